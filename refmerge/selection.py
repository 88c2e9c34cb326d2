"""Exact selection of the k-th largest of arrays that are seen in blocks, and masks of the k largest.

A sample gives a bracket that the answer very likely lies in: one pass counts what is above and holds what is inside. The
answer is exact; if the bracket misses, or too much lies in it, histograms of 16 bits of the floats' bit patterns a pass
narrow it down until few enough candidates are left to hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.fused import support
from refmerge.numeric import array_namespace, host, indicator, keys_of, like, value_of

if TYPE_CHECKING:
    from refmerge.group import Place

CANDIDATES = 1 << 22  # so many values are held; where more are left, histograms divide them further
SORTED = 1 << 12  # so few keys are sorted; of more, a histogram first tells which
PART = 1 << 18  # keys that are looked at together


def flat(x: Any) -> Any:
    return array_namespace(x).reshape(x, (-1,))


def kth_largest_key(parts: Sequence[np.ndarray], k: int) -> int:
    """The k-th largest (k from 1) of unsigned integers, which come in parts; all that is made of them is as small as a part,
    or as PART of its elements. NumPy's partition alone is six times slower on processors that are slow at storing the chosen
    lanes of a vector."""
    parts = [part[start : start + PART] for part in parts for start in range(0, part.size, PART)]
    while sum(part.size for part in parts) > SORTED:
        low, high = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
        if low == high:
            return low
        dtype = parts[0].dtype.type
        bits = max(0, (high - low).bit_length() - 16)
        counts = np.zeros(((high - low) >> bits) + 1, np.intp)
        for part in parts:
            counts += np.bincount(((part - dtype(low)) >> dtype(bits)).astype(np.intp), minlength=counts.size)
        chosen, above = _bin_of_rank(counts, k)
        parts = [part[(part - dtype(low)) >> dtype(bits) == chosen] for part in parts]
        parts, k = [part for part in parts if part.size], k - above
    keys = np.concatenate(parts)
    return int(np.partition(keys, keys.size - k)[keys.size - k])


def _bin_of_rank(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """(bin that holds the element of this rank from the top, elements in the bins above it)."""
    from_top = np.cumsum(counts[::-1])
    i = int(np.searchsorted(from_top, rank))
    chosen = len(counts) - 1 - i
    return chosen, int(from_top[i] - counts[chosen])


def kth_largest(x: np.ndarray, k: int) -> float:
    return value_of(kth_largest_key([keys_of(x)], k), 8 * x.itemsize)


def count_equal(x: np.ndarray, value: float) -> int:
    return int(np.count_nonzero(np.isnan(x) if math.isnan(value) else x == value))


def _float_of(x: Any) -> Any:
    """NumPy's scalar type of the dtype of an array of any library."""
    return np.float64 if str(x.dtype).endswith("float64") else np.float32


def top_mask(x: Any, k: int, size: int, kth: float, kept: int, tied: int) -> Any:
    """1 where x is above `kth`, and at the first `kept` of the `tied` elements equal to it."""
    xp = array_namespace(x)
    if k <= 0:
        return xp.zeros_like(x)
    if k >= size:
        return xp.ones_like(x)
    if math.isnan(kth):
        above, equal = xp.zeros_like(x, dtype=xp.bool), xp.isnan(x)
    elif kept in (0, tied) and kth < math.inf:
        # NaN is above everything: "not below", where a comparison with NaN would say no.
        bound = kth if kept else float(np.nextafter(_float_of(x)(kth), np.inf))
        return indicator(xp.logical_not(x < bound), like=x)
    else:
        above, equal = xp.logical_not(x <= kth), x == kth
    chosen = host(flat(above)).copy()
    chosen[np.flatnonzero(host(flat(equal)))[:kept]] = True
    return xp.reshape(like(chosen.astype(np.float32), x), tuple(x.shape))


@dataclass(frozen=True, slots=True)
class Want:
    """What a selection asks of every block in one pass.

    "hold": all keys, or those with a prefix; "bracket": the keys of what lies inside, with its ends only counted, and how
    many lie above; "histogram": counts of the next 16 bits of the keys with a prefix; "ties": how many equal a value;
    "done": nothing.
    """

    phase: str
    low: int = 0  # keys of the bracket's ends
    high: int = 0
    prefix: int = 0
    known: int = 0  # leading bits of the key that are known
    value: float = math.nan

    def part(self, values: np.ndarray, compiled: bool = False) -> Any:
        """This block's part of the answer."""
        if self.phase == "done":
            return None
        if self.phase == "ties":
            return count_equal(values, self.value)
        if self.phase == "bracket":
            low, high = (values.dtype.type(value_of(key, 8 * values.itemsize)) for key in (self.low, self.high))
            found = support.between(values, low, high) if compiled else None
            if found is None:
                at_most = values <= high  # no for NaN, which is above
                above = values.size - int(np.count_nonzero(at_most))
                found = above, values[at_most & (values >= low)]
            above, inside = found
            keys = keys_of(inside)
            at_high = int(np.count_nonzero(keys == self.high))
            inside = keys[(keys > self.low) & (keys < self.high)]
            return above, at_high, inside, keys.size - at_high - inside.size
        keys = keys_of(values)
        width = 8 * keys.itemsize
        if self.known:
            keys = keys[keys >> keys.dtype.type(width - self.known) == self.prefix]
        if self.phase == "hold":
            return keys
        shift = keys.dtype.type(width - self.known - 16)
        return width, np.bincount((keys >> shift & keys.dtype.type(0xFFFF)).astype(np.intp), minlength=1 << 16)


def first_want(k: int, size: int, ties: bool) -> Want:
    """What a selection asks before anything is known."""
    return Want("done" if ties and not 0 < k < size else "hold" if size <= CANDIDATES // 32 else "histogram")




class Selection:
    """State of one exact selection: what it wants of the blocks in the current pass, and what it has of them."""

    def __init__(self, k: int, size: int, ties: bool = False) -> None:
        self.k, self.size, self.ties = k, size, ties
        self.value = math.nan
        self.want = first_want(k, size, ties)
        self._samples: list[np.ndarray] = []
        self._rank = k  # rank of the answer among the candidates that are left
        self._width = 32  # bits of a key
        self._above = 0
        self._at_low: dict[int, int] = {}  # how many of a block equal an end of the bracket
        self._at_high: dict[int, int] = {}
        self._histogram: np.ndarray | None = None
        self._held: dict[int, np.ndarray] = {}
        self._held_count = 0
        self._tied: dict[int, int] = {}
        self._kept: dict[int, int] = {}

    def add_sample(self, keys: np.ndarray) -> None:
        if self.want.phase == "histogram":
            self._samples.append(keys)

    def end_of_samples(self) -> None:
        samples, self._samples = self._samples, []
        if self.want.phase != "histogram" or not samples:
            return
        m, width = sum(keys.size for keys in samples), samples[0].itemsize
        # Where the answer's rank falls in the sample, give or take eight deviations: neighbours in a tensor are alike.
        centre = self.k / self.size * m
        margin = 8 * math.sqrt(centre * (1 - self.k / self.size)) + 8
        if 2 * margin / m * self.size > CANDIDATES * 3 // 4:
            return
        first, last = math.floor(centre - margin), math.ceil(centre + margin)
        finite = keys_of(np.array([-np.inf, np.inf], dtype=f"f{width}")).tolist()
        low = kth_largest_key(samples, last) if last <= m else finite[0]
        high = kth_largest_key(samples, first) if first >= 1 else finite[1]
        if high <= finite[1]:  # a sampled NaN is above everything
            self.want = Want("bracket", low, high)

    def merge(self, place: Place, part: Any) -> None:
        phase = self.want.phase
        if phase == "bracket":
            above, at_high, keys, at_low = part
            self._above += above
            self._at_high[place.ordinal], self._at_low[place.ordinal] = at_high, at_low
            self._held_count += keys.size
            if self._held_count <= CANDIDATES:
                self._hold(place, keys)
            else:
                self._held = {}
        elif phase == "hold":
            self._hold(place, part)
        elif phase == "ties":
            self._tied[place.ordinal] = part
        elif phase == "histogram":
            width, counts = part
            self._width = width
            self._histogram = counts if self._histogram is None else self._histogram + counts

    def _hold(self, place: Place, keys: np.ndarray) -> None:
        self._width = 8 * keys.itemsize
        self._held[place.ordinal] = keys

    def end_of_pass(self) -> bool:
        phase = self.want.phase
        if phase == "bracket":
            self._end_bracket()
        elif phase == "histogram":
            self._end_histogram()
        elif phase == "hold":
            self._end_hold()
        elif phase == "ties":
            self._share()
        return self.want.phase == "done"

    def _end_bracket(self) -> None:
        rank = self.k - self._above  # from the bracket's upper end
        at_high, at_low = sum(self._at_high.values()), sum(self._at_low.values())
        if 0 < rank <= at_high:
            self._end_at(self.want.high, rank, self._at_high)
        elif 0 < rank - at_high <= self._held_count <= CANDIDATES:
            self._rank = rank - at_high
            self._end_hold()
        elif 0 < rank - at_high - self._held_count <= at_low:
            self._end_at(self.want.low, rank - at_high - self._held_count, self._at_low)
        else:
            self.want, self._held = Want("histogram"), {}

    def _end_at(self, key: int, rank: int, tied: dict[int, int]) -> None:
        """The answer is an end of the bracket, of which each block has counted its own."""
        self._rank, self._tied, self._held = rank, tied, {}
        self._found(key, above=0)
        self._share()

    def _end_hold(self) -> None:
        key = kth_largest_key(list(self._held.values()), self._rank)
        self._found(key, above=sum(int(np.count_nonzero(keys > key)) for keys in self._held.values()))
        self._tied = {i: int(np.count_nonzero(held == key)) for i, held in self._held.items()}
        self._held = {}
        self._share()

    def _end_histogram(self) -> None:
        assert self._histogram is not None
        chosen, above = _bin_of_rank(self._histogram, self._rank)
        count = int(self._histogram[chosen])
        self._rank -= above
        self._histogram = None
        prefix, known = self.want.prefix << 16 | chosen, self.want.known + 16
        if known == self._width:
            self._found(prefix, above=0)
            self.want = Want("ties" if self.ties else "done", value=self.value)
        else:
            self.want = Want("hold" if count <= CANDIDATES else "histogram", prefix=prefix, known=known)

    def _found(self, key: int, above: int) -> None:
        self.value = value_of(key, self._width)
        self._rank -= above  # how many of those equal to the answer are kept

    def _share(self) -> None:
        """Ties go to the lower index: to the blocks in order, until none is left."""
        left = self._rank
        for ordinal in sorted(self._tied):
            self._kept[ordinal] = min(left, self._tied[ordinal])
            left -= self._kept[ordinal]
        self.want = Want("done")

    def ties_of(self, place: Place) -> tuple[int, int]:
        """(kept, all) elements of a block that equal the answer."""
        return self._kept.get(place.ordinal, 0), self._tied.get(place.ordinal, 0)
