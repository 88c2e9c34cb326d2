"""Vectors of dare_ties."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, Test, i64, sign
from vector_cases.dare_linear import drop, fusion_bench_dare, mergekit_dare, peft_dare, with_ties
from vector_cases.ties import agreeing_mean, trim

CODE = {
    "fusion_bench:dare": "tanganke/fusion_bench@54c9e8c fusion_bench/method/dare/ties_merging.py:DareTiesMerging.run",
    "peft:dare_ties": "huggingface/peft@5d602fd src/peft/utils/merge_utils.py:dare_ties",
    "official:dare": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.mask_merging",
}
STEMS = ("dare_ties", "dare")
TOOLS = ("fusion_bench",)
FLAGS = {
    "dare_ties-mergekit-01": ["DareRescaleL1", "DareTiesSumNotMean", "DareTiesTrims"],
    "dare_ties-mergekit-04": ["DareRescaleL1", "DareTiesSumNotMean", "DareTiesTrims"],
    "dare_ties-mergekit-bf16-01": ["DareRescaleL1", "DareTiesSumNotMean", "DareTiesTrims"],
}

STAGED = tuple(
    f"dare_ties-{id}"
    for id in ("rescale", "sum-not-mean", "trims", "order", "trim-after-drop", "zero-sum", "election", "density-zero", "all")
)


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    dropped = drop(tau, given)
    trimmed = [trim(x, int(given.params.get("trim", 0.2) * x.size)) for x in dropped]
    gamma = sign(sum(trimmed))
    return {
        1: {"tau": tau},
        2: {"tau": dropped},
        3: {"tau": trimmed},
        4: {"gamma": gamma},
        5: {"result": given.base + Fraction(given.params.get("lambda_", 1.0)) * agreeing_mean(trimmed, gamma)},
    }


def accepts(test: Test) -> bool:
    """Tools that drop, then hand over to another merge: their results belong to the method that does the same."""
    return not test.id.startswith("dare-") or with_ties(test)


def hand() -> Hand:
    h = Hand("dare_ties", CODE)
    h.case(
        "rescale",
        "tau = (2, 3, -2, 1) keeping its first, probability 1/2, no trim",
        [[2.0, 3.0, -2.0, 1.0]],
        [0.0] * 4,
        ("dare_ties", {"density": 0.5, "trim": 1.0}, [4.0, 0.0, 0.0, 0.0], "times 2"),
        ("mergekit:dare_ties", mergekit_dare(0.5, [1.0]), [8.0, 0.0, 0.0, 0.0], "times |tau|_1 before over after, 8/2"),
        ("fusion_bench:dare", fusion_bench_dare(0.5, threshold=50.0), [4.0, 0.0, 0.0, 0.0], "times 2; the threshold is 0"),
        ("peft:dare_ties", peft_dare(0.5, [1.0]), [4.0, 0.0, 0.0, 0.0], "times 2"),
        flags="DareRescaleL1",
        masks=[[1, 0, 0, 0]],
    )
    h.case(
        "sum-not-mean",
        "tau = (4, -1) and (2, -3), nothing dropped or trimmed",
        [[4.0, -1.0], [2.0, -3.0]],
        [0.0, 0.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [3.0, -2.0], "the mean of the agreeing"),
        ("mergekit:dare_ties", mergekit_dare(1.0, [1.0, 1.0]), [6.0, -4.0], "not normalised by default: the sum"),
        ("fusion_bench:dare", fusion_bench_dare(0.0, threshold=50.0), [6.0, -4.0], "the sum by default"),
        ("peft:dare_ties", peft_dare(1.0, [1.0, 1.0]), [3.0, -2.0], "the mean"),
        flags="DareTiesSumNotMean",
    )
    h.case(
        "trims",
        "tau = (1, 2, 3, 4), nothing dropped",
        [[1.0, 2.0, 3.0, 4.0]],
        [0.0] * 4,
        (
            "dare_ties",
            {"density": 1.0, "trim": 0.5},
            [0.0, 0.0, 3.0, 4.0],
            "TIES trims what DARE has left: 4 * 1/2 = 2 kept",
        ),
        (
            "mergekit:dare_ties",
            mergekit_dare(1.0, [1.0]),
            [1.0, 2.0, 3.0, 4.0],
            "only signs are elected, nothing is trimmed",
        ),
        (
            "fusion_bench:dare",
            fusion_bench_dare(0.0, threshold=50.0, merge_func="mean"),
            [0.0, 2.0, 3.0, 4.0],
            "|tau| >= the 2nd smallest",
        ),
        ("peft:dare_ties", peft_dare(1.0, [1.0]), [1.0, 2.0, 3.0, 4.0], "nothing is trimmed"),
        flags="DareTiesTrims",
    )
    h.case(
        "order",
        "tau = (8, 4, 2, 1), of which DARE keeps 4 and 1 with 1/2: (0, 8, 0, 2); then one of four is kept: (0, 8, "
        "0, 0). "
        "Trimmed first, it would be 8 and then nothing",
        [[8.0, 4.0, 2.0, 1.0]],
        [0.0] * 4,
        ("dare_ties", {"density": 0.5, "trim": 0.25}, [0.0, 8.0, 0.0, 0.0], ""),
        flags="DareTiesOrder",
        masks=[[0, 1, 0, 1]],
    )
    h.case(
        "trim-after-drop",
        "tau = 1..8, of which DARE keeps 7 and 8 with 1/4: 28 and 32; int(8 * 1/2) = 4 places for two: no trim",
        [[float(k) for k in range(1, 9)]],
        [0.0] * 8,
        ("dare_ties", {"density": 0.25, "trim": 0.5}, [0.0] * 6 + [28.0, 32.0], ""),
        flags="DareTiesOrder",
        masks=[[0, 0, 0, 0, 0, 0, 1, 1]],
    )
    h.case(
        "zero-sum",
        "base 1, tau = 3 and -3",
        [[4.0], [-2.0]],
        [1.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [1.0], "no sign is elected: the base"),
        ("mergekit:dare_ties", mergekit_dare(1.0, [1.0, 1.0]), [4.0], "a sum of zero elects +"),
        flags="DareTiesZeroSumSign",
    )
    h.case(
        "zero-sum-majority",
        "tau = (3, 1), (-3, 1): the first sum is zero, the majority of the signs is +",
        [[3.0, 1.0], [-3.0, 1.0]],
        [0.0, 0.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [0.0, 1.0], "nothing is added where the sum is zero"),
        (
            "fusion_bench:dare",
            fusion_bench_dare(0.0, threshold=50.0, merge_func="mean"),
            [3.0, 1.0],
            "the majority sign is taken",
        ),
        ("peft:dare_ties", peft_dare(1.0, [1.0, 1.0]), [3.0, 1.0], "a sum of zero elects +"),
        flags="DareTiesZeroSumSign",
    )
    h.case(
        "election",
        "base 1; tau = (4, -2) keeping both, (-6, -8) keeping the second, probability 1/2: (8, -4), (0, -16); "
        "signs + -; 1 + 8/2, 1 - 10/2",
        [[5.0, -1.0], [-5.0, -7.0]],
        [1.0, 1.0],
        ("dare_ties", {"density": 0.5, "trim": 1.0, "lambda_": 0.5}, [5.0, -4.0], ""),
        masks=[[1, 1], [0, 1]],
    )
    h.case(
        "density-zero",
        "every entry is dropped",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("dare_ties", {"density": 0.0}, [1.0, 2.0], "the base"),
        ("mergekit:dare_ties", mergekit_dare(0.0, [1.0]), [1.0, 2.0], "the base"),
        ("fusion_bench:dare", fusion_bench_dare(1.0, threshold=50.0), [math.nan, math.nan], "0 / 0"),
        ("peft:dare_ties", peft_dare(0.0, [1.0]), [math.nan, math.nan], "0 / 0"),
        flags="DareDensityZero",
        masks=[[0, 0]],
    )
    h.case("density-negative", "probability -1/4", [[1.0]], [0.0], ("dare_ties", {"density": -0.25}, REFUSED, ""))
    h.case(
        "trim-above-one",
        "trim 20",
        [[1.0]],
        [0.0],
        ("dare_ties", {"trim": 20.0}, REFUSED, "a fraction, not a percentage"),
    )
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("dare_ties", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("dare_ties", {}, REFUSED, ""))
    h.case(
        "defaults",
        "of five entries the draws leave 9, 18, 27 and 36, of which int(5 * 0.2) = 1 stays: 36 / 0.9 = 40",
        [[9.0, 18.0, 27.0, 36.0, 45.0]],
        [0.0] * 5,
        ("dare_ties", {}, [0.0, 0.0, 0.0, 40.0, 0.0], "density is 0.9 and trim 0.2 by default"),
        masks=[[1, 1, 1, 1, 0]],
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "all",
        "base 1; tau = (4, 3, 2, -1) keeping the first three with 1/2, (-6, 2, 1, 5) keeping the last three with "
        "1/4: (8, 6, 4, 0), (0, 8, 4, 20); trimmed to two: (8, 6, 0, 0), (0, 8, 0, 20); half of 8, (6 + 8) / 2, 0 and 20",
        [[5.0, 4.0, 3.0, 0.0], [-5.0, 3.0, 2.0, 6.0]],
        [1.0] * 4,
        ("dare_ties", {"density": [0.5, 0.25], "trim": 0.5, "lambda_": 0.5}, [5.0, 4.5, 1.0, 11.0], ""),
        masks=[[1, 1, 1, 0], [0, 1, 1, 1]],
    )
    h.case(
        "no-rescale",
        "tau = (2, 3), both kept with 1/2, as they are",
        [[2.0, 3.0]],
        [0.0, 0.0],
        ("dare_ties", {"density": 0.5, "trim": 1.0, "rescale": False}, [2.0, 3.0], ""),
        masks=[[1, 1]],
    )
    small = {"a": [1.0, 2.0], "b": [30.0, 40.0, 50.0, 60.0]}
    zero = {"a": [0.0] * 2, "b": [0.0] * 4}
    for over, expect, why in (
        ("model", {"a": [0.0, 0.0], "b": [0.0, 40.0, 50.0, 60.0]}, "3 of six, over the model"),
        ("tensor", {"a": [0.0, 2.0], "b": [0.0, 0.0, 50.0, 60.0]}, "1 of two and 2 of four"),
    ):
        h.case(
            f"trim-over-{over}",
            "tau = (1, 2) and (30, 40, 50, 60), nothing dropped, half of it kept",
            [small],
            zero,
            ("dare_ties", {"density": 1.0, "trim": 0.5}, expect, why),
            flags="DareTiesTrims",
            options={"over": over},
        )
    h.case(
        "dropped-entries-count",
        "tau = (4, 3, 2, 1), of which three are dropped; int(4 * 1/4) = 1 place of four entries, not none of one",
        [[4.0, 3.0, 2.0, 1.0]],
        [0.0] * 4,
        ("dare_ties", {"density": 0.5, "trim": 0.25}, [0.0, 0.0, 0.0, 2.0], ""),
        masks=[[0, 0, 0, 1]],
    )
    h.case(
        "trim-zero",
        "tau = (1, 2), nothing dropped",
        [[2.0, 3.0]],
        [1.0, 1.0],
        ("dare_ties", {"density": 1.0, "trim": 0.0}, [1.0, 1.0], "the base"),
    )
    h.case(
        "trim-below-one-entry",
        "tau = (1, 2), nothing dropped, int(2 * 3/8) = 0 kept",
        [[2.0, 3.0]],
        [1.0, 1.0],
        ("dare_ties", {"density": 1.0, "trim": 0.375}, [1.0, 1.0], "the base"),
    )
    h.case(
        "only-signs",
        "tau = (4, -1), (2, 3), nothing dropped or trimmed: (4 + 2) / 2, and 3 alone",
        [[4.0, -1.0], [2.0, 3.0]],
        [0.0, 0.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [3.0, 3.0], ""),
    )
    h.case(
        "as-ties",
        "base 1; tau = (8, -4, 2, 1), (4, -2, -6, 1) trimmed to (8, -4, 0, 0), (4, 0, -6, 0); signs + - -; means (8 "
        "+ 4)/2, -4, -6; half of it added",
        [[9, -3, 3, 2], [5, -1, -5, 2]],
        [1] * 4,
        (
            "dare_ties",
            {"density": 1.0, "trim": 0.5, "lambda_": 0.5},
            [4, -1, -2, 1],
            "what TIES gives with a density of 1/2",
        ),
    )
    h.case(
        "dropped-has-no-vote",
        "tau = (-8, 1) keeping the second, (2, 1) and (4, 1) keeping both, with 1/2: 4 + 8 elect +, which -16 would outvote",
        [[-8.0, 1.0], [2.0, 1.0], [4.0, 1.0]],
        [0.0, 0.0],
        ("dare_ties", {"density": 0.5, "trim": 1.0}, [6.0, 2.0], ""),
        masks=[[0, 1], [1, 1], [1, 1]],
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0]],
        [-0.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [0.0], ""),
    )
    bad = [[math.inf, math.nan, 1.0, 8.0]]
    h.case(
        "dropped-infinity",
        "tau = (inf, NaN, 1, 8), the first two dropped, the rest kept with 1/2: 0 times infinity and 0 times NaN are NaN",
        bad,
        [0.0] * 4,
        ("dare_ties", {"density": 0.5, "trim": 1.0}, [math.nan, math.nan, 2.0, 16.0], ""),
        ("dare_ties", {"density": 0.0, "trim": 1.0}, [0.0] * 4, "density 0 puts zeros in the place of the task vector"),
        masks=[[0, 0, 1, 1]],
    )
    h.case(
        "trimmed-infinity",
        "tau = (inf, inf), nothing dropped: two infinities for one place, and the second one becomes 0 times infinity",
        [[math.inf, math.inf]],
        [0.0, 0.0],
        ("dare_ties", {"density": 1.0, "trim": 0.5}, [math.inf, math.nan], ""),
    )
    h.case(
        "infinities-of-both-signs",
        "tau = (inf, 1) and (-inf, 1), nothing dropped or trimmed: inf - inf elects NaN",
        [[math.inf, 1.0], [-math.inf, 1.0]],
        [0.0, 0.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [math.nan, 1.0], ""),
    )
    h.case(
        "empty-and-integers",
        "two floating entries, of which int(2 * 1/2) = 1 is kept; integers are not among them",
        [{"e": [], "ids": i64(3, 4, 5, 6), "x": [1.0, 2.0]}],
        {"e": [], "ids": i64(3, 4, 5, 6), "x": [0.0, 0.0]},
        ("dare_ties", {"density": 1.0, "trim": 0.5}, {"e": [], "ids": i64(3, 4, 5, 6), "x": [0.0, 2.0]}, ""),
    )
    h.case("density-above-one", "probability 3/2", [[1.0]], [0.0], ("dare_ties", {"density": 1.5}, REFUSED, ""))
    h.case("trim-negative", "trim -1/4", [[1.0]], [0.0], ("dare_ties", {"trim": -0.25}, REFUSED, ""))
    h.case(
        "axes",
        "d = 5, k = int(2.5) = 2; tau = (1, 2, 3, 4) of three axes, kept as (2, 0, 0, 8), and one entry of 3, kept as 6, "
        "of which 8 and 6 are the largest",
        [{"conv": [[[1.0], [2.0]], [[3.0], [4.0]]], "one": [3.0]}],
        {"conv": [[[0.0], [0.0]], [[0.0], [0.0]]], "one": [0.0]},
        ("dare_ties", {"density": 0.5, "trim": 0.5}, {"conv": [[[0.0], [0.0]], [[0.0], [8.0]]], "one": [6.0]}, ""),
        masks=[{"conv": [[[1], [0]], [[0], [1]]], "one": [1]}],
    )
    h.case(
        "equal-models",
        "tau = (2, -4) twice, kept with 1/2 as (4, 0) and (4, -8): the mean of 4 and 4, and -8 alone",
        [[2.0, -4.0]] * 2,
        [0.0, 0.0],
        ("dare_ties", {"density": 0.5, "trim": 1.0}, [4.0, -8.0], ""),
        masks=[[1, 0], [1, 1]],
    )
    h.case(
        "all-base",
        "zeros, whatever is kept",
        [[3.0, -0.5]] * 2,
        [3.0, -0.5],
        ("dare_ties", {"density": 0.5}, [3.0, -0.5], ""),
        masks=[[1, 0], [1, 1]],
    )
    h.case(
        "float64",
        "tau = (1 + 2^-30, 2, -1) in float64, of which the first two stay",
        [[1.0 + 2.0**-30, 2.0, -1.0]],
        [0.0] * 3,
        ("dare_ties", {"density": 0.5, "trim": 1.0, "rescale": False}, [1.0 + 2.0**-30, 2.0, 0.0], ""),
        ("mergekit:dare_ties", mergekit_dare(0.5, [1.0], False), [1.0, 2.0, 0.0], "1 in float32"),
        flags="DareFloat32",
        masks=[[1, 1, 0]],
        dtype="F64",
    )
    return h
