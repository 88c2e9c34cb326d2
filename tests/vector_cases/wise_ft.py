"""Vectors of wise_ft."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, Paper, i64

CODE = {
    "official:wise_ft": "mlfoundations/wise-ft@58b7a4b src/wise_ft.py:_merge",
}
FLAGS = {
    "wise_ft-official-03": ["WiseFtExtrapolates"],
}
PAPER = {
    "wise_ft-official-00": Paper({}),
    "wise_ft-official-03": Paper({"alpha": 1.5}),
}

STAGED = ("wise_ft-half", "wise_ft-quarter", "wise_ft-extrapolates", "wise_ft-extrapolates-back", "wise_ft-lerp-form")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    alpha = Fraction(given.params.get("alpha", 0.5))
    return {1: {"result": (1 - alpha) * given.base + alpha * given.models[0]}}


def hand() -> Hand:
    h = Hand("wise_ft", CODE)
    h.case(
        "half",
        "(2 + 6) / 2 = 4, (8 - 8) / 2 = 0",
        [[6, -8]],
        [2, 8],
        ("wise_ft", {}, [4, 0], "alpha is 1/2 by default"),
        ("official:wise_ft", {"alpha": 0.5}, [4, 0], ""),
    )
    h.case("quarter", "3/4 * 8 + 1/4 * 4 = 7", [[4.0]], [8.0], ("wise_ft", {"alpha": 0.25}, [7.0], ""))
    h.case(
        "lerp-form",
        "float32, alpha 1: x + (y - x) would be 2^25 + (1 - 2^25) = 0, since 1 - 2^25 rounds",
        [[1.0, 4.0]],
        [2.0**25, 2.0],
        ("wise_ft", {"alpha": 1.0}, [1.0, 4.0], "0 * x + 1 * y is y exactly"),
        ("official:wise_ft", {"alpha": 1.0}, [1.0, 4.0], ""),
        flags="WiseFtLerpForm",
    )
    h.case(
        "alpha-zero",
        "1 * x + 0 * y is x",
        [[1.0, -4.0]],
        [2.0**25, 2.0],
        ("wise_ft", {"alpha": 0.0}, [2.0**25, 2.0], ""),
    )
    h.case(
        "extrapolates",
        "-1/2 * 2 + 3/2 * 4 = 5",
        [[4.0]],
        [2.0],
        ("wise_ft", {"alpha": 1.5}, [5.0], ""),
        ("official:wise_ft", {"alpha": 1.5}, [5.0], ""),
        flags="WiseFtExtrapolates",
    )
    h.case(
        "extrapolates-back",
        "3/2 * 2 - 1/2 * 4 = 1",
        [[4.0]],
        [2.0],
        ("wise_ft", {"alpha": -0.5}, [1.0], ""),
        flags="WiseFtExtrapolates",
    )
    buffers, base = [{"x": [3.0], "n": i64(9)}], {"x": [1.0], "n": i64(8)}
    h.case(
        "integers-base",
        "(1 + 3) / 2 = 2; the integer tensor stays the base's",
        buffers,
        base,
        ("wise_ft", {}, {"x": [2.0], "n": i64(8)}, "asked for by the caller; the official code gives 8.5, a float"),
        flags="WiseFtIntegerBuffers",
    )
    h.case(
        "integers-differ",
        "8 in the base, 9 in the model: the official code gives 8.5",
        buffers,
        base,
        ("wise_ft", {}, REFUSED, "a counter has no mean that is one of its values"),
        flags="WiseFtIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "shapes",
        "0-d and empty: (1 + 3) / 2",
        [{"s": 3.0, "e": []}],
        {"s": 1.0, "e": []},
        ("wise_ft", {}, {"s": 2.0, "e": []}, ""),
        dtype="F64",
    )
    h.case("tensor-missing", "the model lacks y", [{"x": [1.0]}], {"x": [1.0], "y": [1.0]}, ("wise_ft", {}, REFUSED, ""))
    h.case("no-base", "one end is missing", [[1.0]], None, ("wise_ft", {}, REFUSED, ""))
    h.case("two-models", "a line has two ends", [[1.0], [2.0]], [0.0], ("wise_ft", {}, REFUSED, ""))
    h.case(
        "agreeing-rounded",
        "float64: 1 - 0.1 is 0.9; 0.9 * 13 is 11.700000000000001, 0.1 * 13 is 1.3, and their sum lies half an ulp above 13",
        [[13.0]],
        [13.0],
        ("wise_ft", {"alpha": 0.1}, [13.000000000000002], "theta_0 + alpha (theta_1 - theta_0) would be 13"),
        flags="WiseFtLerpForm",
        dtype="F64",
    )
    h.case(
        "negative-zero",
        "1 * -0.0 + 0 * 1 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[1.0]],
        [-0.0],
        ("wise_ft", {"alpha": 0.0}, [0.0], ""),
    )
    h.case(
        "infinity",
        "alpha 0: 0 * inf is NaN, and an infinity of the base stays",
        [[math.inf, 1.0, math.nan]],
        [1.0, math.inf, 1.0],
        ("wise_ft", {"alpha": 0.0}, [math.nan, math.inf, math.nan], "x + 0 (y - x) would be NaN there, too"),
        flags="WiseFtLerpForm",
    )
    h.case(
        "infinities-of-both-signs",
        "alpha 1/2: inf and 1 make inf, inf and -inf make NaN",
        [[math.inf, math.inf]],
        [1.0, -math.inf],
        ("wise_ft", {}, [math.inf, math.nan], ""),
    )
    h.case(
        "axes",
        "four axes: (2 + 6) / 2, (4 + 0) / 2, (0 + 2) / 2, (8 - 8) / 2",
        [[[[[6.0, 0.0]]], [[[2.0, -8.0]]]]],
        [[[[2.0, 4.0]]], [[[0.0, 8.0]]]],
        ("wise_ft", {}, [[[[4.0, 2.0]]], [[[1.0, 0.0]]]], ""),
    )
    return h
