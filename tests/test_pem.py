"""Arithmetic of parameter-efficient modules: the authors' results, and laws.

tests/data/pem.npz holds what hkust-nlp/PEM_composition@03bc6ac gave; `about` has parameters and functions.
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
from refmerge.procedures.adapters.pem import cross_terms, pem

DATA = np.load(Path(__file__).parent / "data" / "pem.npz")
ABOUT = json.loads(str(DATA["about"]))
RELAXED = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)


def group(case, part):
    prefix = f"{case}/{part}/"
    return {k.removeprefix(prefix): DATA[k] for k in DATA.files if k.startswith(prefix)}


def random(seed, count, r=2):
    draw = np.random.default_rng(seed)
    return [Adapter({"q": Factors(draw.standard_normal((r, 5)), draw.standard_normal((4, r)))}) for _ in range(count)]


@pytest.mark.parametrize("case", ABOUT)
def test_official(case):
    p = ABOUT[case]["params"]
    count = len({k.split("/")[1] for k in DATA.files if k.startswith(f"{case}/model")})
    options = {"operation": p["op"], "kind": p.get("module", "lora")}
    options["weights"] = p.get("coefficients") or p.get("coefficient_sets")
    if "scale" in p:
        options |= {"scale": -p["scale"], "base": group(case, "base")}
    if "merge_way" in p:
        options |= {k: p[k] for k in ("fisher_floor", "fisher_favor_target_model", "fisher_normalization")}
        options["fisher"] = [group(case, f"stat{n}") for n in range(count)]
    got = pem([group(case, f"model{n}") for n in range(count)], **options)
    for name, x in group(case, "out").items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=ABOUT[case]["tolerance"] * np.max(np.abs(x)))


# --- By hand ----------------------------------------------------------------------------------------------------------

ONE, TWO, THREE = (Adapter({"q": Factors(np.array([[a, 0.0]]), np.array([[b + 0.0]]))}) for a, b in ((2, 4), (6, 2), (4, 8)))


def made(adapter):
    f = adapter.modules["q"]
    return f.A.tolist(), f.B.tolist()


def test_addition():
    """A = (2 + 6) / 2, B = (4 + 2) / 2; the product is 12, the mean of 8 and 12 is 10."""
    got = pem([ONE, TWO])
    assert made(got) == ([[4, 0]], [[3]])
    own, crossed = cross_terms([ONE, TWO])["q"]
    assert (own.tolist(), crossed.tolist()) == ([[5, 0]], [[7, 0]])  # (8 + 12) / 4, (2 * 2 + 4 * 6) / 4
    assert pem([ONE, TWO], on="product").delta("q").tolist() == [[10, 0]]


def test_negation():
    assert made(pem([ONE], operation="negate", scale=0.5)) == ([[2, 0]], [[-2]])
    assert made(pem([ONE], operation="negate", scale=0.5, side="A")) == ([[-1, 0]], [[4]])
    assert pem([ONE], operation="negate", scale=0.5, on="product").delta("q").tolist() == [[-4, 0]]


def test_analogy():
    """A = (2 + 6 + 4) / 2, B = (4 + 2 - 8) / 2; exactly (8 + 12 - 32) / 2."""
    assert made(pem([ONE, TWO, THREE], operation="analogy")) == ([[6, 0]], [[-1]])
    assert pem([ONE, TWO, THREE], operation="analogy", on="product").delta("q").tolist() == [[-6, 0]]
    thirds = pem([ONE, TWO, THREE], operation="analogy", weights=[1, 1, 2])  # (2 + 6 + 8) / 4, (4 + 2 - 16) / 4
    assert made(thirds) == ([[4, 0]], [[-2.5]])


def test_detoxification_forgets_the_first_module():
    """c = 1, -1: A = 2 - (2 - 6), B = 4 - (4 + 2), which is (A of the second, -B of the second)."""
    assert made(pem([ONE, TWO], operation="detox")) == ([[6, 0]], [[-2]])
    assert pem([ONE, TWO], operation="detox", on="product").delta("q").tolist() == [[-4, 0]]
    assert made(pem([ONE, TWO], operation="detox", weights=[1, 0])) == made(ONE)


def test_vectors_and_whole_models():
    a, b, c, base = ({"k": np.array([x])} for x in (0.5, 1.25, 2.0, 3.0))
    assert pem([a], operation="negate", kind="ia3")["k"].tolist() == [1.5]
    assert pem([a, b, c], operation="analogy", kind="ia3")["k"].tolist() == [0.375]  # 1 + (-0.5 + 0.25 - 1) / 2
    assert pem([a], operation="negate", kind="full", base=base, scale=0.5)["k"].tolist() == [4.25]
    assert pem([a, b, c], operation="analogy", kind="full", base=base)["k"].tolist() == [1.375]  # 3 + (-2.5 - 0.75) / 2
    heads = [{"head.w": np.array([x])} for x in (1.0, 2.0)]
    assert pem(heads, kind="full")["head.w"].tolist() == [2.0]
    assert pem(heads, kind="full", leave=())["head.w"].tolist() == [1.5]


def test_fisher():
    """The norms are 5 and 4; F = (3, 4) / 5 and (0, 4) / 4 with the floor on the last: max(0, 1) / 4."""
    x = [{"v": np.array([2.0, 1.0])}, {"v": np.array([6.0, 3.0])}]
    F = [{"v": np.array([3.0, 4.0])}, {"v": np.array([0.0, 4.0])}]
    got = pem(x, kind="ia3", fisher=F, fisher_floor=1.0)["v"]
    np.testing.assert_allclose(got, [(0.6 * 2 + 0.25 * 6) / 0.85, (0.8 * 1 + 1.0 * 3) / 1.8])
    zero = [{"v": np.array([0.0, 1.0])}, {"v": np.array([0.0, 1.0])}]
    with pytest.raises(InputError, match="no module has Fisher information"):
        pem(x, kind="ia3", fisher=zero, fisher_floor=0.0)


# --- Laws -------------------------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS, st.sampled_from(["A", "B"]))
def test_negation_twice_is_nothing_and_once_turns_the_sign(seed, side):
    (a,) = random(seed, 1)
    once = pem([a], operation="negate", side=side)
    np.testing.assert_array_equal(once.delta("q"), -a.delta("q"))
    np.testing.assert_array_equal(pem([once], operation="negate", side=side).delta("q"), a.delta("q"))


@RELAXED
@given(SEEDS, st.lists(st.floats(0.1, 2), min_size=1, max_size=4))
def test_equal_modules_are_returned(seed, w):
    (a,) = random(seed, 1)
    for on in ("factors", "product"):
        np.testing.assert_allclose(pem([a] * len(w), weights=w, on=on).delta("q"), a.delta("q"), atol=1e-12)


@RELAXED
@given(SEEDS, st.lists(st.floats(0.1, 2), min_size=3, max_size=3))
def test_own_and_crossed_terms_are_all(seed, w):
    adapters = random(seed, 3)
    own, crossed = cross_terms(adapters, w)["q"]
    np.testing.assert_allclose(pem(adapters, weights=w).delta("q"), own + crossed, atol=1e-12)
    c = np.array(w) / sum(w)
    np.testing.assert_allclose(own, sum(k**2 * a.delta("q") for k, a in zip(c, adapters)), atol=1e-12)
    exact = sum(k * a.delta("q") for k, a in zip(c, adapters))
    np.testing.assert_allclose(pem(adapters, weights=w, on="product").delta("q"), exact, atol=1e-12)


@RELAXED
@given(SEEDS)
def test_with_a_shared_a_factors_and_products_agree(seed):
    a, b = random(seed, 2)
    b = Adapter({"q": Factors(a.modules["q"].A, b.modules["q"].B)})
    np.testing.assert_allclose(pem([a, b]).delta("q"), pem([a, b], on="product").delta("q"), atol=1e-12)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "options", "error", "message"),
    [
        (random(0, 1) + random(0, 1, 3), {}, InputError, r"q.lora_A: \(2, 5\), \(3, 5\)"),
        ([{"a.lora_A": np.ones(2)}, {"b.lora_A": np.ones(2)}], {}, InputError, "'a.lora_A', 'b.lora_A'"),
        (random(0, 2), {"weights": [1, -1]}, UsageError, "sum to 0"),
        (random(0, 2), {"operation": "negate"}, UsageError, "takes 1 module, not 2"),
        ([{"x": np.ones(2)}], {"operation": "negate"}, InputError, "'x' is no factor"),
        ([{"x": np.ones(2)}], {"operation": "negate", "kind": "full"}, UsageError, "base"),
        ([{"x": np.ones(2)}], {"on": "product"}, UsageError, "Adapters"),
        ([Adapter({"q": Factors(np.ones((1, 2)), np.ones((2, 1)), a)}) for a in (1.0, 2.0)], {}, InputError, "1.0, 2.0"),
        (random(0, 2), {"kind": "ia3"}, UsageError, "kind 'lora'"),
    ],
)
def test_refusals(modules, options, error, message):
    with pytest.raises(error, match=message):
        pem(modules, **options)
