"""Vectors of dare_linear."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, Test, i64

CODE = {
    "fusion_bench:dare": "tanganke/fusion_bench@54c9e8c fusion_bench/method/dare/",
    "peft:dare_linear": "huggingface/peft@5d602fd src/peft/utils/merge_utils.py:dare_linear",
    "sd_mecha:dare_linear": "ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/ties.py:dropout",
    "official:dare": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.mask_merging",
}
STEMS = ("dare_linear", "dare")
TOOLS = ("fusion_bench",)
FLAGS = {
    "dare-fusion_bench-00": ["DareDropMaskPolarity"],
    "dare-fusion_bench-03": ["DareDropMaskPolarity"],
    "dare-MergeLM-00": ["DareDropMaskPolarity"],
    "dare-MergeLM-03": ["DareDropMaskPolarity", "DareRescaleOff"],
    "dare_linear-mergekit-01": ["DareRescaleL1"],
    "dare_linear-mergekit-04": ["DareRescaleL1", "DareDensityZero"],
    "dare_linear-mergekit-bf16-01": ["DareRescaleL1"],
}
PAPER = {
    "dare-fusion_bench-00": Paper(
        {"density": 0.5, "lambda_": 0.3}, keep_masks=True, entry="dare_linear", comment="keep masks; a rate of what goes"
    ),
    "dare-MergeLM-00": Paper(
        {"density": [0.5, 0.3, 0.1], "weight": [1 / 3] * 3},
        drop_masks=True,
        entry="dare_linear",
        comment="keep masks and probabilities",
    ),
    "dare-MergeLM-03": Paper(
        {"density": 0.7, "weight": [1 / 3] * 3, "rescale": False},
        drop_masks=True,
        entry="dare_linear",
        comment="keep masks; no rescaling",
    ),
}

STAGED = tuple(
    f"dare_linear-{id}"
    for id in ("rescale", "no-rescale", "average", "weights", "density-zero", "density-one", "masks-not-looked-at")
)


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    dropped = drop(tau, given)
    merged = sum(w * x for w, x in zip(given.each("weight", 1.0), dropped))
    result = given.base + Fraction(given.params.get("lambda_", 1.0)) * merged
    return {1: {"tau": tau}, 2: {"tau": dropped}, 3: {"result": result}}


def drop(tau: list[Any], given: Exact) -> list[Any]:
    """m tau / density; density 0 and 1 do not look at masks."""
    rescale = given.params.get("rescale", True)
    masks = given.masks or [None] * len(tau)
    return [
        d * x if d in (0, 1) else m * x / d if rescale else m * x for x, m, d in zip(tau, masks, given.each("density", 0.9))
    ]


def accepts(test: Test) -> bool:
    """Tools that drop, then hand over to another merge: their results belong to the method that does the same."""
    return not test.id.startswith("dare-") or not with_ties(test)


def with_ties(test: Test) -> bool:
    return test.params.get("mask_apply_method") == "ties_merging" or "threshold" in test.params


def official_dare(rates: list[float], rescale: bool = True) -> dict[str, Any]:
    return {
        "weight_format": "delta_weight", "weight_mask_rates": rates, "use_weight_rescale": rescale,
        "mask_strategy": "random", "mask_apply_method": "task_arithmetic", "scaling_coefficient": 1.0,
    }  # fmt: skip


def mergekit_dare(density: Any, weight: list[float], rescale: bool = True) -> dict[str, Any]:
    return {"weight": weight, "density": density, "normalize": False, "rescale": rescale, "lambda_": 1.0}


def fusion_bench_dare(ratio: float, **more: Any) -> dict[str, Any]:
    return {"scaling_factor": 1.0, "sparsity_ratio": ratio, "only_on_linear_weights": False, "rescale": True} | more


def peft_dare(density: float, weights: list[float]) -> dict[str, Any]:
    return {"weights": weights, "density": density}


def hand() -> Hand:
    h = Hand("dare_linear", CODE)
    taus = [[2.0, 3.0, -2.0, 1.0], [1.0, -1.0, 0.0, 0.0]]
    text = "tau = (2, 3, -2, 1) keeping its first, (1, -1, 0, 0) keeping its first two, probability 1/2"
    keep = [[1, 0, 0, 0], [1, 1, 0, 0]]
    h.case(
        "rescale",
        text,
        taus,
        [0.0] * 4,
        ("dare_linear", {"density": 0.5}, [6.0, -2.0, 0.0, 0.0], "kept entries times 2: (4, 0, 0, 0) + (2, -2, 0, 0)"),
        ("official:dare", official_dare([0.5, 0.5]), [6.0, -2.0, 0.0, 0.0], "the same, with masks of what is dropped"),
        (
            "mergekit:dare_linear",
            mergekit_dare(0.5, [1.0, 1.0]),
            [9.0, -1.0, 0.0, 0.0],
            "times |tau|_1 before over after, 8/2 and 2/2: (8, 0, 0, 0) + (1, -1, 0, 0)",
        ),
        ("fusion_bench:dare", fusion_bench_dare(0.5), [6.0, -2.0, 0.0, 0.0], "the same, with a rate of what goes"),
        ("peft:dare_linear", peft_dare(0.5, [1.0, 1.0]), [6.0, -2.0, 0.0, 0.0], "the same"),
        flags="DareRescaleL1 DareDropMaskPolarity",
        masks=keep,
    )
    h.case(
        "no-rescale",
        text,
        taus,
        [0.0] * 4,
        ("dare_linear", {"density": 0.5, "rescale": False}, [3.0, -1.0, 0.0, 0.0], "(2, 0, 0, 0) + (1, -1, 0, 0)"),
        ("official:dare", official_dare([0.5, 0.5], False), [3.0, -1.0, 0.0, 0.0], "the command line's default"),
        ("mergekit:dare_linear", mergekit_dare(0.5, [1.0, 1.0], False), [3.0, -1.0, 0.0, 0.0], ""),
        ("fusion_bench:dare", fusion_bench_dare(0.5, rescale=False), [3.0, -1.0, 0.0, 0.0], ""),
        flags="DareRescaleOff",
        masks=keep,
    )
    h.case(
        "overlap",
        text,
        taus,
        [0.0] * 4,
        ("dare_linear", {"density": 0.5}, [6.0, -2.0, 0.0, 0.0], "two models kept the first entry: 4 + 2"),
        (
            "sd_mecha:dare_linear",
            {"probability": 0.5, "alpha": 1.0},
            [3.0, -2.0, 0.0, 0.0],
            "(2 + 1) / 2 / (1/2), and -1 / 1 / (1/2): the mean of those that kept it",
        ),
        flags="DareOverlapMean",
        masks=keep,
    )
    h.case(
        "masks-not-looked-at",
        "tau = (2, 3) with density 1 and (4, 5) with density 0, and masks that say otherwise",
        [[2.0, 3.0], [4.0, 5.0]],
        [0.0, 0.0],
        ("dare_linear", {"density": [1.0, 0.0]}, [2.0, 3.0], "all of the first, nothing of the second"),
        masks=[[0, 1], [1, 0]],
    )
    h.case(
        "average",
        "tau = (2, 4) and (6, 8), keeping the first of each with 1/2: (4, 0) and (12, 0), times 1/2",
        [[2.0, 4.0], [6.0, 8.0]],
        [0.0, 0.0],
        ("dare_linear", {"density": 0.5, "lambda_": 0.5}, [8.0, 0.0], ""),
        ("fusion_bench:dare", {"sparsity_ratio": 0.5, "only_on_linear_weights": False}, [8.0, 0.0], "DareSimpleAverage"),
        masks=[[1, 0], [1, 0]],
    )
    h.case(
        "linear-weights",
        "tau = 2 in two matrices, 3 in a vector, keeping the first entries with 1/2",
        [{"fc.weight": [[2.0, 2.0]], "emb.weight": [[2.0, 2.0]], "fc.bias": [3.0]}],
        {"fc.weight": [[0.0, 0.0]], "emb.weight": [[0.0, 0.0]], "fc.bias": [0.0]},
        (
            "dare_linear",
            {"density": 0.5},
            {"fc.weight": [[4.0, 0.0]], "emb.weight": [[4.0, 0.0]], "fc.bias": [6.0]},
            "all are thinned",
        ),
        (
            "fusion_bench:dare",
            fusion_bench_dare(0.5, only_on_linear_weights=True),
            {"fc.weight": [[4.0, 0.0]], "emb.weight": [[2.0, 2.0]], "fc.bias": [3.0]},
            "on request only weights of linear layers are",
        ),
        flags="DareLinearWeightsOnly",
        masks=[{"fc.weight": [[1, 0]], "emb.weight": [[1, 0]], "fc.bias": [1]}],
    )
    h.case(
        "weights",
        "base 1; tau = (4, 8) keeping the first with 1/2, (8, 16) keeping the second with 1/4; rescaled (8, 0), (0, "
        "64); "
        "1 + 1/2 (8/2 + 0), 1 + 1/2 (0 + 64/4)",
        [[5.0, 9.0], [9.0, 17.0]],
        [1.0, 1.0],
        ("dare_linear", {"density": [0.5, 0.25], "weight": [0.5, 0.25], "lambda_": 0.5}, [3.0, 9.0], ""),
        masks=[[1, 0], [0, 1]],
    )
    h.case(
        "density-zero",
        "every entry is dropped",
        [[3.0, -1.0], [5.0, 2.0]],
        [1.0, 2.0],
        ("dare_linear", {"density": 0.0}, [1.0, 2.0], "the base, and nothing is divided by 0"),
        ("official:dare", official_dare([1.0, 1.0]), [1.0, 2.0], "rate 1 skips the division"),
        ("mergekit:dare_linear", mergekit_dare(0.0, [1.0, 1.0]), [1.0, 2.0], "the rescaling is skipped"),
        ("fusion_bench:dare", fusion_bench_dare(1.0), [math.nan, math.nan], "0 / 0"),
        ("peft:dare_linear", peft_dare(0.0, [1.0, 1.0]), [math.nan, math.nan], "0 / 0"),
        ("sd_mecha:dare_linear", {"probability": 1.0}, [1.0, 2.0], "nothing is divided"),
        flags="DareDensityZero",
        masks=[[0, 0], [0, 0]],
    )
    h.case(
        "density-one",
        "nothing is dropped, nothing is drawn: 1 + (3 - 1) = 3, 2 + (-1 - 2) = -1",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("dare_linear", {"density": 1.0}, [3.0, -1.0], ""),
        ("mergekit:dare_linear", mergekit_dare(1.0, [1.0]), [3.0, -1.0], ""),
    )
    h.case(
        "empty-and-scalar",
        "1 + (3 - 1) / (1/2) = 5; the scalar t is dropped",
        [{"e": [], "s": 3.0, "t": 3.0}],
        {"e": [], "s": 1.0, "t": 1.0},
        ("dare_linear", {"density": 0.5}, {"e": [], "s": 5.0, "t": 1.0}, ""),
        masks=[{"e": [], "s": 1, "t": 0}],
    )
    h.case("density-negative", "probability -1/4", [[1.0]], [0.0], ("dare_linear", {"density": -0.25}, REFUSED, ""))
    h.case("density-above-one", "probability 3/2", [[1.0]], [0.0], ("dare_linear", {"density": 1.5}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("dare_linear", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("dare_linear", {}, REFUSED, ""))
    h.case(
        "defaults",
        "9 / 0.9 = 10 where it is kept; 1 is the weight and lambda",
        [[9.0, 9.0]],
        [0.0, 0.0],
        ("dare_linear", {}, [10.0, 0.0], "density is 0.9 by default"),
        masks=[[1, 0]],
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "mask-missing",
        "tau = (2, 3) with density 1, and without a mask, and (4, 6) with density 1/2, keeping the second: 12",
        [[2.0, 3.0], [4.0, 6.0]],
        [0.0, 0.0],
        ("dare_linear", {"density": [1.0, 0.5]}, [2.0, 15.0], "the first needs none"),
        stats=[{}, {"x.mask": np.array([0, 1], np.uint8)}],
    )
    h.case(
        "mask-missing-refused",
        "a mask for one model of two, both of density 1/2",
        [[2.0, 3.0], [4.0, 6.0]],
        [0.0, 0.0],
        ("dare_linear", {"density": 0.5}, REFUSED, "one for every draw, or none"),
        stats=[{}, {"x.mask": np.array([0, 1], np.uint8)}],
    )
    h.case(
        "masks-are-factors",
        "density 1/4 and nothing dropped: masks are not compared with it; times 4",
        [[1.0, 2.0]],
        [0.0, 0.0],
        ("dare_linear", {"density": 0.25}, [4.0, 8.0], ""),
        masks=[[1, 1]],
    )
    h.case(
        "zero-entries",
        "tau = (0, 0, 3), of which the first is kept and the others are not",
        [[1.0, 2.0, 6.0]],
        [1.0, 2.0, 3.0],
        ("dare_linear", {"density": 0.5}, [1.0, 2.0, 3.0], "the base's"),
        masks=[[1, 0, 0]],
    )
    h.case(
        "all-drop",
        "base 5; tau = (1, 2), (3, 4): both drop the first, and keep the second with 1/2: 5 + 4 + 8",
        [[6.0, 7.0], [8.0, 9.0]],
        [5.0, 5.0],
        ("dare_linear", {"density": 0.5}, [5.0, 17.0], ""),
        masks=[[0, 1], [0, 1]],
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0]],
        [-0.0],
        ("dare_linear", {"density": 0.5}, [0.0], ""),
        masks=[[1]],
    )
    h.case(
        "dropped-infinity",
        "tau = (inf, NaN, 1), all dropped: 0 times infinity and 0 times NaN are NaN",
        [[math.inf, math.nan, 1.0]],
        [0.0] * 3,
        ("dare_linear", {"density": 0.5}, [math.nan, math.nan, 0.0], ""),
        ("dare_linear", {"density": 0.0}, [0.0] * 3, "density 0 puts zeros in the place of the task vector"),
        masks=[[0, 0, 0]],
    )
    h.case(
        "integers",
        "1 + (3 - 1) / (1/2) = 5; integers are the base's",
        [{"x": [3.0], "ids": i64(3, 4)}],
        {"x": [1.0], "ids": i64(3, 4)},
        ("dare_linear", {"density": 0.5}, {"x": [5.0], "ids": i64(3, 4)}, ""),
        stats=[{"x.mask": np.array([1], np.uint8)}],
    )
    h.case(
        "axes",
        "tau = (1, 2, 3, 4) of three axes, the first and the last kept with 1/2, and one entry of 4, kept",
        [{"conv": [[[1.0], [2.0]], [[3.0], [4.0]]], "one": [4.0]}],
        {"conv": [[[0.0], [0.0]], [[0.0], [0.0]]], "one": [0.0]},
        ("dare_linear", {"density": 0.5}, {"conv": [[[2.0], [0.0]], [[0.0], [8.0]]], "one": [8.0]}, ""),
        masks=[{"conv": [[[1], [0]], [[0], [1]]], "one": [1]}],
    )
    h.case(
        "one-model",
        "tau = (2, 4), the second kept with 1/4: 1 + 16",
        [[3.0, 5.0]],
        [1.0, 1.0],
        ("dare_linear", {"density": 0.25}, [1.0, 17.0], ""),
        masks=[[0, 1]],
    )
    h.case(
        "equal-models",
        "tau = (2, 4) twice, kept with 1/2 as (4, 0) and (4, 8)",
        [[2.0, 4.0]] * 2,
        [0.0, 0.0],
        ("dare_linear", {"density": 0.5}, [8.0, 8.0], ""),
        masks=[[1, 0], [1, 1]],
    )
    h.case(
        "float64",
        "tau = (1 + 2^-30, 2, -1) in float64, of which the first two stay",
        [[1.0 + 2.0**-30, 2.0, -1.0]],
        [0.0] * 3,
        ("dare_linear", {"density": 0.5, "rescale": False}, [1.0 + 2.0**-30, 2.0, 0.0], ""),
        ("mergekit:dare_linear", mergekit_dare(0.5, [1.0], False), [1.0, 2.0, 0.0], "1 in float32"),
        flags="DareFloat32",
        masks=[[1, 1, 0]],
        dtype="F64",
    )
    return h
