import numpy as np

from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.ties import disjoint_mean, elect
from refmerge.numeric import array_namespace, at_ranks


@method(
    "della",
    paper="arXiv:2406.11617",
    view="rows",
    domain={"density": (0.0, 1.0), "epsilon": (0.0, 0.5)},
    stats={"mask": "draw"},
)
def della(
    models,
    base,
    rng,
    *,
    density: PerModel[float] = 0.7,
    epsilon: PerModel[float] = 0.07,
    lambda_: float = 1.1,
    rescale: bool = True,
):
    """DELLA-Merging: drop the small entries of each row more often than the large ones, elect sign, fuse.

    The probability 1 - p of an entry to stay grows with its rank in its row, from density - epsilon to density + epsilon;
    an entry that stays is divided by it.
    """
    # 1. task vectors
    delta = [theta_n - base for theta_n in models]
    # 2. drop
    delta = magprune(delta, rng, density, epsilon, rescale)
    # 3. elect
    gamma = elect(delta)
    # 4. fuse
    return base + lambda_ * disjoint_mean(delta, gamma)


def magprune(delta, rng, density, epsilon, rescale):
    """m_n delta_n / q_n with m_n ~ Bernoulli(q_n), q_n = 1 - p_n: the expectation of each entry stays."""
    xp = array_namespace(*delta)
    pruned = []
    for n, (delta_n, d_n, e_n) in enumerate(zip(delta, density, epsilon)):
        if d_n == 0:
            pruned.append(xp.zeros_like(delta_n))
        elif d_n == 1:
            pruned.append(delta_n)
        else:
            q_n = at_ranks(keep_probabilities(delta_n.shape[-1], d_n, e_n), xp.abs(delta_n))
            kept = rng.keep(q_n, model=n) * delta_n
            pruned.append(kept / q_n if rescale else kept)
    return pruned


def keep_probabilities(size, density, epsilon):
    """q for the ranks 0 ... size - 1 of a row: size equal steps around density, which an entry alone in its row has."""
    low, high = density - epsilon, density + epsilon
    if not (low > 0 and high <= 1):
        raise UsageError(
            f"density {density:g} with epsilon {epsilon:g} would keep entries with probabilities from {low:g} to {high:g}; "
            "they must be above 0 and at most 1"
        )
    return low + 2 * epsilon / (size - 1) * np.arange(size) if size > 1 else np.asarray([density])
