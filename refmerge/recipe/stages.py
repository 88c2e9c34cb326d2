"""A checkpoint that a merge before another one makes: known before it is written, but for its values."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from refmerge.checkpoint import Checkpoint, itemsize, open_checkpoint
from refmerge.checkpoint.header import TensorInfo
from refmerge.checkpoint.layout import WEIGHTS, config
from refmerge.errors import ResourceError, UsageError
from refmerge.plan import Plan
from refmerge.sources import ByteSource

__all__ = ["ComingCheckpoint"]


class ComingCheckpoint(Checkpoint):
    """The result of a plan, by its name, before and after it was run: `take` says where it was written.

    Until then what lies beside its weights is in a temporary folder, and only tensors that are copied can be read.
    """

    coming = True

    def __init__(self, name: str, plan: Plan) -> None:
        self.path = Path(name)
        self._plan = plan
        self._made: Checkpoint | None = None
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
    def files(self) -> list[Path]:
        return [] if self._made is None else self._made.files

    def take(self, folder: Path) -> Checkpoint:
        """It is there now, in this folder. ResourceError where that is another one."""
        self._made = open_checkpoint(folder)
        if {n: (t.dtype, t.shape) for n, t in self._made.tensors.items()} != self._plan.specs:
            raise ResourceError(f"{folder}: is not what {self.path} makes: remove it, or leave --resume out to start anew")
        return self._made

    def fingerprint(self) -> list[list[Any]]:
        """Its plan is known by itself."""
        return [["made by", str(self.path)]]

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        if self._made is not None:
            self._made.read(name, start, stop, out)
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
