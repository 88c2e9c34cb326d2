import numpy as np

from refmerge.compat.mergekit._steps import consensus, drawn
from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, at_precision, at_ranks, host, like


@method(
    "mergekit:della",
    paper="mergekit 0.1.5 generalized_task_arithmetic.py",
    view=lambda ndim: "tensor" if ndim > 2 else "rows",
    stats={"mask": "draw"},
)
def della(
    models,
    base,
    group,
    rng,
    *,
    weight: PerModel[float],
    density: PerModel[float] = 1.0,
    epsilon: PerModel[float] = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
):
    """Drop by rank along axis 1, restore each tensor's sum of magnitudes with one factor, elect, weighted mean."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. drop and rescale
    sparse = magprune(delta, density, epsilon, rescale, rng, group)
    # 3. elect and merge
    mixed = consensus(sparse, weight, normalize)
    return base + lambda_ * mixed


def magprune(delta, density, epsilon, rescale, rng, group):
    """Rank sparsifier: all if density >= 1, none if it is <= 0; else keep with probabilities that grow with the rank of the
    magnitude along axis 1 (a vector is one row), and shrink where epsilon is negative."""
    xp = array_namespace(*delta)
    kept = []
    for n, (d, rho, eps) in enumerate(zip(delta, density, epsilon)):
        if rho >= 1:
            kept.append(d)
        elif rho <= 0:
            kept.append(xp.zeros_like(d))
        else:
            if not (0 < rho - eps <= 1 and 0 <= rho + eps < 1):
                raise UsageError(f"mergekit: density {rho:g} +- epsilon {eps:g} must lie inside (0, 1)")

            def p(d=d, rho=rho, eps=eps):
                return at_ranks(probabilities(rho, eps, d), xp.abs(d), axis=1)

            kept.append(rng.keep(p, model=n) * d)
    return drawn(kept, delta, density, rescale, group)


def probabilities(density, epsilon, d):
    """Of the ranks 1 ... w along axis 1, in the precision of d, where ranks above 256 share bfloat16 numbers."""
    w = d.shape[1]
    if w == 1:
        return np.asarray([density])
    rank = like(np.arange(1, w + 1), d)
    span = array_namespace(d).full_like(rank, at_precision(w, d) - 1)
    return host(at_precision(density - epsilon, d) + 2 * epsilon * ((rank - 1) / span))
