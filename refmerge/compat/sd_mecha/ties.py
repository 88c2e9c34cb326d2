from refmerge.compat.sd_mecha._steps import finite, trimmed, voted
from refmerge.method import method
from refmerge.methods.task_vectors.ties import disjoint_mean


@method(
    "sd_mecha:ties",
    paper="ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/ties.py:ties_sum",
    widens=True,
    domain={"k": (0.0, 1.0)},
)
def ties(models, base, group, *, k: float = 1.0, vote_sgn: bool = False, alpha: float = 1.0):
    """TIES for each tensor. Every model has one vote on a sign, whatever its magnitude, unless vote_sgn is true; what is not
    finite in the merged task vector becomes 0."""
    if group.size == 0:
        return base
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. trim; ties at the threshold stay
    tau = trimmed(tau, k, group, "sd_mecha:ties")
    # 3. elect sign
    gamma = voted(tau, vote_sgn)
    # 4. disjoint merge
    return base + alpha * finite(disjoint_mean(tau, gamma), 0.0)
