"""Vectors of multislerp."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Paper, i64

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

STAGED = (
    "multislerp-three", "multislerp-two-at-a-right-angle", "multislerp-base", "multislerp-not-normalised",
    "multislerp-zero-vector", "multislerp-opposite", "multislerp-negative-weight", "multislerp-zero-beside-two",
    "multislerp-one-model-not-normalised", "multislerp-turned-round",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    x = given.models if given.base is None else [theta - given.base for theta in given.models]
    w = given.each("weight", 1.0)
    if given.params.get("normalize", True):
        w = [w_n / sum(w) for w_n in w]
    nu, C = on_sphere(x)
    found = {1: {"x": x}, 2: {"w": w}, 3: {"nu": nu, "C": C}}
    m = math.sqrt(max(sum(w_i * w_j * C[i, j] for i, w_i in enumerate(w) for j, w_j in enumerate(w)), 0))
    if m <= 1e-3 * sum(map(abs, w)):
        merged = sum(w_n * x_n for w_n, x_n in zip(w, x))
    else:
        c = [w_n / m for w_n in w]
        found[4] = {"c": c}
        merged = at_mean_length(c, w, nu, x)
    return found | {5: {"result": merged if given.base is None else given.base + merged}}


def on_sphere(x: list[Any]) -> tuple[list[float], Any]:
    """Lengths and cosines, from exact inner products."""
    G = [[sum(x_i * x_j) for x_j in x] for x_i in x]
    C = [
        [G_ij / math.sqrt(G[i][i] * G[j][j]) if G[i][i] * G[j][j] else 0 for j, G_ij in enumerate(of_i)]
        for i, of_i in enumerate(G)
    ]
    return [math.sqrt(G[n][n]) for n in range(len(x))], np.array(C, object)


def at_mean_length(c: list[float], w: list[Fraction], nu: list[float], x: list[Any]) -> Any:
    s = sum(w_n * nu_n for w_n, nu_n in zip(w, nu))
    return sum((s * c_n / nu_n if nu_n else 0) * x_n for c_n, nu_n, x_n in zip(c, nu, x))


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
    h.case("no-models", "nothing to average", [], None, ("multislerp", {}, REFUSED, ""))
    h.case(
        "weight-count", "two models, three weights", [[1.0], [2.0]], None, ("multislerp", {"weight": [1.0] * 3}, REFUSED, "")
    )
    h.case("all-zero", "no direction at all", [[0.0, 0.0]] * 3, None, ("multislerp", {}, [0.0, 0.0], ""))
    r = math.hypot(256.0, 1.0)
    x, y = 1 / (r * (r + 256.0)), 1 / r
    long = (256.0 + r) / 2 / math.hypot(x, y)
    h.case(
        "not-cancelled",
        "half the sum of the unit vectors of (256, 0) and (-256, 1) is 1/512 long, more than 1/1000: its direction, at the "
        "mean length of 256; with 4096 instead the straight mean, of length 1/2",
        [[256.0, 0.0], [-256.0, 1.0]],
        None,
        ("multislerp", {}, [long * x, long * y], ""),
        flags="MultislerpCancel",
        dtype="F64",
        tolerance=1e-10,
    )
    root = math.sqrt(5)
    for id, far, expect in (("length-zero", 2.0, [0.0, 0.0]), ("turned-round", 3.0, [-2 / root, 1 / root])):
        h.case(
            id,
            f"weights 2 and -1 on (1, 0), (0, {far:g}): direction (2, -1) / sqrt 5, mean length 2 - {far:g} = {2 - far:g}",
            [[1.0, 0.0], [0.0, far]],
            None,
            ("multislerp", {"weight": [2.0, -1.0]}, expect, ""),
            **exact,
        )
    h.case(
        "all-weights-negative",
        "weights -1 and -1 without division: direction (-1, -1) / sqrt 2, length -1 - 3; as with 1 and 1",
        [[1, 0], [0, 3]],
        None,
        ("multislerp", {"weight": -1.0, "normalize": False}, [4 * half, 4 * half], ""),
        **exact,
    )
    h.case("signs-cancel", "+ and -: the straight mean, (3 - 1) / 2", [[3.0], [-1.0]], None, ("multislerp", {}, [1.0], ""))
    h.case(
        "signs-of-three",
        "+, + and -: the direction +, at the mean length (3 + 1 + 1) / 3",
        [[3.0], [1.0], [-1.0]],
        None,
        ("multislerp", {}, [5 / 3], ""),
        **exact,
    )
    h.case(
        "squares-vanish",
        "2^-538 squared is 2^-1076, less than half the least number, and rounds to 0: no directions, so the straight mean",
        [[2.0**-538, 0.0], [0.0, 2.0**-538]],
        None,
        ("multislerp", {}, [2.0**-539, 2.0**-539], ""),
        dtype="F64",
    )
    h.case(
        "squares-infinite",
        "2^512 squared is infinite: an infinite mean length over an infinite length is NaN",
        [[2.0**512, 0.0], [0.0, 2.0**512]],
        None,
        ("multislerp", {}, [math.nan, math.nan], ""),
        dtype="F64",
    )
    for id, bad in (("nan", math.nan), ("infinity", math.inf)):
        h.case(
            id,
            "a length that is not finite, and a cosine that is NaN",
            [[bad, 1.0], [1.0, 1.0]],
            None,
            ("multislerp", {}, [math.nan, math.nan], ""),
        )
    counted = [{"x": [1.0], "ids": i64(3, 4)}, {"x": [3.0], "ids": i64(3, 4)}]
    h.case(
        "integers-agree",
        "signs that agree, mean length (1 + 3) / 2; equal integers are copied",
        counted,
        None,
        ("multislerp", {}, {"x": [2.0], "ids": i64(3, 4)}, ""),
        options={"integers": "equal"},
    )
    h.case(
        "integers-differ",
        "integers have no direction",
        [counted[0], {"x": [3.0], "ids": i64(3, 5)}],
        None,
        ("multislerp", {}, REFUSED, ""),
        options={"integers": "equal"},
    )
    h.case(
        "axes",
        "three axes; lengths of 5, product 7: cos w = 7/25, cos(w/2) = 4/5, and both coefficients are 1 / (2 4/5) = 5/8",
        [[[[4, 2]], [[-2, 1]], [[0, 0]]], [[[2, 0]], [[0, -1]], [[4, 2]]]],
        None,
        ("multislerp", {}, [[[3.75, 1.25]], [[-1.25, 0]], [[2.5, 1.25]]], "5/8 (6, 2, -2, 0, 4, 2)"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "equal-models",
        "one direction, (3, 4) / 5, and a mean length of 5; the base is added back",
        [[4.0, 5.0], [4.0, 5.0], [4.0, 5.0]],
        [1.0, 1.0],
        ("multislerp", {}, [4.0, 5.0], ""),
        dtype="F64",
        tolerance=1e-15,
    )
    return h
