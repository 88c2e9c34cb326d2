"""GGUF files, for reading: through the gguf package, quantised tensors as the float32 values that it makes of them.

The tensors keep GGUF's names and rows (its files of Llama models have the rows of q and k in another order), so that GGUF
files can be merged with and compared to each other, and the result is a safetensors file with these names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from refmerge.checkpoint.dtypes import itemsize
from refmerge.checkpoint.files import open_regular, readable, shown
from refmerge.checkpoint.header import MAX_DIM, MAX_TENSORS, Header, TensorInfo, identity
from refmerge.checkpoint.layout import Layout
from refmerge.checkpoint.reader import Checkpoint
from refmerge.errors import InputError, UsageError

__all__ = ["Gguf", "open_gguf"]

_PLAIN = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16", "I64": "I64", "I32": "I32", "I16": "I16", "I8": "I8"}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. UsageError without the gguf package; InputError for what it cannot read."""
    try:
        import gguf
    except ImportError:
        raise UsageError(f"{shown(path)}: GGUF files are read by the gguf package: pip install 'refmerge[gguf]'") from None
    opened = open_regular(path)
    with readable(path):
        header = Header((), {}, identity(opened.stat()))
    opened.close()
    try:
        found = gguf.GGUFReader(path).tensors
    except Exception as error:  # the reader checks little, and raises whatever it stumbles over
        raise InputError(f"{shown(path)}: not a GGUF file: {type(error).__name__}: {shown(error)}") from None
    if len(found) > MAX_TENSORS:
        raise InputError(f"{shown(path)}: {len(found)} tensors; at most {MAX_TENSORS} are accepted")
    tensors, arrays = {}, {}
    for t in found:
        shape = tuple(int(dim) for dim in reversed(t.shape))  # GGUF counts from the last axis
        plain = _PLAIN.get(t.tensor_type.name)
        if t.name in tensors or any(dim > MAX_DIM for dim in shape):
            raise InputError(f"{shown(path)}: tensor {shown(t.name)} is there twice, or too large")
        if plain is None:
            _check(gguf, t, path)
        dtype = plain or "F32"
        info = TensorInfo(t.name, dtype, shape, path, int(t.data_offset), int(t.n_elements) * itemsize(dtype))
        tensors[t.name], arrays[t.name] = info, (t.data, None if plain else t.tensor_type)
    return Gguf(Layout(path, None, (path,)), {path: header}, dict(sorted(tensors.items())), None, arrays)


def _check(gguf: Any, tensor: Any, path: Path) -> None:
    """InputError for a type that the package cannot dequantise, which shows on nothing at all."""
    try:
        gguf.quants.dequantize(tensor.data[:0], tensor.tensor_type)
    except Exception as error:
        raise InputError(
            f"{shown(path)}: tensor {shown(tensor.name)} is of type {tensor.tensor_type.name}, which the gguf package does "
            f"not dequantise ({shown(error)})"
        ) from None


class Gguf(Checkpoint):
    """A GGUF file, mapped into memory by the gguf package. What is quantised is kept in bfloat16 where nothing else is asked
    for."""

    def __init__(self, *checkpoint: Any) -> None:
        *opened, self._arrays = checkpoint
        super().__init__(*opened)

    def fingerprint(self) -> list[list[Any]]:
        return [["gguf"], *super().fingerprint()]

    def kept_as(self, name: str) -> str:
        return self.tensors[name].dtype if self._arrays[name][1] is None else "BF16"

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        data, kind = self._arrays[name]
        if start == stop:
            return
        if kind is None:
            width = itemsize(self.tensors[name].dtype)
            out[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)[start * width : stop * width]
            return
        import gguf

        columns = self.tensors[name].shape[-1]
        first, last = start // columns, -(-stop // columns)
        rows = gguf.quants.dequantize(data.reshape(-1, data.shape[-1])[first:last], kind)
        flat = np.ascontiguousarray(rows, np.float32).reshape(-1)
        out[:] = flat[start - first * columns : stop - first * columns].view(np.uint8)

    def ahead(self, name: str, start: int, stop: int) -> None:
        pass
