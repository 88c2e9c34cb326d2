"""Steps that mergekit's task-arithmetic family shares (mergekit 0.1.5, generalized_task_arithmetic.py and sparsify.py)."""

from refmerge.errors import UsageError
from refmerge.methods.task_vectors.sce import majority, quotient
from refmerge.numeric import array_namespace, at_precision, in_float32, rounded_like, stacked_sum


def largest(delta, density, group):
    """Magnitude sparsifier: exactly max(1, trunc(density * n)) entries; all if density >= 1, none if it is <= 0."""
    n = group.size
    k = [n if rho >= 1 else 0 if rho <= 0 else max(1, int(rho * n)) for rho in density]
    masks = group.top(*map(array_namespace(*delta).abs, delta), k=k)
    return [m * d for m, d in zip(masks, delta)]


def without_outliers(delta, density, gamma, group):
    """Outlier sparsifier: skip the trunc(gamma * n) largest, keep the next trunc(density * n); where there are not so many,
    the smallest trunc(density * n)."""
    n = group.size
    keep = [n if rho >= 1 else 0 if rho <= 0 else int(rho * n) for rho in density]
    outer = [min(n, k + int(g * n)) if 0 < k < n else k for k, g in zip(keep, gamma)]
    inner = [o - k for o, k in zip(outer, keep)]
    magnitude = list(map(array_namespace(*delta).abs, delta))
    masks = group.top(*magnitude, *magnitude, k=outer + inner)
    return [(o - i) * d for o, i, d in zip(masks[: len(delta)], masks[len(delta) :], delta)]


def bernoulli(delta, density, rescale, rng, group):
    """Random sparsifier: keep with probability density; no draw where density >= 1, nor where it is 0."""
    if any(rho < 0 for rho in density):
        raise UsageError(f"mergekit: density {min(density):g} is below 0, and no probability")
    masks = [1.0 if rho >= 1 else rng.keep(rho, model=n) if rho else 0.0 for n, rho in enumerate(density)]
    kept = [m * d for m, d in zip(masks, delta)]
    return drawn(kept, delta, density, rescale, group)


def drawn(kept, delta, density, rescale, group):
    """What a random sparsifier makes of the entries that it keeps, in float32 whatever the tensors are, bfloat16 aside."""

    def wide(x):
        return x if str(x.dtype).endswith("bfloat16") else in_float32(x)

    sparse = list(map(wide, kept))
    if rescale:
        sparse = rescaled(sparse, list(map(wide, delta)), density, group)
    return [d if rho >= 1 else rounded_like(s, d) for d, rho, s in zip(delta, density, sparse)]


def rescaled(sparse, delta, density, group):
    """Multiply each sparse task vector so that the sum of magnitudes is what it was before: one factor for a tensor."""
    sums = group.sum(*delta, *sparse, of=array_namespace(*delta).abs)
    before, after = sums[: len(delta)], sums[len(delta) :]
    guard = [rho >= 1 or s0 < 1e-7 or s1 < 1e-7 for rho, s0, s1 in zip(density, before, after)]
    ratio = [1.0 if g else at_precision(s0, r) / at_precision(s1, r) for r, g, s0, s1 in zip(sparse, guard, before, after)]
    return [r if g else at_precision(c, r) * r for r, g, c in zip(sparse, guard, ratio)]


def consensus(delta, weight, normalize):
    """Elect the sign of the weighted sum (0 elects +), add what agrees, divide by the weights that agree."""
    weight = [at_precision(w, delta[0]) for w in weight]
    weighted = [w * d for w, d in zip(weight, delta)]
    agrees = majority(weighted, stacked_sum)
    mixed = stacked_sum(m * x for m, x in zip(agrees, weighted))
    if not normalize:
        return mixed
    return quotient(mixed, stacked_sum(w * m for w, m in zip(weight, agrees)))


def weighted_sum(delta, weight, normalize):
    """Sum of the weighted task vectors, divided by the sum of the weights in the tensors' own precision."""
    weight = [at_precision(w, delta[0]) for w in weight]
    mixed = stacked_sum(w * d for w, d in zip(weight, delta))
    if not normalize:
        return mixed
    xp = array_namespace(mixed)
    divisor = stacked_sum(w * xp.ones_like(mixed[:1, ...]) for w in weight)
    return mixed / xp.where(xp.abs(divisor) < 1e-8, xp.ones_like(divisor), divisor)


def at_least(x, low):
    """x with no entry below low, which is no finer than the tensors' numbers."""
    xp = array_namespace(x)
    return xp.maximum(x, xp.full_like(x, at_precision(low, x)))
