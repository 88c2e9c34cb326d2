"""Vectors of della_linear."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, i64
from vector_cases.della import drop

CODE = {
    "official:della": "declare-lab/della@8067515 mergekit/mergekit/sparsify.py:rank_magnitude",
}
FLAGS = {
    "della_linear-mergekit-01": ["DellaRescaleL1"],
    "della_linear-mergekit-04": ["DellaRescaleL1"],
    "della_linear-mergekit-bf16-01": ["DellaRescaleL1"],
}

STAGED = tuple(
    f"della_linear-{id}"
    for id in (
        "rescale", "no-rescale", "rows", "sum", "one-column", "ties", "no-election", "normalize", "density-zero",
        "density-one", "certain", "epsilon-zero", "zero-entry",
    )
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    delta = [theta - given.base for theta in given.models]
    density, epsilon = given.each("density", 0.7), given.each("epsilon", 0.07)
    masks = given.masks or [None] * len(delta)
    dropped = [
        drop(*of_model, rescale=given.params.get("rescale", True)) for of_model in zip(delta, masks, density, epsilon)
    ]
    merged = sum(w * x for w, x in zip(given.each("weight", 1.0), dropped))
    result = given.base + Fraction(given.params.get("lambda_", 1.0)) * merged
    return {1: {"delta": delta}, 2: {"delta": dropped}, 3: {"result": result}}


def hand() -> Hand:
    h = Hand("della_linear", CODE)

    def plain(density: Any, epsilon: Any, **more: Any) -> dict[str, Any]:
        return {"density": density, "epsilon": epsilon} | more

    def mergekit(density: Any, epsilon: Any, **more: Any) -> dict[str, Any]:
        return {
            "weight": 1.0, "density": density, "epsilon": epsilon, "normalize": False, "rescale": True, "lambda_": 1.0,
        } | more  # fmt: skip

    steps = "density 1/2 and epsilon 1/4: a row of three stays with 1/4, 1/2, 3/4 by rank"
    h.case(
        "rescale",
        f"{steps}; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della_linear", plain(0.5, 0.25), [4.0, 0.0, 4.0], "1 / (1/4), 2 / (1/2)"),
        ("mergekit:della_linear", mergekit(0.5, 0.25), [2.0, 0.0, 4.0], "times |tau|_1 before over after, 6/3"),
        flags="DellaRescaleL1",
        masks=[[1, 0, 1]],
    )
    h.case(
        "no-rescale",
        f"{steps}; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della_linear", plain(0.5, 0.25, rescale=False), [1.0, 0.0, 2.0], ""),
        ("mergekit:della_linear", mergekit(0.5, 0.25, rescale=False), [1.0, 0.0, 2.0], ""),
        masks=[[1, 0, 1]],
    )
    h.case(
        "rows",
        "density 1/2, epsilon 1/4, rows (3, 1) and (1, -3): 3/4 and 1/4 for the larger and the smaller of each row",
        [[[3.0, 1.0], [1.0, -3.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("della_linear", plain(0.5, 0.25), [[4.0, 4.0], [4.0, -4.0]], ""),
        masks=[[[1, 1], [1, 1]]],
    )
    h.case(
        "sum",
        f"base 1; {steps}; tau = (1, -3, 2), all kept, and (-6, -2, 4), the last dropped: (4, -4, 4), (-8, -8, 0); with "
        "weights 1/2 and 1/4 they add up to (0, -4, 2), of which half is added",
        [[2.0, -2.0, 3.0], [-5.0, -1.0, 5.0]],
        [1.0] * 3,
        ("della_linear", plain(0.5, 0.25, weight=[0.5, 0.25], lambda_=0.5), [1.0, -1.0, 2.0], ""),
        masks=[[1, 1, 1], [1, 1, 0]],
    )
    h.case(
        "many-axes",
        "density 1/2, epsilon 3/8, shape (1, 2, 2): one row (1, 3, 5, 7), kept with 1/8, 3/8, 5/8, 7/8",
        [[[[1.0, 3.0], [5.0, 7.0]]]],
        [[[0.0, 0.0], [0.0, 0.0]]],
        ("della_linear", plain(0.5, 0.375), [[[8.0, 8.0], [8.0, 8.0]]], ""),
        (
            "mergekit:della_linear",
            mergekit(0.5, 0.375),
            [[[1.0, 3.0], [5.0, 7.0]]],
            "ranks (1, 5) and (3, 7) along axis 1; which it keeps depends on that, what it makes of them does not",
        ),
        flags="DellaManyAxes",
        masks=[[[[1, 1], [1, 1]]]],
    )
    h.case(
        "one-column",
        "rows of one entry, 3 kept and 1 dropped",
        [[[3.0], [1.0]]],
        [[0.0], [0.0]],
        ("della_linear", plain(0.5, 0.25), [[6.0], [0.0]], "kept with 1/2, whatever epsilon"),
        ("mergekit:della_linear", mergekit(0.5, 0.25), OPEN, "(rank - 1) / (1 - 1): its draw fails for NaN"),
        flags="DellaOneColumn",
        masks=[[[1], [0]]],
    )
    h.case(
        "ties",
        "density 1/2, epsilon 1/4, tau = (3, 3), both kept",
        [[3.0, 3.0]],
        [0.0, 0.0],
        ("della_linear", plain(0.5, 0.25), [12.0, 4.0], "the lower index ranks lower: 3 / (1/4), 3 / (3/4)"),
        flags="DellaTies",
        masks=[[1, 1]],
    )
    h.case(
        "no-election",
        "tau = 4 and -6, nothing dropped",
        [[4.0], [-6.0]],
        [0.0],
        ("della_linear", plain(1.0, 0.0), [-2.0], "4 - 6"),
        ("mergekit:della_linear", mergekit(1.0, 0.0), [-2.0], "4 - 6"),
        ("official:della", {"weight": 1.0}, [-6.0], "its della_noelect is this too: - is heavier, and -6 is its mean"),
        flags="DellaNoElection",
    )
    h.case(
        "normalize",
        "tau = 4 and 8 with weights 1 and 3, nothing dropped",
        [[4.0], [8.0]],
        [0.0],
        ("della_linear", plain(1.0, 0.0, weight=[1.0, 3.0]), [28.0], "4 + 24"),
        (
            "mergekit:della_linear",
            mergekit(1.0, 0.0, weight=[1.0, 3.0], normalize=True),
            [7.0],
            "(4 + 24) / (1 + 3)",
        ),
        flags="DellaLinearNormalize",
    )
    h.case(
        "density-zero",
        "every entry is dropped",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("della_linear", plain(0.0, 0.25), [1.0, 2.0], "the base, and epsilon is not looked at"),
        ("mergekit:della_linear", mergekit(0.0, 0.25), [1.0, 2.0], "the base"),
        masks=[[0, 0]],
    )
    h.case(
        "density-one",
        "nothing is dropped, nothing is drawn: 1 + (3 - 1) = 3, 2 + (-1 - 2) = -1",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("della_linear", plain(1.0, 0.5), [3.0, -1.0], "epsilon is not looked at"),
        ("mergekit:della_linear", mergekit(1.0, 0.5), [3.0, -1.0], ""),
    )
    h.case(
        "certain",
        "density 3/4 and epsilon 1/4: 1/2, 3/4, and the largest of the row for certain; tau = (1, 3, 5), all kept",
        [[1.0, 3.0, 5.0]],
        [0.0] * 3,
        ("della_linear", plain(0.75, 0.25), [2.0, 4.0, 5.0], ""),
        ("mergekit:della_linear", mergekit(0.75, 0.25), REFUSED, "density + epsilon must be below 1"),
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
            ("della_linear", plain(density, epsilon), REFUSED, ""),
            ("mergekit:della_linear", mergekit(density, epsilon), REFUSED, ""),
            flags="DellaOutsideWindow",
        )
    h.case(
        "empty-and-scalar",
        "a number is a row of one: 1 + (3 - 1) / (1/2) = 5; the scalar t is dropped",
        [{"e": [], "s": 3.0, "t": 3.0}],
        {"e": [], "s": 1.0, "t": 1.0},
        ("della_linear", plain(0.5, 0.25), {"e": [], "s": 5.0, "t": 1.0}, ""),
        masks=[{"e": [], "s": 1, "t": 0}],
    )
    h.case("density-negative", "probability -1/4", [[1.0]], [0.0], ("della_linear", plain(-0.25, 0.0), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("della_linear", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("della_linear", {}, REFUSED, ""))
    h.case(
        "defaults",
        "density 0.7 and epsilon 0.07: q = 0.63 and 0.77, 6.3 / 0.63 = 7.7 / 0.77 = 10; weight and lambda are 1",
        [[6.3, 7.7]],
        [0.0, 0.0],
        ("della_linear", {}, [10.0, 10.0], ""),
        masks=[[1, 1]],
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "epsilon-zero",
        "each entry stays with 1/4, as in dare_linear; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della_linear", plain(0.25, 0.0), [4.0, 0.0, 8.0], ""),
        masks=[[1, 0, 1]],
    )
    h.case(
        "zero-entry",
        f"base 1; {steps}; tau = (3, 0, 2), of which 0 has the lowest rank: 3 / (3/4), 2 / (1/2), and 0 however",
        [[4.0, 1.0, 3.0]],
        [1.0] * 3,
        ("della_linear", plain(0.5, 0.25), [5.0, 1.0, 5.0], ""),
        masks=[[1, 1, 1]],
    )
    h.case(
        "zero-row",
        "density 1/2, epsilon 1/4, rows (0, 0) and (3, 1): zeros, and 3 / (3/4), 1 / (1/4)",
        [[[0.0, 0.0], [3.0, 1.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("della_linear", plain(0.5, 0.25), [[0.0, 0.0], [4.0, 4.0]], ""),
        masks=[[[1, 0], [1, 1]]],
    )
    h.case(
        "all-drop",
        "base 5; density 1/2, epsilon 1/4; tau = (1, 3), (6, 2): both drop the first and keep the second: 3 / (3/4), "
        "2 / (1/4)",
        [[6.0, 8.0], [11.0, 7.0]],
        [5.0, 5.0],
        ("della_linear", plain(0.5, 0.25), [5.0, 17.0], ""),
        masks=[[0, 1], [0, 1]],
    )
    h.case(
        "masks-not-looked-at",
        "tau = (2, 3) with density 1 and (4, 5) with density 0, and masks that say otherwise",
        [[2.0, 3.0], [4.0, 5.0]],
        [0.0, 0.0],
        ("della_linear", plain([1.0, 0.0], 0.0), [2.0, 3.0], "all of the first, nothing of the second"),
        masks=[[0, 1], [1, 0]],
    )
    h.case(
        "mask-missing",
        "tau = (2, 3) with density 1, and without a mask, and (4, 6) with density 1/2 and epsilon 1/4, keeping the "
        "second: 8",
        [[2.0, 3.0], [4.0, 6.0]],
        [0.0, 0.0],
        ("della_linear", plain([1.0, 0.5], 0.25), [2.0, 11.0], "the first needs none"),
        stats=[{}, {"x.mask": np.array([0, 1], np.uint8)}],
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0]],
        [-0.0],
        ("della_linear", plain(1.0, 0.0), [0.0], ""),
    )
    for id, bad in (("nan-ranks-highest", math.nan), ("infinity-ranks-high", math.inf)):
        h.case(
            id,
            f"{steps}; tau = ({bad}, 4, 1), all kept: 4 / (1/2), 1 / (1/4)",
            [[bad, 4.0, 1.0]],
            [0.0] * 3,
            ("della_linear", plain(0.5, 0.25), [bad, 8.0, 4.0], ""),
            masks=[[1, 1, 1]],
        )
    h.case(
        "nan-above-infinity",
        "density 3/4, epsilon 1/4; of three, the largest stays for certain, the next with 3/4; tau = (inf, NaN, 1), "
        "of which the last with 1/2",
        [[math.inf, math.nan, 1.0]],
        [0.0] * 3,
        ("della_linear", plain(0.75, 0.25), [math.inf, math.nan, 2.0], ""),
        masks=[[1, 1, 1]],
    )
    h.case(
        "dropped-infinity",
        f"{steps}; tau = (inf, NaN, 1), of which the first two are dropped: 0 times infinity and 0 times NaN are NaN; "
        f"1 / (1/4)",
        [[math.inf, math.nan, 1.0]],
        [0.0] * 3,
        ("della_linear", plain(0.5, 0.25), [math.nan, math.nan, 4.0], ""),
        ("della_linear", plain(0.0, 0.0), [0.0] * 3, "density 0 puts zeros in the place of the task vector"),
        masks=[[0, 0, 1]],
    )
    h.case(
        "infinities-of-both-signs",
        "tau = (inf, 1) and (-inf, 1), nothing dropped: inf - inf is NaN",
        [[math.inf, 1.0], [-math.inf, 1.0]],
        [0.0, 0.0],
        ("della_linear", plain(1.0, 0.0), [math.nan, 2.0], ""),
    )
    h.case(
        "integers",
        "1 + (3 - 1) / (1/2) = 5; integers are the base's",
        [{"x": [3.0], "ids": i64(3, 4)}],
        {"x": [1.0], "ids": i64(3, 4)},
        ("della_linear", plain(0.5, 0.25), {"x": [5.0], "ids": i64(3, 4)}, ""),
        stats=[{"x.mask": np.array([1], np.uint8)}],
    )
    h.case("epsilon-negative", "epsilon -1/4", [[1.0]], [0.0], ("della_linear", plain(0.5, -0.25), REFUSED, ""))
    h.case(
        "equal-models",
        "q = 1/2; delta = (2, -4) twice, kept as (4, 0) and (4, -8): added",
        [[2.0, -4.0]] * 2,
        [0.0, 0.0],
        ("della_linear", {"density": 0.5, "epsilon": 0.0, "lambda_": 1.0}, [8.0, -8.0], ""),
        masks=[[1, 0], [1, 1]],
    )
    h.case(
        "float64",
        "tau = (1 + 2^-30, 2, -1) in float64, of which the first two stay",
        [[1.0 + 2.0**-30, 2.0, -1.0]],
        [0.0] * 3,
        ("della_linear", plain(0.5, 0.25, rescale=False), [1.0 + 2.0**-30, 2.0, 0.0], ""),
        ("mergekit:della_linear", mergekit(0.5, 0.25, rescale=False), [1.0, 2.0, 0.0], "1 in float32"),
        flags="DellaFloat32",
        masks=[[1, 1, 0]],
        dtype="F64",
    )
    return h
