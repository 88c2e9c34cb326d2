"""Recipes: what is read, what is refused and how it is said, and the parameters that every tensor gets.

Expected values are worked out by hand from the rules of mergekit 0.1.5; the fake methods below stand in for registered
ones, so that these tests need no method's file.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import registry
from refmerge.errors import RecipeError
from refmerge.method import Method, Param
from refmerge.recipe import describe, load_recipe, parse_recipe, resolve, schema_json
from refmerge.recipe.parameters import interpolate, layer_count, layer_index, position
from refmerge.recipe.plan import load_recipes, resolve_all

EXAMPLES = sorted((Path(__file__).parent.parent / "spec" / "recipes").glob("*.yml"))


def fake(name: str, *params: Param, base: bool = False, models: tuple[int, int | None] = (1, None)) -> Method:
    asks = ("models", "base") if base else ("models",)
    return Method(name, lambda models: models[0], "", asks, {p.name: p for p in params}, models=models)


WEIGHT = Param("weight", float, per_model=True)
NORMALIZE = Param("normalize", bool, True)
LINEAR = fake("mergekit:linear", WEIGHT, NORMALIZE)
SLERP = fake("mergekit:slerp", Param("t", float), base=True, models=(1, 1))
TIES = fake(
    "mergekit:ties",
    WEIGHT,
    Param("density", float, 1.0, per_model=True, domain=(0.0, 1.0)),
    NORMALIZE,
    Param("lambda_", float, 1.0),
    Param("int8_mask", bool, False),
    base=True,
)
OTHER = fake(
    "other",
    Param("steps", int, 10),
    Param("mode", str, "fast", choices=("fast", "exact")),
    Param("scale", float, None, per_model=True, optional=True),
    Param("globs", tuple, ("*.weight",)),
    Param("free", object, None),
)

E2E_01 = """\
merge_method: linear
models:
  - model: ./m0
    parameters:
      weight: [0.0, 0.3, 0.7, 1.0]
  - model: ./m1
    parameters:
      weight:
        - filter: self_attn
          value: [1, 0]
        - filter: mlp.down_proj
          value: 0.25
        - value: 0.5
  - model: ./m2
parameters:
  weight:
    - filter: norm
      value: 2
    - value: 1e-1
  normalize: true
dtype: float32
"""

E2E_03 = """\
models:
  - model: ./m1
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: ./m2
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: ./m3
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0.25
merge_method: ties
base_model: ./base
parameters:
  normalize: true
  int8_mask: true
  lambda: 0.9
dtype: float32
out_dtype: bfloat16
chat_template: chatml
"""


def names_of(layers: int) -> list[str]:
    parts = ("input_layernorm", "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    inner = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in parts]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight"]


def refusal(text: str, method: Method | None = None) -> str:
    """The message with which a recipe is refused: by its reader, or for a method by its resolution."""
    with pytest.raises(RecipeError) as caught:
        recipe = parse_recipe(text)
        if method is not None:
            resolve(recipe, method)
    return str(caught.value)


def body(parameters: str = "", entry: str = "", top: str = "") -> str:
    """A recipe for LINEAR or TIES with two models."""
    return f"""\
merge_method: any
base_model: base
models:
  - {{model: a, parameters: {{{entry}}}}}
  - {{model: b}}
parameters: {{{parameters}}}
{top}"""


# --- one number


@pytest.mark.parametrize(
    "values, t, expected",
    [
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 10.0, 40.0), 0.5, 10.0),
        ((0.0, 10.0, 40.0), 0.75, 25.0),
        ((0.0, 10.0, 40.0), 1.0, 40.0),
        ((1.0, 0.0), 0.0, 1.0),
        ((0.7,), 0.3, 0.7),
        ((True, False), 0.5, True),
        ((True, False), 0.999, True),
        ((True, False), 1.0, False),
        (("a", "b", "c"), 0.5, "b"),
        (("a", "b", "c"), 0.49, "a"),
    ],
)
def test_interpolation(values, t, expected):
    assert interpolate(values, t) == expected


@pytest.mark.parametrize(
    "name, index",
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("model.layers.3.mlp.experts.7.w1.weight", 3),
        ("model.norm.weight", None),
        ("classifier.1", None),
        ("layer1.weight", None),
        ("", None),
    ],
)
def test_layer_index(name, index):
    assert layer_index(name) == index


def test_layer_count_and_position():
    names = names_of(5)
    assert layer_count(names) == 5
    assert layer_count(["a.weight"]) == 0
    assert layer_count(["x.7.a"]) == 8
    assert position("model.layers.0.mlp.up_proj.weight", 5) == 0
    assert position("model.layers.1.mlp.up_proj.weight", 5) == 0.25
    assert position("model.layers.4.mlp.up_proj.weight", 5) == 1
    assert position("lm_head.weight", 5) == 0
    assert position("model.layers.0.mlp.up_proj.weight", 1) == 1, "the only layer takes the last value"


# --- whole recipes


def test_mergekit_end_to_end_01():
    merge = resolve(parse_recipe(E2E_01), LINEAR)
    assert (merge.method, merge.semantics) == ("mergekit:linear", "mergekit")
    assert (merge.models, merge.base, merge.donor) == (("./m0", "./m1", "./m2"), None, "./m0")
    assert (merge.read_dtype, merge.out_dtype) == ("F32", "F32")
    assert (merge.work_dtype, merge.seed, merge.over, merge.stats) == (None, None, None, None)
    names = names_of(4)
    expected = {
        "model.embed_tokens.weight": [0.0, 0.5, 0.1],
        "lm_head.weight": [0.0, 0.5, 0.1],
        "model.norm.weight": [0.0, 0.5, 2.0],
        "model.layers.0.input_layernorm.weight": [0.0, 0.5, 2.0],
        "model.layers.0.self_attn.q_proj.weight": [0.0, 1.0, 0.1],
        "model.layers.1.self_attn.q_proj.weight": [0.3, 2 / 3, 0.1],
        "model.layers.1.mlp.down_proj.weight": [0.3, 0.25, 0.1],
        "model.layers.2.self_attn.q_proj.weight": [0.7, 1 / 3, 0.1],
        "model.layers.2.mlp.up_proj.weight": [0.7, 0.5, 0.1],
        "model.layers.3.self_attn.q_proj.weight": [1.0, 0.0, 0.1],
        "model.layers.3.input_layernorm.weight": [1.0, 0.5, 2.0],
    }
    for name, weight in expected.items():
        given = merge.parameters_for(name, names)
        assert given["weight"] == pytest.approx(weight, abs=1e-15), name
        assert given["normalize"] is True
        assert given.keys() == {"weight", "normalize"}


def test_mergekit_end_to_end_03():
    merge = resolve(parse_recipe(E2E_03), TIES)
    assert (merge.models, merge.base, merge.donor) == (("./m1", "./m2", "./m3"), "./base", "./base")
    assert (merge.read_dtype, merge.out_dtype) == ("F32", "BF16")
    assert (merge.chat_template, merge.notes) == ("chatml", ())
    names = names_of(3)
    expected = {
        "model.embed_tokens.weight": ([1.0, 0.0, 0.25], [1.0, 0.5, 0.33]),
        "model.layers.0.mlp.up_proj.weight": ([1.0, 0.0, 0.5], [1.0, 0.5, 0.33]),
        "model.layers.1.mlp.down_proj.weight": ([1.0, 0.5, 0.5], [0.7, 0.5, 0.33]),
        "model.layers.1.self_attn.q_proj.weight": ([1.0, 0.5, 0.25], [0.7, 0.5, 0.33]),
        "model.layers.2.self_attn.q_proj.weight": ([1.0, 1.0, 0.25], [0.1, 0.5, 0.33]),
    }
    for name, (weight, density) in expected.items():
        given = merge.parameters_for(name, names)
        assert given["weight"] == pytest.approx(weight, abs=1e-15), name
        assert given["density"] == pytest.approx(density, abs=1e-15), name
        assert (given["normalize"], given["int8_mask"], given["lambda_"]) == (True, True, 0.9)


def test_json_is_a_recipe():
    text = json.dumps({"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": 1}})
    assert resolve(parse_recipe(text), LINEAR).parameters_for("x", ["x"]) == {"weight": [1.0], "normalize": True}


def test_native_recipe():
    text = """\
refmerge: 1
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 2}, stats: a.stats.safetensors}
  - {model: b}
parameters: {weight: 1}
dtype: torch.float16
work_dtype: float64
seed: 7
over: model
"""
    merge = resolve(parse_recipe(text), TIES)
    assert (merge.semantics, merge.models, merge.base) == ("refmerge", ("a", "b"), "base")
    assert merge.stats == ("a.stats.safetensors", None)
    assert (merge.read_dtype, merge.out_dtype, merge.work_dtype) == ("F16", "F16", "float64")
    assert (merge.seed, merge.over, merge.notes) == (7, "model", ())
    assert merge.parameters_for("x", ["x"])["weight"] == [2.0, 1.0]


@pytest.mark.parametrize(
    "top, written, asked",
    [
        ("", "ties", "mergekit:ties"),
        ("refmerge: 1\n", "ties", "ties"),
        ("refmerge: 1\n", "mergekit:ties", "mergekit:ties"),
    ],
)
def test_whose_method(monkeypatch, top, written, asked):
    asked_for = []
    monkeypatch.setattr(registry, "get", lambda name: asked_for.append(name) or TIES)
    rest = "base_model: b\nmodels: [{model: a}]\nparameters: {weight: 1}"
    resolve(parse_recipe(f"{top}merge_method: {written}\n{rest}"))
    assert asked_for == [asked]


def test_unknown_method_is_a_recipe_error_with_its_place():
    told = r"r\.yml: line 2, column 1: mergekit has no method 'tise'; did you mean 'ties'\? \(known here: .*ties\)$"
    with pytest.raises(RecipeError, match=told):
        resolve(parse_recipe("models: [{model: a}]\nmerge_method: tise\n", "r.yml"))
    with pytest.raises(RecipeError, match=r"'fisher'.*; a recipe with refmerge: 1 at its top has fisher"):
        resolve(parse_recipe("models: [{model: a}]\nmerge_method: fisher\n"))
    with pytest.raises(RecipeError, match=r"line 3, column 1: no method 'tise'; did you mean ties\?"):
        resolve(parse_recipe("refmerge: 1\nmodels: [{model: a}]\nmerge_method: tise\n"))
    with pytest.raises(RecipeError, match="refmerge: 1"):
        resolve(parse_recipe("models: [{model: a}]\nmerge_method: mergekit:ties\n"))


def test_describe_is_json_and_shows_parameters_as_written():
    told = describe(resolve(parse_recipe(E2E_03), TIES))
    assert json.loads(json.dumps(told)) == told
    assert told["method"] == "mergekit:ties"
    assert told["parameters"] == {"normalize": True, "int8_mask": True, "lambda": 0.9}
    assert told["model_parameters"]["./m1"] == {"density": [1, 0.7, 0.1], "weight": 1.0}


def test_schema_names_the_keys():
    schema = schema_json()
    json.dumps(schema)
    mergekit, native = (schema["$defs"][kind] for kind in ("MergekitRecipe", "NativeRecipe"))
    assert {"merge_method", "models", "base_model", "parameters"} <= mergekit["properties"].keys()
    assert {"refmerge", "seed", "over", "work_dtype"} <= native["properties"].keys()
    assert native["additionalProperties"] is False


# --- scopes, filters, gradients


def weights(text: str, name: str, layers: int = 3, method: Method = TIES) -> list[float]:
    return resolve(parse_recipe(text), method).parameters_for(name, names_of(layers))["weight"]


def test_scopes():
    assert weights(body("weight: 2", "weight: 3"), "lm_head.weight") == [3.0, 2.0]
    assert resolve(parse_recipe(body("weight: 1")), TIES).parameters_for("x", ["x"])["density"] == [1.0, 1.0]


def test_first_matching_filter_wins():
    text = body("weight: [{filter: mlp, value: 1}, {filter: mlp.up, value: 2}, {filter: '*', value: 3}, {value: 4}]")
    assert weights(text, "model.layers.0.mlp.up_proj.weight") == [1.0, 1.0]
    assert weights(text, "lm_head.weight") == [3.0, 3.0]


def test_filter_is_a_plain_substring():
    text = body("weight: [{filter: 'l.p', value: 1}, {value: 2}]")
    assert weights(text, "a.mlp") == [2.0, 2.0]
    assert weights(text, "al.p") == [1.0, 1.0]


def test_silent_conditions_fall_through_to_the_next_scope():
    text = body("weight: {filter: norm, value: 5}", "weight: {filter: mlp, value: 3}")
    with pytest.raises(RecipeError, match=r"weight of a has no value for tensor 'lm_head\.weight'.*without a filter"):
        weights(text, "lm_head.weight")
    with pytest.raises(RecipeError, match="weight of b has no value"):
        weights(text, "model.layers.0.mlp.up_proj.weight")
    assert weights(text, "model.norm.weight") == [5.0, 5.0]
    mixed = body("weight: 1, density: {filter: mlp, value: 0.5}")
    assert resolve(parse_recipe(mixed), TIES).parameters_for("x", ["x"])["density"] == [1.0, 1.0], "the default"


def test_shared_parameters_have_filters_and_gradients_too():
    text = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters:\n  t:\n"
    text += "  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}\n  - {filter: mlp, value: [1, 0]}\n  - value: 0.5\n"
    merge = resolve(parse_recipe(text), SLERP)
    names = names_of(9)

    def t(name):
        return merge.parameters_for(name, names)["t"]

    assert t("model.layers.1.self_attn.q_proj.weight") == pytest.approx(0.25, abs=1e-15)
    assert t("model.layers.5.self_attn.q_proj.weight") == pytest.approx(0.5, abs=1e-15)
    assert t("model.layers.8.self_attn.q_proj.weight") == 1.0
    assert t("model.layers.2.mlp.up_proj.weight") == 0.75
    assert t("lm_head.weight") == 0.5


def test_one_layer_takes_the_last_value_and_other_tensors_the_first():
    text = body("weight: [1, 2, 9]")
    assert weights(text, "model.layers.0.mlp.up_proj.weight", layers=1) == [9.0, 9.0]
    assert weights(text, "model.norm.weight", layers=1) == [1.0, 1.0]


def test_discrete_gradient():
    merge = resolve(parse_recipe(body("weight: 1, normalize: [true, false]")), TIES)
    at = [merge.parameters_for(f"model.layers.{i}.mlp.up_proj.weight", names_of(3))["normalize"] for i in range(3)]
    assert at == [True, True, False]


def test_another_checkpoint_has_its_own_layers():
    merge = resolve(parse_recipe(body("weight: [0, 1]")), TIES)
    name = "model.layers.1.mlp.up_proj.weight"
    assert merge.parameters_for(name, names_of(2))["weight"] == [1.0, 1.0]
    assert merge.parameters_for(name, names_of(5))["weight"] == [0.25, 0.25]
    assert merge.parameters_for(name, dict.fromkeys(names_of(3)).keys())["weight"] == [0.5, 0.5]
    assert merge.parameters_for(name, frozenset(names_of(3)))["weight"] == [0.5, 0.5]


def test_layers_are_counted_once(monkeypatch):
    counted = []
    count = layer_count
    monkeypatch.setattr("refmerge.recipe.parameters.layer_count", lambda names: counted.append(1) or count(names))
    merge = resolve(parse_recipe(body("weight: [0, 1]")), TIES)
    names = names_of(50)
    for name in names:
        merge.parameters_for(name, names)
    assert len(counted) == 1


def test_threads_agree():
    merge = resolve(parse_recipe(body("weight: [0, 1]")), TIES)
    names = names_of(5)
    seen = []

    def ask():
        for _ in range(50):
            seen.extend(merge.parameters_for("model.layers.2.mlp.up_proj.weight", list(names))["weight"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0.5] * 400


# --- types


@pytest.mark.parametrize(
    "written, value",
    [("'1e-5'", 1e-5), ("1e-5", 1e-5), ("2", 2.0), ("'0.5'", 0.5), ("-.5", -0.5), ("1_000", 1000.0)],
)
def test_numbers_of_mergekit(written, value):
    found = weights(body(f"weight: {written}"), "x")
    assert found == [value, value]
    assert all(type(v) is float for v in found)


@pytest.mark.parametrize(
    "written, value", [("yes", True), ("'off'", False), ("1", True), ("0", False), ("false", False)]
)
def test_truth_values_of_mergekit(written, value):
    merge = resolve(parse_recipe(body(f"weight: 1, normalize: {written}")), TIES)
    assert merge.parameters_for("x", ["x"])["normalize"] is value


@pytest.mark.parametrize("setting", ["weight: '1'", "normalize: 1", "normalize: yes", "weight: true"])
def test_native_recipes_do_not_convert(setting):
    text = f"refmerge: 1\nmerge_method: linear\nmodels: [{{model: a}}]\nparameters: {{{setting}}}\n"
    assert f"{setting.split(':')[0]} = " in refusal(text, LINEAR)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("weight: true", "weight = True is not of type float"),
        ("weight: abc", "weight = 'abc' is not of type float"),
        ("weight: nan", "weight = 'nan' is not of type float"),
        ("weight: 'inf'", "weight = 'inf' is not of type float"),
        ("weight: [1, abc]", "weight = 'abc' is not of type float"),
        ("weight: 1, density: 1.5", "density = 1.5 is outside [0.0, 1.0]"),
        ("weight: 1, density: {filter: never, value: [0.1, -1]}", "density = -1.0 is outside [0.0, 1.0]"),
        ("weight: 1, normalize: 0.5", "normalize = 0.5 is not of type bool"),
        ("weight: 1, lambda: x", "lambda = 'x' is not of type float"),
    ],
)
def test_wrong_types(setting, message):
    told = refusal(body(setting), TIES)
    assert message in told
    assert "line 6, column" in told
    assert "lambda_" not in told


def test_other_types():
    def given(parameters: str) -> dict:
        recipe = parse_recipe(f"merge_method: x\nmodels: [{{model: a}}]\nparameters: {{{parameters}}}")
        return resolve(recipe, OTHER).parameters_for("x", ["x"])

    assert given("") == {"steps": 10, "mode": "fast", "scale": [None], "globs": ("*.weight",), "free": None}
    assert given("steps: '12', mode: exact, scale: 2, globs: ['*.w', '*.b'], free: [1, 2]") == {
        "steps": 12,
        "mode": "exact",
        "scale": [2.0],
        "globs": ("*.w", "*.b"),
        "free": [1, 2],
    }
    with pytest.raises(RecipeError, match=r"steps = 1\.5 is not of type int"):
        given("steps: 1.5")
    with pytest.raises(RecipeError, match="steps is a whole number and cannot change over the layers"):
        given("steps: [1, 5]")
    with pytest.raises(RecipeError, match="'slow' is none of 'fast', 'exact'"):
        given("mode: slow")


# --- base and models


def test_listed_base_is_the_base():
    text = "merge_method: ties\nbase_model: ./base\nmodels:\n- model: base\n- model: a\nparameters: {weight: 1}"
    merge = resolve(parse_recipe(text), TIES)
    assert (merge.models, merge.base, merge.notes) == (("a",), "./base", ())


def test_parameters_of_the_base_are_checked_and_noted():
    text = "merge_method: ties\nbase_model: base\nmodels:\n- {model: base, parameters: {weight: 3}}\n- model: a\n"
    merge = resolve(parse_recipe(text + "parameters: {weight: 1}"), TIES)
    assert merge.notes == ("the parameters of 'base' are not used: it is the base",)
    assert merge.parameters_for("x", ["x"])["weight"] == [1.0]
    assert "no parameter 'wieght'" in refusal(text.replace("weight", "wieght") + "parameters: {weight: 1}", TIES)


@pytest.mark.parametrize("listed", ["[{model: a}, {model: b}]", "[{model: b}, {model: a}]", "[{model: b}]"])
def test_slerp_takes_the_base_from_the_list_or_beside_it(listed):
    recipe = parse_recipe(f"merge_method: slerp\nbase_model: a\nmodels: {listed}\nparameters: {{t: 0.3}}")
    merge = resolve(recipe, SLERP)
    assert (merge.models, merge.base) == (("b",), "a")


def test_slerp_of_the_wrong_number():
    three = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {t: 0.3}"
    assert "mergekit:slerp merges 1 model, 2 given, not counting the base" in refusal(three, SLERP)
    alone = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 0.3}"
    assert "0 given" in refusal(alone, SLERP)


def test_method_without_a_base_merges_it_as_mergekit_does():
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: a, parameters: {weight: 2}}]\n"
    merge = resolve(parse_recipe(text + "parameters: {weight: 1}"), LINEAR)
    assert (merge.models, merge.base, merge.donor) == (("a", "base"), None, "base")
    assert merge.parameters_for("x", ["x"])["weight"] == [2.0, 1.0]
    assert merge.notes == ("mergekit:linear takes no base: 'base' is merged as the last model",)
    assert "needs the parameter weight for 'base'" in refusal(text, LINEAR)


def test_method_without_a_base_keeps_a_listed_one_in_its_place():
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: base}, {model: a}]\nparameters: {weight: 1}"
    merge = resolve(parse_recipe(text), LINEAR)
    assert (merge.models, merge.base, merge.donor, merge.notes) == (("base", "a"), None, "base", ())


def test_missing_base():
    told = refusal("merge_method: ties\nmodels: [{model: a}]\nparameters: {weight: 1}", TIES)
    assert told == "<recipe>: line 1, column 1: mergekit:ties needs a base_model"


def test_native_base_is_exactly_that():
    start, end = "refmerge: 1\nmerge_method: any\nbase_model: b\n", "parameters: {weight: 1}"
    listed = start + "models: [{model: a}, {model: ./b}]\n" + end
    assert "line 4, column 22: './b' is the base_model: do not list it among models" in refusal(listed, TIES)
    useless = start + "models: [{model: a}]\n" + end
    assert "line 3, column 1: mergekit:linear takes no base_model" in refusal(useless, LINEAR)


def test_duplicate_models():
    told = refusal("merge_method: linear\nmodels:\n- model: a\n- model: ./a/\nparameters: {weight: 1}", LINEAR)
    assert told == "<recipe>: line 4, column 3: model './a/' is listed twice"


@pytest.mark.parametrize("native", [False, True])
def test_a_base_that_may_be_left_out(native):
    """It is a base where it is given, listed or not, and no model like the others."""
    either = replace(fake("mergekit:nuslerp", WEIGHT, base=True, models=(2, 2)), optional_base=True)
    head = ("refmerge: 1\n" if native else "") + "merge_method: nuslerp\n"
    rest = "models: [{model: a}, {model: b}]\nparameters: {weight: 1}"
    without = resolve(parse_recipe(head + rest), either)
    assert (without.models, without.base, without.donor) == (("a", "b"), None, "a")
    given = resolve(parse_recipe(f"{head}base_model: base\n{rest}"), either)
    assert (given.models, given.base, given.donor, given.notes) == (("a", "b"), "base", "base", ())
    if not native:
        listed = resolve(parse_recipe(f"{head}base_model: base\n{rest.replace('[', '[{model: ./base}, ')}"), either)
        assert (listed.models, listed.base) == (("a", "b"), "base")


def test_missing_and_misplaced_parameters():
    assert "mergekit:linear needs the parameter weight for 'b'" in refusal(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]", LINEAR
    )
    told = refusal("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", SLERP)
    assert told == "<recipe>: line 1, column 1: mergekit:slerp needs the parameter t"
    told = refusal(body("weight: 1", "normalize: true"), TIES)
    assert "normalize is one value for all models: move it to the recipe's parameters" in told


def test_unknown_parameter():
    told = refusal(body("weight: 1, densty: 1"), TIES)
    assert "line 6, column 25: mergekit:ties has no parameter 'densty'; did you mean 'density'?" in told
    assert "weight, density, normalize, lambda, int8_mask" in told


# --- refused text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a recipe is a mapping"),
        ("- a", "line 1, column 1: a recipe is a mapping"),
        ("just text", "a recipe is a mapping"),
        ("merge_method: [", "line 1, column 1"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: 1\n--- \nb: 2", "expected a single document in the stream"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: duplicate key 'a'"),
        ("a: {b: 1, b: 2}", "line 1, column 11: duplicate key 'b'"),
        ("a: !foo 1", "line 1, column 1: tag '!foo' is not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 1: tag 'tag:yaml.org,2002:python/object/apply:os."),
        ("a: !!binary aGk=", "is not allowed"),
        ("a: !!set {b}", "is not allowed"),
        ("a: .nan", "line 1, column 1: '.nan' is not a finite number"),
        ("a: [1, -.INF]", "line 1, column 8: '-.INF' is not a finite number"),
        ("a: 1e999", "'1e999' is not a finite number"),
        ("a: 99999999999999999999", "does not fit into 64 bits"),
        ("a: " + "9" * 5000, "is not a number that every YAML version reads alike"),
        ("a: 010", "'010' is not a number that every YAML version reads alike"),
        ("a: !!int abc", "'abc' is not a number"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: !%25", "not YAML: "),
        ("a: &x [*x]", "line 1, column 4: an alias inside the very list or mapping that it stands for"),
        ("a: &x {b: *x}", "an alias inside the very list or mapping that it stands for"),
        ("&x a: &x {<<: *x}", "an alias inside the very list or mapping that it stands for"),
        ("a: {<<: 3}", "<< takes a mapping or a list of mappings"),
        ("1: a", "line 1, column 1: a key must be text"),
        ("[a]: b", "a key must be text"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: \x00", r"line 1, column 4: the character '\x00' is not allowed in YAML"),
        ("a: 1\nb: \x1b[31m", r"line 2, column 4: the character '\x1b' is not allowed in YAML"),
        ("a: 1\n\u00e9: \ud800", r"line 2, column 4: the character '\ud800' is not allowed in YAML"),
        ("\ta: 1", "line 1, column 1"),
        ('a: "x\\0"', "line 1, column 1: 'x\\x00' holds a NUL character"),
        ('a: ["\\ud800"]', "line 1, column 5: '\\ud800' holds a NUL character or half a surrogate pair"),
    ],
)
def test_text_that_is_refused(text, message):
    assert message in refusal(text)


def test_alias_bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert re.search(r"line \d+, column \d+: more than 100000 values, with aliases copied out$", refusal("\n".join(lines)))


def test_harmless_aliases_and_merge_keys():
    text = """\
merge_method: linear
models:
  - model: a
    parameters: &p {weight: 2}
  - model: b
    parameters: *p
  - model: c
    parameters: {<<: *p}
  - model: d
    parameters: {weight: 5, <<: [*p]}
"""
    assert resolve(parse_recipe(text), LINEAR).parameters_for("x", ["x"])["weight"] == [2.0, 2.0, 2.0, 5.0]


def test_control_characters_are_escaped():
    told = refusal('merge_method: x\n"\\e[31mred\\u202e": 1\nmodels: [{model: a}]')
    assert "\x1b" not in told and "\u202e" not in told
    assert r"\x1b[31mred\u202e" in told


RECIPE = "merge_method: linear\nmodels: [{model: a}]\n"
SLICES = "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("models: [{model: a}]", "line 1, column 1: 'merge_method' is missing"),
        ("merge_method: linear", "'models' is missing (or slices, or modules)"),
        ("merge_method: linear\nslices: []", "line 2, column 1: 'slices' is empty"),
        ("merge_method: linear\nmodules: {}", "line 2, column 1: 'modules' is empty"),
        (SLICES + "models: [{model: a}]", "line 2, column 1: a recipe has one of models, slices and modules: models is"),
        ("merge_method: linear\nslices: [{}]", "line 2, column 10: 'sources' is missing"),
        (SLICES.replace("layer_range: [0, 2]", ""), "'layer_range' is missing"),
        (SLICES.replace("[0, 2]", "[2, 2]"), "line 2, column 32: layer_range [2, 2] has no layers: its end is one after"),
        (SLICES.replace("[0, 2]", "[0, 2, 4]"), "layer_range is [first, one after the last], not [0, 2, 4]"),
        (SLICES.replace("[0, 2]", "[0, x]"), "layer_range is [first, one after the last], not [0, 'x']"),
        (SLICES.replace("[0, 2]", "[0, -1]"), "layer_range is [first, one after the last], not [0, -1]"),
        (SLICES.replace("model: a", "model: a, paramters: {}"), "unknown key 'paramters'; did you mean 'parameters'?"),
        (SLICES.replace("[{sources", "[{t: 1, sources"), "unknown key 't' (known here: sources, base_model"),
        ("merge_method: linear\nmodules: {m: {}}", "line 2, column 11: module 'm' needs models or slices, and not both"),
        ("merge_method: linear\nmodules: {m: {models: [{model: a}], z: 1}}", "unknown key 'z' (known here: models, slices"),
        (RECIPE + "layers: 'model.layers.'", "layers: 'model.layers.' needs {} once, where the number of the layer stands"),
        (RECIPE + "tokenizer: {sorce: a}", "line 3, column 13: unknown key 'sorce'; did you mean 'source'?"),
        (RECIPE + "tokenizer: {tokens: {x: {sorce: a}}}", "unknown key 'sorce'; did you mean 'source'?"),
        (RECIPE + "tokenizer: {tokens: {x: {source: {kind: none}}}}", "the source of a token is a model, {kind: zero}, or"),
        (RECIPE + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", "one of token and token_id"),
        (RECIPE + "tokenizer: {pad_to_multiple_of: 0}", "'pad_to_multiple_of' is out of range: 0"),
        (RECIPE + "tokenizer: {}\ntokenizer_source: base", "tokenizer and tokenizer_source exclude each other"),
        ("merge_method: linear\nmodels: []", "line 2, column 1: 'models' is empty"),
        ("merge_method: linear\nmodels: a", "'models' must be a list, not 'a'"),
        ("merge_method: linear\nmodels: [a]", "line 2, column 10: an entry of 'models' must be a mapping"),
        (
            "merge_method: linear\nmodels: [{model: a, modle: b}]",
            "line 2, column 21: unknown key 'modle'; did you mean",
        ),
        ("merge_method: linear\nmodels: [{model: 3}]", "line 2, column 11: 'model' must be text, not 3"),
        ("merge_method: linear\nmodels: [{model: ''}]", "'model' is empty"),
        ("merge_method: 1\nmodels: [{model: a}]", "line 1, column 1: 'merge_method' must be text, not 1"),
        ("merge_method:\nmodels: [{model: a}]", "'merge_method' must be text, not None"),
        (RECIPE + "paramters: {}", "line 3, column 1: unknown key 'paramters'; did you mean 'parameters'?"),
        (RECIPE + "zzz: 1", "line 3, column 1: unknown key 'zzz' (known here: merge_method, models, base_model"),
        (RECIPE + "parameters: [1]", "line 3, column 1: 'parameters' must be a mapping"),
        (RECIPE + "parameters: {weight: }", "line 3, column 14: 'weight' must be a number"),
        (RECIPE + "parameters: {weight: []}", "'weight' is empty"),
        (RECIPE + "parameters: {weight: [[1]]}", "'weight' must be a number"),
        (RECIPE + "parameters: {weight: [1, {value: 2}]}", "line 3, column 23: 'weight' must be"),
        (
            RECIPE + "parameters: {weight: {value: 1, filtre: a}}",
            "line 3, column 33: unknown key 'filtre'; did you mean",
        ),
        (RECIPE + "parameters: {weight: {filter: a}}", "'value' is missing"),
        (RECIPE + "parameters: {weight: {value: 1, filter: 2}}", "'filter' must be text, not 2"),
        (RECIPE + "parameters: {weight: {value: {value: 1}}}", "'value' must be a number"),
        (RECIPE + "parameters: {weight: [{value: [{value: 1}]}]}", "'value' must be a number"),
        (RECIPE + "dtype: int8", "'dtype' is one of bfloat16, float16, float32, float64, not 'int8'"),
        (RECIPE + "out_dtype: 3", "'out_dtype' is one of bfloat16, float16, float32, float64, not 3"),
        (RECIPE + "base_model: [a]", "'base_model' must be text, not ['a']"),
        (RECIPE + "seed: 3", "'seed' belongs to native recipes, which have refmerge: 1 at the top"),
        ("merge_method: linear\nmodels: [{model: a, stats: b}]", "'stats' belongs to native recipes"),
        (RECIPE + "refmerge: 2", "refmerge: 2 is not a version of the recipe format: only 1 is"),
        (RECIPE + "refmerge: true", "refmerge: True is not a version"),
        (RECIPE + "refmerge: 1.0", "refmerge: 1.0 is not a version"),
        (RECIPE + "refmerge: 1\nseed: -1", "'seed' is out of range: -1"),
        (RECIPE + "refmerge: 1\nseed: 1.5", "'seed' must be a whole number, not 1.5"),
        (RECIPE + "refmerge: 1\nover: row", "'over' is 'tensor' or 'model', not 'row'"),
        (RECIPE + "refmerge: 1\nwork_dtype: bfloat16", "'work_dtype' is 'float32' or 'float64', not 'bfloat16'"),
    ],
)
def test_schema(text, message):
    told = refusal(text)
    assert message in told
    assert "\n" not in told, "one problem, one line"


MAPPINGS = {
    "{model: a}": "a",
    "{model: {path: a}}": "a",
    "{model: {path: a, revision: v1}}": "a@v1",
    "{model: a, lora: b}": "a+b",
    "{model: a, lora: null}": "a",
    "{model: {path: a, revision: null}, lora: {path: b, revision: main}}": "a+b@main",
    "{model: a@v1, lora: b@v2}": "a@v1+b@v2",
}


@pytest.mark.parametrize("written", MAPPINGS)
def test_models_as_mappings(written):
    """As mergekit's ModelReference reads them, wherever a recipe names a model."""
    text = f"merge_method: linear\nmodels:\n  - {{model: {written}, parameters: {{weight: 1}}}}\n"
    more = f"base_model: {written}\ntokenizer: {{source: {written}, tokens: {{model: {{source: {written}}}, "
    more += f"z: {{source: {{kind: model_token, model: {written}, token: b}}}}}}}}\n"
    recipe = parse_recipe(text + more)
    name = MAPPINGS[written]
    assert resolve(recipe).models == (name,)
    plain = recipe.document.data
    assert plain["models"][0]["model"] == plain["base_model"] == plain["tokenizer"]["source"] == name
    assert plain["tokenizer"]["tokens"]["model"]["source"] == name
    assert plain["tokenizer"]["tokens"]["z"]["source"] == {"kind": "model_token", "model": name, "token": "b"}
    sliced = f"merge_method: passthrough\nslices: [{{sources: [{{model: {written}, layer_range: [0, 2]}}]}}]"
    assert resolve(parse_recipe(sliced)).models == (name,)
    assert json.loads(json.dumps(describe(resolve(parse_recipe(sliced)))))["slices"][0]["sources"][0]["model"] == name


@pytest.mark.parametrize(
    "written, message",
    [
        ("{}", "a model given as a mapping needs the key model: a path, or {path, revision}"),
        ("{lora: b}", "a model given as a mapping needs the key model"),
        ("{path: a}", "path belongs one level deeper: {model: {path: ..., revision: ...}, lora: ...}"),
        ("{model: a, revision: v1}", "revision belongs one level deeper"),
        ("{model: a, lroa: b}", "a model given as a mapping has the keys model and lora, and not 'lroa'"),
        ("{model: a, override_architecture: X}", "override_architecture has no place here"),
        ("{model: {path: a, rev: b}}", "model of a model given as a mapping has path and revision, and not 'rev'"),
        ("{model: {revision: b}}", "model of a model given as a mapping needs a path"),
        ("{model: {path: ''}}", "model of a model given as a mapping needs a path"),
        ("{model: a, lora: {path: 3}}", "path of lora must be text, not 3"),
        ("{model: {path: a, revision: 1.5}}", "revision of model must be text, not 1.5"),
        ("{model: a, lora: [b]}", "lora of a model given as a mapping is a path, or {path, revision}, not ['b']"),
        ("{model: 3}", "model of a model given as a mapping is a path, or {path, revision}, not 3"),
    ],
)
def test_mappings_that_are_no_models(written, message):
    told = refusal(f"merge_method: linear\nmodels: [{{model: {written}, parameters: {{weight: 1}}}}]")
    assert f"line 2, column 11: {message}" in told and "\n" not in told


def test_all_problems_at_once():
    text = """\
merge_method: 3
models:
  - model: a
    paramters: {}
  - model: {path: b}
    parameters: {wieght: 1}
dtype: int7
tokenizer_source: [union]
"""
    assert refusal(text).splitlines() == [
        "<recipe>: 5 problems",
        "  line 1, column 1: 'merge_method' must be text, not 3",
        "  line 4, column 5: unknown key 'paramters'; did you mean 'parameters'? (known here: model, parameters)",
        "  line 5, column 5: path belongs one level deeper: {model: {path: ..., revision: ...}, lora: ...}",
        "  line 7, column 1: 'dtype' is one of bfloat16, float16, float32, float64, not 'int7'",
        "  line 8, column 1: 'tokenizer_source' must be text, not ['union']",
    ]
    told = refusal(text.replace("merge_method: 3", "merge_method: liner"))
    assert "line 1, column 1: mergekit has no method 'liner'; did you mean 'linear'? (known here: " in told
    told = refusal(text.replace("merge_method: 3", "merge_method: linear"))
    assert "line 6, column 18: mergekit:linear has no parameter 'wieght'; did you mean 'weight'?" in told


def test_very_many_problems_are_counted():
    told = refusal(RECIPE + "\n".join(f"key{i}: 1" for i in range(50))).splitlines()
    assert told[0] == "<recipe>: 50 problems"
    assert told[-1] == "  and 30 more"
    assert len(told) == 22


def test_all_problems_of_resolution_at_once():
    text = """\
merge_method: ties
models:
  - model: a
    parameters: {densty: 1, weight: x}
  - model: a
parameters:
  normalise: true
"""
    told = refusal(text, TIES).splitlines()
    assert told[0] == "<recipe>: 6 problems"
    for part in ("needs a base_model", "'densty'", "weight = 'x'", "listed twice", "'normalise'", "weight for 'a'"):
        assert any(part in line for line in told), part


# --- files


def test_load(tmp_path):
    path = tmp_path / "r.yml"
    path.write_bytes(b"\xef\xbb\xbf" + E2E_01.encode())
    assert load_recipe(path).content.merge_method == "linear"
    assert load_recipe(str(path)).document.source == str(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "absent.yml")
    with pytest.raises(RecipeError, match=r"^'.*\\x1b.*No such file"):
        load_recipe(tmp_path / "\x1b[31m.yml")
    with pytest.raises(RecipeError, match="directory"):
        load_recipe(tmp_path)
    path = tmp_path / "r.yml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(byte 3\)"):
        load_recipe(path)
    path.write_bytes("ä".encode() * 600_000)
    with pytest.raises(RecipeError, match="larger than 1000000 bytes"):
        load_recipe(path)


def test_importing_refmerge_loads_no_recipe_reader():
    heavy = ("pydantic", "ruamel.yaml", "refmerge.recipe")
    code = f"import sys, refmerge; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples(path):
    """The examples that spec/ ships are recipes of methods that are registered."""
    names = names_of(6)
    for merge in resolve_all(load_recipes(path)):
        rules = [(merge.rules, len(merge.models))] if not merge.modules else []
        rules += [(s.rules, len(s.pieces)) for module in merge.modules for s in module.slices]
        for (rule, count), name in itertools.product(rules, names):
            registry.get(merge.method).bind(rule.for_tensor(name, names), count)


# --- anything at all

KEYS = ["merge_method", "models", "model", "parameters", "value", "filter", "dtype", "base_model", "refmerge", "<<"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "linear", "float32", "1e-5", "*", "a@b"])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*KEYS, "weight", "t"]) | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=20,
)


def accepts_or_refuses(text: str) -> None:
    try:
        recipe = parse_recipe(text)
        for method in (LINEAR, TIES, OTHER):
            try:
                given = resolve(recipe, method).parameters_for("model.layers.1.mlp.weight", names_of(3))
            except RecipeError:
                continue
            for value in given.get("weight", []):
                assert math.isfinite(value)
    except RecipeError as e:
        assert str(e)


@settings(deadline=None)
@given(ANYTHING)
def test_any_structure_is_read_or_refused(data):
    accepts_or_refuses(json.dumps(data))


@settings(deadline=None)
@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING, st.booleans())
def test_anything_inside_a_recipe_is_read_or_refused(shared, own, base, dtype, native):
    recipe = {"merge_method": "x", "models": [{"model": "a", "parameters": {"weight": own}}, {"model": "b"}]}
    recipe |= {"parameters": {"weight": shared}, "base_model": base, "dtype": dtype}
    accepts_or_refuses(json.dumps(recipe | ({"refmerge": 1} if native else {})))


@settings(deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@`<,?=~ \n\t0123456789.e\u2028\ufeff\x85", max_size=60))
def test_any_text_is_read_or_refused(text):
    accepts_or_refuses(text)


@settings(deadline=None)
@given(st.integers(0, len(E2E_03)), st.integers(0, 8), st.text(max_size=4))
def test_any_damage_to_a_recipe_is_read_or_refused(start, length, replacement):
    accepts_or_refuses(E2E_03[:start] + replacement + E2E_03[start + length :])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(2, 40))
def test_gradients_stay_between_their_values_and_meet_the_ends(values, layers):
    assert interpolate(values, position("a.0.b", layers)) == values[0]
    assert interpolate(values, position(f"a.{layers - 1}.b", layers)) == values[-1]
    for i in range(layers):
        assert min(values) - 1e-9 <= interpolate(values, position(f"a.{i}.b", layers)) <= max(values) + 1e-9
