from collections.abc import Mapping

import numpy as np

from refmerge.checkpoint import Checkpoint, open_checkpoint
from refmerge.errors import InputError
from refmerge.methods.subspaces.low_rank_residual import as_matrix
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.sources import dtype_name, rounded
from refmerge.stores import give_back


@procedure("low_rank_restore", paper="arXiv:2305.18425")
def low_rank_restore(stored, base, out=None, *, overwrite: bool = False):
    """The base plus what `low_rank_store` kept of a fine-tune: a mapping name -> NumPy array, or the checkpoint at `out`.

    base: the one that the fine-tune was stored against, a path, an open checkpoint or a mapping.
    """
    # 1. open, and see that it fits
    stored = stored if isinstance(stored, Checkpoint) else open_checkpoint(stored)
    base = base if isinstance(base, Mapping) else open_checkpoint(base)
    bits = int(stored.metadata.get("bits", 0))
    if not 2 <= bits <= 16:
        raise InputError(f"{stored.path}: was not written by low_rank_store")
    for name in {n.partition("/")[2] for n in stored}:
        fits(stored, base, name, bits)
    # 2. restore, tensor by tensor
    specs = {name: (dtype_name(base[name], name), tuple(base[name].shape)) for name in base}
    return give_back(specs, lambda name: restored(stored, base[name], name, bits), out, [stored, base], overwrite)


def fits(stored, base, name, bits):
    """InputError unless the three stored tensors of that name are there and make a matrix of the base's shape."""
    if name not in base:
        raise InputError(f"{stored.path} holds a residual of {name!r}, which the base does not have")
    rows = [-(-n * bits // 8) for n in as_matrix(np.empty(base[name].shape, np.bool_)).shape]
    found = [
        stored.tensors[f"{key}/{name}"].shape if f"{key}/{name}" in stored else () for key in ("scale", "left", "right")
    ]
    if len(found[0]) != 1 or found[1:] != [(*found[0], n) for n in rows]:
        raise InputError(
            f"{stored.path}: the residual of {name!r} does not fit the base's shape {list(base[name].shape)}: it was stored "
            "against another base"
        )


def restored(stored, x, name, bits):
    """theta_0 + left^T diag(scale) right in float64, rounded once to the base's dtype."""
    dtype = dtype_name(x, name)
    if f"scale/{name}" in stored:
        m, n = as_matrix(scores(x)).shape
        q, p = unpacked(stored[f"left/{name}"], m, bits), unpacked(stored[f"right/{name}"], n, bits)
        x = scores(x) + ((q.T * stored[f"scale/{name}"].astype(np.float64)) @ p).reshape(x.shape)
    return rounded(x, dtype)


def unpacked(rows, count, bits):
    """The whole numbers of `packed`, as float64."""
    planes = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
    return planes @ 2.0 ** np.arange(bits - 1, -1, -1) - (2 ** (bits - 1) - 1)
