import numpy as np

from refmerge.errors import UsageError
from refmerge.matrices import decomposed
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import like, scores


@method("official:svc", paper="lyymuwu/SVC@6ad2b31 merge_func.py:Align", models=(2, None), view=whole_matrices)
def svc(models, base, name, *, alpha: float = 0.1, right_only: bool = False, target: int = -1):
    """The merged model comes first. right_only: responses of the right singular vectors in place of the left ones. target:
    one task alone calibrates, where it is in the merge with a positive sign. Factors are rounded to float32."""
    merged, *tasks = models
    if not -1 <= target < len(tasks):
        raise UsageError(f"official:svc: target = {target} is none of -1 (all) to {len(tasks) - 1}, the tasks' places")
    # 1. keep what is no matrix, projections and embeddings
    if base.ndim != 2 or "text_projection" in name or "embedding" in name:
        return merged
    # 2. singular value decomposition of the merged change
    M = finite(scores(merged) - scores(base), name)
    U, S, V = decomposed(M)
    # 3. how often each task is in it
    chosen = tasks if target == -1 else [tasks[target]]
    Delta = [finite(scores(theta_i) - scores(base), name) for theta_i in chosen]
    s = np.stack([projected(V, M.T, D.T) if right_only else projected(U, M, D) for D in Delta])
    # 4. calibrate
    eta = np.mean(np.maximum(s, alpha), axis=0)
    if target != -1:
        eta = np.where(s[0] > 0, np.maximum(s[0], alpha), 1.0)
    # 5. merge
    return base + like((U * (S / eta.astype(np.float32))) @ V.T, base)


def projected(U, M, Delta):
    """For each column u of U the coefficient of u^T Delta that comes nearest to u^T M; squares are at least 1e-12."""
    a, b = U.T @ M, U.T @ Delta
    return np.sum(a * b, axis=1) / np.maximum(np.sum(b * b, axis=1), 1e-12)
