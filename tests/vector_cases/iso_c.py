"""Vectors of iso_c."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, Test, i64
from vector_cases.low_rank_residual import terms

CODE = {
    "official:iso_c": "danielm1405/iso-merging@d34010a src/utils/iso.py:iso_c",
    "fusion_bench:iso_c": "tanganke/fusion_bench@54c9e8c fusion_bench/method/isotropic_merging/iso_utils.py:iso_c",
}
TOOLS = ("fusion_bench",)
PAPER = {"iso_c-official-00": Paper({}, comment="no sum of less than full rank")}
SLACK = 1e-6  # singular vectors are rounded

STAGED = (
    "iso_c-example", "iso_c-other-shares", "iso_c-lambda", "iso_c-one-model", "iso_c-rank", "iso_c-tolerance",
    "iso_c-tolerance-2", "iso_c-row", "iso_c-vector",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    Delta, scale = [theta - given.base for theta in given.models], Fraction(given.params.get("lambda_", 1.0))
    if given.base.ndim != 2:
        return {1: {"result": given.base + scale * sum(Delta) / Fraction(len(Delta))}}
    M = sum(Delta)
    found = spanned(M, given.params.get("tolerance", 1e-5))
    S, polar = [s for s, _ in found], sum(term / s for s, term in found)
    result = given.base + scale * (sum(S) / Fraction(len(S))) * polar
    return {2: {"M": M}, 3: {"S": np.array(S, object)}, 4: {"result": result}}


def spanned(M: Any, tolerance: float) -> list[tuple[Fraction, Any]]:
    """The terms of M without those that count as zero."""
    found = terms(M)
    return [(s, term) for s, term in found if s > Fraction(tolerance) * found[0][0]]


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
    case(
        "equal",
        "diag(6, 2) twice: the sum diag(12, 4), the mean 8",
        [[[6.0, 0.0], [0.0, 2.0]]] * 2,
        zeros,
        ("iso_c", {}, [[8.0, 0.0], [0.0, 8.0]], "twice the diag(4, 4) of one of them"),
    )
    case(
        "low-rank",
        "6 e_1 e_1^T and 2 e_2 e_2^T in a 3 x 3 matrix: two directions, the mean 4",
        [np.diag([6.0, 0.0, 0.0]).tolist(), np.diag([0.0, 2.0, 0.0]).tolist()],
        [[0.0] * 3] * 3,
        ("iso_c", {}, np.diag([4.0, 4.0, 0.0]).tolist(), "nothing where nothing was"),
        flags="IsoRank",
    )
    case(
        "column",
        "a 2 x 1 matrix",
        [[[3.0], [4.0]], [[1.0], [0.0]]],
        [[0.0], [0.0]],
        ("iso_c", {}, [[4.0], [4.0]], "the sum itself"),
    )
    case(
        "opposite-up-to-rounding",
        "diag(4, 1) and diag(-4 + 2^-20, -1): the sum diag(2^-20, 0) is the largest singular value there is",
        [[[4.0, 0.0], [0.0, 1.0]], [[-4.0 + 2.0**-20, 0.0], [0.0, -1.0]]],
        zeros,
        ("iso_c", {}, [[2.0**-20, 0.0], [0.0, 0.0]], "itself, and as small"),
    )
    case(
        "vector",
        "base 1; changes (2, -4) and (4, 2) of mean (3, -1); half of it",
        [[3.0, -3.0], [5.0, 3.0]],
        [1.0, 1.0],
        ("iso_c", {"lambda_": 0.5}, [2.5, 0.5], ""),
        tolerance=0.0,
    )
    nan, inf = float("nan"), float("inf")
    case(
        "vector-not-finite",
        "the mean of (NaN, infinity, 1) and (1, 1, 3)",
        [[nan, inf, 1.0], [1.0, 1.0, 3.0]],
        [0.0] * 3,
        ("iso_c", {}, [nan, inf, 2.0], ""),
        tolerance=0.0,
    )
    return h
