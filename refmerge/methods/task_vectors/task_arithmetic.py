from refmerge.method import PerModel, method
from refmerge.numeric import total


@method("task_arithmetic", paper="arXiv:2212.04089")
def task_arithmetic(models, base, *, weight: PerModel[float] = 1.0, lambda_: float = 1.0):
    """Add task vectors to the base: theta = theta_0 + lambda sum_n w_n tau_n.

    A negative lambda forgets (negation); weights -1, 1, 1 of models A, B, C give "A is to B as C is to D" (analogy).
    """
    # 1. task vectors
    tau = [theta_n - base for theta_n in models]
    # 2. add
    return base + lambda_ * total(w_n * tau_n for w_n, tau_n in zip(weight, tau))
