import math

from refmerge.method import method
from refmerge.numeric import array_namespace, indicator, total


@method("ram", paper="arXiv:2601.13572", domain={"epsilon": (0.0, math.inf)})
def ram(models, base, *, epsilon: float = 1e-5):
    """Reinforced Agent Merging: each entry moves by the mean of the models that changed it, others do not count.

    An entry that one model alone changed keeps its change whole, where an average would divide it by the number of models.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. probe
    changed = [indicator(c_n, like=tau_n) for c_n, tau_n in zip(changes(tau, epsilon), tau)]
    count = total(changed)
    # 3. merge
    return base + over_count(total(c_n * tau_n for c_n, tau_n in zip(changed, tau)), count)


def changes(tau, epsilon):
    """Where each task vector is larger than epsilon in magnitude."""
    xp = array_namespace(*tau)
    return [xp.abs(tau_n) > epsilon for tau_n in tau]


def over_count(mixed, count):
    """Divided by the number of models that changed an entry; 0 where none did."""
    return mixed / array_namespace(count).maximum(count, array_namespace(count).ones_like(count))
