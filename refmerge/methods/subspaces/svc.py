import numpy as np

from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import decomposed, finite
from refmerge.methods.subspaces.tsvm import is_matrix, whole_matrices
from refmerge.numeric import like, scores


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
    # 2. singular value decomposition of the merged change
    U, S, V = decomposed(finite(scores(merged) - scores(base), name))
    # 3. how often each task is in it
    s = np.stack([coefficients(U, S, V, finite(scores(theta_i) - scores(base), name), tolerance) for theta_i in tasks])
    # 4. calibrate
    gamma = 1 / np.mean(np.maximum(s, alpha), axis=0)
    # 5. merge
    return base + like((U * (gamma * S)) @ V.T, base)


def coefficients(U, S, V, Delta, tolerance):
    """s_r with which a task's response b_r = u_r^T Delta comes nearest to the merged one, a_r = S_r v_r; 0 where the task
    does not respond."""
    b = U.T @ Delta
    square, along = np.einsum("rn,rn->r", b, b), S * np.einsum("rn,nr->r", b, V)
    responds = np.sqrt(square) > tolerance * np.linalg.norm(Delta)
    return np.where(responds, along / np.where(responds, square, 1.0), 0.0)
