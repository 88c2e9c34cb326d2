"""Straggler layers: those that spoil the way back from a fine-tune to its zero-shot model where they go it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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

__all__ = ["Stragglers", "straggler_score"]


@dataclass(frozen=True)
class Stragglers:
    """ends: the losses of the zero-shot model and the fine-tune. alpha: places, from 0 to 1. losses: layer -> losses there.
    scores: layer -> score. layers: those whose score is above the tolerance, the highest first."""

    ends: tuple[float, float]
    alpha: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]
    scores: dict[str, float]
    layers: tuple[str, ...]


@procedure("straggler_score", paper="after arXiv:2410.16476")
def straggler_score(
    zero_shot: Any,
    fine_tuned: Any,
    loss: Callable[[Mapping[str, Any]], float],
    *,
    rest: Literal["fine_tuned", "zero_shot"] = "fine_tuned",
    layers: Layers | None = None,
    points: int = 11,
    tolerance: float = 0.0,
    better: Literal["lower", "higher"] = "lower",
    **options: Any,
) -> Stragglers:
    """Straggler layers: how far the loss rises above the line between the two models where one layer alone is interpolated.

    loss: a function of a mapping name -> array. layers: label -> names of tensors, or a function name -> label; by default
    the names up to their last dot. options: what else refmerge.merge takes (integers, missing, nonfinite).
    """
    name = "straggler_score"
    whole_number(name, "points", points, 2)
    one_of(name, "rest", rest, "fine_tuned", "zero_shot")
    one_of(name, "better", better, "lower", "higher")
    theta_0, theta_1 = pair([zero_shot, fine_tuned], name, options)
    groups = layers_of(theta_0, layers, name)
    # 1. the models' own losses
    ends = number(loss(theta_0), name), number(loss(theta_1), name)
    # 2. interpolate each layer by itself
    alpha = tuple(i / (points - 1) for i in range(points))
    keep, same = (theta_1, 1.0) if rest == "fine_tuned" else (theta_0, 0.0)
    losses = {}
    for label, tensors in groups.items():
        ways = (between(part(theta_0, tensors), part(theta_1, tensors), a, options) for a in alpha)
        losses[label] = tuple(
            ends[int(same)] if a == same else number(loss(with_tensors(keep, x)), name) for a, x in zip(alpha, ways)
        )
    # 3. excess over the line
    sign = 1.0 if better == "lower" else -1.0
    line = [(1 - a) * ends[0] + a * ends[1] for a in alpha]
    scores = {label: largest([sign * (x - y) for x, y in zip(found, line)]) for label, found in losses.items()}
    # 4. stragglers
    above = [label for label, score in scores.items() if score > tolerance or math.isnan(score)]
    above.sort(key=lambda label: -math.inf if math.isnan(scores[label]) else -scores[label])
    return Stragglers(ends, alpha, losses, scores, tuple(above))
