"""Vectors of slerp."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Hand, Paper, Test

CODE = {
    "fusion_bench:slerp": "tanganke/fusion_bench@54c9e8c fusion_bench/method/slerp/slerp_utils.py:slerp",
    "mergellm:slerp": "yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.slerp_merging",
    "sd_mecha:slerp": "ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/linear.py:slerp",
    "mergekit:slerp": "mergekit 0.1.5 mergekit/merge_methods/slerp.py:slerp_merge_method",
}
TOOLS = ("fusion_bench", "mergellm")
FLAGS = {
    "slerp-fusion_bench-03": ["SlerpThreshold"],
}
PAPER = {
    "slerp-MergeLLM-00": Paper({"t": 0.3}, comment="no tensor is near the threshold"),
    "slerp-mergekit-01": Paper({"t": 0.35}, base_first=True, comment="mergekit's base is the first model"),
    "slerp-mergekit-04": Paper({"t": 0.0}, base_first=True, comment="mergekit's base is the first model"),
}


def hand() -> Hand:
    h = Hand("slerp", CODE)
    half = math.sqrt(0.5)
    # The angle between (64, 0) and (64, 1): tan w = 1/64.
    omega = math.atan2(1, 64)
    near = 1 / (2 * math.cos(omega / 2))
    far = 1 / (2 * math.sin(omega / 2))

    def both(t: float, expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("slerp", {"t": t}, expect, why)

    def also(t: float, expect: Any, why: str = "") -> list[tuple[str, dict[str, Any], Any, str]]:
        """Tools that do as mergekit does, with two models and no base."""
        return [("fusion_bench:slerp", {"t": t}, expect, why), ("mergellm:slerp", {"slerp_t": t}, expect, why)]

    h.case(
        "right-angle",
        "w = 90 degrees: sin 60 and sin 30 over sin 90",
        [[1.0, 0.0], [0.0, 1.0]],
        None,
        both(1 / 3, [math.sqrt(0.75), 0.5]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "sixty-degrees",
        "cos w = 1 / (sqrt 2 * sqrt 2) = 1/2; sin 30 / sin 60 = 1 / sqrt 3 for both",
        [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]],
        None,
        ("slerp", {}, [2 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)], "t is 1/2 by default"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "endpoint",
        "t = 1 gives the second model: coefficients 0 and 1",
        [[3.0, 0.0], [0.0, 5.0]],
        None,
        both(1.0, [0.0, 5.0]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "extrapolates",
        "t = 2 at w = 90 degrees: sin(-90) a + sin(180) b = -a",
        [[1.0, 0.0], [0.0, 1.0]],
        None,
        both(2.0, [-1.0, 0.0]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "unequal-norms",
        "w = 90 degrees, norms 1 and 3: sin 45 for both",
        [[1.0, 0.0], [0.0, 3.0]],
        None,
        both(0.5, [half, 3 * half], "the coefficients act on the vectors as they are, so norms blend too"),
        *also(0.5, [half, 3 * half]),
        flags="SlerpNormsInterpolated",
        dtype="F64",
        tolerance=1e-14,
    )
    h.tests.append(
        mergekit_slerp(
            "unequal-norms",
            [1.0, 0.0],
            [0.0, 3.0],
            0.5,
            [half, 3 * half],
            "SlerpNormsInterpolated",
            "w = 90 degrees, norms 1 and 3: sin 45 for both",
        )
    )
    angle = "tan w = 1/64, cos w = 0.99988 > 0.9995"
    h.case(
        "threshold",
        angle,
        [[64.0, 0.0], [64.0, 1.0]],
        None,
        both(0.5, [128 * near, near], "an arc: (a + b) / (2 cos(w/2))"),
        *also(0.5, [64.0, 0.5], "a straight line"),
        flags="SlerpThreshold",
        dtype="F64",
        tolerance=1e-12,
    )
    h.tests.append(
        mergekit_slerp(
            "threshold",
            [64.0, 0.0],
            [64.0, 1.0],
            0.5,
            [64.0, 0.5],
            "SlerpThreshold",
            f"{angle}: a straight line, (a + b) / 2",
        )
    )
    opposite = "w = 180 degrees less atan(1/64), cos w = -0.99988"
    h.case(
        "nearly-opposite",
        opposite,
        [[64.0, 0.0], [-64.0, 1.0]],
        None,
        both(
            0.5,
            [0.0, far],
            "an arc half way round, of norm 64: (a + b) / (2 cos(w/2)) with cos(w/2) = sin(atan(1/64)/2)",
        ),
        *also(0.5, [0.0, 0.5], "a straight line"),
        flags="SlerpThreshold SlerpAntiparallel",
        dtype="F64",
        tolerance=1e-10,
    )
    h.tests.append(
        mergekit_slerp(
            "nearly-opposite",
            [64.0, 0.0],
            [-64.0, 1.0],
            0.5,
            [0.0, 0.5],
            "SlerpThreshold SlerpAntiparallel",
            f"{opposite}: a straight line through the origin",
        )
    )
    h.case(
        "opposite",
        "b = -a: sin w is 0 up to rounding, no arc is preferred; the line gives (3/4 - 1/4) a",
        [[1.0, 2.0], [-1.0, -2.0]],
        None,
        both(0.25, [0.5, 1.0]),
        *also(0.25, [0.5, 1.0]),
        flags="SlerpAntiparallel",
        dtype="F64",
        tolerance=1e-14,
    )
    h.tests.append(
        mergekit_slerp(
            "opposite",
            [1.0, 2.0],
            [-1.0, -2.0],
            0.25,
            [0.5, 1.0],
            "SlerpAntiparallel",
            "b = -a: the line gives (3/4 - 1/4) a",
        )
    )
    h.case(
        "zero-operand",
        "a = 0",
        [[0.0, 0.0], [2.0, 4.0]],
        None,
        both(0.5, [1.0, 2.0], "no angle, so the line: b / 2"),
        flags="SlerpZeroOperand",
        dtype="F64",
    )
    h.case(
        "zero-operand",
        "a = 0",
        [[0.0, 0.0], [2.0, 4.0]],
        None,
        *also(0.5, [2 * half, 4 * half], "its cosine is taken as 0, so sin(45) b"),
        flags="SlerpZeroOperand",
        dtype="F64",
        tolerance=1e-14,
    )
    h.tests.append(
        mergekit_slerp(
            "zero-operand",
            [0.0, 0.0],
            [2.0, 4.0],
            0.5,
            [2 * half, 4 * half],
            "SlerpZeroOperand",
            "a = 0: its cosine is taken as 0, so sin(45) b",
        )
    )
    length = (64 + math.hypot(64, 1)) / 2
    for id, a, b, t, expect, flags, comment in (
        (
            "unequal-norms",
            [1.0, 0.0],
            [0.0, 3.0],
            0.5,
            [2 * half, 2 * half],
            "SlerpNormsInterpolated",
            "w = 90 degrees: half way between the unit vectors, times the mean of 1 and 3",
        ),
        (
            "threshold",
            [64.0, 0.0],
            [64.0, 1.0],
            0.5,
            [length * math.cos(omega / 2), length * math.sin(omega / 2)],
            "SlerpThreshold",
            "tan w = 1/64: half way between the unit vectors, times the mean of 64 and sqrt(4097)",
        ),
        (
            "nearly-opposite",
            [64.0, 0.0],
            [-64.0, 1.0],
            0.5,
            [length * math.sin(omega / 2), length * math.cos(omega / 2)],
            "SlerpThreshold SlerpAntiparallel",
            "w = 180 degrees less atan(1/64): half way round, times the mean of 64 and sqrt(4097)",
        ),
        (
            "opposite",
            [1.0, 2.0],
            [-1.0, -2.0],
            0.25,
            [half, 2 * half],
            "SlerpAntiparallel",
            "b = -a: (sin 135 - sin 45) / sin 180 of a is computed where its limit is cos 45",
        ),
        ("zero-operand", [0.0, 0.0], [2.0, 4.0], 0.5, [1.0, 2.0], "SlerpZeroOperand", "a = 0: NaN, and so the line"),
    ):
        answer = ("sd_mecha:slerp", {"alpha": t}, expect, "")
        h.case(id, comment, [a, b], None, answer, flags=flags, tolerance=1e-3 if "opposite" in id else 1e-5)
    h.case("both-zero", "the line between 0 and 0", [[0.0, 0.0], [0.0, 0.0]], None, both(0.5, [0.0, 0.0]))
    h.case(
        "identical",
        "w = 0: (1 - t) x + t x",
        [[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]],
        None,
        both(0.25, [1.0, 2.0, 2.0]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "scalars",
        "0-d tensors have an angle of 0 or 180 degrees: the line, (2 + 6) / 2 and (2 - 6) / 2",
        [{"p": 2.0, "n": 2.0, "e": []}, {"p": 6.0, "n": -6.0, "e": []}],
        None,
        both(0.5, {"p": 4.0, "n": -2.0, "e": []}),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "per-tensor",
        "each tensor has its own angle: x is the right angle, y the line between 1 and 3",
        [{"x": [1.0, 0.0], "y": [1.0]}, {"x": [0.0, 1.0], "y": [3.0]}],
        None,
        both(0.5, {"x": [half, half], "y": [2.0]}),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case("one-model", "an arc needs two ends", [[1.0]], None, ("slerp", {}, REFUSED, ""))
    h.case("three-models", "an arc has two ends", [[1.0], [2.0], [3.0]], None, ("slerp", {}, REFUSED, ""))
    h.case(
        "eps-reached",
        "w = 90 degrees and eps = 1: the sine is not above eps, so the line (3/4, 1/4)",
        [[1.0, 0.0], [0.0, 1.0]],
        None,
        ("slerp", {"t": 0.25, "eps": 1.0}, [0.75, 0.25], ""),
        dtype="F64",
    )
    h.case(
        "cosine-past-one",
        "3 / (sqrt 3 sqrt 3) is rounded to a little more than 1, and -3 over it to less than -1: angles of 0 and 180 "
        "degrees, the line (3/4 + 1/4) a and (3/4 - 1/4) a",
        [{"p": [1.0, 1.0, 1.0], "n": [1.0, 1.0, 1.0]}, {"p": [1.0, 1.0, 1.0], "n": [-1.0, -1.0, -1.0]}],
        None,
        both(0.25, {"p": [1.0, 1.0, 1.0], "n": [0.5, 0.5, 0.5]}),
        dtype="F64",
    )
    h.case(
        "nan",
        "a length that is NaN is not zero: there is an angle, NaN, and all is NaN",
        [[math.nan, 1.0], [1.0, 1.0]],
        None,
        both(0.5, [math.nan, math.nan]),
    )
    return h


def mergekit_slerp(id: str, a: list[float], b: list[float], t: float, expect: list[float], flags: str, comment: str) -> Test:
    """mergekit's first model is called the base, so the same numbers go in differently."""
    h = Hand("slerp", CODE)
    h.case(id, comment, [b], a, ("mergekit:slerp", {"t": t}, expect, ""), flags=flags, dtype="F64", tolerance=1e-12)
    return h.tests[0]
