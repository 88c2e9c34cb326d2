"""Steps that the codes of the authors of TSV, Iso, DC-Merge and SVC share. None looks at the rank: where columns depend on
each other, LAPACK chooses what stands in for the directions that are missing."""

import numpy as np

from refmerge.errors import UsageError
from refmerge.matrices import decomposed
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.tsvm import side_by_side
from refmerge.numeric import divided, scores


def is_matrix(base, name):
    return base.ndim == 2 and "text_projection" not in name


def running_mean(Delta):
    """mean += (x - mean) / n, one after another."""
    mean, *others = Delta
    for n, x in enumerate(others, start=2):
        mean = mean + divided(x - mean, n)
    return mean


def triplets(R, k, name):
    """The first k singular triplets (U, S, V)."""
    U, S, V = decomposed(finite(R, name))
    return U[:, :k].copy(), S[:k], V[:, :k].copy()


def task_triplets(Delta, k, name):
    """Those of all tasks, side by side."""
    return side_by_side([triplets(scores(Delta_t), k, name) for Delta_t in Delta])


def polar(X):
    """A B^T of X = A diag(sigma) B^T."""
    A, _, B = decomposed(X)
    return A @ B.T


def whitened(X):
    """X (X^T X)^(-1/2), by eigenvalues, whose square roots are raised by 1e-12."""
    values, vectors = np.linalg.eigh(X.T @ X)
    return X @ (vectors / (np.sqrt(np.abs(values)) + 1e-12)) @ vectors.T


def common_and_task_specific(Delta, r, n, c, name):
    """For each task n triplets of what the common space leaves of it, then that space, c triplets of the sum; r in all."""
    U, S, V = triplets(sum(scores(Delta_t) for Delta_t in Delta), r, name)
    common = U[:, :c]
    tasks = []
    for Delta_t in Delta:
        R = scores(Delta_t)
        tasks.append(triplets(R - common @ (common.T @ R), n, name))
    U, S, V = side_by_side([*tasks, (common, S[:c], V[:, :c])])
    return U[:, :r], S[:r], V[:, :r]


def dimensions(r, T, fraction, name):
    """Of r dimensions: how many are each task's, and how many are common, below 0 where rounding gave the tasks more than
    there are. UsageError where their code fails on that."""
    n = round((r - int(r * fraction)) / T)
    if n > 1 and n * T > r:
        raise UsageError(
            f"tensor {name!r}: {T} tasks with {n} dimensions each do not fit in {r}, where the authors' code fails; a "
            "larger common_space_fraction leaves them fewer, and the plain iso_cts rounds down"
        )
    return n, r - n * T
