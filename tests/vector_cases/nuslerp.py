"""Vectors of nuslerp."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, i64
from vector_cases.slerp import angle, arc

CODE = {
    "mergekit:nuslerp": "mergekit 0.1.5 mergekit/merge_methods/nuslerp.py:nuslerp_merge_method",
}
FLAGS = {
    "nuslerp-mergekit-04": ["NuslerpWeightsCancel", "NuslerpColumns", "NuslerpZeroVector", "NuslerpManyAxes"],
}
PAPER = {
    "nuslerp-mergekit-01": Paper({"weight": [1.0, 3.0]}, comment="one angle for a tensor, and no base"),
    "nuslerp-mergekit-04": Paper(
        {"weight": [0.5, 0.5], "per": "column"}, names=("conv", "vec"), comment="no column of zeros in these two"
    ),
}
TOLERANCE = {"nuslerp-mergekit-bf16-01": 2.0**-6}  # where mergekit rounds the cosine to 8 bits

STAGED = (
    "nuslerp-base", "nuslerp-no-base", "nuslerp-base-at-sixty-degrees", "nuslerp-weights-count-as-a-ratio",
    "nuslerp-beyond-the-end", "nuslerp-zero-vector", "nuslerp-nearly-opposite", "nuslerp-per-tensor", "nuslerp-per-row",
    "nuslerp-per-column", "nuslerp-zero-row",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    a, b = given.models if given.base is None else [theta - given.base for theta in given.models]
    w_1, w_2 = given.each("weight", 1.0)
    t = w_2 / (w_1 + w_2)
    per = given.params.get("per", "tensor")
    parts = {
        "tensor": lambda x: [x.ravel()],
        "row": lambda x: x.reshape(len(x), -1),
        "column": lambda x: x.reshape(len(x), -1).T,
    }[per]
    omega = [angle(x, y) for x, y in zip(parts(a), parts(b))]
    taken = [(1 - t, t) if math.sin(w) <= 1e-3 else arc(float(t), w) for w in omega]
    c_a, c_b = taken[0]
    if per != "tensor":
        c_a, c_b = (np.array(c, object).reshape((-1, 1) if per == "row" else (1, -1)) for c in zip(*taken))
    merged = c_a * a + c_b * b
    return {
        1: {"a": a, "b": b},
        2: {"t": t},
        3: {"omega": np.array(omega, object)},
        4: {"c_a": c_a, "c_b": c_b},
        5: {"result": merged if given.base is None else given.base + merged},
    }


def hand() -> Hand:
    h = Hand("nuslerp", CODE)
    half = math.sqrt(0.5)
    whole = {"nuslerp_row_wise": False, "nuslerp_flatten": True}
    lines = {"nuslerp_row_wise": False, "nuslerp_flatten": False}
    columns = {"nuslerp_row_wise": True, "nuslerp_flatten": False}

    def both(
        plain: Any,
        mergekit: Any = None,
        why: tuple[str, str] = ("", ""),
        weight: list[float] | None = None,
        per: str = "tensor",
    ) -> list[Any]:
        """Equal weights, unless given."""
        mergekit = plain if mergekit is None else mergekit
        weight = weight or [1.0, 1.0]
        theirs = {"weight": weight} | {"tensor": whole, "row": lines, "column": columns}[per]
        ours = {"weight": weight} | ({} if per == "tensor" else {"per": per})
        return [("nuslerp", ours, plain, why[0]), ("mergekit:nuslerp", theirs, mergekit, why[1])]

    exact = {"dtype": "F64", "tolerance": 1e-14}
    h.case(
        "base",
        "base (1, 1); deltas (2, 0), (0, 2) at 90 degrees, t = 1/3: sin 60 and sin 30",
        [[3, 1], [1, 3]],
        [1, 1],
        *both([1 + math.sqrt(3), 2], weight=[2.0, 1.0]),
        **exact,
    )
    h.case(
        "no-base",
        "(2, 0), (0, 2) at 90 degrees, t = 1/3: sin 60 and sin 30",
        [[2, 0], [0, 2]],
        None,
        *both([math.sqrt(3), 1], weight=[2.0, 1.0]),
        **exact,
    )
    h.case(
        "base-at-sixty-degrees",
        "deltas (1, 1, 0), (1, 0, 1) of cosine 1/2: sin 30 / sin 60 = 1 / sqrt 3 for both",
        [[2, 2, 1], [2, 1, 2]],
        [1, 1, 1],
        ("nuslerp", {}, [1 + 2 / math.sqrt(3), 1 + 1 / math.sqrt(3), 1 + 1 / math.sqrt(3)], "equal weights by default"),
        **exact,
    )
    h.case(
        "weights-count-as-a-ratio",
        "weights 8 and 8 are t = 1/2: sin 45 for both, lengths 1 and 3",
        [[1, 0], [0, 3]],
        None,
        *both([half, 3 * half], weight=[8.0, 8.0]),
        **exact,
    )
    h.case(
        "beyond-the-end",
        "weights 2 and -1 are t = -1: sin 180 = 0 and sin -90 = -1",
        [[1, 0], [0, 1]],
        None,
        *both([0, -1], weight=[2.0, -1.0]),
        **exact,
    )
    h.case(
        "weights-cancel",
        "weights 1 and -1 have no ratio to their sum",
        [[1, 0], [0, 1]],
        None,
        *both(REFUSED, [half, half], ("", "t = 1/2: sin 45 for both"), weight=[1.0, -1.0]),
        flags="NuslerpWeightsCancel",
        **exact,
    )
    h.case(
        "zero-vector",
        "the first model is the base: its delta has no direction",
        [[1, 1], [3, 5]],
        [1, 1],
        *both([2, 3], [1 + 2 * half, 1 + 4 * half], ("the line: half of (2, 4)", "90 degrees: sin 45 times (2, 4)")),
        flags="NuslerpZeroVector",
        **exact,
    )
    h.case(
        "both-at-base",
        "two deltas of zero: the base",
        [[1, 2], [1, 2]],
        [1, 2],
        *both([1, 2]),
        **exact,
    )
    h.case(
        "opposite",
        "b = -a, t = 1/4: no arc is preferred; the line gives (3/4 - 1/4) a",
        [[1, 2], [-1, -2]],
        None,
        ("nuslerp", {"weight": [3.0, 1.0]}, [0.5, 1], ""),
        ("mergekit:nuslerp", {"weight": [3.0, 1.0]} | whole, OPEN, "the line if |a|^-2 a a rounds to -1"),
        flags="NuslerpOpposite",
        **exact,
    )
    h.case(
        "opposite-unit",
        "b = -a, t = 1/4, and the cosine is exactly -1: the line gives (3/4 - 1/4) a",
        [[4, 0], [-4, 0]],
        None,
        *both([2, 0], weight=[3.0, 1.0]),
        flags="NuslerpOpposite",
        **exact,
    )
    # tan of the angle to opposite is 1/4096, and the sum is (0, 1).
    far = math.sqrt(4096.0**2 + 0.25)
    h.case(
        "nearly-opposite",
        "the sine of the angle is 2.4e-4",
        [[4096, 0], [-4096, 1]],
        None,
        *both(
            [0, 0.5],
            [0, far],
            (
                "the line: half of the sum (0, 1)",
                "the arc: the sum over 2 cos(w/2), where cos(w/2) is sin(atan(1/4096) / 2)",
            ),
        ),
        flags="NuslerpNearlyOpposite",
        dtype="F64",
        tolerance=1e-7,
    )
    h.case(
        "identical",
        "w = 0: (1 - t) x + t x",
        [[1, 2, 2], [1, 2, 2]],
        [0, 1, 0],
        *both([1, 2, 2], weight=[3.0, 1.0]),
        **exact,
    )
    a, b = [[2, 0], [0, 1]], [[2, 0], [1, 0]]
    cosine = 4 / 5
    root = 1 / (2 * math.sqrt((1 + cosine) / 2))  # 1 / (2 cos(w/2))
    h.case(
        "per-tensor",
        "cos w = 4 / 5, half-way: the sum over 2 cos(w/2)",
        [a, b],
        None,
        *both([[4 * root, 0], [root, root]]),
        flags="NuslerpColumns",
        **exact,
    )
    h.case(
        "per-row",
        "the first rows are equal, the second ones at 90 degrees: sin 45",
        [a, b],
        None,
        *both([[2, 0], [half, half]], per="row"),
        flags="NuslerpColumns",
        **exact,
    )
    # First columns (2, 0) and (2, 1): lengths 2 and sqrt 5, cosine 4 / (2 sqrt 5). Second columns (0, 1) and (0, 0).
    part = 1 / (2 * math.sqrt((1 + 2 / math.sqrt(5)) / 2))
    h.case(
        "per-column",
        "first columns (2, 0), (2, 1) of cosine 2 / sqrt 5: the sum over 2 cos(w/2); second columns (0, 1), (0, 0)",
        [a, b],
        None,
        *both(
            [[4 * part, 0], [part, 0.5]],
            [[4 * part, 0], [part, half]],
            ("(0, 0) has no direction: the line", "(0, 0) at 90 degrees: sin 45"),
            per="column",
        ),
        flags="NuslerpColumns NuslerpZeroVector",
        **exact,
    )
    h.case(
        "many-axes",
        "shape (1, 2, 2)",
        [[a], [b]],
        None,
        *both(
            [[[4 * root, 0], [root, root]]],
            [[[2, 0], [half, half]]],
            ("one row of four entries, cos w = 4 / 5", "two lines along the last axis, at 0 and 90 degrees"),
            per="row",
        ),
        flags="NuslerpManyAxes",
        **exact,
    )
    h.case(
        "scalars",
        "0-d tensors have an angle of 0 or 180 degrees: the line, (2 + 6) / 2 and (2 - 6) / 2",
        [{"p": 2.0, "n": 2.0, "e": []}, {"p": 6.0, "n": -6.0, "e": []}],
        None,
        *both({"p": 4.0, "n": -2.0, "e": []}, per="row"),
        **exact,
    )
    h.case(
        "columns-of-few-axes",
        "a vector is one column, and a number one of one entry; v is at 90 degrees",
        [{"p": 2.0, "v": [1, 0]}, {"p": 6.0, "v": [0, 1]}],
        None,
        *both({"p": 4.0, "v": [half, half]}, per="column"),
        **exact,
    )
    h.case("one-model", "an arc needs two ends", [[1.0]], [0.0], ("nuslerp", {}, REFUSED, ""))
    h.case("three-models", "an arc has two ends", [[1.0], [2.0], [3.0]], None, ("nuslerp", {}, REFUSED, ""))
    turn = math.sin(math.radians(60))
    h.case(
        "as-slerp",
        "60 degrees, t = 1/4: sin 45 / sin 60 and sin 15 / sin 60, as slerp has it",
        [[1, 1, 0], [1, 0, 1]],
        None,
        (
            "nuslerp",
            {"weight": [0.75, 0.25]},
            [(half + math.sin(math.pi / 12)) / turn, half / turn, math.sin(math.pi / 12) / turn],
            "",
        ),
        **exact,
    )
    h.case(
        "second-zero-vector",
        "the second model is the base: its delta has no direction; the line: 3/4 of (2, 4)",
        [[3, 5], [1, 1]],
        [1, 1],
        ("nuslerp", {"weight": [3.0, 1.0]}, [2.5, 4], ""),
        flags="NuslerpZeroVector",
        **exact,
    )
    h.case(
        "zero-row",
        "first rows at 90 degrees: sin 45; the second rows (0, 0), (4, 2): half of the latter",
        [[[2, 0], [0, 0]], [[0, 2], [4, 2]]],
        None,
        ("nuslerp", {"per": "row"}, [[2 * half, 2 * half], [2, 1]], ""),
        flags="NuslerpZeroVector",
        **exact,
    )
    h.case(
        "parallel",
        "w = 0: 3/4 a + 1/4 2 a",
        [[1, 2, 2], [2, 4, 4]],
        None,
        ("nuslerp", {"weight": [3.0, 1.0]}, [1.25, 2.5, 2.5], ""),
        **exact,
    )
    h.case(
        "beyond-the-end-of-half",
        "weights 1 and -1/2 are t = -1, too: sin 180 = 0 and sin -90 = -1",
        [[1, 0], [0, 3]],
        None,
        ("nuslerp", {"weight": [1.0, -0.5]}, [0, -3], ""),
        **exact,
    )
    for id, weight, expect in (("first-alone", [2.0, 0.0], [3, 1]), ("second-alone", [0.0, 0.5], [1, 4])):
        h.case(
            id,
            "deltas (2, 0), (0, 3): sin 90 of one and sin 0 of the other",
            [[3, 1], [1, 4]],
            [1, 1],
            ("nuslerp", {"weight": weight}, expect, ""),
            **exact,
        )
    h.case(
        "rows-of-one-column",
        "rows of one entry are at 0 or 180 degrees: the line, (2 + 6) / 2 and (2 - 6) / 2; over the tensor it is an angle "
        "of 90 degrees",
        [[[2], [2]], [[6], [-6]]],
        None,
        ("nuslerp", {"per": "row"}, [[4], [-2]], ""),
        **exact,
    )
    little, wide = 2.0**-75, 2.0**64
    for per in ("tensor", "row"):
        h.case(
            f"products-vanish-{per}",
            "2^-75 squared is 2^-150, half the least float32, and rounds to 0: the line, though at a right angle",
            [[[little, 0.0]], [[0.0, little]]],
            None,
            ("nuslerp", {"per": per}, [[little / 2, little / 2]], ""),
        )
    h.case(
        "products-infinite",
        "45 degrees; the square of 2^64 is infinite in float32, so that the cosine is 0 and sin 45 is taken of both",
        [[wide, 0.0], [wide / 2, wide / 2]],
        None,
        ("nuslerp", {}, [wide * 1.5 * half, wide / 2 * half], ""),
        tolerance=1e-6,
    )
    a, b = [[math.nan, 0], [1, 0]], [[1, 3], [0, 1]]
    nan = math.nan
    for per, why, expect in (
        ("tensor", "all is NaN", [[nan, nan], [nan, nan]]),
        ("row", "the second rows are at 90 degrees", [[nan, nan], [half, half]]),
        ("column", "the second columns, (0, 0) and (3, 1), have no angle: the line", [[nan, 1.5], [nan, 0.5]]),
    ):
        h.case(
            f"nan-per-{per}", f"NaN at the first place: {why}", [a, b], None, ("nuslerp", {"per": per}, expect, ""), **exact
        )
    h.case(
        "infinity",
        "infinity over infinity is NaN, and so is the angle",
        [[math.inf, 1.0], [1.0, 1.0]],
        None,
        ("nuslerp", {}, [nan, nan], ""),
    )
    counted = [{"x": [1.0], "ids": i64(3, 4)}, {"x": [3.0], "ids": i64(3, 4)}]
    h.case(
        "integers-agree",
        "one entry: the line, (1 + 3) / 2; equal integers are copied",
        counted,
        None,
        ("nuslerp", {}, {"x": [2.0], "ids": i64(3, 4)}, ""),
        options={"integers": "equal"},
    )
    h.case(
        "integers-differ",
        "integers have no arc",
        [counted[0], {"x": [3.0], "ids": i64(3, 5)}],
        None,
        ("nuslerp", {}, REFUSED, ""),
        options={"integers": "equal"},
    )
    pair = [{"x": [1.0], "y": [[0.0, 2.0]]}, {"x": [0.0], "y": [[2.0, 0.0]]}]
    h.case(
        "over-model",
        "the two tensors as one vector: a right angle, sin 45 for both",
        pair,
        None,
        ("nuslerp", {}, {"x": [half], "y": [[2 * half, 2 * half]]}, ""),
        options={"over": "model"},
        **exact,
    )
    h.case(
        "over-model-rows",
        "rows keep their angles: x the line, y a right angle",
        pair,
        None,
        ("nuslerp", {"per": "row"}, {"x": [0.5], "y": [[2 * half, 2 * half]]}, ""),
        options={"over": "model"},
        **exact,
    )
    return h
