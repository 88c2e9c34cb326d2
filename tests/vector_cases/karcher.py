"""Vectors of karcher."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64
from vector_cases.multislerp import at_mean_length, on_sphere

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

STAGED = (
    "karcher-half-way", "karcher-two-of-three", "karcher-no-step", "karcher-opposite", "karcher-opposite-with-weights",
    "karcher-zero-tensor", "karcher-one-step-suffices", "karcher-near-one-model",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    """Of models in the plane, where the mean's angle is the mean of the angles."""
    w = given.each("weight", 1.0)
    alpha = [w_n / sum(w) for w_n in w]
    nu, C = on_sphere(given.models)
    found: dict[int, dict[str, Any]] = {1: {"alpha": alpha}, 2: {"nu": nu, "C": C}}
    m = math.sqrt(sum(a * b * C[i, j] for i, a in enumerate(alpha) for j, b in enumerate(alpha)))
    c = None
    if m > 1e-3:
        c = [a / m for a in alpha]
        found[3] = {"c": c}
        if C.min() == -1:  # no arc leads to the opposite
            c = None
        elif given.params.get("max_iter") != 0:
            c = in_the_plane(given.models, alpha, nu)
        if c is not None:
            found[4] = {"c": c}
    merged = sum(a * x for a, x in zip(alpha, given.models)) if c is None else at_mean_length(c, alpha, nu, given.models)
    return found | {5: {"result": merged}}


def in_the_plane(models: list[Any], alpha: list[Fraction], nu: list[float]) -> list[float]:
    """c of the mean direction, in which a model without a direction has no part."""
    part = [float(a) if nu_n else 0.0 for a, nu_n in zip(alpha, nu)]
    angle = [math.atan2(x[1], x[0]) for x in models]
    mean = sum(a * b for a, b in zip(part, angle)) / sum(part)
    phi = [abs(b - mean) for b in angle]
    f = [a * (p / math.sin(p) if p else 1.0) for a, p in zip(part, phi)]
    long = sum(f_n * math.cos(p) for f_n, p in zip(f, phi))
    return [f_n / long for f_n in f]


def walked(models: list[list[float]], weights: list[float], steps: int) -> list[float]:
    """The direction after so many steps, in coordinates: along the mean of the arcs by the sphere's maps, and in the last to
    the sum of the w / sin w that the arcs are made of."""
    U = np.array(models) / np.linalg.norm(models, axis=1, keepdims=True)
    alpha = np.array(weights) / sum(weights)
    u = alpha @ U
    for _ in range(steps):
        u /= np.linalg.norm(u)
        angle = np.arccos(U @ u)
        f = alpha * angle / np.sin(angle)
        arc = f @ (U - np.outer(U @ u, u))
        far = np.linalg.norm(arc)
        u = math.cos(far) * u + math.sin(far) / far * arc
    return (f @ U / np.linalg.norm(f @ U)).tolist()


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
    turned = math.pi / 8
    h.case(
        "one-step-suffices",
        "on a circle the mean's angle is that of the angles: (3 * 0 + 90) / 4 = 22.5 degrees, found in one step, and the "
        "second stays; zero has no direction and no part in it, but in the mean length (3 + 1 + 0) / 8",
        [[1, 0], [0, 1], [0, 0]],
        None,
        ("karcher", {"weight": [3.0, 1.0, 4.0], "max_iter": 2}, [math.cos(turned) / 2, math.sin(turned) / 2], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    start = [math.atan2(1, 3), math.atan2(3, 1)]
    f = [0.75 * start[0] / math.sin(start[0]), 0.25 * start[1] / math.sin(start[1])]
    early = [x / math.hypot(*f) for x in f]
    h.case(
        "tol-reached",
        "weights 3/4 and 1/4 at a right angle: the walk starts at (3, 1) / sqrt 10, 18.43 and 71.57 degrees from the two; "
        "in one step the cosines change by less than 1/8 and so the direction is that of (3 w_1 / sin w_1, w_2 / sin w_2)",
        [[1, 0], [0, 1]],
        None,
        ("karcher", {"weight": [3.0, 1.0], "tol": 0.125}, early, ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "nearly-opposite",
        "weights 15 and 1; the second is 180 degrees less 1/2048 from the first, and no more than 1/1000 from the opposite "
        "of where the walk starts: the straight mean, 14/16 of 2048 and 1/16",
        [[2048, 0], [-2048, 1]],
        None,
        ("karcher", {"weight": [15.0, 1.0]}, [1792.0, 0.0625], ""),
        dtype="F64",
        tolerance=1e-12,
    )
    h.case(
        "obtuse",
        "weights 15 and 1 at 120 degrees, in the plane of (1, -1, 0) and (0, 1, -1): 7.5 degrees from the first",
        [[1, -1, 0], [0, 1, -1]],
        None,
        (
            "karcher",
            {"weight": [15.0, 1.0]},
            [
                math.sin(math.radians(112.5)) / math.sin(math.radians(120)),
                (math.sin(math.radians(7.5)) - math.sin(math.radians(112.5))) / math.sin(math.radians(120)),
                -math.sin(math.radians(7.5)) / math.sin(math.radians(120)),
            ],
            "sin 112.5 / sin 120 of the first and sin 7.5 / sin 120 of the second",
        ),
        dtype="F64",
        tolerance=1e-13,
    )
    wide, light = [[1.0, 60.0, 0.0], [1.0, -60.0, 0.0], [0.0, 0.0, 1.0]], [1.0, 1.0, 0.002]
    length = (2 * math.hypot(1, 60) + 0.002) / 2.002
    h.case(
        "default-steps",
        "(1, 60, 0) and (1, -60, 0), nearly opposite, and (0, 0, 1) with a weight of 0.002: each step covers 3 per cent of "
        "what is left, and the hundredth is the last",
        wide,
        None,
        (
            "karcher",
            {"weight": light},
            [length * x for x in walked(wide, light, 100)],
            "by the sphere's maps, in coordinates",
        ),
        dtype="F64",
        tolerance=1e-12,
    )
    near_by, shares = [[20.0, 0.0, 0.0], [20.0, 1.0, 0.0], [20.0, 0.0, 2.0]], [3.0, 2.0, 1.0]
    corner = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    for id, given, limit, steps, why in (
        ("four-steps", near_by, 4, 60, "at angles of 3 to 6 degrees: where sixty steps in coordinates lead, up to rounding"),
        ("ten-steps", corner, 10, 10, "at right angles: where ten steps in coordinates lead, 1e-9 beside the mean"),
        ("thirty-steps", corner, 30, 60, "at right angles: where sixty steps in coordinates lead, up to rounding"),
    ):
        length = sum(w * math.hypot(*x) for w, x in zip(shares, given)) / 6
        h.case(
            id,
            f"three models with weights 3, 2 and 1, {why}",
            given,
            None,
            ("karcher", {"weight": shares, "max_iter": limit}, [length * x for x in walked(given, shares, steps)], ""),
            dtype="F64",
            tolerance=1e-14,
        )
    h.case(
        "near-one-model",
        "weights 4095 and 1 at a right angle: 90/4096 degrees from the first; that it starts near the first is no reason "
        "for the straight mean",
        [[1, 0], [0, 1]],
        None,
        (
            "karcher",
            {"weight": [4095.0, 1.0]},
            [math.cos(math.pi / 8192), math.sin(math.pi / 8192)],
            "",
        ),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "no-minimum",
        "three directions at 120 degrees with weights 6, 5 and 5: the walk stays at the first, where sum alpha w cot w = "
        "(6 - 10 * 2.094 * 0.577) / 16 is negative: the straight mean, a / 16 since b + c = -a",
        [[2, -1, -1], [-1, 2, -1], [-1, -1, 2]],
        None,
        ("karcher", {"weight": [6.0, 5.0, 5.0], "max_iter": 4}, [0.125, -0.0625, -0.0625], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    side = math.asin(0.6)
    f = [8.0, 3 * math.pi / 2, 5 * side / 0.6]
    to = [f[0] + 0.8 * f[2], f[1] - 0.6 * f[2]]
    h.case(
        "angle-zero",
        "weights 8, 3, 5 of (1, 0), (0, 1), (4, -3) / 5: the walk starts at the first, whose w / sin w is 1; after one step "
        "the direction is that of 8 (1, 0) + 3 (w_2 / sin w_2) (0, 1) + 5 (w_3 / sin w_3) (4, -3) / 5, with w_2 = 90 "
        "degrees and sin w_3 = 3/5; the mean length is (8 + 3 + 5 * 5) / 16",
        [[1, 0], [0, 1], [4, -3]],
        None,
        (
            "karcher",
            {"weight": [8.0, 3.0, 5.0], "max_iter": 1},
            [36 / 16 * x / math.hypot(*to) for x in to],
            "",
        ),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "cosine-past-one",
        "(1, 1, 1) and -5 times it, weights 2 and 1: a cosine that may be rounded to less than -1; the straight mean, "
        "(2 - 5) / 3",
        [[1, 1, 1], [-5, -5, -5]],
        None,
        ("karcher", {"weight": [2.0, 1.0]}, [-1.0, -1.0, -1.0], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case("no-models", "nothing to average", [], None, ("karcher", {}, REFUSED, ""))
    h.case(
        "weight-count", "two models, three weights", [[1.0], [2.0]], None, ("karcher", {"weight": [1.0] * 3}, REFUSED, "")
    )
    h.case("max-iter-negative", "no walk has -1 steps", [[1.0], [2.0]], None, ("karcher", {"max_iter": -1}, REFUSED, ""))
    h.case(
        "tol-negative", "nothing moves by less than nothing", [[1.0], [2.0]], None, ("karcher", {"tol": -0.5}, REFUSED, "")
    )
    quarter, turn = math.sin(math.pi / 12), math.sin(math.pi / 3)
    h.case(
        "as-slerp",
        "60 degrees, of length sqrt 2 both, t = 1/4: sin 45 / sin 60 and sin 15 / sin 60, as slerp has it",
        [[1, 1, 0], [1, 0, 1]],
        None,
        ("karcher", {"weight": [0.75, 0.25]}, [(half + quarter) / turn, half / turn, quarter / turn], ""),
        **exact,
    )
    h.case(
        "nearly-cancelled",
        "half the sum of the unit vectors is 1.2e-4 long: the straight mean",
        [[4096, 0], [-4096, 1]],
        None,
        ("karcher", {}, [0, 0.5], ""),
        flags="KarcherOpposite",
        **exact,
    )
    r = math.hypot(256.0, 1.0)
    x, y = 1 / (r * (r + 256.0)), 1 / r  # the sum of the unit vectors
    long = (256.0 + r) / 2 / math.hypot(x, y)
    h.case(
        "not-cancelled",
        "half the sum of the unit vectors of (256, 0) and (-256, 1) is 1/512 long, more than 1/1000: half way round, at the "
        "mean length of 256; with 4096 instead the straight mean, of length 1/2",
        [[256, 0], [-256, 1]],
        None,
        ("karcher", {}, [long * x, long * y], ""),
        flags="KarcherOpposite",
        dtype="F64",
        tolerance=1e-9,
    )
    h.case(
        "zero-weight",
        "the third has a weight of 0: 45 degrees, mean length (1 + 3) / 2",
        [[1, 0], [0, 3], [4, 1]],
        None,
        ("karcher", {"weight": [1.0, 1.0, 0.0]}, [2 * half, 2 * half], ""),
        **exact,
    )
    h.case(
        "zero-weight-nan",
        "0 times NaN is NaN",
        [[1, 0], [0, 3], [math.nan, 1]],
        None,
        ("karcher", {"weight": [1.0, 1.0, 0.0]}, [math.nan, math.nan], ""),
        **exact,
    )
    h.case(
        "squares-vanish",
        "2^-538 squared is 2^-1076, less than half the least number, and rounds to 0: no directions, so the straight mean",
        [[2.0**-538, 0.0], [0.0, 2.0**-538]],
        None,
        ("karcher", {}, [2.0**-539, 2.0**-539], ""),
        dtype="F64",
    )
    h.case(
        "squares-infinite",
        "2^512 squared is infinite: an infinite mean length over an infinite length is NaN",
        [[2.0**512, 0.0], [0.0, 2.0**512]],
        None,
        ("karcher", {}, [math.nan, math.nan], ""),
        dtype="F64",
    )
    for id, bad in (("nan", math.nan), ("infinity", math.inf)):
        h.case(
            id,
            "a length that is not finite, and a cosine that is NaN",
            [[bad, 1.0], [1.0, 1.0]],
            None,
            ("karcher", {}, [math.nan, math.nan], ""),
        )
    counted = [{"x": [1.0], "ids": i64(3, 4)}, {"x": [3.0], "ids": i64(3, 4)}]
    h.case(
        "integers-agree",
        "signs that agree, mean length (1 + 3) / 2; equal integers are copied",
        counted,
        None,
        ("karcher", {}, {"x": [2.0], "ids": i64(3, 4)}, ""),
        options={"integers": "equal"},
    )
    h.case(
        "integers-differ",
        "integers have no direction",
        [counted[0], {"x": [3.0], "ids": i64(3, 5)}],
        None,
        ("karcher", {}, REFUSED, ""),
        options={"integers": "equal"},
    )
    h.case(
        "axes",
        "three axes; lengths of 5, product 7: cos w = 7/25, cos(w/2) = 4/5, and both coefficients are 1 / (2 4/5) = 5/8",
        [[[[4, 2]], [[-2, 1]], [[0, 0]]], [[[2, 0]], [[0, -1]], [[4, 2]]]],
        None,
        ("karcher", {}, [[[3.75, 1.25]], [[-1.25, 0]], [[2.5, 1.25]]], "5/8 (6, 2, -2, 0, 4, 2)"),
        dtype="F64",
        tolerance=1e-14,
    )
    return h
