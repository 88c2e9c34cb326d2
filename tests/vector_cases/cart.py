"""Vectors of cart."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, fraction, i64

CODE = {"official:cart": "JH-GEECS/CART@964cfd7 src/merging.py:StaticMergeModule._merge_weights"}
PAPER = {"cart-official-00": Paper({"rank_ratio": 0.16, "lambda_": 1.5})}
SLACK = 2e-6  # singular vectors are rounded, and so is a third

STAGED = ("cart-rank-one", "cart-rank-two", "cart-rank-zero", "cart-at-least-one", "cart-lambda-default")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    theta_avg = sum(given.models) / Fraction(len(given.models))
    tau = [theta - theta_avg for theta in given.models]
    ratio = given.params.get("rank_ratio", 0.12)
    k = max(1, int(ratio * 2)) if ratio else 0
    kept = [[x * 0 for x in tau], [leading(x) for x in tau], tau][k]
    return {
        1: {"theta_avg": theta_avg},
        2: {"tau": tau},
        3: {"k": k, "tau": kept},
        4: {"result": theta_avg + Fraction(given.params.get("lambda_", 2.0)) * sum(kept)},
    }


def leading(tau: Any) -> Any:
    """The first singular term of a diagonal matrix, or of a P + b Q, P = (1, 1)^T (1, 2, 2) and Q = (1, -1)^T (2, 1, -2)."""
    if tau.shape == (2, 2):
        return np.where(abs(tau) == abs(tau).max(), tau, Fraction(0))
    P, Q = (fraction(np.outer(u, v)) for u, v in (([1, 1], [1, 2, 2]), ([1, -1], [2, 1, -2])))
    a, b = ((tau * x).sum() / (x * x).sum() for x in (P, Q))
    return a * P if abs(a) > abs(b) else b * Q


def hand() -> Hand:
    h = Hand("cart", CODE)

    def case(
        id: str,
        comment: str,
        models: Any,
        ratio: float,
        scale: float,
        expect: Any,
        why: str = "",
        name: str = "attn.w",
    ) -> None:
        given = [{name: x} for x in models]
        zero = {name: zeros(models[0])}
        h.case(
            id, comment, given, zero,
            ("cart", {"rank_ratio": ratio, "lambda_": scale}, {name: expect}, why),
            ("official:cart", {"rank_ratio": ratio, "prior": scale}, {name: expect}, "the same"),
            tolerance=SLACK,
        )  # fmt: skip

    six = (
        "average 2; with P = (1, 1)^T (1, 2, 2) and Q = (1, -1)^T (2, 1, -2), at right angles and of one norm, the models "
        "are 2 + 3 P - Q, 2 - 2 P - Q, 2 - P + 2 Q"
    )
    models = [
        [[3.0, 7.0, 10.0], [7.0, 9.0, 6.0]],
        [[-2.0, -3.0, 0.0], [2.0, -1.0, -4.0]],
        [[5.0, 2.0, -4.0], [-3.0, -2.0, 4.0]],
    ]
    twos = [[2.0] * 3] * 2
    case("rank-one", six, models, 0.5, 0.5, [[4.5, 4.0, 1.0], [0.5, 2.0, 5.0]], "3 P - 2 P + 2 Q = P + 2 Q, half of it")
    case("rank-two", six, models, 1.0, 0.5, twos, "all of the terms, which add up to 0")
    case("rank-zero", six, models, 0.0, 0.5, twos, "none of the terms")
    case("at-least-one", six, models, 0.25, 1.0, [[7.0, 6.0, 0.0], [-1.0, 2.0, 8.0]], "int(1/4 of 2) = 0 becomes 1")
    case("lambda-zero", six, models, 0.5, 0.0, twos, "the average")
    case(
        "two-models",
        "their differences from the average are opposite, and so is what is kept of them",
        [[[4.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 3.0]]],
        0.5,
        5.0,
        [[2.0, 0.0], [0.0, 2.0]],
        "the average",
    )
    case("equal", "three equal models", [twos, twos, twos], 0.5, 2.0, twos)
    case("one-model", "its difference from itself is 0", [models[0]], 0.5, 2.0, models[0])
    case("name", six + "; no name of an attention or MLP layer", models, 0.5, 0.5, twos, "the average", name="proj")
    case(
        "vector", "three vectors", [[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]], 0.5, 2.0, [1.0, 1.0], "the average", name="mlp.bias"
    )
    h.case(
        "ln",
        six + "; a matrix whose name has ln in it, by accident",
        [{"vilns.attn.w": x} for x in models],
        {"vilns.attn.w": twos},
        ("cart", {"rank_ratio": 0.5, "lambda_": 0.5}, {"vilns.attn.w": [[4.5, 4.0, 1.0], [0.5, 2.0, 5.0]]}, "a matrix"),
        ("official:cart", {"rank_ratio": 0.5, "prior": 0.5}, {"vilns.attn.w": twos}, "the average"),
        flags="CartNames",
        tolerance=SLACK,
    )
    h.case(
        "attn-vector",
        "a vector with attn in its name and neither ln nor bias",
        [{"attn.scale": x} for x in ([3.0, 0.0], [0.0, 3.0], [0.0, 0.0])],
        {"attn.scale": [0.0, 0.0]},
        ("cart", {}, {"attn.scale": [1.0, 1.0]}, "the average"),
        ("official:cart", {}, OPEN, "it has no singular values, and their code fails"),
        flags="CartVector",
        tolerance=SLACK,
    )
    cube = [[[[y] for y in row] for row in x] for x in models]
    h.case(
        "many-axes",
        six + "; of shape (2, 3, 1)",
        [{"mlp.conv.w": x} for x in cube],
        {"mlp.conv.w": [[[2.0]] * 3] * 2},
        ("cart", {"rank_ratio": 0.5, "lambda_": 0.5},
         {"mlp.conv.w": [[[4.5], [4.0], [1.0]], [[0.5], [2.0], [5.0]]]}, "a row for each index of the first axis"),
        ("official:cart", {"rank_ratio": 0.5, "prior": 0.5}, OPEN, "its slices take the wrong axes"),
        flags="CartVector",
        tolerance=SLACK,
    )  # fmt: skip
    h.case(
        "layers",
        six + "; all tensors named",
        [{"proj": x} for x in models],
        None,
        ("cart", {"rank_ratio": 0.5, "lambda_": 0.5, "layers": ["*"]}, {"proj": [[4.5, 4.0, 1.0], [0.5, 2.0, 5.0]]}, ""),
        tolerance=SLACK,
    )
    nan = float("nan")
    h.case(
        "nan",
        "a matrix with NaN has no singular values; elsewhere NaN is averaged",
        [{"attn.w": [[nan, 1.0]]}, {"attn.w": [[1.0, 1.0]]}],
        None,
        ("cart", {}, REFUSED, ""),
    )
    h.case(
        "nan-vector",
        "NaN is averaged",
        [{"mlp.bias": [nan, 1.0]}, {"mlp.bias": [1.0, 3.0]}],
        None,
        ("cart", {}, {"mlp.bias": [nan, 2.0]}, ""),
    )
    h.case(
        "empty-scalar-integers",
        "a number is averaged; integers are the first model's",
        [{"mlp.e": [[]], "mlp.s": 8.0, "ids": i64(3, 4)}, {"mlp.e": [[]], "mlp.s": 4.0, "ids": i64(3, 4)}],
        None,
        ("cart", {}, {"mlp.e": [[]], "mlp.s": 6.0, "ids": i64(3, 4)}, ""),
    )
    h.case("ratio-above-one", "rank_ratio 2", [[1.0]], None, ("cart", {"rank_ratio": 2.0}, REFUSED, ""))
    h.case("no-models", "nothing to average", [], None, ("cart", {}, REFUSED, ""))
    h.case(
        "lambda-default",
        "diag(6, 0), diag(0, 6) and diag(0, -3): the average diag(2, 1), differences diag(4, -1), diag(-2, 5), "
        "diag(-2, -4), of which the first singular terms are diag(4, 0), diag(0, 5), diag(0, -4): diag(2, 1) + 2 diag(4, 1)",
        [
            {"attn": [[6.0, 0.0], [0.0, 0.0]]},
            {"attn": [[0.0, 0.0], [0.0, 6.0]]},
            {"attn": [[0.0, 0.0], [0.0, -3.0]]},
        ],
        None,
        ("cart", {}, {"attn": [[10.0, 0.0], [0.0, 3.0]]}, "lambda is 2 by default"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "ratio-default",
        six + "; int(0.12 * 2) = 0 becomes 1",
        [{"attn.w": x} for x in models],
        None,
        ("cart", {"lambda_": 0.5}, {"attn.w": [[4.5, 4.0, 1.0], [0.5, 2.0, 5.0]]}, "rank_ratio is 0.12 by default"),
        tolerance=SLACK,
    )
    h.case(
        "infinity",
        "a matrix with an infinity has no singular values",
        [{"attn.w": [[float("inf"), 1.0]]}, {"attn.w": [[1.0, 1.0]]}],
        None,
        ("cart", {}, REFUSED, ""),
    )
    h.case("ratio-negative", "rank_ratio -1/2", [[1.0]], None, ("cart", {"rank_ratio": -0.5}, REFUSED, ""))
    h.case(
        "overflowing-sum",
        "two models of 2^127, the largest power of two in float32: 2^126 + 2^126, where a sum before the division overflows",
        [[2.0**127], [2.0**127]],
        None,
        ("cart", {}, [2.0**127], ""),
    )
    return h


def zeros(x: Any) -> Any:
    return [zeros(y) for y in x] if isinstance(x, list) else 0.0
