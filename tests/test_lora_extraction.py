"""Adapters out of two checkpoints, and adapters of another rank: mergekit's results, and Eckart and Young's theorem.

tests/data/lora_extraction.npz holds what mergekit 0.1.5's TaskVectorDecompositionTask gave; `about` has the parameters.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError
from refmerge.adapters import Adapter, Factors, apply_adapter, read_adapter, write_adapter
from refmerge.procedures.adapters.lora_extraction import lora_extraction
from refmerge.procedures.adapters.refactor import refactor

DATA = np.load(Path(__file__).parent / "data" / "lora_extraction.npz")
ABOUT = json.loads(str(DATA["about"]))
RELAXED = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)
SIZES = st.integers(1, 8)


def pair(seed, m=6, n=5, name="q.weight"):
    base, tuned = np.random.default_rng(seed).standard_normal((2, m, n))
    return {name: tuned}, {name: base}


@pytest.mark.parametrize("case", ABOUT)
def test_mergekit(case):
    p = ABOUT[case]["params"]
    kind = ml_dtypes.bfloat16 if ABOUT[case].get("dtype") == "bfloat16" else np.float32
    model, base = ({"w.weight": DATA[f"{case}/{k}/w"].astype(kind)} for k in ("model0", "base"))
    adapter, fits = lora_extraction(model, base, rank=p["max_rank"], arithmetic="native")
    f, delta = adapter.modules["w"], DATA[f"{case}/out/delta"]
    bound = ABOUT[case]["tolerance"] * np.max(np.abs(delta))
    assert np.max(np.abs(f.product() - delta)) <= bound
    A = DATA[f"{case}/out/lora_A"]
    signs = np.sign(np.sum(A * f.A.astype(np.float32), axis=1))
    for ours, theirs in (
        (f.A.astype(np.float32) * signs[:, None], A),
        (f.B.astype(np.float32) * signs, DATA[f"{case}/out/lora_B"]),
    ):
        assert np.max(np.abs(ours - theirs)) <= ABOUT[case]["tolerance"] * np.max(np.abs(theirs))
    assert fits["w"].rank == len(A)


# --- Laws -------------------------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS, SIZES, SIZES, SIZES, st.sampled_from(["both", "A", "B"]))
def test_the_error_is_what_is_left_out(seed, m, n, r, scale):
    model, base = pair(seed, m, n)
    adapter, fits = lora_extraction(model, base, rank=r, scale=scale)
    S = np.linalg.svd(model["q.weight"] - base["q.weight"], compute_uv=False)
    assert abs(fits["q"].error - np.linalg.norm(S[r:])) < 1e-9
    assert abs(fits["q"].relative - fits["q"].error / np.linalg.norm(S)) < 1e-12
    left = model["q.weight"] - apply_adapter(base, adapter)["q.weight"]
    assert abs(np.linalg.norm(left) - fits["q"].error) < 1e-9
    f = adapter.modules["q"]
    balanced = {"both": (S[:r], S[:r]), "A": (S[:r] ** 2, S[:r] ** 0), "B": (S[:r] ** 0, S[:r] ** 2)}[scale]
    np.testing.assert_allclose(f.A @ f.A.T, np.diag(balanced[0]), atol=1e-9)
    np.testing.assert_allclose(f.B.T @ f.B, np.diag(balanced[1]), atol=1e-9)


@RELAXED
@given(SEEDS, st.floats(0.01, 1))
def test_the_lowest_rank_with_that_energy(seed, energy):
    model, base = pair(seed)
    _, fits = lora_extraction(model, base, energy=energy)
    S = np.linalg.svd(model["q.weight"] - base["q.weight"], compute_uv=False)
    r, share = fits["q"].rank, np.cumsum(S**2) / np.sum(S**2)
    assert share[r - 1] >= energy - 1e-12 and (r == 1 or share[r - 2] < energy + 1e-12)


@RELAXED
@given(SEEDS, st.integers(1, 5))
def test_random_directions_find_what_is_of_low_rank(seed, r):
    draw = np.random.default_rng(seed)
    low = draw.standard_normal((30, r)) @ draw.standard_normal((r, 20))
    zero = {"q.weight": np.zeros((30, 20))}
    _, fits = lora_extraction({"q.weight": low}, zero, rank=r, randomized=True, oversample=2)
    assert fits["q"].relative < 1e-9
    noisy = {"q.weight": low + draw.standard_normal((30, 20))}
    _, exact = lora_extraction(noisy, zero, rank=r)
    _, near = lora_extraction(noisy, zero, rank=r, randomized=True, oversample=8, iterations=4)
    assert exact["q"].error - 1e-9 <= near["q"].error <= 1.05 * exact["q"].error


@RELAXED
@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 6.0]))
def test_another_rank_is_the_nearest(seed, r, to, alpha):
    draw = np.random.default_rng(seed)
    adapter = Adapter({"q": Factors(draw.standard_normal((r, 5)), draw.standard_normal((6, r)), alpha)})
    made, fits = refactor(adapter, rank=to)
    D = adapter.delta("q")
    S = np.linalg.svd(D, compute_uv=False)
    assert made.modules["q"].rank == min(to, r) and made.modules["q"].scaling == 1
    assert abs(np.linalg.norm(D - made.delta("q")) - np.linalg.norm(S[to:])) < 1e-9
    assert abs(fits["q"].error - np.linalg.norm(S[to:])) < 1e-9


def test_an_extracted_adapter_refactored_is_one_of_lower_rank_extracted():
    model, base = pair(0)
    high, _ = lora_extraction(model, base, rank=5)
    low, _ = lora_extraction(model, base, rank=2)
    np.testing.assert_allclose(refactor(high, rank=2)[0].delta("q"), low.delta("q"), atol=1e-12)


# --- What is taken ----------------------------------------------------------------------------------------------------


def test_tables_convolutions_and_turned_weights(tmp_path):
    draw = np.random.default_rng(0)
    shapes = {"emb.weight": (7, 3), "conv.weight": (4, 2, 3, 3), "q.weight": (4, 3)}
    model, base = ({k: draw.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(2))
    adapter, _ = lora_extraction(model, base, rank=9, embeddings=["emb"])
    assert adapter.modules["emb"].A.shape == (3, 7) and adapter.modules["conv"].B.shape == (4, 4, 1, 1)
    back = read_adapter(write_adapter(adapter, tmp_path / "a"))
    for name, x in apply_adapter(base, back).items():
        np.testing.assert_allclose(x, model[name], atol=1e-5)
    turned, _ = lora_extraction({"q.weight": model["q.weight"]}, {"q.weight": base["q.weight"]}, rank=9, fan_in_fan_out=True)
    assert turned.modules["q"].A.shape == (3, 4)
    np.testing.assert_allclose(apply_adapter(base, turned)["q.weight"], model["q.weight"], atol=1e-5)


def test_what_is_no_matrix():
    model, base = pair(0)
    model["n.weight"], base["n.weight"] = np.ones(3), np.zeros(3)
    model["m.bias"] = base["m.bias"] = np.ones(3)
    with pytest.raises(InputError, match=r"'n\.weight' changed and are no matrices"):
        lora_extraction(model, base, rank=1)
    assert not lora_extraction(model, base, rank=1, rest="skip")[0].saved
    kept, _ = lora_extraction(model, base, rank=5, rest="save")
    assert list(kept.saved) == ["n.weight"]
    np.testing.assert_allclose(apply_adapter(base, kept)["n.weight"], 1)
    assert list(lora_extraction(model, base, rank=1, rest="skip", only="^r")[0].modules) == []


def test_nothing_changed():
    model, _ = pair(0)
    adapter, fits = lora_extraction(model, model, rank=2)
    assert (fits["q"].rank, fits["q"].error, fits["q"].relative) == (2, 0, 0)
    assert adapter.delta("q").any() == False  # noqa: E712
    assert lora_extraction(model, model, energy=0.5)[1]["q"].rank == 0
    none, fits = lora_extraction(model, model, rank=2, threshold=1e-3)
    assert fits["q"].rank == 0
    assert refactor(none, rank=1)[1]["q"].error == 0


def test_refusals():
    model, base = pair(0)
    for options, error, message in (
        ({}, UsageError, "one of rank and energy"),
        ({"rank": 1, "energy": 0.5}, UsageError, "one of rank and energy"),
        ({"energy": 0.5, "randomized": True}, UsageError, "needs rank"),
        ({"rank": 1, "rest": "lose"}, UsageError, "'lose' is none of"),
    ):
        with pytest.raises(error, match=message):
            lora_extraction(model, base, **options)
    with pytest.raises(InputError, match=r"'r\.weight'"):
        lora_extraction(model | {"r.weight": np.ones((2, 2))}, base, rank=1)
    with pytest.raises(InputError, match="infinite or NaN"):
        lora_extraction({"q.weight": np.full((2, 2), np.nan)}, {"q.weight": np.zeros((2, 2))}, rank=1)
