"""Steps that sd-mecha's methods share."""

from refmerge.compat.official._steps import at_least_kth_smallest
from refmerge.methods.task_vectors.ties import elect
from refmerge.numeric import array_namespace


def lerp(a, b, t):
    """From a to b as torch computes it: from the nearer end, so that both ends are exact."""
    return a + t * (b - a) if abs(t) < 0.5 else b - (1 - t) * (b - a)


def finite(x, limit=None):
    """x with 0 for NaN, and for its infinities the limit with their sign: the dtype's largest number unless said."""
    xp = array_namespace(x)
    limit = xp.finfo(x.dtype).max if limit is None else limit
    inside = xp.where(xp.isinf(x), limit * xp.sign(x), x)
    return xp.where(xp.isnan(x), xp.zeros_like(x), inside)


def trimmed(tau, k, group, name):
    """TIES' trim for each tensor, with a threshold: ties stay."""
    return at_least_kth_smallest(tau, [max(int((1 - k) * group.size), 1)] * len(tau), group, name)


def voted(tau, vote_sgn):
    """The elected sign. Every model has one vote, or, with vote_sgn, as much as its entry."""
    return elect(tau if vote_sgn else list(map(array_namespace(*tau).sign, tau)))


def over_count(x, count):
    """x over how many it is a sum of, where there are any."""
    xp = array_namespace(x)
    return x / xp.maximum(count, xp.ones_like(count))
