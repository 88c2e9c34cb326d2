from refmerge.compat.mergekit._steps import consensus, rescaled, without_outliers
from refmerge.method import PerModel, method


@method("mergekit:breadcrumbs_ties", paper="mergekit 0.1.5 generalized_task_arithmetic.py")
def breadcrumbs_ties(
    models,
    base,
    group,
    *,
    weight: PerModel[float],
    density: PerModel[float] = 1.0,
    gamma: PerModel[float] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
):
    """Breadcrumbs for each tensor, then elect the sign of the weighted sum and add what agrees, not averaged by default."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop outliers and small entries
    sparse = without_outliers(delta, density, gamma, group)
    if rescale:
        sparse = rescaled(sparse, delta, density, group)
    # 3. elect and merge
    mixed = consensus(sparse, weight, normalize)
    return base + lambda_ * mixed
