import numpy as np

from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.wudi import adam
from refmerge.numeric import like, scores, total

LAYERS = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@method(
    "official:wudi",
    paper="nathanielyvo/WUDI-Merging@dc3cd12 vit/wudi_main.py:decompose_task_vectors",
    view="tensor",
    domain={"iter_num": (0, 1_000_000)},
)
def wudi(models, base, name, *, iter_num: int = 300, lr: float = 1e-5):
    """The authors' loop over four kinds of matrices of CLIP's towers; all other tensors stay the base's, and a task vector
    of zeros makes NaN of its matrix. Their lr is fixed."""
    if not any(layer in name for layer in LAYERS) or base.ndim != 2:
        return base
    # 1. task vectors
    vectors = [finite(scores(theta_t) - scores(base), name) for theta_t in models]
    # 2. descend from the sum
    merged = adam(total(vectors), lambda x: gradient(x, vectors), iter_num, lr)
    # 3. add
    return base + like(merged, base)


def gradient(x, vectors):
    """Of the sum of |(x - v) v^T|^2 / |v|^2, where |v| = 0 divides."""
    return 2 * total(((x - v) @ v.T / np.sum(v * v)) @ v for v in vectors)
