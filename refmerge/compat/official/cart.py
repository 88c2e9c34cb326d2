from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.methods.task_vectors.cart import rank, truncated
from refmerge.numeric import like, scores, total


@method(
    "official:cart",
    paper="JH-GEECS/CART@964cfd7 src/merging.py:StaticMergeModule._merge_weights",
    view="tensor",
    domain={"rank_ratio": (0.0, 1.0)},
)
def cart(models, base, name, *, rank_ratio: float = 0.12, prior: float = 2.0):
    """Low rank for what has attn or mlp in its name and neither ln nor bias. For all else the centred task vectors are added
    as they are, whose sum is 0 up to rounding. The defaults are those for eight tasks."""
    # 1. average
    theta_avg = base + (1 / len(models)) * total(theta_n - base for theta_n in models)
    # 2. centred task vectors
    tau = [(theta_n - base) + base - theta_avg for theta_n in models]
    # 3. truncate
    named = any(part in name for part in ("attn", "mlp")) and not any(part in name for part in ("ln", "bias"))
    if named and base.ndim > 1:
        R = [finite(as_matrix(scores(tau_n)), name) for tau_n in tau]
        k = rank(rank_ratio, min(R[0].shape))
        tau = [like(truncated(R_n, k).reshape(base.shape), base) for R_n in R]
    elif rank_ratio == 0:
        tau = [0 * tau_n for tau_n in tau]
    # 4. add
    return theta_avg + prior * total(tau)
