"""GPT-2 under its own names, with weights of shape (in, out): token and position embeddings, blocks with the norm first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refmerge.nets.layers import Layers, Params, attention, causal, drawn, gelu_tanh
from refmerge.numeric import array_namespace
from refmerge.symmetry.axes import Nested

__all__ = ["depth", "forward", "init", "prefix"]


def forward(
    params: Params, batch: Any, taps: Any = None, *, heads: int, eps: float = 1e-5, layers: Callable[..., Layers] = Layers
) -> Any:  # fmt: skip
    """batch: tokens (samples, places). Gives scores of each token as the next one, at each place. Without lm_head the
    embedding is the head. `taps` and `layers` as in refmerge.nets.vit."""
    net, at = layers(params, taps), prefix(params)
    xp, (n, t) = array_namespace(batch), batch.shape
    embedding = params[f"{at}wte.weight"]
    d = embedding.shape[1]
    x = xp.reshape(xp.take(embedding, xp.reshape(batch, (-1,)), axis=0), (n, t, d)) + params[f"{at}wpe.weight"][:t, :]
    x = net.units("residual", x)
    for i in range(depth(params)):
        block = f"{at}h.{i}"
        qkv = net.conv1d(f"{block}.attn.c_attn", net.norm(f"{block}.ln_1", x, eps=eps))
        q, k, v = (qkv[..., j * d : (j + 1) * d] for j in range(3))
        for units in (q, k):
            net.units(Nested(f"heads.{i}", f"keys.{i}", d // heads), units)
        y = attention(q, k, v, heads, hidden=causal(t, x))
        y = net.conv1d(f"{block}.attn.c_proj", net.units(Nested(f"heads.{i}", f"values.{i}", d // heads), y))
        x = net.units("residual", x + y)
        y = net.module(f"{block}.mlp", net.norm(f"{block}.ln_2", x, eps=eps), partial(perceptron, block))
        x = net.units("residual", x + y)
    x = net.norm(f"{at}ln_f", x, eps=eps)
    return net.linear("lm_head", x) if "lm_head.weight" in params else x @ xp.matrix_transpose(embedding)


def perceptron(block: str, net: Layers, x: Any) -> Any:
    """The MLP of a block."""
    y = net.units(f"ffn.{block.rpartition('.')[2]}", gelu_tanh(net.conv1d(f"{block}.mlp.c_fc", x)))
    return net.conv1d(f"{block}.mlp.c_proj", y)


def prefix(params: Params) -> str:
    """`transformer.` where the names begin with it."""
    return "transformer." if "transformer.wte.weight" in params else ""


def depth(params: Params) -> int:
    """How many blocks there are."""
    return len([name for name in params if name.endswith(".attn.c_attn.weight")])


def init(
    rng: np.random.Generator, width: int = 16, blocks: int = 2, *, hidden: int | None = None, tokens: int = 11,
    places: int = 8, tied: bool = True,
) -> dict[str, np.ndarray]:  # fmt: skip
    """hidden: units of each MLP, else four times the width. tied: no lm_head of its own."""
    d, m = width, hidden or 4 * width
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (tokens, d), "transformer.wpe.weight": (places, d)}
    for i in range(blocks):
        layers: dict[str, tuple[int, ...]] = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "ln_1": (d,), "ln_2": (d,)}
        layers |= {"mlp.c_fc": (d, m), "mlp.c_proj": (m, d)}
        for name, shape in layers.items():
            shapes |= {f"transformer.h.{i}.{name}.weight": shape, f"transformer.h.{i}.{name}.bias": shape[-1:]}
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    return drawn(rng, shapes if tied else shapes | {"lm_head.weight": (tokens, d)})
