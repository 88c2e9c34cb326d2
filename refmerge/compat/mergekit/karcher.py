import numpy as np

from refmerge.compat.mergekit._sphere import at, dots, in_sixteen_bits, length, norms
from refmerge.method import method
from refmerge.numeric import array_namespace, at_least_float32, divided, total


@method("mergekit:karcher", paper="mergekit 0.1.5 karcher.py")
def karcher(models, group, *, max_iter: int = 10, tol: float = 1e-5):
    """Karcher mean of the directions at the mean length, all models alike; a model of norm up to tol has no direction. One
    model alone stays as it is."""
    if len(models) == 1:
        return models[0]
    # 1. mean direction
    if in_sixteen_bits(models[0]):
        u, nu = step_by_step(models, max_iter, tol, group)
    else:
        u, nu = at_once(models, max_iter, tol, group.gram(*models))
    # 2. merge
    scale = at(sum(1 / len(models) * nu_n for nu_n in nu), models)
    return float(scale) * u


def at_once(x, max_iter, tol, G):
    """The direction as an array, and the norms. Its coordinates are found from the inner products."""
    nu = np.sqrt(np.diag(G))
    valid = [n for n, nu_n in enumerate(at(nu, x)) if nu_n > tol]
    if not valid:
        return total(0.0 * x_n for x_n in x), nu
    C = [[G[i][j] / (nu[i] * nu[j]) for j in valid] for i in valid]
    alpha = 1 / len(valid)
    c = np.full(len(valid), alpha)
    m = length(c, C)
    c = np.eye(len(valid))[0] if m < tol else c / m
    for _ in range(max_iter):
        T = np.zeros(len(valid))
        for n, row in enumerate(C):
            cos = np.clip(at(total(c_i * C_ni for c_i, C_ni in zip(c, row)), x), -1, 1)
            theta = np.arccos(cos)
            if theta >= tol:
                T += alpha * (theta / np.sin(theta)) * (np.eye(len(valid))[n] - cos * c)
        tau = length(T, C)
        if tau < tol:
            break
        c = np.cos(tau) * c + np.sin(tau) / tau * T
        m = length(c, C)
        c = c / m if m > tol else c
    return total(float(c_n / nu[n]) * x[n] for c_n, n in zip(c, valid)), nu


def step_by_step(x, max_iter, tol, group):
    """The same in mergekit's order: norms stay in float32, what is multiplied by an array is rounded to 16 bits."""
    nu = norms(group, *x)
    valid = [n for n, nu_n in enumerate(nu) if nu_n > tol]
    if not valid:
        return total(0.0 * x_n for x_n in x), nu
    u = [divided(x[n], nu[n]) for n in valid]
    alpha = 1 / len(valid)
    mean = total(alpha * u_n for u_n in u)
    m = norms(group, mean)[0]
    mean = u[0] if m < tol else divided(mean, m)
    for _ in range(max_iter):
        T = array_namespace(mean).zeros_like(mean)
        wide, *others = [at_least_float32(y) for y in (mean, *u)]  # products under a dot are not rounded
        for u_n, dot in zip(u, np.clip(at(dots(group, *((wide, y) for y in others)), x), -1, 1)):
            theta = at(np.arccos(dot), x)
            if theta >= tol:
                stretch = at(alpha * at(theta / at(np.sin(theta), x), x), x)
                T = T + float(stretch) * (u_n - float(dot) * mean)
        tau = norms(group, T)[0]
        if tau < tol:
            break
        mean = float(at(np.cos(tau), x)) * mean + float(at(np.sin(tau), x)) * divided(T, tau)
        m = norms(group, mean)[0]
        mean = divided(mean, m) if m > tol else mean
    return mean, nu
