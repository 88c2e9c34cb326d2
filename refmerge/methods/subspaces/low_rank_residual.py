import math

import numpy as np

from refmerge.errors import UsageError
from refmerge.matrices import change, decomposed, product
from refmerge.method import method


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
