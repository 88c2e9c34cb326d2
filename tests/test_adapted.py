"""Checkpoints read with adapters in them: `model+adapter` as a path, in recipes, and in blocks."""

from __future__ import annotations

import json
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import refmerge
from refmerge import InputError, UsageError
from refmerge.adapted import adapted, open_model, reference
from refmerge.adapters import Adapter, Factors, apply_adapter, write_adapter
from refmerge.changes import Product
from refmerge.checkpoint import open_checkpoint, save
from refmerge.cli import main
from refmerge.recipe.run import prepare_recipe

RELAXED = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def one(value=0.5, **more):
    """A change of `value` at the first place of a 2 x 2 matrix."""
    return Adapter({"q": Factors(np.array([[value, 0]], np.float32), np.array([[1], [0]], np.float32), **more)})


@pytest.fixture
def places(tmp_path):
    """A base of 256 in bfloat16, where numbers are 2 apart, and an adapter that adds 0.5."""
    base = {"q.weight": np.full((2, 2), 256, ml_dtypes.bfloat16), "n.weight": np.ones(2, ml_dtypes.bfloat16)}
    save(base, tmp_path / "base.safetensors")
    write_adapter(one(), tmp_path / "half")
    return tmp_path


# --- Values -----------------------------------------------------------------------------------------------------------


def test_rounded_once_by_hand(places):
    """256 + 0.5 is 256 in bfloat16; four such changes on top of each other are 2, which it can show."""
    ref = f"{places / 'base.safetensors'}+{places / 'half'}"
    read = open_model(ref)
    assert read["q.weight"].astype(float).tolist() == [[256, 256], [256, 256]]
    assert read.exact("q.weight", 0, 3).tolist() == [256.5, 256, 256]
    merged = refmerge.merge([ref] * 4, "task_arithmetic", base=places / "base.safetensors")
    assert merged["q.weight"].astype(float).tolist() == [[258, 256], [256, 256]]
    wide = refmerge.merge([ref], "passthrough", out_dtype="float32")
    assert wide["q.weight"].tolist() == [[256.5, 256], [256, 256]]


def test_products_are_made_on_one_thread_of_blas(places, monkeypatch):
    """Those of BLAS in each of the engine's workers would wait for each other: a merge took twenty times as long."""
    threads, added = [], Product.added

    def counted(self, *args):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return added(self, *args)

    monkeypatch.setattr(Product, "added", counted)
    with threadpool_limits(limits=2, user_api="blas"):
        refmerge.merge([f"{places / 'base.safetensors'}+{places / 'half'}"], "passthrough")
    assert threads and set(threads) == {1}


def test_as_another_tool_reads_it(places):
    """`dtype: bfloat16` rounds what is read; native arithmetic rounds everything."""
    ref = f"{places / 'base.safetensors'}+{places / 'half'}"
    merged = refmerge.merge([ref] * 4, "task_arithmetic", base=places / "base.safetensors", arithmetic="native")
    assert merged["q.weight"].astype(float).tolist() == [[256, 256], [256, 256]]
    (places / "r.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: {ref}, parameters: {{weight: 1}}}}]\ndtype: bfloat16\nout_dtype: float32\n"
    )
    assert prepare_recipe(places / "r.yml")[1].run()["q.weight"].tolist() == [[256, 256], [256, 256]]


def kinds(draw):
    """A base with layers of every kind, and an adapter of it: an orientation that only the shape tells among them."""

    def normal(*shape):
        return draw.standard_normal(shape).astype(np.float32)

    base = {
        "lin.weight": normal(6, 4), "lin.bias": normal(6), "turned.weight": normal(4, 6), "table.weight": normal(7, 3),
        "conv.weight": normal(5, 3, 2, 2), "point.weight": normal(5, 3, 1, 1), "norm.weight": normal(6),
        "rest.weight": normal(3), "dora.weight": normal(6, 4), "dora_table.weight": normal(7, 3),
        "dora_conv.weight": normal(5, 3, 2), "alone.bias": normal(4),
    }  # fmt: skip
    modules = {
        "lin": Factors(normal(2, 4), normal(6, 2), alpha=3.0, rslora=True, bias=normal(6)),
        "turned": Factors(normal(2, 4), normal(6, 2)),
        "table": Factors(normal(2, 7), normal(3, 2), alpha=1.0, embedding=True),
        "conv": Factors(normal(2, 3, 2, 2), normal(5, 2, 1, 1), alpha=3.0),
        "point": Factors(normal(2, 3), normal(5, 2)),
        "dora": Factors(normal(1, 4), normal(6, 1), alpha=2.0, magnitude=normal(6)),
        "dora_table": Factors(normal(1, 7), normal(3, 1), embedding=True, magnitude=normal(3)),
        "dora_conv": Factors(normal(1, 3, 2), normal(5, 1, 1), magnitude=normal(5)),
    }
    return base, Adapter(modules, saved={"norm.weight": normal(6), "alone.bias": normal(4)})


def formula(base, adapter):
    """The definition, whole and with einsum, in place of tiles."""
    model = {name: x.astype(float) for name, x in base.items()}
    for module, f in adapter.modules.items():
        name = f"{module}.weight"
        product = np.einsum("or,ri->oi", f.B.reshape(len(f.B), -1), f.A.reshape(f.rank, -1), dtype=float)
        scale = (1 if f.alpha is None else f.alpha / (f.rank**0.5 if f.rslora else f.rank)) * product
        turned = f.embedding or module == "turned"
        W = model[name].T if turned else model[name].reshape(len(product), -1)
        W = W + scale
        if f.magnitude is not None:
            W = f.magnitude[:, None] / np.linalg.norm(W, axis=1)[:, None] * W
        model[name] = (W.T if turned else W).reshape(base[name].shape)
        if f.bias is not None:
            model[f"{module}.bias"] = model[f"{module}.bias"] + f.alpha / f.rank**0.5 * f.bias
    return {**model, **{n: x.astype(float) for n, x in adapter.saved.items()}}


def test_every_kind_of_layer(tmp_path):
    base, adapter = kinds(np.random.default_rng(3))
    # use_rslora holds for a whole adapter: what is written has one sort of scaling
    save(base, tmp_path / "b.safetensors")
    with adapted(tmp_path / "b.safetensors", adapter) as read:
        expected = formula(base, adapter)
        whole = apply_adapter(base, adapter)
        for name in base:
            np.testing.assert_allclose(read[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(read[name], whole[name], err_msg=name)
        assert set(read.changed) == set(base) - {"rest.weight"}


@RELAXED
@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.booleans())
def test_any_stretch_has_the_same_bits(tmp_path_factory, seed, cuts, dora):
    draw = np.random.default_rng(seed)
    rows, cols, r = (int(n) for n in draw.integers(1, [300, 400, 9]))
    more = {"magnitude": draw.standard_normal(rows)} if dora else {}
    f = Factors(draw.standard_normal((r, cols)), draw.standard_normal((rows, r)), **more)
    path = tmp_path_factory.mktemp("x") / "b.safetensors"
    save({"q.weight": draw.standard_normal((rows, cols)).astype(np.float16)}, path)
    read = adapted(path, Adapter({"q": f}))
    n = rows * cols
    whole = read.exact("q.weight", 0, n)
    places = sorted({0, n, *(c % (n + 1) for c in cuts)})
    parts = [read.exact("q.weight", a, b) for a, b in pairwise(places)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_blocks_threads_and_files_change_nothing(tmp_path):
    draw = np.random.default_rng(1)
    base = {f"{m}.weight": draw.standard_normal((700, 300)).astype(ml_dtypes.bfloat16) for m in "ab"}
    save(base, tmp_path / "base.safetensors")
    refs = []
    for i, dora in enumerate((False, True)):
        modules = {}
        for m in "ab":
            A, B = draw.standard_normal((4, 300)), draw.standard_normal((700, 4))
            modules[m] = Factors(A, B, alpha=2.0, magnitude=draw.standard_normal(700) if dora else None)
        write_adapter(Adapter(modules), tmp_path / f"l{i}")
        refs.append(f"{tmp_path / 'base.safetensors'}+{tmp_path / f'l{i}'}")
    options = {"base": tmp_path / "base.safetensors", "density": 0.3}
    first = refmerge.merge(refs, "ties", **options, threads=1)
    for more in ({"threads": 2, "out": tmp_path / "out"}, {"threads": 1, "max_memory": "30MB"}):
        again = refmerge.merge(refs, "ties", **options, **more)
        for name in base:
            assert np.asarray(again[name]).tobytes() == first[name].tobytes()


def test_any_backend_has_the_same_bits(tmp_path):
    pytest.importorskip("torch", reason="the torch backend")
    base, adapter = kinds(np.random.default_rng(5))
    save(base, tmp_path / "b.safetensors")
    ours, theirs = (
        refmerge.merge([adapted(tmp_path / "b.safetensors", adapter)], "passthrough", scale=0.5, backend=backend)
        for backend in ("numpy", "torch")
    )
    for name in base:
        assert np.asarray(theirs[name]).tobytes() == ours[name].tobytes()


def test_weights_and_several_adapters_by_hand(places):
    read = adapted(places / "base.safetensors", one(4.0), places / "half", weights=[-0.5, 3])
    assert read.exact("q.weight", 0, 4).tolist() == [256 - 2 + 1.5, 256, 256, 256]
    whole = Adapter({}, saved={"n.weight": np.array([3, 5], np.float32)})
    assert adapted(places / "base.safetensors", whole, weights=[0.5])["n.weight"].tolist() == [2, 3]
    both = adapted(places / "base.safetensors", whole, whole)  # twice the change of 2 and of 4
    assert both["n.weight"].tolist() == [5, 9]
    assert adapted(places / "base.safetensors", whole).label.endswith("base.safetensors+adapter 0")
    twice = adapted(adapted(places / "base.safetensors", one(4.0)), places / "half")
    assert twice.exact("q.weight", 0, 1).tolist() == [260.5]


def test_a_tensor_that_is_copied_comes_changed(places):
    save({"n.weight": np.ones(2, ml_dtypes.bfloat16)}, places / "small.safetensors")
    write_adapter(one(8.0), places / "eight")
    ref = f"{places / 'base.safetensors'}+{places / 'eight'}"
    merged = refmerge.merge([ref, places / "small.safetensors"], "linear", missing="base", weight=0.5)
    assert merged["q.weight"].astype(float).tolist() == [[264, 256], [256, 256]]


# --- References -------------------------------------------------------------------------------------------------------


def test_a_native_recipe(places):
    """base + 0.5 and base + 8, half of each."""
    write_adapter(one(8.0), places / "eight")
    (places / "r.yml").write_text(
        "refmerge: 1\nmerge_method: task_arithmetic\nbase_model: base.safetensors\nmodels:\n"
        "  - {model: base.safetensors+half, parameters: {weight: 0.5}}\n"
        "  - {model: ./base.safetensors+eight, parameters: {weight: 0.5}}\nout_dtype: float32\n"
    )
    merged = refmerge.run_recipe(places / "r.yml", places / "out.safetensors")
    assert merged["q.weight"].tolist() == [[260.25, 256], [256, 256]]
    told = CliRunner().invoke(main, ["plan", str(places / "r.yml"), "--no-time"]).output
    assert f"adapters    {places / 'half'}: 1 modules, rank 1" in told
    found = json.loads(CliRunner().invoke(main, ["plan", str(places / "r.yml"), "--no-time", "--json"]).output)
    assert len(found["adapters"]) == 2


def test_the_base_and_the_donor_may_have_adapters(places):
    (places / "r.yml").write_text(
        "refmerge: 1\nmerge_method: task_arithmetic\nbase_model: base.safetensors+half\n"
        "models: [{model: base.safetensors, parameters: {weight: 2}}]\nout_dtype: float32\n"
    )
    assert refmerge.run_recipe(places / "r.yml", places / "o.safetensors")["q.weight"][0, 0] == 256.5 - 2 * 0.5


def test_plus_signs_in_paths(places):
    (places / "a+b").mkdir()
    (places / "base.safetensors").rename(places / "a+b" / "base.safetensors")
    assert reference("a+b/base.safetensors+half", places) == ["a+b/base.safetensors", "half"]
    assert open_model("a+b/base.safetensors+half", places).exact("q.weight", 0, 1).tolist() == [256.5]
    assert reference("no+such+thing", places) == ["no", "such", "thing"]


@pytest.mark.parametrize("text", ["+half", "base.safetensors+", "base.safetensors++half"])
def test_empty_parts(places, text):
    with pytest.raises(UsageError, match="one of them is empty"):
        open_model(text, places)


def test_inspected_and_compared(places):
    ref = f"{places / 'base.safetensors'}+{places / 'half'}"
    assert "q.weight" in CliRunner().invoke(main, ["inspect", ref]).output
    assert CliRunner().invoke(main, ["compare", ref, str(places / "base.safetensors")]).exit_code == 0


def test_nothing_is_written_into_an_adapter(places):
    ref = f"{places / 'base.safetensors'}+{places / 'half'}"
    with pytest.raises(UsageError, match="inputs are never written to"):
        refmerge.merge([ref], "passthrough", out=places / "half", overwrite=True)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (Adapter({m: one().modules["q"] for m in ("q", "x", "y")}), InputError, "no 'x', 'y', which the adapter changes"),
        (Adapter({}, saved={"z.weight": np.ones(2)}), InputError, r"no 'z\.weight'"),
        (Adapter({"q": Factors(np.ones((1, 3)), np.ones((2, 1)))}), InputError, r"is \[2, 2\].*change of it \[2, 3\]"),
        (Adapter({}, saved={"n.weight": np.ones(3)}), InputError, r"is \[2\].*\[3\]"),
        (Adapter({"q": one(bias=np.ones(2)).modules["q"]}), InputError, "no 'q'"),
    ],
)
def test_what_does_not_fit(places, adapter, error, message):
    with pytest.raises(error, match=message):
        adapted(places / "base.safetensors", adapter)


def test_what_cannot_be_meant(places):
    base, dora = places / "base.safetensors", one(magnitude=np.ones(2))
    with pytest.raises(UsageError, match="no fraction"):
        adapted(base, dora, weights=[0.5])
    with pytest.raises(UsageError, match=r"another adapter changes 'q\.weight'"):
        adapted(base, one(), dora)
    with pytest.raises(UsageError, match="2 weights for 1"):
        adapted(base, one(), weights=[1, 2])
    with pytest.raises(UsageError, match="no finite number"):
        adapted(base, one(), weights=[float("nan")])
    with pytest.raises(UsageError, match="at least one"):
        adapted(base)
    save({"q.weight": np.ones((2, 2), np.int8)}, places / "int.safetensors")
    with pytest.raises(InputError, match="only floats can be changed"):
        adapted(places / "int.safetensors", one())


def test_a_row_of_zeros_has_no_length(places):
    save({"q.weight": np.array([[1, 1], [0, 0]], np.float32)}, places / "z.safetensors")
    write_adapter(one(magnitude=np.ones(2, np.float32)), places / "dora")
    ref = f"{places / 'z.safetensors'}+{places / 'dora'}"
    with pytest.raises(InputError, match=r"q\.weight"):
        refmerge.merge([ref], "passthrough")
    open_checkpoint(places / "z.safetensors").close()


def test_the_plans_time_counts_adapters(places):
    draw = np.random.default_rng(0)
    save({"q.weight": draw.standard_normal((500, 400)).astype(np.float32)}, places / "b.safetensors")
    read = adapted(places / "b.safetensors", Adapter({"q": Factors(draw.standard_normal((8, 400)), np.ones((500, 8)))}))
    assert read.seconds() > 0
    assert adapted(places / "b.safetensors", Adapter({})).seconds() == 0
    dora = Factors(draw.standard_normal((2, 400)), np.ones((500, 2)), magnitude=np.ones(500))
    tried, fresh = (adapted(places / "b.safetensors", Adapter({"q": dora})) for _ in range(2))
    assert tried.seconds() > 0
    np.testing.assert_array_equal(tried["q.weight"], fresh["q.weight"])  # nothing of the trial is left
    assert read.nbytes_kept == 8 * 400 * 8 + 500 * 8 * 8
