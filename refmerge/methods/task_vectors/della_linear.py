from refmerge.method import PerModel, method
from refmerge.methods.task_vectors.della import magprune
from refmerge.numeric import total


@method(
    "della_linear",
    paper="arXiv:2406.11617",
    view="rows",
    domain={"density": (0.0, 1.0), "epsilon": (0.0, 0.5)},
    stats={"mask": "draw"},
)
def della_linear(
    models,
    base,
    rng,
    *,
    density: PerModel[float] = 0.7,
    epsilon: PerModel[float] = 0.07,
    weight: PerModel[float] = 1.0,
    lambda_: float = 1.0,
    rescale: bool = True,
):
    """DELLA's drop with task arithmetic: drop the small entries of each row more often than the large ones, then add.

    The probability 1 - p of an entry to stay grows with its rank in its row, from density - epsilon to density + epsilon;
    an entry that stays is divided by it.
    """
    # 1. task vectors
    delta = [theta_n - base for theta_n in models]
    # 2. drop
    delta = magprune(delta, rng, density, epsilon, rescale)
    # 3. add
    return base + lambda_ * total(w_n * delta_n for w_n, delta_n in zip(weight, delta))
