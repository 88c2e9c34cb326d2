"""WUDI, DOGE and DOP descend: where to, and what that does not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refmerge
from refmerge.methods.subspaces.doge import gradient, shared_basis
from refmerge.methods.subspaces.dop import balanced, difference, shortest, subspaces

RELAXED = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)


def random(seed, count=3, shape=(5, 7), rank=None):
    draw = np.random.default_rng(seed)
    if rank is None:
        return [draw.standard_normal(shape) for _ in range(count)]
    return [draw.standard_normal((shape[0], rank)) @ draw.standard_normal((rank, shape[1])) for _ in range(count)]


def turn(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def wudi(models, **params):
    return refmerge.call("wudi", models, np.zeros_like(models[0]), **params)


def loss(tau, models):
    return sum(np.sum(((tau - x) @ x.T / np.linalg.norm(x)) ** 2) for x in models)


# --- WUDI -------------------------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS, st.sampled_from([{}, {"steps": 20, "lr": 0.01}, {"solver": "exact"}]))
def test_wudi_does_not_look_at_the_order(seed, params):
    models = random(seed)
    np.testing.assert_allclose(wudi(models[::-1], **params), wudi(models, **params), atol=1e-8)


@RELAXED
@given(SEEDS, st.sampled_from([None, 1, 2]))
def test_the_exact_solver_scales_and_turns(seed, rank):
    models = random(seed, rank=rank)
    L, R = turn(seed, 5), turn(seed + 1, 7)
    exact = wudi(models, solver="exact")
    size = np.max(np.abs(exact))
    np.testing.assert_allclose(wudi([3 * x for x in models], solver="exact"), 3 * exact, atol=1e-8 * size)
    np.testing.assert_allclose(wudi([L @ x @ R for x in models], solver="exact"), L @ exact @ R, atol=1e-8 * size)


@RELAXED
@given(SEEDS, st.sampled_from([None, 2]))
def test_nothing_is_better_than_the_minimum(seed, rank):
    models = random(seed, rank=rank)
    exact = wudi(models, solver="exact")
    draw = np.random.default_rng(seed)
    for x in (*models, sum(models), *(exact + 0.1 * draw.standard_normal(exact.shape) for _ in range(5))):
        assert loss(exact, models) <= loss(x, models) + 1e-9
    # And it is the shortest of the best: none of it is seen by no input.
    V = np.linalg.svd(np.concatenate(models))[2][np.linalg.matrix_rank(np.concatenate(models)) :]
    np.testing.assert_allclose(exact @ V.T, 0, atol=1e-8)


@RELAXED
@given(SEEDS)
def test_adam_heads_for_the_minimum(seed):
    models = random(seed, count=2, shape=(3, 4))
    exact = wudi(models, solver="exact")
    far, near = (wudi(models, steps=s, lr=0.01) for s in (100, 4000))
    assert loss(near, models) < loss(sum(models), models)
    assert loss(near, models) - loss(exact, models) < 0.1 * (loss(far, models) - loss(exact, models)) + 1e-9


# --- DOGE -------------------------------------------------------------------------------------------------------------


def doge(models, **params):
    return refmerge.call("doge", models, np.zeros_like(models[0]), **{"steps": 20} | params)


@RELAXED
@given(SEEDS, st.sampled_from([None, 2]))
def test_doge_does_not_look_at_the_order(seed, rank):
    models = random(seed, shape=(12, 13), rank=rank)
    np.testing.assert_allclose(doge(models[::-1]), doge(models), atol=1e-8)


@RELAXED
@given(SEEDS)
def test_the_gradient_of_doge(seed):
    *T, Delta = random(seed, count=4)
    c = np.random.default_rng(seed).uniform(0.1, 1, 3)

    def value(X):
        rest = sum(a * x for a, x in zip(c, T)) + np.sum(c) * X
        return sum(np.sum(np.sum(x * (x - rest), axis=1) ** 2) for x in T)

    check_gradient(value, gradient(Delta, T, list(c)), Delta, seed)


@RELAXED
@given(SEEDS, st.integers(1, 4))
def test_what_equal_models_share(seed, count):
    """All directions alike: those come first in which the task vectors are larger, whatever LAPACK does."""
    (one,) = random(seed, count=1, shape=(8, 9))
    B = shared_basis([one] * count, 4, 1e-5)
    U = np.linalg.svd(one)[0][:, : min(2, 8 // count)]
    np.testing.assert_allclose(B @ B.T, U @ U.T, atol=1e-8)


@RELAXED
@given(SEEDS)
def test_what_orthogonal_models_share(seed):
    L = turn(seed, 6)
    one, two = L[:, :3] @ np.diag([9.0, 5.0, 1.0]) @ L[:3], L[:, 3:] @ np.diag([7.0, 6.0, 2.0]) @ L[3:]
    B = shared_basis([one, two], 2, 1e-5)
    expected = L[:, [0, 3, 4]]  # 9, 7, 6
    np.testing.assert_allclose(B @ B.T, expected @ expected.T, atol=1e-8)


def test_the_correction_leaves_the_shared_subspace_alone():
    models = random(0, shape=(12, 13))
    base = np.zeros((12, 13))
    learnt, plain = (refmerge.call("doge", models, base, density=1.0, steps=s, subspace=2) for s in (30, 0))
    B = shared_basis(models, 2, 1e-5)
    (size,) = {B.shape[1]}
    assert size == 6
    # Adam works entry by entry and so leaves the projected gradients' space; its first step's sign shows them.
    first = refmerge.call("doge", models, base, density=1.0, steps=1, subspace=2) - plain
    assert np.any(first) and np.any(learnt - plain)


# --- DOP --------------------------------------------------------------------------------------------------------------


def check_gradient(value, gradient, X, seed):
    E = np.random.default_rng(seed + 1).standard_normal(X.shape)
    h = 1e-5
    slope = (value(X + h * E) - value(X - h * E)) / (2 * h)
    assert slope == pytest.approx(np.sum(gradient * E), rel=1e-5, abs=1e-6 * abs(value(X)) + 1e-9)


@RELAXED
@given(SEEDS, st.sampled_from([0.5, 0.9, 1.0]))
def test_the_gradient_of_dop(seed, energy):
    D, X = random(seed, count=2)
    seen = difference(D, *subspaces(D, energy))
    check_gradient(lambda Y: seen(Y)[0], seen(X)[1], X, seed)
    assert seen(D)[0] == 0


@RELAXED
@given(SEEDS, st.floats(0.01, 0.99))
def test_the_subspaces_have_the_energy_asked_for(seed, energy):
    (D,) = random(seed, count=1)
    left, right = subspaces(D, energy)
    S = np.linalg.svd(D, compute_uv=False)
    r = len(left)
    assert np.sum(S[:r]) >= energy * np.sum(S) > np.sum(S[: r - 1])
    np.testing.assert_allclose(np.linalg.norm(left, axis=1), S[:r])
    np.testing.assert_allclose(np.linalg.norm(right, axis=0), S[:r])


@RELAXED
@given(SEEDS, st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_the_mixture_falls(seed, alpha):
    models = random(seed, count=2)
    seen = [difference(D, *subspaces(D, 0.99999)) for D in models]

    def mixed(X):
        return alpha * seen[0](X)[0] + (1 - alpha) * seen[1](X)[0]

    merged = refmerge.call("dop", models, np.zeros((5, 7)), balance="fixed", alpha=alpha, steps=300)
    assert mixed(merged) <= mixed(sum(models) / 2)


@RELAXED
@given(SEEDS)
def test_the_shortest_mixture(seed):
    a, b = random(seed, count=2)
    c = shortest(a, b)
    lengths = [np.linalg.norm(x * a + (1 - x) * b) for x in np.linspace(0, 1, 101)]
    assert np.linalg.norm(c * a + (1 - c) * b) <= min(lengths) + 1e-2 * max(lengths)
    assert shortest(a, 2 * a) == 0.999 and shortest(2 * a, a) == 0.001
    assert shortest(0 * a, a) == 0.999 and shortest(a, a) == 0.999


@RELAXED
@given(SEEDS)
def test_the_weight_drifts_to_the_shortest(seed):
    models = random(seed, count=2)
    seen = [difference(D, *subspaces(D, 0.99999)) for D in models]
    X = sum(models) / 2
    (l_1, g_1), (l_2, g_2) = (s(X) for s in seen)
    c = shortest(g_1 / l_1, g_2 / l_2)
    got = balanced(seen, 0.8, "mgda", 0.75)(X)
    w = 0.75 * 0.8 + 0.25 * c
    np.testing.assert_allclose(got, w * g_1 + (1 - w) * g_2)
