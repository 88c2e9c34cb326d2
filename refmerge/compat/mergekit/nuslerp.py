import numpy as np

from refmerge.compat.mergekit._sphere import dots, in_sixteen_bits, norms
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, at_least_float32, at_precision, divided, host, like, tree_sum


def view(nuslerp_flatten, nuslerp_row_wise, ndim):
    """What must stay whole: of more than two dimensions, a line along the last axis is shorter than a row."""
    if nuslerp_flatten:
        return "flat"
    return "tensor" if ndim > 2 or (nuslerp_row_wise and ndim) else "rows"


@method("mergekit:nuslerp", paper="mergekit 0.1.5 nuslerp.py", models=(2, 2), view=view)
def nuslerp(
    models,
    group,
    base=None,
    *,
    weight: PerModel[float],
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
):
    """SLERP of two models or task vectors, of whole tensors, of lines along the last axis, or (row_wise) along the first."""
    # 1. vectors
    a, b = models if base is None else [x - base for x in models]
    # 2. place on the arc
    w = weight[0] + weight[1]
    t = 0.5 if abs(w) < 1e-6 else weight[1] / w
    # 3. cosines, as they round
    axis = 0 if nuslerp_flatten or nuslerp_row_wise else -1
    c = cosine(a, b, group) if nuslerp_flatten else cosines(a, b, axis)
    straight = at(1 - at(c * c, a), a) <= 1e-16
    # 4. arc
    theta = at(np.arccos(np.where(straight, 0.0, c)), a)
    sines = [at(np.sin(x), a) for x in (at((1 - t) * theta, a), at(t * theta, a), theta)]
    s_a, s_b, s = (like(np.expand_dims(x, axis), a) for x in sines)
    merged = (s_a * a + s_b * b) / s
    # 5. line, where the cosine is 1 or -1
    if straight.any():
        is_line = like(np.expand_dims(straight, axis), a) > 0
        merged = array_namespace(a).where(is_line, (1 - t) * a + t * b, merged)
    return merged if base is None else base + merged


def at(value, x):
    return at_precision(np.asarray(value), x)


def cosine(a, b, group):
    """Of the tensors; a norm is taken for at least 1e-7."""
    if in_sixteen_bits(a):
        n_a, n_b = np.maximum(at(norms(group, a, b), a), at(1e-7, a))
        c = dots(group, (divided(a, n_a), divided(b, n_b)))[0]
    else:
        aa, bb, ab = dots(group, (a, a), (b, b), (a, b))
        n_a, n_b = np.maximum(at(np.sqrt([aa, bb]), a), 1e-7)
        c = ab / (n_a * n_b)
    return np.clip(at(c, a), -1, 1)


def cosines(a, b, axis):
    """Of all lines along an axis."""
    units = []
    for x in (a, b):
        wide = at_least_float32(x)
        n = np.maximum(at(np.sqrt(host(tree_sum(wide * wide, axis=axis))), x), at(1e-7, x))
        units.append(x / like(np.expand_dims(n, axis), x))
    return np.clip(at(host(tree_sum(units[0] * units[1], axis=axis)), a), -1, 1)
