import math

import numpy as np

from refmerge.kept import once
from refmerge.matrices import change, decomposed, less_product
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.methods.subspaces.wudi import inverse, is_layer, significant
from refmerge.numeric import like, total


@method("opcm", paper="arXiv:2501.09522", view="tensor", over="model", domain={"alpha": (0.0, 1.0), "tolerance": (0.0, 1.0)})
def opcm(models, base, group, name, *, alpha: float = 0.5, tolerance: float = 1e-5, layers: tuple = ("*",)):
    """OPCM: merge models in their order, each without what lies in the subspace that those before it use, and rescale.

    Singular values up to `tolerance` times the largest count as zero. Matrices that the globs `layers` name are projected;
    other matrices and vectors are added as they are.
    """
    # 1. task vectors
    tau = [finite(as_matrix(change(theta_t, base)), name) for theta_t in models]
    # 2. add one after another, projected
    D = one_after_another(tau, alpha, tolerance) if is_layer(base, name, layers) else total(tau)
    # 3. lengths over the model
    *squares, square = group.dot(*((x, x) for x in [*tau, D]))
    mean = sum(map(math.sqrt, squares)) / len(tau)
    # 4. rescale to the mean length
    return base + like((mean * inverse(math.sqrt(square)) * D).reshape(base.shape), base)


@once
def one_after_another(tau, alpha, tolerance):
    D, *rest = tau
    for tau_t in rest:
        D = less_product(D + tau_t, *taken(tau_t, D, alpha, tolerance))
    return D


def taken(tau_t, D, alpha, tolerance):
    """U and E V^T of what tau_t loses: its part in the leading block of D's singular vectors, whose singular values sum up
    to at most the share alpha of all, and the rest of that basis' diagonal."""
    U, S, V = significant(*decomposed(D), tolerance)
    share = np.cumsum(S)
    r = int(np.sum(share <= alpha * share[-1:]))
    rows = U.T @ tau_t
    right = np.einsum("rn,nr->r", rows, V)[:, None] * V.T
    right[:r] = rows[:r] @ V[:, :r] @ V[:, :r].T
    return U, right
