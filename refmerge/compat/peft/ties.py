import math
from typing import Literal

from refmerge.compat.peft._steps import disjoint_merge, keep_largest, majority
from refmerge.method import PerModel, method


@method(
    "peft:ties", paper="huggingface/peft@5d602fd src/peft/utils/merge_utils.py:ties", domain={"density": (0.0, math.inf)}
)
def ties(
    models, group, *, weights: PerModel[float], density: float, majority_sign_method: Literal["total", "frequency"] = "total"
):
    """TIES of LoRA factors or other differences, without a base: trim, elect without weights, weigh, divide by the count."""
    # 1. trim
    t = keep_largest(models, group, density)
    # 2. elect sign
    sign = majority(t, majority_sign_method)
    # 3. disjoint merge
    return disjoint_merge(t, weights, sign)
