"""Checkpoints in 8-bit floats with scales: their values are computed where they are read, in float32, rounded once.

A weight `w` in F8_E4M3 or F8_E5M2 has a partner: `w_scale_inv` with a scale for each block of 128 by 128 entries, as
DeepSeek and Qwen publish them, or `w_scale`, one for all, for each row or for each block, as compressed-tensors and vLLM's
FP8 have it, or `scale_weight` beside `weight`, as in scaled image models. All of them multiply. A merge of such a model has
no 8-bit weights any more: it is kept in the float type that its config names, else in bfloat16, unless another is asked
for, and its config says nothing of quantisation.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np

from refmerge.checkpoint.dtypes import DTYPES, FLOATS, WORDS, decode, itemsize
from refmerge.checkpoint.files import shown
from refmerge.checkpoint.header import TensorInfo
from refmerge.checkpoint.pipeline import Pipeline
from refmerge.checkpoint.reader import Checkpoint
from refmerge.errors import InputError

__all__ = ["Scaled", "as_values"]

_EIGHT = ("F8_E4M3", "F8_E5M2")
_STATIC = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale", ".scale_input")
# What says that weights are packed in a way that only its own library can undo: ending of a name -> format.
_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    "_blocks": "MXFP4",
    ".weight_scale_2": "NVFP4",
}


def as_values(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or a view of it in which 8-bit weights are multiplied by their scales.

    InputError for a scale that does not fit its weight, and for weights that are packed in another way.
    """
    if checkpoint.rewritten:
        return checkpoint
    if isinstance(checkpoint, Pipeline):
        return checkpoint.through(as_values)
    tensors = checkpoint.tensors
    for ending, tool in _PACKED.items():
        found = next((n for n, t in tensors.items() if n.endswith(ending) and t.dtype not in FLOATS), None)
        if found is None and ending == ".weight_scale_2":
            found = next((n for n in tensors if n.endswith(ending)), None)
        if found is not None and (ending != "_blocks" or found.removesuffix("_blocks") + "_scales" in tensors):
            raise InputError(
                f"{shown(checkpoint.path)}: tensor {shown(found)} is of {tool}, whose packed weights are no numbers that "
                "could be merged: merge the models they were made from, or undo it with that tool first"
            )
    scales: dict[str, str] = {}
    for name, t in tensors.items():
        if t.dtype in _EIGHT:
            head = name.removesuffix("weight")
            partners = [f"{name}_scale_inv", f"{name}_scale", *([f"{head}scale_weight"] if head != name else [])]
            present = [p for p in partners if p in tensors]
            if len(present) > 1:
                raise InputError(f"{shown(checkpoint.path)}: tensor {shown(name)} has several scales: {', '.join(present)}")
            if present:
                scales[name] = present[0]
    return Scaled(checkpoint, scales) if scales else checkpoint


class Scaled(Checkpoint):
    """A view of an open checkpoint with scales: its weights as F32, without the scales. It shares the checkpoint's files.

    scales: weight -> its scale. config: that of the checkpoint, without what it says of quantisation.
    """

    def __init__(self, of: Checkpoint, scales: dict[str, str]) -> None:
        self.__dict__.update(of.__dict__)
        self._of, self.scales, self.rewritten = of, scales, True
        quantisation = (of.config or {}).get("quantization_config") or {}
        self.config = None if of.config is None else {k: v for k, v in of.config.items() if k != "quantization_config"}
        word = str((of.config or {}).get("torch_dtype") or (of.config or {}).get("dtype")).removeprefix("torch.")
        self._kept = WORDS[word] if WORDS.get(word) in ("BF16", "F16", "F32") else "BF16"
        blocks = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
        self._blocks = {n: self._block(n, blocks) for n in scales}
        gone = {*scales.values(), *(n for n in of.tensors if n.endswith(_STATIC)), *({"scaled_fp8"} & of.tensors.keys())}
        kinds = {n: replace(t, dtype="F32", nbytes=4 * t.size) for n, t in of.tensors.items() if n in scales}
        self.tensors: dict[str, TensorInfo] = {n: kinds.get(n, t) for n, t in of.tensors.items() if n not in gone}
        self.nbytes = sum(t.nbytes for t in self.tensors.values())
        word = DTYPES[self._kept].name
        self.note = f"{shown(of.path)} has {len(scales)} tensors in 8 bits with scales: read in float32, kept in {word}"
        if static := sorted(gone - {*scales.values(), "scaled_fp8"}):
            warnings.warn(
                f"{shown(of.path)}: {len(static)} scales of activations ({shown(static[0])}, ...) are left out: they belong "
                "to 8-bit weights, and the result has none",
                stacklevel=2,
            )

    def kept_as(self, name: str) -> str:
        return self._kept if name in self.scales else self._of.kept_as(name)

    def fingerprint(self) -> list[list[Any]]:
        return [["scaled"], *self._of.fingerprint()]

    def _block(self, name: str, said: Any) -> tuple[int, int]:
        """Rows and columns over which a scale holds, of the tensor as rows of its last axis."""
        weight, scale = self._of.tensors[name], self._of.tensors[self.scales[name]]

        def fail() -> InputError:
            return InputError(
                f"{shown(self._of.path)}: scale {shown(scale.name)} of shape {list(scale.shape)} fits no blocks of "
                f"{shown(name)} of shape {list(weight.shape)}"
            )

        if scale.dtype not in FLOATS or scale.dtype in _EIGHT:
            raise InputError(f"{shown(self._of.path)}: scale {shown(scale.name)} is of dtype {scale.dtype}")
        rows, columns = math.prod(weight.shape[:-1]), weight.shape[-1] if weight.shape else 1
        if scale.size == 1:
            return max(rows, 1), max(columns, 1)
        if len(weight.shape) < 2 or weight.size == 0:
            raise fail()
        if scale.shape in (weight.shape[:-1], (*weight.shape[:-1], 1)):
            return 1, columns
        if len(scale.shape) != len(weight.shape) or scale.shape[:-2] != weight.shape[:-2]:
            raise fail()
        sizes = []
        for axis, (length, count) in enumerate(zip(weight.shape[-2:], scale.shape[-2:])):
            size = said[axis] if isinstance(said, list) and len(said) == 2 else 128
            if type(size) is not int or size < 1 or -(-length // size) != count:
                size = length // count if count and length % count == 0 else 0
            if not size:
                raise fail()
            sizes.append(size)
        if len(weight.shape) > 2 and weight.shape[-2] % sizes[0]:
            raise fail()  # rows of two matrices would share a block
        return sizes[0], sizes[1]

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        if name not in self.scales:
            self._of.read(name, start, stop, out)
            return
        t = self._of.tensors[name]
        raw = np.empty((stop - start) * itemsize(t.dtype), np.uint8)
        self._of.read(name, start, stop, raw)
        values = np.empty(stop - start, np.float32)
        decode(raw, t.dtype, values)
        self._multiply(name, start, stop, values)
        out.view(np.float32)[:] = values

    def _multiply(self, name: str, start: int, stop: int, values: np.ndarray) -> None:
        """Multiply elements [start, stop), in float32, each by the scale of its block."""
        t, scale = self._of.tensors[name], self._of.tensors[self.scales[name]]
        down, across = self._blocks[name]
        if start == stop:
            return
        columns = t.shape[-1] if t.shape else 1
        per_row = -(-columns // across)  # scales
        first, last = start // columns, (stop - 1) // columns
        top, bottom = first // down, last // down + 1
        raw = np.empty((bottom - top) * per_row * itemsize(scale.dtype), np.uint8)
        self._of.read(scale.name, top * per_row, bottom * per_row, raw)
        wide = np.empty((bottom - top) * per_row, np.float64)
        decode(raw, scale.dtype, wide)
        scales = wide.astype(np.float32).reshape(-1, per_row)
        at = start
        with np.errstate(all="ignore"):  # what becomes infinite is found where all values are looked at
            while at < stop:  # a broken row, all whole rows, a broken row
                row, column = divmod(at, columns)
                whole = (stop - at) // columns if column == 0 else 0
                end = at + (whole * columns if whole else min(columns - column, stop - at))
                rows = np.arange(row, row + max(whole, 1)) // down - top
                width = columns if whole else end - at
                factors = np.repeat(scales[rows], across, axis=1)[:, column : column + width]
                values[at - start : end - start].reshape(-1, width)[:] *= factors
                at = end

    def ahead(self, name: str, start: int, stop: int) -> None:
        self._of.ahead(name, start, stop)
