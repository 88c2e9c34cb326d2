"""Vectors of bitdelta."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Tensors, Test, i64, origin

CODE = {
    "official:bitdelta": "FasterDecoding/BitDelta@ecbee1e bitdelta/diff.py:compress_diff",
    "fusion_bench:bitdelta": "tanganke/fusion_bench@54c9e8c fusion_bench/method/bitdelta/bitdelta_utils/diff.py",
}
NAME = "layers.0.mlp.up_proj.weight"

STAGED = ("bitdelta-by-hand", "bitdelta-zero-sign", "bitdelta-no-change", "bitdelta-one-magnitude", "bitdelta-columns")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    delta = given.models[0] - given.base
    B = np.where(delta >= 0, Fraction(1), Fraction(-1))
    alpha = sum(abs(delta.ravel())) / delta.size
    return {1: {"delta": delta}, 2: {"B": B}, 3: {"alpha": alpha}, 4: {"result": given.base + alpha * B}}


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """One matrix, under its own name and under one that the authors' code would compress."""
    base, model, out = tensors["base/w"], tensors["model0/w"], tensors["out/w"]
    asked: list[tuple[str, dict[str, Any], str]] = [("bitdelta", {"layers": ["*"]}, "w"), ("official:bitdelta", {}, NAME)]
    return [
        Test(
            id=id + ("" if ":" in entry else "-paper"),
            entry=entry,
            params=params,
            models=[{name: model}],
            base={name: base},
            expect={name: out},
            comment=meta["notes"].partition(";")[0],
            source=origin(meta["source"]),
            tolerance=float(meta["tolerance"]),
        )
        for entry, params, name in asked
    ]


def hand() -> Hand:
    h = Hand("bitdelta", CODE)

    def case(id: str, comment: str, model: Any, base: Any, expect: Any, flags: str = "BitDeltaColumns") -> None:
        """Of few columns, which the authors' code cannot pack: their entries have the result that it would have."""
        h.case(
            id, comment, [model], base,
            ("bitdelta", {}, expect, ""),
            ("official:bitdelta", {}, expect, ""),
            ("fusion_bench:bitdelta", {}, expect, ""),
            flags=flags,
        )  # fmt: skip

    case(
        "by-hand",
        "base 1; delta = (2, -4), (1, 5): the mean of the magnitudes is 3, the signs + - + +",
        {NAME: [[3.0, -3.0], [2.0, 6.0]]},
        {NAME: [[1.0, 1.0], [1.0, 1.0]]},
        {NAME: [[4.0, -2.0], [4.0, 4.0]]},
    )
    case(
        "zero-sign",
        "delta = (0, -4): mean 2, and 0 counts as +",
        {NAME: [[1.0, -3.0]]},
        {NAME: [[1.0, 1.0]]},
        {NAME: [[3.0, -1.0]]},
        flags="BitDeltaColumns BitDeltaZeroSign",
    )
    case("no-change", "mean 0", {NAME: [[1.0, -3.0]]}, {NAME: [[1.0, -3.0]]}, {NAME: [[1.0, -3.0]]})
    case(
        "one-magnitude",
        "delta = (2, -2): nothing is lost",
        {NAME: [[3.0, -1.0]]},
        {NAME: [[1.0, 1.0]]},
        {NAME: [[3.0, -1.0]]},
    )
    case(
        "each-matrix",
        "delta = (2, 4) and (10, -20), means 3 and 15",
        {NAME: [[2.0, 4.0]], "layers.1.self_attn.q_proj.weight": [[10.0, -20.0]]},
        {NAME: [[0.0, 0.0]], "layers.1.self_attn.q_proj.weight": [[0.0, 0.0]]},
        {NAME: [[3.0, 3.0]], "layers.1.self_attn.q_proj.weight": [[15.0, -15.0]]},
    )
    others = {
        "embed.weight": [[2.0, 4.0]],
        "norm.weight": [2.0, 4.0],
        "mlp.fc1.weight": [[2.0, 4.0]],
        "lm_head.weight": [5.0],
    }
    case(
        "other-tensors",
        "embeddings, norms, heads, and linear layers with other names stay the fine-tune's",
        others,
        {"embed.weight": [[0.0, 0.0]], "norm.weight": [0.0, 0.0], "mlp.fc1.weight": [[0.0, 0.0]], "lm_head.weight": [0.0]},
        others,
        flags="",
    )
    bias = "layers.0.self_attn.q_proj.bias"
    h.case(
        "bias",
        "a bias of a compressed layer: 7 in the fine-tune, 5 in the base",
        [{NAME: [[3.0, -1.0]], bias: [7.0]}],
        {NAME: [[1.0, 1.0]], bias: [5.0]},
        ("bitdelta", {}, {NAME: [[3.0, -1.0]], bias: [7.0]}, "the fine-tune's"),
        ("official:bitdelta", {}, {NAME: [[3.0, -1.0]], bias: [5.0]}, "the base's stays"),
        ("fusion_bench:bitdelta", {}, {NAME: [[3.0, -1.0]], bias: [5.0]}, "as there"),
        flags="BitDeltaBias BitDeltaColumns",
    )
    norm = {"norm.weight": [3.0], "norm.bias": [7.0], "scale": [2.0]}
    restored = {"norm.weight": [3.0], "norm.bias": [5.0], "scale": [1.0]}
    h.case(
        "norm-bias",
        "a norm: weight 3, bias 7, in the base 1 and 5; a parameter of the whole model: 2, in the base 1",
        [norm],
        {"norm.weight": [1.0], "norm.bias": [5.0], "scale": [1.0]},
        ("bitdelta", {}, norm, "the fine-tune's"),
        ("official:bitdelta", {}, restored, "but for weights the base's"),
        ("fusion_bench:bitdelta", {}, restored, "but for weights the base's"),
        flags="BitDeltaBias",
    )
    wide = {NAME: [[4.0, -4.0] * 16], "layers.0.self_attn.q_proj.weight": [[1.0, -7.0] * 16], "norm.weight": [3.0]}
    ones = {NAME: [[4.0, 4.0] * 16], "layers.0.self_attn.q_proj.weight": [[1.0, 1.0] * 16], "norm.weight": [1.0]}
    signs = {NAME: [[8.0, 0.0] * 16], "layers.0.self_attn.q_proj.weight": [[5.0, -3.0] * 16], "norm.weight": [3.0]}
    h.case(
        "word",
        "rows of 32, one word of bits: delta = (0, -8) and (0, -8) sixteen times, means 4; a bias",
        [wide | {bias: [7.0]}],
        ones | {bias: [5.0]},
        ("bitdelta", {}, signs | {bias: [7.0]}, "the fine-tune's"),
        ("official:bitdelta", {}, signs | {bias: [5.0]}, "the base's"),
        ("fusion_bench:bitdelta", {}, signs | {bias: [5.0]}, "the base's"),
        flags="BitDeltaBias BitDeltaZeroSign",
    )
    h.case(
        "columns",
        "three columns; delta = (2, -4, 6): mean 4",
        [{NAME: [[2.0, -4.0, 6.0]]}],
        {NAME: [[0.0, 0.0, 0.0]]},
        ("bitdelta", {}, {NAME: [[4.0, -4.0, 4.0]]}, ""),
        ("official:bitdelta", {}, OPEN, "no multiple of 32, an assertion fails"),
        ("fusion_bench:bitdelta", {}, OPEN, "no multiple of 32, an assertion fails"),
        flags="BitDeltaColumns",
    )
    h.case(
        "layers",
        "all tensors named: vectors and numbers too",
        [{"b": [2.0, -4.0], "s": 5.0, "e": []}],
        {"b": [0.0, 0.0], "s": 1.0, "e": []},
        ("bitdelta", {"layers": ["*"]}, {"b": [3.0, -3.0], "s": 5.0, "e": []}, "a number comes back"),
    )
    h.case(
        "no-layers",
        "none named: the fine-tune",
        [{NAME: [[2.0, -4.0]]}],
        {NAME: [[0.0, 0.0]]},
        ("bitdelta", {"layers": []}, {NAME: [[2.0, -4.0]]}, ""),
    )
    case(
        "integers",
        "integers are the base's",
        {NAME: [[2.0, -2.0]], "ids": i64(3, 4)},
        {NAME: [[0.0, 0.0]], "ids": i64(3, 4)},
        {NAME: [[2.0, -2.0]], "ids": i64(3, 4)},
    )
    nan, inf = float("nan"), float("inf")
    case(
        "nan-inf",
        "one NaN makes the scale NaN, one infinity makes it infinite; the other matrix is not touched by it",
        {NAME: [[nan, 1.0]], "a.mlp.o_proj.weight": [[inf, -1.0]], "b.mlp.o_proj.weight": [[2.0, -2.0]]},
        {NAME: [[0.0, 0.0]], "a.mlp.o_proj.weight": [[0.0, 0.0]], "b.mlp.o_proj.weight": [[0.0, 0.0]]},
        {NAME: [[nan, nan]], "a.mlp.o_proj.weight": [[inf, -inf]], "b.mlp.o_proj.weight": [[2.0, -2.0]]},
    )
    h.case("two-models", "there is one", [[1.0], [2.0]], [0.0], ("bitdelta", {}, REFUSED, ""))
    h.case("no-base", "a change is a difference from a base", [[1.0]], None, ("bitdelta", {}, REFUSED, ""))
    h.case("no-models", "nothing to compress", [], [0.0], ("bitdelta", {}, REFUSED, ""))
    case(
        "unchanged-entries",
        "base 1; delta = (0, 6, 0): mean 2, which the entries that stayed move by, too",
        {NAME: [[1.0, 7.0, 1.0]]},
        {NAME: [[1.0, 1.0, 1.0]]},
        {NAME: [[3.0, 3.0, 3.0]]},
        flags="BitDeltaZeroSign",
    )
    case("one-entry", "delta = -3: nothing is lost", {NAME: [[-2.0]]}, {NAME: [[1.0]]}, {NAME: [[-2.0]]})
    case(
        "other-names",
        "no name of Llama's: the fine-tune",
        {"h.0.attn.c_attn.weight": [[2.0, 4.0]], "h.0.mlp.c_fc.weight": [[2.0, 4.0]]},
        {"h.0.attn.c_attn.weight": [[0.0, 0.0]], "h.0.mlp.c_fc.weight": [[0.0, 0.0]]},
        {"h.0.attn.c_attn.weight": [[2.0, 4.0]], "h.0.mlp.c_fc.weight": [[2.0, 4.0]]},
    )
    h.case(
        "empty",
        "no entries have no mean",
        [{NAME: [[]], "layers.1.mlp.down_proj.weight": [[2.0, -4.0]]}],
        {NAME: [[]], "layers.1.mlp.down_proj.weight": [[0.0, 0.0]]},
        ("bitdelta", {}, {NAME: [[]], "layers.1.mlp.down_proj.weight": [[3.0, -3.0]]}, ""),
    )
    h.case(
        "sum-in-float64",
        "float32: the magnitudes 2^25, 1, 1, 1 and 1 add up to 2^25 + 4, which five divide: 6710887.2, in float32 6710887; "
        "added in float32 from the left they stay 2^25, and a fifth of that is 6710886.5",
        [{NAME: [[2.0**25, 1.0, 1.0, 1.0, 1.0]]}],
        {NAME: [[0.0] * 5]},
        ("bitdelta", {}, {NAME: [[6710887.0] * 5]}, ""),
    )
    h.case(
        "axes",
        "four axes; delta = (1, -3, 4, 0): the mean of the magnitudes is 2, the signs + - + +",
        [{NAME: [[[[2.0, -2.0]]], [[[5.0, 1.0]]]]}],
        {NAME: [[[[1.0, 1.0]]], [[[1.0, 1.0]]]]},
        ("bitdelta", {}, {NAME: [[[[3.0, -1.0]]], [[[3.0, 3.0]]]]}, ""),
    )
    return h
