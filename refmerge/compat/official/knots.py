# Longer than others: a decomposition to and fro, DARE, a trim and an election of its own, and three ways to merge.
from typing import Literal

import numpy as np

from refmerge.compat.official._steps import with_majority
from refmerge.compat.official.ties import agreeing, disjoint
from refmerge.errors import UsageError
from refmerge.kept import once
from refmerge.method import method
from refmerge.methods.subspaces.knots import within
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.task_vectors.ties import elect
from refmerge.numeric import array_namespace, host, indicator, like


@method(
    "official:knots",
    paper="gstoica27/KnOTS@baa35e8 task_merger.py:SVDMerger",
    view="tensor",
    over="model",
    stats={"": "whole"},
    domain={"dare_pruning_coeffs": (0.0, 1.0), "topK": (0.0, 100.0)},
)
def knots(
    models,
    base,
    stats,
    group,
    rng,
    name,
    *,
    merge_method: Literal["ties", "tv"] = "ties",
    topK: float = 100,
    merging_type: Literal["mean", "sum", "max"] = "mean",
    concat_across_output: bool = True,
    scaling_coeff: float = 1.0,
    dare: bool = False,
    dare_pruning_coeffs: float = 0.0,
    dare_seed: int = 0,
):
    """The authors' SVDMerger in float32, on matrices; all other tensors stay the base's. topK is per cent above 1, and 100
    or 1 keep all. A recorded mask, rank x input under the module's name, says what DARE keeps; dare_seed is not looked at.
    """
    # 1. task vectors
    matrix = base.ndim == 2
    tau = [turned(host(theta_t - base), concat_across_output, name) for theta_t in models]
    # 2. align
    U, *sV = aligned([finite(x, name) for x in tau]) if matrix else (None, *(np.zeros((0, 1)) for _ in tau))
    C = [within(base, x) for x in sV]
    # 3. drop and rescale
    if dare:
        C = [kept(base, s, rng, t, dare_pruning_coeffs) * C_t for t, (s, C_t) in enumerate(zip(stats, C))]
    # 4. trim; ties at the threshold stay
    d = group.count(within(base, np.ones(sV[0].shape)) > 0)
    C = at_least(C, group, d, topK / 100 if topK > 1 else topK)
    # 5. elect sign
    if merge_method == "ties":
        C = agreeing(C, with_majority(elect(C), group))
    # 6. merge
    merged = merge([scaling_coeff * C_t for C_t in C], merging_type)
    # 7. turn back
    return base + like(turned(U @ host(merged)[: U.shape[1]], concat_across_output, name), base) if matrix else base


def turned(x, concat_across_output, name):
    """Transposed unless the task vectors are to stand side by side; the authors' code then fails unless it is square."""
    if concat_across_output or x.ndim != 2:
        return x
    if x.shape[0] != x.shape[1]:
        raise UsageError(f"official:knots: concat_across_output = False fails at tensor {name!r}, which is not square")
    return x.T


@once
def aligned(tau):
    """U and S V_t^T of the task vectors side by side, decomposed in float64; singular values up to 1e-5 are dropped, and the
    rest is rounded to float32."""
    U, s, Vt = np.linalg.svd(np.concatenate(tau, axis=1).astype(np.float64), full_matrices=False)
    U, s, Vt = (x.astype(np.float32) for x in (U[:, s > 1e-5], s[s > 1e-5], Vt[s > 1e-5]))
    return U, *(s[:, None] * V for V in np.split(Vt, len(tau), axis=1))


def kept(base, stats, rng, t, p):
    """The mask of what DARE keeps, over the probability to."""
    if p == 1:
        raise UsageError("official:knots: dare_pruning_coeffs = 1 would drop all, and the authors' code divides by 0")
    mask = within(base, host(stats[""])) if "" in stats else rng.keep(1 - p, model=t)
    return (1 / (1 - p)) * mask


def at_least(C, group, d, share):
    """What is at least the (d - int(d share))-th smallest magnitude of a model's d coordinates; all for a share of 1."""
    if share >= 1 or not d:
        return C
    xp = array_namespace(*C)
    magnitude = list(map(xp.abs, C))
    least = group.kth_largest(*magnitude, k=[int(d * share) + 1] * len(C))
    return [indicator(a >= c, like=a) * C_t for a, c, C_t in zip(magnitude, least, C)]


def merge(C, how):
    """The mean over what is not zero, the sum, or the largest magnitude, which has lost its sign."""
    if how != "max":
        return disjoint(C, None, how)
    xp = array_namespace(*C)
    largest = xp.abs(C[0])
    for C_t in C[1:]:
        largest = xp.maximum(largest, xp.abs(C_t))
    return largest
