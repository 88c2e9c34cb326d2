"""Vectors of lines."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, Paper, i64

CODE = {"official:lines": "wang-kee/LiNeS@43a7bdd src/eval/eval.py:LiNeS_scaling"}
PAPER = {
    "lines-official-00": Paper({"blocks": 4, "alpha": 0.2, "beta": 0.8}),
    "lines-official-03": Paper({"blocks": 4, "alpha": 0.0, "beta": 1.0}),
}
FLAGS = {"lines-official-00": ["LinesHead"], "lines-official-03": ["LinesHead"]}

STAGED = ("lines-three-models", "lines-first-block", "lines-second-of-three", "lines-one-block-of-one", "lines-in-no-block")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    alpha = Fraction(given.params.get("alpha", 1 / len(tau)))
    last, block = given.params["blocks"] - 1, re.search(r"\.(\d+)(?=\.)", given.name)
    place = Fraction(0) if block is None else Fraction(int(block[1]), last) if last else Fraction(1)
    scale = alpha + Fraction(given.params["beta"]) * place
    return {1: {"tau": tau}, 2: {"scale": scale}, 3: {"result": given.base + scale * sum(tau)}}


def hand() -> Hand:
    h = Hand("lines", CODE)

    def plain(blocks: int, alpha: float, beta: float, **more: Any) -> dict[str, Any]:
        return {"blocks": blocks, "alpha": alpha, "beta": beta} | more

    def official(blocks: int, alpha: float, beta: float) -> dict[str, Any]:
        return {"num_blocks": blocks, "alpha": alpha, "beta": beta}

    def zeros(model: dict[str, Any]) -> dict[str, Any]:
        return {name: [0.0] * len(x) for name, x in model.items()}

    three = {"embed.w": [4.0], "layers.0.w": [4.0], "layers.1.w": [4.0], "layers.2.w": [4.0], "norm.w": [4.0]}
    by_hand = {"embed.w": [1.0], "layers.0.w": [1.0], "layers.1.w": [2.5], "layers.2.w": [4.0], "norm.w": [1.0]}
    h.case(
        "by-hand",
        "three blocks, alpha 1/4, beta 3/4: scales 1/4, 5/8, 1, and 1/4 for what is in no block; tau = 4",
        [three],
        zeros(three),
        ("lines", plain(3, 0.25, 0.75), by_hand, ""),
        ("official:lines", official(3, 0.25, 0.75), by_hand, ""),
    )
    two = [{"a.0.w": [2.0], "a.1.w": [2.0], "w": [2.0]}, {"a.0.w": [6.0], "a.1.w": [-4.0], "w": [0.0]}]
    summed = {"a.0.w": [4.0], "a.1.w": [-2.0], "w": [1.0]}
    h.case(
        "sum",
        "two models; the sums of tau are 8, -2, 2; alpha 1/2 and beta 1/2: scales 1/2, 1, 1/2",
        two,
        zeros(two[0]),
        ("lines", plain(2, 0.5, 0.5), summed, ""),
        ("official:lines", official(2, 0.5, 0.5), summed, ""),
    )
    h.case(
        "alpha-default",
        "two models; alpha is 1/2, one over their number",
        two,
        zeros(two[0]),
        ("lines", {"blocks": 2, "beta": 0.5}, summed, ""),
        ("official:lines", {"num_blocks": 2, "beta": 0.5}, REFUSED, "alpha must be given"),
        flags="LinesAlpha",
    )
    one = {"a.0.w": [4.0], "w": [4.0]}
    h.case(
        "one-block",
        "one block, alpha 1/4, beta 1/2: it is the last, 3/4",
        [one],
        zeros(one),
        ("lines", plain(1, 0.25, 0.5), {"a.0.w": [3.0], "w": [1.0]}, ""),
        ("official:lines", official(1, 0.25, 0.5), REFUSED, "0 / 0"),
        flags="LinesOneBlock",
    )
    names = {"blocks.1.mlp.0.w": [4.0], "block.1.layer.0.w": [4.0]}
    h.case(
        "first-number",
        "two blocks, alpha 1/4, beta 1/2: names with two numbers, of block 1",
        [names],
        zeros(names),
        ("lines", plain(2, 0.25, 0.5), {key: [3.0] for key in names}, "1/4 + 1/2: the first number counts"),
        ("official:lines", official(2, 0.25, 0.5), {key: [1.0] for key in names}, "1/4: .0. is looked for before .1."),
        flags="LinesFirstNumber",
    )
    h.case(
        "outside",
        "two blocks, and a tensor of block 5",
        [{"a.5.w": [4.0]}],
        {"a.5.w": [0.0]},
        ("lines", plain(2, 0.25, 0.5), REFUSED, "blocks is too small, or the tensor is in none"),
        ("official:lines", official(2, 0.25, 0.5), {"a.5.w": [1.0]}, "alpha"),
        flags="LinesOutside",
    )
    head = {"a.0.w": [4.0], "head.1.w": [4.0]}
    h.case(
        "head",
        "two blocks, alpha 1/4, beta 1/2, and a head with a number in its name",
        [head],
        zeros(head),
        ("lines", plain(2, 0.25, 0.5), {"a.0.w": [1.0], "head.1.w": [3.0]}, "it is taken for block 1"),
        ("official:lines", official(2, 0.25, 0.5), {"a.0.w": [1.0], "head.1.w": [3.0]}, "it is taken for block 1"),
        flags="LinesHead",
    )
    h.case(
        "head-left-out",
        "the same with layers = a.*",
        [head],
        zeros(head),
        ("lines", plain(2, 0.25, 0.5, layers=["a.*"]), {"a.0.w": [1.0], "head.1.w": [1.0]}, "both have alpha"),
        flags="LinesHead",
    )
    ends = {"1.w": [4.0], "a.1": [4.0], "a.b1.w": [4.0], "w": [4.0]}
    h.case(
        "no-number",
        "two blocks, alpha 1/4: a number counts between two dots only",
        [ends],
        zeros(ends),
        ("lines", plain(2, 0.25, 0.5), {key: [1.0] for key in ends}, ""),
        ("official:lines", official(2, 0.25, 0.5), {key: [1.0] for key in ends}, ""),
    )
    h.case(
        "identity",
        "alpha 1, beta 0: the model",
        [{"a.0.w": [3.0], "w": [-2.0]}],
        {"a.0.w": [1.0], "w": [1.0]},
        ("lines", plain(2, 1.0, 0.0), {"a.0.w": [3.0], "w": [-2.0]}, ""),
        ("official:lines", official(2, 1.0, 0.0), {"a.0.w": [3.0], "w": [-2.0]}, ""),
    )
    h.case(
        "alpha-zero",
        "alpha 0, beta 1: the first block and all outside of blocks are the base's, the last is the model's",
        [{"a.0.w": [3.0], "a.1.w": [3.0], "w": [-2.0]}],
        {"a.0.w": [1.0], "a.1.w": [1.0], "w": [1.0]},
        ("lines", plain(2, 0.0, 1.0), {"a.0.w": [1.0], "a.1.w": [3.0], "w": [1.0]}, ""),
        ("official:lines", official(2, 0.0, 1.0), {"a.0.w": [1.0], "a.1.w": [3.0], "w": [1.0]}, ""),
    )
    nan, inf = float("nan"), float("inf")
    h.case(
        "nan-inf",
        "alpha 0, beta 1, two blocks: 0 times infinity is NaN",
        [{"a.0.w": [nan, inf], "a.1.w": [nan, inf]}],
        {"a.0.w": [0.0, 0.0], "a.1.w": [0.0, 0.0]},
        ("lines", plain(2, 0.0, 1.0), {"a.0.w": [nan, nan], "a.1.w": [nan, inf]}, ""),
        ("official:lines", official(2, 0.0, 1.0), {"a.0.w": [nan, nan], "a.1.w": [nan, inf]}, ""),
    )
    h.case(
        "empty-scalar-integers",
        "a number is one entry; integers are the base's",
        [{"e": [], "a.1.s": 8.0, "ids": i64(3, 4)}],
        {"e": [], "a.1.s": 0.0, "ids": i64(3, 4)},
        ("lines", plain(2, 0.25, 0.25), {"e": [], "a.1.s": 4.0, "ids": i64(3, 4)}, ""),
    )
    h.case("no-blocks", "blocks 0", [[1.0]], [0.0], ("lines", plain(0, 0.5, 0.5), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("lines", plain(2, 0.5, 0.5), REFUSED, ""))
    h.case("no-models", "nothing to scale", [], [0.0], ("lines", plain(2, 0.5, 0.5), REFUSED, ""))
    h.case(
        "block-past-the-last",
        "block 2 of 2, which are counted from 0",
        [{"h.2.w": [1.0]}],
        {"h.2.w": [0.0]},
        ("lines", {"blocks": 2, "alpha": 0.5, "beta": 0.5}, REFUSED, ""),
    )
    h.case(
        "second-number-larger",
        "the first number says the block, 0: half of 4",
        [{"h.0.e.5.w": [4.0]}],
        {"h.0.e.5.w": [0.0]},
        ("lines", {"blocks": 2, "alpha": 0.5, "beta": 0.5}, {"h.0.e.5.w": [2.0]}, ""),
    )
    h.case(
        "three-models",
        "base 1; tau = (2, -2), (4, 6), (2, 0) of sum (8, 4); the last of two blocks: 1/4 + 1/2",
        [{"a.1.w": [3.0, -1.0]}, {"a.1.w": [5.0, 7.0]}, {"a.1.w": [3.0, 1.0]}],
        {"a.1.w": [1.0, 1.0]},
        ("lines", plain(2, 0.25, 0.5), {"a.1.w": [7.0, 4.0]}, "1 + 6, 1 + 3"),
    )
    h.case(
        "first-block",
        "base 1; tau = (4, 8); the first of two blocks, of which beta 8 says nothing",
        [{"a.0.w": [5.0, 9.0]}],
        {"a.0.w": [1.0, 1.0]},
        ("lines", plain(2, 0.25, 8.0), {"a.0.w": [2.0, 3.0]}, "a quarter of it"),
    )
    h.case(
        "second-of-three",
        "two models, tau of sum (8, -4); alpha is 1/2 if not given, and the second of three blocks is half way: 1/2 + 1/4",
        [{"a.1.w": [6.0, -8.0]}, {"a.1.w": [2.0, 4.0]}],
        {"a.1.w": [0.0, 0.0]},
        ("lines", {"blocks": 3, "beta": 0.5}, {"a.1.w": [6.0, -3.0]}, ""),
    )
    h.case(
        "one-block-of-one",
        "tau = 8; one block is the last: 1/4 + 1/2",
        [{"a.0.w": [8.0]}],
        {"a.0.w": [0.0]},
        ("lines", plain(1, 0.25, 0.5), {"a.0.w": [6.0]}, ""),
    )
    h.case(
        "in-no-block",
        "tau = 8; no number between dots: 1/4 of it",
        [{"a.w": [8.0]}],
        {"a.w": [0.0]},
        ("lines", plain(2, 0.25, 0.5), {"a.w": [2.0]}, ""),
    )
    h.case(
        "identity-of-a-sum",
        "alpha 1, beta 0; base 1; tau = 2 and 4: 1 + 6, in every block",
        [{"a.0.w": [3.0], "a.1.w": [3.0]}, {"a.0.w": [5.0], "a.1.w": [5.0]}],
        {"a.0.w": [1.0], "a.1.w": [1.0]},
        ("lines", plain(2, 1.0, 0.0), {"a.0.w": [7.0], "a.1.w": [7.0]}, ""),
    )
    h.case(
        "task-arithmetic",
        "beta 0, alpha 1/2; base 1; tau = 2 and 4: 1 + 6/2, in every block and outside",
        [{"a.0.w": [3.0], "a.1.w": [3.0], "w": [3.0]}, {"a.0.w": [5.0], "a.1.w": [5.0], "w": [5.0]}],
        {"a.0.w": [1.0], "a.1.w": [1.0], "w": [1.0]},
        ("lines", plain(2, 0.5, 0.0), {"a.0.w": [4.0], "a.1.w": [4.0], "w": [4.0]}, ""),
    )
    towers = {"text.blocks.0.w": [4.0], "text.blocks.1.w": [4.0], "visual.blocks.0.w": [4.0], "visual.blocks.1.w": [4.0]}
    h.case(
        "two-towers",
        "two blocks in each of two towers: scales 1/4 and 3/4 in both",
        [towers],
        zeros(towers),
        (
            "lines",
            plain(2, 0.25, 0.5),
            {"text.blocks.0.w": [1.0], "text.blocks.1.w": [3.0], "visual.blocks.0.w": [1.0], "visual.blocks.1.w": [3.0]},
            "",
        ),
        (
            "lines",
            plain(2, 0.25, 0.5, layers=["visual.*"]),
            {"text.blocks.0.w": [1.0], "text.blocks.1.w": [1.0], "visual.blocks.0.w": [1.0], "visual.blocks.1.w": [3.0]},
            "a tower of which the globs name nothing has alpha throughout",
        ),
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [{"a.0.w": [-0.0, 2.0]}],
        {"a.0.w": [-0.0, -0.0]},
        ("lines", plain(2, 0.5, 0.5), {"a.0.w": [0.0, 1.0]}, ""),
    )
    h.case(
        "equal-models",
        "tau = 4 twice: 1 + 1/4 (4 + 4), and 1 + (4 + 4) in the last of two blocks",
        [{"a.1.w": [5.0], "w": [5.0]}] * 2,
        {"a.1.w": [1.0], "w": [1.0]},
        ("lines", plain(2, 0.25, 0.75), {"a.1.w": [9.0], "w": [3.0]}, ""),
    )
    h.case(
        "all-base",
        "nothing to scale",
        [{"a.1.w": [5.0], "w": [-0.5]}] * 2,
        {"a.1.w": [5.0], "w": [-0.5]},
        ("lines", plain(2, 0.25, 0.75), {"a.1.w": [5.0], "w": [-0.5]}, ""),
    )
    return h
