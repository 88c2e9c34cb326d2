from typing import Literal

from refmerge.method import method
from refmerge.methods.task_vectors.tall_masks import check_task
from refmerge.methods.task_vectors.ties import elect, elected
from refmerge.numeric import array_namespace


@method("emr", paper="arXiv:2405.17461", over="model")
def emr(models, base, group, *, task: int = 0, average: Literal["entries", "tensors"] = "entries"):
    """EMR-Merging: one task's model, recovered from a task vector that all tasks share by a mask and one number.

    The shared vector has the elected sign and, of the entries with that sign, the largest magnitude.
    """
    check_task(task, models, "emr")
    # 1. task vectors
    tau = [theta_t - base for theta_t in models]
    # 2. elect
    gamma = elect(tau)
    tau_uni = unified(tau, gamma)
    # 3. mask
    m_t = elected(tau[task], gamma)
    # 4. rescale
    lambda_t = rescaler(tau[task], m_t * tau_uni, group, average)
    # 5. recover
    return base + lambda_t * (m_t * tau_uni)


def unified(tau, gamma):
    """gamma times the largest magnitude among the entries whose sign is gamma."""
    xp = array_namespace(gamma)
    epsilon = xp.zeros_like(gamma)
    for tau_t in tau:
        epsilon = xp.maximum(epsilon, elected(tau_t, gamma) * xp.abs(tau_t))
    return gamma * epsilon


def rescaler(tau_t, masked, group, average):
    """The sum of the magnitudes of the task vector over that of what the mask leaves; 0 where nothing is left."""
    own, left = group.sum(*magnitudes(tau_t, masked, group.tensor.size, average))
    return own / left if left else 0.0


def magnitudes(tau_t, masked, size, average):
    """Averaged over tensors, each entry counts as one over the number of entries of its tensor."""
    found = list(map(array_namespace(tau_t).abs, (tau_t, masked)))
    return [(1 / size) * x for x in found] if average == "tensors" else found
