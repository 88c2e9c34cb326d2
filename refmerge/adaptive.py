"""Coefficients of task vectors that data choose: the merge as a function of a few numbers, gradients, Adam, and the result.

theta(c) = theta_0 + sum_t c_t tau_t is linear in its coefficients, so that a loss of theta has a gradient in them that costs
one inner product each. Where the loss's own gradient comes from is a *provider*, `provider(step, x) -> (value, gradients)`:

- `differences`: central differences, for float64 on any array library, two merges and losses a number;
- `autograd` and `jax_grad`: torch's and jax's own, which are imported only there;
- `contracted(f)`: your f(params, task, batch) gives the loss and its gradients by tensor, from whatever framework.

Nothing here draws or shuffles: batches come in the order in which they are used, and a run is a function of its arguments.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_jax_array, is_torch_array

from refmerge.errors import InputError, UsageError
from refmerge.numeric import array_namespace, host, like, tree_sum

__all__ = [
    "Adam", "Coefficients", "Composition", "Fit", "Step", "autograd", "contracted", "cosine", "cross_entropy", "differences",
    "entropy", "fit", "jax_grad", "log_softmax", "provider_for",
]  # fmt: skip

Arrays = Mapping[str, Any]
Numbers = dict[str, np.ndarray]
Provider = Callable[["Step", Numbers], tuple[float, Numbers]]
Example = tuple[int, Any]

# ------------------------------------------------------------------------------------------------------------ composition


@dataclass(frozen=True)
class Composition:
    """theta = theta_0 + sum of c[row, t] m tau_t over the rows and masks m of each tensor.

    base, tau: arrays by name; names that tau lacks are taken from the base. rows: for each name the rows of the matrix of
    coefficients that it has, each with a mask or None. labels: of the rows.
    """

    base: Arrays
    tau: Sequence[Arrays]
    rows: Mapping[str, Sequence[tuple[int, Any]]]
    labels: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.labels), len(self.tau)

    def theta(self, c: Any) -> dict[str, Any]:
        """The merged parameters. c: a matrix of host numbers, or an array that gradients go through."""
        params = dict(self.base)
        for name, parts in self.rows.items():
            x = self.base[name]
            for t, tau in enumerate(self.tau):
                for row, mask in parts:
                    weight = float(c[row, t]) if isinstance(c, np.ndarray) else c[row, t]
                    x = x + weight * (tau[name] if mask is None else mask * tau[name])
            params[name] = x
        return params

    def contract(self, gradients: Arrays) -> np.ndarray:
        """dL/dc[row, t] = sum of dL/dtheta m tau_t, from gradients by name; of a name that is missing it is zero."""
        out = np.zeros(self.shape)
        for name, parts in self.rows.items():
            if gradients.get(name) is None:
                continue
            g = host(gradients[name]).astype(np.float64)
            for t, tau in enumerate(self.tau):
                product = g * host(tau[name])
                for row, mask in parts:
                    out[row, t] += tree_sum(product if mask is None else product * host(mask))
        return out

    def tangents(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(row, t, m tau_t of that row alone) for every coefficient."""
        for row, t in np.ndindex(*self.shape):
            found = {}
            for name, parts in self.rows.items():
                for r, mask in parts:
                    if r == row:
                        found[name] = self.tau[t][name] if mask is None else mask * self.tau[t][name]
            yield row, t, found

    @property
    def example(self) -> Any:
        return next(iter(self.base.values()))


def task_vectors(models: Sequence[Arrays], base: Arrays, who: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The base as arrays, and theta_t - theta_0 of the floating-point tensors. InputError where names or shapes differ."""
    if isinstance(models, str | Path | Mapping):
        raise UsageError(f"{who}: models is a sequence: write [a, b], also for one model")
    start = {name: base[name] for name in sorted(base)}
    tau: list[dict[str, Any]] = []
    for t, model in enumerate(models):
        if set(model) != set(start):
            name = sorted(set(model) ^ set(start))[0]
            where = f"model {t}" if name in start else "the base"
            raise InputError(f"{who}: tensor {name!r} is not in {where}; leave it out of all or add it to all")
        tau.append({})
        for name, x in start.items():
            other = model[name]
            if other.shape != x.shape:
                raise InputError(
                    f"{who}: tensor {name!r} has shape {list(other.shape)} in model {t} and {list(x.shape)} in the base"
                )
            if is_floating(x):
                tau[-1][name] = other - x
    if not tau or not tau[0]:
        raise UsageError(f"{who}: there is {'no floating-point tensor' if tau else 'no model'} to merge")
    return start, tau


def is_floating(x: Any) -> bool:
    xp = array_namespace(x)
    return x.dtype.kind in "fV" if xp is np else bool(xp.isdtype(x.dtype, "real floating"))


def blocks(names: Iterable[str], per: str, who: str) -> tuple[dict[str, list[tuple[int, Any]]], tuple[str, ...]]:
    """A row of coefficients for each tensor, or one for all."""
    names = list(names)
    if per == "tensor":
        return {name: [(row, None)] for row, name in enumerate(names)}, tuple(names)
    if per == "model":
        return {name: [(0, None)] for name in names}, ("model",)
    raise UsageError(f"{who}: per = {per!r} is none of 'tensor', 'model'")


# -------------------------------------------------------------------------------------------------------------- providers


@dataclass(frozen=True)
class Step:
    """What a provider differentiates. composition: the merge. examples: (task, batch) of this step. loss: a function of
    (parameters, the other trained arrays, task, batch); the step's is the sum over its examples. model: a function of the
    coefficients that takes the place of composition.theta, where there is one."""

    composition: Composition
    examples: Sequence[Example]
    loss: Callable[[Any, Arrays, int, Any], Any]
    model: Callable[[Any, int, Any], Any] | None = None

    def value(self, x: Mapping[str, Any]) -> Any:
        """The loss at coefficients x["coefficients"] and other trained arrays x[...]."""
        c, total = x["coefficients"], None
        theta = self.composition.theta(c) if self.model is None else None
        for task, batch in self.examples:
            given = theta if self.model is None else self.model(c, task, batch)
            value = self.loss(given, x, task, batch)
            total = value if total is None else total + value
        return total

    def arrays(self, x: Numbers) -> dict[str, Any]:
        """x as arrays of the models' library, the coefficients as they are."""
        return {k: v if k == "coefficients" else like(v, self.composition.example) for k, v in x.items()}


def differences(step: Step, x: Numbers, h: float = 1e-5) -> tuple[float, Numbers]:
    """Central differences (L(x + h) - L(x - h)) / 2h of each number. Only in float64: else rounding is all that is left."""
    wide = [v for v in step.composition.base.values() if is_floating(v)]
    if any("float64" not in str(v.dtype) for v in wide):
        raise UsageError("differences need models in float64: give them so, or gradients (gradient=...)")

    def at(key: str, place: tuple[int, ...], by: float) -> float:
        moved = x[key].copy()
        moved[place] += by
        return number(step.value(step.arrays({**x, key: moved})))

    gradients = {}
    for key, values in x.items():
        g = gradients[key] = np.zeros(values.shape)
        for place in np.ndindex(*values.shape):
            g[place] = (at(key, place, h) - at(key, place, -h)) / (2 * h)
    return number(step.value(step.arrays(x))), gradients


def autograd(step: Step, x: Numbers) -> tuple[float, Numbers]:
    """By torch."""
    import torch

    some = step.composition.example
    given = {
        k: torch.tensor(
            v, dtype=torch.float64 if k == "coefficients" else some.dtype, device=some.device, requires_grad=True
        )
        for k, v in x.items()
    }
    with torch.enable_grad():
        value = step.value(given)
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            return number(value), {k: np.zeros(v.shape) for k, v in x.items()}
        found = torch.autograd.grad(value, list(given.values()), allow_unused=True)
    return number(value), {
        k: np.zeros(v.shape) if g is None else host(g).astype(float) for (k, v), g in zip(x.items(), found)
    }


def jax_grad(step: Step, x: Numbers) -> tuple[float, Numbers]:
    """By jax."""
    import jax

    some = step.composition.example
    value, found = jax.value_and_grad(step.value)({k: jax.numpy.asarray(v, dtype=some.dtype) for k, v in x.items()})
    return number(value), {k: np.asarray(g, dtype=np.float64) for k, g in found.items()}


def contracted(gradient: Callable[[Arrays, int, Any], tuple[Any, Arrays]]) -> Provider:
    """From gradient(params, task, batch) -> (loss, {name: dL/dtheta}). It trains coefficients alone."""

    def provider(step: Step, x: Numbers) -> tuple[float, Numbers]:
        if step.model is not None or len(x) > 1:
            raise UsageError("gradients by tensor reach only the coefficients of a merge: no heads, no linearised model")
        theta, value, total = step.composition.theta(x["coefficients"]), 0.0, np.zeros(step.composition.shape)
        for task, batch in step.examples:
            loss, found = gradient(theta, task, batch)
            value, total = value + number(loss), total + step.composition.contract(found)
        return value, {"coefficients": total}

    return provider


def provider_for(gradient: Any, example: Any, who: str) -> Provider:
    """The provider of a name; without one torch's and jax's for their arrays, and differences for others."""
    if callable(gradient):
        return gradient
    if gradient is None:
        gradient = "torch" if is_torch_array(example) else "jax" if is_jax_array(example) else "differences"
    known = {"differences": differences, "torch": autograd, "jax": jax_grad}
    if gradient not in known:
        raise UsageError(f"{who}: gradient = {gradient!r} is none of 'differences', 'torch', 'jax', nor a function")
    if {"torch": not is_torch_array(example), "jax": not is_jax_array(example)}.get(gradient):
        raise UsageError(f"{who}: gradient = {gradient!r} needs models that are {gradient} arrays")
    return known[gradient]


def number(value: Any) -> float:
    """A loss as a float. UsageError for what is no number."""
    try:
        return float(host(value).item()) if hasattr(value, "shape") else float(value)
    except (TypeError, ValueError):
        raise UsageError(f"a loss is one number, not {type(value).__name__}") from None


# ---------------------------------------------------------------------------------------------------------------- losses


def log_softmax(z: Any) -> Any:
    """Over the last axis."""
    xp = array_namespace(z)
    z = z - xp.max(z, axis=-1, keepdims=True)
    return z - xp.log(xp.sum(xp.exp(z), axis=-1, keepdims=True))


def entropy(z: Any, eps: float = 0.0) -> Any:
    """The mean over a batch of -sum_c p_c log(p_c + eps), p = softmax(z). 0 log 0 is 0."""
    xp = array_namespace(z)
    logs = log_softmax(z)
    p = xp.exp(logs)
    if eps:
        return xp.mean(-xp.sum(p * xp.log(p + eps), axis=-1))
    return xp.mean(-xp.sum(p * xp.where(p > 0, logs, xp.zeros_like(logs)), axis=-1))


def cross_entropy(z: Any, targets: Any) -> Any:
    """The mean over a batch of -sum_c y_c log p_c. targets: classes, whole numbers, or a row of probabilities for each."""
    xp = array_namespace(z)
    y = host(targets)
    if y.ndim < len(z.shape):
        y = np.eye(z.shape[-1])[y.astype(np.int64)]
    return xp.mean(-xp.sum(like(y, z) * log_softmax(z), axis=-1))


# --------------------------------------------------------------------------------------------------------------- optimiser


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled weight decay (AdamW), as torch computes it. Each array has a state of its own, (m, v, steps), and
    one that gets no gradient in a step is left out of it."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def step(self, x: Numbers, gradients: Numbers, state: dict[str, Any], lr: float | None = None) -> tuple[Numbers, dict]:
        """(x, state) after one step; both arguments stay as they are."""
        lr = self.lr if lr is None else lr
        b1, b2 = self.betas
        x, state = dict(x), dict(state)
        for key, g in gradients.items():
            m, v, t = state.get(key, (np.zeros(g.shape), np.zeros(g.shape), 0))
            m, v, t = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, t + 1
            denominator = np.sqrt(v) / math.sqrt(1 - b2**t) + self.eps
            decayed = x[key] * (1 - lr * self.weight_decay)
            x[key], state[key] = decayed - lr / (1 - b1**t) * (m / denominator), (m, v, t)
        return x, state


def cosine(lr: float, steps: int) -> list[float]:
    """Learning rates from lr down to 0 along half a cosine, which they do not reach."""
    return [0.5 * (1 + math.cos(math.pi * k / steps)) * lr for k in range(steps)]


def clipped(gradients: Numbers, most: float) -> Numbers:
    """Scaled so that the norm of all together is at most that, as torch does it."""
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in gradients.values()))
    scale = min(1.0, most / (norm + 1e-6))
    return {k: scale * g for k, g in gradients.items()}


# --------------------------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Coefficients:
    """What was learned. labels: of the rows, tensor names or "model". values: (rows, tasks). method: which takes them, under
    its parameter `key`, with `params` besides; "parts" is none. prior: for tensors that were not there."""

    labels: tuple[str, ...]
    values: np.ndarray
    prior: float = 0.0
    method: str = "task_arithmetic"
    key: str = "weight"
    params: Mapping[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> list[float]:
        """One for each task, for that tensor."""
        if self.labels == ("model",):
            return [float(v) for v in self.values[0]]
        row = self.labels.index(name) if name in self.labels else None
        return [self.prior] * self.values.shape[1] if row is None else [float(v) for v in self.values[row]]

    def check(self, models: Sequence[Any]) -> None:
        """UsageError where these coefficients are not of so many models, or of none that are merged whole."""
        if len(models) != self.values.shape[1]:
            raise UsageError(f"these are coefficients of {self.values.shape[1]} models, {len(models)} given")
        if self.method == "parts":
            raise UsageError("coefficients of parts of tensors fit no merge of whole ones: use composition.theta of the fit")

    def merge(self, models: Sequence[Any], base: Any, *, out: Any = None, **options: Any) -> Any:
        """The merge with these coefficients: refmerge.merge, with one set of parameters a tensor."""
        from refmerge.api import prepare

        self.check(models)
        write = {k: options.pop(k) for k in ("max_shard_size", "overwrite") if k in options}
        plan = prepare(
            models, self.method, base=base, params=lambda name, _: {**self.params, self.key: self.of(name)},
            **{"integers": "base", **options},
        )  # fmt: skip
        return plan.run(out, **{"max_shard_size": "5GB", "overwrite": False, **write})

    def recipe(self, models: Sequence[str], base: str) -> str:
        """The same as YAML, for paths of checkpoints."""
        self.check(models)
        lines = ["refmerge: 1", f"merge_method: {self.method}", f"base_model: {json.dumps(str(base))}", "models:"]
        for t, model in enumerate(models):
            lines += [f"  - model: {json.dumps(str(model))}", "    parameters:"]
            if self.labels == ("model",):
                lines.append(f"      {self.key}: {plain(self.values[0, t])}")
                continue
            lines.append(f"      {self.key}:")
            # The first entry whose filter is contained in a name counts: a name comes before all that it contains.
            for row in sorted(range(len(self.labels)), key=lambda r: (-len(self.labels[r]), r)):
                lines.append(f"        - {{value: {plain(self.values[row, t])}, filter: {json.dumps(self.labels[row])}}}")
            lines.append(f"        - {{value: {plain(self.prior)}}}")
        if self.params:
            lines += ["parameters:", *(f"  {k}: {plain(v)}" for k, v in self.params.items())]
        return "\n".join([*lines, ""])

    def save(self, path: str | Path, models: Sequence[str], base: str) -> None:
        """Write the recipe."""
        Path(path).write_text(self.recipe(models, base), encoding="utf-8")


def plain(x: float) -> str:
    """A number that every version of YAML reads back exactly: 1.0e-05."""
    mantissa, e, exponent = repr(float(x)).partition("e")
    return mantissa + ("" if "." in mantissa or not e else ".0") + e + exponent


@dataclass(frozen=True)
class Fit:
    """coefficients: the result. raw: before the clamp. losses and gradients (by the coefficients as they enter the merge):
    of each step. path: raw coefficients before the first step and after each. trained: other arrays that were trained.
    composition: of the models that were given; composition.theta(coefficients.values) is the merge that was scored."""

    coefficients: Coefficients
    raw: np.ndarray
    losses: tuple[float, ...]
    gradients: tuple[np.ndarray, ...]
    path: tuple[np.ndarray, ...]
    trained: Numbers
    composition: Composition

    def merge(self, models: Sequence[Any], base: Any, **options: Any) -> Any:
        """refmerge.merge with the coefficients."""
        return self.coefficients.merge(models, base, **options)


def fit(
    composition: Composition,
    steps: Iterable[Sequence[Example]],
    loss: Callable[[Any, Arrays, int, Any], Any],
    *,
    who: str,
    prior: float,
    provider: Provider,
    optimiser: Adam,
    clamp: tuple[float, float] | None = None,
    rates: Sequence[float] | None = None,
    clip: float | None = None,
    penalty: Callable[[np.ndarray], tuple[float, np.ndarray]] | None = None,
    trained: Mapping[str, np.ndarray] | None = None,
    of_task: Callable[[int], Sequence[str]] = lambda task: (),
    model: Callable[[Any, int, Any], Any] | None = None,
    before: Callable[[Arrays, Arrays, Sequence[Example]], Sequence[Example]] | None = None,
) -> Fit:
    """One step of the optimiser for each entry of `steps`, a list of (task, batch).

    clamp: bounds of the coefficients as they enter the merge; outside of them a raw coefficient has no gradient, on them it
    has. trained: other arrays, of which of_task(task) names those that a step of that task trains. before: what changes the
    examples of a step once its model is known; where it leaves none, the step is left out, with NaN for its loss.
    """
    x: Numbers = {"coefficients": np.full(composition.shape, float(prior)), **(trained or {})}
    state: dict[str, Any] = {}
    low, high = clamp or (-math.inf, math.inf)
    losses, gradients, path = [], [], [x["coefficients"]]
    moved = np.zeros(composition.shape, bool)
    for k, given in enumerate(checked_steps(steps, len(composition.tau), who)):
        raw, examples = x["coefficients"], list(given)
        used = ["coefficients", *dict.fromkeys(name for task, _ in examples for name in of_task(task))]
        effective = {key: x[key] for key in used} | {"coefficients": np.clip(raw, low, high)}
        step = Step(composition, examples, loss, model)
        if before is not None:
            examples = list(before(composition.theta(effective["coefficients"]), step.arrays(effective), examples))
            if not examples:
                losses.append(math.nan)
                gradients.append(np.zeros(composition.shape))
                path.append(raw)
                continue
            step = Step(composition, examples, loss, model)
        value, g = provider(step, effective)
        g = {key: np.asarray(g[key], dtype=np.float64) for key in used}
        if not all(np.isfinite(v).all() for v in g.values()):
            raise InputError(f"{who}: the gradient of step {k} is not finite: the loss there is {value}")
        gradients.append(g["coefficients"])
        moved |= g["coefficients"] != 0
        g["coefficients"] = np.where((raw >= low) & (raw <= high), g["coefficients"], 0.0)
        if penalty is not None:
            extra, slope = penalty(raw)
            value, g["coefficients"] = value + extra, g["coefficients"] + slope
        losses.append(value)
        if clip is not None:
            g = clipped(g, clip)
        if rates is not None and k >= len(rates):
            raise UsageError(f"{who}: {len(rates)} learning rates for more steps")
        x, state = optimiser.step(x, g, state, None if rates is None else rates[k])
        path.append(x["coefficients"])
    idle = [composition.labels[row] for row in np.flatnonzero(~moved.any(axis=1))]
    if idle and losses:
        shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
        text = f"{who}: the loss does not depend on {shown}: merged with the coefficient that they started from"
        warnings.warn(text, stacklevel=4)
    raw = x.pop("coefficients")
    result = Coefficients(composition.labels, np.clip(raw, low, high), prior=float(np.clip(prior, low, high)))
    return Fit(result, raw, tuple(losses), tuple(gradients), tuple(path), x, composition)


def checked_steps(steps: Iterable[Sequence[Example]], tasks: int | None, who: str) -> Iterator[list[Example]]:
    """Each step as a list. UsageError for what is no list of (task, batch)."""
    for k, step in enumerate(steps):
        examples = list(step)
        for example in examples:
            if not (isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], int)):
                raise UsageError(f"{who}: step {k} is a list of (task, batch), a whole number and what the model reads")
        if not examples:
            raise UsageError(f"{who}: step {k} has no examples")
        yield examples
