from typing import Literal

from refmerge.method import method
from refmerge.methods.task_vectors.ram import changes, over_count
from refmerge.numeric import array_namespace, indicator, stacked_sum, total


@method(
    "official:ram",
    paper="xiangchi-yuan/mrl@e2d930d ram-main.py:agentic_reinforcement_merge_rescale_v2",
    over="model",
    widens=True,
)
def ram(
    models,
    base,
    group,
    *,
    merge_mode: Literal["arm", "arm-r", "arm-r-v2"] = "arm-r-v2",
    rescale_factor: float = 1.05,
    threshold: float = 1e-5,
):
    """The authors' RAM ("arm", or a factor of 1) and RAM+: unique changes are enlarged up to rescale_factor, by the part of
    a model's changes that others share ("arm-r"), or by shared over unique ("arm-r-v2"), counted over the model."""
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. changes
    changed = changes(tau, threshold)
    masks = [indicator(c_n, like=tau_n) for c_n, tau_n in zip(changed, tau)]
    count = total(masks)
    tau = [m_n * tau_n for m_n, tau_n in zip(masks, tau)]
    # 3. scales
    if merge_mode != "arm":
        ratio = ratios(changed, count, group, merge_mode)
        scale = [1 + (max(rescale_factor, 1.0) - 1) * min(1.0, rho) for rho in ratio]
        unique, shared = indicator(count == 1, like=count), indicator(count >= 2, like=count)
        tau = [(s_n * unique + shared) * tau_n for s_n, tau_n in zip(scale, tau)]
    # 4. merge
    mixed = over_count(stacked_sum(tau), count)
    return base + array_namespace(base).where(count > 0, mixed, 0 * count)


def ratios(changed, count, group, merge_mode):
    """Of each model's changes the shared ones, over all or over the unique ones; 0 where it has none to enlarge."""
    counts = group.count(*changed, *(c_n & (count >= 2) for c_n in changed))
    pairs = list(zip(counts[: len(changed)], counts[len(changed) :]))
    if merge_mode == "arm-r":
        return [shared / every if every else 0.0 for every, shared in pairs]
    return [shared / (every - shared) if every > shared else 0.0 for every, shared in pairs]
