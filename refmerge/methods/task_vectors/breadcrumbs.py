from refmerge.method import method
from refmerge.numeric import array_namespace, total


@method("breadcrumbs", paper="arXiv:2312.06795", domain={"density": (0.0, 1.0), "gamma": (0.0, 1.0)})
def breadcrumbs(models, base, group, *, density: float = 0.15, gamma: float = 0.006, lambda_: float = 0.2):
    """Model Breadcrumbs: drop the outliers and the small entries of each task vector, layer by layer, and add the rest.

    gamma is the fraction of largest entries that go, density the fraction that stays, next in magnitude.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. mask
    tau = [m_n * tau_n for m_n, tau_n in zip(middle(tau, group, density, gamma), tau)]
    # 3. add
    return base + lambda_ * total(tau)


def middle(tau, group, density, gamma):
    """1 at the int(density * size) entries that come in magnitude after the int(gamma * size) largest."""
    magnitude = list(map(array_namespace(*tau).abs, tau))
    outliers = int(gamma * group.size)
    kept = int(density * group.size)
    masks = group.top(*magnitude, *magnitude, k=[outliers + kept] * len(tau) + [outliers] * len(tau))
    return [outer - inner for outer, inner in zip(masks[: len(tau)], masks[len(tau) :])]
