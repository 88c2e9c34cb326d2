from refmerge.compat.mergekit.model_stock import mean_cosine
from refmerge.method import method
from refmerge.numeric import at_precision, divided, total


@method(
    "mergellm:model_stock",
    paper="yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.stock_merging",
    models=(2, None),
)
def model_stock(models, base, group):
    """mergekit's Model Stock with the mean of the cosines for each tensor, and nothing that guards the ratio's pole."""
    # 1. task vectors
    delta = [x - base for x in models]

    # 2. mean cosine
    def p(x):
        return at_precision(x, base)

    N, c = len(models), mean_cosine(delta, group, False, p)
    # 3. interpolation ratio
    t = p(p(N * c) / p(1 + p((N - 1) * c)))
    # 4. interpolate
    return float(t) * divided(total(models), N) + float(p(1 - t)) * base
