from refmerge.compat.official.pcb import pcb as ours
from refmerge.method import same_as

# The formula of the file that the authors' readme names: that of their language experiments, with another clamp.
pcb = same_as(
    ours,
    "official_readme:pcb",
    source="duguodong7/pcb-merging@5897888 pcb-merging.py:PCB_merge",
    pcb_ratio="att_ratio",
    lams="lams",
    clamp=("clamp", 0.0001),
)
