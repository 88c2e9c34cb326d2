"""Every method gives on every array library what it gives on NumPy, to the bit unless a tolerance is stated here.

Tests of torch:cuda:0 and cupy are marked `gpu`. CuPy takes float32 subnormals for zero; inputs here hold none but where
a test says so.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
from refmerge.backends import cupy as cupy_backend
from refmerge.backends import device

import refmerge
from refmerge import merge, numeric, registry
from refmerge.api import prepare
from refmerge.checkpoint import DTYPES, save
from refmerge.errors import UsageError
from refmerge.sources import Scratch
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
    return m, models, tensors(0, shapes, **options) if m.takes_base else None, given


def cut(plan, elements):
    """The plan with blocks of so many elements."""
    plan.elements = elements
    return plan


def run(models, m, elements, base, given, **options):
    return cut(prepare(models, m, base=base, threads=1, seed=5, params=given, **options), elements).run()


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
    least = m.least_for(m.bind(given, len(models)))
    assert all(x.dtype == (least or dtype) for x in expected.values())
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
    if case.name == "official:rws":  # 0 / 0: float8 rounds a clean model's number to the base's
        options["nonfinite"] = "propagate"
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


DEVICE = ("host", "lane", "threads")


def test_a_backend_has_six_members(backend):
    opened = registry.open_backend(backend.spec)
    public = {name for name in dir(opened) if not name.startswith("_")} - {"without"}  # dtypes that a device may lack
    on_device = backend.name in ("torch:cuda:0", "cupy")
    assert public == {"name", "xp", "put", "take", "block_bytes", "kernels", *(DEVICE if on_device else ())}
    assert opened.name.partition(":")[0] == backend.name.partition(":")[0]
    assert opened.block_bytes % 4096 == 0
    assert registry.open_backend(opened.name).name == opened.name  # a user may write what it is called


# --- Devices: buffers, streams, sizes ------------------------------------------------------------------------------------


class Counting:
    """A backend of the host that notes its lanes and buffers, and is NumPy's otherwise."""

    threads = 3

    def __init__(self):
        self._numpy = registry.open_backend("numpy")
        self.name, self.xp, self.block_bytes, self.kernels = "counting", self._numpy.xp, 1 << 20, {}
        self.given, self.lanes = [], []

    def host(self, nbytes):
        self.given.append(np.full(nbytes, 0xAA, np.uint8))
        return self.given[-1]

    @contextmanager
    def lane(self):
        self.lanes.append("in")
        yield
        self.lanes.append("out")

    def put(self, raw, dtype, shape, work, out=None):
        return self._numpy.put(raw, dtype, shape, work)

    def take(self, array, dtype, out):
        self._numpy.take(array, dtype, out)


def test_buffers_of_a_device_are_its_own():
    """Raw buffers come from `host`, by doublings; others and those of other backends are plain."""
    counting = Counting()
    scratch = Scratch(counting)
    a = scratch.raw("a", 1000)
    assert (a.size, len(counting.given), counting.given[0].size) == (1000, 1, 1024)
    assert np.shares_memory(a, counting.given[0])
    assert np.shares_memory(scratch.raw("a", 10), a)
    assert np.shares_memory(scratch.raw("a", 1024), a)
    assert not np.shares_memory(scratch.raw("b", 10), a)
    assert [g.size for g in counting.given] == [1024, 16]
    assert scratch.raw("a", 1025).size == 1025
    assert counting.given[-1].size == 2048
    assert scratch.raw("c", 0).size == 0
    scratch.work("w", 5, "float32")
    assert len(counting.given) == 3
    for other in (None, registry.open_backend("numpy")):
        assert Scratch(other).raw("a", 1000).size == 1000


def test_a_thread_holds_the_lane_while_it_runs_blocks():
    counting = Counting()
    with Scratch(counting) as scratch:
        assert counting.lanes == ["in"]
        assert scratch.raw(0, 8).size == 8
    assert counting.lanes == ["in", "out"]
    with Scratch() as scratch, Scratch(registry.open_backend("numpy")):
        assert scratch.raw(0, 8).size == 8


def test_a_lane_is_left_on_an_error():
    streams = device.Streams(object)
    with pytest.raises(ZeroDivisionError), streams.borrow():
        raise ZeroDivisionError
    with streams.borrow() as again:
        pass
    with streams.borrow() as first, streams.borrow() as second:
        assert first is again
        assert second is not first


def test_streams_are_not_shared_and_come_back():
    made = []
    streams = device.Streams(lambda: made.append(object()) or made[-1])
    together = threading.Barrier(4)
    held = []

    def thread():
        with streams.borrow() as stream:
            held.append(stream)
            together.wait(10)

    for _ in range(3):
        threads = [threading.Thread(target=thread) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(set(map(id, held[-4:]))) == 4
    assert len(made) == 4


@pytest.mark.parametrize(
    ("free", "threads", "mib"),
    [
        (80 << 30, 6, 64),
        (6 << 30, 6, 64),
        (4 << 30, 6, 42.5),
        (2 << 30, 6, 21),
        (1 << 30, 6, 16),
        (0, 6, 16),
        (3 << 30, 4, 48),
    ],
)
def test_blocks_are_sized_to_the_card(free, threads, mib):
    size = device.block_bytes(free, threads)
    assert size == mib * 2**20
    assert size % (8 * numeric.STRETCH) == 0
    assert size * device.ARRAYS * threads <= free or size == device.LEAST


def test_threads_of_a_device():
    assert 2 <= device.threads() <= 6


@pytest.mark.parametrize("name", ["torch", "cupy"])
@pytest.mark.parametrize("spec", ["{}:cuda:99", "{}:cuda:-1", "{}:nonsense", "{}:cuda:x"])
def test_a_missing_device_is_an_error(name, spec):
    """A UsageError that names the backend, whether library and driver are there or not."""
    with pytest.raises(UsageError, match=f"backend {name}"):
        registry.open_backend(spec.format(name))


def test_bfloat16_by_integers():
    """What CuPy, which knows no bfloat16, does on the device: all codes, and halves between them and around."""
    codes = np.arange(1 << 16).astype(np.uint16)
    wide = cupy_backend.widened(codes, np)
    assert np.array_equal(wide.view(np.uint32), codes.view(ml_dtypes.bfloat16).astype(np.float32).view(np.uint32))
    low = codes.astype(np.uint32) << 16
    bits = np.concatenate([low, *(low + d for d in (1, 0x7FFF, 0x8000, 0x8001, 0xFFFF))])
    with np.errstate(all="ignore"):
        expected = bits.view(np.float32).astype(ml_dtypes.bfloat16)
    got = cupy_backend.narrowed(bits, np).view(ml_dtypes.bfloat16)
    assert_same(got, expected)


def test_one_pass_of_linear(monkeypatch):
    """The text of torch's kernel, run by Triton's interpreter, to the bit (it rounds no bfloat16 as a device does)."""
    pytest.importorskip("triton")
    code = """
import numpy as np, torch
from refmerge.backends.torch.kernels._fused import scaled_sum
for stored in (torch.float32, torch.float16, torch.bfloat16):
    for count in (1, 2, 5):
        xs = [(torch.randn(5000, generator=torch.Generator().manual_seed(k)) * 0.02).to(stored) for k in range(count)]
        if stored == torch.float32:
            xs[0][:3] = torch.tensor([1e-45, -1e-40, 3e-39])
        cs = [float(np.float32((k + 1) / 7)) for k in range(count)]
        expected = cs[0] * xs[0].float()
        for c, x in zip(cs[1:], xs[1:]):
            expected = expected + c * x.float()
        kept = torch.float32 if stored == torch.bfloat16 else stored
        out, flag = torch.empty(5000, dtype=kept), torch.zeros(1, dtype=torch.int32)
        scaled_sum(xs, cs, out, flag)
        assert torch.equal(out.view(torch.uint8), expected.to(kept).view(torch.uint8)) and flag.item() == 0, (stored, count)
        xs[-1][4999] = float("nan")
        scaled_sum(xs, cs, out, flag)
        assert flag.item() == 1
"""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


on_cuda = pytest.mark.parametrize(
    "backend", [pytest.param(n, marks=pytest.mark.gpu) for n in ("torch:cuda:0", "cupy")], indirect=True
)


@on_cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_many_blocks_and_threads_on_a_device(case, backend, dtype, tmp_path):
    """From disk to disk, in blocks that cut leaves, on more threads than buffers would forgive: NumPy's bytes."""
    m, count, given = case.arguments()
    shapes = {"a": (257, 1031), "b": (70001,), "c": (3, 5, 7)}
    everything = [tensors(k, shapes, np.dtype(dtype)) for k in range(count + m.takes_base)]
    paths = []
    for k, t in enumerate(everything):
        paths.append(tmp_path / f"{k}.safetensors")
        save(t, paths[-1])
    found = {}
    for spec, elements, threads in (("numpy", 1 << 18, 1), (backend.spec, 4096, 8), (backend.spec, 1 << 20, 2)):
        base = paths[-1] if m.takes_base else None
        plan = prepare(paths[:count], m, base=base, backend=spec, threads=threads, seed=5, params=given)
        out = tmp_path / f"out{len(found)}.safetensors"
        cut(plan, elements).run(out)
        found[spec, threads] = dict(refmerge.open_checkpoint(out))
    expected, *others = found.values()
    for got in others:
        assert_same(got, expected, ulps=ULPS.get(case.name, 0))


@on_cuda
def test_buffers_are_not_overwritten_while_they_are_copied(backend, tmp_path):
    """Thousands of blocks of a method that changes nothing, on many threads: a buffer filled too early would show."""

    @refmerge.method("first", paper="none", models=(2, 2))
    def first(models):
        return models[0]

    draw = np.random.default_rng(0)
    made = [{"x": draw.integers(0, 1 << 24, (1 << 23) + 5).astype(np.float32)} for _ in range(2)]
    for k, t in enumerate(made):
        save(t, tmp_path / f"{k}.safetensors")
    for elements, threads in ((4096, 16), (1 << 18, 16), (1 << 21, 6)):
        for kind in ("disk", "host"):
            models = made if kind == "host" else [tmp_path / f"{k}.safetensors" for k in range(2)]
            plan = prepare(models, first, backend=backend.spec, threads=threads, nonfinite="propagate")
            got = cut(plan, elements).run(*([] if kind == "host" else [tmp_path / f"{elements}.safetensors"]))
            assert np.array_equal(np.asarray(got["x"]), made[0]["x"]), (elements, kind)


@on_cuda
def test_a_lane_gives_a_stream_and_takes_it_back(backend):
    """Each thread computes on a stream of its own, and the caller's is as it was."""
    opened = registry.open_backend(backend.spec)
    if backend.name == "cupy":
        current = lambda: backend.module.cuda.get_current_stream().ptr  # noqa: E731
    else:
        current = lambda: backend.module.cuda.current_stream().cuda_stream  # noqa: E731
    before = current()
    with opened.lane():
        one = current()
        seen = []

        def other():
            with opened.lane():
                seen.append(current())

        t = threading.Thread(target=other)
        t.start()
        t.join()
    assert current() == before
    assert len({before, one, *seen}) == 3


@on_cuda
def test_host_memory_of_a_device_is_pinned(backend):
    buffer = registry.open_backend(backend.spec).host(1000)
    assert (buffer.dtype, buffer.shape, buffer.flags.writeable) == (np.uint8, (1000,), True)
    if backend.name == "cupy":
        assert backend.module.cuda.runtime.pointerGetAttributes(buffer.ctypes.data).type == 1
    else:
        assert backend.module.from_numpy(buffer).is_pinned()


@on_cuda
def test_block_size_follows_the_card(backend):
    opened = registry.open_backend(backend.spec)
    assert device.LEAST <= opened.block_bytes <= device.MOST
    assert opened.block_bytes % device.STRIDE == 0
    assert opened.threads >= 2


@on_cuda
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_linear_in_one_pass_on_a_device(backend, stored):
    """The kernel's `into` gives the method's bits and flags what is not finite; subnormals are kept, by CuPy's as well."""
    if backend.name == "cupy" and stored == "bfloat16":
        pytest.skip("CuPy has no arrays of bfloat16")
    into = registry.open_backend(backend.spec).kernels["linear"].into
    options = {"weight": (0.3, 0.5, -0.1), "normalize": True}
    models = [{"x": np.random.default_rng(k).standard_normal(100_003).astype(np.dtype(stored))} for k in range(3)]
    models[0]["x"][:2] = [1e-40, -3e-39]
    expected = merge(models, "linear", **options)["x"]
    xs = [backend.array(m["x"]) for m in models]
    out, flag = backend.array(np.zeros(100_003, np.dtype(stored))), backend.array(np.zeros(1, np.int32))
    assert into(out, flag, xs, **options)
    assert_same(backend.host(out), expected)
    assert int(flag[0]) == 0
    xs[1][77] = math.inf
    assert into(out, flag, xs, **options)
    assert int(flag[0]) == 1


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
