"""Vectors of svc."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Tensors, Test, i64, origin
from vector_cases.low_rank_residual import terms

CODE = {
    "official:svc": "lyymuwu/SVC@6ad2b31 merge_func.py:Align",
    "fusion_bench:svc": "tanganke/fusion_bench@54c9e8c fusion_bench/method/singular_value_calibration/utils.py"
    ":subspace_consistency_spectral_calibration_accelerated",
}
SLACK = 1e-6  # singular vectors are rounded

STAGED = (
    "svc-example", "svc-equal", "svc-one-task", "svc-at-least-alpha", "svc-negative", "svc-left", "svc-no-response",
    "svc-zero-task", "svc-of-no-task", "svc-vector",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    merged, *tasks = given.models
    if given.base.ndim != 2:
        return {1: {"result": merged}}
    alpha, tolerance = Fraction(given.params.get("alpha", 0.1)), given.params.get("tolerance", 1e-5)
    M = merged - given.base
    found = terms(M)
    s = [[coefficient(E, M, theta - given.base, tolerance) for E in projectors(found)] for theta in tasks]
    gamma = [len(tasks) / sum(max(x, alpha) for x in of_direction) for of_direction in zip(*s)]
    result = given.base + sum(g * term for g, (_, term) in zip(gamma, found))
    return {
        2: {"S": np.array([x for x, _ in found], object)},
        3: {"s": np.array(s, object)},
        4: {"gamma": np.array(gamma, object)},
        5: {"result": result},
    }


def projectors(found: list[tuple[Fraction, Any]]) -> list[Any]:
    """u u^T of each term s u v^T, which has no sign: T T^T / s^2, and of one s = 0 what the others leave of the identity."""
    E = [term @ term.T / s**2 if s else None for s, term in found]
    rest = np.eye(len(found), dtype=int) * Fraction(1) - sum(x for x in E if x is not None)
    return [rest if x is None else x for x in E]


def coefficient(E: Any, M: Any, Delta: Any, tolerance: float) -> Fraction:
    """<a, b> / <b, b> of the responses u^T M and u^T Delta, as traces of E M Delta^T and of E Delta Delta^T."""
    square, length = np.trace(E @ Delta @ Delta.T), math.sqrt(np.sum(Delta * Delta))
    return np.trace(E @ M @ Delta.T) / square if math.sqrt(square) > tolerance * length else Fraction(0)


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """What the authors' code and FusionBench's make of a merged model: here it is the first of the models."""

    def part(prefix: str) -> Tensors:
        return {name.partition("/")[2]: x for name, x in tensors.items() if name.partition("/")[0] == prefix}

    base = part("base")
    merged = part("merged") or {name: base[name] + x for name, x in part("merged_tv").items()}
    count = len({name.partition("/")[0] for name in tensors if name.startswith("model")})
    original = {"implementation": "original"}
    tool = "official" if meta["source"].startswith("lyymuwu") else "fusion_bench"
    test = Test(
        id=id,
        entry=f"{tool}:svc",
        params=json.loads(meta["params"]) | ({} if "accelerated" in meta.get("about", "accelerated") else original),
        models=[merged, *(part(f"model{k}") for k in range(count))],
        base=base,
        expect=part("out"),
        comment=meta["notes"],
        source=origin(meta["source"]),
        tolerance=float(meta["tolerance"]),
    )
    if tool == "official":
        return [test]
    plain = Test(
        id=f"{id}-paper",
        entry="svc",
        params={"alpha": test.params["alpha"]},
        models=test.models,
        base=base,
        expect=test.expect,
        comment="every task responds to every direction",
        source=test.source,
        tolerance=test.tolerance,
    )
    return [test, plain]


def diag(*values: float) -> list[list[float]]:
    return np.diag(values).tolist()


def hand() -> Hand:
    h = Hand("svc", CODE)

    def case(id: str, comment: str, models: list[Any], base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **({"tolerance": SLACK} | more))

    def all_of(alpha: float, expect: Any, why: str = "") -> list[Any]:
        return [(entry, {"alpha": alpha}, expect, why) for entry in ("svc", "official:svc", "fusion_bench:svc")]

    one, two = [[30.0, 24.0, -12.0], [-10.0, 7.0, 34.0]], [[6.0, 12.0, 12.0], [8.0, 16.0, 16.0]]
    none = [[0.0] * 3] * 2
    case(
        "example",
        "u_1 = (3, 4)/5, v_1 = (1, 2, 2)/3, u_2 = (4, -3)/5, v_2 = (2, 1, -2)/3; tasks 30 u_1 v_1^T + 45 u_2 v_2^T and "
        "30 u_1 v_1^T, merged as their sum 60 and 45: s = (2, 2) and (1, 0)",
        [[[36.0, 36.0, 0.0], [-2.0, 23.0, 50.0]], one, two],
        none,
        *all_of(0.5, [[38.0, 28.0, -20.0], [-16.0, 4.0, 40.0]], "60/2 = 30 and 45 * 2/(1 + 1/2) = 60"),
        flags="SvcNoResponse",
    )
    case(
        "equal",
        "base 1, two tasks diag(4, 2), merged as their sum: s = 2",
        [[[9.0, 1.0], [1.0, 5.0]], [[5.0, 1.0], [1.0, 3.0]], [[5.0, 1.0], [1.0, 3.0]]],
        [[1.0, 1.0], [1.0, 1.0]],
        *all_of(0.25, [[5.0, 1.0], [1.0, 3.0]], "the task itself"),
    )
    case(
        "one-task",
        "a task diag(4, 2), merged as half of it: s = 1/2",
        [diag(2.0, 1.0), diag(4.0, 2.0)],
        diag(0.0, 0.0),
        *all_of(0.25, diag(4.0, 2.0), "the task itself"),
    )
    case(
        "at-least-alpha",
        "a task diag(4, 2), merged as an eighth of it: s = 1/8",
        [diag(0.5, 0.25), diag(4.0, 2.0)],
        diag(0.0, 0.0),
        *all_of(0.25, diag(2.0, 1.0), "divided by alpha, 1/4"),
    )
    case(
        "negative",
        "tasks diag(4, 4) and diag(-2, 4), merged as their sum diag(2, 8): s = (1/2, -1) and (2, 2)",
        [diag(2.0, 8.0), diag(4.0, 4.0), diag(-2.0, 4.0)],
        diag(0.0, 0.0),
        *all_of(0.5, diag(4.0, 4.0), "-1 counts as alpha, 1/2: 2/(1/2), 8/2"),
    )
    case(
        "left",
        "tasks 3 e_1 e_1^T and 4 e_1 e_2^T, merged as their sum e_1 (3, 4): u = e_1, s = (3, 4) (3, 0)/9 = 1 and 1",
        [[[3.0, 4.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 0.0]]],
        diag(0.0, 0.0),
        ("svc", {"alpha": 0.5}, [[3.0, 4.0], [0.0, 0.0]], "nothing is counted twice"),
        ("official:svc", {"alpha": 0.5, "right_only": False}, [[3.0, 4.0], [0.0, 0.0]], ""),
        ("official:svc", {"alpha": 0.5, "right_only": True}, [[1.3824, 1.8432], [0.0, 0.0]],
         "M v = 5 e_1, and 9/5 e_1 and 16/5 e_1 of the tasks: s = 25/9 and 25/16, 5/(625/288) = 2.304"),
        flags="SvcSide",
    )  # fmt: skip
    x = 2.0**-22
    case(
        "no-response",
        "a task diag(4, 2) and a task of rank 1 in float32, diag(4, 2^-22), merged as diag(4, 2)",
        [diag(4.0, 2.0), diag(4.0, 2.0), diag(4.0, x)],
        diag(0.0, 0.0),
        (
            "svc",
            {"alpha": 0.5},
            diag(4.0, 8 / 3),
            "2^-22 < 1e-5 * 4: it does not respond, alpha stands for s: 2/((1 + 1/2)/2)",
        ),
        ("svc", {"alpha": 0.5, "tolerance": 1e-8}, diag(4.0, 2 / ((1 + 2 / x) / 2)), "2^-22 > 4e-8: s = 2^23"),
        (
            "official:svc",
            {"alpha": 0.5},
            diag(4.0, 2 / ((1 + 2 * x / 1e-12) / 2)),
            "s = 2 2^-22 / 1e-12: the direction is gone",
        ),
        ("fusion_bench:svc", {"alpha": 0.5}, diag(4.0, 2 / ((1 + 2 * x / 1e-12) / 2)), "the same"),
        ("fusion_bench:svc", {"alpha": 0.5, "implementation": "original"}, diag(4.0, 2 / ((1 + 2 / x) / 2)), "s = 2^23"),
        flags="SvcNoResponse",
    )
    case(
        "zero-task",
        "a task diag(4, 2), merged as itself, and a task that left the matrix alone",
        [diag(4.0, 2.0), diag(4.0, 2.0), diag(0.0, 0.0)],
        diag(0.0, 0.0),
        *all_of(0.5, diag(16 / 3, 8 / 3), "alpha stands for s: divided by (1 + 1/2)/2"),
        ("fusion_bench:svc", {"alpha": 0.5, "implementation": "original"}, diag(16 / 3, 8 / 3), "max(alpha, NaN) is alpha"),
        flags="SvcNoResponse",
    )
    s = 2.0**-22
    case(
        "small",
        "two tasks diag(1, 1) 2^-22, merged as their sum: s = 2",
        [diag(2 * s, 2 * s), diag(s, s), diag(s, s)],
        diag(0.0, 0.0),
        ("svc", {"alpha": 0.1}, diag(s, s), "half, whatever the size"),
        ("official:svc", {"alpha": 0.1}, diag(2 * s / (2 * s * s / 1e-12), 2 * s / (2 * s * s / 1e-12)),
         "the square 2^-44 is below 1e-12: s = 2 2^-44 / 1e-12 = 0.114"),
        ("fusion_bench:svc", {"alpha": 0.1}, diag(2 * s / (2 * s * s / 1e-12), 2 * s / (2 * s * s / 1e-12)), "the same"),
        flags="SvcSmall",
    )  # fmt: skip
    names = ("text_projection", "token_embedding.weight", "w")
    given, calibrated = diag(8.0, 4.0), diag(4.0, 2.0)
    case(
        "kept",
        "two tasks diag(4, 2), merged as their sum, by names",
        [dict.fromkeys(names, given), dict.fromkeys(names, calibrated), dict.fromkeys(names, calibrated)],
        dict.fromkeys(names, diag(0.0, 0.0)),
        ("svc", {}, dict(zip(names, (given, given, calibrated))), "kept as they are merged"),
        ("svc", {"kept": []}, dict.fromkeys(names, calibrated), ""),
        ("official:svc", {}, dict(zip(names, (given, given, calibrated))), ""),
        ("fusion_bench:svc", {}, dict.fromkeys(names, calibrated), "every matrix"),
        flags="SvcKept",
    )
    case(
        "target",
        "tasks diag(4, 2) and diag(4, -1), merged as their sum diag(8, 1)",
        [diag(8.0, 1.0), diag(4.0, 2.0), diag(4.0, -1.0)],
        diag(0.0, 0.0),
        ("official:svc", {"alpha": 0.1, "target": 0}, diag(4.0, 2.0), "s = 2 and 1/2 of the first alone"),
        (
            "official:svc",
            {"alpha": 0.1, "target": 1},
            diag(4.0, 1.0),
            "s = 2 and -1 of the second alone: 1 for what is negative",
        ),
        ("official:svc", {"alpha": 0.1, "target": 2}, REFUSED, "there are two"),
    )
    case(
        "float32-factor",
        "float64: tasks diag(1, 1) and diag(2.5, 2.5), merged as diag(1.5, 1.5)",
        [diag(1.5, 1.5), diag(1.0, 1.0), diag(2.5, 2.5)],
        diag(0.0, 0.0),
        ("svc", {}, diag(1.5 / 1.05, 1.5 / 1.05), "s = 1.5 and 0.6, mean 1.05"),
        ("fusion_bench:svc", {}, diag(1.5 / 1.05, 1.5 / 1.05), ""),
        ("official:svc", {}, diag(1.5 / float(np.float32(1.05)), 1.5 / float(np.float32(1.05))), "1.05 in float32"),
        flags="SvcFactor",
        dtype="F64",
        tolerance=1e-12,
    )
    case(
        "no-matrices",
        "a vector, a number, nothing, integers: as they are merged",
        [{"b": [5.0, 3.0], "s": 4.0, "e": [], "ids": i64(3)}, {"b": [1.0, 3.0], "s": 4.0, "e": [], "ids": i64(3)}],
        {"b": [0.0, 2.0], "s": 0.0, "e": [], "ids": i64(3)},
        ("svc", {}, {"b": [5.0, 3.0], "s": 4.0, "e": [], "ids": i64(3)}, ""),
        tolerance=0.0,
    )
    empty, zero = np.zeros((0, 3), np.float32), diag(0.0, 0.0)
    case("empty-matrix", "shape (0, 3)", [{"e": empty}] * 2, {"e": empty}, ("svc", {}, {"e": empty}, ""), tolerance=0.0)
    case("unchanged", "all equal the base", [zero, zero], zero, ("svc", {}, zero, ""), tolerance=0.0)
    for id, value in (("nan", math.nan), ("infinite", math.inf)):
        case(
            f"{id}-merged",
            "it has no singular values",
            [[[value, 2.0]], [[1.0, 1.0]]],
            [[0.0, 0.0]],
            ("svc", {}, REFUSED, ""),
        )
        case(f"{id}-task", "it has no response", [[[1.0, 2.0]], [[value, 1.0]]], [[0.0, 0.0]], ("svc", {}, REFUSED, ""))
    for id, params in (
        ("alpha-zero", {"alpha": 0.0}),
        ("alpha-large", {"alpha": 1.5}),
        ("tolerance-zero", {"tolerance": 0.0}),
    ):
        case(id, "outside of the domain", [zero, zero], zero, ("svc", params, REFUSED, ""))
    case("no-tasks", "a merged model alone", [zero], zero, ("svc", {}, REFUSED, ""))
    case("no-base", "a task vector is a difference from a base", [zero, zero], None, ("svc", {}, REFUSED, ""))
    case("alpha-above-one", "the authors' code takes it", [diag(1.0, 1.0), diag(1.0, 1.0)], zero,
         ("official:svc", {"alpha": 2.0}, diag(0.5, 0.5), ""),
         ("fusion_bench:svc", {"alpha": 2.0}, diag(0.5, 0.5), ""))  # fmt: skip
    case(
        "of-no-task",
        "merged as diag(4, 2), of which the task has diag(4, 0): s = (1, 0)",
        [diag(4.0, 2.0), diag(4.0, 0.0)],
        diag(0.0, 0.0),
        ("svc", {"alpha": 0.5}, diag(4.0, 4.0), "2 / (1/2)"),
    )
    case(
        "merged-is-base",
        "tasks of which nothing was merged",
        [diag(1.0, 1.0), diag(5.0, 3.0)],
        diag(1.0, 1.0),
        ("svc", {}, diag(1.0, 1.0), "the base"),
    )
    case("vector", "as it is merged, whatever the tasks have", [[5.0, -1.0], [3.0, 3.0], [2.0, 4.0]], [1.0, 1.0],
         ("svc", {}, [5.0, -1.0], ""), tolerance=0.0)  # fmt: skip
    case(
        "vector-not-finite",
        "as it is merged",
        [[math.nan, math.inf, 1.0], [1.0, math.nan, 2.0]],
        [0.0] * 3,
        ("svc", {}, [math.nan, math.inf, 1.0], ""),
        tolerance=0.0,
    )
    case(
        "integers-differ",
        "ids of 7 in the task",
        [{"b": [5.0], "ids": i64(3)}, {"b": [5.0], "ids": i64(7)}],
        {"b": [0.0], "ids": i64(3)},
        ("svc", {}, REFUSED, ""),
        options={"integers": "equal"},
    )
    case(
        "high",
        "higher than wide: tasks diag(40, 10) and diag(20, 20), merged as diag(40, 20): s = (1, 2) and (2, 1); means 3/2",
        [
            [[40.0, 0.0], [0.0, 20.0], [0.0, 0.0]],
            [[40.0, 0.0], [0.0, 10.0], [0.0, 0.0]],
            [[20.0, 0.0], [0.0, 20.0], [0.0, 0.0]],
        ],
        [[0.0, 0.0]] * 3,
        ("svc", {}, [[80 / 3, 0.0], [0.0, 40 / 3], [0.0, 0.0]], "40 and 20 by 3/2"),
    )
    little = 2.0**-16
    case(
        "high-no-response",
        "higher than wide: a task diag(4, 2^-16), whose second response is below 1e-5 of its length, merged as diag(8, 4)",
        [[[8.0, 0.0], [0.0, 4.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, little], [0.0, 0.0]]],
        [[0.0, 0.0]] * 3,
        ("svc", {}, [[4.0, 0.0], [0.0, 40.0], [0.0, 0.0]], "8 by 2, and alpha stands for the other: 4 by 1/10"),
        dtype="F64",
    )
    case(
        "high-response",
        "higher than wide: a task diag(4, 2^-14), whose second response is above 1e-5 of its length, merged as diag(8, 4)",
        [[[8.0, 0.0], [0.0, 4.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 2.0**-14], [0.0, 0.0]]],
        [[0.0, 0.0]] * 3,
        ("svc", {}, [[4.0, 0.0], [0.0, 2.0**-14], [0.0, 0.0]], "8 by 2, and 4 by 2^16: the task itself"),
        dtype="F64",
    )
    case(
        "high-little-merged",
        "higher than wide: a task diag(4, 2^-14), merged as diag(8, 1/4): s = 2 and 2^12",
        [[[8.0, 0.0], [0.0, 0.25], [0.0, 0.0]], [[4.0, 0.0], [0.0, 2.0**-14], [0.0, 0.0]]],
        [[0.0, 0.0]] * 3,
        ("svc", {}, [[4.0, 0.0], [0.0, 2.0**-14], [0.0, 0.0]], "the task itself"),
        dtype="F64",
    )
    case(
        "wide-response",
        "wider than high: a task diag(4, 2^-14), whose second response is above 1e-5 of its length, merged as diag(8, 4)",
        [[[8.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [[4.0, 0.0, 0.0], [0.0, 2.0**-14, 0.0]]],
        [[0.0, 0.0, 0.0]] * 2,
        ("svc", {}, [[4.0, 0.0, 0.0], [0.0, 2.0**-14, 0.0]], "8 by 2, and 4 by 2^16: the task itself"),
        dtype="F64",
    )
    case(
        "beyond-the-range",
        "float64: a change of 1e160, whose square is no number",
        [[[1e160, 0.0]], [[1e160, 0.0]]],
        [[0.0, 0.0]],
        ("svc", {}, REFUSED, ""),
        dtype="F64",
    )
    return h
