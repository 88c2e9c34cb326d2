from refmerge.method import method
from refmerge.numeric import array_namespace


@method("magmax", paper="arXiv:2407.06322")
def magmax(models, base, *, lambda_: float = 0.5):
    """MagMax: of each entry the largest change that any fine-tune made, added to the base.

    Of changes of one magnitude the later model's is taken.
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. select
    tau_max = largest(tau)
    # 3. add
    return base + lambda_ * tau_max


def largest(tau):
    """Entry by entry the task vector of the largest magnitude, of equal ones the last."""
    xp = array_namespace(*tau)
    chosen, *others = tau
    for tau_n in others:
        chosen = xp.where(xp.abs(tau_n) >= xp.abs(chosen), tau_n, chosen)
    return chosen
