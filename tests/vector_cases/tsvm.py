"""Vectors of tsvm."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, Test, i64
from vector_cases.low_rank_residual import terms

CODE = {
    "official:tsvm": "AntoAndGar/task_singular_vectors@a6c9718 src/utils/TSVM_utils.py:compute_and_sum_svd_mem_reduction",
    "fusion_bench:tsvm": "tanganke/fusion_bench@54c9e8c "
    "fusion_bench/method/task_singular_vector/TSVM.py:TaskSingularVectorMerging.run",
    "dcmerge:tsvm": "Tobeginwith/DC-Merge@3c443e4 vision_lora_merge/merging_functions.py:TSVM",
}
TOOLS = ("fusion_bench", "dcmerge")
OPTIONS = {"tsvm-fusion_bench-03": {"arithmetic": "native"}}
TOLERANCE = {"tsvm-fusion_bench-03": 2.0**-8}
PAPER = {
    "tsvm-official-00": Paper({}, comment="no task has a matrix of less than full rank"),
}
LEFT_OUT = ("tsvm-official-03", "tsvm-official-06", "tsvm-fusion_bench-00")  # large, and of what the others show
SLACK = 1e-6  # singular vectors are rounded

STAGED = (
    "tsvm-example", "tsvm-lambda", "tsvm-orthogonal", "tsvm-shared-on-one-side", "tsvm-equal", "tsvm-zero-task",
    "tsvm-low-rank", "tsvm-tolerance", "tsvm-tolerance-2", "tsvm-many-tasks", "tsvm-vector",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """Without P and Q, whose columns have free signs."""
    Delta, scale = [theta - given.base for theta in given.models], Fraction(given.params.get("lambda_", 1.0))
    if given.base.ndim != 2:
        return {1: {"result": given.base + scale * sum(Delta) / Fraction(len(Delta))}}
    k, tolerance = max(1, min(given.base.shape) // len(Delta)), given.params.get("tolerance", 1e-5)
    kept = [(s, term) for of_task in map(terms, Delta) for s, term in of_task[:k] if s > Fraction(tolerance) * of_task[0][0]]
    S = [s for s, _ in kept]
    U = np.stack([unit(max(term.T, key=lambda x: x @ x)) for _, term in kept], axis=1)
    V = np.stack([unit(term.T.astype(float) @ u) for (_, term), u in zip(kept, U.T)], axis=1)
    merged = orthogonal(U, tolerance) * np.array(S, float) @ orthogonal(V, tolerance).T
    result = given.base + scale * np.array([[Fraction(x) for x in row] for row in merged], object)
    return {2: {"k": k, "S": np.array(S, object)}, 4: {"result": result}}


def unit(x: Any) -> Any:
    x = np.asarray(x, float)
    return x / np.linalg.norm(x)


def orthogonal(X: Any, tolerance: float) -> Any:
    """X (X^T X)^(-1/2) on what the columns of X span: sigma^2 are the eigenvalues of X^T X."""
    values, B = np.linalg.eigh(X.T @ X)
    spans = values > tolerance**2 * values[-1]
    return X @ (B[:, spans] / np.sqrt(values[spans])) @ B[:, spans].T


def accepts(test: Test) -> bool:
    return test.id not in LEFT_OUT


def hand() -> Hand:
    h = Hand("tsvm", CODE)

    def case(id: str, comment: str, models: list[Any], base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **({"tolerance": SLACK} | more))

    zeros = [[0.0, 0.0], [0.0, 0.0]]
    case(
        "example",
        "50 u_1 v_1^T and 25 u_2 v_2^T, u = (4, -+3)/5, v = (4, 0, -+3)/5, and what is cut off; P = (1, -+1)/sqrt(2), "
        "Q = (1, 0, -+1)/sqrt(2)",
        [[[32.0, 6.0, -24.0], [-24.0, 8.0, 18.0]], [[16.0, -3.0, 12.0], [12.0, 4.0, 9.0]]],
        [[0.0] * 3] * 2,
        ("tsvm", {}, [[37.5, 0.0, -12.5], [-12.5, 0.0, 37.5]], "25 (1, -1)(1, 0, -1) + 12.5 (1, 1)(1, 0, 1)"),
        ("official:tsvm", {"alpha": 1.0}, [[37.5, 0.0, -12.5], [-12.5, 0.0, 37.5]], "the same"),
        ("fusion_bench:tsvm", {"alpha": 1.0}, [[37.5, 0.0, -12.5], [-12.5, 0.0, 37.5]], "the same"),
    )
    case(
        "lambda",
        "base 1, diag(4, 1) and diag(1, 3): one triplet each, 4 and 3; half of it",
        [[[5.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [1.0, 4.0]]],
        [[1.0, 1.0], [1.0, 1.0]],
        ("tsvm", {"lambda_": 0.5}, [[3.0, 1.0], [1.0, 2.5]], "1 + 4/2, 1 + 3/2"),
        ("official:tsvm", {"alpha": 0.5}, [[3.0, 1.0], [1.0, 2.5]], ""),
        ("fusion_bench:tsvm", {"alpha": 0.5}, [[3.0, 1.0], [1.0, 2.5]], ""),
    )
    case(
        "alpha-list",
        "diag(4, 1) and diag(1, 3), one triplet each; vectors 2 and 4",
        [{"w": [[4.0, 0.0], [0.0, 1.0]], "b": [2.0]}, {"w": [[1.0, 0.0], [0.0, 3.0]], "b": [4.0]}],
        {"w": zeros, "b": [0.0]},
        ("fusion_bench:tsvm", {"alpha": [2.0, 0.5]}, {"w": [[8.0, 0.0], [0.0, 1.5]], "b": [3.0]}, "2 4, 3/2; (2 2 + 4/2)/2"),
        ("tsvm", {}, {"w": [[4.0, 0.0], [0.0, 3.0]], "b": [3.0]}, "tasks have no weights"),
        flags="TsvmScales",
    )
    case(
        "orthogonal",
        "diag(4, 2, 0, 0) and diag(0, 0, 3, 1): nothing is cut off, nothing interferes",
        [
            [[4.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1.0]],
        ],
        [[0.0] * 4] * 4,
        ("tsvm", {}, [[4.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1.0]], "their sum"),
        ("official:tsvm", {"alpha": 1.0}, [[4.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1.0]], ""),
    )
    case(
        "shared-on-one-side",
        "4 e_1 v_1^T and 2 e_1 v_2^T with v = (4, -+3)/5: P = e_1 / sqrt(2) twice, Q = (1, -+1)/sqrt(2)",
        [[[3.2, -2.4], [0.0, 0.0]], [[1.6, 1.2], [0.0, 0.0]]],
        zeros,
        ("tsvm", {}, [[3.0, -1.0], [0.0, 0.0]], "(4/2 + 2/2, -4/2 + 2/2)"),
        flags="TsvmDependent",
    )
    case(
        "equal",
        "diag(4, 1) twice: one triplet each, the same",
        [[[4.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]]],
        zeros,
        ("tsvm", {}, [[4.0, 0.0], [0.0, 0.0]], "the two share one direction: P = (e_1, e_1)/sqrt(2)"),
        ("official:tsvm", {"alpha": 1.0}, OPEN, "diag(4, 4) or diag(4, -4): LAPACK makes up e_2"),
        ("official:tsvm", {"alpha": 1.0, "variant": "compute_and_sum_svd_mem_reduction_2"}, [[4.0, 0.0], [0.0, 0.0]],
         "the inverse root of the Gram matrix does not"),
        flags="TsvmDependent",
    )  # fmt: skip
    case(
        "opposite",
        "base 1, changes diag(4, 1) and its negative: u_1 = u_2 and v_1 = -v_2",
        [[[5.0, 1.0], [1.0, 2.0]], [[-3.0, 1.0], [1.0, 0.0]]],
        [[1.0, 1.0], [1.0, 1.0]],
        ("tsvm", {}, [[1.0, 1.0], [1.0, 1.0]], "4/2 - 4/2"),
        ("official:tsvm", {"alpha": 1.0}, OPEN, "a matrix of norm 4 sqrt(2)"),
        flags="TsvmDependent",
    )
    case(
        "zero-task",
        "diag(4, 1), and a task that left the matrix alone",
        [[[4.0, 0.0], [0.0, 1.0]], zeros],
        zeros,
        ("tsvm", {}, [[4.0, 0.0], [0.0, 0.0]], "it has no singular vectors"),
        ("official:tsvm", {"alpha": 1.0}, OPEN, "e_1 stands in for the missing one, and turns the true: entries of +-2"),
        flags="TsvmRank",
    )
    case(
        "low-rank",
        "4 e_1 e_1^T and 3 e_2 e_2^T, two triplets each where there is one",
        [[[4.0, 0, 0, 0], *[[0.0] * 4] * 3], [[0.0] * 4, [0, 3.0, 0, 0], *[[0.0] * 4] * 2]],
        [[0.0] * 4] * 4,
        ("tsvm", {}, [[4.0, 0, 0, 0], [0, 3.0, 0, 0], *[[0.0] * 4] * 2], "their sum"),
        (
            "official:tsvm",
            {"alpha": 1.0},
            OPEN,
            "where e_2 stands in for the second triplet of the first, e_2 is there twice",
        ),
        ("dcmerge:tsvm", {"rank_per_task": 1}, [[4.0, 0, 0, 0], [0, 3.0, 0, 0], *[[0.0] * 4] * 2], "the rank is known"),
        flags="TsvmRank",
    )
    case(
        "tolerance",
        "one model, diag(1, 2^-20)",
        [[[1.0, 0.0], [0.0, 2.0**-20]]],
        zeros,
        ("tsvm", {}, [[1.0, 0.0], [0.0, 0.0]], "2^-20 < 1e-5: counts as zero"),
        ("tsvm", {"tolerance": 1e-7}, [[1.0, 0.0], [0.0, 2.0**-20]], "2^-20 > 1e-7"),
        ("official:tsvm", {"alpha": 1.0}, [[1.0, 0.0], [0.0, 2.0**-20]], ""),
        flags="TsvmRank",
        tolerance=2.0**-24,
    )
    case(
        "small",
        "one model, diag(2^-20, 2^-22): what counts as zero is so beside the largest, not by its size",
        [[[2.0**-20, 0.0], [0.0, 2.0**-22]]],
        zeros,
        ("tsvm", {}, [[2.0**-20, 0.0], [0.0, 2.0**-22]], "it comes back"),
    )
    case(
        "many-tasks",
        "(3, 4) and (3, -4) as 1 x 2 matrices: 5 v^T with v = (3, +-4)/5, u = 1 for both",
        [[[3.0, 4.0]], [[3.0, -4.0]]],
        [[0.0, 0.0]],
        ("tsvm", {}, [[5.0, 0.0]], "P = (1, 1)/sqrt(2), Q = (1, +-1)/sqrt(2): 5/2 (1, 1) + 5/2 (1, -1)"),
        ("official:tsvm", {"alpha": 1.0}, [[0.0, 0.0]], "int(1 * (1/2)) = 0 triplets each: the base"),
        ("fusion_bench:tsvm", {"alpha": 1.0}, [[0.0, 0.0]], "the same"),
        flags="TsvmManyTasks",
    )
    names = ("text_projection", "w")
    mixed, averaged = [[4.0, 0.0], [0.0, 3.0]], [[2.5, 0.0], [0.0, 2.0]]
    case(
        "projection",
        "diag(4, 1) and diag(1, 3), by names",
        [{n: [[4.0, 0.0], [0.0, 1.0]] for n in names}, {n: [[1.0, 0.0], [0.0, 3.0]] for n in names}],
        dict.fromkeys(names, zeros),
        ("tsvm", {}, {"text_projection": averaged, "w": mixed}, "averaged"),
        ("tsvm", {"averaged": ["w"]}, {"text_projection": mixed, "w": averaged}, ""),
        ("official:tsvm", {"alpha": 1.0}, {"text_projection": averaged, "w": mixed}, ""),
        ("fusion_bench:tsvm", {"alpha": 1.0}, dict.fromkeys(names, mixed), "none by itself"),
        (
            "fusion_bench:tsvm",
            {"alpha": 1.0, "exclude_keys": ["w"]},
            {"text_projection": mixed, "w": averaged},
            "by exact names",
        ),
        flags="TsvmProjection",
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
            "tsvm",
            {"lambda_": 2.0},
            {"b": [4.0, 6.0], "s": 2.0, "k": [[[[2.0, 1.0]]]], "e": [], "ids": i64(3)},
            "twice the mean",
        ),
        tolerance=0.0,
    )
    case("empty-matrix", "shapes (0, 3) and (1, 1)", [{"e": _none(), "w": [[3.0]]}], {"e": _none(), "w": [[1.0]]},
         ("tsvm", {}, {"e": _none(), "w": [[3.0]]}, "one model"))  # fmt: skip
    case("unchanged", "two models that equal the base", [zeros, zeros], zeros, ("tsvm", {}, zeros, ""), tolerance=0.0)
    for id, x in (("nan", float("nan")), ("infinite", float("inf"))):
        case(id, "it has no singular values", [[[x, 2.0], [1.0, 1.0]]], zeros, ("tsvm", {}, REFUSED, ""))
    for id, t in (("tolerance-zero", 0.0), ("tolerance-large", 0.5)):
        case(id, "outside of the domain", [zeros], zeros, ("tsvm", {"tolerance": t}, REFUSED, ""))
    case(
        "alpha-count", "two values for one model", [zeros], zeros, ("fusion_bench:tsvm", {"alpha": [1.0, 2.0]}, REFUSED, "")
    )
    case("tolerance-of-the-largest", "4 counts as zero beside 64, as it is not above a tenth", [[[64.0, 0.0], [0.0, 4.0]]],
         zeros, ("tsvm", {"tolerance": 0.1}, [[64.0, 0.0], [0.0, 0.0]], ""))  # fmt: skip
    case("no-base", "a task vector is a difference from a base", [zeros], None, ("tsvm", {}, REFUSED, ""))
    case("no-models", "nothing to merge", [], zeros, ("tsvm", {}, REFUSED, ""))
    case(
        "one-model",
        "a matrix of rank 2, both terms of which are kept",
        [[[2.0, -1.0, 0.0], [1.0, 3.0, 5.0]]],
        [[0.0] * 3] * 2,
        ("tsvm", {}, [[2.0, -1.0, 0.0], [1.0, 3.0, 5.0]], "it comes back"),
    )
    case(
        "equal-of-low-rank",
        "diag(4, 1, 0, 0) twice: two triplets each, which are all",
        [np.diag([4.0, 1.0, 0.0, 0.0]).tolist()] * 2,
        [[0.0] * 4] * 4,
        ("tsvm", {}, np.diag([4.0, 1.0, 0.0, 0.0]).tolist(), ""),
    )
    case(
        "nearly-equal",
        "4 (1, x) and 2 (1, -x) with x = 2^-12 as 1 x 2 matrices, u = 1 for both, v = (1, +-x) but for 3e-8",
        [[[4.0, 2.0**-10]], [[2.0, -(2.0**-11)]]],
        [[0.0, 0.0]],
        ("tsvm", {}, [[3.0, 1.0]], "Q = (1, +-1)/sqrt(2): 4/2 (1, 1) + 2/2 (1, -1)"),
        ("tsvm", {"tolerance": 1e-3}, [[3.0, 0.0]], "they share (1, 0): 4/2 + 2/2"),
        flags="TsvmDependent",
    )
    case(
        "weak-and-close",
        "4 e_1 e_1^T and 1/8 of e_2 e_2^T, or of (0.96 e_2 + 0.28 e_3) e_3^T; the weakest left direction has 0.4 %",
        [
            np.diag([4.0, 0.125, 0.0, 0.0]).tolist(),
            [[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.12, 0.0], [0.0, 0.0, 0.035, 0.0], [0.0] * 4],
        ],
        [[0.0] * 4] * 4,
        (
            "tsvm",
            {"tolerance": 0.01},
            [[4.0, 0.0, 0.0, 0.0], [0.0, 0.0875, 0.0875, 0.0], [0.0, 0.0125, 0.0125, 0.0], [0.0] * 4],
            "it counts as zero, though the vectors are 16 degrees apart: they share (7 e_2 + e_3)/sqrt(50), over sqrt(2)",
        ),
    )
    case(
        "weak-and-close-in-two-sizes",
        "4 e_1 e_1^T and 1/8 of e_2 e_2^T, or a quarter of 4 e_4 e_4^T and 1/8 of (0.96 e_2 + 0.28 e_3) e_3^T",
        [
            np.diag([4.0, 0.125, 0.0, 0.0]).tolist(),
            [[0.0] * 4, [0.0, 0.0, 0.03, 0.0], [0.0, 0.0, 0.00875, 0.0], [0.0, 0.0, 0.0, 1.0]],
        ],
        [[0.0] * 4] * 4,
        (
            "tsvm",
            {"tolerance": 0.01},
            [[4.0, 0.0, 0.0, 0.0], [0.0, 0.0875, 0.021875, 0.0], [0.0, 0.0125, 0.003125, 0.0], [0.0, 0.0, 0.0, 1.0]],
            "as certain as 1/32 of each task's largest: of the two weak directions one counts, (7 e_2 + e_3)/sqrt(50)",
        ),
    )
    case(
        "weak-and-close-of-full-rank",
        "both tasks have all four singular values, 4, 1/8, 1/16 and 1/16; the second ones' left directions are 16 degrees "
        "apart",
        [
            np.diag([4.0, 0.125, 0.0625, 0.0625]).tolist(),
            [[0.0, 0.0625, 0.0, 0.0], [-0.0175, 0.0, 0.12, 0.0], [0.06, 0.0, 0.035, 0.0], [0.0, 0.0, 0.0, 4.0]],
        ],
        [[0.0] * 4] * 4,
        (
            "tsvm",
            {"tolerance": 0.01},
            [[4.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.075, 0.0], [0.0, -0.075, 0.1, 0.0], [0.0, 0.0, 0.0, 4.0]],
            "nothing counts as zero: turned apart, these are 0.8 e_2 - 0.6 e_3 and 0.6 e_2 + 0.8 e_3",
        ),
    )
    case(
        "vector",
        "base 1; changes (2, -4) and (4, 2) of mean (3, -1); half of it",
        [[3.0, -3.0], [5.0, 3.0]],
        [1.0, 1.0],
        ("tsvm", {"lambda_": 0.5}, [2.5, 0.5], ""),
        tolerance=0.0,
    )
    nan, inf = float("nan"), float("inf")
    case(
        "vector-not-finite",
        "the mean of (NaN, infinity, 1) and (1, 1, 3)",
        [[nan, inf, 1.0], [1.0, 1.0, 3.0]],
        [0.0] * 3,
        ("tsvm", {}, [nan, inf, 2.0], ""),
        tolerance=0.0,
    )
    return h


def _none() -> Any:
    return np.zeros((0, 3), np.float32)
