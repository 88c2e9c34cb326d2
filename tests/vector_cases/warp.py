"""Vectors of warp."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Hand, Paper

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
    return h
