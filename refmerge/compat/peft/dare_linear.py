import math

from refmerge.compat.peft._steps import keep_at_random, weighted
from refmerge.method import PerModel, method
from refmerge.numeric import stacked_sum


@method(
    "peft:dare_linear",
    paper="huggingface/peft@5d602fd src/peft/utils/merge_utils.py:dare_linear",
    stats={"mask": "draw"},
    domain={"density": (0.0, math.inf)},
)
def dare_linear(models, rng, *, weights: PerModel[float], density: float):
    """DARE of LoRA factors or other differences, without a base: drop, rescale, weighted sum."""
    # 1. drop and rescale
    t = keep_at_random(models, rng, density)
    # 2. add
    return stacked_sum(weighted(t, weights))
