from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, total


@method("dare_linear", paper="arXiv:2311.03099", domain={"density": (0.0, 1.0)}, stats={"mask": "draw"})
def dare_linear(
    models,
    base,
    rng,
    *,
    density: PerModel[float] = 0.9,
    weight: PerModel[float] = 1.0,
    lambda_: float = 1.0,
    rescale: bool = True,
):
    """DARE with task arithmetic: drop entries of the task vectors at random, rescale the rest, add.

    density is the probability 1 - p to keep an entry.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. drop and rescale
    tau = drop(tau, rng, density, rescale)
    # 3. add
    return base + lambda_ * total(w_n * tau_n for w_n, tau_n in zip(weight, tau))


def drop(tau, rng, density, rescale):
    """m_n tau_n / density_n with m_n ~ Bernoulli(density_n): the expectation of each entry stays."""
    xp = array_namespace(*tau)
    dropped = []
    for n, (tau_n, d_n) in enumerate(zip(tau, density)):
        if d_n == 0:
            dropped.append(xp.zeros_like(tau_n))
        elif d_n == 1:
            dropped.append(tau_n)
        else:
            c_n = 1 / d_n if rescale else 1.0
            dropped.append(c_n * (rng.keep(d_n, model=n) * tau_n))
    return dropped
