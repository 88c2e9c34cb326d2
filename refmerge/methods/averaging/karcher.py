import math
from functools import lru_cache

from refmerge.method import PerModel, method
from refmerge.methods.averaging.linear import normalized
from refmerge.methods.averaging.multislerp import at_mean_length, direction, length, on_sphere
from refmerge.methods.averaging.nuslerp import EPS
from refmerge.numeric import clamp, exact_sum, total


@method(
    "karcher",
    paper="Karcher 1977, doi:10.1002/cpa.3160300502",
    domain={"weight": (0.0, math.inf), "max_iter": (0, math.inf), "tol": (0.0, 1.0)},
)
def karcher(
    models,
    group,
    *,
    weight: PerModel[float] = 1.0,
    max_iter: int = 100,
    tol: float = 1e-15,
):
    """Karcher mean: the direction of least mean squared angle to those of the models, at their mean length.

    It is a sum of the models, u = sum_n c_n theta_n / nu_n, and their inner products tell all angles.
    """
    # 1. weights
    alpha = tuple(normalized(weight, "karcher"))
    # 2. lengths and cosines
    nu, C = on_sphere(group.gram(*models))
    # 3. mean of the unit vectors
    c = direction(alpha, C)
    # 4. walk to the Karcher mean
    c = c and walk(c, alpha, C, max_iter, tol)
    # 5. merge
    return total(k_n * theta_n for k_n, theta_n in zip(at_mean_length(c, alpha, nu), models))


@lru_cache(maxsize=64)  # the blocks of a tensor all walk the same way
def walk(c, alpha, C, max_iter, tol):
    """From u along the weighted mean of the arcs to the u_n, until no cosine D_n = <u, u_n> moves by more than tol: then u
    is parallel to sum_n f_n u_n. None where one of the u_n is opposite to u, within EPS, or u is no minimum."""
    some = [alpha_n if C_n[n] else 0.0 for n, (alpha_n, C_n) in enumerate(zip(alpha, C))]  # a zero has no direction
    alpha = [alpha_n / total(some) for alpha_n in some]
    D, f, s = clamped(times(C, c)), c, 1.0
    for _ in range(max_iter):
        if any(alpha_n and D_n < 0 and math.sqrt(1 - D_n * D_n) <= EPS for alpha_n, D_n in zip(alpha, D)):
            return None
        f = [alpha_n * stretch(math.acos(D_n)) for alpha_n, D_n in zip(alpha, D)]
        s = exact_sum([f_n * D_n for f_n, D_n in zip(f, D)])
        tau = math.sqrt(max(length(f, C) ** 2 - s * s, 0.0))
        before, sinc = D, 1 / stretch(tau)
        D = clamped([(math.cos(tau) - s * sinc) * D_n + sinc * to_n for D_n, to_n in zip(D, times(C, f))])
        if max(abs(new - old) for new, old in zip(D, before)) <= tol:
            break
    m = length(f, C)
    return None if s <= 0 else tuple(f_n / m for f_n in f)


def times(C, c):
    """<u, u_n> for u = sum_i c_i u_i."""
    return [exact_sum([c_i * C_ni for c_i, C_ni in zip(c, C_n)]) for C_n in C]


def clamped(D):
    return [clamp(D_n, -1.0, 1.0) for D_n in D]


def stretch(angle):
    """angle / sin(angle), the length of an arc beside the height of its end."""
    return angle / math.sin(angle) if angle > 1e-8 else 1.0
