"""Cases by hand for spec/vectors, with dyadic numbers where that can be: the sum in a comment can be redone on paper.

Each is one input and what several entries make of it: the plain name is the paper's semantics, `tool:name` what that
tool's code does. Flags say which way of going wrong a case shows; they are described in vector_notes.toml.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
Tensors = dict[str, np.ndarray]


@dataclass
class Test:
    """One case; consecutive tests that share entry, source, params and options become one group of the file."""

    id: str
    entry: str
    params: dict[str, Any]
    models: list[Tensors]
    base: Tensors | None
    expect: Tensors
    comment: str
    source: dict[str, str]
    flags: list[str] = field(default_factory=list)
    tolerance: float = 0.0
    result: str = "valid"
    stats: list[Tensors] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    registered: bool = True


def origin(text: str) -> dict[str, str]:
    """Reads `owner/name@commit function` and `mergekit 0.1.5 (PyPI) function`."""
    match = re.match(r"(\S+?)(?:@(\S+)| (\d[\d.]*))\s+(?:\(.*?\)\s*)?(.*)", text)
    assert match, text
    repository, commit, version, function = match.groups()
    return {"how": "ran", "repository": repository, "version": commit or version, "function": function}


CODE = {
    "mergekit:linear": "mergekit 0.1.5 mergekit/merge_methods/linear.py:linear_merge",
    "mergekit:slerp": "mergekit 0.1.5 mergekit/merge_methods/slerp.py:slerp_merge_method",
    "mergekit:model_stock": "mergekit 0.1.5 mergekit/merge_methods/model_stock.py:model_stock_merge_method",
    "official:task_arithmetic": "mlfoundations/task_vectors@826a64c src/task_vectors.py:TaskVector",
    "official:ties": "prateeky2806/ties-merging@44e7891 src/utils/merge_utils.py:merge_methods",
    "official:dare": "yule-BUAA/MergeLM@6d49ad9 model_merging_methods/merging_methods.py:MergingMethod.mask_merging",
    "official:della": "declare-lab/della@8067515 mergekit/mergekit/sparsify.py:rank_magnitude",
    "official:breadcrumbs": "rezazzr/breadcrumbs@f89fc66 src/task_vectors.py:TaskVectorMiddleKeep",
    "official:uniform_soup": "mlfoundations/model-soups@d5398f1 main.py",
    "official:wise_ft": "mlfoundations/wise-ft@58b7a4b src/wise_ft.py:_merge",
    "official:widen": "yule-BUAA/MergeLLM@9178ef9 model_merging_methods/merging_methods.py:MergingMethod.widen_merging",
}
FAMILY = "mergekit 0.1.5 mergekit/merge_methods/generalized_task_arithmetic.py:GeneralizedTaskArithmeticMerge"


def arrays(value: Any, dtype: str) -> Tensors:
    """A tensor `x` from numbers, or several from a mapping; an array keeps the dtype it has."""
    if not isinstance(value, dict):
        value = {"x": value}
    return {name: x if isinstance(x, np.ndarray) else np.array(x, DTYPES[dtype]) for name, x in value.items()}


class Hand:
    """Collects the cases by hand of one method."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.tests: list[Test] = []

    def case(
        self,
        id: str,
        comment: str,
        models: list[Any],
        base: Any = None,
        *answers: tuple[str, dict[str, Any], Any, str],
        flags: str = "",
        dtype: str = "F32",
        tolerance: float = 0.0,
        masks: list[Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """One input and what each entry makes of it: answers of (entry, params, expected, why)."""
        for entry, params, expect, why in answers:
            tool = entry.partition(":")[0] if ":" in entry else ""
            source = {"how": "by hand"}
            if tool:
                source = origin(CODE.get(entry, FAMILY)) | source
            stats = None
            if masks is not None:
                stats = [arrays(mask, "U8") for mask in masks]
                if entry == "official:dare":
                    stats = [{name: np.array(1 - x, np.float32) for name, x in one.items()} for one in stats]
                else:
                    stats = [{f"{name}.mask": x for name, x in one.items()} for one in stats]
            if (refused := expect is REFUSED) or expect is OPEN:
                expect = {}
            self.tests.append(
                Test(
                    id=f"{self.method}-{id}" + (f"-{tool}" if tool else ""),
                    entry=entry,
                    params=params,
                    models=[arrays(model, dtype) for model in models],
                    base=None if base is None else arrays(base, dtype),
                    expect=arrays(expect, dtype) if expect != {} else {},
                    comment="; ".join(filter(None, [comment, why])),
                    source=source,
                    flags=flags.split(),
                    tolerance=tolerance,
                    result="invalid" if refused else ("acceptable" if not expect and expect == {} else "valid"),
                    stats=stats,
                    options=options or {},
                )
            )


REFUSED = object()  # the input must be refused
OPEN = object()  # no value is asserted


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def linear() -> Hand:
    h = Hand("linear")
    h.case(
        "uniform",
        "(4 + 8) / 2 = 6, (-2 + 2) / 2 = 0",
        [[4, -2], [8, 2]],
        None,
        ("linear", {}, [6, 0], "weights are 1 by default"),
        ("official:uniform_soup", {}, [6, 0], ""),
    )
    h.case(
        "normalizes",
        "x = 4 and 8 with weights 1 and 3",
        [[4.0], [8.0]],
        None,
        ("linear", {"weight": [1.0, 3.0]}, [7.0], "normalised: 4/4 + 3*8/4 = 7"),
        ("mergekit:linear", {"weight": [1.0, 3.0], "normalize": True}, [7.0], "(4 + 24) / 4 = 7"),
        flags="LinearNormalizes",
    )
    h.case(
        "unnormalized",
        "x = 4 and 8 with weights 1 and 3",
        [[4.0], [8.0]],
        None,
        ("linear", {"weight": [1.0, 3.0], "normalize": False}, [28.0], "4 + 3*8 = 28"),
        ("mergekit:linear", {"weight": [1.0, 3.0], "normalize": False}, [28.0], "4 + 24 = 28"),
        flags="LinearNormalizes",
    )
    h.case(
        "extrapolates",
        "weights 2 and -1: 2*4 - 8 = 0, 2*8 - 2 = 14",
        [[4, 8], [8, 2]],
        None,
        ("linear", {"weight": [2.0, -1.0]}, [0, 14], ""),
    )
    h.case(
        "zero-weight-sum",
        "weights 1 and -1 sum to zero",
        [[4.0, 8.0], [8.0, 8.0]],
        None,
        ("linear", {"weight": [1.0, -1.0]}, REFUSED, "there is no normalised mean, and none is invented"),
        ("mergekit:linear", {"weight": [1.0, -1.0], "normalize": True}, [-math.inf, math.nan], "-4/0 and 0/0"),
        flags="LinearZeroWeightSum",
    )
    h.case(
        "zero-weight-sum-unnormalized",
        "4 - 8 = -4, 8 - 8 = 0",
        [[4.0, 8.0], [8.0, 8.0]],
        None,
        ("linear", {"weight": [1.0, -1.0], "normalize": False}, [-4.0, 0.0], "a difference needs no normalisation"),
        flags="LinearZeroWeightSum",
    )
    h.case(
        "overflowing-sum",
        "two models of 2^127, the largest power of two in float32",
        [[2.0**127], [2.0**127]],
        None,
        ("linear", {}, [2.0**127], "coefficients first: 2^126 + 2^126 = 2^127"),
        ("mergekit:linear", {"weight": [1.0, 1.0], "normalize": True}, [math.inf], "sum first: 2^128 is infinite"),
        ("official:uniform_soup", {}, [2.0**127], "each model is scaled by 1/N first"),
        flags="LinearOverflowingSum",
    )
    h.case(
        "rounds-once",
        "bfloat16 holds even numbers from 256 on; 256 + 1 + 1 = 258",
        [[256.0], [1.0], [1.0]],
        None,
        ("linear", {"normalize": False}, [258.0], "summed in float32, rounded once"),
        ("mergekit:linear", {"weight": [1.0] * 3, "normalize": False}, [258.0], "likewise since 0.1.5"),
        flags="LinearRoundsEachStep",
        dtype="BF16",
    )
    h.case(
        "zero-weight-infinity",
        "0 * inf is NaN: a weight of zero does not remove a model",
        [[1.0], [math.inf]],
        None,
        ("linear", {"weight": [1.0, 0.0]}, [math.nan], ""),
        ("mergekit:linear", {"weight": [1.0, 0.0], "normalize": True}, [math.nan], ""),
        flags="LinearZeroWeightInfinity",
    )
    h.case("one-model", "1 * x is x", [[0.0, -3.0, 2.0**-149]], None, ("linear", {}, [0.0, -3.0, 2.0**-149], ""))
    h.case(
        "shapes",
        "0-d, empty and 2-d tensors: (2 + 4) / 2 = 3, (1 + 3) / 2 = 2",
        [{"s": 2.0, "e": [], "m": [[1.0], [2.0]]}, {"s": 4.0, "e": [], "m": [[3.0], [4.0]]}],
        None,
        ("linear", {}, {"s": 3.0, "e": [], "m": [[2.0], [3.0]]}, ""),
        dtype="F64",
    )
    integers = [{"x": [1.0], "ids": i64(0, 1)}, {"x": [3.0], "ids": i64(0, 2)}]
    h.case(
        "integers-differ",
        "an integer tensor that differs has no mean that is one of its values",
        integers,
        None,
        ("linear", {}, REFUSED, "it must not be averaged and not be dropped"),
        flags="LinearIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "integers-agree",
        "an integer tensor that is the same in all models is copied; (1 + 3) / 2 = 2",
        [integers[0], {"x": [3.0], "ids": i64(0, 1)}],
        None,
        ("linear", {}, {"x": [2.0], "ids": i64(0, 1)}, ""),
        flags="LinearIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case("shape-differs", "shapes (2,) and (3,)", [[1.0, 2.0], [1.0, 2.0, 3.0]], None, ("linear", {}, REFUSED, ""))
    h.case(
        "tensor-missing",
        "the second model lacks y",
        [{"x": [1.0], "y": [1.0]}, {"x": [1.0]}],
        None,
        ("linear", {}, REFUSED, "neither dropped nor averaged over the rest"),
    )
    h.case(
        "weight-count",
        "two models, three weights",
        [[1.0], [2.0]],
        None,
        ("linear", {"weight": [1.0] * 3}, REFUSED, ""),
    )
    h.case("no-models", "nothing to average", [], None, ("linear", {}, REFUSED, ""))
    return h


def slerp() -> Hand:
    h = Hand("slerp")
    half = math.sqrt(0.5)
    # The angle between (64, 0) and (64, 1): tan w = 1/64.
    omega = math.atan2(1, 64)
    near = 1 / (2 * math.cos(omega / 2))
    far = 1 / (2 * math.sin(omega / 2))

    def both(t: float, expect: Any, why: str = "") -> tuple[str, dict[str, Any], Any, str]:
        return ("slerp", {"t": t}, expect, why)

    h.case(
        "right-angle",
        "w = 90 degrees: sin 60 and sin 30 over sin 90",
        [[1.0, 0.0], [0.0, 1.0]],
        None,
        both(1 / 3, [math.sqrt(0.75), 0.5]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "sixty-degrees",
        "cos w = 1 / (sqrt 2 * sqrt 2) = 1/2; sin 30 / sin 60 = 1 / sqrt 3 for both",
        [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]],
        None,
        ("slerp", {}, [2 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)], "t is 1/2 by default"),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "endpoint",
        "t = 1 gives the second model: coefficients 0 and 1",
        [[3.0, 0.0], [0.0, 5.0]],
        None,
        both(1.0, [0.0, 5.0]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "extrapolates",
        "t = 2 at w = 90 degrees: sin(-90) a + sin(180) b = -a",
        [[1.0, 0.0], [0.0, 1.0]],
        None,
        both(2.0, [-1.0, 0.0]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "unequal-norms",
        "w = 90 degrees, norms 1 and 3: sin 45 for both",
        [[1.0, 0.0], [0.0, 3.0]],
        None,
        both(0.5, [half, 3 * half], "the coefficients act on the vectors as they are, so norms blend too"),
        flags="SlerpNormsInterpolated",
        dtype="F64",
        tolerance=1e-14,
    )
    h.tests.append(
        mergekit_slerp(
            "unequal-norms",
            [1.0, 0.0],
            [0.0, 3.0],
            0.5,
            [half, 3 * half],
            "SlerpNormsInterpolated",
            "w = 90 degrees, norms 1 and 3: sin 45 for both",
        )
    )
    angle = "tan w = 1/64, cos w = 0.99988 > 0.9995"
    h.case(
        "threshold",
        angle,
        [[64.0, 0.0], [64.0, 1.0]],
        None,
        both(0.5, [128 * near, near], "an arc: (a + b) / (2 cos(w/2))"),
        flags="SlerpThreshold",
        dtype="F64",
        tolerance=1e-12,
    )
    h.tests.append(
        mergekit_slerp(
            "threshold",
            [64.0, 0.0],
            [64.0, 1.0],
            0.5,
            [64.0, 0.5],
            "SlerpThreshold",
            f"{angle}: a straight line, (a + b) / 2",
        )
    )
    opposite = "w = 180 degrees less atan(1/64), cos w = -0.99988"
    h.case(
        "nearly-opposite",
        opposite,
        [[64.0, 0.0], [-64.0, 1.0]],
        None,
        both(
            0.5,
            [0.0, far],
            "an arc half way round, of norm 64: (a + b) / (2 cos(w/2)) with cos(w/2) = sin(atan(1/64)/2)",
        ),
        flags="SlerpThreshold SlerpAntiparallel",
        dtype="F64",
        tolerance=1e-10,
    )
    h.tests.append(
        mergekit_slerp(
            "nearly-opposite",
            [64.0, 0.0],
            [-64.0, 1.0],
            0.5,
            [0.0, 0.5],
            "SlerpThreshold SlerpAntiparallel",
            f"{opposite}: a straight line through the origin",
        )
    )
    h.case(
        "opposite",
        "b = -a: sin w is 0 up to rounding, no arc is preferred; the line gives (3/4 - 1/4) a",
        [[1.0, 2.0], [-1.0, -2.0]],
        None,
        both(0.25, [0.5, 1.0]),
        flags="SlerpAntiparallel",
        dtype="F64",
        tolerance=1e-14,
    )
    h.tests.append(
        mergekit_slerp(
            "opposite",
            [1.0, 2.0],
            [-1.0, -2.0],
            0.25,
            [0.5, 1.0],
            "SlerpAntiparallel",
            "b = -a: the line gives (3/4 - 1/4) a",
        )
    )
    h.case(
        "zero-operand",
        "a = 0",
        [[0.0, 0.0], [2.0, 4.0]],
        None,
        both(0.5, [1.0, 2.0], "no angle, so the line: b / 2"),
        flags="SlerpZeroOperand",
        dtype="F64",
    )
    h.tests.append(
        mergekit_slerp(
            "zero-operand",
            [0.0, 0.0],
            [2.0, 4.0],
            0.5,
            [2 * half, 4 * half],
            "SlerpZeroOperand",
            "a = 0: its cosine is taken as 0, so sin(45) b",
        )
    )
    h.case("both-zero", "the line between 0 and 0", [[0.0, 0.0], [0.0, 0.0]], None, both(0.5, [0.0, 0.0]))
    h.case(
        "identical",
        "w = 0: (1 - t) x + t x",
        [[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]],
        None,
        both(0.25, [1.0, 2.0, 2.0]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "scalars",
        "0-d tensors have an angle of 0 or 180 degrees: the line, (2 + 6) / 2 and (2 - 6) / 2",
        [{"p": 2.0, "n": 2.0, "e": []}, {"p": 6.0, "n": -6.0, "e": []}],
        None,
        both(0.5, {"p": 4.0, "n": -2.0, "e": []}),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "per-tensor",
        "each tensor has its own angle: x is the right angle, y the line between 1 and 3",
        [{"x": [1.0, 0.0], "y": [1.0]}, {"x": [0.0, 1.0], "y": [3.0]}],
        None,
        both(0.5, {"x": [half, half], "y": [2.0]}),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case("one-model", "an arc needs two ends", [[1.0]], None, ("slerp", {}, REFUSED, ""))
    h.case("three-models", "an arc has two ends", [[1.0], [2.0], [3.0]], None, ("slerp", {}, REFUSED, ""))
    return h


def mergekit_slerp(
    id: str, a: list[float], b: list[float], t: float, expect: list[float], flags: str, comment: str
) -> Test:
    """mergekit's first model is called the base, so the same numbers go in differently."""
    h = Hand("slerp")
    h.case(id, comment, [b], a, ("mergekit:slerp", {"t": t}, expect, ""), flags=flags, dtype="F64", tolerance=1e-12)
    return h.tests[0]


def task_arithmetic() -> Hand:
    h = Hand("task_arithmetic")
    add = {"op": "add", "scaling_coef": 0.5}
    h.case(
        "add",
        "tau = (2, -4) and (4, 4); 1 + (2 + 4)/2 = 4, 1 + 0 = 1",
        [[3, -3], [5, 5]],
        [1, 1],
        ("task_arithmetic", {"lambda_": 0.5}, [4, 1], "one coefficient for the sum, not for the mean"),
        ("official:task_arithmetic", add, [4, 1], ""),
        ("mergekit:task_arithmetic", {"weight": [1.0, 1.0], "normalize": False, "lambda_": 0.5}, [4, 1], ""),
    )
    h.case(
        "negate",
        "tau = (2, -4); 1 - 2/2 = 0, 1 + 4/2 = 3",
        [[3, -3]],
        [1, 1],
        ("task_arithmetic", {"lambda_": -0.5}, [0, 3], ""),
        ("official:task_arithmetic", {"op": "negate", "scaling_coef": 0.5}, [0, 3], ""),
    )
    h.case(
        "analogy",
        "A, B, C = 3, 5, 9 over a base of 1: 1 + (-2 + 4 + 8) = 11",
        [[3], [5], [9]],
        [1],
        ("task_arithmetic", {"weight": [-1.0, 1.0, 1.0]}, [11], "A is to B as C is to the result"),
        ("official:task_arithmetic", {"op": "analogy", "scaling_coef": 1.0}, [11], ""),
    )
    h.case(
        "normalize",
        "tau = 4 and 8 with weights 1 and 3",
        [[4.0], [8.0]],
        [0.0],
        ("task_arithmetic", {"weight": [1.0, 3.0]}, [28.0], "4 + 24"),
        ("mergekit:task_arithmetic", {"weight": [1.0, 3.0], "normalize": True}, [7.0], "(4 + 24) / (1 + 3)"),
        flags="TaskArithmeticNormalize",
    )
    h.case(
        "zero-weight-sum",
        "tau = 4 and 8 with weights 1 and -1",
        [[4.0], [8.0]],
        [0.0],
        ("task_arithmetic", {"weight": [1.0, -1.0]}, [-4.0], "4 - 8: nothing is divided"),
        ("mergekit:task_arithmetic", {"weight": [1.0, -1.0], "normalize": True}, [-4.0], "a divisor of 0 becomes 1"),
        flags="TaskArithmeticZeroWeightSum",
    )
    h.case(
        "lambda-zero",
        "lambda 0 gives the base",
        [[3.0, 7.0]],
        [1.0, -2.0],
        ("task_arithmetic", {"lambda_": 0.0}, [1.0, -2.0], ""),
    )
    h.case(
        "round-trip",
        "float32: 1 - 2^25 = -33554431 rounds to -2^25, so base + (model - base) = 0, not 1; 2 + (4 - 2) = 4",
        [[1.0, 4.0]],
        [2.0**25, 2.0],
        ("task_arithmetic", {}, [0.0, 4.0], ""),
        ("official:task_arithmetic", {"op": "add", "scaling_coef": 1.0}, [0.0, 4.0], ""),
        flags="TaskArithmeticRoundTrip",
    )
    buffers = [{"x": [3.0], "ids": i64(7)}]
    h.case(
        "integers-base",
        "1 + (3 - 1) = 3; the integer tensor stays the base's",
        buffers,
        {"x": [1.0], "ids": i64(5)},
        ("task_arithmetic", {}, {"x": [3.0], "ids": i64(5)}, "asked for by the caller"),
        (
            "official:task_arithmetic",
            {"op": "add", "scaling_coef": 1.0},
            {"x": [3.0], "ids": i64(5)},
            "int64 is skipped",
        ),
        flags="TaskArithmeticIntegerBuffers",
    )
    h.case(
        "integers-differ",
        "5 in the base, 7 in the model",
        buffers,
        {"x": [1.0], "ids": i64(5)},
        ("task_arithmetic", {}, REFUSED, "no integer tensor is subtracted, scaled or dropped silently"),
        flags="TaskArithmeticIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "tensor-missing",
        "the model lacks y",
        [{"x": [1.0]}],
        {"x": [1.0], "y": [1.0]},
        ("task_arithmetic", {}, REFUSED, "it must not stay at the base with a warning"),
        flags="TaskArithmeticMissingTensor",
    )
    h.case(
        "shapes",
        "0-d and empty: 1 + (3 - 1) = 3",
        [{"s": 3.0, "e": []}],
        {"s": 1.0, "e": []},
        ("task_arithmetic", {}, {"s": 3.0, "e": []}, ""),
        dtype="F64",
    )
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("task_arithmetic", {}, REFUSED, ""))
    h.case("no-models", "nothing to add", [], [1.0], ("task_arithmetic", {}, REFUSED, ""))
    return h


def wise_ft() -> Hand:
    h = Hand("wise_ft")
    h.case(
        "half",
        "(2 + 6) / 2 = 4, (8 - 8) / 2 = 0",
        [[6, -8]],
        [2, 8],
        ("wise_ft", {}, [4, 0], "alpha is 1/2 by default"),
        ("official:wise_ft", {"alpha": 0.5}, [4, 0], ""),
    )
    h.case("quarter", "3/4 * 8 + 1/4 * 4 = 7", [[4.0]], [8.0], ("wise_ft", {"alpha": 0.25}, [7.0], ""))
    h.case(
        "lerp-form",
        "float32, alpha 1: x + (y - x) would be 2^25 + (1 - 2^25) = 0, since 1 - 2^25 rounds",
        [[1.0, 4.0]],
        [2.0**25, 2.0],
        ("wise_ft", {"alpha": 1.0}, [1.0, 4.0], "0 * x + 1 * y is y exactly"),
        ("official:wise_ft", {"alpha": 1.0}, [1.0, 4.0], ""),
        flags="WiseFtLerpForm",
    )
    h.case(
        "alpha-zero",
        "1 * x + 0 * y is x",
        [[1.0, -4.0]],
        [2.0**25, 2.0],
        ("wise_ft", {"alpha": 0.0}, [2.0**25, 2.0], ""),
    )
    h.case(
        "extrapolates",
        "-1/2 * 2 + 3/2 * 4 = 5",
        [[4.0]],
        [2.0],
        ("wise_ft", {"alpha": 1.5}, [5.0], ""),
        ("official:wise_ft", {"alpha": 1.5}, [5.0], ""),
        flags="WiseFtExtrapolates",
    )
    h.case(
        "extrapolates-back",
        "3/2 * 2 - 1/2 * 4 = 1",
        [[4.0]],
        [2.0],
        ("wise_ft", {"alpha": -0.5}, [1.0], ""),
        flags="WiseFtExtrapolates",
    )
    buffers, base = [{"x": [3.0], "n": i64(9)}], {"x": [1.0], "n": i64(8)}
    h.case(
        "integers-base",
        "(1 + 3) / 2 = 2; the integer tensor stays the base's",
        buffers,
        base,
        ("wise_ft", {}, {"x": [2.0], "n": i64(8)}, "asked for by the caller; the official code gives 8.5, a float"),
        flags="WiseFtIntegerBuffers",
    )
    h.case(
        "integers-differ",
        "8 in the base, 9 in the model: the official code gives 8.5",
        buffers,
        base,
        ("wise_ft", {}, REFUSED, "a counter has no mean that is one of its values"),
        flags="WiseFtIntegerBuffers",
        options={"integers": "equal"},
    )
    h.case(
        "shapes",
        "0-d and empty: (1 + 3) / 2",
        [{"s": 3.0, "e": []}],
        {"s": 1.0, "e": []},
        ("wise_ft", {}, {"s": 2.0, "e": []}, ""),
        dtype="F64",
    )
    h.case(
        "tensor-missing", "the model lacks y", [{"x": [1.0]}], {"x": [1.0], "y": [1.0]}, ("wise_ft", {}, REFUSED, "")
    )
    h.case("no-base", "one end is missing", [[1.0]], None, ("wise_ft", {}, REFUSED, ""))
    h.case("two-models", "a line has two ends", [[1.0], [2.0]], [0.0], ("wise_ft", {}, REFUSED, ""))
    return h


def official_ties(percent: float, merge: str = "dis-mean") -> dict[str, Any]:
    return {"reset_type": "topk", "reset_thresh": percent, "resolve_method": "mass", "merge_func": merge, "lam": 1.0}


def mergekit_ties(density: float, weight: list[float], normalize: bool = True) -> dict[str, Any]:
    return {"weight": weight, "density": density, "normalize": normalize, "rescale": False, "lambda_": 1.0}


def ties() -> Hand:
    h = Hand("ties")
    h.case(
        "by-hand",
        "base 1; tau = (8, -4, 2, 1), (4, -2, -6, 1) trimmed to (8, -4, 0, 0), (4, 0, -6, 0); signs + - -; "
        "means (8 + 4)/2, -4, -6; half of it added",
        [[9, -3, 3, 2], [5, -1, -5, 2]],
        [1, 1, 1, 1],
        ("ties", {"density": 0.5, "lambda_": 0.5}, [4, -1, -2, 1], ""),
    )
    ten = [float(k) for k in range(1, 11)]
    h.case(
        "keeps-one-more",
        "tau = 1..10, a fifth of it",
        [ten],
        [0.0] * 10,
        ("ties", {"density": 0.2}, [0.0] * 8 + [9.0, 10.0], "int(10 * 0.2) = 2 are kept"),
        ("official:ties", official_ties(20), [0.0] * 7 + [8.0, 9.0, 10.0], "|tau| >= the 8th smallest: 3 are kept"),
        ("mergekit:ties", mergekit_ties(0.2, [1.0]), [0.0] * 8 + [9.0, 10.0], "2 are kept"),
        flags="TiesKeepsOneMore",
    )
    h.case(
        "zero-sum",
        "tau = (3, 1), (-3, -1): every sum is zero and so is the majority",
        [[3.0, 1.0], [-3.0, -1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [0.0, 0.0], "no sign is elected, so nothing is added"),
        ("official:ties", official_ties(50), [-3.0, -1.0], "an elected sign of 0 selects the negative entries"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0]), [3.0, 1.0], "a sum of zero elects +"),
        flags="TiesZeroSumSign",
    )
    h.case(
        "zero-sum-majority",
        "tau = (3, 1), (-3, 1): the first sum is zero, the majority of the signs is +",
        [[3.0, 1.0], [-3.0, 1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [0.0, 1.0], "nothing is added where the sum is zero"),
        ("official:ties", official_ties(50), [3.0, 1.0], "the majority sign is taken"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0]), [3.0, 1.0], "a sum of zero elects +"),
        flags="TiesZeroSumSign",
    )
    h.case(
        "zero-sum-minority",
        "tau = (3, -1), (-3, -1): the first sum is zero, the majority of the signs is -",
        [[3.0, -1.0], [-3.0, -1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [0.0, -1.0], "nothing is added where the sum is zero"),
        ("official:ties", official_ties(50), [-3.0, -1.0], "the majority sign is taken"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0]), [3.0, -1.0], "a sum of zero elects +"),
        flags="TiesZeroSumSign",
    )
    h.case(
        "threshold-ties",
        "tau = (2, 4, 2, -2, 1): three magnitudes of 2 for one place",
        [[2.0, 4.0, 2.0, -2.0, 1.0]],
        [0.0] * 5,
        ("ties", {"density": 0.4}, [2.0, 4.0, 0.0, 0.0, 0.0], "exactly int(5 * 0.4) = 2, the lower index first"),
        ("official:ties", official_ties(40), [2.0, 4.0, 2.0, -2.0, 0.0], "|tau| >= the 3rd smallest = 2: all four"),
        flags="TiesThresholdTies",
    )
    h.case(
        "threshold-ties-across-tensors",
        "tau is 2 everywhere, in tensors b, a, c of two entries each: of 6 * 1/2 = 3 places "
        "two go to a and one to b, whatever the order of the names in the file",
        [{"b": [2.0, 2.0], "a": [2.0, 2.0], "c": [2.0, 2.0]}],
        {"b": [0.0, 0.0], "a": [0.0, 0.0], "c": [0.0, 0.0]},
        ("ties", {"density": 0.5}, {"b": [2.0, 0.0], "a": [2.0, 2.0], "c": [0.0, 0.0]}, ""),
        flags="TiesThresholdTies",
    )
    h.case(
        "per-tensor-trim",
        "tau = (1, 2) and (30, 40, 50)",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0, 50.0]}],
        {"a": [0.0, 0.0], "b": [0.0, 0.0, 0.0]},
        ("ties", {"density": 0.4}, {"a": [0.0, 0.0], "b": [0.0, 40.0, 50.0]}, "2 of 5, over the model: a gets nothing"),
        ("official:ties", official_ties(40), {"a": [0.0, 0.0], "b": [30.0, 40.0, 50.0]}, "2 + 1 of 5, over the model"),
        (
            "mergekit:ties",
            mergekit_ties(0.4, [1.0]),
            {"a": [0.0, 2.0], "b": [0.0, 0.0, 50.0]},
            "1 of 2 (at least one), 1 of 3",
        ),
        flags="TiesPerTensorTrim TiesKeepsAtLeastOne",
    )
    h.case(
        "over-tensor",
        "tau = (1, 2) and (30, 40, 50, 60), trimmed tensor by tensor on request",
        [{"a": [1.0, 2.0], "b": [30.0, 40.0, 50.0, 60.0]}],
        {"a": [0.0, 0.0], "b": [0.0] * 4},
        ("ties", {"density": 0.5}, {"a": [0.0, 2.0], "b": [0.0, 0.0, 50.0, 60.0]}, "1 of 2, 2 of 4"),
        flags="TiesPerTensorTrim",
        options={"over": "tensor"},
    )
    h.case(
        "keeps-none",
        "tau = (1, 2, 3)",
        [[1.0, 2.0, 3.0]],
        [0.0] * 3,
        ("ties", {"density": 0.2}, [0.0, 0.0, 0.0], "int(3 * 0.2) = 0 are kept"),
        ("official:ties", official_ties(20), [0.0, 0.0, 3.0], "0 + 1 is kept"),
        ("mergekit:ties", mergekit_ties(0.2, [1.0]), [0.0, 0.0, 3.0], "at least one is kept"),
        flags="TiesKeepsAtLeastOne TiesKeepsOneMore",
    )
    h.case(
        "density-zero",
        "tau = (1, 2, 3), density 0",
        [[1.0, 2.0, 3.0]],
        [0.0] * 3,
        ("ties", {"density": 0.0}, [0.0, 0.0, 0.0], "the base"),
        ("official:ties", official_ties(0), [0.0, 0.0, 3.0], "|tau| >= the largest keeps the largest"),
        ("mergekit:ties", mergekit_ties(0.0, [1.0]), [0.0, 0.0, 0.0], "the base"),
        flags="TiesZeroDensity",
    )
    h.case(
        "density-one",
        "tau = (1, -2, 0), density 1",
        [[1.0, -2.0, 0.0]],
        [0.0] * 3,
        ("ties", {"density": 1.0}, [1.0, -2.0, 0.0], "nothing is trimmed"),
        ("official:ties", official_ties(1), REFUSED, "1 is the fraction 1.0, and the 0th smallest does not exist"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0]), [1.0, -2.0, 0.0], "nothing is trimmed"),
        flags="TiesDensityOne",
    )
    h.case(
        "weights-elect",
        "tau = 4 and -2",
        [[4.0], [-2.0]],
        [0.0],
        ("ties", {"density": 1.0}, [4.0], "the sum 2 elects +, and 4 is all that agrees"),
        (
            "mergekit:ties",
            mergekit_ties(1.0, [1.0, 3.0]),
            [-2.0],
            "weights 1, 3: the sum 4 - 6 elects -, and -6/3 = -2",
        ),
        flags="TiesWeightsElect",
    )
    h.case(
        "sum-not-mean",
        "tau = 4 and 2",
        [[4.0], [2.0]],
        [0.0],
        ("ties", {"density": 1.0}, [3.0], "the mean of the agreeing"),
        ("official:ties", official_ties(50, "dis-sum"), [6.0], "the sum on request"),
        ("mergekit:ties", mergekit_ties(1.0, [1.0, 1.0], normalize=False), [6.0], "the sum on request"),
        flags="TiesSumNotMean",
    )
    h.case(
        "mean-leaves-out-zeros",
        "tau = (4, 1), (0, 1), (8, 1): (4 + 8) / 2 = 6, not 12 / 3",
        [[4.0, 1.0], [0.0, 1.0], [8.0, 1.0]],
        [0.0, 0.0],
        ("ties", {"density": 1.0}, [6.0, 1.0], ""),
        flags="TiesMeanCountsZeros",
    )
    h.case(
        "trim-first",
        "tau = (5, 3), (-3, -4): trimmed to (5, 0), (0, -4), so nothing conflicts",
        [[5.0, 3.0], [-3.0, -4.0]],
        [0.0, 0.0],
        ("ties", {"density": 0.5}, [5.0, -4.0], ""),
    )
    h.case(
        "empty-and-scalar",
        "three floating elements in all, int(3 * 0.5) = 1 is kept: the scalar",
        [{"e": [], "s": 8.0, "x": [1.0, 2.0]}],
        {"e": [], "s": 0.0, "x": [0.0, 0.0]},
        ("ties", {"density": 0.5}, {"e": [], "s": 8.0, "x": [0.0, 0.0]}, ""),
    )
    h.case(
        "integers-not-counted",
        "two floating elements, int(2 * 0.5) = 1 is kept; integers are not among them",
        [{"ids": i64(3, 4, 5, 6), "x": [1.0, 2.0]}],
        {"ids": i64(3, 4, 5, 6), "x": [0.0, 0.0]},
        ("ties", {"density": 0.5}, {"ids": i64(3, 4, 5, 6), "x": [0.0, 2.0]}, ""),
    )
    h.case("density-negative", "density -1/4", [[1.0]], [0.0], ("ties", {"density": -0.25}, REFUSED, ""))
    h.case(
        "density-above-one",
        "density 3/2",
        [[1.0]],
        [0.0],
        ("ties", {"density": 1.5}, REFUSED, "20 is no fraction either"),
    )
    h.case("no-base", "a task vector is a difference from a base", [[1.0], [2.0]], None, ("ties", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("ties", {}, REFUSED, ""))
    return h


def official_dare(rates: list[float], rescale: bool = True) -> dict[str, Any]:
    return {
        "weight_format": "delta_weight", "weight_mask_rates": rates, "use_weight_rescale": rescale,
        "mask_strategy": "random", "mask_apply_method": "task_arithmetic", "scaling_coefficient": 1.0,
    }  # fmt: skip


def mergekit_dare(density: Any, weight: list[float], rescale: bool = True) -> dict[str, Any]:
    return {"weight": weight, "density": density, "normalize": False, "rescale": rescale, "lambda_": 1.0}


def dare_linear() -> Hand:
    h = Hand("dare_linear")
    taus = [[2.0, 3.0, -2.0, 1.0], [1.0, -1.0, 0.0, 0.0]]
    text = "tau = (2, 3, -2, 1) keeping its first, (1, -1, 0, 0) keeping its first two, probability 1/2"
    keep = [[1, 0, 0, 0], [1, 1, 0, 0]]
    h.case(
        "rescale",
        text,
        taus,
        [0.0] * 4,
        ("dare_linear", {"density": 0.5}, [6.0, -2.0, 0.0, 0.0], "kept entries times 2: (4, 0, 0, 0) + (2, -2, 0, 0)"),
        ("official:dare", official_dare([0.5, 0.5]), [6.0, -2.0, 0.0, 0.0], "the same, with masks of what is dropped"),
        (
            "mergekit:dare_linear",
            mergekit_dare(0.5, [1.0, 1.0]),
            [9.0, -1.0, 0.0, 0.0],
            "times |tau|_1 before over after, 8/2 and 2/2: (8, 0, 0, 0) + (1, -1, 0, 0)",
        ),
        flags="DareRescaleL1 DareDropMaskPolarity",
        masks=keep,
    )
    h.case(
        "no-rescale",
        text,
        taus,
        [0.0] * 4,
        ("dare_linear", {"density": 0.5, "rescale": False}, [3.0, -1.0, 0.0, 0.0], "(2, 0, 0, 0) + (1, -1, 0, 0)"),
        ("official:dare", official_dare([0.5, 0.5], False), [3.0, -1.0, 0.0, 0.0], "the command line's default"),
        ("mergekit:dare_linear", mergekit_dare(0.5, [1.0, 1.0], False), [3.0, -1.0, 0.0, 0.0], ""),
        flags="DareRescaleOff",
        masks=keep,
    )
    h.case(
        "weights",
        "base 1; tau = (4, 8) keeping the first with 1/2, (8, 16) keeping the second with 1/4; rescaled (8, 0), (0, "
        "64); "
        "1 + 1/2 (8/2 + 0), 1 + 1/2 (0 + 64/4)",
        [[5.0, 9.0], [9.0, 17.0]],
        [1.0, 1.0],
        ("dare_linear", {"density": [0.5, 0.25], "weight": [0.5, 0.25], "lambda_": 0.5}, [3.0, 9.0], ""),
        masks=[[1, 0], [0, 1]],
    )
    h.case(
        "density-zero",
        "every entry is dropped",
        [[3.0, -1.0], [5.0, 2.0]],
        [1.0, 2.0],
        ("dare_linear", {"density": 0.0}, [1.0, 2.0], "the base, and nothing is divided by 0"),
        ("official:dare", official_dare([1.0, 1.0]), [1.0, 2.0], "rate 1 skips the division"),
        ("mergekit:dare_linear", mergekit_dare(0.0, [1.0, 1.0]), [1.0, 2.0], "the rescaling is skipped"),
        flags="DareDensityZero",
        masks=[[0, 0], [0, 0]],
    )
    h.case(
        "density-one",
        "nothing is dropped, nothing is drawn: 1 + (3 - 1) = 3, 2 + (-1 - 2) = -1",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("dare_linear", {"density": 1.0}, [3.0, -1.0], ""),
        ("mergekit:dare_linear", mergekit_dare(1.0, [1.0]), [3.0, -1.0], ""),
    )
    h.case(
        "empty-and-scalar",
        "1 + (3 - 1) / (1/2) = 5; the scalar t is dropped",
        [{"e": [], "s": 3.0, "t": 3.0}],
        {"e": [], "s": 1.0, "t": 1.0},
        ("dare_linear", {"density": 0.5}, {"e": [], "s": 5.0, "t": 1.0}, ""),
        masks=[{"e": [], "s": 1, "t": 0}],
    )
    h.case("density-negative", "probability -1/4", [[1.0]], [0.0], ("dare_linear", {"density": -0.25}, REFUSED, ""))
    h.case("density-above-one", "probability 3/2", [[1.0]], [0.0], ("dare_linear", {"density": 1.5}, REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("dare_linear", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("dare_linear", {}, REFUSED, ""))
    return h


def dare_ties() -> Hand:
    h = Hand("dare_ties")
    h.case(
        "rescale",
        "tau = (2, 3, -2, 1) keeping its first, probability 1/2, no trim",
        [[2.0, 3.0, -2.0, 1.0]],
        [0.0] * 4,
        ("dare_ties", {"density": 0.5, "trim": 1.0}, [4.0, 0.0, 0.0, 0.0], "times 2"),
        ("mergekit:dare_ties", mergekit_dare(0.5, [1.0]), [8.0, 0.0, 0.0, 0.0], "times |tau|_1 before over after, 8/2"),
        flags="DareRescaleL1",
        masks=[[1, 0, 0, 0]],
    )
    h.case(
        "sum-not-mean",
        "tau = (4, -1) and (2, -3), nothing dropped or trimmed",
        [[4.0, -1.0], [2.0, -3.0]],
        [0.0, 0.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [3.0, -2.0], "the mean of the agreeing"),
        ("mergekit:dare_ties", mergekit_dare(1.0, [1.0, 1.0]), [6.0, -4.0], "not normalised by default: the sum"),
        flags="DareTiesSumNotMean",
    )
    h.case(
        "trims",
        "tau = (1, 2, 3, 4), nothing dropped",
        [[1.0, 2.0, 3.0, 4.0]],
        [0.0] * 4,
        (
            "dare_ties",
            {"density": 1.0, "trim": 0.5},
            [0.0, 0.0, 3.0, 4.0],
            "TIES trims what DARE has left: 4 * 1/2 = 2 kept",
        ),
        (
            "mergekit:dare_ties",
            mergekit_dare(1.0, [1.0]),
            [1.0, 2.0, 3.0, 4.0],
            "only signs are elected, nothing is trimmed",
        ),
        flags="DareTiesTrims",
    )
    h.case(
        "order",
        "tau = (8, 4, 2, 1), of which DARE keeps 4 and 1 with 1/2: (0, 8, 0, 2); then one of four is kept: (0, 8, "
        "0, 0). "
        "Trimmed first, it would be 8 and then nothing",
        [[8.0, 4.0, 2.0, 1.0]],
        [0.0] * 4,
        ("dare_ties", {"density": 0.5, "trim": 0.25}, [0.0, 8.0, 0.0, 0.0], ""),
        flags="DareTiesOrder",
        masks=[[0, 1, 0, 1]],
    )
    h.case(
        "trim-after-drop",
        "tau = 1..8, of which DARE keeps 7 and 8 with 1/4: 28 and 32; int(8 * 1/2) = 4 places for two: no trim",
        [[float(k) for k in range(1, 9)]],
        [0.0] * 8,
        ("dare_ties", {"density": 0.25, "trim": 0.5}, [0.0] * 6 + [28.0, 32.0], ""),
        flags="DareTiesOrder",
        masks=[[0, 0, 0, 0, 0, 0, 1, 1]],
    )
    h.case(
        "zero-sum",
        "base 1, tau = 3 and -3",
        [[4.0], [-2.0]],
        [1.0],
        ("dare_ties", {"density": 1.0, "trim": 1.0}, [1.0], "no sign is elected: the base"),
        ("mergekit:dare_ties", mergekit_dare(1.0, [1.0, 1.0]), [4.0], "a sum of zero elects +"),
        flags="DareTiesZeroSumSign",
    )
    h.case(
        "election",
        "base 1; tau = (4, -2) keeping both, (-6, -8) keeping the second, probability 1/2: (8, -4), (0, -16); "
        "signs + -; 1 + 8/2, 1 - 10/2",
        [[5.0, -1.0], [-5.0, -7.0]],
        [1.0, 1.0],
        ("dare_ties", {"density": 0.5, "trim": 1.0, "lambda_": 0.5}, [5.0, -4.0], ""),
        masks=[[1, 1], [0, 1]],
    )
    h.case(
        "density-zero",
        "every entry is dropped",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("dare_ties", {"density": 0.0}, [1.0, 2.0], "the base"),
        ("mergekit:dare_ties", mergekit_dare(0.0, [1.0]), [1.0, 2.0], "the base"),
        flags="DareDensityZero",
        masks=[[0, 0]],
    )
    h.case("density-negative", "probability -1/4", [[1.0]], [0.0], ("dare_ties", {"density": -0.25}, REFUSED, ""))
    h.case(
        "trim-above-one",
        "trim 20",
        [[1.0]],
        [0.0],
        ("dare_ties", {"trim": 20.0}, REFUSED, "a fraction, not a percentage"),
    )
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("dare_ties", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("dare_ties", {}, REFUSED, ""))
    return h


def della() -> Hand:
    h = Hand("della")

    def plain(density: Any, epsilon: Any, **more: Any) -> dict[str, Any]:
        return {"density": density, "epsilon": epsilon, "lambda_": 1.0} | more

    def official(density: Any, window: float, **more: Any) -> dict[str, Any]:
        return {
            "weight": 1.0, "density": density, "window_size": window, "rescale": 1, "normalize": True, "lambda_": 1.0,
        } | more  # fmt: skip

    def mergekit(density: Any, epsilon: Any, **more: Any) -> dict[str, Any]:
        return {
            "weight": 1.0, "density": density, "epsilon": epsilon, "normalize": True, "rescale": True, "lambda_": 1.0,
        } | more  # fmt: skip

    steps = "density 1/2 and epsilon 1/4: a row of three stays with 1/4, 1/2, 3/4 by rank"
    h.case(
        "rescale",
        f"{steps}; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.25), [4.0, 0.0, 4.0], "1 / (1/4), 2 / (1/2)"),
        ("official:della", official(0.5, 0.5), [4.0, 0.0, 4.0], "the same"),
        ("mergekit:della", mergekit(0.5, 0.25), [2.0, 0.0, 4.0], "times |tau|_1 before over after, 6/3"),
        flags="DellaRescaleL1",
        masks=[[1, 0, 1]],
    )
    h.case(
        "no-rescale",
        f"{steps}; tau = (1, -3, 2) keeping the first and the last",
        [[1.0, -3.0, 2.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.25, rescale=False), [1.0, 0.0, 2.0], ""),
        ("official:della", official(0.5, 0.5, rescale=0), [1.0, 0.0, 2.0], ""),
        ("mergekit:della", mergekit(0.5, 0.25, rescale=False), [1.0, 0.0, 2.0], ""),
        masks=[[1, 0, 1]],
    )
    h.case(
        "window",
        "tau = (3, 4, 5), all kept with 3/8, 1/2, 5/8: 1/2 +- 1/8, a window 1/4 wide",
        [[3.0, 4.0, 5.0]],
        [0.0] * 3,
        ("della", plain(0.5, 0.125), [8.0, 8.0, 8.0], "3 / (3/8), 4 / (1/2), 5 / (5/8)"),
        ("official:della", official(0.5, 0.25), [8.0, 8.0, 8.0], "the parameter is the whole window"),
        flags="DellaWindow",
        masks=[[1, 1, 1]],
    )
    h.case(
        "rows",
        "density 1/2, epsilon 1/4, rows (3, 1) and (1, -3): 3/4 and 1/4 for the larger and the smaller of each row",
        [[[3.0, 1.0], [1.0, -3.0]]],
        [[0.0, 0.0], [0.0, 0.0]],
        ("della", plain(0.5, 0.25), [[4.0, 4.0], [4.0, -4.0]], ""),
        ("official:della", official(0.5, 0.5), [[4.0, 4.0], [4.0, -4.0]], ""),
        masks=[[[1, 1], [1, 1]]],
    )
    h.case(
        "many-axes",
        "density 1/2, epsilon 3/8, shape (1, 2, 2): one row (1, 3, 5, 7), kept with 1/8, 3/8, 5/8, 7/8",
        [[[[1.0, 3.0], [5.0, 7.0]]]],
        [[[0.0, 0.0], [0.0, 0.0]]],
        ("della", plain(0.5, 0.375), [[[8.0, 8.0], [8.0, 8.0]]], ""),
        (
            "mergekit:della",
            mergekit(0.5, 0.375),
            [[[1.0, 3.0], [5.0, 7.0]]],
            "ranks (1, 5) and (3, 7) along axis 1; which it keeps depends on that, what it makes of them does not",
        ),
        ("official:della", official(0.5, 0.75), OPEN, "its loop over rows fails beyond two axes"),
        flags="DellaManyAxes",
        masks=[[[[1, 1], [1, 1]]]],
    )
    h.case(
        "one-column",
        "rows of one entry, 3 kept and 1 dropped",
        [[[3.0], [1.0]]],
        [[0.0], [0.0]],
        ("della", plain(0.5, 0.25), [[6.0], [0.0]], "kept with 1/2, whatever epsilon"),
        ("official:della", official(0.5, 0.5), OPEN, "(rank - 1) / (1 - 1): its draw fails for NaN"),
        ("mergekit:della", mergekit(0.5, 0.25), OPEN, "(rank - 1) / (1 - 1): its draw fails for NaN"),
        flags="DellaOneColumn",
        masks=[[[1], [0]]],
    )
    h.case(
        "ties",
        "density 1/2, epsilon 1/4, tau = (3, 3), both kept",
        [[3.0, 3.0]],
        [0.0, 0.0],
        ("della", plain(0.5, 0.25), [12.0, 4.0], "the lower index ranks lower: 3 / (1/4), 3 / (3/4)"),
        ("official:della", official(0.5, 0.5), OPEN, "the sort may rank them either way"),
        flags="DellaTies",
        masks=[[1, 1]],
    )
    h.case(
        "elect-and-fuse",
        f"base 1; {steps}; tau = (1, -3, 2), all kept, and (-6, -2, 4), the last dropped: (4, -4, 4), (-8, -8, 0); "
        "signs - - +; 1 + (-8, -12/2, 4) / 2",
        [[2.0, -2.0, 3.0], [-5.0, -1.0, 5.0]],
        [1.0] * 3,
        ("della", plain(0.5, 0.25, lambda_=0.5), [-3.0, -2.0, 3.0], ""),
        ("official:della", official(0.5, 0.5, lambda_=0.5), [-3.0, -2.0, 3.0], ""),
        masks=[[1, 1, 1], [1, 1, 0]],
    )
    h.case(
        "weights",
        "tau = 4 and -6, nothing dropped",
        [[4.0], [-6.0]],
        [0.0],
        ("della", plain(1.0, 0.0), [-6.0], "no weights: - is heavier"),
        ("official:della", official(1.0, 0.0, weight=[2.0, 1.0]), [4.0], "8 against 6: +, and 8/2"),
        ("mergekit:della", mergekit(1.0, 0.0, weight=[2.0, 1.0]), [4.0], "8 against 6: +, and 8/2"),
        flags="DellaWeightsElect",
    )
    h.case(
        "zero-sum",
        "base 1, tau = 3 and -3, nothing dropped",
        [[4.0], [-2.0]],
        [1.0],
        ("della", plain(1.0, 0.0), [1.0], "no sign is elected: the base"),
        ("official:della", official(1.0, 0.0), [4.0], "a sum of zero elects +"),
        ("mergekit:della", mergekit(1.0, 0.0), [4.0], "a sum of zero elects +"),
        flags="DellaZeroSumSign",
    )
    h.case(
        "density-zero",
        "every entry is dropped",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("della", plain(0.0, 0.25), [1.0, 2.0], "the base, and epsilon is not looked at"),
        ("mergekit:della", mergekit(0.0, 0.25), [1.0, 2.0], "the base"),
        ("official:della", official(0.0, 0.0), REFUSED, "0 / 0, and an assertion fails"),
        flags="DellaDensityZero",
        masks=[[0, 0]],
    )
    h.case(
        "density-one",
        "nothing is dropped, nothing is drawn: 1 + (3 - 1) = 3, 2 + (-1 - 2) = -1",
        [[3.0, -1.0]],
        [1.0, 2.0],
        ("della", plain(1.0, 0.5), [3.0, -1.0], "epsilon is not looked at"),
        ("official:della", official(1.0, 1.0), [3.0, -1.0], ""),
        ("mergekit:della", mergekit(1.0, 0.5), [3.0, -1.0], ""),
    )
    h.case(
        "certain",
        "density 3/4 and epsilon 1/4: 1/2, 3/4, and the largest of the row for certain; tau = (1, 3, 5), all kept",
        [[1.0, 3.0, 5.0]],
        [0.0] * 3,
        ("della", plain(0.75, 0.25), [2.0, 4.0, 5.0], ""),
        ("official:della", official(0.75, 0.5), [2.0, 4.0, 5.0], "a warning is printed"),
        ("mergekit:della", mergekit(0.75, 0.25), REFUSED, "density + epsilon must be below 1"),
        flags="DellaOutsideWindow",
        masks=[[1, 1, 1]],
    )
    for id, density, epsilon, why in (
        ("window-too-low", 0.25, 0.25, "the smallest entry would never stay"),
        ("window-too-high", 0.875, 0.25, "a probability of 9/8"),
    ):
        h.case(
            id,
            why,
            [[1.0, 2.0]],
            [0.0, 0.0],
            ("della", plain(density, epsilon), REFUSED, ""),
            ("official:della", official(density, 2 * epsilon), REFUSED, "a warning is printed, and then its code fails"),
            ("mergekit:della", mergekit(density, epsilon), REFUSED, ""),
            flags="DellaOutsideWindow",
        )
    h.case(
        "empty-and-scalar",
        "a number is a row of one: 1 + (3 - 1) / (1/2) = 5; the scalar t is dropped",
        [{"e": [], "s": 3.0, "t": 3.0}],
        {"e": [], "s": 1.0, "t": 1.0},
        ("della", plain(0.5, 0.25), {"e": [], "s": 5.0, "t": 1.0}, ""),
        masks=[{"e": [], "s": 1, "t": 0}],
    )
    h.case(
        "epsilon-negative",
        "small entries would stay more often than large ones",
        [[1.0, 2.0]],
        [0.0, 0.0],
        ("della", plain(0.5, -0.25), REFUSED, ""),
        masks=[[1, 1]],
    )
    h.case("density-negative", "probability -1/4", [[1.0]], [0.0], ("della", plain(-0.25, 0.0), REFUSED, ""))
    h.case("no-base", "a task vector is a difference from a base", [[1.0]], None, ("della", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [0.0], ("della", {}, REFUSED, ""))
    return h


def breadcrumbs() -> Hand:
    h = Hand("breadcrumbs")

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
    h.case(
        "density-zero", "nothing is kept: the base", [four], [0.0] * 4, ("breadcrumbs", plain(0.0, 0.0), [0.0] * 4, "")
    )
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
    return h


def model_stock() -> Hand:
    h = Hand("model_stock")

    def both(plain: Any, mergekit: Any = None, why: tuple[str, str] = ("", ""), **params: Any) -> list[Any]:
        mergekit = plain if mergekit is None else mergekit
        options = {"filter_wise": False} | params
        return [("model_stock", params, plain, why[0]), ("mergekit:model_stock", options, mergekit, why[1])]

    h.case(
        "angles",
        "base (1, 1); deltas (3, 0), (0, 3), (3, 0) of mean (2, 1), at 90, 0 and 90 degrees",
        [[4, 1], [1, 4], [4, 1]],
        [1, 1],
        *both(
            [2.5, 1.75],
            [2.2, 1.6],
            ("mean angle 60, cos = 1/2: t = 3/2 / 2 = 3/4", "mean cosine 1/3: t = 1 / (5/3) = 3/5"),
        ),
        flags="StockMeanOfCosines",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "two-models",
        "deltas (1, 1, 0), (1, 0, 1): cos = 1/2, t = 1 / (3/2) = 2/3 of the mean (1, 1/2, 1/2)",
        [[1, 1, 0], [1, 0, 1]],
        [0, 0, 0],
        *both([2 / 3, 1 / 3, 1 / 3]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "identical",
        "cos = 1, t = 1: the model",
        [[3, -1], [3, -1], [3, -1]],
        [1, 1],
        *both([3, -1]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "orthogonal", "cos = 0, t = 0: the base", [[3, 1], [1, 5]], [1, 1], *both([1, 1]), dtype="F64", tolerance=1e-14
    )
    h.case(
        "negative-ratio",
        "deltas (1, 1, 0), (-1, 0, 1): cos = -1/2, t = -1 / (1/2) = -2 of the mean (0, 1/2, 1/2)",
        [[1, 1, 0], [-1, 0, 1]],
        [0, 0, 0],
        *both([0, -1, -1]),
        flags="StockNegativeRatio",
        dtype="F64",
        tolerance=1e-13,
    )
    small = 2.0**-12
    clamped = 2 * (2.0**-24 / 1e-6) / (1 + 2.0**-24 / 1e-6)
    h.case(
        "small-norms",
        "two equal deltas (2^-12, 0); their norms' product is 2^-24 = 6e-8",
        [[small, 0], [small, 0]],
        [0, 0],
        *both(
            [small, 0],
            [clamped * small, 0],
            ("cos = 1: the model", "the product is raised to 1e-6: cos = 0.0596, t = 2 cos / (1 + cos) = 0.1125"),
        ),
        flags="StockNormClamp",
        dtype="F64",
        tolerance=1e-13,
    )
    h.case(
        "filter-wise",
        "deltas (2, 0; 2, 0), (2, 0; 0, 2): the first rows are equal, t = 1, the second ones orthogonal, t = 0",
        [[[2, 0], [2, 0]], [[2, 0], [0, 2]]],
        [[0, 0], [0, 0]],
        *both([[2, 0], [0, 0]], filter_wise=True),
        flags="StockFilterWise",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "whole-tensor",
        "deltas (2, 0; 2, 0), (2, 0; 0, 2): cos = 4/8, t = 2/3 of the mean (2, 0; 1, 1)",
        [[[2, 0], [2, 0]], [[2, 0], [0, 2]]],
        [[0, 0], [0, 0]],
        *both([[4 / 3, 0], [2 / 3, 2 / 3]]),
        flags="StockFilterWise",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "all-at-base",
        "all deltas are zero: the base",
        [[1, 2], [1, 2]],
        [1, 2],
        *both([1, 2]),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "one-at-base",
        "a delta of zero has no angle, its cosine counts as 0: t = 0, the base",
        [[1, 2], [4, 6]],
        [1, 2],
        *both([1, 2]),
        flags="StockZeroDelta",
        dtype="F64",
        tolerance=1e-14,
    )
    opposite = "deltas (2, 0), (-1, 0): cos = -1, and 1 + cos is 0"
    h.case(
        "singular",
        opposite,
        [[2, 0], [-1, 0]],
        [0, 0],
        ("model_stock", {}, OPEN, "t has no value; a small denominator of rounding may give a large one"),
        ("mergekit:model_stock", {"filter_wise": False}, [0, 0], "t = 0 where the denominator is below 1e-6"),
        flags="StockSingular",
        dtype="F64",
    )
    h.case("one-model", "one model has no angle", [[1.0]], [0.0], ("model_stock", {}, REFUSED, ""))
    h.case("no-base", "the angle is seen from the base", [[1.0], [2.0]], None, ("model_stock", {}, REFUSED, ""))
    return h


def widen() -> Hand:
    h = Hand("widen")
    columns = [[5.0, 0.0, 6.0], [0.0, 4.0, 8.0]]
    fours = [[4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]
    h.case(
        "odd-columns",
        "columns (5, 0), (0, 4), (6, 8) against (4, 0): magnitudes change by 1, 0, 6, directions by 0, 1, 0.4; "
        "ranks r = 1 0 2 and 0 2 1; 2r > 2 holds for r = 2 alone; scores (1, 1, 3) and (1, 3, 1), their means 1 2 2 "
        "times the deltas "
        "(1, 0), (-4, 4), (2, 8)",
        [columns],
        fours,
        ("widen", {"score_calibration_value": 3.0}, [[5.0, -4.0, 8.0], [0.0, 8.0, 16.0]], ""),
        flags="WidenOddColumns",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "one-model",
        "one model, s = 1: every score is 1, the model comes back",
        [columns],
        fours,
        ("widen", {}, columns, ""),
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "vectors-unranked",
        "tau = (1, 1, 1, 5), mean 2: only 5 is above it and scored 2, by its size and not its rank",
        [[1.0, 1.0, 1.0, 5.0]],
        [0.0] * 4,
        ("widen", {"score_calibration_value": 2.0}, [1.0, 1.0, 1.0, 10.0], ""),
        flags="WidenVectorsUnranked",
        dtype="F64",
        tolerance=1e-14,
    )
    h.case(
        "vectors-strictly-above",
        "tau = (1, 2, 3), mean 2: the entry at the mean is not above it",
        [[1.0, 2.0, 3.0]],
        [0.0] * 3,
        ("widen", {"score_calibration_value": 2.0}, [1.0, 2.0, 6.0], ""),
        flags="WidenVectorsUnranked",
        dtype="F64",
        tolerance=1e-14,
    )
    # Softmax over two models of ranks 0 and 1/2, and the reverse: 1 / (1 + e^(1/2)) and its complement.
    low = 1 / (1 + math.exp(0.5))
    high = 1 - low
    h.case(
        "softmax",
        "two models, columns (5, 0), (6, 8) and (6, 8), (5, 0) against (4, 0), threshold out of reach: ranks 0 1 "
        "and 1 0 over 2 "
        "columns, so the weights are softmax(0, 1/2) = 0.3775, 0.6225; deltas (1, 0) and (2, 8)",
        [[[5.0, 6.0], [0.0, 8.0]], [[6.0, 5.0], [8.0, 0.0]]],
        [[4.0, 4.0], [0.0, 0.0]],
        (
            "widen",
            {"above_average_value_ratio": 2.0},
            [[4 + low + 2 * high, 4 + 2 * high + low], [8 * high, 8 * high]],
            "each delta counts, magnitude and direction are not recomposed",
        ),
        flags="WidenRecomposes",
        dtype="F64",
        tolerance=1e-7,
    )
    h.case(
        "not-idempotent",
        "two models of columns (5, 0), (6, 8) against (4, 0): ranks 0 1 each, softmax 1/2, and 1 for the column above "
        "average: weights 1/2 + 1/2 and 1 + 1 times the deltas (1, 0), (2, 8)",
        [[[5.0, 6.0], [0.0, 8.0]], [[5.0, 6.0], [0.0, 8.0]]],
        [[4.0, 4.0], [0.0, 0.0]],
        ("widen", {}, [[5.0, 8.0], [0.0, 16.0]], ""),
        flags="WidenRecomposes",
        dtype="F64",
        tolerance=1e-7,
    )
    # Turned by k 2^-16: 1 - cos = k^2 2^-33, a thousandth of what float32 resolves beside 1.
    turned = [[5.0, 6.0, 7.0, 8.0], [m * k * 2.0**-16 for m, k in zip((5, 6, 7, 8), (4, 3, 2, 1))]]
    h.case(
        "direction-noise",
        "columns (m, m k 2^-16) for m = 5 6 7 8 and k = 4 3 2 1 against (4, 0): magnitudes rank 0 1 2 3, directions "
        "3 2 1 0; "
        "2r > 3 holds for r = 2, 3, so scores (1, 1, 3, 3) and (3, 3, 1, 1), weights 2",
        [{"model.layers.0.mlp.up_proj.weight": turned}],
        {"model.layers.0.mlp.up_proj.weight": [[4.0] * 4, [0.0] * 4]},
        (
            "widen",
            {"score_calibration_value": 3.0},
            {"model.layers.0.mlp.up_proj.weight": [[6.0, 8.0, 10.0, 12.0], [2 * x for x in turned[1]]]},
            "",
        ),
        (
            "official:widen",
            {"above_average_value_ratio": 1.0, "score_calibration_value": 3.0},
            OPEN,
            "1 - cos in float32 is 0 or noise here, so the direction's ranks say nothing",
        ),
        flags="WidenDirectionNoise",
        tolerance=2.0**-22,
    )
    h.case(
        "all-at-base",
        "all deltas are zero: the base",
        [[[1.0, 2.0]], [[1.0, 2.0]]],
        [[1.0, 2.0]],
        ("widen", {}, [[1.0, 2.0]], ""),
    )
    h.case("no-base", "importance is the distance from the base", [[[1.0, 2.0]]], None, ("widen", {}, REFUSED, ""))
    h.case("no-models", "nothing to merge", [], [[1.0, 2.0]], ("widen", {}, REFUSED, ""))
    return h


BY_HAND = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "wise_ft": wise_ft,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "model_stock": model_stock,
    "widen": widen,
}
