"""Vectors of Pareto manifolds, a recipe of the weighted average."""

from __future__ import annotations

from typing import Any

from vector_cases import REFUSED, Hand, Paper, Test, i64

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
    h.case("first-corner", "a member itself", members, None, *both([1.0, 0.0], [4.0, 0.0, 2.0]))
    h.case(
        "equal-preferences",
        "the uniform soup, (4 + 0) / 2, (0 + 4) / 2, 2",
        members,
        None,
        *both([0.5, 0.5], [2.0, 2.0, 2.0]),
    )
    h.case(
        "zeros",
        "1 * -0.0 + 0 * 3 = 0.0; comparing values, as runners do, does not tell it from -0.0",
        [[-0.0], [3.0]],
        None,
        *both([1.0, 0.0], [0.0]),
    )
    h.case(
        "equal-members",
        "float64: 0.3 * 3 is 0.8999999999999999 and 0.7 * 3 is 2.0999999999999996",
        [[3.0], [3.0]],
        None,
        *both([0.3, 0.7], [2.9999999999999996]),
        dtype="F64",
    )
    h.case(
        "normalized",
        "preferences 1 and 3, divided by 4",
        members,
        None,
        ("linear", {"weight": [1.0, 3.0]}, [1.0, 3.0, 2.0], ""),
        ("official:pareto", {"alpha": [1.0, 3.0]}, [4.0, 12.0, 8.0], "as they are"),
        flags="ParetoSimplex",
    )
    counted = [{"w": [4.0], "n": i64(7)}, {"w": [0.0], "n": i64(7)}]
    other = [counted[0], {"w": [0.0], "n": i64(8)}]
    h.case(
        "integers-agree",
        "equal integers are copied",
        counted,
        None,
        *both([0.25, 0.75], {"w": [1.0], "n": i64(7)}),
        options={"integers": "equal"},
    )
    h.case(
        "integers-differ",
        "7 and 8 have no integer between them",
        other,
        None,
        *both([0.25, 0.75], REFUSED),
        options={"integers": "equal"},
    )
    h.case("no-members", "nothing to combine", [], None, *both([1.0], REFUSED))
    h.case("three-preferences", "of two members", members, None, *both([0.5, 0.25, 0.25], REFUSED))
    return h
