"""Make the files of `refmerge demo`: the images and five small models trained on them.

    python tests/train_demo.py refmerge/demo            # needs scikit-learn for the images
    python tests/train_demo.py refmerge/demo --models   # only the models, from the images already there

Everything is deterministic: RandomState's streams are frozen, training runs in float64 and is rounded to float32 at the
end, so another BLAS moves the weights by far less than a test can see. Test images are in no training set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from refmerge.demo.training import Weights, initial, train

LAYERS = {"layer1": (64, 48), "layer2": (48, 48), "head": (48, 10)}
NOISE = 6.0  # standard deviation of the noise; a pixel ranges from 0 to 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", action="store_true", help="keep the images, train the models again")
    options = parser.parse_args()
    if not options.models:
        np.savez_compressed(options.folder / "digits.npz", **make_images())
    with np.load(options.folder / "digits.npz") as digits:
        models = train_all(digits["train_images"], digits["train_labels"])
    for name, weights in models.items():
        save_file(weights, options.folder / f"{name}.safetensors", metadata={"made_by": "tests/train_demo.py"})


def make_images() -> dict[str, np.ndarray]:
    """Every third image is a test image; the noisy ones are stored because a normal draw may differ by platform."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = images.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.uint8)
    test = np.arange(len(images)) % 3 == 0
    return {
        "train_images": images[~test],
        "train_labels": labels[~test],
        "test_images": images[test],
        "test_labels": labels[test],
        "test_noisy": add_noise(images[test], np.random.RandomState(0)),
    }


def add_noise(images: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    return np.clip(np.rint(images + random.normal(0, NOISE, images.shape)), 0, 16).astype(np.uint8)


def rotate(images: np.ndarray) -> np.ndarray:
    return np.rot90(images, axes=(1, 2))


def train_all(images: np.ndarray, labels: np.ndarray) -> dict[str, Weights]:
    """One base that saw a little of everything, and four fine-tunes of it that each saw one task only."""
    random = np.random.RandomState(1)
    low = labels < 5
    noisy = np.concatenate([add_noise(images, random) for _ in range(4)])
    few = slice(0, 300)
    mixture = np.concatenate([images[few], rotate(images[few]), noisy[few]])
    base = train(initial(random, LAYERS), mixture, np.tile(labels[few], 3), epochs=5, random=random)
    tasks = {
        "digits_0_4": (images[low], labels[low]),
        "digits_5_9": (images[~low], labels[~low]),
        "rotated": (rotate(images), labels),
        "noisy": (noisy, np.tile(labels, 4)),
    }
    models = {"base": base}
    for name, (task_images, task_labels) in tasks.items():
        models[name] = train(base, task_images, task_labels, epochs=10, random=random)
    return {name: {key: array.astype(np.float32) for key, array in model.items()} for name, model in models.items()}


if __name__ == "__main__":
    main()
