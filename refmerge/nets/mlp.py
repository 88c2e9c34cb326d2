"""A multilayer perceptron: linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from refmerge.nets.layers import Layers, Params, drawn, in_order, relu

__all__ = ["forward", "init", "order"]


def forward(
    params: Params, batch: Any, taps: Any = None, *, layers: Sequence[str] | None = None,
    activation: Callable[[Any], Any] = relu,
) -> Any:  # fmt: skip
    """batch: (samples, inputs). layers: their names in their order, else as `order` has them. The hidden units of a layer
    are in `taps` under its name."""
    net, x = Layers(params, taps), batch
    *hidden, last = layers or order(params)
    for name in hidden:
        x = net.units(name, activation(net.linear(name, x)))
    return net.linear(last, x)


def order(params: Params) -> list[str]:
    """The names of all layers: those with a number in the order of these, then those without (fc1, fc2, head)."""
    found = in_order(name.removesuffix(".weight") for name in params if name.endswith(".weight"))
    return sorted(found, key=lambda name: not any(c.isdigit() for c in name))


def init(rng: np.random.Generator, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """Parameters for layers.0, layers.1 ... between so many inputs, hidden units and outputs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        shapes |= {f"layers.{i}.weight": (m, n), f"layers.{i}.bias": (m,)}
    return drawn(rng, shapes)
