import numpy as np

from refmerge.compat.fusion_bench.regmean import averaged, grams
from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.data_driven.regmean import shrunk
from refmerge.numeric import like, scores, total


@method(
    "mats:regmean",
    paper="r-three/mats@cb52c38 src/merging/regmean.py:regmean",
    view="tensor",
    work="float64",
    stats={"": "whole"},
    needs="models",
)
def regmean(models, stats, name, *, model_lambda: float = 1.0):
    """RegMean by an explicit inverse; inputs that are dead in all models get weights of 0."""
    # 1. Gram matrices of the module's inputs
    G = grams(stats, name, models)
    if G is None:
        # 2. no module: average
        return averaged(models)
    # 3. shrink what is off the diagonal
    G = [shrunk(G_n, model_lambda) for G_n in G]
    # 4. invert
    merged = inverse_of_living(total(G), name) @ total(G_n @ scores(theta_n).T for G_n, theta_n in zip(G, models))
    return like(merged.T, models[0])


def inverse_of_living(S, name):
    """The inverse; of an exactly singular matrix that of the rows and columns that do not sum to 0, and 0 for the others."""
    try:
        return np.linalg.inv(S)
    except np.linalg.LinAlgError:
        living, across = np.flatnonzero(S.sum(axis=1)), np.flatnonzero(S.sum(axis=0))
    if not np.array_equal(living, across):
        raise UsageError(f"tensor {name!r}: the rows and columns of its Gram matrices that sum to 0 are not the same")
    found = np.zeros_like(S)
    try:
        found[np.ix_(living, living)] = np.linalg.inv(S[np.ix_(living, living)])
    except np.linalg.LinAlgError:
        raise UsageError(f"tensor {name!r}: its Gram matrices sum to a singular matrix, which has no inverse") from None
    return found
