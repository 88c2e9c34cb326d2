from typing import Literal

from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.numeric import total


@method(
    "official:time_vectors",
    paper="KaiNylund/lm-weights-encode-time@5c4e2cf task_vectors/{get_task_vector,multi_task,task_analogy}.py",
    domain={"n_pct_pts": (1, float("inf"))},
)
def time_vectors(
    models,
    base,
    *,
    op: Literal["interpolate", "analogy"] = "interpolate",
    lambdas: PerModel[float] = 1.0,
    n_pct_pts: int | None = None,
    inv_decay: bool = False,
    lambdaA: float | None = None,
    lambdaB: float | None = None,
    lambdaC: float | None = None,
    alpha: float = 1.0,
):
    """The sum of scaled time vectors, or C + (B - A) of three models A, B, C, each scaled; the base is added last.

    The code has no default for its lambdas. n_pct_pts takes the place of two: 1 - 1/n and 1/n, or with inv_decay the other
    way round.
    """
    # 1. time vectors
    tau = [alpha * (x - base) for x in models]
    # 2. coefficients
    if op == "analogy":
        lambdas = analogy_lambdas(lambdas, (lambdaA, lambdaB, lambdaC))
    elif n_pct_pts is not None:
        lambdas = between(n_pct_pts, inv_decay, len(tau))
    # 3. combine
    scaled = [c * x for c, x in zip(lambdas, tau)]
    combined = scaled[2] + (scaled[1] - scaled[0]) if op == "analogy" else total(scaled)
    # 4. add
    return base + combined


def analogy_lambdas(lambdas, named):
    """(lambdaA, lambdaB, lambdaC), each from `lambdas` where it is not named."""
    if len(lambdas) != 3:
        raise UsageError(f"official:time_vectors: op='analogy' takes three models A, B, C, {len(lambdas)} given")
    return [c if own is None else own for c, own in zip(lambdas, named)]


def between(n, inverse, count):
    """Between two times: 1/n of the way to the second, which n = 1 reaches whatever inv_decay says."""
    if count != 2:
        raise UsageError(f"official:time_vectors: n_pct_pts lies between two models, {count} given")
    return (1 / n, 1 - 1 / n) if inverse and n > 1 else (1 - 1 / n, 1 / n)
