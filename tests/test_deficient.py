"""Changes of less than full rank: what float32 makes of them is what float64 does, for every method of subspaces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refmerge

FEW = settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHAPES = [(24, 20), (20, 24), (200, 6), (6, 200)]  # the last two are decomposed in strips
ALL = {
    "tsvm": {},
    "iso_c": {},
    "iso_cts": {"common_space_fraction": 0.5},
    "dc_merge": {"density": 1.0},  # of entries in the cover space, all: what is largest may hang on a last bit
    "svc": {},
    "knots": {"trim": 1.0},
    "opcm": {"alpha": 0.8},
    "doge": {"density": 1.0, "steps": 20, "lr": 1e-2},
    "wudi": {"steps": 20, "lr": 1e-2},
    "wudi, exact": {"solver": "exact"},
    "dop": {"steps": 20, "lr": 1e-2},
    "low_rank_residual": {"rank": 3},
    "singular_projection": {"k": 3},
}


def twice(x, axis):
    """The second half of the columns, or rows, those of the first once more."""
    first = np.split(x, 2, axis=axis)[0]
    return np.concatenate([first, first], axis=axis)


def low(draw, shape, rank):
    return draw.standard_normal((shape[0], rank)) @ draw.standard_normal((rank, shape[1]))


def orthogonal(draw, shape):
    """Three changes of rank 2, none of which has a row, or a column, in what another one spans."""
    left, right = (np.split(np.linalg.qr(draw.standard_normal((n, 6)))[0], 3, axis=1) for n in shape)
    return [L @ np.diag([3.0 + t, 1.0 + 0.1 * t]) @ R.T for t, (L, R) in enumerate(zip(left, right))]


KINDS = {
    "equal models": lambda draw, shape: [draw.standard_normal(shape)] * 3,
    "equal models of low rank": lambda draw, shape: [low(draw, shape, 2)] * 3,
    "LoRA": lambda draw, shape: [low(draw, shape, 1 + t % 2) for t in range(3)],
    "nothing changed": lambda draw, shape: [np.zeros(shape)] * 2,
    "one changed nothing": lambda draw, shape: [low(draw, shape, 2), np.zeros(shape), low(draw, shape, 1)],
    "one model": lambda draw, shape: [draw.standard_normal(shape)],
    "one LoRA": lambda draw, shape: [low(draw, shape, 2)],
    "columns twice": lambda draw, shape: [twice(draw.standard_normal(shape), 1) for _ in range(2)],
    "rows twice": lambda draw, shape: [twice(draw.standard_normal(shape), 0) for _ in range(2)],
    "orthogonal LoRA": lambda draw, shape: orthogonal(draw, shape),
    "opposite": lambda draw, shape: [x := low(draw, shape, 2), -x, low(draw, shape, 1)],
}


def merged(name, changes, base, dtype):
    method = name.partition(",")[0]
    models = [(base + x).astype(dtype) for x in changes]
    if method in ("low_rank_residual", "singular_projection"):
        models = models[:1]
    if method == "svc":
        models = [(base + sum(changes)).astype(dtype), *models]
    return refmerge.call(method, models, base.astype(dtype), **ALL[name]).astype(np.float64) - base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
@FEW
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), weights=st.sampled_from([0, 10]))
def test_float32_and_float64_agree(name, kind, seed, shape, weights):
    """Models rounded to float32, whose rounding has full rank, and models of float64 that were not rounded."""
    draw = np.random.default_rng(seed)
    changes = KINDS[kind](draw, shape)
    base = (weights * draw.standard_normal(shape)).astype(np.float32).astype(np.float64)
    narrow, wide = (merged(name, changes, base, dtype) for dtype in (np.float32, np.float64))
    assert np.all(np.isfinite(wide))
    if (name, kind) == ("wudi", "orthogonal LoRA"):  # its gradients are rounding, of which Adam makes whole steps
        assert np.max(np.abs(narrow - wide)) <= 20 * 1e-2
        return
    slack = (1e-4 if weights else 1e-5) * max(map(np.linalg.norm, changes))
    assert np.linalg.norm(narrow - wide) <= max(slack, 1e-6 * weights)


@FEW
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), part=st.sampled_from(["low", "high"]))
def test_a_base_of_low_rank_has_no_more_directions_in_float32(seed, shape, part):
    draw = np.random.default_rng(seed)
    base, change = low(draw, shape, 3), draw.standard_normal(shape)
    made = [
        refmerge.call("singular_projection", [(base + change).astype(d)], base.astype(d), k=5, part=part).astype(float)
        for d in (np.float32, np.float64)
    ]
    assert np.linalg.norm(made[0] - made[1]) <= 1e-5 * np.linalg.norm(base + change)


def test_why_opcm_needs_a_tolerance():
    """Without one the directions of rounding count, and what of the next task vector lies on their diagonal goes."""
    draw = np.random.default_rng(0)
    changes = KINDS["LoRA"](draw, (24, 20))
    without = [refmerge.call("opcm", [x.astype(d) for x in changes], np.zeros((24, 20), d), tolerance=1e-12)
               for d in (np.float32, np.float64)]  # fmt: skip
    assert np.linalg.norm(without[0] - without[1]) > 0.05 * np.linalg.norm(without[1])
