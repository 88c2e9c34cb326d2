"""Vectors of ties."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, i64, sign

CODE = {
    "fusion_bench:ties": "tanganke/fusion_bench@54c9e8c fusion_bench/method/ties_merging/ties_merging_utils.py:ties_merging",
    "mergelm:ties": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.ties_merging",
    "mergellm:ties": "yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.ties_merging",
    "peft:ties": "huggingface/peft@5d602fd src/peft/utils/merge_utils.py:ties",
    "sd_mecha:ties": "ljleb/sd-mecha@b8d4d88 sd_mecha/extensions/builtin/merge_methods/ties.py:ties_sum",
    "sd_mecha:ties_sum_extended": "ljleb/sd-mecha@b8d4d88 "
    "sd_mecha/extensions/builtin/merge_methods/ties.py:ties_sum_extended",
    "official:ties": "prateeky2806/ties-merging@44e7891 src/utils/merge_utils.py:merge_methods",
}
TOOLS = ("fusion_bench", "mergelm", "mergellm")
FLAGS = {
    "ties-official-00": ["TiesKeepsOneMore"],
    "ties-official-09": ["TiesThresholdTies", "TiesZeroSumSign"],
    "ties-official-12": ["TiesKeepsOneMore", "TiesZeroDensity"],
    "ties-mergekit-01": ["TiesPerTensorTrim"],
    "ties-mergekit-04": ["TiesWeightsElect", "TiesZeroSumSign"],
    "ties-mergekit-bf16-01": ["TiesThresholdTies"],
    "ties-fusion_bench-00": ["TiesKeepsOneMore", "TiesSumNotMean"],
    "ties-MergeLM-00": ["TiesKeepsOneMore"],
    "ties-MergeLLM-00": ["TiesPerTensorTrim", "TiesKeepsOneMore"],
}
PAPER = {
    "ties-official-00": Paper(
        {"density": 0.2011}, comment="official K=20 keeps int(0.2 * 926) + 1 = 186 = int(0.2011 * 926)"
    ),
    "ties-official-12": Paper({"density": 0.0011}, comment="official K=0 keeps one entry, and int(0.0011 * 926) = 1"),
}

STAGED = (
    "ties-by-hand", "ties-keeps-one-more", "ties-zero-sum", "ties-zero-sum-majority", "ties-threshold-ties",
    "ties-weights-elect", "ties-vote-by-count", "ties-sum-not-mean", "ties-mean-leaves-out-zeros", "ties-trim-first",
    "ties-one-model", "ties-defaults",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    k = int(given.params.get("density", 0.2) * given.base.size)
    trimmed = [trim(x, k) for x in tau]
    gamma = sign(sum(trimmed))
    return {
        1: {"tau": tau},
        2: {"tau": trimmed},
        3: {"gamma": gamma},
        4: {"result": given.base + Fraction(given.params.get("lambda_", 1.0)) * agreeing_mean(trimmed, gamma)},
    }


def trim(x: Any, k: int) -> Any:
    """The k entries of largest magnitude, of equal ones those with the lower index; else 0."""
    kept = sorted(range(x.size), key=lambda i: (-abs(x.flat[i]), i))[:k]
    return np.array([x.flat[i] if i in kept else Fraction(0) for i in range(x.size)], object).reshape(x.shape)


def agreeing_mean(deltas: list[Any], gamma: Any) -> Any:
    """At each entry the mean of the deltas of the elected sign, 0 where there is none."""
    mean = np.full(gamma.shape, Fraction(0), object)
    for i, elected in enumerate(gamma.flat):
        agree = [x.flat[i] for x in deltas if elected * x.flat[i] > 0]
        mean.flat[i] = sum(agree) / Fraction(len(agree)) if agree else Fraction(0)
    return mean


def official_ties(percent: float, merge: str = "dis-mean") -> dict[str, Any]:
    return {"reset_type": "topk", "reset_thresh": percent, "resolve_method": "mass", "merge_func": merge, "lam": 1.0}


def mergekit_ties(density: float, weight: list[float], normalize: bool = True) -> dict[str, Any]:
    return {"weight": weight, "density": density, "normalize": normalize, "rescale": False, "lambda_": 1.0}


def fusion_bench_ties(threshold: float, merge: str = "mean") -> dict[str, Any]:
    return {"scaling_factor": 1.0, "threshold": threshold, "merge_func": merge}


def mergelm_ties(rate: float) -> dict[str, Any]:
    return {"param_value_mask_rate": rate, "scaling_coefficient": 1.0}


def peft_ties(density: float, weights: list[float], vote: str = "total") -> dict[str, Any]:
    return {"weights": weights, "density": density, "majority_sign_method": vote}


def sd_mecha_ties(k: float, vote_sgn: bool = False) -> dict[str, Any]:
    return {"k": k, "vote_sgn": vote_sgn}


def hand() -> Hand:
    h = Hand("ties", CODE)
    h.case(
        "by-hand",
        "base 1; tau = (8, -4, 2, 1), (4, -2, -6, 1) trimmed to (8, -4, 0, 0), (4, 0, -6, 0); signs + - -; "
        "means (8 + 4)/2, -4, -6; half of it added",
        [[9, -3, 3, 2], [5, -1, -5, 2]],
        [1, 1, 1, 1],
        ("ties", {"density": 0.5, "lambda_": 0.5}, [4, -1, -2, 1], ""),
    )
    ten = [float(k) for k in range(1, 11)]
    h.case(
        "keeps-one-more",
        "tau = 1..10, a fifth of it",
        [ten],
        [0.0] * 10,
        ("ties", {"density": 0.2}, [0.0] * 8 + [9.0, 10.0], "int(10 * 0.2) = 2 are kept"),
        ("official:ties", official_ties(20), [0.0] * 7 + [8.0, 9.0, 10.0], "|tau| >= the 8th smallest: 3 are kept"),
        ("mergekit:ties", mergekit_ties(0.2, [1.0]), [0.0] * 8 + [9.0, 10.0], "2 are kept"),
        ("fusion_bench:ties", fusion_bench_ties(20.0), [0.0] * 7 + [8.0, 9.0, 10.0], "as the authors"),
        ("mergelm:ties", mergelm_ties(0.8), [0.0] * 7 + [8.0, 9.0, 10.0], "|tau| >= the int(10 * 0.8)-th smallest"),
        ("peft:ties", peft_ties(0.2, [1.0]), [0.0] * 8 + [9.0, 10.0], "2 are kept"),
        ("sd_mecha:ties", sd_mecha_ties(0.2), [0.0] * 7 + [8.0, 9.0, 10.0], "|tau| >= the int((1 - 0.2) 10)-th smallest"),
        flags="TiesKeepsOneMore",
    )
    h.case(
        "zero-sum",
        "tau = (3, 1), (-3, -1): every sum is zero and so is the majority",
        [[3.0, 1.0], [-3.0, -1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [0.0, 0.0], "no sign is elected, so nothing is added"),
        ("official:ties", official_ties(50), [-3.0, -1.0], "an elected sign of 0 selects the negative entries"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0]), [3.0, 1.0], "a sum of zero elects +"),
        ("fusion_bench:ties", fusion_bench_ties(50.0), [-3.0, -1.0], "as the authors"),
        ("mergelm:ties", mergelm_ties(0.5), [0.0, 0.0], "an elected sign of 0 selects nothing"),
        ("peft:ties", peft_ties(1.0, [1.0, 1.0]), [3.0, 1.0], "a sum of zero elects +"),
        ("sd_mecha:ties", sd_mecha_ties(1.0), [0.0, 0.0], "one vote each; 0 is elected and selects the zeros"),
        flags="TiesZeroSumSign",
    )
    h.case(
        "zero-sum-majority",
        "tau = (3, 1), (-3, 1): the first sum is zero, the majority of the signs is +",
        [[3.0, 1.0], [-3.0, 1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [0.0, 1.0], "nothing is added where the sum is zero"),
        ("official:ties", official_ties(50), [3.0, 1.0], "the majority sign is taken"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0]), [3.0, 1.0], "a sum of zero elects +"),
        ("fusion_bench:ties", fusion_bench_ties(50.0), [3.0, 1.0], "the majority sign is taken"),
        ("mergelm:ties", mergelm_ties(0.5), [3.0, 1.0], "the majority sign is taken"),
        ("sd_mecha:ties", sd_mecha_ties(1.0), [0.0, 1.0], "the zeros are selected"),
        flags="TiesZeroSumSign",
    )
    h.case(
        "zero-sum-majority-of-a-tensor",
        "tau = (3, 3) and (1, 1), (-3, -3) and (1, 1): a has no majority, the model has +",
        [{"a": [3.0, 3.0], "b": [1.0, 1.0]}, {"a": [-3.0, -3.0], "b": [1.0, 1.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0]},
        ("ties", {"density": 1.0}, {"a": [0.0, 0.0], "b": [1.0, 1.0]}, "nothing is added where the sum is zero"),
        ("mergelm:ties", mergelm_ties(0.5), {"a": [3.0, 3.0], "b": [1.0, 1.0]}, "the majority over the model"),
        ("mergellm:ties", mergelm_ties(0.5), {"a": [0.0, 0.0], "b": [1.0, 1.0]}, "the majority over each tensor"),
        flags="TiesZeroSumSign",
    )
    h.case(
        "zero-sum-minority",
        "tau = (3, -1), (-3, -1): the first sum is zero, the majority of the signs is -",
        [[3.0, -1.0], [-3.0, -1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [0.0, -1.0], "nothing is added where the sum is zero"),
        ("official:ties", official_ties(50), [-3.0, -1.0], "the majority sign is taken"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0]), [3.0, -1.0], "a sum of zero elects +"),
        flags="TiesZeroSumSign",
    )
    h.case(
        "threshold-ties",
        "tau = (2, 4, 2, -2, 1): three magnitudes of 2 for one place",
        [[2.0, 4.0, 2.0, -2.0, 1.0]],
        [0.0] * 5,
        ("ties", {"density": 0.4}, [2.0, 4.0, 0.0, 0.0, 0.0], "exactly int(5 * 0.4) = 2, the lower index first"),
        ("official:ties", official_ties(40), [2.0, 4.0, 2.0, -2.0, 0.0], "|tau| >= the 3rd smallest = 2: all four"),
        ("fusion_bench:ties", fusion_bench_ties(40.0), [2.0, 4.0, 2.0, -2.0, 0.0], "all four"),
        ("mergelm:ties", mergelm_ties(0.6), [2.0, 4.0, 2.0, -2.0, 0.0], "|tau| >= the 3rd smallest: all four"),
        ("peft:ties", peft_ties(0.4, [1.0]), OPEN, "2 are kept, of which topk has the choice"),
        ("sd_mecha:ties", sd_mecha_ties(0.4), [2.0, 4.0, 2.0, -2.0, 0.0], "|tau| >= the 3rd smallest: all four"),
        flags="TiesThresholdTies",
    )
    h.case(
        "threshold-ties-across-tensors",
        "tau is 2 everywhere, in tensors b, a, c of two entries each: of 6 * 1/2 = 3 places "
        "two go to a and one to b, whatever the order of the names in the file",
        [{"b": [2.0, 2.0], "a": [2.0, 2.0], "c": [2.0, 2.0]}],
        {"b": [0.0, 0.0], "a": [0.0, 0.0], "c": [0.0, 0.0]},
        ("ties", {"density": 0.5}, {"b": [2.0, 0.0], "a": [2.0, 2.0], "c": [0.0, 0.0]}, ""),
        flags="TiesThresholdTies",
    )
    h.case(
        "per-tensor-trim",
        "tau = (1, 2) and (30, 40, 50)",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0, 50.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0, 0.0]},
        ("ties", {"density": 0.4}, {"a": [0.0, 0.0], "b": [0.0, 40.0, 50.0]}, "2 of 5, over the model: a gets nothing"),
        ("official:ties", official_ties(40), {"a": [0.0, 0.0], "b": [30.0, 40.0, 50.0]}, "2 + 1 of 5, over the model"),
        (
            "mergekit:ties",
            mergekit_ties(0.4, [1.0]),
            {"a": [0.0, 2.0], "b": [0.0, 0.0, 50.0]},
            "1 of 2 (at least one), 1 of 3",
        ),
        ("fusion_bench:ties", fusion_bench_ties(40.0), {"a": [0.0, 0.0], "b": [30.0, 40.0, 50.0]}, "2 + 1 over the model"),
        ("mergelm:ties", mergelm_ties(0.6), {"a": [0.0, 0.0], "b": [30.0, 40.0, 50.0]}, "5 - 3 + 1 over the model"),
        ("mergellm:ties", mergelm_ties(0.6), {"a": [1.0, 2.0], "b": [30.0, 40.0, 50.0]}, "2 - 1 + 1 and 3 - 1 + 1"),
        ("peft:ties", peft_ties(0.4, [1.0]), {"a": [0.0, 0.0], "b": [0.0, 0.0, 50.0]}, "int(0.8) and int(1.2)"),
        ("sd_mecha:ties", sd_mecha_ties(0.4), {"a": [1.0, 2.0], "b": [30.0, 40.0, 50.0]}, "2 - 1 + 1 and 3 - 1 + 1"),
        flags="TiesPerTensorTrim TiesKeepsAtLeastOne",
    )
    h.case(
        "over-tensor",
        "tau = (1, 2) and (30, 40, 50, 60), trimmed tensor by tensor on request",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0, 50.0, 60.0]}],
        {"a": [0.0, 0.0], "b": [0.0] * 4},
        ("ties", {"density": 0.5}, {"a": [0.0, 2.0], "b": [0.0, 0.0, 50.0, 60.0]}, "1 of 2, 2 of 4"),
        flags="TiesPerTensorTrim",
        options={"over": "tensor"},
    )
    h.case(
        "keeps-none",
        "tau = (1, 2, 3)",
        [[1.0, 2.0, 3.0]],
        [0.0] * 3,
        ("ties", {"density": 0.2}, [0.0, 0.0, 0.0], "int(3 * 0.2) = 0 are kept"),
        ("official:ties", official_ties(20), [0.0, 0.0, 3.0], "0 + 1 is kept"),
        ("mergekit:ties", mergekit_ties(0.2, [1.0]), [0.0, 0.0, 3.0], "at least one is kept"),
        ("peft:ties", peft_ties(0.2, [1.0]), [0.0, 0.0, 0.0], "none is kept"),
        ("mergellm:ties", mergelm_ties(0.8), [0.0, 2.0, 3.0], "3 - int(3 * 0.8) + 1 = 2 are kept"),
        flags="TiesKeepsAtLeastOne TiesKeepsOneMore",
    )
    h.case(
        "density-zero",
        "tau = (1, 2, 3), density 0",
        [[1.0, 2.0, 3.0]],
        [0.0] * 3,
        ("ties", {"density": 0.0}, [0.0, 0.0, 0.0], "the base"),
        ("official:ties", official_ties(0), [0.0, 0.0, 3.0], "|tau| >= the largest keeps the largest"),
        ("mergekit:ties", mergekit_ties(0.0, [1.0]), [0.0, 0.0, 0.0], "the base"),
        ("fusion_bench:ties", fusion_bench_ties(0.0), [0.0, 0.0, 3.0], "the largest is kept"),
        ("mergelm:ties", mergelm_ties(1.0), [0.0, 0.0, 3.0], "|tau| >= the 3rd smallest"),
        ("peft:ties", peft_ties(0.0, [1.0]), [0.0, 0.0, 0.0], "none is kept"),
        ("sd_mecha:ties", sd_mecha_ties(0.0), [0.0, 0.0, 3.0], "|tau| >= the 3rd smallest"),
        flags="TiesZeroDensity",
    )
    h.case(
        "density-one",
        "tau = (1, -2, 0), density 1",
        [[1.0, -2.0, 0.0]],
        [0.0] * 3,
        ("ties", {"density": 1.0}, [1.0, -2.0, 0.0], "nothing is trimmed"),
        ("official:ties", official_ties(1), REFUSED, "1 is the fraction 1.0, and the 0th smallest does not exist"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0]), [1.0, -2.0, 0.0], "nothing is trimmed"),
        ("fusion_bench:ties", fusion_bench_ties(100.0), REFUSED, "the 0th smallest does not exist"),
        ("mergelm:ties", mergelm_ties(0.0), REFUSED, "the 0th smallest does not exist"),
        ("mergellm:ties", mergelm_ties(0.25), OPEN, "int(3 * 0.25) = 0: the 0th smallest does not exist"),
        ("peft:ties", peft_ties(1.0, [1.0]), [1.0, -2.0, 0.0], "nothing is trimmed"),
        ("sd_mecha:ties", sd_mecha_ties(1.0), [1.0, -2.0, 0.0], "|tau| >= the smallest"),
        flags="TiesDensityOne",
    )
    h.case(
        "weights-elect",
        "tau = 4 and -2",
        [[4.0], [-2.0]],
        [0.0],
        ("ties", {"density": 1.0}, [4.0], "the sum 2 elects +, and 4 is all that agrees"),
        (
            "mergekit:ties",
            mergekit_ties(1.0, [1.0, 3.0]),
            [-2.0],
            "weights 1, 3: the sum 4 - 6 elects -, and -6/3 = -2",
        ),
        ("peft:ties", peft_ties(1.0, [1.0, 3.0]), [4.0], "the sum 2 elects +, and 1 * 4 / 1"),
        flags="TiesWeightsElect",
    )
    h.case(
        "weights-divide",
        "tau = 4 and 2",
        [[4.0], [2.0]],
        [0.0],
        ("ties", {"density": 1.0}, [3.0], "the mean, without weights"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 3.0]), [2.5], "(4 + 6) / (1 + 3): by the weights"),
        ("peft:ties", peft_ties(1.0, [1.0, 3.0]), [5.0], "(4 + 6) / 2: by the number of models"),
        flags="TiesWeightsElect",
    )
    h.case(
        "vote-by-count",
        "tau = 1, 1 and -3",
        [[1.0], [1.0], [-3.0]],
        [0.0],
        ("ties", {"density": 1.0}, [-3.0], "the sum -1 elects -"),
        ("peft:ties", peft_ties(1.0, [1.0] * 3), [-3.0], "the sum of the values"),
        ("sd_mecha:ties", sd_mecha_ties(1.0), [1.0], "two votes to one"),
        flags="TiesVoteByCount",
    )
    h.case(
        "vote-on-request",
        "tau = 1, 1 and -3",
        [[1.0], [1.0], [-3.0]],
        [0.0],
        ("peft:ties", peft_ties(1.0, [1.0] * 3, "frequency"), [1.0], "two votes to one"),
        ("sd_mecha:ties", sd_mecha_ties(1.0, True), [-3.0], "the sum of the values"),
        flags="TiesVoteByCount",
    )
    h.case(
        "sum-not-mean",
        "tau = 4 and 2",
        [[4.0], [2.0]],
        [0.0],
        ("ties", {"density": 1.0}, [3.0], "the mean of the agreeing"),
        ("official:ties", official_ties(50, "dis-sum"), [6.0], "the sum on request"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0], normalize=False), [6.0], "the sum on request"),
        ("fusion_bench:ties", {"scaling_factor": 1.0, "threshold": 50.0}, [6.0], "the sum by default"),
        ("peft:ties", peft_ties(1.0, [1.0, 1.0]), [3.0], "the mean"),
        ("sd_mecha:ties", sd_mecha_ties(1.0), [3.0], "the mean"),
        flags="TiesSumNotMean",
    )
    h.case(
        "mean-leaves-out-zeros",
        "tau = (4, 1), (0, 1), (8, 1): (4 + 8) / 2 = 6, not 12 / 3",
        [[4.0, 1.0], [0.0, 1.0], [8.0, 1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [6.0, 1.0], ""),
        ("peft:ties", peft_ties(1.0, [1.0] * 3), [6.0, 1.0], ""),
        ("sd_mecha:ties", sd_mecha_ties(1.0), [6.0, 1.0], ""),
        flags="TiesMeanCountsZeros",
    )
    h.case(
        "trim-first",
        "tau = (5, 3), (-3, -4): trimmed to (5, 0), (0, -4), so nothing conflicts",
        [[5.0, 3.0], [-3.0, -4.0]],
        [0.0, 0.0],
        ("ties", {"density": 0.5}, [5.0, -4.0], ""),
    )
    h.case(
        "empty-and-scalar",
        "three floating elements in all, int(3 * 0.5) = 1 is kept: the scalar",
        [{"e": [], "s": 8.0, "x": [1.0, 2.0]}],
        {"e": [], "s": 0.0, "x": [0.0, 0.0]},
        ("ties", {"density": 0.5}, {"e": [], "s": 8.0, "x": [0.0, 0.0]}, ""),
    )
    h.case(
        "integers-not-counted",
        "two floating elements, int(2 * 0.5) = 1 is kept; integers are not among them",
        [{"ids": i64(3, 4, 5, 6), "x": [1.0, 2.0]}],
        {"ids": i64(3, 4, 5, 6), "x": [0.0, 0.0]},
        ("ties", {"density": 0.5}, {"ids": i64(3, 4, 5, 6), "x": [0.0, 2.0]}, ""),
    )
    h.case("density-negative", "density -1/4", [[1.0]], [0.0], ("ties", {"density": -0.25}, REFUSED, ""))
    h.case(
        "density-above-one",
        "density 3/2",
        [[1.0]],
        [0.0],
        ("ties", {"density": 1.5}, REFUSED, "20 is no fraction either"),
    )
    h.case("no-base", "a task vector is a difference from a base", [[1.0], [2.0]], None, ("ties", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("ties", {}, REFUSED, ""))
    h.case(
        "defaults",
        "int(5 * 0.2) = 1 entry of each model is kept: 5 and -8, each alone at its place",
        [[5.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, -8.0, 3.0, 4.0]],
        [0.0] * 5,
        ("ties", {}, [5.0, 0.0, -8.0, 0.0, 0.0], "density is 0.2 and lambda 1 by default"),
    )
    h.case(
        "one-model",
        "base 1; tau = (4, -2, 1, 3) trimmed to (4, 0, 0, 3); half of it added",
        [[5.0, -1.0, 2.0, 4.0]],
        [1.0] * 4,
        ("ties", {"density": 0.5, "lambda_": 0.5}, [3.0, 1.0, 1.0, 2.5], ""),
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, -0.0],
        ("ties", {"density": 0.5}, [0.0, 2.0], ""),
    )
    h.case(
        "nan-is-largest",
        "density 1/2 keeps NaN and 4 of (NaN, 4, 1, 2), 3 and 4 of (1, 2, 3, 4)",
        [[math.nan, 4.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]],
        [0.0] * 4,
        ("ties", {"density": 0.5}, [math.nan, 4.0, 3.0, 4.0], "2 is trimmed, as NaN takes a place"),
    )
    h.case(
        "trimmed-infinity",
        "two infinities for one place: the second one becomes 0 times infinity",
        [[math.inf, math.inf]],
        [0.0, 0.0],
        ("ties", {"density": 0.5}, [math.inf, math.nan], ""),
    )
    h.case(
        "infinities-of-both-signs",
        "tau = (inf, 1) and (-inf, 1): inf - inf elects NaN",
        [[math.inf, 1.0], [-math.inf, 1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [math.nan, 1.0], ""),
    )
    h.case(
        "axes",
        "d = 5, k = int(3.75) = 3; tau = (8, -4, 2, 1; 16) and (4, -2, -6, 1; 3) trimmed to (8, -4, 0, 0; 16) and (4, 0, "
        "-6, 0; 3); means 6, -4, -6, none and 9.5 of the one entry",
        [
            {"conv": [[[9.0], [-3.0]], [[3.0], [2.0]]], "one": [17.0]},
            {"conv": [[[5.0], [-1.0]], [[-5.0], [2.0]]], "one": [4.0]},
        ],
        {"conv": [[[1.0], [1.0]], [[1.0], [1.0]]], "one": [1.0]},
        ("ties", {"density": 0.75}, {"conv": [[[7.0], [-3.0]], [[-5.0], [1.0]]], "one": [10.5]}, ""),
    )
    h.case(
        "equal-models",
        "tau = (4, -2) thrice, trimmed to (4, 0); their mean is 4",
        [[5.0, -1.0]] * 3,
        [1.0, 1.0],
        ("ties", {"density": 0.5}, [5.0, 1.0], ""),
    )
    h.case("all-base", "nothing to trim or to elect", [[3.0, -0.5]] * 2, [3.0, -0.5], ("ties", {}, [3.0, -0.5], ""))
    h.case(
        "stock",
        "tau = (2, 0) and (0, 4), orthogonal, untrimmed",
        [[2.0, 0.0], [0.0, 4.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [2.0, 4.0], "one model each"),
        ("sd_mecha:ties_sum_extended", {"k": 1.0}, [0.0, 0.0], "times 2 cos / (1 + cos), which is 0"),
        ("sd_mecha:ties_sum_extended", {"k": 1.0, "apply_stock": True}, [2.0, 4.0], "not multiplied"),
        flags="TiesStock",
    )
    h.case(
        "stock-of-rows",
        "rows (5, 0) and (3, 4) with cosine 3/5, and (1, 0) and (1, 0) with cosine 1, untrimmed",
        [[[5.0, 0.0], [1.0, 0.0]], [[3.0, 4.0], [1.0, 0.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("ties", {"density": 1.0}, [[4.0, 4.0], [1.0, 0.0]], "(5 + 3) / 2, 4 alone; (1 + 1) / 2"),
        ("sd_mecha:ties_sum_extended", {"k": 1.0}, [[3.0, 3.0], [1.0, 0.0]], "times 6/5 / (8/5) = 3/4, and 1"),
        flags="TiesStock",
        tolerance=2e-7,
    )
    return h
