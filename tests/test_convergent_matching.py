"""Matching of units by correlation: the authors' result, numbers by hand, optimality of each step, and laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, registry
from refmerge.procedures.alignment.convergent_matching import (
    loops,
    moments,
    one_to_one,
    semi_matching,
    sparse_prediction,
    spectral_clusters,
)

convergent_matching = registry.procedure("convergent_matching")
FEW = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)

# Correlations of two layers of 8 units, and what YixuanLi/convergent_learning@2ab72f8 match_unit.py made of them:
# max_match_order, with an adapter for the networkx of today, and follow_loops.
CORRELATIONS = [
    [0.78685296, -0.40963513, -0.21131649, 0.20203811, -0.28099583, -0.17053297, -0.40631723, -0.34549147],
    [-0.07485742, 0.33363689, 0.30131618, -0.28146301, 0.90403053, -0.06488325, 0.39520885, 0.14216496],
    [-0.1654566, 0.50333143, 0.3484975, -0.15988434, -0.03979871, -0.17923948, 0.47079284, 0.58483592],
    [-0.34148932, 0.52070967, 0.31775873, 0.57973379, 0.20790889, 0.06203893, 0.74336837, 0.17855762],
    [0.52524015, -0.32055773, -0.08954681, 0.6001684, -0.38274897, -0.2392451, -0.3065923, -0.23076559],
    [-0.23843807, 0.31618245, 0.2137905, 0.84881686, -0.04843085, -0.01049, 0.43671896, 0.09593051],
    [0.08324536, 0.59916769, 0.72662095, -0.30764681, 0.50264294, -0.37125234, 0.51304578, 0.66678954],
    [-0.23112509, -0.27005811, -0.38775093, -0.44853326, -0.09467765, 0.70330214, -0.26601674, -0.24921483],
]


def acts(seed: int, samples: int = 12, units: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, units))


# --- The authors' numbers ---------------------------------------------------------------------------------------------


def test_the_authors_result():
    C = np.array(CORRELATIONS)
    assert one_to_one(C).tolist() == [0, 4, 7, 6, 3, 1, 2, 5]
    assert semi_matching(C).tolist() == [0, 4, 7, 6, 3, 3, 2, 5]
    assert loops(one_to_one(C)) == ((0,), (1, 4, 3, 6, 2, 7, 5))


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_moments_by_hand():
    """a = (0, 2, 4), b = (3, 3, 6): means 2 and 4, differences (-2, 0, 2) and (-1, -1, 2)."""
    found = moments(np.array([[0.0], [2], [4]]), np.array([[3.0], [3], [6]]))
    assert (found.count, found.mean_a[0], found.mean_b[0]) == (3, 2, 4)
    assert (found.scatter_a[0], found.scatter_b[0], found.scatter[0, 0]) == (8, 6, 6)
    assert (found.covariance[0, 0], found.inner[0, 0], found.e_ab[0, 0]) == (3, 10, 11)
    assert found.correlation[0, 0] == pytest.approx(6 / 48**0.5)
    assert found.std_a[0] == 2


def test_a_constant_unit_is_like_none():
    """Its mean is its value, to the bit: 0.1, which summed ten times is not 1."""
    a = acts(0)
    b = a.copy()
    b[:, 1] = 0.1
    C = moments(a, b).correlation
    assert np.all(C[:, 1] == 0) and C[0, 0] == pytest.approx(1)


def test_matching_by_hand():
    C = np.array([[0.9, 0.8], [0.8, 0.1]])
    assert one_to_one(C).tolist() == [1, 0]  # 1.6 against 1.0
    assert semi_matching(C).tolist() == [0, 0]
    assert one_to_one(C, ignore_diagonal=True).tolist() == [1, 0]
    assert one_to_one(C[:, :1]).tolist() == [0, -1] and one_to_one(C[:1]).tolist() == [0]
    assert one_to_one(np.ones((3, 3))).tolist() == [0, 1, 2]


def test_sparse_prediction_by_hand():
    """b = 2 a + 1 of a = (-1, 1): variance 1, covariance 2. The weight is 2 less the decay, and the error its square."""
    a, b = np.array([[-1.0], [1]]), np.array([[-1.0], [3]])
    for decay, weight, error in ((0.0, 2, 0), (0.5, 1.5, 0.25), (2.0, 0, 4), (5.0, 0, 4)):
        found = sparse_prediction(a, b, decay)
        assert (found.weights[0, 0], found.bias[0], found.error[0]) == (weight, 1, error)
        assert found.used.tolist() == [int(weight > 0)]


def test_clusters_by_hand():
    """Two pairs that have nothing to do with each other, and a unit that is like none."""
    C = np.array([[1, 0, 0.5, 0, 0], [0, 1, 0, 0.5, 0], [0.5, 0, 1, 0, 0], [0, 0.5, 0, 1, 0], [0, 0, 0, 0, 0]])
    assert spectral_clusters(C, 2).tolist() == [0, 1, 0, 1, -1]
    assert spectral_clusters(C, 1).tolist() == [0, 0, 0, 0, -1]
    C[0, 1] = C[1, 0] = -0.9  # as good as nothing
    assert spectral_clusters(C, 2).tolist() == [0, 1, 0, 1, -1]


def test_all_of_it():
    a, order = acts(0, 50), [2, 0, 3, 1]
    b = (3 * a + 1)[:, order]
    found = convergent_matching([a[:20], a[20:]], [b[:20], b[20:]], clusters=4, decay=1e-3)
    assert found.match.tolist() == found.semi.tolist() == np.argsort(order).tolist()
    assert found.value == pytest.approx(4) == found.semi_value
    assert found.loops == loops(np.argsort(order))
    assert found.clusters.tolist() == [0, 1, 2, 3, *order]
    assert np.array_equal(np.argmax(found.prediction.weights, axis=0), order)
    alone = convergent_matching(a, ignore_diagonal=True)
    assert all(alone.match[i] != i and alone.semi[i] != i for i in range(4))
    assert alone.clusters is None and alone.prediction is None
    assert convergent_matching(a, b[:, :3]).loops is None


# --- Each step is the best --------------------------------------------------------------------------------------------


@FEW
@given(SEEDS, st.booleans())
def test_one_to_one_is_the_best_of_all(seed, ignore):
    C = acts(seed, 5, 5)
    match = one_to_one(C, ignore_diagonal=ignore)
    every = [p for p in itertools.permutations(range(5)) if not ignore or all(i != j for i, j in enumerate(p))]
    assert C[range(5), match].sum() == pytest.approx(max(C[range(5), p].sum() for p in every))
    assert C[range(5), semi_matching(C, ignore_diagonal=ignore)].sum() >= C[range(5), match].sum() - 1e-12


@FEW
@given(SEEDS, st.sampled_from([0.0, 0.05, 0.3]))
def test_sparse_prediction_is_the_least(seed, decay):
    """A weight that is not 0 has a residual covariance of decay and its sign; one that is 0 has less."""
    a, b = acts(seed), acts(seed + 1, 12, 3)
    found = sparse_prediction(a, b, decay)
    residual = b - (a @ found.weights + found.bias)
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose((residual**2).mean(axis=0), found.error, rtol=1e-9, atol=1e-12)
    slope = (a - a.mean(axis=0)).T @ residual / len(a)
    used = found.weights != 0
    np.testing.assert_allclose(slope[used], decay * np.sign(found.weights[used]), atol=1e-9)
    assert np.all(np.abs(slope[~used]) <= decay + 1e-9)


# --- Laws -------------------------------------------------------------------------------------------------------------


@FEW
@given(SEEDS)
def test_moments_are_numpys_in_any_batches(seed):
    a, b = 5 + acts(seed), acts(seed + 1)
    cuts = sorted(np.random.default_rng(seed).integers(0, 13, 3))
    whole, parts = moments(a, b), moments(np.split(a, cuts), np.split(b, cuts))
    for key in ("mean_a", "mean_b", "covariance", "correlation", "inner", "e_ab", "std_a", "std_b"):
        np.testing.assert_allclose(getattr(parts, key), getattr(whole, key), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole.correlation, np.corrcoef(a.T, b.T)[:4, 4:], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(a.T, b.T)[:4, 4:], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole.inner, a.T @ b / 12, rtol=1e-10, atol=1e-12)
    images = moments(a.reshape(2, 3, 2, 4), b.reshape(2, 3, 2, 4))  # every place is a sample
    np.testing.assert_allclose(images.covariance, whole.covariance, rtol=1e-10, atol=1e-12)


@FEW
@given(SEEDS)
def test_scale_and_shift_do_not_matter(seed):
    a, b, rng = acts(seed), acts(seed + 1), np.random.default_rng(seed)
    found = convergent_matching(a, b)
    moved = convergent_matching(a * 2.0 ** rng.integers(-3, 4, 4), 3 + b * 2.0 ** rng.integers(-3, 4, 4))
    np.testing.assert_allclose(moved.correlation, found.correlation, rtol=1e-9, atol=1e-9)
    assert np.array_equal(moved.match, found.match) and np.array_equal(moved.semi, found.semi)
    flipped = convergent_matching(a * [-1, 1, 1, 1], b)
    np.testing.assert_allclose(flipped.correlation, found.correlation * [[-1], [1], [1], [1]], rtol=1e-12)


@FEW
@given(SEEDS)
def test_the_matching_moves_with_the_units(seed):
    a, b, rng = acts(seed), acts(seed + 1), np.random.default_rng(seed)
    p, q = rng.permutation(4), rng.permutation(4)
    found, moved = convergent_matching(a, b), convergent_matching(a[:, p], b[:, q])
    assert np.array_equal(q[moved.match], found.match[p]) and np.array_equal(q[moved.semi], found.semi[p])


@FEW
@given(SEEDS)
def test_loops_are_the_permutation(seed):
    p = np.random.default_rng(seed).permutation(9)
    found = loops(p)
    assert sorted(sum(found, ())) == list(range(9))
    assert all(p[i] == j for c in found for i, j in zip(c, (*c[1:], c[0])))
    assert [min(c) for c in found] == sorted(c[0] for c in found)


@FEW
@given(SEEDS, st.integers(1, 4))
def test_clusters_move_with_the_units(seed, clusters):
    """Where groups are apart, whatever the order of the units."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.concatenate([np.arange(clusters), rng.integers(0, clusters, 6)]))
    C = np.where(truth[:, None] == truth, 0.8, 0.02) + 0.2 * np.eye(len(truth))
    labels = spectral_clusters(C, clusters)
    assert all((labels[i] == labels[j]) == (truth[i] == truth[j]) for i, j in itertools.combinations(range(len(truth)), 2))
    first = [labels.tolist().index(k) for k in range(clusters)]
    assert first == sorted(first)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: convergent_matching(acts(0), acts(1, 11)), UsageError, "12 samples of a and 11 of b"),
        (lambda: convergent_matching([acts(0), acts(0)], [acts(0, 11), acts(0, 13)]), UsageError, "or in other batches"),
        (lambda: convergent_matching([acts(0), acts(0, 12, 5)], acts(0)), UsageError, "one network has one number"),
        (lambda: convergent_matching(np.ones(3), np.ones(3)), UsageError, "samples x units"),
        (lambda: convergent_matching(np.ones((0, 3)), np.ones((0, 3))), UsageError, "there is no sample"),
        (lambda: convergent_matching(np.array([[1.0, np.nan]]), np.ones((1, 2))), InputError, "unit 1 has a value"),
        (lambda: convergent_matching(acts(0, 5, 1), ignore_diagonal=True), UsageError, "a single unit has no other"),
        (lambda: convergent_matching(acts(0), acts(1, 12, 3), ignore_diagonal=True), UsageError, "are not the same units"),
        (
            lambda: convergent_matching(acts(0), acts(1), clusters=9),
            UsageError,
            "clusters = 9 is no whole number from 1 to 8",
        ),
        (lambda: convergent_matching(acts(0), acts(1), decay=-1.0), UsageError, "decay = -1.0 is no number"),
        (lambda: one_to_one(np.array([[np.inf]])), InputError, "similarity of unit 0 and unit 0 is not finite"),
        (lambda: one_to_one(np.ones(3)), UsageError, "a matrix with rows and columns"),
        (lambda: spectral_clusters(np.array([[1.0, 0.5], [0.4, 1.0]]), 1), UsageError, "is not symmetric"),
        (lambda: spectral_clusters(np.ones((2, 3)), 1), UsageError, "is not symmetric"),
    ],
)
def test_refusals(call, error, said):
    with pytest.raises(error, match=said):
        call()
