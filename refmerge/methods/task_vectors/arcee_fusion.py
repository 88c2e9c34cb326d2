import numpy as np

from refmerge.method import method
from refmerge.numeric import array_namespace, like, scores, tree_sum


@method("arcee_fusion", paper="none; mergekit 0.1, arcee.ai", models=(1, 1), view="rows")
def arcee_fusion(models, base, group):
    """Arcee Fusion: take the entries whose change is important, and leave the others at the base.

    Important is an outlier of |change| times the divergence of its row, above the median plus 1.5 interquartile ranges.
    """
    (theta,) = models
    # 1. divergence of each row
    K = divergence(theta, base)
    # 2. importance
    importance = array_namespace(base).abs(theta - base) * like(K, base)[:, None]
    # 3. threshold
    q_1, median, q_3 = quartiles(importance, group)
    threshold = median + 1.5 * (q_3 - q_1)
    # 4. fuse
    return array_namespace(base).where(importance < threshold, base, theta)


def divergence(theta, base):
    """KL(p, q) of the softmaxes p and q of each row, as sum q (d e^d - (e^d - 1)) with d = log p - log q: no term of it is
    negative, where sum p log(p / q) cancels."""
    x, b = scores(theta), scores(base)
    (p, norm_x), (q, norm_b) = softmax(x), softmax(b)
    d = (x - b) - (norm_x - norm_b)
    return np.maximum(tree_sum(p * d - np.where(d < 1, q * np.expm1(d), p - q), axis=-1), 0.0)


def softmax(x):
    """(e^x / sum e^x, log sum e^x) of each row."""
    top = np.max(x, axis=-1, keepdims=True)
    e = np.exp(x - top)
    whole = tree_sum(e, axis=-1)[:, None]
    return e / whole, top + np.log(whole)


def quartiles(x, group):
    """The entries that come after a quarter, a half and three quarters of the others in ascending order, rounded down."""
    last = group.size - 1
    return group.kth_largest(x, x, x, k=[group.size - last * i // 4 for i in (1, 2, 3)])
