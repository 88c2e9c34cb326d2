from refmerge.compat.official._spectral import running_mean
from refmerge.compat.official.iso_cts import isotropic_spaces
from refmerge.method import method
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import like


@method(
    "fusion_bench:iso_cts",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/isotropic_merging/iso_utils.py:iso_cts",
    view=whole_matrices,
    domain={"common_space_fraction": (0.0, 1.0)},
)
def iso_cts(
    models,
    base,
    name,
    *,
    scaling_factor: float = 1.0,
    common_space_fraction: float = 0.8,
    exclude_keys: tuple | None = None,
):
    """The authors' Iso-CTS. Matrices of exclude_keys are averaged, text_projection not unless it is named."""
    # 1. task vectors
    Delta = [theta_t - base for theta_t in models]
    # 2. running mean of what is no matrix
    if base.ndim != 2 or name in (exclude_keys or ()):
        return base + scaling_factor * running_mean(Delta)
    # 3. common and task-specific spaces, made isotropic
    return base + scaling_factor * like(isotropic_spaces(Delta, common_space_fraction, name), base)
