from refmerge.compat.fusion_bench.fisher import by_inverse_norm, coefficients
from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.data_driven.fisher import given, norms
from refmerge.numeric import total


@method(
    "dataless:fisher",
    paper="bloomberg/dataless-model-merging@92247ae src/model_merge/avg_merger.py:FedAvgMerger.fisher_weighted_average",
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
    fisher_normalize: str | None = None,
    fisher_smooth: float = 1e-10,
    model_coeffs: tuple | None = None,
):
    """Fisher averaging with a floor that is added; norms, if at all, of each tensor or of the model."""
    if fisher_normalize not in (None, "param", "model"):
        raise UsageError(f"dataless:fisher: fisher_normalize = {fisher_normalize!r} is none of 'param', 'model', None")
    # 1. Fisher information
    F = given(stats, "", name)
    # 2. coefficients
    c = coefficients(model_coeffs, len(models), "dataless:fisher")
    if fisher_normalize is not None:
        c = by_inverse_norm(c, norms(F, group.tensor if fisher_normalize == "param" else group), fisher_smooth)
    # 3. weighted average
    P = [c_n * (F_n + fisher_smooth) for c_n, F_n in zip(c, F)]
    return total(P_n * theta_n for P_n, theta_n in zip(P, models)) / total(P)
