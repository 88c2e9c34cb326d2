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
    pairs = list(combinations(range(len(tau)), 2))
    norms = inner([(tau_n, tau_n) for tau_n in tau], group, filter_wise)
    dots = inner([(tau[i], tau[j]) for i, j in pairs], group, filter_wise)
    theta = sum(angle(dot, norms[i], norms[j]) for dot, (i, j) in zip(dots, pairs)) / len(pairs)
    # 3. interpolation ratio
    t = ratio(np.cos(theta), len(models))
    # 4. interpolate
    t = like(t, base)[:, None] if filter_wise else float(t)
    return t * mean(models) + (1 - t) * base


def inner(pairs, group, filter_wise):
    """Inner products over the tensor as host numbers, or for each row as host arrays."""
    if filter_wise:
        return [host(tree_sum(x * y, axis=-1)) for x, y in pairs]
    answers = group.sum(*(x * y for x, y in pairs))
    return [np.float64(a) for a in (answers if len(pairs) > 1 else [answers])]


def angle(dot, xx, yy):
    """Angle of two vectors from their inner products; 90 degrees if one is zero."""
    norms = np.sqrt(xx) * np.sqrt(yy)
    return np.arccos(np.clip(dot / np.where(norms == 0, 1.0, norms), -1.0, 1.0))


def ratio(cos, N):
    """N cos / (1 + (N - 1) cos); 0, the base, where the task vectors cancel and the ratio has a pole."""
    pole = 1 + (N - 1) * cos
    return np.where(pole == 0, 0.0, N * cos / np.where(pole == 0, 1.0, pole))
