"""Mixtures of experts: Mixtral and Qwen-MoE (Qwen2-MoE, Qwen3-MoE) as whole language models, and by itself the block that
they have in place of an MLP, also as Switch Transformers have it; under transformers' names.

A router scores the experts for each token, and the token goes to the `chosen` ones with the highest scores, of equal ones
to the first. What these give is added, each times its probability:

    Mixtral    <layer>.block_sparse_moe.gate, .experts.<e>.{w1,w3,w2}; probabilities of the chosen ones, which sum to 1
    Qwen-MoE   <layer>.mlp.gate, .experts.<e>.{gate,up,down}_proj; probabilities among all, unless `normalize`; beside them
               a shared expert for all tokens, behind a gate of its own, where the model has one
    Switch     <layer>.mlp.router.classifier, .experts.expert_<e>.{wi,wo}; ReLU in place of gates. Every token is served: an
               expert has no capacity that it could run out of

A tensor `<router>.experts` of whole numbers, one for each score, says which expert a score is of where several scores share
one, as `msmoe` writes them.

taps: under the name of the router's weight its scores (logits), a row for each token; under the names of an expert's weights
what its layers give, for the tokens that go there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import device

from refmerge.errors import UsageError
from refmerge.nets import llama
from refmerge.nets.layers import Layers, Params, drawn, like_ints, relu, silu, softmax
from refmerge.numeric import array_namespace, host, like

__all__ = ["Mixtures", "chosen_experts", "forward", "init", "mixture", "options", "router_of"]

# Below a layer: its router, its experts.
ROUTERS = {
    "block_sparse_moe.gate": "block_sparse_moe.experts.{}",
    "mlp.gate": "mlp.experts.{}",
    "mlp.router.classifier": "mlp.experts.expert_{}",
}


KNOWN = ("mixtral", "qwen2_moe", "qwen3_moe")  # model_type in config.json


def forward(
    params: Params, batch: Any, taps: Any = None, *, heads: int, groups: int | None = None, chosen: int = 2,
    normalize: bool | None = None, theta: float = 10000.0, eps: float = 1e-6,
) -> Any:  # fmt: skip
    """As that of refmerge.nets.llama, with a mixture in those layers that have a router. chosen: experts for each token.
    normalize: whether the probabilities of the chosen ones sum to 1; else Mixtral's do, and others' do not."""
    layers = partial(Mixtures, chosen=chosen, normalize=normalize)
    return llama.forward(params, batch, taps, heads=heads, groups=groups, theta=theta, eps=eps, layers=layers)


class Mixtures(Layers):
    """Layers whose MLP is a mixture of experts where the layer has a router."""

    def __init__(self, params: Params, taps: Any = None, *, chosen: int = 2, normalize: bool | None = None) -> None:
        super().__init__(params, taps)
        self.chosen, self.normalize = chosen, normalize

    def module(self, name: str, x: Any, run: Callable[[Layers, Any], Any]) -> Any:
        layer = name.removesuffix(".mlp")
        if layer == name or router_of(self.params, layer) is None:
            return run(self, x)
        return mixture(self, layer, x, chosen=self.chosen, normalize=self.normalize)


def router_of(params: Params, layer: str) -> str | None:
    """The name of a layer's router below it; None where it has none."""
    return next((router for router in ROUTERS if f"{layer}.{router}.weight" in params), None)


def mixture(net: Layers, layer: str, x: Any, *, chosen: int = 2, normalize: bool | None = None) -> Any:
    """What the mixture of a layer makes of x, (..., width). UsageError where there is none, or more experts are to be chosen
    than there are."""
    router = router_of(net.params, layer)
    if router is None:
        raise UsageError(f"moe: layer {layer!r} has no router")
    xp, shape = array_namespace(x), x.shape
    rows = xp.reshape(x, (-1, shape[-1]))
    logits = net.linear(f"{layer}.{router}", rows)
    if not 1 <= chosen <= logits.shape[1]:
        raise UsageError(f"moe: chosen = {chosen} of the {logits.shape[1]} experts of {layer!r}")
    sent = chosen_experts(host(logits), chosen)
    weights = softmax(logits) * like(sent.astype(np.float64), logits)
    if router.startswith("block_sparse") if normalize is None else normalize:
        weights = weights / xp.sum(weights, axis=1, keepdims=True)
    total = xp.zeros_like(rows)
    for expert, scores in served(net.params, f"{layer}.{router}", logits.shape[1]).items():
        if (mine := np.flatnonzero(sent[:, scores].any(axis=1))).size:
            y = perceptron(net, f"{layer}.{ROUTERS[router].format(expert)}", xp.take(rows, like_ints(mine, rows), axis=0))
            back = np.full(len(sent), len(mine))  # a row of zeros for tokens that go elsewhere
            back[mine] = np.arange(len(mine))
            y = xp.concat([y, xp.zeros((1, y.shape[1]), dtype=y.dtype, device=device(y))], axis=0)
            share = xp.sum(xp.take(weights, like_ints(np.array(scores), weights), axis=1), axis=1, keepdims=True)
            total = total + share * xp.take(y, like_ints(back, y), axis=0)
    if f"{layer}.mlp.shared_expert.gate_proj.weight" in net.params:
        gate = net.linear(f"{layer}.mlp.shared_expert_gate", rows)
        total = total + perceptron(net, f"{layer}.mlp.shared_expert", rows) / (1 + xp.exp(-gate))
    return xp.reshape(total, shape)


def chosen_experts(logits: np.ndarray, chosen: int) -> np.ndarray:
    """True where an expert is among the `chosen` highest scores of its row, of equal ones the first; of logits' shape."""
    first = np.argsort(-logits, axis=1, kind="stable")[:, :chosen]
    sent = np.zeros(logits.shape, bool)
    np.put_along_axis(sent, first, True, axis=1)
    return sent


def served(params: Params, router: str, count: int) -> dict[int, list[int]]:
    """Expert -> the scores that are of it."""
    slots = host(params[f"{router}.experts"]).tolist() if f"{router}.experts" in params else range(count)
    found: dict[int, list[int]] = {}
    for score, expert in enumerate(slots):
        found.setdefault(int(expert), []).append(score)
    return found


def perceptron(net: Layers, expert: str, x: Any) -> Any:
    """What one expert makes of rows."""
    for gate, up, down in (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")):
        if f"{expert}.{gate}.weight" in net.params:
            return net.linear(f"{expert}.{down}", silu(net.linear(f"{expert}.{gate}", x)) * net.linear(f"{expert}.{up}", x))
    return net.linear(f"{expert}.wo", relu(net.linear(f"{expert}.wi", x)))


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `forward` must be told of a model, from its config.json. UsageError where that does not say it, or says that the
    model computes something else."""
    for key in ("num_attention_heads", "num_experts_per_tok"):
        if type(config.get(key)) is not int:
            raise UsageError(f"moe: config.json says no {key}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key, value, known in (
        ("model_type", config.get("model_type"), KNOWN),
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
    ):
        if value not in known:
            raise UsageError(f"moe: {key} is {value!r}, and only {' or '.join(map(repr, known))} is computed here")
    given = {
        "groups": config.get("num_key_value_heads"),
        "theta": rope.get("rope_theta", config.get("rope_theta")),
        "eps": config.get("rms_norm_eps"),
        "normalize": config.get("norm_topk_prob"),
    }
    told = {"heads": config["num_attention_heads"], "chosen": config["num_experts_per_tok"]}
    return told | {key: value for key, value in given.items() if value is not None}


def init(
    rng: np.random.Generator, heads: int = 4, groups: int = 2, layers: int = 2, *, experts: int = 4, style: str = "mixtral",
    shared: int = 0, hidden: int = 24, width: int | None = None, **how: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """style: "mixtral" or "qwen". shared: hidden units of a shared expert, if any. how: what else llama.init takes."""
    plain = llama.init(rng, heads, groups, layers, hidden=hidden, width=width, **how)
    d = plain["model.norm.weight"].shape[0]
    params = {name: x for name, x in plain.items() if ".mlp." not in name}
    block, gate, up, down = {
        "mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen": ("mlp", "gate_proj", "up_proj", "down_proj"),
    }[style]  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        at = f"model.layers.{i}.{block}"
        shapes[f"{at}.gate.weight"] = (experts, d)
        for e in range(experts):
            shapes |= {f"{at}.experts.{e}.{part}.weight": (hidden, d) for part in (gate, up)}
            shapes[f"{at}.experts.{e}.{down}.weight"] = (d, hidden)
        if shared:
            shapes |= {f"{at}.shared_expert.{part}.weight": (shared, d) for part in (gate, up)}
            shapes |= {f"{at}.shared_expert.{down}.weight": (d, shared), f"{at}.shared_expert_gate.weight": (1, d)}
    return params | drawn(rng, shapes)
