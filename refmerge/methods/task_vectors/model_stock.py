from itertools import combinations

import numpy as np

from refmerge.method import method
from refmerge.numeric import host, like, mean, tree_sum


@method(
    "model_stock",
    paper="arXiv:2403.19522",
    models=(2, None),
    view=lambda filter_wise: "rows" if filter_wise else "flat",
)
def model_stock(models, base, group, *, filter_wise: bool = False):
    """Model Stock: between the average of the fine-tunes and the base, at the point closest to the fine-tunes' centre.

    The angle between the task vectors says how far: t = N cos(theta) / (1 + (N - 1) cos(theta)).
    """
    # 1. task vectors
    tau = [w_n - base for w_n in models]
    # 2. angle between each two, averaged
    N = len(tau)
    pairs = list(combinations(range(N), 2))
    norms, dots = inner_products(tau, pairs, group, filter_wise)
    theta = sum(angle(dot, norms[i], norms[j]) for dot, (i, j) in zip(dots, pairs)) / len(pairs)
    # 3. interpolation ratio
    t = ratio(np.cos(theta), N)
    # 4. interpolate
    t = like(t, base)[:, None] if filter_wise else float(t)
    return base + t * mean(tau)


def inner_products(tau, pairs, group, filter_wise):
    """(<tau_n, tau_n>, <tau_i, tau_j>): over the tensor as host numbers, or for each row as host arrays."""
    products = [(x, x) for x in tau] + [(tau[i], tau[j]) for i, j in pairs]
    if filter_wise:
        found = [host(tree_sum(x * y, axis=-1)) for x, y in products]
    else:
        found = [np.float64(x) for x in group.dot(*products)]
    return found[: len(tau)], found[len(tau) :]


def angle(dot, xx, yy):
    """Angle of two vectors from their inner products; 90 degrees if one is zero."""
    norms = np.sqrt(xx) * np.sqrt(yy)
    return np.arccos(np.clip(dot / np.where(norms == 0, 1.0, norms), -1.0, 1.0))


def ratio(cos, N):
    """N cos / (1 + (N - 1) cos); 0, the base, within 1e-6 of its pole, where rounding would decide about the ratio."""
    pole = 1 + (N - 1) * cos
    singular = np.abs(pole) < 1e-6
    return np.where(singular, 0.0, N * cos / np.where(singular, 1.0, pole))
