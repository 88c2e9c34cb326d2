"""Mixup in weight space: a new network between two, after the second has been moved next to the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refmerge.api import merge
from refmerge.errors import UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.procedures.alignment.git_rebasin import check_search, weight_matching
from refmerge.symmetry.spec import Spec

__all__ = ["Mixup", "ws_mixup"]


@dataclass(frozen=True)
class Mixup:
    """model: alpha A + (1 - alpha) pi(B). label: the labels mixed alike, or None. permutations: of B, or with align="random"
    of A. objective: <A, pi(B)> at the start and after each visit of the matching."""

    model: dict[str, Any]
    alpha: float
    label: Any
    permutations: dict[str, np.ndarray]
    objective: tuple[float, ...]


@procedure("ws_mixup", paper="arXiv:2402.04081")
def ws_mixup(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    spec: Spec,
    *,
    alpha: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
    labels: Sequence[Any] | None = None,
    align: Literal["weights", "none", "random"] = "weights",
    seed: int = 0,
    order: Sequence[Any] | None = None,
    sweeps: int = 100,
    tolerance: float = 1e-12,
) -> Mixup:
    """A network on the line between two small ones of one shape, with their labels mixed alike, to train on.

    a, b: mappings name -> array. spec: which axes are permuted together. labels: of a and of b, numbers or arrays.
    """
    if align not in ("weights", "none", "random"):
        raise UsageError(f"ws_mixup: align = {align!r} is none of 'weights', 'none', 'random'")
    if labels is not None and len(labels) != 2:
        raise UsageError(f"ws_mixup: {len(labels)} labels: one of a and one of b")
    if labels is not None and np.shape(labels[0]) != np.shape(labels[1]):
        raise UsageError(f"ws_mixup: labels of shape {list(np.shape(labels[0]))} and {list(np.shape(labels[1]))} do not mix")
    check_search(seed, sweeps)
    draw = np.random.default_rng(seed)
    # 1. position
    if alpha is None:
        alpha = low + float(draw.random()) * (high - low)
    # 2. align
    perms, objective = spec.identity(b), ()
    if align == "weights":
        found = weight_matching(a, b, spec, order=order, seed=seed, sweeps=sweeps, tolerance=tolerance)
        perms, objective = found.permutations, found.objective
        b = spec.apply(perms, b)
    elif align == "random":
        perms = spec.random(a, draw)
        a = spec.apply(perms, a)
    # 3. mix
    model = merge([a, b], "linear", weight=[alpha, 1 - alpha], normalize=False)
    label = None if labels is None else alpha * scores(labels[0]) + (1 - alpha) * scores(labels[1])
    return Mixup(model, alpha, label, perms, objective)
