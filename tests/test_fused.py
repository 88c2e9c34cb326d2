"""Programs compiled from a method's text give its bits, and so does NumPy where nothing is compiled."""

from __future__ import annotations

import ctypes
import os
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refmerge
import refmerge.plan
from refmerge import pages, registry
from refmerge.api import prepare
from refmerge.checkpoint import CheckpointWriter, encode, itemsize, name_of
from refmerge.errors import UsageError
from refmerge.fused import Lazy, compiler, graph, leaf, store, stretch_sums, support
from refmerge.laws import Trial, statistics
from refmerge.method import method
from refmerge.numeric import STRETCH, array_namespace, keys_of, leaf_sums
from refmerge.rng import digits_numpy
from refmerge.testing import assert_same

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, -3.4e38, 1.0, -1.0, 0.5]
WHOLE = ("tensor", "model")  # whose arrays are never noted down
STREAMING = [n for n in refmerge.methods() if n in registry._files() and registry.get(n).view not in WHOLE]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def compiled(monkeypatch, cache):
    """Every program is compiled at once, into a cache of this module's own, and none fails."""
    if compiler.command() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(compiler, "folder", lambda: cache)
    monkeypatch.setattr(compiler, "waits", True)
    monkeypatch.setattr(compiler, "_jobs", {})
    monkeypatch.setattr(graph.program, "_kernels", {})
    yield
    assert not [job.source for job in compiler._jobs.values() if job.failed]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(compiler, "command", lambda: None)
    monkeypatch.setattr(graph.program, "_kernels", {})


def nasty(seed: int, size: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(size).astype(np.float32)
    x[draw.integers(0, size, size // 8)] = draw.choice(np.array(SPECIAL, np.float32), size // 8)
    return x


def same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    width = f"u{got.itemsize}"
    off = (got.view(width) != expected.view(width)) & ~(np.isnan(got) & np.isnan(expected))
    assert not off.any(), (got[off][:5], expected[off][:5])


# --- Single operations ------------------------------------------------------------------------------------------------


def everything(a, b, c, xp):
    """Each operation at least once."""
    agrees = xp.astype(a * b > 0, np.float32)
    return {
        "arithmetic": 0.3 * a + 2 * c - (1 - b),
        "quotient": a / b,
        "sign": xp.sign(a),
        "mask": agrees * c,
        "max": xp.maximum(a, b),
        "min": xp.minimum(b, c),
        "abs": xp.abs(-a),
        "where": xp.where(a < b, c, 0.5),
        "logic": xp.astype(xp.logical_not((a <= b) & (b >= c) | (a == c)), np.float32),
        "nan": xp.astype(xp.isnan(a * b) | (a != a), np.float32),
        "not a product and a sum in one rounding": a * b + c,
    }


def operands(size):
    a, b, c = (nasty(k, size) for k in range(3))
    with np.errstate(all="ignore"):
        a, c = a.astype(ml_dtypes.bfloat16), c.astype(np.float16)
    lazy = (leaf(a.view(np.uint16), "BF16", (size,)), leaf(b, "F32", (size,)), leaf(c.view(np.uint16), "F16", (size,)))
    return lazy, (a.astype(np.float32), b, c.astype(np.float32))


@pytest.mark.parametrize("how", ["compiled", "interpreted"])
def test_operations(how, request):
    request.getfixturevalue(how)
    lazy, arrays = operands(4099)
    with np.errstate(all="ignore"):
        expected = everything(*arrays, np)
    got = everything(*lazy, graph.NAMESPACE)
    assert all(type(x) is Lazy for x in got.values())
    for key, x in zip(got, graph.compute(*got.values())):
        zero = 0.0 if key in ("max", "min") else -0.0  # of zeros of both signs NumPy's own answer depends on the processor
        same_bits(x + np.float32(zero), expected[key] + np.float32(zero))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_of_results(compiled, dtype):
    x = np.concatenate([nasty(5, 1 << 15), np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32).view(np.float32)])
    expected, got = (np.empty(x.size * itemsize(dtype), np.uint8) for _ in range(2))
    encode(x, dtype, expected)
    assert store(leaf(x, "F32", x.shape), dtype, got)
    kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
    with np.errstate(all="ignore"):
        same_bits(got.view(kind).astype(np.float32), expected.view(kind).astype(np.float32))


def test_sums_have_the_tree_of_leaf_sums(compiled):
    lazy, (a, b, _) = operands(3 * STRETCH)
    draw = np.random.default_rng(0).standard_normal(3 * STRETCH).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = leaf_sums(a * b, np.abs(draw), draw * draw)
        z = leaf(draw, "F32", draw.shape)
        got = stretch_sums([lazy[0] * lazy[1], abs(z), z * z])
    for x, y in zip(got, expected, strict=True):
        same_bits(x, y)


def test_what_is_not_noted_down_is_computed_by_numpy():
    x = np.array([1.0, -2.0, 3.0], np.float32)
    lazy = leaf(x, "F32", (3,))
    same_bits(np.sqrt(np.abs(lazy)), np.sqrt(np.abs(x)))
    same_bits(lazy + np.float64(0.1), x + np.float64(0.1))
    same_bits(lazy * np.ones((2, 3), np.float32), x * np.ones((2, 3), np.float32))
    same_bits(np.float32(2.0) - lazy, np.float32(2.0) - x)
    same_bits(x[::-1] - lazy, x[::-1] - x)
    same_bits((2.0 * lazy)[:1], 2.0 * x[:1])
    same_bits((2.0 * lazy)[::2], 2.0 * x[::2])
    assert (lazy > 0).any() and not (lazy > 0).all()
    assert list(lazy) == list(x)
    three = graph.NAMESPACE.full_like(lazy, 3)
    same_bits(np.asarray(three), np.full(3, 3, np.float32))
    same_bits(np.asarray(lazy / three), x / np.full(3, 3, np.float32))
    same_bits(three[:1], np.full(1, 3, np.float32))


# --- The compiler -----------------------------------------------------------------------------------------------------

ADD_ONE = "void run(long n, float *x) { for (long i = 0; i < n; i++) x[i] += 1; }  /* %s */"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No program has been compiled yet."""
    if compiler.command() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(compiler, "folder", lambda: tmp_path)
    monkeypatch.setattr(compiler, "_jobs", {})
    return tmp_path


def test_nobody_waits_for_the_compiler(fresh):
    source = ADD_ONE % "nobody waits"
    assert compiler.library(source) is None
    compiler.finish()
    x = np.ones(3, np.float32)
    compiler.library(source).run(ctypes.c_long(3), ctypes.c_void_p(x.ctypes.data))
    assert x.tolist() == [2, 2, 2]
    assert [p.suffix for p in fresh.iterdir()] == [".so"], "scratch files are gone"


def test_another_process_finds_what_was_compiled(fresh, monkeypatch):
    source = ADD_ONE % "found"
    compiler.library(source)
    compiler.finish()
    monkeypatch.setattr(compiler, "_jobs", {})
    assert compiler.library(source) is not None


def test_a_program_that_another_process_compiles_is_left_to_it_while_it_lives(fresh, monkeypatch):
    source = ADD_ONE % "claimed"
    claim = compiler._Job(source).target.with_suffix(".claim")
    claim.write_text(str(os.getppid()))
    assert compiler.library(source) is None
    compiler.finish()
    assert compiler.library(source) is None
    claim.write_text("2147483646")  # no process has this number
    compiler.library(source)
    compiler.finish()
    assert compiler.library(source) is not None


def test_what_cannot_be_compiled_is_left_undone(fresh, monkeypatch):
    monkeypatch.setattr(compiler, "waits", True)
    assert compiler.library("this is no C") is None
    assert compiler.library("this is no C") is None
    assert not list(fresh.glob("*.so")) and not list(fresh.glob("*.claim"))


def test_a_folder_that_others_can_write_to_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "refmerge").mkdir()
    (tmp_path / "refmerge").chmod(0o777)
    assert compiler.folder.__wrapped__() != tmp_path / "refmerge"
    (tmp_path / "refmerge").chmod(0o700)
    assert compiler.folder.__wrapped__() == tmp_path / "refmerge"


def test_arrays_in_memory_are_computed_by_the_text(monkeypatch):
    """They are the oracle."""
    monkeypatch.setattr(refmerge.plan, "WORTH_COMPILING", 0)
    plan = prepare([{"x": np.ones(8, np.float32)}], "linear")
    assert not plan.is_fused


# --- What is done to every block --------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 200), st.integers(0, 4))
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_digits(compiled, k0, k1, start, count, j):
    expected = digits_numpy((k0, k1), start, start + count, j)
    assert np.array_equal(digits_numpy((k0, k1), start, start + count, j, compiled=True), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_finite(compiled, dtype):
    kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
    top = ml_dtypes.finfo(kind).max
    for value in [*SPECIAL, float(top), -float(top)]:
        with np.errstate(all="ignore"):
            x = np.full(1001, 0.5, kind)
            x[777] = value
        assert support.finite(x.view(np.uint8), dtype) == bool(np.isfinite(x.astype(np.float64)).all()), value


@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 5000])
def test_between(compiled, size):
    x = nasty(size, max(size, 8))[:size]
    for low, high in [(-0.5, 0.5), (0.0, 0.0), (-np.inf, np.inf), (1.0, 3.4e38), (2.0, 1.0)]:
        above, inside = support.between(x, low, high)
        assert above == np.count_nonzero(~(x <= np.float32(high)))
        same_bits(inside, x[(x <= np.float32(high)) & (x >= np.float32(low))])
    assert keys_of(inside).size == inside.size


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 896), (2, 9000)])
def test_at_ranks(compiled, shape):
    x = nasty(shape[1], max(shape[0] * shape[1], 8))[: shape[0] * shape[1]].reshape(shape)
    for rows in (x, np.abs(x), np.zeros_like(x)):
        order = np.argsort(rows + np.float32(0), axis=1, kind="stable")
        expected = np.empty(shape, np.float32)
        values = np.linspace(0, 1, shape[1], dtype=np.float32)
        np.put_along_axis(expected, order, np.broadcast_to(values, shape), axis=1)
        same_bits(support.at_ranks(values, rows), expected)


# --- Methods ----------------------------------------------------------------------------------------------------------

# What somebody's own text may do with its arrays, beyond what ours do.
TEXTS = {
    "power": lambda a, b, xp: (a - b) ** 2,
    "truth values times a Python number": lambda a, b, xp: a + xp.astype((a > b) * 0.3, xp.float32),
    "a choice between two Python numbers": lambda a, b, xp: a * xp.astype(xp.where(a > b, 0.3, 0.1), xp.float32),
    "truth values with bits": lambda a, b, xp: xp.where((a > b) ^ (b > 0) | ~(a > 0), a, b),
    "in place": lambda a, b, xp: _in_place(a, b),
    "a sum by NumPy": lambda a, b, xp: a - xp.max(a * 0) + b,
    "a matrix": lambda a, b, xp: xp.flip(a)[::-1] + b,
    "a rounded number": lambda a, b, xp: xp.round(a) + xp.clip(b, -1.0, 1.0),
}


def _in_place(a, b):
    x = a + 0
    x *= b
    return x


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_others(compiled, text, tmp_path):
    @method(text.replace(" ", "_"), paper="none")
    def somebodys(models, base):
        return TEXTS[text](models[0], base, array_namespace(models[0]))

    inputs = [{"a": np.where(np.isnan(x := nasty(k, 2 * STRETCH + 300)), np.float32(1), x)} for k in range(2)]
    paths = [save(tmp_path / f"{k}.safetensors", x) for k, x in enumerate(inputs)]
    expected = merged(somebodys, paths[1:], paths[0], tmp_path / "text.safetensors", {}, fused=False)
    assert not isinstance(expected, str), expected
    equal(merged(somebodys, paths[1:], paths[0], tmp_path / "o.safetensors", {}, fused=True), expected)


def save(path, tensors):
    with CheckpointWriter(path, {k: (name_of(x.dtype), x.shape) for k, x in tensors.items()}) as writer:
        for k, x in tensors.items():
            writer.write(k, 0, np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return path


def merged(merge, paths, base, out, params, *, fused, elements=None, **options):
    """The tensors of a merge of files, or the error by which it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            plan = prepare(paths, merge, base=base, nonfinite="propagate", threads=1, params=params, **options)
            plan.fused, plan.elements = fused, elements
            return {k: np.array(x) for k, x in plan.run(out, overwrite=True).items()}
    except UsageError as refused:
        return str(refused)


def equal(got, expected):
    if isinstance(expected, str) or isinstance(got, str):
        assert got == expected
        return
    assert_same(got, expected)


@pytest.mark.parametrize("name", STREAMING)
def test_methods_compiled(compiled, name, tmp_path):
    """bfloat16 with whole stretches and a rest, special values among them; the parameters of the page's example."""
    merge = registry.get(name)
    example = pages.example_for(merge)
    params = {k: v for k, v in example.params.items() if k in merge.params}
    count = len(example.models)
    with np.errstate(all="ignore"):
        inputs = [
            {"a": nasty(k, 2 * STRETCH + 300).astype(ml_dtypes.bfloat16), "b": nasty(9 + k, 600).reshape(20, 30)}
            for k in range(count + 1)
        ]
    paths = [save(tmp_path / f"{k}.safetensors", x) for k, x in enumerate(inputs)]
    base = paths.pop() if merge.needs_base else None
    paths = paths[:count]
    options = {"seed": example.params.get("seed", 0)}
    if merge.stats:
        whose = [inputs[count], *inputs[:count]] if merge.needs.startswith("base") else inputs[:count]
        options["stats"] = [statistics(merge, x, np.random.default_rng(k)) for k, x in enumerate(whose)]
    expected = merged(merge, paths, base, tmp_path / "text.safetensors", params, fused=False, **options)
    assert not isinstance(expected, str) or "no singular values" in expected, expected
    for elements in (None, STRETCH):
        got = merged(merge, paths, base, tmp_path / "o.safetensors", params, fused=True, elements=elements, **options)
        equal(got, expected)


@pytest.mark.parametrize("name", STREAMING)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_methods_interpreted(interpreted, name, tmp_path_factory, data):
    merge = registry.get(name)
    trial = Trial(merge, data.draw, 0)
    models, base = trial.inputs(nonfinite=True)
    params = trial.params(len(models))
    folder = tmp_path_factory.mktemp("fused")
    paths = [save(folder / f"{k}.safetensors", x) for k, x in enumerate(models)]
    over = None if base is None else save(folder / "base.safetensors", base)
    stats = trial.stats(models)
    expected = merged(merge, paths, over, folder / "text.safetensors", params, fused=False, **stats)
    elements = trial.choose(None, 3, 1024)
    equal(merged(merge, paths, over, folder / "o.safetensors", params, fused=True, elements=elements, **stats), expected)
