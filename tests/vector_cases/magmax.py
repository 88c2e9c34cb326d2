"""Vectors of magmax."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64

CODE = {
    "official:magmax": "danielm1405/magmax@4f49f18 src/merging/task_vectors.py:merge_max_abs",
    "fusion_bench:magmax": "tanganke/fusion_bench@54c9e8c fusion_bench/method/magmax/magmax.py:MagMaxAlgorithm.run",
}
TOOLS = ("fusion_bench",)
PAPER = {"magmax-fusion_bench-00": Paper({"lambda_": 0.5})}

STAGED = (
    "magmax-by-hand", "magmax-by-hand-reversed", "magmax-ties", "magmax-ties-of-three", "magmax-lambda-negative",
    "magmax-lambda-default",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    tau_max = largest(tau)
    scale = Fraction(given.params.get("lambda_", 0.5))
    return {1: {"tau": tau}, 2: {"tau_max": tau_max}, 3: {"result": given.base + scale * tau_max}}


def largest(tau: list[Any]) -> Any:
    """Entry by entry the last of those of the largest magnitude."""
    found = np.empty_like(tau[0])
    for i, entries in enumerate(zip(*(x.flat for x in tau))):
        _, last = max((abs(x), n) for n, x in enumerate(entries))
        found.flat[i] = entries[last]
    return found


def hand() -> Hand:
    h = Hand("magmax", CODE)

    def case(id: str, comment: str, models: Any, base: Any, expect: Any, scale: float = 1.0, **more: Any) -> None:
        h.case(
            id, comment, models, base,
            ("magmax", {"lambda_": scale}, expect, ""),
            ("official:magmax", {"scaling_coef": scale}, expect, ""),
            ("fusion_bench:magmax", {"scaling_factor": scale}, expect, ""),
            **more,
        )  # fmt: skip

    case(
        "by-hand",
        "base 1; tau = (3, -2, 0, 1), (-4, 1, 1/2, 0), (2, 1, -1, 0): -4, -2, -1, 1 are the largest; half of them",
        [[4.0, -1.0, 1.0, 2.0], [-3.0, 2.0, 1.5, 1.0], [3.0, 2.0, 0.0, 1.0]],
        [1.0] * 4,
        [-1.0, 0.0, 0.5, 1.5],
        0.5,
    )
    case(
        "ties",
        "tau = 2 and -2, -2 and 2: of two magnitudes that are the same the later model's; the first would give (2, -2)",
        [[2.0, -2.0], [-2.0, 2.0]],
        [0.0, 0.0],
        [-2.0, 2.0],
        flags="MagMaxTies",
    )
    case("ties-of-three", "tau = 1, -1, 1", [[1.0], [-1.0], [1.0]], [0.0], [1.0], flags="MagMaxTies")
    case("one-model", "base 1; tau = (2, -3)", [[3.0, -2.0]], [1.0, 1.0], [3.0, -2.0])
    case("copies", "three times the same model is that model", [[3.0, -2.0]] * 3, [1.0, 1.0], [3.0, -2.0])
    case("lambda-zero", "the base", [[3.0, -2.0]], [1.0, 4.0], [1.0, 4.0], 0.0)
    case("lambda-negative", "base 1; tau = (2, -3), taken away", [[3.0, -2.0]], [1.0, 1.0], [-1.0, 4.0], -1.0)
    case("base-copy", "a model that equals the base changes nothing", [[3.0, 1.0], [1.0, 1.0]], [1.0, 1.0], [3.0, 1.0])
    h.case(
        "lambda-default",
        "base 0; tau = 8",
        [[8.0]],
        [0.0],
        ("magmax", {}, [4.0], "half of it"),
        ("official:magmax", {}, [8.0], "apply_to scales by 1 unless told otherwise; the scripts tell it 1/2"),
        ("fusion_bench:magmax", {}, [4.0], "half of it"),
        flags="MagMaxLambda",
    )
    nan, inf = float("nan"), float("inf")
    case(
        "nan-inf",
        "tau = (NaN, 1, inf, -inf), (1, NaN, 1, inf): NaN is not at least anything, nor is anything at least NaN",
        [[nan, 1.0, inf, -inf], [1.0, nan, 1.0, inf]],
        [0.0] * 4,
        [nan, 1.0, inf, inf],
    )
    case(
        "empty-scalar-integers",
        "a number is one entry; integers are the base's",
        [{"e": [], "s": 8.0, "ids": i64(3, 4)}, {"e": [], "s": -9.0, "ids": i64(3, 7)}],
        {"e": [], "s": 0.0, "ids": i64(3, 4)},
        {"e": [], "s": -9.0, "ids": i64(3, 4)},
    )
    h.case(
        "integers-differ",
        "ids of 5 in the base and 7 in the model",
        [{"x": [2.0], "ids": i64(7)}],
        {"x": [0.0], "ids": i64(5)},
        ("magmax", {"lambda_": 1.0}, REFUSED, "unless integers='base' is asked for"),
        flags="MagMaxIntegers",
        options={"integers": "equal"},
    )
    h.case(
        "integers-of-the-base",
        "ids of 5 in the base and 7 in the model",
        [{"x": [2.0], "ids": i64(7)}],
        {"x": [0.0], "ids": i64(5)},
        ("official:magmax", {}, {"x": [2.0], "ids": i64(5)}, "int64 and uint8 have no task vector"),
        ("fusion_bench:magmax", {"scaling_factor": 1.0}, {"x": [2.0], "ids": i64(5)}, "integers have no task vector"),
        flags="MagMaxIntegers",
    )
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("magmax", {}, REFUSED, ""))
    h.case("no-models", "nothing to choose from", [], [0.0], ("magmax", {}, REFUSED, ""))
    case(
        "by-hand-reversed",
        "the models of by-hand in the other order; no two magnitudes are the same, so nothing changes",
        [[3.0, 2.0, 0.0, 1.0], [-3.0, 2.0, 1.5, 1.0], [4.0, -1.0, 1.0, 2.0]],
        [1.0] * 4,
        [-1.0, 0.0, 0.5, 1.5],
        0.5,
    )
    case(
        "nan-first-of-three",
        "tau = NaN, 1, 2 and 1, NaN, 2: the first model's NaN stays, the second one's is passed over",
        [[nan, 1.0], [1.0, nan], [2.0, 2.0]],
        [0.0, 0.0],
        [nan, 2.0],
    )
    case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0], [-0.0, 1.0]],
        [-0.0, -0.0],
        [0.0, 2.0],
    )
    return h
