"""Checkpoints that torch pickled: opened only where that is allowed, and then only as torch's weights_only reads them.

A pickle is a program. torch's restricted reader runs none of what a file may name but what makes tensors; that is as far as
trust in such a file can go, and conversion to safetensors ends the question.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.checkpoint import layout
from refmerge.checkpoint.dtypes import WORDS, itemsize
from refmerge.checkpoint.files import open_regular, readable, shown
from refmerge.checkpoint.header import Header, TensorInfo, identity
from refmerge.checkpoint.reader import Checkpoint
from refmerge.errors import InputError, UsageError

__all__ = ["Pickled", "is_pickled", "open_pickled"]

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WITHIN = "state_dict"  # where trainers put the weights beside what else they save


def is_pickled(path: Path) -> bool:
    """Whether it is a pickled file, or a folder whose weights are pickled alone."""
    if not path.is_dir():
        return path.name.endswith((*SUFFIXES, _INDEX))
    names = os.listdir(path)
    return not any(n.endswith(".safetensors") for n in names) and any(n.endswith((*SUFFIXES, _INDEX)) for n in names)


def open_pickled(path: Path) -> Checkpoint:
    """Open pickled weights with torch. InputError for what its restricted reader refuses, and for what are no weights."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UsageError(f"{shown(path)}: pickled weights are read by PyTorch: pip install 'refmerge[torch]'") from None
    found = _locate(path)
    arrays: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    headers = {}
    for file in found.files:
        opened = open_regular(file)
        with readable(file):
            headers[file] = Header((), {}, identity(opened.stat()))
        opened.close()
        for name, tensor in _load(file).items():
            if name in tensors:
                raise InputError(f"{shown(path)}: tensor {shown(name)} is in two files")
            arrays[name], tensors[name] = tensor, _info(file, name, tensor)
    for name, file in (found.weight_map or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(f"{shown(path)}: tensor {shown(name)} is listed in the index but not in {shown(file.name)}")
    return Pickled(found, headers, dict(sorted(tensors.items())), layout.config(found.directory), arrays)


class Pickled(Checkpoint):
    """Weights that torch has read, mapped into memory where their format can be."""

    def __init__(self, *checkpoint: Any) -> None:
        *opened, self._arrays = checkpoint
        super().__init__(*opened)

    def fingerprint(self) -> list[list[Any]]:
        return [["pickled"], *super().fingerprint()]

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        import torch

        flat = self._arrays[name].reshape(-1)[start:stop]
        out[:] = flat.contiguous().view(torch.uint8).numpy()

    def ahead(self, name: str, start: int, stop: int) -> None:
        pass


def _locate(path: Path) -> layout.Layout:
    if not path.is_dir():
        return _indexed(path, path) if path.name.endswith(_INDEX) else layout.Layout(path, None, (path,))
    names = sorted(os.listdir(path))
    if _INDEX in names:
        return _indexed(path, path / _INDEX)
    found = [n for n in names if n.endswith(SUFFIXES) and n != "training_args.bin"]
    if _SINGLE not in found and len(found) != 1:
        raise InputError(f"{shown(path)}: {len(found)} pickled files, and no {_INDEX} to say what belongs")
    single = path / (_SINGLE if _SINGLE in found else found[0])
    return layout.Layout(path, path, (layout.contained(single, path),))


def _indexed(path: Path, index: Path) -> layout.Layout:
    folder = index.parent
    weight_map = layout.read_json(layout.contained(index, folder)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{shown(index)}: weight_map does not map tensor names to file names")
    files = {}
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(SUFFIXES) or "\0" in shard or any(c in shard for c in "/\\:"):
            raise InputError(f"{shown(index)}: shard {shown(shard)} is not the name of a pickled file beside it")
        files[shard] = layout.contained(folder / shard, folder)
    return layout.Layout(path, folder, tuple(files.values()), {n: files[shard] for n, shard in weight_map.items()})


def _load(file: Path) -> Mapping[str, Any]:
    import torch

    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before torch 1.6 cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader stumbles over
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{shown(file)}: torch's weights_only reader refuses it: {shown(reason)}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get(_WITHIN), Mapping):
        loaded = loaded[_WITHIN]
    if not isinstance(loaded, Mapping):
        raise InputError(f"{shown(file)}: holds {type(loaded).__name__}, and no weights by name")
    return loaded


def _info(file: Path, name: Any, tensor: Any) -> TensorInfo:
    import torch

    dtype = WORDS.get(str(getattr(tensor, "dtype", "")).rpartition(".")[2])
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or dtype is None:
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise InputError(f"{shown(file)}: {shown(name)} is no tensor that can be merged ({kind})")
    return TensorInfo(name, dtype, tuple(tensor.shape), file, 0, tensor.numel() * itemsize(dtype))
