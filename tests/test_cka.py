"""CKA: numbers of the authors' notebook, by hand, and laws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import UsageError, registry
from refmerge.procedures.measures.cka import cca, cka_of_features, cka_of_grams, gram

cka = registry.procedure("cka")
DATA = Path(__file__).parent / "data" / "cka.npz"

# google-research/google-research@10bf941a representation_similarity/Demo.ipynb: on its own random features (seed 1337), and
# on the ReLU features of different widths in the data file.
NOTEBOOK = {
    "cca": 0.5431238559305234, "features": 0.5576132566117589, "features_debiased": 0.513456489505526,
    "linear": 0.5576132566117586, "linear_debiased": 0.513456489505526, "rbf_0.5": 0.6548311822614981,
    "rbf_0.5_debiased": 0.4192767510220516, "rbf_1.0": 0.5758322230135368, "rbf_1.0_debiased": 0.5016102703531156,
}  # fmt: skip
RELU = {
    "cca": 0.7841193165802478, "features": 0.6894345739075185, "features_debiased": 0.6430959080448049,
    "linear": 0.6894345739075183, "linear_debiased": 0.6430959080448047, "rbf_0.5": 0.8787126589671518,
    "rbf_0.5_debiased": 0.7484507816868439, "rbf_1.0": 0.8523515977501935, "rbf_1.0_debiased": 0.7499103726031497,
}  # fmt: skip


def notebook():
    draw = np.random.RandomState(1337)
    X = draw.randn(100, 10)
    return X, draw.randn(100, 10) + X


@pytest.mark.parametrize(("which", "expected"), [("notebook", NOTEBOOK), ("relu", RELU)])
def test_numbers_of_the_notebook(which, expected):
    X, Y = notebook() if which == "notebook" else (np.load(DATA)["X"], np.load(DATA)["Y"])
    found = {"cca": cca(X, Y)}
    for suffix, debiased in (("", False), ("_debiased", True)):
        found[f"features{suffix}"] = cka_of_features(X, Y, debiased=debiased)
        found[f"linear{suffix}"] = cka_of_grams(gram(X), gram(Y), debiased=debiased)
        for threshold in (0.5, 1.0):
            found[f"rbf_{threshold}{suffix}"] = cka(X, Y, kernel="rbf", threshold=threshold, debiased=debiased)
        assert cka(X, Y, debiased=debiased) == pytest.approx(found[f"linear{suffix}"], rel=1e-12)
    assert found == pytest.approx(expected, rel=1e-12)


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_one_unit_each():
    X, Y = np.array([[0.0], [1], [3]]), np.array([[0.0], [2], [3]])
    assert cka(X, Y) == pytest.approx((13 / 14) ** 2, rel=1e-14)


def test_the_width_of_the_gaussian():
    """The median of all nine squared distances, 0 0 0 1 1 4 4 9 9, is 1."""
    X = np.array([[0.0], [1], [3]])
    expected = np.exp(-np.array([[0.0, 1, 9], [1, 0, 4], [9, 4, 0]]) / (2 * 0.25))
    np.testing.assert_allclose(gram(X, kernel="rbf", threshold=0.5), expected, rtol=1e-14)


def test_debiased_matrix_by_hand():
    """Off the diagonal 1: u_i = 3 / 2 and c = 6 / 6 = 1, so that all is 1 - 3 + 2 = 0: no variation is left."""
    K = np.ones((4, 4)) + np.diag([5.0, 0, 2, 1])
    assert math.isnan(cka_of_grams(K, K, debiased=True))


def test_what_does_not_vary():
    X = np.random.default_rng(0).standard_normal((5, 3))
    for constant in (np.zeros((5, 2)), np.full((5, 2), 0.1)):
        for options in ({}, {"debiased": True}, {"kernel": "rbf"}):
            assert math.isnan(cka(X, constant, **options)) and math.isnan(cka(constant, constant, **options))
        assert math.isnan(cka_of_features(X, constant))
    mostly = np.array([[0.0], [0], [0], [0], [1]])  # more than half of the distances are 0
    assert math.isnan(cka(mostly, mostly, kernel="rbf"))


def test_nan_features_give_nan():
    X = np.random.default_rng(0).standard_normal((6, 3))
    bad = X.copy()
    bad[0, 0] = np.nan
    for options in ({}, {"debiased": True}, {"kernel": "rbf"}):
        assert math.isnan(cka(X, bad, **options))


def test_a_shift_matters_to_cca_alone():
    X = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert cka(X, X + 3) == pytest.approx(1) and cca(X, X) == pytest.approx(1)
    # y1 - y2 lies in the plane of X, and of y1 + y2 = x1 + x2 + 6 with squared length 148 only 4: (1 + 4 / 148) / 2
    assert cca(X, X + 3) == pytest.approx(19 / 37)


@pytest.mark.parametrize(
    ("X", "Y", "options", "said"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), {}, "as many samples"),
        (np.ones(3), np.ones(3), {}, "samples by units"),
        (np.ones((2, 3, 4)), np.ones((2, 3)), {}, "samples by units"),
        (np.ones((3, 0)), np.ones((3, 1)), {}, "no features"),
        (np.eye(3), np.eye(3), {"debiased": True}, "4 samples or more"),
        (np.eye(3), np.eye(3), {"kernel": "cosine"}, "'linear', 'rbf'"),
        (np.eye(3), np.eye(3), {"kernel": "rbf", "threshold": 0}, "threshold = 0"),
    ],
)
def test_refusals(X, Y, options, said):
    with pytest.raises(UsageError, match=said):
        cka(X, Y, **options)


def test_gram_matrices_are_symmetric_and_square():
    with pytest.raises(UsageError, match="symmetric"):
        cka_of_grams(np.array([[1.0, 2], [0, 1]]), np.eye(2))
    with pytest.raises(UsageError, match="square"):
        cka_of_grams(np.ones((2, 3)), np.ones((2, 3)))


def test_16_bit_features_are_widened():
    import ml_dtypes

    X = np.random.default_rng(0).standard_normal((6, 3)).astype(ml_dtypes.bfloat16)
    assert cka(X, X.astype(np.float64)) == pytest.approx(1)


# --- Laws -------------------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    n = draw(st.integers(5, 12))
    X, Y = (seed.standard_normal((n, draw(st.integers(1, 14)))) for _ in range(2))
    Y[:, 0] += X[:, 0]
    return X, Y, seed


OPTIONS = st.sampled_from([{}, {"debiased": True}, {"kernel": "rbf"}, {"kernel": "rbf", "debiased": True}])


@given(pairs(), OPTIONS)
def test_symmetric_and_one_with_itself(pair, options):
    X, Y, _ = pair
    assert cka(X, Y, **options) == pytest.approx(cka(Y, X, **options), rel=1e-9, abs=1e-12)
    assert cka(X, X, **options) == pytest.approx(1, rel=1e-6)


@given(pairs(), OPTIONS)
def test_what_leaves_it_as_it_is(pair, options):
    X, Y, seed = pair
    expected = pytest.approx(cka(X, Y, **options), rel=1e-6, abs=1e-9)
    rotation, _ = np.linalg.qr(seed.standard_normal((X.shape[1], X.shape[1])))
    samples = seed.permutation(len(X))
    for changed in (X @ rotation, 3 * X, X - 2, X[:, seed.permutation(X.shape[1])]):
        assert cka(changed, Y, **options) == expected
    assert cka(X[samples], Y[samples], **options) == expected


@given(pairs(), st.booleans())
def test_both_forms_of_the_linear_kernel(pair, debiased):
    X, Y, _ = pair
    by_samples = cka_of_grams(gram(X), gram(Y), debiased=debiased)
    assert cka_of_features(X, Y, debiased=debiased) == pytest.approx(by_samples, rel=1e-7, abs=1e-9)


@given(pairs())
def test_bounds_and_correlation(pair):
    X, Y, _ = pair
    assert -1e-12 <= cka(X, Y) <= 1 + 1e-12
    r = np.corrcoef(X[:, 0], Y[:, 0])[0, 1]
    assert cka(X[:, :1], Y[:, :1]) == pytest.approx(r**2, rel=1e-9, abs=1e-12)
