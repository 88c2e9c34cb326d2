"""Every method gives on every array library what it gives on NumPy, to the bit unless a tolerance is stated here.

Tests of torch:cuda:0 and cupy are marked `gpu`.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

import refmerge
from refmerge import merge, numeric, registry
from refmerge.api import prepare
from refmerge.checkpoint import DTYPES, save
from refmerge.testing import assert_same

# How far from NumPy's result a method may be, in ulps, by its name; all others are equal to the bit.
ULPS: dict[str, int] = {}

SHAPES = {
    "b.weight": (23, 67), "a.rows": (3, 350), "conv": (4, 3, 25), "norm": (300,), "number": (), "one": (1,),
    "none": (0, 3),
}  # fmt: skip


def tensors(seed, shapes=SHAPES, dtype=np.float32, coarse=False):
    """Random tensors; coarse ones with ties everywhere and zeros of both signs."""
    draw = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        x = draw.standard_normal(shape)
        made[name] = np.asarray(np.round(x * 4) / 4 if coarse else x * 0.02 + 1, dtype=dtype)
    return made


def inputs(case, **options):
    m, count, given = case.arguments()
    shapes = SHAPES
    if given.get("mask_strategy") == "magnitude":  # a fraction of a few elements is none, which it refuses
        shapes = {n: s for n, s in SHAPES.items() if math.prod(s) > 10}
    models = [tensors(i + 1, shapes, **options) for i in range(count)]
    return m, models, tensors(0, shapes, **options) if m.needs_base else None, given


def run(models, m, elements, base, given, **options):
    plan = prepare(models, m, base=base, threads=1, seed=5, params=given, **options)
    plan.elements = elements
    return plan.run()


def across(library, model):
    return model and {n: library.array(x) for n, x in model.items()}


def back(library, model):
    for name, x in model.items():
        assert library.owns(x), f"{name} is {type(x)}"
    return {n: library.host(x) for n, x in model.items()}


# --- Methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "coarse"), [(np.float32, False), (np.float64, True)])
def test_arrays_of_a_library(case, foreign, dtype, coarse):
    """Whole and in blocks; the results are arrays of that library on that device."""
    m, models, base, given = inputs(case, dtype=dtype, coarse=coarse)
    expected = run(models, m, 1 << 22, base, given)
    models, base = [across(foreign, x) for x in models], across(foreign, base)
    strict = foreign.name == "array_api_strict"  # slow: whole in float32, in blocks in float64
    for elements in (1 << 22, 500) if not strict else (1 << 22,) if dtype == np.float32 else (1024,):
        got = back(foreign, run(models, m, elements, base, given))
        assert_same(got, expected, ulps=ULPS.get(case.name, 0))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_small_floats_in_and_out(case, foreign, dtype):
    if not foreign.holds(np.empty(0, dtype)):
        pytest.skip(f"{foreign.name} has no arrays of {np.dtype(dtype)}")
    m, models, base, given = inputs(case, dtype=dtype)
    expected = run(models, m, 1 << 22, base, given)
    assert all(x.dtype == dtype for x in expected.values())
    got = run([across(foreign, x) for x in models], m, 1024, across(foreign, base), given)
    assert_same(back(foreign, got), expected, ulps=ULPS.get(case.name, 0))


def test_numpy_arrays_through_a_backend(case, backend):
    """NumPy arrays in and out, computed elsewhere, in blocks."""
    m, models, base, given = inputs(case)
    expected = run(models, m, 1 << 22, base, given)
    got = run(models, m, 1024, base, given, backend=backend.spec)
    assert all(isinstance(x, np.ndarray) for x in got.values())
    assert_same(got, expected, ulps=ULPS.get(case.name, 0))


def test_files_through_a_backend(case, backend, tmp_path):
    """The same bytes in the output file, from inputs of all dtypes."""
    m, models, base, given = inputs(case)
    kinds = dict(zip(SHAPES, [ml_dtypes.bfloat16, np.float16, np.float32, np.float64, ml_dtypes.float8_e4m3fn]))
    everything = [
        {n: x.astype(kinds.get(n, np.float32)) for n, x in t.items()} for t in [*models, *([base] if base else [])]
    ]
    paths = []
    for i, t in enumerate(everything):
        t["ids"] = np.arange(7)
        paths.append(tmp_path / f"in{i}.safetensors")
        save(t, paths[-1])
    options = {"base": paths[-1] if base else None, "seed": 5, **given}
    paths = paths[: len(models)]
    merge(paths, m, out=tmp_path / "numpy.safetensors", backend="numpy", **options)
    merge(paths, m, out=tmp_path / "other.safetensors", backend=backend.spec, threads=2, **options)
    if case.name not in ULPS:
        assert (tmp_path / "other.safetensors").read_bytes() == (tmp_path / "numpy.safetensors").read_bytes()
    else:
        one, other = (dict(refmerge.open_checkpoint(tmp_path / f"{n}.safetensors")) for n in ("numpy", "other"))
        assert_same(other, one, ulps=ULPS[case.name])


def test_the_tolerances_name_methods():
    assert set(ULPS) <= set(registry.names())


def test_arrays_in_call(library):
    """`call` takes and gives arrays of any library, and reads stats of the same."""
    base = library.array(np.zeros(4, np.float32))
    model = library.array(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    got = refmerge.call("dare_linear", [model], base, density=0.5, stats=[{"mask": library.array(np.float32([1, 0, 0, 1]))}])
    assert library.owns(got)
    assert library.host(got).tolist() == [2.0, 0.0, 0.0, 8.0]


def test_special_values_travel(foreign):
    """NaN, infinities, subnormals and the sign of zero through the engine, by a method that changes nothing."""
    x = np.array([np.nan, np.inf, -np.inf, 1e-45, -1e-45, 0.0, -0.0, 3.4e38], np.float32)

    @refmerge.method("keep", paper="none")
    def keep(models):
        return models[0]

    got = merge([{"x": foreign.array(x)}], keep, nonfinite="propagate")
    assert_same(back(foreign, got), {"x": x})


def test_results_with_gradients_are_written(torch, tmp_path):
    parameters = {"w": torch.nn.Parameter(torch.tensor([1.0, 3.0])), "v": torch.nn.Parameter(torch.ones(2).bfloat16())}
    for out_dtype in (None, "float32", "bfloat16"):
        path = tmp_path / f"{out_dtype}.safetensors"
        merged = merge([parameters] * 2, "slerp", dtype="float64", out_dtype=out_dtype, out=path)
        assert merged["w"].astype(np.float32).tolist() == [1.0, 3.0]


# --- What backends do: put and take ------------------------------------------------------------------------------------

# Every dtype's largest and smallest values, and neighbours of halves.
STORED = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


def codes(dtype, count=4096):
    """Bit patterns of a dtype that are not NaN: all of an 8- or 16-bit one, random ones else."""
    kind = DTYPES[dtype]
    if kind.itemsize <= 2:
        x = np.arange(256**kind.itemsize).astype(f"u{kind.itemsize}").view(kind)
    else:
        x = np.random.default_rng(0).integers(0, 256, count * kind.itemsize, dtype=np.uint8).view(kind)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return x[~np.isnan(x.astype(np.float64))]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("work", ["float32", "float64"])
def test_put_and_take_are_exact(backend, dtype, work):
    """Every value arrives unchanged in the work dtype, and goes back to the same bytes."""
    if dtype == "F64" and work == "float32":
        pytest.skip("float64 does not fit float32: the engine rounds it before")
    opened = registry.open_backend(backend.spec)
    x = codes(dtype)
    raw = x.view(np.uint8).copy()
    placed = opened.put(raw, dtype, (x.size,), work)
    raw[:] = 0  # the next block is read into the same buffer
    assert backend.owns(placed)
    expected = x.astype(np.float64)
    if backend.name == "cupy":
        backend.module.cuda.Device(0).synchronize()
    assert_same(backend.host(placed), expected.astype(work))
    out = np.full(x.nbytes, 0xAA, np.uint8)
    opened.take(placed, dtype, out)
    assert np.array_equal(out.view(x.dtype).view(f"u{x.itemsize}"), x.view(f"u{x.itemsize}"))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("work", ["float32", "float64"])
def test_take_rounds_once_to_nearest_even(backend, dtype, work):
    """At, just below and just above the middle of each two neighbouring values."""
    kind = DTYPES[dtype]
    line = np.unique(codes(dtype).astype(np.float64))
    line = line[np.isfinite(line)]
    low, high = line[:-1], line[1:]
    middle = low / 2 + high / 2
    even = np.where(low.astype(kind).view(f"u{kind.itemsize}") % 2 == 0, low, high)
    neighbours = np.diff(line) > 0
    if dtype == "F32":  # random values are no neighbours: make some
        low = np.float32(line[: line.size // 2]).astype(np.float64)
        low = low[np.abs(low) < 1e38]
        high = np.nextafter(np.float32(low), np.float32(np.inf)).astype(np.float64)
        middle = low / 2 + high / 2
        even = np.where(low.astype(np.float32).view(np.uint32) % 2 == 0, low, high)
        neighbours = np.ones(low.size, bool)
    below, above = np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)
    if work == "float32":
        if dtype == "F32":
            pytest.skip("nothing is rounded")
        below = np.nextafter(middle.astype(np.float32), np.float32(-np.inf)).astype(np.float64)
        above = np.nextafter(middle.astype(np.float32), np.float32(np.inf)).astype(np.float64)
    for x, expected in ((middle, even), (below, low), (above, high)):
        x, expected = x[neighbours], expected[neighbours].astype(kind)
        out = np.empty(x.size * kind.itemsize, np.uint8)
        registry.open_backend(backend.spec).take(backend.array(x.astype(work)), dtype, out)
        assert_same(out.view(kind), expected, signed_zero=False)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "F8_E5M2"])
def test_take_of_any_strides(backend, dtype):
    x = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    opened = registry.open_backend(backend.spec)
    for view in (lambda a: a.T, lambda a: a[:, ::2], lambda a: a.reshape(-1)[::3], lambda a: a[2:2]):
        expected = view(x).astype(DTYPES[dtype])
        out = np.empty(expected.nbytes, np.uint8)
        opened.take(view(backend.array(x)), dtype, out)
        assert_same(out.view(DTYPES[dtype]), expected.reshape(-1))


def test_a_backend_has_six_members(backend):
    opened = registry.open_backend(backend.spec)
    public = {name for name in dir(opened) if not name.startswith("_")}
    assert public == {"name", "xp", "put", "take", "block_bytes", "kernels"}
    assert opened.name.partition(":")[0] == backend.name.partition(":")[0]
    assert opened.block_bytes % 4096 == 0
    assert registry.open_backend(opened.name).name == opened.name  # a user may write what it is called


# --- Exact primitives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 1030), (1024, 3), (1, 1), (3, 0), (0, 3), (2, 3, 4)])
def test_tree_sums_along_an_axis(foreign, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(1e3)
    for axis in range(-len(shape), len(shape)):
        expected = numeric.tree_sum(x, axis=axis)
        assert expected.shape == tuple(np.delete(shape, axis))
        assert_same(foreign.host(numeric.tree_sum(foreign.array(x), axis=axis)), expected)
    assert numeric.tree_sum(foreign.array(x)) == numeric.tree_sum(x)


def test_tree_sum_along_an_axis_is_the_definition():
    """Leaves of 1024 along the axis by halving, then a left fold, against plain loops."""
    x = np.random.default_rng(1).standard_normal((3, 2500)) * 1e10
    expected = []
    for row in x:
        total = None
        for start in range(0, 2500, 1024):
            leaf = [*row[start : start + 1024].tolist(), *[0.0] * 1024][:1024]
            while len(leaf) > 1:
                half = len(leaf) // 2
                leaf = [a + b for a, b in zip(leaf[:half], leaf[half:])]
            total = leaf[0] if total is None else total + leaf[0]
        expected.append(total)
    assert numeric.tree_sum(x, axis=1).tolist() == expected
    assert numeric.tree_sum(x.T, axis=0).tolist() == expected


def test_ranks_and_top_along(library):
    x = np.array([[3.0, -0.0, 0.0, np.nan, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0]], np.float32)
    assert numeric.ranks(library.array(x)).tolist() == [[2, 0, 1, 4, 3], [0, 1, 2, 3, 4]]
    assert numeric.ranks(library.array(x), axis=0).tolist() == [[1, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    tops = {k: library.host(numeric.top_along(library.array(x), k)).tolist() for k in (0, 1, 2, 4, 5)}
    assert tops == {
        0: [[0] * 5, [0] * 5],
        1: [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]],
        2: [[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]],
        4: [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]],
        5: [[1] * 5, [1] * 5],
    }


def test_host_and_like(library):
    x = library.array(np.array([[1.0, 2.5]], np.float32))
    on_host = numeric.host(x)
    assert isinstance(on_host, np.ndarray)
    assert on_host.tolist() == [[1.0, 2.5]]
    again = numeric.like(on_host.astype(np.float64) * 2, x)
    assert library.owns(again)
    assert_same(library.host(again), np.array([[2.0, 5.0]], np.float32))


def test_indicator(library):
    x = library.array(np.array([-1.0, np.inf, 3.0], np.float32))
    assert_same(library.host(numeric.indicator(x > 0, like=x)), np.array([0, 1, 1], np.float32))
