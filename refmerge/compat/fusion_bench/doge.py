import numpy as np

from refmerge.compat.official._steps import raise_no_kth
from refmerge.errors import UsageError
from refmerge.matrices import decomposed
from refmerge.method import method
from refmerge.methods.subspaces.doge import gradient, outside
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.wudi import adam
from refmerge.numeric import array_namespace, host, indicator, like, scores, total


@method(
    "fusion_bench:doge",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/doge_ta/doge_ta.py:DOGE_TA_Algorithm",
    view="tensor",
    over="model",
    stats={"": "whole"},
    domain={"subspace": (1, 1_000_000), "K": (0.0, 100.0), "steps_per_layer": (0, 1_000_000)},
)
def doge(
    models,
    base,
    stats,
    group,
    name,
    *,
    subspace: int = 6,
    K: float = 30,
    lamda: float = 0.07,
    adam_lr: float = 1e-4,
    steps_per_layer: int = 400,
):
    """DOGE TA on what has "encoder" and "weight" and not "layer_norm" in its name; all else stays the base's. K is per cent
    above 1. A task vector of zeros divides. adam_lr and steps_per_layer are fixed there. A recorded number under the
    tensor's name is its coefficient in place of lamda over the length."""
    merged = "encoder" in name and "layer_norm" not in name and "weight" in name
    if merged and base.ndim != 2:
        raise UsageError(f"fusion_bench:doge takes matrices alone and fails at tensor {name!r}, which has {base.ndim} axes")
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. masks of the largest entries; ties at the threshold stay
    mask = at_least(tau, group, K / 100 if K > 1 else K, merged)
    if not merged:
        return base
    vectors = [finite(scores(x), name) for x in tau]
    # 3. coefficients
    lamdas = [float(host(s[""])) if "" in s else np.float64(lamda) / np.linalg.norm(x) for s, x in zip(stats, vectors)]
    # 4. projection
    u = projection_basis(vectors, subspace)
    # 5. optimise
    delta = adam(np.zeros_like(vectors[0]), lambda x: outside(u, gradient(x, vectors, lamdas)), steps_per_layer, adam_lr)
    # 6. add
    return base + total(float(c) * ((x + like(delta, base)) * m) for c, x, m in zip(lamdas, tau, mask))


def at_least(tau, group, share, merged):
    """1 from the (d - int(d share))-th smallest magnitude on, of the d entries of merged tensors."""
    xp = array_namespace(*tau)
    d = group.count(xp.full_like(tau[0], float(merged)) > 0)
    k = d - int(d * share)
    if d and k < 1:
        raise_no_kth("fusion_bench:doge")
    magnitude = [xp.abs(x) if merged else xp.full_like(x, -1.0) for x in tau]
    least = group.kth_largest(*magnitude, k=[max(d - k + 1, 1)] * len(tau))
    return [indicator(a >= c, like=a) for a, c in zip(magnitude, least)]


def projection_basis(vectors, subspace):
    """Of the first int(r / T) left singular vectors of each, and columns of zeros up to r, the first int(r / subspace) left
    ones."""
    r = min(vectors[0].shape)
    share = int(r / len(vectors))
    stack = np.zeros((len(vectors[0]), r))
    for i, x in enumerate(vectors):
        stack[:, i * share : (i + 1) * share] = decomposed(x)[0][:, :share]
    return decomposed(stack)[0][:, : int(r / subspace)]
