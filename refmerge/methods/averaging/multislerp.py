import math

from refmerge.method import PerModel, method
from refmerge.methods.averaging.linear import normalized
from refmerge.methods.averaging.nuslerp import EPS
from refmerge.numeric import clamp, exact_sum, total


@method("multislerp", paper="no paper: mergekit 0.1.5")
def multislerp(models, group, base=None, *, weight: PerModel[float] = 1.0, normalize: bool = True):
    """The weighted mean of the directions of models, or of their task vectors where there is a base, at their mean length.

    Where the directions cancel, the straight mean.
    """
    # 1. vectors
    x = models if base is None else [theta_n - base for theta_n in models]
    # 2. weights
    w = normalized(weight, "multislerp", "; normalize=False takes them as they are") if normalize else list(weight)
    # 3. lengths and cosines
    nu, C = on_sphere(group.gram(*x))
    # 4. mean direction
    c = direction(w, C)
    # 5. merge
    merged = total(k_n * x_n for k_n, x_n in zip(at_mean_length(c, w, nu), x))
    return merged if base is None else base + merged


def on_sphere(G):
    """From the inner products G of vectors: their lengths, and the cosines between each two, 0 where one is zero."""
    nu = tuple(math.sqrt(row[n]) for n, row in enumerate(G))
    return nu, tuple(
        tuple(clamp(g / (a * b), -1.0, 1.0) if a and b else 0.0 for g, b in zip(row, nu)) for row, a in zip(G, nu)
    )


def direction(w, C):
    """c with |sum_n c_n u_n| = 1 and the direction of sum_n w_n u_n, for unit vectors of cosines C; None where these
    cancel: where their sum is not longer than EPS times that of the weights' sizes."""
    m = length(w, C)
    return None if m <= EPS * math.fsum(map(abs, w)) else tuple(w_n / m for w_n in w)


def length(c, C):
    """|sum_n c_n u_n|."""
    square = exact_sum([c_i * c_j * C_ij for c_i, row in zip(c, C) for c_j, C_ij in zip(c, row)])
    return 0.0 if square < 0 else math.sqrt(square)


def at_mean_length(c, w, nu):
    """What is taken of each vector: the direction c at the mean length sum_n w_n nu_n, or w where there is no direction."""
    if c is None:
        return w
    s = total(w_n * nu_n for w_n, nu_n in zip(w, nu))
    return [s * c_n / nu_n if nu_n else 0.0 for c_n, nu_n in zip(c, nu)]
