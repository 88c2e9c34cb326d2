import math

import numpy as np

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import change, product, strips


@method("low_rank_residual", paper="arXiv:2305.18425", view="tensor", models=(1, 1), domain={"rank": (0, math.inf)})
def low_rank_residual(models, base, name, *, rank: int = 8):
    """Low-rank residual: the base and the best approximation of that rank to what fine-tuning changed in each tensor."""
    (theta,) = models
    # 1. residual
    R = as_matrix(change(theta, base))
    # 2. singular value decomposition
    U, S, V = decomposed(finite(R, name), spend=True)
    # 3. truncate
    R_r = product(U[:, :rank], (V[:, :rank] * S[:rank]).T, base)
    # 4. add
    return base + R_r


def as_matrix(x):
    """A tensor as a matrix: what belongs to one index of the first axis is a row; a vector or a number is one row."""
    return x.reshape(x.shape[0], -1 if x.size else math.prod(x.shape[1:])) if x.ndim > 1 else x.reshape(1, -1)


def finite(R, name):
    """R itself. UsageError where it has no singular values."""
    if not np.all(np.isfinite(R)):
        raise UsageError(f"tensor {name!r}: a residual that is infinite or NaN has no singular values; no option allows it")
    return R


def decomposed(R, spend=False):
    """The thin singular value decomposition in float64: R = U diag(S) V^T, S descending, U turned to its signs.

    spend: R is not needed any more, and may be overwritten.
    """
    if R.shape[0] < R.shape[1]:
        V, S, U = upright(R.T, spend)
    else:
        U, S, V = upright(R, spend)
    turn = signs(U)
    U *= turn
    V *= turn
    return U, S, V


def upright(R, spend):
    """(U, S, V) of a matrix that is not wider than high. A high one is reduced strip by strip to triangles, and these, one
    upon the other, are decomposed: LAPACK would hold several copies of all of it."""
    m, n = R.shape
    parts = strips(m, n)
    if len(parts) == 1:
        U, S, Vt = np.linalg.svd(R, full_matrices=False)
        return U, S, Vt.T
    U = R if spend else np.empty_like(R)
    triangles = np.empty((len(parts), n, n))
    for part, triangle in zip(parts, triangles):
        U[part], triangle[:] = np.linalg.qr(R[part])
    X, S, V = upright(triangles.reshape(-1, n), True)
    for part, turn in zip(parts, np.split(X, len(parts))):
        U[part] = U[part] @ turn
    return U, S, V


def signs(U):
    """-1 for the columns whose first entry of nearly the largest magnitude, up to a millionth less, is negative; else 1."""
    size = np.maximum(np.max(U, axis=0, initial=0.0), -np.min(U, axis=0, initial=0.0))
    large = ((1 - 1e-6) * size <= U) | (-(1 - 1e-6) * size >= U)
    first = U[np.argmax(large, axis=0), np.arange(U.shape[1])] if U.size else np.ones(U.shape[1])
    return np.where(first < 0, -1.0, 1.0)
