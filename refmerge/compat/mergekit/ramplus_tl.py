import numpy as np

from refmerge.compat.mergekit.ram import changes, parts
from refmerge.method import method
from refmerge.numeric import at_least_float32, stacked_sum


@method("mergekit:ramplus_tl", paper="mergekit 0.1.5 ram.py:ramplus_tl_merge", least="float32")
def ramplus_tl(models, base, group, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5):
    """RAM+ for each tensor. The scales are float32 whatever the tensors are, and make float32 of 16-bit ones."""
    # 1. task vectors
    delta = [x - base for x in models]
    # 2. unique and shared changes
    changed = changes(delta, epsilon)
    unique, shared = parts(delta, changed)
    # 3. scales
    scale = scales(changed, group, r, alpha, epsilon)
    # 4. add
    wide = at_least_float32
    return wide(base) + stacked_sum(float(c) * wide(u) + wide(s) for c, u, s in zip(scale, unique, shared))


def scales(changed, group, r, alpha, epsilon):
    """1 + r times shared over unique changes, at most alpha, in float32. NaN where epsilon is 0 and a model has neither."""
    f = np.float32
    counts = group.count(*overlapping(changed), *changed)
    shared, every = counts[: len(changed)], counts[len(changed) :]
    rho = [f(s) / max(f(n - s), f(epsilon)) for s, n in zip(shared, every)]
    return [f(1) + f(r) * min(max(x, f(0)), f(alpha)) for x in rho]


def overlapping(changed):
    """Where a model's change is not its own alone."""
    once = twice = changed[0] & False
    for c in changed:
        once, twice = once | c, twice | (once & c)
    return [c & twice for c in changed]
