import math
from typing import Literal

from refmerge.compat.peft._steps import disjoint_merge, keep_at_random, majority
from refmerge.method import PerModel, method


@method(
    "peft:dare_ties",
    paper="huggingface/peft@5d602fd src/peft/utils/merge_utils.py:dare_ties",
    stats={"mask": "draw"},
    domain={"density": (0.0, math.inf)},
)
def dare_ties(
    models, rng, *, weights: PerModel[float], density: float, majority_sign_method: Literal["total", "frequency"] = "total"
):
    """DARE with an election, of LoRA factors or other differences, without a base and without a trim."""
    # 1. drop and rescale
    t = keep_at_random(models, rng, density)
    # 2. elect sign
    sign = majority(t, majority_sign_method)
    # 3. disjoint merge
    return disjoint_merge(t, weights, sign)
