"""Vectors of multislerp."""

from __future__ import annotations

import math
from typing import Any

from vector_cases import REFUSED, Hand, Paper

CODE = {
    "mergekit:multislerp": "mergekit 0.1.5 mergekit/merge_methods/multislerp.py:multislerp",
}
FLAGS = {
    "multislerp-mergekit-bf16-01": ["MultislerpTangent"],
}
SAME = "the step that is left out is zero"
PAPER = {
    "multislerp-mergekit-01": Paper({}, comment=SAME),
    "multislerp-mergekit-04": Paper({}, comment=SAME),
}
TOLERANCE = {"multislerp-mergekit-bf16-01": 2.0**-6}  # the rounding of mergekit's tangent step


def hand() -> Hand:
    h = Hand("multislerp", CODE)
    half = math.sqrt(0.5)

    def both(
        plain: Any, mergekit: Any = None, why: tuple[str, str] = ("", ""), *, weight: list[float], **theirs: Any
    ) -> list[Any]:
        mergekit = plain if mergekit is None else mergekit
        params = {"weight": weight, "normalize_weights": True, "eps": 1e-8} | theirs
        ours = {"weight": weight} | ({} if params["normalize_weights"] else {"normalize": False})
        return [("multislerp", ours, plain, why[0]), ("mergekit:multislerp", params, mergekit, why[1])]

    exact = {"dtype": "F64", "tolerance": 1e-14}
    near = {"dtype": "F64", "tolerance": 1e-7}  # mergekit's eps on the lengths
    h.case(
        "three",
        "unit vectors at right angles, weights 2/5, 1/5, 2/5: their sum is 3/5 long; mean length (2 5 + 15 + 2 10) / 5 = 9",
        [[3, 4, 0, 0, 0, 0], [0, 0, 9, 12, 0, 0], [0, 0, 0, 0, 8, -6]],
        None,
        *both([3.6, 4.8, 1.8, 2.4, 4.8, -3.6], weight=[2.0, 1.0, 2.0]),
        **near,
    )
    h.case(
        "two-at-a-right-angle",
        "weights 3 and 1: direction (3, 1) / sqrt 10, length 1; the arc's quarter would be (cos 22.5, sin 22.5)",
        [[1, 0], [0, 1]],
        None,
        *both([3 / math.sqrt(10), 1 / math.sqrt(10)], weight=[3.0, 1.0]),
        **near,
    )
    h.case(
        "base",
        "base (1, 1); deltas (2, 0), (0, 4): direction (1, 1) / sqrt 2, mean length 3",
        [[3, 1], [1, 5]],
        [1, 1],
        *both([1 + 3 * half, 1 + 3 * half], weight=[1.0, 1.0]),
        **near,
    )
    h.case(
        "not-normalised",
        "weights 1 and 1 without division: direction (1, 1) / sqrt 2, length 1 + 3",
        [[1, 0], [0, 3]],
        None,
        *both([4 * half, 4 * half], weight=[1.0, 1.0], normalize_weights=False),
        **near,
    )
    h.case(
        "zero-vector",
        "(0, 0) has no direction and counts with length 0: direction (3, 4) / 5, mean length 5/2",
        [[3, 4], [0, 0]],
        None,
        *both([1.5, 2], weight=[1.0, 1.0]),
        **near,
    )
    h.case(
        "opposite",
        "the directions cancel: the straight mean, (2 - 1) / 2",
        [[2, 0], [-1, 0]],
        None,
        *both([0.5, 0], weight=[1.0, 1.0]),
        flags="MultislerpCancel",
        **near,
    )
    opposite = "deltas (2, 0), (-1, 0), (0, 0): the directions cancel"
    h.case(
        "three-cancel",
        opposite,
        [[3, 1], [0, 1], [1, 1]],
        [1, 1],
        *both([4 / 3, 1], weight=[1.0, 1.0, 1.0], why=("the straight mean, 1/3", "fails; here as the plain name")),
        flags="MultislerpCancelOfThree",
        **near,
    )
    h.case(
        "three-untouched",
        "three fine-tunes of which none touched this tensor: the base",
        [[1, 2], [1, 2], [1, 2]],
        [1, 2],
        *both([1, 2], weight=[1.0, 2.0, 1.0], why=("", "fails; here as the plain name")),
        flags="MultislerpCancelOfThree",
        **near,
    )
    # The sum of the unit vectors of (4096, 0) and (-4096, 1): with r = |(-4096, 1)|, (1 - 4096 / r, 1 / r).
    r = math.hypot(4096.0, 1.0)
    x, y = 1 / (r * (r + 4096.0)), 1 / r  # 1 - 4096 / r = (r^2 - 4096^2) / (r (r + 4096))
    long = (4096.0 + r) / 2 / math.hypot(x, y)
    h.case(
        "nearly-opposite",
        "half the sum of the unit vectors is 1.2e-4 long",
        [[4096, 0], [-4096, 1]],
        None,
        *both(
            [0, 0.5],
            [long * x, long * y],
            ("too short: the straight mean", "above 1e-8: the direction of that sum, at the mean length"),
            weight=[1.0, 1.0],
        ),
        flags="MultislerpCancel",
        dtype="F64",
        tolerance=1e-7,
    )
    h.case(
        "eps-on-lengths",
        "(1, 0) and (0, 3), mean length 2",
        [[1, 0], [0, 3]],
        None,
        ("multislerp", {}, [2 * half, 2 * half], "unit vectors: direction (1, 1) / sqrt 2"),
        (
            "mergekit:multislerp",
            {"weight": [1.0, 1.0], "normalize_weights": True, "eps": 1.0 / 4},
            [x * math.cos(1 / 4) / math.sqrt(13**2 + 15**2) for x in (2 * 13, 2 * 15)],
            "1 / (1 + 1/4) = 4/5 and 3 / (3 + 1/4) = 12/13: direction (52, 60), that is (13, 15); the step takes cos(1/4)",
        ),
        flags="MultislerpEps",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "one-model-not-normalised",
        "one model with weight 2",
        [[3, 4]],
        [1, 1],
        *both([5, 7], [3, 4], ("base + 2 (2, 3)", "as it is"), weight=[2.0], normalize_weights=False),
        flags="MultislerpOneModel",
        **exact,
    )
    h.case("one-model", "one model comes back", [[3, 4]], None, *both([3, 4], weight=[5.0]), **exact)
    h.case(
        "zero-weight-sum",
        "weights 1 and -1",
        [[1, 0], [0, 1]],
        None,
        *both(REFUSED, [math.nan, math.nan], ("", "1 / 0 and -1 / 0"), weight=[1.0, -1.0]),
        flags="MultislerpZeroWeightSum",
        dtype="F64",
    )
    h.case(
        "negative-weight",
        "weights 2 and -1 on (1, 0), (0, 1): direction (2, -1) / sqrt 5, mean length 2 - 1",
        [[1, 0], [0, 1]],
        None,
        *both([2 / math.sqrt(5), -1 / math.sqrt(5)], weight=[2.0, -1.0]),
        **near,
    )
    h.case(
        "scalars",
        "of one entry: signs that agree, mean length 4; signs that cancel, (2 - 6) / 2",
        [{"p": 2.0, "n": 2.0, "e": []}, {"p": 6.0, "n": -6.0, "e": []}],
        None,
        ("multislerp", {}, {"p": 4.0, "n": -2.0, "e": []}, ""),
        **exact,
    )
    h.case(
        "eps-of-weights",
        "two weights of 64: the sum of the directions (1, 0) and (-1, 1/1024) is 64/1024 = 1/16 long, less than 1/1000 of "
        "128: it cancels, and the straight sum is (0, 64)",
        [[1024.0, 0.0], [-1024.0, 1.0]],
        None,
        ("multislerp", {"weight": 64.0, "normalize": False}, [0.0, 64.0], ""),
        dtype="F64",
        tolerance=1e-12,
    )
    h.case(
        "no-weights",
        "weights of 0, not normalised: nothing is as long as nothing, so the straight sum, 0",
        [[1.0, 0.0], [0.0, 1.0]],
        None,
        ("multislerp", {"weight": 0.0, "normalize": False}, [0.0, 0.0], ""),
    )
    h.case(
        "weight-default",
        "weights are 1: the direction (1, 1) / sqrt 2 at the length 2 + 2",
        [[2.0, 0.0], [0.0, 2.0]],
        None,
        ("multislerp", {"normalize": False}, [math.sqrt(8), math.sqrt(8)], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "zero-beside-two",
        "directions (1, 0), (0, 1) and none: the mean direction is (1, 1) / sqrt 2, the mean length (1 + 1 + 0) / 3",
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
        None,
        ("multislerp", {}, [math.sqrt(2) / 3, math.sqrt(2) / 3], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "square-below-zero",
        "three directions at 120 degrees, whose sum is 0; its square may be rounded to less. The mean of (1, -1, 0), (0, 1, "
        "-1) and (-3, 0, 3)",
        [[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-3.0, 0.0, 3.0]],
        None,
        ("multislerp", {}, [-2 / 3, 0.0, 2 / 3], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    return h
