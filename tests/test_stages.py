"""Several recipes in one file: the order in which they run, what is between them, and that nothing of it is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from refmerge.checkpoint import CheckpointWriter, open_checkpoint, save
from refmerge.cli import main
from refmerge.errors import InputError, RecipeError, ResourceError, UsageError
from refmerge.plan import Plan
from refmerge.recipe.plan import parse_recipe, parse_recipes
from refmerge.recipe.run import prepare_recipe, run_recipe
from refmerge.verify import verify
from tests.tiny_models import write

MEAN = "merge_method: linear\nparameters: {weight: 1}\nmodels: "
THREE = f"""\
{MEAN}[{{model: stack}}, {{model: b}}]
---
name: stack
merge_method: passthrough
slices:
  - sources: [{{model: mean, layer_range: [0, 2]}}]
  - sources: [{{model: a, layer_range: [2, 4]}}]
---
name: mean
{MEAN}[{{model: a}}, {{model: b}}]
out_dtype: bfloat16
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a", 4, 100)
    write("b", 4, 201)
    return tmp_path


def test_results_are_inputs(folder):
    (folder / "r.yml").write_text(THREE)
    resolved, plan = prepare_recipe("r.yml")
    assert [stage.name for stage in plan.stages] == ["mean", "stack"]
    assert resolved.models == ("stack", "b")
    assert not (folder / "out").exists()
    run_recipe("r.yml", "out")
    merged = open_checkpoint("out")
    # (100 + 201) / 2 = 150.5 in bfloat16, with 8 bits, is 150 (to even); its mean with 201 is 175.5.
    assert merged["model.layers.0.mlp.up_proj.weight"].tolist() == [[175.5] * 3] * 2
    assert merged["model.layers.3.mlp.up_proj.weight"].tolist() == [[(103 + 204) / 2] * 3] * 2
    assert {p.name for p in folder.iterdir()} == {"a", "b", "out", "r.yml"}


def test_without_a_name_for_the_last_one(folder):
    """The one that no other uses makes the result, where all have names."""
    text = f"name: x\n{MEAN}[{{model: a}}]\n---\nname: y\n{MEAN}[{{model: x}}, {{model: b}}]\n"
    assert [r.content.name for r in parse_recipes(text)] == ["x", "y"]
    (folder / "r.yml").write_text(text)
    assert run_recipe("r.yml", "out")["lm_head.weight"][0, 0] == (100.75 + 201.75) / 2


def test_what_lies_beside_the_weights_goes_along(folder):
    (folder / "a" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0}}, "added_tokens": []}))
    (folder / "a" / "LICENSE").write_text("free")
    text = "merge_method: passthrough\nmodels: [{model: one}]\nchat_template: chatml\n---\nname: one\n"
    text += "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 3]}]}]\n"
    (folder / "r.yml").write_text(text)
    run_recipe("r.yml", "out")
    assert json.loads((folder / "out/config.json").read_text())["num_hidden_layers"] == 2
    assert (folder / "out/LICENSE").read_text() == "free"
    assert "<|im_start|>" in (folder / "out/chat_template.jinja").read_text()


def test_arrays_of_several_merges(folder):
    (folder / "r.yml").write_text(THREE)
    _, plan = prepare_recipe("r.yml")
    arrays = plan.run()
    assert arrays["model.layers.0.mlp.up_proj.weight"][0, 0] == 175.5


def test_integers_are_compared_before_anything_is_merged(folder):
    for name, ids in (("i", [0, 1]), ("j", [0, 2])):
        save({"w": np.zeros(2, np.float32), "ids": np.array(ids)}, name)
    text = f"{MEAN}[{{model: x}}, {{model: j}}]\n---\nname: x\n{MEAN}[{{model: i}}]\n"
    (folder / "r.yml").write_text(text)
    with pytest.raises(InputError, match="integer tensor 'ids' differs"):
        prepare_recipe("r.yml")


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_after_a_failure(folder, monkeypatch, overwrite):
    (folder / "r.yml").write_text(THREE)
    if overwrite:
        run_recipe("r.yml", "out")
        before = (folder / "out/model.safetensors").read_bytes()
    fill = Plan.fill
    monkeypatch.setattr(Plan, "fill", lambda self, *to: fill(self, *to) if not self.stages else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_recipe("r.yml", "out", overwrite=overwrite)
    assert {p.name for p in folder.iterdir()} == {"a", "b", "r.yml", *(["out"] if overwrite else [])}
    if overwrite:
        assert (folder / "out/model.safetensors").read_bytes() == before


def test_what_cannot_be_written_is_said_first(folder, monkeypatch):
    """An output that exists is not found out after an hour."""
    (folder / "r.yml").write_text(THREE)
    (folder / "out").mkdir()
    monkeypatch.setattr(Plan, "fill", lambda *_: 1 / 0)
    with pytest.raises(UsageError, match="exists; overwrite"):
        run_recipe("r.yml", "out")
    with pytest.raises((UsageError, ResourceError), match="lies in an input"):
        run_recipe("r.yml", "a/out")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            f"name: x\n{MEAN}[{{model: a}}]\n---\nname: x\n{MEAN}[{{model: b}}]",
            "line 6, column 1: another merge is named 'x'",
        ),
        (f"{MEAN}[{{model: a}}]\n---\n{MEAN}[{{model: b}}]", "line 5, column 1: two merges without a name"),
        (f"name: a/b\n{MEAN}[{{model: a}}]\n---\n{MEAN}[{{model: b}}]", "line 1, column 1: 'a/b' is no name of a merge"),
        (f"name: x\n{MEAN}[{{model: a}}]\n---\n{MEAN}[{{model: b}}]", "line 1, column 1: 'x' is used by no other merge"),
        (
            f"name: x\n{MEAN}[{{model: y}}]\n---\nname: y\n{MEAN}[{{model: x}}]\n---\n{MEAN}[{{model: y}}]",
            "merges that wait for each other: None -> y -> x -> y",
        ),
        (f"name: x\n{MEAN}[{{model: a}}]\n---\nname: y\n{MEAN}[{{model: b}}]", "not one of them makes the result"),
        (f"name: x\n{MEAN}[{{model: a}}]\n---\n{MEAN}[{{model: x}}]\nz: 1", "line 9, column 1: unknown key 'z'"),
        (f"name: x\n{MEAN}[{{model: a}}]\n---\na: [", "<recipe>: line"),
    ],
)
def test_files_that_are_refused(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipes(text)
    assert message in str(caught.value)
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_problems_of_all_recipes_at_once(folder):
    text = THREE.replace("parameters: {weight: 1}", "parameters: {wieght: 1}")
    (folder / "r.yml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        prepare_recipe("r.yml")
    told = str(caught.value)
    assert "line 2, column 14: mergekit:linear has no parameter 'wieght'" in told
    assert "line 13, column 14: mergekit:linear has no parameter 'wieght'" in told


def test_documents_without_content_do_not_count():
    recipes = parse_recipes(f"---\n# first\n---\n{MEAN}[{{model: a}}]\n---\n")
    assert len(recipes) == 1 and recipes[0].content.name is None


# --- what need not be written


FIRST = {
    "linear": "parameters: {weight: 0.3}",
    "slerp": "parameters: {t: 0.3}",
    "dare_linear": "base_model: a\nparameters: {density: 0.4}",
    "model_stock": "base_model: a",
    "tsvm": "base_model: a",
    "mergekit:ties": "base_model: a\nparameters: {density: 0.5, weight: 1.0}",
}
LAST = "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: middle}, {model: first}]\n"


def random_models(count=300):
    """In 16 bits but for one tensor, with one of integers."""
    for k, name in enumerate("abc"):
        draw = np.random.default_rng(k)
        arrays = {f"w{i}": draw.standard_normal((4, count + i)).astype(ml_dtypes.bfloat16) for i in range(2)}
        arrays |= {"v": draw.standard_normal(7).astype(np.float32), "empty": np.zeros((0, 3), np.float32)}
        save(arrays | {"ids": np.arange(3)}, name)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", FIRST)
def test_what_is_not_written_has_the_bits_of_a_file(tmp_path, monkeypatch, first, threads):
    """Against the same merges made one by one, of files."""
    monkeypatch.chdir(tmp_path)
    random_models(70_000 if threads > 1 and first == "linear" else 300)  # worth several processes, or not
    monkeypatch.setattr("refmerge.plan.HELD", 3000)  # one of the larger tensors, or several small ones
    one = f"refmerge: 1\nname: first\nmerge_method: {first}\nmodels: [{{model: b}}, {{model: c}}]\n{FIRST[first]}\n"
    one += "out_dtype: bfloat16\n"
    two = "refmerge: 1\nname: middle\nmerge_method: linear\nmodels: [{model: %s}, {model: b}]\nout_dtype: float16\n"
    three = f"refmerge: 1\n{LAST.replace('first', 'b')}"
    for name, text in (("first", one), ("middle", two % "first"), ("expected", three)):
        (tmp_path / "one.yml").write_text(text)
        run_recipe("one.yml", name)
    expected = {n: x.tobytes() for n, x in open_checkpoint("expected").items()}
    for name in ("first", "middle"):
        shutil.rmtree(name)
    (tmp_path / "all.yml").write_text("---\n".join([one, two % "first", three]))
    written, make = [], CheckpointWriter.__init__
    monkeypatch.setattr(CheckpointWriter, "__init__", lambda w, to, *a, **k: (written.append(to), make(w, to, *a, **k))[1])
    made = run_recipe("all.yml", "out", threads=threads)
    assert {n: x.tobytes() for n, x in made.items()} == expected and written == [Path("out")]
    _, plan = prepare_recipe("all.yml", threads=threads)
    assert {n: x.tobytes() for n, x in plan.run().items()} == expected
    assert verify("out", "all.yml").exact
    kept = run_recipe("all.yml", "with", threads=threads, intermediates="kept")
    assert {n: x.tobytes() for n, x in kept.items()} == expected
    assert written[2:] == [Path("kept/first"), Path("kept/middle")]
    assert open_checkpoint("kept/first").tensors["w0"].dtype == "BF16"


@pytest.mark.parametrize(
    "documents, why",
    [
        (["x linear b", "linear x"], ""),
        (["x linear b", "y linear x", "linear x y"], "several merges read it"),
        (["x ties b", "linear x"], "it looks at all tensors together"),
        (["x linear b", "ties x"], "the merge that reads it looks at all tensors together"),
    ],
)
def test_why_some_are_written(tmp_path, monkeypatch, documents, why):
    monkeypatch.chdir(tmp_path)
    random_models()
    texts = []
    for document in documents:
        words = document.split()
        method = next(i for i, word in enumerate(words) if word in ("linear", "ties"))
        text = f"refmerge: 1\nmerge_method: {words[method]}\nmodels: {[{'model': m} for m in words[method + 1 :]]}\n"
        text += "base_model: a\n" if words[method] == "ties" else ""
        texts.append(text + (f"name: {words[0]}\n" if method else ""))
    (tmp_path / "r.yml").write_text("---\n".join(texts))
    _, plan = prepare_recipe("r.yml")
    assert plan.stages[0].written == why
    run_recipe("r.yml", "out")
    assert verify("out").exact


def test_memory_decides_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_models(5000)  # 40 kB
    text = "refmerge: 1\nname: x\nmerge_method: linear\nmodels: [{model: b}]\n---\nrefmerge: 1\nmerge_method: linear\n"
    (tmp_path / "r.yml").write_text(text + "models: [{model: x}]\n")
    for most, why in (("300kB", ""), ("150kB", "--max-memory is less than four of its largest tensor")):
        assert prepare_recipe("r.yml", max_memory=most, threads=1)[1].stages[0].written == why


def test_an_error_in_what_is_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"w": np.array([1, np.inf, 2], np.float32)}, "a")
    text = "name: x\nmerge_method: passthrough\nmodels: [{model: a}]\n---\nmerge_method: passthrough\nmodels: [{model: x}]\n"
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(InputError, match=r"a: tensor 'w' has 1 non-finite value, the first inf at \(1,\)"):
        run_recipe("r.yml", "out", resume=True)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "r.yml"}


# --- what is kept


def test_results_that_are_kept(folder):
    (folder / "r.yml").write_text(THREE)
    run_recipe("r.yml", "out", intermediates="deep/kept")
    assert {p.name for p in (folder / "deep/kept").iterdir()} == {"mean", "stack"}
    assert open_checkpoint("deep/kept/mean").tensors["lm_head.weight"].dtype == "BF16"
    assert json.loads((folder / "deep/kept/stack/config.json").read_text())["num_hidden_layers"] == 4
    with pytest.raises(UsageError, match="mean': exists; overwrite=True"):
        run_recipe("r.yml", "again", intermediates="deep/kept")
    assert not (folder / "again").exists()
    assert "stack" not in (folder / "deep/kept/mean/mergekit_config.yml").read_text()
    for name in ("mean", "stack"):  # each has a recipe of its own, to be run as it stands
        assert verify(f"deep/kept/{name}").exact
    before = (folder / "deep/kept/mean/model.safetensors").read_bytes()
    run_recipe("r.yml", "again", intermediates="deep/kept", overwrite=True)
    assert (folder / "deep/kept/mean/model.safetensors").read_bytes() == before


def test_recipes_of_kept_results_are_native_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_models()
    (tmp_path / "sub").mkdir()
    names = (("name: x\n", "../b"), ("name: y\n", "x"), ("", "y"))
    texts = [f"refmerge: 1\n{n}merge_method: linear\nmodels: [{{model: {m}}}]\n" for n, m in names]
    (tmp_path / "sub/r.yml").write_text("---\n".join(texts))
    run_recipe("sub/r.yml", "out", intermediates="deep/kept")
    monkeypatch.chdir("sub")
    for name in ("out", "deep/kept/x", "deep/kept/y"):
        assert verify(f"../{name}").exact


@pytest.mark.parametrize(
    "out, kept, message",
    [("out", "out", "one would lie in the other"), ("k/mean/out", "k", "one would lie"), ("out", "a", "lies in an input")],
)
def test_where_they_cannot_be_kept(folder, monkeypatch, out, kept, message):
    (folder / "r.yml").write_text(THREE)
    monkeypatch.setattr(Plan, "fill", lambda *_: 1 / 0)
    with pytest.raises(UsageError, match=message):
        run_recipe("r.yml", out, intermediates=kept)
    assert {p.name for p in folder.iterdir()} == {"a", "b", "r.yml"}


def test_one_merge_has_none_to_keep(folder):
    (folder / "r.yml").write_text(f"{MEAN}[{{model: a}}]")
    with pytest.raises(UsageError, match="there are none"):
        run_recipe("r.yml", "out", intermediates="kept")


def test_the_command_keeps_them(folder):
    (folder / "r.yml").write_text(THREE)
    done = CliRunner().invoke(main, ["merge", "r.yml", "out", "-I", "kept", "--quiet"])
    assert done.exit_code == 0 and (folder / "kept/mean/README.md").exists()
    done = CliRunner().invoke(main, ["merge", "r.yml", "out2", "--intermediate-dir", "kept"])
    assert done.exit_code == 2 and "exists; overwrite=True (--overwrite) replaces it" in done.output
    (folder / "one.yml").write_text(f"{MEAN}[{{model: a}}]")
    done = CliRunner().invoke(main, ["merge", "one.yml", "out2", "-I", "kept"])
    assert done.exit_code == 2 and "results of merges before the last one, and there are none" in done.output
    assert {p.name for p in folder.iterdir()} == {"a", "b", "r.yml", "one.yml", "out", "kept"}
