"""Vectors of nearswap."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64, sign

CODE = {
    "mergekit:nearswap": "mergekit 0.1.5 mergekit/merge_methods/nearswap.py:nearswap_merge",
}
FLAGS = {
    "nearswap-mergekit-04": ["NearswapFloor"],
}
PAPER = {
    "nearswap-mergekit-01": Paper({"t": 0.01}, comment="t is larger than 1e-6"),
}

STAGED = (
    "nearswap-near-and-far", "nearswap-zero-t", "nearswap-large-t", "nearswap-equal", "nearswap-floor",
    "nearswap-floor-of-near",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    (theta_1,), t = given.models, Fraction(given.params.get("t", 1e-4))
    tau = theta_1 - given.base
    theta = given.base + t * sign(tau)
    return {1: {"tau": tau}, 2: {"theta": theta}, 3: {"result": np.where(abs(tau) <= t, theta_1, theta)}}


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
    h.case("no-models", "nothing to swap with", [], [0.0], ("nearswap", {}, REFUSED, ""))
    h.case(
        "zeros",
        "t = 0: equal zeros are the model's, -0.0 first, and -0.0 + 0 * 1 is 0.0; comparing values, as runners do, does not "
        "tell the two apart",
        [[-0.0, 0.0, 1.0]],
        [0.0, -0.0, -0.0],
        ("nearswap", {"t": 0.0}, [-0.0, 0.0, 0.0], ""),
    )
    u = 2.0**-23
    h.case(
        "rounded-up-to-the-model",
        "float32, u = 2^-23: 1 + 3/4 u rounds to 1 + u, which is the model and not past it",
        [[1 + u]],
        [1.0],
        ("nearswap", {"t": 0.75 * u}, [1 + u], ""),
    )
    h.case(
        "less-than-half-an-ulp",
        "1 + 2^-25 is 1 in float32; 2^-2 + 2^-25 is a neighbour of 2^-2",
        [[2.0, 1.0]],
        [1.0, 0.25],
        ("nearswap", {"t": 2.0**-25}, [1.0, 0.25 + 2.0**-25], ""),
    )
    h.case(
        "sixteen-bits",
        "bfloat16, t = 1e-4: 1 + 1e-4 is rounded to 1, which its neighbour 2^-7 above does not draw nearer; 2^-14, beside "
        "2^-7, is less than t and swapped; 2^-12 is more, and 1e-4 of it is rounded to 2 of 2^-14",
        [[1 + 2.0**-7, 1.0, 2.0**-7 + 2.0**-14, 2.0**-7 + 2.0**-12]],
        [1.0, 1.0, 2.0**-7, 2.0**-7],
        ("nearswap", {}, [1.0, 1.0, 2.0**-7 + 2.0**-14, 2.0**-7 + 2.0**-13], ""),
        dtype="BF16",
    )
    h.case(
        "infinite-base",
        "inf - t = inf, towards 1 and towards -inf; inf - inf is NaN",
        [[1.0, -math.inf, math.inf]],
        [math.inf, math.inf, math.inf],
        ("nearswap", {"t": 0.25}, [math.inf, math.inf, math.nan], ""),
        flags="NearswapInfinity",
    )
    counted = [{"x": [3.0], "ids": i64(3, 4)}]
    for id, ids, expect in (
        ("integers-agree", i64(3, 4), {"x": [1.5], "ids": i64(3, 4)}),
        ("integers-differ", i64(3, 5), REFUSED),
    ):
        h.case(
            id,
            "equal integers are copied; 1 goes 1/2 towards 3",
            counted,
            {"x": [1.0], "ids": ids},
            ("nearswap", {"t": 0.5}, expect, ""),
            options={"integers": "equal"},
        )
    h.case(
        "infinite-t",
        "t infinite: all is near, also what equals the base, where infinity times 0 is NaN",
        [[1.0, -5.0, 2.0]],
        [1.0, 1.0, -(2.0**100)],
        ("nearswap", {"t": "Infinity"}, [1.0, -5.0, 2.0], ""),
    )
    h.case(
        "axes",
        "four axes, t 1: 3 is near 2.5 and swapped; 8 goes to 7, towards 2, and -4 to -3, towards 0; 1 is the model's 1",
        [[[[[2.5, 2.0]]], [[[0.0, 1.0]]]]],
        [[[[3.0, 8.0]]], [[[-4.0, 1.0]]]],
        ("nearswap", {"t": 1.0}, [[[[2.5, 7.0]]], [[[-3.0, 1.0]]]], ""),
    )
    return h
