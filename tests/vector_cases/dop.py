"""Vectors of dop."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64
from vector_cases.low_rank_residual import terms
from vector_cases.wudi import adam

TOOL = "fusion_bench:dop"
CODE = {TOOL: "tanganke/fusion_bench@54c9e8c fusion_bench/method/dop/dop_general.py:DOPMerging"}
TOOLS = ("fusion_bench",)
FLAGS = {"dop-fusion_bench-00": ["DopCrossing"]}
PAPER = {
    "dop-fusion_bench-00": Paper(
        {"energy": 0.97, "balance": "fixed", "steps": 50, "lr": 0.001},
        comment="seven of eight terms, which the tool takes for less than 0.99999, are the fewest that have 0.97",
    )
}
RUN = f"{CODE[TOOL]}._optimize_weight"
NAME = "fc.weight"
SMALL = 1e-7  # Adam's 1e-8 beside the gradient
RUNS = 1e-10  # float64 in another order

STAGED = (
    "dop-one-step", "dop-energy", "dop-weights", "dop-weights-one-sided", "dop-balance", "dop-energy-reached", "dop-end-new",
    "dop-end-old", "dop-end-new-zero", "dop-layers", "dop-first-is-base", "dop-energy-one", "dop-energy-zero",
    "dop-shared-side", "dop-shared-side-2", "dop-weight-of-the-base", "dop-convolution", "dop-vector",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """Of two models, without the subspaces, whose vectors have free signs."""
    shape = given.base.shape
    D, tau_2 = tau = [(x - given.base).reshape(len(x), -1) if len(shape) > 1 else x - given.base for x in given.models]
    X = (D + tau_2) / Fraction(2)
    found = {1: {"tau": tau}, 2: {"X": X}}
    if len(shape) > 1 and any(fnmatchcase(given.name, glob) for glob in given.params.get("layers", ["*"])):
        energy = Fraction(given.params.get("energy", 0.99999))
        X = adam(X, balanced(D, tau_2, energy, given.params), given.params.get("steps", 200), given.params.get("lr", 1e-4))
        found[3] = {"X": X, "D": X}
    return found | {4: {"result": given.base + X.reshape(shape)}}


def seen(M: Any, energy: Fraction) -> Callable[[Any], tuple[Fraction, Any]]:
    """X -> the loss and its gradient: of a term s u v^T, s u^T C and C v s are as long as term^T C and C term^T."""
    share, kept = Fraction(0), [0 * M]
    every = [(s, term) for s, term in terms(M) if s]
    for s, term in every:
        if len(kept) == 1 or share < energy * sum(s for s, _ in every):
            kept.append(term)
            share += s
    left, right = sum(x @ x.T for x in kept), sum(x.T @ x for x in kept)

    def loss(X: Any) -> tuple[Fraction, Any]:
        C = X - M
        half = left @ C + C @ right
        return np.sum(C * half), 2 * half

    return loss


def balanced(D: Any, tau: Any, energy: Fraction, params: dict[str, Any]) -> Callable[[Any], Any]:
    old, new = seen(D, energy), seen(tau, energy)
    w, beta = Fraction(params.get("alpha", 0.8)), Fraction(params.get("beta", 0.999))

    def gradient(X: Any) -> Any:
        nonlocal w
        (l_1, g_1), (l_2, g_2) = old(X), new(X)
        if params.get("balance", "mgda") == "mgda":
            a, b = (g / loss if loss else 0 * g for loss, g in ((l_1, g_1), (l_2, g_2)))
            aa, ab, bb = np.sum(a * a), np.sum(a * b), np.sum(b * b)
            if ab >= aa or ab >= bb:
                c = Fraction(999, 1000) if ab >= aa else Fraction(1, 1000)
            else:
                c = (bb - ab) / (aa - 2 * ab + bb)
            w = beta * w + (1 - beta) * c
        return w * g_1 + (1 - w) * g_2

    return gradient


def second_step(g_1: float, g_2: float, lr: float) -> float:
    """Adam's second step, after gradients g_1 and g_2."""
    m = (0.9 * 0.1 * g_1 + 0.1 * g_2) / (1 - 0.9**2)
    v = (0.999 * 0.001 * g_1**2 + 0.001 * g_2**2) / (1 - 0.999**2)
    return -lr * m / (math.sqrt(v) + 1e-8)


def hand() -> Hand:
    h = Hand("dop", CODE)

    def case(id: str, comment: str, models: Any, base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **{"dtype": "F64", "tolerance": SMALL} | more)

    def layer(x: Any) -> dict[str, Any]:
        return {NAME: x}

    zeros = [[0.0] * 3] * 2
    tau_1, tau_2 = [[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]
    one = {"steps": 1, "lr": 0.5}
    config = {"alpha": 0.8, "ema_beta": 0.999, "svd_epsilon": 0.99999}
    theirs = config | {"num_steps": 1, "lr": 0.5}
    half = [[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    case(
        "one-step",
        "4 at one corner, 2 at another; from their mean, 2 and 1, the first loss pulls at the first corner, the second at "
        "the other, and Adam's first step is 1/2 at both",
        [layer(tau_1), layer(tau_2)],
        layer(zeros),
        ("dop", one, layer([[2.5, 0.0, 0.0], [0.0, 0.0, 1.5]]), ""),
        (TOOL, theirs, layer(half), "of rank 1 the only term reaches the share, and is left out: nothing pulls"),
        flags="DopCrossing DopZeroLoss",
    )
    two = [[4.0, 0.0], [0.0, 1.0]]
    case(
        "energy",
        "diag(4, 1) and the base, energy 1/2, fixed weights: the first of two terms, 4 of 5, is enough; it sees the first "
        "row and the first column of what was lost, diag(2, 1/2)",
        [layer(two), layer([[0.0, 0.0], [0.0, 0.0]])],
        layer([[0.0, 0.0], [0.0, 0.0]]),
        ("dop", one | {"energy": 0.5, "balance": "fixed"}, layer([[2.5, 0.0], [0.0, 0.5]]), "one step at the first entry"),
        (
            TOOL,
            theirs | {"svd_epsilon": 0.5, "mgda": False},
            layer([[2.0, 0.0], [0.0, 0.5]]),
            "no term is before the one that reaches it",
        ),
        flags="DopCrossing",
    )
    case(
        "weights",
        "tau_1 = diag(4, 0) pulls the entry 2.5 up to 4, tau_2 = diag(1, 0) down to 1: forces 0.8 * 4 * 16 * 1.5 against "
        "0.2 * 4 * 1.5",
        [layer([[4.0, 0.0], [0.0, 0.0]]), layer([[1.0, 0.0], [0.0, 0.0]])],
        layer([[0.0, 0.0], [0.0, 0.0]]),
        ("dop", one | {"balance": "fixed"}, layer([[3.0, 0.0], [0.0, 0.0]]), "up"),
    )
    case(
        "weights-one-sided",
        "the same with all weight on the new model",
        [layer([[4.0, 0.0], [0.0, 0.0]]), layer([[1.0, 0.0], [0.0, 0.0]])],
        layer([[0.0, 0.0], [0.0, 0.0]]),
        ("dop", one | {"balance": "fixed", "alpha": 0.0}, layer([[2.0, 0.0], [0.0, 0.0]]), "down"),
    )
    case(
        "balance",
        "over the losses 2 * 16 * 2.25 and 2 * 2.25 the two gradients, -4 * 16 * 1.5 and 4 * 1.5, are -4/3 and 4/3; "
        "the shortest mixture has a half of each; without smoothing the weight becomes 1/2",
        [layer([[4.0, 0.0], [0.0, 0.0]]), layer([[1.0, 0.0], [0.0, 0.0]])],
        layer([[0.0, 0.0], [0.0, 0.0]]),
        ("dop", one | {"beta": 0.0, "alpha": 0.0}, layer([[3.0, 0.0], [0.0, 0.0]]), "up: 48 against 3"),
    )
    tiny = 2.0**-18
    three = [
        np.array([[4.0, 1.0, 0.0, -2.0], [1.0, 3.0, 2.0, 0.0], [5.0, 4.0, 2.0, -2.0 + tiny]]),
        np.array([[1.0, -2.0, 3.0, 0.0], [0.0, 2.0, 1.0, 1.0], [1.0, -4.0, 2.0, -1.0 + tiny]]),
        np.array([[0.0, 3.0, -1.0, 1.0], [2.0, 0.0, 1.0, -1.0], [2.0 + tiny, 3.0, 0.0, 0.0]]),
    ]
    start = np.array([[1.0, 0.0, -1.0, 2.0], [0.0, 1.0, 1.0, 0.0], [-2.0, 1.0, 0.0, 1.0]])
    case(
        "defaults",
        "two task vectors of rank 2, but for 2^-18 in a corner: two terms have 0.9999997 of their sum and are enough; the "
        "tool takes as many for svd_epsilon 0.9999999",
        [start + three[0], start + three[1]],
        start,
        (
            "dop",
            {},
            [
                [3.5195817217499847, -0.4805690459381791, 0.5203019711202729, 0.980443321548255],
                [0.5196626917765035, 3.5197264142275424, 2.518963418147866, 0.48039696942532484],
                [1.0196326356507925, 1.019500041862779, 2.019881919485754, -0.5196367159819208],
            ],
            "",
        ),
        tolerance=RUNS,
        ran=RUN,
    )
    many = {"alpha": 0.25, "steps": 20, "lr": 0.01, "energy": 0.9}
    case(
        "three-in-turn",
        "the same and a third, each of which, and the merged model's change, has 0.9 in two terms; the tool takes as many "
        "for svd_epsilon 0.9999999",
        [start + tau_t for tau_t in three],
        start,
        (
            "dop",
            many | {"beta": 0.5},
            [
                [2.5455294476799466, 1.5240726753766143, -0.48999240187388293, 1.7812781387793029],
                [1.1526900682366423, 2.1647711556453495, 2.4813602075595527, -0.4732779146805481],
                [0.7951896678923817, 2.7431688830993664, 1.2447241181202175, 0.00695644096647016],
            ],
            "",
        ),
        (
            "dop",
            many | {"balance": "fixed"},
            [
                [2.249781686147629, 1.3497652115723713, -0.8426201802870074, 2.101951868635924],
                [1.1616221023174957, 2.154062283664879, 2.35905931524158, -0.5421527712790419],
                [0.784606758736442, 2.5990850052037926, 0.9039329477203769, 0.3438775042460823],
            ],
            "with fixed weights",
        ),
        tolerance=RUNS,
        ran=RUN,
    )
    case(
        "energy-reached",
        "diag(2, 1, 1) and the base, energy 1/2: the first term has it, 2 of 4, and alone sees what was lost",
        [layer(np.diag([2.0, 1.0, 1.0])), layer(np.zeros((3, 3)))],
        layer(np.zeros((3, 3))),
        ("dop", one | {"energy": 0.5, "balance": "fixed"}, layer(np.diag([1.5, 0.5, 0.5])), "one step at the first entry"),
    )
    free = {"steps": 2, "lr": 6.0, "beta": 0.0}
    past = (
        "from 2.5 the weight 1/2 and a step of 6 lead to 8.5, past both; there the gradients over the losses, 2 / 4.5 from "
        "4 and 2 / 7.5 from 1, point one way, and the shorter one has the weight 0.999"
    )
    for id, first, second, w in (("end-new", 4.0, 1.0, 0.001), ("end-old", 1.0, 4.0, 0.999)):
        g_1 = 4 * (first**2 * (2.5 - first) + second**2 * (2.5 - second)) / 2
        g_2 = 4 * (w * first**2 * (8.5 - first) + (1 - w) * second**2 * (8.5 - second))
        case(
            id,
            past,
            [[[first]], [[second]]],
            [[0.0]],
            ("dop", free, [[8.5 + second_step(g_1, g_2, 6.0)]], f"gradients {g_1:g} and {g_2:g}"),
        )
    case(
        "end-old-zero",
        "the base loses nothing, and its gradient over that counts as 0: the shortest there is, of weight 0.999; the new "
        "model's, with the rest, pulls at the entry 2 of 4",
        [layer(zeros), layer(tau_1)],
        layer(zeros),
        ("dop", one | {"beta": 0.0}, layer([[2.5, 0.0, 0.0], [0.0, 0.0, 0.0]]), ""),
    )
    case(
        "end-new-zero",
        "the same with the base as the new model: 0.001 is left for the old one's",
        [layer(tau_1), layer(zeros)],
        layer(zeros),
        ("dop", one | {"beta": 0.0}, layer([[2.5, 0.0, 0.0], [0.0, 0.0, 0.0]]), ""),
    )
    case(
        "same-models",
        "two equal models lose nothing",
        [layer(tau_1), layer(tau_1)],
        layer(zeros),
        ("dop", {}, layer(tau_1), ""),
        (TOOL, config, layer(tau_1), "its code fails: no least norm is found among NaN"),
        flags="DopZeroLoss",
        tolerance=0.0,
    )
    case(
        "three-models",
        "no steps: each time the mean of two, so that the first two count a quarter",
        [layer([[4.0]]), layer([[8.0]]), layer([[16.0]])],
        layer([[0.0]]),
        ("dop", {"steps": 0}, layer([[11.0]]), "(4 + 8) / 4 + 16 / 2"),
        (TOOL, config | {"num_steps": 0}, layer([[11.0]]), ""),
        tolerance=0.0,
    )
    case(
        "other-tensors",
        "biases, an embedding and a tensor of the model itself, changed by 4 and 8",
        [
            {"fc.bias": [5.0], "emb.weight": [[5.0]], "token": [5.0]},
            {"fc.bias": [9.0], "emb.weight": [[9.0]], "token": [9.0]},
        ],
        {"fc.bias": [1.0], "emb.weight": [[1.0]], "token": [1.0]},
        ("dop", one, {"fc.bias": [7.0], "emb.weight": [[7.5]], "token": [7.0]}, "the matrix is a layer's"),
        (TOOL, theirs, {"fc.bias": [7.0], "emb.weight": [[7.0]], "token": [1.0]}, "the token stays the base's"),
        flags="DopOtherTensors",
    )
    case(
        "layers",
        "the same embedding, which is none of the layers",
        [{"emb.weight": [[5.0]]}, {"emb.weight": [[9.0]]}],
        {"emb.weight": [[1.0]]},
        ("dop", one | {"layers": ["fc.*"]}, {"emb.weight": [[7.0]]}, "the mean"),
        tolerance=0.0,
    )
    case(
        "first-is-base",
        "the base has no subspace: its loss is 0 everywhere, and the new model's pulls at the entry 2 of 4",
        [layer(zeros), layer(tau_1)],
        layer(zeros),
        ("dop", one, layer([[2.5, 0.0, 0.0], [0.0, 0.0, 0.0]]), ""),
    )
    case(
        "one-model",
        "one model comes back",
        [{"w": [[3.0, -1.0]], "b": [0.5]}],
        {"w": [[1.0, 1.0]], "b": [1.0]},
        ("dop", {}, {"w": [[3.0, -1.0]], "b": [0.5]}, ""),
        (TOOL, config, {"w": [[3.0, -1.0]], "b": [0.5]}, ""),
        tolerance=0.0,
    )
    case(
        "empty-and-integers",
        "no entries; a number; integers",
        [{"e": [], "s": 3.0, "ids": i64(3)}] * 2,
        {"e": [], "s": 1.0, "ids": i64(3)},
        ("dop", {}, {"e": [], "s": 3.0, "ids": i64(3)}, ""),
        tolerance=0.0,
    )
    h.case("nan", "NaN has no singular values", [[[math.nan, 1.0]]], [[0.0, 0.0]], ("dop", {}, REFUSED, ""))
    h.case("alpha", "a weight above 1", [[[1.0]]], [[0.0]], ("dop", {"alpha": 1.5}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[[1.0]]], None, ("dop", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [[0.0]], ("dop", {}, REFUSED, ""))
    h.case("infinite", "infinity has no singular values", [[[math.inf, 1.0]]], [[0.0, 0.0]], ("dop", {}, REFUSED, ""))
    h.case("energy-large", "more than all", [[[1.0]]], [[0.0]], ("dop", {"energy": 1.5}, REFUSED, ""))
    for id, energy, expect, why in (
        ("energy-one", 1.0, [[2.5, 0.0], [0.0, 1.0]], "both terms: a step at both entries"),
        ("energy-zero", 0.0, [[2.5, 0.0], [0.0, 0.5]], "one term: a step at the first entry"),
    ):
        case(
            id,
            "diag(4, 1) and the base, fixed weights, from diag(2, 1/2)",
            [two, [[0.0, 0.0], [0.0, 0.0]]],
            [[0.0, 0.0], [0.0, 0.0]],
            ("dop", one | {"energy": energy, "balance": "fixed"}, expect, why),
        )
    case(
        "shared-side",
        "3 e_1 e_2^T and 2 e_1 e_1^T, from (1, 1.5): the first loss has the gradient 2 9 (1, -1.5) from the left and "
        "2 9 (0, -1.5) from the right, (18, -54); the second 2 4 (-1, 1.5) and 2 4 (-1, 0), (-16, 12)",
        [[[0.0, 3.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("dop", one | {"balance": "fixed", "alpha": 0.5}, [[0.5, 2.0], [0.0, 0.0]], "half of each: (1, -21)"),
        ("dop", one | {"balance": "fixed", "alpha": 0.25}, [[1.5, 2.0], [0.0, 0.0]], "a quarter of the first: (-7.5, -4.5)"),
    )
    case(
        "weight-of-the-base",
        "the base, and 4, from 2: the base's gradient is 0, so that its weight goes half of the way to 0.999, to 0.8995 and "
        "0.94925; the new model's gradient is 64 times what is missing, 2 and after a step of 1/2 1.5",
        [[[0.0]], [[4.0]]],
        [[0.0]],
        (
            "dop",
            {"beta": 0.5, "steps": 2, "lr": 0.5},
            [[2.5 + second_step(-128 * 0.1005, -96 * 0.05075, 0.5)]],
            "gradients -128 0.1005 and -96 0.05075",
        ),
    )
    case(
        "convolution",
        "shape (2, 1, 3): the changes of one-step",
        [[[row] for row in tau_1], [[row] for row in tau_2]],
        [[row] for row in zeros],
        ("dop", one, [[[2.5, 0.0, 0.0]], [[0.0, 0.0, 1.5]]], ""),
    )
    case(
        "vector",
        "base 1, changes (4, -2) and (8, 0)",
        [[5.0, -1.0], [9.0, 1.0]],
        [1.0, 1.0],
        ("dop", one, [7.0, 0.0], "1 + (6, -1)"),
        tolerance=0.0,
    )
    return h
