"""Any method on the changes that adapters make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import InputError, UsageError
from refmerge.adapters import Adapter, Factors, apply_adapter
from refmerge.procedures.adapters.delta_merge import delta_merge

RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
METHODS = {
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "task_arithmetic": {"lambda_": 0.3},
    "breadcrumbs": {"density": 0.6},
    "model_stock": {},
}


def adapters(draw, count=3):
    """Of a matrix, a table and a convolution, with other ranks and scalings each."""
    made = []
    for _ in range(count):
        r = int(draw.integers(1, 4))
        factors = {
            "m": (draw.standard_normal((r, 5)), draw.standard_normal((6, r)), False),
            "e": (draw.standard_normal((r, 7)), draw.standard_normal((4, r)), True),
            "c": (draw.standard_normal((r, 2, 2, 2)), draw.standard_normal((3, r, 1, 1)), False),
        }
        made.append(Adapter({m: Factors(A, B, alpha=2.0, embedding=table) for m, (A, B, table) in factors.items()}))
    return made


@RELAXED
@given(st.integers(0, 10**6), st.sampled_from(sorted(METHODS)))
def test_it_is_the_merge_of_the_models(seed, method):
    draw = np.random.default_rng(seed)
    base = {"m.weight": draw.standard_normal((6, 5)), "e.weight": draw.standard_normal((7, 4))}
    base["c.weight"] = draw.standard_normal((3, 2, 2, 2))
    given_ = adapters(draw)
    options = {"seed": seed, "over": "tensor"}
    merged, fits = delta_merge(given_, method, parameters=METHODS[method], rank=8, **options)
    models = [apply_adapter(base, a) for a in given_]
    expected = refmerge.merge(models, method, base=base, **options, **METHODS[method])
    got = apply_adapter(base, merged)
    for name in base:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-9)
    assert max(fit.relative for fit in fits.values()) < 1e-12


@RELAXED
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_the_error_is_what_is_left_out(seed, rank):
    given_ = adapters(np.random.default_rng(seed))
    whole, _ = delta_merge(given_, "task_arithmetic", rank=9)
    cut, fits = delta_merge(given_, "task_arithmetic", rank=rank)
    for module, fit in fits.items():
        D = whole.modules[module].product()
        S = np.linalg.svd(D, compute_uv=False)
        np.testing.assert_allclose(fit.error, np.linalg.norm(S[rank:]), atol=1e-9)
        np.testing.assert_allclose(fit.error, np.linalg.norm(D - cut.modules[module].product()), atol=1e-9)
        assert fit.rank == min(rank, *D.shape)


@RELAXED
@given(st.integers(0, 10**6))
def test_a_rotation_between_the_factors_shows_not(seed):
    draw = np.random.default_rng(seed)
    given_ = adapters(draw, 2)
    turned = []
    for a in given_:
        f = a.modules["m"]
        Q, _ = np.linalg.qr(draw.standard_normal((f.rank, f.rank)))
        turned.append(replace(a, modules=a.modules | {"m": replace(f, A=Q.T @ f.A, B=f.B @ Q)}))
    one, other = (delta_merge(x, "task_arithmetic", rank=4)[0].delta("m") for x in (given_, turned))
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_over_the_model_by_hand():
    """Changes 1, 2 and 3, 4: half of all four entries stay, which are both of the second module."""
    A = Adapter({m: Factors(np.array([[x, y]]), np.ones((1, 1))) for m, x, y in (("a", 1.0, 2.0), ("b", 3.0, 4.0))})
    options = {"parameters": {"density": 0.5}, "rank": 1}
    merged = delta_merge([A], "ties", over="model", **options)[0]
    assert [merged.delta(m).round(9).tolist() for m in "ab"] == [[[0, 0]], [[3, 4]]]
    apart = delta_merge([A], "ties", over="tensor", **options)[0]
    assert [apart.delta(m).round(9).tolist() for m in "ab"] == [[[0, 2]], [[0, 4]]]


def test_what_is_refused():
    draw = np.random.default_rng(0)
    a, b, _ = adapters(draw)
    with pytest.raises(InputError, match="modules are missing in adapter 1: 'c'"):
        delta_merge([a, replace(b, modules={m: b.modules[m] for m in "me"})], "linear", rank=1)
    with pytest.raises(UsageError, match="give one of rank and energy"):
        delta_merge([a, b], "linear")
    with pytest.raises(UsageError, match="fisher needs more than changes"):
        delta_merge([a, b], "fisher", rank=1)
    with pytest.raises(UsageError, match="none of 'error', 'zero'"):
        delta_merge([a, b], "linear", rank=1, missing="skip")
    dora = replace(a, modules={"m": replace(a.modules["m"], magnitude=np.ones(6))})
    with pytest.raises(UsageError, match=r"'m' have a magnitude \(DoRA\)"):
        delta_merge([dora], "linear", rank=1)
