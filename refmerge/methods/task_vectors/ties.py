from refmerge.method import method
from refmerge.numeric import array_namespace, indicator, total


@method("ties", paper="arXiv:2306.01708", over="model", domain={"density": (0.0, 1.0)})
def ties(models, base, group, *, density: float = 0.2, lambda_: float = 1.0):
    """TIES-Merging: trim, elect sign, disjoint merge.

    Each task vector keeps its `density` largest entries; every entry elects the sign with the larger total magnitude;
    the task vectors that agree with it are averaged.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. trim
    tau = trim(tau, group, density)
    # 3. elect sign
    gamma = elect(tau)
    # 4. disjoint merge
    return base + lambda_ * disjoint_mean(tau, gamma)


def trim(tau, group, density):
    """Keep the int(density * size) entries of largest magnitude of each task vector, exactly so many."""
    xp = array_namespace(*tau)
    k = [int(density * group.size)] * len(tau)
    return [m_n * tau_n for m_n, tau_n in zip(group.top(*map(xp.abs, tau), k=k), tau)]


def elect(tau):
    """gamma = sgn(sum_n tau_n): +1, -1, or 0 where the two sides weigh the same."""
    return array_namespace(*tau).sign(total(tau))


def elected(tau_n, gamma):
    """1 where an entry has the elected sign, and 0 elsewhere."""
    return indicator(gamma * tau_n > 0, like=tau_n)


def disjoint_mean(tau, gamma):
    """Mean of the entries whose sign is the elected one; 0 where there is none."""
    xp = array_namespace(gamma)
    a = [elected(tau_n, gamma) for tau_n in tau]
    count = total(a)
    return total(a_n * tau_n for a_n, tau_n in zip(a, tau)) / xp.maximum(count, xp.ones_like(count))
