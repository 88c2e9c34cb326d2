import math
from typing import Literal

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.task_vectors.ties import elect, elected, trim
from refmerge.numeric import array_namespace, indicator, total


@method("tall_masks", paper="arXiv:2405.07813", over="model", domain={"threshold": (0.0, math.inf), "density": (0.0, 1.0)})
def tall_masks(
    models,
    base,
    group,
    *,
    task: int = 0,
    threshold: float = 0.4,
    multitask: Literal["sum", "ties"] = "sum",
    density: float = 0.2,
):
    """TALL-masks: one task's model, recovered from the multi-task vector by a mask of one bit an entry.

    An entry is taken where the multi-task vector is near enough to the task vector: at threshold 1, nearer than zero is.
    """
    check_task(task, models, "tall_masks")
    # 1. task vectors
    tau = [theta_t - base for theta_t in models]
    # 2. multi-task vector
    tau_MTL = multitask_vector(tau, group, multitask, density)
    # 3. mask
    m_t = mask(tau[task], tau_MTL, threshold)
    # 4. recover
    return base + m_t * tau_MTL


def check_task(task, models, name):
    if not 0 <= task < len(models):
        raise UsageError(f"{name}: task = {task} is none of 0 to {len(models) - 1}, the models' places in the list")


def multitask_vector(tau, group, multitask, density):
    """The sum of the task vectors; over TIES, the sum of what agrees with the elected sign once they are trimmed."""
    if multitask == "sum":
        return total(tau)
    tau = trim(tau, group, density)
    gamma = elect(tau)
    return total(elected(tau_t, gamma) * tau_t for tau_t in tau)


def mask(tau_t, tau_MTL, threshold):
    """1 where |tau_t| > threshold |tau_MTL - tau_t|, and 0 elsewhere."""
    xp = array_namespace(tau_t)
    return indicator(xp.abs(tau_t) > threshold * xp.abs(tau_MTL - tau_t), like=tau_t)
