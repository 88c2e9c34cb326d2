"""Vectors of regmean."""

from __future__ import annotations

from typing import Any

import numpy as np

from vector_cases import REFUSED, Hand, numbered

STEMS = ("regmean", "regmean_mats")
TOOLS = ("fusion_bench", "dataless", "mats")
CODE = {
    "fusion_bench:regmean": "tanganke/fusion_bench@54c9e8c fusion_bench/method/regmean/regmean.py:"
    "merging_with_regmean_weights",
    "dataless:regmean": "bloomberg/dataless-model-merging@92247ae src/model_merge/avg_merger.py:"
    "FedAvgMerger.regmean_mean_params",
    "mergelm:regmean": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.regmean_merging",
    "mats:regmean": "r-three/mats@cb52c38 src/merging/regmean.py:regmean",
}
FLAGS = {"regmean_mats-mats-03": ["RegMeanSingular"]}


def hand() -> Hand:
    h = Hand("regmean", CODE)

    def case(id: str, comment: str, W: list[Any], G: list[Any] | None, *answers: Any, bias: list[Any] | None = None,
             flags: str = "") -> None:  # fmt: skip
        """One layer l: the tools' Gram matrices are under its name, ours under l.gram."""
        models = [{"l.weight": w} | ({"l.bias": bias[i]} if bias else {}) for i, w in enumerate(W)]
        for entry, params, expect, why in answers:
            name = "l" if ":" in entry else "l.gram"
            stats = None if G is None else [{} if g is None else {name: np.array(g)} for g in G]
            if expect is not REFUSED:
                expect = expect if isinstance(expect, dict) else {"l.weight": expect}
            answer = (entry, params, expect, why)
            h.case(
                numbered(h, id, answer[0]),
                comment,
                models,
                None,
                answer,
                flags=flags,
                dtype="F64",
                stats=stats,
                tolerance=1e-12,
            )

    G = [[[2.0, 1.0], [1.0, 2.0]], [[2.0, -1.0], [-1.0, 2.0]]]
    W = [[[2.0, 2.0]], [[-2.0, 2.0]]]
    case(
        "solved",
        "W_1 G_1 = (6, 6), W_2 G_2 = (-6, 6), the sum of both times 1/4, since G_1 + G_2 = 4",
        W,
        G,
        ("regmean", {"off_diagonal": 1.0}, [[0.0, 3.0]], ""),
        ("fusion_bench:regmean", {}, [[0.0, 3.0]], ""),
        ("mergelm:regmean", {}, [[0.0, 3.0]], ""),
        ("dataless:regmean", {}, [[0.0, 3.0]], ""),
        ("mats:regmean", {}, [[0.0, 3.0]], ""),
    )
    case(
        "off-diagonal",
        "off the diagonal 9/10 of it: (5.8, 5.8) + (-5.8, 5.8) over 4; none of it: the mean; half: (5, 5) + (-5, 5)",
        W,
        G,
        ("regmean", {}, [[0.0, 2.9]], "9/10 by default"),
        ("fusion_bench:regmean", {}, [[0.0, 3.0]], "1 by default"),
        ("dataless:regmean", {}, [[0.0, 3.0]], "below 0 is off"),
        ("mats:regmean", {}, [[0.0, 3.0]], ""),
        ("regmean", {"off_diagonal": 0.0}, [[0.0, 2.0]], ""),
        ("dataless:regmean", {"regmean_diag": True}, [[0.0, 2.0]], ""),
        ("dataless:regmean", {"regmean_reduce_nondiag": 0.5}, [[0.0, 2.5]], ""),
        ("fusion_bench:regmean", {"reduce_non_diagonal_ratio": 0.5}, [[0.0, 2.5]], ""),
        ("mergelm:regmean", {"reduce_non_diagonal_ratio": 0.5}, [[0.0, 2.5]], ""),
        ("mats:regmean", {"model_lambda": 0.5}, [[0.0, 2.5]], ""),
        flags="RegMeanOffDiagonal",
    )
    case(
        "dead-input",
        "input 1 is 0 in all samples; of input 0 the weighted mean, (1 * 4 + 3 * 0) / 4 = 1",
        [[[4.0, 7.0]], [[0.0, 7.0]]],
        [[[1.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]],
        ("regmean", {}, REFUSED, "no weight of input 1 is better than another"),
        ("fusion_bench:regmean", {}, REFUSED, ""),
        ("mergelm:regmean", {}, REFUSED, ""),
        ("dataless:regmean", {}, REFUSED, ""),
        ("mats:regmean", {}, [[1.0, 0.0]], "0, though both models say 7"),
        flags="RegMeanSingular",
    )
    case(
        "coefficients",
        "3/4 for both is one factor for both Gram matrices, which cancels; the bias is 3/4 * 2 + 3/4 * 4, and 3 as a mean",
        W,
        G,
        ("regmean", {"off_diagonal": 1.0}, {"l.weight": [[0.0, 3.0]], "l.bias": [3.0]}, "there are no coefficients"),
        ("dataless:regmean", {"model_coeffs": [0.75, 0.75]}, {"l.weight": [[0.0, 3.0]], "l.bias": [4.5]}, ""),
        bias=[[2.0], [4.0]],
        flags="RegMeanCoefficients",
    )
    case(
        "layout",
        "weights (in, out): the transpose of the first case",
        [[[2.0], [2.0]], [[-2.0], [2.0]]],
        G,
        ("regmean", {"off_diagonal": 1.0, "layout": "in_out"}, [[0.0], [3.0]], ""),
        ("fusion_bench:regmean", {"weight_transpose": False}, [[0.0], [3.0]], ""),
    )
    case(
        "two-rank-one",
        "each Gram matrix has rank 1, their sum is regular: every model decides on its own input",
        [[[1.0, 5.0]], [[7.0, 2.0]]],
        [[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]],
        ("regmean", {}, [[1.0, 2.0]], ""),
        ("mats:regmean", {}, [[1.0, 2.0]], ""),
    )
    case("one-model", "W G G^-1", [[[3.0, -1.0]]], [G[0]], ("regmean", {}, [[3.0, -1.0]], ""))
    case("equal-grams", "the mean", W, [G[0]] * 2, ("regmean", {}, [[0.0, 2.0]], ""))
    case("wrong-size", "one input more", W, [np.eye(3), np.eye(3)], ("regmean", {}, REFUSED, ""))
    case("not-square", "no matrix of inputs", W, [np.ones((2, 3))] * 2, ("regmean", {}, REFUSED, ""))
    case("not-symmetric", "1 and 2", W, [[[2.0, 1.0], [2.0, 2.0]], G[1]], ("regmean", {}, REFUSED, ""))
    case("missing", "model 1 has none", W, [G[0], None], ("regmean", {}, REFUSED, ""))
    case("not-finite", "NaN", W, [[[float("nan"), 0.0], [0.0, 1.0]], G[1]], ("regmean", {}, REFUSED, ""))
    case("no-statistics", "nothing to solve", W, None, ("regmean", {}, REFUSED, ""))
    case("no-matching-statistics", "of another layer", W, [None, None], ("regmean", {}, REFUSED, ""))
    S = [[2.0, 1.0], [1.0, 2.0]]
    case(
        "square",
        "one model is the solution, and not its transpose, whatever the layout",
        [[[1.0, 2.0], [3.0, 4.0]]],
        [S],
        ("regmean", {}, [[1.0, 2.0], [3.0, 4.0]], ""),
        ("regmean", {"layout": "in_out"}, [[1.0, 2.0], [3.0, 4.0]], ""),
    )
    case(
        "three-axes",
        "the numbers of solved, the weight of shape (1, 2, 1)",
        [[[[2.0], [2.0]]], [[[-2.0], [2.0]]]],
        G,
        ("regmean", {"off_diagonal": 1.0}, [[[0.0], [3.0]]], ""),
    )
    case(
        "nearly-symmetric",
        "entries that differ by 2^-8 beside 100 are the same up to rounding; the weight 0 comes back",
        [[[0.0, 0.0]]],
        [[[100.0, 1.0], [1.0 + 2.0**-8, 100.0]]],
        ("regmean", {}, [[0.0, 0.0]], ""),
    )
    case(
        "not-symmetric-small",
        "entries that differ by 2^-14 beside 1/2, more than 1e-4 of it",
        [[[0.0, 0.0]]],
        [[[0.5, 0.25], [0.25 + 2.0**-14, 0.5]]],
        ("regmean", {}, REFUSED, ""),
    )
    case(
        "tiny",
        "a Gram matrix of 2^-60 is as good as one of 1",
        [[[1.0, 2.0]]],
        [[[2.0**-60, 0.0], [0.0, 2.0**-60]]],
        ("regmean", {}, [[1.0, 2.0]], ""),
    )
    case(
        "symmetric-at-the-bound",
        "entries that differ by 1e-4 of the largest, not more; none of what is off the diagonal is used",
        [[[1.0, 2.0]]],
        [[[1.0, 1e-4], [0.0, 1.0]]],
        ("regmean", {"off_diagonal": 0.0}, [[1.0, 2.0]], ""),
    )
    case(
        "regular",
        "eigenvalues 1 and 2^-50, more than 2 * 2^-52 of the largest",
        [[[1.0, 2.0]]],
        [[[1.0, 0.0], [0.0, 2.0**-50]]],
        ("regmean", {}, [[1.0, 2.0]], ""),
    )
    case(
        "singular-at-the-bound",
        "eigenvalues 1 and 2^-51, just 2 * 2^-52 of the largest",
        [[[1.0, 2.0]]],
        [[[1.0, 0.0], [0.0, 2.0**-51]]],
        ("regmean", {}, REFUSED, ""),
    )
    case("column", "a column of ones is no square matrix", [[[1.0, 2.0]]], [np.ones((2, 1))], ("regmean", {}, REFUSED, ""))
    case("cube", "three axes of length 1", [[[2.0]]], [np.ones((1, 1, 1))], ("regmean", {}, REFUSED, ""))
    v = np.array([1 / 3, 1 / 5])
    case(
        "singular-up-to-rounding",
        "v v^T with v = (1/3, 1/5) has rank 1, and times 2^40 rounding leaves an eigenvalue of 4e-6 beside 1.7e11",
        [[[1.0, 2.0]]],
        [2.0**40 * np.outer(v, v)],
        ("regmean", {"off_diagonal": 1.0}, REFUSED, ""),
    )
    case(
        "no-inputs",
        "a weight of one output and no inputs",
        [np.zeros((1, 0))],
        [np.zeros((0, 0))],
        ("regmean", {}, np.zeros((1, 0)), ""),
    )
    return h
