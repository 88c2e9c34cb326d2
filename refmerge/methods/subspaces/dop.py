import math
from typing import Literal

import numpy as np

from refmerge.matrices import change, decomposed
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.methods.subspaces.wudi import adam, inverse, is_layer, significant
from refmerge.numeric import like


@method(
    "dop",
    paper="Yang et al., NeurIPS 2025",
    view="tensor",
    domain={"alpha": (0.0, 1.0), "beta": (0.0, 1.0), "energy": (0.0, 1.0), "steps": (0, math.inf), "lr": (0.0, math.inf)},
)
def dop(
    models,
    base,
    name,
    *,
    alpha: float = 0.8,
    balance: Literal["mgda", "fixed"] = "mgda",
    beta: float = 0.999,
    energy: float = 0.99999,
    steps: int = 200,
    lr: float = 1e-4,
    layers: tuple = ("*",),
):
    """DOP: merge models in their order; each time the average moves to where the subspaces of the merged model's change,
    and of the new one's, see least difference.

    alpha is the weight of the merged model's side; "mgda" lets it drift to where both sides gain. Vectors, and matrices that
    none of the globs `layers` names, are averaged two by two.
    """
    # 1. task vectors
    tau = [finite(as_matrix(change(theta_t, base)), name) for theta_t in models]
    D, *rest = tau
    for tau_t in rest:
        # 2. begin between the two
        X = 0.5 * (D + tau_t)
        if is_layer(base, name, layers):
            # 3. descend to where the subspaces of both see least of what was lost
            old, new = subspaces(D, energy), subspaces(tau_t, energy)
            X = adam(X, balanced([difference(D, *old), difference(tau_t, *new)], alpha, balance, beta), steps, lr)
        D = X
    # 4. add
    return base + like(D.reshape(base.shape), base)


def subspaces(D, energy):
    """S U^T and V S of the fewest terms of D whose singular values reach that share of their sum."""
    U, S, V = significant(*decomposed(D))
    sums = np.cumsum(S)
    r = int(np.sum(sums < energy * sums[-1:])) + 1
    return (U[:, :r] * S[:r]).T, V[:, :r] * S[:r]


def difference(D, left, right):
    """X -> (|left (X - D)|^2 + |(X - D) right|^2, its gradient)."""

    def loss(X):
        a, b = left @ (X - D), (X - D) @ right
        return float(np.sum(a * a) + np.sum(b * b)), 2 * (left.T @ a + b @ right.T)

    return loss


def balanced(losses, alpha, balance, beta):
    """The gradient of w loss_1 + (1 - w) loss_2 with w = alpha, which "mgda" moves a little before each step."""
    w = alpha

    def gradient(X):
        nonlocal w
        (l_1, g_1), (l_2, g_2) = (loss(X) for loss in losses)
        if balance == "mgda":
            w = beta * w + (1 - beta) * shortest(inverse(l_1) * g_1, inverse(l_2) * g_2)
        return w * g_1 + (1 - w) * g_2

    return gradient


def shortest(a, b):
    """The c for which c a + (1 - c) b is shortest, by Sener and Koltun's rule: 0.999 and 0.001 where it is at an end."""
    aa, ab, bb = (float(np.sum(x * y)) for x, y in ((a, a), (a, b), (b, b)))
    if ab >= aa:
        return 0.999
    return 0.001 if ab >= bb else (bb - ab) / (aa + bb - 2 * ab)
