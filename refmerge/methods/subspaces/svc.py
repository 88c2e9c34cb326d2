import numpy as np

from refmerge.errors import UsageError
from refmerge.matrices import change, product
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.tsvm import is_matrix, whole_matrices


@method(
    "svc",
    paper="arXiv:2602.05536",
    models=(2, None),
    view=whole_matrices,
    domain={"alpha": (0.001, 1.0), "tolerance": (1e-12, 0.1)},
)
def svc(
    models,
    base,
    name,
    *,
    alpha: float = 0.1,
    tolerance: float = 1e-5,
    kept: tuple = ("*text_projection*", "*embedding*"),
):
    """Singular value calibration of a merged model, the first of the models, by those that it was merged from: singular
    values that count what tasks share more than once shrink.

    Responses of a task up to `tolerance` times its length count as zero. What is no matrix stays as it is merged, as do the
    matrices whose names match the globs `kept`.
    """
    merged, *tasks = models
    # 1. keep what is no matrix
    if not is_matrix(base, name, kept):
        return merged
    # 2. singular vectors of the merged change
    M = finite(change(merged, base), name)
    S, W = shorter_side(M, name)
    # 3. how often each task is in it
    a = responses(W, M, M)
    s = np.stack([coefficients(a, W, S, M, finite(change(theta_i, base), name), tolerance) for theta_i in tasks])
    # 4. calibrate
    gamma = 1 / np.mean(np.maximum(s, alpha), axis=0)
    # 5. merge
    C = (W * gamma) @ W.T
    return base + (product(C, M, base) if of_rows(W, M) else product(M, C, base))


def shorter_side(M, name):
    """The singular values of M, descending, and, by columns, its left singular vectors, or the right ones where M is higher
    than wide: by the eigenvalues of M M^T or M^T M. UsageError where these are beyond the range."""
    G = M @ M.T if len(M) <= M.shape[1] else M.T @ M
    if not np.all(np.isfinite(G)):
        raise UsageError(f"svc: tensor {name!r}: a change above 1e150 has a square beyond the range; no option allows it")
    squares, W = np.linalg.eigh(G)
    return np.sqrt(np.maximum(squares[::-1], 0.0)), W[:, ::-1]


def of_rows(W, M):
    """Whether W are left singular vectors of M."""
    return len(W) == len(M)


def responses(W, M, Delta):
    """u_r^T Delta by rows, or, with right singular vectors in W, S_r times that, which is v_r^T M^T Delta."""
    return W.T @ (Delta if of_rows(W, M) else M.T @ Delta)


def coefficients(a, W, S, M, Delta, tolerance):
    """s_r with which a task's response b_r = u_r^T Delta comes nearest to the merged one, a_r; 0 where the task does not
    respond. Where both are S_r times as large, that cancels."""
    b = responses(W, M, Delta)
    square, along = np.einsum("rn,rn->r", b, b), np.einsum("rn,rn->r", a, b)
    responds = np.sqrt(square) > tolerance * np.linalg.norm(Delta) * (1.0 if of_rows(W, M) else S)
    return np.where(responds, along / np.where(responds, square, 1.0), 0.0)
