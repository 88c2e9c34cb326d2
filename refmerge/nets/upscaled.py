"""Layers of models that were upscaled into mixtures of experts: WEMoE, rank-one experts, SMILE and EMoE.

Each is a function of parameters by name and of x, (..., places, inputs), in the array API. `Upscaled` has them in place of
the layers of a whole network: `vit.forward(params, batch, heads=4, layers=Upscaled)`.

Beside the tensors of the dense layers, under their own names, an upscaled checkpoint has these, for T experts:

| name | shape | of |
|---|---|---|
| `<module>.task_vectors.<tensor>` | (T, ...) | WEMoE: what each expert adds to the module's tensor |
| `<module>.experts.<layer>.u`, `.svh` | (T, out, k), (T, k, in) | rank-one experts: of each linear layer of the module |
| `<module>.gate.<...>` | | their router: `fc1` and `fc2`, or `fc2` alone, each with weight and bias, or one `weight` |
| `gate.<...>` | | one router for all modules |
| `<layer>.experts.u`, `.svh`, or `.weight` | (T, out, k), (T, k, in), (T, out, in) | SMILE: of a linear layer |
| `<layer>.experts.bias` | (T, out) | what is added to its bias |
| `<layer>.gate.weight` | (T g, in) | g rows of the router for each expert |
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, cast

import numpy as np

from refmerge.checkpoint import Checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.nets.layers import Layers, Params, in_order, relu, softmax
from refmerge.numeric import array_namespace, like, top_along

__all__ = [
    "VALUES", "Upscaled", "chosen", "emergent", "emergent_scores", "layers_of", "position_code", "rank_one",
    "rank_one_weights", "routed", "smile", "smile_logits", "soft_top", "weight_ensembling", "weight_ensembling_weights",
]  # fmt: skip

Run = Callable[[Layers, Any], Any]
VALUES = {"gate_proj": "down_proj", "fc1": "fc2"}  # the layer of an MLP's keys -> that of its values
METADATA = "upscaled"  # the entry of a file's header that says how its layers are to be run

# ---------------------------------------------------------------------------------------------------- routers of a module


def routed(params: Params, gate: str, x: Any, code: Any = None) -> Any:
    """The outputs of a router for each place, (..., experts): fc2(relu(fc1 x)), fc2 x, or, the same everywhere, `weight`.

    gate: the prefix of its names. code: numbers in front of those of each place.
    """
    if f"{gate}.weight" in params:
        return params[f"{gate}.weight"]
    if code is not None:
        xp = array_namespace(x)
        x = xp.concat([xp.broadcast_to(like(code, x), (*x.shape[:-1], len(code))), x], axis=-1)
    net = Layers(params)
    if f"{gate}.fc1.weight" in params:
        x = relu(net.linear(f"{gate}.fc1", x))
    return net.linear(f"{gate}.fc2", x)


def position_code(layer: int, size: int) -> np.ndarray:
    """size numbers that tell the layer: sines and then cosines of layer / 10000^(2i/size), i = 0 ... size/2 - 1."""
    angles = layer * 10000.0 ** (-2 * np.arange(size // 2) / size)
    return np.concatenate([np.sin(angles), np.cos(angles)])


def _means(params: Params, gate: str, x: Any, code: Any, by_batch: bool) -> Any:
    """The router's outputs averaged over the places of each sample, (samples, experts), or over all samples, (experts,)."""
    if x.ndim != 3:
        raise UsageError(f"{gate}: a router reads (samples, places, numbers), not an array of {x.ndim} axes")
    xp, w = array_namespace(x), routed(params, gate, x, code)
    if w.ndim == 1:
        return w
    w = xp.mean(w, axis=1)
    return xp.mean(w, axis=0) if by_batch else w


def _merged(params: Params, x: Any, w: Any, parts: Callable[[Any], Iterator[tuple[str, Any]]], run: Run) -> Any:
    """run with the parameters that each sample's weights merge, or all samples' at once."""

    def merged(w: Any, x: Any) -> Any:
        return run(Layers(ChainMap(dict(parts(w)), cast(dict[str, Any], params))), x)

    if w.ndim == 1:
        return merged(w, x)
    if not x.shape[0]:
        return run(Layers(params), x)
    return array_namespace(x).concat([merged(w[b, ...], x[b : b + 1, ...]) for b in range(x.shape[0])], axis=0)


# -------------------------------------------------------------------------------------------------------------- of modules


def weight_ensembling_weights(
    params: Params, name: str, x: Any, *, gate: str | None = None, code: Any = None, by_batch: bool = False
) -> Any:
    """The coefficients of the task vectors, (samples, experts): the means over places of what the router gives."""
    return _means(params, gate or f"{name}.gate", x, code, by_batch)


def weight_ensembling(params: Params, name: str, x: Any, run: Run, **how: Any) -> Any:
    """A WEMoE module: run(layers of theta_b, x_b) for each sample, theta_b = theta_0 + sum of w_bt tau_t.

    x: (samples, places, numbers). run: the dense module as a function of `Layers`, whose parameters have their names in the
    dense model, and of x. how: as in `weight_ensembling_weights`.
    """
    w = weight_ensembling_weights(params, name, x, **how)
    return _merged(params, x, w, partial(_ensembled, params, name), run)


def _ensembled(params: Params, name: str, w: Any) -> Iterator[tuple[str, Any]]:
    stacked = f"{name}.task_vectors."
    for key in params:
        if key.startswith(stacked):
            own, tau = f"{name}.{key.removeprefix(stacked)}", params[key]
            theta = params[own]
            for t in range(tau.shape[0]):
                theta = theta + w[t] * tau[t, ...]
            yield own, theta


def rank_one_weights(
    params: Params, name: str, x: Any, *, select: int = 0, by_batch: bool = False, sharpness: float = 100.0
) -> Any:
    """The coefficients of the rank-one experts, (samples, T k). select: how many count; 0 for all."""
    w = _means(params, f"{name}.gate", x, None, by_batch)
    return soft_top(w, select, sharpness) if select > 0 else w


def soft_top(w: Any, k: int, sharpness: float = 100.0) -> Any:
    """w times the logistic function of sharpness (w - the k-th largest), along the last axis."""
    if k > w.shape[-1]:
        raise UsageError(f"select = {k} is more than the {w.shape[-1]} experts that there are")
    xp = array_namespace(w)
    z = sharpness * (w - xp.sort(w, axis=-1)[..., -k, None])
    e = xp.exp(-xp.abs(z))  # which cannot overflow
    return w * xp.where(z >= 0, xp.ones_like(e), e) / (1 + e)


def rank_one(params: Params, name: str, x: Any, run: Run, **how: Any) -> Any:
    """A module of rank-one experts: each linear layer is W + sum of w_t,i u_t,i (s v^T)_t,i, with the same w in all of them.

    x, run: as in `weight_ensembling`. how: as in `rank_one_weights`.
    """
    w = rank_one_weights(params, name, x, **how)
    return _merged(params, x, w, partial(_ranked, params, name), run)


def _ranked(params: Params, name: str, w: Any) -> Iterator[tuple[str, Any]]:
    experts = f"{name}.experts."
    for key in params:
        if key.startswith(experts) and key.endswith(".u"):
            u, layer = params[key], key.removeprefix(experts).removesuffix(".u")
            svh, own = params[f"{experts}{layer}.svh"], f"{name}.{layer}.weight"
            weight, k = params[own], u.shape[2]
            for t in range(u.shape[0]):
                weight = weight + (u[t, ...] * w[t * k : (t + 1) * k]) @ svh[t, ...]
            yield own, weight


# -------------------------------------------------------------------------------------------------------- of linear layers


def smile_logits(params: Params, name: str, x: Any) -> Any:
    """|R_e x| for each expert e, (..., experts). A single expert has 1."""
    xp, rows = array_namespace(x), params[f"{name}.gate.weight"]
    count = _experts(params, name)
    if count == 1:
        return xp.ones_like(x[..., :1])
    r = x @ xp.matrix_transpose(rows)
    r = xp.reshape(r, (*x.shape[:-1], count, rows.shape[0] // count))
    return xp.sqrt(xp.sum(r * r, axis=-1))


def _experts(params: Params, name: str) -> int:
    key = f"{name}.experts.svh"
    return params[key if key in params else f"{name}.experts.weight"].shape[0]


def chosen(scores: Any, k: int) -> Any:
    """0/1 for each expert, along the last axis: exactly k ones, at the largest scores, of equal ones at the first."""
    if not 1 <= k <= scores.shape[-1]:
        raise UsageError(f"top_k = {k} is outside of [1, {scores.shape[-1]}], the number of experts")
    return top_along(scores, k)


def smile(params: Params, name: str, x: Any, *, top_k: int = 1) -> Any:
    """A SMILE layer: W x + b + sum of p_e (U S V^T x + b_e) over the top_k experts, p = softmax(|R x|) made to sum to 1."""
    xp, y = array_namespace(x), Layers(params).linear(name, x)
    p = softmax(smile_logits(params, name, x))
    p = p * chosen(p, top_k)
    p = p / xp.sum(p, axis=-1, keepdims=True)
    for e in range(p.shape[-1]):
        if f"{name}.experts.svh" in params:
            u, svh = (params[f"{name}.experts.{key}"][e, ...] for key in ("u", "svh"))
            part = x @ xp.matrix_transpose(svh) @ xp.matrix_transpose(u)
        else:
            part = x @ xp.matrix_transpose(params[f"{name}.experts.weight"][e, ...])
        if f"{name}.experts.bias" in params:
            part = part + params[f"{name}.experts.bias"][e, ...]
        y = y + p[..., e, None] * part
    return y


# ------------------------------------------------------------------------------------------------------------------- EMoE


def emergent_scores(params: Params, keys: str, x: Any, experts: int) -> Any:
    """The mean of w x over the keys w of each expert, (..., experts). keys: the layer whose rows are the keys, in order of
    their experts."""
    w = params[f"{keys}.weight"]
    xp, (units, inputs) = array_namespace(w), w.shape
    if not 1 <= experts <= units or units % experts:
        raise UsageError(f"{keys}: its {units} units cannot be parted into {experts} experts of one size")
    gate = xp.mean(xp.reshape(w, (experts, units // experts, inputs)), axis=1)
    return x @ xp.matrix_transpose(gate)


def emergent(net: Layers, x: Any, run: Run, *, keys: str, values: str, experts: int, top_k: int) -> Any:
    """An MLP of which each place uses the top_k experts alone: run(layers, x), whose layer `values` reads 0 from the units
    of all others. keys, values: names of the layers that write and read the units, which lie in order of their experts."""
    xp, mask = array_namespace(x), chosen(emergent_scores(net.params, keys, x, experts), top_k)
    mask = xp.repeat(mask, net.params[f"{keys}.weight"].shape[0] // experts, axis=-1)
    return run(_Masked(net.params, net.taps, values, mask), x)


class _Masked(Layers):
    """Layers of which one, `values`, reads what is left by a mask."""

    def __init__(self, params: Params, taps: Any, values: str, mask: Any) -> None:
        super().__init__(params, taps)
        self._values, self._mask = values, mask

    def linear(self, name: str, x: Any, weight: str = "weight", bias: str = "bias") -> Any:
        return super().linear(name, x * self._mask if name == self._values else x, weight, bias)


# ---------------------------------------------------------------------------------------------------------- whole networks


class Upscaled(Layers):
    """The layers of a network that has been upscaled, by the names of its tensors.

    top_k: experts that count, of SMILE and EMoE. select: rank-one experts that count, 0 for all. by_batch: routers average
    over all samples. experts: of EMoE, in each of `modules`; 0 for none. `taps` see no insides of WEMoE and rank-one
    modules.
    """

    def __init__(
        self, params: Params, taps: Any = None, *, top_k: int = 1, select: int = 0, by_batch: bool = False, experts: int = 0,
        modules: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(params, taps)
        self.top_k, self.select, self.by_batch, self.experts, self.modules = top_k, select, by_batch, experts, modules
        self.ensembling = in_order({name.partition(".task_vectors.")[0] for name in params if ".task_vectors." in name})
        experts_of = {name: name.partition(".experts.") for name in params}
        self.ranked = {module for module, _, rest in experts_of.values() if rest.endswith(".u")}
        self.smiling = {layer for layer, _, rest in experts_of.values() if rest in ("svh", "weight")}

    def linear(self, name: str, x: Any, weight: str = "weight", bias: str = "bias") -> Any:
        if name not in self.smiling:
            return super().linear(name, x, weight, bias)
        self._in(f"{name}.weight", x)
        return self._out(f"{name}.weight", smile(self.params, name, x, top_k=self.top_k))

    def module(self, name: str, x: Any, run: Run) -> Any:
        if name in self.ensembling:
            how: dict[str, Any] = {"by_batch": self.by_batch}
            if not any(f"{name}.gate.{key}" in self.params for key in ("weight", "fc2.weight")):
                how |= {"gate": "gate", "code": self._code(name, x.shape[-1])}
            return weight_ensembling(self.params, name, x, run, **how)
        if name in self.ranked:
            return rank_one(self.params, name, x, run, select=self.select, by_batch=self.by_batch)
        if name in self.modules:
            keys = keys_of(self.params, name)
            values = f"{name}.{VALUES[keys.rpartition('.')[2]]}"
            return emergent(self, x, run, keys=keys, values=values, experts=self.experts, top_k=self.top_k)
        return run(self, x)

    def _code(self, name: str, width: int) -> np.ndarray | None:
        """What tells the shared router the layer, where it reads more than x."""
        first = next((f"gate.{key}.weight" for key in ("fc1", "fc2") if f"gate.{key}.weight" in self.params), None)
        size = self.params[first].shape[1] - width if first else 0
        return position_code(self.ensembling.index(name), size) if size else None


def keys_of(params: Params, module: str) -> str:
    """The layer of an MLP whose rows are the keys of its units. InputError where there is none that is known."""
    for keys, values in VALUES.items():
        if f"{module}.{keys}.weight" in params and f"{module}.{values}.weight" in params:
            return f"{module}.{keys}"
    known = ", ".join(f"{keys} and {values}" for keys, values in VALUES.items())
    raise InputError(f"{module!r}: is no MLP that is known, which has {known}")


def layers_of(stored: Checkpoint) -> Callable[..., Upscaled]:
    """`Upscaled` with what the header of an upscaled checkpoint says. InputError where it says nothing."""
    if METADATA not in stored.metadata:
        raise InputError(f"{stored.path}: is no upscaled checkpoint: its header has no entry {METADATA!r}")
    return partial(Upscaled, **json.loads(stored.metadata[METADATA]))
