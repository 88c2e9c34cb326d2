"""A spec says which axes of which tensors are permuted together. Moving units by it leaves a model's function as it is.

    spec = Spec({
        "fc1.weight": ("P", None), "fc1.bias": ("P",),
        "fc2.weight": (None, "P"), "fc2.bias": (None,),
    })
    perms = spec.random(model, np.random.default_rng(0))     # {"P": array([2, 0, 1])}
    same_function = spec.apply(perms, model)

A permutation p is an array of whole numbers: unit i of the result is unit p[i] of the model. In matrices it is a P with ones
at (i, p[i]), and rows become P W, columns W P^T. One that is owned (refmerge.symmetry.axes) has an axis for each owner
before the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import device, is_numpy_array

from refmerge.errors import UsageError
from refmerge.numeric import array_namespace, scores
from refmerge.symmetry import axes as grammar
from refmerge.symmetry.axes import Entry

__all__ = ["Model", "Perms", "Spec", "compose", "invert"]

Model = Mapping[str, Any]
Perms = Mapping[str, np.ndarray]


def invert(p: np.ndarray) -> np.ndarray:
    """What undoes a permutation: x[p][invert(p)] is x. Each along its last axis."""
    return np.argsort(p, axis=-1)


def compose(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """First p, then q: x[p][q] is x[compose(p, q)]. `Spec.compose` does it for owned ones."""
    return np.asarray(p)[np.asarray(q)]


class Spec:
    """axes: name of each tensor -> one entry for each of its axes (refmerge.symmetry.axes), or None where the whole tensor
    stays as it is. owners: permutation -> those that own it, outermost first. UsageError for what is no spec."""

    def __init__(self, axes: Mapping[str, Sequence[Entry] | None]) -> None:
        self.axes: dict[str, tuple[Entry, ...] | None] = {n: None if e is None else tuple(e) for n, e in axes.items()}
        self.owners: dict[str, tuple[str, ...]] = {}
        self._uses: dict[str, list[tuple[str, int]]] = {}
        for tensor, entries in self.axes.items():
            for axis, entry in enumerate(entries or ()):
                for name, owners in grammar.names(entry):
                    self._use(name, owners, tensor, axis)

    def _use(self, name: str, owners: tuple[str, ...], tensor: str, axis: int) -> None:
        if self.owners.setdefault(name, owners) != owners:
            one, other = (", ".join(map(repr, o)) or "nothing" for o in (self.owners[name], owners))
            raise UsageError(f"spec: permutation {name!r} lies in {one} elsewhere and in {other} on {tensor!r}")
        uses = self._uses.setdefault(name, [])
        if any(t == tensor and a != axis for t, a in uses):
            raise UsageError(f"spec: permutation {name!r} is on two axes of {tensor!r}: one is all that can be matched")
        if (tensor, axis) not in uses:
            uses.append((tensor, axis))

    def __repr__(self) -> str:
        return f"Spec({len(self.axes)} tensors, {len(self.owners)} permutations)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.axes == other.axes

    __hash__ = None  # type: ignore[assignment]

    def told(self) -> dict[str, list[Any] | None]:
        """The axes as JSON and YAML can hold them."""
        return {n: None if e is None else [grammar.told(x) for x in e] for n, e in self.axes.items()}

    @property
    def permutations(self) -> list[str]:
        """The names of all permutations, sorted."""
        return sorted(self.owners)

    def uses(self, name: str) -> list[tuple[str, int]]:
        """(tensor, axis) wherever a permutation acts, in the order of the spec."""
        return list(self._uses[name])

    # ---------------------------------------------------------------------------------------------------- a model's sizes

    def sizes(self, model: Model) -> dict[str, int]:
        """How many units each permutation has; of an owned one, in each block. UsageError where two axes disagree, or the
        model's tensors are not the spec's."""
        found: dict[str, tuple[int, str, int]] = {}
        shapes = _shapes(model)
        if odd := sorted(shapes.keys() ^ self.axes.keys()):
            known, lacking = ("model", "spec: give its axes, or None") if odd[0] in shapes else ("spec", "model")
            raise UsageError(f"spec: tensor {odd[0]!r} is in the {known} and not in the {lacking}")
        for tensor, entries in self.axes.items():
            shape = shapes[tensor]
            if entries is not None and len(entries) != len(shape):
                raise UsageError(f"spec: tensor {tensor!r} of shape {list(shape)} has {len(entries)} entries for its axes")
            for axis, entry in enumerate(entries or ()):
                try:
                    here = list(grammar.lengths(entry, shape[axis]))
                except UsageError as e:
                    raise UsageError(f"spec: axis {axis} of {tensor!r}: {e}") from None
                for name, n in here:
                    m, other, its = found.setdefault(name, (n, tensor, axis))
                    if n != m:
                        raise UsageError(
                            f"spec: {name!r} has {m} units by axis {its} of {other!r} and {n} by axis {axis} of {tensor!r}"
                        )
        return {name: found[name][0] for name in self.permutations}

    def shapes(self, model: Model) -> dict[str, tuple[int, ...]]:
        """The shape of each permutation's array: (n,), with an axis before it for each owner."""
        n = self.sizes(model)
        return {name: (*(n[o] for o in self.owners[name]), n[name]) for name in n}

    def check(self, perms: Perms, model: Model) -> None:
        """UsageError unless the model's tensors are the spec's and each array is a permutation of the right length. A
        permutation that is not given leaves all where it is."""
        shapes = self.shapes(model)
        for name, p in perms.items():
            if name not in shapes:
                raise UsageError(f"permutation {name!r} is not in the spec, which has {', '.join(shapes) or 'none'}")
            p = np.asarray(p)
            if p.shape != shapes[name] or p.dtype.kind not in "iu":
                wanted = list(shapes[name])
                raise UsageError(f"permutation {name!r} is {p.dtype} of shape {list(p.shape)}, not int of {wanted}")
            if not np.array_equal(np.sort(p, axis=-1), np.broadcast_to(np.arange(p.shape[-1]), p.shape)):
                raise UsageError(f"permutation {name!r} does not hold each of 0 ... {p.shape[-1] - 1} once")

    # -------------------------------------------------------------------------------------------------------- permutations

    def identity(self, model: Model) -> dict[str, np.ndarray]:
        """The permutations that move nothing."""
        return {name: np.broadcast_to(np.arange(s[-1]), s).copy() for name, s in self.shapes(model).items()}

    def random(self, model: Model, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Every permutation, each equally likely."""
        return {name: rng.permuted(p, axis=-1) for name, p in self.identity(model).items()}

    def compose(self, first: Perms, then: Perms) -> dict[str, np.ndarray]:
        """The permutations that do at once what `first` and, after it, `then` do. Both with all names of the spec."""
        return {name: self._carried(name, first[name], then, lambda p, q: p[q], then[name]) for name in self.permutations}

    def invert(self, perms: Perms) -> dict[str, np.ndarray]:
        """The permutations that undo these."""
        undone: dict[str, np.ndarray] = {}
        for name in sorted(self.permutations, key=lambda n: len(self.owners[n])):  # owners before what they own
            undone[name] = self._carried(name, perms[name], undone, lambda p, _: invert(p), perms[name])
        return {name: undone[name] for name in self.permutations}

    def _carried(self, name: str, p: Any, owners: Perms, f: Any, q: Any) -> np.ndarray:
        """f(p of the block that its owners bring to block b, q of block b) for each block b."""
        p, q = np.asarray(p), np.asarray(q)
        result = np.empty_like(q)
        for block in np.ndindex(q.shape[:-1]):
            source = tuple(int(owners[o][block[: d + 1]]) for d, o in enumerate(self.owners[name]))
            result[block] = f(p[source], q[block])
        return result

    # -------------------------------------------------------------------------------------------------------------- models

    def apply(self, perms: Perms, model: Model) -> dict[str, Any]:
        """The model with its units permuted, in new arrays of its own library."""
        self.check(perms, model)
        return {name: self.moved(perms, name, model[name]) for name in model}

    def moved(self, perms: Perms, name: str, x: Any, *, but: int | None = None) -> Any:
        """One tensor of the model, permuted along all of its axes, or along all but one. Nothing is checked."""
        for axis, entry in enumerate(self.axes[name] or ()):
            if axis != but and any(p in perms for p, _ in grammar.names(entry)):
                x = _take(x, grammar.index(entry, x.shape[axis], perms), axis)
        return x

    def rows(self, name: str, model: Model, block: tuple[int, ...] = ()) -> np.ndarray:
        """All that belongs to each unit of a permutation, as the rows of a float64 matrix: of an owned one, to the units in
        one block, which `block` names by a unit of each owner. `rows(P, a) @ rows(P, b).T` says how alike units are."""
        found = []
        for tensor, axis in self._uses[name]:
            x = scores(model[tensor])
            entry = (self.axes[tensor] or ())[axis]
            places = grammar.places_of(entry, name, np.arange(x.shape[axis]))
            assert places is not None
            places = places[block]
            x = np.take(np.moveaxis(x, axis, 0), places.reshape(-1), axis=0)
            found.append(x.reshape(len(places), -1))
        return np.concatenate(found, axis=1)


def _take(x: Any, p: np.ndarray, axis: int) -> Any:
    if is_numpy_array(x):
        return np.take(x, p, axis=axis)
    xp = array_namespace(x)
    return xp.take(x, xp.asarray(p, device=device(x)), axis=axis)


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name -> shape, without reading a weight of an open checkpoint."""
    return {name: tuple(x.shape) for name, x in getattr(model, "tensors", model).items()}
