"""LoRACLR's fit and ensembles of adapters: the authors' results, and laws.

tests/data/loraclr.npz holds what enisimsar/LoRACLR@93e34e0 gave, weight_fusion.py:update_contrastive, in float32 on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError
from refmerge.adapters import Adapter, Factors
from refmerge.procedures.adapters.ensemble_predict import ensemble_predict
from refmerge.procedures.adapters.loraclr import loraclr, loss

DATA = np.load(Path(__file__).parent / "data" / "loraclr.npz")
ABOUT = json.loads(str(DATA["about"]))
RELAXED = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)
OFF = {"lambda_con": 0.0, "lambda_mse": 0.0, "lambda_reg": 0.0}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("case", ABOUT)
def test_official(case, recorded):
    p = ABOUT[case]["params"]
    x = {k.removeprefix(case + "/"): DATA[k] for k in DATA.files if k.startswith(case + "/")}
    count = sum(k.endswith("lora_up") for k in x)
    adapters = [Adapter({"w": Factors(x[f"model{n}/lora_down"], x[f"model{n}/lora_up"])}) for n in range(count)]
    pairs = [(x[f"stat{n}/inputs"], x[f"stat{n}/targets"]) for n in range(count)]
    options = {k: p[k] for k in ("alpha", "margin", "lambda_con", "lambda_mse", "lambda_reg")}
    inputs = [{"w": q if recorded else q[0]} for q in pairs]
    got = loraclr({"w.weight": x["base/w"]}, adapters, inputs, iterations=p["iters"], learning_rate=p["lr"], **options)
    expected = x["out/w"]
    assert np.max(np.abs(got["w.weight"] - expected)) <= ABOUT[case]["tolerance"] * np.max(np.abs(expected))


def concepts(seed, count=2, tokens=3):
    draw = np.random.default_rng(seed)
    base = {"w.weight": draw.standard_normal((3, 4))}
    adapters = [Adapter({"w": Factors(draw.standard_normal((1, 4)), draw.standard_normal((3, 1)))}) for _ in range(count)]
    return base, adapters, [{"w": draw.standard_normal((tokens, 4))} for _ in range(count)]


@RELAXED
@given(SEEDS, st.sampled_from([0.5, 20.0]))
def test_the_gradient_is_that_of_the_objective(seed, margin):
    draw = np.random.default_rng(seed)
    X, V, W, D = (draw.standard_normal(s) for s in ((3, 2, 4), (3, 2, 3), (3, 4), (3, 4)))

    def value(D):
        return loss(X @ (W + D).T, V, D, X, margin, 1.0, 0.1, 0.01)[0]

    gradient = loss(X @ (W + D).T, V, D, X, margin, 1.0, 0.1, 0.01)[1]
    step = draw.standard_normal(D.shape) * 1e-6
    assert abs(value(D + step) - value(D - step) - 2 * np.sum(gradient * step)) < 1e-7 * max(1, np.abs(gradient).max())


@RELAXED
@given(SEEDS)
def test_order_does_not_matter_and_one_step_is_none(seed):
    base, adapters, inputs = concepts(seed)
    there = loraclr(base, adapters, inputs, iterations=5)["w.weight"]
    back = loraclr(base, adapters[::-1], inputs[::-1], iterations=5)["w.weight"]
    np.testing.assert_allclose(there, back, atol=1e-9)
    np.testing.assert_array_equal(loraclr(base, adapters, inputs, iterations=1)["w.weight"], base["w.weight"])


def test_long_enough_it_is_least_squares():
    base, adapters, inputs = concepts(0, tokens=8)
    options = OFF | {"lambda_mse": 1.0, "learning_rate": 0.01, "weight_decay": 0.0, "iterations": 5000}
    got = loraclr(base, adapters, inputs, **options)["w.weight"]
    X = np.concatenate([i["w"] for i in inputs])
    V = np.concatenate([i["w"] @ (base["w.weight"] + a.delta("w")).T for i, a in zip(inputs, adapters)])
    np.testing.assert_allclose(got, np.linalg.lstsq(X, V, rcond=None)[0].T, atol=1e-3)


def test_refusals():
    base, adapters, inputs = concepts(0)
    with pytest.raises(UsageError, match="inputs of 1 concepts"):
        loraclr(base, adapters, inputs[:1])
    with pytest.raises(InputError, match="no inputs of module 'w' for concept 1"):
        loraclr(base, adapters, [inputs[0], {}])
    with pytest.raises(InputError, match="equally many"):
        loraclr(base, adapters, [inputs[0], {"w": inputs[1]["w"][:1]}])
    with pytest.raises(InputError, match=r"no 'w\.weight'"):
        loraclr({}, adapters, inputs)


# --- Ensembles --------------------------------------------------------------------------------------------------------


def forward(model):
    return np.array([[1.0, 2, 0, 1], [0, 1, 1, 0]]) @ model["w.weight"].T


@RELAXED
@given(SEEDS, st.integers(1, 4))
def test_ensembles(seed, count):
    base, adapters, _ = concepts(seed, count)
    got = ensemble_predict(base, adapters, forward)
    np.testing.assert_allclose(got.mean.sum(axis=-1), 1)
    np.testing.assert_allclose(got.mean, got.members.mean(axis=0))
    assert np.all(got.spread >= -1e-12)  # Jensen
    nll = -np.log(got.members)
    assert np.all(-np.log(got.mean) <= nll.mean(axis=0) + 1e-12)
    np.testing.assert_allclose(ensemble_predict(base, adapters[::-1], forward).mean, got.mean, atol=1e-12)
    same = ensemble_predict(base, adapters[:1] * 3, forward)
    np.testing.assert_allclose(same.mean, same.members[0])
    np.testing.assert_allclose(same.spread, 0, atol=1e-12)


def test_probabilities_and_logits_by_hand():
    """Members (1/2, 1/2) and (1/4, 3/4): their mean (3/8, 5/8); of logits 1 : sqrt(3)."""
    base = {"w.weight": np.zeros((2, 1))}
    adapters = [Adapter({"w": Factors(np.array([[1.0]]), np.array([[0.0], [np.log(x)]]))}) for x in (1, 3)]

    def answer(model):
        return model["w.weight"][:, 0]

    np.testing.assert_allclose(ensemble_predict(base, adapters, answer).mean, [3 / 8, 5 / 8])
    got = ensemble_predict(base, adapters, answer, average="logits").mean
    np.testing.assert_allclose(got[1] / got[0], np.sqrt(3))
    np.testing.assert_allclose(ensemble_predict(base, adapters, answer, weights=[3, 1]).mean, [7 / 16, 9 / 16])
    for wrong in ([1], [0, 0], [2, -1]):
        with pytest.raises(UsageError, match="2 weights"):
            ensemble_predict(base, adapters, answer, weights=wrong)
