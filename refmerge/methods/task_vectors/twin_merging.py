from typing import Literal

from refmerge.method import PerModel, method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.methods.task_vectors.cart import truncated
from refmerge.numeric import array_namespace, like, scores, total


@method(
    "twin_merging",
    paper="arXiv:2406.15479",
    view="tensor",
    domain={"density": (0.0, 1.0)},
    stats={"mask": "draw"},
)
def twin_merging(
    models,
    base,
    group,
    rng,
    name,
    *,
    weight: PerModel[float],
    sparsify: Literal["svd", "magnitude", "bernoulli"] = "svd",
    density: float = 0.1,
    lambda_: float = 0.3,
):
    """Twin-Merging: a shared model, and on top of it each model's own, compressed remainder, weighed as a router says.

    The shared model is that of task arithmetic with `lambda_`; `weight` is what the router gives for one input.
    """
    # 1. shared model
    theta = base + lambda_ * total(theta_n - base for theta_n in models)
    # 2. exclusive remainders
    v = [theta_n - theta for theta_n in models]
    # 3. compress
    if base.ndim > 1 and density < 1:
        v = compressed(v, sparsify, density, group.tensor, rng, name)
    # 4. merge
    return theta + total(w_n * v_n for w_n, v_n in zip(weight, v))


def compressed(v, how, density, tensor, rng, name):
    """int(density r) singular terms of each matrix, its int(density n) largest entries, or a random fraction of its entries,
    divided by that fraction."""
    if how == "svd":
        matrices = [finite(as_matrix(scores(v_n)), name) for v_n in v]
        k = int(density * min(matrices[0].shape))
        return [like(truncated(R, k).reshape(v_n.shape), v_n) for R, v_n in zip(matrices, v)]
    if how == "magnitude":
        magnitude = map(array_namespace(*v).abs, v)
        return [m_n * v_n for m_n, v_n in zip(tensor.top(*magnitude, k=[int(density * tensor.size)] * len(v)), v)]
    if density == 0:
        return [0 * v_n for v_n in v]
    return [(1 / density) * (rng.keep(density, model=n) * v_n) for n, v_n in enumerate(v)]
