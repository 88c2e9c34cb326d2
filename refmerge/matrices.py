"""Whole matrices on the host, in float64, and what keeps few copies of them in memory.

A method that decomposes a matrix needs all of it, and the largest one, an embedding, is long and narrow. Such a matrix is
worked on in strips of its rows, over its own memory where the caller needs it no more: LAPACK and products would hold
several copies of all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from array_api_compat import is_numpy_array

from refmerge.numeric import host, like, scores

__all__ = ["change", "decomposed", "less_product", "product", "product_over", "total_scores"]

STRIP = 1 << 12  # entries of a strip at least: a call costs as much as it works on these


def change(a: Any, b: Any) -> np.ndarray:
    """a - b in float64, without a float64 copy of either."""
    return np.subtract(host(a), host(b), dtype=np.float64)


def total_scores(xs: Iterable[Any]) -> np.ndarray:
    """The left fold of x_1 + x_2 + ... in float64, one x at a time."""
    xs = iter(xs)
    result = scores(next(xs))
    for x in xs:
        result += host(x)
    return result


def product(A: np.ndarray, B: np.ndarray, x: Any) -> Any:
    """A B as an array of x's library, dtype, device and shape. Of a long or wide one no more than a strip is there in
    float64, where x is NumPy's."""
    rows, columns = len(A), B.shape[1]
    made = np.empty((rows, columns), x.dtype if is_numpy_array(x) else np.float64)
    for part in _strips(max(rows, columns), min(rows, columns)):
        if rows < columns:
            made[:, part] = A @ B[:, part]
        else:
            made[part] = A[part] @ B
    return like(made.reshape(x.shape), x)


def product_over(A: np.ndarray, B: np.ndarray, X: np.ndarray) -> np.ndarray:
    """A B, written over X, whose first columns A may be, where it has the shape of X."""
    if X.shape != (len(A), B.shape[1]):
        return A @ B
    for part in _strips(*X.shape):
        X[part] = A[part] @ B
    return X


def less_product(R: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """R - A B, written over R."""
    for part in _strips(*R.shape):
        R[part] -= A[part] @ B
    return R


def decomposed(R: np.ndarray, spend: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The thin singular value decomposition: R = U diag(S) V^T, S descending, U turned to its signs.

    The first entry of a column of U that has nearly its largest magnitude, up to a millionth less, is positive. spend: R is
    not needed any more, and may be overwritten.
    """
    if R.shape[0] < R.shape[1]:
        V, S, U = _upright(R.T, spend)
    else:
        U, S, V = _upright(R, spend)
    turn = _signs(U)
    U *= turn
    V *= turn
    return U, S, V


def _upright(R: np.ndarray, spend: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, S, V) of a matrix that is not wider than high. A high one is reduced strip by strip to triangles, and these, one
    upon the other, are decomposed."""
    m, n = R.shape
    parts = _strips(m, n)
    if len(parts) == 1:
        U, S, Vt = np.linalg.svd(R, full_matrices=False)
        return U, S, Vt.T
    U = R if spend else np.empty_like(R)
    triangles = np.empty((len(parts), n, n))
    for part, triangle in zip(parts, triangles):
        U[part], triangle[:] = np.linalg.qr(R[part])
    X, S, V = _upright(triangles.reshape(-1, n), True)
    for part, turn in zip(parts, np.split(X, len(parts))):
        U[part] = U[part] @ turn
    return U, S, V


def _signs(U: np.ndarray) -> np.ndarray:
    """-1 for the columns whose first entry of nearly the largest magnitude is negative; else 1."""
    size = np.maximum(np.max(U, axis=0, initial=0.0), -np.min(U, axis=0, initial=0.0))
    large = ((1 - 1e-6) * size <= U) | (-(1 - 1e-6) * size >= U)
    first = U[np.argmax(large, axis=0), np.arange(U.shape[1])] if U.size else np.ones(U.shape[1])
    return np.where(first < 0, -1.0, 1.0)


def _strips(rows: int, columns: int) -> list[slice]:
    """The rows of a matrix in strips of eight times its width or somewhat more, and of STRIP entries or more; all of them
    where there are not enough for two."""
    count = max(1, rows // max(8 * columns, STRIP // columns)) if columns else 1
    return [slice(i * rows // count, (i + 1) * rows // count) for i in range(count)]
