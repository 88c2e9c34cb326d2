from typing import Literal

from refmerge.compat.mergekit._steps import consensus
from refmerge.compat.mergekit.della import probabilities
from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, at_ranks


@method(
    "official:della",
    paper="declare-lab/della@8067515 mergekit/mergekit/merge_methods/generalized_task_arithmetic.py:GTATask.execute",
    view="rows",
    stats={"mask": "draw", "prob": "element"},
)
def della(
    models,
    base,
    stats,
    rng,
    *,
    weight: PerModel[float],
    density: PerModel[float] = 1.0,
    window_size: PerModel[float] = 0.0,
    epsilon: PerModel[float | None] = None,
    rescale: Literal[0, 1] = 1,
    normalize: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
):
    """The authors' fork of mergekit: drop by rank in each row, divide by the own probability, elect, weighted mean, lambda.

    epsilon is half of window_size and stands for it. Recorded probabilities take the place of those by rank: the authors'
    della_norank and della_layer_norm differ in nothing else.
    """
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop
    half = [0.5 * w if e is None else e for w, e in zip(window_size, epsilon)]
    recorded = [s.get("prob") for s in stats]
    sparse = [
        d if rho >= 1 else rank_magnitude(d, rho, e, p, rescale, rng, n)
        for n, (d, rho, e, p) in enumerate(zip(delta, density, half, recorded))
    ]
    # 3. elect and merge
    mixed = consensus(sparse, weight, normalize)
    return base + lambda_ * mixed


def rank_magnitude(d, density, epsilon, p, rescale, rng, n):
    """Keep with probability p, which grows with the rank of the magnitude in its row, and divide by it."""
    if p is None:
        low, high = sorted((density - epsilon, density + epsilon))
        if low < 0 or high > 1 or (rescale and low == 0):
            raise UsageError(
                f"official:della: density {density:g} and window_size {2 * epsilon:g} give probabilities from {low:g} to "
                f"{high:g}, with which the authors' code fails"
            )
        p = at_ranks(probabilities(density, epsilon, d), array_namespace(d).abs(d))
    kept = rng.keep(p, model=n) * d
    return kept / p if rescale else kept
