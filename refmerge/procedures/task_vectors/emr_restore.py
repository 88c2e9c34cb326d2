import numpy as np

from refmerge.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, same_or_inside
from refmerge.errors import InputError, UsageError
from refmerge.numeric import host
from refmerge.procedure import procedure
from refmerge.procedures.task_vectors.tall_masks_restore import unpacked
from refmerge.sources import stored_bytes


@procedure("emr_restore", paper="arXiv:2405.17461")
def emr_restore(stored, out=None, *, task: int = 0, overwrite: bool = False):
    """The model of one task, from what `emr_store` wrote: a mapping name -> NumPy array, or the open checkpoint at `out`."""
    # 1. open
    stored = stored if isinstance(stored, Checkpoint) else open_checkpoint(stored)
    specs = {n.removeprefix("base/"): (t.dtype, t.shape) for n, t in stored.tensors.items() if n.startswith("base/")}
    if "rescaler" not in stored or any(n != "rescaler" and f"base/{n.partition('/')[2]}" not in stored for n in stored):
        raise InputError(f"{stored.path}: was not written by emr_store")
    count = stored.tensors["rescaler"].shape[0]
    if task not in range(count):
        raise UsageError(f"emr_restore: task = {task} is none of 0 to {count - 1}, the tasks of {stored.path}")
    # 2. recover, tensor by tensor
    if out is None:
        return {name: recovered(stored, name, task) for name in specs}
    if same_or_inside(out, stored.path):
        raise UsageError(f"output {str(out)!r} lies in the input: inputs are never written to")
    with CheckpointWriter(out, specs, overwrite=overwrite) as writer:
        for name in specs:
            writer.write(name, 0, recovered(stored, name, task).reshape(-1).view(np.uint8))
    return open_checkpoint(out)


def recovered(stored, name, task):
    """theta_0 + lambda_t (m_t tau_uni) in the precision of tau_uni, rounded once to the base's."""
    base = stored[f"base/{name}"]
    if f"mask/{name}" not in stored:
        return base
    tau_uni = stored[f"unified/{name}"]
    with np.errstate(all="ignore"):
        masked = unpacked(stored, name, task).astype(tau_uni.dtype) * tau_uni
        theta_t = host(base).astype(tau_uni.dtype, copy=False) + float(stored["rescaler"][task]) * masked
    return stored_bytes(theta_t, stored.tensors[f"base/{name}"].dtype).view(base.dtype).reshape(base.shape)
