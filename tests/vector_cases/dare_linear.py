"""Vectors of dare_linear."""

from __future__ import annotations

from typing import Any

from vector_cases import REFUSED, Hand, Paper, Test

CODE = {
    "official:dare": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.mask_merging",
}
STEMS = ("dare_linear", "dare")
FLAGS = {
    "dare-MergeLM-00": ["DareDropMaskPolarity"],
    "dare-MergeLM-03": ["DareDropMaskPolarity", "DareRescaleOff"],
    "dare_linear-mergekit-01": ["DareRescaleL1"],
    "dare_linear-mergekit-04": ["DareRescaleL1", "DareDensityZero"],
    "dare_linear-mergekit-bf16-01": ["DareRescaleL1"],
}
EVIDENCE = {"dare-fusion_bench-00"}
PAPER = {
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


def accepts(test: Test) -> bool:
    """MergeLM drops, then hands over to another merge: its results belong to the method that does the same."""
    return not test.id.startswith("dare-") or test.params.get("mask_apply_method") != "ties_merging"


def official_dare(rates: list[float], rescale: bool = True) -> dict[str, Any]:
    return {
        "weight_format": "delta_weight", "weight_mask_rates": rates, "use_weight_rescale": rescale,
        "mask_strategy": "random", "mask_apply_method": "task_arithmetic", "scaling_coefficient": 1.0,
    }  # fmt: skip


def mergekit_dare(density: Any, weight: list[float], rescale: bool = True) -> dict[str, Any]:
    return {"weight": weight, "density": density, "normalize": False, "rescale": rescale, "lambda_": 1.0}


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
        flags="DareRescaleOff",
        masks=keep,
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
    return h
