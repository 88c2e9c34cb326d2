from refmerge.compat.dcmerge._steps import changes, kept_rank, merged
from refmerge.compat.official._spectral import common_and_task_specific, polar
from refmerge.method import method
from refmerge.methods.subspaces.iso_c import isotropic
from refmerge.methods.subspaces.tsvm import whole_matrices


@method(
    "dcmerge:iso_cts",
    paper="Tobeginwith/DC-Merge@3c443e4 vision_lora_merge/merging_functions.py:iso_cts",
    view=whole_matrices,
    domain={"rank_per_task": (1, float("inf")), "common_space_fraction": (0.0, 1.0)},
)
def iso_cts(models, name, base=None, *, rank_per_task: int = 16, common_space_fraction: float = 0.8):
    """Iso-CTS of adapters of a known rank, in as many dimensions as they have together. Without a base the models are the
    adapters' changes."""
    # 1. task vectors
    Delta = changes(models, base)
    # 2. mean of what is no matrix
    if Delta[0].ndim != 2:
        return merged(base, Delta)
    # 3. dimensions: each task has at least one, and where that makes more than r, the last common ones go
    T = len(Delta)
    r = T * kept_rank(Delta, rank_per_task)
    n = round((r - int(r * common_space_fraction)) / T)
    c = r - n * T
    # 4. common and task-specific spaces
    U, S, V = common_and_task_specific(Delta, r + T, max(1, n), c, name)
    # 5. orthogonalise and make isotropic
    P, Q = polar(U)[:, :r], polar(V)[:, :r]
    return merged(base, Delta, (isotropic(S[:r]) * P) @ Q.T)
