"""Vectors of iso_cts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Hand, Paper, Test, i64

CODE = {
    "official:iso_cts": "danielm1405/iso-merging@d34010a src/utils/iso.py:iso_cts",
    "fusion_bench:iso_cts": "tanganke/fusion_bench@54c9e8c fusion_bench/method/isotropic_merging/iso_utils.py:iso_cts",
    "dcmerge:iso_cts": "Tobeginwith/DC-Merge@3c443e4 vision_lora_merge/merging_functions.py:iso_cts",
}
TOOLS = ("fusion_bench", "dcmerge")
PAPER = {"iso_cts-official-00": Paper({}, comment="no sum of less than full rank")}
LEFT_OUT = (
    "iso_cts-official-03",  # large, as the next one, and of what the others show
    "iso_cts-fusion_bench-00",
    "iso_cts-dcmerge_lora-03",  # float32: U has the condition 23000, and this code itself differs by 5e-5 between machines
)
SLACK = 1e-6  # singular vectors are rounded


def accepts(test: Test) -> bool:
    return test.id not in LEFT_OUT


def diag(*values: float) -> list[list[float]]:
    return np.diag(values).tolist()


def hand() -> Hand:
    h = Hand("iso_cts", CODE)

    def case(id: str, comment: str, models: list[Any], base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **({"tolerance": SLACK} | more))

    def official(fraction: float = 0.8, alpha: float = 1.0) -> dict[str, float]:
        return {"scaling_factor": alpha, "common_space_fraction": fraction}

    none = {"common_space_fraction": 0.0}
    half = {"common_space_fraction": 0.5}
    turned = [[37.5, 0.0, 0.0], [0.0, 0.0, 37.5]]
    case(
        "example",
        "no common space: 50 u_1 v_1^T and 25 u_2 v_2^T, u = (4, -+3)/5, v = (4, 0, -+3)/5; P = (1, -+1)/sqrt(2), "
        "Q = (1, 0, -+1)/sqrt(2), and the mean 37.5",
        [[[32.0, 6.0, -24.0], [-24.0, 8.0, 18.0]], [[16.0, -3.0, 12.0], [12.0, 4.0, 9.0]]],
        [[0.0] * 3] * 2,
        ("iso_cts", none, turned, "18.75 ((1, -1)(1, 0, -1) + (1, 1)(1, 0, 1))"),
        ("official:iso_cts", official(0.0), turned, "the same"),
        ("fusion_bench:iso_cts", official(0.0), turned, "the same"),
    )
    x, y = 4.25 * 3 / math.sqrt(10), 4.25 / math.sqrt(10)
    spaces = [[4.25, 0.0, 0.0, 0.0], [0.0, 4.25, 0.0, 0.0], [0.0, 0.0, x, -y], [0.0, 0.0, y, x]]
    task_2 = [[4.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0] * 4, [0.0, 0.0, 1.2, 1.6]]
    case(
        "both-spaces",
        "4 dimensions, 2 common, 8 e_1 e_1^T and 4 e_2 e_2^T; one task has 3 e_3 e_3^T, the other 2 e_4 (3/5, 4/5)^T: "
        "right vectors 53 degrees apart that become (3, -1)/sqrt(10) and (1, 3)/sqrt(10); the mean of 3, 2, 8, 4",
        [diag(4.0, 2.0, 3.0, 0.0), task_2],
        diag(0.0, 0.0, 0.0, 0.0),
        ("iso_cts", half, spaces, ""),
        ("official:iso_cts", official(0.5), spaces, ""),
        ("fusion_bench:iso_cts", official(0.5), spaces, ""),
    )
    case(
        "nearly-common",
        "4 dimensions, 2 common, 8 e_1 e_1^T and 4 e_2 e_2^T; one task has 3 e_3 e_3^T, the other 2^-14 e_4 e_4^T "
        "beside them",
        [diag(4.0, 2.0, 3.0, 2.0), diag(4.0, 2.0, 0.0, 2.0**-14)],
        diag(0.0, 0.0, 0.0, 0.0),
        ("iso_cts", half, diag(5.0, 5.0, 5.0, 0.0), "2^-14 < 1e-5 * 8 counts as zero: the mean of 3, 8 and 4"),
        flags="IsoCtsRank",
    )
    case(
        "lambda",
        "base 1, changes diag(4, 0) and diag(2, -2): the sum diag(6, -2); 0.8 of 2 leave half a dimension for a task, 0",
        [[[5.0, 1.0], [1.0, 1.0]], [[3.0, 1.0], [1.0, -1.0]]],
        [[1.0, 1.0], [1.0, 1.0]],
        ("iso_cts", {"lambda_": 0.5}, [[3.0, 1.0], [1.0, -1.0]], "as Iso-C: half of diag(4, -4)"),
        ("official:iso_cts", official(0.8, 0.5), [[3.0, 1.0], [1.0, -1.0]], ""),
        ("fusion_bench:iso_cts", official(0.8, 0.5), [[3.0, 1.0], [1.0, -1.0]], ""),
    )
    case(
        "all-common",
        "diag(4, 1) and diag(2, 1): the sum diag(6, 2)",
        [diag(4.0, 1.0), diag(2.0, 1.0)],
        diag(0.0, 0.0),
        ("iso_cts", {"common_space_fraction": 1.0}, diag(4.0, 4.0), "Iso-C"),
        ("official:iso_cts", official(1.0), diag(4.0, 4.0), ""),
    )
    case(
        "rank",
        "4 e_1 e_1^T and 2 e_2 e_2^T in 4 x 4",
        [diag(4.0, 0.0, 0.0, 0.0), diag(0.0, 2.0, 0.0, 0.0)],
        diag(0.0, 0.0, 0.0, 0.0),
        ("iso_cts", {}, diag(3.0, 3.0, 0.0, 0.0), "2 dimensions, both common: the mean of 4 and 2"),
        ("official:iso_cts", official(), OPEN, "4 dimensions: the mean of 4, 2, 0, 0 is 1.5, also where nothing was"),
        ("dcmerge:iso_cts", {"rank_per_task": 1}, OPEN, "2 dimensions, and each task has one, of a zero matrix"),
        flags="IsoCtsRank IsoCtsAtLeastOne",
    )
    case(
        "equal",
        "diag(4, 2) twice, no common space: one triplet each, the same",
        [diag(4.0, 2.0), diag(4.0, 2.0)],
        diag(0.0, 0.0),
        ("iso_cts", none, diag(4.0, 0.0), "the two share one direction"),
        ("official:iso_cts", official(0.0), OPEN, "diag(4, 4) or diag(4, -4): LAPACK makes up e_2"),
        flags="IsoCtsRank",
    )
    case(
        "rounded-up",
        "3 dimensions for 2 tasks: round(3/2) = 2 each would be 4",
        [diag(4.0, 2.0, 0.0), diag(4.0, 0.0, 1.0)],
        diag(0.0, 0.0, 0.0),
        ("iso_cts", none, diag(11 / 3, 11 / 3, 11 / 3), "1 each, 1 common: the mean of 2, 1 and 8"),
        ("official:iso_cts", official(0.0), REFUSED, "shapes differ, and their code fails"),
        ("fusion_bench:iso_cts", official(0.0), REFUSED, "the same"),
        flags="IsoCtsDimensions",
    )
    case(
        "one-dimension-each",
        "2 dimensions for 3 tasks: round(2/3) = 1 each would be 3",
        [diag(4.0, 1.0), diag(3.0, 1.0), diag(2.0, 1.0)],
        diag(0.0, 0.0),
        ("iso_cts", none, diag(6.0, 6.0), "none: the mean of 9 and 3"),
        ("official:iso_cts", official(0.0), OPEN, "the third task is left out, and LAPACK chooses"),
        flags="IsoCtsDimensions",
    )
    names = ("text_projection", "w")
    flat, averaged = diag(4.0, 4.0), diag(3.0, 1.0)
    case(
        "projection",
        "diag(4, 1) and diag(2, 1), by names: the sum diag(6, 2), the mean diag(3, 1)",
        [dict.fromkeys(names, diag(4.0, 1.0)), dict.fromkeys(names, diag(2.0, 1.0))],
        dict.fromkeys(names, diag(0.0, 0.0)),
        ("iso_cts", {}, {"text_projection": averaged, "w": flat}, "averaged"),
        ("iso_cts", {"averaged": ["w"]}, {"text_projection": flat, "w": averaged}, ""),
        ("official:iso_cts", official(), {"text_projection": averaged, "w": flat}, ""),
        ("fusion_bench:iso_cts", official(), dict.fromkeys(names, flat), "none by itself"),
        ("fusion_bench:iso_cts", official() | {"exclude_keys": ["w"]}, {"text_projection": flat, "w": averaged}, ""),
        flags="IsoCtsProjection",
    )
    case(
        "no-matrices",
        "a vector, a number, a kernel (1, 1, 1, 2), nothing, integers",
        [
            {"b": [1.0, 3.0], "s": 4.0, "k": [[[[2.0, 0.0]]]], "e": [], "ids": i64(3)},
            {"b": [3.0, 5.0], "s": -2.0, "k": [[[[0.0, 1.0]]]], "e": [], "ids": i64(3)},
        ],
        {"b": [0.0, 2.0], "s": 0.0, "k": [[[[0.0, 0.0]]]], "e": [], "ids": i64(3)},
        ("iso_cts", {"lambda_": 2.0}, {"b": [4.0, 6.0], "s": 2.0, "k": [[[[2.0, 1.0]]]], "e": [], "ids": i64(3)},
         "twice the mean"),
        tolerance=0.0,
    )  # fmt: skip
    empty, zero = np.zeros((0, 3), np.float32), diag(0.0, 0.0)
    case("empty-matrix", "shape (0, 3)", [{"e": empty}], {"e": empty}, ("iso_cts", {}, {"e": empty}, ""), tolerance=0.0)
    case("unchanged", "two models that equal the base", [zero, zero], zero, ("iso_cts", {}, zero, ""), tolerance=0.0)
    case("opposite", "the sum is zero, and so is its rank", [diag(4.0, 1.0), diag(-4.0, -1.0)], zero,
         ("iso_cts", {}, zero, ""), tolerance=0.0)  # fmt: skip
    for id, value in (("nan", float("nan")), ("infinite", float("inf"))):
        case(id, "it has no singular values", [[[value, 2.0], [1.0, 1.0]]], zero, ("iso_cts", {}, REFUSED, ""))
    for id, params in (("tolerance-zero", {"tolerance": 0.0}), ("fraction-large", {"common_space_fraction": 1.5})):
        case(id, "outside of the domain", [zero], zero, ("iso_cts", params, REFUSED, ""))
    case("no-base", "a task vector is a difference from a base", [zero], None, ("iso_cts", {}, REFUSED, ""))
    case("no-models", "nothing to merge", [], zero, ("iso_cts", {}, REFUSED, ""))
    return h
