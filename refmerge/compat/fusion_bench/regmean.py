import numpy as np

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import like, scores, total


@method(
    "fusion_bench:regmean",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/regmean/regmean.py:merging_with_regmean_weights",
    view="tensor",
    work="float64",
    stats={"": "whole"},
    needs="models",
)
def regmean(models, stats, name, *, reduce_non_diagonal_ratio: float = 1.0, weight_transpose: bool = True):
    """RegMean by an explicit inverse, with factors of the off-diagonal that are rounded to float32."""
    # 1. Gram matrices of the module's inputs
    G = grams(stats, name, models, axis=1 if weight_transpose else 0)
    if G is None:
        # 2. no module: average
        return averaged(models)
    # 3. shrink what is off the diagonal
    G = [reduced(G_n, reduce_non_diagonal_ratio) for G_n in G]
    # 4. invert
    W = [scores(x).T if weight_transpose else scores(x) for x in models]
    merged = inverse(total(G), name) @ total(G_n @ W_n for G_n, W_n in zip(G, W))
    return like(merged.T if weight_transpose else merged, models[0])


def grams(stats, name, models, axis=1):
    """The matrix of each model; None for what is no weight of a module that has one. UsageError where some models lack it,
    or it does not fit."""
    has = ["" in s for s in stats]
    if not any(has) or models[0].ndim != 2 or ("." in name and not name.endswith(".weight")):
        return None
    if not all(has):
        raise UsageError(f"tensor {name!r}: stats of model {has.index(False)} have no matrix for it, those of others do")
    size = models[0].shape[axis]
    for n, s in enumerate(stats):
        if tuple(s[""].shape) != (size, size):
            found = " by ".join(map(str, s[""].shape))
            raise UsageError(f"tensor {name!r}: its matrix in stats of model {n} is {found}, and {size} by {size} is wanted")
    return [scores(s[""]) for s in stats]


def averaged(models):
    """The mean over a stack."""
    return like(total(scores(x) for x in models) / len(models), models[0])


def reduced(G_n, ratio):
    """G_n times ratio off the diagonal and (1 - ratio) + ratio on it, both in float32."""
    a = np.float32(ratio)
    return G_n * np.where(np.eye(len(G_n), dtype=bool), float((np.float32(1) - a) + a), float(a))


def inverse(S, name):
    try:
        return np.linalg.inv(S)
    except np.linalg.LinAlgError:
        raise UsageError(f"tensor {name!r}: its Gram matrices sum to a singular matrix, which has no inverse") from None
