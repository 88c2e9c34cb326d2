"""Rescaling: a ReLU unit that gives c times as much to readers who take 1/c of it leaves the function as it is.

    scales = relu(spec, model)
    same_function = scales.apply({"fc1": np.array([2.0, 0.5, 1.0])}, model)

holds for every activation with f(c x) = c f(x) for c > 0: ReLU, leaky ReLU, max pooling and means, and nothing at all. GELU,
SiLU, tanh and sigmoid are not among them, and no unit whose readers normalise it together with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.errors import UsageError
from refmerge.numeric import like, scores
from refmerge.symmetry.axes import Block, Entry, Nested, Slices, names, places_of
from refmerge.symmetry.spec import Model, Spec

__all__ = ["Scales", "relu"]

Axes = Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class Scales:
    """up: the axes along which a unit's own weights lie, down: those along which its readers' do; tensor -> an entry for
    each axis, as in a spec."""

    up: Axes
    down: Axes

    @property
    def names(self) -> list[str]:
        """What can be scaled, sorted."""
        return sorted(Spec(self.up).owners)

    def apply(self, factors: Mapping[str, np.ndarray], model: Model) -> dict[str, Any]:
        """The model with each unit's weights times its factor and its readers' divided by it; computed in float64, rounded
        once. UsageError for factors that are not positive or not one for each unit."""
        sizes = Spec(self.up).sizes({name: model[name] for name in self.up})
        for name, c in factors.items():
            if name not in sizes:
                raise UsageError(f"scale {name!r} is not known; there are {', '.join(sizes) or 'none'}")
            if np.shape(c) != (sizes[name],) or not np.all(np.isfinite(c) & (np.asarray(c) > 0)):
                raise UsageError(f"scale {name!r} is not {sizes[name]} positive numbers")
        return {name: self._scaled(name, x, factors) for name, x in model.items()}

    def _scaled(self, name: str, x: Any, factors: Mapping[str, np.ndarray]) -> Any:
        y = None
        for axes, power in ((self.up, 1), (self.down, -1)):
            for axis, entry in enumerate(axes.get(name, ())):
                if any(p in factors for p, _ in names(entry)):
                    y = scores(x) if y is None else y
                    shape = [1] * y.ndim
                    shape[axis] = -1
                    y = y * _along(entry, y.shape[axis], factors).reshape(shape) ** power
        return x if y is None else like(y, x)


def _along(entry: Entry, n: int, factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The factor of each of n places."""
    found = np.ones(n)
    for name, _ in names(entry):
        places = places_of(entry, name, np.arange(n))
        if name in factors and places is not None:
            found[places] = np.asarray(factors[name], dtype=np.float64)[:, None]
    return found


def relu(spec: Spec, model: Model) -> Scales:
    """The scales of a network of linear maps, norms before ReLU, and ReLU, with weights of shape (out, in):
    refmerge.nets.mlp, vgg and resnet. A unit that is normalised is scaled by its norm's gain and bias. UsageError for a spec
    with heads."""
    shapes = {name: tuple(x.shape) for name, x in getattr(model, "tensors", model).items()}

    def normed(tensor: str) -> bool:
        return len(shapes.get(f"{tensor.rpartition('.')[0]}.weight", ())) == 1

    norms = {p for p in spec.owners if any(normed(tensor) for tensor, _ in spec.uses(p))}
    up: dict[str, list[Entry]] = {}
    down: dict[str, list[Entry]] = {}
    for tensor, entries in spec.axes.items():
        for axis, entry in enumerate(entries or ()):
            used = [p for p, _ in names(entry)]
            if not used or "running_" in tensor:
                continue
            if _owns(entry):
                raise UsageError(f"rescaling: {tensor!r} has heads: a network with attention has no scales of ReLU units")
            if axis == 1:
                down[tensor] = [None, entry, *[None] * (len(shapes[tensor]) - 2)]
            elif normed(tensor) or not norms & set(used):
                up[tensor] = [entry, *[None] * (len(shapes[tensor]) - 1)]
    return Scales(up, down)


def _owns(entry: Entry) -> bool:
    match entry:
        case Nested():
            return True
        case Block(_, _, inner):
            return _owns(inner)
        case Slices(parts):
            return any(_owns(part) for part in parts)
    return False
