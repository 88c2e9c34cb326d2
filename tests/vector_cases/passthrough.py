"""Vectors of passthrough."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, Paper, i64

CODE = {
    "mergekit:passthrough": "mergekit 0.1.5 mergekit/merge_methods/passthrough.py:passthrough_merge_method",
}
PAPER = {
    "passthrough-mergekit-01": Paper({}, comment="no scale is a scale of 1"),
    "passthrough-mergekit-04": Paper({"scale": -1.5}, comment="where NaN and infinities are let pass"),
}

STAGED = ("passthrough-scaled", "passthrough-as-it-is", "passthrough-zero")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    return {1: {"result": Fraction(given.params.get("scale", 1.0)) * given.models[0]}}


def hand() -> Hand:
    h = Hand("passthrough", CODE)

    def both(scale: float | None, expect: Any) -> list[Any]:
        ours = {} if scale is None else {"scale": scale}
        return [("passthrough", ours, expect, ""), ("mergekit:passthrough", {"scale": [scale]}, expect, "")]

    h.case("scaled", "times -1/2", [[4, -3, 2, -1, 0.5, 6]], None, *both(-0.5, [-2, 1.5, -1, 0.5, -0.25, -3]))
    h.case("as-it-is", "times 1, -0.0 included", [[4, -0.0, 2.0**-149]], None, *both(None, [4, -0.0, 2.0**-149]))
    h.case("zero", "times 0", [[4, 3]], None, *both(0.0, [0, 0]))
    h.case(
        "shapes",
        "a number, nothing, and a matrix",
        [{"n": 3.0, "e": [], "m": [[1, 2], [3, 4]]}],
        None,
        *both(2.0, {"n": 6.0, "e": [], "m": [[2, 4], [6, 8]]}),
    )
    h.case("not-finite", "times -3/2", [[1, math.inf, math.nan]], None, *both(-1.5, [-1.5, -math.inf, math.nan]))
    h.case("zero-times-infinity", "0 times infinity is NaN", [[1, math.inf]], None, *both(0.0, [0, math.nan]))
    h.case("two-models", "one model", [[1.0], [2.0]], None, ("passthrough", {}, REFUSED, ""))
    h.case(
        "rounds-scale",
        "float32: 0.1 is 13421773 / 2^27; 9 times that, 120795957 / 2^27, is rounded to a multiple of 8 / 2^27, 120795960 / "
        "2^27. Nine tenths would be 120795955.2 / 2^27, and round to 120795952",
        [[9.0]],
        None,
        ("passthrough", {"scale": 0.1}, [120795960 / 2**27], "the number is rounded before"),
    )
    h.case(
        "negative-zeros",
        "0 * -3 = -0.0; comparing values, as runners do, does not tell it from 0.0",
        [[-3.0, 4.0]],
        None,
        ("passthrough", {"scale": 0.0}, [-0.0, 0.0], ""),
    )
    h.case(
        "beyond-the-dtype",
        "2 * 2^127 = 2^128 is more than float32 holds: infinite, where the caller lets infinities pass",
        [[2.0**127, 1.0]],
        None,
        ("passthrough", {"scale": 2.0}, [math.inf, 2.0], ""),
    )
    h.case(
        "integers",
        "2 * 1.5 = 3; integers are copied",
        [{"x": [1.5], "ids": i64(3, 4)}],
        None,
        ("passthrough", {"scale": 2.0}, {"x": [3.0], "ids": i64(3, 4)}, ""),
    )
    h.case("no-models", "nothing to pass on", [], None, ("passthrough", {}, REFUSED, ""))
    h.case(
        "axes",
        "four axes: half of each entry",
        [[[[[2.0, -4.0]]], [[[6.0, 1.0]]]]],
        None,
        ("passthrough", {"scale": 0.5}, [[[[1.0, -2.0]]], [[[3.0, 0.5]]]], ""),
    )
    return h
