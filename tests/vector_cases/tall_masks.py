"""Vectors of tall_masks."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import REFUSED, Exact, Hand, Tensors, Test, fraction, i64, origin, sign
from vector_cases.ties import trim

CODE = {
    "official:tall_masks": "nik-dim/tall_masks@d10af8b src/utils/tallmask_utils.py:generate_task_masks",
    "fusion_bench:tall_masks": "tanganke/fusion_bench@54c9e8c fusion_bench/method/tall_mask/task_arithmetic.py",
}

STAGED = (
    "tall_masks-by-hand", "tall_masks-second-task", "tall_masks-threshold", "tall_masks-threshold-zero", "tall_masks-equal",
    "tall_masks-ties", "tall_masks-ties-zero-sum", "tall_masks-ties-signs",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    tau_MTL, tau_t = sum(tau), tau[given.params.get("task", 0)]
    if given.params.get("multitask") == "ties":
        trimmed = [trim(x, int(given.params.get("density", 0.2) * x.size)) for x in tau]
        gamma = sign(sum(trimmed))
        tau_MTL = sum(np.where(gamma * x > 0, x, Fraction(0)) for x in trimmed)
    threshold = Fraction(given.params.get("threshold", 0.4))
    m_t = fraction((abs(tau_t) > threshold * abs(tau_MTL - tau_t)).astype(int))
    return {1: {"tau": tau}, 2: {"tau_MTL": tau_MTL}, 3: {"m_t": m_t}, 4: {"result": given.base + m_t * tau_MTL}}


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """One test for each task's model; of the first task under the plain name too, where the vector is a sum."""

    def part(prefix: str) -> Tensors:
        return {name.partition("/")[2]: x for name, x in tensors.items() if name.partition("/")[0] == prefix}

    given = json.loads(meta["params"])
    count = len({name.partition("/")[0] for name in tensors if name.startswith("model")})
    tests = []
    for task in range(count):
        asked = {"official:tall_masks": {key: given[key] for key in ("tall_mask_lambda", "use_ties")}}
        if task == 0 and not given["use_ties"]:
            asked["tall_masks"] = {"threshold": given["tall_mask_lambda"]}
        for entry, params in asked.items():
            tests.append(
                Test(
                    id=f"{id}-{task}" + ("" if ":" in entry else "-paper"),
                    entry=entry,
                    params={"task": task} | params,
                    models=[part(f"model{t}") for t in range(count)],
                    base=part("base"),
                    expect=part(f"out{task}"),
                    comment=meta["notes"].partition(". ")[2] or meta["notes"],
                    source=origin(meta["source"]),
                    tolerance=float(meta["tolerance"]),
                )
            )
    return tests


def hand() -> Hand:
    h = Hand("tall_masks", CODE)

    def plain(task: int = 0, threshold: float = 1.0, **more: Any) -> dict[str, Any]:
        return {"task": task, "threshold": threshold} | more

    def official(task: int = 0, tall_mask_lambda: float = 1.0, **more: Any) -> dict[str, Any]:
        return {"task": task, "tall_mask_lambda": tall_mask_lambda} | more

    h.case(
        "by-hand",
        "base 1; tau = (4, 2, 0, 3), (-1, 4, 2, 1): sum (3, 6, 2, 4); 4, 2, 0, 3 against |sum - tau_0| = 1, 4, 2, 1",
        [[5.0, 3.0, 1.0, 4.0], [0.0, 5.0, 3.0, 2.0]],
        [1.0, 1.0, 1.0, 1.0],
        ("tall_masks", plain(), [4.0, 1.0, 1.0, 5.0], "the mask is 1 0 0 1"),
        ("official:tall_masks", official(), [4.0, 1.0, 1.0, 5.0], "the same"),
    )
    h.case(
        "second-task",
        "base 1; tau = (4, 2, 0, 3), (-1, 4, 2, 1): sum (3, 6, 2, 4); 1, 4, 2, 1 against |sum - tau_1| = 4, 2, 0, 3",
        [[5.0, 3.0, 1.0, 4.0], [0.0, 5.0, 3.0, 2.0]],
        [1.0, 1.0, 1.0, 1.0],
        ("tall_masks", plain(1), [1.0, 7.0, 3.0, 1.0], "the mask is 0 1 1 0"),
        ("official:tall_masks", official(1), [1.0, 7.0, 3.0, 1.0], "the same"),
    )
    h.case(
        "threshold",
        "tau = (4, 2), (-1, 4): sum (3, 6); 4 against 1/4 of 1, 2 against 1/4 of 4",
        [[4.0, 2.0], [-1.0, 4.0]],
        [0.0, 0.0],
        ("tall_masks", plain(0, 0.25), [3.0, 6.0], "a smaller threshold sets more of the mask"),
        ("official:tall_masks", official(0, 0.25), [3.0, 6.0], "the same"),
    )
    h.case(
        "threshold-zero",
        "tau = (1, 0), (-9, 2): sum (-8, 2)",
        [[1.0, 0.0], [-9.0, 2.0]],
        [0.0, 0.0],
        ("tall_masks", plain(0, 0.0), [-8.0, 0.0], "the mask is 1 wherever the task changed the base"),
        ("official:tall_masks", official(0, 0.0), [-8.0, 0.0], "the same"),
    )
    h.case(
        "equal",
        "tau = (2, 0, 3) twice: sum (4, 0, 6); |tau| = 2, 0, 3 equals |sum - tau| = 2, 0, 3",
        [[2.0, 0.0, 3.0], [2.0, 0.0, 3.0]],
        [0.0, 0.0, 0.0],
        ("tall_masks", plain(), [0.0, 0.0, 0.0], "not greater: the base; with >= it would be (4, 0, 6)"),
        ("official:tall_masks", official(), [0.0, 0.0, 0.0], "the same"),
        flags="TallMasksEqual",
    )
    ulp = 2.0**-23
    h.case(
        "form",
        "base 1; tau = 3 ulps and -1/2 ulp: sum 5/2 ulps; 3 ulps against four times |sum - tau_0|",
        [[1 + 3 * ulp], [1 - ulp / 2]],
        [1.0],
        ("tall_masks", plain(0, 4.0), [1 + 2 * ulp], "four times 1/2 ulp is less: 1 + 5/2 ulps is stored as 1 + 2 ulps"),
        (
            "official:tall_masks",
            official(0, 4.0),
            [1.0],
            "the multi-task model is rounded first, to 1 + 2 ulps: four times 1 ulp is more",
        ),
        flags="TallMasksForm",
    )
    h.case(
        "operands",
        "base 10; tau = 1 and -3: sum -2; 1 against 3",
        [[11.0], [7.0]],
        [10.0],
        ("tall_masks", plain(), [10.0], "the mask is 0"),
        ("official:tall_masks", official(), [10.0], "the same"),
        ("fusion_bench:tall_masks", {"tall_mask_lambda": 1.0}, [8.0], "|theta_0 - tau| = 9 against 3: 10 - 2"),
        flags="TallMasksOperands",
    )
    h.tests[-1].registered = False
    h.case(
        "ties",
        "tau = (4, -3, 1, 2), (2, 5, 1/2, 1) trimmed to (4, -3, 0, 0), (2, 5, 0, 0): sums of what agrees (6, 5, 0, 0)",
        [[4.0, -3.0, 1.0, 2.0], [2.0, 5.0, 0.5, 1.0]],
        [0.0, 0.0, 0.0, 0.0],
        (
            "tall_masks",
            plain(multitask="ties", density=0.5),
            [6.0, 0.0, 0.0, 0.0],
            "4 against 2, 3 against 8; the trimmed 1 and 2 against themselves. A mean would give 3",
        ),
        flags="TallMasksTiesSum",
    )
    h.case(
        "ties-keeps-one-more",
        "one task, tau = 1..10, a fifth of it",
        [[float(x) for x in range(1, 11)]],
        [0.0] * 10,
        (
            "tall_masks",
            plain(0, 0.5, multitask="ties", density=0.2),
            [0.0] * 8 + [9.0, 10.0],
            "int(10 * 0.2) = 2 are kept",
        ),
        ("official:tall_masks", official(0, 0.5, use_ties=True), [0.0] * 7 + [8.0, 9.0, 10.0], "2 + 1 are kept"),
        flags="TallMasksTiesTrim",
    )
    h.case(
        "ties-zero-sum",
        "tau = (3, 1), (-3, 1), trimmed to (3, 0), (-3, 0): the sum is zero and so is the majority",
        [[3.0, 1.0], [-3.0, 1.0]],
        [0.0, 0.0],
        ("tall_masks", plain(1, multitask="ties", density=0.5), [0.0, 0.0], "no sign is elected: nothing is in the vector"),
        (
            "official:tall_masks",
            official(1, use_ties=True),
            [-3.0, 0.0],
            "the negative entries are taken: -3 is task 1's own",
        ),
        flags="TallMasksTiesZeroSum",
    )
    h.case(
        "top-k",
        "tau = (4, -3, 2, 1), (0, 0, 0, 1)",
        [[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
        [0.0] * 4,
        ("tall_masks", plain(0, 0.5), [4.0, -3.0, 2.0, 2.0], "sum (4, -3, 2, 2); 1 against half of 1"),
        ("official:tall_masks", official(0, 0.5), [4.0, -3.0, 2.0, 2.0], "k = 100 keeps all"),
        (
            "official:tall_masks",
            official(0, 0.5, k=50),
            [4.0, -3.0, 2.0, 1.0],
            "what is at least the 2nd smallest of each is added: (4, -3, 2, 0) and (0, 0, 0, 1)",
        ),
        flags="TallMasksTopK",
    )
    h.tests[-1].id = h.tests[-1].id[:-2] + "-50"
    h.case(
        "disjoint",
        "tau = (4, 0, 0), (0, -2, 1): no entry is shared, and each model comes back",
        [[5.0, 1.0, 1.0], [1.0, -1.0, 2.0]],
        [1.0, 1.0, 1.0],
        ("tall_masks", plain(1), [1.0, -1.0, 2.0], ""),
        ("official:tall_masks", official(1), [1.0, -1.0, 2.0], ""),
    )
    h.case(
        "one-task",
        "tau = (2, 0): sum - tau = 0",
        [[3.0, 1.0]],
        [1.0, 1.0],
        ("tall_masks", plain(), [3.0, 1.0], "the model itself"),
        ("official:tall_masks", official(), [3.0, 1.0], "the model itself"),
    )
    h.case(
        "opposite",
        "tau = 2 and -2: the sum is 0, and whatever the mask, nothing is recovered",
        [[3.0], [-1.0]],
        [1.0],
        ("tall_masks", plain(), [1.0], ""),
        ("official:tall_masks", official(), [1.0], ""),
    )
    h.case(
        "empty-scalar-integers",
        "a number is one entry; integers are the base's",
        [{"e": [], "s": 8.0, "ids": i64(3, 4)}, {"e": [], "s": 1.0, "ids": i64(3, 4)}],
        {"e": [], "s": 0.0, "ids": i64(3, 4)},
        ("tall_masks", plain(), {"e": [], "s": 9.0, "ids": i64(3, 4)}, "8 against 1"),
        ("official:tall_masks", official(), {"e": [], "s": 9.0, "ids": i64(3, 4)}, ""),
    )
    nan, inf = float("nan"), float("inf")
    h.case(
        "nan-inf",
        "tau = (NaN, 1, inf, 1), (1, NaN, 1, inf): sums NaN, NaN, inf, inf",
        [[nan, 1.0, inf, 1.0], [1.0, nan, 1.0, inf]],
        [0.0] * 4,
        ("tall_masks", plain(), [nan, nan, nan, nan], "a mask of 0 times what is not finite is NaN; inf - inf is NaN too"),
        ("official:tall_masks", official(), [nan, nan, nan, nan], ""),
    )
    h.case("no-such-task", "task 2 of two", [[1.0], [2.0]], [0.0], ("tall_masks", plain(2), REFUSED, "the first is 0"))
    h.case("task-negative", "task -1", [[1.0], [2.0]], [0.0], ("tall_masks", plain(-1), REFUSED, ""))
    h.case("threshold-negative", "threshold -1/4", [[1.0]], [0.0], ("tall_masks", plain(0, -0.25), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0], [2.0]], None, ("tall_masks", {}, REFUSED, ""))
    h.case("no-models", "nothing to recover", [], [0.0], ("tall_masks", {}, REFUSED, ""))
    h.case(
        "defaults",
        "sum (12, 10); the first task takes 4 > 0.4 * 6 but not 2 > 0.4 * 10",
        [[2.0, 4.0], [10.0, 6.0]],
        [0.0, 0.0],
        ("tall_masks", {}, [0.0, 10.0], "task is 0 and threshold 0.4 by default"),
    )
    h.case(
        "ties-signs",
        "sums 1/4 and -2: what agrees with their signs is 1/2 and -3; threshold 0 takes both",
        [[0.5, -3.0], [-0.25, 1.0]],
        [0.0, 0.0],
        ("tall_masks", {"multitask": "ties", "density": 1.0, "threshold": 0.0}, [0.5, -3.0], ""),
    )
    h.case(
        "threshold-infinite",
        "tau = (4, 1), (0, 1); 4 is not more than infinity times 0, which is NaN, and 1 not more than infinity",
        [[5.0, 2.0], [1.0, 2.0]],
        [1.0, 1.0],
        ("tall_masks", {"threshold": "Infinity"}, [1.0, 1.0], "the base"),
    )
    h.case(
        "ties-density-zero",
        "base 1; tau = (4, 2, 1), (1, 1, 1)",
        [[5.0, 3.0, 2.0], [2.0, 2.0, 2.0]],
        [1.0] * 3,
        ("tall_masks", plain(0, 0.0, multitask="ties", density=0.0), [1.0] * 3, "nothing is in the vector"),
        ("tall_masks", plain(0, 0.0, multitask="ties", density=0.25), [1.0] * 3, "int(3/4) = 0 entries"),
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, -0.0],
        ("tall_masks", plain(), [0.0, 2.0], ""),
    )
    h.case(
        "integers-not-counted",
        "two floating entries, int(2 * 0.5) = 1 is in the vector; the integers that differ are not among them",
        [{"ids": i64(9, 9, 9, 9), "x": [1.0, 2.0]}],
        {"ids": i64(3, 4, 5, 6), "x": [0.0, 0.0]},
        ("tall_masks", plain(0, 0.0, multitask="ties", density=0.5), {"ids": i64(3, 4, 5, 6), "x": [0.0, 2.0]}, ""),
    )
    h.case(
        "equal-models",
        "tau = (2, -1) twice, tau_MTL = (4, -2): 2 > lambda 2 at lambda 1/2, and not at 1",
        [[3.0, 0.0]] * 2,
        [1.0, 1.0],
        ("tall_masks", {"task": 1, "threshold": 0.5}, [5.0, -1.0], ""),
        ("tall_masks", {"task": 1, "threshold": 1.0}, [1.0, 1.0], ""),
    )
    h.case(
        "axes",
        "tau = (4, 0, 2, 1) of three axes, and one entry, 4; the other task's (-4, 8, 2, 0) and 0: tau_MTL (0, 8, 4, 1) and "
        "4; at 1/2, 4 > 2, 0 > 4 is not, 2 > 1, 1 > 0 and 4 > 0",
        [
            {"conv": [[[4.0], [0.0]], [[2.0], [1.0]]], "one": [4.0]},
            {"conv": [[[-4.0], [8.0]], [[2.0], [0.0]]], "one": [0.0]},
        ],
        {"conv": [[[0.0], [0.0]], [[0.0], [0.0]]], "one": [0.0]},
        ("tall_masks", {"threshold": 0.5}, {"conv": [[[0.0], [0.0]], [[4.0], [1.0]]], "one": [4.0]}, ""),
    )
    return h
