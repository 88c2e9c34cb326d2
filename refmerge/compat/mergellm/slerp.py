from refmerge.compat.mergekit.slerp import arc, cosine
from refmerge.method import method


@method(
    "mergellm:slerp",
    paper="yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.slerp_merging",
    models=(2, 2),
)
def slerp(models, group, *, slerp_t: float = 0.5, dot_threshold: float = 0.9995):
    """From the first model (slerp_t = 0) to the second (1), on the weights themselves: a base is not looked at.

    A threshold of 1 still takes the line between parallel tensors, where their code gives NaN.
    """
    v_0, v_1 = models
    # 1. cosine of the whole tensor; a norm up to 1e-10 does not divide
    c = cosine(v_0, v_1, group, 1e-10)
    # 2. nearly parallel, or nearly opposite
    if abs(c) > dot_threshold or abs(c) == 1:
        return (1 - slerp_t) * v_0 + slerp_t * v_1
    # 3. arc, on the tensors as they are
    return arc(v_0, v_1, slerp_t, c)
