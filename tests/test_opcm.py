"""OPCM, singular projection and KnOTS: what they keep, what they drop, and what that does not depend on."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refmerge

RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)
SHAPES = {"a": (6, 5), "b": (4, 7), "bias": (3,)}


def random(seed, count=3, rank=None):
    draw = np.random.default_rng(seed)
    base = {k: draw.standard_normal(s) for k, s in SHAPES.items()}

    def change(s):
        if rank is None or len(s) < 2:
            return draw.standard_normal(s)
        return draw.standard_normal((s[0], rank)) @ draw.standard_normal((rank, s[1]))

    return base, [{k: x + change(x.shape) for k, x in base.items()} for _ in range(count)]


def turn(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def turned(model, seed, rows=True, columns=True):
    left, right = ({k: turn(seed + i, s[i]) for k, s in SHAPES.items() if len(s) > 1} for i in (0, 1))

    def matrix(k, x):
        return (left[k] @ x if rows else x) @ (right[k] if columns else np.eye(x.shape[1]))

    return {k: matrix(k, x) if x.ndim > 1 else x for k, x in model.items()}


def close(got, expected, tolerance=1e-9):
    size = max(np.max(np.abs(x)) for x in expected.values())
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, atol=tolerance * size, err_msg=name)


def length(model, base):
    return np.sqrt(sum(np.sum((model[k] - base[k]) ** 2) for k in base))


# --- OPCM -------------------------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS, st.integers(1, 4), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([None, 1, 2]))
def test_the_change_has_the_mean_length(seed, count, alpha, rank):
    base, models = random(seed, count, rank)
    merged = refmerge.merge(models, "opcm", base=base, alpha=alpha)
    np.testing.assert_allclose(length(merged, base), np.mean([length(m, base) for m in models]), rtol=1e-10)


@RELAXED
@given(SEEDS, st.sampled_from([None, 1, 2]))
def test_opcm_turns(seed, rank):
    base, models = random(seed, rank=rank)
    merged = refmerge.merge(models, "opcm", base=base)
    close(refmerge.merge([turned(m, seed) for m in models], "opcm", base=turned(base, seed)), turned(merged, seed), 1e-7)


@RELAXED
@given(SEEDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_what_is_orthogonal_on_both_sides_is_added_whole(seed, alpha):
    L, R = turn(seed, 6), turn(seed + 1, 7)
    draw = np.random.default_rng(seed)
    parts = [L[:, i : i + 2] @ draw.standard_normal((2, 2)) @ R[i : i + 2] for i in (0, 2, 4)]
    zero = np.zeros((6, 7))
    merged = refmerge.call("opcm", parts, zero, alpha=alpha)
    factor = np.mean([np.linalg.norm(x) for x in parts]) / np.linalg.norm(sum(parts))
    np.testing.assert_allclose(merged, factor * sum(parts), atol=1e-9)
    np.testing.assert_allclose(refmerge.call("opcm", parts[::-1], zero, alpha=alpha), merged, atol=1e-9)


@RELAXED
@given(SEEDS, st.sampled_from([1, 2, 3]))
def test_the_full_block_goes(seed, rank):
    """At alpha 1 nothing is left of what maps the first one's row space to its column space, whatever its rank."""
    draw = np.random.default_rng(seed)
    one = draw.standard_normal((5, rank)) @ draw.standard_normal((rank, 6))
    two = draw.standard_normal((5, 6))
    merged = refmerge.call("opcm", [one, two], np.zeros((5, 6)), alpha=1.0)
    U, _, Vt = np.linalg.svd(one)
    U, V = U[:, :rank], Vt[:rank].T
    left_over = two - U @ (U.T @ two @ V) @ V.T
    direction = (one + left_over) / np.linalg.norm(one + left_over)
    np.testing.assert_allclose(merged / np.linalg.norm(merged), direction, atol=1e-9)


# --- Singular projection ----------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS, st.sampled_from([0, 1, 3, 9, None]))
def test_projections(seed, k):
    base, (model,) = random(seed, 1)

    def part(m, part):
        got = refmerge.merge([m], "singular_projection", base=base, k=k, part=part)
        return got, {n: got[n] - base[n] for n in ("a", "b")}

    (low, low_part), (high, high_part) = part(model, "low"), part(model, "high")
    close(part(low, "low")[0], low)
    close(part(high, "high")[0], high)
    for name in ("a", "b"):
        tau = model[name] - base[name]
        assert abs(np.sum(low_part[name] * high_part[name])) < 1e-9
        rest = tau - low_part[name] - high_part[name]  # what leads from the one into the other
        assert abs(np.sum(rest * low_part[name])) < 1e-9 and abs(np.sum(rest * high_part[name])) < 1e-9
    assert np.array_equal(low["bias"], model["bias"])


@RELAXED
@given(SEEDS, st.sampled_from(["low", "high"]))
def test_projections_turn(seed, part):
    base, (model,) = random(seed, 1)
    params = {"k": 2, "part": part}
    merged = refmerge.merge([model], "singular_projection", base=base, **params)
    got = refmerge.merge([turned(model, seed)], "singular_projection", base=turned(base, seed), **params)
    close(got, turned(merged, seed), 1e-8)


@RELAXED
@given(SEEDS)
def test_all_directions_of_a_square_base_are_all(seed):
    draw = np.random.default_rng(seed)
    base, model = draw.standard_normal((2, 5, 5))
    np.testing.assert_allclose(refmerge.call("singular_projection", [model], base), model, atol=1e-9)
    np.testing.assert_allclose(refmerge.call("singular_projection", [model], base, part="high"), base, atol=1e-9)


# --- KnOTS ------------------------------------------------------------------------------------------------------------


@RELAXED
@given(SEEDS, st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([None, 1, 2]))
def test_knots_order_and_turned_rows(seed, trim, rank):
    base, models = random(seed, rank=rank)
    merged = refmerge.merge(models, "knots", base=base, trim=trim)
    close(refmerge.merge(models[::-1], "knots", base=base, trim=trim), merged, 1e-7)
    rows = {"rows": True, "columns": False}
    got = refmerge.merge([turned(m, seed, **rows) for m in models], "knots", base=turned(base, seed, **rows), trim=trim)
    close(got, turned(merged, seed, **rows), 1e-7)


@RELAXED
@given(SEEDS, st.sampled_from([0.2, 1.0]), st.sampled_from([None, 2]))
def test_a_model_that_equals_the_base_ties_nothing(seed, trim, rank):
    base, models = random(seed, 2, rank)
    merged = refmerge.merge(models, "knots", base=base, trim=trim)
    close(refmerge.merge([models[0], base, models[1]], "knots", base=base, trim=trim), merged, 1e-7)


@RELAXED
@given(SEEDS)
def test_what_is_orthogonal_in_its_outputs_is_added(seed):
    """Nobody else has anything in a model's directions; a zero is in no mean."""
    L, draw = turn(seed, 6), np.random.default_rng(seed)
    parts = [L[:, i : i + 2] * [4.0 + i, 1.0 + 0.1 * i] @ draw.standard_normal((2, 7)) for i in (0, 2, 4)]
    for dtype, atol in ((np.float64, 1e-9), (np.float32, 1e-4)):  # in float32 the zeros are rounded before
        got = refmerge.call("knots", [x.astype(dtype) for x in parts], np.zeros((6, 7), dtype), trim=1.0)
        np.testing.assert_allclose(got, sum(parts), atol=atol)


@RELAXED
@given(SEEDS, st.integers(1, 3))
def test_coordinates_are_as_many_as_the_ranks_allow(seed, rank):
    """LoRA's changes in float32: rounding errors of the weights are no directions."""
    draw = np.random.default_rng(seed)
    base = draw.standard_normal((16, 12)).astype(np.float32)
    models = [
        (base + draw.standard_normal((16, rank)) @ draw.standard_normal((rank, 12))).astype(np.float32) for _ in range(2)
    ]
    merged = refmerge.call("knots", models, base, trim=0.5)
    assert np.linalg.matrix_rank((merged - base).astype(np.float64), tol=1e-3) <= 2 * rank


def test_a_tensor_without_entries_stays_as_it_is():
    for name in ("opcm", "fusion_bench:opcm"):
        models = [{"a.weight": np.zeros((0, 3)), "b.weight": x * np.eye(2)} for x in (1.0, 2.0)]
        merged = refmerge.merge(models, name, base={"a.weight": np.zeros((0, 3)), "b.weight": np.zeros((2, 2))})
        assert merged["a.weight"].shape == (0, 3)
        np.testing.assert_allclose(merged["b.weight"], 1.5 * np.eye(2), atol=1e-12)
