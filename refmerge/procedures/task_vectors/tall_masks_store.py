from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from refmerge.api import prepare
from refmerge.checkpoint import CheckpointWriter, open_checkpoint
from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.tall_masks import mask, multitask_vector
from refmerge.procedure import procedure
from refmerge.sources import stored_bytes
from refmerge.stores import refuse


@procedure("tall_masks_store", paper="arXiv:2405.07813")
def tall_masks_store(
    models,
    base,
    out,
    *,
    threshold: float | list[float] = 0.4,
    multitask: Literal["sum", "ties"] = "sum",
    density: float = 0.2,
    integers: Literal["equal", "base"] = "equal",
    nonfinite: Literal["error", "propagate"] = "error",
    overwrite: bool = False,
):
    """Write the models of several tasks as one checkpoint: the base, the multi-task vector, and a bit for each entry and
    task. Returns it, open; `tall_masks_restore` makes a task's model of it, to the bit what `tall_masks` gives.

    models, base: as for `refmerge.merge`. out: a folder, or a file that ends in .safetensors.
    """
    base = base if isinstance(base, Mapping) else open_checkpoint(base)
    given = {"threshold": threshold, "multitask": multitask, "density": density}

    def plan(made, **options):
        return prepare(models, made, base=base, integers=integers, nonfinite=nonfinite, params=given, **options)

    # 1. what is written, by name: tensors and their bytes
    checked = plan(vector, missing="skip")
    refuse(checked, base, out)
    work = "F64" if any(t.work == "float64" for t in checked.work.tensors) else "F32"
    count = len(checked.work.models)
    layout = {f"base/{name}": spec for name, spec in checked.specs.items()}
    for t in checked.work.tensors:
        layout[f"multitask/{t.name}"] = (work, t.shape)
        layout[f"mask/{t.name}"] = ("U8", (count, -(-t.size // 8)))
    with CheckpointWriter(out, layout, overwrite=overwrite) as writer:
        with TemporaryDirectory(prefix=".refmerge-", dir=writer.target.parent) as scratch:
            # 2. multi-task vector, in the precision in which it is computed
            vectors = plan(vector, out_dtype=work).run(Path(scratch, "vector.safetensors"))
            # 3. masks: of all tasks in one pass, a byte an entry for a while
            plan(masks(count), out_dtype="F8_E4M3").run(Path(scratch, "masks"))
            bits = [open_checkpoint(Path(scratch, "masks", f"mask{t}.safetensors")) for t in range(count)]
            # 4. write: the base as it is, the vector, the masks packed
            for name, (dtype, _) in checked.specs.items():
                writer.write(f"base/{name}", 0, stored_bytes(base[name], dtype))
            for t in checked.work.tensors:
                writer.write(f"multitask/{t.name}", 0, stored_bytes(vectors[t.name], work))
                for n, one in enumerate(bits):
                    packed = np.packbits(one[t.name].reshape(-1).view(np.uint8))
                    writer.write(f"mask/{t.name}", n * packed.size, packed)
            for c in (vectors, *bits):
                c.close()
    return open_checkpoint(out)


def _of_tall_masks(run, outputs=()):
    return method(
        "tall_masks_store",
        paper="arXiv:2405.07813",
        over="model",
        domain={"threshold": (0.0, float("inf")), "density": (0.0, 1.0)},
        outputs=outputs,
    )(run)


def masks(count):
    """The method whose outputs are the masks of so many tasks."""

    def run(models, base, group, *, threshold: PerModel[float], multitask: Literal["sum", "ties"], density: float):
        tau = [theta_t - base for theta_t in models]
        tau_MTL = multitask_vector(tau, group, multitask, density)
        return {f"mask{t}": mask(tau_t, tau_MTL, c) for t, (tau_t, c) in enumerate(zip(tau, threshold))}

    return _of_tall_masks(run, tuple(f"mask{t}" for t in range(count)))


@_of_tall_masks
def vector(models, base, group, *, threshold: PerModel[float], multitask: Literal["sum", "ties"], density: float):
    return multitask_vector([theta_t - base for theta_t in models], group, multitask, density)
