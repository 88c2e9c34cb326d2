"""Vectors of Pareto manifolds, a recipe of the weighted average."""

from __future__ import annotations

from typing import Any

from vector_cases import Hand, Paper, Test

STEMS = ("pareto_manifold",)
CODE = {"official:pareto": "nik-dim/pamal@26adf53 src/ll/subspace_modules.py:SubspaceConv.get_weight"}
PAPER = {
    "pareto_manifold-official-00": Paper({"weight": [0.3, 0.7], "normalize": False}, entry="linear"),
}


def accepts(test: Test) -> bool:
    """Of what was recorded: weights, not activations or gradients."""
    return "alpha" in test.params and test.stats is None


def hand() -> Hand:
    h = Hand("pareto", CODE)
    members = [[4.0, 0.0, 2.0], [0.0, 4.0, 2.0]]

    def both(alpha: list[float], expect: Any, why: str = "") -> list[Any]:
        plain = {"weight": alpha, "normalize": False}
        return [("linear", plain, expect, why), ("official:pareto", {"alpha": alpha}, expect, why)]

    h.case("quarter", "1/4 and 3/4", members, None, *both([0.25, 0.75], [1.0, 3.0, 2.0]))
    h.case("corner", "a member itself", members, None, *both([0.0, 1.0], [0.0, 4.0, 2.0]))
    h.case(
        "not-on-the-simplex",
        "preferences of sum 3/4 are taken as they are",
        members,
        None,
        *both([0.5, 0.25], [2.0, 1.0, 1.5]),
        flags="ParetoSimplex",
    )
    h.case(
        "beyond",
        "3/2 and -1/2: the line goes on",
        members,
        None,
        *both([1.5, -0.5], [6.0, -2.0, 2.0]),
        flags="ParetoSimplex",
    )
    h.case(
        "shared",
        "what exists once in the authors' model is stored with each member: 3/4 + 9/4 = 3",
        [{"w": [4.0], "bn.running_mean": [3.0]}, {"w": [0.0], "bn.running_mean": [3.0]}],
        None,
        *both([0.25, 0.75], {"w": [1.0], "bn.running_mean": [3.0]}),
        flags="ParetoSharedTensors",
    )
    h.case("three", "1/2, 1/4, 1/4", [[4.0], [0.0], [8.0]], None, *both([0.5, 0.25, 0.25], [4.0]))
    return h
