"""A vision transformer under timm's names: patches, a class token, positions, blocks with the norm first, a head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refmerge.nets.layers import Layers, Params, attention, drawn, gelu
from refmerge.numeric import array_namespace
from refmerge.symmetry.axes import Nested

__all__ = ["depth", "forward", "init"]


def forward(
    params: Params, batch: Any, taps: Any = None, *, heads: int, eps: float = 1e-6, layers: Callable[..., Layers] = Layers
) -> Any:  # fmt: skip
    """batch: (samples, channels, height, width). In `taps`: `residual` after the embedding and after each attention and MLP,
    and of block l `heads.l` and `values.l` (what attention gives), `keys.l` (queries, then keys) and `ffn.l`. layers: what
    makes the layers of the parameters; refmerge.nets.upscaled has others."""
    net, size = layers(params, taps), params["patch_embed.proj.weight"].shape[2]
    x = net.conv("patch_embed.proj", batch, stride=size)
    xp, (n, d, rows, columns) = array_namespace(x), x.shape
    x = xp.matrix_transpose(xp.reshape(x, (n, d, rows * columns)))
    x = xp.concat([xp.broadcast_to(params["cls_token"], (n, 1, d)), x], axis=1) + params["pos_embed"]
    x = net.units("residual", x)
    for i in range(depth(params)):
        block = f"blocks.{i}"
        qkv = net.linear(f"{block}.attn.qkv", net.norm(f"{block}.norm1", x, eps=eps))
        q, k, v = (qkv[..., j * d : (j + 1) * d] for j in range(3))
        for units in (q, k):
            net.units(Nested(f"heads.{i}", f"keys.{i}", d // heads), units)
        y = net.units(Nested(f"heads.{i}", f"values.{i}", d // heads), attention(q, k, v, heads))
        x = net.units("residual", x + net.linear(f"{block}.attn.proj", y))
        y = net.module(f"{block}.mlp", net.norm(f"{block}.norm2", x, eps=eps), partial(perceptron, i))
        x = net.units("residual", x + y)
    return net.linear("head", net.norm("norm", x, eps=eps)[:, 0, :])


def perceptron(block: int, net: Layers, x: Any) -> Any:
    """The MLP of a block."""
    y = net.units(f"ffn.{block}", gelu(net.linear(f"blocks.{block}.mlp.fc1", x)))
    return net.linear(f"blocks.{block}.mlp.fc2", y)


def depth(params: Params) -> int:
    """How many blocks there are."""
    return len([name for name in params if name.startswith("blocks.") and name.endswith(".attn.qkv.weight")])


def init(
    rng: np.random.Generator, width: int = 16, blocks: int = 2, *, hidden: int | None = None, patch: int = 4,
    patches: int = 4, channels: int = 3, outputs: int = 10,
) -> dict[str, np.ndarray]:  # fmt: skip
    """hidden: units of each MLP, else four times the width."""
    d, m = width, hidden or 4 * width
    shapes = {
        "cls_token": (1, 1, d), "pos_embed": (1, 1 + patches, d),
        "patch_embed.proj.weight": (d, channels, patch, patch), "patch_embed.proj.bias": (d,),
    }  # fmt: skip
    for i in range(blocks):
        layers: dict[str, tuple[int, ...]] = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "norm1": (d,), "norm2": (d,)}
        layers |= {"mlp.fc1": (m, d), "mlp.fc2": (d, m)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,), "head.weight": (outputs, d), "head.bias": (outputs,)}
    return drawn(rng, shapes)
