"""Merges of LoRA adapters: PEFT's results, and laws.

tests/data/lora_merge.npz holds what LoraModel.add_weighted_adapter gave for one layer in huggingface/peft@5d602fdbf
(0.20.1.dev0) and in release 0.21.2: factors, change, recorded masks, and under `about` the parameters.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError
from refmerge.adapters import Adapter, Factors, write_adapter
from refmerge.procedures.adapters.lora_merge import BY_FACTORS, BY_PRODUCT, lora_merge

DATA = np.load(Path(__file__).parent / "data" / "lora_merge.npz")
ABOUT = json.loads(str(DATA["about"]))
RELAXED = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)
SURE = ("cat", "linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd")  # draw nothing
NAMES = {"mask_A": "lin.lora_A", "mask_B": "lin.lora_B", "mask_delta": "lin.delta"}


def random(seed, count=2, ranks=(3, 3, 3), shape=(5, 6), alpha=None):
    draw = np.random.default_rng(seed)
    return [
        Adapter({"q": Factors(draw.standard_normal((r, shape[1])), draw.standard_normal((shape[0], r)), alpha)})
        for r in ranks[:count]
    ]


def change(adapter, module="q"):
    return adapter.delta(module)


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ABOUT)
def test_peft(case):
    p = ABOUT[case]["params"]
    x = {k.removeprefix(case + "/"): DATA[k] for k in DATA.files if k.startswith(case + "/")}
    count = len(p["weights"])
    adapters = [
        Adapter({"lin": Factors(x[f"model{n}/lora_A"], x[f"model{n}/lora_B"], p["lora_alpha"][n], p["use_rslora"])})
        for n in range(count)
    ]
    draws = [{NAMES[k]: x[f"stat{n}/{k}"] for k in NAMES if f"stat{n}/{k}" in x} for n in range(count)]
    options = {k: p[k] for k in ("svd_rank", "svd_clamp", "density", "majority_sign_method", "combination_type")}
    bugs = "0.21.2" if "0.21.2" in ABOUT[case]["source"] else "0.20.1"
    got = lora_merge(adapters, weights=p["weights"], draws=draws if any(draws) else None, bugs=bugs, **options)
    f = got.modules["lin"]
    assert f.scaling == p["out_scaling"]
    expected = x["out/delta"]
    assert np.max(np.abs(f.product() - expected)) <= ABOUT[case]["tolerance"] * np.max(np.abs(expected))
    if "svd" not in p["combination_type"]:  # singular vectors have no sign
        np.testing.assert_allclose(f.A, x["out/lora_A"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(f.B, x["out/lora_B"], rtol=1e-6, atol=1e-6)


# --- By hand ----------------------------------------------------------------------------------------------------------


def two():
    """Changes (4, 0), scaling 2, and (0, 9)."""
    a = Factors(np.array([[2.0, 0]]), np.array([[1.0]]), alpha=2.0)
    return [Adapter({"q": a}), Adapter({"q": Factors(np.array([[0.0, 9]]), np.array([[1.0]]))})]


def test_cat_is_the_sum_and_linear_is_not():
    assert change(lora_merge(two(), weights=[0.5, 1.0], combination_type="cat")).tolist() == [[2, 9]]
    # c = 1 and 1: A = (2, 9), B = 1 + 1.
    assert change(lora_merge(two(), weights=[0.5, 1.0], combination_type="linear")).tolist() == [[4, 18]]


def test_two_equal_adapters_at_a_half_are_twice_one():
    one = two()[0]
    got = lora_merge([one, one], weights=[0.5, 0.5], combination_type="linear")
    np.testing.assert_allclose(change(got), 2 * change(one), rtol=1e-6)


def test_scaling_twice_and_rslora_inherited_on_request():
    one = Adapter({"q": Factors(np.eye(4), np.eye(4), alpha=4.0, rslora=True)})  # scaling 2
    other = Adapter({"q": Factors(np.zeros((4, 4)), np.eye(4), alpha=4.0, rslora=True)})
    scale = {
        bugs: change(lora_merge([one, other], weights=[1.0, 1.0], combination_type="svd", bugs=bugs))[0, 0]
        for bugs in (None, "0.21.2", "0.20.1")
    }
    assert {k: round(v, 6) for k, v in scale.items()} == {None: 2, "0.21.2": 4, "0.20.1": 8}


# --- Laws -------------------------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS, st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_cat_and_svd_of_full_rank_are_the_weighted_sum(seed, w):
    adapters = random(seed, 3, (1, 2, 3), alpha=2.0)
    exact = sum(w_n * change(a) for w_n, a in zip(w, adapters))
    for kind in ("cat", "svd"):
        got = change(lora_merge(adapters, weights=w, combination_type=kind, svd_rank=6 if kind == "svd" else None))
        np.testing.assert_allclose(got, exact, atol=1e-5)


@RELAXED
@given(SEEDS, st.integers(1, 5))
def test_svd_is_the_nearest_of_its_rank(seed, r):
    adapters = random(seed, 3)
    exact = sum(change(a) for a in adapters)
    S = np.linalg.svd(exact, compute_uv=False)
    got = change(lora_merge(adapters, weights=[1.0] * 3, combination_type="svd", svd_rank=r))
    assert abs(np.linalg.norm(exact - got) - np.linalg.norm(S[r:])) < 1e-9 * max(S)


@RELAXED
@given(SEEDS, st.sampled_from(("cat", *BY_FACTORS, *BY_PRODUCT)), st.floats(-2, 2))
def test_one_adapter_is_scaled(seed, kind, w):
    (one,) = random(seed, 1, alpha=5.0)
    np.testing.assert_allclose(change(lora_merge([one], weights=[w], combination_type=kind)), w * change(one), atol=1e-5)


@RELAXED
@given(SEEDS, st.sampled_from(SURE))
def test_order_does_not_matter(seed, kind):
    adapters = random(seed, 3)
    w = [0.5, -1.0, 0.25]
    options = {"combination_type": kind, "density": 0.5}
    there = lora_merge(adapters, weights=w, **options)
    back = lora_merge(adapters[::-1], weights=w[::-1], **options)
    np.testing.assert_allclose(change(there), change(back), atol=1e-9)


@RELAXED
@given(SEEDS)
def test_a_rotation_between_the_factors_shows_only_factor_by_factor(seed):
    adapters = random(seed, 2)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    f = adapters[0].modules["q"]
    turned = [Adapter({"q": Factors(Q.T @ f.A, f.B @ Q)}), adapters[1]]
    for kind in ("cat", "svd", "ties_svd"):
        a, b = (change(lora_merge(x, weights=[1.0, 1.0], combination_type=kind, density=1.0)) for x in (adapters, turned))
        np.testing.assert_allclose(a, b, atol=1e-9)
    a, b = (change(lora_merge(x, weights=[1.0, 1.0], combination_type="linear")) for x in (adapters, turned))
    assert np.max(np.abs(a - b)) > 1e-3


def test_draws_depend_on_the_seed_and_are_repeatable():
    adapters = random(0, 2)
    runs = [
        change(lora_merge(adapters, weights=[1.0, 1.0], combination_type="dare_linear", density=0.5, seed=s))
        for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.any(runs[0] != runs[2])


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapters", "options", "error", "message"),
    [
        (random(0, 2, (3, 2)), {"combination_type": "linear"}, InputError, r"q: \[3, 2\]"),
        (random(0), {"combination_type": "ties"}, UsageError, "needs density"),
        (random(0), {"combination_type": "slerp"}, UsageError, "'slerp' is none of"),
        (random(0), {"weights": [1.0]}, UsageError, "1 weights for 2"),
        (random(0, 1) + random(0, 1, shape=(5, 7)), {}, InputError, "different layers"),
        ([random(0, 1)[0], Adapter({"r": random(0)[0].modules["q"]})], {}, InputError, "adapter 0: 'r'; adapter 1: 'q'"),
        ([Adapter(random(0)[0].modules, saved={"n.weight": np.ones(2)})] * 2, {}, UsageError, "n.weight"),
        ([], {"weights": []}, UsageError, "at least one"),
        (random(0), {"svd_rank": 0}, UsageError, "svd_rank = 0"),
    ],
)
def test_refusals(adapters, options, error, message):
    with pytest.raises(error, match=message):
        lora_merge(adapters, **{"weights": [1.0] * 2} | options)


def test_modules_of_some_adapters_on_request():
    a, b = random(0)
    b = Adapter({"r": b.modules["q"]})
    got = lora_merge([a, b], weights=[2.0, 1.0], combination_type="cat", missing="skip")
    np.testing.assert_allclose(got.delta("q"), 2 * a.delta("q"))
    np.testing.assert_allclose(got.delta("r"), b.delta("r"))


def test_paths(tmp_path):
    paths = [write_adapter(a, tmp_path / str(n)) for n, a in enumerate(random(0))]
    got = lora_merge(paths, weights=[1.0, 1.0], combination_type="cat")
    np.testing.assert_array_equal(change(got), change(lora_merge(random(0), weights=[1.0, 1.0], combination_type="cat")))
