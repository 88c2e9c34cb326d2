"""How far the loss rises on the way from one model to another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from refmerge.errors import UsageError
from refmerge.procedure import procedure
from refmerge.procedures.measures._common import between, checked, number, one_of, opened, whole_number

__all__ = ["Barrier", "barrier_of", "loss_barrier"]


@dataclass(frozen=True)
class Barrier:
    """t: places on the path, from 0 to 1. losses: there. excess: how much worse than the reference each is. barrier: the
    largest excess. at: the t where it is, the first of equal ones."""

    t: tuple[float, ...]
    losses: tuple[float, ...]
    excess: tuple[float, ...]
    barrier: float
    at: float


@procedure("loss_barrier", paper="arXiv:1912.05671, arXiv:2110.06296")
def loss_barrier(
    path: Sequence[Any] | Callable[[float], Mapping[str, Any]],
    loss: Callable[[Mapping[str, Any]], float],
    *,
    points: int = 25,
    reference: Literal["line", "mean", "max"] = "line",
    better: Literal["lower", "higher"] = "lower",
    **options: Any,
) -> Barrier:
    """The loss barrier: how far the loss along a path rises above what it is at the ends.

    path: two models or more, joined by straight lines, or a function of t in [0, 1] that gives a model. loss: a function of
    a mapping name -> array. options: what else refmerge.merge takes (integers, missing, nonfinite).
    """
    whole_number("loss_barrier", "points", points, 2)
    one_of("loss_barrier", "reference", reference, "line", "mean", "max")
    one_of("loss_barrier", "better", better, "lower", "higher")
    # 1. places
    t, models = at_times(path, points) if callable(path) else on_lines(path, points, options)
    # 2. losses
    losses = [number(loss(model), "loss_barrier") for model in models]
    # 3. excess over the reference
    return barrier_of(t, losses, reference=reference, better=better)


def barrier_of(t: Sequence[float], losses: Sequence[float], *, reference: str = "line", better: str = "lower") -> Barrier:
    """The same from losses that are known, at t from 0 to 1."""
    sign = 1.0 if better == "lower" else -1.0
    start, end = sign * losses[0], sign * losses[-1]
    level = {
        "line": lambda u: (1 - u) * start + u * end,
        "mean": lambda u: (start + end) / 2,
        "max": lambda u: largest([start, end]),
    }[reference]
    excess = [sign * value - level(u) for u, value in zip(t, losses)]
    highest = largest(excess)
    return Barrier(tuple(t), tuple(losses), tuple(excess), highest, t[where(excess, highest)])


def at_times(path: Callable[[float], Any], points: int) -> tuple[list[float], Iterator[Any]]:
    """Evenly spaced t, and the models there."""
    t = [i / (points - 1) for i in range(points)]
    return t, map(path, t)


def on_lines(models: Any, points: int, options: Mapping[str, Any]) -> tuple[list[float], Iterator[Any]]:
    """The same for straight lines from model to model, equally long in t, with so many points on each."""
    if isinstance(models, str | Path | Mapping) or len(models := list(models)) < 2:
        raise UsageError("loss_barrier: a path is two models or more, [a, b], or a function of t")
    checked(models, options)
    vertices, steps = opened(models), points - 1
    places = [(0, 0.0), *((k, j / steps) for k in range(len(vertices) - 1) for j in range(1, steps + 1))]
    t = [(k + s) / (len(vertices) - 1) for k, s in places]
    return t, (between(vertices[k], vertices[k + 1], s, options) for k, s in places)


def largest(values: Sequence[float]) -> float:
    """The largest, or NaN where one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def where(values: Sequence[float], value: float) -> int:
    """The place of a value, the first one; NaN is found too."""
    return next(i for i, x in enumerate(values) if x == value or (math.isnan(x) and math.isnan(value)))
