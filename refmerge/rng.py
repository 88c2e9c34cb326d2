"""Random draws that are a function of (seed, tensor, model, element): the same in every block, thread and library.

Threefry-2x32-20 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the first eight bytes
of SHA-256(seed as 8 bytes, model as 4 bytes, little endian, then the tensor's name in UTF-8). Each element has a string of
16-bit digits d_0 d_1 d_2 ... behind the binary point of a number in [0, 1): digit j of element e is 16 bits of the block
with counter (e // 4, j): x0 low, x0 high, x1 low, x1 high for e % 4 = 0, 1, 2, 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_array, is_torch_array

from refmerge.errors import InputError, UsageError
from refmerge.numeric import like

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = 0x1BD11BDA
MASK = 0xFFFFFFFF
DIGITS = 5  # 80 bits: every float p >= 2**-27 is compared exactly


def threefry(key: tuple[int, int], x0: Any, x1: Any) -> tuple[Any, Any]:
    """Twenty rounds on counters in int64 lanes with 32 significant bits (torch has no unsigned arithmetic)."""
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x0, x1 = (x0 + keys[0]) & MASK, (x1 + keys[1]) & MASK
    for i in range(5):
        for r in ROTATIONS[4 * (i % 2) : 4 * (i % 2) + 4]:
            x0 = (x0 + x1) & MASK
            x1 = (((x1 << r) & MASK) | (x1 >> (32 - r))) ^ x0
        x0 = (x0 + keys[(i + 1) % 3]) & MASK
        x1 = (x1 + (keys[(i + 2) % 3] + i + 1 & MASK)) & MASK
    return x0, x1


def _threefry_numpy(key: tuple[int, int], x0: np.ndarray, x1: np.ndarray) -> None:
    """The same in place on uint32, which wraps by itself: five times as fast."""
    keys = np.array((*key, key[0] ^ key[1] ^ PARITY), dtype=np.uint32)
    spare = np.empty_like(x0)
    np.add(x0, keys[0], out=x0)
    np.add(x1, keys[1], out=x1)
    for i in range(5):
        for r in ROTATIONS[4 * (i % 2) : 4 * (i % 2) + 4]:
            np.add(x0, x1, out=x0)
            np.left_shift(x1, np.uint32(r), out=spare)
            np.right_shift(x1, np.uint32(32 - r), out=x1)
            np.bitwise_or(x1, spare, out=x1)
            np.bitwise_xor(x1, x0, out=x1)
        np.add(x0, keys[(i + 1) % 3], out=x0)
        np.add(x1, np.uint32((int(keys[(i + 2) % 3]) + i + 1) & MASK), out=x1)


def key_for(seed: int, name: str, model: int) -> tuple[int, int]:
    """The two key words for one tensor of one model."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + model.to_bytes(4, "little") + name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


STRIP = 1 << 14  # counters at a time: two words and a spare stay in the first cache levels


def digits_numpy(key: tuple[int, int], start: int, stop: int, j: int) -> np.ndarray:
    """Digit j of the elements [start, stop), uint16."""
    first, last = start // 4, -(-stop // 4)
    words = np.empty((last - first, 2), dtype="<u4")
    for at in range(first, last, STRIP):
        x0 = np.arange(at, min(at + STRIP, last), dtype=np.int64).astype(np.uint32)
        x1 = np.full_like(x0, j)
        _threefry_numpy(key, x0, x1)
        words[at - first : at - first + len(x0), 0] = x0
        words[at - first : at - first + len(x0), 1] = x1
    return words.reshape(-1).view("<u2")[start - 4 * first : stop - 4 * first]


def digits(key: tuple[int, int], start: int, stop: int, j: int, xp: Any, where: Any) -> Any:
    """Digit j of the elements [start, stop) in int64, in any array library."""
    first, last = start // 4, -(-stop // 4)
    x0 = xp.arange(first, last, dtype=xp.int64, device=where) & MASK
    x0, x1 = threefry(key, x0, xp.full((last - first,), j, dtype=xp.int64, device=where))
    lanes = xp.stack([x0 & 0xFFFF, x0 >> 16, x1 & 0xFFFF, x1 >> 16], axis=1)
    return xp.reshape(lanes, (-1,))[start - 4 * first : stop - 4 * first]


class Memo:
    """Masks drawn in one pass, a bit an element, for the next pass over the same blocks; as many as `budget` bytes hold."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._masks: dict[tuple[Any, ...], np.ndarray] = {}

    def get(self, key: tuple[Any, ...]) -> np.ndarray | None:
        return self._masks.get(key)

    def put(self, key: tuple[Any, ...], mask: np.ndarray) -> None:
        if mask.size // 8 < self._budget:
            self._budget -= mask.size // 8
            self._masks[key] = np.packbits(mask)


class Rng:
    """The draws of one block: `keep` and `uniform`, or an implementation's recorded draws in their place.

    like: an array of the block, for its shape, library, dtype and device; start: its first element in the tensor.
    recorded: per model the block's recorded 0/1 draws, or None where this merge draws its own. memo: of the group that the
    block belongs to, where it comes more than once.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        start: int,
        like: Any,
        recorded: Mapping[int, Any] | None = None,
        memo: Memo | None = None,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise UsageError(f"seed {seed} is outside [0, 2**64)")
        self._seed, self._name, self._start, self._like, self._recorded = seed, name, start, like, recorded
        self._memo, self._calls = memo, 0

    def _span(self) -> tuple[int, int]:
        size = 1
        for s in self._like.shape:
            size *= s
        return self._start, self._start + size

    def _on_numpy(self) -> bool:
        x = self._like
        return is_numpy_array(x) or (is_torch_array(x) and x.device.type == "cpu")

    def keep(self, p: Any, model: int) -> Any:
        """0/1 in the block's shape, 1 with probability p: a number, or an array of the block's shape.

        An element is 1 exactly if its digits d_0 d_1 ... as a binary fraction are less than p.
        """
        if self._recorded is not None:
            if model not in self._recorded:
                raise InputError(f"no recorded draw for tensor {self._name!r} of model {model} in stats")
            return self._recorded[model]
        key = key_for(self._seed, self._name, model)
        if self._on_numpy():
            mask = self._remembered(
                key, p if isinstance(p, float | int) else np.asarray(p, dtype=np.float64).reshape(-1)
            )
            return like(mask.reshape(tuple(self._like.shape)), self._like)
        xp, where = array_namespace(self._like), device(self._like)
        start, stop = self._span()
        if isinstance(p, float | int):
            rest = xp.full((stop - start,), float(p), dtype=xp.float64, device=where)
        else:
            rest = xp.astype(xp.reshape(p, (-1,)), xp.float64)
        smaller = xp.zeros((stop - start,), dtype=xp.bool, device=where)
        open_ = xp.ones((stop - start,), dtype=xp.bool, device=where)
        for j in range(DIGITS):
            rest = rest * 65536.0
            limit = xp.floor(rest)
            rest = rest - limit
            d = xp.astype(digits(key, start, stop, j, xp, where), xp.float64)
            smaller = smaller | (open_ & (d < limit))
            open_ = open_ & (d == limit)
        return xp.astype(xp.reshape(smaller, tuple(self._like.shape)), self._like.dtype)

    def _remembered(self, key: tuple[int, int], p: Any) -> np.ndarray:
        """The mask of this call, which is the same in every pass: a method asks the same in each of them."""
        if self._memo is None:
            return self._keep_numpy(key, p)
        start, stop = self._span()
        self._calls += 1
        place = (self._name, start, stop, self._calls)
        packed = self._memo.get(place)
        if packed is not None:
            return np.unpackbits(packed, count=stop - start)
        mask = self._keep_numpy(key, p)
        self._memo.put(place, mask)
        return mask

    def _keep_numpy(self, key: tuple[int, int], p: Any) -> np.ndarray:
        start, stop = self._span()
        d = digits_numpy(key, start, stop, 0)
        rest = p * 65536.0
        # A Python integer compares with uint16 as uint16; a float would widen every digit to float64 first.
        limit: Any = int(rest) if np.ndim(rest) == 0 else np.floor(rest)
        rest = rest - limit
        mask = d < limit
        tied = np.flatnonzero(d == limit)
        for j in range(1, DIGITS):
            rest = (rest if np.ndim(p) == 0 else rest[tied] if j == 1 else rest) * 65536.0
            if tied.size == 0 or not np.any(rest):
                break
            limit = np.floor(rest)
            rest = rest - limit
            at = tied + start
            d = _digits_at(key, at, j)
            mask[tied] = d < limit
            still = d == limit
            tied = tied[still]
            rest = rest if np.ndim(p) == 0 else rest[still]
        return mask

    def uniform(self, model: int) -> Any:
        """Numbers in [0, 1) in the block's shape: the first 24 bits of each element's digits in float32, 53 in float64."""
        key = key_for(self._seed, self._name, model)
        start, stop = self._span()
        xp, where = array_namespace(self._like), device(self._like)
        if self._on_numpy():
            d = [digits_numpy(key, start, stop, j).astype(np.float64) for j in range(4)]
        else:
            d = [xp.astype(digits(key, start, stop, j, xp, where), xp.float64) for j in range(4)]
        floor = np.floor if self._on_numpy() else xp.floor
        if self._like.dtype == xp.float64:
            u = d[0] * 2.0**-16 + d[1] * 2.0**-32 + d[2] * 2.0**-48 + floor(d[3] * 2.0**-11) * 2.0**-53
        else:
            u = d[0] * 2.0**-16 + floor(d[1] * 2.0**-8) * 2.0**-24
        u = u.reshape(tuple(self._like.shape)) if self._on_numpy() else xp.reshape(u, tuple(self._like.shape))
        return like(u, self._like) if self._on_numpy() else xp.astype(u, self._like.dtype)


def _digits_at(key: tuple[int, int], elements: np.ndarray, j: int) -> np.ndarray:
    """Digit j of single elements, uint16."""
    x0 = (elements // 4).astype(np.uint32)
    x1 = np.full_like(x0, j)
    _threefry_numpy(key, x0, x1)
    words = np.where(elements % 4 < 2, x0, x1)
    return np.where(elements % 2 == 0, words & np.uint32(0xFFFF), words >> np.uint32(16)).astype(np.uint16)
