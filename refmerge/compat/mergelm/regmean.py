from refmerge.compat.fusion_bench.regmean import regmean as theirs
from refmerge.method import same_as

regmean = same_as(
    theirs,
    "mergelm:regmean",
    source="yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.regmean_merging",
    reduce_non_diagonal_ratio="reduce_non_diagonal_ratio",
)
