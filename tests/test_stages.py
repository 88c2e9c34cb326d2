"""Several recipes in one file: the order in which they run, what is between them, and that nothing of it is left."""

from __future__ import annotations

import json

import numpy as np
import pytest

from refmerge.checkpoint import open_checkpoint
from refmerge.errors import InputError, RecipeError, ResourceError, UsageError
from refmerge.plan import Plan
from refmerge.recipe.plan import parse_recipe, parse_recipes
from refmerge.recipe.run import prepare_recipe, run_recipe
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
    from refmerge.checkpoint import save

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
