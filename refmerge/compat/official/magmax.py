from refmerge.method import same_as
from refmerge.methods.task_vectors.magmax import magmax as ours

magmax = same_as(
    ours,
    "official:magmax",
    source="danielm1405/magmax@4f49f18 src/merging/task_vectors.py:merge_max_abs",
    scaling_coef=("lambda_", 1.0),
)
