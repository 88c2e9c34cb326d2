from refmerge.compat.mergekit._steps import weighted_sum
from refmerge.method import PerModel, method


@method("mergekit:task_arithmetic", paper="mergekit 0.1.5 generalized_task_arithmetic.py")
def task_arithmetic(
    models,
    base,
    *,
    weight: PerModel[float],
    density: PerModel[float] = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
):
    """Weighted sum of the task vectors. density and rescale are accepted and do nothing, int8_mask never has an effect."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. add
    mixed = weighted_sum(delta, weight, normalize)
    return base + lambda_ * mixed
