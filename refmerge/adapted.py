"""Checkpoints with adapters in them: read like any other, changed where they are read, and never written out for it.

`model+adapter` in a recipe or as a path means such a one. A merge gets its values in the precision in which it computes, and
rounds once, at the end; `read` rounds them to the type that the base has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.checkpoint import Checkpoint, decode, encode, hub, itemsize, open_checkpoint
from refmerge.checkpoint.files import readable, there
from refmerge.checkpoint.scaled import as_values
from refmerge.errors import UsageError

if TYPE_CHECKING:
    from refmerge.adapters import Adapter

__all__ = ["Adapted", "adapted", "open_model", "reference"]

MARK = "+"
TRIAL = 1 << 18  # entries on which the time of all is tried


class Adapted(Checkpoint):
    """An open checkpoint whose tensors come as adapters change them. It shares the files of `base`, and is closed with it.

    adapters: label, Adapter and weight of each. nbytes_kept: what the adapters take in memory.
    """

    multiplies = True

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[str, Adapter, float]]) -> None:
        from refmerge.changes import Changes  # few models have adapters in them

        self.__dict__.update(base.__dict__)
        self._of, self.adapters = base, tuple(adapters)
        self.rewritten, self.note = base.rewritten, base.note
        self._shapes = {n: (t.dtype, t.shape) for n, t in base.tensors.items()}
        self._changes = Changes(self._shapes, adapters)

    @property
    def nbytes_kept(self) -> int:
        return self._changes.nbytes

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that the adapters change."""
        return self._changes.changed

    @property
    def paths(self) -> list[Path]:
        return [*self._of.paths, *(path for label, _, _ in self.adapters if there(path := Path(label)))]

    def kept_as(self, name: str) -> str:
        return self._of.kept_as(name)

    @property
    def label(self) -> str:
        return MARK.join([self._of.label, *(label for label, _, _ in self.adapters)])

    def fingerprint(self) -> list[list[Any]]:
        """The base's, and of each adapter, which is in memory, its contents."""
        return [*self._of.fingerprint(), *([adapter.digest(), weight] for _, adapter, weight in self.adapters)]

    def exact(self, name: str, start: int, stop: int) -> np.ndarray | None:
        if name not in self._changes:
            return self._of.exact(name, start, stop)
        return self._changes.stretch(name, start, stop, lambda i, j: self._wide(name, i, j))

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        exact = self.exact(name, start, stop)
        if exact is None:
            self._of.read(name, start, stop, out)
        else:
            encode(exact, self.tensors[name].dtype, out)

    def seconds(self) -> float:
        """The time in which this machine changes every entry once, without reading it; tried on a part of one tensor."""
        sizes = {name: self.tensors[name].size for name in self.changed}
        if not any(sizes.values()):
            return 0.0
        name = max(sizes, key=lambda n: sizes[n])
        count = min(sizes[name], TRIAL)
        # Others, which may keep what they make of a base that is none.
        changes = type(self._changes)(self._shapes, self.adapters)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            changes.stretch(name, 0, count, lambda i, j: np.ones(j - i))
            best = min(best, time.perf_counter() - start)
        return best / count * sum(sizes.values())

    def ahead(self, name: str, start: int, stop: int) -> None:
        self._of.ahead(name, start, stop)

    def close(self) -> None:
        self._of.close()

    def _wide(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries of the base in float64."""
        exact = self._of.exact(name, start, stop)
        if exact is not None:
            return exact
        dtype = self.tensors[name].dtype
        raw, wide = np.empty((stop - start) * itemsize(dtype), np.uint8), np.empty(stop - start)
        self._of.read(name, start, stop, raw)
        decode(raw, dtype, wide)
        return wide


def adapted(
    base: str | Path | Checkpoint,
    *adapters: str | Path | Adapter,
    weights: Sequence[float] | None = None,
    part: str | None = None,
) -> Adapted:
    """A checkpoint as adapters change it: theta_0 + sum of weight * scaling * B A, in float64 where it is read.

    base: a path or an open checkpoint. adapters: paths, or what `read_adapter` gives. weights: one for each, by default 1.
    part: of an image model's adapters, the part that the base is, as unet. Every module of an adapter must be in the base;
    InputError lists those that are not, and those of another shape.
    """
    from refmerge.adapters import Adapter, read_adapter
    from refmerge.foreign import matched

    if not adapters:
        raise UsageError("adapted: at least one adapter")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise UsageError(f"adapted: {len(weights)} weights for {len(adapters)} adapters")
    base = base if isinstance(base, Checkpoint) else open_checkpoint(base)
    given = []
    for i, (a, w) in enumerate(zip(adapters, weights)):
        label = f"adapter {i}" if isinstance(a, Adapter) else str(a)
        adapter = matched(a if isinstance(a, Adapter) else read_adapter(a), base, label, part)
        given.append((label, adapter, float(w)))
    return Adapted(base, given)


def open_model(
    path: str | Path,
    folder: Path = Path(),
    *,
    download: bool = False,
    allow_pickle: bool = False,
    values: bool = True,
) -> Checkpoint:
    """The checkpoint at a path, or what `base+adapter` means; relative paths start from `folder`.

    download: fetch what is a model of the Hub and not in its cache. allow_pickle: read torch's own files. values: where
    weights of 8 bits have scales, what they mean.
    """
    with readable(path):
        base, *adapters = reference(str(path), folder)
        found = hub.find(base if adapters else path, folder, download=download)
        opened = open_checkpoint(found, allow_pickle=allow_pickle)
        opened = as_values(opened) if values or adapters else opened
        if not adapters:
            return opened
        return adapted(opened, *(hub.find(a, folder, download=download) for a in adapters))


def reference(text: str, folder: Path = Path()) -> list[str]:
    """The parts of `base+adapter+...`; a path that exists as it stands, plus signs and all, is one part."""
    parts = text.split(MARK)
    found: list[str] = []
    while parts:
        ends = (n for n in range(len(parts), 0, -1) if (folder / Path(MARK.join(parts[:n])).expanduser()).exists())
        with readable(text):
            n = next(ends, 1)
        found.append(MARK.join(parts[:n]))
        parts = parts[n:]
    if not all(found):
        raise UsageError(f"{text!r}: a model and an adapter are joined as model+adapter, and one of them is empty")
    return found


def described(checkpoint: Any) -> list[str]:
    """A line on each adapter of a checkpoint, for a plan; none for other checkpoints."""
    lines = []
    for label, adapter, weight in getattr(checkpoint, "adapters", ()):
        ranks = sorted({f.rank for f in adapter.modules.values()})
        kinds = [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"] if ranks else []
        kinds += ["DoRA"] if any(f.magnitude is not None for f in adapter.modules.values()) else []
        kinds += [f"{len(adapter.saved)} tensors whole"] if adapter.saved else []
        kinds += [f"weight {weight:g}"] if weight != 1 else []
        lines.append(f"{label}: {len(adapter.modules)} modules, {', '.join(kinds)}")
    return lines
