import math
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
from numpy.linalg import multi_dot

from refmerge.matrices import change, decomposed
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.numeric import like, total


@method(
    "wudi",
    paper="arXiv:2503.08099",
    view="tensor",
    domain={"steps": (0, math.inf), "lr": (0.0, math.inf), "tolerance": (0.0, 1.0)},
)
def wudi(
    models,
    base,
    name,
    *,
    solver: Literal["adam", "exact"] = "adam",
    steps: int = 300,
    lr: float = 1e-5,
    tolerance: float = 1e-5,
    layers: tuple = ("*",),
):
    """WUDI-Merging: the task vector that disturbs each task least on the inputs that its own task vector spans.

    "adam" takes a few steps from the sum of the task vectors towards it, as published; "exact" is where they head for.
    Matrices are merged; vectors, and tensors that none of the globs `layers` names, stay the base's.
    """
    if not is_layer(base, name, layers):
        return base
    # 1. task vectors
    tau = [finite(as_matrix(change(theta_i, base)), name) for theta_i in models]
    # 2. of unit length, whose rows stand for the inputs of the layer
    a = [inverse(np.linalg.norm(tau_i)) * tau_i for tau_i in tau]
    if solver == "adam":
        # 3. descend from the sum
        G, H = total(a_i.T @ a_i for a_i in a), total(tau_i @ (a_i.T @ a_i) for tau_i, a_i in zip(tau, a))
        tau_m = adam(total(tau), lambda tau_m: 2 * (tau_m @ G - H), steps, lr)
    else:
        # 4. or solve
        tau_m = least_squares(a, tau, tolerance)
    # 5. add
    return base + like(tau_m.reshape(base.shape), base)


def is_layer(base, name, layers):
    """Whether a tensor is a matrix, or of more axes, and one of the globs names it."""
    return base.ndim > 1 and any(fnmatchcase(name, glob) for glob in layers)


def inverse(norm):
    """1 / norm, and 0 for 0: what is zero has no direction."""
    return 1 / norm if norm else 0.0


def adam(x, gradient, steps, lr):
    """So many steps of Adam (Kingma and Ba, 2015) with its usual constants 0.9, 0.999 and 1e-8."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        g = gradient(x)
        m = m + (1 - 0.9) * (g - m)
        v = 0.999 * v + (1 - 0.999) * (g * g)
        x = x - lr / (1 - 0.9**t) * (m / (np.sqrt(v) / math.sqrt(1 - 0.999**t) + 1e-8))
    return x


def least_squares(a, tau, tolerance):
    """The shortest tau_m of those with the least sum over i of |(tau_m - tau_i) a_i^T|^2, where singular values that do not
    count are taken for 0."""
    U, S, V = significant(*decomposed(np.concatenate(a), spend=True), tolerance)
    parts = np.split(U, len(a))
    return (total(multi_dot([tau_i, a_i.T, U_i]) for tau_i, a_i, U_i in zip(tau, a, parts)) / S) @ V.T


def significant(U, S, V, tolerance=None):
    """The terms of a decomposition above tolerance times the largest singular value, or above what rounding makes of 0."""
    tolerance = max(len(U), len(V)) * np.finfo(np.float64).eps if tolerance is None else tolerance
    r = np.count_nonzero(tolerance * S.max(initial=0.0) < S)
    return U[:, :r], S[:r], V[:, :r]
