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
    U, S, V = side_by_side([leading(scores(theta_t - base), k, tolerance, name) for theta_t in models])
    # 3. decorrelate
    P, Q = polar(U, S, tolerance), polar(V, S, tolerance)
    # 4. merge
    return base + lambda_ * product(P, (Q * S).T, base)


def is_matrix(base, name, averaged):
    """Whether a tensor is merged by its singular vectors."""
    return base.ndim == 2 and not any(fnmatchcase(name, glob) for glob in averaged)


def leading(R, k, tolerance, name, least=0.0):
    """The first k singular triplets (U, S, V) of R, without those that count as zero beside the largest or `least`. R may be
    overwritten."""
    U, S, V = decomposed(finite(R, name), spend=True)
    k = min(k, rank(S, tolerance, least))
    return U[:, :k].copy(), S[:k], V[:, :k].copy()


def rank(S, tolerance, least=0.0):
    """How many of the singular values do not count as zero."""
    largest = max(S[:1].max(initial=0.0), least)
    return int(np.count_nonzero(tolerance * largest < S))


def side_by_side(triplets):
    """The tasks' triplets as one: U and V by columns."""
    U, S, V = zip(*triplets)
    return np.concatenate(U, axis=1), np.concatenate(S), np.concatenate(V, axis=1)


def polar(X, S, tolerance):
    """A B^T of X = A diag(sigma) B^T: the nearest matrix of orthonormal columns, of columns that are equal a share of one. X
    may be overwritten."""
    A, _, B = directions(X, S, tolerance)
    return product_over(A, B.T, A)


def directions(X, S, tolerance):
    """The singular triplets (A, sigma, B) of X without the directions in which X diag(S) counts as zero: a vector of a small
    singular value has more rounding in it. X may be overwritten."""
    A, sigma, B = decomposed(X, spend=True)
    if not independent(sigma, B, S, tolerance):
        W, w, _ = decomposed(sigma[:, None] * B.T * S)
        W = W[:, : rank(w, tolerance)]
        C, sigma, B = decomposed((W.T * sigma) @ B.T)
        A = A @ (W @ C)
    return A, sigma, B


def independent(sigma, B, S, tolerance):
    """Whether X diag(S) surely has no direction that counts as zero: its least singular value is above 1 / |its inverse|."""
    if len(sigma) < len(S):
        return False
    with np.errstate(all="ignore"):
        inverse = np.linalg.norm(B / sigma / S[:, None])
    return tolerance * np.max(S, initial=0.0) * np.max(sigma, initial=0.0) * inverse < 1
