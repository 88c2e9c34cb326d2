"""Vectors of low_rank_residual."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Tensors, Test, i64, origin

STEMS = ("lora_extraction",)
SLACK = 1e-6  # singular vectors are rounded

STAGED = (
    "low_rank_residual-rank-one", "low_rank_residual-rank-two", "low_rank_residual-rank-zero",
    "low_rank_residual-transposed", "low_rank_residual-diagonal", "low_rank_residual-convolution",
    "low_rank_residual-vector-rank-zero", "low_rank_residual-unchanged",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    (theta,), base = given.models, given.base
    R = (theta - base).reshape(len(base) if base.ndim > 1 else 1, -1)
    found = terms(R)
    R_r = sum((term for _, term in found[: given.params["rank"]]), 0 * R)
    return {
        1: {"R": R},
        2: {"S": np.array([s for s, _ in found], object)},
        3: {"R_r": R_r},
        4: {"result": base + R_r.reshape(base.shape)},
    }


def terms(M: Any) -> list[tuple[Fraction, Any]]:
    """(s, s u v^T) for each singular value, the largest first: of a diagonal matrix its entries, and of one of two rows from
    the eigenvalues a + h and a - h of the 2 x 2 matrix G = M M^T, whose projectors are (G - (a -+ h)) / (+-2 h)."""
    if len(M) > len(M.T):
        return [(s, term.T) for s, term in terms(M.T)]
    if len(M) == 1:
        return [(root(np.sum(M * M)), M)]
    if not np.any(M[~np.eye(*M.shape, dtype=bool)]):
        alone = [(abs(M[i, i]), np.where(np.arange(len(M))[:, None] == i, M, Fraction(0))) for i in range(len(M))]
        return sorted(alone, key=lambda term: -term[0])
    G, one = M @ M.T, np.eye(2, dtype=int) * Fraction(1)
    a, h = (G[0, 0] + G[1, 1]) / 2, root(((G[0, 0] - G[1, 1]) / 2) ** 2 + G[0, 1] ** 2)
    return [(root(a + h), (G - (a - h) * one) @ M / (2 * h)), (root(a - h), ((a + h) * one - G) @ M / (2 * h))]


def root(x: Fraction) -> Fraction:
    """The square root: itself where it is a fraction, else to a float64."""
    exact = Fraction(math.isqrt(x.numerator), math.isqrt(x.denominator))
    return exact if exact * exact == x else Fraction(math.sqrt(x))


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """Adapters that mergekit extracted from float32 matrices: the base plus the product of its two factors."""
    given = json.loads(meta["params"])
    base, model, delta = tensors["base/w"], tensors["model0/w"], tensors["out/delta"]
    if given.keys() != {"max_rank"} or base.dtype != np.float32 or base.shape != delta.shape:
        return []
    test = Test(
        id=f"low_rank_residual-{id}",
        entry="low_rank_residual",
        params={"rank": given["max_rank"]},
        models=[{"w": model}],
        base={"w": base},
        expect={"w": (base + delta).astype(np.float32)},
        comment=f"{meta['notes'].partition(',')[0].partition('. ')[0]}; expected is the base plus the factors' product",
        source=origin(meta["source"]),
        tolerance=1e-5,
    )
    return [test]


def hand() -> Hand:
    h = Hand("low_rank_residual", {})

    def case(id: str, comment: str, model: Any, base: Any, rank: int, expect: Any, why: str = "", **more: Any) -> None:
        h.case(id, comment, [model], base, ("low_rank_residual", {"rank": rank}, expect, why), tolerance=SLACK, **more)

    six = (
        "18 sqrt(2) u v^T + 9 sqrt(2) u' v'^T, u = (1, 1)/sqrt(2), v = (4, 4, 7)/9, u' = (1, -1)/sqrt(2), v' = (1, -8, 4)/9"
    )
    model, ones = [[10.0, 1.0, 19.0], [8.0, 17.0, 11.0]], [[1.0] * 3] * 2
    case("rank-one", six, model, ones, 1, [[9.0, 9.0, 15.0], [9.0, 9.0, 15.0]], "base + (8, 8, 14) in both rows")
    case("rank-two", six, model, ones, 2, model, "all of it")
    case("rank-above", six, model, ones, 5, model, "there are no more terms")
    case("rank-zero", six, model, ones, 0, ones, "the base")
    case(
        "transposed",
        six + ", transposed",
        [[10.0, 8.0], [1.0, 17.0], [19.0, 11.0]],
        [[1.0] * 2] * 3,
        1,
        [[9.0, 9.0], [9.0, 9.0], [15.0, 15.0]],
        "the same, transposed",
    )
    hadamard = [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]
    change = [[sum(w * h[i] * h[j] for w, h in zip((8, 4, 2, 1), hadamard)) for j in range(4)] for i in range(4)]
    kept = [[sum(w * h[i] * h[j] for w, h in zip((8, 4), hadamard)) for j in range(4)] for i in range(4)]
    case(
        "four-terms",
        "the terms are 8, 4, 2 and 1 times h h^T for the four rows h of a Hadamard matrix",
        change,
        [[0.0] * 4] * 4,
        2,
        kept,
        "the first two",
    )
    case("diagonal", "diag(3, -4, 1): the terms are the entries", [[3.0, 0, 0], [0, -4.0, 0], [0, 0, 1.0]],
         [[0.0] * 3] * 3, 2, [[3.0, 0, 0], [0, -4.0, 0], [0, 0, 0]], "by magnitude")  # fmt: skip
    case(
        "vector",
        "a vector is one row, of one term",
        {"b": [3.0, 4.0], "w": [[2.0, 0.0], [0.0, 1.0]]},
        {"b": [0.0, 0.0], "w": [[0.0, 0.0], [0.0, 0.0]]},
        1,
        {"b": [3.0, 4.0], "w": [[2.0, 0.0], [0.0, 0.0]]},
        flags="LowRankVector",
    )
    case(
        "vector-rank-zero",
        "a vector is one row, of one term",
        [3.0, 4.0],
        [0.0, 0.0],
        0,
        [0.0, 0.0],
        "extract_lora would keep (3, 4) whole",
        flags="LowRankVector",
    )
    case(
        "convolution",
        "shape (2, 1, 2): one 2 x 2 matrix",
        [[[2.0, 0.0]], [[0.0, 1.0]]],
        [[[0.0, 0.0]], [[0.0, 0.0]]],
        1,
        [[[2.0, 0.0]], [[0.0, 0.0]]],
        "two matrices of one row each would keep all",
        flags="LowRankConvolution",
    )
    case(
        "difference",
        "bfloat16: 1 + 2^-7 less 2^-8 is 1 + 2^-8, which bfloat16 does not hold",
        [1.0078125],
        [0.00390625],
        1,
        [1.0078125],
        "kept in float64; rounded to bfloat16 the change would be 1, and 1.0 would come back",
        flags="LowRankDifference",
        dtype="BF16",
    )
    case(
        "empty-scalar-integers",
        "a number is one row of one entry",
        {"e": [], "s": 8.0, "ids": i64(3, 4)},
        {"e": [], "s": 1.0, "ids": i64(3, 4)},
        1,
        {"e": [], "s": 8.0, "ids": i64(3, 4)},
    )
    case("unchanged", "no change, no terms", [[1.0, 2.0]], [[1.0, 2.0]], 1, [[1.0, 2.0]])
    case("nan", "NaN has no singular values", [[float("nan"), 2.0]], [[1.0, 2.0]], 1, REFUSED)
    case("infinite", "infinity has no singular values", [[float("inf"), 2.0]], [[1.0, 2.0]], 1, REFUSED)
    case("rank-negative", "rank -1", [[1.0]], [[0.0]], -1, REFUSED)
    h.case("two-models", "one fine-tune at a time", [[1.0], [2.0]], [0.0], ("low_rank_residual", {"rank": 1}, REFUSED, ""))
    h.case("no-base", "a residual is a difference from a base", [[1.0]], None, ("low_rank_residual", {}, REFUSED, ""))
    h.case(
        "rank-default",
        "diag(10, 9, ..., 1): the eight largest singular values stay",
        [np.diag([10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])],
        np.zeros((10, 10)),
        (
            "low_rank_residual",
            {},
            {"x": np.diag([10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 0.0, 0.0])},
            "rank is 8 by default",
        ),
        tolerance=1e-14,
    )
    h.case(
        "no-rows",
        "a matrix of no rows and three columns",
        [np.zeros((0, 3))],
        np.zeros((0, 3)),
        ("low_rank_residual", {}, {"x": np.zeros((0, 3))}, ""),
    )
    case(
        "vector-of-many",
        "a vector of four entries is one row, of one term, which rank 1 keeps",
        [4.0, -1.0, 3.0, 2.0],
        [1.0] * 4,
        1,
        [4.0, -1.0, 3.0, 2.0],
        flags="LowRankVector",
    )
    case(
        "integers-differ",
        "integers are the base's",
        {"w": [[2.0, 0.0], [0.0, 1.0]], "ids": i64(7)},
        {"w": [[0.0, 0.0], [0.0, 0.0]], "ids": i64(3)},
        1,
        {"w": [[2.0, 0.0], [0.0, 0.0]], "ids": i64(3)},
    )
    return h
