"""The engine: the same bits for every cut into blocks, threads and shards; exact answers of `group`; policies and failures.

Sums are recomputed here from the definition (leaves of 1024 in stretches of 65536, halving trees in float64, correctly
rounded sum of the leaves); selections are compared with a full sort.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from fractions import Fraction
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import refmerge.group
import refmerge.rng
import refmerge.selection
from refmerge import merge, registry
from refmerge.api import prepare
from refmerge.checkpoint import open_checkpoint, save
from refmerge.errors import InputError, UsageError
from refmerge.method import method
from refmerge.testing import assert_same

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# --- Every method, every cut -------------------------------------------------------------------------------------------

SHAPES = {
    "z.weight": (37, 129), "a.rows": (5, 2050), "conv": (5, 7, 65), "norm": (5000,), "number": (), "one": (1,),
    "none": (0, 3),
}  # fmt: skip


def tensors(seed, shapes, dtype=np.float32, coarse=False):
    """Random tensors; coarse ones have ties everywhere, zeros of both signs, and repeat from tensor to tensor."""
    draw = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        x = draw.standard_normal(shape)
        made[name] = np.asarray(np.round(x * 4) / 4 if coarse else x * 0.02 + 1, dtype=dtype)
    return made


def inputs(case, shapes=SHAPES, **options):
    m, count, given_ = case.arguments()
    if given_.get("mask_strategy") == "magnitude":  # a fraction of a few elements is none, which it refuses
        shapes = {n: s for n, s in shapes.items() if math.prod(s) > 10}
    models = [tensors(i + 1, shapes, **options) for i in range(count)]
    return m, models, tensors(0, shapes, **options) if m.takes_base else None, given_


def planned(models, m, elements, *, threads=1, params=None, **options):
    """The plan of a merge, with blocks of so many elements."""
    plan = prepare(models, m, threads=threads, params=params or {}, **options)
    plan.elements = elements
    return plan


@pytest.mark.parametrize("coarse", [False, True])
def test_any_blocks(case, coarse):
    m, models, base, given_ = inputs(case, coarse=coarse)
    whole = planned(models, m, 1 << 22, base=base, params=given_, seed=3).run()
    assert {n: x.shape for n, x in whole.items()} == {n: SHAPES[n] for n in models[0]}
    assert len(whole) >= 4
    for elements in (1024, 4096, 777, 130):
        assert_same(planned(models, m, elements, base=base, params=given_, seed=3).run(), whole)


def test_any_threads(case):
    """Large enough for the engine to use threads, which it does not for less."""
    shapes = {"b": (1030, 140), "a": (1000, 121)}
    m, models, base, given_ = inputs(case, shapes)
    seen = set()
    plan = planned(models, m, 16384, base=base, params=given_)
    plan.work.progress = lambda moved: seen.add(threading.get_ident())
    one = plan.run()
    assert len(seen) == 1
    for threads in (2, 5):
        plan = planned(models, m, 16384, threads=threads, base=base, params=given_)
        assert_same(plan.run(), one)


def test_threads_of_blas():
    """A merge has one for each worker, whatever was set before; that is put back, also by merges within each other."""
    draw = np.random.default_rng(0)
    models = [{"w": draw.standard_normal((200, 300)).astype(np.float32)} for _ in range(3)]
    seen = []

    @method("outer", paper="none", view="tensor")
    def outer(models):
        seen.append(blas_threads())
        merge([{"x": models[0]}], inner)
        seen.append(blas_threads())
        return models[0] @ models[1].T @ models[2]

    @method("inner", paper="none", view="model")
    def inner(models):
        seen.append(blas_threads())
        return models[0]

    once = merge(models, outer)
    with threadpool_limits(3, user_api="blas"):
        assert_same(merge(models, outer), once)
        assert blas_threads() == {3}
    assert seen == [{1}] * 6


def blas_threads():
    return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}


def test_any_files(case, tmp_path):
    """One file, shards of the inputs and of the output, and arrays in memory: the same bytes."""
    m, models, base, given_ = inputs(case)
    stored = {"z.weight": ml_dtypes.bfloat16, "conv": np.float16, "norm": np.float32}
    models = [{n: x.astype(stored.get(n, np.float32)) for n, x in t.items()} for t in models]
    base = base and {n: x.astype(stored.get(n, np.float32)) for n, x in base.items()}
    in_memory = merge(models, m, base=base, threads=1, seed=1, **given_)
    paths = [tmp_path / f"model{i}" for i in range(len(models))]
    for i, (x, path) in enumerate(zip(models, paths)):
        save(x, path, max_shard_size=[10**9, 12000, 1][i % 3])
    if base is not None:
        save(base, tmp_path / "base.safetensors")
    options = {"base": base and tmp_path / "base.safetensors", "seed": 1, **given_}
    whole = merge(paths, m, out=tmp_path / "whole.safetensors", **options)
    work = prepare(paths, m, base=options["base"], params=given_).work
    least = "1GB" if any(work.view(t) == "tensor" for t in work.tensors) else "900KB"  # what must be whole has its size
    shards = merge(paths, m, out=tmp_path / "shards", max_shard_size=9000, max_memory=least, threads=2, **options)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(dict(whole), in_memory)
    assert_same(dict(shards), in_memory)
    assert_same(merge(paths, m, **options), in_memory)


def test_inputs_are_never_changed(case):
    """Read-only arrays, and none that the result shares memory with."""
    m, models, base, given_ = inputs(case)
    everything = [*models, *([base] if base else [])]
    before = [{n: x.copy() for n, x in t.items()} for t in everything]
    for t in everything:
        for x in t.values():
            x.flags.writeable = False
    for elements in (4096, 1 << 22):
        result = planned(models, m, elements, base=base, params=given_).run()
        for t, b in zip(everything, before):
            assert_same(t, b)
            assert not any(np.shares_memory(result[n], t[n]) for n in t)


def test_a_method_that_computes_in_place_cannot():
    @method("in_place", paper="none")
    def in_place(models):
        x = models[0]
        x *= 2
        return x

    model = {"w": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="read-only"):
        merge([model], in_place)
    assert model["w"].tolist() == [1, 1, 1]


def test_strides_do_not_matter(case):
    m, models, base, given_ = inputs(case)
    plain = merge(models, m, base=base, threads=1, **given_)

    def strided(x):
        if x.ndim < 2:
            return np.repeat(x, 2)[::2] if x.ndim else x
        return np.asfortranarray(x)[::-1][::-1]

    odd = [{n: strided(x) for n, x in t.items()} for t in models]
    odd_base = base and {n: strided(x) for n, x in base.items()}
    assert not odd[0]["z.weight"].flags.c_contiguous
    assert_same(merge(odd, m, base=odd_base, threads=1, **given_), plain)
    assert_same(planned(odd, m, 777, base=odd_base, params=given_).run(), plain)


# --- group -------------------------------------------------------------------------------------------------------------


def ask(question, xs, *, elements=1 << 22, over="tensor", view="flat", threads=1, plan_out=None):
    """The answers to question(group, x_1, ...) for arrays or mappings xs, one for each block, all by the engine."""
    answers = []

    @method("asking", paper="none", view=view)
    def asking(models, group):
        answers.append(question(group, *models))
        return models[0]

    models = [x if isinstance(x, dict) else {"x": x} for x in xs]
    plan = planned(models, asking, elements, threads=threads, over=over, nonfinite="propagate")
    plan.run()
    if plan_out is not None:
        plan_out.append(plan)
    return answers


def one(answers):
    """The answer that all blocks got: the same to the bit."""
    assert len({repr(a) for a in answers}) == 1, answers
    return answers[0]


def leaves(x):
    """Sums of the leaves by the definition, in plain loops: 64 columns of 1024 in each stretch of 65536 entries, halved in
    their own dtype down to 128 and in float64 from there."""
    x = np.asarray(x).reshape(-1)
    sums = []
    for start in range(0, x.size, 65536):
        stretch = x[start : start + 65536]
        for lane in range(64):
            leaf = np.zeros(1024, x.dtype)
            part = stretch[lane::64]
            leaf[: part.size] = part
            with np.errstate(all="ignore"):
                while leaf.size > 1:
                    leaf = leaf.astype(np.float64) if leaf.size == 128 else leaf
                    leaf = leaf[: leaf.size // 2] + leaf[leaf.size // 2 :]
            sums.append(float(leaf[0]))
    return sums


def rounded_sum(values):
    """Correctly rounded, by exact fractions; IEEE for what is not finite."""
    special = [v for v in values if not math.isfinite(v)]
    if special:
        return special[0] if len(set(map(repr, special))) == 1 else math.nan
    exact = sum(map(Fraction, values), Fraction(0))
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def wild(n, dtype, seed=0):
    """Values of all magnitudes that cancel: a naive sum is wrong in every digit."""
    draw = np.random.default_rng(seed)
    top = 30 if dtype == np.float32 else 290
    x = draw.standard_normal(n) * 10.0 ** draw.uniform(-top, top, n)
    x[n // 2 :] = -x[: n - n // 2] * (1 + 1e-7 * draw.standard_normal(n - n // 2))
    draw.shuffle(x)
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 5000, 9217])
def test_sum_is_the_definition(n, dtype):
    x = wild(n, dtype)
    expected = rounded_sum(leaves(x))
    for elements in (1 << 22, 1024, 777, 100, 1):
        if n // elements < 1000:
            assert one(ask(lambda g, x: g.sum(x), [x], elements=elements)) == expected


@pytest.mark.parametrize("shape", [(7, 1000), (3, 1025), (40, 129), (5, 7, 65), (1, 3000), (6, 1), (2500, 2)])
@pytest.mark.parametrize("elements", [1, 777, 1024, 4096])
def test_sum_of_rows_that_cut_leaves(shape, elements):
    x = wild(math.prod(shape), np.float64).reshape(shape)
    answers = ask(lambda g, x: g.sum(x), [x], elements=elements, view="rows")
    assert one(answers) == rounded_sum(leaves(x))


@pytest.mark.parametrize("elements", [1 << 22, 1024, 333])
def test_sum_over_a_model_has_leaves_of_each_tensor(elements):
    model = {f"t{i}": wild(n, np.float64, i) for i, n in enumerate([1, 1023, 2500, 0, 1500])}
    expected = rounded_sum([s for x in model.values() for s in leaves(x)])
    assert one(ask(lambda g, x: g.sum(x), [model], elements=elements, over="model")) == expected
    # An empty tensor in view "tensor" has a block of its own; it must not hang or count.
    assert one(ask(lambda g, x: g.sum(x), [model], elements=elements, over="model", view="tensor")) == expected


@pytest.mark.parametrize(
    "x",
    [
        [np.inf, 1.0], [-np.inf, 1.0], [np.inf, -np.inf], [np.nan, 1.0], [np.inf, np.nan], [1.7e308] * 3 + [-1.7e308] * 3,
        [1.7e308] * 3, [-1.7e308] * 3, [5e-324] * 5, [-0.0], [-0.0, -0.0], [0.0, -0.0],
    ],
)  # fmt: skip
def test_sum_of_special_values(x):
    """Spread over leaves, so that the overflow is one of the leaves' sum."""
    spread = np.zeros(1024 * len(x))
    spread[::1024] = x
    expected = rounded_sum(leaves(spread))
    for elements in (1 << 22, 1024, 500):
        assert repr(one(ask(lambda g, x: g.sum(x), [spread], elements=elements))) == repr(expected)


def test_sum_of_several_arrays_is_a_tuple():
    a, b = (wild(3000, np.float32, i).astype(np.float64) for i in (1, 2))  # whose products are finite
    expected = (rounded_sum(leaves(a)), rounded_sum(leaves(b)), rounded_sum(leaves(a * b)))
    for elements in (1 << 22, 700):
        assert one(ask(lambda g, a, b: g.sum(a, b, a * b), [a, b], elements=elements)) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("elements", [1 << 22, 1024, 333])
def test_gram_is_made_of_products_in_float64(elements, dtype):
    xs = [wild(5000, np.float32, i).astype(dtype) for i in range(3)]
    wide = [x.astype(np.float64) for x in xs]
    expected = tuple(tuple(rounded_sum(leaves(x * y)) for y in wide) for x in wide)
    assert one(ask(lambda g, *xs: g.gram(*xs), xs, elements=elements)) == expected
    assert one(ask(lambda g, x: g.gram(x), xs[:1], elements=elements)) == ((expected[0][0],),)


def test_gram_knows_small_differences_of_long_vectors():
    """|a - b|^2 = aa - 2 ab + bb, of which products in float32 would leave no digit."""
    a = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    b = a + np.float32(1e-5) * a
    (aa, ab), (_, bb) = one(ask(lambda g, *xs: g.gram(*xs), [a, b], elements=1024))
    expected = np.sum((b.astype(np.float64) - a) ** 2)
    assert abs(aa - 2 * ab + bb - expected) < 1e-5 * expected


def awkward(n, seed=0, dtype=np.float32):
    """Ties, zeros of both signs, infinities, subnormals, values one ulp apart, and some NaN of either sign."""
    draw = np.random.default_rng(seed)
    tiny = np.finfo(dtype).smallest_subnormal
    near_one = np.nextafter(dtype(1), dtype(2))
    pool = np.array([0.0, -0.0, tiny, -tiny, 2 * tiny, 1.0, near_one, -1.0, -near_one, 3.5, np.inf, -np.inf], dtype)
    x = draw.choice(pool, n)
    x[draw.random(n) < 0.3] = dtype(draw.standard_normal())
    x[draw.random(n) < 0.02] = np.nan
    x[draw.random(n) < 0.02] = -np.nan
    return x


def descending(x):
    """Indices from the largest to the smallest: NaN first, zeros of both signs alike, ties to the lower index."""
    return sorted(range(len(x)), key=lambda i: (not math.isnan(x[i]), -x[i] if not math.isnan(x[i]) else 0.0, i))


@pytest.fixture(params=["plenty", "histograms"])
def selection(request, monkeypatch):
    """Selections as they are, and with so little room that histograms must decide to the last bit."""
    if request.param == "histograms":
        monkeypatch.setattr(refmerge.selection, "CANDIDATES", 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("elements", [1 << 22, 1024, 600])
def test_kth_largest_and_top_against_a_sort(selection, dtype, elements):
    x = awkward(5003, dtype=dtype)
    order = descending(x)
    ks = [1, 2, 150, 2500, 5002, 5003]
    got = one(ask(lambda g, *xs: g.kth_largest(*xs, k=ks), [x] * len(ks), elements=elements))
    # -0.0 == 0.0 here: which zero is the k-th is not defined, that it is the same for all blocks is
    assert [repr(v + 0.0) for v in got] == [repr(float(x[order[k - 1]]) + 0.0) for k in ks]
    for k in [0, -3, 6000, *ks]:
        assert top(x, k, elements) == set(order[: max(k, 0)])


def top(x, k, elements, over="tensor", view="flat"):
    """Indices that group.top marks with a one."""

    @method("topmost", paper="none", view=view)
    def topmost(models, group):
        return group.top(*models, k=k)

    result = planned([{"x": x}], topmost, elements, over=over, nonfinite="propagate").run()["x"]
    assert result.dtype == x.dtype
    assert set(np.unique(result)) <= {0.0, 1.0}
    return set(np.flatnonzero(result).tolist())


@quick
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan, 1 + 2.0**-23]),
        min_size=1,
        max_size=24,
    ),
    k=st.integers(-1, 26),
    elements=st.sampled_from([1 << 22, 1, 2, 5]),
    candidates=st.sampled_from([0, 1, 1 << 20]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@example(values=[1.0], k=1, elements=1, candidates=0, dtype=np.float32)
@example(values=[math.nan] * 8, k=3, elements=1, candidates=0, dtype=np.float32)
@example(values=[-0.0, 0.0] * 6, k=5, elements=2, candidates=1, dtype=np.float32)
@example(values=[2.0] * 12, k=5, elements=1, candidates=1 << 20, dtype=np.float64)
def test_selection_of_few(values, k, elements, candidates, dtype):
    x = np.array(values, dtype)
    order = descending(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refmerge.selection, "CANDIDATES", candidates)
        assert top(x, k, elements) == set(order[: max(k, 0)])
        if 1 <= k <= len(x):
            got = one(ask(lambda g, x: g.kth_largest(x, k=k), [x], elements=elements))
            assert repr(got + 0.0) == repr(float(x[order[k - 1]]) + 0.0)
            assert math.copysign(1, got) == 1 or got != 0


@pytest.mark.parametrize("over", ["model", lambda name: name[0]])
@pytest.mark.parametrize("elements", [1 << 22, 512, 100])
@pytest.mark.parametrize("k", [0, 1, 700, 1500])
def test_top_over_a_model_goes_by_sorted_names(selection, over, elements, k):
    """Ties go to the tensor whose name is first in order, however the mapping is ordered."""
    shapes = {"b.y": 900, "a.z": 1000, "b.x": (20, 30), "a.1": 1}
    model = {n: awkward(int(np.prod(s)), i).reshape(s) for i, (n, s) in enumerate(shapes.items())}
    groups = [sorted(shapes)] if over == "model" else [["a.1", "a.z"], ["b.x", "b.y"]]

    @method("topmost", paper="none")
    def topmost(models, group):
        return group.top(models[0], k=k)

    result = planned([model], topmost, elements, over=over, nonfinite="propagate").run()
    for names in groups:
        flat = np.concatenate([model[n].reshape(-1) for n in names])
        expected = np.zeros(flat.size, np.float32)
        expected[descending(flat)[:k]] = 1
        assert np.concatenate([result[n].reshape(-1) for n in names]).tolist() == expected.tolist()


def test_top_with_more_ties_than_can_be_held(monkeypatch):
    """More elements equal to the answer than a selection holds: a pass of its own counts them."""
    monkeypatch.setattr(refmerge.selection, "CANDIDATES", 1000)
    x = np.full(20_000, 0.5, np.float32)
    x[17::100] = 2.0  # 200 of them
    got = top(x, 5000, 1024)
    ties = [i for i in range(x.size) if x[i] == 0.5]
    assert got == set(range(17, x.size, 100)) | set(ties[:4800])


def test_top_in_threads():
    x = awkward(400_000)
    order = np.lexsort((np.arange(x.size), -np.nan_to_num(x, nan=np.inf, posinf=np.inf, neginf=-np.inf), ~np.isnan(x)))

    @method("topmost", paper="none")
    def topmost(models, group):
        return group.top(models[0], k=123_456)

    result = planned([{"x": x}], topmost, 4096, threads=4, nonfinite="propagate").run()["x"]
    assert np.array_equal(np.flatnonzero(result), np.sort(order[:123_456]))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (6, 5), (-1, 5)])
@pytest.mark.parametrize("elements", [1 << 22, 2])
def test_kth_largest_outside_the_group(k, n, elements):
    with pytest.raises(UsageError, match="kth_largest"):
        ask(lambda g, x: g.kth_largest(x, k=k), [np.ones(n)], elements=elements)


@pytest.mark.parametrize("elements", [1 << 22, 2])
def test_as_many_k_as_arrays(elements):
    for question in (lambda g, x: g.top(x, x, k=[1]), lambda g, x: g.kth_largest(x, k=[1, 2])):
        with pytest.raises(UsageError, match="values of k"):
            ask(question, [np.ones(5)], elements=elements)


@pytest.mark.parametrize("elements", [1 << 22, 1024, 1])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, -1.0, 7.0], 7.0), ([-5.0, -2.0], -2.0), ([-np.inf], -np.inf), ([np.inf, 1.0], np.inf),
        ([1.0, np.nan, 2.0], np.nan), ([-np.nan, 5.0], np.nan), ([-0.0], 0.0), ([-0.0, 0.0], 0.0), ([0.0, -0.0], 0.0),
        ([-1e-45, -1.0], -1e-45),
    ],
)  # fmt: skip
def test_max(values, expected, elements):
    x = np.array(values, np.float32)
    assert repr(one(ask(lambda g, x: g.max(x), [x], elements=elements))) == repr(float(np.float32(expected)))


@pytest.mark.parametrize("elements", [1 << 22, 1000, 64])
def test_max_and_count_over_a_model(elements):
    model = {"b": awkward(3001, 1), "a": awkward(777, 2), "c": np.empty((0, 2), np.float32)}
    everything = np.concatenate([x.reshape(-1) for x in model.values()])
    answers = ask(lambda g, x: (g.count(x > 0, x == 0), g.count(x != x), g.size), [model], elements=elements, over="model")
    nan = int(np.count_nonzero(everything != everything))
    assert nan > 0
    assert one(answers) == (
        (int(np.count_nonzero(everything > 0)), int(np.count_nonzero(everything == 0))), nan, everything.size,
    )  # fmt: skip
    assert all(type(c) is int for c in one(answers)[0])
    assert math.isnan(one(ask(lambda g, x: g.max(x), [model], elements=elements, over="model")))


@pytest.mark.parametrize("elements", [1 << 22, 500])
def test_group_tensor_within_a_model(elements):
    """Questions about the tensor and the model in turn, also where some tensors are one block and others are not."""
    model = {"b": wild(3000, np.float64, 1), "a": wild(400, np.float64, 2), "c": wild(1, np.float64, 3)}
    answers = []

    @method("both", paper="none", over="model")
    def both(models, group, name):
        (x,) = models
        mine = group.tensor.sum(x)
        all_ = group.sum(x)
        above = group.tensor.count(x > all_)
        largest = group.max(x)
        second = group.tensor.kth_largest(x, k=1)
        answers.append((name, mine, all_, above, largest, second, group.size, group.tensor.size))
        return x

    planned([model], both, elements).run()
    everything = [s for x in model.values() for s in leaves(x)]
    total = rounded_sum(everything)
    largest = max(float(x.max()) for x in model.values())
    expected = {
        (n, rounded_sum(leaves(x)), total, int(np.count_nonzero(x > total)), largest, float(x.max()), 3401, x.size)
        for n, x in model.items()
    }
    assert set(answers) == expected


def test_group_tensor_of_one_tensor_is_the_group():
    """The same log: questions by either name come in one order."""
    x = wild(3000, np.float64)
    answers = ask(lambda g, x: (g.tensor.sum(x), g.sum(x * x), g.tensor.max(x)), [x], elements=500, over="model")
    assert one(answers) == (rounded_sum(leaves(x)), rounded_sum(leaves(x * x)), float(x.max()))


@pytest.mark.parametrize("elements", [1 << 22, 300])
def test_questions_in_a_loop(elements):
    """Each question depends on the answer before: a bisection for the value that 100 elements exceed."""
    x = np.random.default_rng(0).permutation(1000).astype(np.float64)

    def bisect(group, x):
        low, high = 0.0, 1024.0
        while high - low > 1:
            middle = (low + high) / 2
            low, high = (middle, high) if group.count(x > middle) > 100 else (low, middle)
        return high

    plans = []
    assert one(ask(bisect, [x], elements=elements, plan_out=plans)) == 899
    assert plans[0].ran.passes == (1 if elements > 1000 else 11)


@pytest.mark.parametrize(
    "question",
    [
        lambda g, x: g.sum(x) if float(x[0]) == 0 else g.max(x),
        lambda g, x: g.sum(x) if float(x[0]) == 0 else g.sum(x, x),
        lambda g, x: g.sum(x) if float(x[0]) == 0 else 0.0,  # some ask nothing
        lambda g, x: (g.sum(x), g.sum(x) if float(x[0]) == 0 else 0.0),
        lambda g, x: (g.sum(x), g.top(x, k=2) if float(x[0]) == 0 else 0.0),
    ],
)
def test_blocks_that_ask_different_questions(question):
    """A method may not branch on what a block holds: an error, neither a hang nor an answer to something else."""
    with pytest.raises(TypeError, match="question"):
        ask(question, [np.arange(5000.0)], elements=500)


@pytest.mark.parametrize(
    ("dtype", "largest", "above"),
    [(np.float16, 65519.0, 65520.0), (ml_dtypes.float8_e5m2, 61439.0, 61440.0), (np.float32, 3.4e38, 3.5e38)],
)
def test_a_result_beyond_its_dtype_is_an_error(dtype, largest, above):
    """65504 is the largest float16, and what is nearer to it than to 65536 is rounded to it; likewise the others."""
    word = {np.float16: "float16", np.float32: "float32"}.get(dtype, "F8_E5M2")
    kept = merge([{"w": np.array([[1.0, largest]])}], "linear", out_dtype=word)["w"]
    assert np.isfinite(kept.astype(np.float64)).all()
    with pytest.raises(InputError, match=r"tensor 'w' at \(0, 1\), which is not finite in .*out_dtype.*propagate"):
        merge([{"w": np.array([[1.0, above]])}], "linear", out_dtype=word)
    assert np.isinf(merge([{"w": np.array([above])}], "linear", out_dtype=word, nonfinite="propagate")["w"][0])


def test_nan_in_float32_is_an_error_and_no_warning():
    zero = {"mlp.c_fc.weight": np.zeros((2, 2), np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"gives nan for tensor 'mlp\.c_fc\.weight'"):
            merge([zero, zero], "official:wudi", base=zero, iter_num=1)


def test_a_result_that_is_infinite_by_itself_is_an_error():
    models = [{"w": np.array([1.0], np.float32)}, {"w": np.array([2.0], np.float32)}]
    with pytest.raises(InputError, match="mergekit:linear gives -inf for tensor 'w'"):
        merge(models, "mergekit:linear", weight=[1.0, -1.0])


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_tied_tensor_is_not_copied_beside_what_it_is_tied_to(on_disk, tmp_path):
    embedding, other = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
    a = {"embed.weight": embedding, "lm_head.weight": embedding.copy()}
    b = {"embed.weight": other}
    if on_disk:
        a, b = (save(x, tmp_path / name) or tmp_path / name for x, name in ((a, "a"), (b, "b")))
    with pytest.raises(InputError, match=r"'lm_head.weight' of .* is 'embed.weight' once more.*missing='skip'"):
        merge([a, b], "linear", missing="base")
    assert set(merge([a, b], "linear", missing="skip")) == {"embed.weight"}


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="no tensor is in all of"):
        merge([{"a": np.zeros(2)}, {"b": np.zeros(2)}], "linear", missing="skip")


def test_a_mask_is_drawn_once_for_all_passes(monkeypatch):
    """mergekit's rescaling asks for sums of the masked task vectors before the merge can be made."""
    drawn = []
    digits = refmerge.rng.digits_numpy

    def counted(key, start, stop, j, compiled=False):
        drawn.append(stop - start if j == 0 else 0)
        return digits(key, start, stop, j, compiled)

    monkeypatch.setattr(refmerge.rng, "digits_numpy", counted)
    x = {"x": np.random.default_rng(0).standard_normal(10_000)}
    plan = prepare([x, x], "mergekit:dare_linear", base={"x": np.zeros(10_000)}, params={"weight": 1.0, "density": 0.5})
    plan.elements = 1024
    plan.run()
    assert plan.ran.passes == 2 and sum(drawn) == 2 * 10_000


@pytest.mark.parametrize("size", [65535, 65536, 65537, 200_000, 262_144])
def test_sums_over_several_stretches(size):
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    expected = rounded_sum(leaves(x))
    for elements in (1 << 22, 65536, 131072, 100_000, 70_001, 1024):
        assert one(ask(lambda g, y: g.sum(y), [x], elements=elements)) == expected


@pytest.mark.parametrize("size", [65535, 65536, 65537, 200_000])
def test_sums_are_the_same_piece_by_piece(size, monkeypatch):
    monkeypatch.setattr(refmerge.group, "PIECE", 65536)
    draw = np.random.default_rng(size)
    x, y = (draw.integers(-9, 9, (1, size)).astype(np.float32) for _ in range(2))

    def asked(g, x, y):
        one = np.ones((1, 1), np.float32)
        return (*g.sum(x, y, of=np.abs), g.dot((x, y)), *g.dot((one, y), (y, one)), *g.gram(x, y)[0])

    a, b = ([int(v) for v in z.ravel()] for z in (x, y))
    products = sum(v * w for v, w in zip(a, b))
    expected = (sum(map(abs, a)), sum(map(abs, b)), products, sum(b), sum(b), sum(v * v for v in a), products)
    assert one(ask(asked, [x, y], view="tensor")) == expected


def test_parameters_that_ask_a_group_for_different_k():
    base, model = ({"x": np.full(6, v), "y": np.full(6, v)} for v in (0.0, 1.0))
    plan = prepare([model], "ties", base=base, params=lambda name, _: {"density": 0.5 if name == "x" else 1.0})
    with pytest.raises(UsageError, match="over='tensor'"):
        plan.run()
    density = {"x": 0.5, "y": 1.0}
    plan = prepare([model], "ties", base=base, over="tensor", params=lambda name, _: {"density": density[name]})
    assert {name: x.sum() for name, x in plan.run().items()} == {"x": 3, "y": 6}


# --- What it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "passes"), [("linear", 1), ("task_arithmetic", 1), ("dare_linear", 1), ("slerp", 2)])
def test_each_pass_reads_everything_once(name, passes, make_case):
    """bfloat16 inputs count as two bytes; nothing is read of a base that the method does not ask for."""
    shapes = {"a": (50, 100), "b": (3000,)}
    m, models, base, given_ = inputs(make_case(name), shapes, dtype=ml_dtypes.bfloat16)
    for elements, times in ((1 << 22, 1), (1024, passes)):
        plan = planned(models, m, elements, base=base or models[0], params=given_)
        moved = []
        plan.work.progress = moved.append
        plan.run()
        assert plan.ran.passes == times
        assert plan.ran.bytes_read == times * (len(models) + m.takes_base) * 8000 * 2
        assert sum(moved) == plan.ran.bytes_read + plan.ran.bytes_sampled


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_a_group_is_sampled_whatever_the_number_of_its_blocks(blocks):
    """The k-th largest of as many entries as are sampled, against a sort."""
    size = 1 << 18
    tau = np.random.default_rng(blocks).permutation(size).astype(np.float32) - size // 2
    plan = prepare([{"x": tau}], "ties", base={"x": np.zeros_like(tau)}, threads=1, params={"density": 0.25})
    plan.elements = size // blocks + 1024
    kept = plan.run()["x"]
    assert plan.ran.bytes_sampled > 0
    assert np.array_equal(np.flatnonzero(kept), np.sort(np.argsort(-np.abs(tau), kind="stable")[: size // 4]))


def test_small_tensors_are_read_once_even_where_large_ones_are_not(make_case):
    shapes = {"large": (5000,), "small": (100,)}
    m, models, _, given_ = inputs(make_case("slerp"), shapes)
    plan = planned(models, m, 1024, params=given_)
    plan.run()
    assert plan.ran.bytes_read == 2 * 4 * (2 * 5000 + 100)


def test_a_selection_passes_at_most_as_often_as_it_has_digits(monkeypatch, make_case):
    """The answer of a selection in float32: two passes of 16 bits, one for its ties, one to use it; fewer with room."""
    shapes = {"a": (50, 100), "b": (3000,)}
    m, models, base, given_ = inputs(make_case("ties"), shapes, coarse=True)
    passes = []
    for candidates in (1 << 20, 0):
        monkeypatch.setattr(refmerge.selection, "CANDIDATES", candidates)
        plan = planned(models, m, 1024, base=base, params=given_)
        plan.run()
        passes.append(plan.ran.passes)
    assert 2 <= passes[0] <= 3
    assert passes[0] < passes[1] <= 4


# --- Several outputs, whole models, statistics -------------------------------------------------------------------------


@method("split", paper="none", outputs=("mask", "model"))
def split(models, group, *, density: float = 0.5):
    mask = group.top(models[0], k=int(density * group.size))
    return {"mask": mask, "model": mask * models[0]}


@pytest.mark.parametrize("elements", [1 << 22, 300])
def test_several_outputs(elements):
    model = {"b": np.arange(1000.0, dtype=np.float32), "a": np.array([[3.0, -1.0]], np.float32)}
    result = planned([model], split, elements).run()
    assert list(result) == ["mask", "model"]
    assert result["mask"]["b"].tolist() == [0.0] * 500 + [1.0] * 500
    assert result["model"]["b"].tolist() == [0.0] * 500 + list(range(500, 1000))
    assert result["model"]["a"].tolist() == [[3.0, 0.0]]


def test_several_outputs_on_disk(tmp_path):
    model = {"b": np.arange(1000.0, dtype=np.float32), "a": np.array([[3.0, -1.0]], np.float32)}
    in_memory = merge([model], split)
    save(model, tmp_path / "model")
    for source, out in ((model, "from_memory"), (tmp_path / "model", "from_disk")):
        merge([source], split, out=tmp_path / out)
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == ["mask.safetensors", "model.safetensors"]
        for name in ("mask", "model"):
            assert_same(dict(open_checkpoint(tmp_path / out / f"{name}.safetensors")), in_memory[name])


@method("reversal", paper="none", view="model")
def reversal(models, base, group, *, scale: float = 1.0):
    """Needs all of the model at once: each tensor gets the first one's total and loses its base, reversed."""
    (model,) = models
    shift = float(np.sum(model[sorted(model)[0]]))
    return {name: scale * (x - base[name])[::-1] + shift + 0.0 * group.size for name, x in model.items()}


@method("scaled", paper="none", view="model", stats={"scale": "whole"})
def scaled(models, stats):
    """Statistics come as the model does: a mapping name -> array for each model."""
    return {name: x * stats[0][f"{name}.scale"] for name, x in models[0].items()}


def test_view_model_has_statistics_by_name(tmp_path):
    model, stats = {"a": np.ones((2, 3), np.float32)}, {"a.scale": np.array([1, 2, 4], np.float32)}
    assert merge([model], scaled, stats=[stats])["a"].tolist() == [[1, 2, 4]] * 2
    save(model, tmp_path / "model")
    save(stats, tmp_path / "stats")
    assert merge([tmp_path / "model"], scaled, stats=[tmp_path / "stats"])["a"].tolist() == [[1, 2, 4]] * 2


def test_view_model_gives_finite_results():
    with pytest.raises(InputError, match="scaled gives inf for tensor 'a'"):
        merge([{"a": np.full(2, 3e38, np.float32)}], scaled, stats=[{"a.scale": np.full(1, 10, np.float32)}])


def test_view_model(tmp_path):
    model = {"b": np.arange(6.0).reshape(3, 2), "a": np.array([1.0, 2.0, 4.0])}
    base = {n: np.ones_like(x) for n, x in model.items()}
    expected = {"a": np.array([3.0, 1.0, 0.0]) * 2 + 7, "b": np.array([[3.0, 4.0], [1.0, 2.0], [-1.0, 0.0]]) * 2 + 7}
    assert_same(merge([model], reversal, base=base, scale=2.0), expected)
    save(model, tmp_path / "model")
    save(base, tmp_path / "base")
    merged = merge([tmp_path / "model"], reversal, base=tmp_path / "base", scale=2.0, out=tmp_path / "out")
    assert_same(dict(merged), expected)


def _lacks_one(models):
    return {n: x for n, x in models[0].items() if n != "a"}


def _has_one_more(models):
    return {**models[0], "c": models[0]["a"]}


def _too_short(models):
    return {n: x[:1] for n, x in models[0].items()}


@pytest.mark.parametrize(("fn", "name"), [(_lacks_one, "a"), (_has_one_more, "c"), (_too_short, "a")])
def test_view_model_must_give_every_tensor(fn, name):
    """What is not written would be whatever memory held."""
    broken = method("broken", paper="none", view="model")(fn)
    with pytest.raises(TypeError, match=f"broken.*{name!r}"):
        merge([{"a": np.ones(3), "b": np.ones((2, 2))}], broken)


@pytest.mark.parametrize("view", ["flat", "rows", "tensor"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[:1], lambda x: x[:0], lambda x: np.concatenate([x, x]), lambda x: np.float64(1.0), lambda x: x[None],
        lambda x: x.reshape(2, 6),
    ],
)  # fmt: skip
def test_a_result_of_another_shape_is_refused(view, wrong):
    @method("broken", paper="none", view=view)
    def broken(models):
        return wrong(models[0])

    with pytest.raises(TypeError, match=r"broken.*'x'"):
        merge([{"x": np.ones((4, 3))}], broken)


@pytest.mark.parametrize("result", [lambda x: {"mask": x}, lambda x: x])
def test_a_declared_output_that_is_not_returned(result):
    @method("broken", paper="none", outputs=("mask", "model"))
    def broken(models):
        return result(models[0])

    with pytest.raises(TypeError, match="broken"):
        merge([{"x": np.ones(4)}], broken)


@pytest.mark.parametrize("elements", [1 << 22, 300])
@pytest.mark.parametrize("on_disk", [False, True])
def test_statistics(elements, on_disk, tmp_path):
    """`whole` comes whole to each block, also under its module's name; `element` is cut with it; absent keys are absent."""
    seen = []

    @method("informed", paper="none", stats={"gram": "whole", "fisher": "element", "": "whole"})
    def informed(models, stats, name):
        seen.append((name, [sorted(s) for s in stats], [s["gram"].shape for s in stats if "gram" in s]))
        fisher = [s.get("fisher") for s in stats]
        out = models[0]
        for f in fisher:
            if f is not None:
                assert f.shape == out.shape
                out = out + f
        return out + sum(float(s["gram"][0, 0]) for s in stats if "gram" in s)

    weight = np.arange(1200.0, dtype=np.float32).reshape(40, 30)
    models = [{"fc.weight": weight, "norm": np.ones(3, np.float32)}, {"fc.weight": weight, "norm": np.ones(3, np.float32)}]
    gram = np.arange(900.0, dtype=np.float64).reshape(30, 30) + 0.5
    stats = [
        {"fc.gram": gram, "fc.weight.fisher": 2 * weight},
        {"fc.weight.gram": gram + 1, "fc.gram": gram + 99, "norm": np.full(3, 5.0, np.float32)},
    ]
    if on_disk:
        for i, (m, s) in enumerate(zip(models, stats)):
            save(m, tmp_path / f"m{i}")
            save(s, tmp_path / f"s{i}.safetensors")
        models = [tmp_path / "m0", tmp_path / "m1"]
        stats = [tmp_path / "s0.safetensors", tmp_path / "s1.safetensors"]
    result = planned(models, informed, elements, stats=stats).run()
    assert result["fc.weight"].tolist() == (3 * weight + 2).tolist()  # 0.5 + 1.5 of the two Gram matrices
    assert result["norm"].tolist() == [1.0] * 3
    assert {(n, str(k), str(s)) for n, k, s in seen} == {
        ("fc.weight", "[['fisher', 'gram'], ['gram']]", "[(30, 30), (30, 30)]"),
        ("norm", "[[], ['']]", "[]"),
    }


def test_statistics_of_another_shape():
    @method("informed", paper="none", stats={"fisher": "element"})
    def informed(models, stats):
        return models[0]

    with pytest.raises(InputError, match=r"stats of model 0.*'w.fisher'.*\(3, 2\).*\(2, 3\)"):
        merge([{"w": np.ones((2, 3))}], informed, stats=[{"w.fisher": np.ones((3, 2))}])


@pytest.mark.parametrize("elements", [1 << 22, 300])
@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64, np.float16, np.float32])
@pytest.mark.parametrize("on_disk", [False, True])
def test_recorded_draws(elements, kind, on_disk, tmp_path):
    draw = np.random.default_rng(0)
    base = {"w": np.zeros((40, 30), np.float32)}
    models = [{"w": draw.integers(1, 9, (40, 30)).astype(np.float32)} for _ in range(2)]
    masks = [draw.integers(0, 2, (40, 30)) for _ in range(2)]
    expected = sum(x["w"] * k for x, k in zip(models, masks)) * 2
    stats = [{"w.mask": k.astype(kind)} for k in masks]
    if on_disk:
        for i in range(2):
            save(models[i], tmp_path / f"m{i}")
            save(stats[i], tmp_path / f"s{i}.safetensors")
        save(base, tmp_path / "base")
        models, base = [tmp_path / "m0", tmp_path / "m1"], tmp_path / "base"
        stats = [tmp_path / "s0.safetensors", tmp_path / "s1.safetensors"]
    plan = planned(models, registry.get("dare_linear"), elements, base=base, stats=stats, params={"density": 0.5})
    assert plan.run()["w"].tolist() == expected.tolist()


def test_a_recorded_draw_that_is_missing():
    w = {"w": np.ones(3)}
    base = {"w": np.zeros(3)}
    with pytest.raises(InputError, match="no recorded draw for tensor 'w' of model 1"):
        merge([w, w], "dare_linear", base=base, stats=[{"w.mask": np.ones(3)}, None])
    two = {"w": np.ones(3), "v": np.ones(3)}
    with pytest.raises(InputError, match="no recorded draw for tensor 'v' of model 0"):
        merge([two], "dare_linear", base={**two}, stats=[{"w.mask": np.ones(3)}])


def test_one_entry_of_stats_for_each_model():
    with pytest.raises(UsageError, match="stats has 1 entries for 2 models"):
        merge([{"w": np.ones(3)}] * 2, "dare_linear", base={"w": np.ones(3)}, stats=[{}])


# --- Policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "label"), [("model", "model 1"), ("base", "base")])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("elements", [1 << 22, 7])
def test_nonfinite_inputs_are_named(where, label, bad, elements):
    models = [{"ok": np.ones(9, np.float32), "w": np.ones((5, 4), np.float32)} for _ in range(2)]
    base = {"ok": np.ones(9, np.float32), "w": np.ones((5, 4), np.float32)}
    spoilt = models[1] if where == "model" else base
    spoilt["w"][3, 1] = bad
    spoilt["w"][4, 3] = np.nan
    plan = planned(models, registry.get("task_arithmetic"), elements, base=base)
    with pytest.raises(InputError, match=rf"{label}: tensor 'w' has 2 non-finite values, the first {bad} at \(3, 1\)"):
        plan.run()
    assert np.isnan(merge(models, "task_arithmetic", base=base, nonfinite="propagate")["w"][4, 3])


def test_finite_values_whose_sum_overflows_are_finite():
    big = np.full(100, 3e38, np.float32)
    assert_same(merge([{"w": big}, {"w": big}], "linear", weight=[1.0, 0.0], threads=1), {"w": big})


@pytest.mark.parametrize("name", ["linear", "slerp"])
def test_nothing_is_written_of_nonfinite_inputs(name, tmp_path):
    good = {"a": np.ones(5000, np.float32), "z": np.ones(5000, np.float32)}
    bad = {"a": np.ones(5000, np.float32), "z": np.ones(5000, np.float32)}
    bad["z"][4999] = np.nan
    save(good, tmp_path / "good")
    save(bad, tmp_path / "bad")
    with pytest.raises(InputError, match=r"bad: tensor 'z' has 1 non-finite value, the first nan at \(4999,\)"):
        merge([tmp_path / "good", tmp_path / "bad"], name, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "good"]


def test_integer_tensors():
    a = {"w": np.ones(2), "ids": np.arange(3), "flag": np.array([True, False])}
    b = {"w": np.ones(2), "ids": np.arange(3), "flag": np.array([True, True])}
    base = {"w": np.ones(2), "ids": np.arange(3), "flag": np.array([False, False])}
    with pytest.raises(InputError, match=r"'flag' differs.*integers='base'.*first model"):
        merge([a, b], "linear")
    with pytest.raises(InputError, match=r"'flag' differs.*integers='base'.*the base"):
        merge([a, a], "task_arithmetic", base=base)
    assert merge([a, a], "linear")["flag"].tolist() == [True, False]
    assert merge([b, a], "linear", integers="base")["flag"].tolist() == [True, True]
    assert merge([a, b], "task_arithmetic", base=base, integers="base")["flag"].tolist() == [False, False]
    merged = merge([a, a], "linear")
    assert merged["ids"].dtype == a["ids"].dtype
    assert not np.shares_memory(merged["ids"], a["ids"])
    for other in (np.arange(3, dtype=np.int32), np.arange(3.0)):
        with pytest.raises(InputError, match=r"'ids'.*integers='base'"):
            merge([a, {**a, "ids": other}], "linear")
        assert merge([a, {**a, "ids": other}], "linear", integers="base")["ids"].tolist() == [0, 1, 2]


def test_missing_tensors(tmp_path):
    a = {"w": np.full(2, 1.0), "only.a": np.full(2, 5.0)}
    b = {"w": np.full(2, 3.0), "only.b": np.full(2, 7.0)}
    base = {"w": np.full(2, 0.0), "only.a": np.full(2, 9.0)}
    with pytest.raises(InputError, match=r"'only.a' \(and 1 more: 'only.b'\) is missing from model 1 and present"):
        merge([a, b], "linear")
    skipped = merge([a, b], "linear", missing="skip")
    assert {n: x.tolist() for n, x in skipped.items()} == {"w": [2.0, 2.0]}
    copied = merge([a, b], "linear", missing="base")
    assert {n: x.tolist() for n, x in copied.items()} == {"w": [2.0, 2.0], "only.a": [5.0, 5.0], "only.b": [7.0, 7.0]}
    copied = merge([a, b], "task_arithmetic", base=base, missing="base")
    assert {n: x.tolist() for n, x in copied.items()} == {"w": [4.0, 4.0], "only.a": [9.0, 9.0], "only.b": [7.0, 7.0]}
    for i, x in enumerate((a, b)):
        save(x, tmp_path / f"m{i}")
    on_disk = merge([tmp_path / "m0", tmp_path / "m1"], "linear", missing="base", out=tmp_path / "out")
    assert_same(dict(on_disk), merge([a, b], "linear", missing="base"))


def test_shapes_differ():
    with pytest.raises(InputError, match=r"'w' has different shapes: \[2, 3\] in model 0, \[3, 2\] in model 1"):
        merge([{"w": np.ones((2, 3))}, {"w": np.ones((3, 2))}], "linear")
    with pytest.raises(InputError, match=r"'w' has different shapes: \[1\] in model 0, \[\] in base"):
        merge([{"w": np.ones(1)}], "task_arithmetic", base={"w": np.ones(())})


def test_mixtures_are_refused(torch, tmp_path):
    a, t = {"w": np.ones(3)}, {"w": torch.ones(3)}
    save(a, tmp_path / "m")
    for models, base in [([a, t], None), ([a], t), ([t], a)]:
        with pytest.raises(UsageError, match=r"arrays of two libraries: (numpy.ndarray and torch|torch.*and numpy.ndarray)"):
            merge(models, "task_arithmetic" if base else "linear", base=base)
    with pytest.raises(UsageError, match="mixture of checkpoints on disk and arrays in memory"):
        merge([a, tmp_path / "m"], "linear")
    for odd in (torch.ones(3).to_sparse(), torch.ones(3, device="meta")):
        with pytest.raises(UsageError, match="'w' holds no plain array of values"):
            merge([{"w": odd}], "linear")
    with pytest.raises(UsageError, match="torch arrays, backend 'numpy' would compute elsewhere"):
        merge([t, t], "linear", backend="numpy")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: merge([a], "linear", wieght=1.0), "no parameter 'wieght'; did you mean weight"),
        (lambda a: merge([a], "linear", weight=[1.0, 2.0]), "weight has 2 values for 1 models"),
        (lambda a: merge([], "linear"), "at least 1 models?, 0 given"),
        (lambda a: merge([a], "slerp"), "slerp merges 2 models, 1 given"),
        (lambda a: merge([a], "ties"), "ties needs a base"),
        (lambda a: merge(a, "linear"), "models is a sequence"),
        (lambda a: merge(a["w"], "linear"), "models is a sequence"),
        (lambda a: merge("path", "linear"), "models is a sequence"),
        (lambda a: merge([a["w"]], "linear"), "a model is a path or a mapping"),
        (lambda a: merge([{"w": [1.0]}], "linear"), "'w' is no array but list"),
        (lambda a: merge([{1: a["w"]}], "linear"), "a tensor's name is text, not 1"),
        (lambda a: merge([a], lambda models: models[0]), "a method is a name or what @method makes of a function"),
        (lambda a: merge([{"w": np.ma.array([1.0, 2.0], mask=[0, 1])}], "linear"), "'w' is no array but MaskedArray"),
        (lambda a: refmerge.call("linear", [a["w"]], out="x"), "linear has no parameter 'out'"),
        (lambda a: merge([a], "linear", threads="2"), "threads = '2' is no whole number above 0"),
        (lambda a: merge([a], "linear", nonfinite="ignore"), "nonfinite = 'ignore' is none of"),
        (lambda a: merge([a], "linear", integers="mean"), "integers = 'mean' is none of"),
        (lambda a: merge([a], "linear", missing="zero"), "missing = 'zero' is none of"),
        (lambda a: merge([a], "linear", over="layer"), "over = 'layer' is none of"),
        (lambda a: merge([a], "linear", dtype="float16"), "dtype = 'float16' is none of"),
        (lambda a: merge([a], "linear", out_dtype="int8"), "out_dtype = 'int8' is none of"),
        (lambda a: merge([a], "linear", threads=0), "threads = 0"),
        (lambda a: merge([a], "linear", backend="jax"), "no backend 'jax'"),
        (lambda a: merge([a], "dare_linear", base=a, density=0.5, seed=-1), "seed = -1 is no whole number"),
    ],
)
def test_calls_that_cannot_be(call, message):
    with pytest.raises(UsageError, match=message):
        call({"w": np.ones(3)})


# --- Dtypes and shapes -------------------------------------------------------------------------------------------------

SMALL = [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("on_disk", [False, True])
def test_small_floats_are_computed_in_float32_and_rounded_once(dtype, on_disk, tmp_path):
    draw = np.random.default_rng(0)
    models = [{"w": draw.standard_normal((30, 41)).astype(dtype)} for _ in range(3)]
    wide = [x["w"].astype(np.float32) for x in models]
    third = np.float32(1 / 3)
    expected = (third * wide[0] + third * wide[1] + third * wide[2]).astype(dtype)
    if on_disk:
        for i, m in enumerate(models):
            save(m, tmp_path / f"m{i}")
        models = [tmp_path / f"m{i}" for i in range(3)]
    assert_same(merge(models, "linear")["w"], expected)


@pytest.mark.parametrize("out", ["bfloat16", "float16"])
def test_float64_is_rounded_once(out):
    """1 + 2^-8 + 2^-40 lies just above the middle of two bfloat16 (likewise float16): float32 on the way would lose it."""
    half = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[out]
    x = np.array([1 + half + 2.0**-40, 1 + half, 1 + half - 2.0**-40, 1 + 3 * half - 2.0**-40])
    got = merge([{"w": x}], "linear", out_dtype=out)["w"]
    assert got.astype(np.float64).tolist() == [1 + 2 * half, 1.0, 1.0, 1 + 2 * half]


@pytest.mark.parametrize("on_disk", [False, True])
def test_dtype_and_out_dtype(on_disk, tmp_path):
    x = {"w": np.array([1.0, 2.0, 1e-3]) / 3}
    y = {"w": np.array([5.0, 7.0, 1e-3]) / 3}
    wide, narrow = [t["w"] for t in (x, y)], [t["w"].astype(np.float32) for t in (x, y)]
    if on_disk:
        save(x, tmp_path / "x")
        save(y, tmp_path / "y")
        x, y = tmp_path / "x", tmp_path / "y"
    exact = 0.5 * wide[0] + 0.5 * wide[1]
    in_float32 = np.float32(0.5) * narrow[0] + np.float32(0.5) * narrow[1]
    assert_same(merge([x, y], "linear")["w"], exact)
    assert_same(merge([x, y], "linear", out_dtype="float32")["w"], exact.astype(np.float32))
    assert_same(merge([x, y], "linear", dtype="float32")["w"], in_float32.astype(np.float64))
    assert_same(merge([x, y], "linear", dtype="float32", out_dtype="float32")["w"], in_float32)


def test_dtype_float64_of_small_floats():
    x = {"w": np.array([1.0, 2.0**-20], np.float32)}
    y = {"w": np.array([2.0**-30, 1.0], np.float32)}
    got = merge([x, y], "linear", normalize=False, dtype="float64", out_dtype="float64")["w"]
    assert got.tolist() == [1 + 2.0**-30, 1 + 2.0**-20]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((ml_dtypes.bfloat16, np.float16), np.float32),
        ((ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2), np.float16),
        ((np.float16, np.float32), np.float32),
        ((ml_dtypes.bfloat16, np.float64), np.float64),
    ],
)
def test_mixed_dtypes_promote(dtypes, expected):
    models = [{"w": np.array([0.5, 2.0]).astype(d)} for d in dtypes]
    got = merge(models, "linear")["w"]
    assert got.dtype == expected
    assert got.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("dtype", [np.complex64, ">f4", np.longdouble])
def test_dtypes_that_cannot_be_merged(dtype):
    if np.dtype(dtype) == np.float64:
        pytest.skip("long double is double here")
    with pytest.raises(InputError, match="cannot be merged"):
        merge([{"w": np.ones(2, dtype)}], "linear")


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_value_that_is_too_large_for_the_work_dtype(on_disk, tmp_path):
    """Finite as it is stored, and infinite as it would be computed with."""
    model = {"w": np.array([1.0, -1e300])}
    if on_disk:
        save(model, tmp_path / "m.safetensors")
        model = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match=r"'w' has 1 non-finite value, the first -inf at \(1,\)"):
        merge([model, model], "linear", dtype="float32")


def test_what_refuses_a_few_elements():
    x = {"one": np.ones(1)}
    with pytest.raises(UsageError, match="nothing would be dropped"):
        merge([x], "official:dare", base=x, mask_strategy="magnitude")


def test_0d_empty_and_single_elements(case):
    """The engine's part: shapes and dtypes stay, whatever the method makes of a tensor of one number."""
    shapes = {"number": (), "one": (1,), "one.one": (1, 1), "none": (0,), "none.rows": (3, 0), "no.rows": (0, 3)}
    m, models, base, given_ = inputs(case, shapes)
    nan = case.name.endswith(":pcb")  # the authors' scripts divide 0 by 0 in a model of three numbers
    for elements in (1 << 22, 1):
        policy = "propagate" if nan else "error"
        result = planned(models, m, elements, base=base, params=given_, nonfinite=policy).run()
        assert {n: x.shape for n, x in result.items()} == {n: shapes[n] for n in models[0]}
        assert all(x.dtype == np.float32 and (nan or np.isfinite(x).all()) for x in result.values())


def test_no_floating_tensor_at_all(tmp_path):
    only = {"ids": np.arange(3)}
    assert merge([only, only], "linear")["ids"].tolist() == [0, 1, 2]
    save(only, tmp_path / "m")
    merged = merge([tmp_path / "m"], "linear", out=tmp_path / "out")
    assert merged["ids"].tolist() == [0, 1, 2]


# --- Failures ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As KeyboardInterrupt and pytest's own exceptions are: no Exception."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Stop, MemoryError])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("where", ["first", "late", "worker"])
def test_a_failure_leaves_nothing(error, threads, where, tmp_path):
    """Whoever meets it, the main thread or another: it ends the merge, reaches the caller, and no output is there."""
    main, done = (os.getpid(), threading.get_ident()), []
    if where == "worker" and threads == 1:
        where = "late"
    worker_ran = threading.Event()

    @method("failing", paper="none")
    def failing(models):
        done.append(1)
        in_worker = (os.getpid(), threading.get_ident()) != main
        if where == "worker" and not in_worker:
            worker_ran.wait(20)
        if where == "first" or (where == "late" and len(done) > 20) or (where == "worker" and in_worker):
            worker_ran.set()
            raise error("stop")
        return models[0]

    save({"w": np.ones(400_000, np.float32)}, tmp_path / "in")
    plan = planned([tmp_path / "in"], failing, 8192, threads=threads)
    before = threading.active_count()
    with pytest.raises(error, match="stop"):
        plan.run(tmp_path / "out")
    assert threading.active_count() == before
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_failure_keeps_what_was_there(tmp_path):
    @method("failing", paper="none")
    def failing(models):
        raise RuntimeError("stop")

    save({"w": np.ones(4, np.float32)}, tmp_path / "in")
    save({"w": np.full(4, 7, np.float32)}, tmp_path / "out")
    with pytest.raises(RuntimeError, match="stop"):
        merge([tmp_path / "in"], failing, out=tmp_path / "out", overwrite=True)
    assert dict(open_checkpoint(tmp_path / "out"))["w"].tolist() == [7.0] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("out", ["in", "in/deeper", "in.safetensors"])
def test_inputs_are_never_written_to(out, tmp_path):
    save({"w": np.ones(4, np.float32)}, tmp_path / "in")
    save({"w": np.ones(4, np.float32)}, tmp_path / "in.safetensors")
    source = tmp_path / ("in.safetensors" if out == "in.safetensors" else "in")
    with pytest.raises(UsageError, match="inputs are never written to"):
        merge([source, source], "linear", out=tmp_path / out, overwrite=True)
    assert dict(open_checkpoint(source))["w"].tolist() == [1.0] * 4


def test_blocks_cover_each_tensor_once():
    """Whatever the view and size, the blocks lie end to end; only whole rows in view "rows"."""
    from refmerge.engine import Tensor, blocks_of

    for shape, view, elements in product(
        [(), (0,), (1,), (10,), (3, 0), (0, 3), (7, 13), (2, 3, 5)], ["flat", "rows", "tensor"], [1, 2, 5, 8, 1000]
    ):
        tensor = Tensor("x", shape, "float32", {})
        blocks = list(blocks_of(tensor, view, elements))
        edges = [0, *(stop for _, stop in blocks)]
        assert [start for start, _ in blocks] == edges[:-1]
        assert edges[-1] == tensor.size
        if view == "rows" and tensor.size:
            assert all(edge % tensor.rows[1] == 0 for edge in edges)
