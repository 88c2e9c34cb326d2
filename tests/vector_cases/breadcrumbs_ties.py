"""Vectors of breadcrumbs_ties."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, i64, sign
from vector_cases.breadcrumbs import window
from vector_cases.ties import agreeing_mean

CODE: dict[str, str] = {}
FLAGS = {
    "breadcrumbs_ties-mergekit-01": ["BreadcrumbsTiesSumNotMean", "BreadcrumbsTiesWeightsElect"],
    "breadcrumbs_ties-mergekit-04": ["BreadcrumbsGammaSlice", "BreadcrumbsDensityOne", "BreadcrumbsTiesSumNotMean"],
    "breadcrumbs_ties-mergekit-bf16-01": ["BreadcrumbsTiesEqual"],
}

STAGED = tuple(
    f"breadcrumbs_ties-{id}"
    for id in (
        "mask-then-elect", "sum-not-mean", "weights-elect", "zero-sum", "window-past-the-end", "density-one", "equal",
        "outside-the-window",
    )
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    r, k = (int(given.params.get(name, usual) * given.base.size) for name, usual in (("gamma", 0.006), ("density", 0.15)))
    masked = [window(x, r, k) for x in tau]
    s = sign(sum(masked))
    return {
        1: {"tau": tau},
        2: {"tau": masked},
        3: {"s": s},
        4: {"result": given.base + Fraction(given.params.get("lambda_", 1.0)) * agreeing_mean(masked, s)},
    }


def hand() -> Hand:
    h = Hand("breadcrumbs_ties", CODE)

    def plain(density: float, gamma: float, **more: Any) -> dict[str, Any]:
        return {"density": density, "gamma": gamma} | more

    def mergekit(density: float, gamma: float, **more: Any) -> dict[str, Any]:
        return {
            "weight": 1.0, "density": density, "gamma": gamma, "normalize": False, "rescale": False, "lambda_": 1.0,
        } | more  # fmt: skip

    four = [1.0, -2.0, 3.0, -4.0]
    h.case(
        "mask-then-elect",
        "base 1; tau = (8, -3, 2, 1) and (-3, 1, 6, 4), each loses its largest and keeps the next two: (0, -3, 2, 0) and "
        "(-3, 0, 0, 4); nothing conflicts, half of it is added",
        [[9.0, -2.0, 3.0, 2.0], [-2.0, 2.0, 7.0, 5.0]],
        [1.0] * 4,
        ("breadcrumbs_ties", plain(0.5, 0.25, lambda_=0.5), [-0.5, -0.5, 2.0, 3.0], "8 and 6 had no vote"),
        ("mergekit:breadcrumbs_ties", mergekit(0.5, 0.25, lambda_=0.5), [-0.5, -0.5, 2.0, 3.0], ""),
    )
    h.case(
        "sum-not-mean",
        "tau = (9, 4, 1, 0) and (9, 2, -3, 0), each loses 9 and keeps the next two: (0, 4, 1, 0), (0, 2, -3, 0); signs + -",
        [[9.0, 4.0, 1.0, 0.0], [9.0, 2.0, -3.0, 0.0]],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(0.5, 0.25), [0.0, 3.0, -3.0, 0.0], "(4 + 2) / 2, and -3 alone"),
        ("mergekit:breadcrumbs_ties", mergekit(0.5, 0.25), [0.0, 6.0, -3.0, 0.0], "4 + 2: not normalised by default"),
        flags="BreadcrumbsTiesSumNotMean",
    )
    h.case(
        "normalize",
        "tau = (9, 4, 1, 0) and (9, 2, -3, 0), each loses 9 and keeps the next two",
        [[9.0, 4.0, 1.0, 0.0], [9.0, 2.0, -3.0, 0.0]],
        [0.0] * 4,
        ("mergekit:breadcrumbs_ties", mergekit(0.5, 0.25, normalize=True), [0.0, 3.0, -3.0, 0.0], "(4 + 2) / (1 + 1)"),
        flags="BreadcrumbsTiesSumNotMean",
    )
    h.case(
        "weights-elect",
        "tau = (4, 0) and (-2, 0), nothing removed, half kept",
        [[4.0, 0.0], [-2.0, 0.0]],
        [0.0, 0.0],
        ("breadcrumbs_ties", plain(0.5, 0.0), [4.0, 0.0], "the sum 2 elects +"),
        (
            "mergekit:breadcrumbs_ties",
            mergekit(0.5, 0.0, weight=[1.0, 3.0]),
            [-6.0, 0.0],
            "weights 1, 3: the sum 4 - 6 elects -, and 3 * -2 is added",
        ),
        flags="BreadcrumbsTiesWeightsElect BreadcrumbsTiesSumNotMean",
    )
    h.case(
        "zero-sum",
        "base 1, tau = 3 and -3, nothing removed, all kept",
        [[4.0], [-2.0]],
        [1.0],
        ("breadcrumbs_ties", plain(1.0, 0.0), [1.0], "no sign is elected: the base"),
        ("mergekit:breadcrumbs_ties", mergekit(1.0, 0.0), [4.0], "a sum of zero elects +"),
        flags="BreadcrumbsTiesZeroSumSign",
    )
    h.case(
        "gamma-below-one-entry",
        "tau = (1, -2, 3, -4), int(4 * 0.01) = 0 removed, 2 kept",
        [four],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(0.5, 0.01), [0.0, 0.0, 3.0, -4.0], ""),
        (
            "mergekit:breadcrumbs_ties",
            mergekit(0.5, 0.01),
            [0.0, 0.0, 3.0, -4.0],
            "0.1.4 sliced to [.. : -0] and kept nothing",
        ),
        flags="BreadcrumbsGammaSlice",
    )
    h.case(
        "window-past-the-end",
        "tau = (1, -2, 3, -4), 2 removed, 3 wanted of 2 left",
        [four],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(0.75, 0.5), [1.0, -2.0, 0.0, 0.0], "the two that are left"),
        (
            "mergekit:breadcrumbs_ties",
            mergekit(0.75, 0.5),
            [1.0, -2.0, 3.0, 0.0],
            "density wins: three are kept, one removed",
        ),
        flags="BreadcrumbsWindowPastEnd",
    )
    h.case(
        "density-one",
        "tau = (1, -2, 3, -4), density 1, a quarter removed",
        [four],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(1.0, 0.25), [1.0, -2.0, 3.0, 0.0], "the largest is removed all the same"),
        ("mergekit:breadcrumbs_ties", mergekit(1.0, 0.25), four, "density 1 changes nothing, gamma is ignored"),
        flags="BreadcrumbsDensityOne",
    )
    h.case(
        "equal",
        "tau = (2, -2, 2, 2): ranks go to the lower index first; rank 0 is removed, 1 and 2 are kept",
        [[2.0, -2.0, 2.0, 2.0]],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(0.5, 0.25), [0.0, -2.0, 2.0, 0.0], ""),
        flags="BreadcrumbsTiesEqual",
    )
    h.case(
        "per-tensor",
        "tau = (1, 2), (30, 40): each tensor is its own, 0 removed, 1 kept",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0]},
        ("breadcrumbs_ties", plain(0.5, 0.25), {"a": [0.0, 2.0], "b": [0.0, 40.0]}, ""),
    )
    h.case(
        "over-model",
        "tau = (1, 2), (30, 40), ranked over the model on request: 40 removed, 30 and 2 kept",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0]},
        ("breadcrumbs_ties", plain(0.5, 0.25), {"a": [0.0, 2.0], "b": [30.0, 0.0]}, ""),
        options={"over": "model"},
    )
    h.case(
        "empty-and-scalar",
        "a 0-d tensor has one entry, of which int(1 * 0.5) = 0 are kept",
        [{"e": [], "s": 5.0}],
        {"e": [], "s": 1.0},
        ("breadcrumbs_ties", plain(0.5, 0.0), {"e": [], "s": 1.0}, ""),
    )
    h.case(
        "density-zero",
        "nothing is kept: the base",
        [four],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(0.0, 0.0), [0.0] * 4, ""),
        ("mergekit:breadcrumbs_ties", mergekit(0.0, 0.1), [0.0] * 4, ""),
    )
    h.case("density-negative", "density -1/4", [[1.0]], [0.0], ("breadcrumbs_ties", {"density": -0.25}, REFUSED, ""))
    h.case("gamma-above-one", "gamma 3/2", [[1.0]], [0.0], ("breadcrumbs_ties", {"gamma": 1.5}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("breadcrumbs_ties", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("breadcrumbs_ties", {}, REFUSED, ""))
    h.case(
        "defaults",
        "tau = 1, 2, ... 200: int(0.006 * 200) = 1 is removed, 200, and int(0.15 * 200) = 30 stay, 170 to 199",
        [[float(k) for k in range(1, 201)]],
        [0.0] * 200,
        ("breadcrumbs_ties", {}, [float(k) if 170 <= k < 200 else 0.0 for k in range(1, 201)], "lambda is 1 by default"),
    )
    h.case(
        "outside-the-window",
        "tau = (8, 2, 1, 0) and (-9, -1, 4, 0), each loses its largest and keeps the next two: (0, 2, 1, 0), (0, -1, 4, 0); "
        "8 and -9 do not vote, the means are 2 alone and (1 + 4) / 2",
        [[8.0, 2.0, 1.0, 0.0], [-9.0, -1.0, 4.0, 0.0]],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(0.5, 0.25), [0.0, 2.0, 2.5, 0.0], ""),
    )
    for count, r, k in ((6, 0, 0), (7, 0, 1), (166, 0, 24), (167, 1, 25)):
        h.case(
            f"defaults-{count}",
            f"tau = 1, 2, ... {count}: int(0.006 * {count}) = {r} removed, int(0.15 * {count}) = {k} stay",
            [[float(i) for i in range(1, count + 1)]],
            [0.0] * count,
            ("breadcrumbs_ties", {}, [float(i) if count - r - k < i <= count - r else 0.0 for i in range(1, count + 1)], ""),
        )
    hundred = [float(i) for i in range(1, 101)]
    h.case(
        "cut-in-float64",
        "tau = 1 ... 100: 0.29 * 100 is 28.999999999999996 in float64, and 28 stay",
        [hundred],
        [0.0] * 100,
        ("breadcrumbs_ties", plain(0.29, 0.0), [0.0] * 72 + hundred[72:], ""),
    )
    h.case(
        "gamma-one", "all are outliers: the base", [four], [1.0] * 4, ("breadcrumbs_ties", plain(0.5, 1.0), [1.0] * 4, "")
    )
    h.case(
        "gamma-zero",
        "tau = (4, -2, 1, 3), (2, 5, -1, 0), half of each kept: (4, 0, 0, 3), (2, 5, 0, 0); TIES, tensor by tensor",
        [[4.0, -2.0, 1.0, 3.0], [2.0, 5.0, -1.0, 0.0]],
        [0.0] * 4,
        ("breadcrumbs_ties", plain(0.5, 0.0), [3.0, 5.0, 0.0, 3.0], ""),
    )
    h.case("scalar-whole", "int(1) = 1 entry stays", [5.0], 1.0, ("breadcrumbs_ties", plain(1.0, 0.0), 5.0, ""))
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, -0.0],
        ("breadcrumbs_ties", plain(0.5, 0.0), [0.0, 2.0], ""),
    )
    for id, bad in (("nan-is-largest", math.nan), ("removed-infinity", math.inf)):
        h.case(
            id,
            f"tau = ({bad}, 4, 1, 2): the first removed, as the largest, and 0 times it is NaN; 4 and 2 kept",
            [[bad, 4.0, 1.0, 2.0]],
            [0.0] * 4,
            ("breadcrumbs_ties", plain(0.5, 0.25), [math.nan, 4.0, 0.0, 2.0], ""),
        )
    h.case(
        "infinities-of-both-signs",
        "tau = (inf, 1) and (-inf, 1), all kept: inf - inf elects NaN",
        [[math.inf, 1.0], [-math.inf, 1.0]],
        [0.0, 0.0],
        ("breadcrumbs_ties", plain(1.0, 0.0), [math.nan, 1.0], ""),
    )
    h.case(
        "integers",
        "integers are the base's; half of (1, 2) stays",
        [{"ids": i64(3, 4), "x": [1.0, 2.0]}],
        {"ids": i64(3, 4), "x": [0.0, 0.0]},
        ("breadcrumbs_ties", plain(0.5, 0.0), {"ids": i64(3, 4), "x": [0.0, 2.0]}, ""),
    )
    h.case("density-above-one", "density 3/2", [[1.0]], [0.0], ("breadcrumbs_ties", {"density": 1.5}, REFUSED, ""))
    h.case("gamma-negative", "gamma -1/4", [[1.0]], [0.0], ("breadcrumbs_ties", {"gamma": -0.25}, REFUSED, ""))
    h.case(
        "axes",
        "tau = (1, 2, 3, 4) of three axes: 4 removed, 3 and 2 kept",
        [[[[1.0], [2.0]], [[3.0], [4.0]]]],
        [[[0.0], [0.0]], [[0.0], [0.0]]],
        ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.25, "lambda_": 1.0}, [[[0.0], [2.0]], [[3.0], [0.0]]], ""),
    )
    h.case(
        "equal-models",
        "tau = (1, 2, 3, 4) twice: 4 removed, 3 and 2 kept in each",
        [[1.0, 2.0, 3.0, 4.0]] * 2,
        [0.0] * 4,
        ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.25, "lambda_": 1.0}, [0.0, 2.0, 3.0, 0.0], ""),
    )
    h.case(
        "all-base",
        "zeros are ranked, removed and kept",
        [[3.0, -0.5]] * 2,
        [3.0, -0.5],
        ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.0, "lambda_": 1.0}, [3.0, -0.5], ""),
    )
    return h
