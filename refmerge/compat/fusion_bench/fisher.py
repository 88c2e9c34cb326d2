import math

from refmerge.errors import UsageError
from refmerge.method import method
from refmerge.methods.data_driven.fisher import given, norms
from refmerge.numeric import at_precision, total


@method(
    "fusion_bench:fisher",
    paper="tanganke/fusion_bench@54c9e8c fusion_bench/method/fisher_merging/fisher_merging.py:merging_with_fisher_weights",
    over="model",
    stats={"": "element"},
    needs="models",
)
def fisher(
    models,
    stats,
    group,
    name,
    *,
    normalize_fisher_weight: bool = True,
    minimal_fisher_weight: float = 1e-6,
    fisher_scaling_coefficients: tuple | None = None,
):
    """Fisher averaging with a floor that is added, to every entry of every model, and to the norms."""
    # 1. Fisher information
    F = given(stats, "", name)
    # 2. coefficients
    c = coefficients(fisher_scaling_coefficients, len(models), "fusion_bench:fisher")
    if normalize_fisher_weight:
        c = by_inverse_norm(c, norms(F, group), minimal_fisher_weight)
    # 3. weighted average
    P = [c_n * (F_n + minimal_fisher_weight) for c_n, F_n in zip(c, F)]
    return total(P_n * theta_n for P_n, theta_n in zip(P, models)) / total(P)


def coefficients(given, count, name):
    """One a model, rounded to float32, in which the tool holds them; 1/T each where none are given."""
    c = [1 / count] * count if given is None else list(given)
    if len(c) != count:
        raise UsageError(f"{name}: {len(c)} coefficients for {count} models")
    return [at_precision(c_n, SINGLE) for c_n in c]


class SINGLE:
    dtype = "float32"


def by_inverse_norm(c, lengths, smooth):
    """c_n (1 / (|F_n| + smooth)), over the sum of these inverse norms."""
    inverse = [1 / (length + smooth) if length + smooth else math.inf for length in lengths]
    return [c_n * (i_n / total(inverse)) for c_n, i_n in zip(c, inverse)]
