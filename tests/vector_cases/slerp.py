"""Vectors of slerp."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, Paper, Test, i64

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

STAGED = (
    "slerp-right-angle", "slerp-sixty-degrees", "slerp-endpoint", "slerp-extrapolates", "slerp-unequal-norms",
    "slerp-zero-operand", "slerp-eps-reached", "slerp-parallel", "slerp-nearly-opposite",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    a, b = given.models
    t = given.params.get("t", 0.5)
    omega = angle(a, b)
    if math.sin(omega) <= given.params.get("eps", 1e-3):
        return {1: {"omega": omega}, 2: {"result": (1 - Fraction(t)) * a + Fraction(t) * b}}
    c_a, c_b = arc(t, omega)
    return {1: {"omega": omega}, 3: {"c_a": c_a, "c_b": c_b, "result": c_a * a + c_b * b}}


def angle(a: Any, b: Any) -> float:
    """By the sine and the cosine, up to the lengths: both exact up to a root."""
    aa, bb, ab = sum(a * a), sum(b * b), sum(a * b)
    return math.atan2(math.sqrt(aa * bb - ab * ab), ab)


def arc(t: float, omega: float) -> tuple[float, float]:
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


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
    exact = {"dtype": "F64", "tolerance": 1e-14}
    h.case("parallel", "w = 0: 3/4 a + 1/4 2 a", [[1, 2, 2], [2, 4, 4]], None, both(0.25, [1.25, 2.5, 2.5]), **exact)
    for id, width, expect, why in (
        ("line-before-the-switch", 1001.0, [1001.0, 0.5], "the line"),
        ("arc-after-the-switch", 999.0, [999.0, 0.5], "the arc: the half sum over cos(w/2)"),
    ):
        stretched = math.cos(math.atan2(1, width) / 2) if width == 999 else 1.0
        h.case(
            id,
            f"tan w = 1/{width:g}, and its sine is on {'this' if width > 1000 else 'that'} side of 1/1000: {why}",
            [[width, 0.0], [width, 1.0]],
            None,
            both(0.5, [x / stretched for x in expect]),
            dtype="F64",
            tolerance=1e-12,
        )
    # x^2 = 1 + 4098 u + 2049^2 u^2 with u = 2^-23, and 2049^2 u is a little more than 1/2: rounded up to 1 + 4099 u.
    u = 2.0**-23
    x, square = 1 + 2049 * u, 1 + 4099 * u
    seen = math.asin(math.sqrt((square - x * x) / square))
    far_out = arc(64.0, seen)
    h.case(
        "angle-of-rounding",
        "1 + 2049/2^23 and 1 in float32, parallel: the first's square is rounded up, so that the cosine is x / sqrt(1 + "
        "4099/2^23) = 1 - 3.0e-8 and the angle 2.4e-4. Far out, at t = 64, the arc with this angle has bent by 1.2e-4",
        [[x], [1.0]],
        None,
        ("slerp", {"t": 64.0, "eps": 0.0}, [far_out[0] * x + far_out[1]], "eps = 0 takes it for an angle"),
        ("slerp", {"t": 64.0}, [64 - 63 * x], "eps takes it for none: the line"),
        tolerance=1e-5,
    )
    opposite = "b = -a; 5 / (sqrt 5 sqrt 5) is 1 - 2^-52, so w = 180 degrees less 2^-25.5"
    h.case(
        "eps-zero-opposite",
        f"{opposite}: (sin(3w/4) - sin(w/4)) / sin w = sin(w/4) / sin(w/2) = sin 45 of a",
        [[1.0, 2.0], [-1.0, -2.0]],
        None,
        ("slerp", {"t": 0.25, "eps": 0.0}, [half, 2 * half], ""),
        flags="SlerpAntiparallel",
        dtype="F64",
        tolerance=1e-6,
    )
    h.case(
        "eps-zero-opposite-rounded",
        f"{opposite}: both coefficients are 2^25 up to 1, which float32 does not tell apart there",
        [[1.0, 2.0], [-1.0, -2.0]],
        None,
        ("slerp", {"t": 0.25, "eps": 0.0}, [0.0, 0.0], ""),
        flags="SlerpAntiparallel",
    )
    h.case(
        "extrapolates-ellipse",
        "w = 90 degrees, t = 3/2: sin -45 of the first and sin 135 of the second, of lengths 1 and 3",
        [[1.0, 0.0], [0.0, 3.0]],
        None,
        both(1.5, [-half, 3 * half]),
        **exact,
    )
    h.case("line-extrapolates", "-2 a + 3 * 2 a", [[1.0, 2.0], [2.0, 4.0]], None, both(3.0, [4.0, 8.0]))
    h.case(
        "products-vanish",
        "2^-75 squared is 2^-150, half the least float32, and rounds to 0: the line, though at a right angle",
        [[2.0**-75, 0.0], [0.0, 2.0**-75]],
        None,
        both(0.5, [2.0**-76, 2.0**-76]),
    )
    h.case(
        "products-subnormal",
        "tan w = 1/2; the squares 2^-148 stay and 2^-150 does not, so that the cosine is 1: the line",
        [[2.0**-74, 0.0], [2.0**-74, 2.0**-75]],
        None,
        both(0.5, [2.0**-74, 2.0**-76]),
    )
    wide = [[2.0**64, 0.0], [2.0**63, 2.0**63]]
    h.case(
        "products-infinite",
        "45 degrees; the square of 2^64 is infinite in float32, so that the cosine is 0 and sin 45 is taken of both",
        wide,
        None,
        both(0.5, [3 * 2.0**63 * half, 2.0**63 * half]),
        tolerance=1e-6,
    )
    h.case(
        "products-finite-in-float64",
        "45 degrees: the sum over 2 cos 22.5",
        wide,
        None,
        both(0.5, [x * 2.0**63 / (2 * math.cos(math.pi / 8)) for x in (3, 1)]),
        **exact,
    )
    h.case(
        "products-nan",
        "2^64 * 2^64 is infinite in float32, and infinity over infinity NaN",
        [[2.0**64, 0.0], [2.0**64, 1.0]],
        None,
        both(0.5, [math.nan, math.nan]),
    )
    h.case(
        "products-infinite-float64",
        "45 degrees; the square of 2^512 is infinite, so that the cosine is 0 and sin 45 is taken of both",
        [[2.0**512, 0.0], [2.0**511, 2.0**511]],
        None,
        both(0.5, [3 * 2.0**511 * half, 2.0**511 * half]),
        **exact,
    )
    h.case(
        "products-vanish-float64",
        "2^-538 squared is 2^-1076, less than half the least number, and rounds to 0: the line, though at a right angle",
        [[2.0**-538, 0.0], [0.0, 2.0**-538]],
        None,
        both(0.5, [2.0**-539, 2.0**-539]),
        dtype="F64",
    )
    counted = [{"x": [1.0], "ids": i64(3, 4)}, {"x": [3.0], "ids": i64(3, 4)}]
    h.case(
        "integers-agree",
        "one entry: the line, (1 + 3) / 2; equal integers are copied",
        counted,
        None,
        both(0.5, {"x": [2.0], "ids": i64(3, 4)}),
        options={"integers": "equal"},
    )
    h.case(
        "integers-differ",
        "integers have no arc",
        [counted[0], {"x": [3.0], "ids": i64(3, 5)}],
        None,
        both(0.5, REFUSED),
        options={"integers": "equal"},
    )
    h.case(
        "over-model",
        "a right angle over both tensors: sin 45 for both; each by itself would be a line",
        [{"x": [1.0], "y": [0.0]}, {"x": [0.0], "y": [1.0]}],
        None,
        both(0.5, {"x": [half], "y": [half]}),
        options={"over": "model"},
        **exact,
    )
    h.case("eps-negative", "eps = -1/8 is no sine", [[1.0], [2.0]], None, ("slerp", {"eps": -0.125}, REFUSED, ""))
    h.case(
        "axes",
        "three axes; lengths of 5, product 7: cos w = 7/25, cos(w/2) = 4/5, and both coefficients are 1 / (2 4/5) = 5/8",
        [[[[4, 2]], [[-2, 1]], [[0, 0]]], [[[2, 0]], [[0, -1]], [[4, 2]]]],
        None,
        ("slerp", {}, [[[3.75, 1.25]], [[-1.25, 0]], [[2.5, 1.25]]], "5/8 (6, 2, -2, 0, 4, 2)"),
        dtype="F64",
        tolerance=1e-14,
    )
    return h


def mergekit_slerp(id: str, a: list[float], b: list[float], t: float, expect: list[float], flags: str, comment: str) -> Test:
    """mergekit's first model is called the base, so the same numbers go in differently."""
    h = Hand("slerp", CODE)
    h.case(id, comment, [b], a, ("mergekit:slerp", {"t": t}, expect, ""), flags=flags, dtype="F64", tolerance=1e-12)
    return h.tests[0]
