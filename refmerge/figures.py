"""What a report tells of each merged tensor: how long it is, and where it lies among the tensors that it was made of.

They are sums over the entries of what is written, as it is rounded there, and of the inputs, made of each block while it is
in memory: nothing is read again. Sums are those of `group.sum`; where a block is whole rows, the exact sum of what each row
comes to. So block size and threads do not change them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from refmerge.fused import Lazy
from refmerge.group import Asked, Place, Sum
from refmerge.numeric import array_namespace, expansion, host, hosts
from refmerge.selection import flat

__all__ = ["Figures", "part_of"]

DIGITS = 9  # that are told; sums in float32 have seven or eight


def _count(inputs: int, with_base: bool) -> int:
    return 1 + 3 * inputs + 2 * (inputs - 1) * with_base


def _terms(written: Any, inputs: Sequence[Any], with_base: bool) -> Iterator[Any]:
    """The arrays to be summed, in the order in which `Figures.told` reads them. inputs: the models, and last the base."""
    yield written * written
    for x in inputs:
        gap = written - x
        yield from (x * x, x * written, gap * gap)
    if with_base:
        base = inputs[-1]
        tau = written - base
        for x in inputs[:-1]:
            tau_n = x - base
            yield from (tau_n * tau_n, tau_n * tau)


def part_of(place: Place, written: Any, inputs: Sequence[Any], with_base: bool, row: int | None) -> Any:
    """A block's part of its tensor's figures. row: the length of a row, where blocks are whole rows."""
    inputs = [flat(x) for x in inputs]
    if type(written) is Lazy and row is None:  # one program for all
        return Sum.part((), place, list(_terms(written, inputs, with_base)))
    if type(written) is Lazy:
        written, *inputs = hosts([written, *inputs])
    if row is not None:
        return [_of_rows(term, row) for term in _terms(written, inputs, with_base)], []
    made = [Sum.part((), place, [term]) for term in _terms(written, inputs, with_base)]
    cut = [(c[0][0], c[0][1], [array for _, _, (array,) in c]) for c in zip(*(cut for _, cut in made))]
    return [sums for parts, _ in made for sums in parts], cut


def _of_rows(x: Any, row: int) -> list[float]:
    """The exact sum of the sums of rows, which are halved as long as they are long, and from an eighth on in float64."""
    xp = array_namespace(x)
    x = xp.reshape(x, (-1, max(row, 1)))
    width, wide = x.shape[1], max(x.shape[1] // 8, 1)
    while width > 1:
        if width <= wide:
            x = xp.astype(x, xp.float64, copy=False)
        half = width // 2
        low = x[:, :half] + x[:, half : 2 * half]
        if width % 2:
            low[:, 0] += x[:, -1]
        x, width = low, half
    return expansion(host(xp.astype(x, xp.float64)).reshape(-1).tolist())


class Figures:
    """The figures of one tensor, as the parts of its blocks come in. inputs: of how many it is made, the base among them."""

    def __init__(self, size: int, inputs: int, with_base: bool) -> None:
        self._inputs, self._with_base = inputs, with_base
        self._sums = Sum(Asked("sum", _count(inputs, with_base)), size)

    def add(self, place: Place, part: Any) -> None:
        self._sums.merge(place, part)

    def told(self) -> dict[str, Any]:
        """norm: of the tensor as it is written. norms, cosines, distances: of each input, of the angle between it and the
        tensor, and from it to the tensor. task_norms, task_cosines: of what each model changed of the base, and of the angle
        between that and what the tensor changed of it, where there is a base, which is the last input. A number that is not
        finite, or an angle with a vector of zeros, is None."""
        self._sums.end_of_pass()
        sums = self._sums.reply(Place(0, "", 0, 0, 0))
        own, of_inputs, of_models = sums[0], sums[1 : 1 + 3 * self._inputs], sums[1 + 3 * self._inputs :]
        squares, dots, gaps = of_inputs[0::3], of_inputs[1::3], of_inputs[2::3]
        found = {
            "norm": _root(own),
            "norms": [_root(s) for s in squares],
            "cosines": [_cosine(d, s, own) for d, s in zip(dots, squares)],
            "distances": [_root(g) for g in gaps],
        }
        if self._with_base:
            found["task_norms"] = [_root(s) for s in of_models[0::2]]
            found["task_cosines"] = [_cosine(d, s, gaps[-1]) for s, d in zip(of_models[0::2], of_models[1::2])]
        return found


def _root(square: float) -> float | None:
    return _rounded(math.sqrt(square)) if math.isfinite(square) else None


def _cosine(dot: float, square: float, other: float) -> float | None:
    length = math.sqrt(square) * math.sqrt(other) if square >= 0 <= other else math.nan
    return _rounded(min(1.0, max(-1.0, dot / length))) if length > 0 and math.isfinite(dot / length) else None


def _rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")
