import numpy as np

from refmerge.matrices import decomposed, product, total_scores
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.tsvm import is_matrix, rank, whole_matrices
from refmerge.numeric import mean


@method("iso_c", paper="arXiv:2502.04959", view=whole_matrices, domain={"tolerance": (1e-12, 0.1)})
def iso_c(
    models,
    base,
    name,
    *,
    lambda_: float = 1.0,
    tolerance: float = 1e-5,
    averaged: tuple = ("*text_projection*",),
):
    """Iso-C: the sum of the task vectors, all its singular values replaced by their mean.

    Singular values up to `tolerance` times the largest count as zero: they stay zero and out of the mean. What is no matrix
    is averaged, as are the matrices whose names match the globs `averaged`.
    """
    # 1. average what is no matrix
    if not is_matrix(base, name, averaged):
        return base + lambda_ * mean([theta_t - base for theta_t in models])
    # 2. sum of the task vectors
    M = total_scores(theta_t - base for theta_t in models)
    # 3. singular value decomposition
    U, S, V = spanned(decomposed(finite(M, name), spend=True), tolerance)
    # 4. make isotropic
    return base + lambda_ * product(U, isotropic(S) * V.T, base)


def spanned(triplets, tolerance):
    """The singular triplets (U, S, V) without those that count as zero."""
    U, S, V = triplets
    rho = rank(S, tolerance)
    return U[:, :rho], S[:rho], V[:, :rho]


def isotropic(S):
    """The mean of the singular values, 0 of none."""
    return float(np.mean(S)) if len(S) else 0.0
