"""Where blocks come from and go to: arrays in memory of any library, or checkpoints on disk through a backend."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_api_compat import is_numpy_array, is_torch_array

from refmerge.checkpoint import Checkpoint, CheckpointWriter, decode, encode, itemsize
from refmerge.checkpoint.dtypes import DTYPES, FLOATS, WORDS
from refmerge.checkpoint.dtypes import finite as finite_bytes
from refmerge.checkpoint.pipeline import part_of
from refmerge.errors import InputError
from refmerge.fused import Lazy, leaf, store, support
from refmerge.native import Rounded
from refmerge.numeric import array_namespace, host

_WORDS = {name: word for word, name in WORDS.items()}


def dtype_name(x: Any, name: str) -> str:
    """The safetensors name of the dtype of tensor `name`. InputError where there is none."""
    word = str(x.dtype).rpartition(".")[2]
    if word not in WORDS:
        raise InputError(f"tensor {name!r} is of dtype {x.dtype}, which cannot be merged (known: {', '.join(WORDS)})")
    return WORDS[word]


def stored_bytes(x: Any, dtype: str) -> np.ndarray:
    """A whole array of any library as the bytes of a tensor of this safetensors dtype; floats are rounded once."""
    flat = np.ascontiguousarray(host(x)).reshape(-1)
    if dtype not in FLOATS:
        return flat.view(np.uint8)
    raw = np.empty(flat.size * itemsize(dtype), dtype=np.uint8)
    encode(flat, dtype, raw)
    return raw


def rounded(x: Any, dtype: str) -> np.ndarray:
    """A whole array in this safetensors dtype; floats are rounded once."""
    return stored_bytes(x, dtype).view(DTYPES[dtype]).reshape(tuple(x.shape))


def all_finite(x: Any) -> bool:
    """Whether no element of an array of any library is infinite or NaN."""
    x = x.values if isinstance(x, Rounded) else x
    if isinstance(x, np.ndarray) and x.flags.c_contiguous:
        return finite_bytes(x.reshape(-1).view(np.uint8), dtype_name(x, ""))
    xp = array_namespace(x)
    if math.prod(x.shape) == 0:
        return True
    # A sum tells at a tenth of the price, unless it overflows.
    with np.errstate(all="ignore"):
        return math.isfinite(float(xp.sum(x))) or bool(xp.all(xp.isfinite(x)))


def _finite(raw: np.ndarray, dtype: str, compiled: bool) -> bool:
    found = support.finite(raw, dtype) if compiled else None
    return finite_bytes(raw, dtype) if found is None else found


class NotFinite(Exception):
    """A value that is infinite or NaN where none may be; whoever catches it says where."""


class Scratch:
    """One thread's buffers, reused from block to block: fresh pages cost as much as the arithmetic.

    `with Scratch(backend)` around a thread's blocks gives it the backend's lane, and raw buffers of the backend's own host
    memory, where it has these (backends/device.py).
    """

    def __init__(self, backend: Any = None) -> None:
        self._host = getattr(backend, "host", None)
        self._lane = getattr(backend, "lane", nullcontext)
        self._buffers: dict[Any, np.ndarray] = {}

    def __enter__(self) -> Scratch:
        self._entered = self._lane()
        self._entered.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.__exit__(*error)

    def raw(self, slot: Any, nbytes: int) -> np.ndarray:
        if self._host is None or not nbytes:
            return self._get(("raw", slot), nbytes, np.uint8)
        buffer = self._buffers.get(("raw", slot))
        if buffer is None or buffer.size < nbytes:  # pinning is slow: by doublings, so that it is soon over
            self._buffers.pop(("raw", slot), None)
            buffer = self._buffers["raw", slot] = self._host(1 << (nbytes - 1).bit_length())
        return buffer[:nbytes]

    def work(self, slot: Any, count: int, dtype: str) -> np.ndarray:
        return self._get(("work", slot, dtype), count, dtype)

    def release(self) -> None:
        """Let go of ordinary buffers where they are large: fresh pages cost nothing beside what takes whole tensors."""
        if self._host is None and sum(buffer.nbytes for buffer in self._buffers.values()) > KEPT:
            self._buffers.clear()

    def _get(self, key: Any, count: int, dtype: Any) -> np.ndarray:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < count:
            buffer = self._buffers[key] = np.empty(count, dtype=dtype)
        return buffer[:count]


WORK = ("float32", "float64")
PIECE = 1 << 22  # elements of a whole tensor that are read and widened at a time
KEPT = 64 << 20  # bytes of buffers that are kept from one block to the next
LAZY = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}  # what a lazy block may be stored as


def _numpy_block(x: np.ndarray, work: str) -> Any:
    """A block in its work dtype; a narrower one than float32 rounds after each operation."""
    return x.astype(work, copy=False) if work in WORK else Rounded(x.astype(np.float32, copy=False), np.dtype(work))


class Source(Protocol):
    """One model: its tensors' names, dtypes and shapes, and any stretch of elements as an array of the work dtype."""

    label: str

    def names(self) -> set[str]: ...
    def dtype(self, name: str) -> str: ...
    def stored(self, name: str) -> str:
        """The dtype as it is kept; `dtype` is the one as which it is read."""

    def shape(self, name: str) -> tuple[int, ...]: ...
    def load(
        self, name: str, start: int, stop: int, work: str, slot: Any, scratch: Scratch, *,
        finite: bool = False, lazy: bool = False,
    ) -> Any:
        """Elements [start, stop). NotFinite if `finite` is asked for and one is not. lazy: as they are stored, to be widened
        where they are used, if that can be."""

    def ahead(self, name: str, start: int, stop: int) -> None:
        """These elements will be asked for next."""

    def told(self, name: str) -> str:
        """The tensor as an error message speaks of it."""

    def same(self, other: Source, name: str, as_name: str | None = None) -> bool:
        """Whether both hold the same values of this tensor (in `other` under the name `as_name`), to the bit."""


class ArraySource:
    """A mapping name -> array; blocks are slices, in the arrays' own library and on their device."""

    def __init__(self, arrays: Mapping[str, Any], label: str) -> None:
        self._arrays, self.label = arrays, label
        self._flat: dict[str, Any] = {}

    def names(self) -> set[str]:
        return set(self._arrays)

    def dtype(self, name: str) -> str:
        return dtype_name(self._arrays[name], name)

    stored = dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def array(self, name: str) -> Any:
        return self._arrays[name]

    def flat(self, name: str) -> Any:
        if name not in self._flat:  # once a tensor: reshaping a transposed array copies it
            x = self._arrays[name]
            x = x.detach() if is_torch_array(x) else x
            self._flat[name] = array_namespace(x).reshape(x, (-1,))
        return self._flat[name]

    def load(
        self, name: str, start: int, stop: int, work: str, slot: Any, scratch: Scratch, *,
        finite: bool = False, lazy: bool = False,
    ) -> Any:
        flat = self.flat(name)[start:stop]
        if is_numpy_array(flat):
            flat.flags.writeable = False  # a method that computes in place fails before it changes its caller's array
            block = _numpy_block(flat, work)
        else:
            xp = array_namespace(flat)
            block = xp.astype(flat, getattr(xp, work), copy=False)
        if finite and not all_finite(block):
            raise NotFinite
        return block

    def ahead(self, name: str, start: int, stop: int) -> None:
        pass

    def told(self, name: str) -> str:
        return f"{self.label}: tensor {name!r}"

    def same(self, other: Source, name: str, as_name: str | None = None) -> bool:
        assert isinstance(other, ArraySource)
        a, b = self._arrays[name], other._arrays[as_name or name]
        return a.dtype == b.dtype and bool(array_namespace(a, b).all(a == b))


class ByteSource:
    """Raw bytes of tensors, decoded into a backend's arrays. `cast`: a dtype to which every value is rounded first. `files`:
    whether any process that was forked from this one can read them. `multiplies`: whether matrices are multiplied for it."""

    label: str
    files = False
    multiplies = False

    def __init__(self, backend: Any, cast: str | None = None) -> None:
        self._backend, self.cast = backend, cast

    def dtype(self, name: str) -> str:
        stored = self.stored(name)
        return self.cast if self.cast and stored in FLOATS else stored

    def load(
        self, name: str, start: int, stop: int, work: str, slot: Any, scratch: Scratch, *,
        finite: bool = False, lazy: bool = False,
    ) -> Any:
        count = stop - start
        if lazy or count <= PIECE or self._backend.name != "numpy":
            return self._piece(name, start, stop, work, slot, scratch, finite, lazy, None)
        out = scratch.work(slot, count, work if work in WORK else "float32")
        for at in range(start, stop, PIECE):
            end = min(at + PIECE, stop)
            self._piece(name, at, end, work, slot, scratch, finite, False, out[at - start : end - start])
        return _numpy_block(out, work)

    def _piece(
        self, name: str, start: int, stop: int, work: str, slot: Any, scratch: Scratch, finite: bool, lazy: bool,
        out: np.ndarray | None,
    ) -> Any:  # fmt: skip
        """The elements, in `out` where NumPy computes and it is given."""
        raw, stored = self.stretch(name, start, stop, work, slot, scratch)
        count = stop - start
        to = self.cast if self.cast and stored in FLOATS else stored
        if to == "F64" and work != "float64":
            to = "F32"  # rounded once, here: a backend only ever widens
        if stored not in FLOATS:  # masks and counts among the statistics
            wide = scratch.work((slot, "cast"), count, "float64")
            wide[:] = raw.view(DTYPES[stored])
            stored, raw, to = "F64", wide.view(np.uint8), "F64" if work == "float64" else "F32"
        if stored != to:
            wide = scratch.work((slot, "wide"), count, "float64" if stored == "F64" else "float32")
            decode(raw, stored, wide)
            raw = scratch.raw((slot, "cast"), count * itemsize(to))
            encode(wide, to, raw)
            stored = to
        on_device = hasattr(self._backend, "lane")  # then looking there is cheaper than one more pass over host memory
        if finite and not on_device and not _finite(raw, stored, lazy):
            raise NotFinite
        if self._backend.name != "numpy":
            x = self._backend.put(raw, stored, (count,), work)
            if finite and on_device and not all_finite(x):
                raise NotFinite
            return x
        if lazy and work == "float32" and stored in LAZY:
            return leaf(raw.view(LAZY[stored]), stored, (count,))
        at_least = work if work in WORK else "float32"
        out = scratch.work(slot, count, at_least) if out is None else out
        return _numpy_block(self._backend.put(raw, stored, (count,), at_least, out), work)

    def stretch(
        self, name: str, start: int, stop: int, work: str, slot: Any, scratch: Scratch
    ) -> tuple[np.ndarray, str]:
        """The bytes of elements [start, stop), and of what dtype they are."""
        stored = self.stored(name)
        raw = scratch.raw(slot, (stop - start) * itemsize(stored))
        self.read(name, start, stop, raw)
        return raw, stored

    def ahead(self, name: str, start: int, stop: int) -> None:
        pass

    def told(self, name: str) -> str:
        return f"{self.label}: tensor {name!r}"

    def same(self, other: Source, name: str, as_name: str | None = None) -> bool:
        assert isinstance(other, ByteSource)
        theirs = as_name or name
        if self.stored(name) != other.stored(theirs):
            return False
        size, width, step = math.prod(self.shape(name)), itemsize(self.stored(name)), 1 << 20
        for start in range(0, size, step):
            stop = min(start + step, size)
            a, b = (np.empty((stop - start) * width, dtype=np.uint8) for _ in range(2))
            self.read(name, start, stop, a)
            other.read(theirs, start, stop, b)
            if not np.array_equal(a, b):
                return False
        return True

    def origins(self, name: str) -> list[tuple[Checkpoint, str]]:
        """The tensors of checkpoints, by their names there, of which the values of this one are made."""
        raise NotImplementedError

    def rule(self, name: str) -> Any:
        """How they are made of those, in terms that JSON has."""
        return self.cast

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def stored(self, name: str) -> str:
        raise NotImplementedError

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        raise NotImplementedError


class DiskSource(ByteSource):
    """A checkpoint on disk, read in pieces. parts: of a pipeline, the components that are looked at; None is all."""

    files = True
    parts: Collection[str] | None = None

    def __init__(self, checkpoint: Checkpoint, backend: Any, cast: str | None = None) -> None:
        super().__init__(backend, cast)
        self.checkpoint, self.label = checkpoint, checkpoint.label

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        return self.checkpoint.multiplies

    def names(self) -> set[str]:
        names = self.checkpoint.tensors
        return set(names) if self.parts is None else {n for n in names if part_of(n) in self.parts}

    def origins(self, name: str) -> list[tuple[Checkpoint, str]]:
        return [(self.checkpoint, name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[name].shape

    def stored(self, name: str) -> str:
        return self.checkpoint.tensors[name].dtype

    def stretch(
        self, name: str, start: int, stop: int, work: str, slot: Any, scratch: Scratch
    ) -> tuple[np.ndarray, str]:
        exact = self.checkpoint.exact(name, start, stop)
        if exact is None:
            return super().stretch(name, start, stop, work, slot, scratch)
        # Rounded once: to what it is cast to, to the type of a native merge, or to that in which blocks are computed.
        kind = self.cast or {"float32": "F32", "float64": "F64"}.get(work) or self.stored(name)
        raw = scratch.raw((slot, "exact"), (stop - start) * itemsize(kind))
        encode(exact, kind, raw)
        return raw, kind

    def dtype(self, name: str) -> str:
        kept = self.checkpoint.kept_as(name)
        return self.cast if self.cast and kept in FLOATS else kept

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        self.checkpoint.read(name, start, stop, out)

    def ahead(self, name: str, start: int, stop: int) -> None:
        self.checkpoint.ahead(name, start, stop)


class StitchedSource(ByteSource):
    """Tensors of several sources under the names that they have in the result: layers of a slice, say.

    places: name -> the source, and the name that the tensor has there.
    """

    def __init__(self, places: Mapping[str, tuple[ByteSource, str]]) -> None:
        self.places = places
        self.label = " and ".join(dict.fromkeys(source.label for source, _ in places.values()))

    @property
    def files(self) -> bool:  # type: ignore[override]
        return all(source.files for source, _ in self.places.values())

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        return any(source.multiplies for source, _ in self.places.values())

    def names(self) -> set[str]:
        return set(self.places)

    def origins(self, name: str) -> list[tuple[Checkpoint, str]]:
        source, theirs = self.places[name]
        return source.origins(theirs)

    def rule(self, name: str) -> Any:
        source, theirs = self.places[name]
        return source.rule(theirs)

    def dtype(self, name: str) -> str:
        source, theirs = self.places[name]
        return source.dtype(theirs)

    def stored(self, name: str) -> str:
        source, theirs = self.places[name]
        return source.stored(theirs)

    def shape(self, name: str) -> tuple[int, ...]:
        source, theirs = self.places[name]
        return source.shape(theirs)

    def told(self, name: str) -> str:
        source, theirs = self.places[name]
        return source.told(theirs)

    def load(
        self, name: str, start: int, stop: int, work: str, slot: Any, scratch: Scratch, *,
        finite: bool = False, lazy: bool = False,
    ) -> Any:
        source, theirs = self.places[name]
        return source.load(theirs, start, stop, work, slot, scratch, finite=finite, lazy=lazy)

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        source, theirs = self.places[name]
        source.read(theirs, start, stop, out)

    def ahead(self, name: str, start: int, stop: int) -> None:
        source, theirs = self.places[name]
        source.ahead(theirs, start, stop)


class HostSource(ByteSource):
    """NumPy arrays that are to be merged by another backend."""

    def __init__(self, arrays: Mapping[str, np.ndarray], label: str, backend: Any) -> None:
        super().__init__(backend)
        self._arrays, self.label = arrays, label

    def names(self) -> set[str]:
        return set(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def stored(self, name: str) -> str:
        return dtype_name(self._arrays[name], name)

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = np.ascontiguousarray(self._arrays[name]).reshape(-1)[start:stop].view(np.uint8)


class Sink(Protocol):
    """Where results go. `write` may be called anywhere, in another process even; what has been written is then recorded
    where the merge is kept account of. folder: on whose disk they lie, None in memory."""

    folder: Path | None

    def write(self, name: str, start: int, block: Any, scratch: Scratch, *, finite: bool = False) -> None:
        """Keep a block, rounded to the result's dtype. NotFinite, and nothing kept, if `finite` is asked for and a value
        is not finite in that dtype."""

    def record(self, name: str, start: int, count: int) -> None: ...
    def copy(self, name: str, source: Source) -> None: ...


class ArraySink:
    """Results as arrays of the inputs' library, on their device, in the given dtypes."""

    folder: Path | None = None

    def __init__(self, specs: Mapping[str, tuple[str, tuple[int, ...]]], example: Any) -> None:
        from array_api_compat import device

        self._xp, self._device, self._specs = array_namespace(example), device(example), specs
        self._numpy = is_numpy_array(example)
        self.arrays: dict[str, Any] = {}
        for name, (dtype, shape) in specs.items():
            kind = DTYPES[dtype] if self._numpy else getattr(self._xp, _WORDS[dtype])
            place = {} if self._numpy else {"device": self._device}
            self.arrays[name] = self._xp.empty((math.prod(shape),), dtype=kind, **place)

    def zeros(self, count: int, dtype: str) -> Any:
        """Zeros where the results are."""
        return self._xp.zeros((count,), dtype=getattr(self._xp, dtype), device=self._device)

    def write(self, name: str, start: int, block: Any, scratch: Scratch, *, finite: bool = False) -> None:
        xp, out = self._xp, self.arrays[name]
        flat = xp.reshape(block, (-1,))
        stop = start + flat.shape[0]
        if self._numpy:
            view = out[start:stop].view(np.uint8)
            encode(np.ascontiguousarray(flat), self._specs[name][0], view)
            if finite and not finite_bytes(view, self._specs[name][0]):
                raise NotFinite
            return
        if is_torch_array(flat) and flat.dtype == xp.float64 and out.dtype.itemsize <= 2:
            # torch would round twice, to float32 on the way
            raw = np.empty(flat.shape[0] * out.dtype.itemsize, dtype=np.uint8)
            encode(host(flat), self._specs[name][0], raw)
            out.view(xp.uint8)[start * out.dtype.itemsize : stop * out.dtype.itemsize] = xp.asarray(raw, device=self._device)
        else:
            out[start:stop] = xp.astype(flat, out.dtype, copy=False)
        if finite and not all_finite(out[start:stop]):
            raise NotFinite

    def record(self, name: str, start: int, count: int) -> None:
        pass

    def copy(self, name: str, source: Source) -> None:
        assert isinstance(source, ArraySource)
        flat = self._xp.reshape(source.array(name), (-1,))
        self.arrays[name] = self._xp.asarray(flat, copy=True)

    def result(self) -> dict[str, Any]:
        return {name: self._xp.reshape(x, self._specs[name][1]) for name, x in self.arrays.items()}


class HostSink:
    """Results as NumPy arrays, taken from another backend's arrays."""

    folder: Path | None = None

    def __init__(self, specs: Mapping[str, tuple[str, tuple[int, ...]]], backend: Any) -> None:
        self._specs, self._backend = specs, backend
        self.arrays = {n: np.empty(math.prod(s) * itemsize(d), dtype=np.uint8) for n, (d, s) in specs.items()}

    def write(self, name: str, start: int, block: Any, scratch: Scratch, *, finite: bool = False) -> None:
        dtype, width = self._specs[name][0], itemsize(self._specs[name][0])
        count = math.prod(block.shape)
        raw = self.arrays[name][start * width : (start + count) * width]
        self._backend.take(block, dtype, raw)
        if finite and not finite_bytes(raw, dtype):
            raise NotFinite

    def record(self, name: str, start: int, count: int) -> None:
        pass

    def copy(self, name: str, source: Source) -> None:
        assert isinstance(source, ByteSource)
        source.read(name, 0, math.prod(self._specs[name][1]), self.arrays[name])

    def result(self) -> dict[str, np.ndarray]:
        return {n: x.view(DTYPES[self._specs[n][0]]).reshape(self._specs[n][1]) for n, x in self.arrays.items()}


class Writer(Protocol):
    """What takes the bytes of a checkpoint's tensors; see CheckpointWriter."""

    def put(self, name: str, start: int, raw: np.ndarray) -> None: ...
    def record(self, name: str, start: int, count: int) -> None: ...
    def write(self, name: str, start: int, raw: np.ndarray) -> None: ...


class DiskSink:
    """Results written where they belong in a checkpoint, in whatever order the blocks come."""

    def __init__(
        self, writer: Writer, specs: Mapping[str, tuple[str, tuple[int, ...]]], backend: Any, folder: Path | None = None
    ) -> None:
        self._writer, self._specs, self._backend, self.folder = writer, specs, backend, folder

    def write(self, name: str, start: int, block: Any, scratch: Scratch, *, finite: bool = False) -> None:
        dtype = self._specs[name][0]
        raw = scratch.raw("out", math.prod(block.shape) * itemsize(dtype))
        if not (type(block) is Lazy and store(block, dtype, raw)):
            self._backend.take(block, dtype, raw)
        if finite and not _finite(raw, dtype, type(block) is Lazy):
            raise NotFinite
        self._writer.put(name, start, raw)

    def written(self, name: str, count: int, work: str, scratch: Scratch, lazy: bool) -> Any:
        """The block of so many elements that was written last with this scratch, as it is in the file, in the work dtype."""
        dtype = self._specs[name][0]
        raw = scratch.raw("out", count * itemsize(dtype))
        if lazy and work == "float32" and dtype in LAZY:
            return leaf(raw.view(LAZY[dtype]), dtype, (count,))
        if self._backend.name != "numpy":
            return self._backend.put(raw, dtype, (count,), work)
        return self._backend.put(raw, dtype, (count,), work, scratch.work("written", count, work))

    def record(self, name: str, start: int, count: int) -> None:
        self._writer.record(name, start, count)

    def copy(self, name: str, source: Source) -> None:
        assert isinstance(source, ByteSource)
        dtype, shape = self._specs[name]
        size, step = math.prod(shape), 1 << 20
        for start in range(0, size, step):
            stop = min(start + step, size)
            raw = np.empty((stop - start) * itemsize(dtype), dtype=np.uint8)
            source.read(name, start, stop, raw)
            self._writer.write(name, start, raw)


class StagedSink:
    """Arrays in memory to a file: each block goes through an ArraySink's rounding of one tensor at a time."""

    def __init__(self, writer: CheckpointWriter, specs: Mapping[str, tuple[str, tuple[int, ...]]], example: Any) -> None:
        self._writer, self._specs, self._example, self.folder = writer, specs, example, writer.target.parent

    def _bytes(self, x: Any) -> np.ndarray:
        if is_torch_array(x):
            import torch

            return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        x = x.get() if hasattr(x, "get") else np.asarray(x)
        return np.ascontiguousarray(x).reshape(-1).view(np.uint8)

    def write(self, name: str, start: int, block: Any, scratch: Any, *, finite: bool = False) -> None:
        sink = ArraySink({name: (self._specs[name][0], (math.prod(block.shape),))}, self._example)
        sink.write(name, 0, block, scratch, finite=finite)
        self._writer.put(name, start, self._bytes(sink.arrays[name]))

    def record(self, name: str, start: int, count: int) -> None:
        self._writer.record(name, start, count)

    def copy(self, name: str, source: Any) -> None:
        raw = self._bytes(source.array(name))
        if raw.size:
            self._writer.write(name, 0, raw)
