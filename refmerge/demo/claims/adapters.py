"""Claims about adapters of low rank: added, negated, extracted, fused by contrast, and asked together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from refmerge import merge
from refmerge.adapters import Adapter, Factors, apply_adapter
from refmerge.demo.claims.claim import Numbers
from refmerge.demo.claims.table import SCALES
from refmerge.demo.claims.world import RATE, TASKS, Split, World, images, right, slope, world
from refmerge.demo.training import Weights
from refmerge.nets import mlp
from refmerge.procedures.adapters.ensemble_predict import ensemble_predict
from refmerge.procedures.adapters.lora_extraction import lora_extraction
from refmerge.procedures.adapters.lora_merge import lora_merge
from refmerge.procedures.adapters.loraclr import loraclr
from refmerge.procedures.adapters.pem import pem
from refmerge.procedures.subspaces.core_space import core_space

RANK = 8


def adapter(
    base: Weights, data: Split, random: np.random.RandomState, *, epochs: int = 10, rate: float = 4 * RATE, start: int = 0,
) -> Adapter:  # fmt: skip
    """LoRA of the hidden layers: A is drawn with the seed `start`, B starts at 0, and both are trained."""
    names, first = mlp.order(base)[:-1], np.random.RandomState(start)
    shapes = {name: base[f"{name}.weight"].shape for name in names}
    A = {name: first.normal(0, inputs**-0.5, (RANK, inputs)) for name, (_, inputs) in shapes.items()}
    B = {name: np.zeros((outputs, RANK)) for name, (outputs, _) in shapes.items()}
    speed = {name: (np.zeros_like(A[name]), np.zeros_like(B[name])) for name in names}
    for _ in range(epochs):
        order = random.permutation(len(data))
        for chosen in np.split(order, range(32, len(order), 32)):
            changed = base | {f"{name}.weight": base[f"{name}.weight"] + B[name] @ A[name] for name in names}
            found = slope(changed, data.of(chosen))
            for name in names:
                g = found[f"{name}.weight"]
                a, b = speed[name]
                speed[name] = a, b = 0.9 * a - rate * B[name].T @ g, 0.9 * b - rate * g @ A[name].T
                A[name], B[name] = A[name] + a, B[name] + b
    return Adapter({name: Factors(A[name], B[name]) for name in names})


@cache
def trained(seed: int) -> tuple[Adapter, ...]:
    """An adapter for each task."""
    w, random = world(seed), np.random.RandomState(seed)
    return tuple(adapter(w.base, t.train, random) for t in w.tasks.values())


def whole(w: World, one: Adapter) -> Weights:
    return apply_adapter(w.base, one)


@cache
def arithmetic(seed: int) -> Numbers:
    """Two adapters of halves of the digits, one of 5 to 9 taken away, and noise carried over."""
    w, random, data, test = world(seed), np.random.RandomState(seed), images().train, images().test
    halves = [adapter(w.base, data.of(slice(i, None, 2)), random) for i in range(2)]
    added = pem(halves)
    names = list(TASKS)
    high, low = w.tasks["5 to 9"].test, w.tasks["0 to 4"].test
    away = whole(w, pem([trained(seed)[names.index("5 to 9")]], operation="negate"))
    noise, clean = w.tasks["noisy"].train, images().train
    kinds = [(clean, clean.y >= 5), (noise, noise.y < 5), (clean, clean.y < 5)]
    parts = [adapter(w.base, d.of(chosen), random) for d, chosen in kinds]
    unseen = w.tasks["noisy"].test.of(w.tasks["noisy"].test.y >= 5)
    return {
        "halves": float(np.mean([right(whole(w, h), test) for h in halves])), "added": right(whole(w, added), test),
        "base, 5 to 9": right(w.base, high), "negated, 5 to 9": right(away, high),
        "base, 0 to 4": right(w.base, low), "negated, 0 to 4": right(away, low),
        "clean 5 to 9": right(whole(w, parts[0]), unseen),
        "analogy": right(whole(w, pem(parts, operation="analogy", on="product")), unseen),
    }  # fmt: skip


@cache
def merged(seed: int) -> Numbers:
    """The adapters of all tasks as one."""
    w, adapters = world(seed), trained(seed)
    inputs = []
    for one, task in zip(adapters, w.tasks.values()):
        taps: dict[str, np.ndarray] = {}
        model, x = whole(w, one), task.train.x[:200]
        mlp.forward(model, x, taps)
        inputs.append({"blocks.0": x, "blocks.1": taps["blocks.0"]})
    contrast = w.base | loraclr(w.base, adapters, inputs)
    share = [1 / len(adapters)] * len(adapters)
    average = whole(w, lora_merge(adapters, weights=share, combination_type="cat"))
    low = whole(w, lora_merge(adapters, weights=share, combination_type="svd", svd_rank=RANK))
    extracted = [apply_adapter(w.base, lora_extraction(m, w.base, rank=RANK, rest="save")[0]) for m in w.models]
    return {
        "adapters": w.mean([whole(w, one) for one in adapters]),
        "average": w.mean(average), "average at rank 8": w.mean(low), "loraclr": w.mean(contrast),
        "fine-tunes": w.mean(w.models), "extracted at rank 8": w.mean(extracted),
    }  # fmt: skip


@cache
def asked(seed: int) -> Numbers:
    """Five adapters of one task on few images, asked together."""
    w, test = world(seed), images().test
    few = images().train.of(slice(0, 300))
    members = [adapter(w.base, few, np.random.RandomState(100 * seed + i), epochs=30, start=i) for i in range(5)]
    found = ensemble_predict(w.base, members, lambda m: mlp.forward(m, test.x))
    one = [calibration(p, test.y) for p in found.members]
    together = calibration(found.mean, test.y)
    numbers: Numbers = {}
    for i, name in enumerate(("right", "log-likelihood", "calibration error")):
        numbers |= {f"members, {name}": float(np.mean([m[i] for m in one])), f"ensemble, {name}": together[i]}
    return numbers


def calibration(p: np.ndarray, y: np.ndarray, bins: int = 10) -> tuple[float, float, float]:
    """(per cent right, mean log-likelihood, expected calibration error)."""
    sure, hit = p.max(axis=1), p.argmax(axis=1) == y
    place = np.minimum((sure * bins).astype(int), bins - 1)
    error = sum(abs(np.sum(hit[place == b]) - np.sum(sure[place == b])) for b in range(bins)) / len(y)
    return 100 * float(hit.mean()), float(np.log(p[np.arange(len(y)), y]).mean()), float(error)


@cache
def spaces(seed: int) -> Numbers:
    """Adapters merged as whole matrices and in spaces that they span, with the scale that is best on validation data."""
    w, adapters = world(seed), trained(seed)
    models = [whole(w, one) for one in adapters]
    ways: dict[str, Callable[[float], Weights]] = {
        "task_arithmetic": lambda s: merge(models, "task_arithmetic", base=w.base, lambda_=s),
        "ties": lambda s: merge(models, "ties", base=w.base, lambda_=s),
        "knots": lambda s: merge(models, "knots", base=w.base, lambda_=s),
        "tsvm": lambda s: merge(models, "tsvm", base=w.base, lambda_=s),
        "core_space with tsvm": lambda s: whole(w, core_space(adapters, method="tsvm", lambda_=s)),
    }
    numbers = {}
    for name, make in ways.items():
        best = max(SCALES, key=lambda s, make=make: (w.mean(make(s), "val"), -s))  # type: ignore[misc]
        numbers[name] = w.mean(make(best))
    return numbers
