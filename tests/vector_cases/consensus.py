"""Vectors of consensus."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64, sign
from vector_cases.ties import trim

CODE = {
    "official:consensus": "nik-dim/tall_masks@d10af8b src/eval/aggregation.py:create_task_vector",
}
STEMS = ("consensus_merging",)
PAPER = {
    "consensus_merging-official-00": Paper({"k": 2, "threshold": [0.4] * 4, "lambda_": 0.5}, entry="consensus"),
    "consensus_merging-official-03": Paper({"k": 5, "threshold": [0.4] * 4, "lambda_": 0.3}, entry="consensus"),
}

SIX = "base 1; tau = (2, 4, 6, 2, 3, 0), (2, 4, 0, 2, -1, 0), (4, 0, 0, 2, 2, 0): sum (8, 8, 6, 6, 4, 0); "
COUNTS = SIX + "with threshold 1/2 the masks are set (1, 2, 1, 0, 2, 0) times"

STAGED = tuple(
    f"consensus-{id}"
    for id in (
        "all", "one", "two", "half", "threshold-per-task", "equal", "ties-sum", "ties-keeps-one-more", "ties-zero-sum",
        "one-task",
    )
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    tau_MTL = sum(tau)
    if given.params.get("multitask") == "ties":
        trimmed = [trim(x, int(given.params.get("density", 0.2) * x.size)) for x in tau]
        gamma = sign(sum(trimmed))
        tau_MTL = sum(np.where(gamma * x > 0, x, Fraction(0)) for x in trimmed)
    m = [np.where(abs(x) > t * abs(tau_MTL - x), 1, 0) for x, t in zip(tau, given.each("threshold", 0.4))]
    keep = np.where(sum(m) >= given.params.get("k", 2), 1, 0)
    return {
        1: {"tau": tau},
        2: {"tau_MTL": tau_MTL},
        3: {"m": m},
        4: {"keep": keep},
        5: {"result": given.base + Fraction(given.params.get("lambda_", 1.0)) * (keep * tau_MTL)},
    }


def hand() -> Hand:
    h = Hand("consensus", CODE)

    def plain(k: int = 2, threshold: Any = 0.5, **more: Any) -> dict[str, Any]:
        return {"k": k, "threshold": threshold, "lambda_": 1.0} | more

    def official(k: int = 2, threshold: Any = 0.5, **more: Any) -> dict[str, Any]:
        return {"tall_mask_lambda_per_task": threshold, "prun_thre_k": k, "alpha": 1.0} | more

    base = [1.0] * 6
    six = [[3.0, 5.0, 7.0, 3.0, 4.0, 1.0], [3.0, 5.0, 1.0, 3.0, 0.0, 1.0], [5.0, 1.0, 1.0, 3.0, 3.0, 1.0]]
    by_k = {
        "all": (0, [9.0, 9.0, 7.0, 7.0, 5.0, 1.0], "k = 0: task arithmetic"),
        "one": (1, [9.0, 9.0, 7.0, 1.0, 5.0, 1.0], "k = 1: what no task uses goes"),
        "two": (2, [1.0, 9.0, 1.0, 1.0, 5.0, 1.0], "k = 2: what one task uses goes too"),
        "three": (3, [1.0] * 6, "k = 3: all tasks"),
        "four": (4, [1.0] * 6, "k above the number of tasks: the base"),
    }
    for id, (k, expect, why) in by_k.items():
        h.case(
            id,
            COUNTS,
            six,
            base,
            ("consensus", plain(k), expect, why),
            ("official:consensus", official(k), expect, why),
        )
    h.case(
        "half",
        COUNTS,
        six,
        base,
        ("consensus", plain(lambda_=0.5), [1.0, 5.0, 1.0, 1.0, 3.0, 1.0], "half of what stays"),
        ("official:consensus", official(alpha=0.5), [1.0, 5.0, 1.0, 1.0, 3.0, 1.0], ""),
    )
    h.case(
        "threshold-per-task",
        SIX + "thresholds 1/4, 1/2, 1 set the masks (2 > 3/2, 4, 6, 2 > 1, 3, 0), (0, 4, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)",
        six,
        base,
        ("consensus", plain(1, [0.25, 0.5, 1.0]), [9.0, 9.0, 7.0, 7.0, 5.0, 1.0], ""),
        ("official:consensus", official(1, [0.25, 0.5, 1.0]), [9.0, 9.0, 7.0, 7.0, 5.0, 1.0], ""),
        (
            "consensus",
            plain(2, [0.25, 0.5, 1.0]),
            [1.0, 9.0, 1.0, 1.0, 1.0, 1.0],
            "of the last task 2 against 2 at entry 5 is not greater",
        ),
    )
    h.tests[-1].id = h.tests[-1].id[:-2] + "-two"
    h.case(
        "equal",
        "tau = 2, 2, 2: sum 6; 2 against half of 4",
        [[2.0], [2.0], [2.0]],
        [0.0],
        ("consensus", plain(1), [0.0], "not greater, for any task: what all agree on is gone. With >= it would be 6"),
        ("official:consensus", official(1), [0.0], "the same"),
        flags="ConsensusEqual",
    )
    h.case(
        "ties-sum",
        "tau = (4, -3, 1, 2), (2, 5, 1/2, 1) trimmed to (4, -3, 0, 0), (2, 5, 0, 0): sums of what agrees (6, 5, 0, 0)",
        [[4.0, -3.0, 1.0, 2.0], [2.0, 5.0, 0.5, 1.0]],
        [0.0, 0.0, 0.0, 0.0],
        (
            "consensus",
            plain(2, 0.25, multitask="ties", density=0.5),
            [6.0, 5.0, 0.0, 0.0],
            "4 and 2 against a quarter of 2 and 4, -3 and 5 against a quarter of 8 and 0; a mean would give 3 and 5",
        ),
        (
            "consensus",
            plain(2, 0.5, multitask="ties", density=0.5),
            [0.0, 0.0, 0.0, 0.0],
            "2 against half of 4, 3 against half of 8: not greater",
        ),
        flags="ConsensusTiesSum",
    )
    h.tests[-1].id = h.tests[-1].id[:-2] + "-half"
    ten = [float(x) for x in range(1, 11)]
    h.case(
        "ties-keeps-one-more",
        "tau = 1..10 twice, a fifth of it: sums of what is kept",
        [ten, ten],
        [0.0] * 10,
        (
            "consensus",
            plain(2, 0.5, multitask="ties", density=0.2),
            [0.0] * 8 + [18.0, 20.0],
            "int(10 * 0.2) = 2 of each are kept",
        ),
        ("official:consensus", official(2, 0.5, use_ties=True), [0.0] * 7 + [16.0, 18.0, 20.0], "2 + 1 of each are kept"),
        flags="ConsensusTiesTrim",
    )
    h.case(
        "ties-zero-sum",
        "tau = (3, 1), (-3, 1), trimmed to (3, 0), (-3, 0): the sum is zero and so is the majority",
        [[3.0, 1.0], [-3.0, 1.0]],
        [0.0, 0.0],
        ("consensus", plain(1, 0.5, multitask="ties", density=0.5), [0.0, 0.0], "no sign is elected"),
        ("official:consensus", official(1, 0.5, use_ties=True), [-3.0, 0.0], "the negative entries are taken"),
        flags="ConsensusTiesZeroSum",
    )
    h.case(
        "one-task",
        "tau = (2, 0), the mask is 1 0",
        [[3.0, 1.0]],
        [1.0, 1.0],
        ("consensus", plain(1), [3.0, 1.0], "k = 1: the model"),
        ("official:consensus", official(1), [3.0, 1.0], ""),
        ("consensus", plain(2), [1.0, 1.0], "k = 2 of one task: the base"),
    )
    h.tests[-1].id = h.tests[-1].id[:-2] + "-two"
    h.case(
        "empty-scalar-integers",
        "tau = 4 and 4 of a number: sum 8, 4 against half of 4; integers are the base's",
        [{"e": [], "s": 4.0, "ids": i64(3, 4)}, {"e": [], "s": 4.0, "ids": i64(3, 4)}],
        {"e": [], "s": 0.0, "ids": i64(3, 4)},
        ("consensus", plain(), {"e": [], "s": 8.0, "ids": i64(3, 4)}, ""),
        ("official:consensus", official(), {"e": [], "s": 8.0, "ids": i64(3, 4)}, ""),
    )
    h.case("k-negative", "k -1", [[1.0]], [0.0], ("consensus", plain(-1), REFUSED, ""))
    h.case("threshold-negative", "threshold -1/4", [[1.0]], [0.0], ("consensus", plain(1, -0.25), REFUSED, ""))
    h.case("thresholds-too-many", "2 thresholds, 1 task", [[1.0]], [0.0], ("consensus", plain(1, [0.5, 0.5]), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0], [2.0]], None, ("consensus", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("consensus", {}, REFUSED, ""))
    h.case(
        "defaults",
        "sum (12, 10); the first task takes 4 > 0.4 * 6 but not 2 > 0.4 * 10, the second both: two tasks agree on one entry",
        [[2.0, 4.0], [10.0, 6.0]],
        [0.0, 0.0],
        ("consensus", {}, [0.0, 10.0], "k is 2, threshold 0.4 and lambda 1 by default"),
    )
    h.case(
        "all-of-two",
        "tau = (4, 4), (3, 1): sum (7, 5); 4 and 3 are more than half of each other, 1 is not more than half of 4",
        [[4.0, 4.0], [3.0, 1.0]],
        [0.0, 0.0],
        ("consensus", plain(2), [7.0, 0.0], "k = 2 of two: what both use"),
    )
    h.case(
        "ties-all",
        "tau = (4, -3, 1, 2), (2, 5, 1/2, 1) trimmed to (4, -3, 0, 0), (2, 5, 0, 0): sums of what agrees",
        [[4.0, -3.0, 1.0, 2.0], [2.0, 5.0, 0.5, 1.0]],
        [0.0] * 4,
        ("consensus", plain(0, 0.5, multitask="ties", density=0.5), [6.0, 5.0, 0.0, 0.0], "k = 0: the disjoint sum"),
        flags="ConsensusTiesSum",
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0], [-0.0, 2.0]],
        [-0.0, -0.0],
        ("consensus", plain(), [0.0, 4.0], ""),
    )
    nan, inf = float("nan"), float("inf")
    bad = [[nan, inf, 1.0], [1.0, 1.0, 1.0]]
    h.case(
        "nan-inf",
        "inf is not more than half of what is left of inf, and NaN of nothing: neither stays, and 0 times them is NaN",
        bad,
        [0.0] * 3,
        ("consensus", plain(1), [nan, nan, 2.0], ""),
        ("consensus", plain(0), [nan, inf, 2.0], "k = 0: all stays"),
    )
    h.tests[-1].id = h.tests[-1].id[:-2] + "-staying"
    h.case(
        "integers-not-counted",
        "two floating entries, of which int(2 * 1/2) = 1 is kept; integers are not among them",
        [{"ids": i64(3, 4, 5, 6), "x": [1.0, 2.0]}],
        {"ids": i64(3, 4, 5, 6), "x": [0.0, 0.0]},
        ("consensus", plain(0, multitask="ties", density=0.5), {"ids": i64(3, 4, 5, 6), "x": [0.0, 2.0]}, ""),
    )
    h.case("density-above-one", "density 3/2", [[1.0]], [0.0], ("consensus", plain(1, density=1.5), REFUSED, ""))
    h.case(
        "equal-models",
        "tau = (2, -1) twice, tau_MTL = (4, -2): 2 > lambda 2 at lambda 1/2, and not at 1",
        [[3.0, 0.0]] * 2,
        [1.0, 1.0],
        ("consensus", {"threshold": 0.5}, [5.0, -1.0], ""),
        ("consensus", {"threshold": 1.0}, [1.0, 1.0], ""),
    )
    h.case(
        "axes",
        "tau = (4, 0, 2, 1) of three axes and one entry of 4, twice at lambda 1/2: what changed stays, and is added twice",
        [{"conv": [[[4.0], [0.0]], [[2.0], [1.0]]], "one": [4.0]}] * 2,
        {"conv": [[[0.0], [0.0]], [[0.0], [0.0]]], "one": [0.0]},
        ("consensus", {"threshold": 0.5}, {"conv": [[[8.0], [0.0]], [[4.0], [2.0]]], "one": [8.0]}, ""),
    )
    return h
