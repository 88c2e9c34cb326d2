import math

import numpy as np

from refmerge.matrices import decomposed
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.methods.subspaces.tsvm import directions, leading, side_by_side
from refmerge.methods.subspaces.wudi import adam, inverse, is_layer
from refmerge.numeric import array_namespace, like, scores, total


@method(
    "doge",
    paper="arXiv:2501.01230",
    view="tensor",
    over="model",
    domain={
        "subspace": (1, math.inf),
        "density": (0.0, 1.0),
        "steps": (0, math.inf),
        "lr": (0.0, math.inf),
        "tolerance": (0.0, 1.0),
    },
)
def doge(
    models,
    base,
    group,
    name,
    *,
    subspace: int = 6,
    density: float = 0.3,
    lambda_: float = 0.07,
    steps: int = 400,
    lr: float = 1e-4,
    tolerance: float = 1e-5,
    layers: tuple = ("*",),
):
    """DOGE TA: task arithmetic with a learnt correction of the task vectors that leaves alone the subspace which they share.

    Each task vector counts as lambda over its length in the layer, and keeps its `density` largest entries. Singular values
    up to `tolerance` times the largest count as zero. Matrices are merged; vectors, and matrices that none of the globs
    `layers` names, stay the base's.
    """
    merged = is_layer(base, name, layers)
    # 1. task vectors
    tau = [theta_t - base for theta_t in models]
    # 2. masks of the largest entries
    m = largest(tau, group, density, merged)
    if not merged:
        return base
    T = [finite(as_matrix(scores(tau_t)), name) for tau_t in tau]
    # 3. coefficients
    c = [float(lambda_ * inverse(np.linalg.norm(T_t))) for T_t in T]
    # 4. the subspace that they share
    B = shared_basis(T, subspace, tolerance)
    # 5. descend outside of it
    Delta = adam(np.zeros_like(T[0]), lambda Delta: outside(B, gradient(Delta, T, c)), steps, lr)
    # 6. add
    Delta = like(Delta.reshape(base.shape), base)
    return base + total(c_t * (m_t * (tau_t + Delta)) for c_t, m_t, tau_t in zip(c, m, tau))


def largest(tau, group, density, merged):
    """1 at the int(density d) largest entries of each task vector, of the d in merged tensors. Others ask as well, with
    magnitudes below all."""
    xp = array_namespace(*tau)
    d = group.count(xp.full_like(tau[0], float(merged)) > 0)
    magnitude = [xp.abs(tau_t) if merged else xp.full_like(tau_t, -1.0) for tau_t in tau]
    return group.top(*magnitude, k=[int(density * d)] * len(tau))


def shared_basis(T, subspace, tolerance):
    """The first left singular vectors, int(r / subspace) of r = min(m, n), of the first int(r / N) left ones of each T_t.

    Of directions that are shared alike, those come first in which the task vectors are larger.
    """
    r = min(T[0].shape)
    U, S, _, C = side_by_side([leading(T_t.copy(), r // len(T), tolerance, "") for T_t in T])
    large = U * S
    B, shares, _ = directions(U, C, tolerance)
    ends = np.flatnonzero(shares[1:] < (1 - max(tolerance, 1e-9)) * shares[:-1]) + 1
    alike = zip(np.split(B, ends, axis=1), np.split(B.T @ large, ends))
    return np.concatenate([part @ decomposed(size)[0] for part, size in alike], axis=1)[:, : r // subspace]


def outside(B, g):
    return g - B @ (B.T @ g)


def gradient(Delta, T, c):
    """Of the sum over j of |rho(T_j (T_j - sum_t c_t (T_t + Delta)))|^2, with rho the sums of rows."""
    rest = total(c_t * T_t for c_t, T_t in zip(c, T)) + sum(c) * Delta
    return -2 * sum(c) * total(np.sum(T_j * (T_j - rest), axis=1, keepdims=True) * T_j for T_j in T)
