"""Exact selection of the k-th largest of arrays that are seen in blocks, and masks of the k largest.

A sample gives a bracket that the answer very likely lies in: one pass counts what is above and holds what is inside. The
answer is exact; if the bracket misses, or too much lies in it, histograms of 16 bits of the floats' bit patterns a pass
narrow it down until few enough candidates are left to hold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.numeric import array_namespace, host, indicator, like

if TYPE_CHECKING:
    from refmerge.group import Place

CANDIDATES = 1 << 22  # so many values are held and sorted; where more are left, histograms divide them further
SAMPLE = 1 << 22  # so many sampled values of an array are worth sorting


def flat(x: Any) -> Any:
    return array_namespace(x).reshape(x, (-1,))


def keys_of(x: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the floats: -0.0 and 0.0 alike, every NaN above infinity."""
    x = x + 0.0
    bits: Any = x.view(np.uint32 if x.dtype == np.float32 else np.uint64)
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    negative = bits >= top
    if negative.any():
        bits = np.where(negative & ~np.isnan(x), ~bits, bits | top)
    else:
        bits = bits | top
    infinity = np.array(np.inf, dtype=x.dtype).view(bits.dtype) | top
    bits[bits > infinity] = ~bits.dtype.type(0)  # all NaN alike, whatever their payload
    return bits


def value_of(key: int, dtype: np.dtype) -> float:
    """The float of a key."""
    width = np.uint32 if dtype == np.float32 else np.uint64
    top = 1 << (8 * np.dtype(width).itemsize - 1)
    bits = key - top if key >= top else ~key & (2 * top - 1)
    return float(np.array(bits, dtype=width).view(dtype)[()])


def kth_largest(x: np.ndarray, k: int) -> float:
    x = x + 0.0
    return float(np.partition(x, x.size - k)[x.size - k])  # a partition puts NaN last


def count_equal(x: np.ndarray, value: float) -> int:
    return int(np.count_nonzero(np.isnan(x) if math.isnan(value) else x == value))


def top_mask(x: Any, k: int, size: int, kth: float, kept: int, tied: int) -> Any:
    """1 where x is above `kth`, and at the first `kept` of the `tied` elements equal to it."""
    xp = array_namespace(x)
    if k <= 0:
        return xp.zeros_like(x)
    if k >= size:
        return xp.ones_like(x)
    if math.isnan(kth):
        above, equal = xp.zeros_like(x, dtype=xp.bool), xp.isnan(x)
    elif kept in (0, tied):
        # NaN is above everything: "not below", where a comparison with NaN would say no.
        return indicator(xp.logical_not(x < kth if kept else x <= kth), like=x)
    else:
        above, equal = xp.logical_not(x <= kth), x == kth
    chosen = host(flat(above)).copy()
    chosen[np.flatnonzero(host(flat(equal)))[:kept]] = True
    return xp.reshape(like(chosen.astype(np.float32), x), tuple(x.shape))


class Selection:
    """State of one exact selection, and what the current pass collects.

    A sample gives a bracket: one pass then counts what lies above it and holds what lies inside. Without a bracket, or
    where it missed, histograms of 16 bits a pass narrow the answer's key until few enough candidates are left to hold.
    """

    def __init__(self, k: int, size: int, ties: bool = False) -> None:
        self.k, self.size, self.ties = k, size, ties
        self.value = math.nan
        self._phase = "done" if ties and not 0 < k < size else "hold" if size <= CANDIDATES // 4 else "histogram"
        self._samples: dict[tuple[str, int], np.ndarray] = {}
        self._low, self._high = -math.inf, math.inf
        self._prefix, self._known = 0, 0  # the leading `known` bits of the answer's key
        self._rank = k  # rank of the answer among the candidates that are left
        self._dtype: np.dtype | None = None
        self._above = 0
        self._histogram: np.ndarray | None = None
        self._held: dict[int, np.ndarray] = {}
        self._held_count = 0
        self._tied: dict[int, int] = {}
        self._kept: dict[int, int] = {}

    def sample(self, place: Place, x: Any) -> None:
        if self._phase == "histogram":
            self._samples[place.tensor, place.start] = np.array(host(x))

    def end_of_samples(self) -> None:
        samples, self._samples = self._samples, {}
        if self._phase != "histogram" or not samples:
            return
        values = np.concatenate([samples[place] for place in sorted(samples)])
        values = values[:: max(1, values.size // SAMPLE)]
        m = values.size
        # Where the answer's rank falls in the sample, give or take eight deviations: neighbours in a tensor are alike.
        centre = self.k / self.size * m
        margin = 8 * math.sqrt(centre * (1 - self.k / self.size)) + 8
        if 2 * margin / m * self.size > CANDIDATES * 3 // 4 or np.isnan(values).any():
            return
        first, last = m - math.ceil(centre + margin), m - math.floor(centre - margin)
        inside = [i for i in (first, last) if 0 <= i < m]
        ordered = np.partition(values, inside) if inside else values
        self._low = float(ordered[first]) if first >= 0 else -math.inf
        self._high = float(ordered[last]) if last < m else math.inf
        self._phase = "bracket"

    def part(self, x: Any) -> Any:
        if self._phase == "done":
            return None
        values = host(x)
        self._dtype = values.dtype
        if self._phase == "ties":
            return count_equal(values, self.value)
        if self._phase == "bracket":
            at_most = values <= self._high  # no for NaN, which is above
            return values.size - int(np.count_nonzero(at_most)), keys_of(values[at_most & (values >= self._low)])
        keys = keys_of(values)
        width = 8 * keys.itemsize
        if self._known:
            keys = keys[keys >> keys.dtype.type(width - self._known) == self._prefix]
        if self._phase == "hold":
            return keys
        shift = keys.dtype.type(width - self._known - 16)
        return np.bincount((keys >> shift & keys.dtype.type(0xFFFF)).astype(np.intp), minlength=1 << 16)

    def merge(self, place: Place, part: Any) -> None:
        if self._phase == "bracket":
            above, keys = part
            self._above += above
            self._held_count += keys.size
            if self._held_count <= CANDIDATES:
                self._held[place.ordinal] = keys
            else:
                self._held = {}
        elif self._phase == "hold":
            self._held[place.ordinal] = part
        elif self._phase == "ties":
            self._tied[place.ordinal] = part
        elif self._phase == "histogram":
            self._histogram = part if self._histogram is None else self._histogram + part

    def end_of_pass(self) -> bool:
        if self._phase == "bracket":
            self._end_bracket()
        elif self._phase == "histogram":
            self._end_histogram()
        elif self._phase == "hold":
            self._end_hold()
        elif self._phase == "ties":
            self._share()
        return self._phase == "done"

    def _end_bracket(self) -> None:
        if self._above < self.k <= self._above + self._held_count and self._held_count <= CANDIDATES:
            self._rank = self.k - self._above
            self._end_hold()
        else:
            self._phase, self._held = "histogram", {}

    def _end_hold(self) -> None:
        keys = np.concatenate(list(self._held.values()))
        key = int(np.partition(keys, keys.size - self._rank)[keys.size - self._rank])
        self._found(key, above=int(np.count_nonzero(keys > key)))
        self._tied = {i: int(np.count_nonzero(held == key)) for i, held in self._held.items()}
        self._held = {}
        self._share()

    def _end_histogram(self) -> None:
        assert self._histogram is not None and self._dtype is not None
        from_top = np.cumsum(self._histogram[::-1])
        i = int(np.searchsorted(from_top, self._rank))
        bin_ = len(self._histogram) - 1 - i
        count = int(self._histogram[bin_])
        self._rank -= int(from_top[i]) - count
        self._prefix = self._prefix << 16 | bin_
        self._known += 16
        self._histogram = None
        if self._known == 8 * self._dtype.itemsize:
            self._found(self._prefix, above=0)
            self._phase = "ties" if self.ties else "done"
        elif count <= CANDIDATES:
            self._phase = "hold"

    def _found(self, key: int, above: int) -> None:
        assert self._dtype is not None
        self.value = value_of(key, self._dtype)
        self._rank -= above  # how many of those equal to the answer are kept

    def _share(self) -> None:
        """Ties go to the lower index: to the blocks in order, until none is left."""
        left = self._rank
        for ordinal in sorted(self._tied):
            self._kept[ordinal] = min(left, self._tied[ordinal])
            left -= self._kept[ordinal]
        self._phase = "done"

    def ties_of(self, place: Place) -> tuple[int, int]:
        """(kept, all) elements of a block that equal the answer."""
        return self._kept.get(place.ordinal, 0), self._tied.get(place.ordinal, 0)
