"""Writing checkpoints: sizes known beforehand, bytes by position, and a target that appears whole or not at all.

Everything is written beside the target under a hidden name, `.NAME.partial-<random>`, and renamed last. A killed
process leaves that name behind and never something that looks finished.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from refmerge.checkpoint.dtypes import DTYPES, itemsize, name_of
from refmerge.checkpoint.files import (
    PositionedFile,
    create_exclusive,
    open_for_writing,
    open_regular,
    shown,
    sync_directory,
)
from refmerge.checkpoint.header import MAX_DIM, MAX_RANK, build_header
from refmerge.checkpoint.layout import INDEX, WEIGHTS
from refmerge.checkpoint.sizes import parse_size
from refmerge.errors import ResourceError, UsageError

__all__ = ["CheckpointWriter", "parse_size", "refuse_input", "same_or_inside", "save"]

_COPY_CHUNK = 1 << 22
_WRITEBACK = 1 << 23  # bytes of a file that are sent to the disk together


class CheckpointWriter:
    """Writes tensors of known types and shapes in any order and from several threads.

    target: a path ending in .safetensors gives one file, any other a folder in the Hub's layout: model.safetensors, or
    shards of at most `max_shard_size` bytes of tensors (more only where one tensor is larger) and their index.
    tensors: name -> (safetensors dtype, shape). metadata: strings for each file's header beside {"format": "pt"}.
    sidecars: files copied into the folder. extra_files: name -> content, which wins over a sidecar of the same name and
    is looked at only by commit(), so that a report may be put there last. weights: the name of a folder's only file.
    overwrite: an existing target stays until the new one is complete, is then moved away, and removed last.

    Raises UsageError for a target that exists or cannot be one, and for impossible tensors; ResourceError where the
    disk has no room or fails; InputError for a sidecar that cannot be read. The same arguments and bytes give the same
    files. As a context manager it commits at the end, and aborts on an exception; threads that write must have ended.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
        sidecars: Sequence[Path] = (),
        extra_files: Mapping[str, bytes] | None = None,
        weights: str = WEIGHTS,
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self._single = self.target.name.endswith(".safetensors")
        self._overwrite = overwrite
        self._sidecars = [Path(path) for path in sidecars]
        self._extra_files: Mapping[str, bytes] = {} if extra_files is None else extra_files
        if self._single and (self._sidecars or self._extra_files):
            raise UsageError(
                f"{shown(self.target)}: a single .safetensors file has no room for other files; give a folder"
            )
        with _disk(self.target):
            self._check_target()
        self._check_names()
        self.partial = self.target.with_name(f".{self.target.name}.partial-{secrets.token_hex(4)}")
        limit = parse_size(max_shard_size)
        sizes = _checked(tensors)
        shards = [list(sizes)] if self._single else _split(sizes, limit)
        self._shards: list[_Shard] = []
        for file, names in zip(_file_names(len(shards), weights), shards):
            part = {name: (tensors[name][0], tuple(map(operator.index, tensors[name][1]))) for name in names}
            path = self.partial if self._single else self.partial / file
            self._shards.append(_Shard(path, part, {"format": "pt", **(metadata or {})}))
        self._home = {name: shard for shard in self._shards for name in shard.tensors}
        self._done = False
        self._made: list[Path] = []
        try:
            with _disk(self.target):
                self._prepare()
        except BaseException:
            self.abort()
            raise

    @property
    def paths(self) -> list[Path]:
        """The files of weights where they are now, before commit(); the same names, in the target, after it."""
        return [shard.path for shard in self._shards]

    def write(self, name: str, start: int, raw: np.ndarray | memoryview | bytes) -> None:
        """Write stored bytes (uint8, contiguous, whole elements) of a tensor from element `start` on.

        Each byte is written once: ValueError for bytes outside the tensor, for more than it has, or after the end.
        KeyError for an unknown name; ResourceError where the disk is full, after which the writer can only be aborted.
        """
        nbytes = raw.nbytes if isinstance(raw, np.ndarray) else memoryview(raw).nbytes
        self._take_note(name, nbytes, lambda: self.put(name, start, raw))

    def put(self, name: str, start: int, raw: np.ndarray | memoryview | bytes) -> None:
        """As `write`, from any process that was forked from the writer's; it is for the writer's own to `record` it."""
        if self._done:
            raise ValueError("the writer has been committed or aborted")
        shard = self._home[name]
        data = raw.data if isinstance(raw, np.ndarray) else memoryview(raw)
        if data.nbytes:
            with _disk(self.target):
                shard.put(name, start, data.cast("B"))

    def record(self, name: str, start: int, count: int) -> None:
        """Take note of `count` elements from `start` on that have been put; commit() wants all of them, once."""
        self._take_note(name, count * itemsize(self._home[name].tensors[name].dtype), lambda: None)

    def _take_note(self, name: str, nbytes: int, put: Callable[[], None]) -> None:
        if self._done:
            raise ValueError("the writer has been committed or aborted")
        shard = self._home[name]
        if nbytes:
            shard.record(name, nbytes, put)

    def commit(self) -> None:
        """Put the complete checkpoint in its place; on any failure nothing is left and the target is as it was.

        ValueError if bytes are missing; UsageError if the target has come into being meanwhile.
        """
        if self._done:
            raise ValueError("the writer has been committed or aborted")
        try:
            with _disk(self.target):
                self._finish()
        except BaseException:
            self.abort()
            raise
        self._done = True

    def abort(self) -> None:
        """Remove everything written. Does nothing after commit()."""
        if self._done:
            return
        self._done = True
        for shard in self._shards:
            shard.close()
        _remove(self.partial)
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                folder.rmdir()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def _check_target(self) -> None:
        if not self.target.name:
            raise UsageError(f"{shown(self.target)}: cannot be the target")
        try:
            mode = os.lstat(self.target).st_mode
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{shown(self.target)}: cannot be the target: {reason}") from None
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UsageError(f"{shown(self.target)}: is a link or a special file, which is never replaced")
        if stat.S_ISDIR(mode) == self._single:
            kinds = ("a folder", "a file") if self._single else ("a file", "a folder")
            raise UsageError(f"{shown(self.target)}: is {kinds[0]}, and the output would be {kinds[1]}")
        if not self._overwrite:
            raise UsageError(f"{shown(self.target)}: exists; overwrite=True (--overwrite) replaces it in the end")
        if not self._single:
            _check_replaceable(self.target)

    def _check_names(self) -> None:
        names = [path.name for path in self._sidecars]
        for name in (*names, *self._extra_files):
            if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
                raise UsageError(f"{shown(name)} is not the name of a file in a folder")
            if name.endswith((".safetensors", INDEX)) or names.count(name) > 1:
                raise UsageError(f"{shown(name)}: another file of this name may be in {shown(self.target)}")

    def _prepare(self) -> None:
        parent = self.target.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.insert(0, folder)
        needed = sum(shard.file_size for shard in self._shards) + sum(map(_size, self._sidecars))
        needed += needed // 100
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ResourceError(f"{shown(self.target)}: needs {needed} bytes, and {shown(parent)} has {free} free")
        if not self._single:
            self.partial.mkdir()
        for shard in self._shards:
            shard.create()

    def _finish(self) -> None:
        for shard in self._shards:
            shard.check_complete()
        for shard in self._shards:
            shard.sync()
        if not self._single:
            self._check_names()
            for path in self._sidecars:
                if path.name not in self._extra_files:
                    _copy(path, self.partial / path.name)
            for name, content in self._extra_files.items():
                _write_file(self.partial / name, content)
            if len(self._shards) > 1:
                _write_file(self.partial / INDEX, self._index())
            sync_directory(self.partial)
        self._check_target()
        self._swap()
        sync_directory(self.target.parent)

    def _index(self) -> bytes:
        total = sum(tensor.nbytes for shard in self._shards for tensor in shard.tensors.values())
        weight_map = {name: shard.path.name for name, shard in sorted(self._home.items())}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, ensure_ascii=False)
        return (text + "\n").encode("utf-8")

    def _swap(self) -> None:
        if self._single or not os.path.lexists(self.target):
            os.replace(self.partial, self.target)
            return
        # There is no portable call that exchanges two folders: between these two lines the target is absent, not mixed.
        old = self.target.with_name(f".{self.target.name}.old-{secrets.token_hex(4)}")
        os.rename(self.target, old)
        try:
            os.rename(self.partial, self.target)
        except BaseException:
            os.rename(old, self.target)
            raise
        _remove(old)


class _Shard:
    """One file: preallocated, opened when first written to, and closed as soon as its last byte is there."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        if not all(isinstance(text, str) for entry in metadata.items() for text in entry):
            raise UsageError(f"{shown(path.name)}: metadata must map strings to strings")
        try:
            self._header, self.tensors = build_header(tensors, metadata, path)
        except ValueError as error:
            raise UsageError(f"{shown(path.name)}: cannot be written: {error}") from None
        self._claimed = dict.fromkeys(self.tensors, 0)
        self._missing = sum(tensor.nbytes for tensor in self.tensors.values())
        self.file_size = len(self._header) + self._missing
        self._file: PositionedFile | None = None
        self._lock = threading.Lock()

    def create(self) -> None:
        # Closed again: a large model in small shards has more of them than a process may have open files.
        file = create_exclusive(self.path)
        try:
            file.preallocate(self.file_size)
            file.write_at(memoryview(self._header), 0)
        finally:
            file.close()

    def put(self, name: str, start: int, data: memoryview) -> None:
        """Write elements from `start` on where they belong, and let the system begin to bring them to the disk."""
        tensor = self.tensors[name]
        size = itemsize(tensor.dtype)
        if len(data) % size or not 0 <= start * size <= tensor.nbytes - len(data):
            raise ValueError(
                f"{len(data)} bytes from element {start} are not elements of {shown(name)} of {tensor.shape}"
            )
        if tensor.dtype == "BOOL" and np.frombuffer(data, np.uint8).max() > 1:
            raise ValueError(f"{shown(name)} is BOOL; its bytes must be 0 or 1")
        with self._lock:
            if self._file is None:
                self._file = open_for_writing(self.path)
            file = self._file
        at = tensor.offset + start * size
        file.write_at(data, at)
        # Bytes mostly come in order: with the end of a piece, all of it is there.
        begun, reached = at // _WRITEBACK * _WRITEBACK, (at + len(data)) // _WRITEBACK * _WRITEBACK
        if reached > begun:
            file.begin_writing(begun, reached - begun)

    def record(self, name: str, nbytes: int, put: Callable[[], None]) -> None:
        """Count bytes of a tensor that `put` writes, or that have been put already."""
        # Claimed before and counted after the write: when nothing is missing, no other thread is still writing here.
        with self._lock:
            if self._claimed[name] + nbytes > self.tensors[name].nbytes:
                raise ValueError(f"{shown(name)}: bytes are written twice")
            self._claimed[name] += nbytes
        try:
            put()
        except ValueError:  # refused, and nothing written
            with self._lock:
                self._claimed[name] -= nbytes
            raise
        with self._lock:
            self._missing -= nbytes
            complete = not self._missing
        if complete:
            self.close()

    def sync(self) -> None:
        file = open_for_writing(self.path)
        try:
            file.sync()
        finally:
            file.close()

    def check_complete(self) -> None:
        short = [name for name, claimed in sorted(self._claimed.items()) if claimed != self.tensors[name].nbytes]
        if short or self._missing:
            some = ", ".join(map(shown, short[:5]))
            raise ValueError(f"{self._missing} bytes of {len(short)} tensors have not been written: {some}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def save(
    tensors: Mapping[str, np.ndarray],
    target: str | os.PathLike[str],
    **options: Any,
) -> None:
    """Write arrays of any strides, byte order and rank; `options` and errors are those of CheckpointWriter.

    InputError for a dtype that safetensors does not have.
    """
    plan = {name: (name_of(array.dtype), array.shape) for name, array in tensors.items()}
    with CheckpointWriter(target, plan, **options) as writer:
        for name, (dtype, _) in sorted(plan.items()):
            array = np.asarray(tensors[name], dtype=DTYPES[dtype], order="C")
            writer.write(name, 0, array.reshape(-1).view(np.uint8))


def same_or_inside(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Whether `target`, which need not exist, is `path` or lies in the folder `path`, links followed."""
    inner, outer = Path(os.path.realpath(target)), Path(os.path.realpath(path))
    # Existing ancestors are compared as files too: letter case and hard links hide identity from their names.
    return any(
        ancestor == outer or (ancestor.exists() and outer.exists() and ancestor.samefile(outer))
        for ancestor in (inner, *inner.parents)
    )


def refuse_input(target: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """UsageError for an output that is one of the inputs or lies in one."""
    for path in inputs:
        if same_or_inside(target, path):
            raise UsageError(f"output {str(target)!r} lies in an input, {str(path)!r}: inputs are never written to")


@contextlib.contextmanager
def _disk(target: Path) -> Iterator[None]:
    """A full, failing or forbidden disk is the user's to mend, not a defect of the program."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{shown(target)}: cannot be written: {error.strerror or error}") from error


def _checked(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Name -> bytes, sorted by name; UsageError for what our own reader would refuse."""
    sizes = {}
    for name, (dtype, shape) in sorted(tensors.items()):
        if dtype not in DTYPES:
            raise UsageError(f"tensor {shown(name)}: unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
        if "\0" in name or name == "__metadata__":
            raise UsageError(f"tensor {shown(name)}: this cannot be a tensor's name")
        if len(shape) > MAX_RANK or not all(0 <= operator.index(dim) <= MAX_DIM for dim in shape):
            raise UsageError(f"tensor {shown(name)}: shape {tuple(shape)} cannot be stored")
        sizes[name] = itemsize(dtype)
        for dim in shape:
            sizes[name] *= operator.index(dim)
    return sizes


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Fill shards with names in their order; at least one shard, if an empty one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _file_names(count: int, single: str) -> list[str]:
    return [single] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _check_replaceable(folder: Path) -> None:
    """Overwriting removes a whole folder, so only one that plainly is a model's, with nothing below it."""
    with os.scandir(folder) as scan:
        entries = list(scan)
    if any(entry.is_dir(follow_symlinks=False) for entry in entries):
        raise UsageError(f"{shown(folder)}: has folders in it, which overwriting would remove; remove it yourself")
    if entries and not any(entry.name.endswith((".safetensors", INDEX)) for entry in entries):
        raise UsageError(f"{shown(folder)}: holds no model, so it is not overwritten; remove it yourself")


def _size(sidecar: Path) -> int:
    file = open_regular(sidecar)
    try:
        return file.stat().st_size
    finally:
        file.close()


def _copy(source: Path, path: Path) -> None:
    reader = open_regular(source)
    writer = create_exclusive(path)
    try:
        buffer = memoryview(bytearray(_COPY_CHUNK))
        offset = 0
        while got := reader.read_at(buffer, offset):
            writer.write_at(buffer[:got], offset)
            offset += got
        writer.sync()
    finally:
        writer.close()
        reader.close()


def _write_file(path: Path, content: bytes) -> None:
    file = create_exclusive(path)
    try:
        file.write_at(memoryview(content), 0)
        file.sync()
    finally:
        file.close()


def _remove(path: Path) -> None:
    """Remove a file or folder of ours, as far as possible; failing at it must not hide why it is being removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
