from refmerge.compat.mergekit._steps import consensus, largest, rescaled
from refmerge.method import PerModel, method


@method("mergekit:ties", paper="mergekit 0.1.5 generalized_task_arithmetic.py")
def ties(
    models,
    base,
    group,
    *,
    weight: PerModel[float],
    density: PerModel[float] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
):
    """TIES for each tensor: exactly max(1, trunc(density n)) entries stay, weights act before the election, 0 elects +."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. keep the largest
    sparse = largest(delta, density, group)
    if rescale:
        sparse = rescaled(sparse, delta, density, group)
    # 3. elect and merge
    mixed = consensus(sparse, weight, normalize)
    return base + lambda_ * mixed
