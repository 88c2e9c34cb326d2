"""REPAIR: units of a merged network get back the mean and the standard deviation that its parents' have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refmerge.checkpoint import FLOATS
from refmerge.errors import UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.procedures.alignment.zipit import by_unit, rounded
from refmerge.sources import dtype_name

__all__ = ["Repaired", "Statistics", "batch_correlation", "closed_form", "repair", "statistics_of", "targets_of"]

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Statistics:
    """The mean of each unit's activations and their variance."""

    mean: np.ndarray
    var: np.ndarray


@dataclass(frozen=True)
class Repaired:
    """model: repaired. measured: layer -> statistics of the merged model, each layer reading what repaired ones give. goal:
    layer -> the mean and standard deviation that it has now (without those of norms, which have their own)."""

    model: dict[str, np.ndarray]
    measured: dict[str, Statistics]
    goal: dict[str, tuple[np.ndarray, np.ndarray]]


@procedure("repair", paper="arXiv:2211.08403")
def repair(
    merged: Model,
    parents: Sequence[Model],
    forward: Callable[..., Any],
    batches: Iterable[Any],
    *,
    alpha: float = 0.5,
    layers: Mapping[str, str] | None = None,
    eps: float = 1e-5,
) -> Repaired:
    """Rescale and shift the layers of a merged model so that activations have its parents' interpolated statistics, or, of
    a model with batch norms, measure the norms' statistics anew.

    merged: the model, open or a mapping name -> array. parents: the two that were merged, aligned; norms need none. forward:
    (parameters, batch, taps) -> output, which writes activations (rows, units) into taps, as refmerge.nets has them. layers:
    module -> tap of what it gives, or, of a norm, of what it reads, in the network's order; found by itself if not given.
    """
    model, batches, layers = opened(merged, parents, forward, batches, layers)
    free = [name for name in layers if not is_norm(model, name)]
    # 1. statistics of the parents
    found = [statistics_of(doubles(p), forward, batches, [layers[name] for name in free]) for p in parents if free]
    # 2. goal
    goal = {name: targets_of(found[0][layers[name]], found[1][layers[name]], alpha) for name in free}
    # 3. statistics of the merged model, behind layers whose statistics are right
    seen: dict[str, list[Statistics]] = {name: [] for name in layers}
    for batch in batches:
        step = dict(model)
        for name, tap in layers.items():
            x = tapped(step, forward, batch, [tap])[tap]
            seen[name].append(Statistics(x.mean(axis=0), unbiased(x, tap)))
            step |= corrected(step, name, Statistics(x.mean(axis=0), x.var(axis=0)), goal.get(name), eps)
    measured = {name: averaged(each) for name, each in seen.items()}
    # 4. into the weights
    for name in layers:
        model |= corrected(model, name, measured[name], goal.get(name), eps)
    result = {n: rounded(x, merged[n], n) if x.dtype == np.float64 else x for n, x in model.items()}
    return Repaired(result, measured, goal)


def opened(
    merged: Model, parents: Sequence[Model], forward: Callable[..., Any], batches: Iterable[Any],
    layers: Mapping[str, str] | None,
) -> tuple[dict[str, Any], list[Any], dict[str, str]]:  # fmt: skip
    """The merged model in float64, the batches and the layers. UsageError where they do not fit each other."""
    batches = list(batches)
    if not batches:
        raise UsageError("repair: no batches")
    model = doubles(merged)
    layers = layers_of(model, forward, batches[0]) if layers is None else dict(layers)
    check(model, layers, parents)
    return model, batches, layers


def corrected(model: Model, name: str, now: Statistics, goal: Any, eps: float) -> dict[str, np.ndarray]:
    """The tensors of a layer that make a mean and a standard deviation of `goal` of the statistics of now; a norm's are put
    into it."""
    if goal is None:
        return {f"{name}.running_mean": now.mean, f"{name}.running_var": now.var}
    mu, sigma = goal
    g = sigma / np.sqrt(now.var + eps)
    W, b = model[f"{name}.weight"], model[f"{name}.bias"]
    return {f"{name}.weight": g.reshape(-1, *[1] * (W.ndim - 1)) * W, f"{name}.bias": mu + g * (b - now.mean)}


def targets_of(first: Statistics, second: Statistics, alpha: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations between those of two models; it is not the variances that are interpolated."""
    mean = (1 - alpha) * first.mean + alpha * second.mean
    return mean, (1 - alpha) * np.sqrt(first.var) + alpha * np.sqrt(second.var)


def closed_form(
    merged: Model,
    parents: Sequence[Model],
    forward: Callable[..., Any],
    batches: Iterable[Any],
    *,
    alpha: float = 0.5,
    layers: Mapping[str, str] | None = None,
    correlation: Mapping[str, Any] | None = None,
    eps: float = 0.0,
) -> Repaired:
    """Repair an average of two parents by what their statistics say that its own are, without running it: exact in the first
    layer, and for networks without norms. The result's `measured` are these statistics.

    correlation: layer -> that of each unit of the first parent with the same one of the second; of what the layer gives, if
    it is not given. eps: what a norm adds to a variance of 1 before it is fused. All else as for repair.
    """
    model, batches, layers = opened(merged, parents, forward, batches, layers)
    if norms := [name for name in layers if is_norm(model, name)]:
        raise UsageError(f"repair: {norms[0]!r} is a norm, whose statistics are measured: closed_form is for other layers")
    taps, wide = list(layers.values()), [doubles(p) for p in parents]
    first, second = (statistics_of(p, forward, batches, taps) for p in wide)
    if correlation is None:
        known = correlations_of(wide, forward, batches, taps)
        correlation = {name: known[tap] for name, tap in layers.items()}
    elif missing := [name for name in layers if name not in correlation]:
        raise UsageError(f"repair: correlation has nothing for layer {missing[0]!r}")
    goal, expected = {}, {}
    for name, tap in layers.items():
        a, b, rho = first[tap], second[tap], scores(correlation[name])
        if rho.shape != a.mean.shape:
            raise UsageError(f"repair: correlations of {name!r} are of shape {list(rho.shape)} for {len(a.mean)} units")
        mu, sigma = goal[name] = targets_of(a, b, alpha)
        products = alpha * (1 - alpha) * np.sqrt(a.var * b.var) * rho
        var = np.maximum((1 - alpha) ** 2 * a.var + alpha**2 * b.var + 2 * products, 0.0)
        expected[name] = Statistics(mu, var)
        # a unit that cannot vary becomes the constant mu
        g = np.divide(sigma, np.sqrt(var), out=np.zeros_like(sigma), where=var > 0)
        scale, W = g / np.sqrt(1 + eps), model[f"{name}.weight"]
        model[f"{name}.weight"] = scale.reshape(-1, *[1] * (W.ndim - 1)) * W
        model[f"{name}.bias"] = mu - g * mu + scale * model[f"{name}.bias"]
    result = {n: rounded(x, merged[n], n) if x.dtype == np.float64 else x for n, x in model.items()}
    return Repaired(result, expected, goal)


def correlations_of(
    parents: Sequence[Model], forward: Callable[..., Any], batches: Iterable[Any], taps: Sequence[str]
) -> dict[str, np.ndarray]:
    """tap -> the correlation of each unit of one model with the same one of another, by plain means over the batches; 0 of
    a unit that does not vary."""
    each: dict[str, list[tuple[np.ndarray, ...]]] = {tap: [] for tap in taps}
    for batch in batches:
        one, other = (tapped(p, forward, batch, taps) for p in parents)
        for tap in taps:
            a, b = one[tap], other[tap]
            each[tap].append(tuple(x.mean(axis=0) for x in (a, b, a * a, b * b, a * b)))
    found = {}
    for tap, moments in each.items():
        ma, mb, qa, qb, ab = (sum(x) / len(moments) for x in zip(*moments))
        spread = np.sqrt(np.maximum(qa - ma * ma, 0.0) * np.maximum(qb - mb * mb, 0.0))
        rho = np.divide(ab - ma * mb, spread, out=np.zeros_like(spread), where=spread > 0)
        found[tap] = np.clip(rho, -1.0, 1.0)
    return found


# ------------------------------------------------------------------------------------------------------------- statistics


def statistics_of(
    model: Model, forward: Callable[..., Any], batches: Iterable[Any], taps: Sequence[str]
) -> dict[str, Statistics]:
    """tap -> the means of the batches' means and of their unbiased variances: every batch counts alike."""
    each: dict[str, list[Statistics]] = {tap: [] for tap in taps}
    for batch in batches:
        for tap, x in tapped(model, forward, batch, taps).items():
            each[tap].append(Statistics(x.mean(axis=0), unbiased(x, tap)))
    return {tap: averaged(found) for tap, found in each.items()}


def tapped(model: Model, forward: Callable[..., Any], batch: Any, taps: Sequence[str]) -> dict[str, np.ndarray]:
    written: dict[str, Any] = {}
    forward(model, batch, written)
    return {tap: by_unit(written, tap) for tap in taps}


def unbiased(x: np.ndarray, tap: str) -> np.ndarray:
    if len(x) < 2:
        raise UsageError(f"repair: a batch has one row of {tap!r}: of one number there is no variance")
    return x.var(axis=0, ddof=1)


def averaged(found: Sequence[Statistics]) -> Statistics:
    return Statistics(np.mean([s.mean for s in found], axis=0), np.mean([s.var for s in found], axis=0))


def batch_correlation(
    first: Iterable[Any],
    second: Iterable[Any],
    *,
    eps: float = 1e-4,
    deviations: Literal["moments", "batches"] = "moments",
) -> np.ndarray:
    """The correlation of two models' units (rows: the first's) by which the authors align them before they average: of
    batches of activations (rows, units), each of which counts alike; eps is added to the products of deviations. deviations:
    those of all batches together, by their "moments", or the means of each of the "batches"' unbiased ones."""
    if deviations not in ("moments", "batches"):
        raise UsageError(f"repair: deviations = {deviations!r} is none of 'moments', 'batches'")
    found = []
    for a, b in zip(first, second, strict=True):
        a, b = by_unit({"a": a}, "a"), by_unit({"b": b}, "b")
        spread = [np.sqrt(unbiased(x, "units")) if deviations == "batches" else (x * x).mean(axis=0) for x in (a, b)]
        found.append((a.mean(axis=0), b.mean(axis=0), *spread, a.T @ b / len(a)))
    if not found:
        raise UsageError("repair: no batches")
    ma, mb, sa, sb, outer = (sum(x) / len(found) for x in zip(*found))
    if deviations == "moments":  # of constants rounding may go below 0
        sa, sb = (np.sqrt(np.maximum(q - m * m, 0.0)) for q, m in ((sa, ma), (sb, mb)))
    return (outer - np.outer(ma, mb)) / (np.outer(sa, sb) + eps)


# ----------------------------------------------------------------------------------------------------------------- layers


def layers_of(model: Model, forward: Callable[..., Any], batch: Any) -> dict[str, str]:
    """The norms with running statistics, if there are any, with the tap before theirs; else all layers but the last. Taps
    under a weight's name are what its layer gives, in the network's order."""
    written: dict[str, Any] = {}
    forward(model, batch, written)
    order = [tap for tap in written if tap in model and tap.endswith(".weight")]
    names = [tap.removesuffix(".weight") for tap in order]
    norms = {name: order[i - 1] for i, name in enumerate(names) if is_norm(model, name)}
    if names and names[0] in norms:
        raise UsageError(f"repair: no tap has what norm {names[0]!r} reads: give layers, module -> tap")
    return norms or {name: tap for name, tap in list(zip(names, order))[:-1] if model[tap].ndim > 1}


def is_norm(model: Model, name: str) -> bool:
    return f"{name}.running_var" in model


def check(model: Model, layers: Mapping[str, str], parents: Sequence[Model]) -> None:
    """UsageError where a layer cannot be repaired."""
    if not layers:
        raise UsageError("repair: forward taps no layers: give them, module -> tap of what it gives")
    for name in layers:
        if is_norm(model, name):
            continue
        if f"{name}.weight" not in model:
            raise UsageError(f"repair: the model has no {name}.weight")
        if f"{name}.bias" not in model:
            raise UsageError(f"repair: layer {name!r} has no bias to shift its mean by: give the merged model one of zeros")
        if len(parents) != 2:
            raise UsageError(f"repair: layer {name!r} has no norm with running statistics: its goal needs both parents")


def doubles(model: Model) -> dict[str, np.ndarray]:
    """Floats as float64, the rest as it is."""
    return {n: scores(model[n]) if dtype_name(model[n], n) in FLOATS else np.asarray(model[n]) for n in model}
