"""The vectors are well formed, refmerge reproduces them, and the tools of refmerge.testing find what they should."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, find, given, settings

import refmerge
from refmerge import registry, testing
from refmerge.errors import RefmergeError

VECTORS = resources.files("refmerge.spec") / "vectors"
SCHEMA = json.loads((VECTORS / "vectors.schema.json").read_text(encoding="utf-8"))
DOCUMENTS = {name: json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8")) for name in testing.names()}
CASES = [case for name in DOCUMENTS for case in testing.vectors(name)]


# --- The files --------------------------------------------------------------------------------------------------------

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
KEYWORDS = {
    "$schema", "title", "description", "$defs", "$ref", "type", "const", "enum", "anyOf", "pattern", "minLength",
    "minimum", "minItems", "minProperties", "items", "properties", "required", "additionalProperties", "propertyNames",
}  # fmt: skip


def violations(value: Any, schema: Any, at: str = "") -> list[str]:
    """The part of JSON Schema that our schema uses; an unknown keyword fails rather than passing unseen."""
    if schema is True or schema is False:
        return [] if schema else [f"{at}: not allowed"]
    if "$ref" in schema:
        return violations(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    assert schema.keys() <= KEYWORDS, f"the schema uses {schema.keys() - KEYWORDS}"
    if "anyOf" in schema:
        branches = [violations(value, branch, at) for branch in schema["anyOf"]]
        return [] if not all(branches) else min(branches, key=len)
    found = []
    if "type" in schema and (not isinstance(value, TYPES[schema["type"]]) or isinstance(value, bool)):
        return [f"{at}: {value!r} is no {schema['type']}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{at}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at}: {value!r} is none of {schema['enum']}")
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        found.append(f"{at}: {value!r} is too short")
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        found.append(f"{at}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, (int, float)) and value < schema.get("minimum", -math.inf):
        found.append(f"{at}: {value} is too small")
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            found.append(f"{at}: too few items")
        for index, item in enumerate(value):
            found += violations(item, schema.get("items", True), f"{at}[{index}]")
    if isinstance(value, dict):
        if missing := set(schema.get("required", ())) - value.keys() or len(value) < schema.get("minProperties", 0):
            found.append(f"{at}: incomplete {missing}")
        for key, item in value.items():
            found += violations(key, schema.get("propertyNames", True), f"{at}: name {key}")
            found += violations(
                item, schema.get("properties", {}).get(key, schema.get("additionalProperties", True)), f"{at}.{key}"
            )
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_file_follows_its_schema(name):
    document = DOCUMENTS[name]
    assert not (found := violations(document, SCHEMA)), "\n".join(found[:10])
    assert document["method"] == name
    tests = [test for group in document["groups"] for test in group["tests"]]
    assert document["number_of_tests"] == len(tests)
    for group in document["groups"]:
        assert ("reason" in group) == ("registered" in group), f"{group['entry']}: a skip needs its reason"
        assert group["source"]["how"] == "by hand" or group["source"].keys() == {
            "how",
            "repository",
            "version",
            "function",
        }
    used = {flag for test in tests for flag in test["flags"]}
    assert used == set(document["notes"]), "each flag is described, and shown by at least one vector"
    for test in tests:
        assert (test["expect"] == {}) == (test["result"] == "invalid") or test["result"] == "acceptable", test["id"]
    for path in VECTORS.iterdir():
        assert len(path.read_bytes()) < 900_000, f"{path.name} is too large for a source tree"


def test_schema_violations_are_found():
    document = json.loads(json.dumps(DOCUMENTS["linear"]))
    document["groups"][0]["tests"][0]["result"] = "fine"
    document["groups"][0]["surprise"] = 1
    del document["notes"]["LinearNormalizes"]["effect"]
    assert len(violations(document, SCHEMA)) == 3


def test_ids_are_unique():
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))


# --- refmerge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refmerge(case):
    if not case.registered and case.entry not in registry.names():
        pytest.skip(case.reason)
    run = lambda: refmerge.merge(case.models, case.entry, **case.call)  # noqa: E731
    if problem := testing.outcome(case, run, error=RefmergeError):
        pytest.fail(str(testing.Failure(case, problem)), pytrace=False)


SIXTEEN_BITS = [
    case
    for case in CASES
    if case.result == "valid"
    and case.source.get("how") == "ran"
    and case.entry.partition(":")[0] in ("mergekit", "official")
    and any(x.dtype in (np.float16, ml_dtypes.bfloat16) for x in case.expect.values())
]


@pytest.mark.parametrize("case", SIXTEEN_BITS, ids=lambda case: case.id)
def test_native_arithmetic_gives_a_tools_own_bits(case):
    """A tool that merges 16-bit tensors in 16 bits rounds after each operation; so does refmerge when asked to."""
    merged = refmerge.merge(case.models, case.entry, **case.call, arithmetic="native")
    for name, expected in case.expect.items():
        testing.assert_same(merged[name], expected)


def test_there_are_results_in_sixteen_bits():
    assert len(SIXTEEN_BITS) >= 7


# --- Another language -------------------------------------------------------------------------------------------------


def test_a_reader_in_another_language():
    """The files say all that there is to know: a hundred lines of JavaScript read them and merge, without refmerge."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    reader = Path(__file__).parent / "readers" / "vectors.mjs"
    found = json.loads(subprocess.run([node, reader, str(VECTORS)], capture_output=True, text=True, check=True).stdout)
    assert found["failures"] == []
    assert found["files"] == len(DOCUMENTS) and found["tests"] == len(CASES) and found["merged"] >= 25


# --- refmerge.testing -------------------------------------------------------------------------------------------------


def wise_ft(models, base, *, alpha=0.5):
    """Somebody's own implementation, with its own errors."""
    (model,) = models
    assert base is not None and base.keys() == model.keys()
    blend = {
        x: ((1 - alpha) * base[x] + alpha * model[x]).astype(base[x].dtype) for x in base if base[x].dtype.kind == "f"
    }
    return base | blend


def test_check_passes_a_right_function():
    report = testing.check(wise_ft, "wise_ft")
    assert report.ok and len(report.passed) > 5, report
    assert report.skipped == {"wise_ft-integers-differ": "the function takes no integers"}


def test_check_names_the_flag_of_a_wrong_function():
    def other_form(models, base, *, alpha=0.5):
        return {x: base[x] + (alpha * (models[0][x] - base[x])).astype(base[x].dtype) for x in base}

    report = testing.check(other_form, "wise_ft")
    text = str(report)
    assert not report.ok
    assert "wise_ft-lerp-form [WiseFtLerpForm]" in text
    assert "refmerge.merge(" in text and "wise_ft-two-models" in text
    assert testing.check(other_form, "wise_ft", tolerance=math.inf).failures, (
        "what must be refused is refused at any tolerance"
    )


def test_check_passes_what_a_case_needs_to_functions_that_take_it():
    seen = []

    def dare(models, base, *, stats=None, **params):
        seen.append(stats)
        raise NotImplementedError

    assert not testing.check(dare, "dare_linear").ok
    assert any(seen), "recorded draws arrive in stats"
    assert all(
        "stats" in reason
        for reason in testing.check(lambda models, base, density=0.9, **_: base, "ties").skipped.values()
    )


@pytest.mark.parametrize("result", [None, [1.0]])
def test_check_of_a_function_that_returns_no_mapping(result):
    report = testing.check(lambda models, base, **params: result, "linear")
    assert not report.ok and f"returned {type(result).__name__}, not a mapping" in str(report)


def test_check_refuses_what_has_no_vectors():
    with pytest.raises(LookupError, match="there are some for"):
        testing.check(wise_ft, "no_such_method")
    with pytest.raises(LookupError, match="entries: "):
        testing.check(wise_ft, "ties", entry="no_such_tool:ties")


def test_reproducer_runs():
    case = next(testing.vectors("linear", "linear"))
    scope: dict[str, Any] = {}
    exec(case.reproducer().replace("refmerge.merge(", "got = refmerge.merge("), scope)
    testing.assert_same(scope["got"], case.expect)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_assert_same_counts_ulps(dtype):
    zero, one = np.zeros(1, dtype), np.ones(1, dtype)
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    testing.assert_same(one, one.copy())
    testing.assert_same(np.array([np.nan], dtype), np.array([-np.nan], dtype))
    testing.assert_same(np.array([tiny], dtype), np.array([-tiny], dtype), ulps=2)
    with pytest.raises(AssertionError, match="largest distance 2 ulps"):
        testing.assert_same(np.array([tiny], dtype), np.array([-tiny], dtype), ulps=1)
    testing.assert_same(zero, -zero, signed_zero=False)
    for other in (-zero, one, zero * np.array(np.nan, dtype)):
        with pytest.raises(AssertionError):
            testing.assert_same(zero, other)
    with pytest.raises(AssertionError):
        testing.assert_same(np.array([np.nan], dtype), one, ulps=2**63)
    with pytest.raises(AssertionError):
        testing.assert_same(np.array([np.inf], dtype), np.array([-np.inf], dtype), ulps=5)


def test_assert_same_compares_dtype_then_shape_then_values():
    x = np.arange(3.0)
    with pytest.raises(AssertionError, match="dtype float32"):
        testing.assert_same(x.astype(np.float32), x)
    with pytest.raises(AssertionError, match=r"shape \(3, 1\)"):
        testing.assert_same(x[:, None], x)
    with pytest.raises(AssertionError, match=r"b: 1 of 3 differ .* the first\[2\] is 2, expected 0"):
        testing.assert_same({"a": x, "b": np.arange(3)}, {"a": x, "b": np.array([0, 1, 0])})
    with pytest.raises(AssertionError, match="names differ"):
        testing.assert_same({"a": x}, {"b": x})
    testing.assert_same(np.zeros((0, 3)), np.zeros((0, 3)))


def test_assert_same_reads_torch():
    torch = pytest.importorskip("torch")
    x = np.array([1.0, -0.0, 2.5], ml_dtypes.bfloat16)
    testing.assert_same(torch.tensor([1.0, -0.0, 2.5], dtype=torch.bfloat16), x)
    testing.assert_same(torch.tensor(2.0), np.float32(2.0))
    testing.assert_same(torch.tensor([1.0, -0.5]).to(torch.float8_e5m2), np.array([1, -0.5], ml_dtypes.float8_e5m2))


@settings(max_examples=50, suppress_health_check=list(HealthCheck), deadline=None)
@given(testing.checkpoints(nonfinite=True, max_models=4))
def test_checkpoints_fit_together(drawn):
    models, base = drawn
    assert 1 <= len(models) <= 4
    for model in models:
        assert model.keys() == base.keys()
        assert all(model[name].shape == base[name].shape and model[name].dtype == base[name].dtype for name in base)


BITES = {
    "negative zero": lambda models, base: any(((x == 0) & np.signbit(x)).any() for x in models[0].values()),
    "opposite": lambda models, base: any(
        ((models[0][n] - base[n] == base[n] - models[-1][n]) & (models[0][n] != base[n])).any() for n in base
    ),
    "empty": lambda models, base: any(x.size == 0 for x in base.values()),
    "scalar": lambda models, base: any(x.ndim == 0 for x in base.values()),
    "subnormal": lambda models, base: any(
        ((x != 0) & (abs(x) < np.finfo(x.dtype).smallest_normal)).any() for x in base.values()
    ),
    "unsorted names": lambda models, base: list(base) != sorted(base),
}


@pytest.mark.parametrize("what", BITES)
def test_checkpoints_reach_what_bites(what):
    find(testing.checkpoints(), lambda drawn: BITES[what](*drawn), settings=settings(max_examples=2000, database=None))


def test_import_is_light():
    code = "import sys, refmerge.testing; print([m for m in ('torch', 'cupy', 'hypothesis') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
