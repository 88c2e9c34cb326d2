"""Vectors of ram."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, fraction, i64

CODE = {
    "official:ram": "xiangchi-yuan/mrl@e2d930d ram-main.py:agentic_reinforcement_merge_rescale_v2",
    "mergekit:ram": "mergekit 0.1.5 mergekit/merge_methods/ram.py:ram_merge",
}
PAPER = {
    "ram-mergekit-01": Paper({"epsilon": 1e-5}),
    "ram-mergekit-04": Paper({"epsilon": 1e-5}),
}

STAGED = ("ram-by-hand", "ram-rescales", "ram-strict", "ram-epsilon-zero", "ram-three", "ram-one-model")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    changed = changes(tau, given.params.get("epsilon", 1e-5))
    count = sum(changed)
    merged = sum(c * x for c, x in zip(changed, tau)) / np.maximum(count, Fraction(1))
    return {1: {"tau": tau}, 2: {"changed": changed, "count": count}, 3: {"result": given.base + merged}}


def changes(tau: list[Any], epsilon: float) -> list[Any]:
    """1 where a model changed an entry by more than epsilon, and 0 elsewhere."""
    return [fraction((abs(x) > Fraction(epsilon)).astype(int)) for x in tau]


def hand() -> Hand:
    h = Hand("ram", CODE)

    def paper(expect: Any, why: str = "", epsilon: Any = 1e-5) -> tuple[str, dict[str, Any], Any, str]:
        return ("ram", {"epsilon": epsilon}, expect, why)

    def mergekit(expect: Any, why: str = "", epsilon: float = 1e-5) -> tuple[str, dict[str, Any], Any, str]:
        return ("mergekit:ram", {"epsilon": epsilon}, expect, why)

    def official(
        expect: Any, why: str = "", factor: float = 1.0, mode: str = "arm-r-v2", threshold: float = 1e-5
    ) -> tuple[str, dict[str, Any], Any, str]:
        return ("official:ram", {"merge_mode": mode, "rescale_factor": factor, "threshold": threshold}, expect, why)

    one, two = [4.0, 0.0, 2.0, 0.0, -3.0], [0.0, -2.0, 4.0, 0.0, 3.0]
    by_hand = [4.0, -2.0, 3.0, 0.0, 0.0]
    steps = "tau = (4, 0, 2, 0, -3) and (0, -2, 4, 0, 3): two unique changes, (2 + 4)/2, nothing, (-3 + 3)/2"
    h.case("by-hand", steps, [one, two], [0.0] * 5, paper(by_hand), official(by_hand), mergekit(by_hand))
    h.case("by-hand-arm", steps, [one, two], [0.0] * 5, official(by_hand, "no scale is looked at", mode="arm", factor=2.0))
    h.case(
        "rescales",
        "tau = (4, 2) and (0, 2): of the first model's changes one is unique and one shared",
        [[4.0, 2.0], [0.0, 2.0]],
        [0.0, 0.0],
        paper([4.0, 2.0], "a unique change stays what it is"),
        official([4.2, 2.0], "its default: 1 + 0.05 min(1, 1/1)", factor=1.05),
        mergekit([4.0, 2.0], "a unique change stays what it is"),
        flags="RamRescales",
        tolerance=1e-6,
    )
    nan, inf = float("nan"), float("inf")
    h.case(
        "not-finite",
        "one model",
        [[nan, inf, 1.0]],
        [0.0] * 3,
        paper([nan, inf, 1.0], "1 times inf"),
        official([0.0, inf, 1.0], "NaN is not above the threshold, and where nobody changed there is the base"),
        mergekit([nan, nan, 1.0], "inf times 0, the mask of shared changes"),
        flags="RamNotFinite",
    )
    h.case(
        "strict",
        "a change of epsilon is none, one of twice that is; both alone and beside 4",
        [[0.5, 1.0, 4.0, 4.0], [0.0, 0.0, 0.5, 1.0]],
        [0.0] * 4,
        paper([0.0, 1.0, 4.0, 2.5], "", epsilon=0.5),
        official([0.0, 1.0, 4.0, 2.5], "", threshold=0.5),
        mergekit([0.0, 1.0, 4.0, 2.5], "", epsilon=0.5),
    )
    h.case(
        "epsilon-zero",
        "every difference counts: (4 + 2^-20) / 2",
        [[4.0], [2.0**-20]],
        [0.0],
        paper([2.0 + 2.0**-21], "", epsilon=0.0),
        mergekit([2.0 + 2.0**-21], "", epsilon=0.0),
    )
    h.case("epsilon-infinite", "no change counts: the base", [[4.0]], [1.0], paper([1.0], "", epsilon="Infinity"))
    h.case(
        "three",
        "base 1; tau = 3, 6 and 0: (3 + 6) / 2, the third does not count",
        [[4.0], [7.0], [1.0]],
        [1.0],
        paper([5.5]),
        official([5.5]),
        mergekit([5.5]),
    )
    h.case(
        "one-model",
        "its changes above epsilon",
        [[4.0, 1.0 + 2.0**-20]],
        [1.0, 1.0],
        paper([4.0, 1.0]),
        mergekit([4.0, 1.0]),
    )
    h.case("all-base", "nobody changed anything", [[1.0, 2.0]] * 2, [1.0, 2.0], paper([1.0, 2.0]), mergekit([1.0, 2.0]))
    h.case(
        "empty-and-scalar",
        "a number: (2 + 4) / 2",
        [{"e": [], "s": 3.0}, {"e": [], "s": 5.0}],
        {"e": [], "s": 1.0},
        paper({"e": [], "s": 4.0}),
        mergekit({"e": [], "s": 4.0}),
    )
    h.case("epsilon-negative", "no magnitude is below 0", [[1.0]], [0.0], paper(REFUSED, "", epsilon=-1.0))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("ram", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("ram", {}, REFUSED, ""))
    h.case(
        "defaults",
        "2^-17 is no change and 2^-16 is one, since epsilon is 1e-5 by default: 4 alone, and (2^-16 + 4) / 2",
        [[2.0**-17, 2.0**-16], [4.0, 4.0]],
        [0.0, 0.0],
        ("ram", {}, [4.0, 2.0 + 2.0**-17], ""),
        dtype="F64",
    )
    h.case(
        "copies",
        "base 1; tau = (3, 2^-20) three times: 9 / 3, and nothing that is below epsilon",
        [[4.0, 1.0 + 2.0**-20]] * 3,
        [1.0, 1.0],
        paper([4.0, 1.0]),
        mergekit([4.0, 1.0]),
    )
    h.case(
        "opposite",
        "tau = 3, 1, -4: all three changed it, and (3 + 1 - 4) / 3 = 0; the majority's sign would give 2",
        [[3.0], [1.0], [-4.0]],
        [0.0],
        paper([0.0]),
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, -0.0],
        paper([0.0, 2.0]),
    )
    h.case(
        "not-finite-shared",
        "tau = (inf, 2, inf, 0) and (2, NaN, -inf, NaN): (inf + 2) / 2, NaN, inf - inf, NaN",
        [[inf, 2.0, inf, 0.0], [2.0, nan, -inf, nan]],
        [0.0] * 4,
        paper([inf, nan, nan, nan]),
    )
    h.case(
        "integers",
        "integers are the base's; (2 + 4) / 2",
        [{"x": [3.0], "ids": i64(3, 7)}, {"x": [5.0], "ids": i64(3, 9)}],
        {"x": [1.0], "ids": i64(3, 4)},
        paper({"x": [4.0], "ids": i64(3, 4)}),
    )
    h.case(
        "axes",
        "tau = (4, 1) and (0, 3) of three axes: 4 is unique, 1 and 3 are shared",
        [[[[4.0], [1.0]]], [[[0.0], [3.0]]]],
        [[[0.0], [0.0]]],
        ("ram", {}, [[[4.0], [2.0]]], ""),
    )
    return h
