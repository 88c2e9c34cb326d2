"""Vectors of warp."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64
from vector_cases.slerp import angle, arc

CODE = {
    "mergekit:slerp": "mergekit 0.1.5 mergekit/merge_methods/slerp.py:slerp_merge_method",
}
FLAGS = {
    "warp-WARP_lab-00": ["WarpAngleScope"],
    "warp-zokost-00": ["WarpAngleScope", "WarpClamp"],
}
EVIDENCE = {"warp-WARP_lab-00", "warp-zokost-00"}
PAPER = {
    "warp-WARP_lab-00": Paper({}, entry="warp", comment="tensors outside of layers have an angle each, there and here"),
}
TOLERANT: dict[str, Any] = {"dtype": "F64", "tolerance": 1e-14}

STAGED = (
    "warp-five-eighths", "warp-weights", "warp-three-policies", "warp-three-policies-weights", "warp-zero-task-vector",
    "warp-identical", "warp-opposite", "warp-cancelled", "warp-negative-weight", "warp-last-alone",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """The arcs themselves, where the page has coefficients alone."""
    delta = [theta - given.base for theta in given.models]
    G = np.array([[sum(x * y) for y in delta] for x in delta], object)
    w = given.each("weight", 1.0)
    c, s = [Fraction(1)], delta[0]
    for m in range(1, len(delta)):
        share = w[m] / sum(w[: m + 1]) if w[m] else Fraction(0)
        parts = sum(c_i * c_i * G[i, i] for i, c_i in enumerate(c))
        omega = angle(s, delta[m]) if sum(s * s) > parts / 10**6 else 0.0
        of_s, of_delta = arc(float(share), omega) if math.sin(omega) > 1e-3 else (1 - share, share)
        c, s = [*(of_s * c_i for c_i in c), of_delta], of_s * s + of_delta * delta[m]
    return {1: {"delta": delta}, 2: {"G": G}, 3: {"c": c}, 4: {"result": given.base + s}}


def hand() -> Hand:
    h = Hand("warp", CODE)
    half, third = math.sqrt(0.5), math.sqrt(0.75)

    def plain(expect: Any, why: str = "", **params: Any) -> tuple[str, dict[str, Any], Any, str]:
        return ("warp", params, expect, why)

    h.case(
        "five-eighths",
        "task vectors of length 5, product 7: cos w = 7/25, cos(w/2) = 4/5, and both coefficients are 1 / (2 4/5) = 5/8",
        [[5, 3, -1, 2, 1, 1], [3, 1, 1, 0, 5, 3]],
        [1, 1, 1, 1, 1, 1],
        plain([4.75, 2.25, -0.25, 1, 3.5, 2.25], "1 + 5/8 (6, 2, -2, 0, 4, 2)"),
        **TOLERANT,
    )
    h.case(
        "weights",
        "w = 90 degrees, weights 2 and 1: a third of the way, sin 60 and sin 30",
        [[1.0, 0.0], [0.0, 1.0]],
        [0.0, 0.0],
        plain([third, 0.5], weight=[2.0, 1.0]),
        **TOLERANT,
    )
    h.case(
        "second-alone",
        "weights 0 and 1: all the way",
        [[4.0, 1.0], [1.0, 3.0]],
        [1.0, 1.0],
        plain([1.0, 3.0], weight=[0.0, 1.0]),
        **TOLERANT,
    )
    h.case(
        "three-policies",
        "half-way from x to y there is (1, 1, 0) / sqrt 2, of length 1, and a third of the way to z at 90 degrees sin 60 of "
        "it and sin 30 of z",
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [0.0, 0.0, 0.0],
        plain([half * third, half * third, 0.5]),
        flags="WarpManyPolicies",
        **TOLERANT,
    )
    h.case(
        "three-policies-weights",
        "weights 1, 0 and 1: nothing of y, and half of the way to z",
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [0.0, 0.0, 0.0],
        plain([half, 0.0, half], weight=[1.0, 0.0, 1.0]),
        flags="WarpManyPolicies",
        **TOLERANT,
    )
    h.case(
        "one-angle-a-layer",
        "layer 0: task vectors (4, 2, -2, 1 | 0, 0) and (2, 0, 0, -1 | 4, 2) over both of its tensors, 5/8 as above; the "
        "norm alone: (2, 0) and (0, 2) at 90 degrees, sin 45 for both",
        [
            {"model.layers.0.a": [4, 2, -2, 1], "model.layers.0.b": [0, 0], "model.norm": [2, 0]},
            {"model.layers.0.a": [2, 0, 0, -1], "model.layers.0.b": [4, 2], "model.norm": [0, 2]},
        ],
        {"model.layers.0.a": [0, 0, 0, 0], "model.layers.0.b": [0, 0], "model.norm": [0, 0]},
        plain(
            {
                "model.layers.0.a": [3.75, 1.25, -1.25, 0],
                "model.layers.0.b": [2.5, 1.25],
                "model.norm": [2 * half, 2 * half],
            }
        ),
        flags="WarpAngleScope",
        **TOLERANT,
    )
    fine_tunes = "task vectors (0, 1, 0) and (0, 0, 1) on a base of (64, 0, 0)"
    h.case(
        "task-vectors",
        fine_tunes,
        [[64.0, 1.0, 0.0], [64.0, 0.0, 1.0]],
        [64.0, 0.0, 0.0],
        plain([64.0, half, half], "90 degrees: sin 45 for both"),
        flags="WarpOfWeights",
        **TOLERANT,
    )
    h.case(
        "weights-on-an-arc",
        fine_tunes,
        [[64.0, 0.0, 1.0]],
        [64.0, 1.0, 0.0],
        (
            "mergekit:slerp",
            {"t": 0.5},
            [64.0, 0.5, 0.5],
            "mergekit's base is the first model; the weights have a cosine of 4096/4097 > 0.9995: the average",
        ),
        flags="WarpOfWeights",
        dtype="F64",
        tolerance=1e-12,
    )
    h.case(
        "zero-task-vector",
        "the first policy is the base: no angle, so the line: half of (2, 4)",
        [[1.0, 1.0], [3.0, 5.0]],
        [1.0, 1.0],
        plain([2.0, 3.0]),
        flags="WarpNoDirection",
        dtype="F64",
    )
    h.case(
        "identical",
        "w = 0: the line; the policy itself",
        [[3.0, 5.0, -1.0], [3.0, 5.0, -1.0]],
        [1.0, 1.0, 1.0],
        plain([3.0, 5.0, -1.0]),
        flags="WarpNoDirection",
        dtype="F64",
    )
    h.case(
        "opposite",
        "w = 180 degrees: the line; weights 3 and 1, so 3/4 - 1/4 of (2, -4)",
        [[3.0, -3.0], [-1.0, 5.0]],
        [1.0, 1.0],
        plain([2.0, -1.0], weight=[3.0, 1.0]),
        flags="WarpNoDirection",
        dtype="F64",
    )
    h.case(
        "cancelled",
        "the first two are opposite and meet at the base, which has no direction: a third of the third, (0, 6)",
        [[2.0, 0.0], [-2.0, 0.0], [0.0, 6.0]],
        [0.0, 0.0],
        plain([0.0, 2.0]),
        flags="WarpNoDirection WarpManyPolicies",
        **TOLERANT,
    )
    h.case(
        "all-the-base",
        "policies that equal the base give it",
        [[1.0, -2.0], [1.0, -2.0], [1.0, -2.0]],
        [1.0, -2.0],
        plain([1.0, -2.0]),
    )
    h.case(
        "scalars",
        "0-d tensors have an angle of 0 or 180 degrees: the line, 1 + (2 + 6) / 2 and 1 + (2 - 6) / 2; and no entry at all",
        [{"p": 3.0, "n": 3.0, "e": []}, {"p": 7.0, "n": -5.0, "e": []}],
        {"p": 1.0, "n": 1.0, "e": []},
        plain({"p": 5.0, "n": -1.0, "e": []}),
        **TOLERANT,
    )
    h.case("one-policy", "an arc needs two ends", [[1.0]], [0.0], plain(REFUSED))
    refused = "w_1 + w_2 = 0 divides w_2"
    h.case("weights-cancel", refused, [[1.0], [2.0], [3.0]], [0.0], plain(REFUSED, weight=[1.0, -1.0, 2.0]))
    h.case("weights-zero", "0 / 0", [[1.0], [2.0]], [0.0], plain(REFUSED, weight=[0.0, 0.0]))
    half = math.sqrt(0.5)
    h.case(
        "layers-apart",
        "h.0.a and h.0.b are one layer, at a right angle: half way, sqrt(1/2) of each. h.1.a is another, parallel: the line",
        [{"h.0.a": [1.0], "h.0.b": [0.0], "h.1.a": [2.0]}, {"h.0.a": [0.0], "h.0.b": [1.0], "h.1.a": [4.0]}],
        {"h.0.a": [0.0], "h.0.b": [0.0], "h.1.a": [0.0]},
        ("warp", {}, {"h.0.a": [half], "h.0.b": [half], "h.1.a": [3.0]}, ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "cancelled-line",
        "task vectors (1024, 0) and (-1024, 1), within 1/1000 of opposite: the line, (0, 1/2), which is little beside them "
        "and so has no direction; with the third, (3, 0), the line again: 2/3 of it and 1/3 of the third",
        [[1024.0, 0.0], [-1024.0, 1.0], [3.0, 0.0]],
        [0.0, 0.0],
        ("warp", {}, [1.0, 1 / 3], ""),
        dtype="F64",
        tolerance=1e-10,
    )
    for id, width, why in (
        ("cancelled-arc", 800, "1 / (2 * 800^2) is less than 1e-6, so it is a difference of long vectors: the line"),
        ("arc-not-cancelled", 512, "1 / (2 * 512^2) is more than 1e-6: a right angle, sin 60 and sin 30 degrees of the two"),
    ):
        c = 1 / (2 * math.sin(math.atan2(1, width) / 2))
        h.case(
            id,
            f"task vectors ({width}, 0) and (-{width}, 1): half way along the arc is (0, c) with c = 1 / (2 cos(w/2)) = "
            f"1 / (2 sin(atan(1/{width}) / 2)); its square is c^2 and the parts' squares {width}^2 c^2 each. {why}",
            [[float(width), 0.0], [-float(width), 1.0], [3.0, 0.0]],
            [0.0, 0.0],
            ("warp", {}, [1.0, c * 2 / 3] if width == 800 else [1.5, c * math.sqrt(0.75)], ""),
            dtype="F64",
            tolerance=1e-6,
        )
    for id, comment, weight, deltas, expect in (
        ("sum-of-minus-one-first", "lambda_2 = 3/2 with sums -1 and 2: -2/2 + 3*4/2", [-1.0, 3.0], [2.0, 4.0], 5.0),
        ("negative-weight", "lambda_2 = -3 / -2 with sums 1 and -2: -2/2 + 3*4/2", [1.0, -3.0], [2.0, 4.0], 5.0),
        ("last-alone", "lambda_2 = 0 though the sum is 0, lambda_3 = 1", [0.0, 0.0, 1.0], [2.0, 4.0, 6.0], 6.0),
    ):
        h.case(id, comment, [[d] for d in deltas], [0.0], ("warp", {"weight": weight}, [expect], ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0], [2.0]], None, ("warp", {}, REFUSED, ""))
    h.case(
        "weight-count", "two policies, three weights", [[1.0], [2.0]], [0.0], ("warp", {"weight": [1.0] * 3}, REFUSED, "")
    )
    apart = [{"h.0.a": [1.0], "h.0.b": [0.0], "h.1.a": [2.0]}, {"h.0.a": [0.0], "h.0.b": [1.0], "h.1.a": [4.0]}]
    nothing = {"h.0.a": [0.0], "h.0.b": [0.0], "h.1.a": [0.0]}
    h.case(
        "over-tensor",
        "tensors of one entry: the line",
        apart,
        nothing,
        ("warp", {}, {"h.0.a": [0.5], "h.0.b": [0.5], "h.1.a": [3.0]}, ""),
        flags="WarpAngleScope",
        options={"over": "tensor"},
        **TOLERANT,
    )
    k = 1 / math.sqrt(2 * (1 + 8 / math.sqrt(85)))
    h.case(
        "over-model",
        "(1, 0, 2) and (0, 1, 4): cos w = 8 / (sqrt 5 sqrt 17), and both coefficients are 1 / (2 cos(w/2))",
        apart,
        nothing,
        ("warp", {}, {"h.0.a": [k], "h.0.b": [k], "h.1.a": [6 * k]}, ""),
        flags="WarpAngleScope",
        options={"over": "model"},
        **TOLERANT,
    )
    one, two, other = (f"stages.{i}.blocks.{j}.conv.weight" for i, j in ((2, 4), (2, 5), (3, 4)))
    h.case(
        "stages",
        "blocks 4 and 5 of stage 2 are one layer, at a right angle: sin 45 of each; stage 3 is another, parallel: the line",
        [{one: [1.0], two: [0.0], other: [2.0]}, {one: [0.0], two: [1.0], other: [4.0]}],
        {one: [0.0], two: [0.0], other: [0.0]},
        ("warp", {}, {one: [half], two: [half], other: [3.0]}, ""),
        flags="WarpAngleScope",
        **TOLERANT,
    )
    h.case(
        "products-in-float64",
        "float32 at a right angle: 2^-75 and 2^64, whose squares float32 does not hold; sin 45 for both",
        [{"x": [2.0**-75, 0.0], "y": [2.0**64, 0.0]}, {"x": [0.0, 2.0**-75], "y": [0.0, 2.0**64]}],
        {"x": [0.0, 0.0], "y": [0.0, 0.0]},
        ("warp", {}, {"x": [2.0**-75 * half] * 2, "y": [2.0**64 * half] * 2}, ""),
        tolerance=2.0**-22,
    )
    h.case(
        "products-vanish",
        "2^-538 squared is 2^-1076, less than half the least number, and rounds to 0: the line, though at a right angle",
        [[2.0**-538, 0.0], [0.0, 2.0**-538]],
        [0.0, 0.0],
        ("warp", {}, [2.0**-539, 2.0**-539], ""),
        dtype="F64",
    )
    h.case(
        "products-infinite",
        "2^512 squared is infinite, and not more than a millionth of itself: it counts as cancelled, and the line is taken",
        [[2.0**512, 0.0], [0.0, 2.0**512]],
        [0.0, 0.0],
        ("warp", {}, [2.0**511, 2.0**511], ""),
        dtype="F64",
    )
    h.case(
        "nan",
        "NaN in h.0.a makes NaN of h.0.b too, the other tensor of its layer; h.1.a is another: the line",
        [apart[0] | {"h.0.a": [math.nan]}, apart[1]],
        nothing,
        ("warp", {}, {"h.0.a": [math.nan], "h.0.b": [math.nan], "h.1.a": [3.0]}, ""),
        **TOLERANT,
    )
    counted = [{"x": [1.0], "ids": i64(3)}, {"x": [3.0], "ids": i64(4)}], {"x": [0.0], "ids": i64(3)}
    why = "one entry: the line, (1 + 3) / 2"
    merged = {"x": [2.0], "ids": i64(3)}
    h.case("integers-base", why, *counted, ("warp", {}, merged, "the base's, asked for by the caller"))
    h.case("integers-differ", why, *counted, ("warp", {}, REFUSED, ""), options={"integers": "equal"})
    h.case(
        "integers-agree",
        why,
        [counted[0][0], {"x": [3.0], "ids": i64(3)}],
        counted[1],
        ("warp", {}, merged, ""),
        options={"integers": "equal"},
    )
    h.case(
        "axes",
        "three axes; lengths of 5, product 7: cos w = 7/25, cos(w/2) = 4/5, and both coefficients are 1 / (2 4/5) = 5/8",
        [[[[4, 2]], [[-2, 1]], [[0, 0]]], [[[2, 0]], [[0, -1]], [[4, 2]]]],
        [[[0, 0]], [[0, 0]], [[0, 0]]],
        ("warp", {}, [[[3.75, 1.25]], [[-1.25, 0]], [[2.5, 1.25]]], "5/8 (6, 2, -2, 0, 4, 2)"),
        dtype="F64",
        tolerance=1e-14,
    )
    return h
