from typing import Literal

import numpy as np

from refmerge.compat.fusion_bench._steps import owned_by_leaf, refuse_shuffle
from refmerge.compat.fusion_bench.dare import is_linear
from refmerge.matrices import decomposed
from refmerge.method import method
from refmerge.methods.subspaces.dop import balanced, difference
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.wudi import adam
from refmerge.numeric import like, scores


@method(
    "fusion_bench:dop",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/dop/dop_general.py:DOPMerging",
    view="model",
    domain={"alpha": (0.0, 1.0), "svd_epsilon": (0.0, 1.0), "num_steps": (0, 1_000_000), "ema_beta": (0.0, 1.0)},
)
def dop(
    models,
    base,
    *,
    alpha: float,
    shuffle_order: bool = False,
    lr: float = 1e-4,
    num_steps: int = 200,
    mgda: bool = True,
    ema: bool = True,
    ema_beta: float = 0.99,
    svd_epsilon: float = 1.0,
    svd_proj_space: Literal["u", "v", "uv"] = "uv",
    exclude_keys: tuple = (),
    embeddings: tuple = ("*emb*", "*wte*", "*wpe*", "*shared*", "*relative_attention_bias*"),
):
    """DOP with the tool's choice of spaces and tensors. Tensors that belong to no leaf module stay the base's.

    Linear weights are matrices `*.weight` whose name matches none of the globs `embeddings`, which is ours: a file does not
    say what its tensors are. exclude_keys are names of modules. Defaults are the class's; its configuration has alpha 0.8,
    ema_beta 0.999, svd_epsilon 0.99999, and shuffles.
    """
    refuse_shuffle(shuffle_order, "fusion_bench:dop")
    first, *rest = models
    merged = {}
    for name in base:
        # 1. task vectors
        D = scores(first[name]) - scores(base[name])
        for model in rest:
            tau = scores(model[name]) - scores(base[name])
            if not owned_by_leaf(name, base):
                # 2. what the tool passes over
                D = 0 * D
            elif not is_linear(name, base[name], embeddings) or name.rpartition(".")[0] in exclude_keys:
                # 3. the mean of the two
                D = 0.5 * (D + tau)
            else:
                # 4. descend from the mean
                spaces = [spaces_of(finite(x, name), svd_epsilon, svd_proj_space) for x in (D, tau)]
                seen = [difference(x, *space) for x, space in zip((D, tau), spaces)]
                gradient = balanced(seen, alpha, "mgda" if mgda else "fixed", ema_beta if ema else 0.0)
                D = adam(0.5 * (D + tau), gradient, num_steps, lr)
        # 5. add
        merged[name] = base[name] + like(D, base[name])
    return merged


def spaces_of(D, epsilon, space):
    """S U^T and V S of the terms before the one at which the share epsilon of the singular values' sum is reached; all of
    them where it never is. What `space` does not name is left out."""
    U, S, V = decomposed(D)
    r = int(np.searchsorted(np.cumsum(S) / np.sum(S), epsilon))
    left, right = (r if side in space else 0 for side in "uv")
    return (U[:, :left] * S[:left]).T, V[:, :right] * S[:right]
