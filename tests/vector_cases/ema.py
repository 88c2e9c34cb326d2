"""Vectors of ema."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from vector_cases import REFUSED, Exact, Hand, i64

STAGED = ("ema-halves", "ema-order", "ema-decay", "ema-start", "ema-mu-zero", "ema-mu-one")


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    mu, theta = Fraction(given.params.get("mu", 0.01)), given.base
    for theta_n in given.models:
        theta = (1 - mu) * theta + mu * theta_n
    return {1: {"result": theta}}


def hand() -> Hand:
    h = Hand("ema", {})
    h.case(
        "halves",
        "mu = 1/2: 8, then (8 + 0) / 2 = 4, (4 + 4) / 2 = 4, (4 + 1) / 2 = 2.5; and -4, -4, 0, 0",
        [[0.0, -4.0], [4.0, 4.0], [1.0, 0.0]],
        [8.0, -4.0],
        ("ema", {"mu": 0.5}, [2.5, 0.0], ""),
    )
    h.case(
        "order",
        "the same checkpoints the other way round: 8, (8 + 1) / 2 = 4.5, (4.5 + 4) / 2 = 4.25, 4.25 / 2 = 2.125",
        [[1.0], [4.0], [0.0]],
        [8.0],
        ("ema", {"mu": 0.5}, [2.125], "the later one counts more"),
    )
    h.case(
        "decay",
        "from 0 to 8 with the parameter 1/4",
        [[8.0]],
        [0.0],
        ("ema", {"mu": 0.25}, [2.0], "mu is the share of the new one; where it is called decay, 6 comes out"),
        flags="EmaDecay",
    )
    h.case(
        "default",
        "mu = 1/100 of 100",
        [[100.0]],
        [0.0],
        ("ema", {}, [1.0], ""),
        dtype="F64",
        tolerance=1e-15,
    )
    h.case(
        "start",
        "0, then (0 + 8) / 2 = 4, (4 + 4) / 2 = 4",
        [[8.0], [4.0]],
        [0.0],
        ("ema", {"mu": 0.5}, [4.0], "from 8, the first checkpoint, it would be (8 + 4) / 2 = 6"),
        flags="EmaStart",
    )
    h.case(
        "warmup",
        "from 0 to 8 with mu = 1/4 in a first step",
        [[8.0]],
        [0.0],
        ("ema", {"mu": 0.25}, [2.0], "a first step whose decay is 0 gives 8, one whose decay is 2/11 gives 6.545"),
        flags="EmaWarmup",
    )
    h.case(
        "lerp-form",
        "float32, mu 1: x + (y - x) would be 2^25 + (1 - 2^25) = 0, since 1 - 2^25 rounds",
        [[1.0]],
        [2.0**25],
        ("ema", {"mu": 1.0}, [1.0], "0 x + 1 y is y exactly"),
        flags="EmaLerpForm",
    )
    h.case(
        "rounds-once",
        "bfloat16, mu = 1/4, three steps from 1 to 1 + 2^-7, its neighbour: 1 + (1 - 27/64) 2^-7, more than half-way",
        [[1.0078125], [1.0078125], [1.0078125]],
        [1.0],
        ("ema", {"mu": 0.25}, [1.0078125], "each step by itself, 1 + 2^-9, is rounded back to 1"),
        flags="EmaRoundsEachStep",
        dtype="BF16",
    )
    h.case(
        "running-statistics",
        "batch-norm statistics are tensors like others: 3/4 * 0 + 1/4 * 8",
        [{"bn.running_mean": [8.0], "bn.weight": [4.0]}],
        {"bn.running_mean": [0.0], "bn.weight": [0.0]},
        ("ema", {"mu": 0.25}, {"bn.running_mean": [2.0], "bn.weight": [1.0]}, ""),
        flags="EmaBuffers",
    )
    counters = [{"x": [8.0], "n": i64(7)}], {"x": [0.0], "n": i64(5)}
    h.case(
        "integers-base",
        "8 / 4 = 2; the integer tensor stays the base's",
        *counters,
        ("ema", {"mu": 0.25}, {"x": [2.0], "n": i64(5)}, "asked for by the caller"),
        flags="EmaBuffers",
    )
    h.case(
        "integers-differ",
        "5 in the base, 7 in the checkpoint",
        *counters,
        ("ema", {"mu": 0.25}, REFUSED, "a counter has no mean that is one of its values"),
        flags="EmaBuffers",
        options={"integers": "equal"},
    )
    h.case("mu-zero", "1 * x + 0 * y is x", [[1.0], [5.0]], [2.0**25], ("ema", {"mu": 0.0}, [2.0**25], ""))
    h.case("mu-one", "the last checkpoint", [[1.0], [5.0]], [2.0**25], ("ema", {"mu": 1.0}, [5.0], ""))
    h.case(
        "infinity",
        "infinity stays, and 0 * inf is NaN, where the caller lets them pass",
        [[math.inf, 1.0], [1.0, 1.0]],
        [0.0, math.inf],
        ("ema", {"mu": 0.5}, [math.inf, math.inf], ""),
        ("ema", {"mu": 1.0}, [math.nan, math.nan], ""),
    )
    h.tests[-1].id = h.tests[-1].id[:-2] + "-mu-one"
    h.case(
        "shapes",
        "0-d, empty and 3-d: (1 + 3) / 2",
        [{"s": 3.0, "e": [], "c": [[[3.0]]]}],
        {"s": 1.0, "e": [], "c": [[[1.0]]]},
        ("ema", {"mu": 0.5}, {"s": 2.0, "e": [], "c": [[[2.0]]]}, ""),
        dtype="F64",
    )
    h.case("no-checkpoint", "nothing to follow", [], [1.0], ("ema", {}, REFUSED, ""))
    h.case("no-base", "nowhere to start", [[1.0]], None, ("ema", {}, REFUSED, ""))
    h.case("mu-outside", "mu = 1.5", [[1.0]], [0.0], ("ema", {"mu": 1.5}, REFUSED, "an average does not leave its terms"))
    h.case(
        "one-checkpoint",
        "float64: 1 - 0.1 is 0.9; 0.9 * 13 is 11.700000000000001, 0.1 * 13 is 1.3, and their sum lies half an ulp above 13",
        [[13.0]],
        [13.0],
        ("ema", {"mu": 0.1}, [13.000000000000002], "to the bit what wise_ft gives with alpha = 0.1"),
        flags="EmaLerpForm",
        dtype="F64",
    )
    h.case(
        "equal-models",
        "0.99 * 3 = 2.9699999999999998 and 0.01 * 3 = 0.03 make 2.9999999999999996, an ulp less; the next step stays there",
        [[3.0], [3.0]],
        [3.0],
        ("ema", {}, [2.9999999999999996], ""),
        dtype="F64",
    )
    for count, expect, why in ((3, 40.99999999999998, "each step loses an ulp"), (13, 40.99999999999997, "four in all")):
        h.case(
            f"equal-models-{count}",
            f"{count} times 41 in float64, of ulp 2^-47: {why}",
            [[41.0]] * count,
            [41.0],
            ("ema", {}, [expect], ""),
            dtype="F64",
        )
    h.case(
        "nan",
        "NaN in the first checkpoint; 1, then 1 and 3 make 2 beside it",
        [[math.nan, 1.0], [5.0, 3.0]],
        [1.0, 1.0],
        ("ema", {"mu": 0.5}, [math.nan, 2.0], ""),
    )
    h.case("mu-negative", "mu = -1/2", [[1.0]], [0.0], ("ema", {"mu": -0.5}, REFUSED, "an average does not leave its terms"))
    h.case(
        "axes",
        "four axes, mu 1/2: 0 and 2 make 1, 1 and 5 make 3; 4 and 8 make 6, 6 and 0 make 3",
        [[[[[2.0]], [[8.0]]]], [[[[5.0]], [[0.0]]]]],
        [[[[0.0]], [[4.0]]]],
        ("ema", {"mu": 0.5}, [[[[3.0]], [[3.0]]]], ""),
    )
    return h
