from refmerge.compat.official.iso_c import flat_sum
from refmerge.method import method
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import divided, like, total


@method(
    "fusion_bench:iso_c",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/isotropic_merging/iso_utils.py:iso_c",
    view=whole_matrices,
)
def iso_c(models, base, name, *, scaling_factor: float = 1.0, exclude_keys: tuple | None = None):
    """The authors' Iso-C. Matrices of exclude_keys are averaged, text_projection not unless it is named."""
    # 1. task vectors
    Delta = [theta_t - base for theta_t in models]
    # 2. mean of what is no matrix
    if base.ndim != 2 or name in (exclude_keys or ()):
        return base + scaling_factor * divided(total(Delta), len(Delta))
    # 3. make the sum isotropic
    return base + scaling_factor * like(flat_sum(Delta, name), base)
