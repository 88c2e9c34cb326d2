import math

from refmerge.compat.peft._steps import keep_largest, weighted
from refmerge.method import PerModel, method
from refmerge.numeric import stacked_sum


@method(
    "peft:magnitude_prune",
    paper="huggingface/peft@5d602fd src/peft/utils/merge_utils.py:magnitude_prune",
    domain={"density": (0.0, math.inf)},
)
def magnitude_prune(models, group, *, weights: PerModel[float], density: float):
    """Weighted sum of the largest entries of LoRA factors or other differences, without a base."""
    # 1. prune
    t = keep_largest(models, group, density)
    # 2. add
    return stacked_sum(weighted(t, weights))
