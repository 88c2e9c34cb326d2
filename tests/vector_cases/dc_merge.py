"""Vectors of dc_merge."""

from __future__ import annotations

from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Hand, Paper, Test, i64

CODE = {
    "official:dc_merge": "Tobeginwith/DC-Merge@3c443e4 vision_fft_merge/src/utils/DC_utils.py:dc_merge",
    "official_lora:dc_merge": "Tobeginwith/DC-Merge@3c443e4 vision_lora_merge/merging_functions.py:dc_merge",
}
TOOLS = ("official_lora",)
PAPER = {"dc_merge-official-00": Paper({}, comment="no task has a matrix of less than full rank")}
LEFT_OUT = ("dc_merge-official_lora-03",)  # float32, in which this code itself differs by 7e-6 between machines
SLACK = 1e-6  # singular vectors are rounded


def accepts(test: Test) -> bool:
    return test.id not in LEFT_OUT


def diag(*values: float) -> list[list[float]]:
    return np.diag(values).tolist()


def hand() -> Hand:
    h = Hand("dc_merge", CODE)

    def case(id: str, comment: str, models: list[Any], base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **({"tolerance": SLACK} | more))

    two = [[[32.0, 6.0, -24.0], [-24.0, 8.0, 18.0]], [[16.0, -3.0, 12.0], [12.0, 4.0, 9.0]]]
    of_two = (
        "50 u_1 v_1^T and 25 u_2 v_2^T, u = (4, -+3)/5, v = (4, 0, -+3)/5, in the basis P = (1, -+1)/sqrt(2), "
        "Q = (1, 0, -+1)/sqrt(2): M_1 = (49, 7; 7, 1), M_2 = (1, 7; 7, 49)/2"
    )
    none = [[0.0] * 3] * 2

    def plain(density: float, **more: Any) -> dict[str, Any]:
        return {"density": density} | more

    def official(density: float, alpha: float = 1.0) -> dict[str, float]:
        return {"alpha": alpha, "keep_topk": density}

    kept = [[36.75, 0.0, -12.25], [-12.25, 0.0, 36.75]]
    for id, density, why in (
        ("one-entry", 0.25, "49 and 24.5: 24.5 (1, -1)(1, 0, -1) + 12.25 (1, 1)(1, 0, 1)"),
        ("three-entries", 0.75, "49 and 24.5; what is beside the blocks, (7 + 3.5)/2, is cut out"),
    ):
        case(
            id,
            of_two,
            two,
            none,
            ("dc_merge", plain(density), kept, why),
            ("official:dc_merge", official(density), kept, "the same"),
        )
    case(
        "all-entries",
        of_two,
        two,
        none,
        ("dc_merge", plain(1.0), [[18.75, 0.0, -6.0], [-6.0, 0.0, 18.75]],
         "(49 + 1/2)/2 and (1 + 49/2)/2: 12.375 (1, -1)(1, 0, -1) + 6.375 (1, 1)(1, 0, 1)"),
        ("official:dc_merge", official(1.0), [[18.75, 0.0, -6.0], [-6.0, 0.0, 18.75]], ""),
    )  # fmt: skip
    case(
        "lambda",
        "base 1, diag(4, 1) and diag(1, 3): one triplet each; half of it",
        [[[5.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [1.0, 4.0]]],
        [[1.0, 1.0], [1.0, 1.0]],
        ("dc_merge", plain(0.25, lambda_=0.5), [[3.0, 1.0], [1.0, 2.5]], "1 + 4/2, 1 + 3/2"),
        ("official:dc_merge", official(0.25, 0.5), [[3.0, 1.0], [1.0, 2.5]], ""),
    )
    case(
        "smoothing",
        "one task, diag(4, 2, 2, 1), all 16 entries of M",
        [diag(4.0, 2.0, 2.0, 1.0)],
        diag(0.0, 0.0, 0.0, 0.0),
        ("dc_merge", plain(1.0), diag(4.0, 2.0, 2.0, 1.0), "as it is"),
        ("dc_merge", plain(1.0, smoothing="average"), diag(2.25, 2.25, 2.25, 2.25), "9/4 each"),
        ("dc_merge", plain(1.0, smoothing="linear", rho=2.0), diag(3.0, 2.5, 2.0, 1.5), "9 (2, 5/3, 4/3, 1)/6"),
        ("dc_merge", plain(1.0, smoothing="linear", rho=8.0), diag(3.6, 2.7, 1.8, 0.9), "4/1 < 8: 9 (4, 3, 2, 1)/10"),
        ("official:dc_merge", official(1.0), diag(4.0, 2.0, 2.0, 1.0), "for full fine-tuning"),
        ("official_lora:dc_merge", {"rank_per_task": 4, "smoothing": "avg", "rho": 5.0, "keep_topk": 1.0},
         diag(2.25, 2.25, 2.25, 2.25), "for LoRA"),
        ("official_lora:dc_merge", {"rank_per_task": 4, "smoothing": "linear", "rho": 2.0, "keep_topk": 1.0},
         diag(3.0, 2.5, 2.0, 1.5), "for LoRA"),
        flags="DcMergeSmoothing",
    )  # fmt: skip
    case(
        "smoothing-halves",
        "one task, diag(5, 4, 2), whose first is 2.5 times the last; all entries of M",
        [diag(5.0, 4.0, 2.0)],
        diag(0.0, 0.0, 0.0),
        ("dc_merge", plain(1.0, smoothing="linear", rho=100.0), diag(110 / 21, 77 / 21, 44 / 21), "11 (2.5, 1.75, 1)/5.25"),
        flags="DcMergeSmoothing",
    )
    case(
        "smoothing-default",
        "one task, diag(16, 2), whose first is 8 times the last",
        [diag(16.0, 2.0)],
        diag(0.0, 0.0),
        ("dc_merge", plain(1.0, smoothing="linear"), diag(15.0, 3.0), "5 times: 18 (5, 1)/6"),
        flags="DcMergeSmoothing",
    )
    wide, nothing = [[*row, 0.0] for row in [*two[0], [0.0] * 3]], [[0.0] * 4] * 3
    also = [[*row, 0.0] for row in [*two[1], [0.0] * 3]]
    case(
        "more-rows",
        "the task vectors 50 u_1 v_1^T and 25 u_2 v_2^T in a 3 x 4 matrix: one triplet each, and r = 3",
        [wide, also],
        nothing,
        (
            "dc_merge",
            plain(0.5),
            [[18.75, 0.0, -6.0, 0.0], [-6.0, 0.0, 18.75, 0.0], [0.0] * 4],
            "int(4.5) entries of each M_t, which has no more",
        ),
        (
            "dc_merge",
            plain(0.375),
            [[36.75, 0.0, -12.25, 0.0], [-12.25, 0.0, 36.75, 0.0], [0.0] * 4],
            "int(3.375): 49, 7 and 7, of which the first is in a block",
        ),
        (
            "dc_merge",
            plain(1.0),
            [[18.75, 0.0, -6.0, 0.0], [-6.0, 0.0, 18.75, 0.0], [0.0] * 4],
            "9 entries are more than there are",
        ),
    )
    case(
        "low-rank",
        "one task, diag(4, 2, 0), has two of three triplets, so that r = 2: one entry of 2 x 2, not two of 3 x 3",
        [diag(4.0, 2.0, 0.0)],
        diag(0.0, 0.0, 0.0),
        ("dc_merge", plain(0.25), diag(4.0, 0.0, 0.0), ""),
        flags="DcMergeRank",
    )
    for id, unit in (("nearly-zero", 1.0), ("nearly-zero-small", 2.0**-40)):
        first = unit * np.array([[1e6, 1e3], [1e3, 1.0]])
        case(
            id,
            "(1000, 1) and (1, 1000) times themselves, which are turned to e_1 and e_2, so that each M_t is its task "
            "vector; its "
            "entry in the other's block is a millionth of its largest",
            [first, first[::-1, ::-1].copy()],
            [[0.0, 0.0]] * 2,
            ("dc_merge", plain(1.0), diag(1e6 * unit, 1e6 * unit), "it counts as zero"),
            ("dc_merge", plain(1.0, tolerance=1e-8), diag(500000.5 * unit, 500000.5 * unit), "averaged with the other's"),
            dtype="F64",
        )
    case(
        "ties",
        "one task, diag(3, 3), smoothed or not: two entries of the same size, of which one is asked for",
        [diag(3.0, 3.0)],
        diag(0.0, 0.0),
        ("dc_merge", plain(0.25), diag(3.0, 3.0), "both stay"),
        ("official:dc_merge", official(0.25), OPEN, "both, or the one that rounding makes larger"),
        flags="DcMergeTies",
    )
    case(
        "equal",
        "diag(4, 1) twice: one triplet each, the same; M has 4/2 four times, of which one is asked for",
        [diag(4.0, 1.0), diag(4.0, 1.0)],
        diag(0.0, 0.0),
        ("dc_merge", plain(0.25), diag(2.0, 0.0), "two of the four are in blocks: 2 (1/2 + 1/2)"),
        ("official:dc_merge", official(0.25), OPEN, "LAPACK makes up e_2"),
        flags="DcMergeRank DcMergeTies",
    )
    case(
        "zero-task",
        "diag(4, 1), and a task that left the matrix alone",
        [diag(4.0, 1.0), diag(0.0, 0.0)],
        diag(0.0, 0.0),
        ("dc_merge", plain(0.25), diag(4.0, 0.0), "it has no singular vectors"),
        (
            "official:dc_merge",
            official(1.0),
            OPEN,
            "e_1 stands in for the missing one, and turns the true one: diag(2, +-2)",
        ),
        flags="DcMergeRank",
    )
    case(
        "many-tasks",
        "(3, 4) and (3, -4) as 1 x 2 matrices: 5 v^T, v = (3, +-4)/5; P = (1, 1)/sqrt(2), Q = (1, +-1)/sqrt(2), M_1 = "
        "(7, -1; 7, -1)/2, M_2 = (-1, 7; -1, 7)/2, all entries",
        [[[3.0, 4.0]], [[3.0, -4.0]]],
        [[0.0, 0.0]],
        ("dc_merge", plain(1.0), [[3.5, 0.0]], "the sums are positive: 7/2 in both blocks, 7/4 (1, 1) + 7/4 (1, -1)"),
        ("official:dc_merge", official(1.0), [[0.0, 0.0]], "no triplets: the base"),
        flags="DcMergeManyTasks",
    )
    names = ("text_projection", "w")
    merged, averaged = diag(4.0, 3.0), diag(2.5, 2.0)
    case(
        "projection",
        "diag(4, 1) and diag(1, 3), by names",
        [dict.fromkeys(names, diag(4.0, 1.0)), dict.fromkeys(names, diag(1.0, 3.0))],
        dict.fromkeys(names, diag(0.0, 0.0)),
        ("dc_merge", {}, {"text_projection": averaged, "w": merged}, "averaged"),
        ("dc_merge", {"averaged": ["w"]}, {"text_projection": merged, "w": averaged}, ""),
        ("official:dc_merge", official(0.001), {"text_projection": averaged, "w": merged}, ""),
    )
    case(
        "no-matrices",
        "a vector, a number, a kernel (1, 1, 1, 2), nothing, integers",
        [
            {"b": [1.0, 3.0], "s": 4.0, "k": [[[[2.0, 0.0]]]], "e": [], "ids": i64(3)},
            {"b": [3.0, 5.0], "s": -2.0, "k": [[[[0.0, 1.0]]]], "e": [], "ids": i64(3)},
        ],
        {"b": [0.0, 2.0], "s": 0.0, "k": [[[[0.0, 0.0]]]], "e": [], "ids": i64(3)},
        ("dc_merge", {"lambda_": 2.0}, {"b": [4.0, 6.0], "s": 2.0, "k": [[[[2.0, 1.0]]]], "e": [], "ids": i64(3)},
         "twice the mean"),
        tolerance=0.0,
    )  # fmt: skip
    case(
        "no-base",
        "4 e_1 e_1^T and 3 e_2 e_2^T, without a base",
        [diag(4.0, 0.0), diag(0.0, 3.0)],
        None,
        ("dc_merge", {}, REFUSED, "a task vector is a difference from a base"),
        ("official_lora:dc_merge", {"rank_per_task": 1, "smoothing": "avg", "rho": 5.0, "keep_topk": 0.25}, diag(4.0, 3.0),
         "they are the changes"),
    )  # fmt: skip
    empty, zero = np.zeros((0, 3), np.float32), diag(0.0, 0.0)
    case("empty-matrix", "shape (0, 3)", [{"e": empty}], {"e": empty}, ("dc_merge", {}, {"e": empty}, ""), tolerance=0.0)
    case("unchanged", "two models that equal the base", [zero, zero], zero, ("dc_merge", {}, zero, ""), tolerance=0.0)
    for id, value in (("nan", float("nan")), ("infinite", float("inf"))):
        case(id, "it has no singular values", [[[value, 2.0], [1.0, 1.0]]], zero, ("dc_merge", {}, REFUSED, ""))
    for id, params in (
        ("tolerance-zero", {"tolerance": 0.0}),
        ("density-large", {"density": 1.5}),
        ("rho-small", {"rho": 0.5}),
    ):
        case(id, "outside of the domain", [zero], zero, ("dc_merge", params, REFUSED, ""))
    case("no-models", "nothing to merge", [], zero, ("dc_merge", {}, REFUSED, ""))
    return h
