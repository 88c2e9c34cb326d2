from refmerge.method import method
from refmerge.methods.task_vectors.breadcrumbs import middle
from refmerge.methods.task_vectors.ties import disjoint_mean, elect


@method("breadcrumbs_ties", paper="arXiv:2312.06795", domain={"density": (0.0, 1.0), "gamma": (0.0, 1.0)})
def breadcrumbs_ties(models, base, group, *, density: float = 0.15, gamma: float = 0.006, lambda_: float = 1.0):
    """Model Breadcrumbs with TIES' election: drop the outliers and the small entries of each task vector, layer by layer,
    elect a sign for every entry, and average the task vectors that agree with it.

    gamma is the fraction of largest entries that go, density the fraction that stays, next in magnitude.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. mask
    tau = [m_n * tau_n for m_n, tau_n in zip(middle(tau, group, density, gamma), tau)]
    # 3. elect sign
    s = elect(tau)
    # 4. disjoint merge
    return base + lambda_ * disjoint_mean(tau, s)
