import numpy as np

from refmerge.compat.mergekit.sce import most_variable
from refmerge.method import method
from refmerge.methods.task_vectors.sce import majority, weighted_mean
from refmerge.numeric import at_precision, stacked_sum


@method(
    "official:sce",
    paper="fanqiwan/FuseAI@7d9a307 FuseChat/mergekit/mergekit/merge_methods/sce_merging.py:SCETask.execute",
    domain={"select_topk": (0.0, float("inf"))},
)
def sce(models, base, group, *, select_topk: float = 1.0):
    """SCE in which the selection decides the weights alone: all entries are merged, selected or not."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. select and calculate
    selected = delta
    if select_topk < 1:
        mask = most_variable(delta, select_topk, group)
        selected = [d * mask for d in delta]
    weight = shares(selected, group)
    # 3. erase
    agrees = majority(delta, stacked_sum)
    # 4. merge
    return base + weighted_mean(delta, agrees, weight, stacked_sum)


def shares(delta, group):
    """Shares of the sum of squares, in the precision of the tensors at first and at last; equal where that sum is 0."""
    sums = np.atleast_1d(group.dot(*((d, d) for d in delta))).tolist()
    squares = [at_precision(s, delta[0]) / group.size for s in sums]
    whole = sum(squares)
    return [at_precision(1 / len(delta) if whole == 0 else s / whole, delta[0]) for s in squares]
