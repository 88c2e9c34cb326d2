import math

import numpy as np

from refmerge.compat.mergekit._sphere import at, dots, in_sixteen_bits, length, norms
from refmerge.method import PerModel, method
from refmerge.numeric import divided, stacked_sum, total


@method("mergekit:multislerp", paper="mergekit 0.1.5 multislerp.py")
def multislerp(models, group, base=None, *, weight: PerModel[float], normalize_weights: bool = True, eps: float = 1e-8):
    """Weighted mean direction at the mean length, of models or of task vectors; one model alone stays as it is.

    mergekit then steps along a mean of tangent vectors. It is zero but for rounding, and left out except in 16 bits; but the
    step is as long as eps at the least, so that the direction is multiplied by cos(eps).
    """
    if len(models) == 1:
        return models[0]
    # 1. vectors
    x = models if base is None else [theta_n - base for theta_n in models]
    # 2. weights, which are divided by a sum of 0 as well
    w = at(weight, x)
    if normalize_weights:
        w = at(w / at(w.sum(), x), x)
    # 3. mean direction and length
    merged = step_by_step(x, w, eps, group) if in_sixteen_bits(x[0]) else at_once(x, w, eps, group.gram(*x))
    return merged if base is None else base + merged


def at_once(x, w, eps, G):
    """The direction of sum_n w_n x_n / (nu_n + eps) at the length cos(eps) sum_n w_n nu_n. Where the directions cancel the
    sum of w_n x_n, for which mergekit has an error unless there are two models."""
    nu = np.sqrt(np.diag(G))
    c = w / (nu + eps)
    m = length(c, G)
    k = w if m < eps else math.cos(eps) * c / m * total(w * nu)
    return total(float(k_n) * x_n for k_n, x_n in zip(k, x))


def step_by_step(x, w, eps, group):
    """The same in mergekit's order."""
    w = [float(w_n) for w_n in w]
    nu = at(norms(group, *x), x)
    u = [divided(x_n, nu_n) for x_n, nu_n in zip(x, at(nu + eps, x))]
    mean = stacked_sum(w_n * u_n for w_n, u_n in zip(w, u))
    m = at(norms(group, mean), x)[0]
    if m < eps:
        return total(w_n * x_n for w_n, x_n in zip(w, x))
    mean = divided(mean, m)
    along = at(dots(group, *((u_n, mean) for u_n in u)), x)
    T = stacked_sum(w_n * (u_n - float(d_n) * mean) for w_n, u_n, d_n in zip(w, u, along))
    tau = at(at(norms(group, T), x)[0] + eps, x)
    result = float(at(np.cos(tau), x)) * mean + float(at(at(np.sin(tau), x) / tau, x)) * T
    return float(at(total(at(w * nu, x)), x)) * result
