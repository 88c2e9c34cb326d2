from refmerge.compat.mergekit._steps import bernoulli, consensus
from refmerge.method import PerModel, method


@method("mergekit:dare_ties", paper="mergekit 0.1.5 generalized_task_arithmetic.py", stats={"mask": "draw"})
def dare_ties(
    models,
    base,
    group,
    rng,
    *,
    weight: PerModel[float],
    density: PerModel[float] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
):
    """Drop at random, restore each tensor's sum of magnitudes with one factor, then elect and add what agrees; no trim."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop and rescale
    sparse = bernoulli(delta, density, rescale, rng, group)
    # 3. elect and merge
    mixed = consensus(sparse, weight, normalize)
    return base + lambda_ * mixed
