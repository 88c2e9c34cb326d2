import json
from collections.abc import Mapping

import numpy as np

from refmerge.checkpoint import DTYPES, Checkpoint, CheckpointWriter, open_checkpoint, same_or_inside
from refmerge.errors import InputError, UsageError
from refmerge.numeric import host
from refmerge.procedure import procedure
from refmerge.sources import dtype_name, stored_bytes


@procedure("bitdelta_restore", paper="arXiv:2402.10193")
def bitdelta_restore(stored, base, out=None, *, overwrite: bool = False):
    """The base plus the signs and scales that `bitdelta_store` kept of a fine-tune: a mapping name -> NumPy array, or the
    open checkpoint at `out`.

    base: the one that the fine-tune was stored against, a path, an open checkpoint or a mapping.
    """
    # 1. open, and see that it fits
    stored = stored if isinstance(stored, Checkpoint) else open_checkpoint(stored)
    base = base if isinstance(base, Mapping) else open_checkpoint(base)
    if "bitdelta" not in stored.metadata:
        raise InputError(f"{stored.path}: was not written by bitdelta_store")
    dtypes = json.loads(stored.metadata["bitdelta"])
    for key, t in stored.tensors.items():
        fits(stored, base, *key.split("/", 1), t.shape)
    specs = {name: (dtype_name(base[name], name), tuple(base[name].shape)) for name in base}
    specs |= {name: (dtype, specs[name][1]) for name, dtype in dtypes.items()}
    specs |= {
        name: (stored.tensors[f"whole/{name}"].dtype, shape)
        for name, (_, shape) in specs.items()
        if f"whole/{name}" in stored
    }
    # 2. restore, tensor by tensor
    if out is None:
        return {name: restored(stored, base, name, *spec) for name, spec in specs.items()}
    for path in (c.path for c in (stored, base) if isinstance(c, Checkpoint)):
        if same_or_inside(out, path):
            raise UsageError(f"output {str(out)!r} lies in an input, {str(path)!r}: inputs are never written to")
    with CheckpointWriter(out, specs, overwrite=overwrite) as writer:
        for name, spec in specs.items():
            writer.write(name, 0, restored(stored, base, name, *spec).reshape(-1).view(np.uint8))
    return open_checkpoint(out)


def fits(stored, base, key, name, shape):
    """InputError unless the base has a tensor of that name, of as many entries."""
    if name not in base:
        raise InputError(f"{stored.path} holds {name!r}, which the base does not have")
    size = np.prod(base[name].shape, dtype=int)
    wanted = {"whole": tuple(base[name].shape), "sign": (-(-size // 8),), "scale": ()}
    if shape != wanted[key]:
        raise InputError(
            f"{stored.path}: what is stored of {name!r} does not fit the base's shape {list(base[name].shape)}: it was "
            "stored against another base"
        )


def restored(stored, base, name, dtype, shape):
    """theta_0 + alpha B in the precision of alpha, rounded once."""
    if f"whole/{name}" in stored:
        return stored[f"whole/{name}"]
    x = base[name]
    if f"sign/{name}" in stored:
        alpha = stored[f"scale/{name}"]
        B = 2 * np.unpackbits(stored[f"sign/{name}"], count=np.prod(shape, dtype=int)).reshape(shape).astype(alpha.dtype) - 1
        with np.errstate(all="ignore"):
            x = host(x).astype(alpha.dtype, copy=False) + float(alpha) * B
    return stored_bytes(x, dtype).view(DTYPES[dtype]).reshape(shape)
