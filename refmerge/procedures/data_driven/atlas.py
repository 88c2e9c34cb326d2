"""Coefficients of task vectors, one for each tensor or random part of one, learned from labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from array_api_compat import is_jax_array, is_torch_array

from refmerge.adaptive import (
    Adam,
    Composition,
    Example,
    Fit,
    blocks,
    checked_steps,
    cross_entropy,
    fit,
    provider_for,
    task_vectors,
)  # fmt: skip
from refmerge.errors import UsageError
from refmerge.numeric import host, like
from refmerge.procedure import procedure

__all__ = ["atlas"]


@procedure("atlas", paper="arXiv:2407.02880")
def atlas(
    models: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    forward: Callable[[Mapping[str, Any], int, Any], Any],
    batches: Iterable[Sequence[tuple[int, Any]]],
    *,
    loss: Callable[[Any, int, Any], Any] | None = None,
    per: Literal["tensor", "model"] = "tensor",
    parts: Mapping[str, Sequence[Any]] | None = None,
    linearised: bool = False,
    prior: float = 0.0,
    lr: float | Sequence[float] = 0.001,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    lp: float | None = None,
    gradient: Any = None,
) -> Fit:
    """aTLAS: anisotropic scaling of task vectors, learned by AdamW from a loss of the outputs.

    forward: of (parameters, task, batch). batches: for each step a list of (task, batch). loss: of (what forward gives,
    task, batch); without one the cross-entropy with batch[1].
    """
    # 1. task vectors
    start, tau = task_vectors(models, base, "atlas")
    # 2. blocks
    rows, labels = blocks(tau[0], per, "atlas") if parts is None else partition(tau[0], parts)
    composition = Composition(start, tau, rows, labels)
    provider = provider_for(gradient, composition.example, "atlas")
    score = loss or (lambda z, task, batch: cross_entropy(z, batch[1]))
    # 3. the model, or its tangent at the base
    model, steps = None, checked_steps(batches, None, "atlas")
    if linearised:
        model, steps = tangent(composition, forward), numbered(steps)

    def total(given: Any, _: Any, task: int, batch: Any) -> Any:
        if linearised:
            return score(given, task, batch[1])
        return score(forward(given, task, batch), task, batch)

    # 4. steps of AdamW
    rates = None if isinstance(lr, int | float) else [float(r) for r in lr]
    result = fit(
        composition, steps, total, who="atlas", prior=prior, provider=provider, clip=clip, rates=rates, model=model,
        optimiser=Adam(0.0 if rates is not None else lr, weight_decay=weight_decay),
        penalty=None if lp is None else lambda c: lp_norm(c, lp),
    )  # fmt: skip
    if parts is None:
        return result
    return replace(result, coefficients=replace(result.coefficients, method="parts"))


def partition(tau: Mapping[str, Any], parts: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A row for each mask of each tensor in `parts`; tensors that are not there stay at the base."""
    rows: dict[str, Any] = {}
    labels: list[str] = []
    for name, masks in parts.items():
        if name not in tau:
            raise UsageError(f"atlas: parts has {name!r}, which is no floating-point tensor of the models")
        rows[name] = []
        for k, mask in enumerate(masks):
            if tuple(mask.shape) != tuple(tau[name].shape):
                raise UsageError(f"atlas: mask {k} of {name!r} has shape {list(mask.shape)}, not {list(tau[name].shape)}")
            rows[name].append((len(labels), like(host(mask).astype(np.float64), tau[name])))
            labels.append(f"{name}[{k}]")
    return rows, tuple(labels)


def numbered(steps: Iterable[Sequence[Example]]) -> Iterator[list[Example]]:
    """Each batch with a number of its own, under which its tangent is kept for the step."""
    for k, examples in enumerate(steps):
        yield [(task, ((k, i), batch)) for i, (task, batch) in enumerate(examples)]


def tangent(composition: Composition, forward: Callable[[Any, int, Any], Any]) -> Callable[[Any, int, Any], Any]:
    """The outputs f(theta_0) + sum_t c_t J tau_t of one (number, batch). What is not c is computed once for each."""
    kept: dict[Any, Any] = {}

    def outputs(c: Any, task: int, numbered: Any) -> Any:
        (step, place), batch = numbered
        if (step, place) not in kept:
            for old in [key for key in kept if key[0] != step]:
                del kept[old]
            kept[step, place] = derivatives(composition, lambda p: forward(p, task, batch))
        z, slopes = kept[step, place]
        for (row, t), slope in slopes.items():
            z = z + (float(c[row, t]) if isinstance(c, np.ndarray) else c[row, t]) * slope
        return z

    return outputs


def derivatives(composition: Composition, f: Callable[[Any], Any], h: float = 1e-5) -> tuple[Any, dict[Any, Any]]:
    """f at the base, and its derivative along each coefficient: forward mode of torch and jax, else central differences."""
    base, some = composition.base, composition.example
    slopes = {}
    for row, t, along in composition.tangents():
        names = list(along)
        if is_torch_array(some) or is_jax_array(some):
            if is_torch_array(some):
                from torch.func import jvp
            else:
                from jax import jvp
            point, direction = tuple(base[n] for n in names), tuple(along[n] for n in names)
            slopes[row, t] = jvp(lambda *xs, names=names: f({**base, **dict(zip(names, xs))}), point, direction)[1]
        else:
            up = f({**base, **{n: base[n] + h * along[n] for n in names}})
            down = f({**base, **{n: base[n] - h * along[n] for n in names}})
            slopes[row, t] = (0.5 / h) * (up - down)
    return f(base), slopes


def lp_norm(c: np.ndarray, p: float) -> tuple[float, np.ndarray]:
    """Half the mean over blocks of the p-norm over tasks, and its gradient, which is 0 where a norm is."""
    norms = np.sum(np.abs(c) ** p, axis=1, keepdims=True) ** (1 / p)
    safe = np.where(norms > 0, norms, 1.0)
    slope = np.where(norms > 0, np.sign(c) * np.abs(c / safe) ** (p - 1), 0.0)
    return 0.5 * float(np.mean(norms)), 0.5 / len(c) * slope
