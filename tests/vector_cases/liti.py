"""Vectors of liti."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, i64

STAGED = ("liti-quarter", "liti-weighted-up", "liti-beyond", "liti-before", "liti-form")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    eta = Fraction(given.params["eta"])
    return {1: {"result": (1 - eta) * given.base + eta * given.models[0]}}


def hand() -> Hand:
    h = Hand("liti", {})
    h.case(
        "quarter",
        "3/4 * 1 + 1/4 * 5 = 2, 3/4 * -4 + 1/4 * 8 = -1; towards the merge itself the result would be (5, 8)",
        [[5, 8]],
        [1, -4],
        ("liti", {"eta": 0.25}, [2, -1], ""),
        flags="LitiOverwritten",
    )
    h.case("weighted-up", "1/4 * 8 + 3/4 * 4 = 5", [[4.0]], [8.0], ("liti", {"eta": 0.75}, [5.0], ""))
    h.case(
        "default",
        "float64: 0.3 of 10 is 3, and 0.7 of 0 nothing",
        [[10.0]],
        [0.0],
        ("liti", {}, [3.0], "eta is 0.3 by default"),
        dtype="F64",
    )
    h.case(
        "form",
        "float32, eta 1: x + (y - x) would be 2^25 + (1 - 2^25) = 0, since 1 - 2^25 rounds",
        [[1.0, 4.0]],
        [2.0**25, 2.0],
        ("liti", {"eta": 1.0}, [1.0, 4.0], "0 * x + 1 * y is y exactly"),
    )
    h.case("eta-zero", "1 * x + 0 * y is x", [[1.0, -4.0]], [2.0**25, 2.0], ("liti", {"eta": 0.0}, [2.0**25, 2.0], ""))
    h.case("beyond", "-1/2 * 1 + 3/2 * 5 = 7", [[5.0]], [1.0], ("liti", {"eta": 1.5}, [7.0], ""))
    h.case("before", "5/4 * 1 - 1/4 * 5 = 0", [[5.0]], [1.0], ("liti", {"eta": -0.25}, [0.0], ""))
    h.case(
        "unchanged",
        "1/2 of 3 and 1/2 of 3, 1/2 of -7 and 1/2 of -7",
        [[3.0, -7.0]],
        [3.0, -7.0],
        ("liti", {"eta": 0.5}, [3.0, -7.0], ""),
    )
    h.case("two-merges", "a line has two ends", [[1.0], [2.0]], [0.0], ("liti", {}, REFUSED, ""))
    h.case("no-base", "one end is missing", [[1.0]], None, ("liti", {}, REFUSED, ""))
    h.case("tensor-missing", "the merge lacks y", [{"x": [1.0]}], {"x": [1.0], "y": [1.0]}, ("liti", {}, REFUSED, ""))
    h.case(
        "shapes",
        "(1 + 3) / 2 = 2 in a number; of four axes (0 + 2) / 2, (4 + 0) / 2, (2 + 6) / 2 and (1 + 1) / 2; and nothing",
        [{"s": 3.0, "e": [], "conv": [[[[2.0, 0.0]], [[6.0, 1.0]]]]}],
        {"s": 1.0, "e": [], "conv": [[[[0.0, 4.0]], [[2.0, 1.0]]]]},
        ("liti", {"eta": 0.5}, {"s": 2.0, "e": [], "conv": [[[[1.0, 2.0]], [[4.0, 1.0]]]]}, ""),
    )
    h.case(
        "infinity",
        "eta 0: 0 * inf is NaN, and an infinity of the initialisation stays",
        [[math.inf, 1.0, math.nan]],
        [1.0, math.inf, 1.0],
        ("liti", {"eta": 0.0}, [math.nan, math.inf, math.nan], ""),
    )
    buffers, base = [{"x": [5.0], "n": i64(9)}], {"x": [1.0], "n": i64(8)}
    h.case(
        "integers-base",
        "1/2 * 1 + 1/2 * 5 = 3; the integer tensor stays the initialisation's",
        buffers,
        base,
        ("liti", {"eta": 0.5}, {"x": [3.0], "n": i64(8)}, "asked for by the caller"),
    )
    h.case(
        "integers-differ",
        "8 in the initialisation, 9 in the merge",
        buffers,
        base,
        ("liti", {}, REFUSED, "a counter has no mean that is one of its values"),
        options={"integers": "equal"},
    )
    return h
