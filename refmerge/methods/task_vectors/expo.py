from refmerge.method import method


@method("expo", paper="arXiv:2404.16792", models=(1, 1))
def expo(models, base, *, alpha: float = 0.3):
    """ExPO: go on in the direction of training, from the base through the trained model and `alpha` times as far again."""
    (theta,) = models
    # 1. change
    tau = theta - base
    # 2. extrapolate
    return theta + alpha * tau
