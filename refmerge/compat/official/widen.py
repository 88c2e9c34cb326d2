import numpy as np

from refmerge.method import method
from refmerge.methods.task_vectors.widen import as_matrix
from refmerge.numeric import array_namespace, host, like, ranks, total, tree_sum


@method(
    "official:widen",
    paper="yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.widen_merging",
    view="tensor",
)
def widen(
    models, base, name, *, above_average_value_ratio: float = 1.0, score_calibration_value: float = 1.0
):  # fmt: skip
    """WIDEN with the authors' direction score, 1 - cosine in the weights' precision, and float32 ranks and scores."""
    t, s = np.float32(above_average_value_ratio), np.float32(score_calibration_value)
    transposed = name == "model.embed_tokens.weight" and base.ndim == 2
    W_0, *W = (as_matrix(x, transposed) for x in (base, *models))
    # 1. task vectors
    D = [W_n - W_0 for W_n in W]
    if base.ndim < 2:
        # 2. a vector: score the entries themselves
        w = score(np.stack([host(array_namespace(D_n).abs(D_n)) for D_n in D]), t, s)
    else:
        # 3. how far magnitude and direction of each column moved
        m_0, d_0 = disentangled(W_0)
        a, b = [], []
        for W_n in W:
            m_n, d_n = disentangled(W_n)
            a.append(np.abs(m_n - m_0))
            b.append(1 - cosine(d_n, d_0))
        # 4. rank within each model, score across models
        w = np.float32(0.5) * (score(by_rank(np.stack(a)), t, s) + score(by_rank(np.stack(b)), t, s))
    # 5. merge the task vectors
    merged = W_0 + total(like(w_n, W_0) * D_n for w_n, D_n in zip(w, D))
    return merged.T if transposed else array_namespace(base).reshape(merged, base.shape)


def disentangled(W):
    """(m, d): the columns' norms, rounded to the weights' precision, and the columns divided by them."""
    x = host(W)
    m = np.sqrt(host(tree_sum(W * W, axis=0))).astype(x.dtype)
    return m, x / m


def cosine(x, y):
    """Cosine of columns in the arrays' precision; a product of squared norms below 1e-16 counts as 1e-16."""
    dot, xx, yy = ((p * q).sum(axis=0) for p, q in ((x, y), (x, x), (y, y)))
    return dot / np.sqrt(np.maximum(xx * yy, x.dtype.type(1e-16)))


def by_rank(x):
    """r / C of the stable ascending rank r, in float32."""
    return (ranks(x) / x.shape[1]).astype(np.float32)


def score(R, t, s):
    """Softmax over the models; s where a model's significance is above t times its average."""
    e = np.exp(R - R.max(axis=0))
    return np.where(R.mean(axis=1, keepdims=True, dtype=R.dtype) * t < R, s, e / e.sum(axis=0))
