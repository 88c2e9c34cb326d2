import math

from refmerge.errors import UsageError
from refmerge.method import PerModel, method
from refmerge.methods.averaging.linear import normalized
from refmerge.numeric import array_namespace, in_float64, total


@method(
    "fisher",
    paper="arXiv:2111.09832",
    over="model",
    stats={"fisher": "element"},
    needs="models",
    domain={"weight": (0.0, math.inf), "floor": (0.0, math.inf)},
)
def fisher(
    models,
    stats,
    group,
    name,
    *,
    weight: PerModel[float] = 1.0,
    normalize: bool = True,
    floor: float = 1e-6,
    favor_target: bool = True,
):
    """Fisher-weighted averaging: every entry is the mean of the models, weighted by how much it matters to each of them.

    theta = sum_n c_n F_n theta_n / sum_n c_n F_n with the diagonal F_n of the Fisher information of model n.
    """
    # 1. Fisher information
    F = given(stats, "fisher", name)
    # 2. coefficients
    c = normalized(weight, "fisher")
    if normalize:
        c = [divided_by_norm(c_n, F_norm, n) for n, (c_n, F_norm) in enumerate(zip(c, norms(F, group)))]
    # 3. floor
    F = [at_least(F_n, floor) if n == 0 or not favor_target else F_n for n, F_n in enumerate(F)]
    # 4. weighted average
    P = [c_n * F_n for c_n, F_n in zip(c, F)]
    return total(P_n * theta_n for P_n, theta_n in zip(P, models)) / total(P)


def given(stats, key, name):
    """That statistic of every model. UsageError where a model lacks it."""
    for n, s in enumerate(stats):
        if key not in s:
            what = f"{name}.{key}" if key else name
            raise UsageError(
                f"tensor {name!r} has no statistic {what!r} in stats of model {n}: give one, or merge without this tensor"
            )
    return [s[key] for s in stats]


def norms(F, group):
    """The length of each diagonal over the model, from squares in float64, where those of float32 are exact."""
    squares = group.dot(*[(F_n, F_n) for F_n in map(in_float64, F)])
    return [math.sqrt(square) for square in (squares if len(F) > 1 else [squares])]


def divided_by_norm(c_n, norm, n):
    if norm == 0:
        raise UsageError(f"fisher: the Fisher information of model {n} is 0 everywhere; normalize=False takes it as it is")
    return c_n / norm


def at_least(F_n, floor):
    """max(F_n, floor), entry by entry."""
    xp = array_namespace(F_n)
    return xp.maximum(F_n, xp.full_like(F_n, floor))
