"""Vectors of emr."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Tensors, Test, i64, origin, sign

CODE = {
    "official:emr": "harveyhuang18/EMR_Merging@cc225ec merge_vit/src/main_emr_merging.py:emr_merge",
    "fusion_bench:emr": "tanganke/fusion_bench@54c9e8c fusion_bench/method/emr_merging/utils.py:emr_merge",
}
PLAIN = {"emr-official-00", "emr-official_flat-00", "emr-fusion_bench-00"}  # no sum of task vectors in them is zero
FLAGS = {"emr-official-03": ["EmrZeroSum", "EmrAverage"]}

STAGED = tuple(
    f"emr-{id}"
    for id in (
        "by-hand", "second-task", "zero-sum", "no-change", "outvoted", "one-task", "copies", "disjoint", "average-of-one",
    )
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    gamma = sign(sum(tau))
    epsilon = np.max([np.where(gamma * x > 0, abs(x), Fraction(0)) for x in tau], axis=0)
    tau_uni = gamma * epsilon
    tau_t = tau[given.params.get("task", 0)]
    m_t = np.where(gamma * tau_t > 0, 1, 0)
    left = sum(abs(m_t * tau_uni))
    lambda_t = sum(abs(tau_t)) / left if left else Fraction(0)
    return {
        1: {"tau": tau},
        2: {"gamma": gamma, "tau_uni": tau_uni},
        3: {"m_t": m_t},
        4: {"lambda_t": lambda_t},
        5: {"result": given.base + lambda_t * (m_t * tau_uni)},
    }


def several(id: str, tensors: Tensors, meta: dict[str, str]) -> list[Test]:
    """One test for each task's model. The authors add magnitudes up in float32, whatever the weights' precision."""

    def part(prefix: str) -> Tensors:
        return {name.partition("/")[2]: x for name, x in tensors.items() if name.partition("/")[0] == prefix}

    count = len({name.partition("/")[0] for name in tensors if name.startswith("model")})
    base, flat = part("base"), "official_flat" in id
    tests = []
    for task in range(count):
        expect = part(f"merged{task}")
        if not expect:
            r, u, m = (part(key) for key in ("rescalers", "unified", f"mask{task}"))
            expect = {name: (x + u[name] * m[name] * float(r["r"][task])).astype(x.dtype) for name, x in base.items()}
        asked = {"fusion_bench:emr" if "fusion_bench" in id else "official:emr": {"flat": True} if flat else {}}
        if id in PLAIN:
            asked["emr"] = {"average": "entries" if flat else "tensors"}
        for entry, params in asked.items():
            tests.append(
                Test(
                    id=f"{id}-{task}" + ("" if ":" in entry else "-paper"),
                    entry=entry,
                    params={"task": task} | params,
                    models=[part(f"model{t}") for t in range(count)],
                    base=base,
                    expect=expect,
                    comment=meta["notes"].partition("; merged")[0].strip(),
                    source=origin(meta["source"]),
                    flags=FLAGS.get(id, []),
                    tolerance=1e-6,
                )
            )
    return tests


def hand() -> Hand:
    h = Hand("emr", CODE)

    def case(id: str, comment: str, models: Any, base: Any, expect: Any, task: int = 0, **more: Any) -> None:
        """One tensor, in which an average over tensors is one over entries."""
        h.case(
            id, comment, models, base,
            ("emr", {"task": task}, expect, ""),
            ("official:emr", {"task": task}, expect, ""),
            ("fusion_bench:emr", {"task": task}, expect, ""),
            **more,
        )  # fmt: skip

    two = [[5.0, -1.0, 2.0, 1.0, 4.0, 3.0], [3.0, 6.0, 3.0, 1.0, -6.0, 2.0]]
    tau = "base 1; tau = (4, -2, 1, 0, 3, 2), (2, 5, 2, 0, -7, 1): signs + + + 0 - +, unified (4, 5, 2, 0, -7, 2)"
    case(
        "by-hand",
        tau + "; task 0 agrees at 1, 3 and 6: 4 + 2 + 2 = 8 of 12, so that it is rescaled by 3/2",
        two,
        [1.0] * 6,
        [7.0, 1.0, 4.0, 1.0, 1.0, 4.0],
    )
    case(
        "second-task",
        tau + "; task 1 agrees everywhere: 4 + 5 + 2 + 7 + 2 = 20 of 17",
        two,
        [1.0] * 6,
        [1 + 0.85 * x for x in (4, 5, 2, 0, -7, 2)],
        1,
        tolerance=1e-6,
    )
    h.case(
        "zero-sum",
        "base 0; tau = (3, 2), (-3, 1)",
        [[3.0, 2.0], [-3.0, 1.0]],
        [0.0, 0.0],
        ("emr", {"task": 1}, [0.0, 4.0], "no sign: unified (0, 2), the rescaler of task 1 is 4/2"),
        ("official:emr", {"task": 1}, [-2.4, 1.6], "-: unified (-3, 2), the rescaler of task 1 is 4/5"),
        ("fusion_bench:emr", {"task": 1}, [-2.4, 1.6], "-"),
        flags="EmrZeroSum",
        tolerance=1e-6,
    )
    small = [{"a": [4.0], "b": [1.0, -1.0, 1.0, 1.0]}, {"a": [8.0], "b": [1.0, 2.0, 1.0, 1.0]}]
    zero = {"a": [0.0], "b": [0.0] * 4}
    h.case(
        "average",
        "base 0; tau = 4 and (1, -1, 1, 1), 8 and (1, 2, 1, 1); unified 8 and (1, 2, 1, 1), of which task 0 has 8 and "
        "(1, 0, 1, 1)",
        small,
        zero,
        ("emr", {}, {"a": [64 / 11], "b": [8 / 11, 0.0, 8 / 11, 8 / 11]}, "8 over 11"),
        ("emr", {"average": "tensors"}, {"a": [160 / 35], "b": [20 / 35, 0.0, 20 / 35, 20 / 35]}, "4 + 4/4 over 8 + 3/4"),
        ("official:emr", {}, {"a": [160 / 35], "b": [20 / 35, 0.0, 20 / 35, 20 / 35]}, "4 + 4/4 over 8 + 3/4"),
        ("official:emr", {"flat": True}, {"a": [64 / 11], "b": [8 / 11, 0.0, 8 / 11, 8 / 11]}, "8/5 over 11/5"),
        ("fusion_bench:emr", {}, {"a": [160 / 35], "b": [20 / 35, 0.0, 20 / 35, 20 / 35]}, "4 + 4/4 over 8 + 3/4"),
        flags="EmrAverage",
        tolerance=1e-6,
    )
    h.tests[-4].id = h.tests[-4].id[:-2] + "-tensors"
    h.tests[-2].id = h.tests[-2].id[:-2] + "-flat"
    nan, inf = float("nan"), float("inf")
    h.case(
        "no-change",
        "base 1; tau = (0, 0), (2, -2): task 0 changed nothing",
        [[1.0, 1.0], [3.0, -1.0]],
        [1.0, 1.0],
        ("emr", {}, [1.0, 1.0], "the base"),
        ("official:emr", {}, [nan, nan], "the rescaler is 0 / 0"),
        ("fusion_bench:emr", {}, [nan, nan], "the rescaler is 0 / 0"),
        flags="EmrNoChange",
    )
    h.case(
        "outvoted",
        "base 1; tau = (1, -1), (-2, 2): task 0 agrees nowhere",
        [[2.0, 0.0], [-1.0, 3.0]],
        [1.0, 1.0],
        ("emr", {}, [1.0, 1.0], "the base"),
        ("official:emr", {}, [nan, nan], "the rescaler is 2 / 0, and infinity times 0 NaN"),
        ("fusion_bench:emr", {}, [nan, nan], "the rescaler is 2 / 0, and infinity times 0 NaN"),
        flags="EmrNoChange",
    )
    case("one-task", "base 1; tau = (2, -3, 0): unified and rescaler 1", [[3.0, -2.0, 1.0]], [1.0] * 3, [3.0, -2.0, 1.0])
    case("copies", "equal models come back", [[3.0, -2.0]] * 3, [1.0, 1.0], [3.0, -2.0], 2)
    case(
        "disjoint",
        "base 1; tau = (2, 0, 0), (0, -3, 1): what only one task changed is its own",
        [[3.0, 1.0, 1.0], [1.0, -2.0, 2.0]],
        [1.0] * 3,
        [1.0, -2.0, 2.0],
        1,
    )
    case(
        "empty-scalar-integers",
        "base 0; tau = 8 and 4: unified 8, rescaler of task 1 1/2; integers are the base's",
        [{"s": 8.0, "ids": i64(3, 4)}, {"s": 4.0, "ids": i64(3, 4)}],
        {"s": 0.0, "ids": i64(3, 4)},
        {"s": 4.0, "ids": i64(3, 4)},
        1,
        flags="EmrIntegers",
    )
    h.case(
        "empty",
        "a tensor without entries; base 0; tau = 8 and 4",
        [{"e": [], "s": 8.0}, {"e": [], "s": 4.0}],
        {"e": [], "s": 0.0},
        ("emr", {"task": 1}, {"e": [], "s": 4.0}, ""),
        ("official:emr", {"task": 1}, OPEN, "their mean of no entries is NaN, and with it every rescaler"),
        flags="EmrEmpty",
    )
    h.case(
        "nan-inf",
        "base 0; tau = (NaN, 1), (1, 1): one NaN is in the sums of its task, whose rescaler is NaN",
        [[nan, 1.0], [1.0, 1.0]],
        [0.0, 0.0],
        ("emr", {}, [nan, nan], ""),
    )
    h.case(
        "inf",
        "base 0; tau = (inf, 1), (-1, 2): unified (inf, 2)",
        [[inf, 1.0], [-1.0, 2.0]],
        [0.0, 0.0],
        ("emr", {"task": 1}, [nan, nan], "0 times infinity, also in the sum that the rescaler divides by"),
    )
    h.case("no-such-task", "task 2 of two", [[1.0], [2.0]], [0.0], ("emr", {"task": 2}, REFUSED, "the first is 0"))
    h.case("task-negative", "task -1", [[1.0], [2.0]], [0.0], ("emr", {"task": -1}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("emr", {}, REFUSED, ""))
    h.case("no-models", "nothing to recover", [], [0.0], ("emr", {}, REFUSED, ""))
    h.case(
        "average-of-one",
        "base 1; tau = (4, -2), (2, 2): signs + 0, unified (4, 0); 4 + 2 over 4, and with means 3 over 2",
        [[5.0, -1.0], [3.0, 3.0]],
        [1.0, 1.0],
        ("emr", {"average": "tensors"}, [7.0, 1.0], "of one tensor both are the same"),
        flags="EmrAverage",
    )
    h.case(
        "election-of-sums",
        "base 0; tau = 1, 1 and -3: - is elected, by its weight and not by two models to one; unified -3",
        [[1.0], [1.0], [-3.0]],
        [0.0],
        ("emr", {"task": 2}, [-3.0], "the rescaler is 3/3"),
    )
    h.case(
        "nobody-changed",
        "base (1, 2, 3); tau = (0, 3, 2), (0, -3, 2): what nobody changed and what cancels is the base's for both",
        [[1.0, 5.0, 5.0], [1.0, -1.0, 5.0]],
        [1.0, 2.0, 3.0],
        ("emr", {}, [1.0, 2.0, 8.0], "unified (0, 0, 2), the rescaler 5/2"),
        ("emr", {"task": 1}, [1.0, 2.0, 8.0], ""),
        flags="EmrZeroSum",
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, 1.0],
        ("emr", {}, [0.0, 2.0], ""),
    )
    h.case(
        "inf-of-the-task",
        "base 0; tau = (inf, 1), (-1, 2): the task's own infinity makes its rescaler infinity over infinity",
        [[inf, 1.0], [-1.0, 2.0]],
        [0.0, 0.0],
        ("emr", {}, [nan, nan], ""),
    )
    h.case(
        "masked-infinity",
        "base 0; tau = (1, 2), (inf, 1), task 0, which agrees: the sum of what the mask leaves is infinite, and the "
        "rescaler 3 over infinity",
        [[1.0, 2.0], [inf, 1.0]],
        [0.0, 0.0],
        ("emr", {}, [nan, 0.0], "0 times infinity, and 0 times 2"),
    )
    h.case(
        "nan-of-another",
        "base 0; tau = (NaN, 1), (1, 1), task 1: 0 times NaN is in the sum of what the mask leaves",
        [[nan, 1.0], [1.0, 1.0]],
        [0.0, 0.0],
        ("emr", {"task": 1}, [nan, nan], ""),
    )
    pair = [
        {"e": [], "ids": i64(3, 4, 5), "s": 8.0, "x": [1.0, 1.0]},
        {"e": [], "ids": i64(3, 4, 5), "s": 4.0, "x": [2.0, 2.0]},
    ]
    unified = {"e": [], "ids": i64(3, 4, 5), "s": 8.0, "x": [2.0, 2.0]}
    for average, sums in (("entries", (10, 12)), ("tensors", (9, 10))):
        scale = sums[0] / sums[1]
        h.case(
            f"not-counted-{average}",
            "base 0; tau = 8 and (1, 1), 4 and (2, 2): unified 8 and (2, 2), beside integers and a tensor of no entries",
            pair,
            {"e": [], "ids": i64(3, 4, 5), "s": 0.0, "x": [0.0, 0.0]},
            ("emr", {"average": average}, unified | {"s": 8 * scale, "x": [2 * scale] * 2}, f"{sums[0]} over {sums[1]}"),
            flags="EmrAverage",
            tolerance=1e-6,
        )
    return h
