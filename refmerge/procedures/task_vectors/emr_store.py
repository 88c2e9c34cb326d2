from collections.abc import Mapping
from typing import Literal

import numpy as np

from refmerge.api import prepare
from refmerge.checkpoint import CheckpointWriter, open_checkpoint
from refmerge.methods.task_vectors.emr import emr, magnitudes, unified
from refmerge.methods.task_vectors.ties import elect, elected
from refmerge.numeric import exact_sum, host, leaf_sums
from refmerge.procedure import procedure
from refmerge.sources import stored_bytes
from refmerge.stores import read, refuse


@procedure("emr_store", paper="arXiv:2405.17461")
def emr_store(
    models,
    base,
    out,
    *,
    average: Literal["entries", "tensors"] = "entries",
    integers: Literal["equal", "base"] = "equal",
    nonfinite: Literal["error", "propagate"] = "error",
    overwrite: bool = False,
):
    """Write the models of several tasks as one checkpoint: the base, the unified task vector, a bit for each entry and task,
    and a number for each task. Returns it, open; `emr_restore` makes a task's model of it, to the bit what `emr` gives.

    models, base: as for `refmerge.merge`. out: a folder, or a file that ends in .safetensors.
    """
    base = base if isinstance(base, Mapping) else open_checkpoint(base)
    plan = prepare(
        models, emr, base=base, integers=integers, nonfinite=nonfinite, missing="skip", params={"average": average}
    )
    refuse(plan, base, out)
    # 1. what is written, by name
    work = "F64" if any(t.work == "float64" for t in plan.work.tensors) else "F32"
    count = len(plan.work.models)
    layout = {f"base/{name}": spec for name, spec in plan.specs.items()} | {"rescaler": ("F64", (count,))}
    for t in plan.work.tensors:
        layout |= {f"unified/{t.name}": (work, t.shape), f"mask/{t.name}": ("U8", (count, -(-t.size // 8)))}
    sums = [([], []) for _ in range(count)]
    with CheckpointWriter(out, layout, overwrite=overwrite) as writer, np.errstate(all="ignore"):
        for name, (dtype, _) in plan.specs.items():
            writer.write(f"base/{name}", 0, stored_bytes(base[name], dtype))
        for t in plan.work.tensors:
            # 2. elect
            thetas, theta_0 = read(plan, t)
            tau = [theta - theta_0 for theta in thetas]
            gamma = elect(tau)
            tau_uni = unified(tau, gamma)
            writer.write(f"unified/{t.name}", 0, stored_bytes(tau_uni, work))
            # 3. mask
            for task, tau_t in enumerate(tau):
                m_t = elected(tau_t, gamma)
                packed = np.packbits(host(m_t) != 0)
                writer.write(f"mask/{t.name}", task * packed.size, packed)
                for sum_, x in zip(sums[task], magnitudes(tau_t, m_t * tau_uni, t.size or 1, average)):
                    sum_.extend(leaf_sums(x)[0].tolist())
        # 4. rescale
        own_left = [(exact_sum(own), exact_sum(left)) for own, left in sums]
        rescalers = np.asarray([own / left if left else 0.0 for own, left in own_left])
        writer.write("rescaler", 0, rescalers.view(np.uint8))
    return open_checkpoint(out)
