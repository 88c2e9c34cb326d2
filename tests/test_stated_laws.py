"""Laws that pages state in words, and that `refmerge.laws` has no name for since they are of one method or two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import call, testing

seeds = st.integers(0, 1 << 32)
shares = st.floats(0, 1)
quick = settings(max_examples=25, deadline=None)


def near(a, b, *around):
    """Equal up to a few roundings of the largest number around."""
    largest = max(float(np.max(np.abs(x), initial=0)) for x in (b, *around))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * largest + 1e-300)


def drawn(seed, count, shape=(3, 4)):
    return list(np.random.default_rng(seed).standard_normal((count, *shape)))


def whole(seed, count, shape=(3, 4)):
    """Small whole numbers, whose sums and products are exact."""
    return list(np.random.default_rng(seed).integers(-8, 9, (count, *shape)).astype(np.float64))


# --- Lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "along"), [("wise_ft", "alpha"), ("liti", "eta")])
@quick
@given(seeds, shares, shares)
def test_two_steps_on_a_line_are_one(name, along, seed, a, b):
    base, model = drawn(seed, 2)
    once = call(name, [model], base, **{along: a})
    near(call(name, [once], base, **{along: b}), call(name, [model], base, **{along: a * b}), base, model)


@quick
@given(seeds, shares)
def test_liti_is_wise_ft_to_the_bit(seed, eta):
    base, model = (x.astype(np.float32) for x in drawn(seed, 2))
    testing.assert_same(call("liti", [model], base, eta=eta), call("wise_ft", [model], base, alpha=eta))


@quick
@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_beyond_a_model_and_further_beyond(seed, a, b):
    """expo by alpha and then by beta, both from the base."""
    base, model = drawn(seed, 2)
    once = call("expo", [model], base, alpha=a)
    near(call("expo", [once], base, alpha=b), call("expo", [model], base, alpha=a + b + a * b), base, 9 * model)


@quick
@given(seeds, st.integers(1, 3), shares, st.sampled_from([np.float32, np.float64]))
def test_a_run_is_followed_in_two_sittings(seed, cut, mu, dtype):
    base, *run = (x.astype(dtype) for x in drawn(seed, 5))
    middle = call("ema", run[:cut], base, mu=mu)
    testing.assert_same(call("ema", run[cut:], middle, mu=mu), call("ema", run, base, mu=mu))


@quick
@given(seeds, st.integers(1, 4))
def test_an_average_of_averages(seed, cut):
    models = drawn(seed, 5)
    parts = [call("linear", models[:cut]), call("linear", models[cut:])]
    near(call("linear", parts, weight=[float(cut), 5.0 - cut]), call("linear", models), *models)


@quick
@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_lines_is_linear_in_alpha_and_beta(seed, a, b):
    base, *models = drawn(seed, 3)

    def moved(alpha, beta):
        return call("lines", models, base, name="layers.1.w", blocks=4, alpha=alpha, beta=beta) - base

    near(moved(a, b), a * moved(1.0, 0.0) + b * moved(0.0, 1.0), base, *models)


# --- Arcs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multislerp", "karcher"])
@quick
@given(seeds, st.floats(0.25, 4))
def test_the_length_of_one_model_changes_only_that_of_the_result(name, seed, factor):
    models = [np.abs(x) for x in drawn(seed, 3)]  # in one half of the sphere, where no directions cancel
    before = call(name, models)
    after = call(name, [factor * models[0], *models[1:]])
    near(after / np.linalg.norm(after), before / np.linalg.norm(before))


@quick
@given(seeds, st.floats(0.125, 8))
def test_two_policies_may_change_places(seed, weight):
    base, a, b = drawn(seed, 3)
    near(call("warp", [a, b], base, weight=[1.0, weight]), call("warp", [b, a], base, weight=[weight, 1.0]), base, a, b)


@quick
@given(seeds)
def test_a_policy_alone_in_weight_comes_back(seed):
    base, a, b = drawn(seed, 3)
    for weight, expected in (([1.0, 0.0], a), ([0.0, 1.0], b)):
        near(call("warp", [a, b], base, weight=weight), expected, base, a, b)


@quick
@given(seeds, st.integers(2, 4))
def test_a_policy_that_did_not_move_shortens_the_merge(seed, count):
    base, *policies = drawn(seed, count + 1)
    merged = call("warp", policies, base)
    near(call("warp", [*policies, base], base) - base, count / (count + 1) * (merged - base), base, *policies)


# --- Task vectors -----------------------------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(1, 3))
def test_the_largest_changes_may_be_selected_in_steps(seed, cut):
    """magmax at lambda 1: ties are among small whole numbers, and the later one stays either way."""
    base, *models = whole(seed, 5)
    first = call("magmax", models[:cut], base, lambda_=1.0)
    testing.assert_same(call("magmax", [first, *models[cut:]], base, lambda_=1.0), call("magmax", models, base, lambda_=1.0))


@quick
@given(seeds, st.floats(0.25, 4))
def test_the_length_of_a_task_vector_does_not_move_the_stock(seed, factor):
    base, a, b = drawn(seed, 3)
    longer = base + factor * (a - base)
    t = (call("model_stock", [a, b], base) - base) / ((a + b) / 2 - base)
    near(call("model_stock", [longer, b], base), base + t * ((longer + b) / 2 - base), base, a, b, longer)


@quick
@given(seeds, st.integers(2, 4))
def test_copies_of_one_model_are_the_stock(seed, count):
    base, model = drawn(seed, 2)
    np.testing.assert_allclose(call("model_stock", [model] * count, base), model, atol=1e-7)  # an arccos near 1


@quick
@given(seeds, st.integers(1, 4))
def test_disjoint_changes_are_added(seed, count):
    draw = np.random.default_rng(seed)
    base, change = whole(seed, 2)
    owner = draw.integers(0, count, base.shape)
    models = [base + change * (owner == n) for n in range(count)]
    testing.assert_same(call("ram", models, base), call("task_arithmetic", models, base), signed_zero=False)


@quick
@given(seeds, st.lists(st.integers(-4, 4), min_size=3, max_size=3))
def test_a_row_of_both_may_be_moved(seed, by):
    """arcee_fusion: neither changes nor softmaxes see it."""
    base, model = drawn(seed, 2)
    shift = np.array(by, np.float64)[:, None]
    near(call("arcee_fusion", [model + shift], base + shift), call("arcee_fusion", [model], base) + shift, 16 * base, model)


@quick
@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_signatures_are_at_right_angles_and_add_up(seed, v, w):
    base, clean, fog, snow = drawn(seed, 4)

    def patched(*weights):
        return call("rws", [clean, fog, snow], base, weight=[0.0, *weights]) - clean

    assert abs(np.sum((clean - base) * patched(1.0, 0.0))) < 1e-12 * np.sum((clean - base) ** 2 + (fog - base) ** 2)
    near(patched(v, w), v * patched(1.0, 0.0) + w * patched(0.0, 1.0), base, clean, fog, snow)
    twice = call("rws", [clean, fog, fog], base, weight=[0.0, v, w]) - clean
    near(twice, (v + w) * patched(1.0, 0.0), base, clean, fog)


@quick
@given(seeds, st.integers(-8, 8), st.floats(0, 3))
def test_matrices_are_widened_at_any_scale(seed, power, ratio):
    base, *models = drawn(seed, 4)
    merged = call("widen", models, base, above_average_value_ratio=ratio)
    scaled = call("widen", [2.0**power * m for m in models], 2.0**power * base, above_average_value_ratio=ratio)
    testing.assert_same(scaled, 2.0**power * merged)


@quick
@given(seeds, st.integers(1, 4))
def test_where_no_column_is_marked_the_scores_sum_to_one(seed, count):
    base, model, *others = drawn(seed, count + 1)
    near(call("widen", [model] * count, base, above_average_value_ratio=2.0), model, base)
    scores = call(
        "widen", [np.ones((3, 4)), *(np.zeros((3, 4)) for _ in others)], np.zeros((3, 4)), above_average_value_ratio=2.0
    )
    assert np.all(scores >= 1 / (1 + (count - 1) * np.e) - 1e-12) and np.all(scores <= np.e / (np.e + count - 1) + 1e-12)


# --- Draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["della", "della_linear"])
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_what_is_dropped_has_the_expectation_and_the_variance_of_its_probability(name, seed):
    """Of many rows alike, whose entries stay with 1/4, 5/12, 7/12 and 3/4, within six deviations."""
    rows, change = 1 << 12, np.array([1.0, -2.0, 4.0, 8.0])
    models = [np.tile(change, (rows, 1))]
    merged = call(name, models, 0 * models[0], density=0.5, epsilon=0.25, lambda_=1.0, seed=seed)
    q = np.array([3, 5, 7, 9]) / 12
    variance = change**2 * (1 - q) / q
    assert np.all(np.abs(merged.mean(axis=0) - change) < 6 * np.sqrt(variance / rows))
    fourth = change**4 * ((1 - q) ** 4 / q**3 + 1 - q)  # of the distance from the mean, to the fourth power
    assert np.all(np.abs(merged.var(axis=0) - variance) < 6 * np.sqrt(fourth / rows))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.1, 0.5, 0.9]))
def test_the_variance_of_dare(seed, density):
    count = 1 << 14
    merged = call("dare_linear", [np.ones(count)], np.zeros(count), density=density, seed=seed)
    variance, fourth = (1 - density) / density, (1 - density) ** 4 / density**3 + 1 - density
    assert abs(merged.var() - variance) < 6 * np.sqrt(fourth / count)
