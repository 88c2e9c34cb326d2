# Longer than others: three ways to trim, four to elect, seven to merge, and any of them may be combined.
import math

import numpy as np

from refmerge.compat.official._steps import at_least_kth_smallest, with_majority
from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import array_namespace, indicator, stacked_sum, total


@method("official:ties", paper="prateeky2806/ties-merging@44e7891 src/utils/merge_utils.py:merge_methods", over="model")
def ties(
    models,
    base,
    group,
    *,
    reset_type: str = "topk",
    reset_thresh: float | str = 20,
    resolve_method: str = "mass",
    merge_func: str = "dis-mean",
    lam: float = 1.0,
):
    """The authors' merge_methods with all its variants. reset_thresh: percent if above 1, else a fraction; "none" to keep
    all."""
    # 1. task vectors
    T = [theta_n - base for theta_n in models]
    # 2. reset noise
    T = reset(T, group, reset_type, reset_thresh)
    # 3. resolve signs
    gamma = None if resolve_method == "none" else with_majority(signs(T, group, resolve_method), group)
    # 4. merge
    merged = disjoint(T, gamma, merge_func.split("-")[-1]) if "dis" in merge_func else aggregate(T, gamma, merge_func)
    return base + lam * merged


def reset(T, group, kind, threshold, name="official:ties"):
    """Zero what the authors call noise. "topk" keeps one entry more than int(K d), and all ties with it."""
    if threshold == "none" or threshold is None or not any(word in kind for word in ("nf", "topk", "std")):
        return T
    if "nf" in kind:
        return [share_of_norm(T_n, group, threshold) * T_n for T_n in T]
    if "topk" in kind:
        K = threshold / 100 if threshold > 1 else threshold
        return at_least_kth_smallest(T, [group.size - int(group.size * K)] * len(T), group, name)
    xp = array_namespace(*T)
    d = group.size
    means = np.atleast_1d(group.sum(*T)) / d
    centred = [T_n - float(mean) for T_n, mean in zip(T, means)]
    squares = np.atleast_1d(group.sum(*(c * c for c in centred))).tolist()
    bounds = [threshold * (s / (d - 1)) ** 0.5 if d > 1 else math.nan for s in squares]
    return [indicator(xp.abs(c) > bound, like=T_n) * T_n for T_n, c, bound in zip(T, centred, bounds)]


def share_of_norm(T_n, group, share):
    """1 at the fewest largest entries whose squares reach `share` of the squared norm, and, by how the authors pad their
    indices, at the last entry of the vector too if not all are kept."""
    xp = array_namespace(T_n)
    magnitude, square, d = xp.abs(T_n), T_n * T_n, group.size
    whole = group.sum(square)
    low, high = 1, d  # the answer lies in [low, high]; nothing reaching the share keeps one entry
    if 0 < whole < math.inf and share <= 1:
        while low < high:
            middle = (low + high) // 2
            if group.sum(group.top(magnitude, k=middle) * square) / whole >= share:
                high = middle
            else:
                low = middle + 1
    kept = group.top(magnitude, k=low)
    last = 1 - group.top(xp.ones_like(T_n), k=d - 1)
    return kept if low == d else xp.maximum(kept, last)


def signs(T, group, how):
    """The elected sign of each entry, before zeros are resolved."""
    xp = array_namespace(*T)
    if how == "mass":
        return xp.sign(stacked_sum(T))
    if how not in ("normfrac", "normmass"):
        raise UsageError(f"official:ties: resolve_method = {how!r} is none of 'mass', 'normfrac', 'normmass', 'none'")
    squares = [T_n * T_n for T_n in T]
    norms = np.atleast_1d(group.sum(*squares)).tolist()
    share = [s / xp.full_like(s, norm) for s, norm in zip(squares, norms)]
    if how == "normmass":
        return xp.sign(total(xp.sign(T_n) * s for T_n, s in zip(T, share)))
    best, most = T[0], share[0]
    for T_n, s in zip(T[1:], share[1:]):
        better = (s > most) | (xp.isnan(s) & ~xp.isnan(most))  # torch's argmax takes the first NaN as the largest
        best, most = xp.where(better, T_n, best), xp.where(better, s, most)
    return xp.sign(best)


def disjoint(T, gamma, how):
    """Aggregate the entries of the elected sign; where no sign could be elected, the negative ones."""
    xp = array_namespace(*T)
    selected = T if gamma is None else agreeing(T, gamma)
    if how == "sum":
        return stacked_sum(selected)
    if how == "mean":
        count = total(indicator(s != 0, like=s) for s in selected)
        return stacked_sum(selected) / xp.maximum(count, xp.ones_like(count))
    if how != "max":
        raise UsageError(f"official:ties: merge_func = 'dis-{how}' is none of 'dis-mean', 'dis-sum', 'dis-max'")
    if gamma is None:
        raise UsageError("official:ties: merge_func = 'dis-max' needs a sign: the authors' code fails without one")
    largest = xp.abs(selected[0])
    for s in selected[1:]:
        largest = xp.maximum(largest, xp.abs(s))
    return largest * gamma


def agreeing(T, gamma):
    """The entries of the elected sign, the others zero."""
    xp = array_namespace(gamma)
    return [indicator(xp.where(gamma > 0, T_n > 0, T_n < 0), like=T_n) * T_n for T_n in T]


def aggregate(T, gamma, how):
    """Aggregate all models, whatever their signs, and give the magnitude the elected sign."""
    xp = array_namespace(*T)
    if how == "mean":
        merged = (1 / len(T)) * total(T)
    elif how == "sum":
        merged = total(T)
    elif how == "median":
        merged = xp.sort(xp.stack(T), axis=0)[(len(T) - 1) // 2, ...]
    elif how == "magnitude":
        merged = T[0]
        for T_n in T[1:]:
            merged = xp.where(xp.abs(T_n) > xp.abs(merged), T_n, merged)
    else:
        raise UsageError(
            f"official:ties: merge_func = {how!r} is none of 'mean', 'sum', 'median', 'magnitude', 'dis-...'"
        )
    return merged if gamma is None else xp.abs(merged) * gamma
