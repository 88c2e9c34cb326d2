"""Reading checkpoints: every check before the first weight is read, then bytes by position, with no memory map.

A memory map would be shorter, but a file that someone truncates while it is mapped kills the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.checkpoint import layout
from refmerge.checkpoint.dtypes import DTYPES, itemsize
from refmerge.checkpoint.files import PositionedFile, open_regular, readable, shown
from refmerge.checkpoint.header import Header, TensorInfo, identity, read_header
from refmerge.errors import InputError, ResourceError

if TYPE_CHECKING:
    from refmerge.checkpoint.pipeline import Component

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """Open a .safetensors file, an index .json, a folder in the Hub's layout or that of a diffusers pipeline; a .gguf file
    where the gguf package is.

    Reads and checks all headers and the index, and no weights. InputError names the file and what is wrong with it.
    allow_pickle: open pickled weights (.bin, .pt, .pth, .ckpt), too, through torch's weights_only reader.
    """
    with readable(path):
        if os.fspath(path).endswith(".gguf") and os.path.isfile(path):
            from refmerge.checkpoint.gguf_files import open_gguf

            return open_gguf(Path(path))
        if os.path.lexists(os.path.join(path, layout.PIPELINE)):
            from refmerge.checkpoint.pipeline import open_pipeline

            return open_pipeline(Path(path), lambda folder: open_checkpoint(folder, allow_pickle=allow_pickle))
        if allow_pickle and os.path.exists(path):
            from refmerge.checkpoint.pickles import is_pickled, open_pickled

            if is_pickled(Path(path)):
                return open_pickled(Path(path))
        return _open(path)


def _open(path: str | os.PathLike[str]) -> Checkpoint:
    found = layout.locate(path)
    headers = {file: read_header(file) for file in found.files}
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for tensor in header.tensors:
            if tensor.name in tensors:
                files = f"{shown(tensors[tensor.name].file)} and in {shown(file)}"
                raise InputError(f"{shown(found.path)}: tensor {shown(tensor.name)} is both in {files}")
            tensors[tensor.name] = tensor
    if found.weight_map is not None:
        _match(found.path, found.weight_map, tensors)
    return Checkpoint(found, headers, {name: tensors[name] for name in sorted(tensors)}, layout.config(found.directory))


def _match(path: Path, weight_map: dict[str, Path], tensors: dict[str, TensorInfo]) -> None:
    """The index and the shards must name the same tensors in the same places."""
    listed, stored = set(weight_map.items()), {(name, tensor.file) for name, tensor in tensors.items()}
    for names, what in (
        (listed - stored, "listed in the index but not in"),
        (stored - listed, "not in the index but in"),
    ):
        if names:
            some = ", ".join(f"{shown(name)} ({what} {shown(file.name)})" for name, file in sorted(names)[:5])
            raise InputError(f"{shown(path)}: index and shards disagree on {len(names)} tensors: {some}")


class Checkpoint(Mapping[str, np.ndarray]):
    """An opened checkpoint: a mapping from tensor name, in sorted order, to an array read anew on each access.

    path: as given. directory: the folder of a sharded or Hub-layout checkpoint, None for a lone file. tensors: name ->
    TensorInfo, sorted. weights: how a folder's only file is called in models of this kind. metadata: the `__metadata__`
    entries on which all shards that have them agree. config: the folder's config.json, None where there is none. nbytes: of
    all tensors. coming: whether it is still to be written.
    Safe to read from several threads; close it, or use it as a context manager, to close its files.
    """

    coming = False
    multiplies = False  # whether matrices are multiplied where it is read
    rewritten = False  # whether `config` is not what the folder's file says
    note = ""  # what a plan should say of how it is read
    components: Mapping[str, Component] = MappingProxyType({})

    def __init__(
        self,
        found: layout.Layout,
        headers: Mapping[Path, Header],
        tensors: dict[str, TensorInfo],
        config: dict[str, Any] | None,
    ) -> None:
        self.path = found.path
        self.directory, self.weights = found.directory, found.weights
        self.tensors = tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.config = config
        self.metadata = _agreed([header.metadata for header in headers.values()])
        self._identities = {file: header.identity for file, header in headers.items()}
        self._open: dict[Path, PositionedFile] = {}
        self._lock = threading.Lock()

    @property
    def paths(self) -> list[Path]:
        """What must not be written to."""
        return [self.path]

    @property
    def label(self) -> str:
        return str(self.path)

    def exact(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Elements [start, stop) in float64, where they are computed when they are read and `read` rounds them; None where
        it does not."""
        return None

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return sorted(self._identities)

    def sidecars(self) -> list[Path]:
        """The files of the folder that belong into a model merged from this one, sorted; never weights or an index."""
        if self.directory is None:
            return []
        with readable(self.directory):
            return layout.sidecars(self.directory)

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read elements [start, stop) of a tensor, in C order, as stored.

        out: uint8, 1-D, contiguous, of exactly their size in bytes; ValueError otherwise. KeyError for an unknown name;
        InputError if the file was changed or cut short since it was opened, or a BOOL is neither 0 nor 1.
        """
        tensor = self.tensors[name]
        size = itemsize(tensor.dtype)
        if not 0 <= start <= stop <= tensor.size:
            raise ValueError(f"[{start}, {stop}) is not within the {tensor.size} elements of {shown(name)}")
        if out.dtype != np.uint8 or out.shape != ((stop - start) * size,) or not out.flags.c_contiguous:
            raise ValueError(f"need {(stop - start) * size} contiguous bytes, got {out.dtype} of shape {out.shape}")
        if start == stop:
            return
        try:
            got = self._file(tensor.file).read_at(out.data, tensor.offset + start * size)
        except OSError as error:
            raise InputError(f"{shown(tensor.file)}: cannot read {shown(name)}: {error.strerror}") from error
        if got != out.size:
            raise InputError(
                f"{shown(tensor.file)}: ends within tensor {shown(name)}; it was cut short after it was opened"
            )
        if tensor.dtype == "BOOL" and out.max() > 1:
            raise InputError(f"{shown(tensor.file)}: tensor {shown(name)} is BOOL but holds bytes other than 0 and 1")

    def ahead(self, name: str, start: int, stop: int) -> None:
        """Say that elements [start, stop) will be read next, so that the system can fetch them meanwhile."""
        tensor = self.tensors[name]
        size = itemsize(tensor.dtype)
        self._file(tensor.file).will_read(tensor.offset + start * size, (min(stop, tensor.size) - start) * size)

    def kept_as(self, name: str) -> str:
        """The type in which a merge keeps this tensor, where nothing else is asked for: the one that it is stored in."""
        return self.tensors[name].dtype

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole tensor in its own dtype and shape."""
        tensor = self.tensors[name]
        try:
            raw = np.empty(tensor.nbytes, np.uint8)
        except MemoryError:
            raise ResourceError(f"not enough memory for the {tensor.nbytes} bytes of {shown(name)}") from None
        self.read(name, 0, tensor.size, raw)
        return raw.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"Checkpoint({shown(self.path)}, {len(self)} tensors, {self.nbytes} bytes)"

    # Two checkpoints are the same only if they are the same object: Mapping's comparison would read both whole.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def check_unchanged(self) -> None:
        """InputError if a file was replaced or rewritten since the checkpoint was opened."""
        for file, known in self._identities.items():
            try:
                now = identity(os.stat(file))
            except OSError as error:
                raise InputError(f"{shown(file)}: is gone since it was opened: {error.strerror}") from None
            if now != known:
                raise InputError(f"{shown(file)}: was changed since it was opened")

    def fingerprint(self) -> list[list[Any]]:
        """Path, size and time of each file, as they were when it was opened: what tells these files from others later."""
        return [[os.path.realpath(file), *known[2:]] for file, known in self._identities.items()]

    def close(self) -> None:
        """Close all files. Reading again opens them again, if they are still the same."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, path: Path) -> PositionedFile:
        file = self._open.get(path)
        if file is not None:
            return file
        with self._lock:
            if path not in self._open:
                file = open_regular(path)
                with readable(path):
                    now = identity(file.stat())
                if now != self._identities[path]:
                    file.close()
                    raise InputError(f"{shown(path)}: was changed since it was opened")
                self._open[path] = file
            return self._open[path]


def _agreed(metadata: list[dict[str, str]]) -> dict[str, str]:
    merged: dict[str, str] = {}
    disputed = set()
    for entries in metadata:
        for key, value in entries.items():
            if merged.setdefault(key, value) != value:
                disputed.add(key)
    return {key: merged[key] for key in sorted(merged) if key not in disputed}
