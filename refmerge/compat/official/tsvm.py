from typing import Literal

from refmerge.compat.official._spectral import is_matrix, polar, running_mean, task_triplets, whitened
from refmerge.method import method
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import like


@method(
    "official:tsvm",
    paper="AntoAndGar/task_singular_vectors@a6c9718 src/utils/TSVM_utils.py:compute_and_sum_svd_mem_reduction",
    view=whole_matrices,
)
def tsvm(
    models,
    base,
    name,
    *,
    alpha: float = 1.0,
    variant: Literal[
        "compute_and_sum_svd_mem_reduction",
        "compute_and_sum_svd_mem_reduction_2",
        "compute_and_sum_svd_mem_reduction_lossless",
        "compute_and_sum_svd_mem_reduction_rank_reduction",
        "sum_svd_dict",
    ] = "compute_and_sum_svd_mem_reduction",
):
    """The authors' functions: the first and the last are TSV-Merge; _2 whitens by eigenvalues, lossless keeps all triplets,
    and rank_reduction makes nothing orthogonal. Their lossless_eigen leaves the singular vectors out and fails."""
    # 1. task vectors
    Delta = [theta_t - base for theta_t in models]
    # 2. running mean of what is no matrix
    if not is_matrix(base, name):
        return base + alpha * running_mean(Delta)
    # 3. task singular vectors: none where there are more tasks than dimensions
    r = min(base.shape)
    U, S, V = task_triplets(Delta, r if variant.endswith("_lossless") else int(r * (1 / len(models))), name)
    # 4. decorrelate
    if variant.endswith("_2"):
        U, V = whitened(U), whitened(V)
    elif not variant.endswith("_rank_reduction"):
        U, V = polar(U), polar(V)
    # 5. merge
    return base + alpha * like((U * S) @ V.T, base)
