from refmerge.matrices import decomposed, less_product, product, total_scores
from refmerge.method import method
from refmerge.methods.subspaces.iso_c import isotropic, spanned
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.tsvm import certainty, is_matrix, leading, polar, side_by_side, whole_matrices
from refmerge.numeric import mean, scores


@method(
    "iso_cts",
    paper="arXiv:2502.04959",
    view=whole_matrices,
    domain={"common_space_fraction": (0.0, 1.0), "tolerance": (1e-12, 0.1)},
)
def iso_cts(
    models,
    base,
    name,
    *,
    common_space_fraction: float = 0.8,
    lambda_: float = 1.0,
    tolerance: float = 1e-5,
    averaged: tuple = ("*text_projection*",),
):
    """Iso-CTS: the largest singular triplets of the sum of the task vectors and, in place of the others, some that are each
    task's own; singular vectors made orthogonal, singular values replaced by their mean.

    Singular values up to `tolerance` times the largest count as zero. What is no matrix is averaged, as are the matrices
    whose names match the globs `averaged`.
    """
    # 1. average what is no matrix
    if not is_matrix(base, name, averaged):
        return base + lambda_ * mean([theta_t - base for theta_t in models])
    # 2. common space
    M = total_scores(theta_t - base for theta_t in models)
    triplets = decomposed(finite(M, name), spend=True)
    U, S, V = spanned(triplets, tolerance)
    C = certainty(triplets[1], tolerance)
    c, n = dimensions(len(S), len(models), common_space_fraction)
    common = U[:, :c], S[:c], V[:, :c], C[:c]
    # 3. task-specific spaces
    tasks = [own(theta_t - base, U[:, :c], n, tolerance, name, S[0]) for theta_t in models if n]
    # 4. orthogonalise
    U, S, V, C = side_by_side([*tasks, common])
    P, Q = polar(U, C, tolerance), polar(V, C, tolerance)
    # 5. make isotropic
    return base + lambda_ * product(P, isotropic(S) * Q.T, base)


def dimensions(r, T, fraction):
    """Of r dimensions: (how many are common, how many are left for each of T tasks). Half a dimension is rounded to even."""
    n = min(round((r - int(fraction * r)) / T), r // T)
    return r - n * T, n


def own(Delta, U, n, tolerance, name, least):
    """The first n triplets of what of a task vector the columns of U do not span."""
    R = scores(Delta)
    R = less_product(R, U, U.T @ R)
    return leading(R, n, tolerance, name, least, min(len(R) - U.shape[1], R.shape[1]))
