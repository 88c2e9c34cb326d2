import numpy as np

from refmerge.checkpoint import Checkpoint, open_checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.numeric import host
from refmerge.procedure import procedure
from refmerge.sources import rounded
from refmerge.stores import give_back, unpacked


@procedure("tall_masks_restore", paper="arXiv:2405.07813")
def tall_masks_restore(stored, out=None, *, task: int = 0, overwrite: bool = False):
    """The model of one task, from what `tall_masks_store` wrote: a mapping name -> NumPy array, or the open checkpoint at
    `out`."""
    # 1. open
    stored = stored if isinstance(stored, Checkpoint) else open_checkpoint(stored)
    specs = {n.removeprefix("base/"): (t.dtype, t.shape) for n, t in stored.tensors.items() if n.startswith("base/")}
    counts = {t.shape[0] for n, t in stored.tensors.items() if n.startswith("mask/")}
    if not specs or len(counts) > 1 or any(f"base/{n.partition('/')[2]}" not in stored for n in stored):
        raise InputError(f"{stored.path}: was not written by tall_masks_store")
    if counts and task not in range(*counts):
        raise UsageError(f"tall_masks_restore: task = {task} is none of 0 to {max(counts) - 1}, the tasks of {stored.path}")
    # 2. recover, tensor by tensor
    return give_back(specs, lambda name: recovered(stored, name, task), out, [stored], overwrite)


def recovered(stored, name, task):
    """theta_0 + m_t tau_MTL in the precision of tau_MTL, rounded once to the base's."""
    base = stored[f"base/{name}"]
    if f"mask/{name}" not in stored:
        return base
    tau_MTL = stored[f"multitask/{name}"]
    with np.errstate(all="ignore"):
        m_t = unpacked(stored, name, task).astype(tau_MTL.dtype)
        theta_t = host(base).astype(tau_MTL.dtype, copy=False) + m_t * tau_MTL
    return rounded(theta_t, stored.tensors[f"base/{name}"].dtype)
