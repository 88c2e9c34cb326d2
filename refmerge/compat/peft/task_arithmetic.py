from refmerge.compat.peft._steps import weighted
from refmerge.method import PerModel, method
from refmerge.numeric import stacked_sum


@method("peft:task_arithmetic", paper="huggingface/peft@5d602fd src/peft/utils/merge_utils.py:task_arithmetic")
def task_arithmetic(models, *, weights: PerModel[float]):
    """Weighted sum of LoRA factors or other differences, without a base."""
    # 1. add
    return stacked_sum(weighted(models, weights))
