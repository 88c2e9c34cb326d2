import numpy as np

from refmerge.method import method
from refmerge.methods.task_vectors.emr import unified
from refmerge.methods.task_vectors.tall_masks import check_task
from refmerge.methods.task_vectors.ties import elected
from refmerge.numeric import array_namespace, indicator, stacked_sum


@method("official:emr", paper="harveyhuang18/EMR_Merging@cc225ec merge_vit/src/main_emr_merging.py:emr_merge", over="model")
def emr(models, base, group, *, task: int = 0, flat: bool = False):
    """One task's model. A mean of zero elects -, and the rescaler is a quotient of sums over tensors of means, or with flat
    one of means over the model, as in main_emr_30_vits.py. The authors add them up in float32."""
    check_task(task, models, "official:emr")
    # 1. task vectors
    vectors = [theta_t - base for theta_t in models]
    # 2. elect
    flag = elect(vectors)
    vector_unified = unified(vectors, flag)
    # 3. mask
    masked = vector_unified * elected(vectors[task], flag)
    # 4. rescale; 0 / 0 where the task changed nothing
    scale, new_scale = map(np.float32, scales(vectors[task], masked, group, flat))
    rescaler = float(scale / new_scale)
    # 5. recover
    return base + masked * rescaler


def elect(vectors):
    """+1 where the mean is above 0, and -1 elsewhere."""
    return 2 * indicator(stacked_sum(vectors) > 0, like=vectors[0]) - 1


def scales(vector, masked, group, flat):
    each = 1 / (group.size if flat else group.tensor.size)
    absolute = array_namespace(vector).abs
    return group.sum(each * absolute(vector), each * absolute(masked))
