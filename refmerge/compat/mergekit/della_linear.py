from refmerge.compat.mergekit._steps import weighted_sum
from refmerge.compat.mergekit.della import magprune
from refmerge.method import PerModel, method


@method(
    "mergekit:della_linear",
    paper="mergekit 0.1.5 generalized_task_arithmetic.py",
    view=lambda ndim: "tensor" if ndim > 2 else "rows",
    stats={"mask": "draw"},
)
def della_linear(
    models,
    base,
    group,
    rng,
    *,
    weight: PerModel[float],
    density: PerModel[float] = 1.0,
    epsilon: PerModel[float] = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
):
    """Drop by rank along axis 1, restore each tensor's sum of magnitudes with one factor, add."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop and rescale
    sparse = magprune(delta, density, epsilon, rescale, rng, group)
    # 3. add
    mixed = weighted_sum(sparse, weight, normalize)
    return base + lambda_ * mixed
