import math

import numpy as np

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import like, scores


@method("low_rank_residual", paper="arXiv:2305.18425", view="tensor", models=(1, 1), domain={"rank": (0, math.inf)})
def low_rank_residual(models, base, name, *, rank: int = 8):
    """Low-rank residual: the base and the best approximation of that rank to what fine-tuning changed in each tensor."""
    (theta,) = models
    # 1. residual
    R = as_matrix(scores(theta) - scores(base))
    # 2. singular value decomposition
    U, S, V = decomposed(finite(R, name))
    # 3. truncate
    R_r = (U[:, :rank] * S[:rank]) @ V[:, :rank].T
    # 4. add
    return base + like(R_r.reshape(base.shape), base)


def as_matrix(x):
    """A tensor as a matrix: what belongs to one index of the first axis is a row; a vector or a number is one row."""
    return x.reshape(x.shape[0], -1 if x.size else math.prod(x.shape[1:])) if x.ndim > 1 else x.reshape(1, -1)


def finite(R, name):
    """R itself. UsageError where it has no singular values."""
    if not np.all(np.isfinite(R)):
        raise UsageError(f"tensor {name!r}: a residual that is infinite or NaN has no singular values; no option allows it")
    return R


def decomposed(R):
    """The thin singular value decomposition in float64: R = U diag(S) V^T, S descending, U turned to its signs."""
    U, S, Vt = np.linalg.svd(R, full_matrices=False)
    turn = signs(U)
    U *= turn
    Vt *= turn[:, None]
    return U, S, Vt.T


def signs(U):
    """-1 for the columns whose first entry of nearly the largest magnitude, up to a millionth less, is negative; else 1."""
    size = np.abs(U)
    large = size >= (1 - 1e-6) * np.max(size, axis=0, initial=0.0)
    first = U[np.argmax(large, axis=0), np.arange(U.shape[1])] if U.size else np.ones(U.shape[1])
    return np.where(first < 0, -1.0, 1.0)
