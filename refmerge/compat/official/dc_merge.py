from refmerge.compat.official._spectral import is_matrix, polar, running_mean, triplets
from refmerge.method import method
from refmerge.methods.subspaces.dc_merge import blocks, largest
from refmerge.methods.subspaces.tsvm import side_by_side, whole_matrices
from refmerge.methods.task_vectors.ties import disjoint_mean, elect
from refmerge.numeric import like, scores


@method(
    "official:dc_merge",
    paper="Tobeginwith/DC-Merge@3c443e4 vision_fft_merge/src/utils/DC_utils.py:dc_merge",
    view=whole_matrices,
    domain={"keep_topk": (0.0, 1.0)},
)
def dc_merge(models, base, name, *, alpha: float = 1.0, keep_topk: float = 0.001):
    """DC-Merge for full fine-tuning, without smoothing, whatever the rank."""
    # 1. task vectors
    Delta = [theta_t - base for theta_t in models]
    # 2. running mean of what is no matrix
    if not is_matrix(base, name):
        return base + alpha * running_mean(Delta)
    # 3. task singular vectors: none where there are more tasks than dimensions
    r = min(base.shape)
    tasks = [triplets(scores(Delta_t), int(r * (1 / len(models))), name) for Delta_t in Delta]
    # 4. merge in the cover space
    return base + alpha * like(covered(tasks, max(1, int(keep_topk * r**2))), base)


def covered(tasks, k):
    """The k largest entries of each task in the cover space, averaged where they agree in sign, within the tasks' blocks."""
    U, _, V = side_by_side(tasks)
    P, Q = polar(U), polar(V)
    M = [largest(((P.T @ U_t) * S_t) @ (V_t.T @ Q), k) for U_t, S_t, V_t in tasks]
    M = disjoint_mean(M, elect(M)) * blocks([len(S_t) for _, S_t, _ in tasks])
    return P @ M @ Q.T
