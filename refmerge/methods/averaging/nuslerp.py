import math
from typing import Literal

import numpy as np

from refmerge.method import PerModel, method
from refmerge.methods.averaging.linear import normalized
from refmerge.methods.averaging.slerp import angle, arc
from refmerge.numeric import host, like, tree_sum

EPS = 1e-3  # of an angle's sine, and of the mean of unit vectors: what is shorter is little more than rounding


@method(
    "nuslerp",
    paper="no paper: mergekit 0.1.5",
    models=(2, 2),
    view=lambda per, ndim: "flat" if per == "tensor" else "tensor" if per == "column" and ndim else "rows",
)
def nuslerp(
    models,
    group,
    base=None,
    *,
    weight: PerModel[float] = 1.0,
    per: Literal["tensor", "row", "column"] = "tensor",
):
    """SLERP of two models, or of their task vectors where there is a base, at the place on the arc that two weights say.

    There is one angle for a tensor, or one for each of its rows or columns. Where there is no arc, the straight line.
    """
    # 1. vectors
    a, b = models if base is None else [theta_n - base for theta_n in models]
    # 2. place on the arc
    t = normalized(weight, "nuslerp")[1]
    # 3. angle
    omega = [angle(*products) for products in inner_products(a, b, group, per)]
    # 4. coefficients
    c_a, c_b = coefficients(t, omega, a, per)
    # 5. interpolate
    merged = c_a * a + c_b * b
    return merged if base is None else base + merged


def inner_products(a, b, group, per):
    """(<a, a>, <b, b>, <a, b>) of the tensors, or for each of their rows or columns."""
    pairs = [(a, a), (b, b), (a, b)]
    if per == "tensor":
        return [group.dot(*pairs)]
    along = -1 if per == "row" else 0
    return list(zip(*(host(tree_sum(x * y, axis=along)).reshape(-1).tolist() for x, y in pairs)))


def coefficients(t, omega, x, per):
    """What is taken of a and of b: two numbers, or arrays of one number for each row or column of x."""
    pairs = [arc_or_line(t, w) for w in omega]
    if per == "tensor":
        return pairs[0]
    shape = (-1, 1) if per == "row" else (1, *x.shape[1:])
    return [like(np.reshape(c, shape), x) for c in zip(*pairs)]


def arc_or_line(t, omega):
    """What is taken of two vectors, t of the way along the arc; along the line where they are parallel or opposite."""
    return (1 - t, t) if math.sin(omega) <= EPS else arc(t, omega)
