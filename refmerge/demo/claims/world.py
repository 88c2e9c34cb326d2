"""What claims are tried on: eight tasks on handwritten digits, a base that saw a little of each, a fine-tune for each.

Everything is a function of a seed. Arrays are float64. Images are rows of 64 numbers in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from refmerge import merge, registry
from refmerge.demo import FOLDER
from refmerge.demo.training import Weights, backward, initial, losses, softmax, train
from refmerge.nets import mlp

__all__ = ["TASKS", "Data", "Made", "Split", "World", "compact", "images", "learn", "right", "slope", "world"]

WIDTH = 128
FEW = 200  # images of each task that the base sees
RATE = 0.005
BASE_EPOCHS, EPOCHS = 10, 10
Model = Weights | Callable[[np.ndarray], np.ndarray]  # weights, or what gives the logits of images
Made = Model | Sequence[Model]

NOISE = 6.0  # standard deviation; a pixel ranges from 0 to 16 before it is divided by 16


@dataclass(frozen=True)
class Split:
    """Images (samples, 64) and labels."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def of(self, chosen: Any) -> Split:
        return Split(self.x[chosen], self.y[chosen])


@dataclass(frozen=True)
class Data:
    """What is trained on, what settings are chosen on, and what is reported."""

    train: Split
    val: Split
    test: Split

    def each(self, change: Callable[[Split], Split]) -> Data:
        return Data(change(self.train), change(self.val), change(self.test))


@cache
def images() -> Data:
    """The demo's digits: 999 images to train on, 199 to choose on (each sixth of its training images), 599 to test on."""
    with np.load(Path(FOLDER) / "digits.npz") as file:
        x, y = file["train_images"].astype(float), file["train_labels"].astype(int)
        test = Split(rows(file["test_images"].astype(float)), file["test_labels"].astype(int))
    held = np.arange(len(y)) % 6 == 5
    return Data(Split(rows(x[~held]), y[~held]), Split(rows(x[held]), y[held]), test)


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1) / 16


def moved(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Split, np.random.RandomState], Split]:
    """A task that shows other pictures: change is a function of (samples, 8, 8)."""
    return lambda data, _: Split(change(data.x.reshape(-1, 8, 8)).reshape(len(data), -1), data.y)


def noisy(data: Split, random: np.random.RandomState, deviation: float = NOISE) -> Split:
    noise = random.normal(0, deviation, data.x.shape)
    return Split(np.clip(np.rint(16 * data.x + noise), 0, 16) / 16, data.y)


TASKS: dict[str, Callable[[Split, np.random.RandomState], Split]] = {
    "0 to 4": lambda data, _: data.of(data.y < 5),
    "5 to 9": lambda data, _: data.of(data.y >= 5),
    "turned": moved(lambda x: np.rot90(x, axes=(1, 2))),
    "mirrored": moved(lambda x: x[:, :, ::-1]),
    "noisy": noisy,
    "shifted": moved(lambda x: np.roll(x, 2, axis=2)),
    "inverted": moved(lambda x: 1 - x),
    "thick": moved(lambda x: np.maximum(x, np.roll(x, 1, axis=1))),
}


@cache
def tasks() -> dict[str, Data]:
    """The noise is the same in all runs."""
    random = np.random.RandomState(7)
    return {name: images().each(lambda data, task=task: task(data, random)) for name, task in TASKS.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class World:
    """base, and models: of each task, in the order of TASKS, with the base's last layer."""

    seed: int
    base: Weights
    models: tuple[Weights, ...]

    @property
    def tasks(self) -> dict[str, Data]:
        return tasks()

    def mean(self, merged: Made, part: str = "test") -> float:
        """The mean of the accuracies on all tasks, of one model or of one for each task."""
        models = merged if isinstance(merged, Sequence) else [merged] * len(TASKS)
        return float(np.mean([right(m, getattr(data, part)) for m, data in zip(models, self.tasks.values(), strict=True)]))

    def merge(self, method: str, **params: Any) -> Weights:
        """All fine-tunes merged, with the base and statistics where the method asks for them."""
        asks = registry.get(method).asks
        given: dict[str, Any] = {"base": self.base} if "base" in asks else {}
        if "stats" in asks:
            given["stats"] = self.statistics
        return merge(list(self.models), method, **given, **params)

    @cached_property
    def statistics(self) -> list[Weights]:
        """Gram matrices, gradients' Gram matrices and Fisher information of each model on its task's training images."""
        return [collect(m, data.train) for m, data in zip(self.models, self.tasks.values(), strict=True)]


@cache
def world(seed: int) -> World:
    random, data = np.random.RandomState(seed), [t.train for t in tasks().values()]
    few = Split(np.concatenate([t.x[:FEW] for t in data]), np.concatenate([t.y[:FEW] for t in data]))
    base = learn(network(random), few, random, epochs=BASE_EPOCHS)
    models = tuple(learn(base, t, random) | head(base) for t in data)
    return World(seed, base, models)


def network(random: np.random.RandomState, width: int = WIDTH, hidden: int = 2, outputs: int = 10) -> Weights:
    """A new network."""
    sizes = [64, *[width] * hidden, outputs]
    names = [*(f"blocks.{i}" for i in range(hidden)), "head"]
    return initial(random, dict(zip(names, pairwise(sizes))))


def learn(
    weights: Weights, data: Split, random: np.random.RandomState, *, epochs: int = EPOCHS, rate: float = RATE,
    decay: float = 0.0, targets: np.ndarray | None = None,
) -> Weights:  # fmt: skip
    """A network trained on. targets: in place of labels, a row of probabilities for each image."""
    labels = data.y if targets is None else targets
    return train(weights, 16 * data.x, labels, epochs=epochs, random=random, rate=rate, decay=decay)


def head(weights: Weights) -> Weights:
    return {name: x for name, x in weights.items() if name.startswith("head")}


def rest_of(weights: Weights) -> Weights:
    """All but the last layer."""
    return {name: x for name, x in weights.items() if not name.startswith("head")}


def right(model: Model, data: Split) -> float:
    """Per cent."""
    logits = model(data.x) if callable(model) else mlp.forward(model, data.x)
    return 100 * float(np.mean(logits.argmax(axis=1) == data.y))


def loss(weights: Mapping[str, Any], data: Split) -> float:
    """Cross-entropy."""
    return float(losses(mlp.forward(weights, data.x), data.y).mean())


def slope(weights: Weights, data: Split) -> Weights:
    """The gradient of the cross-entropy."""
    return backward(weights, data.x, lambda z: (softmax(z) - np.eye(z.shape[1])[data.y]) / len(data))


def collect(weights: Weights, data: Split) -> Weights:
    """Means over all images of what methods read; probabilities of the classes are the model's own."""
    found, read, x = {}, {}, data.x
    for name in mlp.order(weights):
        read[name] = x
        gram = x.T @ x / len(x)
        found[f"{name}.gram"] = gram + 1e-6 * np.trace(gram) / len(gram) * np.eye(
            len(gram)
        )  # units may be dead in all models
        x = np.maximum(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0)
    p = softmax(mlp.forward(weights, data.x))
    back = np.eye(p.shape[1])[None] - p[:, None]  # of each image and class, the gradient of log p by the outputs of a layer
    for name in reversed(mlp.order(weights)):
        square = np.einsum("nc,nco->no", p, back**2)  # each image has one place, so that the square of a product is that
        found[f"{name}.weight.fisher"] = square.T @ read[name] ** 2 / len(p)  # of the factors' squares
        found[f"{name}.bias.fisher"] = square.mean(axis=0)
        weighted = (np.sqrt(p)[..., None] * back).reshape(-1, back.shape[2])
        found[f"{name}.gradient_gram"] = weighted.T @ weighted / len(p)
        back = (back @ weights[f"{name}.weight"]) * (read[name] > 0)[:, None]
    return found


def compact(tau: Mapping[str, np.ndarray]) -> np.ndarray:
    """All entries as one vector, by name."""
    return np.concatenate([tau[name].ravel() for name in sorted(tau)])
