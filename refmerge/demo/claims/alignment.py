"""Claims about networks that were trained apart: reordered, repaired, transported, zipped, and compared."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.special import expit

from refmerge import merge
from refmerge.demo import alignment as measured
from refmerge.demo.claims.claim import Numbers
from refmerge.demo.claims.world import images, learn, network
from refmerge.demo.training import Weights, losses, softmax
from refmerge.nets import mlp
from refmerge.nets.layers import Reads
from refmerge.procedures.alignment.convergent_matching import convergent_matching
from refmerge.procedures.alignment.pleas import distances, pleas
from refmerge.procedures.alignment.repair import repair
from refmerge.procedures.alignment.soft_trees import outputs, shares, soft_trees
from refmerge.procedures.alignment.ws_mixup import ws_mixup
from refmerge.procedures.measures.cka import cka
from refmerge.procedures.measures.layerwise_barrier import layerwise_barrier
from refmerge.symmetry import architectures
from refmerge.symmetry.proof import changes

EPOCHS = 30


@cache
def pairs(seed: int) -> Numbers:
    """Two networks with two hidden layers of 64 units."""
    a, b = measured.pair(seed, (64, 64), epochs=EPOCHS)
    spec = architectures.mlp(a)
    by_weights, by_activations = (measured.aligned(a, b, by) for by in ("weights", "activations"))
    average = merge([a, b], "linear")
    repaired = repair(by_weights[1], by_weights[0], mlp.forward, [measured.digits().train_x]).model
    mixed = {align: ws_mixup(a, b, spec, alpha=0.5, align=align).model for align in ("weights", "none")}
    return {
        "barrier": measured.barrier([a, b]),
        "barrier, matched by weights": measured.barrier(by_weights[0]),
        "barrier, matched by activations": measured.barrier(by_activations[0]),
        "loss, matched": measured.loss(by_weights[1]), "loss, matched and repaired": measured.loss(repaired),
        "loss, average": measured.loss(average),
        "loss, mixed": measured.loss(mixed["none"]), "loss, mixed after matching": measured.loss(mixed["weights"]),
    }  # fmt: skip


@cache
def halves(seed: int) -> Numbers:
    """Two networks with one initialisation, trained on other halves of the images."""
    random, data = np.random.RandomState(seed), images().train
    start = network(random)
    a, b = (learn(start, data.of(slice(i, None, 2)), random, epochs=EPOCHS, rate=0.02) for i in range(2))
    layers = layerwise_barrier([a, b], measured.loss).layers.values()
    return {
        "barrier of the network": measured.barrier([a, b]),
        "largest barrier of a layer": max(max(layer.barriers) for layer in layers),
    }


@cache
def symmetric(seed: int) -> Numbers:
    """How much a permutation changes what a network answers, in units of the largest answer."""
    a, _ = measured.pair(seed, (64, 64), epochs=EPOCHS)
    x = measured.digits().test_x
    found = changes(architectures.mlp(a), a, lambda m: mlp.forward(m, x), np.random.default_rng(seed))
    return {"-log10 of the change": -float(np.log10(max(max(found.values()), 1e-17)))}


@cache
def widened(seed: int) -> Numbers:
    """Units that are not alike stay side by side: layers of 1, 1.5 and 2 times 64 units."""
    a, b = measured.pair(seed, (64, 64), epochs=EPOCHS)
    spec, x = architectures.mlp(a), measured.digits().train_x
    taps = [Reads(), Reads()]
    for model, tap in zip((a, b), taps):
        mlp.forward(model, x, tap)
    similarity = distances([taps], [f"layer{i}" for i in (1, 2)])
    made = {budget: pleas([a, b], spec, similarity, [[t.reads for t in taps]], budget=budget) for budget in (1.0, 1.5, 2.0)}
    numbers = {f"{budget:g} times as wide": measured.right(found.merged) for budget, found in made.items()}
    return numbers | {"not fitted": measured.right(made[1.0].start)}


@cache
def zipped(seed: int) -> Numbers:
    """Networks for other digits."""
    rows = measured.disjoint(seed, sizes=(64,), epochs=EPOCHS)
    keys = ("average", "permuted by activations", "zipped", "zipped, alpha 1, beta 1")
    return {key: float(rows[f"64: {key}"][measured.JOINT]) for key in keys}


@cache
def transported(seed: int) -> Numbers:
    """A network of 128 units a layer fused into one of 64."""
    rows = measured.transport(seed, epochs=EPOCHS)
    name = "128 into 64: "
    return {
        "averaged": rows[f"{name}the first 64 units, averaged"]["right"],
        "fused": rows[f"{name}otfusion by activations"]["right"],
        "fused, trained on": rows[f"{name}otfusion by activations"]["after 5 epochs"],
        "parent, trained on": rows[f"{name}model 1"]["after 5 epochs"],
    }


@cache
def of_depths(seed: int) -> Numbers:
    """A network of four hidden layers fused into one of two."""
    rows = measured.depths(seed, epochs=EPOCHS)
    return {
        "averaged": rows["layers merged, averaged"]["right"],
        "fused": rows["layers merged, fused by activations"]["right"],
        "fused, trained on": rows["layers merged, fused by activations"]["after 5 epochs"],
        "parent, trained on": rows["model 1"]["after 5 epochs"],
    }


@cache
def alike(seed: int) -> Numbers:
    """Features of two networks of four hidden layers on the test images, of the second before it was trained too."""
    a, b = measured.pair(seed, (64,) * 4, epochs=EPOCHS)
    fresh = measured.network(2 * seed + 1, (64,) * 4, epochs=0)
    features = []
    for model in (a, b, fresh):
        taps: dict[str, np.ndarray] = {}
        mlp.forward(model, measured.digits().test_x, taps)
        features.append([taps[f"layer{i}"] for i in range(1, 5)])
    table = np.array([[cka(x, y) for y in features[1]] for x in features[0]])
    found = np.concatenate([table.argmax(axis=1), table.argmax(axis=0)]) == np.tile(np.arange(4), 2)
    matched = [convergent_matching(features[0][1], other[1]) for other in features[1:]]
    units = features[0][1].shape[1]
    return {
        "layers found": 100 * float(found.mean()), "by chance": 25.0,
        "correlation of matched units": matched[0].value / units,
        "with a network that was not trained": matched[1].value / units,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- trees

TREES = 16


def forest(seed: int, epochs: int = 40, rate: float = 0.5) -> Weights:
    """Soft trees of three splits and four leaves, by gradient descent on the cross-entropy."""
    random, data = np.random.RandomState(seed), images().train
    e = {
        "w": random.normal(0, 0.5, (TREES, 3, 64)), "b": np.zeros((TREES, 3)), "pi": random.normal(0, 0.5, (TREES, 4, 10)),
    }  # fmt: skip
    for _ in range(epochs):
        order = random.permutation(len(data))
        for chosen in np.split(order, range(32, len(order), 32)):
            x, y = data.x[chosen], data.y[chosen]
            s = expit(np.einsum("mnf,xf->mxn", e["w"], x) + e["b"][:, None])
            leaves = shares(s, "non_oblivious")
            error = (softmax(np.einsum("mxl,mlc->xc", leaves, e["pi"])) - np.eye(10)[y]) / len(y)
            back = np.einsum("xc,mlc->mxl", error, e["pi"])
            root, left, right = s[..., 0], s[..., 1], s[..., 2]
            by_split = np.stack(
                [
                    back[..., 0] * left + back[..., 1] * (1 - left) - back[..., 2] * right - back[..., 3] * (1 - right),
                    root * (back[..., 0] - back[..., 1]),
                    (1 - root) * (back[..., 2] - back[..., 3]),
                ],
                axis=-1,
            )
            z = by_split * s * (1 - s)
            found = {
                "w": np.einsum("mxn,xf->mnf", z, x), "b": z.sum(axis=1), "pi": np.einsum("mxl,xc->mlc", leaves, error),
            }  # fmt: skip
            e = {name: value - rate * found[name] for name, value in e.items()}
    return e


@cache
def forests(seed: int) -> Numbers:
    a, b = (forest(2 * seed + i) for i in range(2))
    data, test = images().train, images().test

    def answers(e: Weights) -> np.ndarray:
        return outputs(e, test.x, tree="non_oblivious").sum(axis=0)

    def excess(e: Weights) -> float:
        return float(losses(answers(e), test.y).mean() - np.mean([losses(answers(p), test.y).mean() for p in (a, b)]))

    whole = soft_trees(a, b, tree="non_oblivious", inputs=data.x)
    trees_only = soft_trees(a, b, tree="non_oblivious", inputs=data.x, flip=False, order=False)
    return {
        "parents right": 100 * float(np.mean([np.mean(answers(e).argmax(axis=1) == test.y) for e in (a, b)])),
        "barrier": excess({name: (a[name] + b[name]) / 2 for name in a}),
        "barrier, trees matched": excess(trees_only.merged),
        "barrier, trees matched and flipped": excess(whole.merged),
    }
