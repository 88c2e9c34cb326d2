from refmerge.compat.official._steps import at_least_kth_smallest, with_majority
from refmerge.compat.official.ties import disjoint, signs
from refmerge.method import method
from refmerge.methods.task_vectors.tall_masks import check_task
from refmerge.numeric import array_namespace, indicator, stacked_sum


@method(
    "official:tall_masks",
    paper="nik-dim/tall_masks@d10af8b src/utils/tallmask_utils.py:generate_task_masks",
    over="model",
    domain={"k": (0.0, 100.0)},
)
def tall_masks(
    models, base, group, *, task: int = 0, tall_mask_lambda: float = 1.0, use_ties: bool = False, k: float = 100.0
):  # fmt: skip
    """One task's mask on the multi-task vector, compared as models: |theta_0 - theta_t| > lambda |theta_MT - theta_t|."""
    check_task(task, models, "official:tall_masks")
    # 1. task vectors
    T = [theta_t - base for theta_t in models]
    # 2. multi-task vector
    tv = multitask_vector(T, group, use_ties, k)
    # 3. mask
    m = mask(base, models[task], tv, tall_mask_lambda)
    # 4. recover
    return base + m * tv


def multitask_vector(T, group, use_ties, k):
    """The sum of the task vectors, of which the top k per cent are kept; or their TIES, always of the top 20, summed."""
    if use_ties:
        kept = topk(T, group, 20)
        return disjoint(kept, with_majority(signs(kept, group, "mass"), group), "sum")
    return stacked_sum(topk(T, group, k))


def topk(T, group, k):
    """Keep what is at least the threshold of the top k per cent, ties included; 100 keeps all, and below 1 is a fraction."""
    if k == 100:
        return T
    share = k / 100 if k >= 1 else k
    return at_least_kth_smallest(T, [group.size - int(group.size * share)] * len(T), group, "tall_masks")


def mask(base, theta_t, tv, tall_mask_lambda):
    """1 where the base is farther from the task's model than lambda times the multi-task model is."""
    xp = array_namespace(base)
    return indicator(xp.abs(base - theta_t) > tall_mask_lambda * xp.abs((base + tv) - theta_t), like=base)
