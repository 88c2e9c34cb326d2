"""A path of straight pieces between two networks that can do without half of their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.errors import UsageError
from refmerge.numeric import host
from refmerge.procedure import procedure
from refmerge.procedures.measures._common import checked, layers_of, opened

__all__ = ["DropoutPath", "dropout_path"]

Array = np.ndarray


@dataclass(frozen=True)
class DropoutPath:
    """points: the models at the corners, from the first to the second. pieces: what changes between neighbours: "top" (the
    last layer), "free" (what no unit that counts reads) or "same" (the last layer, between equal outputs). dropped: places
    in points of the networks without half the units of the last hidden layer, then of the last two, ...: of the first
    model, and then backwards of the second."""

    points: tuple[dict[str, Array], ...]
    pieces: tuple[str, ...]
    dropped: tuple[int, ...]


@procedure("dropout_path", paper="arXiv:1912.10095, arXiv:1906.06247")
def dropout_path(
    models: Sequence[Any],
    *,
    layers: Sequence[str | tuple[str, str | None]] | None = None,
    keep: Sequence[Sequence[int]] | None = None,
) -> DropoutPath:
    """The piecewise-linear path between two networks through their halves: they are emptied, exchanged and filled again.

    models: two, of fully connected or convolutional layers in a row. layers: weights, or pairs of weight and bias, from the
    input to the output. keep: for each hidden layer the units that stay; the first half by default.
    """
    if isinstance(models, Mapping) or len(models := list(models)) != 2:
        raise UsageError("dropout_path: models are two: write [a, b]")
    a, b = (Net.of(model, layers) for model in opened(models))
    checked(models, {})
    kept = a.halves(keep)
    # 1. empty the first model, layer by layer from the top
    there, pieces, dropped = emptied(a, kept)
    # 2. the second's half in the empty half, and over to it
    back, back_pieces, back_dropped = emptied(b, kept)
    free = [a.others(k, h) for h, k in enumerate(kept)]
    half, other = there[-1], back[-1]
    beside = half.with_copy(other, kept, free)
    across = beside.with_top(other, kept, free)
    # 3. the second's half where it belongs
    both = across.with_copy(other, kept, kept)
    home = both.with_top(other, kept, kept)
    # 4. fill the second model
    points = [*there, beside, across, both, home, *back[::-1]]
    pieces = [*pieces, "free", "top", "free", "same", "free", *back_pieces[::-1]]
    last = len(points) - 1
    return DropoutPath(
        tuple(net.model for net in points), tuple(pieces), (*dropped, *(last - i for i in back_dropped[::-1]))
    )


def emptied(net: Net, kept: list[Array]) -> tuple[list[Net], list[str], list[int]]:
    """The path from a network to one whose last layer reads, and whose layers read, only the units that are kept."""
    free = [net.others(k, h) for h, k in enumerate(kept)]
    points, pieces, dropped = [net], [], []
    top = len(kept) - 1
    for h in range(top, -1, -1):
        small = points[-1].without(h, kept)
        if h == top:
            points.append(small)
            pieces.append("top")
        else:
            beside = points[-1].with_copy(small, kept, free, above=h)
            across = beside.with_top(small, kept, free)
            both = across.with_copy(small, kept, kept, above=h)
            points += [beside, across, both, both.with_top(small, kept, kept)]
            pieces += ["free", "top", "free", "same"]
        dropped.append(len(points) - 1)
    return points, pieces, dropped


@dataclass(frozen=True)
class Net:
    """A model as layers in a row, from the input to the output. layers: weight and bias, by name."""

    model: dict[str, Array]
    layers: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, model: Mapping[str, Any], layers: Sequence[str | tuple[str, str | None]] | None) -> Net:
        arrays = {name: as_numpy(model[name]) for name in model}
        if layers is None:
            order = [name for names in layers_of(model, None, "dropout_path").values() for name in names]
            layers = [name for name in order if arrays[name].ndim > 1]
        found = tuple((x, bias_of(x, arrays)) if isinstance(x, str) else (x[0], x[1]) for x in layers)
        net = cls(arrays, found)
        net.check()
        return net

    def check(self) -> None:
        if len(self.layers) < 2:
            raise UsageError("dropout_path: a network has two layers or more, named from the input to the output by layers")
        for name in (name for layer in self.layers for name in layer if name is not None):
            if name not in self.model:
                raise UsageError(f"dropout_path: layers names {name!r}, and there is no such tensor")
        if rest := sorted(self.model.keys() - {name for layer in self.layers for name in layer}):
            raise UsageError(f"dropout_path: {rest[0]!r} is neither weight nor bias of a layer: there is no path for it")
        for (before, _), (name, _) in zip(self.layers, self.layers[1:]):
            out, shape = len(self.model[before]), self.model[name].shape
            if len(shape) < 2 or shape[1] != out:
                raise UsageError(f"dropout_path: {name!r} of shape {list(shape)} cannot read {out} units of {before!r}")

    def width(self, h: int) -> int:
        return len(self.model[self.layers[h][0]])

    def halves(self, keep: Sequence[Sequence[int]] | None) -> list[Array]:
        """The units of each hidden layer that stay."""
        hidden = len(self.layers) - 1
        if keep is not None and len(keep) != hidden:
            raise UsageError(f"dropout_path: keep is a list for each of {hidden} hidden layers, not {len(keep)}")
        found = []
        for h in range(hidden):
            n = self.width(h)
            units = np.arange(n // 2) if keep is None else np.asarray(keep[h], dtype=np.int64)
            if not 0 < len(units) <= n // 2 or len(set(units.tolist()) & {*range(n)}) != len(units):
                raise UsageError(
                    f"dropout_path: of the {n} units of {self.layers[h][0]!r} {units.tolist()} cannot stay: "
                    "at least one and at most half, each once"
                )
            found.append(units)
        return found

    def others(self, units: Array, h: int) -> Array:
        """As many other units of a hidden layer."""
        return np.setdiff1d(np.arange(self.width(h)), units)[: len(units)]

    def without(self, h: int, kept: list[Array]) -> Net:
        """What reads hidden layer h reads only the units that are kept, times n / m."""
        name = self.layers[h + 1][0]
        w = self.model[name]
        small = np.zeros_like(w)
        small[:, kept[h]] = (self.width(h) / len(kept[h]) * w[:, kept[h]]).astype(w.dtype)
        return self.changed({name: small})

    def with_copy(self, other: Net, source: list[Array], target: list[Array], above: int = -1) -> Net:
        """Units `source` of the other's hidden layers above one as the units `target` of this one's."""
        arrays = {}
        for j in range(above + 1, len(source)):
            name, bias = self.layers[j]
            w, theirs = self.model[name].copy(), other.model[name]
            w[target[j]] = 0
            if j == above + 1:
                w[target[j]] = theirs[source[j]]
            else:
                w[np.ix_(target[j], target[j - 1])] = theirs[np.ix_(source[j], source[j - 1])]
            arrays[name] = w
            if bias is not None:
                arrays[bias] = self.model[bias].copy()
                arrays[bias][target[j]] = other.model[bias][source[j]]
        return self.changed(arrays)

    def with_top(self, other: Net, source: list[Array], target: list[Array]) -> Net:
        """The other's last layer, reading units `target` where the other reads `source`, and nothing else."""
        name, bias = self.layers[-1]
        w = np.zeros_like(self.model[name])
        w[:, target[-1]] = other.model[name][:, source[-1]]
        return self.changed({name: w} | ({bias: other.model[bias]} if bias is not None else {}))

    def changed(self, arrays: Mapping[str, Array]) -> Net:
        return Net({**self.model, **arrays}, self.layers)


def bias_of(weight: str, arrays: Mapping[str, Array]) -> str | None:
    bias = f"{weight.removesuffix('weight')}bias"
    return bias if weight.endswith("weight") and bias in arrays else None


def as_numpy(x: Any) -> Array:
    return host(x) if hasattr(x, "detach") or hasattr(x, "get") else np.asarray(x)
