"""Steps on the hidden units of single experts: their order, and experts zipped unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refmerge.errors import InputError, UsageError
from refmerge.nets.layers import relu
from refmerge.numeric import scores
from refmerge.procedures.alignment.convergent_matching import moments
from refmerge.procedures.alignment.git_rebasin import assignment, weight_matching
from refmerge.sources import all_finite
from refmerge.symmetry import Spec

__all__ = ["aligned_by_activations", "aligned_by_weights", "permuted", "zip_experts"]

Expert = Mapping[str, Any]


def aligned_by_weights(a: Expert, b: Expert, parts: Mapping[str, int | None], *, columns: bool = True) -> np.ndarray:
    """The order of b's hidden units in which its weights fit a's best: the assignment with the largest sum of inner products
    of rows and, with `columns`, of the columns that read the units. Biases are carried along and not counted."""
    left = [part for part, axis in parts.items() if np.ndim(a[part]) < 2 or (axis == 1 and not columns)]
    counted = {part: axis for part, axis in parts.items() if part not in left}
    if not any(axis is not None for axis in counted.values()):
        raise UsageError("msmoe: no matrix is left to align by: count the columns as well")
    if bad := [part for part in counted for x in (a, b) if not all_finite(x[part])]:
        raise InputError(f"msmoe: {bad[0]} of an expert has values that are infinite or NaN, and cannot be aligned")
    spec = Spec({part: _entries(np.ndim(a[part]), axis) for part, axis in counted.items()})
    found = weight_matching({p: a[p] for p in counted}, {p: b[p] for p in counted}, spec)
    return found.permutations["units"]


def _entries(ndim: int, axis: int | None) -> tuple[str | None, ...]:
    return tuple("units" if i == axis else None for i in range(ndim))


def permuted(x: np.ndarray, axis: int | None, order: np.ndarray | None) -> np.ndarray:
    """A part of an expert with its hidden units in that order; as it is where it has none, or there is no order."""
    return x if axis is None or order is None else np.take(x, order, axis=axis)


def aligned_by_activations(
    a: Expert, b: Expert, hidden: Any, *, activation: Callable[[Any], Any] = relu, eps: float = 0.0
) -> np.ndarray:
    """The order of b's hidden units in which they do best what a's do on the same inputs, by Pearson's correlation.

    a, b: experts with `wi.weight` (units, width). hidden: what the tokens sent to either of them bring, (tokens, width); of
    one token or none nothing is learnt, and the order stays. eps: added to the products of standard deviations.
    """
    x = _rows(hidden, a)
    if len(x) < 2:
        return np.arange(len(a["wi.weight"]))
    return assignment(_correlation(*(activation(x @ scores(e["wi.weight"]).T) for e in (a, b)), eps), "units")


def _rows(hidden: Any, expert: Expert) -> np.ndarray:
    x, width = scores(hidden), np.shape(expert["wi.weight"])[1]
    if x.ndim != 2 or x.shape[1] != width:
        raise UsageError(f"msmoe: hidden states are (tokens, {width}), not {list(x.shape)}")
    return x


def _correlation(a: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    found = moments(a, b)
    spread = np.outer(found.std_a, found.std_b) + eps
    return np.divide(found.covariance, spread, out=np.zeros_like(spread), where=spread > 0)


def zip_experts(
    experts: Sequence[Expert],
    weights: Sequence[float] | None = None,
    hidden: Any = None,
    *,
    alpha: float = 0.1,
    eps: float = 0.0,
    activation: Callable[[Any], Any] = relu,
) -> dict[str, np.ndarray]:
    """One expert from several, as M-SMoE's code zips them: of all their hidden units the two most alike become one, their
    weighted mean in rows of `wi.weight` and in columns of `wo.weight`, until as many are left as one expert has.

    weights: one for each expert, or for each unit of all experts; else all alike. hidden: (tokens, width): units are alike
    by the correlation of their activations, and a merged unit is to another one `alpha` times the lower of what its parts
    were. Without hidden they are alike by the inner product of rows and columns, computed anew for a merged unit. Of equal
    pairs the first in C order. eps: added to sums of weights, and to products of standard deviations; without it two weights
    of 0 count alike.
    """
    if not experts:
        raise UsageError("msmoe: there are no experts to zip")
    rows = np.concatenate([scores(e["wi.weight"]) for e in experts])
    columns = np.concatenate([scores(e["wo.weight"]).T for e in experts])
    count = len(experts[0]["wi.weight"])
    share = np.ones(len(rows)) if weights is None else np.array(weights, np.float64)
    if len(share) == len(experts):
        share = np.repeat(share, count)
    if share.shape != (len(rows),):
        raise UsageError(f"msmoe: {len(share)} weights for {len(experts)} experts of {count} units")
    if hidden is not None:
        x = _rows(hidden, experts[0])
        if len(x) < 2:
            return {"wi.weight": rows[:count], "wo.weight": columns[:count].T}
        features = activation(x @ rows.T)
        likeness, never = _correlation(features, features, eps), -1.0
    else:
        likeness, never = rows @ rows.T + columns @ columns.T, -np.inf
    np.fill_diagonal(likeness, never)
    while len(rows) > count:
        i, j = np.unravel_index(np.argmax(likeness), likeness.shape)
        total = share[i] + share[j] + eps
        of_i, of_j = (share[i] / total, share[j] / total) if total else (0.5, 0.5)
        for x in (rows, columns):
            x[i] = of_i * x[i] + of_j * x[j]
        if hidden is not None:
            likeness[i] = alpha * np.minimum(likeness[i], likeness[j])
        else:
            likeness[i] = rows @ rows[i] + columns @ columns[i]
        likeness[:, i] = likeness[i]
        likeness[i, i] = never
        share[i] += share[j]
        rows, columns, share = (np.delete(x, j, axis=0) for x in (rows, columns, share))
        likeness = np.delete(np.delete(likeness, j, axis=0), j, axis=1)
    return {"wi.weight": rows, "wo.weight": columns.T}
