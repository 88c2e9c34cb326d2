import math

from refmerge.method import method
from refmerge.numeric import clamp


@method("slerp", paper="Shoemake 1985, doi:10.1145/325334.325242", models=(2, 2), domain={"eps": (0.0, 1.0)})
def slerp(models, group, *, t: float = 0.5, eps: float = 1e-3):
    """Spherical linear interpolation from the first model (t = 0) to the second (t = 1), tensor by tensor.

    Where the two directions are undefined (a zero tensor), or within eps of parallel or opposite, the straight line: from
    sums of float32 products such an angle cannot be told from none. Near parallel the line is 1.3e-7 from the arc at most.
    """
    a, b = models
    # 1. angle
    aa, bb, ab = group.dot((a, a), (b, b), (a, b))
    omega = angle(aa, bb, ab)
    # 2. no arc to follow
    if math.sin(omega) <= eps:
        return (1 - t) * a + t * b
    # 3. arc
    c_a, c_b = arc(t, omega)
    return c_a * a + c_b * b


def angle(aa, bb, ab):
    """Angle of two vectors from their inner products; 0 if one of them is zero."""
    norms = math.sqrt(aa) * math.sqrt(bb)
    return math.acos(clamp(ab / norms, -1.0, 1.0)) if norms != 0 else 0.0


def arc(t, omega):
    """What is taken of two vectors at the angle omega to be t of the way along the arc from the first to the second."""
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
