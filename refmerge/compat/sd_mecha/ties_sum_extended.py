from refmerge.compat.sd_mecha._steps import finite, over_count, trimmed, voted
from refmerge.compat.sd_mecha.model_stock import as_rows, stock_ratio
from refmerge.method import method
from refmerge.methods.task_vectors.ties import elected
from refmerge.numeric import array_namespace, total


@method(
    "sd_mecha:ties_sum_extended",
    paper="ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/ties.py:ties_sum_extended",
    widens=True,
    models=(2, None),
    view="tensor",
    domain={"k": (0.0, 1.0)},
)
def ties_sum_extended(
    models,
    base,
    group,
    *,
    k: float = 0.2,
    vote_sgn: bool = False,
    apply_stock: bool = False,
    cos_eps: float = 1e-6,
    alpha: float = 1.0,
):
    """sd_mecha:ties, times Model Stock's ratio of what is left in each row of the last axis. apply_stock, despite its name,
    leaves the ratio out; the tool's geometric median is not offered."""
    if group.size == 0:
        return base
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. trim; ties at the threshold stay
    tau = trimmed(tau, k, group, "sd_mecha:ties_sum_extended")
    # 3. elect sign
    gamma = voted(tau, vote_sgn)
    # 4. keep what agrees
    agrees = [elected(x, gamma) for x in tau]
    rows = [as_rows(a * x) for a, x in zip(agrees, tau)]
    count = as_rows(total(agrees))
    # 5. interpolation ratio
    mixed = total(rows) if apply_stock else stock_ratio(rows, cos_eps) * total(rows)
    # 6. merge
    merged = finite(over_count(mixed, count), 0.0)
    return base + alpha * array_namespace(base).reshape(merged, base.shape)
