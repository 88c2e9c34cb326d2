import numpy as np

from refmerge.method import method
from refmerge.methods.task_vectors.arcee_fusion import quartiles
from refmerge.numeric import array_namespace, at_least_float32, at_precision, host, indicator, like, scores, tree_sum


@method(
    "mergekit:arcee_fusion",
    paper="mergekit 0.1.5 arcee_fusion.py",
    models=(1, 1),
    view=lambda ndim: "tensor" if ndim > 2 else "rows",
    least="float32",
)
def arcee_fusion(models, base, group):
    """Arcee Fusion along the last axis, with every number in the tensors' precision, in which the divergence of real weights
    is mostly rounding; quartiles of all entries where mergekit takes those of a million at random. 16 bits give float32."""
    (x,) = models

    def p(values):
        return at_precision(values, base)

    # 1. importance
    importance = array_namespace(base).abs(x - base) * like(divergence(x, base, p), base)[..., None]
    # 2. threshold
    q_1, median, q_3 = quartiles(importance, group)
    threshold = p(median + p(1.5 * p(q_3 - q_1)))
    # 3. fuse
    change = at_least_float32(x - base)
    return at_least_float32(base) + change * indicator(importance >= threshold, like=change)


def divergence(x, base, p):
    """Sum over the last axis of P log(P / Q), softmaxes with 1e-8 added."""
    P, Q = (p(p(softmax(scores(v))) + 1e-8) for v in (x, base))
    return p(host(tree_sum(p(P * p(np.log(p(P / Q)))), axis=-1)))


def softmax(v):
    e = np.exp(v - np.max(v, axis=-1, keepdims=True))
    return e / tree_sum(e, axis=-1)[..., None]
