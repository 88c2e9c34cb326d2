"""Vectors of model_stock."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64

CODE = {
    "fusion_bench:model_stock": "tanganke/fusion_bench@54c9e8c "
    "fusion_bench/method/model_stock/model_stock.py:ModelStock.run",
    "mergellm:model_stock": "yule-BUAA/MergeLLM@9178ef9 "
    "model_merging_methods/merging_methods.py:MergingMethod.stock_merging",
    "sd_mecha:model_stock": "ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/ties.py:model_stock",
    "mergekit:model_stock": "mergekit 0.1.5 mergekit/merge_methods/model_stock.py:model_stock_merge_method",
}
TOOLS = ("fusion_bench", "mergellm")
FLAGS = {
    "model_stock-MergeLLM-00": ["StockMeanOfCosines"],
    "model_stock-mergekit-04": ["StockNormClamp", "StockSingular", "StockNegativeRatio"],
    "model_stock-mergekit-taskvec-03": ["StockMeanOfCosines"],
}
STOCK = Paper({}, comment="two models: one angle, and its cosine is every tool's")
PAPER = {
    "model_stock-mergekit-01": STOCK,
    "model_stock-mergekit-taskvec-00": STOCK,
    "model_stock-mergekit-taskvec-06": STOCK,
    "model_stock-fusion_bench-taskvec-00": STOCK,
    "model_stock-fusion_bench-taskvec-03": STOCK,
}

STAGED = (
    "model_stock-angles", "model_stock-two-models", "model_stock-negative-ratio", "model_stock-filter-wise",
    "model_stock-whole-tensor", "model_stock-parallel", "model_stock-beyond-the-pole", "model_stock-one-moved",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    rows = given.params.get("filter_wise", False)
    found = [ratio(row) for row in zip(*tau)] if rows else [ratio([x.ravel() for x in tau])]
    theta, t = (np.array(x, object) for x in zip(*found))
    across = t[:, None] if rows else t[0]
    return {
        1: {"tau": tau},
        2: {"theta": theta if rows else theta[0]},
        3: {"t": t if rows else t[0]},
        4: {"result": given.base + across * (sum(tau) / Fraction(len(tau)))},
    }


def ratio(tau: Any) -> tuple[float, Fraction]:
    """The mean angle of vectors, and t. Cosines of 60 and 120 degrees are 1/2 and -1/2, so that t is a fraction."""
    angles = []
    for x, y in combinations(tau, 2):
        xx, yy, xy = x @ x, y @ y, x @ y
        angles.append(math.acos(float(xy) / math.sqrt(xx * yy)) if xx * yy else math.pi / 2)
    theta, N = sum(angles) / len(angles), len(tau)
    cos = Fraction(round(60 * math.cos(theta)), 60)
    assert abs(math.cos(theta) - cos) < 1e-15
    return theta, N * cos / (1 + (N - 1) * cos)


def hand() -> Hand:
    h = Hand("model_stock", CODE)

    def both(plain: Any, mergekit: Any = None, why: tuple[str, str] = ("", ""), **params: Any) -> list[Any]:
        mergekit = plain if mergekit is None else mergekit
        options = {"filter_wise": False} | params
        return [("model_stock", params, plain, why[0]), ("mergekit:model_stock", options, mergekit, why[1])]

    def tools(
        id: str,
        comment: str,
        models: list[Any],
        base: Any,
        flags: str,
        *,
        fusion_bench: Any = None,
        mergellm: Any = None,
        sd_mecha: Any = None,
        why: dict[str, str] | None = None,
    ) -> None:
        """What other tools make of it, which find angles or all of it in float32."""
        for tool, expect in (("fusion_bench", fusion_bench), ("mergellm", mergellm), ("sd_mecha", sd_mecha)):
            if expect is not None:
                answer = (f"{tool}:model_stock", {}, expect, (why or {}).get(tool, ""))
                h.case(id, comment, models, base, answer, flags=flags, tolerance=1e-6)

    three = "base (1, 1); deltas (3, 0), (0, 3), (3, 0) of mean (2, 1), at 90, 0 and 90 degrees"
    tools(
        "angles",
        three,
        [[4, 1], [1, 4], [4, 1]],
        [1, 1],
        "StockMeanOfCosines",
        fusion_bench=[2.5, 1.75],
        mergellm=[2.2, 1.6],
        sd_mecha=[1, 1],
        why={
            "fusion_bench": "mean angle 60: t = 3/4",
            "mergellm": "mean cosine 1/3: t = 3/5",
            "sd_mecha": "neighbours in the list are at 90 degrees: t = 0",
        },
    )
    h.case(
        "angles",
        three,
        [[4, 1], [1, 4], [4, 1]],
        [1, 1],
        *both(
            [2.5, 1.75],
            [2.2, 1.6],
            ("mean angle 60, cos = 1/2: t = 3/2 / 2 = 3/4", "mean cosine 1/3: t = 1 / (5/3) = 3/5"),
        ),
        flags="StockMeanOfCosines",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "two-models",
        "deltas (1, 1, 0), (1, 0, 1): cos = 1/2, t = 1 / (3/2) = 2/3 of the mean (1, 1/2, 1/2)",
        [[1, 1, 0], [1, 0, 1]],
        [0, 0, 0],
        *both([2 / 3, 1 / 3, 1 / 3]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "identical",
        "cos = 1, t = 1: the model",
        [[3, -1], [3, -1], [3, -1]],
        [1, 1],
        *both([3, -1]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case("orthogonal", "cos = 0, t = 0: the base", [[3, 1], [1, 5]], [1, 1], *both([1, 1]), dtype="F64", tolerance=1e-14)
    h.case(
        "negative-ratio",
        "deltas (1, 1, 0), (-1, 0, 1): cos = -1/2, t = -1 / (1/2) = -2 of the mean (0, 1/2, 1/2)",
        [[1, 1, 0], [-1, 0, 1]],
        [0, 0, 0],
        *both([0, -1, -1]),
        flags="StockNegativeRatio",
        dtype="F64",
        tolerance=1e-13,
    )
    small = 2.0**-12
    clamped = 2 * (2.0**-24 / 1e-6) / (1 + 2.0**-24 / 1e-6)
    h.case(
        "small-norms",
        "two equal deltas (2^-12, 0); their norms' product is 2^-24 = 6e-8",
        [[small, 0], [small, 0]],
        [0, 0],
        *both(
            [small, 0],
            [clamped * small, 0],
            ("cos = 1: the model", "the product is raised to 1e-6: cos = 0.0596, t = 2 cos / (1 + cos) = 0.1125"),
        ),
        flags="StockNormClamp",
        dtype="F64",
        tolerance=1e-13,
    )
    added = 2 * (2.0**-24 / (2.0**-24 + 1e-8))
    tools(
        "small-norms",
        "two equal deltas (2^-12, 0); their norms' product is 2^-24 = 6e-8",
        [[small, 0], [small, 0]],
        [0, 0],
        "StockNormClamp",
        fusion_bench=[added / (1 + added / 2 + 1e-8) * small, 0],
        mergellm=[clamped * small, 0],
        sd_mecha=[small, 0],
        why={
            "fusion_bench": "1e-8 is added: cos = 0.856, t = 0.923",
            "mergellm": "the product is raised to 1e-6: t = 0.1125",
            "sd_mecha": "norms are raised to 1e-6, and are larger: the model",
        },
    )
    h.case(
        "filter-wise",
        "deltas (2, 0; 2, 0), (2, 0; 0, 2): the first rows are equal, t = 1, the second ones orthogonal, t = 0",
        [[[2, 0], [2, 0]], [[2, 0], [0, 2]]],
        [[0, 0], [0, 0]],
        *both([[2, 0], [0, 0]], filter_wise=True),
        flags="StockFilterWise",
        dtype="F64",
        tolerance=1e-14,
    )
    tools(
        "filter-wise",
        "deltas (2, 0; 2, 0), (2, 0; 0, 2): the first rows are equal, the second ones orthogonal",
        [[[2, 0], [2, 0]], [[2, 0], [0, 2]]],
        [[0, 0], [0, 0]],
        "StockFilterWise",
        fusion_bench=[[4 / 3, 0], [2 / 3, 2 / 3]],
        mergellm=[[4 / 3, 0], [2 / 3, 2 / 3]],
        sd_mecha=[[2, 0], [0, 0]],
        why={
            "fusion_bench": "one cosine for the tensor, 1/2: t = 2/3",
            "mergellm": "one cosine for the tensor, 1/2: t = 2/3",
            "sd_mecha": "by rows: t = 1 and t = 0",
        },
    )
    h.case(
        "whole-tensor",
        "deltas (2, 0; 2, 0), (2, 0; 0, 2): cos = 4/8, t = 2/3 of the mean (2, 0; 1, 1)",
        [[[2, 0], [2, 0]], [[2, 0], [0, 2]]],
        [[0, 0], [0, 0]],
        *both([[4 / 3, 0], [2 / 3, 2 / 3]]),
        flags="StockFilterWise",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "all-at-base",
        "all deltas are zero: the base",
        [[1, 2], [1, 2]],
        [1, 2],
        *both([1, 2]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "one-at-base",
        "a delta of zero has no angle, its cosine counts as 0: t = 0, the base",
        [[1, 2], [4, 6]],
        [1, 2],
        *both([1, 2]),
        flags="StockZeroDelta",
        dtype="F64",
        tolerance=1e-14,
    )
    opposite = "deltas (2, 0), (-1, 0): cos = -1, and 1 + cos is 0"
    h.case(
        "singular",
        opposite,
        [[2, 0], [-1, 0]],
        [0, 0],
        ("model_stock", {}, [0, 0], "t = 0 where the denominator is below 1e-6: the base"),
        ("mergekit:model_stock", {"filter_wise": False}, [0, 0], "t = 0 where the denominator is below 1e-6"),
        flags="StockSingular",
        dtype="F64",
    )
    tools(
        "one-at-base",
        "a delta of zero has no angle",
        [[1, 2], [4, 6]],
        [1, 2],
        "StockZeroDelta",
        fusion_bench=[1, 2],
        mergellm=[1, 2],
        sd_mecha=[1, 2],
        why={"fusion_bench": "0 / 1e-8: cos = 0", "mergellm": "0 / 1e-6: cos = 0", "sd_mecha": "0 / 1e-6: cos = 0"},
    )
    tools(
        "singular",
        opposite,
        [[2, 0], [-1, 0]],
        [0, 0],
        "StockSingular",
        fusion_bench=[-1e8, 0],
        mergellm=[math.nan, math.nan],
        sd_mecha=[-(2.0**128 - 2.0**104), 0],
        why={
            "fusion_bench": "t = -2 / 1e-8 of the mean (1/2, 0)",
            "mergellm": "t = -inf, and -inf 0 + inf 0 is NaN",
            "sd_mecha": "t = -inf; infinities become the largest number, NaN 0",
        },
    )
    h.case(
        "ignored-keys",
        "deltas (2, 0) and (0, 2) at a right angle",
        [[3.0, 1.0], [1.0, 3.0]],
        [1.0, 1.0],
        ("model_stock", {}, [1.0, 1.0], "t = 0: the base"),
        ("fusion_bench:model_stock", {"ignore_keys": ["x"]}, [2.0, 2.0], "x is averaged, whatever its angle"),
        flags="StockIgnoredKeys",
        tolerance=1e-6,
    )
    h.case("one-model", "one model has no angle", [[1.0]], [0.0], ("model_stock", {}, REFUSED, ""))
    h.case("no-base", "the angle is seen from the base", [[1.0], [2.0]], None, ("model_stock", {}, REFUSED, ""))
    h.case(
        "cosine-past-one",
        "equal deltas (1, 1, 1): 3 / (sqrt 3 sqrt 3) is rounded to a little more than 1; the angle is 0, t = 2 / 2",
        [[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]],
        [1.0, 2.0, 3.0],
        ("model_stock", {}, [2.0, 3.0, 4.0], ""),
        dtype="F64",
    )
    h.case(
        "opposite-past-one",
        "deltas (2, 2, 2) and (-1, -1, -1): the cosine is rounded to less than -1; 180 degrees are the pole of the ratio, "
        "which gives the base, whatever the mean, (1/2, 1/2, 1/2)",
        [[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]],
        [0.0, 0.0, 0.0],
        ("model_stock", {}, [0.0, 0.0, 0.0], ""),
        dtype="F64",
    )
    h.case(
        "parallel",
        "base 1; deltas (3, 4) and (6, 8), of one direction: t = 1, the average, 1 + (9/2, 6)",
        [[4, 5], [7, 9]],
        [1, 1],
        *both([5.5, 7]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "wide-angle",
        "deltas (5, 0) and (-3, 4), of cosine -15/25: t = -6/5 / (2/5) = -3 of the mean (1, 2)",
        [[5, 0], [-3, 4]],
        [0, 0],
        *both([-3, -6]),
        flags="StockNegativeRatio",
        dtype="F64",
        tolerance=1e-13,
    )
    h.case(
        "beyond-the-pole",
        "base 1; deltas 1, 3, -1, -1, two pairs at 0 and four at 180 degrees, 120 in the mean: cos = -1/2, "
        "t = -2 / (1 - 3/2) = 4 of the mean 1/2",
        [[2], [4], [0], [0]],
        [1],
        ("model_stock", {}, [3], ""),
        dtype="F64",
        tolerance=1e-13,
    )
    h.case(
        "pole-of-three",
        "base 1; deltas 1, 3, -1 at 0, 180 and 180 degrees, 120 in the mean: 1 + 2 cos is 0 up to rounding, so t = 0",
        [[2], [4], [0]],
        [1],
        ("model_stock", {}, [1], ""),
        dtype="F64",
    )
    h.case(
        "pole-of-two",
        "base 1; deltas 2 and -1 of mean 1/2 at 180 degrees: 1 + cos is 0, so t = 0",
        [[3, 1], [0, 1]],
        [1, 1],
        ("model_stock", {}, [1, 1], ""),
        flags="StockSingular",
        dtype="F64",
    )
    h.case(
        "one-moved",
        "deltas (3, 0), (3, 0) and 0: 0, 90 and 90 degrees, 60 in the mean: t = 3/2 / 2 = 3/4 of the mean (2, 0)",
        [[4, 1], [4, 1], [1, 1]],
        [1, 1],
        ("model_stock", {}, [2.5, 1], "by cosines it would be 3/5 of it, 2.2"),
        flags="StockZeroDelta",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "rows-of-many-axes",
        "x, of shape (2, 1, 2), has two rows: equal ones, t = 1, and orthogonal ones, t = 0. v is one row: cos = 1/2, t = "
        "2/3 of the mean (1, 1/2, 1/2); so is a number, t = 1",
        [{"x": [[[2, 0]], [[2, 0]]], "v": [1, 1, 0], "s": 2}, {"x": [[[2, 0]], [[0, 2]]], "v": [1, 0, 1], "s": 4}],
        {"x": [[[0, 0]], [[0, 0]]], "v": [0, 0, 0], "s": 0},
        (
            "model_stock",
            {"filter_wise": True},
            {"x": [[[2, 0]], [[0, 0]]], "v": [2 / 3, 1 / 3, 1 / 3], "s": 3},
            "",
        ),
        flags="StockFilterWise",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "products-of-float32",
        "deltas (1, 2^-80) and (0, 2^-80): 2^-160 is 0 in float32, so that the second one has no length: 90 degrees, t = 0",
        [[2.0, 2.0**-80], [1.0, 2.0**-80]],
        [1.0, 0.0],
        ("model_stock", {}, [1.0, 0.0], "the base, up to rounding"),
        tolerance=1e-15,
    )
    h.case(
        "products-of-float64",
        "deltas (0, 2^-80) twice: 2^-160 is a number in float64, the cosine 1 and t = 1",
        [[1.0, 2.0**-80]] * 2,
        [1.0, 0.0],
        ("model_stock", {}, [1.0, 2.0**-80], ""),
        dtype="F64",
    )
    nan = [[[math.nan, 1.0], [2.0, 0.0]], [[1.0, 1.0], [2.0, 0.0]]]
    h.case(
        "nan",
        "a NaN in the first row",
        nan,
        [[0.0, 0.0], [0.0, 0.0]],
        ("model_stock", {}, [[math.nan] * 2] * 2, "the angle is that of the tensor"),
        ("model_stock", {"filter_wise": True}, [[math.nan] * 2, [2.0, 0.0]], "that of the second row is 0"),
    )
    h.case(
        "empty-and-integers",
        "base 0; of one direction, so the mean of (3, 4) and (6, 8)",
        [{"e": [], "x": [3, 4], "ids": i64(1, 2)}, {"e": [], "x": [6, 8], "ids": i64(1, 3)}],
        {"e": [], "x": [0, 0], "ids": i64(1, 2)},
        ("model_stock", {}, {"e": [], "x": [4.5, 6], "ids": i64(1, 2)}, ""),
        dtype="F64",
        tolerance=1e-14,
    )
    return h
