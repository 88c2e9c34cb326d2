from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.numeric import total


@method("linear", paper="arXiv:2203.05482")
def linear(models, *, weight: PerModel[float] = 1.0, normalize: bool = True):
    """Weighted average of the models; with equal weights the uniform soup.

    theta = sum_n c_n theta_n, with c_n = w_n / sum(w) if normalize, else c_n = w_n.
    """
    # 1. coefficients
    c = normalized(weight, "linear", "; normalize=False takes them as they are") if normalize else list(weight)
    # 2. average
    return total(c_n * theta_n for c_n, theta_n in zip(c, models))


def normalized(weight, method, instead=""):
    """w_n / sum(w). UsageError where that has no value, with what the method offers instead."""
    w = total(weight)
    if w == 0:
        raise UsageError(f"{method}: the weights sum to 0 and cannot be normalised{instead}")
    return [w_n / w for w_n in weight]
