"""Vectors of dop."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Hand, i64

TOOL = "fusion_bench:dop"
CODE = {TOOL: "tanganke/fusion_bench@54c9e8c fusion_bench/method/dop/dop_general.py:DOPMerging"}
TOOLS = ("fusion_bench",)
FLAGS = {"dop-fusion_bench-00": ["DopCrossing"]}
NAME = "fc.weight"
SMALL = 1e-7  # Adam's 1e-8 beside the gradient


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
    return h
