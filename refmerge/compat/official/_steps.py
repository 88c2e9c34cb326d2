"""Steps that the code of the authors of TIES and of DARE (MergeLM) shares."""

import math

from refmerge.errors import UsageError
from refmerge.numeric import array_namespace, indicator


def with_majority(gamma, group):
    """Zeros of gamma take the sign of the sum of all signs."""
    majority = group.sum(gamma)
    sign = float(majority > 0) - float(majority < 0)
    return gamma + sign * indicator(gamma == 0, like=gamma)


def at_least_kth_smallest(x, k, group, name):
    """x where its magnitude is at least the k-th smallest, ties kept; elsewhere 0. k = 0 is an error, as in torch."""
    if any(k_n < 1 for k_n in k):
        raise_no_kth(name)
    xp = array_namespace(*x)
    magnitude = list(map(xp.abs, x))
    least = group.kth_largest(*magnitude, k=[group.size - k_n + 1 for k_n in k])
    # NaN * 0 is NaN: a NaN survives the authors' trim, which multiplies by its mask.
    return [indicator(a >= c if not math.isnan(c) else xp.isnan(a), like=a) * x_n for x_n, a, c in zip(x, magnitude, least)]


def raise_no_kth(name):
    raise UsageError(f"{name}: nothing would be dropped, where the authors' code takes a 0-th smallest value and fails")
