"""Where checkpoints keep their experts: rules of names, and what is no mixture by them; and `refmerge experts`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from refmerge import InputError, UsageError, open_checkpoint
from refmerge.checkpoint import save
from refmerge.cli import main
from refmerge.experts import RULES, Rule, find, route
from refmerge.nets import moe
from refmerge.stats import Statistics


def mixtral(layers=1, experts=3):
    return moe.init(np.random.default_rng(0), 2, 1, layers, experts=experts, hidden=8, head_width=4)


AT = "model.layers.0.block_sparse_moe"


def test_what_is_found():
    found = find(mixtral(layers=12))
    assert list(found) == [f"model.layers.{i}" for i in range(12)]  # 2 before 10
    m = found["model.layers.0"]
    assert (m.rule.name, m.router, len(m.experts), m.units) == ("mixtral", f"{AT}.gate", 3, 8)
    assert m.experts[1]["w2.weight"] == m.name(1, "w2.weight") == f"{AT}.experts.1.w2.weight"
    assert m.shapes == {"w1.weight": (8, 8), "w2.weight": (8, 8), "w3.weight": (8, 8)} and m.nbytes == 3 * 64 * 8
    assert m.slots == (0, 1, 2) and not m.shared


def test_a_dense_layer_and_a_shared_expert_are_left_alone():
    model = moe.init(np.random.default_rng(0), 2, 1, 2, experts=3, style="qwen", shared=5)
    model = {n: x for n, x in model.items() if "layers.1.mlp" not in n}
    model |= {f"model.layers.1.mlp.{p}_proj.weight": np.zeros((4, 4)) for p in ("gate", "up", "down")}
    assert list(find(model)) == ["model.layers.0"]


def broken(change):
    model = mixtral()
    change(model)
    return model


def remove(*names):
    return lambda m: [m.pop(f"{AT}.{name}") for name in names]


def put(shape, *names, dtype=np.float64):
    return lambda m: m.update({f"{AT}.{name}": np.zeros(shape, dtype) for name in names})


ALL = [f"experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w2", "w3")]
CASES = {
    r"missing are 'model\.layers\.0\.block_sparse_moe\.experts\.1\.w2\.weight'": remove("experts.1.w2.weight"),
    r"has experts up to 2 and lacks '1'": remove(*ALL[3:6]),
    r"experts\.2\.w1\.weight is F64 \[7, 8\], and F64 \[8, 8\] in the first": put((7, 8), "experts.2.w1.weight"),
    r"experts\.2\.w1\.weight is F32 \[8, 8\], and F64": put((8, 8), "experts.2.w1.weight", dtype=np.float32),
    r"gate\.weight is missing": remove("gate.weight"),
    r"gate scores 4 experts, and there are 3": put((4, 8), "gate.weight"),
    r"gate\.bias is of shape \[2\] for 3 experts": put((2,), "gate.bias"),
    r"below .* are 'model\.layers\.0\.block_sparse_moe\.gate\.offset'": put((3,), "gate.offset"),
    r"not in the rule 'mixtral': 'model\.layers\.0\.block_sparse_moe\.experts\.0\.w4\.weight'": put(
        (3,), "experts.0.w4.weight"
    ),
    r"experts have 8 hidden units by w1\.weight, 9 hidden units by w2\.weight": put((8, 9), *ALL[1::3]),
    r"is I64: only experts of floats": put((8, 8), *ALL, dtype=np.int64),
}


@pytest.mark.parametrize("message", CASES)
def test_what_does_not_fit_is_listed(message):
    with pytest.raises(InputError, match=message):
        find(broken(CASES[message]))


@pytest.mark.parametrize("style", ["mixtral", "qwen"])
def test_no_tensor_of_a_mixture_may_be_missing(style):
    model = moe.init(np.random.default_rng(0), 2, 1, 2, experts=3, style=style, hidden=8, head_width=4)
    for name in (n for n in model if ".experts." in n or ".gate.weight" in n):
        with pytest.raises(InputError, match=r"missing|lacks|scores 3 experts, and there are 2"):
            find({n: x for n, x in model.items() if n != name})


def test_an_unknown_style_says_what_there_is():
    with pytest.raises(InputError, match="and no tensor with expert in its name"):
        find({"w": np.zeros(3)})
    with pytest.raises(InputError, match=r"there are 'l\.moe\.w_in'; a Rule of your own"):
        find({"l.moe.w_in": np.zeros(3)})
    with pytest.raises(InputError, match=r"'l\.mlp\.experts\.gate_up_proj' has all experts in one tensor"):
        find({"l.mlp.experts.gate_up_proj": np.zeros((2, 3, 4)), "l.mlp.gate.weight": np.zeros((2, 4))})
    with pytest.raises(InputError, match="'qwen' would know"):
        find(mixtral(), RULES["qwen"])


RULE = """\
name = "mine"
block = "ffn"
router = "gate"
expert = "experts.{}"
count = "n_experts"
chosen = 1
others = ["norm.*"]

[parts]
"fc1.weight" = 0
"fc2.weight" = 1
"fc2.bias" = "none"
"""


def test_a_rule_from_a_file(tmp_path):
    (tmp_path / "rule.toml").write_text(RULE)
    rule = Rule.load(tmp_path / "rule.toml")
    assert rule.parts == {"fc1.weight": 0, "fc2.weight": 1, "fc2.bias": None} and rule.others == ("norm.*",)
    assert (rule.chosen_of(None), RULES["qwen"].chosen_of({"num_experts_per_tok": 4})) == (1, 4)
    with pytest.raises(UsageError, match="is not in config"):
        RULES["qwen"].chosen_of({})
    for old, new, message in (
        ('block = "ffn"\n', "", "this one lacks 'block'"),
        ('block = "ffn"', 'block = "ffn"\nkind = 1', "this one has 'kind'"),
        ('"experts.{}"', '"experts"', "has not one {}"),
        ('= 1\n"fc2.bias', '= 2\n"fc2.bias', "0, 1 or None"),
        ("name =", "name", "cannot be read as a rule"),
    ):
        (tmp_path / "bad.toml").write_text(RULE.replace(old, new))
        with pytest.raises(UsageError, match=message):
            Rule.load(tmp_path / "bad.toml")
    with pytest.raises(UsageError, match="cannot be read as a rule"):
        Rule.load(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="no part has an axis"):
        Rule("x", "ffn", "gate", "experts.{}", {"b": None}, "n", 1)


# --- A model that is run, and the command line ------------------------------------------------------------------------

CONFIG = {
    "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rope_theta": 500.0, "rms_norm_eps": 1e-5, "sliding_window": 9,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A model and tokens of which some are padding."""
    draw = np.random.default_rng(0)
    model = moe.init(draw, 2, 1, 2, experts=4, hidden=8, head_width=4)
    params = {name: x.astype(np.float32) for name, x in model.items()}
    save(params, tmp_path / "model", extra_files={"config.json": json.dumps(CONFIG).encode()})
    tokens = draw.integers(0, 11, (5, 7))
    np.savez(tmp_path / "tokens.npz", inputs=tokens, mask=np.arange(7) < [[7], [3], [1], [7], [5]])
    return tmp_path


def test_a_model_is_run_as_its_config_says(folder):
    with np.load(folder / "tokens.npz") as file:
        tokens, mask = file["inputs"], file["mask"]
    found = route(folder / "model", tokens, mask, batch=2)
    expected = Statistics()
    with open_checkpoint(folder / "model") as model:
        taps = expected.routing_taps({m.router: 2 for m in find(model).values()}, mask)
        moe.forward({n: model[n] for n in model}, tokens, taps, heads=2, groups=1, theta=500.0, eps=1e-5)
    assert list(found) == list(expected) and len(found) == 4
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    for given, message in (
        ((tokens.astype(float),), r"tokens are whole numbers \(samples, places\), not float64"),
        ((tokens[0],), r"not int64 of \[7\]"),
        ((tokens + 9,), "tokens are from 0 to 10, and here"),
        ((np.zeros((1, 10), int),), "samples of 10 places, and attention looks back 9"),
        ((tokens, mask[:2]), r"a mask of shape \[2, 7\] for tokens of \[5, 7\]"),
    ):
        with pytest.raises(UsageError, match=message):
            route(folder / "model", *given)
    with pytest.raises(UsageError, match=r"what its config\.json says, and there is none"):
        route(mixtral(), tokens)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "olmoe"}, r"model_type is 'olmoe', and only .*Statistics\.routing"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type is 'linear'"),
    ({"num_experts_per_tok": None}, "says no num_experts_per_tok"),
])  # fmt: skip
def test_what_is_not_computed_here_is_refused(folder, change, message):
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(UsageError, match=message):
        route(folder / "model", np.zeros((1, 2), int))


def test_the_command_line_all_the_way(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*words, status=0):
        result = CliRunner().invoke(main, ["experts", *words])
        assert result.exit_code == status, result.output
        return result.output

    assert run("route", "model", "tokens.npz", "stats.safetensors") == "2 routers, 23 tokens, to stats.safetensors\n"
    assert run("show", "model").splitlines()[1] == "model.layers.1: 4 experts of 8 hidden units, 768 B each (mixtral)"
    shown = run("show", "model", "--stats", "stats.safetensors", "--groups", "2", "--grouping", "layer")
    assert shown.count("  group 0, ") == shown.count("  group 1, ") == 2
    assert shown.splitlines()[-1].startswith("8 experts to 4: ")
    assert run("show", "model", "--rule", "mixtral") == run("show", "model")
    told = json.loads(run("show", "model", "--stats", "stats.safetensors", "--groups", "2", "--json"))
    assert sum(len(layer["dominant"]) for layer in told.values()) == 4
    merge = ("merge", "model", "small", "--stats", "stats.safetensors", "--groups", "2")
    assert "2 layers merged to 4: small" in run(*merge, "--grouping", "layer", "--write", "reduced")
    assert json.loads((folder / "small" / "config.json").read_text())["num_local_experts"] == 2
    assert "exists; overwrite=True" in run(*merge, status=2)
    told = json.loads(run(*merge, "--grouping", "layer", "--write", "reduced", "--overwrite", "--json"))
    assert told["layers"] == json.loads((folder / "small" / "refmerge_report.json").read_text())
    assert {len(layer["dominant"]) for layer in told["layers"].values()} == {2}
    run("merge", "model", "shared", "--stats", "stats.safetensors", "--groups", "2", "--write", "shared", "-q")
    assert "2 experts for 4 scores" in run("show", "shared") or "3 experts for 4 scores" in run("show", "shared")
    assert "12 matrices" in run("compress", "small", "stored")
    run("restore", "stored", "whole", "-q")
    run("restore", "shared", "tied", "-q")
    assert json.loads((folder / "tied" / "config.json").read_text()) == CONFIG
    assert "nothing to restore" in run("restore", "tied", "again", status=3)
    assert "--groups wants --stats" in run("show", "model", "--groups", "2", status=2)
    assert "stats.safetensors: exists" in run("route", "model", "tokens.npz", "stats.safetensors", status=2)
    assert "ends in .safetensors" in run("route", "model", "tokens.npz", "stats.npz", status=2)
    assert "cannot be read as .npz" in run("route", "model", "stats.safetensors", "more.safetensors", status=3)
    assert "cannot be read as a rule" in run("show", "model", "--rule", "none.toml", status=2)
    (folder / "rule.toml").write_text(RULE)
    assert "no mixture of experts that 'mine' would know" in run("show", "model", "--rule", "rule.toml", status=3)
