"""Vectors of karcher."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Hand, Paper

CODE = {
    "mergekit:karcher": "mergekit 0.1.5 mergekit/merge_methods/karcher.py:karcher_merge_method",
}
FLAGS = {
    "karcher-mergekit-04": ["KarcherSmallTensor"],
}
PAPER = {
    "karcher-mergekit-04": Paper({}, names=("allzero", "same", "zero"), comment="no short tensor among these"),
}
TOLERANCE = {"karcher-mergekit-bf16-01": 2.0**-6}  # mergekit walks in 8 bits


def hand() -> Hand:
    h = Hand("karcher", CODE)
    half, root = math.sqrt(0.5), math.sqrt(0.75)
    defaults = {"max_iter": 10, "tol": 1e-5}
    exact = {"dtype": "F64", "tolerance": 1e-13}

    def both(plain: Any, mergekit: Any = None, why: tuple[str, str] = ("", ""), **theirs: Any) -> list[Any]:
        mergekit = plain if mergekit is None else mergekit
        return [("karcher", {}, plain, why[0]), ("mergekit:karcher", defaults | theirs, mergekit, why[1])]

    h.case(
        "weights",
        "lengths 6 and 3 at 90 degrees, weights 2 and 1: 30 degrees from the first, mean length 5",
        [[4, 4, 2, 0, 0, 0], [0, 0, 0, 2, 2, -1]],
        None,
        (
            "karcher",
            {"weight": [2.0, 1.0]},
            [5 * root * 2 / 3, 5 * root * 2 / 3, 5 * root / 3, 5 / 3, 5 / 3, -5 / 6],
            "sin 60 and sin 30 of the unit vectors",
        ),
        **exact,
    )
    h.case(
        "half-way",
        "equal weights at 90 degrees: 45 degrees, mean length (1 + 3) / 2",
        [[1, 0], [0, 3]],
        None,
        *both([2 * half, 2 * half]),
        **exact,
    )
    stops = "0, 90 and 0 degrees: the mean is at 30, the sum of the unit vectors at atan(1/2) = 26.6"
    h.case(
        "two-of-three",
        stops,
        [[1, 0], [0, 1], [1, 0]],
        None,
        *both([root, 0.5]),
        **exact,
    )
    h.case(
        "stops-early",
        stops,
        [[1, 0], [0, 1], [1, 0]],
        None,
        *both(
            [root, 0.5],
            [2 / math.sqrt(5), 1 / math.sqrt(5)],
            ("", "the step of 3.4 degrees, 0.06, is shorter than tol and not made"),
            tol=0.1,
        ),
        flags="KarcherStops",
        **exact,
    )
    h.case(
        "no-step",
        stops,
        [[1, 0], [0, 1], [1, 0]],
        None,
        ("karcher", {"max_iter": 0}, [2 / math.sqrt(5), 1 / math.sqrt(5)], "no step: Multi-SLERP"),
        **exact,
    )
    h.case(
        "corner",
        "three at right angles, lengths 1, 2, 3: the diagonal, by symmetry, at length 2",
        [[1, 0, 0], [0, 2, 0], [0, 0, 3]],
        None,
        *both([2 / math.sqrt(3)] * 3),
        **exact,
    )
    h.case(
        "opposite",
        "no direction is the mean",
        [[2, 0], [-2, 0]],
        None,
        *both(
            [0, 0], [2, 0], ("the straight mean", "the walk starts at the first model, and 0 times a large number ends it")
        ),
        flags="KarcherOpposite",
        **exact,
    )
    h.case(
        "opposite-with-weights",
        "weights 3 and 1: the sum of the unit vectors is the first, but no arc leads to the second: (3 2 - 2) / 4",
        [[2, 0], [-2, 0]],
        None,
        ("karcher", {"weight": [3.0, 1.0]}, [1, 0], "the straight mean"),
        flags="KarcherOpposite",
        **exact,
    )
    h.case(
        "star",
        "three at 120 degrees: the sum of the unit vectors is 0, and so is the straight mean of equal lengths",
        [[1, 0], [-0.5, root], [-0.5, -root]],
        None,
        ("karcher", {}, [0, 0], ""),
        dtype="F64",
    )
    small = 2.0**-20
    h.case(
        "small-tensor",
        "lengths 2^-20 = 9.5e-7 at 90 degrees",
        [[small, 0], [0, small]],
        None,
        *both([small * half, small * half], [0, 0], ("", "below tol: no direction, zeros")),
        flags="KarcherSmallTensor",
        **exact,
    )
    h.case(
        "zero-tensor",
        "(0, 0) has no direction and counts with length 0: (3, 4) / 5 at length 5/2",
        [[3, 4], [0, 0]],
        None,
        *both([1.5, 2]),
        **exact,
    )
    h.case("all-zero", "no direction at all", [[0, 0], [0, 0]], None, *both([0, 0]), **exact)
    h.case("identical", "the model", [[1, 2, 2], [1, 2, 2], [1, 2, 2]], None, *both([1, 2, 2]), **exact)
    h.case("one-model", "the model", [[3, -1]], None, *both([3, -1]), **exact)
    h.case(
        "scalars",
        "of one entry: signs that agree, mean length 4; opposite ones, (2 - 6) / 2",
        [{"p": 2.0, "n": 2.0, "e": []}, {"p": 6.0, "n": -6.0, "e": []}],
        None,
        ("karcher", {}, {"p": 4.0, "n": -2.0, "e": []}, ""),
        **exact,
    )
    h.case(
        "negative-weight",
        "a mean of arcs has no negative weights",
        [[1, 0], [0, 1]],
        None,
        ("karcher", {"weight": [2.0, -1.0]}, REFUSED, ""),
    )
    h.case("no-weight", "weights that are all 0", [[1.0], [2.0]], None, ("karcher", {"weight": 0.0}, REFUSED, ""))
    return h
