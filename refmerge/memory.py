"""What memory a tensor takes of which a method needs all at once.

What a method's text allocates is the same multiple of the tensor for tensors of the same proportions: it is counted once
on a small one. Beside it stand the inputs, what LAPACK holds for itself, and the result as it is stored.
"""

from __future__ import annotations

import tracemalloc
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from refmerge.checkpoint import itemsize
from refmerge.sources import PIECE, ArraySink, ArraySource
from refmerge.work import Tensor, Work

__all__ = ["of_block", "of_compiled", "of_whole"]

SMALL = 1 << 16  # entries of the tensor on which a method's arrays are counted


def of_block(work: Work, t: Tensor, count: int) -> int:
    """Bytes of a block of so many entries, roughly: inputs as they are read and as they are computed with, temporaries."""
    return count * (8 if t.work == "float64" else 4) * (3 * len(work.read) + 4)


def of_compiled(work: Work, t: Tensor, count: int, sums: bool) -> int:
    """As of_block where a program computes it: inputs and result as they are stored, and, unless sums are all that is asked
    for, two arrays for each model, of which entries are chosen."""
    arrays = 0 if sums else 2 * len(work.models) * 4
    return work.bytes_of(t, count) + count * (itemsize(t.out) + arrays)


def of_whole(work: Work, t: Tensor) -> int:
    """Bytes that the merge of this tensor takes, of view "tensor", beyond its statistics: an estimate."""
    bytes_of = 8 if t.work == "float64" else 4
    inputs = len(work.read) * t.size * bytes_of + work.bytes_of(t, min(t.size, PIECE))
    short, long = sorted(t.rows)
    lapack = 8 * (2 * min(long, 8 * short) + 5 * short) * short
    return int(inputs + _texts(work, t) * t.size + lapack + t.size * itemsize(t.out))


_counts: dict[tuple[Any, ...], float] = {}


def _texts(work: Work, t: Tensor) -> float:
    """Bytes an entry that the method's arrays take where most of them are alive, counted once for each kind of tensor."""
    globs = [v for v in t.params.values() if type(v) is tuple and all(isinstance(glob, str) for glob in v)]
    named = tuple(any(fnmatchcase(t.name, glob) for glob in v) for v in globs)  # then others may be left alone
    kind = (work.method.run, len(work.models), work.base is None, t.rows, len(t.shape), t.work, repr(t.params), named)
    if kind not in _counts:
        try:
            _counts[kind] = _counted(work, t)
        except Exception:  # on what it fails with made-up numbers, the merge itself may not, or says so
            _counts[kind] = float(of_block(work, t, 1))
    return _counts[kind]


def _counted(work: Work, t: Tensor) -> float:
    from refmerge.engine import run

    shape = _smaller(t)
    draw = np.random.default_rng(0)
    dtype = np.dtype("float64" if t.work == "float64" else "float32")
    arrays = [{t.name: draw.standard_normal(shape).astype(dtype)} for _ in range(len(work.models) + 1)]
    sources = [ArraySource(a, "") for a in arrays]
    base = sources[-1] if work.base is not None else None
    # More steps of a descent hold no more.
    few = {k: min(v, 2) if k == "steps" and type(v) is int else v for k, v in t.params.items()}
    small = Tensor(t.name, shape, dtype.name, few)
    trial = Work(work.method, sources[:-1], base, [small], work.over)
    sinks: dict[str, Any] = {o: ArraySink({t.name: ("F64", shape)}, arrays[0][t.name]) for o in work.method.outputs or ("",)}
    run(trial, sinks, elements=SMALL, threads=1)  # what is imported on the way does not count
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    held = []
    try:
        for _ in range(2):  # what other threads allocate meanwhile does not count either
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            run(trial, sinks, elements=SMALL, threads=1)
            held.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        if not tracing:
            tracemalloc.stop()
    return min(held) / small.size


def _smaller(t: Tensor) -> tuple[int, ...]:
    """A shape of about SMALL entries and these proportions, with as many axes."""
    rows, width = t.rows
    scale = max(1.0, (t.size / SMALL) ** 0.5)
    short = max(min(rows, width, 16), round(min(rows, width) / scale))
    long = min(max(rows, width), round(max(rows, width) / min(rows, width) * short), 4 * SMALL // short)
    small = (short, long) if rows <= width else (long, short)
    return (*small, *([1] * (len(t.shape) - 2))) if len(t.shape) > 1 else (small[0] * small[1],)
