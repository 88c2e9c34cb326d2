"""What adapters make of a model's tensors, in float64, a stretch of entries at a time.

A product B A is made in tiles of rows whose number depends on the shape of the tensor alone, so that an entry has the same
bits whichever stretch it is asked for in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from refmerge.checkpoint import FLOATS
from refmerge.checkpoint.files import listed
from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores

if TYPE_CHECKING:
    from refmerge.adapters import Adapter, Factors

__all__ = ["Changes", "Read"]

Read = Callable[[int, int], np.ndarray]  # entries [start, stop) of the base's tensor, in float64, to be written to
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype and shape
TILE = 1 << 15  # entries of a tile


@dataclass(frozen=True)
class Replaced:
    """weight * (theta - theta_0) more, of a tensor that the adapter brings whole."""

    tensor: np.ndarray
    weight: float

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def applied(self, x: np.ndarray, start: int, stop: int, before: Read, base: Read) -> np.ndarray:
        whole = scores(self.tensor.reshape(-1)[start:stop])
        return whole if self.weight == 1 and before is base else x + self.weight * (whole - base(start, stop))


@dataclass(frozen=True)
class Shifted:
    """scale * shift more, of a bias."""

    shift: np.ndarray
    scale: float

    @property
    def nbytes(self) -> int:
        return self.shift.nbytes

    def applied(self, x: np.ndarray, start: int, stop: int, before: Read, base: Read) -> np.ndarray:
        return x + self.scale * scores(self.shift[start:stop])


@dataclass(frozen=True, eq=False)
class Product:
    """scale * B A more, and of DoRA each output's entries are then stretched to its magnitude.

    turned: the model stores in x out, so that (B A)^T is added.
    """

    factors: Factors
    scale: float
    turned: bool

    @property
    def nbytes(self) -> int:
        return self.factors.A.nbytes + self.factors.B.nbytes

    def applied(self, x: np.ndarray, start: int, stop: int, before: Read, base: Read) -> np.ndarray:
        x = self.added(x, start, stop)
        if not self.rescales:
            return x
        cols = _wide(self).shape[1]
        at = np.arange(start, stop)
        with np.errstate(all="ignore"):  # a length of 0 makes NaN, which a merge reports
            return self._stretch(before)[at % cols if self.turned else at // cols] * x

    @property
    def rescales(self) -> bool:
        return self.factors.magnitude is not None

    @property
    def left(self) -> np.ndarray:
        """rows x r, as stored: it is widened a tile at a time."""
        f = self.factors
        return f.A.reshape(f.rank, -1).T if self.turned else f.B.reshape(len(f.B), f.rank)

    def added(self, x: np.ndarray, start: int, stop: int) -> np.ndarray:
        """x, in place, plus the product's entries [start, stop) in the order in which the model stores them."""
        if start == stop:
            return x
        left, right = self.left, _wide(self)
        cols = right.shape[1]
        step = max(1, TILE // cols)
        for i in range(start // cols // step * step, -(-stop // cols), step):
            rows = np.ascontiguousarray(scores(left[i : i + step]))
            tile, at = (rows @ right).reshape(-1), i * cols
            a, b = max(start, at), min(stop, at + tile.size)
            x[a - start : b - start] += tile[a - at : b - at]
        return x

    def _stretch(self, before: Read) -> np.ndarray:
        """Of each output, its magnitude over the length of W + scale * B A. Kept, for it takes a pass over the tensor."""
        if "_stretched" not in self.__dict__:
            rows, cols = len(self.left), _wide(self).shape[1]
            step, axis = max(1, TILE // cols), 0 if self.turned else 1
            squares = []
            for i in range(0, rows, step):
                start, stop = i * cols, min(i + step, rows) * cols
                x = self.added(before(start, stop), start, stop).reshape(-1, cols)
                squares.append(np.sum(x * x, axis=axis))
            lengths = np.sqrt(sum(squares) if self.turned else np.concatenate(squares))
            with np.errstate(all="ignore"):
                self.__dict__["_stretched"] = scores(self.factors.magnitude) / lengths
        return self.__dict__["_stretched"]


@lru_cache(maxsize=16)
def _wide(product: Product) -> np.ndarray:
    """scale times the right factor, r x columns, in float64; few are wanted at a time."""
    B, A = product.factors.matrices()
    return product.scale * np.ascontiguousarray(B.T if product.turned else A)


class Changes:
    """What adapters change of a base: `changed` names the tensors.

    base: name -> safetensors dtype and shape of every tensor. adapters: label, Adapter and weight of each; changes of the
    same tensor are added. InputError lists what an adapter changes and the base does not have, or has in another shape.
    """

    def __init__(self, base: Shapes, adapters: Sequence[tuple[str, Adapter, float]]) -> None:
        self._of: dict[str, list[Replaced | Shifted | Product]] = {}
        for label, adapter, weight in adapters:
            if not math.isfinite(weight):
                raise UsageError(f"{label}: weight = {weight!r} is no finite number")
            missing = [m for m, f in adapter.modules.items() if any(name not in base for name in _touched(m, f, base))]
            if missing := missing + [name for name in adapter.saved if name not in base]:
                raise InputError(f"{label}: the base has no {listed(missing)}, which the adapter changes")
            before = {name: len(changes) for name, changes in self._of.items()}
            for name, tensor in adapter.saved.items():  # factors are added to what replaces the base's
                self._add(base, label, name, tuple(tensor.shape), Replaced(tensor, weight))
            for module, f in adapter.modules.items():
                self._products(base, label, adapter, module, f, weight)
            for name, n in before.items():
                if n < len(self._of[name]) and any(isinstance(c, Product) and c.rescales for c in self._of[name]):
                    raise UsageError(f"{label}: another adapter changes {name!r} too, and one of them is DoRA's")

    def __contains__(self, name: object) -> bool:
        return name in self._of

    @property
    def changed(self) -> list[str]:
        return sorted(self._of)

    @property
    def nbytes(self) -> int:
        """Of all factors and whole tensors, which are kept in memory."""
        return sum(c.nbytes for changes in self._of.values() for c in changes)

    def stretch(self, name: str, start: int, stop: int, read: Read) -> np.ndarray:
        """Entries [start, stop) of a changed tensor, in float64."""
        x, before = read(start, stop), read
        for change in self._of[name]:
            x, before = change.applied(x, start, stop, before, read), partial(_then, change, before, read)
        return x

    def _products(self, base: Shapes, label: str, adapter: Adapter, module: str, f: Factors, weight: float) -> None:
        name = _weight(module, base)
        if f.magnitude is not None and weight != 1:
            raise UsageError(f"{label}: module {module!r} is DoRA's, which has no fraction: its weight is 1, not {weight!r}")
        turned = adapter.turned(module)
        shape = f.stored_shape(turned)
        if _same(shape[::-1], base[name][1]) and not _same(shape, base[name][1]) and not f.embedding and f.A.ndim == 2:
            # PEFT goes by the kind of layer, whatever the configuration says.
            turned, shape = not turned, shape[::-1]
        if f.rank:
            self._add(base, label, name, shape, Product(f, weight * f.scaling, turned))
        if f.bias is not None:
            self._add(base, label, f"{module}.bias", f.bias.shape, Shifted(f.bias, weight * f.scaling))

    def _add(
        self, base: Shapes, label: str, name: str, shape: tuple[int, ...], change: Replaced | Shifted | Product
    ) -> None:
        dtype, own = base[name]
        if not _same(shape, own):
            raise InputError(f"{label}: tensor {name!r} is {list(own)}, and the adapter's change of it {list(shape)}")
        if dtype not in FLOATS:
            raise InputError(f"{label}: tensor {name!r} is {dtype} in the base: only floats can be changed")
        self._of.setdefault(name, []).append(change)


def _then(change: Replaced | Shifted | Product, before: Read, base: Read, start: int, stop: int) -> np.ndarray:
    return change.applied(before(start, stop), start, stop, before, base)


def _touched(module: str, f: Factors, base: Shapes) -> list[str]:
    return [_weight(module, base), *([f"{module}.bias"] if f.bias is not None else [])]


def _weight(module: str, base: Shapes) -> str:
    """A module's weight; torch's attention calls that of its inner module in_proj in_proj_weight."""
    joined = f"{module}_weight"
    return joined if module.endswith("in_proj") and joined in base else f"{module}.weight"


def _same(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are equal but for axes of length 1 at their ends: of a convolution 1 x 1 and a matrix."""
    return _trimmed(a) == _trimmed(b)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)
