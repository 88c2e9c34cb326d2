import math
from functools import lru_cache

from refmerge.method import PerModel, method
from refmerge.methods.averaging.linear import normalized
from refmerge.methods.averaging.multislerp import at_mean_length, direction, length, on_sphere
from refmerge.numeric import clamp, exact_sum, total


@method(
    "karcher",
    paper="Karcher 1977, doi:10.1002/cpa.3160300502",
    domain={"weight": (0.0, math.inf), "max_iter": (0, math.inf), "tol": (0.0, 1.0), "eps": (0.0, 1.0)},
)
def karcher(
    models,
    group,
    *,
    weight: PerModel[float] = 1.0,
    max_iter: int = 100,
    tol: float = 1e-12,
    eps: float = 1e-3,
):
    """Karcher mean: the direction of least mean squared angle to those of the models, at their mean length.

    u = sum_n c_n theta_n / nu_n is known by its coordinates c, and the inner products of the models tell all angles.
    """
    # 1. weights
    alpha = normalized(weight, "karcher")
    # 2. lengths and cosines
    nu, C = on_sphere(group.gram(*models))
    # 3. mean of the unit vectors
    c = direction(alpha, C, eps)
    # 4. walk to the Karcher mean
    c = c and walk(tuple(c), tuple(alpha), tuple(map(tuple, C)), max_iter, tol, eps)
    # 5. merge
    return total(k_n * theta_n for k_n, theta_n in zip(at_mean_length(c, alpha, nu), models))


@lru_cache(maxsize=64)  # the blocks of a tensor all walk the same way
def walk(c, alpha, C, max_iter, tol, eps):
    """From u along the mean of the arcs to the directions, until no coordinate moves by more than tol; None where one of the
    directions comes within eps of opposite to u, so that no arc leads there."""
    some = [alpha_n if C_n[n] else 0.0 for n, (alpha_n, C_n) in enumerate(zip(alpha, C))]  # a zero has no direction
    alpha = [alpha_n / total(some) for alpha_n in some]
    for _ in range(max_iter):
        cos = [clamp(exact_sum([c_i * C_ni for c_i, C_ni in zip(c, C_n)]), -1.0, 1.0) for C_n in C]
        if any(alpha_n and cos_n < 0 and math.sqrt(1 - cos_n * cos_n) <= eps for alpha_n, cos_n in zip(alpha, cos)):
            return None
        f = [alpha_n * stretch(math.acos(cos_n)) for alpha_n, cos_n in zip(alpha, cos)]
        s = exact_sum([f_n * cos_n for f_n, cos_n in zip(f, cos)])
        T = [f_n - s * c_n for f_n, c_n in zip(f, c)]
        tau = length(T, C)
        moved = [math.cos(tau) * c_n + T_n / stretch(tau) for c_n, T_n in zip(c, T)]
        m, before = length(moved, C), c
        c = [c_n / m for c_n in moved]
        if max(abs(new - old) for new, old in zip(c, before)) <= tol:
            break
    return c


def stretch(angle):
    """angle / sin(angle), the length of an arc beside the height of its end."""
    return angle / math.sin(angle) if angle > 1e-8 else 1.0
