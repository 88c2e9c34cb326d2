import numpy as np

from refmerge.compat.fusion_bench._steps import owned_by_leaf, refuse_shuffle
from refmerge.compat.fusion_bench.dare import is_linear
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.numeric import like, scores


@method(
    "fusion_bench:opcm",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/opcm/opcm_general.py:OPCM",
    view="model",
)
def opcm(
    models,
    base,
    *,
    alpha: float = 0.5,
    shuffle_order: bool = False,
    embeddings: tuple = ("*emb*", "*wte*", "*wpe*", "*shared*", "*relative_attention_bias*"),
):
    """OPCM in the bases of full decompositions. Tensors that belong to no leaf module are the first model's, rescaled.

    Linear weights are matrices `*.weight` whose name matches none of the globs `embeddings`, which is ours: a file does not
    say what its tensors are. The tool shuffles unless told not to.
    """
    refuse_shuffle(shuffle_order, "fusion_bench:opcm")
    # 1. task vectors
    tau = [{name: finite(scores(x[name]) - scores(base[name]), name) for name in base} for x in models]
    D, factor, lengths = tau[0], 1.0, [length(tau[0])]
    for tau_t in tau[1:]:
        # 2. add the next one, cleaned
        for name in (n for n in base if owned_by_leaf(n, base)):
            linear = is_linear(name, base[name], embeddings)
            new = cleaned(tau_t[name], D[name], alpha) if linear else tau_t[name]
            D = D | {name: factor * D[name] + new}
        # 3. rescale to the mean length
        lengths.append(length(tau_t))
        mean, norm = np.mean(lengths), length(D)
        D, factor = {name: (mean / norm) * x for name, x in D.items()}, norm / mean
    # 4. add
    return {name: base[name] + like(D[name], base[name]) for name in base}


def length(x):
    return np.sqrt(sum(np.sum(v * v) for v in x.values()))


def cleaned(task_tv, merged_tv, alpha):
    """What is left of the entries in the bases of the merged matrix: not the diagonal, nor the block before the first
    singular value at which the share alpha is exceeded; no block where it never is. Their code fails without entries."""
    if not task_tv.size:
        return task_tv
    u, s, vt = np.linalg.svd(merged_tv, full_matrices=True)
    P = u.T @ task_tv @ vt.T
    np.fill_diagonal(P, 0)
    r = int(np.argmax(np.cumsum(s) / np.sum(s) > alpha))
    P[:r, :r] = 0
    return u @ P @ vt
