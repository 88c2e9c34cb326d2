"""Steps that PEFT's functions on tensors share. PEFT merges LoRA factors, or products of them, which have no base."""

import numpy as np

from refmerge.methods.task_vectors.bitdelta import signs
from refmerge.methods.task_vectors.ties import elected
from refmerge.numeric import array_namespace, divided, stacked_sum


def keep_largest(t, group, density):
    """The int(density n) largest of each tensor; all of them from density 1 on."""
    if density >= 1:
        return list(t)
    masks = group.top(*map(array_namespace(*t).abs, t), k=[int(density * group.size)] * len(t))
    return [m * x for m, x in zip(masks, t)]


def keep_at_random(t, rng, density):
    """Each entry with probability density, and divided by it, which at density 0 is 0 / 0; all of them from density 1 on."""
    return list(t) if density >= 1 else [divided(rng.keep(density, model=n) * x, density) for n, x in enumerate(t)]


def majority(t, how):
    """+1 where the sum, or the sum of the signs, is not negative, else -1."""
    votes = t if how == "total" else map(array_namespace(*t).sign, t)
    return signs(stacked_sum(votes))


def weighted(t, weights):
    """PEFT keeps weights in float32."""
    return [float(np.float32(w)) * x for w, x in zip(weights, t)]


def disjoint_merge(t, weights, sign):
    """Sum of the weighted entries of that sign over their number: the weights are neither in the vote nor in the divisor."""
    agrees = [elected(x, sign) for x in t]
    count = stacked_sum(agrees)
    mixed = stacked_sum(m * x for m, x in zip(agrees, weighted(t, weights)))
    return mixed / array_namespace(count).maximum(count, array_namespace(count).ones_like(count))
