import numpy as np

from refmerge.compat.official.pcb import clamped_and_normalised, intra, kept, merged, of
from refmerge.method import PerModel, method
from refmerge.numeric import stacked_sum


@method("official_readme:pcb", paper="duguodong7/pcb-merging@5897888 pcb-merging.py:PCB_merge", over="model")
def pcb(models, base, group, *, pcb_ratio: float = 0.1, lams: PerModel[float] = 1.0, clamp: float = 0.0001):
    """The formula of the file that the authors' readme names: that of their language experiments, with another clamp. An
    evolution chooses lams in it, which are 1 without one."""
    # 1. task vectors
    F = [theta_n - base for theta_n in models]
    # 2. clamp and normalise the magnitudes
    C, N = clamped_and_normalised(F, clamp, group)
    # 3. balance
    balancing = [intra(N_n, len(F)) * of(np.tanh, F_n * stacked_sum(F)) for F_n, N_n in zip(F, N)]
    # 4. drop and merge
    return base + merged(C, kept(balancing, pcb_ratio, group), lams)
