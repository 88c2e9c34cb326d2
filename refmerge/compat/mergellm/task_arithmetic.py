from refmerge.method import same_as
from refmerge.methods.task_vectors.task_arithmetic import task_arithmetic as ours

task_arithmetic = same_as(
    ours,
    "mergellm:task_arithmetic",
    source="yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.task_arithmetic",
    scaling_coefficient="lambda_",
)
