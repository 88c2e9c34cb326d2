from fnmatch import fnmatchcase

import numpy as np

from refmerge.matrices import decomposed, product, product_over
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.numeric import mean, scores


def whole_matrices(ndim):
    """A matrix must be whole; anything else is averaged, entry by entry."""
    return "tensor" if ndim == 2 else "flat"


@method("tsvm", paper="arXiv:2412.00081", view=whole_matrices, domain={"tolerance": (1e-12, 0.1)})
def tsvm(
    models,
    base,
    name,
    *,
    lambda_: float = 1.0,
    tolerance: float = 1e-5,
    averaged: tuple = ("*text_projection*",),
):
    """TSV-Merge: of each task's change of a matrix the largest singular triplets, their singular vectors made orthogonal to
    each other across the tasks, and added.

    Singular values up to `tolerance` times the largest count as zero. What is no matrix is averaged, as are the matrices
    whose names match the globs `averaged`.
    """
    # 1. average what is no matrix
    if not is_matrix(base, name, averaged):
        return base + lambda_ * mean([theta_t - base for theta_t in models])
    # 2. task singular vectors
    k = max(1, min(base.shape) // len(models))
    U, S, V, C = side_by_side([leading(scores(theta_t - base), k, tolerance, name) for theta_t in models])
    # 3. decorrelate
    P, Q = polar(U, C, tolerance), polar(V, C, tolerance)
    # 4. merge
    return base + lambda_ * product(P, (Q * S).T, base)


def is_matrix(base, name, averaged):
    """Whether a tensor is merged by its singular vectors."""
    return base.ndim == 2 and not any(fnmatchcase(name, glob) for glob in averaged)


def leading(R, k, tolerance, name, least=0.0, full=None):
    """The first k singular triplets (U, S, V) of R, without those that count as zero beside the largest or `least`, and how
    certain each is, where `full` is the rank that R can have. R may be overwritten."""
    U, S, V = decomposed(finite(R, name), spend=True)
    C = certainty(S, tolerance, least, full)
    k = min(k, len(C))
    return U[:, :k].copy(), S[:k], V[:, :k].copy(), C[:k]


def certainty(S, tolerance, least=0.0, full=None):
    """1 for each of the singular values of a matrix of full rank. Of one that has zeros, which are noise, each S over the
    largest: its vectors are off by the noise over S."""
    rho = rank(S, tolerance, least)
    return np.ones(rho) if rho >= (len(S) if full is None else full) else S[:rho] / max(*S[:1], least)


def rank(S, tolerance, least=0.0):
    """How many of the singular values do not count as zero."""
    largest = max(S[:1].max(initial=0.0), least)
    return int(np.count_nonzero(tolerance * largest < S))


def side_by_side(tasks):
    """The tasks' triplets as one: U and V by columns."""
    return tuple(np.concatenate(x, axis=-1) for x in zip(*tasks))


def polar(X, C, tolerance):
    """A B^T of X = A diag(sigma) B^T: the nearest matrix of orthonormal columns, of columns that are equal a share of one. X
    may be overwritten."""
    A, _, B = directions(X, C, tolerance)
    return product_over(A, B.T, A)


def directions(X, C, tolerance):
    """The singular triplets (A, sigma, B) of X without directions in which X diag(C) counts as zero, written over X."""
    A, sigma, B = decomposed(X, spend=True)
    if np.any(C < 1) or rank(sigma, tolerance) < len(C):
        Z = sigma[:, None] * B.T
        W, w, _ = decomposed(Z * C)
        W = W[:, : rank(w, tolerance)]
        Y, sigma, B = decomposed(W.T @ Z)
        A = A @ (W @ Y)
    return A, sigma, B
