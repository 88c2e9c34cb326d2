"""CART and Twin-Merging: low-rank parts on a shared model, against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import call, merge

RELAXED = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10**6)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def cut(R, k):
    """The nearest matrix of rank k, by the eigenvectors of R^T R."""
    _, V = np.linalg.eigh(R.T @ R)
    V = V[:, ::-1][:, : min(k, *R.shape)]
    return R @ V @ V.T


@RELAXED
@given(seeds, st.integers(1, 6), st.integers(2, 6), st.integers(2, 6), st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_cart_is_its_definition(seed, count, rows, columns, ratio):
    models = np.random.default_rng(seed).standard_normal((count, rows, columns))
    average, r = models.mean(axis=0), min(rows, columns)
    k = max(1, int(ratio * r)) if ratio else 0
    expected = average + 1.5 * sum(cut(m - average, k) for m in models)
    for entry, scale, base in (("cart", "lambda_", None), ("official:cart", "prior", np.zeros((rows, columns)))):
        got = call(entry, list(models), base, name="attn.w", rank_ratio=ratio, **{scale: 1.5})
        np.testing.assert_allclose(got, expected, **CLOSE)
    if ratio in (0.0, 1.0) or count < 3:
        np.testing.assert_allclose(expected, average, **CLOSE)


@RELAXED
@given(seeds, st.integers(3, 5))
def test_cart_does_not_know_the_order_or_the_origin(seed, count):
    models = np.random.default_rng(seed).standard_normal((count, 5, 4))
    got = call("cart", list(models), name="mlp.w", rank_ratio=0.5)
    np.testing.assert_allclose(call("cart", list(models[::-1]), name="mlp.w", rank_ratio=0.5), got, **CLOSE)
    moved = call("cart", list(models + models[0]), name="mlp.w", rank_ratio=0.5)
    np.testing.assert_allclose(moved, got + models[0], **CLOSE)


def test_cart_averages_what_is_not_named():
    draw = np.random.default_rng(0)
    shapes = {"attn.w": (4, 5), "attn.bias": (5,), "mlp.scale": (), "proj.w": (4, 5), "mlp.conv": (4, 3, 2)}
    models = [{n: draw.standard_normal(s) for n, s in shapes.items()} for _ in range(3)]
    average = merge(models, "linear")
    for layers, chosen in ((None, {"attn.w", "mlp.conv"}), (("*",), {"attn.w", "proj.w", "mlp.conv"}), ((), set())):
        got = merge(models, "cart", rank_ratio=0.3, **({} if layers is None else {"layers": layers}))
        assert {n for n in shapes if np.abs(got[n] - average[n]).max() > 1e-3} == chosen


# --- Twin-Merging -----------------------------------------------------------------------------------------------------


@RELAXED
@given(seeds, st.integers(1, 4), st.sampled_from([0.0, 0.2, 0.5, 0.8]), st.sampled_from([0.0, 0.3, 1.0]))
def test_twin_merging_is_its_definition(seed, count, density, scale):
    draw = np.random.default_rng(seed)
    base, *models = draw.standard_normal((count + 1, 5, 6))
    weight = [float(w) for w in draw.uniform(0, 1, count)]
    shared = base + scale * sum(m - base for m in models)
    expected = shared + sum(w * cut(m - shared, int(density * 5)) for w, m in zip(weight, models))
    params = {"weight": weight, "density": density, "lambda_": scale}
    np.testing.assert_allclose(call("twin_merging", models, base, **params), expected, **CLOSE)
    left = [np.sort(np.abs(m - shared).ravel())[::-1] for m in models]
    kept = [np.where(np.abs(m - shared) > x[int(density * 30)], m - shared, 0) for m, x in zip(models, left)]
    expected = shared + sum(w * v for w, v in zip(weight, kept))
    np.testing.assert_allclose(call("twin_merging", models, base, sparsify="magnitude", **params), expected, **CLOSE)


@RELAXED
@given(seeds, st.integers(2, 4), st.sampled_from(["svd", "magnitude", "bernoulli"]))
def test_everything_kept_is_an_average_of_the_models(seed, count, how):
    draw = np.random.default_rng(seed)
    base, *models = draw.standard_normal((count + 1, 4, 5))
    for task in range(count):
        one = call("twin_merging", models, base, weight=[float(t == task) for t in range(count)], sparsify=how, density=1.0)
        np.testing.assert_allclose(one, models[task], **CLOSE)
    weight = draw.dirichlet(np.ones(count)).tolist()
    for scale in (0.0, 0.3, 5.0):
        got = call("twin_merging", models, base, weight=weight, sparsify=how, density=1.0, lambda_=scale)
        np.testing.assert_allclose(got, sum(w * m for w, m in zip(weight, models)), **CLOSE)


@RELAXED
@given(seeds, st.sampled_from(["svd", "magnitude", "bernoulli"]))
def test_linear_in_the_weights(seed, how):
    base, *models = np.random.default_rng(seed).standard_normal((3, 4, 5))

    def at(*weight):
        return call("twin_merging", models, base, weight=list(weight), sparsify=how, density=0.5, seed=seed)

    np.testing.assert_allclose(at(0.7, -0.2) - at(0.0, 0.0), 0.7 * (at(1.0, 0.0) - at(0.0, 0.0))
                               - 0.2 * (at(0.0, 1.0) - at(0.0, 0.0)), **CLOSE)  # fmt: skip


@pytest.mark.parametrize("over", ["tensor", "model"])
def test_magnitudes_are_those_of_a_tensor(over):
    draw = np.random.default_rng(0)
    shapes = {"loud": (4, 5), "quiet": (4, 5), "b": (5,)}
    base, model = ({n: draw.standard_normal(s) * (100 if n == "loud" else 1) for n, s in shapes.items()} for _ in range(2))
    got = merge([model], "twin_merging", base=base, over=over, weight=1.0, sparsify="magnitude", density=0.25, lambda_=0.0)
    moved = {n: int(np.count_nonzero(got[n] != base[n])) for n in shapes}
    assert moved == {"loud": 5, "quiet": 5, "b": 5}
