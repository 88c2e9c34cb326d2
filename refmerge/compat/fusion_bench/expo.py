from refmerge.method import method
from refmerge.numeric import divided, total


@method("fusion_bench:expo", paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/linear/expo.py:ExPOAlgorithm.run")
def expo(models, base, *, extrapolation_factor: float = 0.1):
    """ExPO from the average of the models, where there are several."""
    # 1. average
    theta = divided(total(models), len(models))
    # 2. change
    delta = theta - base
    # 3. extrapolate
    return theta + extrapolation_factor * delta
