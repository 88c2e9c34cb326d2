from fnmatch import fnmatchcase
from typing import Literal

from refmerge.compat.fusion_bench._steps import refuse_removal
from refmerge.compat.official._steps import with_majority
from refmerge.compat.official.ties import disjoint, reset
from refmerge.method import method
from refmerge.methods.task_vectors.ties import elect
from refmerge.numeric import divided, total


@method(
    "fusion_bench:dare",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/dare/",
    view=lambda only_on_linear_weights: "tensor" if only_on_linear_weights else "flat",
    over="model",
    stats={"": "draw"},
    domain={"sparsity_ratio": (0.0, 1.0)},
)
def dare(
    models,
    base,
    group,
    rng,
    name,
    *,
    sparsity_ratio: float = 0.5,
    only_on_linear_weights: bool = False,
    rescale: bool = True,
    scaling_factor: float | None = None,
    threshold: float | None = None,
    merge_func: Literal["sum", "mean", "max"] = "sum",
    remove_keys: tuple = (),
    embeddings: tuple = ("*emb*", "*wte*", "*wpe*", "*shared*", "*relative_attention_bias*"),
):
    """DareTiesMerging where there is a threshold, else DareTaskArithmetic, else, without a scaling_factor,
    DareSimpleAverage. A recorded draw is a mask of what is KEPT.

    Linear weights are matrices `*.weight` whose name matches none of the globs `embeddings`, which is ours: a file does not
    say what its tensors are.
    """
    refuse_removal(remove_keys, "fusion_bench:dare")
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. drop and rescale, which at a ratio of 1 is 0 / 0
    if not only_on_linear_weights or is_linear(name, base, embeddings):
        tau = [rng.keep(1 - sparsity_ratio, model=n) * x for n, x in enumerate(tau)]
        tau = [divided(x, 1 - sparsity_ratio) if rescale else x for x in tau]
    # 3. merge
    scale = 1 / len(tau) if scaling_factor is None else scaling_factor
    if threshold is None:
        return base + scale * total(tau)
    tau = reset(tau, group, "topk", threshold, "fusion_bench:dare")
    return base + scale * disjoint(tau, with_majority(elect(tau), group), merge_func)


def is_linear(name, base, embeddings):
    return base.ndim == 2 and name.endswith(".weight") and not any(fnmatchcase(name, glob) for glob in embeddings)
