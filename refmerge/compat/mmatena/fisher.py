import math

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.data_driven.fisher import at_least, given, norms
from refmerge.numeric import total


@method(
    "mmatena:fisher",
    paper="mmatena/model_merging@46802f9 model_merging/merging.py:_merge_with_coeffs",
    over="model",
    stats={"": "element"},
    needs="models",
)
def fisher(
    models,
    stats,
    group,
    name,
    *,
    coefficients: tuple | None = None,
    fisher_floor: float = 1e-6,
    favor_target_model: bool = True,
    normalize_fishers: bool = True,
):
    """Fisher averaging with the authors' defaults and no checks: 0 / 0 where no model has any information."""
    c = [1 / len(models)] * len(models) if coefficients is None else list(coefficients)
    if len(c) != len(models):
        raise UsageError(f"mmatena:fisher: {len(c)} coefficients for {len(models)} models")
    # 1. Fisher information
    F = given(stats, "", name)
    # 2. coefficients
    if normalize_fishers:
        c = [c_n / length if length else math.inf for c_n, length in zip(c, norms(F, group))]
    # 3. floor
    F = [at_least(F_n, fisher_floor) if n == 0 or not favor_target_model else F_n for n, F_n in enumerate(F)]
    # 4. weighted average
    P = [c_n * F_n for c_n, F_n in zip(c, F)]
    return total(P_n * theta_n for P_n, theta_n in zip(P, models)) / total(P)
