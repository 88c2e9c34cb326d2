from refmerge.compat.mergekit._steps import at_least
from refmerge.method import method
from refmerge.numeric import array_namespace


@method("mergekit:nearswap", paper="mergekit 0.1.5 nearswap.py", models=(1, 1))
def nearswap(models, base, *, t: float):
    """Each entry goes t towards the other model's, a difference below 1e-6 counting as 1e-6; a t below 0 counts as 0."""
    a, (b,) = base, models
    # 1. distance
    distance = at_least(abs(a - b), 1e-6)
    # 2. share of the other model
    w = share(t, distance)
    # 3. mix
    return w * b + (1 - w) * a


def share(t, distance):
    """t / distance, held inside [0, 1]; torch divides a number by a tensor as the number times the reciprocals."""
    xp = array_namespace(distance)
    return xp.clip(t * (xp.ones_like(distance) / distance), 0.0, 1.0)
