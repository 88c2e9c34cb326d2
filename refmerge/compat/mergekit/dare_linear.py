from refmerge.compat.mergekit._steps import bernoulli, weighted_sum
from refmerge.method import PerModel, method


@method("mergekit:dare_linear", paper="mergekit 0.1.5 generalized_task_arithmetic.py", stats={"mask": "draw"})
def dare_linear(
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
    """Drop at random, restore each tensor's sum of magnitudes with one factor, add."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop and rescale
    sparse = bernoulli(delta, density, rescale, rng, group)
    # 3. add
    mixed = weighted_sum(sparse, weight, normalize)
    return base + lambda_ * mixed
