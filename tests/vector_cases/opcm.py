"""Vectors of opcm."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64
from vector_cases.low_rank_residual import root, terms

TOOL = "fusion_bench:opcm"
CODE = {TOOL: "tanganke/fusion_bench@54c9e8c fusion_bench/method/opcm/opcm_general.py:OPCM"}
TOOLS = ("fusion_bench",)
PAPER = {
    "opcm-fusion_bench-00": Paper({"alpha": 0.5}, comment="no singular value is 0, and all matrices are linear layers'"),
    "opcm-fusion_bench-03": Paper({"alpha": 0.9}, comment="no singular value is 0, and all matrices are linear layers'"),
}
NAME = "fc.weight"

STAGED = (
    "opcm-diagonal", "opcm-order", "opcm-order-reversed", "opcm-block", "opcm-block-transposed", "opcm-alpha-between",
    "opcm-rank-one", "opcm-first-is-base", "opcm-equal",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    D, *rest = tau
    for tau_t in rest:
        D = D + tau_t - used(tau_t, D, Fraction(given.params.get("alpha", 0.5)))
    squares, square = [np.sum(x * x) for x in tau], np.sum(D * D)
    mean = sum(root(x) for x in squares) / len(tau)
    return {
        1: {"tau": tau},
        2: {"D": D},
        3: {"squares": squares, "square": square, "mean": mean},
        4: {"result": given.base + mean / root(square) * D},
    }


def used(tau_t: Any, D: Any, alpha: Fraction) -> Any:
    """U E V^T, with projectors in place of vectors: u v^T = T / s of a term T, u u^T = T T^T / s^2, v v^T = T^T T / s^2."""
    found = [(s, term) for s, term in terms(D) if s]
    share, r = Fraction(0), 0
    for s, _ in found:
        share += s
        r += share <= alpha * sum(s for s, _ in found)
    gone = sum((np.sum(term * tau_t) / s**2 * term for s, term in found[r:]), 0 * D)
    if r:
        gone = gone + sum(x @ x.T / s**2 for s, x in found[:r]) @ tau_t @ sum(x.T @ x / s**2 for s, x in found[:r])
    return gone


def hand() -> Hand:
    h = Hand("opcm", CODE)

    def layer(x: Any, **more: Any) -> dict[str, Any]:
        return {NAME: x, **more}

    def case(id: str, comment: str, models: Any, base: Any, *answers: Any, **more: Any) -> None:
        h.case(id, comment, models, base, *answers, **{"dtype": "F64", "tolerance": 1e-14} | more)

    tau_1, tau_2 = [[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]], [[5.0, 5.0, 5.0], [5.0, 0.0, 0.0]]
    zeros = [[0.0] * 3] * 2
    six = "tau_1 = diag(4, 3) of length 5, tau_2 of length 10; their singular vectors' shares are 4/7 and 1"
    result = [[3.0, 3.75, 3.75], [3.75, 2.25, 0.0]]
    case(
        "diagonal",
        f"{six}: at alpha 1/2 the diagonal of tau_2, (5, 0), goes; the sum has length 10, the mean is 7.5",
        [layer(tau_1), layer(tau_2)],
        layer(zeros),
        ("opcm", {}, layer(result), "3/4 of (4, 5, 5; 5, 3, 0)"),
        (TOOL, {}, layer(result), "the same"),
    )
    case(
        "order",
        "of (3, 4) the part along (0, 2) goes, which is 4; lengths 2 and 5, mean 7/2",
        [[[0.0, 2.0]], [[3.0, 4.0]]],
        [[0.0, 0.0]],
        ("opcm", {}, [[3.0 * 3.5 / math.sqrt(13), 2.0 * 3.5 / math.sqrt(13)]], "(0, 2) + (3, 0), from sqrt(13) to 7/2"),
    )
    case(
        "order-reversed",
        "the same two models in the other order: (0, 2) loses its part along (3, 4) / 5, which is 8/5",
        [[[3.0, 4.0]], [[0.0, 2.0]]],
        [[0.0, 0.0]],
        (
            "opcm",
            {},
            [[(3 - 0.96) * 3.5 / math.sqrt(26.44), (4 + 0.72) * 3.5 / math.sqrt(26.44)]],
            "(3, 4) + (0, 2) - 8/5 (3/5, 4/5) = (2.04, 4.72), from sqrt(26.44) to 7/2",
        ),
    )
    block = [[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]
    length = math.sqrt(50.0)
    case(
        "block",
        "tau_1 = diag(4, 3), tau_2 of length 10; at alpha 1 all of the block goes here; the tool finds no singular value at "
        "which the share exceeds 1 and takes away the diagonal alone",
        [layer(tau_1), layer(tau_2)],
        layer(zeros),
        (
            "opcm",
            {"alpha": 1.0},
            layer([[(a + b) * 7.5 / length for a, b in zip(x, y)] for x, y in zip(tau_1, block)]),
            "(4, 0, 5; 0, 3, 0), from sqrt(50) to 7.5",
        ),
        (TOOL, {"alpha": 1.0}, layer(result), "as with alpha 1/2"),
        flags="OpcmAlphaOne",
    )
    case(
        "alpha-between",
        "tau_1 = diag(4, 3), alpha 0.9: the block of the first singular value is its diagonal entry",
        [layer(tau_1), layer(tau_2)],
        layer(zeros),
        ("opcm", {"alpha": 0.9}, layer(result), "as with alpha 1/2"),
        (TOOL, {"alpha": 0.9}, layer(result), ""),
    )
    rank_one, full = [[4.0, 0.0], [0.0, 0.0]], [[3.0, 1.0], [2.0, 4.0]]
    mean = (4 + math.sqrt(30)) / 2
    case(
        "rank-one",
        "tau_1 = diag(4, 0), tau_2 = (3, 1; 2, 4) of length sqrt(30)",
        [layer(rank_one), layer(full)],
        layer([[0.0, 0.0], [0.0, 0.0]]),
        (
            "opcm",
            {},
            layer([[4 * mean / math.sqrt(37), mean / math.sqrt(37)], [2 * mean / math.sqrt(37), 4 * mean / math.sqrt(37)]]),
            "3 goes, where tau_1 is; (4, 1; 2, 4) has length sqrt(37)",
        ),
        (
            TOOL,
            {},
            layer([[4 * mean / math.sqrt(21), mean / math.sqrt(21)], [2 * mean / math.sqrt(21), 0.0]]),
            "4 goes too, where tau_1 has the singular value 0; (4, 1; 2, 0) has length sqrt(21)",
        ),
        flags="OpcmNullDirections",
    )
    little, lengths = 2.0**-20, (math.sqrt(16 + 2.0**-40) + math.sqrt(30)) / 2
    for id, tolerance, kept, comment in (
        ("rounding", {}, 4 + little, "which counts as zero: only 3 goes, where the 4 of tau_1 is"),
        ("above-the-tolerance", {"tolerance": 2.0**-23}, little, "which is above: 4 goes too"),
    ):
        by = lengths / math.sqrt(21 + kept**2)
        case(
            id,
            "diag(4, 2^-20), whose second singular value is 2^-22 of the first, and (3, 1; 2, 4)",
            [layer([[4.0, 0.0], [0.0, little]]), layer([[3.0, 1.0], [2.0, 4.0]])],
            layer([[0.0, 0.0], [0.0, 0.0]]),
            ("opcm", tolerance, layer([[4 * by, by], [2 * by, kept * by]]), comment),
        )
    case(
        "first-is-base",
        "tau_1 = 0: nothing is used yet; the lengths are 0 and 5",
        [[[0.0, 0.0]], [[3.0, 4.0]]],
        [[0.0, 0.0]],
        ("opcm", {}, [[1.5, 2.0]], "half of tau_2: the mean length is 2.5"),
    )
    case(
        "vector",
        "a bias is added as it is: (3, 0) + (0, 4) of length 5; the lengths are 3 and 4, their mean 3.5",
        [{"b": [3.0, 0.0]}, {"b": [0.0, 4.0]}],
        {"b": [0.0, 0.0]},
        ("opcm", {}, {"b": [2.1, 2.8]}, "7/10 of it"),
        (TOOL, {}, {"b": [2.1, 2.8]}, ""),
    )
    case(
        "over-the-model",
        "lengths are those of the whole model: 3 and 4 in two tensors; the sum has length 5",
        [{"a": [3.0], "b": [0.0]}, {"a": [0.0], "b": [4.0]}],
        {"a": [0.0], "b": [0.0]},
        ("opcm", {}, {"a": [2.1], "b": [2.8]}, "3.5 / 5 of both"),
        (TOOL, {}, {"a": [2.1], "b": [2.8]}, ""),
    )
    case(
        "convolution",
        "shape (2, 1, 2), a 2 x 2 matrix here: (3, 0; 0, 0), then (4, 0; 0, 3), of lengths 3 and 5",
        [layer([[[3.0, 0.0]], [[0.0, 0.0]]]), layer([[[4.0, 0.0]], [[0.0, 3.0]]])],
        layer([[[0.0, 0.0]], [[0.0, 0.0]]]),
        ("opcm", {}, layer([[[4 / math.sqrt(2), 0.0]], [[0.0, 4 / math.sqrt(2)]]]), "(3, 3), from sqrt(18) to 4"),
        (TOOL, {}, layer([[[28 / math.sqrt(58), 0.0]], [[0.0, 12 / math.sqrt(58)]]]), "(7, 3): added as it is"),
        flags="OpcmOtherTensors",
    )
    case(
        "embedding",
        "a matrix (3, 0) and then (4, 3), of lengths 3 and 5, that the tool takes for an embedding",
        [{"emb.weight": [[3.0, 0.0]]}, {"emb.weight": [[4.0, 3.0]]}],
        {"emb.weight": [[0.0, 0.0]]},
        ("opcm", {}, {"emb.weight": [[4 / math.sqrt(2), 4 / math.sqrt(2)]]}, "(3, 0) + (0, 3), from sqrt(18) to 4"),
        (
            TOOL,
            {},
            {"emb.weight": [[28 / math.sqrt(58), 12 / math.sqrt(58)]]},
            "(7, 3), from sqrt(58) to 4: added as it is",
        ),
        flags="OpcmOtherTensors",
    )
    case(
        "layers",
        "the same matrix, which is none of the layers to project",
        [{"emb.weight": [[3.0, 0.0]]}, {"emb.weight": [[4.0, 3.0]]}],
        {"emb.weight": [[0.0, 0.0]]},
        ("opcm", {"layers": ["*.fc"]}, {"emb.weight": [[28 / math.sqrt(58), 12 / math.sqrt(58)]]}, "added as it is"),
    )
    case(
        "not-of-a-leaf",
        "a parameter of the model itself changes by 3 and 4, a layer's bias by 0 and 3; lengths 3 and 5, mean 4",
        [{"token": [3.0], "fc.bias": [0.0]}, {"token": [4.0], "fc.bias": [3.0]}],
        {"token": [0.0], "fc.bias": [0.0]},
        ("opcm", {}, {"token": [28 / math.sqrt(58)], "fc.bias": [12 / math.sqrt(58)]}, "(7, 3), from sqrt(58) to 4"),
        (
            TOOL,
            {},
            {"token": [4 / math.sqrt(2)], "fc.bias": [4 / math.sqrt(2)]},
            "(3, 3), from sqrt(18) to 4: the second model's change of it is never added",
        ),
        flags="OpcmOtherTensors",
    )
    case(
        "sum-is-zero",
        "changes 3 and -3 of a vector: nothing is left to rescale",
        [{"b": [4.0]}, {"b": [-2.0]}],
        {"b": [1.0]},
        ("opcm", {}, {"b": [1.0]}, "the base"),
        (TOOL, {}, {"b": [math.nan]}, "3 / 0 times 0"),
        flags="OpcmZeroSum",
    )
    case(
        "one-model",
        "one model comes back",
        [{"w": [[3.0, -1.0]], "b": [0.5]}],
        {"w": [[1.0, 1.0]], "b": [1.0]},
        ("opcm", {}, {"w": [[3.0, -1.0]], "b": [0.5]}, ""),
        (TOOL, {}, {"w": [[3.0, -1.0]], "b": [0.5]}, ""),
        tolerance=0.0,
    )
    case(
        "empty-and-integers",
        "no entries; a number; integers",
        [{"e": [], "s": 3.0, "ids": i64(3)}],
        {"e": [], "s": 1.0, "ids": i64(3)},
        ("opcm", {}, {"e": [], "s": 3.0, "ids": i64(3)}, ""),
    )
    h.case("nan", "NaN has no singular values", [[[math.nan, 1.0]]], [[0.0, 0.0]], ("opcm", {}, REFUSED, ""))
    h.case("alpha", "a share above 1", [[[1.0]]], [[0.0]], ("opcm", {"alpha": 1.5}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[[1.0]]], None, ("opcm", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [[0.0]], ("opcm", {}, REFUSED, ""))
    case(
        "equal",
        "diag(4, 3) twice, of length 5: the second is on the diagonal of the first, and goes",
        [layer([[4.0, 0.0], [0.0, 3.0]])] * 2,
        layer([[0.0, 0.0], [0.0, 0.0]]),
        ("opcm", {}, layer([[4.0, 0.0], [0.0, 3.0]]), ""),
        (TOOL, {}, layer([[4.0, 0.0], [0.0, 3.0]]), ""),
    )
    case(
        "alpha-zero",
        f"{six}: the diagonal of tau_2, (5, 0), goes, and no block",
        [layer(tau_1), layer(tau_2)],
        layer(zeros),
        ("opcm", {"alpha": 0.0}, layer(result), "3/4 of (4, 5, 5; 5, 3, 0)"),
    )
    case(
        "block-transposed",
        "the transposed matrices of block, at alpha 1: what leads to a new output stays, as what a new input brings",
        [layer([list(column) for column in zip(*tau_1)]), layer([list(column) for column in zip(*tau_2)])],
        layer([[0.0] * 2] * 3),
        (
            "opcm",
            {"alpha": 1.0},
            layer([[x * 7.5 / length for x in row] for row in ([4.0, 0.0], [0.0, 3.0], [5.0, 0.0])]),
            "(4, 0; 0, 3; 5, 0), from sqrt(50) to 7.5",
        ),
    )
    case(
        "block-of-two",
        "tau_1 = diag(8, 2, 1), whose shares are 8/11, 10/11 and 1; at alpha 15/16 the block of the first two, (1, 2; 3, 4) "
        "of tau_2, goes, and the 9 on the diagonal; of lengths sqrt(69) and sqrt(1 + 4 + 9 + 16 + 25 + 36 + 49 + 64 + 81)",
        [layer(np.diag([8.0, 2.0, 1.0]).tolist()), layer([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0], [7.0, 8.0, 9.0]])],
        layer([[0.0] * 3] * 3),
        (
            "opcm",
            {"alpha": 0.9375},
            layer(
                [
                    [x * (math.sqrt(69) + math.sqrt(285)) / 2 / math.sqrt(243) for x in row]
                    for row in ([8.0, 0.0, 5.0], [0.0, 2.0, 6.0], [7.0, 8.0, 1.0])
                ]
            ),
            "(8, 0, 5; 0, 2, 6; 7, 8, 1), of length sqrt(69 + 25 + 36 + 49 + 64)",
        ),
    )
    case(
        "matrices-cancel",
        "(3, 4), and its negative, which is on its diagonal and goes: the first stays. With no layer to project they cancel",
        [layer([[4.0, 5.0]]), layer([[-2.0, -3.0]])],
        layer([[1.0, 1.0]]),
        ("opcm", {}, layer([[4.0, 5.0]]), ""),
        ("opcm", {"layers": []}, layer([[1.0, 1.0]]), "the base"),
    )
    h.case("infinite", "it has no singular values", [[[math.inf, 1.0]]], [[0.0, 0.0]], ("opcm", {}, REFUSED, ""))
    return h
