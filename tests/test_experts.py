"""Where checkpoints keep their experts: rules of names, and what is no mixture by them."""

from __future__ import annotations

import numpy as np
import pytest

from refmerge import InputError, UsageError
from refmerge.experts import RULES, Rule, find
from refmerge.nets import moe


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
