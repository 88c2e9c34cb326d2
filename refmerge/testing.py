"""Tests that anybody's merging code can run: the published vectors, an exact comparison, and inputs that bite.

    from refmerge import testing
    report = testing.check(my_ties, "ties")       # my_ties(models, base, *, density=0.2, lambda_=1.0)
    assert report.ok, report

Expected values come from the authors' code, from another tool or from arithmetic by hand, never from refmerge, so
refmerge is tested by the same vectors.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "Case", "Failure", "Report", "Stage", "StepDiffers", "answered", "assert_close", "assert_same", "check", "checkpoints",
    "first_differing", "flags", "keywords", "names", "outcome", "ulps_between", "vectors", "version",
]  # fmt: skip

Tensors = dict[str, np.ndarray]
Merge = Callable[..., Mapping[str, Any]]
NO_VECTORS = (".schema.json", "collection.json")  # JSON beside the vectors


# --- The vectors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a numbered step of the page gives, by the names that the page's code assigns: an array, or a list of them."""

    step: int
    title: str
    values: dict[str, np.ndarray | list[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One vector: what goes in, what must come out, and which ways of going wrong it shows (`flags`).

    stages: what the steps of the page give on the way, for some small cases. page: what of the page it tests, "step 2" or
    the first words of a sentence of its edge cases.
    """

    id: str
    entry: str
    result: Literal["valid", "invalid", "acceptable"]
    comment: str
    flags: tuple[str, ...]
    params: dict[str, Any]
    models: list[Tensors]
    base: Tensors | None
    expect: Tensors
    tolerance: float
    stats: list[Tensors] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    registered: bool = True
    reason: str = ""
    source: dict[str, str] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    page: tuple[str, ...] = ()

    @property
    def call(self) -> dict[str, Any]:
        """What refmerge.merge is called with beside models and entry."""
        policy = {"nonfinite": "propagate", "integers": "base"} | self.options
        return {"base": self.base, "stats": self.stats, **policy, **self.params}

    def reproducer(self) -> str:
        """Python that runs this case: the arrays in full where they are small, else read from the vectors."""
        if sum(x.size for one in [*self.models, self.base or {}] for x in one.values()) <= 64:
            arguments = "".join(f",\n    {name}={_paste(value)}" for name, value in self.call.items())
            call = f'refmerge.merge({_paste(self.models)}, "{self.entry}"{arguments})'
            return f"import numpy as np, refmerge\n{call}\n# expected: {_paste(self.expect)}"
        return (
            "import refmerge, refmerge.testing as testing\n"
            f'case = next(c for m in testing.names() for c in testing.vectors(m) if c.id == "{self.id}")\n'
            f'refmerge.merge(case.models, "{self.entry}", **case.call)  # expected: case.expect'
        )


def _paste(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_paste(x)}" for name, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_paste, value)) + "]"
    if isinstance(value, np.ndarray):
        data = repr(value.tolist()).replace("nan", "np.nan").replace("inf", "np.inf")
        return f"np.array({data}, np.dtype({value.dtype.name!r}))"
    return repr(value)


def names() -> list[str]:
    """The methods that have vectors."""
    found = (path.name for path in _folder().iterdir())
    return sorted(name[:-5] for name in found if name.endswith(".json") and not name.endswith(NO_VECTORS))


def version() -> str:
    """The semantic version of the collection of vectors, as spec/vectors/collection.json has it."""
    return json.loads((_folder() / "collection.json").read_text(encoding="utf-8"))["version"]


def flags(method: str) -> dict[str, dict[str, Any]]:
    """The ways in which implementations of `method` disagree: flag -> description, who does what, effect."""
    return _document(method)["notes"]


def vectors(method: str, entry: str | None = None) -> Iterator[Case]:
    """The cases of `method`, all or only those that `entry` ("ties", "official:ties", ...) must reproduce."""
    document = _document(method)
    twin: Tensors = {}
    path = _folder() / f"{method}.safetensors"
    if path.is_file():
        twin = _safetensors(path.read_bytes())
    for group in document["groups"]:
        if entry not in (None, group["entry"]):
            continue
        for test in group["tests"]:
            base, stats = test["base"], test.get("stats")
            yield Case(
                id=test["id"],
                entry=group["entry"],
                result=test["result"],
                comment=test["comment"],
                flags=tuple(test["flags"]),
                params={name: _scalars(value) for name, value in group["params"].items()},
                models=[_tensors(x, twin) for x in test["models"]],
                base=None if base is None else _tensors(base, twin),
                expect=_tensors(test["expect"], twin),
                tolerance=test["tolerance"],
                stats=None if stats is None else [_tensors(x, twin) for x in stats],
                options=dict(group.get("options", {})),
                registered=group.get("registered", True),
                reason=group.get("reason", ""),
                source=dict(group["source"]),
                stages=tuple(_stage(x, twin) for x in test.get("stages", ())),
                page=tuple(test.get("page", ())),
            )


def _folder() -> Any:
    return resources.files("refmerge.spec") / "vectors"


def _document(method: str) -> dict[str, Any]:
    path = _folder() / f"{method}.json"
    if not path.is_file():
        tool = '; for the semantics of a tool: check(fn, "ties", entry="mergekit:ties")' if ":" in method else ""
        raise LookupError(f"no vectors for {method!r}; there are some for {', '.join(names())}{tool}")
    return json.loads(path.read_text(encoding="utf-8"))


def _scalars(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are spelled as strings, which float() reads."""
    if isinstance(value, list):
        return [_scalars(x) for x in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _dtype(name: str) -> np.dtype:
    """A dtype by its safetensors name."""
    if name == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if name == "BOOL":
        return np.dtype(bool)
    return np.dtype({"F": "float", "I": "int", "U": "uint"}[name[0]] + name[1:])


def _tensors(value: Mapping[str, Any], twin: Tensors) -> Tensors:
    return {name: _array(x, twin) for name, x in value.items()}


def _stage(stage: Mapping[str, Any], twin: Tensors) -> Stage:
    values = {
        name: [_array(x, twin) for x in value] if isinstance(value, list) else _array(value, twin)
        for name, value in stage["values"].items()
    }
    return Stage(stage["step"], stage["title"], values)


def _array(value: Mapping[str, Any], twin: Tensors) -> np.ndarray:
    if "$ref" in value:
        return twin[value["$ref"]]
    return np.array(_scalars(value["data"]), _dtype(value["dtype"])).reshape(value["shape"])


def _safetensors(data: bytes) -> Tensors:
    """The format in eight lines, so that whoever vendors the vectors can vendor this module too."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    out: Tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + at for at in entry["data_offsets"])
            out[name] = np.frombuffer(data[start:stop], _dtype(entry["dtype"])).reshape(entry["shape"])
    return out


# --- Running them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    case: Case
    message: str

    def __str__(self) -> str:
        case = self.case
        flagged = f" [{', '.join(case.flags)}]" if case.flags else ""
        page = f"  of the page: {'; '.join(case.page)}\n" if case.page else ""
        return f"{case.id}{flagged}: {self.message}\n  {case.comment}\n{page}" + _indent(case.reproducer())


@dataclass
class Report:
    """What `check` found: the ids that passed, the failures, and what was left out, with the reason."""

    method: str
    entry: str
    passed: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        lines = [
            f"{self.entry}: {len(self.passed)} passed, {len(self.failures)} failed, {len(self.skipped)} skipped",
            *map(str, self.failures),
        ]
        notes = flags(self.method)
        shown = dict.fromkeys(flag for failure in self.failures for flag in failure.case.flags)
        lines += [f"{flag}: {notes[flag]['description']}" for flag in shown]
        lines += [f"skipped {id}: {reason}" for id, reason in self.skipped.items()]
        return "\n".join(lines)


def check(
    fn: Merge, method: str, *, tolerance: float | None = None, ulps: int | None = None, entry: str | None = None
) -> Report:
    """Run the vectors of `method` against `fn(models, base, **params) -> {name: array}`.

    `fn` may give its own steps beside the result, `({name: array}, {2: {"tau": [array, array]}})`: by the number of the
    page's step, the names that `Case.stages` has. Where the result is wrong, the failure then says which step differs first.
    `entry` says whose semantics `fn` claims: the paper's (the default, `method` itself), or say "mergekit:ties". What a
    case needs beyond models, base and parameters (recorded draws in `stats`, or options such as `over`) is passed by
    keyword to a function that takes it; for one that does not, the case is skipped. `tolerance` (relative to a tensor's
    largest value) and `ulps` replace the tolerance of every case.
    """
    entry = entry or method
    report = Report(method, entry)
    cases = list(vectors(method, entry))
    if not cases:
        known = sorted({case.entry for case in vectors(method)})
        raise LookupError(f"no vectors of {method!r} for the entry {entry!r}; entries: {', '.join(known)}")
    takes = keywords(fn)
    for case in cases:
        extra = dict(case.options) | ({"stats": case.stats} if case.stats is not None else {})
        if missing := [name for name in extra if not takes(name)]:
            report.skipped[case.id] = f"the function takes no {' or '.join(missing)}"
        elif problem := outcome(case, partial(fn, case.models, case.base, **extra, **case.params), tolerance, ulps):
            report.failures.append(Failure(case, problem))
        else:
            report.passed.append(case.id)
    return report


def outcome(
    case: Case,
    run: Callable[[], Mapping[str, Any]],
    tolerance: float | None = None,
    ulps: int | None = None,
    error: type[Exception] = Exception,
) -> str:
    """What is wrong with the outcome of `run` as an answer to `case`; nothing where it is right.

    `run` gives a mapping name -> array, or that and its steps (see `check`).
    """
    try:
        got, stages = answered(run())
    except error as exception:
        return "" if case.result != "valid" else f"raised {type(exception).__name__}: {exception}"
    if case.result == "invalid":
        return "gave a result where the input must be refused"
    if case.result == "acceptable":
        return ""
    if not isinstance(got, Mapping):
        return f"returned {type(got).__name__}, not a mapping name -> array, with or without its steps"
    for name, expected in case.expect.items():
        if name not in got:
            return f"{name} is missing from the result"
        try:
            if ulps is not None:
                assert_same(got[name], expected, ulps=ulps, signed_zero=False)
            else:
                assert_close(_host(got[name]), expected, case.tolerance if tolerance is None else tolerance)
        except AssertionError as exception:
            first = first_differing(case, stages, tolerance)
            return f"{name}: {exception}" + (f"; {first}" if first else "")
    return ""


def answered(got: Any) -> tuple[Any, Mapping[Any, Any]]:
    """A result, and the steps that were given beside it, if any."""
    match got:
        case (Mapping(), Mapping() as stages) if all(isinstance(x, Mapping) for x in stages.values()):
            return got
    return got, {}


@dataclass(frozen=True)
class StepDiffers:
    """The first step whose value is not the page's, and where."""

    step: int
    title: str
    what: str

    def __str__(self) -> str:
        return f"first differing step: {self.step}, {self.title} ({self.what})"


def first_differing(
    case: Case, stages: Mapping[Any, Mapping[str, Any]], tolerance: float | None = None
) -> StepDiffers | None:
    """The first of the case's steps of which `stages`, number of the step -> {name: value}, has another value.

    A value is an array or numbers, or a list of them, one a model; entries are compared in C order, within `tolerance`,
    that of the case where it is None. Steps and names that are not given are passed over. None where all is right that is
    given.
    """
    allowed = case.tolerance if tolerance is None else tolerance
    for stage in case.stages:
        given = stages.get(stage.step, stages.get(str(stage.step), {}))
        for name, expected in stage.values.items():
            if name in given and (what := _differs(name, given[name], expected, allowed)):
                return StepDiffers(stage.step, stage.title, what)
    return None


def _differs(name: str, got: Any, expected: np.ndarray | list[np.ndarray], tolerance: float) -> str:
    """What is wrong with a value of a step: "tau of model 1, entry 3: 4.0 where 0.0 is right", both counted from 0."""
    if isinstance(expected, list):
        try:
            each = list(got)
        except TypeError:
            return f"{name}: no list, where one of {len(expected)} is right"
        if len(each) != len(expected):
            return f"{name}: a list of {len(each)} where {len(expected)} is right"
        pairs = ((f"{name} of model {n}", x, y) for n, (x, y) in enumerate(zip(each, expected)))
        return next(filter(None, (_differs(where, x, y, tolerance) for where, x, y in pairs)), "")
    try:
        x, y = np.ravel(_host(got)).astype(np.float64), np.ravel(expected).astype(np.float64)
    except (TypeError, ValueError):
        return f"{name}: no numbers"
    if x.size != y.size:
        return f"{name}: of size {x.size} where {y.size} is right"
    off = np.where(np.isnan(x), np.inf, np.abs(x - y))
    wrong = off > tolerance * np.max(np.abs(y), initial=0.0)
    if not wrong.any():
        return ""
    first = int(np.argmax(wrong))
    at = [int(i) for i in np.unravel_index(first, expected.shape)]
    entry = f", entry {at[0] if len(at) == 1 else tuple(at)}" if at else ""
    return f"{name}{entry}: {x[first]} where {y[first]} is right"


def keywords(fn: Callable[..., Any]) -> Callable[[str], bool]:
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return lambda name: True
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return lambda name: True
    return lambda name: name in parameters


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest finite value of the tensor; NaN equals NaN, infinity itself."""
    _same_kind(got, expected)
    x, y = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(y)
    scale = float(np.max(np.abs(y[finite]), initial=0.0))
    with np.errstate(invalid="ignore"):
        off = np.where(finite, np.abs(x - y), np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.inf))
    off = np.where(np.isnan(off), np.inf, off)
    wrong = off > tolerance * scale
    if wrong.any():
        allowed = f"{tolerance:g} of {scale:g} allowed"
        raise AssertionError(_where(got, expected, wrong, f"largest difference {np.max(off):g}, {allowed}"))


def _where(got: np.ndarray, expected: np.ndarray, wrong: np.ndarray, detail: str) -> str:
    first = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.ndim else ()
    at = f"[{', '.join(map(str, first))}]" if first else ""
    return (
        f"{int(wrong.sum())} of {wrong.size} differ ({detail}); "
        f"the first{at} is {got[first]!s}, expected {expected[first]!s}"
    )


def _same_kind(got: np.ndarray, expected: np.ndarray) -> None:
    if got.dtype != expected.dtype:
        raise AssertionError(f"dtype {got.dtype}, expected {expected.dtype}")
    if got.shape != expected.shape:
        raise AssertionError(f"shape {got.shape}, expected {expected.shape}")


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


# --- Comparing exactly ------------------------------------------------------------------------------------------------


def assert_same(a: Any, b: Any, ulps: int = 0, *, signed_zero: bool = True) -> None:
    """Dtype, then shape, then values, at most `ulps` apart; mappings name by name.

    NaN equals NaN whatever its payload. -0.0 differs from 0.0 at `ulps=0` unless `signed_zero=False`. Arrays of torch,
    CuPy and the array standard are brought to the host first.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        assert a.keys() == b.keys(), f"names differ: {sorted(a.keys() ^ b.keys())}"
        for name in a:
            try:
                assert_same(a[name], b[name], ulps, signed_zero=signed_zero)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return
    x, y = _host(a), _host(b)
    _same_kind(x, y)
    if not (_is_float(x.dtype)):
        wrong, detail = x != y, "integers are compared exactly"
    else:
        apart = ulps_between(x, y)
        wrong = apart > np.uint64(ulps)
        if signed_zero and not ulps:
            wrong |= (x == 0) & (y == 0) & (np.signbit(x) != np.signbit(y))
        detail = f"largest distance {int(np.max(apart, initial=0))} ulps"
    if wrong.any():
        raise AssertionError(_where(x, y, wrong, detail))


def ulps_between(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many steps from x to y on the floating-point line; 0 between two NaN, the most from NaN to a number."""
    width = x.dtype.itemsize * 8
    sign = np.uint64(1 << (width - 1))

    def ordered(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values).view(f"u{x.dtype.itemsize}").astype(np.uint64).reshape(values.shape)
        # Negative numbers count down from the middle, positive ones up from it, and the two zeros meet there.
        return np.where(bits & sign, sign - (bits & ~sign), sign + bits)

    p, q = ordered(x), ordered(y)
    apart = np.where(p > q, p - q, q - p)
    nan_x, nan_y = np.isnan(x), np.isnan(y)
    return np.where(nan_x & nan_y, np.uint64(0), np.where(nan_x ^ nan_y, np.iinfo(np.uint64).max, apart))


def _is_float(dtype: np.dtype) -> bool:
    # ml_dtypes' floats have kind "V": they are numbers that NumPy does not know.
    return dtype.kind == "f" or (dtype.kind == "V" and dtype.name.startswith(("bfloat", "float")))


def _host(x: Any) -> np.ndarray:
    """x as a NumPy array, from whichever library it is; none is imported here."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        torch, name = sys.modules["torch"], str(x.dtype).removeprefix("torch.")
        if name.startswith(("bfloat16", "float8")):  # which torch does not hand to NumPy
            import ml_dtypes

            bits = torch.int16 if x.dtype.itemsize == 2 else torch.uint8
            return x.contiguous().view(bits).numpy().view(getattr(ml_dtypes, name))
        return x.numpy()
    if type(x).__module__.partition(".")[0] == "cupy":
        x = x.get()
    return np.asarray(x)


# --- Inputs that bite -------------------------------------------------------------------------------------------------


def checkpoints(
    *,
    min_models: int = 1,
    max_models: int = 5,
    base: bool = True,
    nonfinite: bool = False,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    max_tensors: int = 3,
    max_side: int = 5,
) -> SearchStrategy[tuple[list[Tensors], Tensors | None]]:
    """A hypothesis strategy for (models, base) that looks for the places where merging goes wrong.

    Values are small and dyadic, so that sums are exact and ties common, with zeros of both signs, magnitudes that are
    equal and opposite, subnormals, and NaN and infinities with `nonfinite`. A model may be fresh, equal to the base,
    equal to the first model, or its mirror image about the base. Shapes are 0-d to 4-d, with empty and single elements;
    those of more than two axes have sides of 2 at most.
    """
    # hypothesis is a test dependency: check() and assert_same must work without it.
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp

    dyadic = [k / 4 for k in range(-8, 9)] + [-0.0, 16.0, -16.0, 1 + 2.0**-10]

    @st.composite
    def draw_checkpoints(draw: Callable[[Any], Any]) -> tuple[list[Tensors], Tensors | None]:
        dtype = np.dtype(draw(st.sampled_from(dtypes)))
        tiny = float(np.finfo(dtype).smallest_subnormal)
        values = [*dyadic, tiny, -tiny, 3 * tiny]
        if nonfinite:
            values += [np.nan, np.inf, -np.inf]
        elements = st.sampled_from(values)
        flat = hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=max_side)
        deep = hnp.array_shapes(min_dims=3, max_dims=4, min_side=0, max_side=min(max_side, 2))
        shapes = draw(st.lists(flat | deep, min_size=1, max_size=max_tensors))
        named = dict(zip("acbdefgh", shapes))  # not in sorted order: code that relies on it must sort

        def fresh() -> Tensors:
            return {name: draw(hnp.arrays(dtype, shape, elements=elements)) for name, shape in named.items()}

        # Methods that ask for no base still get models that mirror each other, about an origin of their own.
        origin = fresh()
        models: list[Tensors] = []
        for index in range(draw(st.integers(min_models, max_models))):
            relation = draw(st.sampled_from(["fresh", "fresh", "base", "first", "mirror"])) if index else "fresh"
            if relation == "fresh":
                model = fresh()
            elif relation == "base":
                model = {name: x.copy() for name, x in origin.items()}
            elif relation == "first":
                model = {name: x.copy() for name, x in models[0].items()}
            else:
                with np.errstate(invalid="ignore"):
                    model = {name: np.asarray(2 * origin[name] - x, dtype) for name, x in models[0].items()}
            models.append(model)
        return models, origin if base else None

    return draw_checkpoints()
