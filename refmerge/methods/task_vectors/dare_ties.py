from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.dare_linear import drop
from refmerge.methods.task_vectors.ties import disjoint_mean, elect
from refmerge.methods.task_vectors.ties import trim as keep_largest


@method(
    "dare_ties",
    paper="arXiv:2311.03099",
    over="model",
    domain={"density": (0.0, 1.0), "trim": (0.0, 1.0)},
    stats={"mask": "draw"},
)
def dare_ties(
    models,
    base,
    group,
    rng,
    *,
    density: PerModel[float] = 0.9,
    trim: float = 0.2,
    lambda_: float = 1.0,
    rescale: bool = True,
):
    """DARE, then TIES: drop entries of the task vectors at random, rescale the rest; then trim, elect sign, merge.

    density is the probability 1 - p to keep an entry, trim the density of TIES.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. drop and rescale
    tau = drop(tau, rng, density, rescale)
    # 3. trim
    tau = keep_largest(tau, group, trim)
    # 4. elect sign
    gamma = elect(tau)
    # 5. disjoint merge
    return base + lambda_ * disjoint_mean(tau, gamma)
