"""A trainer of small perceptrons in NumPy, with which the demo's models were made.

RandomState's streams are frozen and training runs in float64, so the same seed gives the same network everywhere, but for
what another BLAS rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from refmerge.nets import mlp

__all__ = ["Weights", "backward", "gradient", "initial", "losses", "softmax", "train"]

Weights = dict[str, np.ndarray]


def initial(random: np.random.RandomState, layers: Mapping[str, tuple[int, int]]) -> Weights:
    """He's initialisation of layers of (inputs, outputs); matrices are (out, in) as torch stores them."""
    weights = {}
    for name, (inputs, outputs) in layers.items():
        weights[f"{name}.weight"] = random.normal(0, np.sqrt(2 / inputs), (outputs, inputs))
        weights[f"{name}.bias"] = np.zeros(outputs)
    return weights


def train(
    weights: Weights, images: np.ndarray, labels: np.ndarray, *, epochs: int, random: np.random.RandomState,
    rate: float = 0.02, decay: float = 0.0,
) -> Weights:  # fmt: skip
    """Stochastic gradient descent with momentum on the cross-entropy, batches of 32.

    labels: numbers of outputs, or for each image a row of probabilities. decay: of weights, that fraction of them is added
    to their slopes.
    """
    weights = {name: array.copy() for name, array in weights.items()}
    velocity = {name: np.zeros_like(array) for name, array in weights.items()}
    outputs = len(weights[f"{mlp.order(weights)[-1]}.bias"])
    pixels = images.reshape(len(images), -1) / 16
    targets = labels if labels.ndim == 2 else np.eye(outputs)[labels]
    for _ in range(epochs):
        order = random.permutation(len(pixels))
        for batch in np.split(order, range(32, len(order), 32)):
            for name, slope in gradient(weights, pixels[batch], targets[batch]).items():
                slope = slope + decay * weights[name] if decay else slope
                velocity[name] = 0.9 * velocity[name] - rate * slope
                weights[name] += velocity[name]
    return weights


def gradient(weights: Weights, pixels: np.ndarray, targets: np.ndarray) -> Weights:
    """Of the mean cross-entropy. targets: a row of probabilities for each image."""
    return backward(weights, pixels, lambda logits: (softmax(logits) - targets) / len(targets))


def backward(weights: Weights, pixels: np.ndarray, slope: Callable[[np.ndarray], np.ndarray]) -> Weights:
    """Backpropagation, written out. slope: what a function of the logits has as its gradient there."""
    layers = mlp.order(weights)
    activations = [pixels]
    for name in layers:
        outputs = activations[-1] @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        activations.append(outputs if name == layers[-1] else np.maximum(outputs, 0))
    error = slope(activations.pop())
    slopes = {}
    for name in reversed(layers):
        inputs = activations.pop()
        slopes[f"{name}.weight"], slopes[f"{name}.bias"] = error.T @ inputs, error.sum(axis=0)
        error = (error @ weights[f"{name}.weight"]) * (inputs > 0)
    return slopes


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probabilities of each row of logits."""
    likelihood = np.exp(logits - logits.max(axis=1, keepdims=True))
    return likelihood / likelihood.sum(axis=1, keepdims=True)


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The cross-entropy of each row of logits."""
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(len(labels)), labels]
