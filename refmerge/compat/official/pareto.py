from refmerge.method import PerModel, method
from refmerge.numeric import total


@method("official:pareto", paper="nik-dim/pamal@26adf53 src/ll/subspace_modules.py:Subspace{Conv,Linear,BatchNorm2d}")
def pareto(models, *, alpha: PerModel[float]):
    """The member weights combined with the preferences alpha, which nobody checks to lie on the simplex."""
    # 1. combine
    return total(alpha_i * theta_i for alpha_i, theta_i in zip(alpha, models))
