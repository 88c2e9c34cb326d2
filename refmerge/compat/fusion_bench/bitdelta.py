from refmerge.compat.official.bitdelta import bitdelta as ours
from refmerge.method import same_as

bitdelta = same_as(
    ours,
    "fusion_bench:bitdelta",
    source="tanganke/fusion_bench@54c9e8c fusion_bench/method/bitdelta/bitdelta_utils/diff.py",
)
