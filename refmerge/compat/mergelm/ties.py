from refmerge.compat.official._steps import at_least_kth_smallest, with_majority
from refmerge.method import method
from refmerge.methods.task_vectors.ties import disjoint_mean, elect


@method(
    "mergelm:ties",
    paper="yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.ties_merging",
    over="model",
    domain={"param_value_mask_rate": (0.0, 1.0)},
)
def ties(models, base, group, *, param_value_mask_rate: float = 0.8, scaling_coefficient: float = 1.0):
    """The authors' TIES with a rate of what is dropped in place of a percentage kept; nothing where no sign is elected and
    there is no majority."""
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. trim; ties at the threshold stay
    tau = at_least_kth_smallest(tau, [int(group.size * param_value_mask_rate)] * len(tau), group, "mergelm:ties")
    # 3. elect sign
    gamma = with_majority(elect(tau), group)
    # 4. disjoint merge
    return base + scaling_coefficient * disjoint_mean(tau, gamma)
