from typing import Literal

import numpy as np

from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.twin_merging import compressed
from refmerge.numeric import total


@method(
    "official:twin_merging",
    paper="LZY-the-boys/Twin-Merging@f481c60 discriminative/twin_merge.py:run_twin_vector",
    view="tensor",
    stats={"": "draw"},
    domain={"mask_rate": (0.0, 1.0)},
)
def twin_merging(
    models,
    base,
    group,
    rng,
    name,
    *,
    router_prob: PerModel[float],
    mask_rate: float = 0.9,
    mask_strategy: Literal["svd", "magnitude", "bernoulli"] = "svd",
    scaling: float = 0.3,
):
    """The model for one input, whose router_prob goes through a softmax. The density is what 1 - mask_rate rounds to."""
    density = 1 - mask_rate
    # 1. shared expert, by task arithmetic
    merged = base + scaling * total(theta_n - base for theta_n in models)
    # 2. twin vectors
    twin = [theta_n - merged for theta_n in models]
    # 3. sparsify
    if base.ndim > 1 and density < 1:
        twin = compressed(twin, mask_strategy, density, group.tensor, rng, name)
    # 4. merge
    return merged + total(w_n * twin_n for w_n, twin_n in zip(softmax(router_prob), twin))


def softmax(logits):
    """In float32, of which their script makes a tensor: torch multiplies by the reciprocal of the sum."""
    x = np.float32(logits)
    e = np.exp(np.float64(x - x.max())).astype(np.float32)
    return [float(p) for p in e * (1 / total(e))]
