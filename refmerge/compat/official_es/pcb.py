import numpy as np

from refmerge.compat.official.pcb import clamped_and_normalised, intra, kept, merged, of
from refmerge.method import PerModel, method
from refmerge.numeric import array_namespace, stacked_sum


@method("official_es:pcb", paper="duguodong7/pcb-merging@5897888 vision_source_code/pcb_ES.py:PCB", over="model")
def pcb(models, base, group, *, pcb_ratio: float = 0.05, lams: PerModel[float] = 1.2, clamp: float = 0.01):
    """The formula of the vision experiments with evolved lams: agreement with each model by itself, added up."""
    # 1. task vectors
    F = [theta_n - base for theta_n in models]
    # 2. clamp and normalise the magnitudes
    C, N = clamped_and_normalised(F, clamp, group)
    signed = [array_namespace(F_n).sign(F_n) * N_n for F_n, N_n in zip(F, N)]
    # 3. balance
    inter = [stacked_sum(of(np.tanh, s_i * s_j) for s_j in signed) for s_i in signed]
    balancing = [intra(N_n, len(F)) * inter_n for N_n, inter_n in zip(N, inter)]
    # 4. drop and merge; their tensor of lams is of float32
    lams = [float(np.float32(lam)) for lam in lams]
    return base + merged(C, kept(balancing, pcb_ratio, group), lams)
