import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.errors import UsageError
from refmerge.numeric import exact_sum, scores
from refmerge.procedure import procedure
from refmerge.symmetry import Spec
from refmerge.symmetry.scales import Scales, relu


@dataclass(frozen=True)
class Canonical:
    """model: the representative. scales: the factor of each unit, in the given model's order. permutations: unit i of the
    result is unit p[i] of the given model. mass: the sum of squares that was made small, before the first sweep and after
    each. change: the largest |log factor| of the last sweep."""

    model: dict[str, Any]
    scales: dict[str, np.ndarray]
    permutations: dict[str, np.ndarray]
    mass: list[float]
    change: float


@procedure("canonicalize", paper="arXiv:2310.08287")
def canonicalize(model, spec, *, scales="relu", order=True, biases=False, tolerance=1e-12, max_sweeps=1000):
    """Of all models that permuting and rescaling units makes of one: the lightest one, with its heaviest units first.

    model: a mapping name -> array, or an open checkpoint. spec: a `refmerge.symmetry.Spec`. scales: "relu" for a network of
    linear maps, norms and ReLU, None where units cannot be rescaled, or `refmerge.symmetry.scales.Scales`. order: whether
    units are sorted. biases: whether the squares of biases are counted too.
    """
    if scales == "relu":
        scales = relu(spec, model)
    if not (scales is None or isinstance(scales, Scales)):
        raise UsageError(f"canonicalize: scales = {scales!r} is none of 'relu', None, Scales")
    spec.check({}, model)
    # 1. rescale
    rescaled, factors, mass, change = model, {}, [], 0.0
    if scales is not None:
        factors, mass, change = balanced(scales, model, biases, tolerance, max_sweeps)
        rescaled = scales.apply(factors, model)
    # 2. order
    perms = ordered(spec, rescaled) if order else spec.identity(model)
    return Canonical(spec.apply(perms, rescaled), factors, perms, mass, change)


def balanced(scales, model, biases, tolerance, max_sweeps):
    """The factors of the least sum of squares, its history, and the last sweep's largest |log factor|: for one permutation
    after another, what comes in and what goes out of each unit get equal sums of squares."""
    weights = {t: scores(model[t]) for t in {**scales.up, **scales.down} if biases or not t.endswith("bias")}
    if odd := next((t for t, x in weights.items() if not np.all(np.isfinite(x))), None):
        raise UsageError(f"canonicalize: tensor {odd!r} holds NaN or infinity: it has no least sum of squares")
    own, readers = (Spec({t: axes[t] for t in weights if t in axes}) for axes in (scales.up, scales.down))
    kept = Scales({t: scales.up[t] for t in own.axes}, {t: scales.down[t] for t in readers.axes})
    factors = {name: np.ones(n) for name, n in own.sizes({t: weights[t] for t in own.axes}).items()}
    mass, change = [total(weights)], math.inf
    while change > tolerance and len(mass) <= max_sweeps:
        change = 0.0
        for name in sorted(own.owners.keys() & readers.owners.keys()):
            a, b = (np.sum(side.rows(name, weights) ** 2, axis=1) for side in (own, readers))
            both = (a > 0) & (b > 0)  # else nothing is least: a smaller factor, or a larger one, is always better
            c = np.where(both, np.divide(b, a, out=np.ones_like(a), where=both) ** 0.25, 1.0)
            factors[name] = factors[name] * c
            weights = kept.apply({name: c}, weights)
            change = max(change, float(np.max(np.abs(np.log(c)), initial=0.0)))
        mass.append(total(weights))
    return factors, mass, change


def total(weights):
    return exact_sum([exact_sum((x * x).reshape(-1).tolist()) for x in weights.values()])


def ordered(spec, model):
    """The permutations that sort units by the sum of squares of all that belongs to them, largest first, equal ones in the
    model's order; in each block the units that are its own."""
    shapes, perms = spec.shapes(model), {}
    for name in sorted(shapes, key=lambda name: len(spec.owners[name])):
        moved = spec.apply({owner: perms[owner] for owner in spec.owners[name]}, model)
        perms[name] = np.empty(shapes[name], dtype=np.int64)
        for block in np.ndindex(shapes[name][:-1]):
            weight = [exact_sum((row * row).tolist()) for row in spec.rows(name, moved, block)]
            perms[name][block] = np.argsort(-np.array(weight), kind="stable")
    return perms
