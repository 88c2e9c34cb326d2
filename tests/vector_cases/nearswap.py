"""Vectors of nearswap."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Hand, Paper

CODE = {
    "mergekit:nearswap": "mergekit 0.1.5 mergekit/merge_methods/nearswap.py:nearswap_merge",
}
FLAGS = {
    "nearswap-mergekit-04": ["NearswapFloor"],
}
PAPER = {
    "nearswap-mergekit-01": Paper({"t": 0.01}, comment="t is larger than 1e-6"),
}


def hand() -> Hand:
    h = Hand("nearswap", CODE)
    exact = {"dtype": "F64", "tolerance": 1e-14}

    def both(t: float, plain: Any, mergekit: Any = None, why: tuple[str, str] = ("", "")) -> list[Any]:
        mergekit = plain if mergekit is None else mergekit
        return [("nearswap", {"t": t}, plain, why[0]), ("mergekit:nearswap", {"t": t}, mergekit, why[1])]

    h.case(
        "near-and-far",
        "differences 1/4, -1/2, 0, 2, -1/8, -2: those up to t = 1/4 are swapped, the others are cut to 1/4",
        [[1.25, 0.5, 1, 3, 0.875, -1]],
        [1, 1, 1, 1, 1, 1],
        *both(0.25, [1.25, 0.75, 1, 1.25, 0.875, 0.75]),
        **exact,
    )
    h.case("zero-t", "t = 0: the base", [[1.25, 0.5]], [1, 1], *both(0.0, [1, 1]), **exact)
    h.case("large-t", "t = 8 swaps all", [[1.25, -5]], [1, 1], *both(8.0, [1.25, -5]), **exact)
    h.case("equal", "a model equal to the base", [[1, 2]], [1, 2], *both(0.5, [1, 2]), **exact)
    h.case(
        "shapes",
        "a number, nothing, and a matrix, entry by entry",
        [{"n": 3.0, "e": [], "m": [[1, 2], [3, 4]]}],
        {"n": 1.0, "e": [], "m": [[0, 2], [5, 4.5]]},
        *both(0.5, {"n": 1.5, "e": [], "m": [[0.5, 2], [4.5, 4]]}),
        **exact,
    )
    h.case(
        "rounded-difference",
        "float32: 2^24 + 2 - 1 is rounded to 2^24 = t, and is near; the step would end at 2^24 + 1, rounded to 2^24",
        [[2.0**24 + 2]],
        [1.0],
        ("nearswap", {"t": 2.0**24}, [2.0**24 + 2], "the model's"),
    )
    t, difference = 2.0**-22, 2.0**-21
    h.case(
        "floor",
        "difference 2^-21 = 4.8e-7, t = 2^-22",
        [[difference]],
        [0],
        *both(t, [t], [t / 1e-6 * difference], ("a step of t", "the difference counts as 1e-6: t / 1e-6 of it")),
        flags="NearswapFloor",
        **exact,
    )
    h.case(
        "floor-of-near",
        "difference 2^-23 = 1.2e-7, t = 2^-22",
        [[difference / 4]],
        [0],
        *both(t, [difference / 4], [t / 1e-6 * difference / 4], ("swapped", "t / 1e-6 = 0.24 of it")),
        flags="NearswapFloor",
        **exact,
    )
    h.case(
        "negative-t",
        "t = -1",
        [[2, 0]],
        [1, 1],
        *both(-1.0, REFUSED, [1, 1], ("", "a share of 0: the base")),
        flags="NearswapNegativeT",
        **exact,
    )
    h.case(
        "infinity",
        "base 1, model infinite",
        [[math.inf, -math.inf]],
        [1, 1],
        *both(0.25, [1.25, 0.75], [math.nan, math.nan], ("a step of t", "0 times infinity")),
        flags="NearswapInfinity",
        **exact,
    )
    h.case(
        "nan",
        "NaN on either side makes NaN of the entry",
        [[math.nan, 1, 2]],
        [1, math.nan, 1],
        *both(0.25, [math.nan, math.nan, 1.25]),
        **exact,
    )
    h.case("no-base", "what is near is seen from the base", [[1.0]], None, ("nearswap", {}, REFUSED, ""))
    h.case("two-models", "one after another", [[1.0], [2.0]], [0.0], ("nearswap", {}, REFUSED, ""))
    h.case(
        "defaults",
        "2^-16 is less than 1e-4 and is taken, 1 is not",
        [[1.0 + 2.0**-16, 2.0]],
        [1.0, 1.0],
        ("nearswap", {}, [1.0 + 2.0**-16, 1.0001], "t is 1e-4 by default"),
        dtype="F64",
        tolerance=1e-14,
    )
    return h
