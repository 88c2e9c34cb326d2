"""Experts that are stored in factors, multiplied out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refmerge.adapters import listed
from refmerge.checkpoint import Checkpoint, open_checkpoint
from refmerge.errors import InputError
from refmerge.experts import FACTORS, Output, known_again
from refmerge.numeric import scores
from refmerge.procedure import procedure


@procedure("mc_smoe_restore", paper="arXiv:2310.01334")
def mc_smoe_restore(
    stored: Any, out: str | Path | None = None, *, max_shard_size: int | str = "5GB", overwrite: bool = False
) -> Any:
    """What `mc_smoe` stored as a model with whole matrices, W = L R + S: a mapping name -> array, or the open checkpoint.

    stored: a path or an open checkpoint. out: a folder, a file that ends in .safetensors, or None for a mapping in memory.
    """
    stored = stored if isinstance(stored, Checkpoint) else open_checkpoint(stored)
    # 1. open, and see that it fits
    if FACTORS not in stored.metadata:
        raise InputError(f"{stored.path}: was not written by mc_smoe")
    names = [n.removeprefix("left/") for n in stored if n.startswith("left/")]
    shapes = {name: fitting(stored, name) for name in names}
    factors = {f"{side}/{name}" for name in names for side in ("left", "right", "rows", "sparse")}
    specs = {n: (x.dtype, x.shape) for n, x in stored.tensors.items() if n not in factors}
    specs |= {name: (stored.tensors[f"left/{name}"].dtype, shape) for name, shape in shapes.items()}
    files = None if stored.config is None else known_again(stored.config, FACTORS)
    # 2. multiply out, matrix by matrix
    with Output(stored, specs, out, files, max_shard_size=max_shard_size, overwrite=overwrite) as output:
        for name in specs:
            if name not in shapes:
                output.copy(name)
            else:
                W = scores(stored[f"left/{name}"]) @ scores(stored[f"right/{name}"])
                W[stored[f"rows/{name}"]] += scores(stored[f"sparse/{name}"])
                output.put(name, W)
    return output.result


def fitting(stored: Checkpoint, name: str) -> tuple[int, int]:
    """The shape of a matrix whose factors fit. InputError where they do not, or one is missing."""
    if missing := [side for side in ("right", "rows", "sparse") if f"{side}/{name}" not in stored]:
        raise InputError(f"{stored.path}: of {name!r} are missing {listed(missing)}")
    left, right, rows, sparse = (stored.tensors[f"{side}/{name}"].shape for side in ("left", "right", "rows", "sparse"))
    if len(left) != 2 or len(right) != 2 or left[1] != right[0] or sparse != (*rows, right[1]):
        raise InputError(f"{stored.path}: the factors of {name!r} do not fit: {[left, right, rows, sparse]}")
    if rows[0] and not 0 <= (found := stored[f"rows/{name}"]).min() <= found.max() < left[0]:
        raise InputError(f"{stored.path}: rows/{name} names rows that the matrix does not have")
    return left[0], right[1]
