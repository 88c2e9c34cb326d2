from typing import Literal

import numpy as np

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix
from refmerge.numeric import like, mean, scores, total


@method(
    "regmean",
    paper="arXiv:2212.09849",
    view="tensor",
    work="float64",
    stats={"gram": "whole"},
    needs="models",
    domain={"off_diagonal": (0.0, 1.0)},
)
def regmean(models, stats, name, *, off_diagonal: float = 0.9, layout: Literal["out_in", "in_out"] = "out_in"):
    """Regression mean: the linear layer whose outputs are nearest, in squares, to those of each model on its own inputs.

    W = (sum_n W_n G_n) (sum_n G_n)^-1 with the Gram matrix G_n of the inputs of model n; what has none is averaged.
    """
    W = [oriented(theta_n, layout) for theta_n in models]
    # 1. Gram matrices of the layer's inputs
    G = matrices(stats, "gram", name, models)
    if not G:
        # 2. no layer: average
        return mean(models)
    # 3. shrink what is off the diagonal
    check_sizes(G, W[0].shape[1], name, "gram")
    G = [shrunk(G_n, off_diagonal) for G_n in G]
    # 4. solve the normal equations
    S = definite(total(G), name, "off_diagonal below 1")
    merged = np.linalg.solve(S, total(W_n @ G_n for W_n, G_n in zip(W, G)).T).T
    return restored(merged, models[0], layout)


def matrices(stats, key, name, models):
    """One symmetric matrix a model, in float64; nothing where no model has one for this tensor, or it is no matrix."""
    has = [key in s for s in stats]
    if models[0].ndim < 2 or not any(has):
        return []
    if not all(has):
        raise UsageError(
            f"tensor {name!r}: stats of model {has.index(True)} have its {key!r}, those of model {has.index(False)} do not"
        )
    found = [scores(s[key]) for s in stats]
    for n, G_n in enumerate(found):
        if G_n.ndim != 2 or G_n.shape[0] != G_n.shape[1] or not np.all(np.isfinite(G_n)):
            kind = "holds values that are not finite" if G_n.ndim == 2 and G_n.shape[0] == G_n.shape[1] else "is not square"
            raise UsageError(f"tensor {name!r}: {key!r} of model {n}, of shape {list(G_n.shape)}, {kind}")
        if np.max(np.abs(G_n - G_n.T), initial=0.0) > 1e-4 * np.max(np.abs(G_n), initial=0.0):
            raise UsageError(f"tensor {name!r}: {key!r} of model {n} is not symmetric")
    return found


def check_sizes(G, size, name, key):
    for n, G_n in enumerate(G):
        if len(G_n) != size:
            raise UsageError(
                f"tensor {name!r}: {key!r} of model {n} is {len(G_n)} by {len(G_n)}, its weight wants {size} by {size}"
            )


def oriented(theta_n, layout):
    """The weight in float64 as (out, in): a row for each output."""
    W = as_matrix(scores(theta_n))
    return W.T if layout == "in_out" else W


def restored(W, theta, layout):
    """A matrix (out, in) as a weight like theta."""
    return like((W.T if layout == "in_out" else W).reshape(theta.shape), theta)


def shrunk(G_n, factor):
    """factor G_n + (1 - factor) diag(G_n)."""
    return np.where(np.eye(len(G_n), dtype=bool), G_n, factor * G_n)


def definite(S, name, remedy):
    """S itself. UsageError where it is not positive definite to working precision, so that no solution is the only one."""
    values = np.linalg.eigvalsh(S)
    bound = len(S) * np.finfo(S.dtype).eps * np.max(np.abs(values), initial=0.0)
    if values.size and values[0] <= bound:
        rank = int(np.sum(values > bound))
        raise UsageError(
            f"tensor {name!r}: its Gram matrices sum to a singular matrix, of rank {rank} where {len(S)} are needed; more "
            f"samples, or {remedy}, make it regular"
        )
    return S
