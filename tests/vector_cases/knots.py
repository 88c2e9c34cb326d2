"""Vectors of knots."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, Tensors, Test, i64, origin, sign
from vector_cases.low_rank_residual import terms
from vector_cases.ties import agreeing_mean, trim

OFFICIAL = "official:knots"
CODE = {
    OFFICIAL: "gstoica27/KnOTS@baa35e8 task_merger.py:SVDMerger",
}
FLAGS = {
    "knots-official-06": ["KnotsOneMore"],
}
PAPER = {
    "knots-official-00": Paper({"trim": 1.0}, comment="nothing is trimmed, and no sum is zero"),
}

STAGED = (
    "knots-trim", "knots-lambda", "knots-zero-coordinates", "knots-mean", "knots-dare", "knots-tolerance",
    "knots-tolerance-zero", "knots-zero-sum", "knots-ranks-differ",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """Without the coordinates and what follows of them: their signs are free."""
    asked, tau = given.params, [theta - given.base for theta in given.models]
    found = terms(np.concatenate(tau, axis=1))
    found = [(s, term) for s, term in found if s > Fraction(asked.get("tolerance", 1e-5)) * found[0][0]]
    S, U = [s for s, _ in found], np.stack([left(term) for _, term in found], axis=1)
    C = [np.where(abs(x) > Fraction(1e-10) * S[0], x, Fraction(0)) for x in (U.T @ tau_t for tau_t in tau)]
    if given.masks:
        C = [m[: len(S)] * C_t / p for m, C_t, p in zip(given.masks, C, given.each("density", 1.0))]
    C = [trim(C_t, int(asked.get("trim", 0.2) * C_t.size)) for C_t in C]
    merged = U @ agreeing_mean(C, sign(sum(C)))
    result = given.base + Fraction(asked.get("lambda_", 1.0)) * merged
    return {1: {"tau": tau}, 2: {"S": np.array(S, object)}, 7: {"result": result}}


def left(term: Any) -> Any:
    """u of s u v^T, of either sign."""
    u = max(term.T, key=lambda column: column @ column)
    return u / Fraction(math.hypot(*u))


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """FusionBench's alignment alone: its basis and coordinates make each task vector again, as one model does here."""
    base = {"w": tensors["base/w"]}
    assert json.loads(meta["params"]) == {"eps": 0.0001}
    return [
        Test(
            id=f"{id}-model{k}",
            entry="knots",
            params={"trim": 1.0},
            models=[{"w": tensors[f"model{k}/w"]}],
            base=base,
            expect={"w": (base["w"] + tensors[f"recon/{k}"]).astype(np.float32)},
            comment="basis times coordinates is the task vector; of one model all of it comes back",
            source=origin(meta["source"]),
            tolerance=2e-6,
        )
        for k in range(3)
    ]


def hand() -> Hand:
    h = Hand("knots", CODE)

    def case(id: str, comment: str, models: Any, base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **{"dtype": "F64", "tolerance": 1e-6} | more)

    def turned(*rows: list[float]) -> list[list[float]]:
        """U C with U = (1, 1; 1, -1) / sqrt2 and C = sqrt2 rows."""
        a, b = np.array(rows)
        return [(a + b).tolist(), (a - b).tolist()]

    zeros = [[0.0] * 3] * 2
    c_1, c_2 = ([4.0, 1.0, 3.0], [0.5, -0.25, 0.75]), ([-2.0, 5.0, 1.0], [0.25, -0.625, -0.375])
    two = (
        "in the basis (1, 1), (1, -1) over sqrt2 the coordinates are sqrt2 times (4, 1, 3; 1/2, -1/4, 3/4) and (-2, 5, 1; "
        "1/4, -5/8, -3/8); the rows of both together are orthogonal, the first is the larger"
    )
    models = [turned(*c_1), turned(*c_2)]
    three = turned([4.0, 3.0, 2.0], [0.0, 0.0, 0.0])
    case(
        "trim",
        f"{two}; of each the three largest stay, the first row: 4 wins against -2, (1 + 5) / 2, (3 + 1) / 2",
        models,
        zeros,
        ("knots", {"trim": 0.5}, three, "half of six"),
        (OFFICIAL, {"topK": 34}, three, "a third of six and one more"),
    )
    case(
        "one-more",
        f"{two}; half of the six",
        models,
        zeros,
        ("knots", {"trim": 0.5}, three, "the first row"),
        (OFFICIAL, {"topK": 50}, turned([4.0, 3.0, 2.0], [0.0, -0.625, 0.75]), "and 3/4 of the one, -5/8 of the other"),
        flags="KnotsOneMore",
    )
    case(
        "lambda",
        f"{two}; lambda 1/2",
        models,
        zeros,
        ("knots", {"trim": 0.5, "lambda_": 0.5}, turned([2.0, 1.5, 1.0], [0.0, 0.0, 0.0]), ""),
        (OFFICIAL, {"topK": 34, "scaling_coeff": 0.5}, turned([2.0, 1.5, 1.0], [0.0, 0.0, 0.0]), ""),
    )
    apart = [[[2.0, 2.0, 0.0], [2.0, 2.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]]
    case(
        "zero-coordinates",
        "2 (1, 1)^T (1, 1, 0) and (1, -1)^T (0, 0, 1): each model has the coordinate 0 where the other has something",
        apart,
        zeros,
        ("knots", {"trim": 1.0}, [[2.0, 2.0, 1.0], [2.0, 2.0, -1.0]], "their sum: a 0 is in no mean"),
        (OFFICIAL, {}, OPEN, "rounding errors in place of 0 agree or not, and halve what they agree with"),
        flags="KnotsZeroCoordinates",
    )
    case(
        "nearly-zero-coordinate",
        "one row; the first model's second coordinate, 2^-40, is about 2e-13 of the largest singular value, sqrt(17)",
        [[[1.0, 2.0**-40]], [[0.0, 4.0]]],
        [[0.0, 0.0]],
        ("knots", {"trim": 1.0}, [[1.0, 4.0]], "it counts as 0, and is not averaged with 4"),
        flags="KnotsZeroCoordinates",
        tolerance=1e-15,
    )
    short, alone = [[4.0, 0.0], [0.0, 2.0**-20]], [[0.0, 0.0], [0.0, 3.0]]
    case(
        "short-row",
        "the first model changes the second row by 2^-20, below 1e-5 of what it changes the first by; the second model by 3",
        [short, alone],
        [[0.0, 0.0], [0.0, 0.0]],
        ("knots", {"trim": 1.0}, [[4.0, 0.0], [0.0, 3.0]], "its row of coordinates counts as 0, and is not averaged with 3"),
        (OFFICIAL, {}, [[4.0, 0.0], [0.0, 1.5 + 2.0**-21]], "(3 + 2^-20) / 2"),
        flags="KnotsZeroCoordinates",
    )
    case(
        "short-row-kept",
        "the same with tolerance 0",
        [short, alone],
        [[0.0, 0.0], [0.0, 0.0]],
        ("knots", {"trim": 1.0, "tolerance": 0.0}, [[4.0, 0.0], [0.0, 1.5 + 2.0**-21]], "(3 + 2^-20) / 2"),
        tolerance=1e-12,
    )
    case(
        "small",
        "one row: (4, 3) and (2, -1), times 2^-40",
        [[[4 * 2.0**-40, 3 * 2.0**-40]], [[2 * 2.0**-40, -(2.0**-40)]]],
        [[0.0, 0.0]],
        ("knots", {"trim": 1.0}, [[3 * 2.0**-40, 3 * 2.0**-40]], "what counts as 0 is so beside the largest singular value"),
    )
    case(
        "mean",
        "one row: coordinates are entries, but for a sign; 4 and 2 agree, 3 and -1 do not",
        [[[4.0, 3.0]], [[2.0, -1.0]]],
        [[0.0, 0.0]],
        ("knots", {"trim": 1.0}, [[3.0, 3.0]], "means of those that agree"),
        (OFFICIAL, {}, [[3.0, 3.0]], ""),
    )
    case(
        "mean-of-all",
        "one row: 4 and 2, 3 and -1",
        [[[4.0, 3.0]], [[2.0, -1.0]]],
        [[0.0, 0.0]],
        (OFFICIAL, {"merge_method": "tv"}, [[3.0, 1.0]], "no signs"),
    )
    case(
        "dare",
        "one row; of (4, 3) the first is dropped, of (2, -1) the second; what stays doubles: 6 and 4",
        [[[4.0, 3.0]], [[2.0, -1.0]]],
        [[0.0, 0.0]],
        ("knots", {"density": 0.5, "trim": 1.0}, [[4.0, 6.0]], ""),
        masks=[[[0, 1]], [[1, 0]]],
    )
    case(
        "threshold",
        "one row that changed by 2^-20, about 1e-6",
        [[[2.0**-20, 0.0]]],
        [[0.0, 0.0]],
        ("knots", {"trim": 1.0}, [[2.0**-20, 0.0]], "it is the largest singular value"),
        (OFFICIAL, {}, [[0.0, 0.0]], "below 1e-5"),
        flags="KnotsThreshold",
        tolerance=1e-12,
    )
    case(
        "tolerance",
        "diag(1, 2^-20): the second singular value is 1e-6 of the first",
        [[[1.0, 0.0], [0.0, 2.0**-20]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("knots", {"trim": 1.0}, [[1.0, 0.0], [0.0, 0.0]], "dropped"),
        tolerance=1e-12,
    )
    case(
        "tolerance-zero",
        "diag(1, 2^-20) with tolerance 0",
        [[[1.0, 0.0], [0.0, 2.0**-20]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("knots", {"trim": 1.0, "tolerance": 0.0}, [[1.0, 0.0], [0.0, 2.0**-20]], "kept"),
        tolerance=1e-12,
    )
    case(
        "vector",
        "a bias that changed by (4, 3) and (2, -1)",
        [{"fc.bias": [5.0, 4.0]}, {"fc.bias": [3.0, 0.0]}],
        {"fc.bias": [1.0, 1.0]},
        ("knots", {"trim": 1.0}, {"fc.bias": [4.0, 4.0]}, "a matrix of one row: 1 + 3, 1 + 3"),
        (OFFICIAL, {}, {"fc.bias": [1.0, 1.0]}, "the base's: only matrices of adapters are given"),
        flags="KnotsVectors",
    )
    case(
        "over-the-model",
        "one direction in each of two matrices, (3, 0) and (4, 0); of all four coordinates a quarter stays",
        [{"a": [[3.0, 0.0], [0.0, 0.0]], "b": [[4.0, 0.0], [0.0, 0.0]]}],
        {"a": [[0.0, 0.0], [0.0, 0.0]], "b": [[0.0, 0.0], [0.0, 0.0]]},
        (
            "knots",
            {"trim": 0.25},
            {"a": [[0.0, 0.0], [0.0, 0.0]], "b": [[4.0, 0.0], [0.0, 0.0]]},
            "the second rows are in no direction, and do not count among the four",
        ),
    )
    case(
        "short-row-long-column",
        "(10, 1/2) in one column and (-1, 5) in the other: the axes are the basis; 1/2 is a row of a twentieth",
        [[[10.0, 0.0], [0.5, 0.0]], [[0.0, -1.0], [0.0, 5.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("knots", {"trim": 1.0, "tolerance": 0.1}, [[10.0, -1.0], [0.0, 5.0]], "rows are compared, not columns"),
    )
    case(
        "zero-sum",
        "one row; 4 and -4 weigh the same, and 1 and 2 do not",
        [[[4.0, 1.0]], [[-4.0, 2.0]]],
        [[0.0, 0.0]],
        ("knots", {"trim": 1.0}, [[0.0, 1.5]], "no sign is elected"),
    )
    case(
        "equal-to-base",
        "nothing changed: there are no coordinates",
        [[[1.0, 2.0]], [[1.0, 2.0]]],
        [[1.0, 2.0]],
        ("knots", {}, [[1.0, 2.0]], ""),
        (OFFICIAL, {}, [[1.0, 2.0]], ""),
        tolerance=0.0,
    )
    case(
        "equal-to-base-topk",
        "nothing changed: there are no coordinates",
        [[[1.0, 2.0]]],
        [[1.0, 2.0]],
        (OFFICIAL, {"topK": 20}, [[1.0, 2.0]], "its code fails: no smallest of none"),
        tolerance=0.0,
    )
    case(
        "empty-and-integers",
        "no entries; a number; integers",
        [{"e": [], "s": 3.0, "ids": i64(3)}],
        {"e": [], "s": 1.0, "ids": i64(3)},
        ("knots", {"trim": 1.0}, {"e": [], "s": 3.0, "ids": i64(3)}, ""),
    )
    h.case("nan", "NaN has no singular values", [[[math.nan, 1.0]]], [[0.0, 0.0]], ("knots", {}, REFUSED, ""))
    h.case("trim-above-one", "more than all", [[[1.0]]], [[0.0]], ("knots", {"trim": 1.5}, REFUSED, ""))
    h.case("dare-all", "1 / 0", [[[1.0]]], [[0.0]], (OFFICIAL, {"dare": True, "dare_pruning_coeffs": 1.0}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[[1.0]]], None, ("knots", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [[0.0]], ("knots", {}, REFUSED, ""))
    case(
        "one-at-base",
        "one row; the second model is the base: 0 is in no mean",
        [[[5.0, 4.0]], [[1.0, 1.0]]],
        [[1.0, 1.0]],
        ("knots", {"trim": 1.0}, [[5.0, 4.0]], ""),
    )
    case(
        "nothing-kept",
        "one row; (4, 3) and (2, -1)",
        [[[5.0, 4.0]], [[3.0, 0.0]]],
        [[1.0, 1.0]],
        ("knots", {"trim": 0.0}, [[1.0, 1.0]], "the base"),
        ("knots", {"density": 0.0, "trim": 1.0}, [[1.0, 1.0]], "the base"),
        ("knots", {"trim": 1.0, "lambda_": 0.0}, [[1.0, 1.0]], "the base"),
    )
    case(
        "ranks-differ",
        "in the basis (1, 1), (1, -1) over sqrt2 the coordinates are sqrt2 times (4, 0, 3; 0, 2, 0), of rank 2, and "
        "(-2, 5, 1; 0, 0, 0), of rank 1: 4 wins against -2, (3 + 1) / 2",
        [turned([4.0, 0.0, 3.0], [0.0, 2.0, 0.0]), turned([-2.0, 5.0, 1.0], [0.0, 0.0, 0.0])],
        zeros,
        ("knots", {"trim": 1.0}, turned([4.0, 5.0, 2.0], [0.0, 2.0, 0.0]), ""),
    )
    h.case("infinite", "it has no singular values", [[[math.inf, 1.0]]], [[0.0, 0.0]], ("knots", {}, REFUSED, ""))
    return h
