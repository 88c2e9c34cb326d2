"""Random draws that are a function of (seed, tensor, model, element): the same in every block, thread and library.

Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as NumPy has it. The key is the
first sixteen bytes of SHA-256(seed as 8 bytes, model as 4 bytes, little endian, then the tensor's name in UTF-8). Each
element has a string of 16-bit digits d_0 d_1 d_2 ... behind the binary point of a number in [0, 1): digit j of element e is
one sixteenth of the block with counter (e // 16, j, 0, 0), whose four words are read as sixteen digits, lowest bits first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_api_compat import device, is_numpy_array, is_torch_array

from refmerge.errors import InputError, UsageError
from refmerge.fused import Lazy, support
from refmerge.numeric import array_namespace, host, like

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # what the key grows by from round to round
ROUNDS = 10
LOW = 0xFFFFFFFF
WORD = (1 << 64) - 1
PER_BLOCK = 16  # digits in the 256 bits of one counter
DIGITS = 5  # 80 bits: every float p >= 2**-27 is compared exactly


def philox(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int, int, int]:
    """The block of one counter (its two high words are 0), in Python integers."""
    x = [*counter, 0, 0]
    for r in range(ROUNDS):
        a, b = MULTIPLIERS[0] * x[0], MULTIPLIERS[1] * x[2]
        k = [(key[i] + r * WEYL[i]) & WORD for i in (0, 1)]
        x = [b >> 64 ^ x[1] ^ k[0], b & WORD, a >> 64 ^ x[3] ^ k[1], a & WORD]
    return x[0], x[1], x[2], x[3]


def key_for(seed: int, name: str, model: int) -> tuple[int, int]:
    """The two key words for one tensor of one model."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + model.to_bytes(4, "little") + name.encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def digits_numpy(key: tuple[int, int], start: int, stop: int, j: int, compiled: bool = False) -> np.ndarray:
    """Digit j of the elements [start, stop), uint16, by NumPy's own generator or, where it is there, a compiled one."""
    first, last = start // PER_BLOCK, -(-stop // PER_BLOCK)
    if compiled and (words := support.philox(key, first, j, last - first)) is not None:
        return words.astype("<u8", copy=False).view("<u2")[start - PER_BLOCK * first : stop - PER_BLOCK * first]
    before = ((j << 64) + first - 1) % (1 << 256)  # the generator counts up before it draws
    words = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=_words(before)).random_raw(4 * (last - first))
    return words.astype("<u8", copy=False).view("<u2")[start - PER_BLOCK * first : stop - PER_BLOCK * first]


def _words(number: int) -> np.ndarray:
    return np.array([number >> 64 * i & WORD for i in range(4)], dtype=np.uint64)


def _digit_of(key: tuple[int, int], element: int, j: int) -> int:
    """Digit j of a single element."""
    words = philox(key, (element // PER_BLOCK, j))
    return words[element % PER_BLOCK // 4] >> 16 * (element % 4) & 0xFFFF


def _times(m: int, high: Any, low: Any) -> tuple[Any, Any, Any, Any]:
    """m times a 64-bit word, as four 32-bit words from the highest. All are int64 lanes of 32 significant bits, since torch
    has no unsigned arithmetic; products are of 16 by 32 bits, which cannot overflow."""
    limbs = [m >> 16 * i & 0xFFFF for i in range(4)]

    def by(word: Any) -> tuple[Any, Any, Any]:
        """m times a 32-bit word: its three 32-bit words from the lowest."""
        a, b, c, d = (word * limb for limb in limbs)
        t = a + ((b & 0xFFFF) << 16)
        u = (t >> 32) + (b >> 16) + c + ((d & 0xFFFF) << 16)
        return t & LOW, u & LOW, (u >> 32) + (d >> 16)

    l0, l1, l2 = by(low)
    h0, h1, h2 = by(high)
    t = l1 + h0
    u = (t >> 32) + l2 + h1
    return (u >> 32) + h2, u & LOW, t & LOW, l0


def digits(key: tuple[int, int], start: int, stop: int, j: int, xp: Any, where: Any) -> Any:
    """Digit j of the elements [start, stop) in int64, in any array library."""
    first, last = start // PER_BLOCK, -(-stop // PER_BLOCK)
    counter = xp.arange(first, last, dtype=xp.int64, device=where)
    zero = xp.zeros_like(counter)
    # Each word as (high, low) half.
    x = [(counter >> 32, counter & LOW), (zero, zero + j), (zero, zero), (zero, zero)]
    for r in range(ROUNDS):
        k = [(key[i] + r * WEYL[i]) & WORD for i in (0, 1)]
        a, b = _times(MULTIPLIERS[0], *x[0]), _times(MULTIPLIERS[1], *x[2])
        x = [
            (b[0] ^ x[1][0] ^ (k[0] >> 32), b[1] ^ x[1][1] ^ (k[0] & LOW)),
            (b[2], b[3]),
            (a[0] ^ x[3][0] ^ (k[1] >> 32), a[1] ^ x[3][1] ^ (k[1] & LOW)),
            (a[2], a[3]),
        ]
    halves = [half for high, low in x for half in (low, high)]
    lanes = xp.stack([part for half in halves for part in (half & 0xFFFF, half >> 16)], axis=1)
    return xp.reshape(lanes, (-1,))[start - PER_BLOCK * first : stop - PER_BLOCK * first]


def _below(x: np.ndarray, limit: int) -> bool:
    return bool(x.size and x.min() >= 0 and x.max() < limit)


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
        return is_numpy_array(x) or type(x) is Lazy or (is_torch_array(x) and x.device.type == "cpu")

    def keep(self, p: Any, model: int) -> Any:
        """0/1 in the block's shape, 1 with probability p: a number, an array of the block's shape, or a function that makes
        one and is called only where the mask is to be drawn, being neither recorded nor remembered.

        An element is 1 exactly if its digits d_0 d_1 ... as a binary fraction are less than p.
        """
        if self._recorded is not None:
            if model not in self._recorded:
                raise InputError(f"no recorded draw for tensor {self._name!r} of model {model} in stats")
            return self._recorded[model]
        key = key_for(self._seed, self._name, model)
        if self._on_numpy():
            mask = self._remembered(key, p)
            return like(mask.reshape(tuple(self._like.shape)), self._like)
        xp, where = array_namespace(self._like), device(self._like)
        start, stop = self._span()
        p = p() if callable(p) else p
        number = isinstance(p, float | int)
        rest = float(p) if number else xp.astype(xp.reshape(p, (-1,)), xp.float64)
        smaller = xp.zeros((stop - start,), dtype=xp.bool, device=where)
        open_ = xp.ones((stop - start,), dtype=xp.bool, device=where)
        for j in range(DIGITS):
            if number and not rest:  # no digit is below those that are left
                break
            rest = rest * 65536.0
            limit = float(math.floor(rest)) if number else xp.floor(rest)
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
            return np.unpackbits(packed, count=stop - start).view(bool)
        mask = self._keep_numpy(key, p)
        self._memo.put(place, mask)
        return mask

    def _keep_numpy(self, key: tuple[int, int], p: Any) -> np.ndarray:
        start, stop = self._span()
        p = p() if callable(p) else p
        p = p if isinstance(p, float | int) else host(p).reshape(-1)
        d = digits_numpy(key, start, stop, 0, type(self._like) is Lazy)
        rest = p * 65536.0
        # Integers, and 16-bit ones where they fit: a float would widen every digit to float64 before it is compared.
        limit: Any = int(rest) if np.ndim(rest) == 0 else rest.astype(np.uint16 if _below(rest, 65536) else np.int32)
        mask = d < limit
        tied = np.flatnonzero(d == limit)
        at_ties = (lambda x: x) if np.ndim(p) == 0 else (lambda x: x[tied].astype(np.float64))
        rest = at_ties(rest) - at_ties(limit)
        for j in range(1, DIGITS):
            if tied.size == 0 or not np.any(rest):
                break
            rest = rest * 65536.0
            limit = np.floor(rest)
            rest = rest - limit
            d = np.array([_digit_of(key, start + int(e), j) for e in tied], dtype=np.uint16)
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
