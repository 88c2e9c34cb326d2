"""Vectors of task_arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, i64

CODE = {
    "fusion_bench:task_arithmetic": "tanganke/fusion_bench@54c9e8c fusion_bench/method/task_arithmetic/task_arithmetic.py",
    "mergelm:task_arithmetic": "yule-BUAA/MergeLM@6d49ad9 "
    "model_merging_methods/merging_methods.py:MergingMethod.task_arithmetic",
    "peft:task_arithmetic": "huggingface/peft@5d602fd src/peft/utils/merge_utils.py:task_arithmetic",
    "official:task_arithmetic": "mlfoundations/task_vectors@826a64c src/task_vectors.py:TaskVector",
}
TOOLS = ("fusion_bench",)
FLAGS = {
    "task_arithmetic-mergekit-04": ["TaskArithmeticNormalize", "TaskArithmeticZeroWeightSum"],
    "task_arithmetic-task_vectors-00": ["TaskArithmeticIntegerBuffers"],
}
PAPER = {
    "task_arithmetic-task_vectors-00": Paper({"lambda_": 0.8}),
    "task_arithmetic-task_vectors-03": Paper({"weight": [-1.0, 1.0, 1.0]}, comment="analogy: C + (B - A)"),
    "task_arithmetic-mergekit-01": Paper({"weight": [0.6, 0.4]}),
    "task_arithmetic-fusion_bench-00": Paper({"lambda_": 0.3}),
}

STAGED = (
    "task_arithmetic-add", "task_arithmetic-negate", "task_arithmetic-analogy", "task_arithmetic-normalize",
    "task_arithmetic-zero-weight-sum", "task_arithmetic-one-model", "task_arithmetic-equal-models",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    added = sum(w * x for w, x in zip(given.each("weight", 1.0), tau))
    return {1: {"tau": tau}, 2: {"result": given.base + Fraction(given.params.get("lambda_", 1.0)) * added}}


def hand() -> Hand:
    h = Hand("task_arithmetic", CODE)
    add = {"op": "add", "scaling_coef": 0.5}
    h.case(
        "add",
        "tau = (2, -4) and (4, 4); 1 + (2 + 4)/2 = 4, 1 + 0 = 1",
        [[3, -3], [5, 5]],
        [1, 1],
        ("task_arithmetic", {"lambda_": 0.5}, [4, 1], "one coefficient for the sum, not for the mean"),
        ("official:task_arithmetic", add, [4, 1], ""),
        ("mergekit:task_arithmetic", {"weight": [1.0, 1.0], "normalize": False, "lambda_": 0.5}, [4, 1], ""),
        ("fusion_bench:task_arithmetic", {"scaling_factor": 0.5}, [4, 1], ""),
        ("mergelm:task_arithmetic", {"scaling_coefficient": 0.5}, [4, 1], ""),
    )
    h.case(
        "negate",
        "tau = (2, -4); 1 - 2/2 = 0, 1 + 4/2 = 3",
        [[3, -3]],
        [1, 1],
        ("task_arithmetic", {"lambda_": -0.5}, [0, 3], ""),
        ("official:task_arithmetic", {"op": "negate", "scaling_coef": 0.5}, [0, 3], ""),
    )
    h.case(
        "analogy",
        "A, B, C = 3, 5, 9 over a base of 1: 1 + (-2 + 4 + 8) = 11",
        [[3], [5], [9]],
        [1],
        ("task_arithmetic", {"weight": [-1.0, 1.0, 1.0]}, [11], "A is to B as C is to the result"),
        ("official:task_arithmetic", {"op": "analogy", "scaling_coef": 1.0}, [11], ""),
    )
    h.case(
        "normalize",
        "tau = 4 and 8 with weights 1 and 3",
        [[4.0], [8.0]],
        [0.0],
        ("task_arithmetic", {"weight": [1.0, 3.0]}, [28.0], "4 + 24"),
        ("mergekit:task_arithmetic", {"weight": [1.0, 3.0], "normalize": True}, [7.0], "(4 + 24) / (1 + 3)"),
        ("peft:task_arithmetic", {"weights": [1.0, 3.0]}, [28.0], "4 + 24; it has no base"),
        flags="TaskArithmeticNormalize",
    )
    h.case(
        "zero-weight-sum",
        "tau = 4 and 8 with weights 1 and -1",
        [[4.0], [8.0]],
        [0.0],
        ("task_arithmetic", {"weight": [1.0, -1.0]}, [-4.0], "4 - 8: nothing is divided"),
        ("mergekit:task_arithmetic", {"weight": [1.0, -1.0], "normalize": True}, [-4.0], "a divisor of 0 becomes 1"),
        flags="TaskArithmeticZeroWeightSum",
    )
    h.case(
        "one-model",
        "tau = (2, -4); 1 + 2/2 = 2, 1 - 4/2 = -1",
        [[3, -3]],
        [1, 1],
        ("task_arithmetic", {"lambda_": 0.5}, [2, -1], "a sum of one"),
        ("mergelm:task_arithmetic", {"scaling_coefficient": 0.5}, OPEN, "its sum begins with the second of the models"),
        flags="TaskArithmeticOneModel",
    )
    h.case(
        "lambda-zero",
        "lambda 0 gives the base",
        [[3.0, 7.0]],
        [1.0, -2.0],
        ("task_arithmetic", {"lambda_": 0.0}, [1.0, -2.0], ""),
    )
    h.case(
        "round-trip",
        "float32: 1 - 2^25 = -33554431 rounds to -2^25, so base + (model - base) = 0, not 1; 2 + (4 - 2) = 4",
        [[1.0, 4.0]],
        [2.0**25, 2.0],
        ("task_arithmetic", {}, [0.0, 4.0], ""),
        ("official:task_arithmetic", {"op": "add", "scaling_coef": 1.0}, [0.0, 4.0], ""),
        flags="TaskArithmeticRoundTrip",
    )
    buffers = [{"x": [3.0], "ids": i64(7)}]
    h.case(
        "integers-base",
        "1 + (3 - 1) = 3; the integer tensor stays the base's",
        buffers,
        {"x": [1.0], "ids": i64(5)},
        ("task_arithmetic", {}, {"x": [3.0], "ids": i64(5)}, "asked for by the caller"),
        (
            "official:task_arithmetic",
            {"op": "add", "scaling_coef": 1.0},
            {"x": [3.0], "ids": i64(5)},
            "int64 is skipped",
        ),
        flags="TaskArithmeticIntegerBuffers",
    )
    h.case(
        "integers-differ",
        "5 in the base, 7 in the model",
        buffers,
        {"x": [1.0], "ids": i64(5)},
        ("task_arithmetic", {}, REFUSED, "no integer tensor is subtracted, scaled or dropped silently"),
        flags="TaskArithmeticIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "tensor-missing",
        "the model lacks y",
        [{"x": [1.0]}],
        {"x": [1.0], "y": [1.0]},
        ("task_arithmetic", {}, REFUSED, "it must not stay at the base with a warning"),
        flags="TaskArithmeticMissingTensor",
    )
    h.case(
        "shapes",
        "0-d and empty: 1 + (3 - 1) = 3",
        [{"s": 3.0, "e": []}],
        {"s": 1.0, "e": []},
        ("task_arithmetic", {}, {"s": 3.0, "e": []}, ""),
        dtype="F64",
    )
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("task_arithmetic", {}, REFUSED, ""))
    h.case("no-models", "nothing to add", [], [1.0], ("task_arithmetic", {}, REFUSED, ""))
    h.case(
        "weights-zero",
        "weights of 0 give the base",
        [[3.0], [5.0]],
        [1.0],
        ("task_arithmetic", {"weight": [0.0, 0.0]}, [1.0], ""),
    )
    h.case("equal-models", "tau = 2, twice: 1 + 2 + 2", [[3.0], [3.0]], [1.0], ("task_arithmetic", {}, [5.0], "no mean"))
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[3.0]],
        [-0.0],
        ("task_arithmetic", {"lambda_": 0.0}, [0.0], ""),
    )
    h.case(
        "nan-inf",
        "weights 0 and 1: 0 inf + 2 = NaN, 0 NaN + 2 = NaN, inf - inf = NaN, 0 + inf = inf, 0 + 2 = 2",
        [[math.inf, math.nan, 1.0, 1.0, 1.0], [2.0, 2.0, math.inf, math.inf, 2.0]],
        [0.0, 0.0, math.inf, 0.0, 0.0],
        ("task_arithmetic", {"weight": [0.0, 1.0]}, [math.nan, math.nan, math.nan, math.inf, 2.0], ""),
    )
    h.case(
        "axes",
        "four axes: 2 + 1/2 (4 + 2), 4 + 1/2 (-4 + 0), 0 + 1/2 (2 + 2), 1 + 1/2 (0 - 1)",
        [[[[[6.0, 0.0]]], [[[2.0, 1.0]]]], [[[[4.0, 4.0]]], [[[2.0, 0.0]]]]],
        [[[[2.0, 4.0]]], [[[0.0, 1.0]]]],
        ("task_arithmetic", {"lambda_": 0.5}, [[[[5.0, 2.0]]], [[[2.0, 0.5]]]], ""),
    )
    h.case(
        "all-base",
        "3 + 2 (0 + 0) = 3",
        [[3.0, -0.5], [3.0, -0.5]],
        [3.0, -0.5],
        ("task_arithmetic", {"lambda_": 2.0}, [3.0, -0.5], ""),
    )
    return h
