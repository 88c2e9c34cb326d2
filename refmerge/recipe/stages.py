"""A checkpoint that a merge before another one makes: known before there are values of it.

Where that can be, it is never written: the tensors that the next merge is about to read are merged into memory, rounded as
they would be in a file, and forgotten when they have been read.
"""

from __future__ import annotations

import math
import mmap
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from refmerge.checkpoint import Checkpoint, itemsize, open_checkpoint
from refmerge.checkpoint.header import TensorInfo
from refmerge.checkpoint.layout import WEIGHTS, config
from refmerge.errors import ResourceError, UsageError
from refmerge.plan import Plan, Specs
from refmerge.skipping import POLICY
from refmerge.sources import ByteSource, DiskSink

__all__ = ["ComingCheckpoint", "why_written"]


class ComingCheckpoint(Checkpoint):
    """The result of a plan, by its name, before and after it was run: `take` says where it was written.

    Until then what lies beside its weights is in a temporary folder, and only tensors can be read that are copied, or are
    held in memory. may_stream: whether it need not be written.
    """

    coming = True

    def __init__(self, name: str, plan: Plan) -> None:
        self.path = Path(name)
        self.may_stream = False
        self._plan = plan
        self._made: Checkpoint | None = None
        self._kept = False
        self._held: _Memory | None = None
        self._folder = TemporaryDirectory(prefix="refmerge-")
        self.directory: Path = Path(self._folder.name)
        sidecars, files = plan.side_files()
        for name, path in sidecars.items():
            shutil.copyfile(path, self._place(name))
        for name, content in files.items():
            self._place(name).write_bytes(content)
        if plan.arranged is not None:
            self.index = plan.arranged.index
            donors = plan.arranged.donors.items()
            self.components = {n: replace(c.components[n], folder=self.directory / n) for n, c in donors}
        self.config = config(self.directory)
        self.metadata = {}
        self.weights = WEIGHTS if plan.donor is None else plan.donor.weights
        self.tensors = {
            n: TensorInfo(n, dtype, shape, self.path, 0, math.prod(shape) * itemsize(dtype))
            for n, (dtype, shape) in sorted(plan.specs.items())
        }
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def _place(self, name: str) -> Path:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        return path

    @property
    def streams(self) -> bool:
        """Whether its tensors are merged when they are read."""
        return self.may_stream and self._made is None

    @property
    def files(self) -> list[Path]:
        """Its files of weights, where they stay."""
        return self._made.files if self._made is not None and self._kept else []

    def take(self, folder: Path, kept: bool) -> Checkpoint:
        """It is there now, in this folder, where it may be kept. ResourceError where that is another one."""
        made = open_checkpoint(folder)
        if {n: (t.dtype, t.shape) for n, t in made.tensors.items()} != self._plan.specs:
            raise ResourceError(f"{folder}: is not what {self.path} makes: remove it, or leave --resume out to start anew")
        self._made, self._kept = made, kept
        if kept:
            self.directory = folder
        return made

    @contextmanager
    def held(self, names: Collection[str]) -> Iterator[None]:
        """Within it these tensors are in memory."""
        plan = self._plan
        memory = _Memory({name: plan.specs[name] for name in names})
        plan.fill({"": DiskSink(memory, plan.specs, plan.backend)}, done=frozenset(plan.specs.keys() - names))
        before, self._held = self._held, memory
        try:
            yield
        finally:
            self._held = before

    def fingerprint(self) -> list[list[Any]]:
        """Its plan is known by itself."""
        return [["made by", str(self.path)]]

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        if self._made is not None:
            self._made.read(name, start, stop, out)
            return
        if self._held is not None and name in self._held.arrays:
            self._held.read(name, start, stop, out)
            return
        source = self._plan.copied.get(name)
        if not isinstance(source, ByteSource):
            raise UsageError(f"{self.path}: {name!r} has to be read before it is merged: merge {self.path} by itself first")
        source.read(name, start, stop, out)

    def ahead(self, name: str, start: int, stop: int) -> None:
        if self._made is not None:
            self._made.ahead(name, start, stop)

    def check_unchanged(self) -> None:
        if self._made is not None:
            self._made.check_unchanged()

    def close(self) -> None:
        if self._made is not None:
            self._made.close()


class _Memory:
    """Takes the place of a checkpoint's writer: the bytes go into memory that forked processes share."""

    def __init__(self, specs: Specs) -> None:
        self._sizes = {name: itemsize(dtype) for name, (dtype, _) in specs.items()}
        self.arrays = {name: _shared(math.prod(shape) * self._sizes[name]) for name, (_, shape) in specs.items()}

    def put(self, name: str, start: int, raw: np.ndarray) -> None:
        at = start * self._sizes[name]
        self.arrays[name][at : at + raw.size] = raw

    write = put

    def record(self, name: str, start: int, count: int) -> None:
        """Nothing is kept account of."""

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = self.arrays[name][start * self._sizes[name] : stop * self._sizes[name]]


def _shared(nbytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8) if nbytes else np.empty(0, np.uint8)


def why_written(coming: ComingCheckpoint, plan: Plan, plans: Sequence[Plan]) -> str:
    """Why the result of a plan is written before the others read it; empty where it need not be. plans: all others."""
    readers = [p for p in plans if coming in p.checkpoints]
    if len(readers) > 1:
        return "several merges read it"
    if any(p.work.nonfinite == POLICY for p in (plan, *readers)):
        return "a model may be left out of it"
    if plan.before is not None or _at_once(plan):
        return "it looks at all tensors together"
    if any(p.before is not None or _at_once(p) for p in readers):
        return "the merge that reads it looks at all tensors together"
    largest = max((t.nbytes for t in coming.tensors.values()), default=0)
    if any(p.max_memory is not None and 4 * largest > p.max_memory for p in readers):
        return "--max-memory is less than four of its largest tensor"
    return ""


def _at_once(plan: Plan) -> bool:
    return any(w.over != "tensor" or any(w.view(t) == "model" for t in w.tensors) for w in plan.works)
