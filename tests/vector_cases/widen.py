"""Vectors of widen."""

from __future__ import annotations

import math

from vector_cases import OPEN, REFUSED, Hand, Paper

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


def hand() -> Hand:
    h = Hand("widen", CODE)
    columns = [[5.0, 0.0, 6.0], [0.0, 4.0, 8.0]]
    fours = [[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]
    h.case(
        "odd-columns",
        "columns (5, 0), (0, 4), (6, 8) against (4, 0): magnitudes change by 1, 0, 6, directions by 0, 1, 0.4; "
        "ranks r = 1 0 2 and 0 2 1; 2r > 2 holds for r = 2 alone; scores (1, 1, 3) and (1, 3, 1), their means 1 2 2 "
        "times the deltas "
        "(1, 0), (-4, 4), (2, 8)",
        [columns],
        fours,
        ("widen", {"score_calibration_value": 3.0}, [[5.0, -4.0, 8.0], [0.0, 8.0, 16.0]], ""),
        flags="WidenOddColumns",
        dtype="F64",
        tolerance=1e-14,
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
        "two models, columns (5, 0), (6, 8) and (6, 8), (5, 0) against (4, 0), threshold out of reach: ranks 0 1 "
        "and 1 0 over 2 "
        "columns, so the weights are softmax(0, 1/2) = 0.3775, 0.6225; deltas (1, 0) and (2, 8)",
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
        "columns (m, m k 2^-16) for m = 5 6 7 8 and k = 4 3 2 1 against (4, 0): magnitudes rank 0 1 2 3, directions "
        "3 2 1 0; "
        "2r > 3 holds for r = 2, 3, so scores (1, 1, 3, 3) and (3, 3, 1, 1), weights 2",
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
    return h
