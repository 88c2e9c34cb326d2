import numpy as np

from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, like, scores, stacked_sum


@method(
    "official:pcb",
    paper="duguodong7/pcb-merging@5897888 nlp_source_code/utils/merge_utils.py:task_para_att_merge",
    over="model",
)
def pcb(models, base, group, *, att_ratio: float = 0.1, lams: PerModel[float] = 1.0, clamp: float = 0.01):
    """The formula of the language experiments. Their script takes att_ratio in whole per cent and one lambda, rounded to a
    decimal, for all models."""
    # 1. task vectors
    F = [theta_n - base for theta_n in models]
    # 2. clamp and normalise the magnitudes
    C, N = clamped_and_normalised(F, clamp, group)
    # 3. balance
    balancing = [intra(N_n, len(F)) * of(np.tanh, F_n * stacked_sum(F)) for F_n, N_n in zip(F, N)]
    # 4. drop and merge
    return base + merged(C, kept(balancing, att_ratio, group), lams)


def clamped_and_normalised(F, ratio, group):
    """sign(F) A and (A - min A) / (max A - min A), of the magnitudes A held between the int(d ratio)-th in ascending order,
    counted from 0, and the int(d (1 - ratio) - 1)-th."""
    xp = array_namespace(*F)
    magnitude = list(map(xp.abs, F))
    low, high = bounds(magnitude, ratio, ratio, group)
    A = [held(x, lo, hi) for x, lo, hi in zip(magnitude, low, high)]
    C = [xp.sign(F_n) * A_n for F_n, A_n in zip(F, A)]
    return C, [normalised(A_n, min(lo, hi), hi) for A_n, lo, hi in zip(A, low, high)]


def bounds(x, min_ratio, max_ratio, group):
    """Order statistics of each array."""
    d = group.size
    first, last = int(d * min_ratio), int(d * (1 - max_ratio) - 1)
    found = group.kth_largest(*x, *x, k=[d - first] * len(x) + [d - last] * len(x))
    return found[: len(x)], found[len(x) :]


def held(x, low, high):
    """x between low and high, the latter where low is above it."""
    xp = array_namespace(x)
    return xp.minimum(xp.maximum(x, xp.full_like(x, low)), xp.full_like(x, high))


def normalised(x, low, high):
    """(x - low) / (high - low): NaN where these are the same."""
    return (x - low) / array_namespace(x).full_like(x, high - low)


def intra(N_n, n):
    return of(np.exp, n * (N_n * N_n))


def kept(balancing, ratio, group):
    """Scores below the int(d (1 - ratio))-th in ascending order, counted from 0, become 0 and the largest 1."""
    if not 0 < ratio <= 1:
        raise UsageError(
            f"a ratio of {ratio:g} keeps nothing, where the authors' code fails, or more than all: it is in (0, 1]"
        )
    low, high = bounds(balancing, 1 - ratio, 0, group)
    return [normalised(held(x, lo, hi), lo, hi) for x, lo, hi in zip(balancing, low, high)]


def merged(C, scale, lams):
    """The mean of lambda_n C_n, weighted by the scores."""
    xp = array_namespace(*C)
    weight = stacked_sum(scale)
    return stacked_sum(lam * C_n * s_n for lam, C_n, s_n in zip(lams, C, scale)) / xp.maximum(
        weight, xp.full_like(weight, 1e-12)
    )


def of(function, x):
    """A transcendental function, computed in float64."""
    return like(function(scores(x)), x)
