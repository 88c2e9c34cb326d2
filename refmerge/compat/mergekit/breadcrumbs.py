from refmerge.compat.mergekit._steps import rescaled, weighted_sum, without_outliers
from refmerge.method import PerModel, method


@method("mergekit:breadcrumbs", paper="mergekit 0.1.5 generalized_task_arithmetic.py")
def breadcrumbs(
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
    """Breadcrumbs for each tensor: gamma is the fraction of largest entries dropped, density the fraction kept."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop outliers and small entries
    sparse = without_outliers(delta, density, gamma, group)
    if rescale:
        sparse = rescaled(sparse, delta, density, group)
    # 3. add
    mixed = weighted_sum(sparse, weight, normalize)
    return base + lambda_ * mixed
