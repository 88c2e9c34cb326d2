import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from refmerge.api import prepare
from refmerge.checkpoint import CheckpointWriter, name_of, open_checkpoint
from refmerge.group import Group, Place, State
from refmerge.methods.task_vectors.bitdelta import bitdelta, mean_magnitude, signs
from refmerge.numeric import host
from refmerge.procedure import procedure
from refmerge.procedures.task_vectors._stores import read, refuse
from refmerge.sources import stored_bytes


@procedure("bitdelta_store", paper="arXiv:2402.10193")
def bitdelta_store(
    model,
    base,
    out,
    *,
    layers: tuple = ("*mlp*.*proj*.weight", "*self_attn*.*proj*.weight"),
    integers: Literal["equal", "base"] = "equal",
    nonfinite: Literal["error", "propagate"] = "error",
    overwrite: bool = False,
):
    """Write a fine-tune as a bit for each entry and a number for each tensor that one of the globs `layers` names, and all
    other tensors as they are. Returns it, open; `bitdelta_restore` adds it to the base, to the bit what `bitdelta` gives.

    model, base: a path or an open checkpoint, or a mapping name -> array. out: a folder, or a file that ends in
    .safetensors.
    """
    model, base = (x if isinstance(x, Mapping) else open_checkpoint(x) for x in (model, base))
    plan = prepare([model], bitdelta, base=base, integers=integers, nonfinite=nonfinite, missing="skip")
    refuse(plan, base, out)
    # 1. what is written, by name; integer tensors are the base's
    chosen = [t for t in plan.work.tensors if any(fnmatchcase(t.name, glob) for glob in layers)]
    others = [t.name for t in plan.work.tensors if t not in chosen]
    layout = {f"whole/{name}": plan.specs[name] for name in others}
    for t in chosen:
        layout |= {f"sign/{t.name}": ("U8", (-(-t.size // 8),)), f"scale/{t.name}": (name_of(np.dtype(t.work)), ())}
    dtypes = {"bitdelta": json.dumps({t.name: plan.specs[t.name][0] for t in chosen})}
    with CheckpointWriter(out, layout, overwrite=overwrite, metadata=dtypes) as writer, np.errstate(all="ignore"):
        for name in others:
            writer.write(f"whole/{name}", 0, stored_bytes(model[name], plan.specs[name][0]))
        for t in chosen:
            # 2. change
            (theta,), theta_0 = read(plan, t)
            delta = theta - theta_0
            # 3. signs and scale
            writer.write(f"sign/{t.name}", 0, np.packbits(host(signs(delta)) > 0))
            alpha = mean_magnitude(delta, Group(State(t.size, 1), Place(0, t.name, 0, t.size, t.size))) if t.size else 0.0
            writer.write(f"scale/{t.name}", 0, np.full(1, alpha, t.work).view(np.uint8))
    return open_checkpoint(out)
