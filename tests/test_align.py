"""Recipes that align their models before they merge them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
from click.testing import CliRunner

import refmerge
from refmerge import registry
from refmerge.checkpoint import journal, open_checkpoint, save, writer
from refmerge.cli import main
from refmerge.errors import InputError, RecipeError, UsageError
from refmerge.nets import llama, mlp
from refmerge.procedure import Procedure
from refmerge.procedures.alignment import git_rebasin
from refmerge.recipe import describe, parse_recipe, resolve, schema_json
from refmerge.recipe.run import prepare_recipe
from refmerge.symmetry import Slices, Spec, architectures

RECIPE = """\
refmerge: 1
merge_method: linear
models: [{model: ./a}, {model: ./b}]
align:
  method: sorted
"""
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}


class Result:
    def __init__(self, models):
        self.models = models


@pytest.fixture
def aligner(monkeypatch, tmp_path):
    """A procedure that brings units into the order of the first model's by the order of their norms, and its calls."""
    calls, known = [], registry.procedure
    canonicalize = known("canonicalize")

    def run(models, spec, *, order: float = 1.0, among: Sequence[int] | None = None):
        calls.append(([m.path.name for m in models], order, among))
        first = canonicalize(models[0], spec, scales=None)
        found = [models[0]]
        for i, model in enumerate(models[1:]):
            here = spec.apply(spec.invert(first.permutations), canonicalize(model, spec, scales=None).model)
            save(here, tmp_path / f"aligned{i}.safetensors", overwrite=True)
            found.append(open_checkpoint(tmp_path / f"aligned{i}.safetensors"))
        return Result(found)

    def procedure(name):
        return Procedure(name, run, "") if name == "sorted" else known(name)

    monkeypatch.setattr(registry, "procedure", procedure)
    return calls


def shuffled(folder, model, spec, config=None):
    """A model, the same one in another order, and how far apart they are."""
    other = spec.apply(spec.random(model, np.random.default_rng(1)), model)
    for name, tensors in (("a", model), ("b", other)):
        save(tensors, folder / name)
        if config:
            (folder / name / "config.json").write_text(json.dumps(config))
    return other


def run(folder, text, **options):
    (folder / "recipe.yml").write_text(text)
    return dict(refmerge.run_recipe(folder / "recipe.yml", folder / "merged", **options))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_models_are_aligned_before_they_are_merged(tmp_path, aligner):
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    shuffled(tmp_path, model, architectures.mlp(model))
    assert same(run(tmp_path, RECIPE), model)
    assert aligner == [(["a", "b"], 1.0, None)]
    plain = run(tmp_path, RECIPE.partition("align:")[0], overwrite=True)
    assert not same(plain, model)


def test_the_model_that_stays_and_parameters(tmp_path, aligner):
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    other = shuffled(tmp_path, model, architectures.mlp(model))
    text = RECIPE + "  to: b\n  spec: mlp\n  parameters: {order: 2, among: [1, 2]}\n"
    assert same(run(tmp_path, text), other)
    assert aligner == [(["b", "a"], 2, [1, 2])]


def test_the_base_stays_where_nothing_else_is_said(tmp_path, aligner):
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    spec = architectures.mlp(model)
    shuffled(tmp_path, model, spec)
    base = spec.apply(spec.random(model, np.random.default_rng(2)), model)
    save(base, tmp_path / "base")
    text = RECIPE.replace("linear", "task_arithmetic\nbase_model: ./base")
    merged = run(tmp_path, text)
    assert same(merged, base)  # no model differs from it but in the order of its units
    assert aligner == [(["base", "a", "b"], 1.0, None)]
    merged = run(tmp_path, text + "  to: ./a\n", overwrite=True)
    assert same(merged, model) and aligner[1][0] == ["a", "base", "b"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_transformer_with_its_config(tmp_path, aligner, threads):
    model = {n: x.astype(np.float32) for n, x in llama.init(np.random.default_rng(0), 4, 2).items()}
    shuffled(tmp_path, model, architectures.llama(model, 4, 2), CONFIG)
    assert same(run(tmp_path, RECIPE, threads=threads), model)


def test_a_plan_reads_no_weight(tmp_path, aligner):
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    shuffled(tmp_path, model, architectures.mlp(model))
    (tmp_path / "recipe.yml").write_text(RECIPE)
    resolved, plan = prepare_recipe(tmp_path / "recipe.yml")
    assert aligner == [] and plan.before is not None
    assert describe(resolved)["align"] == {"method": "sorted", "to": "./a", "spec": {}, "parameters": {}}
    told = CliRunner().invoke(main, ["plan", str(tmp_path / "recipe.yml"), "--no-time"])
    assert told.exit_code == 0, told.output
    said = r"^aligned +to ./a by sorted, before anything else\n +1,020 multiplications .*, 392 B for the largest matrix;"
    assert re.search(said, told.output, re.MULTILINE)
    assert aligner == []


def test_models_that_the_spec_does_not_fit(tmp_path, aligner):
    rng = np.random.default_rng(0)
    model = mlp.init(rng, [5, 7, 6, 4])
    shuffled(tmp_path, model, architectures.mlp(model))
    with pytest.raises(UsageError, match="resnet: the model has no tensor"):
        run(tmp_path, RECIPE + "  spec: resnet\n")
    attention = llama.init(rng, 4, 2)
    for name in "ab":
        save(attention, tmp_path / name, overwrite=True)
    with pytest.raises(UsageError, match="how many heads there are"):
        run(tmp_path, RECIPE)
    assert aligner == []


@pytest.mark.parametrize(
    "align, message",
    [
        ("{}", "line 4, column 1: 'method' is missing"),
        ("{method: rebasin}", "no procedure 'rebasin'"),
        ("{method: canonicalize}", "canonicalize does not align models"),
        ("{method: sorted, to: c}", "'c' is none of the models"),
        ("{method: sorted, spec: lama}", "'spec' is 'mlp', 'vgg', .* not 'lama'"),
        ("{method: sorted, parameters: {sweps: 1}}", r"sorted has no parameter 'sweps' \(known here: order, among\)"),
        ("{method: sorted, parameters: {order: {value: 1}}}", "'order' must be a number, true or false, text, or a list"),
        ("{method: sorted, over: 1}", r"unknown key 'over' \(known here: method, spec, to, parameters\)"),
        ("sorted", "'align' must be a mapping"),
        ("{method: sorted, spec: {head: 4}}", r"unknown key 'head'; did you mean 'heads'"),
        ("{method: sorted, spec: {heads: 0}}", "'heads' is out of range: 0"),
        ("{method: pleas}", "pleas needs similarity too, which a recipe cannot give: call it in Python"),
        ("{method: git_rebasin, parameters: {progress: 3}}", r"'progress' of git_rebasin cannot be set in a recipe \(what"),
        ("{method: git_rebasin, parameters: {out: x}}", "'out' of git_rebasin cannot be set in a recipe"),
        ("{method: git_rebasin, parameters: {weight: [1, 2]}}", "'weight' of git_rebasin cannot be set in a recipe"),
        ("{method: git_rebasin, parameters: {start: [1]}}", "'start' of git_rebasin cannot be set in a recipe"),
        ("{method: git_rebasin, parameters: {sweeps: x}}", "'sweeps' of git_rebasin must be a whole number, not 'x'"),
        ("{method: git_rebasin, parameters: {sweeps: true}}", "'sweeps' of git_rebasin must be a whole number, not True"),
        ("{method: git_rebasin, parameters: {by: weigth}}", "'by' of git_rebasin must be one of 'weights', .*'weigth'"),
        ("{method: git_rebasin, parameters: {leave: bias}}", "'leave' of git_rebasin must be a list, not 'bias'"),
        ("{method: otfusion, parameters: {exact: 1}}", "'exact' of otfusion must be true or false, not 1"),
    ],
)
def test_what_is_refused(aligner, align, message):
    text = RECIPE.partition("align:")[0] + f"align: {align}\n"
    with pytest.raises(RecipeError, match=message):
        resolve(parse_recipe(text))


@pytest.mark.parametrize(
    "parameters, message",
    [
        ("sweeps: 0", "sweeps = 0 is no whole number above 0"),
        ("by: activations", "activations go with by='activations'"),
        ("by: straight_through", "straight_through takes gradient"),
        ("order: [layers.0]", r"order names \['layers.0'\]: each of layers.0, layers.1 once"),
    ],
)
def test_a_plan_says_what_the_procedure_would(tmp_path, parameters, message):
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    shuffled(tmp_path, model, architectures.mlp(model))
    (tmp_path / "recipe.yml").write_text(RECIPE.replace("sorted", "git_rebasin") + f"  parameters: {{{parameters}}}\n")
    with pytest.raises(UsageError, match=message):
        prepare_recipe(tmp_path / "recipe.yml")


def test_what_tensors_do_not_tell_is_in_the_recipe(tmp_path, aligner):
    """Heads of a model without config, and the layers of an autoencoder, whose names come in another order."""
    model = llama.init(np.random.default_rng(0), 4, 2)
    shuffled(tmp_path, model, architectures.llama(model, 4, 2))
    assert same(run(tmp_path, RECIPE + "  spec: {heads: 4, groups: 2}\n"), model)
    with pytest.raises(UsageError, match=r"are not 3 parts of one size"):
        run(tmp_path, RECIPE + "  spec: {heads: 3, groups: 2}\n", overwrite=True)
    with pytest.raises(UsageError, match=r"llama has no layers to be given \(known here: heads, groups\)"):
        run(tmp_path, RECIPE + "  spec: {heads: 4, layers: [a]}\n", overwrite=True)
    draw = np.random.default_rng(0).standard_normal
    model = {"encoder.weight": draw((3, 6)), "encoder.bias": draw(3), "decoder.weight": draw((6, 3))}
    spec = architectures.mlp(model, ["encoder", "decoder"])
    other = spec.apply({"encoder": np.array([2, 0, 1])}, model)
    for name, tensors in (("a", model), ("b", other)):
        save(tensors, tmp_path / name, overwrite=True)
    with pytest.raises(UsageError, match="names do not tell in which order decoder, encoder come: give layers"):
        run(tmp_path, RECIPE, overwrite=True)
    assert same(run(tmp_path, RECIPE + "  spec: {layers: [encoder, decoder]}\n", overwrite=True), model)


def test_a_spec_in_the_recipe(tmp_path, aligner):
    """Blocks of a network that is none of those known, with two gates in one tensor."""
    draw = np.random.default_rng(0).standard_normal
    model = {"in": draw((4, 3)), "blocks.0.up": draw((10, 4)), "blocks.0.down": draw((4, 5)), "steps": np.array(3)}
    model |= {"blocks.1.up": draw((6, 4)), "blocks.1.down": draw((4, 3))}
    halves, text = Slices(["h.0", "h.0"]), RECIPE + """  spec:
    axes:
      in: [stream, null]
      blocks.{l}.up: [{slices: ["h.{l}", "h.{l}"]}, stream]
      blocks.{l}.down: [stream, "h.{l}"]
"""
    axes = {"in": ("stream", None), "blocks.0.up": (halves, "stream"), "blocks.0.down": ("stream", "h.0"), "steps": None}
    axes |= {"blocks.1.up": (Slices(["h.1", "h.1"]), "stream"), "blocks.1.down": ("stream", "h.1")}
    shuffled(tmp_path, model, Spec(axes))
    with pytest.raises(UsageError, match="spec: tensor 'steps' is not declared"):
        run(tmp_path, text)
    assert same(run(tmp_path, text + "      steps: null\n"), model)
    with pytest.raises(RecipeError, match=r"line 11, column 7: .*'block': 'h'.* is no entry of an axis"):
        run(tmp_path, text + "      steps: [{block: h}]\n", overwrite=True)
    with pytest.raises(RecipeError, match="nothing else goes with them"):
        run(tmp_path, text + "    heads: 2\n", overwrite=True)
    with pytest.raises(UsageError, match=r"'stream' has 4 units by axis 0 of 'blocks.0.down' and 3 by axis 1 of 'in'"):
        run(tmp_path, text.replace("[stream, null]", "[null, stream]") + "      steps: []\n", overwrite=True)


def test_models_of_other_heads(tmp_path, aligner):
    """Four heads of eight are two of sixteen by their shapes; their spec is another one."""
    model = llama.init(np.random.default_rng(0), 4, 2)
    shuffled(tmp_path, model, architectures.llama(model, 4, 2), CONFIG)
    other = {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "llama"}
    (tmp_path / "b" / "config.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match=r"the config.json of ./b has other heads than that of ./a"):
        run(tmp_path, RECIPE)
    assert aligner == []


def test_models_of_other_tensors(tmp_path, aligner):
    """A head that is the embedding, and one that is stored: as a merge that would leave it out."""
    model = llama.init(np.random.default_rng(0), 4, 2)
    shuffled(tmp_path, model, architectures.llama(model, 4, 2), CONFIG)
    tied = {n: x for n, x in open_checkpoint(tmp_path / "b").items() if n != "lm_head.weight"}
    config = json.dumps(CONFIG).encode()
    save(tied, tmp_path / "b", overwrite=True, extra_files={"config.json": config})
    with pytest.raises(UsageError, match=r"tensor 'lm_head.weight' is in ./a and not in ./b: aligned models"):
        run(tmp_path, RECIPE, missing="skip")
    assert aligner == []


def test_tokens_that_differ(tmp_path, aligner):
    """The order of units says nothing of that of tokens: it has to be asked for that rows are merged as they are."""
    model = {n: x.astype(np.float32) for n, x in llama.init(np.random.default_rng(0), 4, 2).items()}
    shuffled(tmp_path, model, architectures.llama(model, 4, 2), CONFIG)
    for name, words in (("a", "abcdefghijk"), ("b", "kbcdefghija")):
        vocabulary = {"model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "a"}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match="the models' tokens differ"):
        run(tmp_path, RECIPE)
    assert same(run(tmp_path, RECIPE + "tokenizer_source: rows\n"), model)


def test_what_the_report_says(tmp_path):
    """Which units moved, and what is gained: the norm of the model, where it is matched with itself."""
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    spec = architectures.mlp(model)
    other = spec.apply({"layers.0": np.array([1, 0, 2, 3, 4, 5, 6])}, model)
    for name, tensors in (("a", model), ("b", other)):
        save(tensors, tmp_path / name)
    (tmp_path / "recipe.yml").write_text(RECIPE.replace("sorted", "git_rebasin"))
    _, plan = prepare_recipe(tmp_path / "recipe.yml")
    said = []
    plan.before.progress = said.append
    assert plan.before.told() == {} and plan.before.matrix == 8 * 7 * 7
    assert plan.before.products == 7 * (7 * 5 + 7 + 6 * 7) + 6 * (6 * 7 + 6 + 4 * 6)
    plan.run(tmp_path / "merged")
    told = json.loads((tmp_path / "merged" / "refmerge_report.json").read_text())["alignment"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Units were brought into the order of `./a` by `git_rebasin` before." in card
    objective = [sum(np.vdot(model[n], m[n]) for n in model) for m in (other, model)]
    assert told == {"./b": {"moved": {"layers.0": "2 of 7"}, "objective": pytest.approx(objective, rel=1e-5)}}
    assert {line.partition(", layers")[0] for line in said} == {f"git_rebasin: ./b, sweep {i}" for i in (0, 1)}


def test_an_interrupted_merge_goes_on_with_its_permutations(tmp_path, monkeypatch):
    """The bytes of one that was not interrupted, report and all, and units are not matched twice."""
    model = {n: x.astype(np.float32) for n, x in llama.init(np.random.default_rng(0), 4, 2).items()}
    shuffled(tmp_path, model, architectures.llama(model, 4, 2), CONFIG)
    text = RECIPE.replace("sorted", "git_rebasin")
    run(tmp_path, text, threads=1)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    shutil.rmtree(tmp_path / "merged")
    note, matched = journal.Journal.note, []

    def stopping(self, names):
        note(self, names)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "NOTE_SECONDS", 0.0)
        patch.setattr(journal.Journal, "note", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, text, threads=1, resume=True)
    assert not (tmp_path / "merged").exists() and len(list(tmp_path.glob(".merged*.stages/alignment.safetensors"))) == 1
    monkeypatch.setattr(git_rebasin, "weight_matching", lambda *args, **_: matched.append(args))
    with pytest.raises(UsageError, match="is of another merge"):
        run(tmp_path, text + "  parameters: {sweeps: 3}\n", threads=1, resume=True)
    (tmp_path / "recipe.yml").write_text(text)
    run(tmp_path, text, threads=1, resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == whole
    assert matched == [] and not list(tmp_path.glob(".merged*"))


def test_other_alignments_start_anew(tmp_path):
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    shuffled(tmp_path, model, architectures.mlp(model))
    with pytest.raises(UsageError, match=r"not for .* what is aligned first by other than permutations"):
        run(tmp_path, RECIPE.replace("sorted", "otfusion"), resume=True)
    merged = run(tmp_path, RECIPE.replace("sorted", "otfusion"))
    assert all(np.allclose(merged[n], model[n], rtol=0, atol=1e-12) for n in model)


def test_it_belongs_to_native_recipes():
    with pytest.raises(RecipeError, match="'align' belongs to native recipes"):
        parse_recipe(RECIPE.replace("refmerge: 1\n", ""))
    assert "Align" in schema_json()["$defs"]


def test_what_gives_no_checkpoints(tmp_path, aligner, monkeypatch):
    model = mlp.init(np.random.default_rng(0), [5, 7, 6, 4])
    shuffled(tmp_path, model, architectures.mlp(model))

    def in_memory(models, spec):
        return Result([dict(m) for m in models])

    monkeypatch.setattr(registry, "procedure", lambda name: Procedure(name, in_memory, ""))
    with pytest.raises(UsageError, match="sorted gives no checkpoints"):
        run(tmp_path, RECIPE)
    assert not (tmp_path / "merged").exists()


@pytest.mark.skipif("git_rebasin" not in registry.procedures(), reason="git_rebasin is not here")
@pytest.mark.parametrize("architecture", ["mlp", "llama"])
def test_git_rebasin_in_a_recipe(tmp_path, architecture):
    """A model and the same one in another order average to the model, in a merge by processes."""
    rng = np.random.default_rng(0)
    model = mlp.init(rng, [5, 7, 6, 4]) if architecture == "mlp" else llama.init(rng, 4, 2)
    spec = architectures.detect(model, CONFIG)
    shuffled(tmp_path, model, spec, CONFIG if architecture == "llama" else None)
    text = RECIPE.replace("sorted", "git_rebasin") + "  parameters: {sweeps: 20}\n"
    merged = run(tmp_path, text, threads=2)
    if architecture == "mlp":
        assert same(merged, model)
    else:  # sweeps may end in another optimum, of a model with the same function all the same
        batch = np.array([[3, 1, 4, 1, 5, 9]])
        forward = [llama.forward(m, batch, heads=4, groups=2) for m in (model, merged)]
        assert np.isfinite(forward[1]).all()
