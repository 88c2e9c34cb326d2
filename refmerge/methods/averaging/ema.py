from refmerge.method import method


@method("ema", paper="arXiv:2406.16768", domain={"mu": (0.0, 1.0)})
def ema(models, base, *, mu: float = 0.01):
    """Exponential moving average that starts at the base and follows the models, the checkpoints of a run in their order.

    theta <- (1 - mu) theta + mu theta_n, once for each of them.
    """
    theta = base
    # 1. follow the run
    for theta_n in models:
        theta = (1 - mu) * theta + mu * theta_n
    return theta
