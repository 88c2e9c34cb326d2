"""MC-SMoE: merged experts as the sum of a product of low rank and of a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.adapters import listed
from refmerge.checkpoint import Checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.experts import FACTORS, Mixture, Output, Rule, dtype_of, find, opened, refused_by_others
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.sources import rounded

__all__ = ["kept_rows", "low_rank", "mc_smoe", "rank_of", "sensitivity"]


@procedure("mc_smoe", paper="arXiv:2310.01334")
def mc_smoe(
    model: Any,
    out: str | Path,
    *,
    ratio: float = 0.15,
    rank_ratio: float | None = None,
    keep: float = 0.1,
    importance: Any = None,
    rule: Rule | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Write each matrix of each expert as L R + S: a product of low rank, and of what is left the most important rows.
    Returns the open checkpoint; `mc_smoe_restore` multiplies out.

    model: a path, an open checkpoint, or a mapping name -> array; best what `msmoe` wrote shared or reduced. out: a folder,
    or a file that ends in .safetensors. Matrices are read one by one.
    """
    model = opened(model)
    for key, value in (("ratio", ratio), ("keep", keep), ("rank_ratio", 0 if rank_ratio is None else rank_ratio)):
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            raise UsageError(f"mc_smoe: {key} = {value!r} is outside [0, 1]")
    mixtures = find(model, rule)
    tensors: Mapping[str, Any] = getattr(model, "tensors", model)
    names = [m.experts[e][part] for m in mixtures.values() for e in range(len(m.experts)) for part in matrices(m)]
    given = None if importance is None else importances(opened(importance), tensors, names)
    dtypes = {name: dtype_of(tensors[name], name) for name in names}
    ranks = {name: rank_of(tensors[name].shape, ratio, rank_ratio) for name in names}
    # 1. importance of each row of what low rank leaves
    rows = given or {name: np.mean(np.abs(split(model, name, ranks[name], dtypes[name])[2]), axis=1) for name in names}
    # 2. the rows that stay, by one threshold for all matrices
    kept = kept_rows(rows, {name: tensors[name].shape[1] for name in names}, keep)
    specs = {n: (dtype_of(x, n), tuple(x.shape)) for n, x in tensors.items() if n not in rows}
    for name in names:
        (m, n), dtype, r = tensors[name].shape, dtypes[name], ranks[name]
        specs |= {f"left/{name}": (dtype, (m, r)), f"right/{name}": (dtype, (r, n))}
        specs |= {f"rows/{name}": ("I32", (len(kept[name]),)), f"sparse/{name}": (dtype, (len(kept[name]), n))}
    config = model.config if isinstance(model, Checkpoint) else None
    files = None if config is None else refused_by_others(config, FACTORS)
    options = {"max_shard_size": max_shard_size, "overwrite": overwrite, "metadata": {FACTORS: "1"}}
    with Output(model, specs, out, files, **options) as output:
        for name in (n for n in tensors if n not in rows):
            output.copy(name)
        for name in names:
            # 3. low rank, 4. the rows
            L, R, S = split(model, name, ranks[name], dtypes[name])
            for side, x in (("left", L), ("right", R), ("sparse", S[kept[name]])):
                output.put(f"{side}/{name}", x)
            output.put(f"rows/{name}", kept[name].astype(np.int32))
            if progress is not None:
                progress(name)
    return output.result


def matrices(mixture: Mixture) -> list[str]:
    """The parts of an expert that are matrices."""
    return [part for part, shape in mixture.shapes.items() if len(shape) == 2]


def rank_of(shape: tuple[int, ...], ratio: float, rank_ratio: float | None = None) -> int:
    """The rank at which L and R have `ratio` as many numbers as the matrix, rounded up, at most the lower side; or the share
    `rank_ratio` of the lower side, rounded up."""
    m, n = shape
    if rank_ratio is not None:
        return math.ceil(min(m, n) * rank_ratio)
    return min(m, n, math.ceil(ratio * (m * n) / (m + n))) if m and n else 0


def low_rank(W: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """L = U sqrt(S) and R = sqrt(S) V^T of the first `rank` singular values, in float64: L R is the nearest of that rank."""
    U, S, Vt = np.linalg.svd(scores(W), full_matrices=False)
    root = np.sqrt(S[:rank])
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def split(model: Mapping[str, Any], name: str, rank: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L and R as they are stored, in `dtype`, and what they leave of the matrix, in float64."""
    W = scores(model[name])
    if not np.isfinite(W).all():
        raise InputError(f"tensor {name!r} has values that are infinite or NaN, and has no singular values")
    L, R = (rounded(x, dtype) for x in low_rank(W, rank))
    return L, R, W - scores(L) @ scores(R)


def importances(given: Mapping[str, Any], tensors: Mapping[str, Any], names: list[str]) -> dict[str, np.ndarray]:
    """name -> a number for each row: as given, or the mean of a row where there is one for each entry. InputError lists what
    is missing, too much, or does not fit."""
    found, wrong = {}, []
    if missing := sorted(set(names) - {*given}):
        wrong.append(f"missing are {listed(missing)}")
    if odd := sorted({*given} - set(names)):
        wrong.append(f"of no expert's matrix are {listed(odd)}")
    for name in (n for n in names if n in given):
        x, shape = scores(given[name]), tuple(tensors[name].shape)
        if x.shape not in (shape, shape[:1]) or not np.isfinite(x).all():
            wrong.append(f"{name} is of shape {list(x.shape)} for {list(shape)}, or not finite")
        found[name] = x.mean(axis=1) if x.ndim == 2 else x
    if wrong:
        raise InputError(f"mc_smoe: importance: {'; '.join(wrong[:6])}")
    return found


def kept_rows(rows: Mapping[str, np.ndarray], widths: Mapping[str, int], keep: float) -> dict[str, np.ndarray]:
    """The rows of each matrix that stay. All entries of all matrices are ranked by the importance of their rows; rows below
    the k-th smallest go, k = int(n (1 - keep)) of n entries. With keep = 0 all go."""
    every = np.concatenate([*rows.values()]) if rows else np.zeros(0)
    counts = np.concatenate([np.full(len(x), widths[name]) for name, x in rows.items()]) if rows else np.zeros(0, int)
    k = int(counts.sum() * (1 - keep))
    threshold = -math.inf if keep else math.inf
    if keep and k:
        order = np.argsort(every, kind="stable")
        threshold = float(every[order[np.searchsorted(np.cumsum(counts[order]), k)]])
    return {name: np.flatnonzero(x >= threshold) for name, x in rows.items()}


def sensitivity(before: np.ndarray | None, weight: np.ndarray, gradient: np.ndarray, *, beta: float = 0.85) -> np.ndarray:
    """LoSparse's importance of each entry after one more step of training: beta times what it was, which is 0 at first, plus
    1 - beta times |w g|. In float64."""
    now = (1 - beta) * np.abs(scores(weight) * scores(gradient))
    return now if before is None else beta * scores(before) + now
