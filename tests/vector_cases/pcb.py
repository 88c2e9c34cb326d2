"""Vectors of pcb."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Tensors, Test, i64, origin

CODE = {
    "official:pcb": "duguodong7/pcb-merging@5897888 nlp_source_code/utils/merge_utils.py:task_para_att_merge",
    "official_readme:pcb": "duguodong7/pcb-merging@5897888 pcb-merging.py:PCB_merge",
    "official_vision:pcb": "duguodong7/pcb-merging@5897888 vision_source_code/pcb.py:__main__",
    "official_es:pcb": "duguodong7/pcb-merging@5897888 vision_source_code/pcb_ES.py:PCB",
}
FLAGS = {"pcb-official_readme-03": ["PcbConstant"]}
SLACK = 1e-6

STAGED = ("pcb-scores", "pcb-by-hand", "pcb-clamp", "pcb-density-one", "pcb-lambda", "pcb-two-of-two")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    beta = [np.array([Fraction(x) for x in b], object) for b in scores([[float(x) for x in t] for t in tau])]
    k = int(given.params.get("density", 0.1) * given.base.size)
    dropped = [np.array([x if i in best(b, k) else Fraction(0) for i, x in enumerate(b)], object) for b in beta]
    divisor = sum(dropped)
    merged = sum(b * w * x for b, w, x in zip(dropped, given.each("weight", 1.0), tau)) / np.where(
        divisor == 0, Fraction(1), divisor
    )
    result = given.base + Fraction(given.params.get("lambda_", 1.0)) * merged
    return {1: {"tau": tau}, 3: {"beta": beta}, 4: {"beta": dropped}, 5: {"result": result}}


def best(beta: Any, k: int) -> list[int]:
    return sorted(range(beta.size), key=lambda i: (-beta[i], i))[:k]


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """The model that a script would evaluate: its base plus its merged task vector."""
    given = {key: x for key, x in json.loads(meta["params"]).items() if key != "lambda"}
    count = len({name.partition("/")[0] for name in tensors if name.startswith("model")})
    base = tensors["base/flat"]
    test = Test(
        id=id,
        entry=f"{id.split('-')[1]}:pcb",
        params=given,
        models=[{"flat": tensors[f"model{t}/flat"]} for t in range(count)],
        base={"flat": base},
        expect={"flat": (base + tensors["tv/merged"]).astype(base.dtype)},
        comment=meta["notes"].strip(),
        source=origin(meta["source"]),
        flags=FLAGS.get(id, []),
        tolerance=float(meta["tolerance"]) if base.dtype == np.float64 else SLACK,
    )
    return [test]


def hand() -> Hand:
    h = Hand("pcb", CODE)

    def plain(density: float, **more: Any) -> dict[str, Any]:
        return {"density": density} | more

    def officials(ratio: float, clamp: float, *expect: Any, why: tuple[str, ...] = ("",) * 4) -> list[Any]:
        """What the four give: one value for all, or one each."""
        each = expect if len(expect) == 4 else expect * 4
        keys = ("att_ratio", "pcb_ratio", "att_ratio", "pcb_ratio")
        return [(entry, {key: ratio, "clamp": clamp, "lams": 1.0}, x, w) for entry, key, x, w in zip(CODE, keys, each, why)]

    one, two = [-0.5, -0.25, 1.0, 0.75], [1.5, 0.0, -2.0, 1.0]
    b_1, b_2 = scores([one, two])
    h.case(
        "scores",
        "base 0; tau = (-1/2, -1/4, 1, 3/4), (3/2, 0, -2, 1); of each the best entry",
        [one, two],
        [0.0] * 4,
        ("pcb", plain(0.25), [0.0, 0.0, (b_1[2] - 2 * b_2[2]) / (b_1[2] + b_2[2]), 0.0], "the third of both, in conflict"),
        *officials(
            0.5, 0.0, [0.0, 0.0, -2.0, 0.75], [0.0, 0.0, -2.0, 0.75], [1.5, 0.0, 0.0, 0.75], [0.0, 0.0, 0.0, 0.875],
            why=(
                "e^(2 N^2) tanh(F sum F) = (-0.58, 0.06, -5.63, 2.10), (2.79, 0, 7.12, 1.55); the second best weighs 0",
                "as there",
                "e^(2 N^2) tanh(F sum SN) = (-0.26, 0, 0, 1.71), (1.71, 0, 0, 1.36)",
                "e^(2 N^2) sum tanh(SN SN) = (-0.17, 0, 0, 1.80), (0.82, 0, 0, 0.93): the mean of 3/4 and 1",
            ),
        ),
        flags="PcbScores",
        tolerance=SLACK,
    )  # fmt: skip
    h.case(
        "clamp",
        "base 0; tau = 1 ... 8, one model, whose weights cancel",
        [[float(x) for x in range(1, 9)]],
        [0.0] * 8,
        ("pcb", plain(0.5), [0.0] * 4 + [5.0, 6.0, 7.0, 8.0], "the four largest, as they are"),
        *officials(
            0.5, 0.125, [0.0] * 5 + [6.0, 7.0, 7.0],
            why=("8 is held at 7; of the four best the least is the threshold and has the weight 0",) * 4,
        ),
        flags="PcbClamp PcbLeastScore",
        tolerance=SLACK,
    )  # fmt: skip
    h.case(
        "little-spread",
        "base 0; tau = (1024, 1025), one model, whose squares differ by 2049: they are moved to 0 and 1 before powers "
        "are taken",
        [[1024.0, 1025.0]],
        [0.0, 0.0],
        ("pcb", plain(1.0), [1024.0, 1025.0], "it comes back"),
    )
    h.case(
        "many-models",
        "base 0; tau = (2, 1) ninety times: the powers of the first entry are e^(90 (1 - 1)), of the second e^(90 (0 - 1))",
        [[2.0, 1.0]] * 90,
        [0.0, 0.0],
        ("pcb", plain(0.5), [2.0, 0.0], "the first; e^90 is beyond float32"),
    )
    nan, inf = float("nan"), float("inf")
    h.case(
        "one-kept",
        "base 0; tau = (1, 2, 3, 4), a quarter",
        [[1.0, 2.0, 3.0, 4.0]],
        [0.0] * 4,
        ("pcb", plain(0.25), [0.0, 0.0, 0.0, 4.0], ""),
        *officials(0.25, 0.0, [nan] * 4, why=("the threshold is the largest score: 0 / 0",) * 4),
        flags="PcbOneKept",
    )
    h.case(
        "ties",
        "base 0; tau = (4, 3, 3, 3), three quarters",
        [[4.0, 3.0, 3.0, 3.0]],
        [0.0] * 4,
        ("pcb", plain(0.75), [4.0, 3.0, 3.0, 0.0], "exactly three, the lower index first"),
        *officials(0.75, 0.0, [4.0, 0.0, 0.0, 0.0], why=("all that equal the threshold have the weight 0",) * 4),
        flags="PcbThresholdTies",
        tolerance=SLACK,
    )
    still, moved = [1.0] * 4, [3.0, 1.0, 1.0, 1.0]
    share = (math.e**2 / (math.e**2 + 3)) * (math.e / (math.e + 3) + 0.25)
    h.case(
        "no-change",
        "base 1; tau = 0 and (2, 0, 0, 0); the products with 0 are one number",
        [still, moved],
        [1.0] * 4,
        ("pcb", plain(0.25), [1 + 2 * share / (share + 0.125), 1.0, 1.0, 1.0],
         "0 everywhere has the weights 1/4 (1/4 + 1/4), and its first entry stays"),
        *officials(0.5, 0.0, [nan] * 4, why=("0 / 0 in the magnitudes of the first",) * 4),
        flags="PcbConstant",
        tolerance=SLACK,
    )  # fmt: skip
    h.case(
        "density-zero",
        "nothing is kept",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("pcb", plain(0.0), [1.0, 2.0], "the base"),
        *officials(0.0, 0.0, REFUSED, why=("the index of the threshold is the number of entries: out of range",) * 4),
        flags="PcbDensityZero",
    )
    h.case(
        "density-one",
        "base 1; one model, tau = (2, -4, 0, 1): its weights cancel",
        [[3.0, -3.0, 1.0, 2.0]],
        [1.0] * 4,
        ("pcb", plain(1.0), [3.0, -3.0, 1.0, 2.0], "the model"),
        tolerance=SLACK,
    )
    h.case(
        "lambda",
        "base 1; one model, tau = (2, -4, 0, 1), half of it kept: -4 and 2",
        [[3.0, -3.0, 1.0, 2.0]],
        [1.0] * 4,
        ("pcb", plain(0.5, weight=2.0, lambda_=0.25), [2.0, -1.0, 1.0, 1.0], "half of 2 and of -4"),
        ("pcb", plain(0.5, lambda_=0.0), [1.0] * 4, "the base"),
        tolerance=SLACK,
    )
    h.tests[-1].id = h.tests[-1].id[:-2] + "-zero"
    six = [[5.0, 3.0, -1.0, 1.0, 1.0, 1.0], [3.0, -3.0, -3.0, 1.0, 1.0, 1.0]]
    six_tau = [[x - 1 for x in m] for m in six]
    a, b = scores(six_tau)
    h.case(
        "by-hand",
        "base 1; tau = (4, 2, -2, 0, 0, 0), (2, -4, -4, 0, 0, 0), a third of each: 4 and -2, -4 and -4",
        six,
        [1.0] * 6,
        ("pcb", plain(1 / 3), [5.0, -3.0, 1 - (2 * a[2] + 4 * b[2]) / (a[2] + b[2]), 1.0, 1.0, 1.0],
         "the third entry is the mean of -2 and -4 with their weights"),
        tolerance=SLACK,
    )  # fmt: skip
    h.case(
        "copies",
        "base 1; three times the same model, tau = (2, -4, 0, 1), half of it kept",
        [[3.0, -3.0, 1.0, 2.0]] * 3,
        [1.0] * 4,
        ("pcb", plain(0.5), [3.0, -3.0, 1.0, 1.0], "the mean of equal entries"),
        tolerance=SLACK,
    )
    h.case(
        "two-tensors",
        "base 0; tau = (1, 2) and (3, 4), one model; half of the model's entries stay",
        [{"a": [1.0, 2.0], "b": [3.0, 4.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0]},
        ("pcb", plain(0.5), {"a": [0.0, 0.0], "b": [3.0, 4.0]}, ""),
        tolerance=SLACK,
    )
    h.case(
        "empty-scalar-integers",
        "a number is one entry; integers are the base's",
        [{"e": [], "s": 8.0, "ids": i64(3, 4)}],
        {"e": [], "s": 0.0, "ids": i64(3, 4)},
        ("pcb", plain(1.0), {"e": [], "s": 8.0, "ids": i64(3, 4)}, "the product is one number"),
        tolerance=SLACK,
    )
    h.case(
        "nan",
        "one NaN is in the sums and the ends of its model",
        [[nan, 1.0, 2.0, 3.0]],
        [0.0] * 4,
        ("pcb", plain(0.5), [nan] * 4, ""),
        *officials(0.5, 0.0, [nan] * 4),
    )
    h.case("inf", "infinity less infinity", [[inf, 1.0, 2.0, 3.0]], [0.0] * 4, ("pcb", plain(0.5), [nan] * 4, ""))
    h.case("density-negative", "density -1/4", [[1.0]], [0.0], ("pcb", plain(-0.25), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("pcb", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("pcb", {}, REFUSED, ""))
    h.case(
        "density-default",
        "the larger an entry of one model, the larger its weight: of ten the largest stays, and has no other to share with",
        [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 16.0]],
        [0.0] * 10,
        ("pcb", {}, [0.0] * 9 + [16.0], "density is 0.1 by default"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "density-below-one-entry",
        "a quarter of three entries is none",
        [[3.0, -1.0, 5.0]],
        [1.0, 2.0, 3.0],
        ("pcb", plain(0.25), [1.0, 2.0, 3.0], "the base"),
    )
    shared = [(b_1[i] * one[i] + b_2[i] * two[i]) / (b_1[i] + b_2[i]) for i in range(4)]
    h.case(
        "two-of-two",
        "base 0; tau = (-1/2, -1/4, 1, 3/4), (3/2, 0, -2, 1); nothing is dropped",
        [one, two],
        [0.0] * 4,
        ("pcb", plain(1.0), shared, "the means with the weights beta"),
        tolerance=SLACK,
    )
    h.case(
        "one-magnitude",
        "tau = (-2, 2, 2), of which the agreement (-10, 2, 8) with (5, 1, 4) decides: its third entry stays. Of the other "
        "model the first does, with e^2 (e / 5.59 + 1 / 5.67) = 4.9 against e^1.25 (e^0.625 / 5.59 + e / 5.67) = 2.8",
        [[-2.0, 2.0, 2.0], [5.0, 1.0, 4.0]],
        [0.0] * 3,
        ("pcb", plain(0.34), [5.0, 0.0, 2.0], ""),
        tolerance=SLACK,
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, -0.0],
        ("pcb", plain(0.5), [0.0, 2.0], ""),
    )
    h.case(
        "integers-not-counted",
        "two floating entries, int(2 * 0.5) = 1 stays; the integers that differ are not among them",
        [{"ids": i64(9, 9, 9, 9), "x": [1.0, 2.0]}],
        {"ids": i64(3, 4, 5, 6), "x": [0.0, 0.0]},
        ("pcb", plain(0.5), {"ids": i64(3, 4, 5, 6), "x": [0.0, 2.0]}, ""),
    )
    h.case(
        "axes",
        "base 1; tau = (2, -4, 0, 1) of three axes, one model, half of it kept",
        [[[[3.0], [-3.0]], [[1.0], [2.0]]]],
        [[[1.0], [1.0]], [[1.0], [1.0]]],
        ("pcb", plain(0.5), [[[3.0], [-3.0]], [[1.0], [1.0]]], ""),
        tolerance=SLACK,
    )
    h.case(
        "all-base",
        "all scores are alike, and all task vectors 0",
        [[3.0, -0.5]] * 2,
        [3.0, -0.5],
        ("pcb", plain(0.5), [3.0, -0.5], ""),
    )
    return h


def scores(tau: list[list[float]]) -> list[np.ndarray]:
    """The paper's beta, written out."""

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum()

    t = np.asarray(tau)
    return [softmax(len(t) * norm(x * x)) * sum(softmax(norm(x * y)) for y in t) for x in t]
