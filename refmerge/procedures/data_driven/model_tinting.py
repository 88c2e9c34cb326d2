"""Coefficients and a layer for each task, fitted to what the individual models say of unlabelled inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from refmerge.adaptive import Adam, Composition, Example, Fit, blocks, cross_entropy, fit, provider_for, task_vectors
from refmerge.errors import UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure

__all__ = ["model_tinting"]

TARGETS = ("hard", "confident", "soft")


@procedure("model_tinting", paper="arXiv:2412.19098")
def model_tinting(
    models: Sequence[Mapping[str, Any]],
    heads: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    logits: Callable[[Mapping[str, Any], Mapping[str, Any], Any], Any],
    batches: Iterable[tuple[int, Any]],
    *,
    targets: Literal["hard", "confident", "soft"] = "hard",
    train_heads: bool = True,
    prior: float = 0.3,
    lr: float = 0.01,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    gradient: Any = None,
) -> Fit:
    """Model Tinting: layer-wise coefficients and the tasks' own layers, trained together on the individual models' labels.

    heads: for each model the arrays of its task's layer, by name. logits: of (parameters, head, batch). batches: (task,
    batch), one for each step. The result's `trained` has the heads as "<task>/<name>".
    """
    if targets not in TARGETS:
        raise UsageError(f"model_tinting: targets = {targets!r} is none of {', '.join(map(repr, TARGETS))}")
    if len(heads) != len(models):
        raise UsageError(f"model_tinting: {len(heads)} heads for {len(models)} models")
    # 1. task vectors
    start, tau = task_vectors(models, base, "model_tinting")
    composition = Composition(start, tau, *blocks(tau[0], "tensor", "model_tinting"))
    provider = provider_for(gradient, composition.example, "model_tinting")
    # 2. heads
    trained = {f"{k}/{name}": scores(x) for k, head in enumerate(heads) for name, x in head.items()} if train_heads else {}

    def head(x: Mapping[str, Any], task: int) -> dict[str, Any]:
        return {name: x.get(f"{task}/{name}", given) for name, given in heads[task].items()}

    # 3. labels of the individual models
    def label(theta: Any, x: Any, examples: Sequence[Example]) -> list[Example]:
        ((task, batch),) = examples
        y = softmax(scores(logits(models[task], heads[task], batch)))
        if targets == "soft":
            return [(task, (batch, y, np.arange(len(y))))]
        rows = np.arange(len(y))
        if targets == "confident":
            rows = confident(y, softmax(scores(logits(theta, head(x, task), batch))))
        return [(task, (batch, np.argmax(y, axis=-1)[rows], rows))] if len(rows) else []

    # 4. cross-entropy
    def loss(params: Any, x: Any, task: int, labelled: Any) -> Any:
        batch, y, rows = labelled
        z = logits(params, head(x, task), batch)
        return cross_entropy(z if len(rows) == z.shape[0] else z[rows, ...], y)

    # 5. a step of Adam for each batch
    return fit(
        composition, ([step] for step in batches), loss, who="model_tinting", prior=prior, provider=provider,
        optimiser=Adam(lr), clamp=clamp, trained=trained, before=label,
        of_task=lambda task: [name for name in trained if name.startswith(f"{task}/")],
    )  # fmt: skip


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def confident(individual: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """The places of the samples on which the two agree, or of whose class the individual model is at least as sure as the
    merged one of its own."""
    same = individual.argmax(axis=-1) == merged.argmax(axis=-1)
    return np.flatnonzero(same | (individual.max(axis=-1) >= merged.max(axis=-1)))
