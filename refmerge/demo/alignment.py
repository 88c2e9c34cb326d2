"""What alignment is worth on small networks that learned to read digits, measured over five pairs of them.

    python -m refmerge.demo.alignment               # all tables, in a few minutes
    python -m refmerge.demo.alignment widths zip    # only these
    python -m refmerge.demo.alignment --plot FILE   # and the barriers over the width as SVG

Pair k has the seeds 2 k and 2 k + 1; settings were tried on the seeds 1000 and 1001. spec/alignment.md keeps the tables.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from refmerge import __version__, merge
from refmerge.demo.training import Weights, gradient, initial, losses, train
from refmerge.nets import mlp
from refmerge.plots import draw_series
from refmerge.procedures.alignment.canonicalize import canonicalize
from refmerge.procedures.alignment.clafusion import clafusion
from refmerge.procedures.alignment.git_rebasin import git_rebasin
from refmerge.procedures.alignment.otfusion import otfusion
from refmerge.procedures.alignment.repair import repair, statistics_of
from refmerge.procedures.alignment.ws_mixup import ws_mixup
from refmerge.procedures.alignment.zipit import covariances, zipit
from refmerge.procedures.measures.loss_barrier import loss_barrier
from refmerge.symmetry import architectures

__all__ = ["CLAIMS", "TABLES", "Digits", "barriers_plot", "main", "markdown", "run", "verdicts"]

PAIRS = 5
WIDTHS = (8, 16, 32, 64, 128, 256, 512)
DECAY = 0.001
JOINT = "right of ten"

Numbers = dict[str, float]
Rows = dict[str, Numbers]
Table = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Digits:
    """Images as rows of 64 numbers in [0, 1], and labels: to train on, and held out."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@cache
def digits() -> Digits:
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        x, y = ([file[f"{part}_{what}"] for part in ("train", "test")] for what in ("images", "labels"))
    (a, b), (c, d) = ([image.reshape(len(image), -1) / 16 for image in x], [label.astype(int) for label in y])
    return Digits(a, c, b, d)


@cache
def network(
    seed: int, hidden: tuple[int, ...], epochs: int = 60, decay: float = DECAY, classes: range = range(10)
) -> Weights:
    """A perceptron with hidden layers layer1, layer2, ... of these widths, trained on the images of some classes."""
    data, random = digits(), np.random.RandomState(seed)
    chosen = np.isin(data.train_y, classes)
    sizes = (data.train_x.shape[1], *hidden, len(classes))
    names = [*(f"layer{i + 1}" for i in range(len(hidden))), "head"]
    start = initial(random, dict(zip(names, pairwise(sizes))))
    images, labels = data.train_x[chosen] * 16, data.train_y[chosen] - classes[0]
    return train(start, images, labels, epochs=epochs, random=random, decay=decay)


def pair(k: int, hidden: tuple[int, ...], **how: Any) -> tuple[Weights, Weights]:
    """The k-th pair of networks: two initialisations, two orders of the images."""
    return network(2 * k, hidden, **how), network(2 * k + 1, hidden, **how)


def loss(model: Mapping[str, Any]) -> float:
    """The cross-entropy on held-out images."""
    return float(losses(mlp.forward(model, digits().test_x), digits().test_y).mean())


def right(model: Mapping[str, Any]) -> float:
    """Held-out images whose digit is found, in per cent."""
    return 100 * float(np.mean(mlp.forward(model, digits().test_x).argmax(axis=1) == digits().test_y))


def barrier(models: Sequence[Mapping[str, Any]]) -> float:
    return float(loss_barrier(models, loss, points=11).barrier)


def activations(model: Mapping[str, Any], *, before: bool = False) -> dict[str, np.ndarray]:
    """Of each hidden layer, on the training images, behind the ReLU or before."""
    taps: dict[str, np.ndarray] = {}
    mlp.forward(model, digits().train_x, taps)
    return {name: taps[f"{name}.weight" if before else name] for name in mlp.order(model)[:-1]}


def aligned(a: Weights, b: Weights, by: str) -> tuple[Sequence[Weights], Weights]:
    """(a and b with its units moved, their average): by nothing, by weights, or by the correlation of activations."""
    if by == "nothing":
        return (a, b), merge([a, b], "linear")
    given = {"activations": [activations(a), activations(b)], "criterion": "correlation"} if by == "activations" else {}
    found = git_rebasin([a, b], architectures.mlp(a), by=by, **given)
    return found.models, found.merged


# ----------------------------------------------------------------------------------------------------- one pair of a table


def widths(k: int, sizes: Sequence[int] = WIDTHS, **how: Any) -> Rows:
    """The barrier on the straight line, before and after alignment."""
    rows = {}
    for n in sizes:
        a, b = pair(k, (n, n), **how)
        rows[str(n)] = {"parents' loss": (loss(a) + loss(b)) / 2, "parents right": (right(a) + right(b)) / 2}
        for by, word in (("nothing", "before"), ("weights", "by weights"), ("activations", "by activations")):
            models, merged = aligned(a, b, by)
            rows[str(n)] |= {f"barrier {word}": barrier(models), f"right {word}": right(merged)}
    return rows


def disjoint(k: int, sizes: Sequence[int] = (32, 128), **how: Any) -> Rows:
    """Digits 0 to 4 and 5 to 9, a network each: right among all ten digits, and among the five of a network."""
    rows: Rows = {}
    for n in sizes:
        models = (
            network(2 * k, (n, n), classes=range(5), **how),
            network(2 * k + 1, (n, n), classes=range(5, 10), **how),
        )
        spec, features = architectures.mlp(models[0]), [activations(m) for m in models]
        C = covariances([features], spec.permutations)
        P, _ = aligned(*models, "weights")
        rows |= {
            f"{n}: both networks, apart": of_heads(models),
            f"{n}: average": of_zip(zipit(models, spec, C, match="identity", multihead=True)),
            f"{n}: permuted by weights": of_zip(zipit(P, spec, C, match="identity", multihead=True)),
            f"{n}: permuted by activations": of_zip(zipit(models, spec, C, match="permute", multihead=True)),
            f"{n}: zipped": of_zip(zipit(models, spec, C, multihead=True)),
            f"{n}: zipped, alpha 1, beta 1": of_zip(zipit(models, spec, C, alpha=1, beta=1, multihead=True)),
        }
        first = {"layer1": C["layer1"]}
        rows |= {
            f"{n}: layer1 permuted by activations": of_zip(zipit(models, spec, first, match="permute", multihead=True)),
            f"{n}: layer1 zipped": of_zip(zipit(models, spec, first, multihead=True)),
        }
    return rows


def of_zip(found: Any) -> Numbers:
    return of_heads([found.merged | head for head in found.heads])


def of_heads(models: Sequence[Mapping[str, Any]]) -> Numbers:
    """Joint: the larger of all ten outputs. By task: each network on its five digits."""
    x, y = digits().test_x, digits().test_y
    logits = np.concatenate([mlp.forward(m, x) for m in models], axis=1)
    low = y < 5
    tasks = [logits[low, :5].argmax(axis=1) == y[low], logits[~low, 5:].argmax(axis=1) == y[~low] - 5]
    return {
        JOINT: 100 * np.mean(logits.argmax(axis=1) == y),
        "right of five": 100 * np.mean([np.mean(t) for t in tasks]),
    }


def transport(k: int, sizes: tuple[int, int] = (128, 64), **how: Any) -> Rows:
    """A wide network fused into a narrow one, and the other way round."""
    rows: Rows = {}
    for one, other in (sizes, sizes[::-1]):
        a, b = network(2 * k, (one, one), **how), network(2 * k + 1, (other, other), **how)
        given = {
            f"the first {min(sizes)} units, averaged": cut(a, b),
            "otfusion by weights": otfusion([b, a]).merged,
            "otfusion by activations": otfusion([b, a], activations=[activations(b), activations(a)]).merged,
        }
        rows |= compared(f"{one} into {other}: ", given, a, b, k)
    return rows


def cut(a: Weights, b: Weights) -> Weights:
    """The average with no matching: units that b has no place for are left out, places that a has no unit for are b's."""
    result = {name: x.copy() for name, x in b.items()}
    for name, x in result.items():
        common = tuple(slice(min(sizes)) for sizes in zip(x.shape, a[name].shape))
        x[common] = (x[common] + a[name][common]) / 2
    return result


def depths(k: int, deep: int = 4, shallow: int = 2, n: int = 64, **how: Any) -> Rows:
    """A deep network and a shallow one."""
    a, b = network(2 * k, (n,) * deep, **how), network(2 * k + 1, (n,) * shallow, **how)
    before = partial(activations, before=True)
    added, folded = clafusion(a, b), clafusion(a, b, balance="merge", activations=before)
    given = {
        "layers added, averaged": merge([added.deep, added.shallow], "linear"),
        "layers added, fused by weights": added.merged,
        "layers added, fused by activations": clafusion(a, b, match="activations", activations=before).merged,
        "layers merged, averaged": merge([folded.deep, folded.shallow], "linear"),
        "layers merged, fused by weights": folded.merged,
        "layers merged, fused by activations": clafusion(
            a, b, balance="merge", match="activations", activations=before
        ).merged,
    }
    return compared("", given, a, b, k)


def compared(title: str, given: Mapping[str, Weights], a: Weights, b: Weights, k: int) -> Rows:
    """The parents, what was made of them, and a new network of its shape; each also after five more epochs."""
    last = list(given.values())[-1]
    shapes = {name: last[f"{name}.weight"].shape[::-1] for name in mlp.order(last)}
    rows = {"model 0": a, "model 1": b, **given, "a new network": initial(np.random.RandomState(2 * k), shapes)}
    return {title + name: {"right": right(m), "after 5 epochs": right(more(m, k))} for name, m in rows.items()}


def more(model: Weights, k: int, epochs: int = 5) -> Weights:
    """Trained on for a while."""
    return train(model, digits().train_x * 16, digits().train_y, epochs=epochs, random=np.random.RandomState(k), decay=DECAY)


def repairs(k: int, depths: Sequence[int] = (1, 2, 4, 6), n: int = 64, **how: Any) -> Rows:
    """The loss of the average above that of the parents, and the standard deviations of the last hidden layer's units over
    the parents', without REPAIR and with it."""
    rows = {}
    for depth in depths:
        a, b = pair(k, (n,) * depth, **how)
        for by in ("nothing", "weights", "activations"):
            models, merged = aligned(a, b, by)
            restored = repair(merged, models, mlp.forward, [digits().train_x]).model
            for title, model in (("", merged), (", repaired", restored)):
                rows[f"{depth} hidden, {by}{title}"] = {
                    "excess": loss(model) - (loss(a) + loss(b)) / 2,
                    "deviation": deviation(model, models),
                    "right": right(model),
                }
    return rows


def deviation(model: Mapping[str, Any], parents: Sequence[Mapping[str, Any]]) -> float:
    """Of the last hidden layer's units before the ReLU, the sum of standard deviations over the mean of the parents'."""
    tap = f"{mlp.order(model)[-2]}.weight"
    sums = [np.sqrt(statistics_of(m, mlp.forward, [digits().train_x], [tap])[tap].var).sum() for m in (model, *parents)]
    return float(sums[0] / np.mean(sums[1:]))


def ways(k: int, n: int = 64, **how: Any) -> Rows:
    """Other ways to the same end, of two hidden layers."""
    a, b = pair(k, (n, n), **how)
    spec = architectures.mlp(a)
    acts = [activations(a), activations(b)]
    sorted_alike = [canonicalize(m, spec).model for m in (a, b)]
    found: dict[str, Callable[[], Sequence[Mapping[str, Any]]]] = {
        "nothing": lambda: (a, b),
        "canonicalize": lambda: sorted_alike,
        "git_rebasin, weights": lambda: git_rebasin([a, b], spec).models,
        "git_rebasin, activations": lambda: git_rebasin([a, b], spec, by="activations", activations=acts).models,
        "git_rebasin, correlation": lambda: aligned(a, b, "activations")[0],
        "git_rebasin, straight_through": lambda: (
            git_rebasin([a, b], spec, by="straight_through", gradient=slope, learning_rate=0.1).models
        ),
        "git_rebasin, many": lambda: git_rebasin([a, b], spec, by="many").models,
        "ws_mixup": lambda: (a, spec.apply(ws_mixup(a, b, spec).permutations, b)),
        "otfusion, weights": lambda: otfusion([a, b]).models,
        "otfusion, activations": lambda: otfusion([a, b], activations=acts).models,
    }
    rows = {}
    for name, models in found.items():
        start = time.process_time()
        ends = models()
        seconds = time.process_time() - start
        rows[name] = {"barrier": barrier(ends), "right": right(merge(list(ends), "linear")), "seconds": seconds}
    return rows


def slope(weights: Mapping[str, np.ndarray], step: int) -> tuple[float, Weights]:
    """The loss and its gradient on 256 training images, others in each step."""
    data = digits()
    batch = np.random.RandomState(step).permutation(len(data.train_x))[:256]
    x, y = data.train_x[batch], data.train_y[batch]
    return float(losses(mlp.forward(weights, x), y).mean()), gradient(dict(weights), x, np.eye(10)[y])


# ---------------------------------------------------------------------------------------------------------------- all pairs

TABLES: dict[str, tuple[str, Callable[..., Rows]]] = {
    "widths": ("Width of two hidden layers", widths),
    "lazy": ("The same without weight decay", partial(widths, decay=0.0)),
    "repair": ("REPAIR, layers of 64 units", repairs),
    "zip": ("Disjoint classes, two hidden layers", disjoint),
    "transport": ("Different widths, two hidden layers", transport),
    "depths": ("Different depths, four hidden layers and two of 64 units", depths),
    "ways": ("Other ways, two hidden layers of 64 units", ways),
}


# What the papers say: a table, (row, column) of what is better, and of what it is better than
CLAIMS: dict[str, tuple[str, tuple[str, str], tuple[str, str]]] = {
    "matching weights lowers the barrier, width 8": ("widths", ("8", "barrier by weights"), ("8", "barrier before")),
    "matching weights lowers the barrier, width 512": ("widths", ("512", "barrier by weights"), ("512", "barrier before")),
    "the barrier that is left is lower at width 64 than at 8": (
        "widths",
        ("64", "barrier by weights"),
        ("8", "barrier by weights"),
    ),
    "the barrier that is left is lower at width 512 than at 64": (
        "widths",
        ("512", "barrier by weights"),
        ("64", "barrier by weights"),
    ),
    "the same without weight decay": ("lazy", ("512", "barrier by weights"), ("64", "barrier by weights")),
    "the same by activations, without weight decay": (
        "lazy",
        ("512", "barrier by activations"),
        ("64", "barrier by activations"),
    ),
    "REPAIR lowers the loss, 1 hidden layer": (
        "repair",
        ("1 hidden, weights, repaired", "excess"),
        ("1 hidden, weights", "excess"),
    ),
    "REPAIR lowers the loss, 2 hidden layers": (
        "repair",
        ("2 hidden, weights, repaired", "excess"),
        ("2 hidden, weights", "excess"),
    ),
    "REPAIR lowers the loss, 6 hidden layers": (
        "repair",
        ("6 hidden, weights, repaired", "excess"),
        ("6 hidden, weights", "excess"),
    ),
    "matching weights does more than REPAIR alone, 2 hidden layers": (
        "repair",
        ("2 hidden, weights", "excess"),
        ("2 hidden, nothing, repaired", "excess"),
    ),
    "zipping beats permuting, width 32": ("zip", ("32: zipped", JOINT), ("32: permuted by activations", JOINT)),
    "zipping beats permuting, width 128": ("zip", ("128: zipped", JOINT), ("128: permuted by activations", JOINT)),
    "zipping without a budget beats permuting, width 32": (
        "zip",
        ("32: zipped, alpha 1, beta 1", JOINT),
        ("32: permuted by activations", JOINT),
    ),
    "zipping without a budget beats permuting, width 128": (
        "zip",
        ("128: zipped, alpha 1, beta 1", JOINT),
        ("128: permuted by activations", JOINT),
    ),
    "zipping only layer1 beats permuting only layer1, width 128": (
        "zip",
        ("128: layer1 zipped", JOINT),
        ("128: layer1 permuted by activations", JOINT),
    ),
    "otfusion by activations beats averaging what fits, 128 into 64": (
        "transport",
        ("128 into 64: otfusion by activations", "right"),
        ("128 into 64: the first 64 units, averaged", "right"),
    ),
    "fused and trained on, better than model 1 trained on, 128 into 64": (
        "transport",
        ("128 into 64: otfusion by activations", "after 5 epochs"),
        ("128 into 64: model 1", "after 5 epochs"),
    ),
    "clafusion by activations beats averaging, layers added": (
        "depths",
        ("layers added, fused by activations", "right"),
        ("layers added, averaged", "right"),
    ),
    "clafusion by activations beats averaging, layers merged": (
        "depths",
        ("layers merged, fused by activations", "right"),
        ("layers merged, averaged", "right"),
    ),
    "fused and trained on, better than model 1 trained on, layers merged": (
        "depths",
        ("layers merged, fused by activations", "after 5 epochs"),
        ("model 1", "after 5 epochs"),
    ),
    "straight_through beats matching weights": (
        "ways",
        ("git_rebasin, straight_through", "barrier"),
        ("git_rebasin, weights", "barrier"),
    ),
}


def run(name: str, pairs: Iterable[int] = range(PAIRS), each: Callable[..., Iterable[Rows]] = map) -> Table:
    """The rows of a table; each number is those of all pairs, an array. each: map, or that of a pool."""
    found = list(each(TABLES[name][1], pairs))
    return {row: {key: np.array([f[row][key] for f in found]) for key in found[0][row]} for row in found[0]}


def markdown(rows: Table) -> str:
    """A table of means and, behind them, standard deviations over the pairs."""
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row, numbers in rows.items():
        lines.append(f"| {row} | " + " | ".join(spread(numbers[key], key) for key in columns) + " |")
    return "\n".join(lines)


def spread(x: np.ndarray, key: str) -> str:
    places = 1 if "right" in key or "epochs" in key else 2
    deviation = x.std(ddof=1) if len(x) > 1 else 0.0
    return f"{x.mean():.{places}f} ± {deviation:.{places}f}"


def verdicts(tables: Mapping[str, Table]) -> str:
    """What becomes of each claim: by how much better, and in how many pairs."""
    lines = ["| claim | better by | in pairs |", "|---|---:|---:|"]
    for claim, (table, better, worse) in CLAIMS.items():
        if table in tables:
            x, y = (tables[table][row][column] for row, column in (better, worse))
            gain = y - x if better[1].startswith(("barrier", "excess")) else x - y
            lines.append(f"| {claim} | {spread(gain, better[1])} | {np.count_nonzero(gain > 0)} of {len(gain)} |")
    return "\n".join(lines)


def barriers_plot(decayed: Table, lazy: Table) -> str:
    """SVG of the tables "widths" and "lazy": the barriers over the width."""
    keys = ("before", "by weights", "by activations")
    series = {key: {float(n): row[f"barrier {key}"] for n, row in decayed.items()} for key in keys}
    series["by weights, no weight decay"] = {float(n): row["barrier by weights"] for n, row in lazy.items()}
    return draw_series(series, "Loss barrier of pairs trained apart, over their width", "barrier", "width")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m refmerge.demo.alignment", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all of them if none is named")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the barriers over the width, as SVG")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.tables if name not in TABLES]:
        parser.error(f"there is no table {unknown[0]!r}, there are {', '.join(TABLES)}")
    names = options.tables or list(TABLES)
    if options.plot and not {"widths", "lazy"} <= {*names}:
        parser.error("the plot is of the tables widths and lazy")

    versions = f"refmerge {__version__}, NumPy {np.__version__}, SciPy {version('scipy')}"
    print(f"{versions}; mean ± standard deviation over {PAIRS} pairs", flush=True)
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[threads] = "1"  # of each process
    tables = {}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for name in names:
            start = time.perf_counter()
            tables[name] = run(name, each=pool.map)
            print(f"\n{TABLES[name][0]} ({time.perf_counter() - start:.0f} seconds)\n\n{markdown(tables[name])}", flush=True)
    print(f"\nClaims\n\n{verdicts(tables)}")
    if options.plot:
        options.plot.write_text(barriers_plot(tables["widths"], tables["lazy"]), encoding="utf-8")


if __name__ == "__main__":
    main()
