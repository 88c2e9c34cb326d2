"""Slices and modules: which layer of which model becomes which of the result, with which parameters, and what config.json
then says. The tensors are filled with one number each, so that a result tells where it comes from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge.checkpoint import open_checkpoint, save
from refmerge.errors import InputError, RecipeError, UsageError
from refmerge.recipe.layers import find_layers, in_modules, is_first, place_of
from refmerge.recipe.run import prepare_recipe, run_recipe
from tests.tiny_models import PARTS, write


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """(recipe) -> name -> the one number in that tensor, and config.json, of a merge of a = 100.., b = 200.., c = 300.."""
    monkeypatch.chdir(tmp_path)
    for name, layers, number in (("a", 4, 100), ("b", 4, 200), ("c", 6, 300)):
        write(name, layers, number)

    def run(recipe, **options):
        (tmp_path / "r.yml").write_text(recipe)
        result = run_recipe("r.yml", "out", overwrite=True, **options)
        assert all(np.ptp(x) == 0 for x in result.values())
        return {name: x.flat[0].item() for name, x in result.items()}, json.loads((tmp_path / "out/config.json").read_text())

    return run


def layer_values(values, part=PARTS[0], stack="model.layers."):
    found = {int(n[len(stack) :].split(".")[0]): v for n, v in values.items() if n.startswith(stack) and n.endswith(part)}
    assert sorted(found) == list(range(len(found)))
    return [found[i] for i in sorted(found)]


FRANKEN = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: c, layer_range: [4, 6]}]
  - sources: [{model: b, layer_range: [1, 3]}]
"""


def test_layers_are_stacked(merged):
    values, config = merged(FRANKEN)
    assert layer_values(values) == layer_values(values, PARTS[1]) == [100, 101, 102, 304, 305, 201, 202]
    assert values["model.embed_tokens.weight"] == 100.25, "before the layers: the first slice's"
    assert (values["model.norm.weight"], values["lm_head.weight"]) == (200.5, 200.75), "after them: the last slice's"
    assert config["num_hidden_layers"] == 7


def test_a_stack_of_layers_is_the_same_in_shards_and_blocks(merged, tmp_path):
    values, _ = merged(FRANKEN)
    again, _ = merged(FRANKEN, max_shard_size=100, threads=2)
    assert again == values
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_slices_of_several_models_and_their_scopes(merged):
    values, config = merged("""\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 3], parameters: {weight: [0, 1]}}
      - {model: c, layer_range: [2, 5], parameters: {weight: [{filter: layers.3., value: 5}, {filter: mlp, value: 2}]}}
    parameters: {weight: 3}
  - sources:
      - {model: b, layer_range: [3, 4]}
parameters: {weight: 7, normalize: false}
""")
    # Layer 0: a's gradient begins with 0; c's own filters are silent on layer 2's attention: the slice's weight, 3.
    assert layer_values(values) == [3 * 302, 0.5 * 101 + 5 * 303, 102 + 3 * 304, 7 * 203]
    assert layer_values(values, PARTS[1]) == [2 * 302, 0.5 * 101 + 5 * 303, 102 + 2 * 304, 7 * 203]
    assert values["model.embed_tokens.weight"] == 0 * 100.25 + 3 * 300.25, "the gradient's first value"
    assert values["model.norm.weight"] == 7 * 200.5
    assert config["num_hidden_layers"] == 4


def test_a_slice_of_one_layer_takes_the_gradients_end(merged):
    values, _ = merged("""\
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [2, 3], parameters: {weight: [1, 2, 9]}}]
parameters: {normalize: false}
""")
    assert layer_values(values) == [9 * 102]
    assert values["lm_head.weight"] == 1 * 100.75


def test_a_base_of_its_own_in_each_slice(merged):
    values, _ = merged("""\
merge_method: task_arithmetic
base_model: a
slices:
  - sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [3, 4]}]
  - base_model: c
    sources: [{model: b, layer_range: [0, 1]}, {model: c, layer_range: [5, 6]}]
parameters: {weight: 0.5}
""")
    assert layer_values(values) == [101 + 0.5 * (203 - 101), 305 + 0.5 * (200 - 305)]
    assert values["model.norm.weight"] == 300.5 + 0.5 * (200.5 - 300.5)


LONGER_LAST = """\
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [1, 2]}, {model: c, layer_range: [2, 3]}]
parameters: {weight: 1}
"""


def test_after_the_last_layer_mergekit_merges_as_many_as_in_the_first_slice(merged):
    values, _ = merged(LONGER_LAST)
    assert layer_values(values) == [100, (201 + 302) / 2]
    assert values["model.norm.weight"] == 200.5
    native, _ = merged("refmerge: 1\n" + LONGER_LAST.replace("parameters: {weight: 1}", ""))
    assert layer_values(native) == layer_values(values)
    assert native["model.norm.weight"] == (200.5 + 300.5) / 2
    resolved, _ = prepare_recipe("r.yml")
    assert resolved.notes == ()


def test_modules(merged, tmp_path):
    for name, number in (("v1", 1000), ("v2", 2000)):
        vision = {f"vision_tower.layers.{i}.w": np.full(2, number + 10 * i) for i in range(3)}
        vision |= {"multi_modal_projector.w": np.full(2, number + 7)}
        config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 3}}
        write(tmp_path / name, 4, number, config=config, **vision)
    values, config = merged("""\
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources: [{model: v1, layer_range: [0, 2]}, {model: v2, layer_range: [2, 4]}]
      - sources: [{model: v2, layer_range: [3, 4]}]
  vision_tower:
    models: [{model: v1}, {model: v2, parameters: {weight: [1, 3]}}]
    parameters: {weight: 1}
  multi_modal_projector:
    models: [{model: v2}]
parameters: {weight: 1}
""")
    assert layer_values(values) == [(1000 + 2002) / 2, (1001 + 2003) / 2, 2003]
    tower = [values[f"vision_tower.layers.{i}.w"] for i in range(3)]
    assert tower == pytest.approx([1500, (1010 + 2 * 2010) / 3, (1020 + 3 * 2020) / 4])
    assert values["multi_modal_projector.w"] == 2007
    assert config == {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 3}}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_layers": 4, "num_decoder_layers": 4}, {"num_layers": 2, "num_decoder_layers": 4}),
        (
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            {"encoder_layers": 2, "decoder_layers": 4, "num_hidden_layers": 2},
        ),
    ],
)
def test_the_number_of_an_encoders_layers(merged, before, after):
    tensors = {f"{part}.block.{i}.w": np.full(2, i, np.float32) for part in ("encoder", "decoder") for i in range(4)}
    tensors["shared.weight"] = np.ones((2, 2), np.float32)
    save(tensors, "t", extra_files={"config.json": json.dumps(before).encode()})
    values, config = merged("""\
merge_method: passthrough
modules:
  encoder: {slices: [{sources: [{model: t, layer_range: [2, 4]}]}]}
  decoder: {models: [{model: t}]}
  shared: {models: [{model: t}]}
""")
    assert config == after
    assert [values[f"encoder.block.{i}.w"] for i in range(2)] == [2, 3]
    assert [values[f"decoder.block.{i}.w"] for i in range(4)] == [0, 1, 2, 3]
    assert "encoder.block.2.w" not in values


def test_lists_with_an_entry_for_each_layer(merged, tmp_path):
    for name, layers, number, kinds in (("x", 3, 10, "abc"), ("y", 2, 20, "de")):
        config = {"n_layer": layers, "layer_types": list(kinds), "eos": [1] * layers, "deep": {"layers": [0] * layers}}
        write(tmp_path / name, layers, number, config=config)
    text = "merge_method: passthrough\nslices:\n"
    text += "  - sources: [{model: x, layer_range: [1, 3]}]\n  - sources: [{model: y, layer_range: [0, 2]}]\n"
    _, config = merged(text)
    assert config == {"n_layer": 4, "layer_types": list("bcde"), "eos": [1] * 3, "deep": {"layers": [0] * 3}}


def test_a_config_that_does_not_say_how_many_layers_there_are(merged, tmp_path):
    write(tmp_path / "x", 3, 10, config={"hidden": 3})
    _, config = merged("merge_method: passthrough\nslices: [{sources: [{model: x, layer_range: [0, 2]}]}]")
    assert config == {"hidden": 3}
    resolved, _ = prepare_recipe("r.yml")
    assert resolved.notes == ("config.json: no key says how many layers default has; 2 is not written there",)


def test_a_head_that_is_tied_in_one_model(merged, tmp_path):
    tied = {n: np.array(x) for n, x in open_checkpoint("b").items() if n != "lm_head.weight"}
    config = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    save(tied, "b", extra_files={"config.json": json.dumps(config).encode()}, overwrite=True)
    text = "merge_method: linear\nbase_model: b\nmodels: [{model: a, parameters: {weight: [1, 3]}}, {model: b}]\n"
    text += "parameters: {weight: 1}\n"
    values, config = merged(text)
    assert values["lm_head.weight"] == (100.75 + 200.25) / 2
    assert layer_values(values)[3] == (3 * 103 + 203) / 4
    assert config["tie_word_embeddings"] is False
    assert prepare_recipe("r.yml")[0].notes == (
        "b stores no lm_head.weight: it is tied to model.embed_tokens.weight, which is merged in its place",
        "config.json: tie_word_embeddings is false, as the head is no longer the embedding",
    )
    values, config = merged(text, missing="skip")
    assert "lm_head.weight" not in values and config["tie_word_embeddings"] is True
    with pytest.raises(InputError, match=r"'lm_head\.weight' is missing from b and present in a; missing='base'"):
        merged("refmerge: 1\nmerge_method: linear\nmodels: [{model: a}, {model: b}]")


def test_layers_by_a_pattern(merged, tmp_path):
    write(tmp_path / "x", 3, 10, stack="blocks_")  # blocks_0.self_attn...: no number between dots
    text = "merge_method: passthrough\nslices: [{sources: [{model: x, layer_range: [1, 3]}]}]\n"
    with pytest.raises(InputError, match=r"x: no tensor's name has the number of a layer; `layers: PATTERN` says where"):
        merged(text)
    values, config = merged(text + "layers: blocks_{}.\n")
    assert layer_values(values, stack="blocks_") == [11, 12]
    assert config["num_hidden_layers"] == 2


def test_two_stacks_of_layers(merged, tmp_path):
    extra = {f"encoder.layers.{i}.w": np.full(2, i) for i in range(4)}
    write(tmp_path / "x", 4, 10, config={}, **extra)
    text = "merge_method: passthrough\nslices: [{sources: [{model: x, layer_range: [1, 3]}]}]\n"
    with pytest.raises(InputError, match=r"several places: encoder\.layers\.\{\} \(4\), model\.layers\.\{\} \(4\); say"):
        merged(text)
    values, _ = merged(text + "layers: encoder.layers.{}.\n")
    assert layer_values(values, part="w", stack="encoder.layers.") == [1, 2]
    assert layer_values(values) == [10, 11, 12, 13], "outside of the layers that are meant"
    # Where the config tells them apart, nothing needs to be said.
    write(tmp_path / "y", 4, 10, encoder_w=np.zeros(2), **{f"encoder.layers.{i}.w": np.full(2, i) for i in range(2)})
    values, _ = merged(text.replace("x", "y"))
    assert layer_values(values) == [11, 12]


@pytest.mark.parametrize(
    "text, error, message",
    [
        (FRANKEN.replace("[4, 6]", "[4, 7]"), InputError, r"c: layer_range \[4, 7\] of a model that has 6 layers"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
            RecipeError,
            "line 2, column 10: mergekit:linear needs the parameter weight for 'a'",
        ),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0}\n"
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]",
            RecipeError,
            r"line 4, column 65: all sources of a slice have as many layers: \[0, 3\] is not as long as \[0, 2\]",
        ),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0}\nslices: [{sources: [{model: c, layer_range: [0, 2]}]}]",
            RecipeError,
            "mergekit:slerp needs the layers of the base, 'a', among the sources of each slice",
        ),
        (
            "merge_method: slerp\nparameters: {t: 0}\nslices: [{sources: [{model: c, layer_range: [0, 2]}]}]",
            RecipeError,
            "mergekit:slerp needs a base_model",
        ),
        (
            "merge_method: passthrough\n"
            "slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]",
            RecipeError,
            "mergekit:passthrough merges 1 model, 2 given",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\n"
            "slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: ./a, layer_range: [2, 3]}]}]",
            RecipeError,
            "model './a' is listed twice",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\n"
            "slices: [{sources: [{model: a, layer_range: [0, 1]}], parameters: {wieght: 1}}]",
            RecipeError,
            "no parameter 'wieght'; did you mean 'weight'?",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\nmodules: {vision_tower: {models: [{model: a}]}}",
            InputError,
            r"a: 11 tensors are in none of the modules vision_tower, 'lm_head\.weight' for one; a module's `prefix`",
        ),
        (
            "refmerge: 1\nmerge_method: ties\nover: model\nbase_model: a\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]\n"
            "  - sources:\n"
            "      [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [0, 1]}, {model: c, layer_range: [0, 1]}]\n",
            UsageError,
            "give every slice the same number of models",
        ),
    ],
)
def test_what_cannot_be(merged, tmp_path, text, error, message):
    with pytest.raises(error, match=message) as caught:
        merged(text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_error_names_the_tensor_as_its_file_has_it(merged, tmp_path):
    x = {n: np.array(t) for n, t in open_checkpoint("c").items()}
    x["model.layers.4.mlp.up_proj.weight"][1, 1] = np.nan
    save(x, "c", overwrite=True)
    with pytest.raises(InputError, match=r"^c: tensor 'model\.layers\.4\.mlp\.up_proj\.weight' has 1 non-finite value"):
        merged(FRANKEN)


def test_places():
    place = place_of("model.layers.12.mlp.experts.3.w")
    assert (place.stack, place.layer, place.rest) == ("model.layers.", 12, ".mlp.experts.3.w")
    assert place.moved(3) == "model.layers.3.mlp.experts.3.w"
    assert place_of("lm_head.weight") is None
    assert place_of("h12.w", ["h{}."]).layer == 12
    assert place_of("x.h12.w", ["h{}."]) is None
    one_of_two = find_layers(["a.0.w", "b.0.w", "b.1.w"], None, {"deep": {"depth": 2}}, "x")
    assert one_of_two.keys() == {"b.0.w", "b.1.w"}


@pytest.mark.parametrize(
    "before, after",
    [
        ("model.embed_tokens.weight", "model.norm.weight"),
        ("transformer.wte.weight", "transformer.ln_f.bias"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("bert.embeddings.LayerNorm.weight", "bert.pooler.dense.weight"),
        ("shared.weight", "decoder.final_layer_norm.weight"),
        ("visual.patch_embed.proj.weight", "score.weight"),
        ("backbone.embeddings.weight", "backbone.norm_f.weight"),
        ("model.tok_embeddings.weight", "output.weight"),
        ("model.conv1.bias", "lm_head.bias"),
        ("word_embeddings_layernorm.weight", "classifier.out_proj.weight"),
    ],
)
def test_before_and_after_the_layers(before, after):
    assert is_first(before) and not is_first(after)


def test_modules_by_their_prefixes():
    names = ["model.x", "visual.blocks.0.w", "visual.merger.mlp.w", "lm_head.w"]
    found = in_modules(names, dict.fromkeys(["vision_tower", "multi_modal_projector", "text_decoder"]), "x")
    assert found["vision_tower"] == {"visual.blocks.0.w"}
    assert found["multi_modal_projector"] == {"visual.merger.mlp.w"}
    assert found["text_decoder"] == {"model.x", "lm_head.w"}
    named = in_modules(["eyes.0.w", "rest.w"], {"eyes": None, "other": ("rest",)}, "x")
    assert named == {"eyes": {"eyes.0.w"}, "other": {"rest.w"}}
    with pytest.raises(InputError, match="2 tensors are in none of the modules eyes, 'a' for one"):
        in_modules(["eyes.0.w", "a", "b"], {"eyes": None}, "x")


CUTS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=5)


@settings(max_examples=15)
@given(CUTS)
def test_any_stack_copies_what_it_names(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("cuts")
    for name, number in (("a", 100), ("b", 200)):
        write(folder / name, 4, number)
    made = [(m, start, min(4, start + length)) for m, start, length in cuts]
    text = "refmerge: 1\nmerge_method: passthrough\nslices:\n"
    for m, start, stop in made:
        text += f"  - sources: [{{model: {m}, layer_range: [{start}, {stop}]}}]\n"
    (folder / "r.yml").write_text(text)
    result = refmerge.run_recipe(folder / "r.yml", folder / "out")
    wanted = [{"a": 100, "b": 200}[m] + i for m, start, stop in made for i in range(start, stop)]
    assert layer_values({n: x.flat[0].item() for n, x in result.items()}) == wanted
