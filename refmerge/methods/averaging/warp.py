from itertools import accumulate

from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.methods.averaging.nuslerp import EPS, arc_or_line
from refmerge.methods.averaging.slerp import angle
from refmerge.numeric import exact_sum, total


@method("warp", paper="arXiv:2406.16768", models=(2, None), over=lambda name: layer(name))
def warp(models, base, group, *, weight: PerModel[float] = 1.0):
    """WARP's merge of policies: spherical interpolation of their task vectors, one after another, one angle a layer.

    s_1 = delta_1, and s_m is lambda_m of the way along the arc from s_(m-1) to delta_m, with lambda_m = w_m / (w_1 + ...
    + w_m): 1/m if the weights are equal.
    """
    # 1. task vectors
    delta = [theta_m - base for theta_m in models]
    # 2. inner products
    G = group.gram(*delta)
    # 3. arcs
    c = [1.0]
    for lambda_m in shares(weight)[1:]:
        c = along_arc(c, lambda_m, G)
    # 4. combine
    return base + total(c_m * delta_m for c_m, delta_m in zip(c, delta))


def layer(name):
    """The tensor's name up to the first number between dots, "model.layers.3"; outside of layers each tensor is its own."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts[1:-1], 1) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def shares(weight):
    """lambda_m = w_m / (w_1 + ... + w_m), and 0 for a weight of 0."""
    sums = list(accumulate(weight))
    if sums[-1] == 0 or any(w_m != 0 and w == 0 for w_m, w in zip(weight, sums)):
        raise UsageError(f"warp: the weights {', '.join(f'{w:g}' for w in weight)} sum to 0 on the way; each sum divides")
    return [w_m / w if w_m != 0 else 0.0 for w_m, w in zip(weight, sums)]


def along_arc(c, t, G):
    """Coefficients of the point t of the way along the arc from s = sum_i c_i delta_i to the next task vector.

    The straight line where one of the two has no direction, or within EPS of parallel or opposite.
    """
    m = len(c)
    ss = exact_sum([c[i] * c[j] * G[i][j] for i in range(m) for j in range(m)])
    sd, dd = exact_sum([c[i] * G[i][m] for i in range(m)]), G[m][m]
    cancelled = ss <= EPS**2 * exact_sum([c[i] * c[i] * G[i][i] for i in range(m)])
    omega = 0.0 if cancelled else angle(ss, dd, sd)
    s, d = arc_or_line(t, omega)
    return [*(s * c_i for c_i in c), d]
