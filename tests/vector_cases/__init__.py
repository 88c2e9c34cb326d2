"""What spec/vectors holds, one module a method: `vector_cases/<method>.py` and, for its flags, `<method>.toml`.

`hand()` gives the cases by hand, with dyadic numbers where that can be: the sum in a comment can be redone on paper. Each
is one input and what several entries make of it: the plain name is the paper's semantics, `tool:name` what that tool's
code does. Flags say which way of going wrong a case shows. What a module may say beside, of the results of other code:

CODE: entry -> where its code is, as `owner/name@commit function`.
STEMS: how result files of this method are called, where that is not its name alone.
TOOLS: whose results are taken, beside the authors' and mergekit's.
FLAGS: id of a result -> the flags it shows.
OPTIONS: id of a result -> options that it needs, such as {"arithmetic": "native"}.
PAPER: id of a result -> how to ask for it under the plain name (see Paper).
TOLERANCE: id of a result in 16 bits -> its tolerance, where the tool's rounding is more than an ulp of the largest value.
EVIDENCE: ids of results of tools that have no entry, kept because they show a disagreement.
several: function (id, arrays, header) -> Tests, of a result that is no merge of tensors into tensors: several outputs, say.
accepts: function Test -> whether a result belongs to this method, where the file's name does not tell.
STAGED: ids of cases under the plain name, of one tensor each, that get the values of the page's steps.
stages: function Exact -> {step: {name: value}}, the page's definition in exact numbers, written from the page and apart from
the methods. A value is an array, a number, or a list of them; `result`, in the last step, must be what the case expects.

`<method>.toml` has the flags, and two tables more. [cases]: "given" (what the definition begins with), "step 2", "all
steps", or the first words of a sentence of the page's edge cases -> the ids of the cases under the plain name that test it.
[untested]: such a sentence -> why no vector can test it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
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
    stages: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Exact:
    """A case of one tensor in exact numbers: arrays of Fractions. stats: one mapping name -> array a model."""

    base: Any
    models: list[Any]
    params: dict[str, Any]
    stats: list[dict[str, Any]]

    @classmethod
    def of(cls, test: Test) -> Exact:
        def fractions(tensors: Tensors) -> dict[str, Any]:
            return {name: fraction(x.astype(np.float64)) for name, x in tensors.items()}

        base, *models = (sole(fractions(x)) for x in (test.base or test.models[0], *test.models))
        return cls(base if test.base else None, models, test.params, [fractions(x) for x in test.stats or ()])

    @property
    def masks(self) -> list[Any]:
        """Recorded draws, 0 or 1, one array a model."""
        return [sole(x) for x in self.stats]

    def each(self, name: str, default: Any) -> list[Fraction]:
        """A parameter of which each model has one, or all have the same."""
        value = self.params.get(name, default)
        return [Fraction(x) for x in value] if isinstance(value, list) else [Fraction(value)] * len(self.models)


def sole(tensors: dict[str, Any]) -> Any:
    (x,) = tensors.values()
    return x


fraction = np.frompyfunc(Fraction, 1, 1)
sign = np.frompyfunc(lambda x: Fraction((x > 0) - (x < 0)), 1, 1)


def origin(text: str) -> dict[str, str]:
    """Reads `owner/name@commit function` and `mergekit 0.1.5 (PyPI) function`."""
    match = re.match(r"(\S+?)(?:@(\S+)| (\d[\d.]*))\s+(?:\(.*?\)\s*)?(.*)", text)
    assert match, text
    repository, commit, version, function = match.groups()
    return {"how": "ran", "repository": repository, "version": commit or version, "function": function}


FAMILY = "mergekit 0.1.5 mergekit/merge_methods/generalized_task_arithmetic.py:GeneralizedTaskArithmeticMerge"


def arrays(value: Any, dtype: str) -> Tensors:
    """A tensor `x` from numbers, or several from a mapping; an array keeps the dtype it has."""
    if not isinstance(value, dict):
        value = {"x": value}
    return {name: x if isinstance(x, np.ndarray) else np.array(x, DTYPES[dtype]) for name, x in value.items()}


@dataclass
class Paper:
    """A result that the paper's semantics give as well: how to ask for it under the plain name.

    names: of the tensors that agree; all, if empty. base_first: the tool's base is the first model. entry: the plain name,
    where it is not the tool's. drop_masks: recorded masks say what is dropped; keep_masks: they say what is kept, and bear
    the tensor's own name. without_stats: what was recorded follows from the models.
    """

    params: dict[str, Any]
    names: tuple[str, ...] = ()
    base_first: bool = False
    drop_masks: bool = False
    keep_masks: bool = False
    without_stats: bool = False
    comment: str = ""
    entry: str = ""


class Hand:
    """Collects the cases by hand of one method; code: entry -> where its code is."""

    def __init__(self, method: str, code: dict[str, str]) -> None:
        self.method, self.code = method, code
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
        stats: list[Tensors] | None = None,
        options: dict[str, Any] | None = None,
        ran: str = "",
    ) -> None:
        """One input and what each entry makes of it: answers of (entry, params, expected, why). Where an entry has several,
        those after the first have a number in their ids. masks: of what is kept. ran: the code whose results are expected,
        where they are not by hand; how it was asked for what the paper means is said in the comment."""
        before: list[str] = []
        for entry, params, expect, why in answers:
            before.append(entry)
            again = f"-{before.count(entry)}" if before.count(entry) > 1 else ""
            tool = entry.partition(":")[0] if ":" in entry else ""
            source = {"how": "by hand"}
            if tool:
                source = origin(self.code.get(entry, FAMILY)) | source
            if ran:
                source = origin(ran)
            given = stats
            if masks is not None:
                given = [arrays(mask, "U8") for mask in masks]
                if entry == "official:dare":
                    given = [{name: np.array(1 - x, np.float32) for name, x in one.items()} for one in given]
                elif entry != "fusion_bench:dare":
                    given = [{f"{name}.mask": x for name, x in one.items()} for one in given]
            if (refused := expect is REFUSED) or expect is OPEN:
                expect = {}
            self.tests.append(
                Test(
                    id=f"{self.method}-{id}" + (f"-{tool}" if tool else "") + again,
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
                    stats=given,
                    options=options or {},
                )
            )


def numbered(h: Hand, id: str, entry: str) -> str:
    """The id of a case, or id-2, id-3 ... where this entry has answered it with other parameters before."""
    tool = f"-{entry.partition(':')[0]}" if ":" in entry else ""
    there = {t.id for t in h.tests}
    ids = (f"{id}-{k}" if k > 1 else id for k in range(1, 99))
    return next(i for i in ids if f"{h.method}-{i}{tool}" not in there)


REFUSED = object()  # the input must be refused
OPEN = object()  # no value is asserted


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)
