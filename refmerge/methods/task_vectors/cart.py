from fnmatch import fnmatchcase

from refmerge.matrices import decomposed
from refmerge.method import method
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite
from refmerge.numeric import like, mean, scores, total


@method("cart", paper="arXiv:2412.12153", view="tensor", domain={"rank_ratio": (0.0, 1.0)})
def cart(models, name, *, rank_ratio: float = 0.12, lambda_: float = 2.0, layers: tuple = ("*attn*", "*mlp*")):
    """CART: the average of the models, and on top of it the largest singular directions of each model's difference from it.

    So are the tensors of two or more axes merged that one of the globs `layers` names; all others are averaged.
    """
    # 1. average
    theta_avg = mean(models)
    if theta_avg.ndim < 2 or not any(fnmatchcase(name, glob) for glob in layers):
        return theta_avg
    # 2. centred task vectors
    tau = [finite(as_matrix(scores(theta_n) - scores(theta_avg)), name) for theta_n in models]
    # 3. truncate
    k = rank(rank_ratio, min(tau[0].shape))
    tau = [truncated(tau_n, k) for tau_n in tau]
    # 4. add
    return theta_avg + lambda_ * like(total(tau).reshape(theta_avg.shape), theta_avg)


def rank(ratio, r):
    """int(ratio r), but at least 1; 0 where the ratio is."""
    return max(1, int(ratio * r)) if ratio > 0 else 0


def truncated(R, k):
    """The first k terms of the singular value decomposition of a matrix."""
    U, S, V = decomposed(R)
    return (U[:, :k] * S[:k]) @ V[:, :k].T
