"""What the values of one checkpoint are, tensor by tensor in blocks: read and summed as a comparison reads and sums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from refmerge.checkpoint import DTYPES, FLOATS, Checkpoint
from refmerge.compare import KINDS, blocks, digits, effective_rank, kind_of, percent, shown, some, together, widened
from refmerge.numeric import exact_sum, expansion, leaf_sums
from refmerge.recipe.layers import place_of

__all__ = ["ORDERS", "Inspection", "Layer", "Values", "values"]

ORDERS = ("norm", "magnitude", "largest", "zeros", "rank", "size")


@dataclass(frozen=True)
class Values:
    """What is found out of a tensor. norm: of all entries. low, high: the least and the greatest, magnitude: the mean of
    their magnitudes, all three of the finite ones; largest: the greatest magnitude of these. zeros: the share of entries
    that are 0. nan, infinite: how many there are; first: the index of the first of either. rank: the effective rank of a
    matrix. Integers count as the nearest float64. None where there is no such number: the norm of what is not finite,
    ranges and shares of no entries."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    norm: float | None = None
    low: float | None = None
    high: float | None = None
    magnitude: float | None = None
    zeros: float | None = None
    nan: int = 0
    infinite: int = 0
    first: tuple[int, ...] | None = None
    rank: float | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def largest(self) -> float | None:
        return None if self.low is None or self.high is None else max(-self.low, self.high)

    @property
    def root_mean_square(self) -> float | None:
        return None if self.norm is None or not self.size else self.norm / math.sqrt(self.size)


@dataclass(frozen=True)
class Layer:
    """All tensors of one kind in a layer as one: the root of their entries' mean square, and the greatest magnitude."""

    root_mean_square: float | None
    largest: float | None


@dataclass(frozen=True)
class Inspection:
    """tensors: by name. same: names of tensors whose bytes are the same, a group each; those of one value are not counted.
    ranked: whether ranks were asked for; too_large: the matrices that were too large for that."""

    tensors: dict[str, Values]
    same: tuple[tuple[str, ...], ...]
    ranked: bool = False
    too_large: tuple[str, ...] = field(default=())

    def most(self, by: str = "norm") -> list[Values]:
        """All tensors: those with NaN or infinities first, then by one of ORDERS, the greatest first."""

        def order(x: Values) -> tuple[bool, float, str]:
            number = getattr(x, by)
            return not (x.nan or x.infinite), math.inf if number is None else -number, x.name

        return sorted(self.tensors.values(), key=order)

    def by_layer(self) -> dict[str, dict[str, dict[int, Layer]]]:
        """How the names of layers begin -> kind, of KINDS -> layer -> what is found out of its floating-point tensors."""
        members: dict[tuple[str, str, int], list[Values]] = {}
        for x in self.tensors.values():
            place = place_of(x.name)
            if place is not None and x.dtype in FLOATS:
                members.setdefault((place.stack, kind_of(place.rest), place.layer), []).append(x)
        found: dict[str, dict[str, dict[int, Layer]]] = {}
        for stack, kind, layer in sorted(members, key=lambda key: (key[0], KINDS.index(key[1]), key[2])):
            found.setdefault(stack, {}).setdefault(kind, {})[layer] = _layer(members[stack, kind, layer])
        return found

    def told(self) -> dict[str, Any]:
        """For programs."""

        def facts(x: Values) -> dict[str, Any]:
            return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(x).items() if key != "name"}

        layers = {
            stack: {kind: {str(n): vars(layer) for n, layer in layers.items()} for kind, layers in kinds.items()}
            for stack, kinds in self.by_layer().items()
        }
        found = {name: facts(x) for name, x in self.tensors.items()}
        told = {"tensors": found, "same": [list(names) for names in self.same], "layers": layers}
        return told | ({"too_large": list(self.too_large)} if self.ranked else {})

    def summary(self) -> list[tuple[str, str]]:
        """What there is to say of the whole: label, sentence."""
        every = list(self.tensors.values())
        entries, zero = sum(x.size for x in every), sum((x.zeros or 0.0) * x.size for x in every)
        found = [("zeros", f"{percent(zero / entries if entries else None)} of the entries")]
        odd = [x for x in every if x.nan or x.infinite]
        if odd:
            counts = f"{sum(x.nan for x in odd):,} NaN and {sum(x.infinite for x in odd):,} infinite entries"
            at = f"{shown(odd[0].name)}{list(odd[0].first or ())}"
            found.append(("NaN, inf", f"{counts} in {some([x.name for x in odd])}; the first at {at}"))
        alike = (x for x in every if x.size > 1 and x.low is not None and x.low == x.high)
        if constant := [x.name for x in alike if not (x.nan or x.infinite)]:
            found.append(("one value", f"in all of {some(constant)}"))
        found += [("same", ", ".join(map(shown, names))) for names in self.same]
        if self.ranked:
            ranks = sum(x.rank is not None for x in every)
            found.append(("rank", f"effective, exp of the entropy of the singular values, of {ranks} matrices"))
        if self.too_large:
            found.append(("", f"not of {len(self.too_large)} that are too large: {some(self.too_large)}"))
        return found

    def columns(self) -> list[str]:
        """Numbers of a tensor that a narrow table shows."""
        odd = ["nan", "infinite"] * any(x.nan or x.infinite for x in self.tensors.values())
        return ["norm", "low", "high", "magnitude", "zeros", *odd, *["rank"] * self.ranked]

    def text(self, top: int = 20, by: str = "norm") -> str:
        """For people."""
        lines = [f"{label:9}  {said}" for label, said in self.summary()]
        listed = self.most(by)[:top]
        if listed:
            columns = self.columns()
            rows = [[f"tensors, by {by}", "dtype", "shape", *columns]]
            rows += [[shown(x.name), x.dtype, dimensions(x), *(digits(getattr(x, key)) for key in columns)] for x in listed]
            widths = [max(map(len, column)) for column in zip(*rows)]
            lines.append("")
            for first, *others in rows:
                lines.append("  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(others, widths[1:]))]))
        return "\n".join(lines)


def dimensions(x: Values) -> str:
    """Of a tensor, for people."""
    return " \u00d7 ".join(map(str, x.shape)) or "number"


def _layer(tensors: Sequence[Values]) -> Layer:
    norm, size = together([x.norm for x in tensors]), sum(x.size for x in tensors)
    largest = [x.largest for x in tensors if x.largest is not None]
    return Layer(norm / math.sqrt(size) if norm is not None and size else None, max(largest, default=None))


def values(
    checkpoint: Checkpoint,
    progress: Callable[[int], None] = lambda nbytes: None,
    rank: int | None = None,
    only: Collection[str] | None = None,
) -> Inspection:
    """What the values of a checkpoint are, a block of each tensor at a time. progress is told the bytes that were read.
    rank: how many entries a matrix may have to be held whole, for its effective rank; None for no ranks. only: names of the
    tensors that are read; None is all."""
    found, too_large = {}, []
    copies: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if only is not None and name not in only:
            continue
        matrix = rank is not None and info.dtype in FLOATS and len(info.shape) == 2
        fits = matrix and rank is not None and info.size <= rank
        if matrix and not fits:
            too_large.append(name)
        sums, digest = _Sums(), hashlib.blake2b(digest_size=16)
        held = []
        for ((dtype, raw),) in blocks(name, info.size, [checkpoint], progress):
            digest.update(raw.tobytes())
            entries = widened((dtype, raw)) if dtype in FLOATS else raw.view(DTYPES[dtype])
            sums.add(entries)
            if fits:
                held.append(entries)
        seen = sums.values(name, info.dtype, info.shape, info.nbytes)
        if fits:
            seen = replace(seen, rank=effective_rank(np.concatenate([*held, np.empty(0)]).reshape(info.shape)))
        found[name] = seen
        if seen.low != seen.high:
            copies.setdefault((info.dtype, info.shape, digest.digest()), []).append(name)
    same = tuple(tuple(names) for names in copies.values() if len(names) > 1)
    return Inspection(found, same, rank is not None, tuple(too_large))


class _Sums:
    """Sums and counts over the entries of a tensor, block by block; the sums are exact."""

    def __init__(self) -> None:
        self.seen = self.nan = self.infinite = self.zeros = 0
        self.first: int | None = None
        self.low, self.high = math.inf, -math.inf
        self.parts: dict[str, list[float]] = {"squares": [], "magnitudes": []}

    def add(self, x: np.ndarray) -> None:
        finite = np.isfinite(x)
        if not finite.all():
            self.nan += int(np.count_nonzero(np.isnan(x)))
            self.infinite += int(np.count_nonzero(np.isinf(x)))
            if self.first is None:
                self.first = self.seen + int(np.argmin(finite))
        self.seen += x.size
        self.zeros += int(np.count_nonzero(x == 0))
        if finite.any():
            known = x if finite.all() else x[finite]
            self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
        with np.errstate(all="ignore"):
            wide = np.where(finite, x, 0.0)
            for key, sums in zip(self.parts, leaf_sums(wide * wide, np.abs(wide))):
                self.parts[key] = expansion([*self.parts[key], *sums.tolist()])

    def values(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> Values:
        finite = self.seen - self.nan - self.infinite
        squares, magnitudes = (exact_sum(parts) for parts in self.parts.values())
        whole = finite == self.seen and math.isfinite(squares)
        place = None if self.first is None else tuple(map(int, np.unravel_index(self.first, shape)))
        return Values(
            name, dtype, shape, nbytes, norm=math.sqrt(squares) if whole else None,
            low=self.low if finite else None, high=self.high if finite else None,
            magnitude=magnitudes / finite if finite and math.isfinite(magnitudes) else None,
            zeros=self.zeros / self.seen if self.seen else None, nan=self.nan, infinite=self.infinite, first=place,
        )  # fmt: skip
