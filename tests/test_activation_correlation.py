"""Correlations of units: by hand and as laws."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import UsageError, registry

activation_correlation = registry.procedure("activation_correlation")
U, V = np.array([-1.0, 0.0, 1.0]), np.array([1.0, -2.0, 1.0])


def columns(*xs):
    return np.stack(xs, axis=1)


def test_two_units_by_hand():
    found = activation_correlation(columns(U, V), columns(V, U + V))
    np.testing.assert_allclose(found.matrix, [[0, 0.5], [1, math.sqrt(3) / 2]], atol=1e-15)
    assert found.match.tolist() == [1, 0]
    assert found.aligned == pytest.approx(math.sqrt(3) / 4)
    assert found.matched == found.best == pytest.approx(0.75)
    assert found.constant == (0, 0)


def test_units_that_do_not_vary():
    found = activation_correlation(columns(U, U * 0 + 0.1), columns(V * 0 + 0.1, U))
    assert found.matrix.tolist() == [[0, pytest.approx(1)], [0, 0]]
    assert found.constant == (1, 1) and found.aligned == 0.0 and found.matched == pytest.approx(0.5)
    one = activation_correlation(np.ones((1, 2)), np.ones((1, 2)))
    assert one.matrix.tolist() == [[0, 0], [0, 0]] and one.constant == (2, 2)


def test_layers_of_different_width():
    found = activation_correlation(columns(U, V, U + V), columns(V, U))
    assert found.aligned is None and found.match.tolist() == [1, 0, -1] and found.matched == pytest.approx(1)
    assert activation_correlation(columns(V, U), columns(U, V, U + V)).match.tolist() == [1, 0]


def test_what_is_not_finite_is_not_matched():
    found = activation_correlation(columns(U, V), columns(U, [np.nan, 0, 1]))
    assert math.isnan(found.matched) and found.match.tolist() == [-1, -1] and found.matrix[0, 0] == pytest.approx(1)


def test_refusals():
    for X, Y in ((np.ones((3, 2)), np.ones((2, 2))), (np.ones(3), np.ones(3)), (np.ones((3, 0)), np.ones((3, 1)))):
        with pytest.raises(UsageError, match="activation_correlation"):
            activation_correlation(X, Y)


@st.composite
def pairs(draw):
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    n, d = draw(st.integers(3, 20)), draw(st.integers(1, 4))
    X = seed.standard_normal((n, d))
    return X, X[:, seed.permutation(d)] + draw(st.sampled_from([0.0, 0.5, 3.0])) * seed.standard_normal((n, d)), seed


@given(pairs())
def test_the_matching_is_the_best_and_means_are_ordered(pair):
    X, Y, _ = pair
    found = activation_correlation(X, Y)
    d = X.shape[1]
    np.testing.assert_allclose(found.matrix, np.corrcoef(X.T, Y.T)[:d, d:], atol=1e-12)
    best = max(found.matrix[np.arange(d), list(p)].mean() for p in permutations(range(d)))
    assert found.matched == pytest.approx(best)
    assert found.aligned <= found.matched + 1e-12 and found.matched <= found.best + 1e-12
    assert np.abs(found.matrix).max() <= 1


@given(pairs())
def test_what_units_are_scaled_by_does_not_matter(pair):
    X, Y, seed = pair
    found = activation_correlation(X, Y)
    scaled = activation_correlation(X * seed.uniform(0.1, 9, X.shape[1]) + 2, Y)
    np.testing.assert_allclose(scaled.matrix, found.matrix, atol=1e-9)
    np.testing.assert_allclose(activation_correlation(-X, Y).matrix, -found.matrix, atol=1e-12)
    np.testing.assert_allclose(activation_correlation(Y, X).matrix, found.matrix.T, atol=1e-12)


@given(pairs())
def test_a_permutation_is_found(pair):
    X, _, seed = pair
    p = seed.permutation(X.shape[1])
    found = activation_correlation(X, 2 * X[:, p] - 1)
    if len(X) > 3:  # three samples of one sign pattern can be nearly alike
        assert np.array_equal(p[found.match], np.arange(len(p)))
    assert found.matched == pytest.approx(1) == found.best
