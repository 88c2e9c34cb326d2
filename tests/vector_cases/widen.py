"""Vectors of widen."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, fraction, i64

CODE = {
    "official:widen": "yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.widen_merging",
}
FLAGS = {
    "widen-MergeLLM-00": ["WidenTransposesEmbedding"],
    "widen-MergeLLM-03": ["WidenTransposesEmbedding"],
    "widen-MergeLLM-06": ["WidenZeroColumn"],
}
WIDEN_NAMES = (
    "lm_head.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
)
PAPER = {
    "widen-MergeLLM-00": Paper({}, names=WIDEN_NAMES, comment="without the transposed embedding"),
    "widen-MergeLLM-03": Paper(
        {"above_average_value_ratio": 0.0}, names=WIDEN_NAMES, comment="without the transposed embedding"
    ),
}

STAGED = (
    "widen-vectors-unranked", "widen-vectors-strictly-above", "widen-odd-columns", "widen-softmax", "widen-directions",
    "widen-directions-3", "widen-model-at-base",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    t, s = Fraction(given.params.get("above_average_value_ratio", 1.0)), given.params.get("score_calibration_value", 1.0)
    D = [W - given.base for W in given.models]
    if given.base.ndim < 2:
        R = np.stack([abs(x) for x in D])
        mean = np.sum(R, axis=1, keepdims=True) / Fraction(given.base.size)
        w = score(R, np.greater(R, t * mean), s)
        return {1: {"D": D}, 2: {"R": R, "w": w}, 5: {"result": given.base + sum(w * D)}}
    a, b = (np.array(x, object) for x in zip(*(changes(given.base, W) for W in given.models)))
    C = Fraction(a.shape[1])
    r = [fraction(np.argsort(np.argsort(x.astype(float), axis=1, kind="stable"), axis=1)) for x in (a, b)]
    w = sum(score(x / C, 2 * x > t * (C - 1), s) for x in r) / Fraction(2)
    result = given.base + sum(w_n * x for w_n, x in zip(w, D))
    return {1: {"D": D}, 3: {"a": a, "b": b}, 4: {"w": w}, 5: {"result": result}}


def changes(W_0: Any, W: Any) -> tuple[list[float], list[float]]:
    """How far the length and the direction of each column moved."""
    columns = [[[float(x) for x in column] for column in M.T] for M in (W_0, W)]
    pairs = [(x, y, math.hypot(*x), math.hypot(*y)) for x, y in zip(*columns)]
    return [abs(n - m) for _, _, m, n in pairs], [1 - sum(map(float.__mul__, x, y)) / (m * n) for x, y, m, n in pairs]


def score(R: Any, above: Any, s: float) -> Any:
    """Softmax over the models, and s where an entry is above."""
    e = np.array([[Fraction(math.exp(x)) for x in row] for row in R], object)
    return np.where(above, Fraction(s), e / np.sum(e, axis=0))


def hand() -> Hand:
    h = Hand("widen", CODE)
    columns = [[5.0, 0.0, 6.0], [0.0, 4.0, 8.0]]
    fours = [[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]
    h.case(
        "odd-columns",
        "columns (5, 0), (0, 4), (6, 8) against (4, 0): magnitudes change by 1, 0, 6, directions by 0, 1, 0.4; ranks r = 1 "
        "0 2 and 0 2 1; 2r > 2 holds for r = 2 alone; scores (1, 1, 3) and (1, 3, 1), their means 1 2 2 times the deltas "
        "(1, 0), (-4, 4), (2, 8)",
        [columns],
        fours,
        ("widen", {"score_calibration_value": 3.0}, [[5.0, -4.0, 8.0], [0.0, 8.0, 16.0]], ""),
        flags="WidenOddColumns",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "equal-lengths",
        "columns (2^27, 1) and (1 + 2^-20, 0) against (2^27, 0) and (1, 0): magnitudes change by 2^-28, though float64 has "
        "one number for both, and by 2^-20, directions by 2^-55 and 0; the larger of each is scored 0, the other 1",
        [[[2.0**27, 1 + 2.0**-20], [1.0, 0.0]]],
        [[2.0**27, 1.0], [0.0, 0.0]],
        ("widen", {"score_calibration_value": 0.0}, [[2.0**27, 1 + 2.0**-21], [0.5, 0.0]], "half of both task vectors"),
        dtype="F64",
        tolerance=2.0**-52,
    )
    h.case(
        "one-model",
        "one model, s = 1: every score is 1, the model comes back",
        [columns],
        fours,
        ("widen", {}, columns, ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "vectors-unranked",
        "tau = (1, 1, 1, 5), mean 2: only 5 is above it and scored 2, by its size and not its rank",
        [[1.0, 1.0, 1.0, 5.0]],
        [0.0] * 4,
        ("widen", {"score_calibration_value": 2.0}, [1.0, 1.0, 1.0, 10.0], ""),
        flags="WidenVectorsUnranked",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "vectors-large",
        "tau = (400, 500), one model: its share of the powers of e is 1, though e^800 is beyond float64",
        [[400.0, 500.0]],
        [0.0] * 2,
        ("widen", {"score_calibration_value": 2.0}, [400.0, 1000.0], "500 is above the mean, 450"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "vectors-strictly-above",
        "tau = (1, 2, 3), mean 2: the entry at the mean is not above it",
        [[1.0, 2.0, 3.0]],
        [0.0] * 3,
        ("widen", {"score_calibration_value": 2.0}, [1.0, 2.0, 6.0], ""),
        flags="WidenVectorsUnranked",
        dtype="F64",
        tolerance=1e-14,
    )
    # Softmax over two models of ranks 0 and 1/2, and the reverse: 1 / (1 + e^(1/2)) and its complement.
    low = 1 / (1 + math.exp(0.5))
    high = 1 - low
    h.case(
        "softmax",
        "two models, columns (5, 0), (6, 8) and (6, 8), (5, 0) against (4, 0), threshold out of reach: ranks 0 1 and 1 0 "
        "over 2 columns, so the weights are softmax(0, 1/2) = 0.3775, 0.6225; deltas (1, 0) and (2, 8)",
        [[[5.0, 6.0], [0.0, 8.0]], [[6.0, 5.0], [8.0, 0.0]]],
        [[4.0, 4.0], [0.0, 0.0]],
        (
            "widen",
            {"above_average_value_ratio": 2.0},
            [[4 + low + 2 * high, 4 + 2 * high + low], [8 * high, 8 * high]],
            "each delta counts, magnitude and direction are not recomposed",
        ),
        flags="WidenRecomposes",
        dtype="F64",
        tolerance=1e-7,
    )
    h.case(
        "not-idempotent",
        "two models of columns (5, 0), (6, 8) against (4, 0): ranks 0 1 each, softmax 1/2, and 1 for the column above "
        "average: weights 1/2 + 1/2 and 1 + 1 times the deltas (1, 0), (2, 8)",
        [[[5.0, 6.0], [0.0, 8.0]], [[5.0, 6.0], [0.0, 8.0]]],
        [[4.0, 4.0], [0.0, 0.0]],
        ("widen", {}, [[5.0, 8.0], [0.0, 16.0]], ""),
        flags="WidenRecomposes",
        dtype="F64",
        tolerance=1e-7,
    )
    # Turned by k 2^-16: 1 - cos = k^2 2^-33, a thousandth of what float32 resolves beside 1.
    turned = [[5.0, 6.0, 7.0, 8.0], [m * k * 2.0**-16 for m, k in zip((5, 6, 7, 8), (4, 3, 2, 1))]]
    h.case(
        "direction-noise",
        "columns (m, m k 2^-16) for m = 5 6 7 8 and k = 4 3 2 1 against (4, 0): magnitudes rank 0 1 2 3, directions 3 2 1 "
        "0; 2r > 3 holds for r = 2, 3, so scores (1, 1, 3, 3) and (3, 3, 1, 1), weights 2",
        [{"model.layers.0.mlp.up_proj.weight": turned}],
        {"model.layers.0.mlp.up_proj.weight": [[4.0] * 4, [0.0] * 4]},
        (
            "widen",
            {"score_calibration_value": 3.0},
            {"model.layers.0.mlp.up_proj.weight": [[6.0, 8.0, 10.0, 12.0], [2 * x for x in turned[1]]]},
            "",
        ),
        (
            "official:widen",
            {"above_average_value_ratio": 1.0, "score_calibration_value": 3.0},
            OPEN,
            "1 - cos in float32 is 0 or noise here, so the direction's ranks say nothing",
        ),
        flags="WidenDirectionNoise",
        tolerance=2.0**-22,
    )
    h.case(
        "all-at-base",
        "all deltas are zero: the base",
        [[[1.0, 2.0]], [[1.0, 2.0]]],
        [[1.0, 2.0]],
        ("widen", {}, [[1.0, 2.0]], ""),
    )
    h.case("no-base", "importance is the distance from the base", [[[1.0, 2.0]]], None, ("widen", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [[1.0, 2.0]], ("widen", {}, REFUSED, ""))
    # Columns against (4, 0): cosines 1, 3/5, 5/13, -4/5, 0, norms 5, 10, 13, 25, 30. Magnitudes and directions both rank
    # 0, 1, 2, and then 3, 4 and 4, 3.
    moved = [[5.0, 6.0, 5.0, -20.0, 0.0], [0.0, 8.0, 12.0, 15.0, 30.0]]
    fixed = [[4.0] * 5, [0.0] * 5]
    delta = [[x - y for x, y in zip(row, row_0)] for row, row_0 in zip(moved, fixed)]

    def weighed(w: list[float]) -> list[list[float]]:
        return [[y + w_j * d for y, w_j, d in zip(row_0, w, row)] for row, row_0 in zip(delta, fixed)]

    def turned_over(rows: list[list[float]]) -> list[list[float]]:
        return [list(column) for column in zip(*rows)]

    for id, comment, name, shape in (
        ("directions", "two axes", "w", lambda x: x),
        ("three-axes", "shape (2, 5, 1) is the matrix of two rows", "w", lambda x: [[[v] for v in row] for row in x]),
        ("embedding", "five tokens, so that the columns are its rows", "model.embed_tokens.weight", turned_over),
    ):
        h.case(
            id,
            "five columns against (4, 0), of norms 5 10 13 25 30 and cosines 1, 3/5, 5/13, -4/5, 0: magnitudes rank 0 1 2 3 "
            "4, directions 0 1 2 4 3; one model's softmax is 1. " + comment,
            [{name: shape(moved)}],
            {name: shape(fixed)},
            (
                "widen",
                {"score_calibration_value": 3.0, "above_average_value_ratio": 0.875},
                {name: shape(weighed([1.0, 1.0, 3.0, 3.0, 3.0]))},
                "2 r > 3.5 for r = 2, 3, 4",
            ),
            (
                "widen",
                {"score_calibration_value": 3.0, "above_average_value_ratio": 1.25},
                {name: shape(weighed([1.0, 1.0, 1.0, 3.0, 3.0]))},
                "2 r > 5 for r = 3, 4",
            ),
            (
                "widen",
                {"score_calibration_value": 3.0, "above_average_value_ratio": 1.75},
                {name: shape(weighed([1.0, 1.0, 1.0, 2.0, 2.0]))},
                "2 r > 7 for r = 4: (1 + 3) / 2 for both",
            ),
            dtype="F64",
            tolerance=1e-14,
        )
    h.case(
        "three-axes-no-embedding",
        "a tensor of three axes is no embedding, whatever its name",
        [{"w": [[[v] for v in row] for row in moved]}],
        {"w": [[[v] for v in row] for row in fixed]},
        (
            "widen",
            {"score_calibration_value": 3.0, "above_average_value_ratio": 1.25, "embeddings": ["w"]},
            {"w": [[[v] for v in row] for row in weighed([1.0, 1.0, 1.0, 3.0, 3.0])]},
            "",
        ),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "zero-columns",
        "columns (0, 0) to (0, 0), (0, 0) to (1/2, 0), (3/4, 0) to (0, 0), (1, 0) to (13/8, 0): magnitudes 0, 1/2, 3/4, 5/8 "
        "rank 0 1 3 2; the first three have no direction and rank last in order, 1 2 3, behind the 0 of the fourth. "
        "2 r > 5.25 for r = 3: the third alone, by both",
        [[[0.0, 0.5, 0.0, 1.625], [0.0] * 4]],
        [[0.0, 0.0, 0.75, 1.0], [0.0] * 4],
        (
            "widen",
            {"score_calibration_value": 3.0, "above_average_value_ratio": 1.75},
            [[0.0, 0.5, 0.75 - 3 * 0.75, 1.625], [0.0] * 4],
            "",
        ),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "both-zero-first",
        "columns (1, 0) to (1.25, 0) and (0, 0) to (0, 0): magnitudes 1/4 and 0 rank 1 0, directions 0 and none rank 0 1; "
        "2 r > 1 for r = 1, so both have (1 + 3) / 2",
        [[[1.25, 0.0], [0.0, 0.0]]],
        [[1.0, 0.0], [0.0, 0.0]],
        ("widen", {"score_calibration_value": 3.0}, [[1.5, 0.0], [0.0, 0.0]], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    tiny = [[5.0, 6.0, 7.0, 8.0], [m * k * 2.0**-32 for m, k in zip((5, 6, 7, 8), (4, 3, 2, 1))]]
    h.case(
        "direction-noise-float64",
        "as direction-noise, but turned by k 2^-32: 1 - cos = k^2 2^-65, which float64 does not resolve beside 1",
        [tiny],
        [[4.0] * 4, [0.0] * 4],
        ("widen", {"score_calibration_value": 3.0}, [[6.0, 8.0, 10.0, 12.0], [2 * x for x in tiny[1]]], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "unit-columns",
        "a norm of 1 is no norm of 0. x, against (1, 0): (0, 1) and (3, 0), magnitudes 0 and 2, directions 1 and 0. y, "
        "against (4, 0): (1, 0) and (0, 4), magnitudes 3 and 0, directions 0 and 1. Each column ranks 0 once and 1 once: "
        "(1 + 3) / 2",
        [{"x": [[0.0, 3.0], [1.0, 0.0]], "y": [[1.0, 0.0], [0.0, 4.0]]}],
        {"x": [[1.0, 1.0], [0.0, 0.0]], "y": [[4.0, 4.0], [0.0, 0.0]]},
        (
            "widen",
            {"score_calibration_value": 3.0},
            {"x": [[-1.0, 5.0], [2.0, 0.0]], "y": [[-2.0, -4.0], [0.0, 8.0]]},
            "",
        ),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case("number", "a number of one model, none of whose entries is above its average", [3.0], 1.0, ("widen", {}, 3.0, ""))
    for id, ratio, w, why in (
        ("ratio-zero", 0.0, [1.0, 3.0, 3.0, 3.0, 3.0], "2 r > 0 for all but the lowest, of both"),
        ("ratio-negative", -1.0, [3.0] * 5, "2 r > -4 for all"),
        ("ratio-two", 2.0, [1.0] * 5, "2 r > 8 for none"),
    ):
        h.case(
            id,
            "the five columns of directions, whose magnitudes rank 0 1 2 3 4, directions 0 1 2 4 3",
            [moved],
            fixed,
            ("widen", {"score_calibration_value": 3.0, "above_average_value_ratio": ratio}, weighed(w), why),
            dtype="F64",
            tolerance=1e-14,
        )
    h.case(
        "one-column",
        "of one column neither model is above its average, 0: the softmax of 0 and 0, 1/2; deltas (1, 0) and (2, 8)",
        [[[5.0], [0.0]], [[6.0], [8.0]]],
        [[4.0], [0.0]],
        ("widen", {"score_calibration_value": 3.0}, [[5.5], [4.0]], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "model-at-base",
        "columns (6, 8), (5, 0) and (4, 0), (4, 0) against (4, 0): ranks 1 0, and 0 1 in the order of the columns. The "
        "first column of the first model is marked, 3; its second has softmax(0, 1/2) = 0.3775. The other has no delta",
        [[[6.0, 5.0], [8.0, 0.0]], [[4.0, 4.0], [0.0, 0.0]]],
        [[4.0, 4.0], [0.0, 0.0]],
        ("widen", {"score_calibration_value": 3.0}, [[10.0, 4 + low], [24.0, 0.0]], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    grown = [[4.25, 4.5, 4.75, 5.0], [k * 2.0**-20 for k in (4, 3, 2, 1)]]
    h.case(
        "growth-and-turn",
        "columns (m, k 2^-20) for m = 17/4, 9/2, 19/4, 5 and k = 4 3 2 1 against (4, 0), grown by up to a quarter and "
        "turned by a millionth: magnitudes rank 0 1 2 3, directions 3 2 1 0, so that all have (1 + 3) / 2",
        [grown],
        [[4.0] * 4, [0.0] * 4],
        (
            "widen",
            {"score_calibration_value": 3.0},
            [[2 * x - 4 for x in grown[0]], [2 * x for x in grown[1]]],
            "",
        ),
        tolerance=2.0**-22,
    )
    h.case(
        "nan-in-a-matrix",
        "columns (NaN, 0), (5, 0), (6, 8) against (4, 0): ranks 2 0 1, of both; the last would be marked without the first",
        [[[math.nan, 5.0, 6.0], [0.0, 0.0, 8.0]]],
        fours,
        ("widen", {"score_calibration_value": 3.0}, [[math.nan, 5.0, 6.0], [0.0, 0.0, 8.0]], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "nan-in-a-vector",
        "tau = (NaN, 1, 5): nothing is above a mean of NaN, where 5 is above that of 1 and 5",
        [[math.nan, 1.0, 5.0]],
        [0.0] * 3,
        ("widen", {"score_calibration_value": 3.0}, [math.nan, 1.0, 5.0], ""),
    )
    h.case(
        "empty-zero-and-integers",
        "no entries; -0.0 + 0 = 0.0, which runners do not tell from -0.0; integers are the base's",
        [{"e": [], "z": [-0.0], "ids": i64(7)}],
        {"e": [], "z": [-0.0], "ids": i64(3)},
        ("widen", {}, {"e": [], "z": [0.0], "ids": i64(3)}, ""),
    )
    return h
