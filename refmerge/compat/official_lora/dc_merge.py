from typing import Literal

from refmerge.compat.dcmerge._steps import changes, kept_rank, merged
from refmerge.compat.official._spectral import triplets
from refmerge.compat.official.dc_merge import covered
from refmerge.method import method
from refmerge.methods.subspaces.dc_merge import smoothed
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import scores


@method(
    "official_lora:dc_merge",
    paper="Tobeginwith/DC-Merge@3c443e4 vision_lora_merge/merging_functions.py:dc_merge",
    view=whole_matrices,
    domain={"rank_per_task": (1, float("inf")), "keep_topk": (0.0, 1.0), "rho": (1.0, float("inf"))},
)
def dc_merge(
    models,
    name,
    base=None,
    *,
    rank_per_task: int = 16,
    smoothing: Literal["avg", "linear"] = "avg",
    rho: float = 5.0,
    keep_topk: float = 0.001,
):
    """DC-Merge for LoRA, with smoothing and a known rank. Without a base the models are the adapters' changes."""
    # 1. task vectors
    Delta = changes(models, base)
    # 2. mean of what is no matrix
    if Delta[0].ndim != 2:
        return merged(base, Delta)
    # 3. task singular vectors, smoothed
    k = kept_rank(Delta, rank_per_task)
    tasks = [triplets(scores(Delta_t), k, name) for Delta_t in Delta]
    tasks = [(U_t, smoothed(S_t, {"avg": "average"}.get(smoothing, smoothing), rho), V_t) for U_t, S_t, V_t in tasks]
    # 4. merge in the cover space
    return merged(base, Delta, covered(tasks, max(1, int(keep_topk * (k * len(models)) ** 2))))
