from typing import Literal

from refmerge.compat.official._steps import at_least_kth_smallest, raise_no_kth, with_majority
from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.ties import disjoint_mean, elect
from refmerge.numeric import array_namespace, indicator, mean, total


@method(
    "official:dare",
    paper="yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.mask_merging",
    over="model",
    stats={"": "draw"},
    domain={"weight_mask_rates": (0.0, 1.0)},
)
def dare(
    models,
    base,
    group,
    rng,
    *,
    weight_format: Literal["delta_weight", "finetuned_weight"] = "delta_weight",
    weight_mask_rates: PerModel[float] = 0.1,
    use_weight_rescale: bool = False,
    mask_strategy: Literal["random", "magnitude"] = "random",
    mask_apply_method: Literal["average_merging", "task_arithmetic", "ties_merging"] = "average_merging",
    scaling_coefficient: float = 1.0,
    param_value_mask_rate: float = 0.8,
):
    """Mask each fine-tune's task vector (or its weights), then merge the masked models. A recorded draw is a mask of what
    is DROPPED."""
    # 1. what is masked
    x = [theta_n - base for theta_n in models] if weight_format == "delta_weight" else list(models)
    # 2. drop
    rates = weight_mask_rates
    if mask_strategy == "random":
        x = [x_n - rng.keep(p, model=n) * x_n for n, (x_n, p) in enumerate(zip(x, rates))]
    else:
        x = without_smallest(x, rates, group.tensor)
    # 3. rescale
    if use_weight_rescale:
        x = [x_n if p == 1 else (1 / (1 - p)) * x_n for x_n, p in zip(x, rates)]
    masked = [base + x_n for x_n in x] if weight_format == "delta_weight" else x
    # 4. merge the masked models
    if mask_apply_method == "average_merging":
        return mean(masked)
    tau = [theta_n - base for theta_n in masked]
    if mask_apply_method == "ties_merging":
        k = int(group.size * param_value_mask_rate)
        tau = at_least_kth_smallest(tau, [k] * len(tau), group, "official:dare")
        return base + scaling_coefficient * disjoint_mean(tau, with_majority(elect(tau), group))
    return base + scaling_coefficient * total(tau)


def without_smallest(x, rates, tensor):
    """Zero what is at most the int(n rate)-th smallest magnitude of its tensor, ties included."""
    xp = array_namespace(*x)
    k = [int(tensor.size * p) for p in rates]
    if min(k) < 1:
        raise_no_kth("official:dare")
    magnitude = list(map(xp.abs, x))
    bounds = tensor.kth_largest(*magnitude, k=[tensor.size - k_n + 1 for k_n in k])
    return [indicator(xp.logical_not(a <= c), like=a) * x_n for x_n, a, c in zip(x, magnitude, bounds)]
