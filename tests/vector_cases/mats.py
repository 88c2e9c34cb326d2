"""Vectors of mats."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, numbered

TOOLS = ("mats",)
CODE = {
    "mats:mats": "r-three/mats@cb52c38 src/merging/conjugateGradient_fisherMerging.py:conjugateGradient_fisherMerging",
}
FLAGS = {"mats-mats-06": ["MatsHead"], "mats-mats-09": ["MatsBaseTurned"]}

STAGED = (
    "mats-one-step", "mats-converged", "mats-task-arithmetic-start", "mats-dead-input", "mats-dead-input-2", "mats-kfac-2",
    "mats-fisher-2",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    asked, base, W = given.params, given.base, given.models

    def C(one: dict[str, Any], X: Any) -> Any:
        if asked.get("objective") == "fisher":
            return one["l.weight.fisher"] * X
        return (one["l.gradient_gram"] @ X if asked.get("objective", "kfac") == "kfac" else X) @ one["l.gram"]

    B = sum(C(one, W_n) for one, W_n in zip(given.stats, W))
    X = {
        "average": lambda: sum(W) / Fraction(len(W)),
        "task_arithmetic": lambda: base + Fraction(asked.get("lambda_", 0.3)) * sum(W_n - base for W_n in W),
        "zero": lambda: 0 * B,
    }[asked.get("start", "average")]()
    merged = solved(lambda X: sum(C(one, X) for one in given.stats), B, X, asked.get("iterations", 100))
    return {3: {"B": B}, 5: {"X": X}, 6: {"merged": merged, "result": merged}}


def solved(A: Any, B: Any, X: Any, iterations: int) -> Any:
    """Conjugate gradients, which reach the solution in exact numbers: nothing is then left of R."""
    R = B - A(X)
    P = R
    for _ in range(iterations):
        if not np.any(R):
            break
        step = np.sum(R * R) / np.sum(P * A(P))
        X, R, before = X + step * P, R - step * A(P), np.sum(R * R)
        P = R + np.sum(R * R) / before * P
    return X


def hand() -> Hand:
    h = Hand("mats", CODE)

    def case(first: str, comment: str, W: list[Any], stats: list[dict[str, Any]] | None, *answers: Any, base: Any = None,
             flags: str = "", name: str = "l.weight") -> None:  # fmt: skip
        """One weight; our statistics are l.gram, l.gradient_gram and l.weight.fisher, theirs l, in/l and out/l."""
        for entry, params, expect, why in answers:
            given = None if stats is None else [{k: np.array(x, np.float64) for k, x in s.items()} for s in stats]
            if given is not None and ":" in entry:
                given = [{k.replace("l.gram", "l"): x for k, x in s.items()} for s in given]
            answer = (entry, params, expect if expect is REFUSED else {name: expect}, why)
            id = numbered(h, first, entry)
            h.case(id, comment, [{name: w} for w in W], None if base is None else {name: base}, answer, flags=flags,
                   dtype="F64", stats=given, tolerance=1e-6 if ":" in entry else 1e-12)  # fmt: skip

    W = [[[6.0, 3.0], [0.0, 6.0], [3.0, 0.0]], [[0.0, -3.0], [0.0, 0.0], [-3.0, 0.0]]]
    G = [{"l.gram": np.diag([3.0, 0.0])}, {"l.gram": np.diag([1.0, 2.0])}]
    one = {"objective": "gram", "iterations": 1}
    case(
        "one-step",
        "G_1 + G_2 = diag(4, 2); from the mean the residual has two equally long columns: step (1 + 1) / (4 + 2) = 1/3",
        W,
        G,
        ("mats", one, [[5.0, -2.0], [0.0, 1.0], [2.0, 0.0]], ""),
        ("mats:mats", {"num_iterations": 1}, [[5.0, -2.0], [0.0, 1.0], [2.0, 0.0]], ""),
    )
    exact = [[4.5, -3.0], [0.0, 0.0], [1.5, 0.0]]
    case(
        "converged",
        "two eigenvalues, two steps: 3/4 of column 0 of the first and 1/4 of the second; column 1 is the second's",
        W,
        G,
        ("mats", one | {"iterations": 2}, exact, ""),
        ("mats", {"objective": "gram", "solver": "direct"}, exact, ""),
        ("mats:mats", {"num_iterations": 2}, exact, ""),
    )
    base = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    eye = [{"l.gram": np.eye(3)}]
    case(
        "base-start",
        "no iteration leaves the start",
        [np.zeros((2, 3)) + 1],
        eye,
        ("mats", {"objective": "gram", "iterations": 0, "start": "base"}, base, ""),
        (
            "mats:mats",
            {"num_iterations": 0, "initialization": "pretrained"},
            [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]],
            "its entries are read as a (3, 2) matrix and turned",
        ),
        base=base,
        flags="MatsBaseTurned",
    )
    head = "transformer.lm_head.weight"
    case(
        "head",
        "inputs weigh 3 to 1: (3 * 0 + 1 * 4) / 4 = 1; the mean is 2",
        [[[0.0]], [[4.0]]],
        [{"transformer.lm_head.gram": [[3.0]]}, {"transformer.lm_head.gram": [[1.0]]}],
        ("mats", {"objective": "gram"}, [[1.0]], ""),
        name=head,
        flags="MatsHead",
    )
    case(
        "head",
        "inputs weigh 3 to 1: (3 * 0 + 1 * 4) / 4 = 1; the mean is 2",
        [[[0.0]], [[4.0]]],
        [{"transformer.lm_head": [[3.0]]}, {"transformer.lm_head": [[1.0]]}],
        ("mats:mats", {}, [[2.0]], "an lm_head is averaged"),
        name=head,
        flags="MatsHead",
    )
    case(
        "task-arithmetic-start",
        "1 + 0.25 ((3 - 1) + (5 - 1)) = 2.5",
        [[[3.0]], [[5.0]]],
        [{"l.gram": [[1.0]]}] * 2,
        ("mats", {"objective": "gram", "iterations": 0, "start": "task_arithmetic", "lambda_": 0.25}, [[2.5]], ""),
        base=[[1.0]],
    )
    case(
        "dead-input",
        "nothing is known of input 1: the start stays, the mean 2 or zero",
        [[[4.0, 1.0]], [[0.0, 3.0]]],
        [{"l.gram": np.diag([1.0, 0.0])}, {"l.gram": np.diag([3.0, 0.0])}],
        ("mats", {"objective": "gram"}, [[1.0, 2.0]], ""),
        ("mats", {"objective": "gram", "start": "zero"}, [[1.0, 0.0]], ""),
        ("mats:mats", {}, [[1.0, 2.0]], ""),
        ("mats:mats", {"initialization": None}, [[1.0, 0.0]], ""),
        ("mats", {"objective": "gram", "solver": "direct"}, REFUSED, ""),
    )
    case(
        "kfac",
        "diagonal matrices: entry (o, i) has the weight H_oo G_ii, 2 * 3 = 6 and 1 * 2 = 2 for (0, 0): (6 * 4 + 2 * 0) / 8",
        [[[4.0, 4.0], [4.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]],
        [
            {"l.gram": np.diag([3.0, 1.0]), "l.gradient_gram": np.diag([2.0, 1.0])},
            {"l.gram": np.diag([2.0, 1.0]), "l.gradient_gram": np.diag([1.0, 1.0])},
        ],
        ("mats", {"solver": "direct"}, [[3.0, 8 / 3], [2.4, 2.0]], "6:2, 2:1, 3:2, 1:1"),
        ("mats", {"tolerance": 0.0}, [[3.0, 8 / 3], [2.4, 2.0]], ""),
    )
    case(
        "kfac-mats",
        "the weights 6 and 2 of the entry: (6 * 4 + 2 * 0) / 8",
        [[[4.0]], [[0.0]]],
        [{"in/l": [[3.0]], "out/l": [[2.0]]}, {"in/l": [[2.0]], "out/l": [[1.0]]}],
        ("mats:mats", {"kind": "blockwise_fisher_linear"}, [[3.0]], ""),
    )
    case(
        "fisher",
        "weights 3 and 1, and 1 and 1: (3 * 0 + 4) / 4 and (0 + 4) / 2",
        [[[0.0, 0.0]], [[4.0, 4.0]]],
        [{"l.weight.fisher": [[3.0, 1.0]]}, {"l.weight.fisher": [[1.0, 1.0]]}],
        ("mats", {"objective": "fisher", "solver": "direct"}, [[1.0, 2.0]], ""),
        ("mats", {"objective": "fisher"}, [[1.0, 2.0]], "two eigenvalues, two steps"),
    )
    case(
        "opposed",
        "the right-hand side is 0, and so is the result, whatever the start",
        [[[2.0]], [[-2.0]]],
        [{"l.gram": [[1.0]]}] * 2,
        ("mats", {"objective": "gram", "start": "base"}, [[0.0]], ""),
        base=[[5.0]],
    )
    case("no-base", "nothing to start from", W, G, ("mats", {"objective": "gram", "start": "base"}, REFUSED, ""))
    case("missing", "model 1 has none", W, [G[0], {}], ("mats", {"objective": "gram"}, REFUSED, ""))
    case("wrong-size", "3 for 2 inputs", W, [{"l.gram": np.eye(3)}] * 2, ("mats", {"objective": "gram"}, REFUSED, ""))
    case("no-statistics", "nothing matters", W, None, ("mats", {}, REFUSED, ""))
    case(
        "tolerance",
        "the right-hand side is 3/2, and so is the residual at 0",
        [[[1.5]]],
        [{"l.gram": [[1.0]]}],
        (
            "mats",
            {"objective": "gram", "start": "zero", "tolerance": 1.125},
            [[0.0]],
            "less than 9/8 of 3/2: the start",
        ),
        (
            "mats",
            {"objective": "gram", "start": "zero", "tolerance": 1.0},
            [[1.5]],
            "not less than 3/2: one step",
        ),
    )
    # The matrix with 2 on the diagonal and -1 beside it, of 127 rows, and e_1, in its eigenvectors: each step of conjugate
    # gradients solves for one row more, and x after k steps is (k, k - 1, ..., 1) / (k + 1), then zeros.
    angle = np.arange(1, 128) * math.pi / 128
    eigenvalues, eigenvectors = 2 - 2 * np.cos(angle), math.sqrt(2 / 128) * np.sin(np.outer(np.arange(1, 128), angle))
    case(
        "default-iterations",
        "127 eigenvalues 2 - 2 cos(j pi / 128), right-hand side sqrt(1/64) sin(j pi / 128); after 100 steps x is the sum "
        "over i of sqrt(1/64) sin(i j pi / 128) (101 - i) / 101, and the residual 1 / 101",
        [(eigenvectors[0] / eigenvalues)[None]],
        [{"l.weight.fisher": eigenvalues[None]}],
        (
            "mats",
            {"objective": "fisher", "start": "zero"},
            ((101 - np.arange(1, 101)) / 101 @ eigenvectors[:100])[None],
            "100 by default",
        ),
    )
    case(
        "lambda-default",
        "no step: the start, 2 + 0.3 (12 - 2)",
        [[[12.0]]],
        [{"l.gram": [[1.0]]}],
        ("mats", {"objective": "gram", "start": "task_arithmetic", "iterations": 0}, [[5.0]], ""),
        base=[[2.0]],
    )
    case(
        "off-diagonal",
        "W_1 G_1 = (6, 6), W_2 G_2 = (-6, 6), the sum of both times 1/4, since G_1 + G_2 = 4",
        [[[2.0, 2.0]], [[-2.0, 2.0]]],
        [{"l.gram": [[2.0, 1.0], [1.0, 2.0]]}, {"l.gram": [[2.0, -1.0], [-1.0, 2.0]]}],
        (
            "mats",
            {"objective": "gram", "solver": "direct"},
            [[0.0, 3.0]],
            "what is off the diagonal counts whole by default",
        ),
    )
    case(
        "one-direct",
        "one model is the solution, 3 W / 3",
        [[[1.0, 5.0]]],
        [{"l.gram": [[3.0, 0.0], [0.0, 3.0]], "l.weight.fisher": [[3.0, 3.0]]}],
        ("mats", {"objective": "fisher", "solver": "direct"}, [[1.0, 5.0]], ""),
        ("mats", {"objective": "gram", "solver": "direct"}, [[1.0, 5.0]], ""),
    )
    case(
        "fisher-fraction",
        "(3 * 1 + 0) / (3 + 1)",
        [[[1.0]], [[0.0]]],
        [{"l.weight.fisher": [[3.0]]}, {"l.weight.fisher": [[1.0]]}],
        ("mats", {"objective": "fisher", "solver": "direct"}, [[0.75]], ""),
    )
    case(
        "fisher-zero",
        "0 / 0 for the second entry",
        [[[1.0, 1.0]], [[0.0, 2.0]]],
        [{"l.weight.fisher": [[3.0, 0.0]]}] * 2,
        ("mats", {"objective": "fisher", "solver": "direct"}, REFUSED, "no entry of it matters to any model"),
    )
    case(
        "fisher-missing",
        "model 1 has none",
        [[[1.0]], [[0.0]]],
        [{"l.weight.fisher": [[3.0]]}, {}],
        ("mats", {"objective": "fisher"}, REFUSED, ""),
    )
    h.case(
        "fisher-none",
        "l.weight has statistics, (3 + 0) / (3 + 1), and m.weight none: (1 + 3) / 2",
        [{"l.weight": [[1.0]], "m.weight": [[1.0]]}, {"l.weight": [[0.0]], "m.weight": [[3.0]]}],
        None,
        ("mats", {"objective": "fisher"}, {"l.weight": [[0.75]], "m.weight": [[2.0]]}, "the average"),
        dtype="F64",
        stats=[{"l.weight.fisher": np.array([[3.0]])}, {"l.weight.fisher": np.array([[1.0]])}],
        tolerance=1e-12,
    )
    case(
        "task-arithmetic-no-base",
        "nothing to start from",
        W,
        G,
        ("mats", {"objective": "gram", "start": "task_arithmetic"}, REFUSED, ""),
    )
    case(
        "not-symmetric",
        "1 and 2",
        [[[1.0, 2.0]]],
        [{"l.gram": [[2.0, 1.0], [2.0, 2.0]]}],
        ("mats", {"objective": "gram"}, REFUSED, ""),
    )
    case(
        "not-finite",
        "NaN",
        [[[1.0, 2.0]]],
        [{"l.gram": [[float("nan"), 0.0], [0.0, 1.0]]}],
        ("mats", {"objective": "gram"}, REFUSED, ""),
    )
    h.case(
        "half-of-kfac",
        "l has both matrices, weights 6 and 2: (6 * 4 + 2 * 0) / 8; m lacks one, and a bias is a vector: the means",
        [{"l.weight": [[x]], "m.weight": [[x]], "l.bias": [x]} for x in (4.0, 0.0)],
        None,
        ("mats", {}, {"l.weight": [[3.0]], "m.weight": [[2.0]], "l.bias": [2.0]}, ""),
        dtype="F64",
        stats=[
            {"l.gram": np.array([[3.0]]), "l.gradient_gram": np.array([[2.0]]), "m.gram": np.array([[3.0]])},
            {"l.gram": np.array([[2.0]]), "l.gradient_gram": np.array([[1.0]]), "m.gram": np.array([[2.0]])},
        ],
        tolerance=1e-12,
    )
    return h
