from refmerge.compat.official._spectral import polar, running_mean, task_triplets
from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.subspaces.tsvm import whole_matrices
from refmerge.numeric import like


@method(
    "fusion_bench:tsvm",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/task_singular_vector/TSVM.py",
    view=whole_matrices,
)
def tsvm(models, base, name, *, alpha: float | tuple | None = 1.0, exclude_keys: tuple | None = None):
    """The authors' TSV-Merge. One alpha scales the merged task vector; a list scales the task vectors before, and nothing
    after. Matrices of exclude_keys are averaged, text_projection not unless it is named."""
    each = alpha if isinstance(alpha, list | tuple) else [1.0] * len(models)
    if len(each) != len(models):
        raise UsageError(f"fusion_bench:tsvm: alpha has {len(each)} values for {len(models)} models")
    # 1. task vectors
    Delta = [theta_t - base for theta_t in models]
    if each is alpha:
        Delta = [alpha_t * Delta_t for alpha_t, Delta_t in zip(alpha, Delta)]
    scale = 1.0 if each is alpha or alpha is None else alpha
    # 2. running mean of what is no matrix
    if base.ndim != 2 or name in (exclude_keys or ()):
        return base + scale * running_mean(Delta)
    # 3. task singular vectors
    U, S, V = task_triplets(Delta, int(min(base.shape) * (1 / len(models))), name)
    # 4. decorrelate and merge
    return base + scale * like((polar(U) * S) @ polar(V).T, base)
