from fnmatch import fnmatchcase

from refmerge.method import method
from refmerge.numeric import array_namespace, indicator


@method("bitdelta", paper="arXiv:2402.10193", models=(1, 1))
def bitdelta(models, base, group, name, *, layers: tuple = ("*mlp*.*proj*.weight", "*self_attn*.*proj*.weight")):
    """BitDelta: what a fine-tune changed in each matrix, cut down to the sign of each entry times one scale.

    Tensors that none of the globs `layers` names stay the fine-tune's.
    """
    (theta,) = models
    if not any(fnmatchcase(name, glob) for glob in layers):
        return theta
    # 1. change
    delta = theta - base
    # 2. signs
    B = signs(delta)
    # 3. scale
    alpha = mean_magnitude(delta, group)
    # 4. add
    return base + alpha * B


def signs(delta):
    """+1 where delta >= 0, and -1 elsewhere."""
    return 2 * indicator(delta >= 0, like=delta) - 1


def mean_magnitude(delta, group):
    """The scale that brings alpha B nearest to delta: the mean of the magnitudes."""
    return group.sum(delta, of=array_namespace(delta).abs) / group.size
