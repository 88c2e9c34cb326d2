from refmerge.method import method


@method("wise_ft", paper="arXiv:2109.01903", models=(1, 1))
def wise_ft(models, base, *, alpha: float = 0.5):
    """Weight-space ensemble of a zero-shot model and its fine-tune: theta = (1 - alpha) theta_0 + alpha theta_1."""
    theta_0, (theta_1,) = base, models
    # 1. interpolate
    return (1 - alpha) * theta_0 + alpha * theta_1
