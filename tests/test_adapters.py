"""Adapters in PEFT's layout: what is written comes back, and what does not belong is listed."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError
from refmerge.adapters import (
    Adapter,
    Factors,
    adapter_from,
    apply_adapter,
    chosen_rank,
    factorised,
    leading,
    read_adapter,
    write_adapter,
)

RELAXED = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# The last one ends like others: patterns of PEFT are ends of names.
NAMES = ("model.layers.0.q_proj", "model.layers.1.q_proj", "layers.1.q_proj", "q_proj")
NAME = "base_model.model.q.lora_A.weight"


def factors(draw, r, out=4, inner=5, dtype=np.float32, **more):
    return Factors(draw.standard_normal((r, inner)).astype(dtype), draw.standard_normal((out, r)).astype(dtype), **more)


def same(a, b):
    assert (a.alpha, a.rslora, a.embedding, a.scaling) == (b.alpha, b.rslora, b.embedding, b.scaling)
    np.testing.assert_array_equal(a.A, b.A)
    np.testing.assert_array_equal(a.B, b.B)
    assert a.A.dtype == b.A.dtype


# --- Layout -----------------------------------------------------------------------------------------------------------


@RELAXED
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1.0, 2.0, 2.5])), min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]),
)
def test_written_and_read_is_the_same(tmp_path_factory, seed, ranks, rslora, dtype):
    draw = np.random.default_rng(seed)
    modules = {n: factors(draw, r, dtype=dtype, alpha=a, rslora=rslora) for n, (r, a) in zip(NAMES, ranks)}
    adapter = Adapter(modules, {"base_model_name_or_path": "there", "task_type": "CAUSAL_LM"})
    back = read_adapter(write_adapter(adapter, tmp_path_factory.mktemp("a") / "x"))
    assert back.modules.keys() == adapter.modules.keys()
    for name, f in adapter.modules.items():
        same(back.modules[name], f)
    assert back.config["task_type"] == "CAUSAL_LM"
    again = write_adapter(back, tmp_path_factory.mktemp("b") / "x")
    assert read_adapter(again).config == back.config


def test_the_files_are_pefts(tmp_path):
    f = Factors(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), alpha=8.0)
    table = Factors(np.ones((1, 7), np.float32), np.ones((3, 1), np.float32), embedding=True)
    out = write_adapter(Adapter({"m.q": f, "m.emb": table}, saved={"m.norm.weight": np.ones(3, np.float32)}), tmp_path / "a")
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 8)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"m.emb": 1}, {"m.emb": 1})
    assert (config["target_modules"], config["modules_to_save"]) == (["m.emb", "m.q"], ["m.norm"])
    assert list(read_adapter(out).tensors()) == [
        "base_model.model.m.emb.lora_embedding_A",
        "base_model.model.m.emb.lora_embedding_B",
        "base_model.model.m.norm.weight",
        "base_model.model.m.q.lora_A.weight",
        "base_model.model.m.q.lora_B.weight",
    ]


def test_patterns_are_anchored_where_plain_names_would_fit_others():
    f = Factors(np.ones((2, 3)), np.ones((4, 2)))
    one = Factors(np.ones((1, 3)), np.ones((4, 1)))
    config = Adapter({"q": one, "a.q": f, "b.q": f}).configuration()
    assert config["rank_pattern"] == {"^q": 1}
    assert Adapter({"c.q": one, "a.q": f, "b.q": f}).configuration()["rank_pattern"] == {"c.q": 1}


def test_patterns_are_regular_expressions_and_the_first_one_counts():
    tensors = Adapter({f"{i}.q": Factors(np.ones((i + 1, 3)), np.ones((4, i + 1))) for i in range(3)}).tensors()
    config = {"r": 1, "lora_alpha": 4, "rank_pattern": {"1.q": 2, "[12].q": 3}, "alpha_pattern": {"q": 6}}
    read = adapter_from(tensors, config)
    assert [f.scaling for f in read.modules.values()] == [6.0, 3.0, 2.0]


def test_scaling():
    f = Factors(np.ones((4, 2)), np.ones((3, 4)), alpha=8.0)
    assert (f.scaling, replace(f, rslora=True).scaling, replace(f, alpha=None).scaling) == (2.0, 4.0, 1.0)


def test_a_module_without_rank_is_left_out(tmp_path):
    none = Factors(np.zeros((0, 3), np.float32), np.zeros((4, 0), np.float32))
    assert none.product().tolist() == [[0.0] * 3] * 4
    one = Factors(np.ones((1, 3), np.float32), np.ones((4, 1), np.float32))
    assert list(read_adapter(write_adapter(Adapter({"a": none, "b": one}), tmp_path / "a")).modules) == ["b"]
    with pytest.raises(UsageError, match="changes nothing"):
        write_adapter(Adapter({"a": none}), tmp_path / "b")


def test_an_output_that_exists_is_refused(tmp_path):
    adapter = Adapter({"q": factors(np.random.default_rng(0), 1)})
    write_adapter(adapter, tmp_path / "a")
    with pytest.raises(UsageError, match="exists"):
        write_adapter(adapter, tmp_path / "a")
    write_adapter(adapter, tmp_path / "a", overwrite=True)


# --- What does not belong ---------------------------------------------------------------------------------------------

GOOD = {NAME: np.ones((2, 3)), NAME.replace("lora_A", "lora_B"): np.ones((4, 2))}
CONFIG = {"r": 2, "lora_alpha": 2}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (GOOD | {"base_model.model.q.lora_E": np.ones(4)}, CONFIG, "lora_E.*belong to no"),
        (GOOD | {"base_model.model.q.lora_magnitude_vector": np.ones(3)}, CONFIG, r"of shape \[3\] for 4 outputs"),
        (GOOD | {"base_model.model.q.bias": np.ones(4)}, CONFIG, r"q\.bias' belong to no"),
        (GOOD | {"q.lora_A.weight": np.ones((2, 3))}, CONFIG, "'q.lora_A.weight' belong to no"),
        ({NAME: np.ones((2, 3))}, CONFIG, r"'q \(no B\)'"),
        (GOOD, CONFIG | {"r": 3}, r"q \(2, said to be 3\)"),
        (GOOD | {NAME: np.ones((3, 3))}, CONFIG, "have no product"),
        (GOOD, CONFIG | {"use_dora": True}, "use_dora is set, and 'q' have no lora_magnitude_vector"),
        (GOOD, CONFIG | {"use_qalora": True}, "'use_qalora'"),
        (GOOD, CONFIG | {"peft_type": "IA3"}, "'IA3'"),
        (GOOD, CONFIG | {"init_lora_weights": "pissa_niter_4"}, "changed the base too"),
        (GOOD, {"r": 2}, "no number 'lora_alpha'"),
        (GOOD, CONFIG | {"lora_alpha": float("nan")}, "no number 'lora_alpha'"),
        (GOOD, CONFIG | {"rank_pattern": ["q"]}, "rank_pattern in .* is no mapping"),
        (GOOD, CONFIG | {"alpha_pattern": {"q": "2"}}, "alpha_pattern in .* is no mapping of patterns to numbers"),
        (GOOD, CONFIG | {"rank_pattern": {"(": 2}}, "pattern '\\(' is no regular expression"),
        (GOOD, CONFIG | {"modules_to_save": "head"}, "is no list of names"),
    ],
)
def test_what_does_not_belong_is_listed(tensors, config, message):
    with pytest.raises(InputError, match=message):
        adapter_from(tensors, config)


def test_no_adapter(tmp_path):
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    with pytest.raises(InputError, match=r"nowhere': no such file or directory, of an adapter"):
        read_adapter(tmp_path / "nowhere")


# --- Applied ----------------------------------------------------------------------------------------------------------


def test_applied_by_hand():
    """[1; 2] (4, 0, 1) times 2 / 1, the table transposed."""
    f = Factors(np.array([[4.0, 0, 1]], np.float32), np.array([[1.0], [2]], np.float32), alpha=2.0)
    base = {"q.weight": np.zeros((2, 3), np.float32), "e.weight": np.zeros((3, 2), np.float32)}
    got = apply_adapter(base, Adapter({"q": f, "e": replace(f, embedding=True)}))
    assert got["q.weight"].tolist() == [[8, 0, 2], [16, 0, 4]]
    assert got["e.weight"].tolist() == [[8, 16], [0, 0], [2, 4]]
    turned = Adapter({"q": f}, {"fan_in_fan_out": True})
    assert apply_adapter({"q.weight": np.zeros((3, 2))}, turned, weight=-0.5)["q.weight"].tolist() == [
        [-4, -8],
        [0, 0],
        [-1, -2],
    ]


def test_a_convolution_by_hand():
    f = Factors(np.arange(8.0).reshape(2, 1, 2, 2), np.array([[1.0, 0], [0, 2], [1, 1]]).reshape(3, 2, 1, 1))
    change = Adapter({"c": f}).delta("c")
    assert change.shape == (3, 1, 2, 2)
    assert change.reshape(3, 4).tolist() == [[0, 1, 2, 3], [8, 10, 12, 14], [4, 6, 8, 10]]


def test_modules_that_the_base_does_not_have_are_listed():
    f = factors(np.random.default_rng(0), 2)
    with pytest.raises(InputError, match=r"'r', 's'"):
        apply_adapter({"q.weight": np.zeros((4, 5))}, Adapter({"q": f, "r": f, "s": f}))
    with pytest.raises(InputError, match=r"\[5, 5\].*\[4, 5\]"):
        apply_adapter({"q.weight": np.zeros((5, 5))}, Adapter({"q": f}))


def test_where_the_shape_tells_it_goes_before_fan_in_fan_out():
    """As PEFT goes by the kind of layer: GPT-2's are stored in x out, whatever the configuration says."""
    f = factors(np.random.default_rng(0), 2)
    for config in ({}, {"fan_in_fan_out": True}):
        got = apply_adapter({"q.weight": np.zeros((5, 4))}, Adapter({"q": f}, config))["q.weight"]
        np.testing.assert_allclose(got, f.product().T)


# --- Steps ------------------------------------------------------------------------------------------------------------


@RELAXED
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
def test_the_decomposition_of_a_product_is_that_of_its_matrix(seed, m, n, r):
    draw = np.random.default_rng(seed)
    B, A = draw.standard_normal((m, r)), draw.standard_normal((r, n))
    U, S, Vt = factorised(B, A, "q")
    np.testing.assert_allclose((U * S) @ Vt, B @ A, atol=1e-12)
    np.testing.assert_allclose(S, np.linalg.svd(B @ A, compute_uv=False)[: len(S)], atol=1e-12)


def test_ranks_by_energy():
    S = np.array([2.0, 1, 1, 0])  # squares 4, 1, 1, 0 of 6
    assert [chosen_rank(S, None, e) for e in (0.5, 4 / 6, 0.7, 5 / 6, 0.9, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert chosen_rank(np.zeros(3), None, 0.5) == 0
    assert chosen_rank(np.zeros(3), 2, None) == 2
    for wrong in ((None, None), (1, 0.5), (0, None), (None, 1.5)):
        with pytest.raises(UsageError):
            chosen_rank(S, *wrong)


@RELAXED
@given(st.integers(0, 10**6), st.integers(16, 40), st.integers(16, 40), st.integers(1, 5), st.floats(0.1, 1.0))
def test_the_leading_part_is_that_of_the_decomposition(seed, m, n, rank, falls):
    """However fast singular values fall, where few are asked for and where many are."""
    draw = np.random.default_rng(seed)
    k = min(m, n)
    U, _ = np.linalg.qr(draw.standard_normal((m, k)))
    V, _ = np.linalg.qr(draw.standard_normal((n, k)))
    S = 3.0 * falls ** np.arange(k)
    D = (U * S) @ V.T
    u, s, vt = (x[..., :rank] if i < 2 else x[:rank] for i, x in enumerate(leading(D, rank)))
    np.testing.assert_allclose(s, S[:rank], rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(vt @ vt.T, np.eye(rank), atol=1e-5)
    error = np.linalg.norm(D - (u * s) @ vt)
    np.testing.assert_allclose(error, np.linalg.norm(S[rank:]), rtol=1e-7, atol=1e-12)


def test_of_nothing_there_is_no_leading_part():
    assert leading(np.zeros((16, 20)), 2)[1].tolist() == [0.0] * 16
