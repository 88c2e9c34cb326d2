from refmerge.method import method
from refmerge.numeric import array_namespace, at_precision, indicator, stacked_sum, total


@method("mergekit:ram", paper="mergekit 0.1.5 ram.py:ram_merge")
def ram(models, base, *, epsilon: float = 1e-5):
    """RAM, with epsilon in the tensors' precision; shared changes are divided by their number before they are added."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. unique and shared changes
    unique, shared = parts(delta, changes(delta, epsilon))
    # 3. add
    return base + stacked_sum(u + s for u, s in zip(unique, shared))


def changes(delta, epsilon):
    """Where each task vector is larger than epsilon, which is no finer than the tensors' numbers."""
    xp = array_namespace(*delta)
    return [xp.abs(d) > at_precision(epsilon, d) for d in delta]


def parts(delta, changed):
    """The unique changes, and the shared ones over their number. 0 times a change that is infinite is NaN."""
    xp = array_namespace(*delta)
    masks = [indicator(c, like=d) for c, d in zip(changed, delta)]
    count = total(masks)
    unique, shared = indicator(count == 1, like=count), indicator(count > 1, like=count)
    divisor = xp.maximum(count, xp.ones_like(count))
    delta = [d * m for d, m in zip(delta, masks)]
    return [d * unique for d in delta], [d * shared / divisor for d in delta]
