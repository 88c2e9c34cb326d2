"""Emergent experts: the units of a dense model's MLPs, clustered by their keys into experts of one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from refmerge.checkpoint import Checkpoint, open_checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.nets.layers import like_ints
from refmerge.nets.upscaled import VALUES, keys_of
from refmerge.numeric import array_namespace, scores
from refmerge.procedure import procedure
from refmerge.procedures.experts._upscaling import give, matching, spec, values
from refmerge.rng import key_for

__all__ = ["balanced", "distortion", "emoe"]

SMALLEST = 1e-12  # what a norm is at least, when it is divided by


@procedure("emoe", paper="arXiv:2310.10908")
def emoe(
    model: Any,
    out: str | Path | None = None,
    *,
    experts: int,
    top_k: int,
    modules: Sequence[str] = ("*.mlp",),
    starts: int = 10,
    iterations: int = 100,
    seed: int = 0,
    overwrite: bool = False,
) -> Any:
    """EMoE: the same dense model with the units of its MLPs in order of the expert that they belong to.

    model: a path, an open checkpoint, or a mapping name -> array. Gives a mapping, or the open checkpoint at `out`, which is
    a dense model like the one that came in; refmerge.nets.upscaled runs it with top_k experts for each place.
    """
    model = model if isinstance(model, Mapping) else open_checkpoint(model)
    found = matching(model, modules, "emoe")
    if min(starts, iterations) < 1:
        raise UsageError(f"emoe: starts = {starts!r} and iterations = {iterations!r}: each is 1 at least")
    if not 1 <= top_k <= experts:
        raise UsageError(f"emoe: top_k = {top_k!r} is outside of [1, {experts}], the number of experts")
    keys = {m: keys_of(model, m) for m in found}
    for key in keys.values():
        units = spec(model, f"{key}.weight")[1][0]
        if units % experts:
            raise UsageError(f"emoe: the {units} units of {key!r} cannot be parted into {experts} experts of one size")
    axes = {name: axis for m in found for name, axis in axes_of(model, m, keys[m])}

    def parts() -> Iterator[tuple[str, Any]]:
        for m in found:
            # 1. keys, each of length 1
            k = scores(values([], model, f"{keys[m]}.weight", "emoe")[1])
            k = k / np.maximum(np.linalg.norm(k, axis=1, keepdims=True), SMALLEST)
            # 2. clusters of one size
            expert = balanced(k, experts, iterations, seed, m, starts)
            # 3. order by expert, and within one as before
            order = np.argsort(expert, kind="stable")
            for name in (name for name in axes if name.startswith(f"{m}.")):
                x = values([], model, name, "emoe")[1]
                yield name, array_namespace(x).take(x, like_ints(order, x), axis=axes[name])
        yield from ((name, model[name]) for name in model if name not in axes)

    specs = {name: spec(model, name) for name in model}
    sidecars = model.sidecars() if isinstance(model, Checkpoint) and not str(out).endswith(".safetensors") else ()
    how = {"experts": experts, "top_k": top_k, "modules": found}
    return give(specs, parts(), out, [model], overwrite, how, sidecars)


def axes_of(model: Mapping[str, Any], module: str, keys: str) -> Iterator[tuple[str, int]]:
    """The tensors of an MLP that have an axis of units, and which it is. InputError for tensors that are not known."""
    value = f"{module}.{VALUES[keys.rpartition('.')[2]]}"
    known = {f"{keys}.weight": 0, f"{keys}.bias": 0, f"{value}.weight": 1}
    if keys.endswith("gate_proj"):
        known |= {f"{module}.up_proj.weight": 0, f"{module}.up_proj.bias": 0}
    units = spec(model, f"{keys}.weight")[1][0]
    for name in (name for name in model if name.startswith(f"{module}.")):
        if name in known:
            if spec(model, name)[1][known[name]] != units:
                raise InputError(f"emoe: {name!r} has shape {list(spec(model, name)[1])}, and {keys!r} {units} units")
            yield name, known[name]
        elif name != f"{value}.bias":
            raise InputError(f"emoe: tensor {name!r} is none of an MLP that is known: leave its module out of modules")


def balanced(points: np.ndarray, count: int, iterations: int, seed: int, name: str, starts: int = 1) -> np.ndarray:
    """The cluster of each point, the best of so many starts: k-means with clusters of one size, from centres that
    k-means++ draws. Clusters are numbered by their first points."""
    found = [clustered(points, count, iterations, key_for(seed, name, start)) for start in range(starts)]
    cluster = min(found, key=lambda cluster: distortion(points, cluster))
    first = np.array([np.flatnonzero(cluster == c)[0] for c in range(count)])
    return np.argsort(np.argsort(first))[cluster]


def clustered(points: np.ndarray, count: int, iterations: int, key: tuple[int, int]) -> np.ndarray:
    """From one start: assignments to centres, and centres of what is assigned, in turn."""
    draw = np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))
    centres, size = spread(points, count, draw), len(points) // count
    cluster = np.full(len(points), -1)
    for _ in range(iterations):
        distances = squared(points, centres)
        _, column = linear_sum_assignment(np.repeat(distances, size, axis=1))  # as many places as points in each cluster
        found = column // size
        if np.array_equal(found, cluster):
            break
        cluster = found
        centres = np.stack([points[cluster == c].mean(axis=0) for c in range(count)])
    return cluster


def spread(points: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """Points drawn as first centres, each with probability as the square of its distance from the nearest before."""
    chosen = [int(draw.integers(len(points)))]
    while len(chosen) < count:
        nearest = squared(points, points[chosen]).min(axis=1)
        nearest[chosen] = 0.0
        total = nearest.sum()
        rest = np.setdiff1d(np.arange(len(points)), chosen)
        chosen.append(int(draw.choice(len(points), p=nearest / total)) if total > 0 else int(rest[0]))
    return points[chosen]


def squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """|p - c|^2 of every point and centre."""
    found = np.sum(points**2, axis=1)[:, None] - 2 * (points @ centres.T) + np.sum(centres**2, axis=1)
    return np.maximum(found, 0.0)


def distortion(points: np.ndarray, cluster: np.ndarray) -> float:
    """The sum of the squared distances of points from the centres of their clusters, which `balanced` makes small."""
    found = [points[cluster == c] for c in np.unique(cluster)]
    return float(sum(np.sum((p - p.mean(axis=0)) ** 2) for p in found))
