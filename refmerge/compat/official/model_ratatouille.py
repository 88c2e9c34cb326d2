from fnmatch import fnmatchcase

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.numeric import divided


@method(
    "official:model_ratatouille",
    paper="facebookresearch/ModelRatatouille@1afb4e7 domainbed/algorithms_inference.py:WA.add_weights",
)
def model_ratatouille(
    models, name, *, weight_selection: str = "uniform", buffers: tuple = ("*running_mean", "*running_var")
):
    """The authors' running mean over parameters. Buffers, which no optimiser trains, stay those of the first model: tensors
    with names like these, and integers."""
    if weight_selection != "uniform":
        raise UsageError(
            f"official:model_ratatouille: weight_selection = {weight_selection!r}, not 'uniform': a selection needs scores, "
            "and the procedure greedy_soup makes it with rule='at_least'"
        )
    theta, *others = models
    # 1. buffers
    if any(fnmatchcase(name, pattern) for pattern in buffers):
        return theta
    # 2. running mean
    for n, theta_n in enumerate(others, start=1):
        theta = divided(theta * n + theta_n, n + 1)
    return theta
