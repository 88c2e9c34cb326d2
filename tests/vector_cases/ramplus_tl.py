"""Vectors of ramplus_tl."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import DTYPES, OPEN, REFUSED, Exact, Hand, Paper, fraction, i64
from vector_cases.ram import changes

CODE = {
    "official:ram": "xiangchi-yuan/mrl@e2d930d ram-main.py:agentic_reinforcement_merge_rescale_v2",
    "mergekit:ramplus_tl": "mergekit 0.1.5 mergekit/merge_methods/ram.py:ramplus_tl_merge",
}
FLAGS = {
    "ramplus_tl-mergekit-bf16-01": ["RamplusWidens"],
}
OPTIONS = {
    "ramplus_tl-mergekit-bf16-01": {"arithmetic": "native"},
}
PAPER = {
    "ramplus_tl-mergekit-01": Paper({"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "ramplus_tl-mergekit-04": Paper({"r": 0.3, "alpha": 0.8, "epsilon": 1e-5}, comment="up to the precision of the scale"),
}

STAGED = (
    "ramplus_tl-by-hand", "ramplus_tl-bound", "ramplus_tl-nothing-changed", "ramplus_tl-all-shared", "ramplus_tl-r-zero",
    "ramplus_tl-one-model", "ramplus_tl-alpha-infinite", "ramplus_tl-many-shared",
)  # fmt: skip


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    r, alpha, epsilon = (float(given.params[name]) for name in ("r", "alpha", "epsilon"))
    tau = [theta - given.base for theta in given.models]
    changed = changes(tau, epsilon)
    count = sum(changed)
    unique, shared = (fraction(x.astype(int)) for x in (count == 1, count > 1))
    rho = [Fraction(np.sum(c * shared), np.sum(c * unique)) if np.any(c * unique) else Fraction(0) for c in changed]
    scale = [1 + Fraction(r) * Fraction(min(rho_n, alpha)) for rho_n in rho]
    rescaled = [c * (s * unique + shared) * x for s, c, x in zip(scale, changed, tau)]
    return {
        1: {"tau": tau},
        2: {"changed": changed, "count": count},
        3: {"rho": rho},
        4: {"scale": scale, "unique": unique, "shared": shared, "tau": rescaled},
        5: {"result": given.base + sum(rescaled) / np.maximum(count, Fraction(1))},
    }


def hand() -> Hand:
    h = Hand("ramplus_tl", CODE)

    def scales(r: float, alpha: float, epsilon: float = 1e-5) -> dict[str, Any]:
        return {"r": r, "alpha": alpha, "epsilon": epsilon}

    def paper(params: dict[str, Any], expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("ramplus_tl", params, expect, why)

    def mergekit(params: dict[str, Any], expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("mergekit:ramplus_tl", params, expect, why)

    def official(factor: float, expect: Any, why: str = "", mode: str = "arm-r-v2") -> tuple[str, dict[str, Any], Any, str]:
        return ("official:ram", {"merge_mode": mode, "rescale_factor": factor, "threshold": 1e-5}, expect, why)

    h.case(
        "by-hand",
        "tau = (4, 0, 2, 0, -2, 8) and (0, -2, 4, 0, 2, 0): 2 shared over 2 unique, over 1; scales 1 + 1/2, 1 + 1/2 1.5",
        [[4.0, 0.0, 2.0, 0.0, -2.0, 8.0], [0.0, -2.0, 4.0, 0.0, 2.0, 0.0]],
        [0.0] * 6,
        paper(scales(0.5, 1.5), [6.0, -3.5, 3.0, 0.0, 0.0, 12.0]),
        mergekit(scales(0.5, 1.5), [6.0, -3.5, 3.0, 0.0, 0.0, 12.0]),
        official(1.5, [6.0, -3.0, 3.0, 0.0, 0.0, 12.0], "both overlaps count as 1"),
        flags="RamplusBound",
    )
    two_over_one = "tau = (4, 1, 1) and (0, 1, 1): 2 shared over 1 unique"
    h.case(
        "bound",
        two_over_one,
        [[4.0, 1.0, 1.0], [0.0, 1.0, 1.0]],
        [0.0] * 3,
        paper(scales(0.5, 0.2), [4.4, 1.0, 1.0], "4 (1 + 1/2 0.2)"),
        mergekit(scales(0.5, 0.2), [4.4, 1.0, 1.0], "4 (1 + 1/2 0.2)"),
        official(1.5, [6.0, 1.0, 1.0], "4 (1 + 1/2 min(1, 2))"),
        flags="RamplusBound",
        tolerance=1e-6,
    )
    h.case(
        "bound-arm-r",
        two_over_one,
        [[4.0, 1.0, 1.0], [0.0, 1.0, 1.0]],
        [0.0] * 3,
        official(1.5, [4 * (1 + 1 / 3), 1.0, 1.0], "4 (1 + 1/2 2/3)", mode="arm-r"),
        flags="RamplusBound",
        tolerance=1e-6,
    )
    scope = "x: tau = (4, 1) and (0, 1), 1 shared over 1 unique; y: tau = 4 and 0, none over 1; together 1 over 2"
    pair = [{"x": [4.0, 1.0], "y": [4.0]}, {"x": [0.0, 1.0], "y": [0.0]}]
    h.case(
        "scope",
        scope,
        pair,
        {"x": [0.0, 0.0], "y": [0.0]},
        paper(scales(0.5, 1.0), {"x": [6.0, 1.0], "y": [4.0]}, "3/2 and 1"),
        mergekit(scales(0.5, 1.0), {"x": [6.0, 1.0], "y": [4.0]}, "3/2 and 1"),
        official(1.5, {"x": [5.0, 1.0], "y": [5.0]}, "5/4 for the model"),
        flags="RamplusScope",
    )
    h.case(
        "scope-model",
        scope,
        pair,
        {"x": [0.0, 0.0], "y": [0.0]},
        paper(scales(0.5, 1.0), {"x": [5.0, 1.0], "y": [5.0]}, "5/4 for the model"),
        flags="RamplusScope",
        options={"over": "model"},
    )
    h.case(
        "nothing-changed",
        "the first model is the base",
        [[1.0, 2.0], [3.0, 2.0]],
        [1.0, 2.0],
        paper(scales(0.1, 0.2, 0.0), [3.0, 2.0], "its scale is not needed"),
        mergekit(scales(0.1, 0.2, 0.0), [float("nan")] * 2, "0 shared over max(0 unique, 0) is NaN, and NaN times 0 is"),
        flags="RamplusNothingChanged",
    )
    h.case(
        "nothing-changed-epsilon",
        "the first model is the base",
        [[1.0, 2.0], [3.0, 2.0]],
        [1.0, 2.0],
        paper(scales(0.1, 0.2), [3.0, 2.0], ""),
        mergekit(scales(0.1, 0.2), [3.0, 2.0], "0 shared over max(0 unique, 1e-5)"),
        official(1.2, [3.0, 2.0], "no change at all has a ratio of 0"),
        flags="RamplusNothingChanged",
    )
    h.case(
        "all-shared",
        "tau = 1 and 3: nothing is unique; (1 + 3) / 2",
        [[1.0], [3.0]],
        [0.0],
        paper(scales(0.5, 1.0), [2.0], ""),
        mergekit(scales(0.5, 1.0), [2.0], "1 / 1e-5 is bounded and multiplies 0"),
        official(1.5, OPEN, "1 / 0 fails"),
        flags="RamplusAllShared",
    )
    h.case(
        "shrinks",
        "tau = (4, 1) and (0, 1): 1 shared over 1 unique",
        [[4.0, 1.0], [0.0, 1.0]],
        [0.0, 0.0],
        paper(scales(-0.5, 1.0), REFUSED, "r is at least 0"),
        mergekit(scales(-0.5, 1.0), [2.0, 1.0], "4 (1 - 1/2)"),
        official(0.5, [4.0, 1.0], "a factor below 1 is set to 1"),
        flags="RamplusShrinks",
    )

    def sixteen(*values: float) -> dict[str, np.ndarray]:
        return {"x": np.array(values, DTYPES["BF16"])}

    h.case(
        "widens",
        "base 1, tau = (2^-7, 1) and (0, 1): 1 shared over 1 unique, scale 3/2; 1 + 3/256",
        [sixteen(1 + 2.0**-7, 2.0), sixteen(1.0, 2.0)],
        sixteen(1.0, 1.0),
        paper(scales(0.5, 1.0), sixteen(1 + 4 / 256, 2.0), "rounded to even"),
        mergekit(scales(0.5, 1.0), {"x": np.array([1 + 3 / 256, 2.0], np.float32)}, "float32"),
        flags="RamplusWidens",
    )
    h.case(
        "float32-scale",
        "tau = (1, 1) and (0, 1): 1 shared over 1 unique, counted as 0.2",
        [[1.0, 1.0], [0.0, 1.0]],
        [0.0, 0.0],
        paper(scales(0.1, 0.2), [1.02, 1.0], ""),
        mergekit(scales(0.1, 0.2), [float(np.float32(1.02)), 1.0], "the float32 that is next to 1.02"),
        flags="RamplusFloat32Scale",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "r-zero",
        "RAM: (4, 1) and (0, 3) give 4 and (1 + 3) / 2",
        [[4.0, 1.0], [0.0, 3.0]],
        [0.0, 0.0],
        paper(scales(0.0, 1.0), [4.0, 2.0]),
        mergekit(scales(0.0, 1.0), [4.0, 2.0]),
        official(1.0, [4.0, 2.0]),
    )
    h.case(
        "one-model",
        "all changes are unique, none is shared",
        [[4.0, 1.0]],
        [1.0, 1.0],
        paper(scales(0.5, 1.0), [4.0, 1.0]),
        mergekit(scales(0.5, 1.0), [4.0, 1.0]),
        official(1.5, [4.0, 1.0]),
    )
    h.case(
        "alpha-infinite",
        "tau = (4, 1, 1) and (0, 1, 1): 4 (1 + 1/2 2)",
        [[4.0, 1.0, 1.0], [0.0, 1.0, 1.0]],
        [0.0] * 3,
        ("ramplus_tl", {"r": 0.5, "alpha": "Infinity", "epsilon": 1e-5}, [8.0, 1.0, 1.0], ""),
        ("mergekit:ramplus_tl", {"r": 0.5, "alpha": "Infinity", "epsilon": 1e-5}, [8.0, 1.0, 1.0], ""),
    )
    h.case(
        "empty-and-scalar",
        "a number is shared, or unique with nothing shared",
        [{"e": [], "s": 3.0, "t": 3.0}, {"e": [], "s": 5.0, "t": 1.0}],
        {"e": [], "s": 1.0, "t": 1.0},
        paper(scales(0.5, 1.0), {"e": [], "s": 4.0, "t": 3.0}),
        mergekit(scales(0.5, 1.0), {"e": [], "s": 4.0, "t": 3.0}),
    )
    h.case("alpha-negative", "no overlap is below 0", [[1.0]], [0.0], paper(scales(0.1, -1.0), REFUSED))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("ramplus_tl", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("ramplus_tl", {}, REFUSED, ""))
    h.case(
        "defaults",
        "2^-17 is no change and 2^-16 is one: the models have one change of their own, 50 and 2^-16, and one that they "
        "share, 4 and 8. The overlap 1 is above alpha = 0.2: 1 + 0.1 * 0.2 times their own",
        [[50.0, 4.0, 0.0], [2.0**-17, 8.0, 2.0**-16]],
        [0.0, 0.0, 0.0],
        ("ramplus_tl", {}, [51.0, 6.0, 1.02 * 2.0**-16], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "alpha-zero",
        "RAM: (4, 1) and (0, 3) give 4 and (1 + 3) / 2",
        [[4.0, 1.0], [0.0, 3.0]],
        [0.0, 0.0],
        paper(scales(0.5, 0.0), [4.0, 2.0]),
        mergekit(scales(0.5, 0.0), [4.0, 2.0]),
    )
    h.case(
        "nothing-shared",
        "tau = (4, 0) and (0, 2): rho is 0 over 1",
        [[4.0, 0.0], [0.0, 2.0]],
        [0.0, 0.0],
        paper(scales(0.5, 1.0), [4.0, 2.0]),
        mergekit(scales(0.5, 1.0), [4.0, 2.0]),
    )
    h.case(
        "many-shared",
        "tau = (4, 1, 1, 1, 1, 1) and (0, 3, 3, 3, 3, 3): 5 shared over 1 unique, counted as 2: 4 (1 + 1/2 2)",
        [[4.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 3.0, 3.0, 3.0, 3.0]],
        [0.0] * 6,
        paper(scales(0.5, 2.0), [8.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        mergekit(scales(0.5, 2.0), [8.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
    )
    h.case(
        "one-tensor-changed",
        "the first model changed x alone, (4, 1), the second (0, 1) in x and 8 in y: 1 shared over 1 unique for both over "
        "the model, 3/2 of 4 and of 8",
        [{"x": [4.0, 1.0], "y": [0.0]}, {"x": [0.0, 1.0], "y": [8.0]}],
        {"x": [0.0, 0.0], "y": [0.0]},
        paper(scales(0.5, 1.0), {"x": [6.0, 1.0], "y": [12.0]}),
        options={"over": "model"},
    )
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, -0.0],
        paper(scales(0.5, 1.0), [0.0, 2.0]),
    )
    nan, inf = float("nan"), float("inf")
    h.case(
        "not-finite",
        "tau = (NaN, 1, inf, inf, 0) and (1, 1, 1, 0, 4): NaN is not counted, so the second model has 2 shared over 2 "
        "unique, 4 (1 + 1/2), and the first 2 over 1; (inf + 1) / 2 and inf (1 + 1/2 2)",
        [[nan, 1.0, inf, inf, 0.0], [1.0, 1.0, 1.0, 0.0, 4.0]],
        [0.0] * 5,
        paper(scales(0.5, 4.0), [nan, 1.0, inf, inf, 6.0]),
    )
    h.case(
        "integers",
        "tau = (4, 1) and (0, 1), 1 shared over 1 unique; the integers that differ are no third and fourth change",
        [{"x": [4.0, 1.0], "ids": i64(7, 8)}, {"x": [0.0, 1.0], "ids": i64(3, 4)}],
        {"x": [0.0, 0.0], "ids": i64(3, 4)},
        paper(scales(0.5, 1.0), {"x": [6.0, 1.0], "ids": i64(3, 4)}, "4 (1 + 1/2)"),
        options={"over": "model"},
    )
    h.case(
        "axes",
        "tau = (4, 1) and (0, 1) of three axes, 1 shared over 1 unique in the first: 4 (1 + 1/2), and the mean of 1 and 1",
        [[[[4.0], [1.0]]], [[[0.0], [1.0]]]],
        [[[0.0], [0.0]]],
        ("ramplus_tl", {"r": 0.5, "alpha": 1.0}, [[[6.0], [1.0]]], ""),
    )
    h.case(
        "equal-models",
        "tau = (4, -2) thrice: all shared, and nothing to rescale",
        [[5.0, -1.0]] * 3,
        [1.0, 1.0],
        ("ramplus_tl", {"r": 0.5, "alpha": 1.0}, [5.0, -1.0], ""),
    )
    h.case("all-base", "no change", [[3.0, -0.5]] * 2, [3.0, -0.5], ("ramplus_tl", {}, [3.0, -0.5], ""))
    return h
