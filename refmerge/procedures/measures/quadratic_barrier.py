"""The barrier between two models from the slope of the loss at a few places, as if the loss were quadratic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.errors import UsageError
from refmerge.numeric import exact_sum, host, leaf_sums, scores
from refmerge.procedure import procedure
from refmerge.procedures.measures._common import Layers, between, layers_of, pair, part, with_tensors

__all__ = ["Quadratic", "quadratic_barrier"]


@dataclass(frozen=True)
class Quadratic:
    """curvature: of the loss along the line, D^T H D. barrier: what it predicts, max(0, -curvature / 8). layers: layer ->
    (curvature, barrier) of that layer in model 0, and in model 1."""

    curvature: float
    barrier: float
    layers: dict[str, tuple[tuple[float, float], tuple[float, float]]]


@procedure("quadratic_barrier", paper="after arXiv:2406.16300")
def quadratic_barrier(
    models: Sequence[Any],
    gradient: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    *,
    at: float = 0.5,
    step: float = 1.0,
    layers: Layers | None = None,
    layerwise: bool = False,
    **options: Any,
) -> Quadratic:
    """The loss barrier that gradients predict: minus an eighth of the curvature between two models.

    models: two. gradient: of the loss, a function of a mapping name -> array that gives one; the loss is taken not to depend
    on tensors without a gradient. options: what else refmerge.merge takes (integers, missing, nonfinite).
    """
    low, high = at - step / 2, at + step / 2
    if not (step > 0 and low >= 0 and high <= 1):
        raise UsageError(f"quadratic_barrier: at = {at!r} and step = {step!r}: from {low} to {high} is not within [0, 1]")
    a, b = pair(models, "quadratic_barrier", options)
    every = list(a)

    def curvature(tensors: list[str], rest: Mapping[str, Any] | None) -> tuple[float, float]:
        # 1. slopes at two places
        slopes = []
        for t in (low, high):
            x = between(part(a, tensors), part(b, tensors), t, options)
            g = gradient(x if rest is None else with_tensors(rest, x))
            slopes.append(slope(g, a, b, tensors))
        # 2. curvature
        c = (slopes[1] - slopes[0]) / step
        # 3. barrier
        return c, float("nan") if c != c else max(0.0, -c / 8)

    whole = curvature(every, None)
    groups = layers_of(a, layers, "quadratic_barrier") if layerwise or layers is not None else {}
    return Quadratic(*whole, {label: (curvature(ts, a), curvature(ts, b)) for label, ts in groups.items()})


def slope(g: Mapping[str, Any], a: Mapping[str, Any], b: Mapping[str, Any], tensors: Sequence[str]) -> float:
    """The derivative along b - a: the sum of its products with the gradient over these tensors."""
    sums = []
    for name in g:
        if name not in a:
            raise UsageError(f"quadratic_barrier: the gradient has a tensor {name!r} and the models have none")
        if np.shape(host(g[name])) != np.shape(host(a[name])):
            raise UsageError(f"quadratic_barrier: the gradient of {name!r} has another shape than the tensor")
    for name in tensors:
        if name in g:
            products = (scores(b[name]) - scores(a[name])) * scores(g[name])
            sums += leaf_sums(products.reshape(-1))[0].tolist()
    return exact_sum(sums)
