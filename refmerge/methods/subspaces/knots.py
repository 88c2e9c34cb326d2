import numpy as np

from refmerge.kept import once
from refmerge.matrices import change, decomposed
from refmerge.method import PerModel, method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.methods.subspaces.wudi import significant
from refmerge.methods.task_vectors.dare_linear import drop
from refmerge.methods.task_vectors.ties import disjoint_mean, elect
from refmerge.numeric import array_namespace, like, scores


@method(
    "knots",
    paper="arXiv:2410.19735",
    view="tensor",
    over="model",
    domain={"density": (0.0, 1.0), "trim": (0.0, 1.0), "tolerance": (0.0, 1.0)},
    stats={"mask": "draw"},
)
def knots(
    models,
    base,
    group,
    rng,
    name,
    *,
    density: PerModel[float] = 1.0,
    trim: float = 0.2,
    lambda_: float = 1.0,
    tolerance: float = 1e-5,
):
    """KnOTS: TIES, or DARE and TIES, on the coordinates of the task vectors in one basis that they share.

    The basis is that of the left singular vectors of the task vectors side by side. density is DARE's probability to keep a
    coordinate, trim the fraction that TIES keeps of all coordinates of the model.
    """
    # 1. task vectors
    tau = [finite(as_matrix(change(theta_t, base)), name) for theta_t in models]
    # 2. align
    U, S, *C = aligned(tau, tolerance)
    C = [within(base, C_t) for C_t in C]
    # 3. drop and rescale
    C = drop(C, rng, density, rescale=True)
    # 4. trim
    C = trimmed(C, group, trim, within(base, np.ones((len(S), tau[0].shape[1]))))
    # 5. elect sign
    gamma = elect(C)
    # 6. disjoint merge
    merged = as_matrix(scores(disjoint_mean(C, gamma)))
    # 7. turn back
    return base + lambda_ * like((U @ merged[: len(S)]).reshape(base.shape), base)


@once
def aligned(tau, tolerance):
    """U and S of the task vectors side by side, and the coordinates of each in that basis."""
    U, S, _ = significant(*decomposed(np.concatenate(tau, axis=1), spend=True), tolerance)
    return U, S, *(coordinates(tau_t, U, S, tolerance) for tau_t in tau)


def coordinates(tau_t, U, S, tolerance):
    """U^T tau_t, and 0 where that may be rounding's of a zero, which would agree in sign by chance: in rows that are short
    beside the longest, and where an entry is next to nothing."""
    C = U.T @ tau_t
    length = np.linalg.norm(C, axis=1, keepdims=True)
    real = (length > tolerance * length.max(initial=0.0)) & (np.abs(C) > 1e-10 * S.max(initial=0.0))
    return np.where(real, C, 0.0)


def trimmed(C, group, share, real):
    """Keep the int(share d) largest coordinates of each model, of the d where `real` is 1."""
    xp = array_namespace(*C)
    d = group.count(real > 0)
    return [m_t * C_t for m_t, C_t in zip(group.top(*map(xp.abs, C), k=[int(share * d)] * len(C)), C)]


def within(base, C):
    """The rows of C, and zeros below them, in the shape of a tensor that has as many rows or more."""
    rows = np.zeros(as_matrix(np.empty(base.shape, np.bool_)).shape)
    rows[: len(C)] = C
    return like(rows.reshape(base.shape), base)
