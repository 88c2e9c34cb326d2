"""Vectors of breadcrumbs."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from vector_cases import OPEN, REFUSED, Exact, Hand, Paper, i64

CODE = {
    "mergellm:breadcrumbs": "yule-BUAA/MergeLLM@9178ef9 "
    "model_merging_methods/merging_methods.py:MergingMethod.breadcrumbs_merging",
    "peft:magnitude_prune": "huggingface/peft@5d602fd src/peft/utils/merge_utils.py:magnitude_prune",
    "official:breadcrumbs": "rezazzr/breadcrumbs@f89fc66 src/task_vectors.py:TaskVectorMiddleKeep",
}
TOOLS = ("mergellm",)
FLAGS = {
    "breadcrumbs-MergeLLM-00": ["BreadcrumbsKeepsOneMore"],
    "breadcrumbs-official-00": ["BreadcrumbsPerRow", "BreadcrumbsScalars"],
    "breadcrumbs-official-03": ["BreadcrumbsPerRow", "BreadcrumbsScalars"],
    "breadcrumbs-official-06": ["BreadcrumbsPerRow", "BreadcrumbsTies"],
    "breadcrumbs-mergekit-04": ["BreadcrumbsGammaSlice", "BreadcrumbsDensityOne"],
    "breadcrumbs-mergekit-bf16-01": ["BreadcrumbsTies"],
}
PAPER = {
    "breadcrumbs-official-00": Paper(
        {"density": 0.2, "gamma": 0.1, "lambda_": 0.4}, names=("ln_w",), comment="a vector is its own single row"
    ),
    "breadcrumbs-official-03": Paper(
        {"density": 0.5, "gamma": 0.5, "lambda_": 1.0}, names=("ln_w",), comment="a vector is its own single row"
    ),
}

STAGED = tuple(
    f"breadcrumbs-{id}"
    for id in ("per-row", "keeps-one-more", "no-outlier", "window-past-the-end", "keep-first", "density-one", "ties", "sum")
)


def stages(given: Exact) -> dict[int, dict[str, Any]]:
    tau = [theta - given.base for theta in given.models]
    r, k = (int(given.params.get(name, usual) * given.base.size) for name, usual in (("gamma", 0.006), ("density", 0.15)))
    masked = [window(x, r, k) for x in tau]
    return {
        1: {"tau": tau},
        2: {"tau": masked},
        3: {"result": given.base + Fraction(given.params.get("lambda_", 0.2)) * sum(masked)},
    }


def window(x: Any, r: int, k: int) -> Any:
    """The k entries that come in magnitude after the r largest, of equal ones the lower index first; else 0."""
    ranked = sorted(range(x.size), key=lambda i: (-abs(x.flat[i]), i))
    return np.array([x.flat[i] if i in ranked[r : r + k] else Fraction(0) for i in range(x.size)], object).reshape(x.shape)


def hand() -> Hand:
    h = Hand("breadcrumbs", CODE)

    def plain(density: float, gamma: float) -> dict[str, Any]:
        return {"density": density, "gamma": gamma, "lambda_": 1.0}

    def official(keep: float, remove: float, first: bool = True) -> dict[str, Any]:
        return {"top_k_keep": keep, "top_k_remove": remove, "alpha": 1.0, "remove_first": first}

    def mergekit(density: float, gamma: float) -> dict[str, Any]:
        return {
            "weight": [1.0],
            "density": density,
            "gamma": gamma,
            "normalize": False,
            "rescale": False,
            "lambda_": 1.0,
        }

    def mergellm(density: float, small: float) -> dict[str, Any]:
        return {"param_density": density, "param_value_mask_rate": small, "scaling_coefficient": 1.0}

    four = [1.0, -2.0, 3.0, -4.0]
    h.case(
        "per-row",
        "tau = (1, 2, 3, 4) over (5, 6, 7, 8), a quarter removed, a half kept",
        [[[1, 2, 3, 4], [5, 6, 7, 8]]],
        [[0] * 4, [0] * 4],
        ("breadcrumbs", plain(0.5, 0.25), [[0, 0, 3, 4], [5, 6, 0, 0]], "of 8: 8 and 7 removed, 6 5 4 3 kept"),
        (
            "official:breadcrumbs",
            official(0.5, 0.25),
            [[0, 2, 3, 0], [0, 6, 7, 0]],
            "of each row of 4: 1 removed, 2 kept",
        ),
        ("mergekit:breadcrumbs", mergekit(0.5, 0.25), [[0, 0, 3, 4], [5, 6, 0, 0]], "per tensor"),
        flags="BreadcrumbsPerRow",
    )
    h.case(
        "gamma-below-one-entry",
        "tau = (1, -2, 3, -4), int(4 * 0.01) = 0 removed, 2 kept",
        [four],
        [0.0] * 4,
        ("breadcrumbs", plain(0.5, 0.01), [0.0, 0.0, 3.0, -4.0], ""),
        ("official:breadcrumbs", official(0.5, 0.01), [0.0, 0.0, 3.0, -4.0], ""),
        (
            "mergekit:breadcrumbs",
            mergekit(0.5, 0.01),
            [0.0, 0.0, 3.0, -4.0],
            "0.1.4 sliced to [.. : -0] and kept nothing",
        ),
        flags="BreadcrumbsGammaSlice",
    )
    ten = [float(k) for k in range(1, 11)]
    h.case(
        "keeps-one-more",
        "tau = 1..10, of which three tenths are small, one tenth is large, and six stay",
        [ten],
        [0.0] * 10,
        ("breadcrumbs", plain(0.6, 0.1), [0.0] * 3 + ten[3:9] + [0.0], "10 removed, six kept"),
        ("mergellm:breadcrumbs", mergellm(0.6, 0.3), [0.0] * 2 + ten[2:9] + [0.0], "3rd smallest <= |tau| <= 9th smallest"),
        flags="BreadcrumbsKeepsOneMore",
    )
    h.case(
        "no-small-entry",
        "tau = (1, -2, 3, -4)",
        [four],
        [0.0] * 4,
        ("breadcrumbs", plain(0.75, 0.25), [1.0, -2.0, 3.0, 0.0], "-4 removed, the rest kept"),
        ("mergellm:breadcrumbs", mergellm(0.75, 0.2), OPEN, "int(4 * 0.2) = 0: the 0th smallest does not exist"),
        flags="BreadcrumbsNoSmallEntry",
    )
    h.case(
        "small-entries-exceed-what-goes",
        "of 10 entries int(10 (1 - 0.9)) = 0 go, and 8 of them are to be small: the defaults of its merging_models",
        [ten],
        [0.0] * 10,
        ("mergellm:breadcrumbs", mergellm(0.9, 0.8), REFUSED, "an assertion fails"),
    )
    h.case(
        "no-outlier",
        "tau = (1, -2, 3, -4), half of it kept",
        [four],
        [0.0] * 4,
        ("breadcrumbs", plain(0.5, 0.0), [0.0, 0.0, 3.0, -4.0], "nothing removed"),
        ("peft:magnitude_prune", {"weights": [1.0], "density": 0.5}, [0.0, 0.0, 3.0, -4.0], "prunes, then adds"),
    )
    h.case(
        "prune-weights",
        "tau = (4, 1) and (1, -2), half of each kept: (4, 0), (0, -2); weights 1/2 and 3",
        [[4.0, 1.0], [1.0, -2.0]],
        [0.0, 0.0],
        ("peft:magnitude_prune", {"weights": [0.5, 3.0], "density": 0.5}, [2.0, -6.0], ""),
    )
    h.case(
        "window-past-the-end",
        "tau = (1, -2, 3, -4), 2 removed, 3 wanted of 2 left",
        [four],
        [0.0] * 4,
        ("breadcrumbs", plain(0.75, 0.5), [1.0, -2.0, 0.0, 0.0], "the two that are left"),
        ("official:breadcrumbs", official(0.75, 0.5), [1.0, -2.0, 0.0, 0.0], "the third place goes to a zero"),
        (
            "mergekit:breadcrumbs",
            mergekit(0.75, 0.5),
            [1.0, -2.0, 3.0, 0.0],
            "density wins: three are kept, one removed",
        ),
        flags="BreadcrumbsWindowPastEnd",
    )
    h.case(
        "keep-first",
        "tau = (1, -2, 3, -4), half kept, a quarter removed",
        [four],
        [0.0] * 4,
        ("breadcrumbs", plain(0.5, 0.25), [0.0, -2.0, 3.0, 0.0], "-4 removed, then 3 and -2 kept"),
        (
            "official:breadcrumbs",
            official(0.5, 0.25, first=False),
            [0.0, 0.0, 3.0, 0.0],
            "-4 and 3 kept, then -4 removed",
        ),
        flags="BreadcrumbsKeepFirst",
    )
    h.case(
        "density-one",
        "tau = (1, -2, 3, -4), density 1, a quarter removed",
        [four],
        [0.0] * 4,
        ("breadcrumbs", plain(1.0, 0.25), [1.0, -2.0, 3.0, 0.0], "the largest is removed all the same"),
        ("official:breadcrumbs", official(1.0, 0.25), [1.0, -2.0, 3.0, 0.0], ""),
        ("mergekit:breadcrumbs", mergekit(1.0, 0.25), four, "density 1 changes nothing, gamma is ignored"),
        flags="BreadcrumbsDensityOne",
    )
    h.case(
        "scalar",
        "a 0-d tensor, 1 + 4 = 5",
        [5.0],
        1.0,
        ("breadcrumbs", plain(0.5, 0.0), 1.0, "int(1 * 0.5) = 0 of its entries are kept: the base"),
        ("official:breadcrumbs", official(0.5, 0.0), 5.0, "0-d tensors are left whole"),
        ("mergekit:breadcrumbs", mergekit(0.5, 0.0), 1.0, "none is kept"),
        flags="BreadcrumbsScalars",
    )
    h.case(
        "ties",
        "tau = (2, -2, 2, 2): ranks go to the lower index first; rank 0 is removed, 1 and 2 are kept",
        [[2.0, -2.0, 2.0, 2.0]],
        [0.0] * 4,
        ("breadcrumbs", plain(0.5, 0.25), [0.0, -2.0, 2.0, 0.0], ""),
        ("mergellm:breadcrumbs", mergellm(0.5, 0.25), [2.0, -2.0, 2.0, 2.0], "2 <= |tau| <= 2: all"),
        flags="BreadcrumbsTies",
    )
    h.case(
        "sum",
        "base 1; tau = (4, 2), (-2, 6), each loses its largest: (0, 2), (-2, 0); half the sum is added",
        [[5.0, 3.0], [-1.0, 7.0]],
        [1.0, 1.0],
        ("breadcrumbs", {"density": 0.5, "gamma": 0.5, "lambda_": 0.5}, [0.0, 2.0], ""),
        ("official:breadcrumbs", official(0.5, 0.5) | {"alpha": 0.5}, [0.0, 2.0], ""),
    )
    h.case("density-zero", "nothing is kept: the base", [four], [0.0] * 4, ("breadcrumbs", plain(0.0, 0.0), [0.0] * 4, ""))
    h.case(
        "per-tensor",
        "tau = (1, 2), (30, 40): each tensor is its own, 0 removed, 1 kept",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0]},
        ("breadcrumbs", plain(0.5, 0.25), {"a": [0.0, 2.0], "b": [0.0, 40.0]}, ""),
    )
    h.case("density-negative", "density -1/4", [[1.0]], [0.0], ("breadcrumbs", {"density": -0.25}, REFUSED, ""))
    h.case("gamma-above-one", "gamma 3/2", [[1.0]], [0.0], ("breadcrumbs", {"gamma": 1.5}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("breadcrumbs", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("breadcrumbs", {}, REFUSED, ""))
    h.case(
        "defaults",
        "tau = 5, 10, ... 1000, two hundred entries: int(0.006 * 200) = 1 is removed, 1000, and int(0.15 * 200) = 30 stay, "
        "850 to 995, a fifth of each is added",
        [[5.0 * k for k in range(1, 201)]],
        [0.0] * 200,
        ("breadcrumbs", {}, [float(k) if 170 <= k < 200 else 0.0 for k in range(1, 201)], ""),
        dtype="F64",
        tolerance=1e-14,
    )
    for count, r, k in ((6, 0, 0), (7, 0, 1), (166, 0, 24), (167, 1, 25)):
        h.case(
            f"defaults-{count}",
            f"tau = 5, 10, ... {5 * count}: int(0.006 * {count}) = {r} removed, int(0.15 * {count}) = {k} stay; a fifth",
            [[5.0 * i for i in range(1, count + 1)]],
            [0.0] * count,
            ("breadcrumbs", {}, [float(i) if count - r - k < i <= count - r else 0.0 for i in range(1, count + 1)], ""),
            dtype="F64",
            tolerance=1e-14,
        )
    hundred = [float(i) for i in range(1, 101)]
    h.case(
        "cut-in-float64",
        "tau = 1 ... 100: 0.29 * 100 is 28.999999999999996 in float64, and 28 stay",
        [hundred],
        [0.0] * 100,
        ("breadcrumbs", plain(0.29, 0.0), [0.0] * 72 + hundred[72:], ""),
    )
    h.case("gamma-one", "all are outliers: the base", [four], [1.0] * 4, ("breadcrumbs", plain(0.5, 1.0), [1.0] * 4, ""))
    h.case(
        "nothing-goes",
        "base 1; tau = (4, 2), (-2, 6), all kept: task arithmetic, half the sum",
        [[5.0, 3.0], [-1.0, 7.0]],
        [1.0, 1.0],
        ("breadcrumbs", {"density": 1.0, "gamma": 0.0, "lambda_": 0.5}, [2.0, 5.0], ""),
    )
    h.case(
        "zeros-take-places",
        "tau = (0, 0, 3, 0): 3 removed, and the three that stay are zeros",
        [[0.0, 0.0, 3.0, 0.0]],
        [0.0] * 4,
        ("breadcrumbs", plain(0.75, 0.25), [0.0] * 4, ""),
    )
    h.case("scalar-whole", "int(1) = 1 entry stays", [5.0], 1.0, ("breadcrumbs", plain(1.0, 0.0), 5.0, ""))
    h.case(
        "negative-zero",
        "-0.0 + 0 = 0.0; comparing values, as runners do, does not tell the two apart",
        [[-0.0, 2.0]],
        [-0.0, -0.0],
        ("breadcrumbs", plain(0.5, 0.0), [0.0, 2.0], ""),
    )
    for id, bad in (("nan-is-largest", math.nan), ("removed-infinity", math.inf)):
        h.case(
            id,
            f"tau = ({bad}, 4, 1, 2): the first removed, as the largest, and 0 times it is NaN; 4 and 2 kept",
            [[bad, 4.0, 1.0, 2.0]],
            [0.0] * 4,
            ("breadcrumbs", plain(0.5, 0.25), [math.nan, 4.0, 0.0, 2.0], ""),
        )
    h.case(
        "infinities-of-both-signs",
        "tau = (inf, 1) and (-inf, 1), all kept: inf - inf is NaN",
        [[math.inf, 1.0], [-math.inf, 1.0]],
        [0.0, 0.0],
        ("breadcrumbs", plain(1.0, 0.0), [math.nan, 2.0], ""),
    )
    h.case(
        "empty-and-integers",
        "no entries; integers are the base's; half of (1, 2) stays",
        [{"e": [], "ids": i64(3, 4), "x": [1.0, 2.0]}],
        {"e": [], "ids": i64(3, 4), "x": [0.0, 0.0]},
        ("breadcrumbs", plain(0.5, 0.0), {"e": [], "ids": i64(3, 4), "x": [0.0, 2.0]}, ""),
    )
    h.case(
        "over-model",
        "tau = (1, 2), (30, 40), ranked over the model on request: 40 removed, 30 and 2 kept",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0]},
        ("breadcrumbs", plain(0.5, 0.25), {"a": [0.0, 2.0], "b": [30.0, 0.0]}, ""),
        options={"over": "model"},
    )
    h.case("density-above-one", "density 3/2", [[1.0]], [0.0], ("breadcrumbs", {"density": 1.5}, REFUSED, ""))
    h.case("gamma-negative", "gamma -1/4", [[1.0]], [0.0], ("breadcrumbs", {"gamma": -0.25}, REFUSED, ""))
    h.case(
        "axes",
        "tau = (1, 2, 3, 4) of three axes: 4 removed, 3 and 2 kept",
        [[[[1.0], [2.0]], [[3.0], [4.0]]]],
        [[[0.0], [0.0]], [[0.0], [0.0]]],
        ("breadcrumbs", {"density": 0.5, "gamma": 0.25, "lambda_": 1.0}, [[[0.0], [2.0]], [[3.0], [0.0]]], ""),
    )
    h.case(
        "equal-models",
        "tau = (1, 2, 3, 4) twice: 4 removed, 3 and 2 kept in each",
        [[1.0, 2.0, 3.0, 4.0]] * 2,
        [0.0] * 4,
        ("breadcrumbs", {"density": 0.5, "gamma": 0.25, "lambda_": 1.0}, [0.0, 4.0, 6.0, 0.0], ""),
    )
    h.case(
        "all-base",
        "zeros are ranked, removed and kept",
        [[3.0, -0.5]] * 2,
        [3.0, -0.5],
        ("breadcrumbs", {"density": 0.5, "gamma": 0.0, "lambda_": 1.0}, [3.0, -0.5], ""),
    )
    return h
