"""The policy nonfinite="skip-model": a tensor in which a model is not finite is what the other models make of it."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, merge, registry, skipping
from refmerge.checkpoint import save, writer
from refmerge.cli import main
from refmerge.procedures.task_vectors.tall_masks_store import tall_masks_store
from refmerge.recipe.run import prepare_recipe, run_recipe
from refmerge.testing import assert_same

sys.path.append(str(Path(__file__).parents[1]))  # `pytest` alone does not look for the folder `tests` there

from tests.reliability import crashes

SHAPES = {"a": (3, 4), "b": (5,), "layers.0.c": (2, 2), "layers.1.c": (2, 2)}
SKIP = "skip-model"


def models(count, seed=0):
    draw = np.random.default_rng(seed)
    return [{n: draw.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(count)]


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return merge(*args, nonfinite=SKIP, **options)


METHODS = {
    "linear": {"weight": [1.0, 2.0, 3.0, 4.0]},
    "mergekit:dare_ties": {"weight": [0.5, 1.0, 0.3, 0.2], "density": [0.9, 0.5, 0.6, 0.8]},
    "task_arithmetic": {},
    "breadcrumbs": {},
    "model_stock": {},
    "ties": {"density": 0.6},
}


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(METHODS)), st.lists(st.tuples(st.integers(0, 3), st.sampled_from(sorted(SHAPES)))),
    st.sampled_from([np.nan, np.inf, -np.inf]), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_it_is_the_merge_of_the_models_that_are_finite_there(method, spoilt, bad, whole, at):
    """One by one where a method looks at one tensor at a time; where it looks at the model, a model is left out of all."""
    base, *inputs = models(5)
    for i, name in spoilt:
        inputs[i][name].reshape(-1)[at % inputs[i][name].size] = bad
    given, takes_base = METHODS[method], registry.get(method).takes_base
    options = {"over": "model" if whole else "tensor", "seed": 3}

    def merged(left, names, **more):
        params = {k: [v[i] for i in left] if isinstance(v, list) else v for k, v in given.items()}
        based = {"base": {n: base[n] for n in names}} if takes_base else {}
        return merge([{n: inputs[i][n] for n in names} for i in left], method, **params, **based, **options, **more)

    lefts = {n: [i for i in range(4) if not any(i == j and (whole or n == m) for j, m in spoilt)] for n in SHAPES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if any(len(left) < registry.get(method).models[0] for left in lefts.values()):
            with pytest.raises(InputError, match=r"of 4 are left, and .* merges at least"):
                merged(range(4), SHAPES, nonfinite=SKIP)
            return
        found = merged(range(4), SHAPES, nonfinite=SKIP)
    assert_same(found, {n: merged(left, SHAPES if whole else [n])[n] for n, left in lefts.items()})


def test_a_base_that_is_not_finite_is_an_error():
    base, *inputs = models(3)
    base["b"][2] = np.inf
    with pytest.raises(InputError, match=r"base: tensor 'b' has 1 non-finite value, the first inf at \(2,\)"):
        merge(inputs, "ties", base=base, nonfinite=SKIP)


def test_what_is_left_must_suffice():
    inputs = models(2)
    inputs[1]["b"][2] = np.nan
    with pytest.raises(InputError) as error:
        merge(inputs, "slerp", nonfinite=SKIP)
    assert str(error.value) == (
        "tensor 'b': without the models that have values that are not finite (model 1) 1 of 2 are left, and slerp merges 2 "
        "models, 1 given; nonfinite='propagate' (--nonfinite propagate) merges all of them"
    )
    with pytest.raises(InputError, match=r"tensor 'b' and the 3 merged with it: without .*\(model 1\) 1 of 2 are left"):
        merge(inputs, "slerp", nonfinite=SKIP, over="model")


def test_a_result_that_is_not_finite_is_still_an_error():
    inputs = [{"a": np.full(3, x, np.float32)} for x in (3e38, 3e38, np.nan)]
    with pytest.raises(InputError, match=r"linear gives inf for tensor 'a'"), pytest.warns(UserWarning, match="model 2"):
        merge(inputs, "linear", weight=[1.0, 1.0, 1.0], normalize=False, nonfinite=SKIP)


def test_the_warning_says_what_was_left_out():
    inputs = models(3)
    for name in SHAPES:
        inputs[2][name].reshape(-1)[1] = np.nan
    inputs[0]["a"][1, 2], inputs[0]["a"][2, 0] = np.inf, np.nan
    with pytest.warns(UserWarning) as told:
        merge(inputs, "linear", nonfinite=SKIP)
    some = "has 1 non-finite value, the first nan at"
    assert [str(w.message) for w in told] == [
        "model 0: tensor 'a' has 2 non-finite values, the first inf at (1, 2): 1 tensor merged from the other models",
        f"model 2: tensor 'a' {some} (0, 1); model 2: tensor 'b' {some} (1,); model 2: tensor 'layers.0.c' {some} (0, 1); "
        "1 more tensor with some: 4 tensors merged from the other models",
    ]
    inputs[2]["a"][0, 1] = 0
    with pytest.warns(UserWarning) as told:
        merge(inputs, "linear", nonfinite=SKIP, over="model")
    assert all(str(w.message).endswith(": 4 tensors merged from the other models") for w in told) and len(told) == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_on_disk_in_stretches(tmp_path, threads, monkeypatch):
    """With one bad value at the very end, read by several threads."""
    monkeypatch.setattr(skipping, "_STRETCH", 1000)
    size = 50_001
    for k in range(3):
        x = np.full(size, k, np.float16)
        x[-1] = np.nan if k == 1 else 7
        save({"big": x, "small": np.full(3, k, np.float16)}, tmp_path / f"{k}.safetensors")
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    with pytest.warns(UserWarning, match=rf"1.safetensors: tensor 'big' has 1 .* at \({size - 1},\)"):
        merged = merge(paths, "linear", nonfinite=SKIP, out=tmp_path / "out", threads=threads)
    assert merged["big"].tolist() == [1.0] * (size - 1) + [7.0] and merged["small"].tolist() == [1.0] * 3


def test_statistics_are_those_of_the_models_that_are_left():
    inputs, stats = models(3), [{f"{n}.fisher": np.full(s, k + 1.0) for n, s in SHAPES.items()} for k in range(3)]
    inputs[0]["b"][0] = np.nan
    found = quiet(inputs, "fisher", stats=stats, over="tensor")
    of_b = merge([{"b": m["b"]} for m in inputs[1:]], "fisher", stats=stats[1:], over="tensor")
    assert_same(found, {**merge([{**m, "b": np.zeros(5)} for m in inputs], "fisher", stats=stats, over="tensor"), **of_b})
    assert_same(quiet(inputs, "fisher", stats=stats, over="model"), merge(inputs[1:], "fisher", stats=stats[1:]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = models(3)
    made[1]["layers.1.c"][0, 1] = np.nan
    for k, model in enumerate(made):
        save(model, f"m{k}", extra_files={"config.json": b'{"num_hidden_layers": 2}'})
    Path("r.yml").write_text("refmerge: 1\nmerge_method: linear\nmodels: [{model: m0}, {model: m1}, {model: m2}]\n")
    return made


def test_the_command_line_and_the_report(folder):
    run = CliRunner().invoke
    failed = run(main, ["merge", "r.yml", "out"])
    assert failed.exit_code == 3 and "nonfinite='skip-model' (--nonfinite skip-model) merges a tensor" in failed.output
    done = run(main, ["merge", "r.yml", "out", "--nonfinite", SKIP, "--resume"])
    line = "m1: tensor 'layers.1.c' has 1 non-finite value, the first nan at (0, 1): 1 tensor merged from the other models"
    assert done.exit_code == 0 and f"refmerge: warning: {line}\n" in done.stderr
    report = json.loads(Path("out/refmerge_report.json").read_text())
    assert report["skipped"] == [
        {
            "model": "m1", "tensor": "layers.1.c", "nonfinite": 1, "first": [0, 1], "value": "nan",
            "tensors_without_it": 1,
        }
    ]  # fmt: skip
    assert report["options"]["nonfinite"] == SKIP
    assert report["tensors"]["layers.1.c"]["from"] == ["m0", "m2"] and len(report["tensors"]["a"]["from"]) == 3
    assert run(main, ["verify", "out", "--exact", "--nonfinite", SKIP]).exit_code == 0
    size = sum(x.nbytes for x in folder[0].values())
    told = json.loads(run(main, ["plan", "r.yml", "--json", "--no-time", "--nonfinite", SKIP]).stdout)
    assert told["figures"]["bytes_read"] == 2 * 3 * size  # all is looked at before anything is merged


def test_what_was_interrupted_goes_on_to_the_same_bytes(folder, monkeypatch):
    monkeypatch.setattr(writer, "NOTE_SECONDS", 0.0)
    options = {"nonfinite": SKIP, "threads": 1, "seed": 0}
    Path("r.yml").write_text("refmerge: 1\nmerge_method: mergekit:dare_linear\nbase_model: m0\nmodels: [{model: m1}, "
                             "{model: m2}]\nparameters: {weight: 1, density: 0.5}\n")  # fmt: skip
    with pytest.warns(UserWarning, match="m1"):
        run_recipe("r.yml", "whole", **options)
    _, plan = prepare_recipe("r.yml", **options)
    seen = []

    def stop(_):
        seen.append(1)
        if len(seen) == 3 * len(SHAPES) + 3:  # all have been looked at, and some are merged
            raise KeyboardInterrupt

    plan.work.progress = stop
    with pytest.raises(KeyboardInterrupt) as caught, pytest.warns(UserWarning, match="m1"):
        plan.run("out", resume=True)
    assert "tensors are kept" in caught.value.__notes__[0]
    with pytest.warns(UserWarning, match="m1"):
        run_recipe("r.yml", "out", resume=True, **options)
    assert crashes.digest(Path("out")) == crashes.digest(Path("whole"))


def test_in_slices(folder):
    Path("s.yml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources:\n      - {model: m0, layer_range: [1, 2]}\n"
        "      - {model: m1, layer_range: [1, 2]}\n  - sources:\n      - {model: m1, layer_range: [0, 1]}\n"
        "      - {model: m2, layer_range: [0, 1]}\n"
    )
    with pytest.warns(UserWarning, match=r"m1: tensor 'layers.1.c' has 1 .*: 1 tensor merged"):
        merged = run_recipe("s.yml", "out", nonfinite=SKIP)
    np.testing.assert_array_equal(merged["layers.0.c"], folder[0]["layers.1.c"])
    expected = (folder[1]["layers.0.c"] + folder[2]["layers.0.c"]) / 2
    np.testing.assert_allclose(merged["layers.1.c"], expected, rtol=1e-6)


def test_what_looks_at_each_model_refuses_it(folder):
    base, *inputs = models(3)
    with pytest.raises(UsageError, match="nonfinite = 'skip-model' is for merges"):
        tall_masks_store(inputs, base, "store", nonfinite=SKIP)
    Path("r.yml").write_text(Path("r.yml").read_text() + "align: {method: git_rebasin, spec: mlp}\n")
    save({"layers.0.weight": np.ones((2, 2), np.float32), "layers.1.weight": np.ones((2, 2), np.float32)}, "x")
    Path("a.yml").write_text(
        "refmerge: 1\nmerge_method: linear\nmodels: [{model: x}, {model: x/model.safetensors}]\n"
        "align: {method: git_rebasin, spec: mlp}\n"
    )
    with pytest.raises(UsageError, match="align looks at whole models, and nonfinite = 'skip-model'"):
        prepare_recipe("a.yml", nonfinite=SKIP)
    with pytest.raises(UsageError, match="is none of 'error', 'propagate', 'skip-model'"):
        merge(inputs, "linear", nonfinite="skip")


def test_in_a_pipeline_a_component_is_a_model_of_its_own(tmp_path):
    made = models(4)
    for k, model in enumerate(made):
        for part in ("unet", "vae"):
            spoilt = {n: x.copy() for n, x in model.items()}
            if k == 2 and part == "unet":
                spoilt["b"][0] = np.inf
            save(spoilt, tmp_path / f"{k}" / part, extra_files={"config.json": b"{}"})
        classes = {"unet": ["x", "U"], "vae": ["x", "V"]}
        (tmp_path / f"{k}" / "model_index.json").write_text(json.dumps(classes))
    base, *paths = (tmp_path / f"{k}" for k in range(4))
    with pytest.warns(UserWarning, match=r"2: tensor 'unet.b' has 1 .*: 4 tensors merged from the other models"):
        merged = merge(paths, "ties", base=base, nonfinite=SKIP, density=0.5, out=tmp_path / "out")
    all_three = merge(made[1:], "ties", base=made[0], density=0.5)
    without = merge([made[1], made[3]], "ties", base=made[0], density=0.5)
    assert_same({n: merged[f"vae.{n}"] for n in SHAPES}, all_three)
    assert_same({n: merged[f"unet.{n}"] for n in SHAPES}, without)
