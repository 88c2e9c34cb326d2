"""Mixtures of experts made of dense models: names and bytes, transformers' own functions, routers, recipes, and refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import refmerge
from refmerge import InputError, UsageError
from refmerge.checkpoint import open_checkpoint, save
from refmerge.cli import main
from refmerge.errors import RecipeError
from refmerge.nets import llama
from refmerge.procedures.experts._gates import encoder, hidden, options
from refmerge.procedures.experts.moe_from_dense import Expert, moe_from_dense, prepare

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 11}
TYPES = {"llama": {}, "mistral": {}, "qwen2": {"bias": True}, "qwen3": {"head_norms": True}}
WORDS = ("[UNK]", "<s>", "add", "the", "numbers", "write", "a", "poem", "about", "rain", "now")


def dense(folder: Path, seed: int, kind: str = "llama", dtype=np.float32, **more) -> Path:
    """A small model as transformers has them, with a tokenizer of whole words."""
    draw = np.random.default_rng(seed)
    params = llama.init(draw, 4, 2, 2, head_width=4, width=16, hidden=24, **TYPES[kind])
    folder.mkdir()
    save({n: x.astype(dtype) for n, x in params.items()}, folder / "model.safetensors")
    config = {"model_type": kind, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "head_dim": 4, "torch_dtype": "float32"}
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config |= {"architectures": [f"{names[kind]}ForCausalLM"], "max_position_embeddings": 64, **SIZES, **more}
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = dict(zip(WORDS, range(11)))
    tokenizer = {
        "version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "decoder": None, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    return folder


@pytest.fixture
def models(tmp_path):
    return [dense(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b"))]


def tokens(seed=0, shape=(2, 6)):
    return np.random.default_rng(seed).integers(0, 11, shape)


# --- Names and bytes --------------------------------------------------------------------------------------------------

ROUTERS = {"mixtral": "block_sparse_moe", "qwen": "mlp", "qwen3": "mlp"}


@pytest.mark.parametrize("kind", TYPES)
def test_every_tensor_has_its_place(tmp_path, kind):
    base, a, b = (dense(tmp_path / n, i, kind, ml_dtypes.bfloat16) for i, n in enumerate(("base", "a", "b")))
    shared = [b] if kind == "qwen2" else []
    out = moe_from_dense(base, [a, b], tmp_path / "out", gate_mode="random", shared_experts=shared)
    form = {"qwen2": "qwen", "qwen3": "qwen3"}.get(kind, "mixtral")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if form == "mixtral" else {}
    expected = {n: ("base", n) for n in open_checkpoint(base) if ".mlp." not in n}
    for i in range(2):
        layer = f"model.layers.{i}"
        for p in ("gate_proj", "up_proj", "down_proj"):
            for e, name in enumerate("ab"):
                own = f"{layer}.{ROUTERS[form]}.experts.{e}.{names.get(p, p)}.weight"
                expected[own] = (name, f"{layer}.mlp.{p}.weight")
            if shared:
                expected[f"{layer}.mlp.shared_expert.{p}.weight"] = ("b", f"{layer}.mlp.{p}.weight")
    routers = {f"model.layers.{i}.{ROUTERS[form]}.gate.weight": (2, 16) for i in range(2)}
    if shared:
        routers |= {f"model.layers.{i}.mlp.shared_expert_gate.weight": (1, 16) for i in range(2)}
    assert {*out} == {*expected} | {*routers}
    for name, (model, there) in expected.items():
        assert out[name].tobytes() == open_checkpoint(tmp_path / model)[there].tobytes()
    for name, shape in routers.items():
        assert out[name].shape == shape and out[name].dtype == ml_dtypes.bfloat16
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_the_config(models, tmp_path):
    config = moe_from_dense(models[0], models, tmp_path / "o", gate_mode="random", dtype="bfloat16").config
    assert config["model_type"] == "mixtral" and config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["sliding_window"]) == (3, 2, None)
    assert config["rope_theta"] == 10000.0 and config["torch_dtype"] == "bfloat16" and config["rms_norm_eps"] == 1e-5
    assert {x.dtype for x in open_checkpoint(tmp_path / "o").tensors.values()} == {"BF16"}
    windowed = dense(tmp_path / "w", 0, "mistral", sliding_window=7)
    assert prepare(windowed, [windowed] * 2, gate_mode="random").config["sliding_window"] == 7
    silent = dense(tmp_path / "s", 0, "mistral")
    assert prepare(silent, [silent] * 2, gate_mode="random").config["sliding_window"] == 4096


def test_noise_and_scale(models, tmp_path):
    base, a, _ = models
    given = [Expert(a, noise_scale=0.5, residual_scale=2.0), Expert(a, residual_scale=-1)]
    out = moe_from_dense(base, given, tmp_path / "o", gate_mode="random", seed=3)
    again = moe_from_dense(base, given, tmp_path / "p", gate_mode="random", seed=3)
    other = moe_from_dense(base, given, tmp_path / "q", gate_mode="random", seed=4)
    there = open_checkpoint(a)
    at = "model.layers.0.block_sparse_moe"
    for name, source, scale in (("w1", "gate_proj", 1), ("w2", "down_proj", 2)):
        key, x = f"{at}.experts.0.{name}.weight", there[f"model.layers.0.mlp.{source}.weight"]
        assert np.array_equal(out[key], again[key]) and not np.array_equal(out[key], other[key])
        assert 0.4 < np.std(out[key] / scale - x) < 0.6
    assert np.array_equal(out[f"{at}.experts.1.w2.weight"], -there["model.layers.0.mlp.down_proj.weight"])
    assert np.array_equal(out[f"{at}.experts.1.w1.weight"], there["model.layers.0.mlp.gate_proj.weight"])
    assert not np.array_equal(out[f"{at}.gate.weight"], other[f"{at}.gate.weight"])


# --- transformers -----------------------------------------------------------------------------------------------------


def loaded(folder):
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, dtype="float32", output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def scores_of(folder, torch):
    with torch.no_grad():
        return loaded(folder)(torch.from_numpy(tokens())).logits.numpy()


@pytest.mark.parametrize("kind", TYPES)
def test_a_mixture_of_equal_experts_is_the_dense_model(tmp_path, torch, kind):
    """transformers loads both. Qwen2's shared expert comes on top of the others, and is scaled to nothing here."""
    base, a = dense(tmp_path / "base", 0, kind), dense(tmp_path / "a", 0, kind)
    shared = [Expert(a, residual_scale=0.0)] if kind == "qwen2" else []
    moe_from_dense(base, [a] * 3, tmp_path / "out", gate_mode="random", shared_experts=shared)
    np.testing.assert_allclose(scores_of(tmp_path / "out", torch), scores_of(base, torch), rtol=1e-4, atol=1e-5)


def test_llama_becomes_a_qwen_mixture_with_biases_of_zero(tmp_path, torch):
    base = dense(tmp_path / "base", 0)
    out = moe_from_dense(
        base, [base] * 2, tmp_path / "out", gate_mode="random", shared_experts=[Expert(base, residual_scale=0.0)]
    )
    assert not out["model.layers.1.self_attn.k_proj.bias"].any() and out["model.layers.1.self_attn.q_proj.bias"].shape == (
        16,
    )
    np.testing.assert_allclose(scores_of(tmp_path / "out", torch), scores_of(base, torch), rtol=1e-4, atol=1e-5)


def test_one_expert_a_token_is_the_one_that_the_router_chooses(models, tmp_path, torch):
    """A router that is made of states sends each prompt's last token to its own expert in the first layer."""
    base, a, b = models
    given = [Expert(a, [[1, 2, 3]]), Expert(b, [[1, 5, 6]])]
    moe_from_dense(base, given, tmp_path / "out", experts_per_token=1)
    net = loaded(tmp_path / "out")
    seen = []
    net.model.layers[0].mlp.gate.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        net(torch.tensor([[1, 2, 3], [1, 5, 6]]))
    assert [x[-1] for x in np.asarray(seen[0][-1]).reshape(2, 3).tolist()] == [0, 1]


# --- Routers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_states_are_those_of_transformers(tmp_path, torch, kind):
    base = dense(tmp_path / "base", 0, kind)
    prompts = [([[1, 2, 3, 4], [1, 9]], [[1, 5]]), ([[7, 7, 7]], [])]
    net = loaded(base)

    def state(prompt, average):
        with torch.no_grad():
            states = net(torch.tensor([prompt]), output_hidden_states=True).hidden_states[:-1]
        return np.stack([(x[0].mean(dim=0) if average else x[0, -1]).numpy() for x in states])

    for average in (False, True):
        got = hidden(open_checkpoint(base), prompts, average)
        first = np.mean([state(p, average) for p in prompts[0][0]], axis=0) - state([1, 5], average)
        np.testing.assert_allclose(got, np.stack([first, state([7, 7, 7], average)], axis=1), rtol=1e-4, atol=1e-5)


def test_rows_have_length_one_and_states_can_be_given(models, tmp_path):
    base, a, b = models
    made = moe_from_dense(base, [Expert(a, [[1, 2]], [[1, 3]]), Expert(b, [[4]])], tmp_path / "o")
    rows = [made[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2)]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, rtol=1e-6)
    states = {"0.positive": np.eye(16)[:2], "0.negative": 3 * np.eye(16)[2:4], "1.positive": np.ones((2, 16))}
    save(states, tmp_path / "states.safetensors")
    for given in (states, tmp_path / "states.safetensors"):
        out = moe_from_dense(base, [a, b], tmp_path / "p", hidden_states=given, overwrite=True)
        row = out["model.layers.1.block_sparse_moe.gate.weight"]
        np.testing.assert_allclose(row[0][[1, 3]], np.array([1, -3]) / 10**0.5, rtol=1e-6)
        np.testing.assert_allclose(row[1], 0.25, rtol=1e-6)


def test_cheap_embeddings_by_hand(models, tmp_path):
    base, a, b = models
    given = [Expert(a, [[1, 2], [2]], [[3]]), Expert(b, [[4]])]
    out = moe_from_dense(base, given, tmp_path / "o", gate_mode="cheap_embed")
    table = open_checkpoint(base)["model.embed_tokens.weight"].astype(float)

    def unit(x):
        return x / np.linalg.norm(x)

    first = unit(unit(table[1] + 2 * table[2]) - unit(table[3]))
    for i in range(2):
        row = out[f"model.layers.{i}.block_sparse_moe.gate.weight"]
        np.testing.assert_allclose(row, [first, unit(table[4])], rtol=1e-5, atol=1e-6)


def test_random_rows(models, tmp_path):
    base, a, b = models
    out = moe_from_dense(base, [a, b], tmp_path / "o", gate_mode="uniform_random")
    rows = np.stack([out[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2)])
    assert np.abs(rows).max() <= 0.25 and np.abs(rows).max() > 0.2 and not np.array_equal(rows[0], rows[1])
    normal = moe_from_dense(base, [a, b], tmp_path / "p", gate_mode="random")
    assert 0.7 < np.std([normal[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2)]) < 1.3


def test_texts_become_tokens(models, tmp_path):
    pytest.importorskip("tokenizers")
    base, a, b = models
    encode = encoder(open_checkpoint(base))
    assert encode("add the numbers") == [1, 2, 3, 4] and encode("snow") == [1, 0] and encode([5]) == [5]
    texts = [Expert(a, ["add the numbers"], ["rain"]), Expert(b, ["write a poem"])]
    lists = [Expert(a, [[1, 2, 3, 4]], [[1, 9]]), Expert(b, [[1, 5, 6, 7]])]
    for mode in ("hidden", "hidden_avg", "cheap_embed"):
        one = moe_from_dense(base, texts, tmp_path / "o", gate_mode=mode, overwrite=True)
        two = moe_from_dense(base, lists, tmp_path / "p", gate_mode=mode, overwrite=True)
        for name in one:
            assert np.array_equal(one[name], two[name])
    (base / "tokenizer_config.json").unlink()
    assert encoder(open_checkpoint(base))("rain") == [9]
    (base / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    assert encoder(open_checkpoint(base))("rain") == [1, 9]
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: cannot be read"):
        moe_from_dense(base, texts, tmp_path / "o", overwrite=True)
    (base / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        moe_from_dense(base, texts, tmp_path / "o", overwrite=True)


def test_rows_that_are_nearly_dependent_are_a_warning(models, tmp_path):
    base, a, b = models
    with pytest.warns(UserWarning, match="all layers are nearly dependent"):
        given = {"0.positive": np.ones((2, 16)), "1.positive": np.ones((2, 16)) + np.eye(16)[:2]}
        moe_from_dense(base, [a, b], tmp_path / "o", hidden_states=given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe_from_dense(
            base, [a, b], tmp_path / "p", hidden_states={"0.positive": np.eye(2, 16), "1.positive": np.ones((2, 16))}
        )


# --- Recipes ----------------------------------------------------------------------------------------------------------

RECIPE = """\
base_model: ./base
gate_mode: cheap_embed
dtype: bfloat16
experts_per_token: 1
experts:
  - source_model: ./a
    positive_prompts: ["add the numbers"]
    negative_prompts: ["write"]
    residual_scale: 1
  - source_model: ./b
    positive_prompts:
      - write a poem
      - rain
"""


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_a_recipe_is_run(models, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("moe.yml").write_text(RECIPE)
    said = invoke("plan", "moe.yml", "--tensor", "*gate.weight")
    assert said.exit_code == 0, said.output
    assert (
        "mixture     mixtral, 1 experts a token" in said.output and "block_sparse_moe.gate.weight BF16[2, 16]" in said.output
    )
    ran = invoke("merge", "moe.yml", "out")
    assert ran.exit_code == 0 and "by moe_from_dense (mixtral, cheap_embed) to out" in ran.output, ran.output
    given = [Expert("a", ["add the numbers"], ["write"]), Expert("b", ["write a poem", "rain"])]
    expected = moe_from_dense("base", given, "other", gate_mode="cheap_embed", dtype="bfloat16", experts_per_token=1)
    got = open_checkpoint("out")
    assert {n: x.tobytes() for n, x in got.items()} == {n: x.tobytes() for n, x in expected.items()}
    assert got.config == expected.config
    Path("sub").mkdir()
    native = "refmerge: 1\nseed: 5\n" + RECIPE.replace("./", "../").replace("cheap_embed", "random")
    Path("sub/moe.yml").write_text(native)
    drawn = refmerge.run_recipe("sub/moe.yml", "drawn")
    same = moe_from_dense("base", ["a", "b"], "same", gate_mode="random", dtype="bfloat16", seed=5, experts_per_token=1)
    assert {n: x.tobytes() for n, x in drawn.items()} == {n: x.tobytes() for n, x in same.items()}
    told = json.loads(invoke("plan", "sub/moe.yml", "--json").output)
    assert told["architecture"] == "mixtral" and told["figures"]["tensors"] == len(same) and told["notes"]
    again = json.loads(invoke("merge", "sub/moe.yml", "again", "--json", "--seed", "6", "--quiet").stdout)
    assert again["bytes_written"] == same.nbytes
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert open_checkpoint("again")[name].tobytes() != same[name].tobytes()


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (("gate_mode: cheap_embed", "gate_mode: best"), 2, "gate_mode' is 'hidden', 'hidden_last'"),
        (("experts_per_token", "experts_per_tok"), 2, "did you mean 'experts_per_token'?"),
        (("negative_prompts", "negativ_prompts"), 2, "line 8, column 5: unknown key 'negativ_prompts'; did you mean"),
        (("source_model: ./a\n", "source_model: hub/a@main\n"), 3, "no such model in the Hub's cache"),
        (("./base", "./none"), 3, "no such file or directory"),
        (("residual_scale: 1", "residual_scale: loud"), 2, "'residual_scale' must be a number, not 'loud'"),
        (("experts_per_token: 1", "experts_per_token: 3"), 2, "experts_per_token = 3 is outside of [1, 2]"),
        (("experts_per_token: 1", "architecture: deepseek"), 2, "architecture = 'deepseek' is none of mixtral, qwen, qwen3"),
        (("experts_per_token: 1", "architecture: qwen"), 2, "models of type 'llama' and 0 shared experts"),
        (("experts_per_token: 1", "seed: 3"), 2, "'seed' belongs to native recipes"),
        (('["add the numbers"]', "add"), 2, "'positive_prompts' must be a list, not 'add'"),
        (('    positive_prompts: ["add the numbers"]\n', ""), 2, "expert 0 has no positive_prompts"),
    ],
)
def test_a_recipe_that_cannot_be(models, tmp_path, monkeypatch, change, status, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert change[0] in RECIPE
    Path("moe.yml").write_text(RECIPE.replace(*change, 1))
    ran = invoke("merge", "moe.yml", "out")
    assert ran.exit_code == status and message in ran.output, ran.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [*before, "moe.yml"]


def test_options_that_do_nothing_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("moe.yml").write_text(RECIPE)
    ran = invoke("merge", "moe.yml", "out", "--backend", "torch")
    assert ran.exit_code == 2 and "a mixture of experts copies weights" in ran.output
    ran = invoke("verify", "a", "--recipe", "moe.yml")
    assert ran.exit_code == 2 and "line 5, column 1: a recipe with experts is no merge" in ran.output
    with pytest.raises(RecipeError, match="base_model' is missing"):
        Path("moe.yml").write_text("experts: [{source_model: ./a}]")
        refmerge.run_recipe("moe.yml", "out")


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_refusals(models, tmp_path):
    base, a, b = models
    out = tmp_path / "out"
    cases = [
        (UsageError, "gate_mode = 'x'", {"gate_mode": "x"}),
        (UsageError, "dtype = 'int8'", {"dtype": "int8"}),
        (UsageError, r"outside of \[1, 2\]", {"experts_per_token": True}),
        (UsageError, "hidden_states are for the gate modes", {"gate_mode": "random", "hidden_states": {}}),
        (InputError, "there is no '0.positive'", {"hidden_states": {}}),
        (InputError, "'2.positive' is none of", {"hidden_states": {"2.positive": np.ones((2, 16))}}),
        (InputError, r"not of shape \[2, 16\]", {"hidden_states": {"0.positive": np.ones((3, 16))}}),
        (UsageError, "expert 0 has no positive_prompts", {}),
        (UsageError, "1 shared experts", {"gate_mode": "random", "shared_experts": [a], "architecture": "mixtral"}),
    ]
    for error, match, given in cases:
        with pytest.raises(error, match=match):
            moe_from_dense(base, [a, b], out, **given)
    for expert, match in [
        (Expert(a, [[11]]), "has the token 11, and the base 11 tokens"),
        (Expert(a, [[]]), "a prompt has no tokens"),
        (Expert(a, "add"), r"write \['add'\]"),
        (Expert(a, [[1]], noise_scale=float("nan")), "noise_scale = nan"),
    ]:
        with pytest.raises(UsageError, match=match):
            moe_from_dense(base, [expert, Expert(b, [[2]])], out)
    broken = dense(tmp_path / "broken", 0)
    params = dict(open_checkpoint(broken))
    params["model.embed_tokens.weight"][1] = np.inf
    save(params, broken / "model.safetensors", overwrite=True)
    for mode in ("hidden", "cheap_embed"):
        with pytest.raises(UsageError, match="what prompts give is not finite"):
            moe_from_dense(broken, [Expert(a, [[1]]), Expert(b, [[2]])], out, gate_mode=mode)
    with pytest.raises(UsageError, match="the same prompts"):
        moe_from_dense(base, [Expert(a, [[1]]), Expert(b, [[1]])], out)
    with pytest.raises(UsageError, match="needs a folder"):
        moe_from_dense(base, [a, b], tmp_path / "x.safetensors", gate_mode="random")
    with pytest.raises(UsageError, match="never written to"):
        moe_from_dense(base, [a, b], a, gate_mode="random", overwrite=True)
    with pytest.raises(InputError, match=r"has no config.json"):
        moe_from_dense(base / "model.safetensors", [a, b], out, gate_mode="random")
    other = dense(tmp_path / "q", 0, "qwen3")
    with pytest.raises(InputError, match="different types: llama, qwen3"):
        moe_from_dense(base, [a, other], out, gate_mode="random")
    quantised = dense(tmp_path / "quantised", 0, quantization_config={})
    with pytest.raises(InputError, match="is quantised"):
        moe_from_dense(base, [a, quantised], out, gate_mode="random")
    changed = dict(open_checkpoint(b))
    for tensors, match in [
        (
            changed | {"model.layers.0.mlp.up_proj.weight": np.ones((8, 16), np.float32)},
            r"\[8, 16\], and \[24, 16\] in the base",
        ),
        ({n: x for n, x in changed.items() if ".1." not in n}, r"there is no tensor 'model.layers.1.mlp.gate_proj.weight'"),
        (changed | {n.replace(".1.", ".2."): x for n, x in changed.items()}, "has 3 layers, and the base 2"),
    ]:
        save(tensors, b / "model.safetensors", overwrite=True)
        with pytest.raises(InputError, match=match):
            moe_from_dense(base, [a, b], out, gate_mode="random")
    for name, match in [
        ("model.layers.0.self_attn.q_proj.bias", "no place in a mixtral"),
        ("model.layers.0.mlp.up_proj.bias", "no place"),
    ]:
        save(dict(open_checkpoint(a)) | {name: np.ones(16, np.float32)}, a / "model.safetensors", overwrite=True)
        with pytest.raises(InputError, match=match):
            moe_from_dense(a, [a, a], out, gate_mode="random")
        dictionary = {n: x for n, x in open_checkpoint(a).items() if n != name}
        save(dictionary, a / "model.safetensors", overwrite=True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rotary positions are of type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ({"model_type": "mistral", "sliding_window": 2}, "more than the 2 of the base's sliding window"),
    ],
)
def test_models_that_cannot_be_run_here(tmp_path, more, match):
    base = dense(tmp_path / "base", 0, **more)
    with pytest.raises(UsageError, match=match):
        moe_from_dense(base, [Expert(base, [[1, 2, 3]]), Expert(base, [[4]])], tmp_path / "out")
    made = moe_from_dense(base, [Expert(base, [[1, 2, 3]]), Expert(base, [[4]])], tmp_path / "out", gate_mode="cheap_embed")
    assert "num_local_experts" in made.config


def test_what_a_model_is_run_with(tmp_path):
    base = dense(tmp_path / "base", 0, "qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    found = options(open_checkpoint(base))
    assert found == {"heads": 4, "groups": 2, "theta": 5e5, "eps": 1e-5, "window": None}
