from refmerge.compat.mergellm._steps import without_smallest
from refmerge.compat.official._steps import with_majority
from refmerge.method import method
from refmerge.methods.task_vectors.ties import disjoint_mean, elect


@method(
    "mergellm:ties",
    paper="yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.ties_merging",
    domain={"param_value_mask_rate": (0.0, 1.0)},
)
def ties(models, base, group, *, param_value_mask_rate: float = 0.8, scaling_coefficient: float = 1.0):
    """MergeLM's TIES for each tensor by itself, the majority of the signs too. A tensor of which none is to go stays whole,
    where their code fails."""
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. trim; ties at the threshold stay
    tau = without_smallest(tau, int(group.size * param_value_mask_rate), group)
    # 3. elect sign
    gamma = with_majority(elect(tau), group)
    # 4. disjoint merge
    return base + scaling_coefficient * disjoint_mean(tau, gamma)
