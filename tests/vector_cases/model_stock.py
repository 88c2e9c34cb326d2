"""Vectors of model_stock."""

from __future__ import annotations

from typing import Any

from vector_cases import OPEN, REFUSED, Hand, Paper

CODE = {
    "mergekit:model_stock": "mergekit 0.1.5 mergekit/merge_methods/model_stock.py:model_stock_merge_method",
}
FLAGS = {
    "model_stock-mergekit-04": ["StockNormClamp", "StockSingular", "StockNegativeRatio"],
    "model_stock-mergekit-taskvec-03": ["StockMeanOfCosines"],
}
EVIDENCE = {"model_stock-fusion_bench-taskvec-00", "model_stock-fusion_bench-taskvec-03"}
STOCK = Paper({}, comment="two models: one angle, and its cosine is every tool's")
PAPER = {
    "model_stock-mergekit-01": STOCK,
    "model_stock-mergekit-taskvec-00": STOCK,
    "model_stock-mergekit-taskvec-06": STOCK,
    "model_stock-fusion_bench-taskvec-00": STOCK,
    "model_stock-fusion_bench-taskvec-03": STOCK,
}


def hand() -> Hand:
    h = Hand("model_stock", CODE)

    def both(plain: Any, mergekit: Any = None, why: tuple[str, str] = ("", ""), **params: Any) -> list[Any]:
        mergekit = plain if mergekit is None else mergekit
        options = {"filter_wise": False} | params
        return [("model_stock", params, plain, why[0]), ("mergekit:model_stock", options, mergekit, why[1])]

    h.case(
        "angles",
        "base (1, 1); deltas (3, 0), (0, 3), (3, 0) of mean (2, 1), at 90, 0 and 90 degrees",
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
        ("model_stock", {}, OPEN, "t has no value; a small denominator of rounding may give a large one"),
        ("mergekit:model_stock", {"filter_wise": False}, [0, 0], "t = 0 where the denominator is below 1e-6"),
        flags="StockSingular",
        dtype="F64",
    )
    h.case("one-model", "one model has no angle", [[1.0]], [0.0], ("model_stock", {}, REFUSED, ""))
    h.case("no-base", "the angle is seen from the base", [[1.0], [2.0]], None, ("model_stock", {}, REFUSED, ""))
    return h
