import numpy as np

from refmerge.compat.official.pcb import clamped_and_normalised, intra, kept, merged, of
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, stacked_sum


@method("official_vision:pcb", paper="duguodong7/pcb-merging@5897888 vision_source_code/pcb.py:__main__", over="model")
def pcb(models, base, group, *, att_ratio: float = 0.05, lams: PerModel[float] = 1.2, clamp: float = 0.01):
    """The formula of the vision experiments: agreement with the sum of the normalised task vectors."""
    # 1. task vectors
    F = [theta_n - base for theta_n in models]
    # 2. clamp and normalise the magnitudes
    C, N = clamped_and_normalised(F, clamp, group)
    signed = [array_namespace(F_n).sign(F_n) * N_n for F_n, N_n in zip(F, N)]
    # 3. balance
    balancing = [intra(N_n, len(F)) * of(np.tanh, F_n * stacked_sum(signed)) for F_n, N_n in zip(F, N)]
    # 4. drop and merge; their tensor of lams is of float32
    lams = [float(np.float32(lam)) for lam in lams]
    return base + merged(C, kept(balancing, att_ratio, group), lams)
