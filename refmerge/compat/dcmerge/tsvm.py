from refmerge.compat.dcmerge._steps import changes, kept_rank, merged
from refmerge.compat.official._spectral import polar, task_triplets
from refmerge.method import method
from refmerge.methods.subspaces.tsvm import whole_matrices


@method(
    "dcmerge:tsvm",
    paper="Tobeginwith/DC-Merge@3c443e4 vision_lora_merge/merging_functions.py:TSVM",
    view=whole_matrices,
    domain={"rank_per_task": (1, float("inf"))},
)
def tsvm(models, name, base=None, *, rank_per_task: int = 16):
    """TSV-Merge of adapters of a known rank. Without a base the models are the adapters' changes."""
    # 1. task vectors
    Delta = changes(models, base)
    # 2. mean of what is no matrix
    if Delta[0].ndim != 2:
        return merged(base, Delta)
    # 3. task singular vectors
    U, S, V = task_triplets(Delta, kept_rank(Delta, rank_per_task), name)
    # 4. decorrelate and merge
    return merged(base, Delta, (polar(U) * S) @ polar(V).T)
