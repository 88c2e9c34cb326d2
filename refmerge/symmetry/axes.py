"""The grammar of one axis of a tensor: which permutation moves what lies along it.

    None                    nothing moves
    "P"                     one place for each unit of P
    Block("P", k)           k places for each unit, which move together: the k pixels that a channel is flattened to
    Block("P", k, inner)    and inside of every block the same `inner`, an entry that spans k places
    Nested("P", inner, k)   k places for each unit, and inside of each block an `inner` of its own: heads and what is in them
    Slices([a, b, ...])     entries side by side along the axis, of equal lengths or of the `sizes` given

A permutation that lies under Nested entries is *owned*: there is one for each unit of its owners. Its array then has an axis
for each owner, outermost first, and a last one for the permutation. Its row i moves what comes to lie in block i.

Each function here takes the place numbers of an axis, `places`, as an array, and does the same for all kinds of entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.errors import UsageError

__all__ = ["Block", "Entry", "Nested", "Slices", "index", "lengths", "names", "occurrences", "places_of", "read", "told"]

Perms = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Block:
    """`k` places for each unit of `name`, one block after the other; inside of every block the same `inner`."""

    name: str
    k: int
    inner: Entry = None


@dataclass(frozen=True)
class Nested:
    """Blocks of `k` places, permuted by `name`; inside of each an `inner` of its own."""

    name: str
    inner: Entry
    k: int


@dataclass(frozen=True, init=False)
class Slices:
    """Entries side by side, of `sizes` places each, which are all equal where they are not given."""

    parts: tuple[Entry, ...]
    sizes: tuple[int, ...] | None

    def __init__(self, parts: Sequence[Entry], sizes: Sequence[int] | None = None) -> None:
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "sizes", None if sizes is None else tuple(sizes))
        if not self.parts or (self.sizes is not None and len(self.sizes) != len(self.parts)):
            raise UsageError(f"Slices: {len(self.parts)} entries and {self.sizes} as their sizes: one size for each entry")


Entry = None | str | Block | Nested | Slices


def told(entry: Entry) -> Any:
    """An entry as JSON and YAML can hold it."""
    match entry:
        case Block(name, k, inner):
            return {"block": name, "k": k} | ({} if inner is None else {"inner": told(inner)})
        case Nested(name, inner, k):
            return {"nested": name, "k": k, "inner": told(inner)}
        case Slices(parts, sizes):
            return {"slices": [told(part) for part in parts]} | ({} if sizes is None else {"sizes": list(sizes)})
    return entry


def read(said: Any) -> Entry:
    """The entry of which `told` gives this. UsageError for what is none."""
    match said:
        case None | str():
            return said
        case {"block": str(name), "k": int(k), **more} if type(k) is int and more.keys() <= {"inner"}:
            return Block(name, k, read(more.get("inner")))
        case {"nested": str(name), "k": int(k), "inner": inner, **more} if type(k) is int and not more:
            return Nested(name, read(inner), k)
        case {"slices": [*parts], **more} if more.keys() <= {"sizes"}:
            sizes = more.get("sizes")
            if sizes is None or (isinstance(sizes, list) and all(type(size) is int for size in sizes)):
                return Slices([read(part) for part in parts], sizes)
    raise UsageError(
        f"{said!r} is no entry of an axis: null, a name, {{block: name, k: 4}}, {{nested: name, k: 4, inner: other}}, "
        "{slices: [one, other], sizes: [4, 8]}"
    )


def names(entry: Entry, owners: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(permutation, its owners) for each occurrence in an entry."""
    match entry:
        case str():
            yield entry, owners
        case Block(name, _, inner):
            yield name, owners
            yield from names(inner, owners)
        case Nested(name, inner, _):
            yield name, owners
            yield from names(inner, (*owners, name))
        case Slices(parts):
            for part in parts:
                yield from names(part, owners)


def lengths(entry: Entry, n: int) -> Iterator[tuple[str, int]]:
    """(permutation, its number of units) for each occurrence in an entry that spans n places. UsageError if it cannot."""
    match entry:
        case str():
            yield entry, n
        case Block(name, k, inner) | Nested(name, inner, k):
            if k < 1 or n % k:
                raise UsageError(f"{n} places are not made of blocks of {k}, as {name!r} has them")
            yield name, n // k
            yield from lengths(inner, k)
        case Slices():
            for part, size in zip(entry.parts, _sizes(entry, n)):
                yield from lengths(part, size)


def index(entry: Entry, n: int, perms: Perms, block: tuple[int, ...] = ()) -> np.ndarray:
    """Where what comes to lie on each of n places is taken from. `block`: the units of the owners that the entry lies in."""
    match entry:
        case str() if entry in perms:
            return np.asarray(perms[entry])[block]
        case Block(name, k, inner):
            within = index(inner, k, perms, block)
            return (k * index(name, n // k, perms, block)[:, None] + within).reshape(-1)
        case Nested(name, inner, k):
            within = np.stack([index(inner, k, perms, (*block, i)) for i in range(n // k)])
            return (k * index(name, n // k, perms, block)[:, None] + within).reshape(-1)
        case Slices():
            sizes = _sizes(entry, n)
            starts = np.cumsum([0, *sizes])
            return np.concatenate([s + index(e, size, perms, block) for e, size, s in zip(entry.parts, sizes, starts)])
    return np.arange(n)


def places_of(entry: Entry, name: str, places: np.ndarray) -> np.ndarray | None:
    """The places that each unit of a permutation has: an axis for each owner, one for the units, one for a unit's places.
    None where the permutation is not in the entry."""
    match entry:
        case str() if entry == name:
            return places[:, None]
        case Block(outer, k) | Nested(outer, _, k) if outer == name:
            return places.reshape(-1, k)
        case Block(_, k, inner):
            return _joined([places_of(inner, name, block) for block in places.reshape(-1, k)])
        case Nested(_, inner, k):
            found = [places_of(inner, name, block) for block in places.reshape(-1, k)]
            return None if found[0] is None else np.stack([x for x in found if x is not None])
        case Slices():
            cuts = np.cumsum(_sizes(entry, len(places)))[:-1]
            return _joined([places_of(part, name, some) for part, some in zip(entry.parts, np.split(places, cuts))])
    return None


def occurrences(entry: Entry, name: str, places: np.ndarray) -> Iterator[tuple[np.ndarray, Entry]]:
    """Each occurrence of a permutation that no other owns: the places of each of its units, and what moves inside of each
    block by itself, None where nothing does."""
    match entry:
        case str() if entry == name:
            yield places[:, None], None
        case Nested(outer, inner, k) if outer == name:
            yield places.reshape(-1, k), inner
        case Block(outer, k) if outer == name:
            yield places.reshape(-1, k), None
        case Block(_, k, inner):
            for block in places.reshape(-1, k):
                yield from occurrences(inner, name, block)
        case Slices():
            for part, some in zip(entry.parts, np.split(places, np.cumsum(_sizes(entry, len(places)))[:-1])):
                yield from occurrences(part, name, some)


def _joined(found: Sequence[np.ndarray | None]) -> np.ndarray | None:
    there = [x for x in found if x is not None]
    return np.concatenate(there, axis=-1) if there else None


def _sizes(entry: Slices, n: int) -> tuple[int, ...]:
    if entry.sizes is not None:
        if sum(entry.sizes) != n:
            raise UsageError(f"{n} places are not slices of {', '.join(map(str, entry.sizes))}")
        return entry.sizes
    if n % len(entry.parts):
        raise UsageError(f"{n} places are not {len(entry.parts)} slices of one size: give their sizes")
    return (n // len(entry.parts),) * len(entry.parts)
