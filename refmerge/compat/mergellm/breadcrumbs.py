from refmerge.compat.mergellm._steps import without_smallest
from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import array_namespace, indicator, total


@method(
    "mergellm:breadcrumbs",
    paper="yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.breadcrumbs_merging",
    domain={"param_density": (0.0, 1.0), "param_value_mask_rate": (0.0, 1.0)},
)
def breadcrumbs(
    models,
    base,
    group,
    *,
    param_density: float = 0.9,
    param_value_mask_rate: float = 0.09,
    scaling_coefficient: float = 1.0,
):
    """Breadcrumbs for each tensor: param_density is what stays, param_value_mask_rate the share of small entries that goes;
    what is left to go are the largest. A tensor of which no small entry is to go loses none, where their code fails."""
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. drop the small and the large entries; both thresholds stay
    small = int(group.size * param_value_mask_rate)
    large = int(group.size * (1 - param_density)) - small
    if large < 0:
        raise UsageError(
            f"mergellm:breadcrumbs: of {group.size} entries param_density {param_density:g} drops fewer than "
            f"param_value_mask_rate {param_value_mask_rate:g} alone"
        )
    tau = without_largest(without_smallest(tau, small, group), large, group)
    # 3. add
    return base + scaling_coefficient * total(tau)


def without_largest(tau, k, group):
    """0 above the (k + 1)-th largest magnitude of the tensor."""
    magnitude = list(map(array_namespace(*tau).abs, tau))
    most = group.kth_largest(*magnitude, k=[k + 1] * len(tau)) if group.size else magnitude
    return [indicator(a <= c, like=a) * x for a, c, x in zip(magnitude, most, tau)]
