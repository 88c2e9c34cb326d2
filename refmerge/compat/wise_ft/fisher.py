from refmerge.method import method
from refmerge.methods.data_driven.fisher import at_least
from refmerge.numeric import array_namespace, total


@method(
    "wise_ft:fisher",
    paper="mlfoundations/wise-ft@58b7a4b src/wise_ft.py:_merge",
    models=(1, 1),
    stats={"": "element"},
    needs="base and models",
)
def fisher(models, base, stats, *, alpha: float = 0.5, fisher_floor: float = 1e-8):
    """Interpolation from the base to its fine-tune, weighted by the Fisher information of both; 1 where one lacks it."""
    theta = [base, *models]
    # 1. Fisher information
    F = [s[""] if "" in s else array_namespace(x).ones_like(x) for s, x in zip(stats, theta)]
    # 2. floor
    F = [at_least(F_n, fisher_floor) for F_n in F]
    # 3. weighted interpolation
    P = [c_n * F_n for c_n, F_n in zip((1 - alpha, alpha), F)]
    return total(P_n * theta_n for P_n, theta_n in zip(P, theta)) / total(P)
