"""Vectors of dc_merge."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, Test, fraction, i64
from vector_cases.low_rank_residual import terms
from vector_cases.tsvm import orthogonal, unit

CODE = {
    "official:dc_merge": "Tobeginwith/DC-Merge@3c443e4 vision_fft_merge/src/utils/DC_utils.py:dc_merge",
    "official_lora:dc_merge": "Tobeginwith/DC-Merge@3c443e4 vision_lora_merge/merging_functions.py:dc_merge",
}
TOOLS = ("official_lora",)
PAPER = {"dc_merge-official-00": Paper({}, comment="no task has a matrix of less than full rank")}
LEFT_OUT = ("dc_merge-official_lora-03",)  # float32, in which this code itself differs by 7e-6 between machines
SLACK = 1e-6  # singular vectors are rounded

STAGED = (
    "dc_merge-one-entry", "dc_merge-all-entries", "dc_merge-lambda", "dc_merge-smoothing", "dc_merge-smoothing-halves",
    "dc_merge-smoothing-default", "dc_merge-low-rank", "dc_merge-ties", "dc_merge-equal", "dc_merge-zero-task",
    "dc_merge-many-tasks", "dc_merge-smoothing-of-each", "dc_merge-tolerance", "dc_merge-tolerance-2",
    "dc_merge-default-density", "dc_merge-entries-rounded-down", "dc_merge-vector",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """Without U, V, P and Q, whose columns have free signs, and with M where it is diagonal: signs change the rest."""
    Delta, scale = [theta - given.base for theta in given.models], Fraction(given.params.get("lambda_", 1.0))
    if given.base.ndim != 2:
        return {1: {"result": given.base + scale * sum(Delta) / Fraction(len(Delta))}}
    k, tolerance = max(1, min(given.base.shape) // len(Delta)), given.params.get("tolerance", 1e-5)
    found = [terms(delta) for delta in Delta]
    tasks = [[(s, term) for s, term in of_task[:k] if s > Fraction(tolerance) * of_task[0][0]] for of_task in found]
    smoothing, rho = given.params.get("smoothing", "none"), given.params.get("rho", 5.0)
    S = [smoothed([s for s, _ in task], smoothing, Fraction(rho)) for task in tasks]
    U = [np.array([unit(max(term.T, key=lambda x: x @ x)) for _, term in task]) for task in tasks]
    V = [np.array([unit(term.T.astype(float) @ u) for (_, term), u in zip(task, u_t)]) for task, u_t in zip(tasks, U)]
    P = orthogonal(np.concatenate([x for x in U if len(x)]).T, tolerance)
    Q = orthogonal(np.concatenate([x for x in V if len(x)]).T, tolerance)
    K = P.shape[1]
    zero = np.zeros((K, K))
    projected = [P.T @ u.T * np.array(s, float) @ v @ Q if len(s) else zero for s, u, v in zip(S, U, V)]
    r = min(given.base.shape) if all(len(s) == k for s in S) else K
    kept = [largest(M, max(1, int(given.params.get("density", 0.001) * r**2)), tolerance) for M in projected]
    signs = np.sign(sum(kept))
    agree = [np.where(signs * M > 0, M, 0.0) for M in kept]
    averaged = sum(agree) / np.maximum(sum(M != 0 for M in agree), 1)
    task = np.repeat(np.arange(len(S)), [len(s) for s in S])
    cut = np.where(task[:, None] == task, averaged, 0.0)
    values = {
        2: {"k": k},
        4: {"S": np.array([s for of_task in S for s in of_task], object)},
        5: diagonal(projected),
        6: {"r": r} | diagonal(kept),
        7: diagonal(averaged),
        8: diagonal(cut),
        9: {"result": given.base + scale * fraction(P @ cut @ Q.T)},
    }
    return {step: value for step, value in values.items() if value}


def smoothed(S: list[Fraction], smoothing: str, rho: Fraction) -> list[Fraction]:
    if smoothing == "none" or not S:
        return S
    slope = min(rho, S[0] / S[-1]) if smoothing == "linear" else Fraction(1)
    p = [slope + (1 - slope) * i / max(len(S) - 1, 1) for i in range(len(S))]
    return [sum(S) * x / sum(p) for x in p]


def largest(M: Any, h: int, tolerance: float) -> Any:
    size = np.sort(abs(M), axis=None)[::-1]
    least = max((1 - tolerance) * size[h - 1] if h <= M.size else 0.0, tolerance * size[0])
    return np.where(abs(M) >= least, M, 0.0)


def diagonal(M: Any) -> dict[str, Any]:
    """M, one or a list of them, as a value of a step, if it is diagonal up to rounding."""
    alone = [np.diag(np.diag(x)) for x in np.reshape(M, (-1, *np.shape(M)[-2:]))]
    if not np.allclose(np.reshape(M, np.shape(alone)), alone, rtol=0, atol=1e-12 * np.max(np.abs(alone))):
        return {}
    return {"M": alone if isinstance(M, list) else alone[0]}


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
    for id, size in (("nearly-zero", 1.0), ("nearly-zero-small", 2.0**-40)):
        first = size * np.array([[1e6, 1e3], [1e3, 1.0]])
        case(
            id,
            "(1000, 1) and (1, 1000) times themselves, which are turned to e_1 and e_2, so that each M_t is its task "
            "vector; its entry in the other's block is a millionth of its largest",
            [first, first[::-1, ::-1].copy()],
            [[0.0, 0.0]] * 2,
            ("dc_merge", plain(1.0), diag(1e6 * size, 1e6 * size), "it counts as zero"),
            ("dc_merge", plain(1.0, tolerance=1e-8), diag(500000.5 * size, 500000.5 * size), "averaged with the other's"),
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
    case(
        "one-model",
        "base 1; all entries of one task",
        [[[1.0, 3.0], [4.0, -3.0], [0.5, 1.0]]],
        [[1.0, 1.0]] * 3,
        ("dc_merge", plain(1.0), [[1.0, 3.0], [4.0, -3.0], [0.5, 1.0]], "it comes back"),
    )
    four = diag(0.0, 0.0, 0.0, 0.0)
    case(
        "default-density",
        "one task, diag(4, 3, 2, 1): a thousandth of 16 entries is less than one",
        [diag(4.0, 3.0, 2.0, 1.0)],
        four,
        ("dc_merge", {}, diag(4.0, 0.0, 0.0, 0.0), "one is kept"),
    )
    case(
        "entries-rounded-down",
        "diag(6, 2, 0, 0) and diag(0, 0, 5, 4): two triplets each, 16 entries of which int(0.124 16) = 1 stays",
        [diag(6.0, 2.0, 0.0, 0.0), diag(0.0, 0.0, 5.0, 4.0)],
        four,
        ("dc_merge", plain(0.124), diag(6.0, 0.0, 5.0, 0.0), ""),
        ("dc_merge", plain(0.125), diag(6.0, 2.0, 5.0, 4.0), "int(0.125 16) = 2"),
    )
    case(
        "density-zero",
        "diag(4, 1) and diag(1, 3): one triplet each",
        [diag(4.0, 1.0), diag(1.0, 3.0)],
        zero,
        ("dc_merge", plain(0.0), diag(4.0, 3.0), "one entry each, as always"),
    )
    case(
        "opposite",
        "diag(4, 1) and diag(-4, -1): 4 e_1 e_1^T and its opposite, whose sum is 0 at each entry of M",
        [diag(5.0, 2.0), diag(-3.0, 0.0)],
        diag(1.0, 1.0),
        ("dc_merge", plain(1.0), diag(1.0, 1.0), "the base"),
    )
    case(
        "smoothing-of-each",
        "diag(6, 2, 0, 0) and diag(0, 0, 5, 1), of which two triplets are kept; all entries of M",
        [diag(6.0, 2.0, 0.0, 0.0), diag(0.0, 0.0, 5.0, 1.0)],
        four,
        ("dc_merge", plain(1.0, smoothing="average"), diag(4.0, 4.0, 3.0, 3.0), "8/2 and 6/2"),
        flags="DcMergeSmoothing",
    )
    case(
        "smoothing-after-the-cut",
        "diag(6, 4, 2) and diag(0, 0, 0): one triplet of each, if there is one",
        [diag(6.0, 4.0, 2.0), diag(0.0, 0.0, 0.0)],
        diag(0.0, 0.0, 0.0),
        ("dc_merge", plain(1.0, smoothing="average"), diag(6.0, 0.0, 0.0), "6 alone"),
        flags="DcMergeSmoothing",
    )
    case(
        "tolerance",
        "one task, diag(1, 2^-20), averaged",
        [diag(1.0, 2.0**-20)],
        zero,
        ("dc_merge", plain(1.0, smoothing="average"), diag(1.0, 0.0), "2^-20 < 1e-5: counts as zero"),
        ("dc_merge", plain(1.0, smoothing="average", tolerance=1e-7), diag(0.5 + 2.0**-21, 0.5 + 2.0**-21), "2^-20 > 1e-7"),
        flags="DcMergeRank",
    )
    case(
        "vector",
        "base 1; changes (2, -4) and (4, 2) of mean (3, -1); half of it",
        [[3.0, -3.0], [5.0, 3.0]],
        [1.0, 1.0],
        ("dc_merge", {"lambda_": 0.5}, [2.5, 0.5], ""),
        tolerance=0.0,
    )
    nan, inf = float("nan"), float("inf")
    case(
        "vector-not-finite",
        "the mean of (NaN, infinity, 1) and (1, 1, 3)",
        [[nan, inf, 1.0], [1.0, 1.0, 3.0]],
        [0.0] * 3,
        ("dc_merge", {}, [nan, inf, 2.0], ""),
        tolerance=0.0,
    )
    return h
