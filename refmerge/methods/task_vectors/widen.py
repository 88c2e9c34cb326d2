from fnmatch import fnmatchcase

import numpy as np

from refmerge.method import method
from refmerge.numeric import array_namespace, by_columns, like, ranks, scores, total, tree_sum


@method("widen", paper="arXiv:2408.03092", view="tensor")
def widen(
    models,
    base,
    name,
    *,
    above_average_value_ratio: float = 1.0,
    score_calibration_value: float = 1.0,
    embeddings: tuple = ("model.embed_tokens.weight",),
):
    """WIDEN: weigh each column of each task vector by how much its magnitude and direction changed, by rank in its model.

    A matrix (out, in) has one column for each input feature; an input embedding (tokens, hidden), named by the globs
    `embeddings`, is transposed, so that its columns are tokens.
    """
    t, s = above_average_value_ratio, score_calibration_value
    transposed = base.ndim == 2 and any(fnmatchcase(name, glob) for glob in embeddings)
    W_0, *W = (as_matrix(x, transposed) for x in (base, *models))
    # 1. task vectors
    D = [W_n - W_0 for W_n in W]
    if base.ndim < 2:
        # 2. a vector: score the entries themselves
        R = np.stack([scores(array_namespace(D_n).abs(D_n)) for D_n in D])
        w = score(R, t * R.mean(axis=1, keepdims=True) < R, s)
    else:
        # 3. how far magnitude m and direction d of each column moved
        a, b = np.stack([by_columns(changes, W_0, W_n) for W_n in W], axis=1)
        # 4. rank within each model, score across models
        w = (score(*by_rank(ranks(a), t), s) + score(*by_rank(ranks(b), t), s)) / 2
    # 5. merge the task vectors
    merged = W_0 + total(like(w_n, W_0) * D_n for w_n, D_n in zip(w, D))
    return merged.T if transposed else array_namespace(base).reshape(merged, base.shape)


def as_matrix(x, transposed):
    """A tensor as a matrix whose columns are scored; vectors and numbers as a vector."""
    if transposed:
        return x.T
    return array_namespace(x).reshape(x, (x.shape[0], -1) if x.ndim > 2 else (-1,) if x.ndim == 0 else x.shape)


def changes(W_0, W):
    """(|m - m_0|, 1 - cos(d, d_0)) for each column, from the task vector itself and in float64: a difference of norms or
    a cosine near 1 would be all rounding error for a small D. NaN direction where a column is zero."""
    D = W - W_0
    square_0, square, square_D, along = (tree_sum(x * y, axis=0) for x, y in ((W_0, W_0), (W, W), (D, D), (D, W_0)))
    m_0, m = np.sqrt(square_0), np.sqrt(square)
    magnitude = np.abs(2 * along + square_D) / np.where(m + m_0 == 0, 1.0, m + m_0)
    zero = (m_0 == 0) | (m == 0)
    across = D - along / np.where(zero, 1.0, square_0) * W_0
    cos = (square_0 + along) / np.where(zero, 1.0, m_0 * m)
    small = tree_sum(across * across, axis=0) / np.where(zero, 1.0, square * (1 + np.abs(cos)))
    return magnitude, np.where(zero, np.nan, np.where(cos > 0, small, 1 - cos))


def by_rank(r, t):
    """Significance r / C of the ranks 0..C-1, and where it exceeds t times its mean: 2 r > t (C - 1), exactly."""
    C = r.shape[1]
    return r / C, 2 * r > t * (C - 1)


def score(R, above, s):
    """Softmax over the models; s where a model's significance is above its average."""
    e = np.exp(R - R.max(axis=0))
    return np.where(above, s, e / e.sum(axis=0))
