"""Residual networks under torchvision's names: conv1; stages layer1, layer2 ..., of blocks of two or three convolutions; fc.

A stem of 7 x 7 has stride 2 and is pooled, one of 3 x 3, for small images, neither. From the second stage on the first
block halves the image. Its shortcut is a convolution with a norm (`downsample`, or `shortcut`), or without parameters:
every second pixel, with as many channels of zeros before and after as are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import device

from refmerge.nets.layers import Layers, Params, drawn, max_pool, relu
from refmerge.numeric import array_namespace
from refmerge.symmetry.axes import Entry, Slices

__all__ = ["Unit", "blocks", "forward", "head", "init"]


class Unit(NamedTuple):
    """A block: its name, those of its convolutions, its stride, its shortcut's convolution, or None; and the units of the
    residual stream, as entries of a spec, that it reads and writes."""

    name: str
    convs: list[str]
    stride: int
    shortcut: str | None
    before: Entry
    after: Entry


def forward(params: Params, batch: Any, taps: Any = None) -> Any:
    """batch: (samples, channels, height, width). In `taps`, under the name of a stage, is its residual stream after each of
    its blocks, and under the name of a convolution inside of a block what follows its ReLU."""
    net, found = Layers(params, taps), blocks(params)
    size = params["conv1.weight"].shape[2]
    x = relu(net.norm("bn1", net.conv("conv1", batch, 2 if size == 7 else 1, size // 2), axis=1))
    x = net.units(found[0].before, max_pool(x, 3, 2, 1) if size == 7 else x, axis=1)
    for block in found:
        y = x
        for i, conv in enumerate(block.convs, 1):
            kernel = params[f"{conv}.weight"].shape[2]
            stride = block.stride if i == len(block.convs) - 1 else 1
            y = net.norm(f"{block.name}.bn{i}", net.conv(conv, y, stride, kernel // 2), axis=1)
            if i < len(block.convs):
                y = net.units(conv, relu(y), axis=1)
        if block.shortcut is not None:
            x = net.conv(f"{block.shortcut}.0", x, block.stride, params[f"{block.shortcut}.0.weight"].shape[2] // 2)
            x = net.norm(f"{block.shortcut}.1", x, axis=1)
        elif x.shape != y.shape:
            x = widened(x, y.shape[1], block.stride)
        x = net.units(block.after, relu(x + y), axis=1)
    return net.linear(head(params), array_namespace(x).mean(x, axis=(2, 3)))


def widened(x: Any, channels: int, stride: int) -> Any:
    """Every pixel at that stride, between channels of zeros."""
    xp, x = array_namespace(x), x[:, :, ::stride, ::stride]
    edge = (x.shape[0], (channels - x.shape[1]) // 2, *x.shape[2:])
    zeros = xp.zeros(edge, dtype=x.dtype, device=device(x))
    return xp.concat([zeros, x, zeros], axis=1)


def blocks(params: Params) -> list[Unit]:
    """All blocks in their order."""
    found: list[Unit] = []
    width, stage = params["conv1.weight"].shape[0], 1
    stream: Entry = "layer1" if shortcut_of("layer1.0", params) is None else "conv1"
    while f"layer{stage}.0.conv1.weight" in params:
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in params:
            name = f"layer{stage}.{block}"
            convs = [f"{name}.conv{i}" for i in (1, 2, 3) if f"{name}.conv{i}.weight" in params]
            after, channels = stream, params[f"{convs[-1]}.weight"].shape[0]
            shortcut = shortcut_of(name, params)
            if shortcut is not None:
                after = f"layer{stage}"
            elif channels != width:  # the old units between new ones
                edge = (channels - width) // 2
                after = Slices([f"layer{stage}.low", stream, f"layer{stage}.high"], [edge, width, edge])
            found.append(Unit(name, convs, 2 if stage > 1 and block == 0 else 1, shortcut, stream, after))
            stream, width, block = after, channels, block + 1
        stage += 1
    return found


def shortcut_of(block: str, params: Params) -> str | None:
    """The name of a block's shortcut with parameters."""
    return next((f"{block}.{key}" for key in ("downsample", "shortcut") if f"{block}.{key}.0.weight" in params), None)


def head(params: Params) -> str:
    """The name of the last layer."""
    return "fc" if "fc.weight" in params else "linear"


def init(
    rng: np.random.Generator,
    widths: Sequence[int] = (16, 32, 64),
    depth: int = 3,
    *,
    inputs: int = 3,
    outputs: int = 10,
    norm: str = "batch",
    shortcut: str = "conv",
    bottleneck: bool = False,
    stem: int = 3,
) -> dict[str, np.ndarray]:
    """A stage of `depth` blocks for each width; (16, 32, 64) and 3 are ResNet-20. norm: "batch" or "layer". shortcut:
    "conv", or "zeros" for the one without parameters. bottleneck: blocks of three convolutions, four times as wide
    outside."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, normed: str, n: int, m: int, size: int) -> None:
        shapes[f"{name}.weight"] = (m, n, size, size)
        keys = ("weight", "bias", "running_mean", "running_var")[: 4 if norm == "batch" else 2]
        shapes.update({f"{normed}.{key}": (m,) for key in keys})

    convolution("conv1", "bn1", inputs, widths[0], stem)
    n = widths[0]
    for s, inner in enumerate(widths, 1):
        m = 4 * inner if bottleneck else inner
        for b in range(depth):
            name = f"layer{s}.{b}"
            sizes = [(n, inner, 1), (inner, inner, 3), (inner, m, 1)] if bottleneck else [(n, m, 3), (m, m, 3)]
            for i, (before, after, size) in enumerate(sizes, 1):
                convolution(f"{name}.conv{i}", f"{name}.bn{i}", before, after, size)
            if n != m and shortcut == "conv":
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", n, m, 1)
            n = m
    return drawn(rng, shapes | {"fc.weight": (outputs, n), "fc.bias": (outputs,)})
