"""Vectors of wudi."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, fraction, i64
from vector_cases.low_rank_residual import root

CODE = {
    "official:wudi": "nathanielyvo/WUDI-Merging@dc3cd12 vit/wudi_main.py:get_redundant_task_vector",
    "fusion_bench:wudi": "tanganke/fusion_bench@54c9e8c fusion_bench/method/wudi/wudi.py:wudi_merging",
}
TOOLS = ("fusion_bench",)
LAYERS = ["*attn.in_proj_weight", "*attn.out_proj.weight", "*mlp.c_fc.weight", "*mlp.c_proj.weight"]
FLAGS = {
    "wudi-official-00": ["WudiOtherTensors"],
    "wudi-fusion_bench-00": ["WudiOtherTensors"],
}
PAPER = {"wudi-official-00": Paper({"layers": LAYERS}, comment="the authors' four kinds of matrices by name")}
NAME = "visual.mlp.c_fc.weight"
SMALL = 1e-7  # Adam's 1e-8 beside the gradient

STAGED = (
    "wudi-one-step", "wudi-exact", "wudi-same-models-exact", "wudi-convolution", "wudi-equal", "wudi-orthogonal",
    "wudi-low-rank", "wudi-low-rank-2", "wudi-small-gradient", "wudi-two-steps",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [(theta - given.base).reshape(len(given.base), -1) for theta in given.models]
    squares = [np.sum(tau_i * tau_i) for tau_i in tau]
    G = sum(tau_i.T @ tau_i / s for tau_i, s in zip(tau, squares) if s)
    H = sum(tau_i @ tau_i.T @ tau_i / s for tau_i, s in zip(tau, squares) if s)
    found = {1: {"tau": tau}, 2: {"a": [tau_i / root(s) if s else tau_i for tau_i, s in zip(tau, squares)]}}
    if given.params.get("solver") == "exact":
        # tau G = H are the normal equations; the eigenvalues of G are the squares of the singular values.
        tau_m = fraction(H.astype(float) @ np.linalg.pinv(G.astype(float), 1e-10, hermitian=True))
        found[4] = {"tau_m": tau_m}
    else:
        steps, lr = given.params.get("steps", 300), given.params.get("lr", 1e-5)
        tau_m = adam(sum(tau), lambda tau_m: 2 * (tau_m @ G - H), steps, lr)
        found[3] = {"G": G, "H": H, "tau_m": tau_m}
    return found | {5: {"result": given.base + tau_m.reshape(given.base.shape)}}


def adam(x: Any, gradient: Callable[[Any], Any], steps: int, lr: float) -> Any:
    """Few steps: the fractions grow."""
    m = v = 0 * x
    for t in range(1, steps + 1):
        g = gradient(x)
        if not np.any(g) and not np.any(m):
            return x
        m = (9 * m + g) / Fraction(10)
        v = (999 * v + g * g) / Fraction(1000)
        size = np.frompyfunc(root, 1, 1)(v / (1 - Fraction(999, 1000) ** t)) + Fraction(1, 10**8)
        x = x - Fraction(lr) * m / (1 - Fraction(9, 10) ** t) / size
    return x


def hand() -> Hand:
    h = Hand("wudi", CODE)

    def named(x: Any, **more: Any) -> dict[str, Any]:
        return {NAME: x, **more}

    tau_1, tau_2 = [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    zeros, ones = [[0.0] * 3] * 2, [[1.0] * 3] * 2
    two = "tau_1 = (2, 0) (1, 0, 0)^T, tau_2 = (0, 1) (1, 1, 0)^T"
    h.case(
        "one-step",
        f"{two}: the gradient at their sum is 2 (1, 1, 0; 1, 0, 0); Adam's first step goes lr = 1/2 against its sign",
        [tau_1, tau_2],
        zeros,
        ("wudi", {"steps": 1, "lr": 0.5}, [[1.5, -0.5, 0.0], [0.5, 1.0, 0.0]], "a gradient of 0 moves nothing"),
        dtype="F64",
        tolerance=SMALL,
    )
    h.case(
        "exact",
        f"{two}: (1, 0, 0) is to give (2, 0), (1, 1, 0) is to give (0, 2), and the rest nothing",
        [tau_1, tau_2],
        zeros,
        ("wudi", {"solver": "exact"}, [[2.0, -2.0, 0.0], [0.0, 2.0, 0.0]], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "no-steps",
        "base 1; the sum is where Adam begins",
        [[[3.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [2.0, 2.0, 1.0]]],
        ones,
        ("wudi", {"steps": 0}, [[3.0, 1.0, 1.0], [2.0, 2.0, 1.0]], ""),
    )
    h.case(
        "one-model",
        "the gradient at the task vector itself is 0",
        [[[3.0, -1.0], [0.5, 2.0]]],
        [[1.0, 1.0], [1.0, 1.0]],
        ("wudi", {}, [[3.0, -1.0], [0.5, 2.0]], ""),
    )
    h.case(
        "same-models-exact",
        "two equal models, and a third that doubles what they change: 1 + 1, 1 + 1 and 2 + 2 on one direction, with weights "
        "that the lengths have divided out",
        [[[1.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]]],
        [[0.0, 0.0]],
        ("wudi", {"solver": "exact"}, [[4 / 3, 0.0]], "(1 + 1 + 2) / 3"),
        dtype="F64",
        tolerance=1e-14,
    )
    large = 1024.0
    h.case(
        "steps",
        "tau = 1024 and 2048 on one direction: the sum is 3072, the minimum 1536, the gradient hardly changes on the way, "
        "and each step goes 1e-5",
        [named([[large, 0.0]]), named([[2 * large, 0.0]])],
        named([[0.0, 0.0]]),
        ("wudi", {}, named([[3 * large - 0.003, 0.0]]), "300 steps"),
        ("official:wudi", {}, named([[3 * large - 0.003, 0.0]]), "300 steps"),
        ("fusion_bench:wudi", {"iter_num": 400}, named([[3 * large - 0.004, 0.0]]), "400 steps"),
        flags="WudiSteps",
        dtype="F64",
        tolerance=1e-11,
    )
    h.case(
        "zero-task-vector",
        "the second model is the base",
        [named([[3.0, 0.0], [0.0, 1.0]]), named([[0.0, 0.0], [0.0, 0.0]])],
        named([[0.0, 0.0], [0.0, 0.0]]),
        ("wudi", {}, named([[3.0, 0.0], [0.0, 1.0]]), "it has no inputs to protect"),
        ("official:wudi", {}, named([[math.nan] * 2] * 2), "0 / 0 is in the loss"),
        ("fusion_bench:wudi", {}, named([[math.nan] * 2] * 2), "0 / 0 is in the loss"),
        flags="WudiZeroTaskVector",
    )
    h.case(
        "other-tensors",
        "a bias, with changes 2 and 4, and a matrix that is none of CLIP's four kinds; no steps",
        [{"proj.bias": [3.0], "proj.weight": [[3.0]]}, {"proj.bias": [5.0], "proj.weight": [[5.0]]}],
        {"proj.bias": [1.0], "proj.weight": [[1.0]]},
        ("wudi", {"steps": 0}, {"proj.bias": [1.0], "proj.weight": [[7.0]]}, "vectors stay, matrices are merged"),
        ("official:wudi", {"iter_num": 0}, {"proj.bias": [1.0], "proj.weight": [[1.0]]}, "both stay the base's"),
        ("fusion_bench:wudi", {"iter_num": 0}, {"proj.bias": [4.0], "proj.weight": [[7.0]]}, "1 + (2 + 4) / 2"),
        flags="WudiOtherTensors",
    )
    h.case(
        "layers",
        "of two matrices the globs name one",
        [{"a.q": [[2.0]], "a.k": [[2.0]]}, {"a.q": [[3.0]], "a.k": [[3.0]]}],
        {"a.q": [[1.0]], "a.k": [[1.0]]},
        ("wudi", {"steps": 0, "layers": ["*.q"]}, {"a.q": [[4.0]], "a.k": [[1.0]]}, "1 + 1 + 2; the base's"),
    )
    h.case(
        "tolerance",
        "inputs (1, 0) and (1, 2^-20), nearly the same: of the unit rows' singular values, near sqrt(2) and 2^-20 / sqrt(2) "
        "the second does not count",
        [[[1.0, 0.0]], [[3.0, 3 * 2.0**-20]]],
        [[0.0, 0.0]],
        ("wudi", {"solver": "exact"}, [[2.0, 2.0**-20]], "(1 + 3) / 2 on the direction between the two"),
        dtype="F64",
        tolerance=1e-9,
    )
    h.case(
        "tolerance-zero",
        "inputs (1, 0) and (1, 2^-20), nearly the same, and both count",
        [[[1.0, 0.0]], [[3.0, 3 * 2.0**-20]]],
        [[0.0, 0.0]],
        ("wudi", {"solver": "exact", "tolerance": 0.0}, [[1.0, 2.0**21]], "1, and (3 - 1) / 2^-20 to meet the other"),
        dtype="F64",
        tolerance=1e-9,
    )
    h.case(
        "tolerance-of-the-largest",
        "inputs (1, 0) and (1, 1.5 2^-20): singular values near sqrt(2) and 1.5 2^-20 / sqrt(2), a part of 0.75 2^-20",
        [[[1.0, 0.0]], [[3.0, 4.5 * 2.0**-20]]],
        [[0.0, 0.0]],
        ("wudi", {"solver": "exact", "tolerance": 2.0**-20}, [[2.0, 1.5 * 2.0**-20]], "less than 2^-20 does not count"),
        dtype="F64",
        tolerance=1e-9,
    )
    h.case(
        "tolerance-of-less-than-one",
        "diag(1, 1, 1, 1/8) over its length, about 1.74: the largest singular value is 0.57, the smallest an eighth of that",
        [np.diag([1.0, 1.0, 1.0, 0.125])],
        np.zeros((4, 4)),
        ("wudi", {"solver": "exact", "tolerance": 0.1}, np.diag([1.0, 1.0, 1.0, 0.125]).tolist(), "a tenth and more counts"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "tolerance-one",
        "no singular value is more than the largest",
        [[[3.0, 1.0]]],
        [[1.0, 1.0]],
        ("wudi", {"solver": "exact", "tolerance": 1.0}, [[1.0, 1.0]], "none counts: the base"),
    )
    h.case(
        "convolution",
        "shape (2, 1, 2): a 2 x 2 matrix",
        [[[[2.0, 0.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]]],
        [[[0.0, 0.0]], [[0.0, 0.0]]],
        ("wudi", {"solver": "exact"}, [[[2.0, -2.0]], [[0.0, 2.0]]], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "empty-and-integers",
        "no entries; a vector; integers",
        [{"e": [], "v": [2.0], "ids": i64(3)}],
        {"e": [], "v": [1.0], "ids": i64(3)},
        ("wudi", {}, {"e": [], "v": [1.0], "ids": i64(3)}, ""),
    )
    h.case(
        "number",
        "a number is no matrix",
        [{"s": 3.0, "w": [[3.0]]}],
        {"s": 1.0, "w": [[1.0]]},
        ("wudi", {}, {"s": 1.0, "w": [[3.0]]}, "it stays the base's"),
    )
    h.case("nan", "NaN has no length", [[[math.nan, 1.0]]], [[0.0, 0.0]], ("wudi", {}, REFUSED, ""))
    h.case("infinite", "infinity has no length", [[[math.inf, 1.0]]], [[0.0, 0.0]], ("wudi", {}, REFUSED, ""))
    h.case("steps-negative", "-1 steps", [[[1.0]]], [[0.0]], ("wudi", {"steps": -1}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[[1.0]]], None, ("wudi", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [[0.0]], ("wudi", {}, REFUSED, ""))
    h.case(
        "orthogonal",
        "base 1; changes (4, 0) and (0, 2), of which neither sees the other",
        [[[5.0, 1.0]], [[1.0, 3.0]]],
        [[1.0, 1.0]],
        ("wudi", {}, [[5.0, 3.0]], "the sum: its gradient is 0"),
    )
    h.case(
        "equal",
        "base 1; twice the change diag(3, 4) of length 5",
        [[[4.0, 1.0], [1.0, 5.0]]] * 2,
        [[1.0, 1.0], [1.0, 1.0]],
        ("wudi", {"solver": "exact"}, [[4.0, 1.0], [1.0, 5.0]], "the model"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "equal-steps",
        "twice the change 1024: the sum is 2048, and each of 300 steps goes 1e-5 towards 1024",
        [[[large, 0.0]]] * 2,
        [[0.0, 0.0]],
        ("wudi", {}, [[2 * large - 0.003, 0.0]], ""),
        dtype="F64",
        tolerance=1e-11,
    )
    h.case(
        "unchanged",
        "both models are the base",
        [[[3.0, -1.0]]] * 2,
        [[3.0, -1.0]],
        ("wudi", {}, [[3.0, -1.0]], "Adam"),
        ("wudi", {"solver": "exact"}, [[3.0, -1.0]], "no singular value counts"),
    )
    h.case(
        "low-rank",
        "(3, 4) and (6, 8): both see (3, 4)/5 alone, the first 5 and the second 10 of it",
        [[[3.0, 4.0]], [[6.0, 8.0]]],
        [[0.0, 0.0]],
        ("wudi", {"solver": "exact"}, [[4.5, 6.0]], "7.5 (3, 4)/5, and nothing of (4, -3)"),
        ("wudi", {"steps": 1, "lr": 0.5}, [[8.5, 11.5]],
         "from (9, 12), where the gradient is 2 (2 15 - 15) (3, 4)/5, as far in both entries"),
        dtype="F64",
        tolerance=SMALL,
    )  # fmt: skip
    h.case(
        "lr-zero",
        "base 1, changes (2, 0) and (0, 2); 300 steps of no length",
        [[[3.0, 1.0]], [[1.0, 3.0]]],
        [[1.0, 1.0]],
        ("wudi", {"lr": 0.0}, [[3.0, 3.0]], "the sum"),
    )
    h.case(
        "small-gradient",
        "changes 0.5e-8 and 1e-8: at their sum, 1.5e-8, the gradient is 2 (2 1.5e-8 - 1.5e-8) = 3e-8",
        [[[0.5e-8]], [[1e-8]]],
        [[0.0]],
        ("wudi", {"steps": 1, "lr": 1.0}, [[1.5e-8 - 0.75]], "3e-8 / (3e-8 + 1e-8) of a step"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "two-steps",
        "changes 4 and 12: from their sum, 16, the gradient is 4 (16 - 8) = 32, and a first step of 6 leads to 10, where it "
        "is 8: m = 0.09 32 + 0.1 8 over 0.19, v = 0.000999 32^2 + 0.001 8^2 over 0.001999",
        [[[4.0]], [[12.0]]],
        [[0.0]],
        ("wudi", {"steps": 2, "lr": 6.0}, [[10 - 6 * (3.68 / 0.19) / math.sqrt(1.086976 / 0.001999)]], ""),
        dtype="F64",
        tolerance=SMALL,
    )
    h.case(
        "lr-negative",
        "uphill",
        [[[1.0]]],
        [[0.0]],
        ("wudi", {"lr": -1.0}, REFUSED, ""),
    )
    h.case("tolerance-large", "more than all", [[[1.0]]], [[0.0]], ("wudi", {"tolerance": 1.5}, REFUSED, ""))
    return h
