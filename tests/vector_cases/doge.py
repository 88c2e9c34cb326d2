"""Vectors of doge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Hand, Paper, i64

TOOL = "fusion_bench:doge"
CODE = {TOOL: "tanganke/fusion_bench@54c9e8c fusion_bench/method/doge_ta/doge_ta.py:DOGE_TA_Algorithm"}
TOOLS = ("fusion_bench",)
FLAGS = {"doge-fusion_bench-00": ["DogeOneMore", "DogeNames"]}
PAPER = {
    "doge-fusion_bench-00": Paper(
        {"density": 0.305},
        names=("encoder.layers.0.attn.weight", "encoder.layers.0.mlp.weight"),
        without_stats=True,
        comment="the two matrices that the tool merges; its 30 per cent of 200 entries are 61",
    )
}
NAME = "encoder.weight"
SMALL = 1e-7  # Adam's 1e-8 beside the gradient


def hand() -> Hand:
    h = Hand("doge", CODE)

    def case(id: str, comment: str, models: Any, base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **{"dtype": "F64", "tolerance": SMALL} | more)

    def layer(x: Any) -> dict[str, Any]:
        return {NAME: x}

    zeros = [[0.0] * 3] * 2
    tau_1, tau_2 = [[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [6.0, 8.0, 0.0]]
    two = "tau_1 = (3, 0, 4; 0, 0, 0) of length 5, tau_2 = (0, 0, 0; 6, 8, 0) of length 10; they count 1/5 and 1/10"
    half = {"subspace": 2, "lambda_": 1.0, "steps": 1, "lr": 0.5, "density": 0.5}
    case(
        "one-step",
        f"{two}; the larger one's direction, the second row, is left alone; in the first row the gradient is -12 (3, 0, 4), "
        "and Adam's first step (1/2, 0, 1/2)",
        [tau_1, tau_2],
        zeros,
        (
            "doge",
            half,
            [[0.75, 0.0, 0.9], [0.6, 0.8, 0.0]],
            "of each its two entries and the first of its zeros: (3 + 1/2) / 5 + (0 + 1/2) / 10; (4 + 1/2) / 5; 6/10, 8/10",
        ),
    )
    plain = {"subspace": 6, "lambda_": 1.0, "steps": 0, "lr": 0.5}
    theirs = {"subspace": 6, "lamda": 1.0, "steps_per_layer": 0, "adam_lr": 0.5}
    case(
        "one-more",
        "one model (3, 4, 0, 0; 0, 0, 12, 0) of length 13; a quarter of 8 entries; no steps",
        [layer([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 12.0, 0.0]])],
        layer([[0.0] * 4] * 2),
        ("doge", plain | {"density": 0.25}, layer([[0.0, 4 / 13, 0.0, 0.0], [0.0, 0.0, 12 / 13, 0.0]]), "two entries"),
        (
            TOOL,
            theirs | {"K": 25.0},
            layer([[3 / 13, 4 / 13, 0.0, 0.0], [0.0, 0.0, 12 / 13, 0.0]]),
            "all from the 6th smallest magnitude of 8 on: three entries",
        ),
        flags="DogeOneMore",
    )
    case(
        "all",
        "all entries: (3, 4) / 5; no steps",
        [layer([[3.0, 4.0]])],
        layer([[0.0, 0.0]]),
        ("doge", plain | {"density": 1.0}, layer([[0.6, 0.8]]), ""),
        (TOOL, theirs | {"K": 100.0}, REFUSED, "a 0-th smallest magnitude"),
        flags="DogeOneMore",
    )
    case(
        "zero-task-vector",
        "the second model is the base; no steps",
        [layer([[3.0, 4.0]]), layer([[0.0, 0.0]])],
        layer([[0.0, 0.0]]),
        ("doge", plain | {"density": 1.0}, layer([[0.6, 0.8]]), "it counts nothing"),
        (TOOL, theirs | {"K": 60.0}, layer([[math.nan, math.nan]]), "1 / 0 times 0"),
        flags="DogeZeroTaskVector",
    )
    case(
        "names",
        "a matrix of an encoder, another one, and a vector: (3, 4) each; no steps",
        [{"encoder.weight": [[3.0, 4.0]], "text.weight": [[3.0, 4.0]], "encoder.bias": [3.0, 4.0]}],
        {"encoder.weight": [[0.0, 0.0]], "text.weight": [[0.0, 0.0]], "encoder.bias": [0.0, 0.0]},
        (
            "doge",
            plain | {"density": 1.0},
            {"encoder.weight": [[0.6, 0.8]], "text.weight": [[0.6, 0.8]], "encoder.bias": [0.0, 0.0]},
            "matrices",
        ),
        (
            TOOL,
            theirs | {"K": 60.0},
            {"encoder.weight": [[0.6, 0.8]], "text.weight": [[0.0, 0.0]], "encoder.bias": [0.0, 0.0]},
            "by name",
        ),
        flags="DogeNames",
    )
    case(
        "over-the-model",
        "two matrices, (3, 4) and (6, 8): half of four entries are 8 and 6; no steps",
        [{"a": [[3.0, 4.0]], "b": [[6.0, 8.0]]}],
        {"a": [[0.0, 0.0]], "b": [[0.0, 0.0]]},
        (
            "doge",
            plain | {"density": 0.5},
            {"a": [[0.0, 0.0]], "b": [[0.6, 0.8]]},
            "lengths are the layers' own: 6/10, 8/10",
        ),
    )
    case(
        "vectors-do-not-count",
        "a quarter of the four entries of the matrix; the vector's are larger, and are none of them; no steps",
        [{"a": [[3.0, 4.0], [0.0, 0.0]], "b": [9.0] * 4}],
        {"a": [[0.0, 0.0], [0.0, 0.0]], "b": [0.0] * 4},
        ("doge", plain | {"density": 0.25}, {"a": [[0.0, 0.8], [0.0, 0.0]], "b": [0.0] * 4}, ""),
    )
    alike = [[3.0, 0.0], [0.0, 8.0]]
    case(
        "one-model",
        "one model diag(3, 8) of length sqrt(73): its two left vectors are shared alike, one is left alone; the rows "
        "have the gradients c (c - 1) 9 3 and c (c - 1) 64 8, both below 0; one step of 1/2",
        [layer(alike)],
        layer([[0.0, 0.0], [0.0, 0.0]]),
        (
            "doge",
            {"subspace": 2, "lambda_": 1.0, "steps": 1, "lr": 0.5, "density": 1.0},
            layer([[3.5 / math.sqrt(73), 0.0], [0.0, 8 / math.sqrt(73)]]),
            "that of 8, the larger",
        ),
        (TOOL, {"subspace": 2, "lamda": 1.0, "steps_per_layer": 1, "adam_lr": 0.5, "K": 60.0}, OPEN, "LAPACK chooses"),
        flags="DogeSharedAlike",
    )
    case(
        "unprojected",
        "one row has no int(1/6) directions: the gradient is c (c - 1) 25 (3, 4) 2 < 0; one step of 1/2",
        [layer([[3.0, 4.0]])],
        layer([[0.0, 0.0]]),
        ("doge", plain | {"density": 1.0, "steps": 1}, layer([[0.7, 0.9]]), "(3.5, 4.5) / 5"),
    )
    case(
        "default-subspace",
        "diag(2, 1, 1, 1, 1, 1) of length 3: of six directions, all shared alike, the largest is left alone; the "
        "others' entries "
        "make one step of 1/2",
        [np.diag([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])],
        np.zeros((6, 6)),
        (
            "doge",
            {"density": 1.0, "lambda_": 1.0, "steps": 1, "lr": 0.5},
            (np.diag([2.0, 1.5, 1.5, 1.5, 1.5, 1.5]) / 3).tolist(),
            "2 / 3 and 1.5 / 3",
        ),
        flags="DogeSharedAlike",
    )
    # Each row has one entry in each model, so that the gradients have the signs of what is left over: T (T - rest) > 0.
    for id, a, b, third, left_alone, why in (
        ("shared-first", 4.0, 5.0, 0.0, (0, 2), "the first row's, which both have, comes first, though it is small; then 5"),
        ("shared-first-too", 5.0, 4.0, 0.0, (0, 1), "the same the other way round"),
        ("two-each", 5.0, 4.5, 3.0, (0, 1), "5, since the first model's 3 in the third row is its third direction"),
    ):
        e = np.eye(4)
        small = third + 1
        rows = np.outer(e[1], e[0]) * a + np.outer(e[0], e[1]) * small + np.outer(e[2], e[2]) * third
        others = np.outer(e[2], e[0]) * b + np.outer(e[0], e[1]) * small
        lengths = np.linalg.norm(rows), np.linalg.norm(others)
        step = np.where((rows != 0) | (others != 0), 0.5, 0.0)
        step[list(left_alone)] = 0.0
        case(
            id,
            f"one entry in a row: {a:g} in the second and {b:g} in the third, each in one of two models, and "
            f"{small:g} in the first "
            "in both; two directions of each count, two of four are left alone, and the others' entries make one step "
            "of 1/2",
            [rows, others],
            np.zeros((4, 4)),
            (
                "doge",
                {"subspace": 2, "density": 1.0, "lambda_": 0.5, "steps": 1, "lr": 0.5},
                (0.5 * ((rows + step) / lengths[0] + (others + step) / lengths[1])).tolist(),
                why,
            ),
            flags="DogeSharedAlike",
        )
    case(
        "zeros-before-vectors",
        f"{two}; all six entries, zeros too, come before any of the vector; the step is that of one-step",
        [{"a": [9.0] * 4, "b": tau_1}, {"a": [9.0] * 4, "b": tau_2}],
        {"a": [0.0] * 4, "b": zeros},
        (
            "doge",
            half | {"density": 1.0},
            {"a": [0.0] * 4, "b": [[0.75, 0.0, 0.95], [0.6, 0.8, 0.0]]},
            "(3 + 1/2) / 5 + (0 + 1/2) / 10; (4 + 1/2) / 5 + (0 + 1/2) / 10",
        ),
    )
    case(
        "recorded-coefficients",
        "a recorded coefficient of 1/2 in place of 1 / 5; no steps",
        [layer([[3.0, 4.0]])],
        layer([[0.0, 0.0]]),
        (TOOL, theirs | {"K": 60.0}, layer([[1.5, 2.0]]), ""),
        stats=[{NAME: np.array(0.5)}],
    )
    case(
        "lambda-zero",
        "coefficients of 0",
        [[[3.0, 4.0]]],
        [[1.0, 1.0]],
        ("doge", {"lambda_": 0.0, "steps": 1}, [[1.0, 1.0]], "the base"),
        tolerance=0.0,
    )
    case(
        "empty-and-integers",
        "no entries; a number; integers",
        [{"e": [], "s": 3.0, "ids": i64(3)}],
        {"e": [], "s": 1.0, "ids": i64(3)},
        ("doge", {}, {"e": [], "s": 1.0, "ids": i64(3)}, "a number stays the base's"),
    )
    h.case("nan", "NaN has no length", [[[math.nan, 1.0]]], [[0.0, 0.0]], ("doge", {}, REFUSED, ""))
    h.case("subspace-zero", "a 0-th part", [[[1.0]]], [[0.0]], ("doge", {"subspace": 0}, REFUSED, ""))
    h.case("density", "more than all", [[[1.0]]], [[0.0]], ("doge", {"density": 1.5}, REFUSED, ""))
    h.case("not-a-matrix", "a vector of an encoder", [{NAME: [1.0]}], {NAME: [0.0]}, (TOOL, {}, REFUSED, "no decomposition"))
    h.case("no-base", "a task vector is a difference from a base", [[[1.0]]], None, ("doge", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [[0.0]], ("doge", {}, REFUSED, ""))
    return h
