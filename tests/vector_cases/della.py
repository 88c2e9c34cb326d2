"""Vectors of della."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, i64, sign
from vector_cases.ties import agreeing_mean

CODE = {
    "official:della": "declare-lab/della@8067515 mergekit/mergekit/sparsify.py:rank_magnitude",
}
FLAGS = {
    "della-official-00": ["DellaWindow"],
    "della-mergekit-01": ["DellaRescaleL1", "DellaWeightsElect"],
    "della-mergekit-04": ["DellaDensityZero", "DellaRescaleL1", "DellaWeightsElect"],
    "della-mergekit-bf16-01": ["DellaRescaleL1", "DellaWeightsElect"],
}
PAPER = {
    "della-official-00": Paper(
        {"density": 0.7, "epsilon": 0.07, "lambda_": 1.1}, comment="weights of 1 are none; no sum is exactly zero"
    ),
    "della-official-06": Paper({"density": 1.0, "lambda_": 1.0}, comment="nothing is dropped"),
}

STAGED = (
    "della-rescale", "della-no-rescale", "della-window", "della-rows", "della-ties", "della-elect-and-fuse", "della-weights",
    "della-zero-sum", "della-density-one", "della-certain", "della-epsilon-zero", "della-zero-entry",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    delta = [theta - given.base for theta in given.models]
    density, epsilon = given.each("density", 0.7), given.each("epsilon", 0.07)
    masks = given.masks or [None] * len(delta)
    dropped = [
        drop(*of_model, rescale=given.params.get("rescale", True)) for of_model in zip(delta, masks, density, epsilon)
    ]
    gamma = sign(sum(dropped))
    return {
        1: {"delta": delta},
        2: {"delta": dropped},
        3: {"gamma": gamma},
        4: {"result": given.base + Fraction(given.params.get("lambda_", 1.1)) * agreeing_mean(dropped, gamma)},
    }


def drop(delta: Any, mask: Any, density: Fraction, epsilon: Fraction, rescale: bool) -> Any:
    if density in (0, 1):
        return density * delta
    q = np.full(delta.shape, density, object)
    for row, of_row in zip(delta.reshape(-1, delta.shape[-1]), q.reshape(-1, delta.shape[-1])):
        ranked = sorted(range(row.size), key=lambda i: (abs(row[i]), i))
        for r, i in enumerate(ranked if row.size > 1 else ()):
            of_row[i] = (density - epsilon) + 2 * epsilon / (row.size - 1) * r
    return mask * delta / q if rescale else mask * delta


def hand() -> Hand:
    h = Hand("della", CODE)

    def plain(density: Any, epsilon: Any, **more: Any) -> dict[str, Any]:
        return {"density": density, "epsilon": epsilon, "lambda_": 1.0} | more

    def official(density: Any, window: float, **more: Any) -> dict[str, Any]:
        return {
            "weight": 1.0, "density": density, "window_size": window, "rescale": 1, "normalize": True, "lambda_": 1.0,
        } | more  # fmt: skip

    def mergekit(density: Any, epsilon: Any, **more: Any) -> dict[str, Any]:
        return {
            "weight": 1.0, "density": density, "epsilon": epsilon, "normalize": True, "rescale": True, "lambda_": 1.0,
        } | more  # fmt: skip

    steps = "density 1/2 and epsilon 1/4: a row of three stays with 1/4, 1/2, 3/4 by rank"
    h.case(
        "rescale",
        f"{steps}; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.25), [4.0, 0.0, 4.0], "1 / (1/4), 2 / (1/2)"),
        ("official:della", official(0.5, 0.5), [4.0, 0.0, 4.0], "the same"),
        ("mergekit:della", mergekit(0.5, 0.25), [2.0, 0.0, 4.0], "times |tau|_1 before over after, 6/3"),
        flags="DellaRescaleL1",
        masks=[[1, 0, 1]],
    )
    h.case(
        "no-rescale",
        f"{steps}; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.25, rescale=False), [1.0, 0.0, 2.0], ""),
        ("official:della", official(0.5, 0.5, rescale=0), [1.0, 0.0, 2.0], ""),
        ("mergekit:della", mergekit(0.5, 0.25, rescale=False), [1.0, 0.0, 2.0], ""),
        masks=[[1, 0, 1]],
    )
    h.case(
        "window",
        "tau = (3, 4, 5), all kept with 3/8, 1/2, 5/8: 1/2 +- 1/8, a window 1/4 wide",
        [[3.0, 4.0, 5.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.125), [8.0, 8.0, 8.0], "3 / (3/8), 4 / (1/2), 5 / (5/8)"),
        ("official:della", official(0.5, 0.25), [8.0, 8.0, 8.0], "the parameter is the whole window"),
        flags="DellaWindow",
        masks=[[1, 1, 1]],
    )
    h.case(
        "rows",
        "density 1/2, epsilon 1/4, rows (3, 1) and (1, -3): 3/4 and 1/4 for the larger and the smaller of each row",
        [[[3.0, 1.0], [1.0, -3.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("della", plain(0.5, 0.25), [[4.0, 4.0], [4.0, -4.0]], ""),
        ("official:della", official(0.5, 0.5), [[4.0, 4.0], [4.0, -4.0]], ""),
        masks=[[[1, 1], [1, 1]]],
    )
    h.case(
        "many-axes",
        "density 1/2, epsilon 3/8, shape (1, 2, 2): one row (1, 3, 5, 7), kept with 1/8, 3/8, 5/8, 7/8",
        [[[[1.0, 3.0], [5.0, 7.0]]]],
        [[[0.0, 0.0], [0.0, 0.0]]],
        ("della", plain(0.5, 0.375), [[[8.0, 8.0], [8.0, 8.0]]], ""),
        (
            "mergekit:della",
            mergekit(0.5, 0.375),
            [[[1.0, 3.0], [5.0, 7.0]]],
            "ranks (1, 5) and (3, 7) along axis 1; which it keeps depends on that, what it makes of them does not",
        ),
        ("official:della", official(0.5, 0.75), OPEN, "its loop over rows fails beyond two axes"),
        flags="DellaManyAxes",
        masks=[[[[1, 1], [1, 1]]]],
    )
    h.case(
        "one-column",
        "rows of one entry, 3 kept and 1 dropped",
        [[[3.0], [1.0]]],
        [[0.0], [0.0]],
        ("della", plain(0.5, 0.25), [[6.0], [0.0]], "kept with 1/2, whatever epsilon"),
        ("official:della", official(0.5, 0.5), OPEN, "(rank - 1) / (1 - 1): its draw fails for NaN"),
        ("mergekit:della", mergekit(0.5, 0.25), OPEN, "(rank - 1) / (1 - 1): its draw fails for NaN"),
        flags="DellaOneColumn",
        masks=[[[1], [0]]],
    )
    h.case(
        "ties",
        "density 1/2, epsilon 1/4, tau = (3, 3), both kept",
        [[3.0, 3.0]],
        [0.0, 0.0],
        ("della", plain(0.5, 0.25), [12.0, 4.0], "the lower index ranks lower: 3 / (1/4), 3 / (3/4)"),
        ("official:della", official(0.5, 0.5), OPEN, "the sort may rank them either way"),
        flags="DellaTies",
        masks=[[1, 1]],
    )
    h.case(
        "elect-and-fuse",
        f"base 1; {steps}; tau = (1, -3, 2), all kept, and (-6, -2, 4), the last dropped: (4, -4, 4), (-8, -8, 0); "
        "signs - - +; 1 + (-8, -12/2, 4) / 2",
        [[2.0, -2.0, 3.0], [-5.0, -1.0, 5.0]],
        [1.0] * 3,
        ("della", plain(0.5, 0.25, lambda_=0.5), [-3.0, -2.0, 3.0], ""),
        ("official:della", official(0.5, 0.5, lambda_=0.5), [-3.0, -2.0, 3.0], ""),
        masks=[[1, 1, 1], [1, 1, 0]],
    )
    h.case(
        "weights",
        "tau = 4 and -6, nothing dropped",
        [[4.0], [-6.0]],
        [0.0],
        ("della", plain(1.0, 0.0), [-6.0], "no weights: - is heavier"),
        ("official:della", official(1.0, 0.0, weight=[2.0, 1.0]), [4.0], "8 against 6: +, and 8/2"),
        ("mergekit:della", mergekit(1.0, 0.0, weight=[2.0, 1.0]), [4.0], "8 against 6: +, and 8/2"),
        flags="DellaWeightsElect",
    )
    h.case(
        "zero-sum",
        "base 1, tau = 3 and -3, nothing dropped",
        [[4.0], [-2.0]],
        [1.0],
        ("della", plain(1.0, 0.0), [1.0], "no sign is elected: the base"),
        ("official:della", official(1.0, 0.0), [4.0], "a sum of zero elects +"),
        ("mergekit:della", mergekit(1.0, 0.0), [4.0], "a sum of zero elects +"),
        flags="DellaZeroSumSign",
    )
    h.case(
        "density-zero",
        "every entry is dropped",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("della", plain(0.0, 0.25), [1.0, 2.0], "the base, and epsilon is not looked at"),
        ("mergekit:della", mergekit(0.0, 0.25), [1.0, 2.0], "the base"),
        ("official:della", official(0.0, 0.0), REFUSED, "0 / 0, and an assertion fails"),
        flags="DellaDensityZero",
        masks=[[0, 0]],
    )
    h.case(
        "density-one",
        "nothing is dropped, nothing is drawn: 1 + (3 - 1) = 3, 2 + (-1 - 2) = -1",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("della", plain(1.0, 0.5), [3.0, -1.0], "epsilon is not looked at"),
        ("official:della", official(1.0, 1.0), [3.0, -1.0], ""),
        ("mergekit:della", mergekit(1.0, 0.5), [3.0, -1.0], ""),
    )
    h.case(
        "certain",
        "density 3/4 and epsilon 1/4: 1/2, 3/4, and the largest of the row for certain; tau = (1, 3, 5), all kept",
        [[1.0, 3.0, 5.0]],
        [0.0] * 3,
        ("della", plain(0.75, 0.25), [2.0, 4.0, 5.0], ""),
        ("official:della", official(0.75, 0.5), [2.0, 4.0, 5.0], "a warning is printed"),
        ("mergekit:della", mergekit(0.75, 0.25), REFUSED, "density + epsilon must be below 1"),
        flags="DellaOutsideWindow",
        masks=[[1, 1, 1]],
    )
    for id, density, epsilon, why in (
        ("window-too-low", 0.25, 0.25, "the smallest entry would never stay"),
        ("window-too-high", 0.875, 0.25, "a probability of 9/8"),
    ):
        h.case(
            id,
            why,
            [[1.0, 2.0]],
            [0.0, 0.0],
            ("della", plain(density, epsilon), REFUSED, ""),
            ("official:della", official(density, 2 * epsilon), REFUSED, "a warning is printed, and then its code fails"),
            ("mergekit:della", mergekit(density, epsilon), REFUSED, ""),
            flags="DellaOutsideWindow",
        )
    h.case(
        "empty-and-scalar",
        "a number is a row of one: 1 + (3 - 1) / (1/2) = 5; the scalar t is dropped",
        [{"e": [], "s": 3.0, "t": 3.0}],
        {"e": [], "s": 1.0, "t": 1.0},
        ("della", plain(0.5, 0.25), {"e": [], "s": 5.0, "t": 1.0}, ""),
        masks=[{"e": [], "s": 1, "t": 0}],
    )
    h.case(
        "epsilon-negative",
        "small entries would stay more often than large ones",
        [[1.0, 2.0]],
        [0.0, 0.0],
        ("della", plain(0.5, -0.25), REFUSED, ""),
        masks=[[1, 1]],
    )
    h.case("density-negative", "probability -1/4", [[1.0]], [0.0], ("della", plain(-0.25, 0.0), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("della", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("della", {}, REFUSED, ""))
    h.case(
        "defaults",
        "density 0.7 and epsilon 0.07: q = 0.63 and 0.77, 6.3 / 0.63 = 7.7 / 0.77 = 10; lambda is 1.1",
        [[6.3, 7.7]],
        [0.0, 0.0],
        ("della", {}, [11.0, 11.0], ""),
        masks=[[1, 1]],
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "negative-probability",
        "1/4 - 1/2 is no probability",
        [[1.0, 2.0]],
        [0.0, 0.0],
        ("della", plain(0.25, 0.5), REFUSED, ""),
        masks=[[1, 1]],
    )
    h.case(
        "epsilon-zero",
        "density 1/2 and epsilon 0: every entry stays with 1/2; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.0), [2.0, 0.0, 4.0], "as in DARE"),
        masks=[[1, 0, 1]],
    )
    h.case(
        "zero-entry",
        f"{steps}; tau = (2, 0, 3), all kept: the zero has the lowest rank",
        [[3.0, 1.0, 4.0]],
        [1.0] * 3,
        ("della", plain(0.5, 0.25), [5.0, 1.0, 5.0], "1 + 2 / (1/2), 1 + 0 / (1/4), 1 + 3 / (3/4)"),
        masks=[[1, 1, 1]],
    )
    h.case(
        "zero-row",
        f"{steps}; rows (0, 0, 0) and (3, 1, 2), all kept",
        [[[1.0, 1.0, 1.0], [4.0, 2.0, 3.0]]],
        [[1.0] * 3] * 2,
        ("della", plain(0.5, 0.25), [[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]], "0 / q is 0"),
        masks=[[[1, 1, 1], [1, 1, 1]]],
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[2.0]],
        [-0.0],
        ("della", plain(0.0, 0.0), [0.0], ""),
        masks=[[0]],
    )
    h.case(
        "nan-ranks-highest",
        f"{steps}; tau = (inf, NaN, 1), all kept: 1 has the lowest rank",
        [[math.inf, math.nan, 1.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.25), [math.inf, math.nan, 4.0], "1 / (1/4)"),
        masks=[[1, 1, 1]],
    )
    h.case(
        "dropped-infinity",
        f"{steps}; tau = (inf, NaN, 1), all dropped",
        [[math.inf, math.nan, 1.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.25), [math.nan, math.nan, 0.0], "0 times infinity, 0 times NaN"),
        masks=[[0, 0, 0]],
    )
    h.case(
        "nan-at-density-zero",
        "tau = (NaN, inf) and (2, 3), densities 0 and 1: the first model is 0, and not 0 times anything",
        [[math.nan, math.inf], [2.0, 3.0]],
        [0.0, 0.0],
        ("della", plain([0.0, 1.0], 0.0), [2.0, 3.0], ""),
    )
    h.case(
        "integers",
        "0 + (3 - 0) = 3; the integers are the base's",
        [{"x": [3.0], "ids": i64(1, 2)}],
        {"x": [0.0], "ids": i64(1, 2)},
        ("della", plain(1.0, 0.0), {"x": [3.0], "ids": i64(1, 2)}, ""),
    )
    h.case(
        "equal-models",
        "q = 1/2; delta = (2, -4) twice, kept as (4, 0) and (4, -8): the mean of 4 and 4, and -8 alone",
        [[2.0, -4.0]] * 2,
        [0.0, 0.0],
        ("della", {"density": 0.5, "epsilon": 0.0, "lambda_": 1.0}, [4.0, -8.0], ""),
        masks=[[1, 0], [1, 1]],
    )
    h.case(
        "float64",
        "tau = (1 + 2^-30, 2, -1) in float64, of which the first two stay",
        [[1.0 + 2.0**-30, 2.0, -1.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.25, rescale=False), [1.0 + 2.0**-30, 2.0, 0.0], ""),
        ("mergekit:della", mergekit(0.5, 0.25, rescale=False), [1.0, 2.0, 0.0], "1 in float32"),
        flags="DellaFloat32",
        masks=[[1, 1, 0]],
        dtype="F64",
    )
    return h
