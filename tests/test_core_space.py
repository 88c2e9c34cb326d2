"""Merging LoRA adapters in their core space: the authors' results, and laws.

tests/data/core_space.npz holds what MatrixPerLayerMerger gave in apanariello4/core-space-merging@85176fa for two layers:
factors, base and merged weights, and under `about` the parameters.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import InputError, UsageError
from refmerge.adapters import Adapter, Factors, apply_adapter, write_adapter
from refmerge.method import method
from refmerge.numeric import like, scores
from refmerge.procedures.subspaces.core_space import core_space

DATA = np.load(Path(__file__).parent / "data" / "core_space.npz")
ABOUT = json.loads(str(DATA["about"]))
RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)
# Methods of which the basis of the core space is none of the business.
FREE = [("task_arithmetic", {}), ("task_arithmetic", {"lambda_": 0.25}), ("cart", {"rank_ratio": 0.3, "layers": ("*",)})]


@method("tsv", paper="none", view="tensor")
def tsv(models):
    """The authors' TSV: int(d / T) terms of each, their vectors made orthonormal."""
    triples = [np.linalg.svd(scores(m)) for m in models]
    k = min(models[0].shape) // len(models)
    left, right = (polar(np.concatenate(x, axis=1)) for x in zip(*((u[:, :k], vt[:k].T) for u, _, vt in triples)))
    return like((left * np.concatenate([s[:k] for _, s, _ in triples])) @ right.T, models[0])


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def random(seed, ranks=(3, 2, 4), shape=(9, 11), alpha=None):
    draw = np.random.default_rng(seed)
    return [
        Adapter({"q": Factors(draw.standard_normal((r, shape[1])), draw.standard_normal((shape[0], r)), alpha)})
        for r in ranks
    ]


def product(adapter, module="q"):
    return adapter.modules[module].product()


# --- The authors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ABOUT)
def test_authors(case):
    about = ABOUT[case]
    x = {k.removeprefix(case + "/"): DATA[k] for k in DATA.files if k.startswith(case + "/")}
    modules = sorted({k.split("/")[1].removesuffix(".weight") for k in x if k.startswith("out/")})
    adapters = [
        Adapter({m: Factors(x[f"model{t}/{m}.weight.lora_A"], x[f"model{t}/{m}.weight.lora_B"]) for m in modules})
        for t in range(len(about["params"]["ranks"]))
    ]
    rule = {"sum": "task_arithmetic", "tsv": tsv}[about["params"]["merge_method"]]
    merged = core_space(adapters, method=rule, isotropize=about["params"].get("isotropize", False))
    base = {k.removeprefix("base/"): v for k, v in x.items() if k.startswith("base/")}
    got = apply_adapter(base, merged, weight=about["params"]["scaling_coeffs"])
    for m in modules:
        expected = x[f"out/{m}.weight"]
        assert got[f"{m}.weight"].dtype == expected.dtype
        off = np.max(np.abs(got[f"{m}.weight"].astype(np.float64) - expected))
        assert off <= about["tolerance"] * np.max(np.abs(expected))


# --- Laws -------------------------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS)
def test_nothing_is_lost(seed):
    adapters = random(seed)
    expected = sum(map(product, adapters))
    np.testing.assert_allclose(product(core_space(adapters)), expected, atol=1e-12)
    weighted = core_space(adapters, weights=[1.0, -2.0, 0.5])
    np.testing.assert_allclose(
        product(weighted), product(adapters[0]) - 2 * product(adapters[1]) + product(adapters[2]) / 2, atol=1e-12
    )


@RELAXED
@given(SEEDS, st.sampled_from([*FREE, (tsv, {})]), st.booleans())
def test_factors_do_not_matter_but_their_product(seed, rule, isotropize):
    """A -> G A and B -> B G^-1: another pair of factors of the same change, in other bases."""
    draw = np.random.default_rng(seed)
    adapters = random(seed, ranks=(2, 3, 2))
    other = []
    for a in adapters:
        f = a.modules["q"]
        G = np.linalg.qr(draw.standard_normal((f.rank, f.rank)))[0] * draw.uniform(0.5, 2, f.rank)
        other.append(Adapter({"q": Factors(G @ f.A, f.B @ np.linalg.inv(G))}))
    one, two = (product(core_space(x, method=rule[0], isotropize=isotropize, **rule[1])) for x in (adapters, other))
    np.testing.assert_allclose(one, two, atol=1e-9 * np.max(np.abs(one)))


@RELAXED
@given(SEEDS, st.sampled_from(FREE))
def test_it_is_the_method_on_the_products(seed, rule):
    """What does not ask for a basis gives the same in the core space and in full: sums and what is made of spectra."""
    adapters = random(seed, ranks=(2, 2, 2), shape=(7, 8))
    full = refmerge.call(rule[0], [product(a) for a in adapters], np.zeros((7, 8)), name="q", **rule[1])
    if rule[0] == "cart":  # whose rank is a share of the matrix it sees: 2 of 7 in full, 1 of 6 in the core
        full = refmerge.call("cart", [product(a) for a in adapters], name="q", rank_ratio=0.2, layers=("*",))
    np.testing.assert_allclose(product(core_space(adapters, method=rule[0], **rule[1])), full, atol=1e-10)


@RELAXED
@given(SEEDS)
def test_of_equal_adapters_tsv_and_isotropy_are_well_posed(seed):
    (a,) = random(seed, ranks=(3,))
    copies = [a] * 3
    change = product(a)
    np.testing.assert_allclose(product(core_space(copies, method="task_arithmetic", lambda_=1 / 3)), change, atol=1e-12)
    iso = product(core_space(copies, isotropize=True))
    S = np.linalg.svd(change, compute_uv=False)[:3]
    assert np.linalg.matrix_rank(iso, tol=1e-9) == 3
    np.testing.assert_allclose(np.linalg.svd(iso, compute_uv=False)[:3], 3 * np.mean(S), rtol=1e-10)
    assert core_space(copies, isotropize=True).modules["q"].rank == 3


@RELAXED
@given(SEEDS, st.sampled_from(["task_arithmetic", "ties", "tsvm", "iso_c"]))
def test_isotropy_of_one_change_by_other_factors_is_the_same_in_float32_and_float64(seed, rule):
    draw = np.random.default_rng(seed)
    A, B = draw.standard_normal((4, 24)), draw.standard_normal((16, 4))
    turns, made = draw.standard_normal((3, 4, 4)), []
    for dtype in (np.float32, np.float64):
        adapters = [Adapter({"q": Factors((G @ A).astype(dtype), (B @ np.linalg.inv(G)).astype(dtype))}) for G in turns]
        made.append(product(core_space(adapters, method=rule, isotropize=True)).astype(float))
    assert np.linalg.norm(made[0] - made[1]) <= 1e-4 * np.linalg.norm(made[1])


def test_zero_adapters_change_nothing():
    adapters = random(0, ranks=(2, 2))
    still = Adapter({"q": Factors(adapters[1].modules["q"].A, np.zeros((9, 2)))})
    np.testing.assert_allclose(product(core_space([adapters[0], still])), product(adapters[0]), atol=1e-12)
    nothing = core_space([still, still], isotropize=True)
    assert nothing.modules["q"].rank == 0 and not np.any(product(nothing))


def test_the_scaling_of_an_adapter_counts():
    adapters = [random(s, ranks=(2,), alpha=alpha)[0] for s, alpha in ((0, 8.0), (1, 2.0))]
    merged = core_space(adapters)
    assert merged.modules["q"].scaling == 1.0
    np.testing.assert_allclose(product(merged), sum(map(product, adapters)), atol=1e-12)
    assert product(adapters[0]).shape == (9, 11) and adapters[0].modules["q"].scaling == 4.0


def test_ties_by_hand():
    """Factors that are unit vectors in the order of their size: coordinates are entries."""
    one, D, E = np.eye(3), np.diag([1.0, 2.0, 3.0]), np.diag([4.0, 5.0, 6.0])
    # The factors side by side, [E I] and [I D], have the singular vectors e_2, e_1, e_0, by size.
    adapters = [Adapter({"q": Factors(one, E)}), Adapter({"q": Factors(D, one)})]
    merged = product(core_space(adapters, method="ties", density=1.0))
    np.testing.assert_allclose(merged, np.diag([2.5, 3.5, 4.5]), atol=1e-12)


def test_recorded_draws():
    adapters = random(3, ranks=(2, 2))
    kept, dropped = np.ones((4, 4)), np.zeros((4, 4))
    got = core_space(adapters, method="dare_linear", density=0.5, draws=[{"q": kept}, {"q": dropped}])
    np.testing.assert_allclose(product(got), 2 * product(adapters[0]), atol=1e-12)


def test_draws_depend_on_the_seed():
    adapters = random(3, ranks=(2, 2))
    one, same, other = (product(core_space(adapters, method="dare_linear", density=0.5, seed=s)) for s in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_modules_that_some_adapters_lack():
    one, two = random(0, ranks=(2, 3))
    two = Adapter({**two.modules, "k": two.modules["q"]})
    with pytest.raises(InputError, match="core_space: modules are missing in adapter 0: 'k'"):
        core_space([one, two])
    got = core_space([one, two], missing="skip", method="task_arithmetic", lambda_=0.5)
    np.testing.assert_allclose(product(got, "k"), product(two) / 2, atol=1e-12)
    np.testing.assert_allclose(product(got), (product(one) + product(two)) / 2, atol=1e-12)


def test_convolutions_and_tables():
    draw = np.random.default_rng(5)
    convs = [
        Adapter({"c": Factors(draw.standard_normal((2, 3, 2, 2)), draw.standard_normal((4, 2, 1, 1)))}) for _ in range(2)
    ]
    got = core_space(convs)
    np.testing.assert_allclose(got.delta("c"), sum(a.delta("c") for a in convs), atol=1e-12)
    tables = [
        Adapter({"e": Factors(draw.standard_normal((2, 7)), draw.standard_normal((3, 2)), embedding=True)}) for _ in range(2)
    ]
    np.testing.assert_allclose(core_space(tables).delta("e"), sum(a.delta("e") for a in tables), atol=1e-12)


def test_folders(tmp_path):
    adapters = random(1, ranks=(2, 2))
    paths = [write_adapter(a, tmp_path / str(i)) for i, a in enumerate(adapters)]
    np.testing.assert_allclose(product(core_space(paths)), product(core_space(adapters)), atol=1e-12)


def test_refusals():
    adapters = random(0, ranks=(2, 2))
    with pytest.raises(UsageError, match="at least one"):
        core_space([])
    with pytest.raises(UsageError, match="1 weights for 2 adapters"):
        core_space(adapters, weights=[1.0])
    with pytest.raises(UsageError, match="missing = 'all'"):
        core_space(adapters, missing="all")
    with pytest.raises(UsageError, match="no method 'tis'"):
        core_space(adapters, method="tis")
    with pytest.raises(UsageError, match="has no parameter 'densty'"):
        core_space(adapters, method="ties", densty=0.1)
    with pytest.raises(InputError, match="different layers: 9 x 11; 9 x 5"):
        core_space([adapters[0], *random(0, ranks=(2,), shape=(9, 5))])
    with pytest.raises(UsageError, match="modules_to_save"):
        core_space([Adapter(adapters[0].modules, saved={"head.weight": np.ones(2)})])
    broken = Adapter({"q": Factors(np.full((1, 11), np.nan), np.ones((9, 1)))})
    with pytest.raises(InputError, match="'q': a change that is infinite or NaN"):
        core_space([broken])
    turned = Adapter(adapters[1].modules, {"fan_in_fan_out": True})
    with pytest.raises(InputError, match="fan_in_fan_out differs"):
        core_space([adapters[0], turned])
