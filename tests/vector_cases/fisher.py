"""Vectors of fisher."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, arrays, numbered

STEMS = ("fisher", "fisher_mats", "fisher_merging")
TOOLS = ("fusion_bench", "mmatena", "dataless", "mats", "wise_ft")
CODE = {
    "fusion_bench:fisher": "tanganke/fusion_bench@54c9e8c fusion_bench/method/fisher_merging/fisher_merging.py:"
    "merging_with_fisher_weights",
    "mergelm:fisher": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.fisher_merging",
    "mmatena:fisher": "mmatena/model_merging@46802f9 model_merging/merging.py:_merge_with_coeffs",
    "dataless:fisher": "bloomberg/dataless-model-merging@92247ae src/model_merge/avg_merger.py:"
    "FedAvgMerger.fisher_weighted_average",
    "mats:fisher": "r-three/mats@cb52c38 src/merging/diagonal_fisherMerging.py:diagonal_fisherMerging",
    "wise_ft:fisher": "mlfoundations/wise-ft@58b7a4b src/wise_ft.py:_merge",
}
FLAGS = {"fisher_mats-mats-03": ["FisherFloor"], "fisher_merging-wise_ft-00": ["FisherMissing"]}

STAGED = (
    "fisher-weighted", "fisher-normalised", "fisher-normalised-2", "fisher-floor", "fisher-floor-2", "fisher-nothing-known",
    "fisher-nothing-known-2", "fisher-weights", "fisher-one-model",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    F = [one[f"{given.name}.fisher"] for one in given.stats]
    weight = given.each("weight", 1.0)
    c = [w / sum(weight) for w in weight]
    if given.params.get("normalize", True):
        c = [c_n / Fraction(math.sqrt(np.sum(F_n * F_n))) for c_n, F_n in zip(c, F)]
    floor, favor = Fraction(given.params.get("floor", 1e-6)), given.params.get("favor_target", True)
    lifted = [np.maximum(F_n, floor) if n == 0 or not favor else F_n for n, F_n in enumerate(F)]
    P = [c_n * F_n for c_n, F_n in zip(c, lifted)]
    result = sum(P_n * theta for P_n, theta in zip(P, given.models)) / sum(P)
    return {1: {"F": F}, 2: {"c": c}, 3: {"F": lifted}, 4: {"result": result}}


def hand() -> Hand:
    h = Hand("fisher", CODE)

    def case(id: str, comment: str, models: list[Any], F: list[Any] | None, *answers: Any, base: Any = None, flags: str = "",
             dtype: str = "F64", tolerance: float = 1e-14) -> None:  # fmt: skip
        """The tools' Fisher information bears the tensor's own name, ours has .fisher behind it."""
        for answer in answers:
            stats = None if F is None else [arrays(f, dtype) if f is not None else {} for f in F]
            if stats is not None and ":" not in answer[0]:
                stats = [{f"{name}.fisher": x for name, x in one.items()} for one in stats]
            h.case(
                numbered(h, id, answer[0]),
                comment,
                models,
                base,
                answer,
                flags=flags,
                dtype=dtype,
                stats=stats,
                tolerance=tolerance,
            )

    off = {"normalize": False}
    case(
        "weighted",
        "(3 * 0 + 1 * 4) / 4 and (1 * 4 + 3 * 0) / 4",
        [[0.0, 4.0], [4.0, 0.0]],
        [[3.0, 1.0], [1.0, 3.0]],
        ("fisher", {}, [1.0, 1.0], "both have the same norm"),
        ("mmatena:fisher", {}, [1.0, 1.0], ""),
        ("fusion_bench:fisher", {"minimal_fisher_weight": 0.0}, [1.0, 1.0], ""),
        ("mergelm:fisher", {"minimal_fisher_weight": 0.0}, [1.0, 1.0], ""),
        ("dataless:fisher", {"fisher_smooth": 0.0}, [1.0, 1.0], ""),
        ("mats:fisher", {"model_lambda": 0.5}, [1.0, 1.0], ""),
    )
    case(
        "normalised",
        "norms 5 and 10: after division both have (3/5, 4/5); as they are (6 * 4) / 9 = 8/3",
        [[0.0, 0.0], [4.0, 4.0]],
        [[3.0, 4.0], [6.0, 8.0]],
        ("fisher", {}, [2.0, 2.0], ""),
        ("fisher", off, [8 / 3, 8 / 3], ""),
        ("mmatena:fisher", {}, [2.0, 2.0], ""),
        ("fusion_bench:fisher", {"minimal_fisher_weight": 0.0}, [2.0, 2.0], ""),
        ("mergelm:fisher", {"minimal_fisher_weight": 0.0, "normalize_fisher_weight": False}, [8 / 3, 8 / 3], "if asked"),
        ("dataless:fisher", {"fisher_smooth": 0.0}, [8 / 3, 8 / 3], "not by default"),
        ("mats:fisher", {"model_lambda": 0.5}, [8 / 3, 8 / 3], "never"),
        flags="FisherNorm",
    )
    case(
        "norm-of-what",
        "norms over the model 5 and 10: x has 3/5 and 8/10, 7 * 0.8 / 1.4 = 4, and y 4/5 and 6/10, 7 * 0.6 / 1.4 = 3; norms "
        "of each tensor make every single entry 1",
        [{"x": [0.0], "y": [0.0]}, {"x": [7.0], "y": [7.0]}],
        [{"x": [3.0], "y": [4.0]}, {"x": [8.0], "y": [6.0]}],
        ("fisher", {}, {"x": [4.0], "y": [3.0]}, ""),
        ("dataless:fisher", {"fisher_normalize": "model", "fisher_smooth": 0.0}, {"x": [4.0], "y": [3.0]}, ""),
        ("dataless:fisher", {"fisher_normalize": "param", "fisher_smooth": 0.0}, {"x": [3.5], "y": [3.5]}, ""),
        flags="FisherNorm",
    )
    quarter = 0.25
    case(
        "floor",
        "floor 1/4: entry 0 has 0 and 1/4, entry 1 has 1/4 and 0",
        [[2.0, 2.0], [4.0, 4.0]],
        [[0.0, quarter], [quarter, 0.0]],
        ("fisher", off | {"floor": quarter}, [3.0, 2.0], "only the first model is lifted"),
        ("fisher", off | {"floor": quarter, "favor_target": False}, [3.0, 3.0], "both are"),
        ("mmatena:fisher", {"fisher_floor": quarter, "normalize_fishers": False}, [3.0, 2.0], ""),
        (
            "fusion_bench:fisher",
            {"minimal_fisher_weight": quarter, "normalize_fisher_weight": False},
            [10 / 3, 8 / 3],
            "added to both: weights 1/4 and 1/2, (1/2 + 2) / (3/4), and the other way round",
        ),
        (
            "mergelm:fisher",
            {"minimal_fisher_weight": quarter, "normalize_fisher_weight": False},
            [10 / 3, 8 / 3],
            "added to both",
        ),
        ("dataless:fisher", {"fisher_smooth": quarter}, [10 / 3, 8 / 3], "added to both"),
        ("mats:fisher", {"model_lambda": 0.5, "min_fisher": quarter}, [3.0, 3.0], "both are lifted"),
        flags="FisherFloor",
    )
    case(
        "floor-wise_ft",
        "floor 1/4 in both: weights 1/4 and 1/4",
        [[4.0]],
        [[0.0], [quarter]],
        ("wise_ft:fisher", {"fisher_floor": quarter}, [3.0], ""),
        base=[2.0],
        flags="FisherFloor",
    )
    case(
        "nothing-known",
        "no information at all",
        [[2.0], [4.0]],
        [[0.0], [0.0]],
        ("fisher", off, [2.0], "the first model has the floor, the other 0"),
        ("fisher", off | {"favor_target": False}, [3.0], "equal weights"),
        ("fisher", {}, REFUSED, "0 has no direction to keep"),
        ("mmatena:fisher", {"normalize_fishers": False}, [2.0], ""),
        ("mmatena:fisher", {}, [float("nan")], "infinity over infinity"),
        ("fusion_bench:fisher", {}, [3.0], "equal weights"),
        ("mergelm:fisher", {}, [3.0], "equal weights"),
        flags="FisherNothing",
    )
    case(
        "two-models",
        "equal information",
        [[0.0], [4.0]],
        [[1.0], [1.0]],
        ("fisher", {}, [2.0], ""),
        ("mats:fisher", {}, [0.0], "lambda is 1 by default, and the second model has 1 - lambda = 0"),
        flags="FisherTwoModels",
    )
    case(
        "missing",
        "the base has no Fisher information",
        [[4.0]],
        [None, [3.0]],
        ("wise_ft:fisher", {}, [3.5], "taken for 1: (2 + 3 * 4) / 4"),
        base=[2.0],
        flags="FisherMissing",
    )
    case(
        "missing",
        "model 0 has no Fisher information",
        [[2.0], [4.0]],
        [None, [3.0]],
        ("fisher", {}, REFUSED, ""),
        ("fusion_bench:fisher", {}, REFUSED, ""),
        ("mergelm:fisher", {}, REFUSED, ""),
        ("mats:fisher", {}, REFUSED, ""),
        flags="FisherMissing",
    )
    case(
        "weights",
        "weights 3 and 1 with equal information: (3 * 0 + 1 * 4) / 4",
        [[0.0], [4.0]],
        [[2.0], [2.0]],
        ("fisher", {"weight": [3.0, 1.0]}, [1.0], ""),
        ("mmatena:fisher", {"coefficients": [0.75, 0.25]}, [1.0], ""),
        ("fusion_bench:fisher", {"fisher_scaling_coefficients": [0.75, 0.25]}, [1.0], ""),
        ("mergelm:fisher", {"fisher_scaling_coefficients": [0.75, 0.25]}, [1.0], ""),
    )
    case("one-model", "F theta / F", [[2.0, -4.0]], [[4.0, 0.0]], ("fisher", {}, [2.0, -4.0], "the floor where F is 0"))
    case(
        "shapes",
        "0-d, empty and a convolution: (0 + 4) / 2",
        [{"s": 0.0, "e": [], "c": np.zeros((1, 1, 1, 2))}, {"s": 4.0, "e": [], "c": np.full((1, 1, 1, 2), 4.0)}],
        [{"s": 1.0, "e": [], "c": np.ones((1, 1, 1, 2))}] * 2,
        ("fisher", {}, {"s": 2.0, "e": [], "c": np.full((1, 1, 1, 2), 2.0)}, ""),
    )
    case("wrong-shape", "two numbers for one entry", [[2.0], [4.0]], [[1.0, 1.0], [1.0]], ("fisher", {}, REFUSED, ""))
    case("no-statistics", "nothing to weigh by", [[2.0], [4.0]], None, ("fisher", {}, REFUSED, ""))
    case("weights-zero", "0 + 0", [[2.0], [4.0]], [[1.0]] * 2, ("fisher", {"weight": [0.0, 0.0]}, REFUSED, ""))
    case("weight-negative", "-1", [[2.0], [4.0]], [[1.0]] * 2, ("fisher", {"weight": [2.0, -1.0]}, REFUSED, ""))
    nan = float("nan")
    case(
        "floor-zero",
        "nothing is known of the first entry, and there is no floor: 0 / 0; (2 + 4) / 2",
        [[2.0, 2.0], [4.0, 4.0]],
        [[0.0, 1.0], [0.0, 1.0]],
        ("fisher", {"floor": 0.0}, [nan, 3.0], ""),
    )
    case(
        "nothing-known-of-an-entry",
        "nothing is known of the first entry: the first model's 2, which alone has the floor; lifted in both, the mean "
        "with the weights 3 and 1, (3 2 + 4) / 4 = 5/2, which those of the second entry give too",
        [[2.0, 2.0], [4.0, 4.0]],
        [[0.0, 1.0], [0.0, 1.0]],
        ("fisher", {"weight": [3.0, 1.0]}, [2.0, 2.5], ""),
        ("fisher", {"weight": [3.0, 1.0], "favor_target": False}, [2.5, 2.5], ""),
    )
    case("negative", "no mean of squares", [[2.0], [4.0]], [[1.0], [-1.0]], ("fisher", {}, REFUSED, ""))
    case(
        "nan",
        "NaN in the first entry of a model; (2 + 4) / 2",
        [[nan, 2.0], [4.0, 4.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        ("fisher", {}, [nan, 3.0], ""),
    )
    case(
        "nan-in-fisher",
        "NaN in the first entry of a diagonal; (2 + 4) / 2",
        [[2.0, 2.0], [4.0, 4.0]],
        [[nan, 1.0], [1.0, 1.0]],
        ("fisher", {}, [nan, nan], "it is in the norm"),
        ("fisher", off, [nan, 3.0], "no norm"),
    )
    return h
