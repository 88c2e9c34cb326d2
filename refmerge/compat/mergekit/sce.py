import numpy as np

from refmerge.compat.mergekit._steps import at_least
from refmerge.method import method
from refmerge.methods.task_vectors.sce import majority
from refmerge.numeric import array_namespace, at_precision, like, scores, stacked_sum


@method("mergekit:sce", paper="mergekit 0.1.5 sce.py")
def sce(models, base, group, *, select_topk: float = 1.0, int8_mask: bool = False):
    """SCE of the selected entries alone. Weights are equal where the mean squares add up to less than 1e-6, and a divisor is
    at least 1e-6."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. select
    if select_topk < 1:
        mask = most_variable(delta, select_topk, group)
        delta = [d * mask for d in delta]
    # 3. erase
    agrees = majority(delta, stacked_sum)
    # 4. calculate
    weight = shares(delta, group)
    # 5. merge
    share = [w * a for w, a in zip(weight, agrees)]
    return base + stacked_sum(d * s for d, s in zip(delta, share)) / at_least(stacked_sum(share), 1e-6)


def most_variable(delta, density, group):
    """1 at the entries of largest variance over the models: of those where it is not 0, int(density * number) with a product
    in float32, as torch makes it of a tensor."""
    if density <= 0:
        return array_namespace(*delta).zeros_like(delta[0])
    v = variance(delta)
    return group.top(v, k=int(np.float32(density) * np.float32(group.count(v != 0))))


def variance(delta):
    """Over the models, one after the other, in float64; then in the precision of the tensors. Of equal models exactly 0."""
    mean = scores(delta[0])
    squares = np.zeros_like(mean)
    for n, d in enumerate(map(scores, delta[1:]), start=2):
        change = d - mean
        mean = mean + change / n
        squares = squares + change * (d - mean)
    return like(squares / len(delta), delta[0])


def shares(delta, group):
    """Mean squares over their sum, all in the precision of the tensors; equal where that is below 1e-6."""

    def p(x):
        return at_precision(x, delta[0])

    squares = [p(s / group.size) for s in np.atleast_1d(group.dot(*((d, d) for d in delta))).tolist()]
    whole = p(sum(squares))
    return [p(1 / len(delta)) if abs(whole) < 1e-6 else p(s / whole) for s in squares]
