"""The demo's network and its four tasks: 8x8 handwritten digits, whole, by half of the classes, turned, and noisy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LAYERS = ("layer1", "layer2", "head")

Tasks = dict[str, tuple[np.ndarray, np.ndarray]]


def load_tasks(path: Path) -> Tasks:
    """Images and labels by task; every image is held out from training. A fine-tune has the name of its task."""
    with np.load(path) as digits:
        images, labels, noisy = digits["test_images"], digits["test_labels"], digits["test_noisy"]
    low = labels < 5
    return {
        "digits_0_4": (images[low], labels[low]),
        "digits_5_9": (images[~low], labels[~low]),
        "rotated": (np.rot90(images, axes=(1, 2)), labels),
        "noisy": (noisy, labels),
    }


def classify(weights: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The digit that the network takes each image for, among all ten, whatever the task."""
    x = images.reshape(len(images), -1) / 16
    for layer in LAYERS:
        x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        if layer != "head":
            x = np.maximum(x, 0)
    return x.argmax(axis=1)


def accuracies(weights: dict[str, np.ndarray], tasks: Tasks) -> dict[str, float]:
    """The share of right answers on each task, and the mean over the tasks."""
    found = {name: float(np.mean(classify(weights, images) == labels)) for name, (images, labels) in tasks.items()}
    return found | {"mean": sum(found.values()) / len(found)}
