"""Vectors of iso_c."""

from __future__ import annotations

from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Hand, Paper, Test, i64

CODE = {
    "official:iso_c": "danielm1405/iso-merging@d34010a src/utils/iso.py:iso_c",
    "fusion_bench:iso_c": "tanganke/fusion_bench@54c9e8c fusion_bench/method/isotropic_merging/iso_utils.py:iso_c",
}
TOOLS = ("fusion_bench",)
PAPER = {"iso_c-official-00": Paper({}, comment="no sum of less than full rank")}
SLACK = 1e-6  # singular vectors are rounded


def accepts(test: Test) -> bool:
    return test.id != "iso_c-fusion_bench-00"  # large, and of what the others show


def hand() -> Hand:
    h = Hand("iso_c", CODE)

    def case(id: str, comment: str, models: list[Any], base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **({"tolerance": SLACK} | more))

    zeros = [[0.0, 0.0], [0.0, 0.0]]
    case(
        "example",
        "the sum is 45 (3, 4)/5 (1, 2, 2)/3 + 15 (4, -3)/5 (2, 1, -2)/3; the mean of 45 and 15 is 30",
        [[[9.0, 9.0, 5.0], [5.0, 10.0, 15.0]], [[8.0, 13.0, 5.0], [1.0, 11.0, 15.0]]],
        [[0.0] * 3] * 2,
        ("iso_c", {}, [[22.0, 20.0, -4.0], [-4.0, 10.0, 28.0]], "2 (3, 4)(1, 2, 2) + 2 (4, -3)(2, 1, -2)"),
        ("official:iso_c", {"scaling_factor": 1.0}, [[22.0, 20.0, -4.0], [-4.0, 10.0, 28.0]], ""),
        ("fusion_bench:iso_c", {"scaling_factor": 1.0}, [[22.0, 20.0, -4.0], [-4.0, 10.0, 28.0]], ""),
    )
    case(
        "other-shares",
        "the same sum, all from one model",
        [[[17.0, 22.0, 10.0], [6.0, 21.0, 30.0]], [[0.0] * 3] * 2],
        [[0.0] * 3] * 2,
        ("iso_c", {}, [[22.0, 20.0, -4.0], [-4.0, 10.0, 28.0]], "only the sum counts"),
        ("official:iso_c", {"scaling_factor": 1.0}, [[22.0, 20.0, -4.0], [-4.0, 10.0, 28.0]], ""),
    )
    case(
        "lambda",
        "base 1, changes diag(4, 0) and diag(2, -2): the sum diag(6, -2), the mean 4; half of it",
        [[[5.0, 1.0], [1.0, 1.0]], [[3.0, 1.0], [1.0, -1.0]]],
        [[1.0, 1.0], [1.0, 1.0]],
        ("iso_c", {"lambda_": 0.5}, [[3.0, 1.0], [1.0, -1.0]], "signs stay"),
        ("official:iso_c", {"scaling_factor": 0.5}, [[3.0, 1.0], [1.0, -1.0]], ""),
        ("fusion_bench:iso_c", {"scaling_factor": 0.5}, [[3.0, 1.0], [1.0, -1.0]], ""),
    )
    case(
        "one-model",
        "diag(6, 2)",
        [[[6.0, 0.0], [0.0, 2.0]]],
        zeros,
        ("iso_c", {}, [[4.0, 0.0], [0.0, 4.0]], "one model does not come back"),
        ("official:iso_c", {"scaling_factor": 1.0}, [[4.0, 0.0], [0.0, 4.0]], ""),
    )
    case(
        "rank",
        "the sum is diag(6, 0)",
        [[[4.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]],
        zeros,
        ("iso_c", {}, [[6.0, 0.0], [0.0, 0.0]], "the mean of 6 alone"),
        ("official:iso_c", {"scaling_factor": 1.0}, OPEN, "the mean of 6 and 0 is 3, also where nothing was: diag(3, +-3)"),
        (
            "fusion_bench:iso_c",
            {"scaling_factor": 1.0},
            OPEN,
            "the mean of 6 and 0 is 3, also where nothing was: diag(3, +-3)",
        ),
        flags="IsoRank",
    )
    case(
        "tolerance",
        "diag(1, 2^-20)",
        [[[1.0, 0.0], [0.0, 2.0**-20]]],
        zeros,
        ("iso_c", {}, [[1.0, 0.0], [0.0, 0.0]], "2^-20 < 1e-5: counts as zero"),
        ("iso_c", {"tolerance": 1e-7}, [[0.5 + 2.0**-21, 0.0], [0.0, 0.5 + 2.0**-21]], "2^-20 > 1e-7"),
        ("official:iso_c", {"scaling_factor": 1.0}, [[0.5 + 2.0**-21, 0.0], [0.0, 0.5 + 2.0**-21]], ""),
        flags="IsoRank",
    )
    case("row", "a 1 x 2 matrix", [[[3.0, 4.0]], [[1.0, 0.0]]], [[0.0, 0.0]], ("iso_c", {}, [[4.0, 4.0]], "the sum itself"),
         ("official:iso_c", {"scaling_factor": 1.0}, [[4.0, 4.0]], ""))  # fmt: skip
    opposite = [[[4.0, 0.0], [0.0, 1.0]], [[-4.0, 0.0], [0.0, -1.0]]]
    case("opposite", "the sum is zero", opposite, zeros, ("iso_c", {}, zeros, ""),
         ("official:iso_c", {"scaling_factor": 1.0}, zeros, ""), tolerance=0.0)  # fmt: skip
    names = ("text_projection", "w")
    flat, averaged = [[4.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [0.0, 1.0]]
    case(
        "projection",
        "diag(4, 1) and diag(2, 1), by names: the sum diag(6, 2), the mean diag(3, 1)",
        [{n: [[4.0, 0.0], [0.0, 1.0]] for n in names}, {n: [[2.0, 0.0], [0.0, 1.0]] for n in names}],
        dict.fromkeys(names, zeros),
        ("iso_c", {}, {"text_projection": averaged, "w": flat}, "averaged"),
        ("iso_c", {"averaged": ["w"]}, {"text_projection": flat, "w": averaged}, ""),
        ("official:iso_c", {"scaling_factor": 1.0}, {"text_projection": averaged, "w": flat}, ""),
        ("fusion_bench:iso_c", {"scaling_factor": 1.0}, dict.fromkeys(names, flat), "none by itself"),
        ("fusion_bench:iso_c", {"scaling_factor": 1.0, "exclude_keys": ["w"]}, {"text_projection": flat, "w": averaged}, ""),
        flags="IsoProjection",
    )
    case(
        "no-matrices",
        "a vector, a number, a kernel (1, 1, 1, 2), nothing, integers",
        [
            {"b": [1.0, 3.0], "s": 4.0, "k": [[[[2.0, 0.0]]]], "e": [], "ids": i64(3)},
            {"b": [3.0, 5.0], "s": -2.0, "k": [[[[0.0, 1.0]]]], "e": [], "ids": i64(3)},
        ],
        {"b": [0.0, 2.0], "s": 0.0, "k": [[[[0.0, 0.0]]]], "e": [], "ids": i64(3)},
        (
            "iso_c",
            {"lambda_": 2.0},
            {"b": [4.0, 6.0], "s": 2.0, "k": [[[[2.0, 1.0]]]], "e": [], "ids": i64(3)},
            "twice the mean",
        ),
        tolerance=0.0,
    )
    none = np.zeros((0, 3), np.float32)
    case("empty-matrix", "shape (0, 3)", [{"e": none}], {"e": none}, ("iso_c", {}, {"e": none}, ""), tolerance=0.0)
    case("unchanged", "two models that equal the base", [zeros, zeros], zeros, ("iso_c", {}, zeros, ""), tolerance=0.0)
    for id, x in (("nan", float("nan")), ("infinite", float("inf"))):
        case(id, "it has no singular values", [[[x, 2.0], [1.0, 1.0]]], zeros, ("iso_c", {}, REFUSED, ""))
    for id, t in (("tolerance-zero", 0.0), ("tolerance-large", 0.5)):
        case(id, "outside of the domain", [zeros], zeros, ("iso_c", {"tolerance": t}, REFUSED, ""))
    case("no-base", "a task vector is a difference from a base", [zeros], None, ("iso_c", {}, REFUSED, ""))
    case("no-models", "nothing to merge", [], zeros, ("iso_c", {}, REFUSED, ""))
    return h
