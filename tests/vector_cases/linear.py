"""Vectors of linear."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Exact, Hand, Paper, i64

CODE = {
    "fusion_bench:linear": "tanganke/fusion_bench@54c9e8c fusion_bench/method/simple_average.py and weighted_average",
    "mergelm:linear": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.average_merging",
    "mergellm:linear": "yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.average_merging",
    "mergekit:linear": "mergekit 0.1.5 mergekit/merge_methods/linear.py:linear_merge",
    "official:uniform_soup": "mlfoundations/model-soups@d5398f1 main.py",
}
STEMS = ("linear", "simple_average", "uniform_soup", "weighted_average")
TOOLS = ("fusion_bench",)
FLAGS = {
    "linear-mergekit-04": ["LinearZeroWeightSum"],
    "weighted_average-fusion_bench-00": ["LinearNormalizes"],
}
PAPER = {
    "uniform_soup-official-00": Paper({}, entry="linear", comment="the uniform soup is linear with equal weights"),
    "linear-mergekit-01": Paper({"weight": [0.6, 0.4], "normalize": True}),
    "weighted_average-fusion_bench-00": Paper({"weight": [0.5, 1.0, 2.5]}),
}

STAGED = (
    "linear-uniform", "linear-normalizes", "linear-unnormalized", "linear-extrapolates",
    "linear-zero-weight-sum-unnormalized", "linear-negative-sum",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    w = given.each("weight", 1.0)
    c = [w_n / sum(w) for w_n in w] if given.params.get("normalize", True) else w
    return {1: {"c": c}, 2: {"result": sum(c_n * theta for c_n, theta in zip(c, given.models))}}


def hand() -> Hand:
    h = Hand("linear", CODE)
    h.case(
        "uniform",
        "(4 + 8) / 2 = 6, (-2 + 2) / 2 = 0",
        [[4, -2], [8, 2]],
        None,
        ("linear", {}, [6, 0], "weights are 1 by default"),
        ("official:uniform_soup", {}, [6, 0], ""),
        ("fusion_bench:linear", {}, [6, 0], ""),
        ("mergelm:linear", {}, [6, 0], ""),
    )
    h.case(
        "normalizes",
        "x = 4 and 8 with weights 1 and 3",
        [[4.0], [8.0]],
        None,
        ("linear", {"weight": [1.0, 3.0]}, [7.0], "normalised: 4/4 + 3*8/4 = 7"),
        ("mergekit:linear", {"weight": [1.0, 3.0], "normalize": True}, [7.0], "(4 + 24) / 4 = 7"),
        ("fusion_bench:linear", {"weights": [1.0, 3.0], "normalize": True}, [7.0], "4/4 + 3*8/4 = 7"),
        flags="LinearNormalizes",
    )
    h.case(
        "unnormalized",
        "x = 4 and 8 with weights 1 and 3",
        [[4.0], [8.0]],
        None,
        ("linear", {"weight": [1.0, 3.0], "normalize": False}, [28.0], "4 + 3*8 = 28"),
        ("mergekit:linear", {"weight": [1.0, 3.0], "normalize": False}, [28.0], "4 + 24 = 28"),
        ("fusion_bench:linear", {"weights": [1.0, 3.0], "normalize": False}, [28.0], "4 + 24 = 28"),
        flags="LinearNormalizes",
    )
    h.case(
        "extrapolates",
        "weights 2 and -1: 2*4 - 8 = 0, 2*8 - 2 = 14",
        [[4, 8], [8, 2]],
        None,
        ("linear", {"weight": [2.0, -1.0]}, [0, 14], ""),
    )
    h.case(
        "zero-weight-sum",
        "weights 1 and -1 sum to zero",
        [[4.0, 8.0], [8.0, 8.0]],
        None,
        ("linear", {"weight": [1.0, -1.0]}, REFUSED, "there is no normalised mean, and none is invented"),
        ("mergekit:linear", {"weight": [1.0, -1.0], "normalize": True}, [-math.inf, math.nan], "-4/0 and 0/0"),
        ("fusion_bench:linear", {"weights": [1.0, -1.0]}, [math.nan, math.nan], "weights of inf and -inf: inf - inf"),
        flags="LinearZeroWeightSum",
    )
    h.case(
        "zero-weight-sum-unnormalized",
        "4 - 8 = -4, 8 - 8 = 0",
        [[4.0, 8.0], [8.0, 8.0]],
        None,
        ("linear", {"weight": [1.0, -1.0], "normalize": False}, [-4.0, 0.0], "a difference needs no normalisation"),
        flags="LinearZeroWeightSum",
    )
    h.case(
        "overflowing-sum",
        "two models of 2^127, the largest power of two in float32",
        [[2.0**127], [2.0**127]],
        None,
        ("linear", {}, [2.0**127], "coefficients first: 2^126 + 2^126 = 2^127"),
        ("mergekit:linear", {"weight": [1.0, 1.0], "normalize": True}, [math.inf], "sum first: 2^128 is infinite"),
        ("official:uniform_soup", {}, [2.0**127], "each model is scaled by 1/N first"),
        ("fusion_bench:linear", {}, [math.inf], "simple_average: sum first"),
        ("mergelm:linear", {}, [math.inf], "the mean of a stack: sum first"),
        ("mergellm:linear", {}, [math.inf], "the mean of a stack: sum first"),
        flags="LinearOverflowingSum",
    )
    h.case(
        "overflowing-weighted-sum",
        "two models of 2^127 with equal weights",
        [[2.0**127], [2.0**127]],
        None,
        ("linear", {"weight": [1.0, 1.0]}, [2.0**127], "each model is scaled first"),
        ("fusion_bench:linear", {"weights": [1.0, 1.0]}, [2.0**127], "weighted_average too"),
        flags="LinearOverflowingSum",
    )
    h.case(
        "some-weights",
        "a weight for one model of two",
        [[1.0], [3.0]],
        None,
        ("fusion_bench:linear", {"weights": [1.0, None]}, REFUSED, "all or none"),
    )
    h.case(
        "rounds-once",
        "bfloat16 holds even numbers from 256 on; 256 + 1 + 1 = 258",
        [[256.0], [1.0], [1.0]],
        None,
        ("linear", {"normalize": False}, [258.0], "summed in float32, rounded once"),
        ("mergekit:linear", {"weight": [1.0] * 3, "normalize": False}, [258.0], "likewise since 0.1.5"),
        flags="LinearRoundsEachStep",
        dtype="BF16",
    )
    h.case(
        "zero-weight-infinity",
        "0 * inf is NaN: a weight of zero does not remove a model",
        [[1.0], [math.inf]],
        None,
        ("linear", {"weight": [1.0, 0.0]}, [math.nan], ""),
        ("mergekit:linear", {"weight": [1.0, 0.0], "normalize": True}, [math.nan], ""),
        flags="LinearZeroWeightInfinity",
    )
    h.case("one-model", "1 * x is x", [[0.0, -3.0, 2.0**-149]], None, ("linear", {}, [0.0, -3.0, 2.0**-149], ""))
    h.case(
        "shapes",
        "0-d, empty and 2-d tensors: (2 + 4) / 2 = 3, (1 + 3) / 2 = 2",
        [{"s": 2.0, "e": [], "m": [[1.0], [2.0]]}, {"s": 4.0, "e": [], "m": [[3.0], [4.0]]}],
        None,
        ("linear", {}, {"s": 3.0, "e": [], "m": [[2.0], [3.0]]}, ""),
        dtype="F64",
    )
    integers = [{"x": [1.0], "ids": i64(0, 1)}, {"x": [3.0], "ids": i64(0, 2)}]
    h.case(
        "integers-differ",
        "an integer tensor that differs has no mean that is one of its values",
        integers,
        None,
        ("linear", {}, REFUSED, "it must not be averaged and not be dropped"),
        flags="LinearIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "integers-agree",
        "an integer tensor that is the same in all models is copied; (1 + 3) / 2 = 2",
        [integers[0], {"x": [3.0], "ids": i64(0, 1)}],
        None,
        ("linear", {}, {"x": [2.0], "ids": i64(0, 1)}, ""),
        flags="LinearIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case("shape-differs", "shapes (2,) and (3,)", [[1.0, 2.0], [1.0, 2.0, 3.0]], None, ("linear", {}, REFUSED, ""))
    h.case(
        "tensor-missing",
        "the second model lacks y",
        [{"x": [1.0], "y": [1.0]}, {"x": [1.0]}],
        None,
        ("linear", {}, REFUSED, "neither dropped nor averaged over the rest"),
    )
    h.case(
        "weight-count",
        "two models, three weights",
        [[1.0], [2.0]],
        None,
        ("linear", {"weight": [1.0] * 3}, REFUSED, ""),
    )
    h.case("no-models", "nothing to average", [], None, ("linear", {}, REFUSED, ""))
    h.case(
        "negative-sum",
        "weights 1 and -2, of sum -1: -1 and 2, so -4 + 2*8 = 12",
        [[4.0], [8.0]],
        None,
        ("linear", {"weight": [1.0, -2.0]}, [12.0], "any sum but 0 divides"),
    )
    h.case(
        "sum-that-should-be-zero",
        "0.1 + 0.2 - 0.3 = 2^-54 in float64; divided by that, 0.1 + 0.2 = 0.30000000000000004 is 5404319552844596",
        [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]],
        None,
        ("linear", {"weight": [0.1, 0.2, -0.3]}, [1.0, 5404319552844596.0], "it is not 0, and it divides"),
        dtype="F64",
    )
    h.case(
        "one-model-weighted",
        "0.3 / 0.3 = 1",
        [[0.1, -3.0]],
        None,
        ("linear", {"weight": [0.3]}, [0.1, -3.0], "to the bit"),
        dtype="F64",
    )
    h.case(
        "one-model-unnormalized",
        "4 / 2 = 2",
        [[4.0]],
        None,
        ("linear", {"weight": [0.5], "normalize": False}, [2.0], "a factor"),
    )
    for count, x, expect, why in (
        (2, 0.1, 0.1, "to the bit"),
        (3, 7.0, 6.999999999999999, "7/3 is rounded down, and so are the sums"),
        (4, 1.9999999999999998, 1.9999999999999998, "3/4 of 53 ones is rounded, and the last sum rounds back"),
        (8, 1.1, 1.0999999999999999, "3/8, 5/8 and 7/8 of it are rounded"),
    ):
        h.case(
            f"equal-{count}",
            f"{count} times {x!r}",
            [[x]] * count,
            None,
            ("linear", {}, [expect], why),
            dtype="F64",
        )
    h.case(
        "equal-largest",
        "ten times the largest float32, 2^128 - 2^104: a tenth is rounded up, and ten of them are above it",
        [[2.0**128 - 2.0**104]] * 10,
        None,
        ("linear", {}, [math.inf], ""),
    )
    h.case(
        "subnormal",
        "half of 2^-149, the least positive float32, is a tie that goes to 0; half of 2^-148 is exact",
        [[2.0**-149, 2.0**-148], [2.0**-149, 2.0**-148]],
        None,
        ("linear", {}, [0.0, 2.0**-148], "each is scaled before it is added"),
    )
    h.case(
        "negative-zero",
        "-0.0 - 0.0 = -0.0, -0.0 + 0.0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, -0.0], [-0.0, 0.0]],
        None,
        ("linear", {}, [-0.0, 0.0], ""),
    )
    h.case(
        "axes",
        "four axes: (2 + 4) / 2, (4 + 0) / 2, (6 + 2) / 2, (8 + 0) / 2",
        [[[[[2.0, 4.0]]], [[[6.0, 8.0]]]], [[[[4.0, 0.0]]], [[[2.0, 0.0]]]]],
        None,
        ("linear", {}, [[[[3.0, 2.0]]], [[[4.0, 4.0]]]], ""),
    )
    h.case(
        "fused",
        "-1024 and 3072 with weights 1 and 1/3, which is (1 + 2^-25) / 3 in float32",
        [[-1024.0], [3072.0]],
        None,
        ("linear", {"weight": [1.0, 1 / 3], "normalize": False}, [0.0], "1024 + 2^-15 rounds to 1024"),
        ("mergekit:linear", {"weight": [1.0, 1 / 3], "normalize": False}, [2.0**-15], "added before it is rounded"),
        flags="LinearFused",
        dtype="BF16",
        options={"arithmetic": "native"},
    )
    h.case(
        "mean-rounds-once",
        "the mean of 256, 1 and 1 in bfloat16, 258 / 3; of a sum in bfloat16 it would be 256 / 3, rounded to 85.5",
        [[256.0], [1.0], [1.0]],
        None,
        ("linear", {}, [86.0], "summed in float32, rounded once"),
        ("mergelm:linear", {}, [86.0], "the mean of a stack is summed in float32"),
        ("mergellm:linear", {}, [86.0], "the mean of a stack is summed in float32"),
        flags="LinearRoundsEachStep",
        dtype="BF16",
    )
    return h
