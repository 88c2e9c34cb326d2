from refmerge.method import method
from refmerge.numeric import array_namespace, top_along, total


@method(
    "official:breadcrumbs", paper="rezazzr/breadcrumbs@f89fc66 src/task_vectors.py:TaskVectorMiddleKeep", view="tensor"
)
def breadcrumbs(
    models,
    base,
    *,
    top_k_keep: float = 0.15,
    top_k_remove: float = 0.006,
    alpha: float = 0.2,
    remove_first: bool = True,
):
    """Breadcrumbs for each row of the last axis; numbers (0-d tensors) are not masked."""
    # 1. task vectors
    tau = [x - base for x in models]
    # 2. mask
    if base.ndim > 0:
        tau = [middle(x, top_k_keep, top_k_remove, remove_first) for x in tau]
    # 3. add
    return base + alpha * total(tau)


def middle(x, keep, remove, remove_first):
    """Zero the largest of each row, then keep the largest of what is left; or the other way round."""
    magnitude = array_namespace(x).abs
    keep, remove = int(x.shape[-1] * keep), int(x.shape[-1] * remove)
    if remove_first:
        x = (1 - top_along(magnitude(x), remove)) * x
        return top_along(magnitude(x), keep) * x
    x = top_along(magnitude(x), keep) * x
    return (1 - top_along(magnitude(x), remove)) * x
