"""Every method on the eight tasks: how much one model, or one for each task, finds on average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from refmerge import merge
from refmerge.adaptive import cross_entropy, entropy
from refmerge.demo.claims.world import EPOCHS, TASKS, Made, Split, World, head, learn, rest_of, slope, world
from refmerge.demo.training import Weights, backward, softmax
from refmerge.nets import mlp, upscaled
from refmerge.nets.layers import relu
from refmerge.procedures.averaging.greedy_soup import greedy_soup
from refmerge.procedures.data_driven.adamerging import adamerging
from refmerge.procedures.data_driven.atlas import atlas
from refmerge.procedures.data_driven.evolutionary_merge import evolutionary_merge
from refmerge.procedures.data_driven.model_tinting import model_tinting
from refmerge.procedures.data_driven.regmean_plusplus import Stage, regmean_plusplus
from refmerge.procedures.experts.smile import smile

__all__ = ["ROWS", "Row", "best", "result", "tuned"]

SCALES = tuple(round(0.1 * k, 1) for k in range(1, 16))
STEPS, BATCH = 500, 16


@dataclass(frozen=True)
class Row:
    """name: of the row. make: what merges the models of a World. kind: what it gives and needs. scale: the parameter that is
    also chosen on validation data out of SCALES, if there is one. given: parameters that are no defaults. fusionbench, esm:
    what is published for ViT-B/32 on eight tasks."""

    name: str
    make: Callable[..., Made]
    kind: str
    scale: str | None = None
    given: str = ""
    fusionbench: float | None = None
    esm: float | None = None


def method(
    name: str, kind: str, *, label: str | None = None, scale: str | None = None, fusionbench: float | None = None,
    esm: float | None = None, **params: Any,
) -> Row:  # fmt: skip
    """A row of a method of the registry, with its defaults but for params."""

    def make(w: World, **more: Any) -> Weights:
        return w.merge(name, **(params | more))

    return Row(label or name, make, kind, scale, told(params), fusionbench, esm)


def told(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.strip('_')} {', '.join(x) if isinstance(x, tuple) else x}" for key, x in params.items())


def each(name: str) -> Row:
    """A row of a method that is called once for each task."""
    return Row(name, lambda w: [w.merge(name, task=i) for i in range(len(TASKS))], EACH)


def routed(w: World) -> list[Weights]:
    """A router that knows the task."""
    return [w.merge("twin_merging", weight=[float(task == i) for i in range(len(TASKS))]) for task in range(len(TASKS))]


def alone(name: str, **params: Any) -> Row:
    """A row of what is made of each fine-tune by itself."""

    def make(w: World) -> list[Weights]:
        return [merge([m], name, base=w.base, **params) for m in w.models]

    return Row(name, make, EACH, given=told(params))


# ---------------------------------------------------------------------------------------------------------- data and search


def batches(w: World, steps: int = STEPS, size: int = BATCH, labels: bool = False) -> Iterator[list[tuple[int, Any]]]:
    """For each step of each task two batches of training images, without labels unless they are asked for."""
    random = np.random.RandomState(w.seed)
    data = [t.train for t in w.tasks.values()]
    for _ in range(steps):
        drawn = [d.of(random.randint(len(d), size=2 * size)) for d in data]
        yield [(i, (d.x, d.y) if labels else d.x) for i, d in enumerate(drawn)]


def logits(params: Weights, _: int, x: np.ndarray) -> np.ndarray:
    return mlp.forward(params, x)


def uncertain(params: Weights, x: np.ndarray) -> tuple[float, Weights]:
    """The entropy of predictions and its gradient."""
    return float(entropy(mlp.forward(params, x))), backward(params, x, lambda z: uncertain_slope(z)[1])


def uncertain_slope(z: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean entropy of logits and its gradient by these."""
    p = softmax(z)
    logs = np.log(p + 1e-300)
    less = (p * logs).sum(axis=1, keepdims=True)
    return -float(less.mean()), -p * (logs - less) / len(z)


def wrong(params: Weights, x: np.ndarray, y: np.ndarray) -> tuple[float, Weights]:
    """The cross-entropy and its gradient."""
    return float(cross_entropy(mlp.forward(params, x), y)), slope(params, Split(x, y))


def provider(loss: Callable[..., tuple[float, Weights]]) -> Callable[..., Any]:
    """Gradients for coefficients, of the loss on the images of all tasks of a step together."""

    def through(step: Any, x: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        given = [batch if isinstance(batch, tuple) else (batch,) for _, batch in step.examples]
        params = step.composition.theta(x["coefficients"])
        value, found = loss(params, *(np.concatenate(parts) for parts in zip(*given, strict=True)))
        return value, {"coefficients": by_coefficient(step.composition, found)}

    return through


def by_coefficient(composition: Any, found: Weights) -> np.ndarray:
    """What composition.contract gives, but for rounding, sooner."""
    out = np.zeros(composition.shape)
    for name, parts in composition.rows.items():
        for row, _ in parts:
            out[row] += [np.vdot(found[name], tau[name]) for tau in composition.tau]
    return out


def adapted(w: World, *, steps: int = STEPS, **how: Any) -> Weights:
    fit = adamerging(w.models, w.base, logits, batches(w, steps), gradient=provider(uncertain), **how)
    return fit.merge(w.models, w.base)


def composed(w: World, *, steps: int = STEPS) -> Weights:
    """With labels; the authors' rate for the addition of tasks."""
    given = batches(w, steps, labels=True)
    fit = atlas(w.models, w.base, lambda p, i, b: logits(p, i, b[0]), given, gradient=provider(wrong), lr=0.01)
    return fit.merge(w.models, w.base)


def tinted(w: World, *, steps: int = STEPS, **how: Any) -> list[Weights]:
    """Of each task the merge with that task's own last layer."""
    heads = [head(m) for m in w.models]
    shared = [rest_of(m) for m in (*w.models, w.base)]
    given = (example for step in batches(w, steps) for example in step)

    def through(step: Any, x: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        ((task, (images, labels, chosen)),) = step.examples
        own = {name: x[f"{task}/{name}"] for name in heads[task]}
        params = step.composition.theta(x["coefficients"]) | own
        value, found = wrong(params, images[chosen], labels)
        trained = {f"{task}/{name}": found[name] for name in own}
        return value, {"coefficients": by_coefficient(step.composition, found), **trained}

    fit = model_tinting(
        shared[:-1], heads, shared[-1], lambda p, own, x: mlp.forward(p | own, x), given, gradient=through, **how
    )
    merged = fit.merge(shared[:-1], shared[-1])
    return [merged | {name: fit.trained[f"{i}/{name}"] for name in own} for i, own in enumerate(heads)]


def smiled(w: World, **params: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Hidden layers with a router and an expert for each task."""
    found = smile(w.models, w.base, layers=("blocks.*",), **params)
    *hidden, last = mlp.order(w.base)

    def logits(x: np.ndarray) -> np.ndarray:
        for name in hidden:
            x = relu(upscaled.smile(found, name, x))
        return x @ found[f"{last}.weight"].T + found[f"{last}.bias"]

    return logits


def stages(weights: Weights) -> list[Stage]:
    """A stage for each layer."""

    def run(name: str) -> Callable[..., np.ndarray]:
        def through(params: Weights, h: np.ndarray, reads: Callable[[str, Any], None]) -> np.ndarray:
            few = 1e-3 * np.sqrt(len(h) * np.mean(h * h)) * np.eye(h.shape[1])  # units may be dead in all models
            reads(name, np.concatenate([h, few]))
            z = h @ params[f"{name}.weight"].T + params[f"{name}.bias"]
            return z if name == "head" else relu(z)

        return through

    return [Stage(f"{name}.", run(name)) for name in mlp.order(weights)]


def staged(w: World) -> Weights:
    data = [[t.train.x] for t in w.tasks.values()]
    return regmean_plusplus(w.models, stages(w.base), data)


def soup(w: World) -> Weights:
    return greedy_soup(w.models, lambda m: w.mean(m, "val")).merged


def evolved(w: World, evaluations: int = 100) -> Weights:
    found = evolutionary_merge(
        w.models, lambda m: w.mean(m, "val"), method="task_arithmetic", base=w.base, search=["weight"],
        evaluations=evaluations, seed=w.seed,
    )  # fmt: skip
    return found.merged


def jointly(w: World) -> Weights:
    """The base trained on all tasks at once."""
    data = [t.train for t in w.tasks.values()]
    everything = Split(np.concatenate([d.x for d in data]), np.concatenate([d.y for d in data]))
    trained = learn(w.base, everything, np.random.RandomState(w.seed), epochs=EPOCHS)
    return trained


# ----------------------------------------------------------------------------------------------------------------- the rows

ENDS, ONE, DATA, EACH = "no merge", "one model, without data", "one model, with data", "a model for each task"
ROUTED = "one model that routes inputs to experts, without data"

ROWS = [
    Row("base", lambda w: w.base, ENDS, esm=48.3),
    Row("each task's fine-tune", lambda w: w.models, ENDS, fusionbench=90.3, esm=92.8),
    Row("trained on all tasks", jointly, ENDS, fusionbench=88.6),
    method("linear", ONE, fusionbench=66.5, esm=66.3),
    method("karcher", ONE),
    method("multislerp", ONE),
    method("warp", ONE),
    method("ema", ONE, mu=0.5),
    method("task_arithmetic", ONE, scale="lambda_", lambda_=0.3, fusionbench=68.0, esm=70.8),
    method("ties", ONE, scale="lambda_", fusionbench=72.2, esm=75.1),
    method("dare_linear", ONE, scale="lambda_", density=0.1, lambda_=0.3),
    method("dare_ties", ONE, scale="lambda_", density=0.1),
    method("breadcrumbs", ONE, scale="lambda_"),
    method("breadcrumbs_ties", ONE, scale="lambda_"),
    method("della", ONE, scale="lambda_"),
    method("della_linear", ONE, scale="lambda_", lambda_=0.3),
    method("model_stock", ONE),
    method("widen", ONE),
    method("sce", ONE),
    method("ram", ONE),
    method("ramplus_tl", ONE),
    method("magmax", ONE, scale="lambda_"),
    method("pcb", ONE, scale="lambda_"),
    method("lines", ONE, blocks=2, beta=0.3, scale="beta"),
    method("consensus", ONE, scale="lambda_", lambda_=0.3, esm=75.0),
    method("cart", ONE, layers=("blocks.*",)),
    method("tsvm", ONE, scale="lambda_", fusionbench=83.1, esm=85.9),
    method("iso_c", ONE, scale="lambda_", fusionbench=82.8, esm=86.3),
    method("iso_cts", ONE, scale="lambda_", fusionbench=82.7, esm=86.2),
    method("dc_merge", ONE, scale="lambda_", esm=87.1),
    method("knots", ONE, scale="lambda_"),
    method("wudi", ONE, fusionbench=84.5),
    method("wudi", ONE, solver="exact", label="wudi, exact"),
    method("doge", ONE),
    method("svc", ONE),
    method("dop", ONE),
    method("opcm", ONE),
    Row("smile", smiled, ROUTED),
    Row("smile, wide gates", lambda w: smiled(w, k=32, gate_k=16), ROUTED, given="k 32, gate_k 16", esm=91.5),
    Row("greedy_soup", soup, DATA, given="validation data"),
    Row("evolutionary_merge", evolved, DATA, given="validation data"),
    method("fisher", DATA, fusionbench=70.6),
    method("regmean", DATA, fusionbench=82.4),
    Row("regmean_plusplus", staged, DATA, fusionbench=84.4),
    method("mats", DATA),
    Row("adamerging, task-wise", lambda w, **k: adapted(w, per="model", **k), DATA, fusionbench=68.7),
    Row("adamerging, layer-wise", adapted, DATA, fusionbench=82.6),
    Row("adamerging++, layer-wise", lambda w, **k: adapted(w, density=0.2, **k), DATA, given="density 0.2"),
    Row("atlas", composed, DATA, given="labels, lr 0.01"),
    Row("model_tinting", tinted, EACH),
    each("tall_masks"),
    each("emr"),
    Row("twin_merging", routed, EACH, given="the task is known"),
    alone("bitdelta", layers=("*.weight",)),
    alone("low_rank_residual"),
]  # fmt: skip


def tuned(row: Row, w: World) -> tuple[float, float]:
    """(scale, accuracy on test images) of the scale that is best on validation images, the smallest of equal ones."""
    assert row.scale is not None
    found = [(w.mean(row.make(w, **{row.scale: s}), "val"), -s) for s in SCALES]
    best = -max(found)[1]
    return best, w.mean(row.make(w, **{row.scale: best}))


@cache
def result(name: str, seed: int) -> tuple[float, float | None, float | None]:
    """Of a row the accuracy with its defaults, the scale that is best on validation images, and the accuracy there."""
    (row,) = (row for row in ROWS if row.name == name)
    w = world(seed)
    return (w.mean(row.make(w)), *(tuned(row, w) if row.scale else (None, None)))


def best(seed: int) -> dict[str, float]:
    """Of each row the accuracy with the scale chosen, or with its defaults if nothing is chosen."""
    found = {row.name: result(row.name, seed) for row in ROWS}
    return {name: default if chosen is None else chosen for name, (default, _, chosen) in found.items()}
