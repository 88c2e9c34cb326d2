from refmerge.compat.official._spectral import common_and_task_specific, dimensions, is_matrix, polar, running_mean
from refmerge.method import method
from refmerge.methods.subspaces.iso_c import isotropic
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import like


@method(
    "official:iso_cts",
    paper="danielm1405/iso-merging@d34010a src/utils/iso.py:iso_cts",
    view=whole_matrices,
    domain={"common_space_fraction": (0.0, 1.0)},
)
def iso_cts(models, base, name, *, scaling_factor: float = 1.0, common_space_fraction: float = 0.8):
    """With c = r - round((r - int(f r)) / T) T common dimensions of r = min(m, n), whatever the rank; where c is below 0,
    the first r tasks have one each."""
    # 1. task vectors
    Delta = [theta_t - base for theta_t in models]
    # 2. running mean of what is no matrix
    if not is_matrix(base, name):
        return base + scaling_factor * running_mean(Delta)
    # 3. common and task-specific spaces, made isotropic
    return base + scaling_factor * like(isotropic_spaces(Delta, common_space_fraction, name), base)


def isotropic_spaces(Delta, fraction, name):
    """The triplets of both, made orthogonal, with the mean of their singular values."""
    r = min(Delta[0].shape)
    n, c = dimensions(r, len(Delta), fraction, name)
    U, S, V = common_and_task_specific(Delta, r, n, c, name)
    return (isotropic(S) * polar(U)) @ polar(V).T
