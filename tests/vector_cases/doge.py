"""Vectors of doge."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, i64
from vector_cases.low_rank_residual import root
from vector_cases.wudi import adam

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

STAGED = (
    "doge-one-step", "doge-one-more", "doge-zero-task-vector", "doge-one-model", "doge-unprojected",
    "doge-shared-first", "doge-shared-first-too", "doge-two-each", "doge-unchanged", "doge-more-models-than-rows",
    "doge-density-one", "doge-lambda-negative", "doge-convolution", "doge-two-steps",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """Without B, whose columns have free signs."""
    tau = [theta - given.base for theta in given.models]
    m = [first_largest(tau_t, int(given.params.get("density", 0.3) * tau_t.size)) for tau_t in tau]
    T = [tau_t.reshape(len(tau_t), -1) for tau_t in tau]
    length, scale = [root(np.sum(T_t * T_t)) for T_t in T], Fraction(given.params.get("lambda_", 0.07))
    c = [scale / x if x else Fraction(0) for x in length]
    alone = shared_rows(T, given.params.get("subspace", 6), given.params.get("tolerance", 1e-5))

    def outside(Delta: Any) -> Any:
        merged = sum(c_t * (T_t + Delta) for c_t, T_t in zip(c, T))
        g = sum(-2 * sum(c) * np.sum(T_j * (T_j - merged), axis=1, keepdims=True) * T_j for T_j in T)
        g[alone] = Fraction(0)
        return g

    Delta = adam(0 * T[0], outside, given.params.get("steps", 400), given.params.get("lr", 1e-4))
    moved = [c_t * m_t * (tau_t + Delta.reshape(tau_t.shape)) for c_t, m_t, tau_t in zip(c, m, tau)]
    return {
        1: {"tau": tau},
        2: {"m": m, "T": T},
        3: {"c": np.array(c, object)},
        5: {"Delta": Delta},
        6: {"result": given.base + sum(moved)},
    }


def first_largest(x: Any, k: int) -> Any:
    mask = np.zeros(x.size, int) * Fraction(1)
    mask[sorted(range(x.size), key=lambda i: (-abs(x.flat[i]), i))[:k]] = Fraction(1)
    return mask.reshape(x.shape)


def shared_rows(T: list[Any], subspace: int, tolerance: float) -> list[int]:
    """Of task vectors with orthogonal rows, whose left singular vectors are the rows' unit vectors: those that B has. Which
    more of the task vectors have come first, and of those the longest."""
    r, count, square = min(T[0].shape), [0] * len(T[0]), [Fraction(0)] * len(T[0])
    for T_t in T:
        G = T_t @ T_t.T
        assert not np.any(G[~np.eye(len(G), dtype=bool)])
        squares = np.diag(G)
        for i in sorted(range(len(G)), key=lambda i: -squares[i])[: r // len(T)]:
            if squares[i] > Fraction(tolerance) ** 2 * max(squares):
                count[i] += 1
                square[i] += squares[i]
    order = sorted(range(len(count)), key=lambda i: (-count[i], -square[i]))
    return [i for i in order if count[i]][: r // subspace]


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
        "diag(2, 1, 1, 1, 1, 1) of length 3: of six directions, all shared alike, the largest is left alone; the others' "
        "entries make one step of 1/2",
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
            f"one entry in a row: {a:g} in the second and {b:g} in the third, each in one of two models, and {small:g} in "
            "the first in both; two directions of each count, two of four are left alone, and the others' entries make "
            "one step of 1/2",
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
    h.case("infinite", "infinity has no length", [[[math.inf, 1.0]]], [[0.0, 0.0]], ("doge", {}, REFUSED, ""))
    every = {"density": 1.0, "lambda_": 1.0, "lr": 0.5}
    case(
        "unchanged",
        "both models are the base; a step of 1/2",
        [[[3.0, -1.0], [0.5, 2.0]]] * 2,
        [[3.0, -1.0], [0.5, 2.0]],
        ("doge", every | {"steps": 1}, [[3.0, -1.0], [0.5, 2.0]], "coefficients and gradient are 0"),
        tolerance=0.0,
    )
    case(
        "more-models-than-rows",
        "(3, 4) and (0, 5), each of length 5, sum (0.6, 1.8); of one direction int(1/2) is none, so that nothing is left "
        "alone; rho is 3 2.4 + 4 2.2 = 16 and 5 3.2 = 16, the gradient below 0",
        [[[3.0, 4.0]], [[0.0, 5.0]]],
        [[0.0, 0.0]],
        ("doge", every | {"subspace": 1, "steps": 1}, [[0.8, 2.0]], "(3.5 + 0.5) / 5, (4.5 + 5.5) / 5"),
    )
    case(
        "low-rank",
        "(1, 2) (3, 4)^T of length sqrt(125): one direction, (1, 2), where two are asked for; the rows' gradients, like "
        "-(1, 4) (1, 2) = -(1, 8), have -17/5 (1, 2) of it and keep (12, -6)/5; one step of 1/2",
        [[[3.0, 4.0], [6.0, 8.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        (
            "doge",
            every | {"subspace": 1, "steps": 1},
            (np.array([[2.5, 3.5], [6.5, 8.5]]) / math.sqrt(125)).tolist(),
            "down in the first row, up in the second",
        ),
    )
    length = math.sqrt(2.0**40 + 1)
    case(
        "tolerance",
        "diag(2^20, 1), both rows asked for, coefficient close to a half; one step of 1/2",
        [[[2.0**20, 0.0], [0.0, 1.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        (
            "doge",
            every | {"subspace": 1, "steps": 1, "lambda_": 2.0**19},
            [[2.0**39 / length, 0.0], [0.0, 1.5 * 2.0**19 / length]],
            "2^-20 < 1e-5: the second does not count, and moves",
        ),
        (
            "doge",
            every | {"subspace": 1, "steps": 1, "lambda_": 2.0**19, "tolerance": 1e-7},
            [[2.0**39 / length, 0.0], [0.0, 2.0**19 / length]],
            "2^-20 > 1e-7: both are left alone",
        ),
        tolerance=1e-12,
    )
    case("density-zero", "no entries", [[[3.0, 4.0]]], [[1.0, 1.0]],
         ("doge", {"density": 0.0}, [[1.0, 1.0]], "the base"), tolerance=0.0)  # fmt: skip
    case(
        "density-one",
        f"{two}; the step is that of one-step",
        [tau_1, tau_2],
        zeros,
        (
            "doge",
            half | {"density": 1.0},
            [[0.75, 0.0, 0.95], [0.6, 0.8, 0.0]],
            "(3 + 1/2) / 5 + (0 + 1/2) / 10; (4 + 1/2) / 5 + (0 + 1/2) / 10",
        ),
    )
    case(
        "lr-zero",
        f"{two}; a step of no length",
        [tau_1, tau_2],
        zeros,
        ("doge", half | {"lr": 0.0}, [[0.6, 0.0, 0.8], [0.6, 0.8, 0.0]], "3/5, 4/5; 6/10, 8/10"),
        tolerance=1e-14,
    )
    case(
        "lambda-negative",
        "base 1; the change (3, 4) of length 5; no steps",
        [[[4.0, 5.0]]],
        [[1.0, 1.0]],
        ("doge", plain | {"density": 1.0, "lambda_": -1.0}, [[0.4, 0.2]], "1 - 3/5, 1 - 4/5"),
        tolerance=1e-14,
    )
    case(
        "layers",
        "of two matrices the globs name one: half of its two entries, no steps",
        [{"a.k": [[30.0, 40.0]], "a.q": [[3.0, 4.0]]}],
        {"a.k": [[0.0, 0.0]], "a.q": [[0.0, 0.0]]},
        ("doge", plain | {"density": 0.5, "layers": ["*.q"]}, {"a.k": [[0.0, 0.0]], "a.q": [[0.0, 0.8]]}, "4/5"),
        tolerance=1e-14,
    )
    case(
        "convolution",
        f"shape (2, 1, 3): {two}, as in one-step",
        [[[row] for row in tau_1], [[row] for row in tau_2]],
        [[row] for row in zeros],
        ("doge", half, [[[0.75, 0.0, 0.9]], [[0.6, 0.8, 0.0]]], ""),
    )
    case(
        "one-model-turned",
        "26 u_1 e_1^T + 13 u_2 e_2^T of length sqrt(845), u_1 = (5, 12)/13, u_2 = (12, -5)/13, shared alike up to "
        "rounding: u_1 is left alone; of the rows' gradients, like -(244 (10, 12); 601 (24, -5)), u_2 (42840, -50161)/13 "
        "stays; one step of 1/2",
        [[[10.0, 12.0], [24.0, -5.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        (
            "doge",
            every | {"subspace": 2, "steps": 1},
            (np.array([[9.5, 12.5], [24.5, -5.5]]) / math.sqrt(845)).tolist(),
            "against the signs (1, -1; -1, 1)",
        ),
        flags="DogeSharedAlike",
    )
    second = 0.5 * (3.73 / 0.19) / math.sqrt(0.77209 / 0.001999)
    case(
        "two-steps",
        "(3, 4) with the coefficient 1/5: rho is 25 4/5 = 20, after a step of 1/2 in both entries 20 - 3.5/5 = 19.3; the "
        "second step has m = 0.09 20 + 0.1 19.3 over 0.19, v = 0.000999 20^2 + 0.001 19.3^2 over 0.001999",
        [[[3.0, 4.0]]],
        [[0.0, 0.0]],
        ("doge", every | {"steps": 2}, [[(3.5 + second) / 5, (4.5 + second) / 5]], ""),
    )
    return h
