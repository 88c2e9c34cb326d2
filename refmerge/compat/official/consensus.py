from refmerge.compat.official.tall_masks import mask, multitask_vector
from refmerge.method import PerModel, method
from refmerge.numeric import indicator, total


@method(
    "official:consensus",
    paper="nik-dim/tall_masks@d10af8b src/eval/aggregation.py:create_task_vector",
    over="model",
    domain={"k": (0.0, 100.0)},
)
def consensus(
    models,
    base,
    group,
    *,
    tall_mask_lambda_per_task: PerModel[float],
    prun_thre_k: int = 2,
    alpha: float = 1.0,
    use_ties: bool = False,
    k: float = 100.0,
):
    """The multi-task vector where at least prun_thre_k of the tasks' masks are set. The authors read masks from files: here
    they are made anew, with the lambda that validation chose for each task."""
    # 1. task vectors
    T = [theta_t - base for theta_t in models]
    # 2. multi-task vector
    tv = multitask_vector(T, group, use_ties, k)
    # 3. masks
    masks = [mask(base, theta_t, tv, c) for theta_t, c in zip(models, tall_mask_lambda_per_task)]
    # 4. consensus
    consensus_mask = indicator(total(masks) >= prun_thre_k, like=base)
    # 5. add
    return base + alpha * (tv * consensus_mask)
