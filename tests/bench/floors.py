"""The least that a merge on NumPy must take: what it moves, at a plain copy's speed, and the work that no rewriting avoids.

    floor = (bytes read + bytes written) / bandwidth of the copy + unavoidable work / threads

The bytes are those that `refmerge merge --json` reports: of tensors, in all passes that it made. The copy is one thread's,
and a merge by several can read faster: a ratio to the floor below 1 is possible where there is little but moving. The work
is timed on one core, on a sample of random numbers, without any preparation of the operands, and multiplied up:

    dare_linear, dare_ties   16 bits for each parameter of each model, by `random_raw` of NumPy's Philox
    della                    the same, and the ordering of each row of each model, at the rows' widths, by the fastest of:
                             `np.sort` of the float32 values; of uint64 keys that hold a value and its place; two stable
                             `np.argsort` of uint16, the lower and the upper halves of the values. Vectors are left out.
                             Code that needs but one such argsort, where 16 bits tell neighbours apart, can beat this.
    ties, breadcrumbs        for each parameter of each model two comparisons, with the ends of a bracket, and counts of
                             what is above and what is inside
    widen                    two rankings for each matrix of each model: `np.argsort` of a float64 for each column
    all others               nothing

With --cold all passes count at the speed of a copy from the disk, though only the first one comes from there.

What decomposes matrices has a benchmark of its own, `tests.bench.decompositions`. Arithmetic, conversions and the
interpreter's start count as avoidable.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from tests.bench.data import EMBEDDING, Shapes, elements

SAMPLE = 1 << 20  # elements that are sorted for each width
BLOCK = 1 << 16
REPEATS = 3


def seconds(f: Callable[[], object]) -> float:
    """The least of a few calls: whatever disturbs one is no part of a floor."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return min(taken)


def magnitudes(*shape: int) -> np.ndarray:
    return np.abs(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def row_widths(tensors: Shapes) -> dict[int, int]:
    """Width of a row -> elements in rows of that width. Vectors, which are few, are left out."""
    found: dict[int, int] = {}
    for name, shape in tensors.items():
        if len(shape) > 1:
            found[shape[-1]] = found.get(shape[-1], 0) + elements({name: shape})
    return found


def column_counts(tensors: Shapes) -> dict[int, int]:
    """Columns of a matrix -> matrices with so many; the embedding's columns are its tokens."""
    found: dict[int, int] = {}
    for name, shape in tensors.items():
        if len(shape) == 2:
            columns = shape[0] if name == EMBEDDING else shape[1]
            found[columns] = found.get(columns, 0) + 1
    return found


def ordering(width: int) -> float:
    """Seconds for an element, in rows of this width."""
    values = magnitudes(max(1, SAMPLE // width), width)
    bits = values.view(np.uint32)
    packed = (bits.astype(np.uint64) << np.uint64(32)) | np.arange(width, dtype=np.uint64)
    lower, upper = bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)

    def digits() -> None:
        np.argsort(lower, axis=1, kind="stable")
        np.argsort(upper, axis=1, kind="stable")

    ways = (lambda: np.sort(values, axis=1), lambda: np.sort(packed, axis=1), digits)
    return min(map(seconds, ways)) / values.size


def orderings(tensors: Shapes, models: int) -> float:
    return models * sum(count * ordering(width) for width, count in row_widths(tensors).items())


def draws(tensors: Shapes, models: int) -> float:
    generator, blocks = np.random.Philox(0), 16
    taken = seconds(lambda: [generator.random_raw(BLOCK // 4) for _ in range(blocks)])  # four draws in a word
    return models * elements(tensors) * taken / (blocks * BLOCK)


def selections(tensors: Shapes, models: int) -> float:
    values, blocks = magnitudes(BLOCK), 16
    low, high = np.quantile(values, [0.49, 0.51]).astype(np.float32)
    at_most, at_least = np.empty(BLOCK, bool), np.empty(BLOCK, bool)

    def select() -> None:
        for _ in range(blocks):
            np.less_equal(values, high, out=at_most)
            np.count_nonzero(at_most)
            np.greater_equal(values, low, out=at_least)
            np.logical_and(at_most, at_least, out=at_most)
            np.count_nonzero(at_most)

    taken = seconds(select)
    return models * elements(tensors) * taken / (blocks * BLOCK)


def rankings(tensors: Shapes, models: int) -> float:
    taken = 0.0
    for columns, matrices in column_counts(tensors).items():
        changes = magnitudes(columns).astype(np.float64)
        taken += 2 * matrices * seconds(partial(np.argsort, changes))
    return models * taken


UNAVOIDABLE: dict[str, tuple[Callable[[Shapes, int], float], ...]] = {
    "dare_linear": (draws,),
    "dare_ties": (draws,),
    "della": (draws, orderings),
    "ties": (selections,),
    "breadcrumbs": (selections,),
    "widen": (rankings,),
}


def floor(method: str, tensors: Shapes, *, models: int, moved: int, bandwidth: float, threads: int) -> float:
    """Seconds; `moved` in bytes, `bandwidth` in bytes a second."""
    work = sum(part(tensors, models) for part in UNAVOIDABLE.get(method, ()))
    return moved / bandwidth + work / threads
