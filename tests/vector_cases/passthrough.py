"""Vectors of passthrough."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Hand, Paper

CODE = {
    "mergekit:passthrough": "mergekit 0.1.5 mergekit/merge_methods/passthrough.py:passthrough_merge_method",
}
PAPER = {
    "passthrough-mergekit-01": Paper({}, comment="no scale is a scale of 1"),
    "passthrough-mergekit-04": Paper({"scale": -1.5}, comment="where NaN and infinities are let pass"),
}


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
    return h
