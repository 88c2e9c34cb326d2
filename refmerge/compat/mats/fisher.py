from refmerge.method import method
from refmerge.methods.data_driven.fisher import at_least, given
from refmerge.numeric import total


@method(
    "mats:fisher",
    paper="r-three/mats@cb52c38 src/merging/diagonal_fisherMerging.py:diagonal_fisherMerging",
    stats={"": "element"},
    needs="models",
)
def fisher(models, stats, name, *, model_lambda: float = 1.0, min_fisher: float = 1e-8):
    """Fisher averaging with a floor in all models; two models are weighed with lambda and 1 - lambda, others alike."""
    # 1. Fisher information
    F = given(stats, "", name)
    # 2. floor
    F = [at_least(F_n, min_fisher) for F_n in F]
    # 3. weigh two models
    c = [model_lambda, 1 - model_lambda] if len(models) == 2 else [1.0] * len(models)
    # 4. weighted average
    P = [c_n * F_n for c_n, F_n in zip(c, F)]
    return total(P_n * theta_n for P_n, theta_n in zip(P, models)) / total(P)
