from refmerge.method import method
from refmerge.numeric import divided, total


@method(
    "mergelm:linear",
    paper="yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.average_merging",
    widens=True,
)
def linear(models):
    """The mean over a stack: the sum divided by the number of models, with no weights."""
    # 1. average
    return divided(total(models), len(models))
