import numpy as np

from refmerge.compat.official._spectral import is_matrix, triplets
from refmerge.method import method
from refmerge.methods.subspaces.iso_c import isotropic
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import divided, like, scores, total


@method("official:iso_c", paper="danielm1405/iso-merging@d34010a src/utils/iso.py:iso_c", view=whole_matrices)
def iso_c(models, base, name, *, scaling_factor: float = 1.0):
    """The sum with the mean of all its singular values, zeros among them, in place of each."""
    # 1. task vectors
    Delta = [theta_t - base for theta_t in models]
    # 2. mean of what is no matrix
    if not is_matrix(base, name):
        return base + scaling_factor * divided(total(Delta), len(Delta))
    # 3. make the sum isotropic
    return base + scaling_factor * like(flat_sum(Delta, name), base)


def flat_sum(Delta, name):
    """The polar factor of the sum, times the mean of its singular values."""
    M = sum(scores(Delta_t) for Delta_t in Delta)
    U, S, V = triplets(M, np.size(M), name)
    return (isotropic(S) * U) @ V.T
