"""The header of a safetensors file: strict on the way in, canonical on the way out.

The safetensors package checks a header first. This module then refuses what that parser lets pass (a name that appears
twice, fields it does not know, limits that NumPy has), so that two programs cannot read two models from one file.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import safe_open

from refmerge.checkpoint.dtypes import DTYPES, itemsize
from refmerge.checkpoint.files import PositionedFile, open_regular, shown
from refmerge.errors import InputError

MAX_HEADER = 25_000_000  # bytes; the Hub's own limit
MAX_TENSORS = 100_000
MAX_RANK = 32
MAX_DIM = 1 << 48
MAX_NAME = 1024  # bytes of a tensor's name
LARGE = 1 << 20  # bytes of a header whose parsing takes memory to speak of

_RANKS = {name: rank for rank, name in enumerate(DTYPES)}
_SIZES = {name: itemsize(name) for name in DTYPES}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at the absolute `offset` of `file`; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself; `identity` tells whether the name still means the same, unchanged file."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    identity: tuple[int, ...]


def strict_json(data: bytes | bytearray, *, floats: bool, made_of: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse JSON; ValueError for bad UTF-8, a repeated key, and too deep nesting.

    Without `floats` also for numbers that are not integers; NaN and Infinity are taken for floats, as Python does.
    made_of: what is to stand in place of an object, called with each when it is parsed, the inner ones first.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"key {shown(repeated)} appears twice")
        return found if made_of is None else made_of(found)

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"number {shown(text)} is not an integer")

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=float if floats else refuse,
            parse_float=float if floats else refuse,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; InputError naming the file and the reason."""
    file = open_regular(path)
    try:
        status = file.stat()
        prefix = bytearray(8)
        if file.read_at(memoryview(prefix), 0) < 8:
            raise ValueError("shorter than the 8 bytes of a header's length")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER:
            raise ValueError(f"header of {length} bytes; at most {MAX_HEADER} are accepted")
        text = _text(file, length)
        if not text.startswith(b"{"):
            raise ValueError("header does not begin with '{'")
        # Before any parser builds objects from it; a name in JSON cannot hold these bytes with both quotes unescaped.
        if text.count(b'"data_offsets"') > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        if length < LARGE:
            _check_with_safetensors(path)
        else:  # that takes ten times the header's size: nothing of ours beside it, and none of it beside ours
            del text
            _check_with_safetensors(path)
            _give_back()
            text = _text(file, length)
        tensors, metadata = _parse(text, path, status.st_size)
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{shown(path)}: not a valid safetensors file: {error}") from None
    finally:
        file.close()
    return Header(tensors, metadata, identity(status))


def _text(file: PositionedFile, length: int) -> bytearray:
    text = bytearray(length)
    if file.read_at(memoryview(text), 8) < length:
        raise ValueError(f"ends within its header of {length} bytes")
    return text


def identity(status: Any) -> tuple[int, ...]:
    """What stays the same of a file as long as nobody replaces or rewrites it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _give_back() -> None:
    """Let glibc give back to the system what was freed: it keeps the many small pieces that a parser has used."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc


def _check_with_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="np"):
            pass
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the crate is not an Exception
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(shown(reason)[1:-1] or type(error).__name__) from None


def _parse(text: bytearray, path: Path, file_size: int) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most tensors of a model share theirs

    def compact(found: dict[str, Any]) -> Any:
        """An object's span, where that is what it says; the errors of others are for those who know its name."""
        try:
            dtype, shape, begin, nbytes = _span(found)
        except ValueError:
            return found
        return dtype, shapes.setdefault(shape, shape), begin, nbytes

    header = strict_json(text, floats=False, made_of=compact if len(text) >= LARGE else None)
    if isinstance(header, tuple):
        raise ValueError("the header is that of one tensor, without a name")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ does not map strings to strings")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors; at most {MAX_TENSORS} are accepted")
    start = 8 + len(text)
    tensors = []
    while header:  # each goes as the other comes
        name, fields = header.popitem()
        tensors.append(_tensor(name, fields, path, start))
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise ValueError(f"tensor {shown(tensor.name)} does not begin where the one before it ends")
        end += tensor.nbytes
    if end != file_size:
        raise ValueError(f"{file_size} bytes, but the header accounts for {end}")
    return tuple(tensors), metadata


def _tensor(name: str, fields: Any, path: Path, start: int) -> TensorInfo:
    try:
        if "\0" in name:
            raise ValueError("a name may not hold NUL")
        # A ValueError, too, for a lone surrogate, which JSON can spell and UTF-8 cannot.
        if len(name.encode("utf-8")) > MAX_NAME:
            raise ValueError(f"a name of more than {MAX_NAME} bytes")
        dtype, shape, begin, nbytes = fields if isinstance(fields, tuple) else _span(fields)
    except ValueError as error:
        raise ValueError(f"tensor {shown(name)}: {error}") from None
    return TensorInfo(name, dtype, shape, path, start + begin, nbytes)


def _span(fields: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and size of a tensor. ValueError for fields that do not say these, or not consistently."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("needs exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {shown(dtype)} is not supported")
    # True is an int to Python, hence the exact type.
    if not isinstance(shape, list) or not all(type(dim) is int and 0 <= dim <= MAX_DIM for dim in shape):
        raise ValueError(f"shape must be a list of integers from 0 to {MAX_DIM}")
    if len(shape) > MAX_RANK:
        raise ValueError(f"{len(shape)} dimensions; at most {MAX_RANK} are accepted")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(x) is int and x >= 0 for x in offsets):
        raise ValueError("data_offsets must be two integers")
    size = _SIZES[dtype]
    nbytes = math.prod(shape) * size
    if (nbytes or math.prod(filter(None, shape)) * size) >= 1 << 63:
        raise ValueError("dimensions whose product no array has, be it that another one is 0")
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"data_offsets {offsets} do not span the {nbytes} bytes of its shape and dtype")
    return sys.intern(dtype), tuple(shape), offsets[0], nbytes


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], path: Path
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The bytes of a file up to its first tensor, and where in `path` each tensor will lie.

    Canonical: one order of tensors (that of the safetensors crate, which keeps each aligned to its own element size),
    metadata sorted by key, padded with spaces to 8 bytes. ValueError where our own reader would refuse the result.
    """
    order = sorted(tensors, key=lambda name: (_RANKS[tensors[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * itemsize(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(order) > MAX_TENSORS or len(text) > MAX_HEADER:
        raise ValueError(f"{len(order)} tensors with a header of {len(text)} bytes are too many for one file")
    start = 8 + len(text)
    infos = {}
    for name in order:
        begin, end = header[name]["data_offsets"]
        infos[name] = TensorInfo(name, *tensors[name], path, start + begin, end - begin)
    return struct.pack("<Q", len(text)) + text, infos
