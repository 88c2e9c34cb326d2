import math
from typing import Literal

import numpy as np

from refmerge.matrices import change, decomposed
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.methods.subspaces.wudi import is_layer, significant
from refmerge.numeric import like, scores


@method(
    "singular_projection",
    paper="arXiv:2408.10174",
    view="tensor",
    models=(1, 1),
    domain={"k": (0, math.inf), "tolerance": (0.0, 1.0)},
)
def singular_projection(
    models,
    base,
    name,
    *,
    k: int | None = 128,
    part: Literal["low", "high"] = "low",
    tolerance: float = 1e-5,
    layers: tuple = ("*",),
):
    """Singular projection: of what fine-tuning changed in a matrix, the part inside, or outside, the base's own subspaces.

    "low" keeps what maps the base's first right singular vectors to its first left ones, `k` of each or, with None, so
    many as have half of the sum of the singular values; "high" what does so with all others. Singular values up to
    `tolerance` times the largest count as zero. Vectors, and matrices that
    none of the globs `layers` names, are the fine-tune's.
    """
    (theta,) = models
    if not is_layer(base, name, layers):
        return theta
    # 1. task vector
    tau = finite(as_matrix(change(theta, base)), name)
    # 2. singular vectors of the base
    U, S, V = significant(*decomposed(finite(as_matrix(scores(base)), name), spend=True), tolerance)
    # 3. the first k
    k = int(np.sum(np.cumsum(S) < 0.5 * np.sum(S))) + 1 if k is None else k
    U_k, V_k = U[:, :k], V[:, :k]
    # 4. project on both sides
    onto = U_k @ (U_k.T @ tau @ V_k) @ V_k.T
    if part == "high":
        # 5. or on what is left of both
        left = tau - U_k @ (U_k.T @ tau)
        onto = left - (left @ V_k) @ V_k.T
    # 6. add
    return base + like(onto.reshape(base.shape), base)
