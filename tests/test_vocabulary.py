"""Models of different vocabularies: whose row each token gets, what is written, and what is refused.

The rows of a model hold one number each, the model's number plus the row's, so that a result tells where it comes from.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge.checkpoint import open_checkpoint, save
from refmerge.errors import InputError, RecipeError, UsageError
from refmerge.recipe.run import prepare_recipe, run_recipe
from refmerge.recipe.tokenizers import read_vocabulary

TOKENS = {"a": ["<s>", "x", "y", "z"], "b": ["<s>", "z", "new", "x"], "c": ["<s>", "x", "new", "odd"]}
NUMBERS = {"a": 100, "b": 200, "c": 400}


def tokenizer(tokens, added=("<s>",), kind="BPE"):
    plain = {token: i for i, token in enumerate(tokens) if token not in added}
    entries = [
        {"id": tokens.index(token), "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for token in added
    ]  # fmt: skip
    vocab = plain if kind != "Unigram" else [[token, 0.0] for token in tokens]
    return {"version": "1.0", "added_tokens": entries, "model": {"type": kind, "vocab": vocab, "merges": []}}


def write(path, number, tokens, rows=None, dtype=np.float32, files=None, config=None, added=("<s>",), kind="BPE"):
    rows = len(tokens) if rows is None else rows
    by_row = (number + np.arange(rows, dtype=np.float32)).reshape(-1, 1).repeat(2, axis=1)
    tensors = {"model.embed_tokens.weight": by_row, "lm_head.weight": by_row + 0.5, "model.layers.0.w": np.ones(3)}
    files = dict(files or {})
    files["config.json"] = json.dumps({"vocab_size": rows} if config is None else config)
    if tokens:
        files["tokenizer.json"] = json.dumps(tokenizer(list(tokens), added, kind))
    extra = {name: content.encode() for name, content in files.items()}
    save({name: x.astype(dtype) for name, x in tensors.items()}, path, extra_files=extra, overwrite=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, tokens in TOKENS.items():
        write(name, NUMBERS[name], tokens)
    return tmp_path


def merge(recipe, tensor="model.embed_tokens.weight"):
    """token -> the number in its row, and the numbers of rows without a token."""
    with open("r.yml", "w") as file:
        file.write(recipe)
    result = run_recipe("r.yml", "out", overwrite=True)
    ids = read_vocabulary(open_checkpoint("out")).ids
    assert len(set(ids.values())) == len(ids)
    rows = result[tensor]
    assert (rows[:, 0] == rows[:, 1]).all()
    assert open_checkpoint("out").config["vocab_size"] == len(rows)
    numbers = [row[0].item() for row in rows]
    return {t: numbers[i] for t, i in ids.items()}, [x for i, x in enumerate(numbers) if i not in ids.values()]


SUM = "merge_method: linear\nparameters: {weight: 1, normalize: false}\nmodels: [{model: a}, {model: b}, {model: c}]\n"


@pytest.mark.parametrize("native", [False, True])
def test_the_union_of_all_tokens(folder, native):
    rows, padding = merge("refmerge: 1\n" * native + SUM + "tokenizer_source: union\n")
    assert rows == {
        "<s>": 100 + 200 + 400,
        "x": 101 + 203 + 401,
        "y": 3 * 102,  # only a has it: all get its row
        "z": 103 + 201 + (103 + 201) / 2,  # c gets the mean of those that have it
        "new": 202 + 402 + (202 + 402) / 2,
        "odd": 3 * 403,
    }
    assert padding == []
    assert merge("refmerge: 1\n" * native + SUM + "tokenizer_source: union\n", "lm_head.weight")[0]["y"] == 3 * 102.5
    ids = read_vocabulary(open_checkpoint("out")).ids
    assert [ids[t] for t in TOKENS["a"]] == [0, 1, 2, 3], "the base's tokens keep their numbers"
    assert {ids["new"], ids["odd"]} == {4, 5}


def test_a_base_that_has_a_token_gives_its_row(folder):
    rows, _ = merge(SUM + "base_model: b\ntokenizer_source: union\n")
    assert rows["z"] == 103 + 201 + 201
    assert rows["new"] == 202 + 202 + 402
    assert rows["y"] == 3 * 102


@pytest.mark.parametrize(("source", "base"), [("base", "b"), ("./b", "c"), ("b", None)])
def test_the_tokens_of_one(folder, source, base):
    rows, _ = merge(SUM + (f"base_model: {base}\n" if base else "") + f"tokenizer_source: {source}\n")
    assert rows.keys() == set(TOKENS["b"])
    assert rows["x"] == 101 + 203 + 401
    assert read_vocabulary(open_checkpoint("out")).ids == {t: i for i, t in enumerate(TOKENS["b"])}


def test_rules_for_tokens(folder):
    rows, padding = merge(
        SUM
        + """\
base_model: a
tokenizer:
  source: union
  pad_to_multiple_of: 4
  tokens:
    x: {source: c, force: true}
    new: {source: {kind: zero}}
    odd: {source: {kind: model_token, model: b, token: x}}
    fresh: {source: {kind: model_token, model: ./c, token_id: 3}}
    y: {source: a}
"""
    )
    assert rows["x"] == 3 * 401, "forced upon all"
    assert rows["new"] == 0 + 202 + 402, "zero where it is lacking"
    assert rows["odd"] == 203 + 203 + 403
    assert rows["fresh"] == 3 * 403
    assert rows["y"] == 3 * 102
    assert len(rows) == 7
    assert padding == pytest.approx([sum(rows.values()) / 7]), "a row more for a round number: the mean of all"


def test_tokens_that_the_tokenizer_has_more_than_the_model_rows(folder):
    write("a", 100, [*TOKENS["a"], "over"], rows=4)
    write("b", 200, [*TOKENS["b"], "beyond"], rows=4)
    rows, _ = merge(SUM + "base_model: a\ntokenizer_source: union\n")
    assert rows.keys() == {"<s>", "x", "y", "z", "new", "odd"}
    write("a", 100, [*TOKENS["a"], "over"], rows=4, kind="Unigram")
    with pytest.raises(InputError, match=r"a: its tokenizer has 1 tokens more than the model has rows, 'over' for one"):
        merge(SUM + "base_model: a\ntokenizer_source: union\n")


def test_rows_without_a_token(folder):
    """mergekit leaves them out; a native recipe keeps them, and new tokens take them first."""
    for name in "abc":
        write(name, NUMBERS[name], TOKENS[name], rows=7)
    rows, padding = merge(SUM + "base_model: a\ntokenizer_source: base\n")
    assert padding == [] and len(rows) == 4
    resolved, _ = prepare_recipe("r.yml")
    assert resolved.notes[-1].startswith("3 rows of a without a token are left out, as mergekit does; with refmerge: 1")
    native, padding = merge("refmerge: 1\n" + SUM + "tokenizer_source: base\n")
    assert {**native, "z": 0} == {**rows, "z": 0}, "of z the base's row there, and a mean here, where no base is declared"
    assert padding == [3 * i + 700 for i in (4, 5, 6)]
    native, padding = merge("refmerge: 1\n" + SUM + "tokenizer_source: union\n")
    assert padding == [3 * 6 + 700]
    assert native["odd"] == 3 * 403


def test_one_model_with_a_longer_table(folder):
    write("a", 100, TOKENS["a"], rows=6)
    rows, padding = merge("refmerge: 1\n" + SUM + "tokenizer_source: base\n")
    assert padding == [3 * 104, 3 * 105], "no other model has such rows: they are the first one's"
    assert rows["x"] == 101 + 203 + 401


def test_dtypes_are_rounded_once(folder):
    import ml_dtypes

    write("b", 201, TOKENS["b"], dtype=ml_dtypes.bfloat16)
    rows, _ = merge(SUM + "tokenizer_source: union\ndtype: bfloat16\nout_dtype: float32\n")
    # 103 and 202 are exact in bfloat16, 201 + 103 / 2 is 152.5 and there 152, and so are 402 (even), 403 -> 404.
    assert rows["z"] == 103 + 202 + 152
    assert rows["odd"] == 3 * 404


def test_a_model_without_a_tokenizer(folder):
    write("c", 400, None, rows=4)
    rows, _ = merge(SUM + "tokenizer_source: base\nbase_model: a\n")
    assert rows["y"] == 102 + 102 + 402
    resolved, _ = prepare_recipe("r.yml")
    assert "c has no tokenizer: its rows are taken to be those of a" in resolved.notes
    with pytest.raises(InputError, match=r"^c: has no tokenizer.json to say what its rows are"):
        merge("refmerge: 1\n" + SUM + "tokenizer_source: base\n")
    with pytest.raises(InputError, match=r"^c: has no tokenizer.json, and the others' tokens are brought"):
        merge(SUM + "tokenizer_source: base\nbase_model: c\n")


def test_slices_have_the_rows_of_their_own_models(folder):
    rows, _ = merge("""\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: c, layer_range: [0, 1]}]
tokenizer_source: union
""")
    assert rows == {"<s>": 100, "x": 101, "y": 102, "z": 103, "new": 0, "odd": 0}, "a has no row of the last two"
    out = open_checkpoint("out")
    head = {token: out["lm_head.weight"][i, 0] for token, i in read_vocabulary(out).ids.items()}
    assert head == {"<s>": 400.5, "x": 401.5, "y": 0, "z": 0, "new": 402.5, "odd": 403.5}


def test_which_tensors_have_a_row_for_each_token(folder):
    for name in "ab":
        tensors = {
            "embed.weight": np.full((4, 2), NUMBERS[name]), "embed_positions.weight": np.full((4, 2), NUMBERS[name]),
            "model.layers.0.proj.weight": np.full((4, 2), NUMBERS[name]), "norm.weight": np.full(4, NUMBERS[name]),
        }  # fmt: skip
        files = {"config.json": b'{"text_config": {"vocab_size": 4}}', "tokenizer.json": json.dumps(tokenizer(TOKENS[name]))}
        extra = {n: x if isinstance(x, bytes) else x.encode() for n, x in files.items()}
        save({n: x.astype(np.float32) for n, x in tensors.items()}, name, extra_files=extra, overwrite=True)
    text = SUM.replace(", {model: c}", "") + "tokenizer_source: union\n"
    (folder / "r.yml").write_text(text)
    shapes = {n: x.shape[0] for n, x in run_recipe("r.yml", "out").items()}
    assert shapes == {"embed.weight": 5, "embed_positions.weight": 4, "model.layers.0.proj.weight": 4, "norm.weight": 4}
    assert json.loads((folder / "out/config.json").read_text()) == {"text_config": {"vocab_size": 5}}
    (folder / "r.yml").write_text(text + "vocabulary: ['*.proj.*']\n")
    shapes = {n: x.shape[0] for n, x in run_recipe("r.yml", "out", overwrite=True).items()}
    assert shapes == {"embed.weight": 4, "embed_positions.weight": 4, "model.layers.0.proj.weight": 5, "norm.weight": 4}


def test_files_of_the_tokenizer(folder):
    config = {"added_tokens_decoder": {"0": {"content": "<s>"}}, "chat_template": "old", "x": 1}
    write("a", 100, TOKENS["a"], files={
        "tokenizer_config.json": json.dumps(config), "vocab.json": "{}", "merges.txt": "", "LICENSE": "free",
        "generation_config.json": "{}", "chat_template.jinja": "A",
    })  # fmt: skip
    for name in "bc":
        write(name, NUMBERS[name], TOKENS[name], files={"chat_template.jinja": f"{name} {{{{ x }}}}", "merges.txt": name})
    merge(SUM + "tokenizer_source: union\n")
    names = {p.name for p in (folder / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json", "chat_template.jinja"} <= names
    assert not names & {"vocab.json", "merges.txt"}, "they know nothing of the new tokens"
    settings = json.loads((folder / "out/tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"].keys() == {"0", "4", "5"} and settings["chat_template"] == "old"
    merge(SUM + "tokenizer_source: b\nbase_model: a\nchat_template: auto\n")
    names = {p.name for p in (folder / "out").iterdir()}
    assert (folder / "out/merges.txt").read_text() == "b", "all of b's, and nothing of a's"
    assert "vocab.json" not in names and "LICENSE" in names and "tokenizer_config.json" not in names
    assert (folder / "out/chat_template.jinja").read_text() == "A", "each has one of its own: the first one's"
    merge(SUM + "tokenizer_source: base\nbase_model: a\nchat_template: '{{ 1 }}'\n")
    assert (folder / "out/chat_template.jinja").read_text() == "{{ 1 }}"
    assert "chat_template" not in json.loads((folder / "out/tokenizer_config.json").read_text())


def test_numbers_of_tokens_mean_the_same_tokens(folder):
    config = {"vocab_size": 4, "eos_token_id": [0, 3], "pad_token_id": 2, "bos_token_id": None}
    config["text_config"] = {"x_token_id": 1}
    generation = {"eos_token_id": 3, "max_length": 3}
    write("a", 100, TOKENS["a"], config=config, files={"generation_config.json": json.dumps(generation)})
    merge(SUM + "base_model: a\ntokenizer_source: b\n")
    written = json.loads((folder / "out/config.json").read_text())
    # a's 3 is z, which is b's 1; its 1 is x, b's 3; y is not in b.
    assert written == {**config, "eos_token_id": [0, 1], "text_config": {"x_token_id": 3}}
    assert json.loads((folder / "out/generation_config.json").read_text()) == {"eos_token_id": 1, "max_length": 3}
    told = prepare_recipe("r.yml")[0].notes
    assert "config.json: eos_token_id is 1 now, not 3, for 'z'" in told
    assert "config.json: pad_token_id is the number of 'y', which the result does not have: unchanged" in told
    merge(SUM + "base_model: a\ntokenizer_source: union\n")
    assert json.loads((folder / "out/config.json").read_text()) == {**config, "vocab_size": 6}


PLAIN = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"


def test_differences_without_an_instruction(folder):
    """Of the same size: mergekit merges them by number, and says nothing. Of other sizes nobody can."""
    (folder / "r.yml").write_text(PLAIN)
    resolved, _ = prepare_recipe("r.yml")
    assert len(resolved.notes) == 1 and "their rows are merged by number, as mergekit does" in resolved.notes[0]
    (folder / "r.yml").write_text("refmerge: 1\n" + PLAIN)
    with pytest.raises(InputError) as caught:
        prepare_recipe("r.yml")
    assert str(caught.value).splitlines() == [
        "the models' tokens differ, and the recipe does not say what to do: tokenizer_source: base, union or a model's path "
        "brings them into one order; tokenizer_source: rows merges the rows as they are",
        "  model  rows  tokens  not in the first  missing here  other number",
        "  a         4       4                 0             0             0",
        "  b         4       4                 1             1             2",
    ]
    (folder / "r.yml").write_text("refmerge: 1\n" + PLAIN + "tokenizer_source: rows\n")
    assert run_recipe("r.yml", "out")["model.embed_tokens.weight"][1, 0] == (101 + 201) / 2
    write("b", 200, [*TOKENS["b"], "more"])
    (folder / "r.yml").write_text(PLAIN)
    with pytest.raises(InputError, match=r"different sizes, and the recipe does not say what to do: tokenizer_source: base"):
        prepare_recipe("r.yml")


@pytest.mark.parametrize(
    "more, error, message",
    [
        ("tokenizer: {tokens: {z: {}}}", UsageError, "token 'z' has no source, and c lack it"),
        ("tokenizer: {tokens: {x: {force: true}}}", UsageError, "token 'x' has no source, and force wants one"),
        ("tokenizer: {tokens: {y: {source: b}}}", UsageError, "b has no token 'y', the source of 'y'"),
        ("tokenizer: {tokens: {y: {source: d}}}", UsageError, "the source of token 'y', 'd', is not merged where its"),
        (
            "tokenizer: {tokens: {y: {source: {kind: model_token, model: a, token_id: 4}}}}",
            UsageError,
            "a has 4 rows, none with token_id 4",
        ),
        ("tokenizer_source: absent", InputError, "absent'?: no such file or directory"),
        ("tokenizer_source: base\nvocabulary: [none]", InputError, r"a: no tensor has a row for each of the 4 tokens"),
        ("chat_template: chatlm", UsageError, "chat_template 'chatlm' is no Jinja text and none of auto, alpaca, chatml"),
        ("tokenizer_source: union\ntokenizer: {}", RecipeError, "exclude each other"),
    ],
)
def test_what_cannot_be(folder, more, error, message):
    with pytest.raises(error, match=message) as caught:
        merge(SUM + more + "\n")
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"model": {"vocab": {"x": "1"}}}', '{"model": {"vocab": 3}}'])
def test_files_that_are_no_tokenizers(folder, content):
    (folder / "b/tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json|JSON"):
        merge(SUM + "tokenizer_source: union\n")


def test_a_tokenizer_in_another_form(folder):
    write("b", 200, None, rows=4, files={"tokenizer.model": "x"})
    with pytest.raises(InputError, match=r"^b: its tokenizer is only in tokenizer.model: tokens are compared by"):
        merge(SUM + "tokenizer_source: union\n")


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True)


@settings(max_examples=20)
@given(WORDS, WORDS, st.booleans(), st.sampled_from([1, 4]), st.integers(0, 2))
def test_any_two_vocabularies(tmp_path_factory, one, other, native, step, spare):
    """What all have is merged with itself; every token of either has a row, and it is that of those that have it."""
    folder = tmp_path_factory.mktemp("any")
    write(folder / "p", 10, one, rows=len(one) + spare, added=())
    write(folder / "q", 50, other, added=())
    text = "refmerge: 1\n" * native + "merge_method: linear\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 1}\n"
    text = text % ((("p", "q")) if native else (folder / "p", folder / "q"))
    (folder / "r.yml").write_text(text + f"tokenizer: {{source: union, pad_to_multiple_of: {step}}}\n")
    result = run_recipe(folder / "r.yml", folder / "out")["model.embed_tokens.weight"]
    ids = read_vocabulary(open_checkpoint(folder / "out")).ids
    assert ids.keys() == {*one, *other}
    assert len(result) % step == 0 and len(result) >= (len(one) + spare if native else len(ids))
    for token, i in ids.items():
        own = [10 + one.index(token)] if token in one else []
        own += [50 + other.index(token)] if token in other else []
        assert result[i, 0] == sum(own) / len(own)
