"""Steps that sd-mecha's methods share."""

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
