"""Vectors of della_linear."""

from __future__ import annotations

from typing import Any

from vector_cases import OPEN, REFUSED, Hand

CODE = {
    "official:della": "declare-lab/della@8067515 mergekit/mergekit/sparsify.py:rank_magnitude",
}
FLAGS = {
    "della_linear-mergekit-01": ["DellaRescaleL1"],
    "della_linear-mergekit-04": ["DellaRescaleL1"],
    "della_linear-mergekit-bf16-01": ["DellaRescaleL1"],
}


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
    return h
