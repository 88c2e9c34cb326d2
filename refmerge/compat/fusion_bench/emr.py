from refmerge.compat.official.emr import emr as ours
from refmerge.method import same_as

emr = same_as(
    ours,
    "fusion_bench:emr",
    source="tanganke/fusion_bench@54c9e8c fusion_bench/method/emr_merging/utils.py:emr_merge",
    task="task",
)
