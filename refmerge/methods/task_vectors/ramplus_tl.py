import math

from refmerge.method import method
from refmerge.methods.task_vectors.ram import changes, over_count
from refmerge.numeric import indicator, total


@method(
    "ramplus_tl",
    paper="arXiv:2601.13572",
    domain={"r": (0.0, math.inf), "alpha": (0.0, math.inf), "epsilon": (0.0, math.inf)},
)
def ramplus_tl(models, base, group, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5):
    """RAM+: RAM in which what one model alone changed is enlarged, the more of that model's changes others share.

    Tensor by tensor; `over="model"` counts over the whole model, which is the paper's RAM+.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. probe
    changed = changes(tau, epsilon)
    count = total(indicator(c_n, like=tau_n) for c_n, tau_n in zip(changed, tau))
    # 3. overlap
    rho = overlap(changed, count, group)
    # 4. rescale
    scale = [1 + r * min(rho_n, alpha) for rho_n in rho]
    unique, shared = indicator(count == 1, like=count), indicator(count > 1, like=count)
    tau = [indicator(c_n, like=tau_n) * tau_n for c_n, tau_n in zip(changed, tau)]
    tau = [(s_n * unique + shared) * tau_n for s_n, tau_n in zip(scale, tau)]
    # 5. merge
    return base + over_count(total(tau), count)


def overlap(changed, count, group):
    """Each model's number of shared changes over that of its unique ones; 0 where it has none to enlarge."""
    counts = group.count(*(c_n & (count > 1) for c_n in changed), *(c_n & (count == 1) for c_n in changed))
    shared, unique = counts[: len(changed)], counts[len(changed) :]
    return [s / u if u else 0.0 for s, u in zip(shared, unique)]
