import math
from itertools import pairwise

import numpy as np

from refmerge.api import merge
from refmerge.errors import UsageError
from refmerge.procedure import procedure


@procedure("pareto_gradients", paper="arXiv:2210.09759")
def pareto_gradients(members, alphas, evaluate, *, temperature=1.0, reg_coefficient=0.0):
    """One step of Pareto Manifold Learning: the gradient that each member gets from forwards at several preferences.

    members: T checkpoints, member t for task t. alphas: W preferences of T numbers each. evaluate: a merged checkpoint ->
    (T losses, T mappings name -> gradient of that loss). Returns (total loss, penalty, T gradients, one for each member).
    """
    alphas = [[float(a) for a in alpha] for alpha in alphas]
    W, T = len(alphas), len(members)
    if W == 0 or any(len(alpha) != T for alpha in alphas):
        raise UsageError(f"pareto_gradients: alphas are lists of {T} numbers, one for each member, and at least one list")
    # 1. combine at each preference
    models = [merge(members, "linear", weight=alpha, normalize=False) for alpha in alphas]
    # 2. losses and gradients there
    losses, gradients = zip(*map(evaluate, models))
    if any(len(row) != T for row in (*losses, *gradients)):
        raise UsageError(f"pareto_gradients: evaluate gives {T} losses and {T} gradients, one of each for each task")
    # 3. weigh the losses
    loss = math.fsum(a * x for alpha, row in zip(alphas, losses) for a, x in zip(alpha, row))
    # 4. penalise
    penalties, slopes = zip(*map(penalty, zip(*alphas), zip(*losses), [temperature] * T))
    R = math.fsum(penalties)
    strength = reg_coefficient if reg_coefficient * R < loss else 0.0
    # 5. chain rule
    c = [[alphas[w][t] + strength * slopes[t][w] for t in range(T)] for w in range(W)]
    everything = [g for row in gradients for g in row]
    shares = [[alphas[w][i] * c[w][t] for w in range(W) for t in range(T)] for i in range(T)]
    return loss + strength * R, R, [merge(everything, "linear", weight=w, normalize=False) for w in shares]


def penalty(alpha, losses, temperature):
    """(R_t, its derivative by each loss): the log of the mean of exp(temperature * rise) over neighbours, the losses sorted
    by falling alpha. Of equal alphas the last counts; without neighbours there is no penalty."""
    order = sorted({a: w for w, a in enumerate(alpha)}.items(), reverse=True)
    pairs = [(before, after) for (_, before), (_, after) in pairwise(order)]
    slope = np.zeros(len(alpha))
    if not pairs:
        return 0.0, slope
    rises = [max(float(losses[after]) - float(losses[before]), 0.0) for before, after in pairs]
    most = temperature * max(rises)
    weights = [math.exp(temperature * rise - most) for rise in rises]
    whole = math.fsum(weights)
    for (before, after), rise, weight in zip(pairs, rises, weights):
        if rise > 0:
            slope[after] += temperature * weight / whole
            slope[before] -= temperature * weight / whole
    return most + math.log(whole / (len(alpha) - 1)), slope
