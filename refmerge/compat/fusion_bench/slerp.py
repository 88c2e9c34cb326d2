import math

from refmerge.compat.mergekit.slerp import arc, cosine
from refmerge.method import method


@method(
    "fusion_bench:slerp",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/slerp/slerp_utils.py:slerp",
    widens=True,
    models=(2, 2),
    domain={"epsilon": (0.0, math.inf)},
)
def slerp(models, group, *, t: float = 0.5, DOT_THRESHOLD: float = 0.9995, epsilon: float = 1e-8):
    """From the first model (t = 0) to the second (t = 1), as mergekit does it, with a threshold and a least norm to choose.

    A threshold of 1 still takes the line between parallel tensors, where their code gives NaN.
    """
    v_0, v_1 = models
    # 1. cosine of the whole tensor; a norm up to epsilon does not divide
    c = cosine(v_0, v_1, group, epsilon)
    # 2. nearly parallel, or nearly opposite
    if abs(c) > DOT_THRESHOLD or abs(c) == 1:
        return (1 - t) * v_0 + t * v_1
    # 3. arc, on the tensors as they are
    return arc(v_0, v_1, t, c)
