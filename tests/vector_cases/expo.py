"""Vectors of expo."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, i64

CODE = {
    "official:expo": "chujiezheng/LLM-Extrapolation@04e04f5 code/extrapolate.py:main",
    "fusion_bench:expo": "tanganke/fusion_bench@54c9e8c fusion_bench/method/linear/expo.py:ExPOAlgorithm.run",
}
TOOLS = ("fusion_bench",)
FLAGS = {"expo-fusion_bench-00": ["ExpoSeveral"]}

STAGED = tuple(f"expo-{id}" for id in ("by-hand", "alpha-zero", "alpha-minus-one", "alpha-large", "no-change", "between"))


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    (theta,) = given.models
    tau = theta - given.base
    return {1: {"tau": tau}, 2: {"result": theta + Fraction(given.params.get("alpha", 0.3)) * tau}}


def hand() -> Hand:
    h = Hand("expo", CODE)

    def case(id: str, comment: str, model: Any, base: Any, alpha: float, expect: Any, **more: Any) -> None:
        h.case(
            id, comment, [model], base,
            ("expo", {"alpha": alpha}, expect, ""),
            ("official:expo", {"alpha": alpha}, expect, ""),
            ("fusion_bench:expo", {"extrapolation_factor": alpha}, expect, ""),
            **more,
        )  # fmt: skip

    case(
        "by-hand",
        "tau = (2, 0, -1); the model and half of it: 3 + 1, 2, -2 - 1/2",
        [3.0, 2.0, -2.0],
        [1.0, 2.0, -1.0],
        0.5,
        [4.0, 2.0, -2.5],
    )
    case("alpha-zero", "the model", [3.0, 2.0], [1.0, 2.0], 0.0, [3.0, 2.0])
    case("alpha-minus-one", "back to the base", [3.0, 2.0], [1.0, -2.0], -1.0, [1.0, -2.0])
    case("alpha-large", "tau = 2: 3 + 8", [3.0], [1.0], 4.0, [11.0])
    case("no-change", "a model that equals the base", [3.0, -1.0], [3.0, -1.0], 0.5, [3.0, -1.0])
    case(
        "empty-scalar-integers",
        "a number is one entry; integers are the base's",
        {"e": [], "s": 3.0, "ids": i64(3, 4)},
        {"e": [], "s": 1.0, "ids": i64(3, 4)},
        0.5,
        {"e": [], "s": 4.0, "ids": i64(3, 4)},
    )
    nan, inf = float("nan"), float("inf")
    case("nan-inf", "inf - inf is NaN", [nan, 1.0, inf, inf], [1.0, nan, 1.0, inf], 0.5, [nan, nan, inf, nan])
    u = 2.0**-23
    case(
        "form",
        "base 7/4, model one unit in the last place, u = 2^-23, above it: 7/4 + u + u/4 rounds to 7/4 + u; 5/4 of the model "
        "less 1/4 of the base is 7/4 + 2 u, since 35/16 + 5/4 u rounds to 35/16 + 2 u",
        [1.75 + u],
        [1.75],
        0.25,
        [1.75 + u],
        flags="ExpoForm",
    )
    h.case(
        "several",
        "base 1; models 3 and 5: their average 4 and half of 3",
        [[3.0], [5.0]],
        [1.0],
        ("expo", {"alpha": 0.5}, REFUSED, "average them first"),
        ("fusion_bench:expo", {"extrapolation_factor": 0.5}, [5.5], ""),
        flags="ExpoSeveral",
    )
    h.case(
        "alpha-default",
        "base 0; model 10",
        [[10.0]],
        [0.0],
        ("expo", {}, [13.0], "the authors' readme calls 0.3 or 0.5 usually good"),
        ("official:expo", {}, REFUSED, "--alpha is required"),
        ("fusion_bench:expo", {}, [11.0], "0.1 in its configuration"),
        flags="ExpoAlpha",
        tolerance=1e-6,
    )
    h.case("no-base", "a change is a difference from a base", [[1.0]], None, ("expo", {}, REFUSED, ""))
    h.case("no-models", "nothing was trained", [], [0.0], ("expo", {}, REFUSED, ""))
    case("between", "tau = (2, -4): half of it back", [3.0, -3.0], [1.0, 1.0], -0.5, [2.0, -1.0])
    case("before-the-base", "tau = 2: 3 - 6, the other side of 1", [3.0], [1.0], -3.0, [-3.0])
    case(
        "inexact-change",
        "float32: 1 - 2^25 rounds to -2^25, and 1 + 2^25 to 2^25: the base, as two roundings cancel",
        [1.0],
        [2.0**25],
        -1.0,
        [2.0**25],
    )
    case(
        "inexact-change-lost",
        "float32: 2^25 + 4 - 1 is 2^25 + 3, which rounds to 2^25 + 4, and the model less that is 0, not the base's 1",
        [2.0**25 + 4],
        [1.0],
        -1.0,
        [0.0],
    )
    case(
        "negative-zero",
        "-0.0 - 0.0 = -0.0 and -0.0 + -0.0 = -0.0; -0.0 - -0.0 = 0.0 and -0.0 + 0.0 = 0.0; comparing values, as runners do, "
        "does not tell the two apart",
        [-0.0, -0.0],
        [0.0, -0.0],
        0.5,
        [-0.0, 0.0],
    )
    case("unchanged-entry", "the first entry stays, however far", [0.1, 2.0], [0.1, 1.0], 1024.0, [0.1, 1026.0])
    case(
        "beyond-the-dtype",
        "2^127 + 2 * 2^127 is more than float32 holds: infinite, where the caller lets infinities pass",
        [2.0**127, 2.0],
        [0.0, 1.0],
        2.0,
        [inf, 4.0],
    )
    h.case(
        "axes",
        "four axes; tau = (2, 0, -1, 4): the model and half of it",
        [[[[[3.0, 2.0]]], [[[-2.0, 4.0]]]]],
        [[[[1.0, 2.0]]], [[[-1.0, 0.0]]]],
        ("expo", {"alpha": 0.5}, [[[[4.0, 2.0]]], [[[-2.5, 6.0]]]], ""),
    )
    return h
