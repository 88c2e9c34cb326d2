"""Vectors of singular_projection."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, fraction, i64

TOOL = "fusion_bench:singular_projection"
CODE = {
    TOOL: "tanganke/fusion_bench@54c9e8c fusion_bench/method/smile_upscaling/singular_projection_merging.py:"
    "SingularProjectionMergingAlgorithm"
}
TOOLS = ("fusion_bench",)
PAPER = {
    "singular_projection-fusion_bench-00": Paper({"k": 3}, comment="the base has full rank"),
    "singular_projection-fusion_bench-03": Paper({"k": 2, "part": "high"}, comment="the base has full rank"),
}
NAME = "fc.weight"

STAGED = tuple(f"singular_projection-{id}" for id in ("low", "high", "half", "all", "rank-zero", "rank-zero-high"))


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """Of the base [[3, 1, 0], [1, 3, 0]], of singular vectors (1, 1) and (1, -1) over sqrt 2: their projectors."""
    k = given.params.get("k", 128)
    k = 1 if k is None else k
    half = fraction(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]])) / 2
    Q = [half * 0, half, np.diag(fraction(np.array([1, 1, 0])))][min(k, 2)]
    P = Q[:2, :2]
    tau = given.models[0] - given.base
    onto = P @ tau @ Q
    found = {1: {"tau": tau}, 2: {"S": fraction(np.array([4, 2]))}, 3: {"k": k}, 4: {"onto": onto}}
    if given.params.get("part") == "high":
        left = tau - P @ tau
        onto = left - left @ Q
        found[5] = {"left": left, "onto": onto}
    return found | {6: {"result": given.base + onto}}


def hand() -> Hand:
    h = Hand("singular_projection", CODE)

    def case(id: str, comment: str, model: Any, base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, [model], base, *answers, **{"dtype": "F64", "tolerance": 1e-14} | more)

    def layer(x: Any) -> dict[str, Any]:
        return {NAME: x}

    base, model = [[3.0, 1.0, 0.0], [1.0, 3.0, 0.0]], [[7.0, 3.0, 1.0], [3.0, 3.0, 5.0]]
    hadamard = "base 4 (1, 1)/sqrt2 (1, 1, 0)/sqrt2 + 2 (1, -1)/sqrt2 (1, -1, 0)/sqrt2; change (4, 2, 1; 2, 0, 5)"
    low = [[5.0, 3.0, 0.0], [3.0, 5.0, 0.0]]
    case(
        "low",
        f"{hadamard}: of the 2 x 2 block the mean, 2, lies between the first two vectors",
        layer(model),
        layer(base),
        ("singular_projection", {"k": 1}, layer(low), ""),
        (TOOL, {"k": 1}, layer(low), ""),
    )
    high = [[3.0, 1.0, -2.0], [1.0, 3.0, 2.0]]
    left = f"{hadamard}: left over are (1, -1) on the left and (1, -1, 0), (0, 0, 1) on the right: 0 and -2 sqrt(2)"
    case(
        "high",
        left,
        layer(model),
        layer(base),
        ("singular_projection", {"k": 1, "part": "high"}, layer(high), ""),
        (TOOL, {"k": 1, "rank": "high"}, layer(base), "the thin decomposition has (1, -1, 0) alone, and there is nothing"),
        flags="SingularProjectionHigh",
    )
    case(
        "high-full",
        left,
        layer(model),
        layer(base),
        (TOOL, {"k": 1, "rank": "high", "full_matrices": True}, layer(high), "full_matrices has (0, 0, 1) too"),
        flags="SingularProjectionHigh",
    )
    case(
        "half",
        f"{hadamard}: 4 of 6 is half of the sum and more, so that one direction is enough",
        layer(model),
        layer(base),
        ("singular_projection", {"k": None}, layer(low), ""),
        (TOOL, {"k": -1}, layer(low), ""),
    )
    block = [[7.0, 3.0, 0.0], [3.0, 3.0, 0.0]]
    case(
        "all",
        f"{hadamard}: all that maps the row space of the base to its column space",
        layer(model),
        layer(base),
        ("singular_projection", {}, layer(block), "there are two directions of 128"),
        (TOOL, {}, layer(block), ""),
    )
    case(
        "rank-zero",
        "no direction is kept",
        layer(model),
        layer(base),
        ("singular_projection", {"k": 0}, layer(base), ""),
        (TOOL, {"k": 0}, layer(base), ""),
    )
    case(
        "rank-zero-high",
        "nothing is left out",
        layer(model),
        layer(base),
        ("singular_projection", {"k": 0, "part": "high"}, layer(model), ""),
        (TOOL, {"k": 0, "rank": "high", "full_matrices": True}, layer(model), ""),
    )
    case(
        "deficient",
        "base diag(4, 0), change all ones, rank 2",
        layer([[5.0, 1.0], [1.0, 1.0]]),
        layer([[4.0, 0.0], [0.0, 0.0]]),
        ("singular_projection", {"k": 2}, layer([[5.0, 0.0], [0.0, 0.0]]), "the base has one direction"),
        (TOOL, {"k": 2}, layer([[5.0, 1.0], [1.0, 1.0]]), "the second, of singular value 0, is LAPACK's"),
        flags="SingularProjectionZero",
    )
    for id, tolerance, expect, comment in (
        ("rounding", {}, [[5.0, 0.0], [0.0, 2.0**-20]], "which counts as zero: the base has one direction"),
        ("above-the-tolerance", {"tolerance": 2.0**-23}, [[5.0, 1.0], [1.0, 1.0 + 2.0**-20]], "which is above: it has two"),
    ):
        case(
            id,
            "base diag(4, 2^-20), whose second singular value is 2^-22 of the first, change all ones",
            layer([[5.0, 1.0], [1.0, 1.0 + 2.0**-20]]),
            layer([[4.0, 0.0], [0.0, 2.0**-20]]),
            ("singular_projection", {"k": 2, **tolerance}, layer(expect), comment),
        )
    case(
        "zero-base",
        "a base of zeros has no directions",
        layer([[5.0, 1.0]]),
        layer([[0.0, 0.0]]),
        ("singular_projection", {}, layer([[0.0, 0.0]]), "the base"),
    )
    case(
        "zero-base-high",
        "a base of zeros has no directions",
        layer([[5.0, 1.0]]),
        layer([[0.0, 0.0]]),
        ("singular_projection", {"part": "high"}, layer([[5.0, 1.0]]), "all of the change is outside of them"),
    )
    case(
        "embedding",
        "base (4, 0), change (1, 1)",
        {"emb.weight": [[5.0, 1.0]]},
        {"emb.weight": [[4.0, 0.0]]},
        ("singular_projection", {}, {"emb.weight": [[5.0, 0.0]]}, ""),
        (TOOL, {}, {"emb.weight": [[5.0, 1.0]]}, "not a linear layer's: the fine-tune's"),
        flags="SingularProjectionOthers",
    )
    case(
        "layers",
        "base (4, 0), change (1, 1), in a matrix that is not to be projected, and a bias",
        {"emb.weight": [[5.0, 1.0]], "fc.bias": [3.0]},
        {"emb.weight": [[4.0, 0.0]], "fc.bias": [1.0]},
        ("singular_projection", {"layers": ["fc*"]}, {"emb.weight": [[5.0, 1.0]], "fc.bias": [3.0]}, "the fine-tune's"),
        (TOOL, {}, {"emb.weight": [[5.0, 1.0]], "fc.bias": [3.0]}, ""),
        tolerance=0.0,
    )
    case(
        "empty-and-integers",
        "no entries; a number; integers",
        {"e": [], "s": 3.0, "ids": i64(3)},
        {"e": [], "s": 1.0, "ids": i64(3)},
        ("singular_projection", {}, {"e": [], "s": 3.0, "ids": i64(3)}, ""),
    )
    h.case("nan", "NaN has no singular values", [[[math.nan, 1.0]]], [[0.0, 0.0]], ("singular_projection", {}, REFUSED, ""))
    h.case("rank-negative", "rank -1", [[[1.0]]], [[0.0]], ("singular_projection", {"k": -1}, REFUSED, ""))
    h.case("two-models", "one fine-tune", [[1.0], [2.0]], [0.0], ("singular_projection", {}, REFUSED, ""))
    h.case("no-base", "it has no subspaces", [[[1.0]]], None, ("singular_projection", {}, REFUSED, ""))
    ones = np.ones((4, 4))
    a, b = np.diag([6.0, 5.0, 4.0, 3.0]), np.diag([9.0, 5.0, 3.0, 1.0])
    h.case(
        "half-of-the-sum",
        "every entry changes by 1. a: half of 6 + 5 + 4 + 3 is 9, passed by 6 + 5, so k = 2; b: half of 9 + 5 + 3 + 1 is 9, "
        "which 9 is, so k = 1. The first k rows and columns have the change",
        [{"a": a + ones, "b": b + ones}],
        {"a": a, "b": b},
        (
            "singular_projection",
            {"k": None},
            {
                "a": [[7.0, 1.0, 0.0, 0.0], [1.0, 6.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 3.0]],
                "b": np.diag([10.0, 5.0, 3.0, 1.0]),
            },
            "",
        ),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case("no-models", "nothing to project", [], [[0.0]], ("singular_projection", {}, REFUSED, ""))
    case(
        "many-axes",
        f"{hadamard}; of shape (2, 3, 1), a row for each index of the first axis",
        layer([[[y] for y in row] for row in model]),
        layer([[[y] for y in row] for row in base]),
        ("singular_projection", {"k": 1}, layer([[[y] for y in row] for row in low]), ""),
    )
    square, changed = [[4.0, 0.0], [0.0, 2.0]], [[5.0, 3.0], [-2.0, 2.0]]
    for id, part, expect in (("invertible", "low", changed), ("invertible-high", "high", square)):
        case(
            id,
            "base diag(4, 2), whose two directions are all there are",
            layer(changed),
            layer(square),
            ("singular_projection", {"k": 2, "part": part}, layer(expect), ""),
        )
    for id, part, x in (("zero-base-half", "low", 0.0), ("zero-base-half-high", "high", 5.0)):
        case(
            id,
            "a base of zeros has no directions, of which half of the sum were",
            layer([[5.0, 5.0]]),
            layer([[0.0, 0.0]]),
            ("singular_projection", {"k": None, "part": part}, layer([[x, x]]), ""),
        )
    case("unchanged", "the change is 0", layer(base), layer(base), ("singular_projection", {"k": 1}, layer(base), ""))
    h.case(
        "infinity",
        "an infinity has no singular values, in the base or in the model",
        [[[1.0, 1.0]]],
        [[math.inf, 0.0]],
        ("singular_projection", {}, REFUSED, ""),
    )
    return h
