import numpy as np

from refmerge.compat.fusion_bench.fisher import coefficients
from refmerge.compat.fusion_bench.regmean import averaged, grams, inverse, reduced
from refmerge.method import method
from refmerge.numeric import like, scores, total


@method(
    "dataless:regmean",
    paper="bloomberg/dataless-model-merging@92247ae src/model_merge/avg_merger.py:FedAvgMerger.regmean_mean_params",
    view="tensor",
    work="float64",
    stats={"": "whole"},
    needs="models",
)
def regmean(
    models, stats, name, *, model_coeffs: tuple | None = None, regmean_reduce_nondiag: float = -1.0,
    regmean_diag: bool = False,
):  # fmt: skip
    """RegMean by an explicit inverse; regmean_reduce_nondiag below 0 shrinks nothing, coefficients need not sum to 1."""
    N = len(models)
    # 1. Gram matrices of the module's inputs
    G = grams(stats, name, models)
    if G is None:
        # 2. no module: average
        if model_coeffs is None:
            return averaged(models)
        return total(c_n * theta_n for c_n, theta_n in zip(coefficients(model_coeffs, N, "dataless:regmean"), models))
    # 3. shrink what is off the diagonal
    if regmean_diag:
        G = [np.diag(np.diag(G_n)) for G_n in G]
    if regmean_reduce_nondiag >= 0:
        G = [reduced(G_n, regmean_reduce_nondiag) for G_n in G]
    # 4. weigh the models
    if model_coeffs is not None:
        coefficients(model_coeffs, N, "dataless:regmean")
        G = [(c_n * N) * G_n for c_n, G_n in zip(model_coeffs, G)]
    # 5. invert
    merged = inverse(total(G), name) @ total(G_n @ scores(theta_n).T for G_n, theta_n in zip(G, models))
    return like(merged.T, models[0])
