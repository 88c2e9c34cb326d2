"""Low-rank residuals: Eckart and Young's theorem, ranks for a budget, and the error bound of what is stored."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, call, merge
from refmerge.checkpoint import save
from refmerge.methods.subspaces.low_rank_residual import as_matrix
from refmerge.procedures.subspaces.low_rank_restore import low_rank_restore, unpacked
from refmerge.procedures.subspaces.low_rank_store import allocated, low_rank_store, packed
from refmerge.testing import assert_same

SHAPES = {"a.weight": (17, 11), "conv": (4, 3, 5), "bias": (9,), "number": (), "none": (0, 3)}
RELAXED = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10**6)


def model(draw, dtype=np.float32, fall=1.0):
    """Random tensors whose matrices have singular values that fall."""
    made = {}
    for name, shape in SHAPES.items():
        x = as_matrix(draw.standard_normal(shape))
        U, S, Vt = np.linalg.svd(x, full_matrices=False)
        made[name] = ((U * S * fall ** np.arange(len(S))) @ Vt).reshape(shape).astype(dtype)
    return made


def difference(a, b, name):
    return as_matrix(a[name].astype(np.float64) - b[name].astype(np.float64))


# --- The method -------------------------------------------------------------------------------------------------------


@RELAXED
@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(0, 10))
def test_eckart_and_young(seed, m, n, rank):
    draw = np.random.default_rng(seed)
    base, theta = draw.standard_normal((2, m, n))
    R, S = theta - base, np.linalg.svd(theta - base, compute_uv=False)
    left = theta - call("low_rank_residual", [theta], base, rank=rank)
    dropped = S[rank:]
    assert math.isclose(np.linalg.norm(left) ** 2, np.sum(dropped**2), rel_tol=1e-9, abs_tol=1e-20 * S[0] ** 2 + 1e-24)
    assert math.isclose(np.linalg.norm(left, 2), max(dropped, default=0.0), rel_tol=1e-9, abs_tol=1e-12)
    kept = R - left
    assert np.linalg.matrix_rank(kept, tol=1e-9) == min(rank, m, n)
    other = draw.standard_normal((m, min(rank, n))) @ draw.standard_normal((min(rank, n), n))
    nearest = other * np.sum(other * R) / max(np.sum(other * other), 1e-300)
    assert np.linalg.norm(left) <= np.linalg.norm(R - nearest) + 1e-12
    turned = call("low_rank_residual", [theta.T], base.T, rank=rank)
    np.testing.assert_allclose(turned.T, theta - left, atol=1e-12)


def test_the_shape_is_kept_and_vectors_have_one_term():
    base, theta = model(np.random.default_rng(0)), model(np.random.default_rng(1))
    got = merge([theta], "low_rank_residual", base=base, rank=1)
    assert {n: x.shape for n, x in got.items()} == SHAPES
    for name in ("bias", "number"):
        np.testing.assert_allclose(got[name], theta[name], rtol=1e-6)
    R = difference(theta, base, "conv")
    assert R.shape == (4, 15)
    U, S, Vt = np.linalg.svd(R, full_matrices=False)
    np.testing.assert_allclose(difference(got, base, "conv"), S[0] * np.outer(U[:, 0], Vt[0]), atol=1e-6)


# --- Ranks ------------------------------------------------------------------------------------------------------------

LAYERS = st.lists(
    st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 12)), min_size=1, max_size=3
)


def by_name(layers):
    values = {f"x{i}": np.sort(np.array(s, float))[::-1] for i, (s, _) in enumerate(layers)}
    return values, dict.fromkeys(values, (4, 4)), {f"x{i}": price for i, (_, price) in enumerate(layers)}


def spent(ranks, price):
    return sum(r * price[n] for n, r in ranks.items())


def taken(ranks, values):
    return sum(float(np.sum(values[n][:r] ** 2)) for n, r in ranks.items())


@RELAXED
@given(LAYERS, st.integers(1, 60))
def test_allocation_is_near_the_best(layers, budget):
    values, shapes, price = by_name(layers)
    ranks = allocated(values, shapes, price, budget)
    assert spent(ranks, price) <= budget
    every = itertools.product(*(range(len(s) + 1) for s in values.values()))
    best = max(taken(r, values) for r in (dict(zip(values, choice)) for choice in every) if spent(r, price) <= budget)
    # The fractional knapsack's bound: what came before the first term that did not fit, and as much of that as is left.
    order = sorted((-(s**2) / price[n], n, i) for n, S in values.items() for i, s in enumerate(S))
    bound, left = 0.0, budget
    for density, name, _ in order:
        part = min(price[name], left)
        bound, left = bound - density * part, left - part
        if part < price[name]:
            break
    assert taken(ranks, values) <= best <= bound + 1e-9
    largest = max(float(s[0]) ** 2 for s in values.values())
    assert best - taken(ranks, values) <= largest


@RELAXED
@given(LAYERS)
def test_a_larger_budget_keeps_more(layers):
    values, shapes, price = by_name(layers)
    kept = [taken(allocated(values, shapes, price, budget), values) for budget in range(1, 100)]
    assert all(a <= b for a, b in itertools.pairwise(kept))
    whole = {n: len(s) for n, s in values.items()}
    assert allocated(values, shapes, price, spent(whole, price)) == whole


def test_equal_terms_go_by_name_and_zeros_are_never_taken():
    values = {"b": np.array([2.0, 2.0]), "a": np.array([2.0, 0.0]), "c": np.array([1e3, 1e-14])}
    shapes, price = dict.fromkeys(values, (2, 2)), dict.fromkeys(values, 8)
    assert allocated(values, shapes, price, 16) == {"b": 0, "a": 1, "c": 1}
    assert allocated(values, shapes, price, 10**6) == {"b": 2, "a": 1, "c": 1}


# --- The store --------------------------------------------------------------------------------------------------------


@RELAXED
@given(seeds, st.integers(2, 16), st.integers(1, 900), st.sampled_from([1.0, 0.5]))
def test_the_error_bound(tmp_path_factory, seed, bits, budget, fall):
    draw = np.random.default_rng(seed)
    base, change = model(draw, np.float64), model(draw, np.float64, fall)
    theta = {n: base[n] + change[n] for n in base}
    stored = low_rank_store(theta, base, tmp_path_factory.mktemp("s") / "x.safetensors", budget=budget, bits=bits)
    restored = low_rank_restore(stored, base)
    assert stored.nbytes <= budget
    top = 2 ** (bits - 1) - 1
    cost = 0
    for name in base:
        R = difference(theta, base, name)
        U, S, Vt = np.linalg.svd(R, full_matrices=False)
        r = len(stored[f"scale/{name}"]) if f"scale/{name}" in stored else 0
        cost += r * (sum(-(-n * bits // 8) for n in R.shape) + 8)
        a, b = (math.sqrt(k) * np.max(np.abs(x), axis=0, initial=0) / (2 * top) for k, x in zip(R.shape, (U, Vt.T)))
        bound = np.linalg.norm(S[r:]) + np.sum((S * np.minimum(1, a + b + a * b))[:r])
        error = np.linalg.norm(difference(theta, restored, name))
        assert error <= bound * (1 + 1e-9) + 1e-12
        assert error <= np.linalg.norm(S[r:]) + np.sum(S[:r]) + 1e-12
    assert stored.nbytes == cost


@RELAXED
@given(st.integers(2, 16), st.integers(1, 9), seeds)
def test_whole_numbers_come_back(bits, count, seed):
    top = 2 ** (bits - 1) - 1
    q = np.random.default_rng(seed).integers(-top, top + 1, (3, count)).astype(np.float64)
    rows = packed(q, bits)
    assert rows.dtype == np.uint8 and rows.shape == (3, -(-count * bits // 8))
    assert np.array_equal(unpacked(rows, count, bits), q)


def test_a_layout_by_hand(tmp_path):
    """diag(3, -1) in 4 bits: u and v are unit vectors, 7 and 0; raised by 7 they are 14 and 7, or 0 for -7."""
    base, theta = {"x": np.zeros((2, 2), np.float32)}, {"x": np.diag([3, -1]).astype(np.float32)}
    stored = low_rank_store(theta, base, tmp_path / "s", budget=12, bits=4)
    assert stored.nbytes == 12 and stored.metadata["bits"] == "4"
    assert {n: (x.dtype, x.shape) for n, x in stored.items()} == {
        "left/x": (np.uint8, (2, 1)), "right/x": (np.uint8, (2, 1)), "scale/x": (np.float32, (2,)),
    }  # fmt: skip
    np.testing.assert_allclose(stored["scale/x"], np.array([3, 1]) / 49, rtol=1e-6)
    signs = unpacked(stored["left/x"], 2, 4) @ np.ones(2) * (unpacked(stored["right/x"], 2, 4) @ np.ones(2))
    assert signs.tolist() == [49, -49]
    assert {int(row[0]) for row in stored["left/x"]} <= {0xE7, 0x07, 0x7E, 0x70}
    np.testing.assert_allclose(low_rank_restore(stored, base)["x"], theta["x"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_all_that_fits_is_nearly_all(tmp_path, dtype):
    base, theta = (model(np.random.default_rng(i), dtype) | {"ids": np.arange(3)} for i in (0, 1))
    stored = low_rank_store(theta, base, tmp_path / "s.safetensors", budget="1MB", bits=16)
    restored = low_rank_restore(stored, base)
    eps = float(ml_dtypes.finfo(dtype).eps)
    for name in SHAPES:
        assert (restored[name].dtype, restored[name].shape) == (dtype, SHAPES[name])
        assert np.max(np.abs(difference(restored, theta, name)), initial=0) <= 4 * eps + 1e-3
    assert_same(restored["ids"], base["ids"])
    assert_same(dict(low_rank_restore(stored.path, base, tmp_path / "out")), restored)


def test_nothing_fits(tmp_path):
    base, theta = model(np.random.default_rng(0)), model(np.random.default_rng(1))
    stored = low_rank_store(theta, base, tmp_path / "s", budget=1)
    assert dict(stored) == {}
    assert_same(low_rank_restore(stored, base), base)


def test_files_and_arrays_of_torch_are_stored_alike(tmp_path, torch):
    base, theta = model(np.random.default_rng(0)), model(np.random.default_rng(1))
    for name, one in (("base", base), ("theta", theta)):
        save(one, tmp_path / f"{name}.safetensors")
    tensors = [{n: torch.from_numpy(x.copy()) for n, x in one.items()} for one in (theta, base)]
    files = [tmp_path / f"{name}.safetensors" for name in ("theta", "base")]
    expected = low_rank_store(theta, base, tmp_path / "arrays", budget=300)
    for name, inputs in (("torch", tensors), ("files", files)):
        stored = low_rank_store(*inputs, tmp_path / name, budget=300)
        assert_same(dict(stored), dict(expected))
        assert_same(dict(low_rank_restore(stored, inputs[1])), low_rank_restore(expected, base))


def test_refusals(tmp_path):
    base, theta = model(np.random.default_rng(0)), model(np.random.default_rng(1))
    files = [tmp_path / f"{name}.safetensors" for name in ("theta", "base")]
    for file, tensors in zip(files, (theta, base)):
        save(tensors, file)
    for bits in (1, 17, 8.0, True):
        with pytest.raises(UsageError, match="no whole number in"):
            low_rank_store(theta, base, tmp_path / "s", budget=100, bits=bits)
    with pytest.raises(UsageError, match="not a size"):
        low_rank_store(theta, base, tmp_path / "s", budget="much")
    with pytest.raises(InputError, match="'more' is not in both"):
        low_rank_store(theta | {"more": np.zeros(1, np.float32)}, base, tmp_path / "s", budget=100)
    with pytest.raises(InputError, match="integers='base'"):
        low_rank_store(theta | {"ids": np.arange(2)}, base | {"ids": np.ones(2, int)}, tmp_path / "s", budget=100)
    with pytest.raises(UsageError, match="'bias'"):
        low_rank_store(theta | {"bias": np.full(9, np.nan, np.float32)}, base, tmp_path / "s", budget=100)
    with pytest.raises(UsageError, match="never written to"):
        low_rank_store(*files, files[1], budget=100, overwrite=True)
    stored = low_rank_store(theta, base, tmp_path / "s", budget=300)
    with pytest.raises(UsageError, match="overwrite=True"):
        low_rank_store(theta, base, tmp_path / "s", budget=300)
    with pytest.raises(InputError, match="which the base does not have"):
        low_rank_restore(stored, {"other": base["bias"]})
    with pytest.raises(InputError, match="another base"):
        low_rank_restore(stored, base | {n: np.zeros((2, 3), np.float32) for n in ("a.weight", "conv", "bias")})
    with pytest.raises(InputError, match="was not written by low_rank_store"):
        low_rank_restore(files[1], base)
    with pytest.raises(UsageError, match="never written to"):
        low_rank_restore(stored, files[1], files[1], overwrite=True)
