"""Writing checkpoints: sizes known beforehand, bytes by position, and a target that appears whole or not at all.

Everything is written beside the target under a hidden name, `.NAME.partial-<random>`, and renamed last. A killed
process leaves that name behind and never something that looks finished; with it a journal (journal.py), from which the same
merge goes on where that one stopped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import operator
import os
import shutil
import stat
import threading
import time
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
from refmerge.checkpoint.header import MAX_DIM, MAX_NAME, MAX_RANK, build_header
from refmerge.checkpoint.journal import Journal, beside, discard, stages, take_up
from refmerge.checkpoint.layout import INDEXES, PIPELINE, WEIGHTS, read_json
from refmerge.checkpoint.sizes import parse_size
from refmerge.errors import ResourceError, UsageError

__all__ = ["CheckpointWriter", "check_target", "parse_size", "refuse_input", "refuse_overlap", "same_or_inside", "save"]

_COPY_CHUNK = 1 << 22
_WRITEBACK = 1 << 23  # bytes of a file that are sent to the disk together
NOTE_SECONDS = 20.0  # between two lines of the journal: each waits for the disk
_GOES_ON = "--resume goes on from"


class CheckpointWriter:
    """Writes tensors of known types and shapes in any order and from several threads.

    target: a path ending in .safetensors gives one file, any other a folder in the Hub's layout: model.safetensors, or
    shards of at most `max_shard_size` bytes of tensors (more only where one tensor is larger) and their index.
    tensors: name -> (safetensors dtype, shape). metadata: strings for each file's header beside {"format": "pt"}.
    sidecars: files copied into the folder, or name there -> file. extra_files: name -> content, which wins over a sidecar of
    the same name and is looked at only by commit(), so that a report may be put there last. weights: the name of a folder's
    only file, after which those of several are called, too. For a pipeline of components it is component -> that name: the
    tensors of unet, `unet.<name>`, go into the folder unet without that beginning, and names of other files may be
    `unet/<name>`.
    overwrite: an existing target stays until the new one is complete, is then moved away, and removed last.
    merge: what decides every byte, part -> digest; a journal is then kept. resume: go on with the output of the same merge
    that an earlier run left, if there is one, and leave this one to be gone on with if it is interrupted. finished: the
    tensors that are there already, which reuse() takes as they are. made: the results that this one needs first which are
    there already, name -> fingerprint, or begun, None; on_the_way() says where others are to be written.

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
        sidecars: Sequence[Path] | Mapping[str, Path] = (),
        extra_files: Mapping[str, bytes] | None = None,
        weights: str | Mapping[str, str] = WEIGHTS,
        merge: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self._single = self.target.name.endswith(".safetensors")
        self._overwrite = overwrite
        named = sidecars.items() if isinstance(sidecars, Mapping) else [(Path(path).name, path) for path in sidecars]
        self._sidecars = [(name, Path(path)) for name, path in named]
        self._extra_files: Mapping[str, bytes] = {} if extra_files is None else extra_files
        if self._single and (self._sidecars or self._extra_files):
            raise UsageError(
                f"{shown(self.target)}: a single .safetensors file has no room for other files; give a folder"
            )
        check_target(self.target, overwrite)
        self._weights = {"": weights} if isinstance(weights, str) else dict(weights)
        self._check_names()
        self._merge, self._resume = merge, resume and merge is not None
        self._journal: Journal | None = None
        self._noted, self._note_lock = time.monotonic(), threading.Lock()
        if self._resume and merge is not None:
            with _disk(self.target):
                self._journal = take_up(self.target, merge)
        new = self.target.with_name(f".{self.target.name}.partial-{os.urandom(4).hex()}")
        self.partial = new if self._journal is None else self._journal.partial
        self.finished = frozenset(() if self._journal is None else self._journal.finished)
        self.made: dict[str, Any] = {} if self._journal is None else dict(self._journal.made)
        limit = parse_size(max_shard_size)
        sizes = _checked(tensors)
        self._shards: list[_Shard] = []
        for folder, only in self._weights.items():
            prefix = f"{folder}." if folder else ""
            of = {name: size for name, size in sizes.items() if name.startswith(prefix)}
            shards = [list(of)] if self._single else _split(of, limit)
            for file, names in zip(_file_names(len(shards), only), shards):
                part = {name: (tensors[name][0], tuple(map(operator.index, tensors[name][1]))) for name in names}
                path = self.partial if self._single else self.partial / folder / file
                self._shards.append(_Shard(path, part, {"format": "pt", **(metadata or {})}, prefix))
        self._home = {name: shard for shard in self._shards for name in shard.tensors}
        if homeless := sizes.keys() - self._home.keys():
            raise UsageError(f"tensor {shown(min(homeless))} is in none of the components {', '.join(self._weights)}")
        self._done = False
        self._made: list[Path] = []
        try:
            with _disk(self.target):
                self._prepare() if self._journal is None else self._continue()
        except BaseException:
            self.abort(keep=True)
            raise

    @property
    def paths(self) -> list[Path]:
        """The files of weights where they are now, before commit(); the same names, in the target, after it."""
        return [shard.path for shard in self._shards]

    def reuse(self, names: Iterable[str]) -> None:
        """Take these tensors, which are among `finished`, as written."""
        for name in names:
            self._home[name].reuse(name)

    def on_the_way(self, name: str) -> Path:
        """Where a result of this name belongs that this output needs first: it is removed with the partial output."""
        folder = stages(self.partial)
        with _disk(self.target):
            folder.mkdir(exist_ok=True)
        return folder / name

    def note_made(self, name: str, fingerprint: Any) -> None:
        """A result that this output needs first is in its place, wherever that is; or, None, is going to be there."""
        self.made[name] = fingerprint
        if self._journal is not None:
            with _disk(self.target):
                self._journal.note_made(name, fingerprint)

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
        if self._journal is not None and time.monotonic() - self._noted > NOTE_SECONDS:
            self._note()

    def _note(self) -> None:
        """Wait until the tensors finished since the last time are on the disk, and note them."""
        assert self._journal is not None
        with self._note_lock, _disk(self.target):
            self._noted = time.monotonic()
            names: list[str] = []
            for shard in self._shards:
                if new := shard.written - self._journal.finished:
                    shard.sync()
                    names += new
            if names:
                self._sync_directories()
                self._journal.note(names)

    def commit(self) -> None:
        """Put the complete checkpoint in its place; on any failure the target is as it was, and nothing is left beside it
        but what can be resumed, if that was asked for.

        ValueError if bytes are missing; UsageError if the target has come into being meanwhile.
        """
        if self._done:
            raise ValueError("the writer has been committed or aborted")
        try:
            with _disk(self.target):
                self._finish()
        except BaseException as error:
            self._fail(error)
            raise
        self._done = True

    def abort(self, *, keep: bool = False) -> None:
        """Remove everything written; or keep what the journal knows, for a run that resumes. Does nothing after commit()."""
        if self._done:
            return
        self._done = True
        if keep and self._journal is not None:
            with contextlib.suppress(ResourceError):
                self._note()
        for shard in self._shards:
            shard.close()
        if keep and self._journal is not None and self._journal.holds_something:
            self._journal.close()
            return
        discard(self.partial)
        if self._journal is not None:
            self._journal.close()
        if self._merge is not None:
            with contextlib.suppress(OSError):  # it may be there unknown: an interrupt comes between any two lines
                beside(self.partial).unlink()
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
            self._fail(error)

    def _fail(self, error: BaseException | None) -> None:
        """Abort; keep what is there if it was asked for and the error may be gone the next time."""
        passing = not isinstance(error, Exception) or isinstance(error, ResourceError | MemoryError | OSError)
        self.abort(keep=self._resume and passing)
        if self._resume and self._journal is not None and os.path.lexists(self.partial) and error is not None:
            count = len(self._journal.finished)
            kept = f"{count} tensors are kept, and --resume goes on from them"
            if not count:
                kept = "what was begun is kept, and --resume goes on from it"
            if not any(_GOES_ON in note for note in getattr(error, "__notes__", ())):  # a merge before this one said so
                error.add_note(kept)

    def _check_names(self) -> None:
        names = [name for name, _ in self._sidecars]
        for path in (*names, *self._extra_files):
            folder, slash, name = path.rpartition("/") if "" not in self._weights else ("", "", path)
            if name in ("", ".", "..") or any(c in name for c in "/\\\0") or (slash and not folder.isidentifier()):
                raise UsageError(f"{shown(path)} is not the name of a file in a folder")
            if name.endswith((".safetensors", INDEXES)) or names.count(path) > 1:
                raise UsageError(f"{shown(path)}: another file of this name may be in {shown(self.target)}")

    def _prepare(self) -> None:
        parent = self.target.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.insert(0, folder)
        self._check_room(sum(shard.file_size for shard in self._shards))
        if not self._single:
            self.partial.mkdir()
        for shard in self._shards:
            shard.path.parent.mkdir(exist_ok=True)
            shard.create()
        if self._merge is not None:
            self._journal = Journal.create(self.partial, self._merge)

    def _check_room(self, needed: int) -> None:
        needed += sum(_size(path) for _, path in self._sidecars)
        needed += needed // 100
        free = shutil.disk_usage(self.target.parent).free
        if free < needed:
            raise ResourceError(
                f"{shown(self.target)}: needs {needed} bytes, and {shown(self.target.parent)} has {free} free"
            )

    def _continue(self) -> None:
        """Check that what was left is what this merge would have laid out, and remove what it had begun to put beside it."""
        for shard in self._shards:
            shard.take_up()
        if not self._single:
            ours = {shard.path for shard in self._shards}
            for path in self.partial.rglob("*"):
                if path not in ours and not path.is_dir():
                    path.unlink()
        self._check_room(sum(shard.file_size - _allocated(shard.path) for shard in self._shards))

    def _finish(self) -> None:
        for shard in self._shards:
            shard.check_complete()
        for shard in self._shards:
            shard.sync()
        if not self._single:
            self._check_names()
            for name, path in self._sidecars:
                if name not in self._extra_files:
                    _copy(path, self._place(name))
            for name, content in self._extra_files.items():
                _write_file(self._place(name), content)
            for folder, only in self._weights.items():
                shards = [shard for shard in self._shards if shard.path.parent == self.partial / folder]
                if len(shards) > 1:
                    _write_file(self.partial / folder / f"{only}.index.json", _index(shards))
            self._sync_directories()
        check_target(self.target, self._overwrite)
        self._swap()
        discard(self.partial)  # what was needed first
        if self._journal is not None:
            self._journal.remove()
        sync_directory(self.target.parent)

    def _place(self, name: str) -> Path:
        path = self.partial / name
        path.parent.mkdir(exist_ok=True)
        return path

    def _sync_directories(self) -> None:
        if not self._single:
            for path in self.partial.iterdir():
                if path.is_dir():
                    sync_directory(path)
            sync_directory(self.partial)

    def _swap(self) -> None:
        if self._single or not os.path.lexists(self.target):
            os.replace(self.partial, self.target)
            return
        # There is no portable call that exchanges two folders: between these two lines the target is absent, not mixed.
        old = self.target.with_name(f".{self.target.name}.old-{os.urandom(4).hex()}")
        os.rename(self.target, old)
        try:
            os.rename(self.partial, self.target)
        except BaseException:
            os.rename(old, self.target)
            raise
        shutil.rmtree(old, ignore_errors=True)


class _Shard:
    """One file: preallocated, opened when first written to, and closed as soon as its last byte is there. prefix: what its
    tensors' names begin with, and do not in the file."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], prefix: str
    ) -> None:
        self.path = path
        if not all(isinstance(text, str) for entry in metadata.items() for text in entry):
            raise UsageError(f"{shown(path.name)}: metadata must map strings to strings")
        try:
            inner = {name.removeprefix(prefix): spec for name, spec in tensors.items()}
            self._header, infos = build_header(inner, metadata, path)
        except ValueError as error:
            raise UsageError(f"{shown(path.name)}: cannot be written: {error}") from None
        self.tensors = {prefix + name: tensor for name, tensor in infos.items()}
        self.written: set[str] = set()
        self._claimed = dict.fromkeys(self.tensors, 0)
        self._unwritten = {name: tensor.nbytes for name, tensor in self.tensors.items()}
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

    def take_up(self) -> None:
        """The file that an earlier run created; ResourceError if it is another one now."""
        file = open_for_writing(self.path)
        try:
            header = bytearray(len(self._header))
            file.read_at(memoryview(header), 0)
            if file.stat().st_size != self.file_size or header != self._header:
                raise ResourceError(
                    f"{shown(self.path)}: is not what its journal says; remove both, or leave --resume out to start anew"
                )
        finally:
            file.close()

    def reuse(self, name: str) -> None:
        self._claimed[name] = self.tensors[name].nbytes
        self._missing -= self.tensors[name].nbytes
        self._unwritten[name] = 0
        self.written.add(name)

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
            self._unwritten[name] -= nbytes
            if not self._unwritten[name]:
                self.written.add(name)
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


def check_target(target: str | os.PathLike[str], overwrite: bool) -> None:
    """UsageError for a path at which no checkpoint can be written: one that exists, unless a model may be overwritten there,
    and any link or special file. ResourceError where that cannot be seen."""
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UsageError(f"{shown(target)}: cannot be the target")
    with _disk(target):
        try:
            mode = os.lstat(target).st_mode
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.EIO:
                raise  # the disk's fault, and not the name's
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{shown(target)}: cannot be the target: {reason}") from None
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UsageError(f"{shown(target)}: is a link or a special file, which is never replaced")
        single = target.name.endswith(".safetensors")
        if stat.S_ISDIR(mode) == single:
            kinds = ("a folder", "a file") if single else ("a file", "a folder")
            raise UsageError(f"{shown(target)}: is {kinds[0]}, and the output would be {kinds[1]}")
        if not overwrite:
            raise UsageError(f"{shown(target)}: exists; overwrite=True (--overwrite) replaces it in the end")
        if not single:
            _check_replaceable(target)


def refuse_input(target: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """UsageError for an output that is one of the inputs or lies in one; ResourceError where that cannot be seen."""
    for path in inputs:
        with _disk(Path(target)):
            inside = same_or_inside(target, path)
        if inside:
            raise UsageError(f"output {str(target)!r} lies in an input, {str(path)!r}: inputs are never written to")


def refuse_overlap(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
    """UsageError for two outputs of which one is the other or lies in it; ResourceError where that cannot be seen."""
    with _disk(Path(one)):
        overlap = same_or_inside(one, other) or same_or_inside(other, one)
    if overlap:
        raise UsageError(f"outputs {str(one)!r} and {str(other)!r} are one, or one would lie in the other")


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
        if "\0" in name or name == "__metadata__" or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME:
            raise UsageError(f"tensor {shown(name)}: this cannot be a tensor's name")
        if len(shape) > MAX_RANK or not all(0 <= operator.index(dim) <= MAX_DIM for dim in shape):
            raise UsageError(f"tensor {shown(name)}: shape {tuple(shape)} cannot be stored")
        if math.prod(dim for dim in shape if dim) * itemsize(dtype) >= 1 << 63:
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


def _index(shards: Sequence[_Shard]) -> bytes:
    tensors = [(tensor, shard.path.name) for shard in shards for tensor in shard.tensors.values()]
    weight_map = {tensor.name: file for tensor, file in sorted(tensors, key=lambda pair: pair[0].name)}
    total = sum(tensor.nbytes for tensor, _ in tensors)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, ensure_ascii=False)
    return (text + "\n").encode("utf-8")


def _file_names(count: int, single: str) -> list[str]:
    stem = single.removesuffix(".safetensors")
    return [single] if count == 1 else [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _check_replaceable(folder: Path) -> None:
    """Overwriting removes a whole folder, so only one that plainly is a model's, with nothing below it but components."""
    files, folders = _entries(folder)
    if PIPELINE in files:
        components = read_json(folder / PIPELINE).keys()
        for name in [name for name in folders if name in components]:
            inner, deeper = _entries(folder / name)
            files += inner
            folders = [*(f for f in folders if f != name), *(f"{name}/{f}" for f in deeper)]
    if folders:
        raise UsageError(f"{shown(folder)}: has folders in it, which overwriting would remove; remove it yourself")
    if files and not any(name.endswith((".safetensors", INDEXES)) for name in files):
        raise UsageError(f"{shown(folder)}: holds no model, so it is not overwritten; remove it yourself")


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of files and of folders in a folder."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [entry.name for entry in entries if entry.name not in below], below


def _size(sidecar: Path) -> int:
    file = open_regular(sidecar)
    try:
        return file.stat().st_size
    finally:
        file.close()


def _allocated(path: Path) -> int:
    """Bytes of a file that need no more room on the disk."""
    status = os.stat(path)
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, 512 * blocks)


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
