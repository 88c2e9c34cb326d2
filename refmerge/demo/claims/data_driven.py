"""Claims about coefficients that data choose, beside those that the table of methods shows."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refmerge import merge
from refmerge.demo.claims.claim import Numbers
from refmerge.demo.claims.table import batches, by_coefficient, logits, uncertain_slope
from refmerge.demo.claims.world import BASE_EPOCHS, FEW, Split, World, head, learn, network, world
from refmerge.demo.training import Weights, backward
from refmerge.nets import mlp
from refmerge.procedures.data_driven.adamerging import adamerging

__all__ = ["own_outputs"]

CLASSES = 10


def own(task: int, data: Split) -> Split:
    """With the labels of that task's outputs."""
    return Split(data.x, data.y + CLASSES * task)


def accuracy(w: World, model: Weights) -> float:
    """The mean over the tasks, each among its own outputs."""
    found = []
    for i, task in enumerate(w.tasks.values()):
        answers = mlp.forward(model, task.test.x)[:, CLASSES * i : CLASSES * (i + 1)].argmax(axis=1)
        found.append(100 * np.mean(answers == task.test.y))
    return float(np.mean(found))


def entropies(step: Any, x: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The entropy over the outputs of each image's task, and its gradient by the coefficients."""
    given = np.concatenate([images for _, images in step.examples])
    tasks = np.concatenate([np.full(len(images), task) for task, images in step.examples])
    places = CLASSES * tasks[:, None] + np.arange(CLASSES)
    values = []

    def slope(z: np.ndarray) -> np.ndarray:
        value, found = uncertain_slope(np.take_along_axis(z, places, axis=1))
        values.append(value)
        whole = np.zeros_like(z)
        np.put_along_axis(whole, places, found, axis=1)
        return whole

    found = backward(step.composition.theta(x["coefficients"]), given, slope)
    return values[0], {"coefficients": by_coefficient(step.composition, found)}


@cache
def own_outputs(seed: int) -> Numbers:
    """The eight tasks again, each with ten outputs that no other has, as the papers' tasks have their own."""
    w, random = world(seed), np.random.RandomState(seed)
    data = [own(i, task.train) for i, task in enumerate(w.tasks.values())]
    few = Split(np.concatenate([d.x[:FEW] for d in data]), np.concatenate([d.y[:FEW] for d in data]))
    base = learn(network(random, outputs=CLASSES * len(data)), few, random, epochs=BASE_EPOCHS)
    models = [learn(base, d, random) | head(base) for d in data]
    numbers = {
        "average": accuracy(w, merge(models, "linear")),
        "task_arithmetic": accuracy(w, merge(models, "task_arithmetic", base=base, lambda_=0.3)),
    }
    for name, per in (("task-wise", "model"), ("layer-wise", "tensor")):
        fit = adamerging(models, base, logits, batches(w), per=per, gradient=entropies)  # type: ignore[arg-type]
        numbers[name] = accuracy(w, fit.merge(models, base))
        numbers[f"{name}, entropy falls by"] = fit.losses[0] - float(np.mean(fit.losses[-50:]))
    return numbers
