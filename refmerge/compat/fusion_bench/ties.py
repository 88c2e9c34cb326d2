from typing import Literal

from refmerge.compat.fusion_bench._steps import refuse_removal
from refmerge.compat.official._steps import with_majority
from refmerge.compat.official.ties import disjoint, reset
from refmerge.method import method
from refmerge.methods.task_vectors.ties import elect


@method(
    "fusion_bench:ties",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/ties_merging/ties_merging_utils.py:ties_merging",
    over="model",
)
def ties(
    models,
    base,
    group,
    *,
    scaling_factor: float = 0.3,
    threshold: float = 20.0,
    merge_func: Literal["sum", "mean", "max"] = "sum",
    remove_keys: tuple = (),
):
    """The authors' TIES, which keeps a percentage (a fraction up to 1), with sums of what agrees in place of means."""
    refuse_removal(remove_keys, "fusion_bench:ties")
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. trim; ties at the threshold stay
    tau = reset(tau, group, "topk", threshold, "fusion_bench:ties")
    # 3. elect sign
    gamma = with_majority(elect(tau), group)
    # 4. disjoint merge
    return base + scaling_factor * disjoint(tau, gamma, merge_func)
