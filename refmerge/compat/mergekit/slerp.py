import math

from refmerge.method import method
from refmerge.numeric import clamp


@method("mergekit:slerp", paper="mergekit 0.1.5 slerp.py", widens=True, models=(1, 1))
def slerp(models, base, group, *, t: float):
    """From the base (t = 0) to the other model (t = 1); a straight line where the cosine exceeds 0.9995 either way."""
    v_0, (v_1,) = base, models
    # 1. cosine of the whole tensor; a norm up to 1e-8 does not divide
    c = cosine(v_0, v_1, group, 1e-8)
    # 2. nearly parallel, or nearly opposite
    if abs(c) > 0.9995:
        return (1 - t) * v_0 + t * v_1
    # 3. arc, on the tensors as they are
    return arc(v_0, v_1, t, c)


def cosine(v_0, v_1, group, eps):
    """Of two tensors as vectors, held inside [-1, 1]; a norm that does not exceed eps counts as 1."""
    aa, bb, ab = group.dot((v_0, v_0), (v_1, v_1), (v_0, v_1))
    norm_0, norm_1 = math.sqrt(aa), math.sqrt(bb)
    return clamp(ab / ((norm_0 if norm_0 > eps else 1.0) * (norm_1 if norm_1 > eps else 1.0)), -1.0, 1.0)


def arc(v_0, v_1, t, c):
    """Between two tensors whose cosine is c."""
    theta = math.acos(c)
    return math.sin((1 - t) * theta) / math.sin(theta) * v_0 + math.sin(t * theta) / math.sin(theta) * v_1
