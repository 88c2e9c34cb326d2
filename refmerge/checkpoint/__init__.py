"""Checkpoints on disk: strict reading, exact conversion, streaming and atomic writing of safetensors."""

from refmerge.checkpoint.dtypes import DTYPES, FLOATS, decode, encode, itemsize, name_of, promote
from refmerge.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint
from refmerge.checkpoint.sizes import parse_size
from refmerge.checkpoint.writer import (
    CheckpointWriter,
    check_target,
    refuse_input,
    refuse_overlap,
    same_or_inside,
    save,
)

__all__ = [
    "DTYPES",
    "FLOATS",
    "Checkpoint",
    "CheckpointWriter",
    "TensorInfo",
    "check_target",
    "decode",
    "encode",
    "itemsize",
    "name_of",
    "open_checkpoint",
    "parse_size",
    "promote",
    "refuse_input",
    "refuse_overlap",
    "same_or_inside",
    "save",
]
