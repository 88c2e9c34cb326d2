from refmerge.method import same_as
from refmerge.methods.task_vectors.task_arithmetic import task_arithmetic as ours

task_arithmetic = same_as(
    ours,
    "fusion_bench:task_arithmetic",
    source="tanganke/fusion_bench@54c9e8c fusion_bench/method/task_arithmetic/task_arithmetic.py:task_arithmetic_merge",
    scaling_factor=("lambda_", 0.3),
)
