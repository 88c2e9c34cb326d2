"""Barriers of single layers: what happens where only one layer of a model, or the first few, are averaged with another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from refmerge.procedure import procedure
from refmerge.procedures.measures._common import (
    Layers,
    between,
    layers_of,
    number,
    one_of,
    pair,
    part,
    whole_number,
    with_tensors,
)  # fmt: skip
from refmerge.procedures.measures.loss_barrier import largest

__all__ = ["LayerBarrier", "LayerBarriers", "layerwise_barrier", "with_layer"]


@dataclass(frozen=True)
class LayerBarrier:
    """tensors: the names that are interpolated. first: the losses of model 0 with them at each t; second: of model 1 with
    them. barriers: the largest excess of each over the mean loss of the two models, between the ends."""

    tensors: tuple[str, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    barriers: tuple[float, float]


@dataclass(frozen=True)
class LayerBarriers:
    """ends: the losses of the two models. t: places, from 0 to 1. layers: label -> LayerBarrier, in order."""

    ends: tuple[float, float]
    t: tuple[float, ...]
    layers: dict[str, LayerBarrier]


@procedure("layerwise_barrier", paper="arXiv:2307.06966")
def layerwise_barrier(
    models: Sequence[Any],
    loss: Callable[[Mapping[str, Any]], float],
    *,
    layers: Layers | None = None,
    cumulative: Literal["no", "shallow", "deep"] = "no",
    points: int = 3,
    better: Literal["lower", "higher"] = "lower",
    **options: Any,
) -> LayerBarriers:
    """Layer-wise linear mode connectivity: the loss barrier of each layer by itself, in either model.

    models: two. loss: a function of a mapping name -> array. layers: label -> names of tensors, or a function name -> label;
    by default the names up to their last dot. options: what else refmerge.merge takes (integers, missing, nonfinite).
    """
    whole_number("layerwise_barrier", "points", points, 3)
    one_of("layerwise_barrier", "cumulative", cumulative, "no", "shallow", "deep")
    one_of("layerwise_barrier", "better", better, "lower", "higher")
    a, b = pair(models, "layerwise_barrier", options)
    # 1. groups
    groups = grown(layers_of(a, layers, "layerwise_barrier"), cumulative)
    # 2. the models' own losses
    ends = number(loss(a), "layerwise_barrier"), number(loss(b), "layerwise_barrier")
    # 3. interpolate each group, in both models
    t = tuple(i / (points - 1) for i in range(points))
    sign = 1.0 if better == "lower" else -1.0
    found = {}
    for label, tensors in groups.items():
        inside = [between(part(a, tensors), part(b, tensors), s, options) for s in t]
        first = ends[0], *(number(loss(with_tensors(a, x)), "layerwise_barrier") for x in inside[1:])
        second = *(number(loss(with_tensors(b, x)), "layerwise_barrier") for x in inside[:-1]), ends[1]
        # 4. excess over the mean
        mean = (ends[0] + ends[1]) / 2
        above = [largest([sign * (x - mean) for x in losses[1:-1]]) for losses in (first, second)]
        found[label] = LayerBarrier(tuple(tensors), first, second, (above[0], above[1]))
    return LayerBarriers(ends, t, found)


def with_layer(models: Sequence[Any], tensors: Sequence[str], t: float, into: int, **options: Any) -> Mapping[str, Any]:
    """Model `into`, 0 or 1, with these tensors (1 - t) of model 0 plus t of model 1: what a loss is taken of."""
    a, b = pair(models, "layerwise_barrier", options)
    return with_tensors((a, b)[into], between(part(a, tensors), part(b, tensors), t, options))


def grown(layers: Mapping[str, Sequence[str]], cumulative: str) -> dict[str, list[str]]:
    """Each layer by itself, or with all before it, from the first or from the last on."""
    if cumulative == "no":
        return {label: list(tensors) for label, tensors in layers.items()}
    order = list(layers) if cumulative == "shallow" else list(layers)[::-1]
    return {label: [tensor for one in order[: i + 1] for tensor in layers[one]] for i, label in enumerate(order)}
