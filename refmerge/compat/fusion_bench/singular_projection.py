from typing import Literal

import numpy as np

from refmerge.compat.fusion_bench.dare import is_linear
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.numeric import like, scores


@method(
    "fusion_bench:singular_projection",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/smile_upscaling/singular_projection_merging.py",
    view="tensor",
    models=(1, 1),
)
def singular_projection(
    models,
    base,
    name,
    *,
    k: int = 128,
    rank: Literal["low", "high"] = "low",
    full_matrices: bool = False,
    embeddings: tuple = ("*emb*", "*wte*", "*wpe*", "*shared*", "*relative_attention_bias*"),
):
    """Projection of linear weights' changes; a k below 0 is that at which half of the sum of the singular values is
    reached. All else is the fine-tune's.

    Linear weights are matrices `*.weight` whose name matches none of the globs `embeddings`, which is ours: a file does not
    say what its tensors are.
    """
    (theta,) = models
    if not is_linear(name, base, embeddings):
        return theta
    # 1. task vector
    w_diff = finite(scores(theta) - scores(base), name)
    # 2. singular vectors of the base
    u, s, vt = np.linalg.svd(finite(scores(base), name), full_matrices=full_matrices)
    # 3. the first k, or the others
    if k < 0:
        sums = np.cumsum(s)
        k = int(np.sum(sums < 0.5 * sums[-1])) + 1
    chosen = slice(None, k) if rank == "low" else slice(k, None)
    u, v = u[:, chosen], vt[chosen].T
    # 4. project
    return base + like(u @ (u.T @ w_diff @ v) @ v.T, base)
