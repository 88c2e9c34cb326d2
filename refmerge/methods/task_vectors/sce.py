from itertools import combinations

from refmerge.method import method
from refmerge.methods.task_vectors.bitdelta import signs
from refmerge.methods.task_vectors.ties import elected
from refmerge.numeric import array_namespace, indicator, total


@method("sce", paper="arXiv:2408.07990", domain={"density": (0.0, 1.0)})
def sce(models, base, group, *, density: float = 0.1, weights_only: bool = False):
    """SCE: select the entries on which the models differ most, calculate a weight for each tensor, erase minority signs.

    A model's weight is its share of the squares of all selected entries. `weights_only` merges the entries that were not
    selected as well, with these weights.
    """
    # 1. task vectors
    delta = [theta_n - base for theta_n in models]
    # 2. select
    selected = select(delta, group, density)
    # 3. calculate
    weight = shares(selected, group)
    # 4. erase
    delta = delta if weights_only else selected
    agrees = majority(delta)
    # 5. merge
    return base + weighted_mean(delta, agrees, weight)


def select(delta, group, density):
    """Zero all but the int(density * m) entries of largest variance over the models, of the m whose variance is not 0."""
    if density == 1:
        return delta
    variance = spread(delta)
    mask = group.top(variance, k=int(density * group.count(variance != 0)))
    return [mask * delta_n for delta_n in delta]


def spread(delta):
    """N^2 times the variance over the models, as the sum of all squared differences: exactly 0 where the models agree."""
    pairs = [(a - b) * (a - b) for a, b in combinations(delta, 2)]
    return total(pairs) if pairs else array_namespace(*delta).zeros_like(delta[0])


def shares(delta, group):
    """Each model's share of the sum of squares; equal shares where that is 0."""
    if len(delta) == 1:
        return [1.0]
    squares = group.dot(*((delta_n, delta_n) for delta_n in delta))
    whole = sum(squares)
    return [s / whole if whole != 0 else 1 / len(delta) for s in squares]


def majority(delta, add=total):
    """1 where a model has the sign of the sum, and where the sum is 0 the sign +."""
    gamma = signs(add(delta))
    return [elected(delta_n, gamma) for delta_n in delta]


def weighted_mean(delta, agrees, weight, add=total):
    """The weighted mean of the models that agree; 0 where none does."""
    share = [w_n * a_n for w_n, a_n in zip(weight, agrees)]
    return quotient(add(s_n * delta_n for s_n, delta_n in zip(share, delta)), add(share))


def quotient(x, divisor):
    """x / divisor, and x itself where the divisor is 0."""
    return x / (divisor + indicator(divisor == 0, like=divisor))
