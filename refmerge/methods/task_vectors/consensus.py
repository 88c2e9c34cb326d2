import math
from typing import Literal

from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.tall_masks import mask, multitask_vector
from refmerge.numeric import indicator, total


@method(
    "consensus",
    paper="arXiv:2405.07813",
    over="model",
    domain={"k": (0, math.inf), "threshold": (0.0, math.inf), "density": (0.0, 1.0)},
)
def consensus(
    models,
    base,
    group,
    *,
    k: int = 2,
    threshold: PerModel[float] = 0.4,
    multitask: Literal["sum", "ties"] = "sum",
    density: float = 0.2,
    lambda_: float = 1.0,
):
    """Consensus Merging: keep the entries of the multi-task vector that the TALL-masks of at least `k` tasks use.

    With k = 2 the catastrophic ones, which no task uses, and the selfish ones, which one task uses, go back to the base.
    """
    # 1. task vectors
    tau = [theta_t - base for theta_t in models]
    # 2. multi-task vector
    tau_MTL = multitask_vector(tau, group, multitask, density)
    # 3. masks
    m = [mask(tau_t, tau_MTL, lambda_t) for tau_t, lambda_t in zip(tau, threshold)]
    # 4. consensus
    keep = indicator(total(m) >= k, like=base)
    # 5. add
    return base + lambda_ * (keep * tau_MTL)
