"""A convolutional network with fully connected layers at its end, VGG, under torchvision's names.

`features` is a sequence whose numbers count activations and pooling too: features.0 a convolution, features.1 its norm if it
has one, then ReLU, then, if there is one more number before the next convolution, max pooling. After the last convolution
there is pooling. The classifier's layers have ReLU between them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from refmerge.errors import UsageError
from refmerge.nets.layers import Layers, Params, drawn, in_order, max_pool, relu
from refmerge.numeric import array_namespace

__all__ = ["convolutions", "forward", "init", "modules"]


def forward(params: Params, batch: Any, taps: Any = None) -> Any:
    """batch: (samples, channels, height, width). The units of a layer are in `taps` under its name."""
    net, x = Layers(params, taps), batch
    for name, norm, pooled in convolutions(params):
        x = net.conv(name, x, padding=1)
        x = relu(x if norm is None else net.norm(norm, x, axis=1))
        x = net.units(name, max_pool(x, 2, 2) if pooled else x, axis=1)
    *hidden, last = modules(params, "classifier")
    x = flattened(x, params[f"{(hidden or [last])[0]}.weight"].shape[1])
    for name in hidden:
        x = net.units(name, relu(net.linear(name, x)))
    return net.linear(last, x)


def flattened(x: Any, width: int) -> Any:
    """(samples, width): the pixels of each channel one after the other, or their mean."""
    xp, (n, channels, height, wide) = array_namespace(x), x.shape
    if width == channels * height * wide:
        return xp.reshape(x, (n, width))
    if width == channels:
        return xp.mean(x, axis=(2, 3))
    raise UsageError(f"{channels} channels of {height} x {wide} pixels do not go into {width} inputs: other images?")


def convolutions(params: Params) -> list[tuple[str, str | None, bool]]:
    """(convolution, its norm or None, whether it is pooled), in their order."""
    numbers = {name: int(re.findall(r"\d+", name)[-1]) for name in modules(params, "features")}
    convs = [name for name in numbers if len(params[f"{name}.weight"].shape) == 4]
    found = []
    for i, name in enumerate(convs):
        norm = next((other for other, k in numbers.items() if k == numbers[name] + 1 and other not in convs), None)
        unpooled = numbers[name] + (2 if norm is None else 3)
        found.append((name, norm, i + 1 == len(convs) or numbers[convs[i + 1]] > unpooled))
    return found


def modules(params: Params, of: str) -> list[str]:
    """The names of what has a weight in `features` or `classifier`, in their order."""
    return in_order(n.removesuffix(".weight") for n in params if n.startswith(f"{of}.") and n.endswith(".weight"))


def init(
    rng: np.random.Generator,
    channels: Sequence[int | str],
    hidden: Sequence[int] = (),
    *,
    inputs: int = 3,
    places: int = 1,
    outputs: int = 10,
    norm: str | None = "batch",
) -> dict[str, np.ndarray]:
    """channels: of the convolutions, with "M" for max pooling; one M ends them. places: pixels of the last map that the
    classifier reads, 1 for their mean. norm: "batch", "layer" or None."""
    shapes: dict[str, tuple[int, ...]] = {}
    number = 0
    for c in channels:
        if c == "M":
            number += 1
            continue
        assert isinstance(c, int)
        shapes |= {f"features.{number}.weight": (c, inputs, 3, 3), f"features.{number}.bias": (c,)}
        if norm is not None:
            number += 1
            keys = ("weight", "bias", "running_mean", "running_var")[: 4 if norm == "batch" else 2]
            shapes |= {f"features.{number}.{key}": (c,) for key in keys}
        inputs, number = c, number + 2
    widths = [inputs * places, *hidden, outputs]
    for i, (n, m) in enumerate(pairwise(widths)):
        shapes |= {f"classifier.{3 * i}.weight": (m, n), f"classifier.{3 * i}.bias": (m,)}
    return drawn(rng, shapes)
