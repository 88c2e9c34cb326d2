from refmerge.method import method


@method("passthrough", paper="no paper: mergekit 0.1.5", models=(1, 1))
def passthrough(models, *, scale: float = 1.0):
    """One model as it is, or multiplied by a number."""
    (theta,) = models
    # 1. scale
    return scale * theta
