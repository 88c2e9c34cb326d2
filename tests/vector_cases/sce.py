"""Vectors of sce."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, fraction, i64

CODE = {
    "official:sce": "fanqiwan/FuseAI@7d9a307 FuseChat/mergekit/mergekit/merge_methods/sce_merging.py:SCETask.execute",
    "mergekit:sce": "mergekit 0.1.5 mergekit/merge_methods/sce.py:sce_merge",
}
FLAGS = {
    "sce-official-03": ["SceMergesAll"],
    "sce-official-06": ["SceMergesAll"],
    "sce-mergekit-04": ["SceNothingSelected"],
}
PAPER = {
    "sce-official-00": Paper({"density": 1.0}, comment="nothing is left out by the selection"),
    "sce-official-03": Paper({"density": 0.2, "weights_only": True}),
    "sce-mergekit-01": Paper({"density": 1.0}, comment="the mean squares are large enough"),
    "sce-mergekit-04": Paper({"density": 0.5}),
}

STAGED = (
    "sce-merges-all", "sce-weights-only", "sce-small-tensor", "sce-divisor-floor", "sce-ties", "sce-zero-sum",
    "sce-only-what-differs-counts", "sce-base-copy", "sce-agreed-kept", "sce-one-model-density-one",
    "sce-agrees-without-weight",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    delta = [theta - given.base for theta in given.models]
    density = given.params.get("density", 0.1)
    selected = [select(delta, density) * x for x in delta]
    squares = [np.sum(x * x) for x in selected]
    weight = [s / sum(squares) if sum(squares) else Fraction(1, len(delta)) for s in squares]
    left = delta if given.params.get("weights_only") else selected
    gamma = np.where(sum(left) >= 0, 1, -1)
    agrees = [fraction((gamma * x > 0).astype(int)) for x in left]
    divisor = sum(w * a for w, a in zip(weight, agrees))
    merged = sum(w * a * x for w, a, x in zip(weight, agrees, left)) / np.where(divisor == 0, Fraction(1), divisor)
    return {
        1: {"delta": delta},
        2: {"selected": selected},
        3: {"weight": weight},
        4: {"delta": left, "agrees": agrees},
        5: {"result": given.base + merged},
    }


def select(delta: list[Any], density: float) -> Any:
    """1 at the entries that are selected, and 0 elsewhere."""
    if density == 1:
        return fraction(np.ones(delta[0].shape, int))
    v = sum(((x - y) ** 2 for x, y in combinations(delta, 2)), fraction(np.zeros(delta[0].shape, int)))
    differ = sorted((i for i in range(v.size) if v[i] != 0), key=lambda i: (-v[i], i))
    kept = differ[: int(density * len(differ))]
    return np.array([Fraction(i in kept) for i in range(v.size)], object)


def hand() -> Hand:
    h = Hand("sce", CODE)

    def paper(density: float, expect: Any, why: str = "", **more: Any) -> tuple[str, dict[str, Any], Any, str]:
        return ("sce", {"density": density} | more, expect, why)

    def official(topk: float, expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("official:sce", {"select_topk": topk}, expect, why)

    def mergekit(topk: float, expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("mergekit:sce", {"select_topk": topk, "int8_mask": False}, expect, why)

    steps = (
        "delta = (5, 1, 1, 1) and (1, 2, -2, 1/2) differ by 4, -1, 3, 1/2; 3/4 selects three, of squares 27 and 9: "
        "weights 3/4 and 1/4; 3/4 5 + 1/4, 3/4 + 1/4 2, a minus"
    )
    one, two = [5.0, 1.0, 1.0, 1.0], [1.0, 2.0, -2.0, 0.5]
    h.case(
        "merges-all",
        steps,
        [one, two],
        [0.0] * 4,
        paper(0.75, [4.0, 1.25, -2.0, 0.0], "the last entry was not selected"),
        official(0.75, [4.0, 1.25, -2.0, 0.875], "the last entry too, 3/4 + 1/8"),
        mergekit(0.75, [4.0, 1.25, -2.0, 0.0], "the last entry was not selected"),
        flags="SceMergesAll",
    )
    h.case(
        "weights-only",
        steps,
        [one, two],
        [0.0] * 4,
        paper(0.75, [4.0, 1.25, -2.0, 0.875], "the last entry too, 3/4 + 1/8", weights_only=True),
        flags="SceMergesAll",
    )
    small = 2.0**-12
    h.case(
        "uniform",
        f"all times 2^-12; {steps}",
        [[small * x for x in one], [small * x for x in two]],
        [0.0] * 4,
        paper(0.75, [small * x for x in (4.0, 1.25, -2.0, 0.0)], ""),
        official(0.75, [small * x for x in (4.0, 1.25, -2.0, 0.875)], ""),
        mergekit(0.75, [small * x for x in (3.0, 1.5, -2.0, 0.0)], "(27/4 + 9/4) 2^-24 < 1e-6: equal weights"),
        flags="SceUniform SceMergesAll",
    )
    h.case(
        "equal-models",
        "two models moved by (3, -1): no variance",
        [[3.0, -1.0], [3.0, -1.0]],
        [0.0, 0.0],
        paper(0.5, [0.0, 0.0], "nothing is selected"),
        official(0.5, [3.0, -1.0], "equal weights, and all entries are merged"),
        mergekit(0.5, [0.0, 0.0], "nothing is selected"),
        flags="SceNothingSelected",
    )
    h.case(
        "one-model",
        "one model has no variance",
        [[3.0, -1.0]],
        [1.0, 1.0],
        paper(0.5, [1.0, 1.0], "nothing is selected: the base"),
        official(0.5, [3.0, -1.0], "its weight is 1"),
        mergekit(0.5, [1.0, 1.0], "nothing is selected: the base"),
        flags="SceNothingSelected",
    )
    h.case(
        "small-tensor",
        "density 1/10 of three entries is none; equal weights of (4, 2, 0) and (2, -6, 2): 3, -6, 2",
        [[4.0, 2.0, 0.0], [2.0, -6.0, 2.0]],
        [0.0] * 3,
        paper(0.1, [0.0, 0.0, 0.0], ""),
        official(0.1, [3.0, -6.0, 2.0], "equal weights, since no square is selected"),
        mergekit(0.1, [0.0, 0.0, 0.0], ""),
        flags="SceNothingSelected",
    )
    h.case(
        "small-tensor-weights-only",
        "density 1/10 of three entries is none; equal weights of (4, 2, 0) and (2, -6, 2): 3, -6, 2",
        [[4.0, 2.0, 0.0], [2.0, -6.0, 2.0]],
        [0.0] * 3,
        paper(0.1, [3.0, -6.0, 2.0], "equal weights, since no square is selected", weights_only=True),
        flags="SceNothingSelected",
    )
    h.case(
        "divisor-floor",
        "delta = (2048, 0) and (0, 1): the second weight is 1 / (2^22 + 1)",
        [[2048.0, 0.0], [0.0, 1.0]],
        [0.0, 0.0],
        paper(1.0, [2048.0, 1.0], "w / w"),
        official(1.0, [2048.0, 1.0], "w / w"),
        mergekit(1.0, [2048.0, 1e6 / (2**22 + 1)], "w / 1e-6"),
        flags="SceDivisorFloor",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "ties",
        "two entries of one variance, half selected",
        [[2.0, 2.0], [0.0, 0.0]],
        [0.0, 0.0],
        paper(0.5, [2.0, 0.0], "the lower index"),
        mergekit(0.5, OPEN, "topk may take either"),
        flags="SceTies",
    )
    fifty = [float(k) for k in range(1, 51)]
    h.case(
        "count-float32",
        "delta = 1..50 and 0; 0.58 of 50; the second model has weight 0",
        [fifty, [0.0] * 50],
        [0.0] * 50,
        paper(0.58, [0.0] * 22 + fifty[22:], "int(28.999999999999996) = 28"),
        mergekit(0.58, [0.0] * 21 + fifty[21:], "29 in float32"),
        flags="SceCountFloat32",
    )
    h.case(
        "only-what-differs-counts",
        "entries 1 and 2 agree: half of the two others is one, the one of difference 4; squares 25 and 1",
        [[8.0, 1.0, -2.0, 5.0], [8.0, 1.0, 1.0, 1.0]],
        [0.0] * 4,
        paper(0.5, [0.0, 0.0, 0.0, 126 / 26], "(25 5 + 1 1) / 26"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "zero-sum",
        "base 1, delta = 3 and -3: equal weights, and a sum of zero elects +",
        [[4.0], [-2.0]],
        [1.0],
        paper(1.0, [4.0]),
        official(1.0, [4.0]),
        mergekit(1.0, [4.0]),
    )
    h.case(
        "base-copy",
        "the second model is the base: weight 0, and it agrees nowhere",
        [[4.0, -1.0], [1.0, 1.0]],
        [1.0, 1.0],
        paper(1.0, [4.0, -1.0]),
        official(1.0, [4.0, -1.0]),
        mergekit(1.0, [4.0, -1.0]),
    )
    h.case(
        "all-base",
        "all models are the base",
        [[1.0, 2.0], [1.0, 2.0]],
        [1.0, 2.0],
        paper(1.0, [1.0, 2.0]),
        official(1.0, [1.0, 2.0]),
        mergekit(1.0, [1.0, 2.0]),
    )
    h.case(
        "density-zero",
        "nothing is selected",
        [[4.0, -1.0], [2.0, 5.0]],
        [1.0, 1.0],
        paper(0.0, [1.0, 1.0]),
        mergekit(0.0, [1.0, 1.0]),
    )
    h.case(
        "per-tensor",
        "each tensor has its own weights: in x squares 9 and 1, weights 9/10 and 1/10; in y 1 and 9",
        [{"x": [3.0], "y": [1.0]}, {"x": [1.0], "y": [3.0]}],
        {"x": [0.0], "y": [0.0]},
        paper(1.0, {"x": [2.8], "y": [2.8]}, "(27 + 1) / 10 in both"),
        official(1.0, {"x": [2.8], "y": [2.8]}),
        mergekit(1.0, {"x": [2.8], "y": [2.8]}),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "over-model",
        "one weight for the model: squares 9 + 1 and 1 + 9",
        [{"x": [3.0], "y": [1.0]}, {"x": [1.0], "y": [3.0]}],
        {"x": [0.0], "y": [0.0]},
        paper(1.0, {"x": [2.0], "y": [2.0]}, "the means"),
        dtype="F64",
        tolerance=1e-14,
        options={"over": "model"},
    )
    nan = float("nan")
    h.case(
        "nan",
        "a NaN makes NaN of all weights",
        [[nan, 1.0], [2.0, 3.0]],
        [0.0, 0.0],
        paper(1.0, [nan, nan]),
        official(1.0, [nan, nan]),
        mergekit(1.0, [nan, nan]),
    )
    h.case(
        "empty-and-scalar",
        "a number, of squares 4 and 16: (4 2 + 16 4) / 20",
        [{"e": [], "s": 3.0}, {"e": [], "s": 5.0}],
        {"e": [], "s": 1.0},
        paper(1.0, {"e": [], "s": 1.0 + 3.6}, ""),
        mergekit(1.0, {"e": [], "s": 1.0 + 3.6}, ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case("topk-negative", "its code asserts", [[1.0], [2.0]], [0.0], official(-1.0, REFUSED))
    h.case("density-above-one", "no fraction", [[1.0], [2.0]], [0.0], paper(1.5, REFUSED))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("sce", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("sce", {}, REFUSED, ""))
    h.case(
        "one-model-density-one",
        "no variance over one model; at density 1 nothing is asked about it",
        [[5.0, -2.0]],
        [1.0, 0.0],
        ("sce", {"density": 1.0}, [5.0, -2.0], "the model"),
    )
    h.case(
        "agreed-kept",
        "deltas (4, 4) and (4, 12): at density 1 the first entry stays, on which both agree; squares 32 and 160, weights "
        "1/6 and 5/6: 4 / 6 + 60 / 6",
        [[4.0, 4.0], [4.0, 12.0]],
        [0.0, 0.0],
        ("sce", {"density": 1.0}, [4.0, 64 / 6], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "defaults",
        "ten entries with a variance, int(0.1 * 10) = 1 is selected, the first, 8 and -2; the sum is 6, so 8 alone agrees",
        [[8.0] + [1.0] * 9, [-2.0] + [2.0] * 9],
        [0.0] * 10,
        ("sce", {}, [8.0] + [0.0] * 9, "density is 0.1 by default"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "agrees-without-weight",
        "delta = (4, 0) and (0, 2); one of two entries is selected, the first: weights 1 and 0. The only model that "
        "agrees on the second has weight 0, so nothing is added",
        [[4.0, 0.0], [0.0, 2.0]],
        [0.0, 0.0],
        paper(0.5, [4.0, 0.0], weights_only=True),
    )
    h.case(
        "equal-models-kept",
        "two models moved by (3, -1), with weights of 1/2",
        [[3.0, -1.0], [3.0, -1.0]],
        [0.0, 0.0],
        paper(1.0, [3.0, -1.0], "density 1 selects everything"),
        paper(0.5, [3.0, -1.0], "everything is merged, whatever is selected", weights_only=True),
    )
    h.case(
        "too-small-for-a-tenth",
        "a tenth of one and of nine entries that differ is less than one entry",
        [{"s": 3.0, "x": [3.0] * 9}, {"s": 5.0, "x": [5.0] * 9}],
        {"s": 1.0, "x": [1.0] * 9},
        ("sce", {}, {"s": 1.0, "x": [1.0] * 9}, "the base"),
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0], [-0.0, 0.0]],
        [-0.0, -0.0],
        paper(1.0, [0.0, 2.0]),
    )
    h.case(
        "tiny-differences",
        "differences 2^-76, 1 and 1/2; the square 2^-152 is 0 in float32, so that two entries differ and int(3/4 2) = 1 "
        "of them is selected, where it would be int(3/4 3) = 2 of three",
        [[2.0**-76, 1.0, 1.0], [0.0, 0.0, 0.5]],
        [0.0] * 3,
        paper(0.75, [0.0, 1.0, 0.0]),
    )
    h.case(
        "huge-differences",
        "the square of 2^65 is infinite in float32: weights inf / inf and 2 / inf",
        [[2.0**65, 1.0], [1.0, 1.0]],
        [0.0, 0.0],
        paper(1.0, [nan, nan]),
    )
    inf = float("inf")
    h.case(
        "nan-ranks-first",
        "one of two entries is selected, that with NaN: all weights are NaN",
        [[1.0, nan], [9.0, 2.0]],
        [0.0, 0.0],
        paper(0.5, [nan, nan]),
    )
    h.case(
        "infinity-not-selected",
        "nothing is selected, and 0 times infinity is NaN, in the weights too",
        [[inf, 1.0], [2.0, 3.0]],
        [0.0, 0.0],
        paper(0.0, [nan, nan]),
    )
    h.case(
        "nan-of-one-model",
        "nothing is selected; 0 times NaN at its own entry, and weight 1",
        [[nan, 4.0]],
        [0.0, 1.0],
        paper(0.5, [nan, 1.0]),
    )
    h.case(
        "integers",
        "integers are the base's; 4 against 0 with weight 1",
        [{"x": [4.0], "ids": i64(7)}, {"x": [0.0], "ids": i64(8)}],
        {"x": [0.0], "ids": i64(5)},
        paper(1.0, {"x": [4.0], "ids": i64(5)}),
    )
    h.case(
        "axes",
        "delta = (2, 0) and (0, 2) of three axes: 4 squares each, weights of 1/2, and one model at each entry",
        [[[[2.0], [0.0]]], [[[0.0], [2.0]]]],
        [[[0.0], [0.0]]],
        ("sce", {"density": 1.0}, [[[2.0], [2.0]]], ""),
    )
    return h
