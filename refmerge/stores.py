"""Steps of the procedures that keep fine-tunes in little room, and of those that give them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.block import report_nonfinite
from refmerge.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, refuse_input
from refmerge.errors import InputError, UsageError
from refmerge.plan import Plan
from refmerge.skipping import POLICY
from refmerge.sources import NotFinite, Scratch
from refmerge.work import Tensor

__all__ = ["give_back", "read", "refuse", "unpacked"]


def refuse(plan: Plan, base: Mapping[str, Any], out: str | Path) -> None:
    """InputError where models and base have not the same tensors, UsageError for an output that lies in an input and for a
    policy under which models could be missing."""
    for s in plan.work.models:
        if odd := sorted(s.names() ^ {*base}):
            raise InputError(f"tensor {odd[0]!r} is not in both {s.label} and the base: they must have the same tensors")
    if plan.work.nonfinite == POLICY:
        raise UsageError(f"nonfinite = {POLICY!r} is for merges: here every model has a place of its own")
    refuse_input(out, [p for c in plan.checkpoints for p in c.paths])


def read(plan: Plan, tensor: Tensor) -> tuple[list[Any], Any]:
    """A whole tensor of each model and of the base, flat, in the dtype that it is computed in."""
    assert plan.work.base is not None
    found, strict = [], plan.work.nonfinite == "error"
    for source in [*plan.work.models, plan.work.base]:
        try:
            found.append(source.load(tensor.name, 0, tensor.size, tensor.work, 0, Scratch(), finite=strict))
        except NotFinite:
            report_nonfinite(source, tensor)
    return found[:-1], found[-1]


def unpacked(stored: Checkpoint, name: str, task: int) -> np.ndarray:
    """The mask of a task on one tensor, as booleans of its shape."""
    base, row = stored.tensors[f"base/{name}"], stored.tensors[f"mask/{name}"].shape[1]
    packed = np.empty(row, np.uint8)
    stored.read(f"mask/{name}", task * row, (task + 1) * row, packed)
    return np.unpackbits(packed, count=base.size).reshape(base.shape).astype(bool)


def give_back(
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    restored: Callable[[str], np.ndarray],
    out: str | Path | None,
    inputs: Iterable[Any],
    overwrite: bool,
) -> Any:
    """`restored` of each name, tensor by tensor: a mapping name -> array, or the open checkpoint at `out`, which may not lie
    in one of the inputs that are checkpoints. specs: name -> (safetensors dtype, shape)."""
    if out is None:
        return {name: restored(name) for name in specs}
    refuse_input(out, [p for c in inputs if isinstance(c, Checkpoint) for p in c.paths])
    with CheckpointWriter(out, specs, overwrite=overwrite) as writer:
        for name in specs:
            writer.write(name, 0, restored(name).reshape(-1).view(np.uint8))
    return open_checkpoint(out)
