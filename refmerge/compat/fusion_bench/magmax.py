from refmerge.method import same_as
from refmerge.methods.task_vectors.magmax import magmax as ours

magmax = same_as(
    ours,
    "fusion_bench:magmax",
    source="tanganke/fusion_bench@54c9e8c fusion_bench/method/magmax/magmax.py:MagMaxAlgorithm.run",
    scaling_factor=("lambda_", 0.5),
)
