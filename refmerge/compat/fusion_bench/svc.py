from typing import Literal

import numpy as np

from refmerge.compat.official.svc import projected
from refmerge.matrices import decomposed
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import like, scores


@method(
    "fusion_bench:svc",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/singular_value_calibration/utils.py",
    models=(2, None),
    view=whole_matrices,
)
def svc(models, base, name, *, alpha: float = 0.1, implementation: Literal["accelerated", "original"] = "accelerated"):
    """The merged model comes first, and every matrix is calibrated. The original one divides squares by themselves, also
    where they are zero."""
    merged, *tasks = models
    # 1. keep what is no matrix
    if base.ndim != 2:
        return merged
    # 2. singular value decomposition of the merged change
    M = finite(scores(merged) - scores(base), name)
    U, S, V = decomposed(M)
    # 3. how often each task is in it
    project = projected if implementation == "accelerated" else exactly
    s = np.stack([project(U, M, finite(scores(theta_i) - scores(base), name)) for theta_i in tasks])
    # 4. calibrate
    gamma = len(tasks) / np.sum(np.where(s > alpha, s, alpha), axis=0)
    # 5. merge
    return base + like((U * (gamma * S)) @ V.T, base)


def exactly(U, M, Delta):
    """As `projected`, with squares as they are."""
    a, b = U.T @ M, U.T @ Delta
    return np.sum(a * b, axis=1) / np.sum(b * b, axis=1)
