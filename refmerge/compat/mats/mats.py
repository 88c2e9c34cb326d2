# Longer than others: the operators of four kinds of statistics, and three starts.
import math

import numpy as np

from refmerge.compat.fusion_bench.regmean import averaged
from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.data_driven.mats import KFAC, Diagonal, Gram, conjugate_gradients
from refmerge.methods.data_driven.regmean import shrunk
from refmerge.numeric import like, scores, total


@method(
    "mats:mats",
    paper="r-three/mats@cb52c38 src/merging/conjugateGradient_fisherMerging.py:conjugateGradient_fisherMerging",
    view="tensor",
    work="float64",
    least=lambda kind: "float64" if kind == "average" else None,
    stats={"": "whole", "out/": "whole", "in/": "whole", "init/": "whole"},
)
def mats(
    models,
    stats,
    name,
    base=None,
    *,
    num_iterations: int = 100,
    initialization: str | None = "average",
    model_lambda: float = 1.0,
    kind: str = "regmean",
):
    """MaTS as its scripts compute it: conjugate gradients in float32, with their start and a tolerance of 1e-5.

    kind: "average", or which statistics the tensors have: "diagonal_fisher", "regmean", "blockwise_fisher_linear"
    (in/<module> and out/<module>), "blockwise_fisher_ia3" (of the flattened tensor). initialization: "average",
    "pretrained", "path" (init/<tensor>, else a task-arithmetic merge with 0.3), or None for zeros.
    """
    # 1. operators
    C = operators(kind, stats, name, models, model_lambda)
    if not C:
        # 2. no statistics: average
        return averaged(models)
    W = [scores(theta_n).astype(np.float32) for theta_n in models]
    # 3. right-hand side
    B = total(C_n(W_n) for C_n, W_n in zip(C, W))
    # 4. start
    X = started(initialization, W, base, stats, name, is_layer(kind))
    # 5. conjugate gradients
    if kind == "average":
        merged = conjugate_gradients(lambda X: X, scores(B), scores(X), num_iterations, 1e-5)
    else:
        merged = conjugate_gradients(lambda X: total(C_n(X) for C_n in C), B, X, num_iterations, 1e-5)
    return like(merged, models[0])


def operators(kind, stats, name, models, model_lambda):
    """One operator a model; nothing where no model has statistics of that kind for the tensor, or it is an lm_head."""
    if kind == "average":
        return [Diagonal(np.float32(1 / len(models))) for _ in models]
    key = "in/" if any("in/" in s for s in stats) else ""
    if not any(key in s for s in stats) or (is_layer(kind) and (models[0].ndim != 2 or "lm_head" in name)):
        return []
    G = of_all(stats, key, name)
    if "diag" in kind:
        return [Diagonal(check(G_n, models[0].shape, name)) for G_n in G]
    size = models[0].shape[1] if is_layer(kind) else math.prod(models[0].shape)
    G = [shrunk(check(G_n, (size, size), name), np.float32(model_lambda)) for G_n in G]
    if not is_layer(kind):
        return [Block(G_n) for G_n in G]
    if kind == "regmean":
        return [Gram(G_n) for G_n in G]
    out = (models[0].shape[0],) * 2
    H = [shrunk(check(H_n, out, name), np.float32(model_lambda)) for H_n in of_all(stats, "out/", name)]
    return [KFAC(G_n, H_n) for G_n, H_n in zip(G, H)]


def is_layer(kind):
    """Whether the statistics of this kind are matrices of a layer's inputs, and its outputs' gradients."""
    return "linear" in kind or kind == "regmean"


class Block:
    """x -> F x, F for all entries of the flattened tensor."""

    def __init__(self, F):
        self.F = F

    def __call__(self, x):
        return (self.F @ x.reshape(-1)).reshape(x.shape)


def of_all(stats, key, name):
    """That statistic of every model, in float32. UsageError where one lacks it."""
    for n, s in enumerate(stats):
        if key not in s:
            raise UsageError(f"tensor {name!r}: stats of model {n} have no {key + name!r}")
    return [scores(s[key]).astype(np.float32) for s in stats]


def check(x, shape, name):
    if x.shape != tuple(shape):
        raise UsageError(f"tensor {name!r}: its statistic has shape {list(x.shape)} and not {list(shape)}")
    return x


def started(initialization, X, base, stats, name, turned):
    """The start. The base comes without the transposition that the unknown of a layer has; the others come with it."""
    if initialization is None:
        return np.zeros_like(X[0])
    if initialization == "average":
        return np.float32(1 / len(X)) * total(X)
    if base is None and not (initialization == "path" and "init/" in stats[0]):
        raise UsageError(f"mats:mats: initialization = {initialization!r} needs a base model: give base=")
    theta_0 = None if base is None else scores(base).astype(np.float32)
    if initialization == "pretrained":
        return theta_0.reshape(theta_0.shape[::-1]).T if turned else theta_0
    if initialization != "path":
        raise UsageError(f"mats:mats: initialization = {initialization!r} is none of 'average', 'pretrained', 'path', None")
    if "init/" in stats[0]:
        return check(scores(stats[0]["init/"]).astype(np.float32), X[0].shape, name)
    return theta_0 + np.float32(0.3) * total(x - theta_0 for x in X)
