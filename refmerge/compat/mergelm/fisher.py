from refmerge.compat.fusion_bench.fisher import fisher as theirs
from refmerge.method import same_as

fisher = same_as(
    theirs,
    "mergelm:fisher",
    source="yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.fisher_merging",
    normalize_fisher_weight="normalize_fisher_weight",
    minimal_fisher_weight="minimal_fisher_weight",
    fisher_scaling_coefficients="fisher_scaling_coefficients",
)
