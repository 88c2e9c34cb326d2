"""Models that are permuted, or averaged, only where they are read: so that none need be in memory as a whole.

`Permuted` and `Mean` are read like the models that they are made of; `pairs` reads one tensor of two models, in stretches
where its leading axis allows that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refmerge.checkpoint import Checkpoint, itemsize
from refmerge.checkpoint.dtypes import DTYPES
from refmerge.numeric import host, scores
from refmerge.symmetry import axes as grammar
from refmerge.symmetry.spec import Model, Perms, Spec

__all__ = ["Mean", "Permuted", "pairs", "permuted", "stretch"]

STRETCH = 1 << 22  # elements that are read together where a tensor can be read in stretches
SMALL = 1 << 20  # bytes of a tensor that is read whole where rows of it are wanted in another order


def permuted(spec: Spec, perms: Perms, model: Model) -> Model:
    """The model with its units permuted: an open checkpoint as a view, arrays in memory as new ones."""
    return Permuted(model, spec, perms) if isinstance(model, Checkpoint) else spec.apply(perms, model)


class Permuted(Checkpoint):
    """An open checkpoint whose units come permuted when they are read. It shares the files, and is closed with them."""

    def __init__(self, checkpoint: Checkpoint, spec: Spec, perms: Perms) -> None:
        spec.check(perms, checkpoint)
        self.__dict__.update(checkpoint.__dict__)
        self._of, self._sources = checkpoint, dict[str, list[np.ndarray | None]]()
        for name, entries in spec.axes.items():
            moves = [any(p in perms for p, _ in grammar.names(e)) for e in entries or ()]
            if any(moves):
                shape = self.tensors[name].shape
                self._sources[name] = [
                    grammar.index(e, n, perms) if m else None for e, n, m in zip(entries or (), shape, moves)
                ]

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        if name not in self._sources or start == stop:
            return self._of.read(name, start, stop, out)
        tensor, (leading, *others) = self.tensors[name], self._sources[name]
        row = tensor.size // tensor.shape[0]
        first, last = start // row, -(-stop // row)
        x = self._rows(name, np.arange(first, last) if leading is None else leading[first:last])
        for axis, source in enumerate(others, 1):
            if source is not None:
                x = np.take(x, source, axis=axis)
        size, skipped = itemsize(tensor.dtype), start - first * row
        out[:] = x.reshape(-1).view(np.uint8)[skipped * size : (skipped + stop - start) * size]

    def ahead(self, name: str, start: int, stop: int) -> None:
        if name not in self._sources:
            self._of.ahead(name, start, stop)

    def _rows(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """Rows of the checkpoint's tensor, in this order."""
        if self.tensors[name].nbytes <= SMALL:
            return self._of[name][wanted]
        if np.array_equal(wanted, np.arange(wanted[0], wanted[0] + len(wanted))):
            return stretch(self._of, name, int(wanted[0]), int(wanted[-1]) + 1)
        return np.concatenate([stretch(self._of, name, i, i + 1) for i in wanted.tolist()])


class Mean(Mapping[str, np.ndarray]):
    """The mean of models, in float64, computed where it is read."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = models
        self.tensors = getattr(models[0], "tensors", models[0])  # for shapes alone

    def stretch(self, name: str, start: int, stop: int) -> np.ndarray:
        total = scores(stretch(self.models[0], name, start, stop))
        for model in self.models[1:]:
            total += scores(stretch(model, name, start, stop))
        return total / len(self.models)

    def __getitem__(self, name: str) -> np.ndarray:
        total = scores(self.models[0][name])
        for model in self.models[1:]:
            total += scores(model[name])
        return total / len(self.models)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def stretch(model: Model, name: str, start: int, stop: int) -> Any:
    """Places [start, stop) of a tensor's leading axis, as it is stored."""
    if isinstance(model, Mean):
        return model.stretch(name, start, stop)
    if not isinstance(model, Checkpoint):
        return model[name][start:stop]
    tensor = model.tensors[name]
    row = tensor.size // tensor.shape[0]
    raw = np.empty((stop - start) * row * itemsize(tensor.dtype), np.uint8)
    model.read(name, start * row, stop * row, raw)
    return raw.view(DTYPES[tensor.dtype]).reshape(stop - start, *tensor.shape[1:])


def pairs(
    name: str, a: Model, b: Model, spec: Spec, perms: Perms, *, whole: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A tensor of a, and that of b permuted, as they are stored: in stretches of the leading axis where nothing moves along
    it and `whole` does not forbid it, else at once."""
    entries, shape = spec.axes[name] or (), tuple(getattr(a, "tensors", a)[name].shape)
    rows = shape[0] if shape else 1
    if not (whole or not shape or (entries and any(True for _ in grammar.names(entries[0])))):
        rows = max(1, STRETCH // max(1, int(np.prod(shape[1:]))))
    if not shape or rows >= shape[0]:
        yield _numpy(a[name]), spec.moved(perms, name, _numpy(b[name]))
        return
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield _numpy(stretch(a, name, start, stop)), spec.moved(perms, name, _numpy(stretch(b, name, start, stop)))


def _numpy(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else host(x)
