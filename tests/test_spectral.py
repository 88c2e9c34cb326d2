"""Merges by singular vectors: what holds of spectra, and where matrices have less than full rank."""

from __future__ import annotations

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import call, merge
from refmerge.matrices import decomposed
from refmerge.methods.subspaces.dc_merge import smoothed
from refmerge.methods.subspaces.iso_cts import dimensions
from refmerge.methods.subspaces.tsvm import polar

RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10**6)
sides = st.tuples(st.integers(2, 12), st.integers(2, 12))
counts = st.integers(1, 4)
METHODS = ("tsvm", "iso_c", "iso_cts", "dc_merge", "svc")
DENSE = {"dc_merge": {"density": 1.0}}  # of entries in the cover space, all


def random(seed, shape, T, rank=None):
    """T changes of a matrix, of full or of a lower rank."""
    draw = np.random.default_rng(seed)
    if rank is None:
        return [draw.standard_normal(shape) for _ in range(T)]
    return [draw.standard_normal((shape[0], rank)) @ draw.standard_normal((rank, shape[1])) for _ in range(T)]


def merged(name, changes, **params):
    """The merged change. SVC calibrates the sum."""
    models = [sum(changes), *changes] if name == "svc" else changes
    return call(name, models, np.zeros_like(changes[0]), **DENSE.get(name, {}) | params)


def values(x):
    return np.linalg.svd(x, compute_uv=False)


def close(x, y, slack=1e-9):
    np.testing.assert_allclose(x, y, atol=slack * max(1.0, float(np.max(np.abs(y), initial=0))))


# --- The decomposition ------------------------------------------------------------------------------------------------


@RELAXED
@given(seeds, sides)
def test_decomposition_and_signs(seed, shape):
    (R,) = random(seed, shape, 1)
    U, S, V = decomposed(R)
    close((U * S) @ V.T, R)
    assert np.all(np.diff(S) <= 0)
    for X in (U, V):
        close(X.T @ X, np.eye(len(S)))
    largest = np.argmax(np.abs(U), axis=0)
    assert np.all(U[largest, np.arange(len(S))] > 0)
    again, _, _ = decomposed(-R)  # of two signs the same is chosen
    close(again, U)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 4)])
def test_decomposition_of_little(shape):
    U, S, V = decomposed(np.ones(shape))
    assert (U.shape, S.shape, V.shape) == ((shape[0], min(shape)), (min(shape),), (shape[1], min(shape)))


def test_signs_by_the_first_of_equal_entries():
    U, _, _ = decomposed(np.array([[1.0, 1.0], [-1.0, -1.0]]))
    assert U[0, 0] > 0 > U[1, 0]


@RELAXED
@given(seeds, sides, st.integers(1, 5))
def test_polar_factor(seed, shape, copies):
    """Nearest of all with orthonormal columns; of columns that depend on each other a partial isometry."""
    m, n = max(shape), min(shape)
    (X,) = random(seed, (m, n), 1)
    P = polar(X, np.ones(n), 1e-5)
    close(P.T @ P, np.eye(n))
    assert np.all(np.linalg.eigvalsh(P.T @ X) > 0)
    many = polar(np.concatenate([X] * copies, axis=1), np.ones(copies * n), 1e-5)
    close(many @ many.T, P @ P.T)
    close(many, np.concatenate([P] * copies, axis=1) / math.sqrt(copies))
    close(polar(0 * X, np.ones(n), 1e-5), 0 * X)


# --- TSV-Merge --------------------------------------------------------------------------------------------------------


@RELAXED
@given(seeds, sides, counts)
def test_tsvm_keeps_the_singular_values(seed, shape, T):
    k = min(shape) // T
    if not k:
        return
    changes = random(seed, shape, T)
    kept = np.sort(np.concatenate([values(x)[:k] for x in changes]))[::-1]
    close(values(merged("tsvm", changes))[: k * T], kept, 1e-7)


@RELAXED
@given(seeds, st.integers(2, 4), st.integers(1, 3))
def test_orthogonal_tasks_are_added(seed, T, rank):
    """Left spaces and right spaces at right angles: nothing interferes."""
    size = 4 * 3
    left, right = (np.linalg.qr(x)[0] for x in random(seed, (size, size), 2))
    s = np.random.default_rng(seed).uniform(1, 4, (T, rank))
    parts = [slice(t * rank, (t + 1) * rank) for t in range(T)]
    changes = [(left[:, p] * s_t) @ right[:, p].T for p, s_t in zip(parts, s)]
    for name in ("tsvm", "dc_merge"):
        close(merged(name, changes), sum(changes))
    directions = sum(left[:, p] @ right[:, p].T for p in parts)
    close(merged("iso_cts", changes, common_space_fraction=0.0), np.mean(s) * directions)


@RELAXED
@given(seeds, sides, st.integers(1, 4))
def test_equal_models_are_one_cut_off(seed, shape, T):
    (change,) = random(seed, shape, 1)
    U, S, V = decomposed(change)
    k = max(1, min(shape) // T)
    close(merged("tsvm", [change] * T), (U[:, :k] * S[:k]) @ V[:, :k].T)
    close(merged("dc_merge", [change] * T), (U[:, :k] * S[:k]) @ V[:, :k].T / T)
    close(merged("svc", [change] * T), change)
    close(merged("iso_c", [change] * T), T * merged("iso_c", [change]))


@RELAXED
@given(seeds, sides, counts)
def test_tsvm_is_the_authors_where_ranks_are_full(seed, shape, T):
    if min(shape) < T:
        return
    changes = random(seed, shape, T)
    for name in ("tsvm", "iso_c", "iso_cts"):
        official = call(f"official:{name}", changes, np.zeros(shape))
        close(merged(name, changes), official, 1e-6)
    close(merged("dc_merge", changes), call("official:dc_merge", changes, np.zeros(shape), keep_topk=1.0), 1e-6)


# --- Iso --------------------------------------------------------------------------------------------------------------


@RELAXED
@given(seeds, sides, counts)
def test_iso_c_flattens_the_sum(seed, shape, T):
    changes = random(seed, shape, T)
    M = sum(changes)
    flat = merged("iso_c", changes)
    close(values(flat), np.full(min(shape), np.mean(values(M))), 1e-7)
    assert np.linalg.norm(flat) <= np.linalg.norm(M) * (1 + 1e-9)
    assert np.sum(flat * M) > 0
    close(merged("iso_c", [M - 3.0, np.full(shape, 3.0)]), flat, 1e-6)  # however the sum is shared out
    close(merged("iso_c", [flat]), flat, 1e-6)


@RELAXED
@given(seeds, sides, counts)
def test_iso_cts_with_all_in_common_is_iso_c(seed, shape, T):
    changes = random(seed, shape, T)
    close(merged("iso_cts", changes, common_space_fraction=1.0), merged("iso_c", changes))


@RELAXED
@given(seeds, sides, counts, st.sampled_from([0.0, 0.3, 0.5, 0.8]))
def test_iso_cts_is_isotropic(seed, shape, T, fraction):
    found = values(merged("iso_cts", random(seed, shape, T), common_space_fraction=fraction))
    close(found, np.full(min(shape), found[0]), 1e-5)


@RELAXED
@given(st.integers(0, 2000), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.99, 1.0]))
def test_dimensions(r, T, fraction):
    c, n = dimensions(r, T, fraction)
    assert c >= 0 and n >= 0 and c + n * T == r
    assert abs(n - (r - int(fraction * r)) / T) <= 0.5 or n == r // T


# --- DC-Merge and SVC -------------------------------------------------------------------------------------------------


@RELAXED
@given(seeds, st.integers(1, 9), st.sampled_from(["average", "linear"]), st.sampled_from([1.0, 2.0, 5.0, math.inf]))
def test_smoothing_keeps_the_sum_and_never_steepens(seed, k, smoothing, rho):
    S = np.sort(np.random.default_rng(seed).uniform(0.1, 9, k))[::-1]
    made = smoothed(S, smoothing, rho)
    assert math.isclose(np.sum(made), np.sum(S))
    assert np.all(np.diff(made) <= 1e-12)
    assert made[0] / made[-1] <= min(rho if smoothing == "linear" else 1.0, S[0] / S[-1]) * (1 + 1e-12)


@RELAXED
@given(seeds, sides, counts)
def test_dc_merge_adds_nothing(seed, shape, T):
    changes = random(seed, shape, T)
    for density in (0.0, 0.3, 1.0):
        made = np.linalg.norm(merged("dc_merge", changes, density=density))
        assert made <= math.sqrt(sum(np.linalg.norm(x) ** 2 for x in changes)) * (1 + 1e-9)


@RELAXED
@given(seeds, sides, counts, st.sampled_from([1.0, 0.5, 0.1]))
def test_svc(seed, shape, T, alpha):
    changes = random(seed, shape, T)
    M, calibrated = sum(changes), merged("svc", changes, alpha=alpha)
    U, S, V = decomposed(M)
    assert np.all(np.abs(U.T @ calibrated @ V - np.diag(np.diag(U.T @ calibrated @ V))) < 1e-9)
    assert np.all(np.diag(U.T @ calibrated @ V) <= S / alpha + 1e-9)
    close(call("svc", [M, *changes[::-1]], 0 * M, alpha=alpha), calibrated)
    for c in (alpha, 1.0, 3.0):  # equal tasks come back, however often they were added
        close(call("svc", [c * changes[0], *[changes[0]] * T], 0 * M, alpha=alpha), changes[0])


# --- All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@RELAXED
@given(seed=seeds, shape=sides, T=counts)
def test_turning_the_tasks_turns_the_merge(name, seed, shape, T):
    changes = random(seed, shape, T)
    left, right = (np.linalg.qr(random(seed + 1, (n, n), 1)[0])[0] for n in shape)
    turned = merged(name, [left @ x @ right for x in changes])
    close(turned, left @ merged(name, changes) @ right, 1e-6)


@pytest.mark.parametrize("name", METHODS)
@RELAXED
@given(seed=seeds, T=st.integers(1, 4), rank=st.integers(1, 3))
def test_low_rank_gives_the_same_in_float32_and_float64(name, seed, T, rank):
    """Changes of low rank, rounded to float32, alone and on weights ten times as large: nothing else enters the merge."""
    changes = random(seed, (24, 20), T, rank)
    exact = merged(name, changes)
    size = np.linalg.norm(exact)
    outside = exact - spanned(changes) @ exact
    assert np.linalg.norm(outside) < 1e-9 * size
    for weights in (np.zeros((24, 20)), 10 * random(seed + 1, (24, 20), 1)[0]):
        base = weights.astype(np.float32)
        models = [(base + x).astype(np.float32) for x in changes]
        if name == "svc":
            models = [(base + sum(changes)).astype(np.float32), *models]
        made = call(name, models, base, **DENSE.get(name, {}) | {"lambda_": 1.0} if name != "svc" else {})
        noise = 3e-5 if np.any(weights) else 3e-6
        assert np.linalg.norm(made.astype(np.float64) - base - exact) < noise * size


def spanned(changes):
    """The projection onto what the columns of all changes span."""
    U, S, _ = np.linalg.svd(np.concatenate(changes, axis=1), full_matrices=False)
    U = U[:, S / S[0] > 1e-9]
    return U @ U.T


@pytest.mark.parametrize("name", ["tsvm", "dc_merge"])
@RELAXED
@given(seed=seeds, weak=st.sampled_from([1e-2, 1e-3, 1e-4]), side=st.sampled_from([0, 1]))
def test_weak_directions_that_tasks_share_are_no_others_in_float32(name, seed, weak, side):
    """As of LoRA whose tasks have one A, or one B: a singular vector of a small value is off by more than epsilon."""
    draw = np.random.default_rng(seed)
    A = np.linalg.qr(draw.standard_normal((20, 3)))[0]
    sizes = [draw.permutation([1.0, 0.5, weak]) for _ in range(3)]
    turns = [np.linalg.qr(draw.standard_normal((3, 3)))[0] for _ in range(3)]
    changes = [np.linalg.qr(draw.standard_normal((16, 3)))[0] * s @ (A @ t).T for s, t in zip(sizes, turns)]
    changes = [x.T if side else x for x in changes]
    narrow, wide = (merged(name, [x.astype(dtype) for x in changes]) for dtype in (np.float32, np.float64))
    close(narrow, wide, 1e-3)


@pytest.mark.parametrize("name", ["tsvm", "iso_c", "iso_cts", "dc_merge"])
def test_the_authors_differ_between_float32_and_float64_there(name):
    """Why: the same in the authors' own semantics is another merge in every precision."""
    changes = random(0, (24, 20), 3, 2)
    params = {"keep_topk": 1.0} if name == "dc_merge" else {}
    wide = call(f"official:{name}", changes, np.zeros((24, 20)), **params)
    narrow = call(f"official:{name}", [x.astype(np.float32) for x in changes], np.zeros((24, 20), np.float32), **params)
    assert np.linalg.norm(narrow - wide) > 0.3 * np.linalg.norm(wide)


@pytest.mark.parametrize("name", ["tsvm", "iso_c", "dc_merge"])
def test_a_task_of_rank_zero_brings_nothing(name):
    """A task that left a matrix alone has no singular vectors: among tasks of low rank it is not there."""
    changes = random(5, (24, 20), 2, 3)
    close(merged(name, [*changes, np.zeros((24, 20))]), merged(name, changes))


@pytest.mark.parametrize("name", ["tsvm", "iso_c", "svc"])  # the others choose by what is small
def test_bfloat16_needs_a_larger_tolerance(name):
    """Rounded to 16 bits, all singular values are there; a tolerance above the noise leaves those that mean something."""
    weights, changes = random(7, (48, 40), 1)[0], [x / 2 for x in random(8, (48, 40), 3, 2)]
    base, *models = ({"w": x.astype(ml_dtypes.bfloat16)} for x in (weights, *(weights + x for x in changes)))
    if name == "svc":
        models = [{"w": (weights + sum(changes)).astype(ml_dtypes.bfloat16)}, *models]
    exact = merged(name, changes)

    def off(tolerance):
        params = DENSE.get(name, {}) | {"tolerance": tolerance}
        made = merge(models, name, base=base, out_dtype="float64", **params)["w"] - base["w"].astype(np.float64)
        return np.linalg.norm(made - exact) / np.linalg.norm(exact)

    assert off(0.05) < 0.03
    assert name == "svc" or off(0.05) < off(1e-5) / 5


CALLS = {"tsvm": 4 + 2, "iso_c": 1, "iso_cts": 1 + 4 + 2, "dc_merge": 4 + 2, "svc": 0}  # it has eigenvectors


@pytest.mark.parametrize("name", METHODS)
def test_no_matrix_is_decomposed_twice(name, monkeypatch):
    """As many decompositions as the definition has, all thin, and memory of some matrices."""
    changes = random(2, (160, 128), 4)
    shapes, svd = [], np.linalg.svd

    def counted(x, full_matrices=True, compute_uv=True):
        assert not full_matrices and compute_uv and x.dtype == np.float64
        shapes.append(x.shape)
        return svd(x, full_matrices=full_matrices)

    monkeypatch.setattr(np.linalg, "svd", counted)
    params = {"common_space_fraction": 0.5} if name == "iso_cts" else {}
    tracemalloc.start()
    merged(name, changes, **params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(shapes) == CALLS[name]
    assert peak < 24 * changes[0].nbytes


def test_values_that_are_not_finite_are_named():
    from refmerge import UsageError

    bad = np.eye(3)
    bad[0, 1] = np.nan
    for name in METHODS:
        models = [np.eye(3), bad]
        with pytest.raises(UsageError, match="'x'"):
            call(name, models, np.zeros((3, 3)))


# --- Adapters of a known rank -----------------------------------------------------------------------------------------


@RELAXED
@given(seed=seeds, T=st.integers(1, 4), rank=st.integers(1, 4))
def test_a_known_rank_is_what_is_found(seed, T, rank):
    """DC-Merge's code for LoRA is told the rank; where it is right, these are the plain methods."""
    changes = random(seed, (24, 20), T, rank)
    told = {"rank_per_task": rank}
    close(call("dcmerge:tsvm", changes, **told), merged("tsvm", changes), 1e-7)
    theirs = call("official_lora:dc_merge", changes, **told, smoothing="linear", keep_topk=0.3)
    close(theirs, merged("dc_merge", changes, smoothing="linear", density=0.3), 1e-6)
    fraction = 0.5 * rank / (rank + 1)  # which leaves each task a direction of its own
    if dimensions(T * rank, T, fraction)[1]:
        theirs = call("dcmerge:iso_cts", changes, **told, common_space_fraction=fraction)
        close(theirs, merged("iso_cts", changes, common_space_fraction=fraction), 1e-5)


@pytest.mark.parametrize("entry", ["dcmerge:tsvm", "dcmerge:iso_cts", "official_lora:dc_merge"])
def test_changes_may_come_with_a_base(entry):
    changes = random(3, (24, 20), 2, 3)
    base = {"w": random(4, (24, 20), 1)[0], "b": np.ones(3)}
    models = [{"w": base["w"] + x, "b": base["b"] * k} for k, x in enumerate(changes, start=2)]
    made = merge(models, entry, base=base, rank_per_task=3)
    close(made["w"] - base["w"], call(entry, changes, rank_per_task=3), 1e-6)
    close(made["b"], np.full(3, 2.5))
    few = call(entry, [x[:5, :4] for x in changes])  # of rank 16 what fits
    assert np.linalg.matrix_rank(few, tol=1e-9) <= 4
