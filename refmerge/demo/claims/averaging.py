"""Claims about averages of models: soups, lines, policies, shards, times and fronts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
from scipy.ndimage import rotate

from refmerge import merge
from refmerge.demo.claims.claim import Numbers
from refmerge.demo.claims.world import (
    TASKS,
    Data,
    Split,
    World,
    images,
    learn,
    loss,
    network,
    right,
    slope,
    world,
)  # fmt: skip
from refmerge.demo.training import Weights, backward, softmax
from refmerge.nets import mlp
from refmerge.procedures.averaging.greedy_soup import greedy_soup
from refmerge.procedures.averaging.pareto_gradients import pareto_gradients
from refmerge.procedures.averaging.weight_selection import weight_selection
from refmerge.procedures.measures.sparse_stragglers import sparse_stragglers
from refmerge.procedures.measures.straggler_score import straggler_score

__all__ = [
    "anchored", "front", "line", "policies", "ratatouille", "reinforce", "reward", "rewards", "selected", "shards",
    "shifted", "soups", "times",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- soups and lines

MEMBERS = [(rate, epochs) for rate in (0.002, 0.005, 0.01, 0.02) for epochs in (3, 9)]


@cache
def members(seed: int) -> tuple[Weights, ...]:
    """Eight fine-tunes of the base on upright digits, of other rates, lengths and orders."""
    base = world(seed).base
    given = [(np.random.RandomState(100 * seed + i), *how) for i, how in enumerate(MEMBERS)]
    return tuple(learn(base, images().train, random, rate=rate, epochs=epochs) for random, rate, epochs in given)


def shifted(w: World, model: Weights) -> float:
    """Of a model that was fine-tuned on upright digits: the mean over the pictures that it was not fine-tuned on."""
    kept = [right(model, t.test) for name, t in w.tasks.items() if not name.startswith(("0", "5"))]
    return float(np.mean(kept))


def ensemble(models: Sequence[Weights], x: np.ndarray) -> np.ndarray:
    return np.mean([softmax(mlp.forward(m, x)) for m in models], axis=0)


@cache
def soups(seed: int) -> Numbers:
    w, models, test = world(seed), members(seed), images().test
    scores = [right(m, images().val) for m in models]
    best = models[int(np.argmax(scores))]
    uniform = merge(models, "linear")
    greedy = greedy_soup(models, lambda m: right(m, images().val)).merged
    first, last = models[2], models[3]
    stock, two = merge([first, last], "model_stock", base=w.base), merge([first, last], "linear")
    away = [t.test for name, t in w.tasks.items() if not name.startswith(("0", "5"))]
    found = {
        "uniform soup": uniform,
        "greedy soup": greedy,
        "best member": best,
        "average of two": two,
        "stock of two": stock,
    }
    numbers = {name: right(m, test) for name, m in found.items()}
    numbers |= {f"{name}, shifted": shifted(w, m) for name, m in found.items()}
    return numbers | {
        "members": float(np.mean([right(m, test) for m in models])),
        "members, shifted": float(np.mean([shifted(w, m) for m in models])),
        "ensemble": 100 * float(np.mean(ensemble(models, test.x).argmax(axis=1) == test.y)),
        "ensemble, shifted": 100 * float(np.mean([np.mean(ensemble(models, t.x).argmax(axis=1) == t.y) for t in away])),
    }


@cache
def line(seed: int) -> Numbers:
    w, test = world(seed), images().test
    random = np.random.RandomState(seed)
    tuned = learn(w.base, images().train, random)
    mixed = learn(w.base, *mixture(images().train, random))
    half = merge([tuned], "wise_ft", base=w.base)
    bang = merge([mixed], "wise_ft", base=w.base)
    straggling = straggler_score(w.base, tuned, lambda m: loss(m, images().val))
    worst = straggling.layers[:1] or (max(straggling.scores, key=lambda layer: straggling.scores[layer]),)
    sparse = sparse_stragglers(w.base, tuned, worst)
    models = {"base": w.base, "fine-tune": tuned, "half way": half, "half way, BANG": bang, "half way, sparse": dict(sparse)}
    numbers = {name: right(m, test) for name, m in models.items()}
    return numbers | {f"{name}, shifted": shifted(w, m) for name, m in models.items()}


def mixture(data: Split, random: np.random.RandomState, smoothing: float = 0.1) -> tuple[Split, np.random.RandomState]:
    """Mixup, with labels that are smoothed: what BANG trains on. Targets lie in the place of labels."""
    other, share = random.permutation(len(data)), random.uniform(0.5, 1.0, (len(data), 1))
    y = (1 - smoothing) * np.eye(10)[data.y] + smoothing / 10
    return Split(share * data.x + (1 - share) * data.x[other], share * y + (1 - share) * y[other]), random


@cache
def ratatouille(seed: int) -> Numbers:
    """Four auxiliary tasks, and as many fine-tunes straight from the base."""
    w, data, test = world(seed), images().train, images().test
    orders = [np.random.RandomState(100 * seed + i) for i in range(8)]
    recycled = merge([learn(m, data, r) for m, r in zip(w.models[2:6], orders)], "linear")
    soup = merge([learn(w.base, data, r) for r in orders[4:]], "linear")
    return {
        "ratatouille": right(recycled, test), "soup": right(soup, test),
        "ratatouille, shifted": shifted(w, recycled), "soup, shifted": shifted(w, soup),
    }  # fmt: skip


@cache
def rewards(seed: int, wrong: float = 0.3, count: int = 4) -> Numbers:
    """Fine-tunes on labels of which three in ten are wrong."""
    w, data, test = world(seed), images().train, images().test
    random = np.random.RandomState(seed)
    turned = random.uniform(size=len(data)) < wrong
    y = np.where(turned, (data.y + random.randint(1, 10, len(data))) % 10, data.y)
    spoilt, bad = Split(data.x, y), Split(data.x[turned], y[turned])
    models = [learn(w.base, spoilt, random, epochs=20, rate=0.01) for _ in range(count)]
    averaged, p = merge(models, "linear"), [ensemble(models, x) for x in (test.x, bad.x)]
    found = {
        "members": float(np.mean([right(m, test) for m in models])),
        "average": right(averaged, test),
        "ensemble": 100 * float(np.mean(p[0].argmax(axis=1) == test.y)),
        "average, wrong labels learned": right(averaged, bad),
        "ensemble, wrong labels learned": 100 * float(np.mean(p[1].argmax(axis=1) == bad.y)),
    }
    return found


# ----------------------------------------------------------------------------------------------------------------- policies


def reinforce(
    policy: Weights, reference: Weights, data: Split, random: np.random.RandomState, *, beta: float, epochs: int = 5,
    anchor: float = 0.0, rate: float = 0.05,
) -> Iterator[Weights]:  # fmt: skip
    """The policy after each epoch of gradient ascent on the expected reward, 1 for the right digit, less beta times the KL
    divergence from the reference, which follows the policy as a moving average if anchor is above 0."""
    policy, reference = dict(policy), dict(reference)
    for _ in range(epochs):
        order = random.permutation(len(data))
        for chosen in np.split(order, range(32, len(order), 32)):
            batch = data.of(chosen)
            ref = softmax(mlp.forward(reference, batch.x))

            def error(z: np.ndarray, batch: Split = batch, ref: np.ndarray = ref) -> np.ndarray:
                p = softmax(z)
                worth = np.eye(10)[batch.y] - beta * np.log((p + 1e-12) / (ref + 1e-12))
                return -p * (worth - (p * worth).sum(axis=1, keepdims=True)) / len(z)

            found = backward(policy, batch.x, error)
            policy = {name: x - rate * found[name] for name, x in policy.items()}
            if anchor:
                reference = {name: (1 - anchor) * x + anchor * policy[name] for name, x in reference.items()}
        yield policy


def reward(policy: Weights, data: Split) -> float:
    """The expected reward, in per cent."""
    p = softmax(mlp.forward(policy, data.x))
    return 100 * float(p[np.arange(len(data)), data.y].mean())


def divergence(policy: Weights, reference: Weights, data: Split) -> float:
    """KL(policy, reference), the mean over images, in nats."""
    p, q = (softmax(mlp.forward(m, data.x)) for m in (policy, reference))
    return float((p * np.log((p + 1e-12) / (q + 1e-12))).sum(axis=1).mean())


@cache
def anchored(seed: int) -> Numbers:
    """A policy held to one supervised fine-tune, or to the average of two."""
    w = world(seed)
    few, data, test = images().train.of(slice(0, 200)), images().train, images().test
    sft = [learn(w.base, few, np.random.RandomState(100 * seed + i), epochs=5) for i in range(2)]
    soup = merge(sft, "linear")
    random = np.random.RandomState
    *_, one = reinforce(sft[0], sft[0], data, random(seed), beta=0.2)
    *_, other = reinforce(sft[0], soup, data, random(seed), beta=0.2)
    return {"start": reward(sft[0], test), "one reference": reward(one, test), "soup as reference": reward(other, test)}


@cache
def policies(seed: int) -> Numbers:
    """Two policies, merged; the line back to where they began, against one policy trained for other times."""
    w, data, test = world(seed), images().train, images().test
    start = w.base
    orders = [np.random.RandomState(100 * seed + i) for i in range(2)]
    runs = [list(reinforce(start, start, data, random, beta=0.1, anchor=0.01, epochs=6)) for random in orders]
    ends = [run[3] for run in runs]
    round_, straight = merge(ends, "warp", base=start, over=lambda name: name.rpartition(".")[0]), merge(ends, "linear")
    back = [merge([round_], "wise_ft", base=start, alpha=a) for a in np.linspace(0, 1.5, 31)]
    at, worth = [divergence(m, start, test) for m in back], [reward(m, test) for m in back]
    singles = [(divergence(m, start, test), reward(m, test)) for run in runs for m in run[1:]]
    above = [float(np.interp(kl, at, worth)) - r for kl, r in singles]
    return {
        "policies": float(np.mean([reward(m, test) for m in ends])),
        "slerp": reward(round_, test),
        "average": reward(straight, test),
        "front above policies": float(np.mean(above)),
    }


# ------------------------------------------------------------------------------------------------------------ shards, times


@cache
def shards(seed: int) -> Numbers:
    """Five shards of two digits each, and four of digits at random."""
    w, data, test = world(seed), images().train, images().test
    random = np.random.RandomState(seed)
    pairs = [learn(w.base, data.of(data.y // 2 == i), random, epochs=3) for i in range(5)]
    whole, without = merge(pairs, "linear"), merge(pairs[:-1], "linear")
    gone, rest = test.of(test.y >= 8), test.of(test.y < 8)
    some = np.arange(len(data)) % 4
    random_shards = [learn(w.base, data.of(some == i), random) for i in range(4)]
    return {
        "digits 8 and 9": right(whole, gone), "digits 8 and 9, shard taken out": right(without, gone),
        "others": right(whole, rest), "others, shard taken out": right(without, rest),
        "shards": float(np.mean([right(m, test) for m in random_shards])),
        "soup of shards": right(merge(random_shards, "linear"), test),
        "one model on all": right(learn(w.base, data, random), test),
    }  # fmt: skip


def at_time(angle: float) -> Data:
    """Digits that lean further from year to year."""

    def lean(data: Split) -> Split:
        x = rotate(data.x.reshape(-1, 8, 8), angle, axes=(2, 1), reshape=False, order=1)
        return Split(np.clip(x, 0, 1).reshape(len(data), -1), data.y)

    return images().each(lean)


@cache
def times(seed: int) -> Numbers:
    w, random = world(seed), np.random.RandomState(seed)
    years = {angle: at_time(angle) for angle in (0, 20, 40)}
    early, late = (learn(w.base, years[angle].train, random) for angle in (0, 40))
    between = merge([early, late], "task_arithmetic", base=w.base, lambda_=0.5)
    thick = w.models[list(TASKS).index("thick")]
    there = years[40].each(lambda data: TASKS["thick"](data, random)).test
    later = merge([thick, late, early], "task_arithmetic", base=w.base, weight=[1.0, 1.0, -1.0])
    test = years[20].test
    return {
        "early": right(early, test), "late": right(late, test), "between": right(between, test),
        "thick, early": right(thick, there), "thick + late - early": right(later, there),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- fronts and sizes


@cache
def front(seed: int, steps: int = 150) -> Numbers:
    """Two members for the tasks turned and mirrored, trained together with preferences drawn anew in each step."""
    w, random = world(seed), np.random.RandomState(seed)
    names = ("turned", "mirrored")
    data = [w.tasks[name] for name in names]
    members = [dict(w.base), dict(w.base)]
    for _ in range(steps):
        batches = [d.train.of(random.randint(len(d.train), size=32)) for d in data]
        a = random.uniform()
        _, _, found = pareto_gradients(members, [[a, 1 - a], [1 - a, a]], evaluate(batches))
        members = [{name: x - 0.05 * g[name] for name, x in m.items()} for m, g in zip(members, found)]
    apart = [w.models[list(TASKS).index(name)] for name in names]
    numbers = {}
    for kind, models in (("together", members), ("apart", apart)):
        for share in (1.0, 0.5, 0.0):
            mixed = merge(models, "linear", weight=[share, 1 - share])
            for name, d in zip(names, data):
                numbers[f"{kind}, {share:g} {name}: {name}"] = right(mixed, d.test)
            numbers[f"{kind}, {share:g}"] = float(np.mean([right(mixed, d.test) for d in data]))
    one, half, none = (numbers[f"together, {a:g} turned: turned"] for a in (1.0, 0.5, 0.0))
    two = numbers["together, 1 mirrored: mirrored"]
    return {
        "turned, at its end": one, "turned, in the middle": half, "turned, at the other end": none,
        "mirrored, at turned's end": two, "mean in the middle": numbers["together, 0.5"],
        "mean in the middle, trained apart": numbers["apart, 0.5"],
    }  # fmt: skip


def evaluate(batches: Sequence[Split]) -> Callable[[Weights], tuple[list[float], list[Weights]]]:
    return lambda theta: ([loss(theta, b) for b in batches], [slope(theta, b) for b in batches])


@cache
def selected(seed: int) -> Numbers:
    """A network of 256 units, and one of 64 that starts from a quarter of its weights."""
    random, data, test = np.random.RandomState(seed), images().train, images().test
    large = learn(network(random, 256), data, random, epochs=15, rate=0.01)
    small = network(random, 64)
    chosen = small | weight_selection(large, small)
    numbers = {}
    for epochs in (1, 20):
        for name, start in (("selected", chosen), ("new", small)):
            trained = learn(start, data, np.random.RandomState(seed), epochs=epochs, rate=0.01)
            numbers[f"{name}, {epochs} epoch{'s' if epochs > 1 else ''}"] = right(trained, test)
    return numbers
