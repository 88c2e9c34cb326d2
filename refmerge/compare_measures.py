"""What else two models and labelled inputs say of each other: measures layer by layer, and a way around the barrier.

Each measure is a function of two models and a `refmerge.compare.Task`. Layers are modules, in the order in which the network
runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.compare import Task, digits, shown
from refmerge.errors import UsageError
from refmerge.numeric import host
from refmerge.procedures.alignment.git_rebasin import git_rebasin
from refmerge.procedures.measures._common import layers_of
from refmerge.procedures.measures.activation_correlation import activation_correlation
from refmerge.procedures.measures.cka import cka
from refmerge.procedures.measures.dropout_path import dropout_path
from refmerge.procedures.measures.layerwise_barrier import layerwise_barrier
from refmerge.procedures.measures.layerwise_sharpness import layerwise_sharpness
from refmerge.procedures.measures.loss_barrier import loss_barrier
from refmerge.procedures.measures.quadratic_barrier import quadratic_barrier
from refmerge.procedures.measures.straggler_score import straggler_score
from refmerge.symmetry.architectures import detect

if TYPE_CHECKING:
    from refmerge.procedures.measures.loss_barrier import Barrier

__all__ = ["LENIENT", "MEASURES", "Measure"]

Model = Mapping[str, Any]
LENIENT: dict[str, Any] = {"integers": "base", "nonfinite": "propagate"}
ROWS = 2048  # of activations at the most, evenly spaced: similarities of samples are matrices of so many rows and columns
CORNER = 5  # points on each straight piece of a path, both its corners among them


@dataclass(frozen=True)
class Measure:
    """about: what the numbers are. columns: what each row has. rows: label -> numbers, None where there is none. path: the
    losses on another path than the line, and what that is called."""

    about: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    path: Barrier | None = None
    path_label: str = ""

    def told(self) -> dict[str, Any]:
        """For programs."""
        return {label: dict(zip(self.columns, row)) for label, row in self.rows.items()}

    def text(self) -> str:
        """For people."""
        width = max(map(len, map(shown, self.rows)), default=0)
        wide = [max(9, len(column)) for column in self.columns]
        lines = [self.about, "  ".join(["", " " * width, *(c.rjust(w) for c, w in zip(self.columns, wide))])]
        for label, row in self.rows.items():
            lines.append("  ".join(["", shown(label).ljust(width), *(digits(x).rjust(w) for x, w in zip(row, wide))]))
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- layer by layer


def barriers(models: Sequence[Model], of: Task, cumulative: str = "no") -> Measure:
    """Of a layer by itself, or with all before it from the input or the output on."""
    about = {
        "no": "one layer alone half-way",
        "shallow": "a layer and all before it half-way",
        "deep": "a layer and all behind it half-way",
    }[cumulative]
    found = layerwise_barrier(models, of.loss, layers=in_order(models[0], of), cumulative=cumulative, **LENIENT)
    rows = {label: layer.barriers for label, layer in found.layers.items()}
    return Measure(f"{about}, above the mean loss of A and B: in A, and in B", ("A", "B"), rows)


def stragglers(models: Sequence[Model], of: Task) -> Measure:
    """B as a fine-tune of A: layers that spoil the way back where they go it alone."""
    found = straggler_score(*models, of.loss, layers=in_order(models[0], of), **LENIENT)
    order = sorted(found.scores, key=lambda label: -_or_infinity(found.scores[label]))
    about = "stragglers: one layer of B on its way to A, the highest loss above the line from A to B"
    return Measure(about, ("score",), {label: (found.scores[label],) for label in order})


def sharpness(models: Sequence[Model], of: Task) -> Measure:
    """How far noise of a hundredth of each weight lifts the loss."""
    found = [layerwise_sharpness(m, of.loss, layers=in_order(m, of)) for m in models]
    every = {label: (found[0].layers[label], found[1].layers[label]) for label in found[0].layers}
    about = "sharpness: the mean rise of the loss under noise of 1 % of each weight of a layer, 20 draws: of A, and of B"
    return Measure(about, ("A", "B"), {**every, "all layers": (found[0].whole, found[1].whole)})


def quadratic(models: Sequence[Model], of: Task) -> Measure:
    """The barriers that the slopes of the loss at both ends predict."""
    layers = in_order(models[0], of)
    found = quadratic_barrier(models, partial(gradient, of=of), layers=layers, **LENIENT)
    rows = {label: (a[1], b[1]) for label, (a, b) in found.layers.items()}
    about = "barriers as the slopes at both ends predict them, of one layer alone in A and in B, and of the line"
    return Measure(about, ("A", "B"), {**rows, "all layers": (found.barrier, found.barrier)})


def activations(models: Sequence[Model], of: Task) -> Measure:
    """How alike layers describe the inputs, and their units."""
    one, other = (tapped(m, of) for m in models)
    rows = {tap: alike(one[tap], other[tap]) for tap in one}
    about = "activations: CKA, and the mean correlation of units of the same number and of units matched one to one"
    return Measure(about, ("cka", "debiased", "rbf", "aligned", "matched"), rows)


def alike(x: np.ndarray, y: np.ndarray) -> tuple[float | None, ...]:
    """The numbers of one layer. Four samples are the least that debiased CKA can be made of."""
    found = activation_correlation(x, y)
    debiased = cka(x, y, debiased=True) if len(x) >= 4 else None
    return cka(x, y), debiased, cka(x, y, kernel="rbf"), found.aligned, found.matched


def aligned(models: Sequence[Model], of: Task) -> Measure:
    """The line from A to B with its units in the order of A's, by their weights."""
    heads = {"num_attention_heads": of.options.get("heads"), "num_key_value_heads": of.options.get("groups")}
    net = of.forward.__module__.rpartition(".")[2]
    spec = detect(models[0], {key: x for key, x in heads.items() if x is not None}, net)
    found = git_rebasin(models, spec)
    path = loss_barrier([models[0], found.models[1]], of.loss, **LENIENT)
    perms = found.permutations[1].values()
    moved = sum(int(np.count_nonzero(p != np.arange(p.shape[-1]))) for p in perms)
    about = f"the line to B with its units in A's order, by git_rebasin; {moved} of {sum(p.size for p in perms)} units move"
    return Measure(about, ("barrier", "at"), {"aligned": (path.barrier, path.at)}, path, "aligned")


def dropout(models: Sequence[Model], of: Task) -> Measure:
    """A path around the barrier, for networks that can do without half of their units."""
    order = [name for tensors in in_order(models[0], of).values() for name in tensors if len(models[0][name].shape) > 1]
    path = dropout_path(models, layers=order)
    found = loss_barrier(path.points, of.loss, points=CORNER, reference="max", **LENIENT)
    halved = [of.loss(path.points[place]) for place in path.dropped]
    half = len(halved) // 2
    rows: dict[str, tuple[float | None, ...]] = {}
    for which, losses in (("A", halved[:half]), ("B", halved[half:][::-1])):
        for i, loss in enumerate(losses):
            rows[f"{which}, halved in its last {f'{i + 1} hidden layers' if i else 'hidden layer'}"] = (loss,)
    rows["the highest on the path, above the worse of A and B"] = (found.barrier,)
    about = "the path through halves of both networks, which can be low where the line is not: losses"
    return Measure(about, ("loss",), rows, found, "through halves")


MEASURES: dict[str, Callable[[Sequence[Model], Task], Measure]] = {
    "layers": barriers,
    "shallow": partial(barriers, cumulative="shallow"),
    "deep": partial(barriers, cumulative="deep"),
    "activations": activations,
    "stragglers": stragglers,
    "sharpness": sharpness,
    "quadratic": quadratic,
    "aligned": aligned,
    "dropout": dropout,
}


# ---------------------------------------------------------------------------------------------------- running a network


def in_order(model: Model, of: Task) -> dict[str, list[str]]:
    """Module -> names of its tensors, in the order in which the network runs them; first those that it does not tap, such as
    embeddings."""
    taps: dict[str, Any] = {}
    next(of.run(model, taps))
    place = {tap.removesuffix(".weight"): i for i, tap in enumerate(taps) if tap in model}
    found = layers_of(model, None, "compare")
    return {label: found[label] for label in sorted(found, key=lambda label: place.get(label, -1))}


def tapped(model: Model, of: Task) -> dict[str, np.ndarray]:
    """Tap -> rows of activations of the inputs, ROWS at the most; without those of units in heads."""
    taps: dict[str, Any] = {}
    rows: dict[str, list[np.ndarray]] = {}
    batches = math.ceil(len(of.inputs) / of.batch)
    for _ in of.run(model, taps):
        for name, x in taps.items():
            if x.ndim == 2:
                few = min(len(x), max(1, ROWS // batches))
                rows.setdefault(name, []).append(np.asarray(x[np.arange(few) * len(x) // few], dtype=np.float64))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def gradient(model: Model, of: Task) -> dict[str, np.ndarray]:
    """Of the loss, by torch in float64; without tensors that the loss does not depend on."""
    try:
        import torch
    except ImportError:
        raise UsageError(
            "quadratic wants gradients of the loss, and those want torch: pip install 'refmerge[torch]'"
        ) from None
    params = {name: torch.from_numpy(np.array(host(model[name]))) for name in model}
    params = {name: x.double().requires_grad_() if x.is_floating_point() else x for name, x in params.items()}
    leaves = {name: x for name, x in params.items() if x.requires_grad}
    for x, y in of.batches():
        batch = torch.from_numpy(x.astype(np.float64) if x.dtype.kind == "f" else x)
        z = of.fitting(of.outputs(params, batch), y)
        losses = torch.nn.functional.cross_entropy(z, torch.from_numpy(y.astype(np.int64)), reduction="sum")
        (losses / of.samples).backward()
    return {name: x.grad.numpy() for name, x in leaves.items() if x.grad is not None}


def _or_infinity(x: float) -> float:
    return math.inf if math.isnan(x) else x
