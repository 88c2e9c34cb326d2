"""Llama and its kin (Mistral, Qwen2, Qwen3) under transformers' names: RMS norm, rotary positions, heads that share keys and
values in groups, and an MLP whose hidden units are gated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refmerge.nets.layers import Layers, Params, attention, causal, drawn, joined, rotated, silu, split
from refmerge.numeric import array_namespace
from refmerge.symmetry.axes import Block, Nested

__all__ = ["depth", "forward", "init", "prefix"]


def forward(
    params: Params, batch: Any, taps: Any = None, *, heads: int, groups: int | None = None, theta: float = 10000.0,
    eps: float = 1e-6, layers: Callable[..., Layers] = Layers,
) -> Any:  # fmt: skip
    """batch: tokens (samples, places). Gives scores of each token as the next one, at each place. groups: the number of
    heads of keys and values. In `taps`: `residual` after the embedding and after each attention and MLP, and of layer l
    `groups.l`, `queries.l` (heads in their group) and `values.l`, all from what attention gives, and `ffn.l`. layers: what
    makes the layers of the parameters; refmerge.nets.moe and refmerge.nets.upscaled have others."""
    net, at, groups = layers(params, taps), prefix(params), groups or heads
    xp, (n, t) = array_namespace(batch), batch.shape
    embedding = params[f"{at}embed_tokens.weight"]
    x = xp.reshape(xp.take(embedding, xp.reshape(batch, (-1,)), axis=0), (n, t, embedding.shape[1]))
    x = net.units("residual", x)
    for i in range(depth(params)):
        layer = f"{at}layers.{i}"
        y = net.norm(f"{layer}.input_layernorm", x, eps=eps)
        q, k, v = (net.linear(f"{layer}.self_attn.{key}_proj", y) for key in "qkv")
        if f"{layer}.self_attn.q_norm.weight" in params:
            q = joined(net.norm(f"{layer}.self_attn.q_norm", split(q, heads), eps=eps))
            k = joined(net.norm(f"{layer}.self_attn.k_norm", split(k, groups), eps=eps))
        y = attention(q, k, v, heads, groups, causal(t, x), lambda x: rotated(x, theta))
        width = y.shape[-1] // heads
        inner = Block(f"queries.{i}", width, f"values.{i}")
        y = net.units(Nested(f"groups.{i}", inner, heads // groups * width), y)
        x = net.units("residual", x + net.linear(f"{layer}.self_attn.o_proj", y))
        y = net.norm(f"{layer}.post_attention_layernorm", x, eps=eps)
        x = net.units("residual", x + net.module(f"{layer}.mlp", y, partial(perceptron, layer)))
    x = net.norm(f"{at}norm", x, eps=eps)
    return net.linear("lm_head", x) if "lm_head.weight" in params else x @ xp.matrix_transpose(embedding)


def perceptron(layer: str, net: Layers, x: Any) -> Any:
    """The MLP of a layer."""
    y = silu(net.linear(f"{layer}.mlp.gate_proj", x)) * net.linear(f"{layer}.mlp.up_proj", x)
    return net.linear(f"{layer}.mlp.down_proj", net.units(f"ffn.{layer.rpartition('.')[2]}", y))


def prefix(params: Params) -> str:
    """`model.` where the names begin with it."""
    return "model." if "model.embed_tokens.weight" in params else ""


def depth(params: Params) -> int:
    """How many layers there are."""
    return len([name for name in params if name.endswith(".self_attn.q_proj.weight")])


def init(
    rng: np.random.Generator, heads: int = 4, groups: int = 2, layers: int = 2, *, head_width: int = 8,
    width: int | None = None, hidden: int = 24, tokens: int = 11, tied: bool = False, bias: bool = False,
    head_norms: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """width: of the residual stream, else that of all heads. bias: of queries, keys and values, as Qwen2 has it. head_norms:
    of queries and keys, as Qwen3 has them."""
    d, m = width or heads * head_width, hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, d)}
    for i in range(layers):
        at = f"model.layers.{i}"
        rows = {"q": heads * head_width, "k": groups * head_width, "v": groups * head_width}
        shapes |= {f"{at}.self_attn.{key}_proj.weight": (n, d) for key, n in rows.items()}
        if bias:
            shapes |= {f"{at}.self_attn.{key}_proj.bias": (n,) for key, n in rows.items()}
        if head_norms:
            shapes |= {f"{at}.self_attn.{key}_norm.weight": (head_width,) for key in "qk"}
        shapes |= {f"{at}.self_attn.o_proj.weight": (d, heads * head_width)}
        shapes |= {f"{at}.mlp.{key}_proj.weight": (m, d) for key in ("gate", "up")} | {f"{at}.mlp.down_proj.weight": (d, m)}
        shapes |= {f"{at}.{key}_layernorm.weight": (d,) for key in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (d,)}
    return drawn(rng, shapes if tied else shapes | {"lm_head.weight": (tokens, d)})
