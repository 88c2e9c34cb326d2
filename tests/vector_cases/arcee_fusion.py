"""Vectors of arcee_fusion."""

from __future__ import annotations

from typing import Any

import numpy as np

from vector_cases import DTYPES, OPEN, REFUSED, Hand, Paper

CODE = {
    "mergekit:arcee_fusion": "mergekit 0.1.5 mergekit/merge_methods/arcee_fusion.py:arcee_fusion_merge_method",
}
FLAGS = {
    "arcee_fusion-mergekit-bf16-01": ["ArceeRounding", "ArceeWidens"],
}
OPTIONS = {
    "arcee_fusion-mergekit-bf16-01": {"arithmetic": "native"},
}
PAPER = {
    "arcee_fusion-mergekit-01": Paper({}, comment="the changes are large enough for float32"),
    "arcee_fusion-mergekit-04": Paper({}),
}


def hand() -> Hand:
    h = Hand("arcee_fusion", CODE)

    def paper(expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("arcee_fusion", {}, expect, why)

    def mergekit(expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("mergekit:arcee_fusion", {}, expect, why)

    def both(expect: Any, why: str = "") -> list[tuple[str, dict[str, Any], Any, str]]:
        return [paper(expect, why), mergekit(expect, why)]

    zeros = [[0.0] * 3] * 2
    h.case(
        "by-hand",
        "base 0: q = 1/3; row (2, 0, -1): p = 0.844, 0.114, 0.042, K = sum p log(3 p) = 0.574; row (1, 0, 0): p = 0.576, "
        "0.212, 0.212, K = 0.123; importances 1.149, 0, 0.574, 0.123, 0, 0; quartiles 0, 0, 0.123, threshold 0.185",
        [[[2.0, 0.0, -1.0], [1.0, 0.0, 0.0]]],
        zeros,
        *both([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]),
    )
    h.case(
        "quarter",
        "one of five entries changed: all quartiles are 0, and so is the threshold, which everything reaches",
        [[0.0, 0.25, 0.0, 0.0, 0.0]],
        [0.0] * 5,
        *both([0.0, 0.25, 0.0, 0.0, 0.0]),
    )
    h.case(
        "half",
        "two of five entries changed alike, importance I: quartiles 0, 0, I, threshold 1.5 I, which nothing reaches",
        [[0.0, 1.0, 0.0, 0.0, 1.0]],
        [0.0] * 5,
        *both([0.0] * 5),
    )
    h.case(
        "epsilon",
        "rows exchange a and 0: K = a tanh(a/2), importances a^2, 1600 for 40, 400 for 20, and 0; quartiles 0, 400, "
        "400, threshold 1000",
        [[[0.0, 40.0], [0.0, 20.0], [0.0, 0.0]]],
        [[40.0, 0.0], [20.0, 0.0], [0.0, 0.0]],
        paper([[0.0, 40.0], [20.0, 0.0], [0.0, 0.0]], "1600 is above"),
        mergekit(
            [[40.0, 0.0], [20.0, 0.0], [0.0, 0.0]],
            "with 1e-8 added K is 18.42 and 18.25: 737 and 365, threshold 912, which nothing reaches",
        ),
        flags="ArceeEpsilon",
        dtype="F64",
    )
    tiny = [[s * 2.0**-30, -s * 2.0**-30] for s in (1.0, 0.5, 0.25, 0.125)]
    h.case(
        "rounding",
        "base 0, rows (v, -v), v = 2^-30 and its halves: K = v^2/2, importances 1, 1/8, 1/64, 1/512 times 2^-91, two "
        "of each; quartiles 1/512, 1/64, 1/8, threshold 1/64 + 1.5 (1/8 - 1/512) = 0.2",
        [tiny],
        [[0.0, 0.0]] * 4,
        paper([tiny[0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], "the first row"),
        mergekit(tiny, "all softmaxes are 1/2 in float32, all importances 0, all reach the threshold 0"),
        flags="ArceeRounding",
    )
    v = 2.0**-30
    h.case(
        "rounding-of-one",
        "base 0, rows (v, 0, 0) with v = 2^-30 and three times 19/16 of it: K = v^2/9, importances v^3/9, 1 and 1.67 times the "
        "first, and eight zeros; quartiles 0, 0 and the first, threshold 1.5",
        [[[v, 0.0, 0.0], *[[v * 19 / 16, 0.0, 0.0]] * 3]],
        [[0.0] * 3] * 4,
        paper([[0.0] * 3, *[[v * 19 / 16, 0.0, 0.0]] * 3], "the other three rows"),
    )
    h.case(
        "many-axes",
        "base 0, shape (1, 2, 2), rows (3, 3) and (2, -1)",
        [[[[3.0, 3.0], [2.0, -1.0]]]],
        [[[0.0, 0.0], [0.0, 0.0]]],
        paper([[[0.0, 0.0], [0.0, 0.0]]], "one row, importances K (3, 3, 2, 1): threshold K (2 + 1.5 2), above all"),
        mergekit([[[0.0, 0.0], [2.0, 0.0]]], "the first row is a shift, K = 0; importances K (0, 0, 2, 1): threshold K 1.5"),
        flags="ArceeManyAxes",
    )
    nan = float("nan")
    h.case(
        "not-finite",
        "base 0, rows (NaN, 1) and (2, 0): importances NaN, NaN, 2 K, 0; the third quartile is NaN, and so is the threshold",
        [[[nan, 1.0], [2.0, 0.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        paper([[nan, 1.0], [2.0, 0.0]], "nothing is below it"),
        mergekit([[nan, 0.0], [0.0, 0.0]], "nothing reaches it, and NaN times 0 is NaN"),
        flags="ArceeNotFinite",
    )
    h.case(
        "adds",
        "a row of one entry has K = 0 and is taken: 1, from 2^25",
        [[1.0]],
        [2.0**25],
        paper([1.0], "the model's entry"),
        mergekit([0.0], "1 - 2^25 rounds to -2^25"),
        flags="ArceeAdds",
    )
    h.case(
        "widens",
        "a row of one entry is taken",
        [{"x": np.array([1.0078125], DTYPES["BF16"])}],
        {"x": np.array([1.0], DTYPES["BF16"])},
        paper({"x": np.array([1.0078125], DTYPES["BF16"])}),
        mergekit({"x": np.array([1.0078125], np.float32)}),
        flags="ArceeWidens",
    )
    h.case(
        "empty",
        "no entries",
        [[]],
        [],
        paper([]),
        mergekit(OPEN, "an index of 0 is out of bounds"),
        flags="ArceeEmpty",
    )
    h.case("identical", "importances and threshold 0: everything is taken", [[1.0, -2.0]], [1.0, -2.0], *both([1.0, -2.0]))
    h.case(
        "column",
        "rows of one entry have K = 0: importances and threshold are 0, everything is taken; numbers too",
        [{"c": [[2.0], [3.0]], "s": 5.0}],
        {"c": [[1.0], [1.0]], "s": 1.0},
        *both({"c": [[2.0], [3.0]], "s": 5.0}),
    )
    h.case(
        "shift",
        "the second row moved by 2 as a whole, unseen by softmax; the first by (1, -1), K = tanh 1 - log cosh 1 = 0.328; "
        "quartiles 0, 0, 0.328, threshold 0.492, which nothing reaches",
        [[[1.0, -1.0], [2.0, 2.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        *both([[0.0, 0.0], [0.0, 0.0]]),
    )
    h.case("two-models", "one model is fused into the base", [[1.0], [2.0]], [0.0], ("arcee_fusion", {}, REFUSED, ""))
    h.case("no-base", "importance is that of a change", [[1.0]], None, ("arcee_fusion", {}, REFUSED, ""))
    h.case(
        "divergence-decides",
        "against uniform rows of four. Row (t, 0, 0, 0): p is (1, 0, 0, 0) up to 1e-5, the divergence log 4; row "
        "(20, 20, 0, 0): p is (1/2, 1/2, 0, 0), the divergence log 2. Importances t log 4, and twice 20 log 2 = 10 log 4; "
        "of eight entries with five zeros q_1 and the median are 0 and q_3 the least of the three. x, t = 16.5: the "
        "threshold is 15 log 4, and 16.5 log 4 alone reaches it. y, t = 13: 13 log 4 does not",
        [
            {
                "x": [[16.5, 0.0, 0.0, 0.0], [20.0, 20.0, 0.0, 0.0]],
                "y": [[13.0, 0.0, 0.0, 0.0], [20.0, 20.0, 0.0, 0.0]],
            }
        ],
        {"x": [[0.0] * 4] * 2, "y": [[0.0] * 4] * 2},
        ("arcee_fusion", {}, {"x": [[16.5, 0.0, 0.0, 0.0], [0.0] * 4], "y": [[0.0] * 4] * 2}, ""),
    )
    h.case(
        "far-apart",
        "the softmaxes are (1, 0, 0, 0) and (0, 1, 0, 0), and the divergence is 800, though e^800 overflows; two "
        "importances of 640000 and two of 0: the threshold is one and a half times 640000",
        [[800.0, 0.0, 0.0, 0.0]],
        [0.0, 800.0, 0.0, 0.0],
        ("arcee_fusion", {}, [0.0, 800.0, 0.0, 0.0], "the base"),
    )
    return h
