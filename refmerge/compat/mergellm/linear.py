from refmerge.compat.mergelm.linear import linear as ours
from refmerge.method import same_as

linear = same_as(
    ours,
    "mergellm:linear",
    source="yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.average_merging",
)
