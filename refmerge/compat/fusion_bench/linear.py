import numpy as np

from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.numeric import divided, total


@method(
    "fusion_bench:linear",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/simple_average.py, weighted_average/weighted_average.py",
)
def linear(models, *, weights: PerModel[float | None] = None, normalize: bool = True):
    """simple_average where there are no weights, else weighted_average, which divides by a sum of zero without a guard."""
    given = [w_n is not None for w_n in weights]
    if any(given) and not all(given):
        raise UsageError("fusion_bench:linear: weights are given for some models and not for all")
    # 1. simple average
    if not any(given):
        return divided(total(models), len(models))
    # 2. weighted average
    c = np.asarray(weights) / (total(weights) if normalize else 1)
    return total(float(c_n) * x for c_n, x in zip(c, models))
