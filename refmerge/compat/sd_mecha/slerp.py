import math

from refmerge.compat.mergekit.slerp import cosine
from refmerge.compat.sd_mecha._steps import lerp
from refmerge.method import method


@method(
    "sd_mecha:slerp",
    paper="ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/linear.py:slerp",
    widens=True,
    models=(2, 2),
)
def slerp(models, group, *, alpha: float = 0.5):
    """From the first model (alpha = 0) to the second (1), along the arc between unit vectors, with the length interpolated
    beside; the line where that gives NaN: parallel tensors, a tensor of zeros, a length that is not finite."""
    a, b = models
    # 1. lengths and angle
    aa, bb = group.dot((a, a), (b, b))
    norm_a, norm_b = math.sqrt(aa), math.sqrt(bb)
    c = cosine(a, b, group, 0.0)
    # 2. no arc
    if not (0 < norm_a < math.inf and 0 < norm_b < math.inf and c < 1):
        return lerp(a, b, alpha)
    # 3. arc between unit vectors
    s, t = shares(alpha, c)
    # 4. length
    length = lerp(norm_a, norm_b, alpha)
    return length * s / norm_a * a + length * t / norm_b * b


def shares(alpha, c):
    """Of the unit vectors in the point of the arc; their limit within 1e-6 of opposite, where they are rounding alone."""
    omega = math.acos(c)
    if c < 0 and math.sin(omega) < 1e-6:
        return math.cos(alpha * math.pi), 0.0
    return math.sin((1 - alpha) * omega) / math.sin(omega), math.sin(alpha * omega) / math.sin(omega)
