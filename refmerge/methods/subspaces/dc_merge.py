import math
from typing import Literal

import numpy as np

from refmerge.matrices import product
from refmerge.method import method
from refmerge.methods.subspaces.tsvm import is_matrix, leading, polar, side_by_side, whole_matrices
from refmerge.methods.task_vectors.ties import disjoint_mean, elect
from refmerge.numeric import mean, scores


@method(
    "dc_merge",
    paper="arXiv:2603.06242",
    view=whole_matrices,
    domain={"density": (0.0, 1.0), "rho": (1.0, math.inf), "tolerance": (1e-12, 0.1)},
)
def dc_merge(
    models,
    base,
    name,
    *,
    density: float = 0.001,
    smoothing: Literal["none", "average", "linear"] = "none",
    rho: float = 5.0,
    lambda_: float = 1.0,
    tolerance: float = 1e-5,
    averaged: tuple = ("*text_projection*",),
):
    """DC-Merge: the tasks' largest singular triplets in one shared orthogonal basis, where the largest entries that agree in
    sign are averaged.

    Singular values up to `tolerance` times the largest count as zero. What is no matrix is averaged, as are the matrices
    whose names match the globs `averaged`.
    """
    # 1. average what is no matrix
    if not is_matrix(base, name, averaged):
        return base + lambda_ * mean([theta_t - base for theta_t in models])
    # 2. task singular vectors
    k = max(1, min(base.shape) // len(models))
    tasks = [leading(scores(theta_t - base), k, tolerance, name) for theta_t in models]
    # 3. smooth
    tasks = [(U_t, smoothed(S_t, smoothing, rho), V_t, C_t) for U_t, S_t, V_t, C_t in tasks]
    # 4. cover space
    U, S, V, C = side_by_side(tasks)
    P, Q = polar(U, C, tolerance), polar(V, C, tolerance)
    # 5. project
    M = [((P.T @ U_t) * S_t) @ (V_t.T @ Q) for U_t, S_t, V_t, _ in tasks]
    # 6. keep the largest
    r = min(base.shape) if len(S) == k * len(tasks) else len(S)
    M = [largest(M_t, max(1, int(density * r**2)), tolerance) for M_t in M]
    # 7. average what agrees in sign
    M = disjoint_mean(M, elect(M))
    # 8. cut out the blocks
    M = M * blocks([len(S_t) for _, S_t, *_ in tasks])
    # 9. back from the cover space
    return base + lambda_ * product(P, M @ Q.T, base)


def smoothed(S, smoothing, rho):
    """Singular values of the same sum: all equal, or on a line whose first is rho times the last, or S_1 / S_k times where
    that is less."""
    if smoothing == "none" or not len(S):
        return S
    slope = min(rho, S[0] / S[-1]) if smoothing == "linear" else 1.0
    profile = np.linspace(slope, 1.0, len(S))
    return np.sum(S) * (profile / np.sum(profile))


def largest(M, k, tolerance=0.0):
    """M where its magnitude is at least the k-th largest, 0 elsewhere. What is less by `tolerance` times that counts as
    equal, and what is up to `tolerance` times the largest as zero."""
    size = np.abs(M)
    kth = np.partition(size, -k, axis=None)[-k] if k <= M.size else 0.0
    return np.where(size >= max((1 - tolerance) * kth, tolerance * np.max(size, initial=0.0)), M, 0.0)


def blocks(sizes):
    """1 where row and column belong to the same task."""
    task = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(task[:, None] == task, 1.0, 0.0)
