"""Merges along arcs: what they have in common, and mergekit's steps in 16 bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge.api import prepare
from refmerge.errors import UsageError
from refmerge.testing import assert_same

seeds = given(seed=st.integers(0, 2**32 - 1))
quick = settings(max_examples=50, deadline=None, derandomize=True)


def vectors(seed: int, count: int, spread: float = 1.0, size: int = 12) -> list[np.ndarray]:
    """Around a common direction, of lengths from 1/8 to 8; spread 1 parts them by about 45 degrees."""
    draw = np.random.default_rng(seed)
    common = draw.standard_normal(size)
    return [2.0 ** draw.uniform(-3, 3) * (common + spread * draw.standard_normal(size)) for _ in range(count)]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


@quick
@seeds
def test_nuslerp_is_slerp_at_the_ratio_of_the_weights(seed):
    a, b = vectors(seed, 2)
    base = np.random.default_rng(seed + 1).standard_normal(12)
    assert_same(refmerge.call("nuslerp", [a, b], weight=[0.75, 0.25]), refmerge.call("slerp", [a, b], t=0.25))
    expected = base + refmerge.call("slerp", [a - base, b - base], t=0.25)
    assert_same(refmerge.call("nuslerp", [a, b], base, weight=[3.0, 1.0]), expected)


@quick
@seeds
def test_rows_and_columns_go_along_arcs_of_their_own(seed):
    draw = np.random.default_rng(seed)
    a, b = draw.standard_normal((2, 5, 7))
    for per, x, y in (("row", a, b), ("column", a.T, b.T)):
        whole = refmerge.call("nuslerp", [a, b], weight=[2.0, 1.0], per=per)
        alone = [refmerge.call("slerp", [p.copy(), q.copy()], t=1 / 3) for p, q in zip(x, y)]
        np.testing.assert_allclose(whole if per == "row" else whole.T, alone, rtol=1e-13, atol=1e-14)


@quick
@seeds
def test_a_karcher_mean_of_two_is_on_the_arc(seed):
    a, b = map(unit, vectors(seed, 2))
    mean = refmerge.call("karcher", [a, b], weight=[0.75, 0.25])
    np.testing.assert_allclose(mean, refmerge.call("slerp", [a, b], t=0.25), rtol=1e-12, atol=1e-12)


@quick
@seeds
def test_at_a_karcher_mean_the_arcs_cancel(seed):
    draw = np.random.default_rng(seed)
    count, weight = int(draw.integers(2, 7)), draw.uniform(0.1, 2, 6)
    x = vectors(seed, count, spread=draw.choice([1e-4, 0.1, 1.0, 3.0]))
    mean = refmerge.call("karcher", x, weight=list(weight[:count]))
    u, directions = unit(mean), np.array([unit(v) for v in x])
    cosines = directions @ u
    if np.min(cosines) <= 0:
        return  # so far apart there may be no mean
    angles = np.arccos(np.clip(cosines, -1, 1))
    stretch = np.where(angles > 1e-6, angles / np.sin(np.where(angles > 1e-6, angles, 1)), 1)
    arcs = (weight[:count] * stretch)[:, None] * (directions - cosines[:, None] * u)
    np.testing.assert_allclose(np.sum(arcs, axis=0), 0, atol=1e-13)
    lengths = [np.linalg.norm(v) for v in x]
    np.testing.assert_allclose(np.linalg.norm(mean), np.average(lengths, weights=weight[:count]))


@quick
@seeds
def test_multislerp_is_the_mean_of_unit_vectors_at_the_mean_length(seed):
    x = vectors(seed, 4)
    weight = [2.0, -0.5, 1.0, 0.25]
    mean = sum(w * unit(v) for w, v in zip(weight, x))
    length = sum(w * np.linalg.norm(v) for w, v in zip(weight, x)) / sum(weight)
    np.testing.assert_allclose(refmerge.call("multislerp", x, weight=weight), length * unit(mean), rtol=1e-12, atol=1e-12)


def test_float32_inputs_nearly_cancel_and_keep_their_digits():
    """Two models of 1e-3 apart, one of them subtracted: their products in float32 would leave three digits."""
    draw = np.random.default_rng(0)
    a = draw.standard_normal(5000).astype(np.float32)
    b = a + (1e-3 * draw.standard_normal(5000)).astype(np.float32)
    given_ = {"weight": [1.0, -0.9], "normalize": False}
    exact = refmerge.call("multislerp", [a.astype(np.float64), b.astype(np.float64)], **given_)
    np.testing.assert_allclose(refmerge.call("multislerp", [a, b], **given_), exact, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher"])
def test_weights_that_sum_to_zero_are_refused(name):
    weight = [0.0, 0.0] if name == "karcher" else [1.0, -1.0]
    with pytest.raises(UsageError, match=f"{name}: the weights sum to 0"):
        refmerge.call(name, [[1.0, 0.0], [0.0, 1.0]], weight=weight)


MERGEKIT = [
    ("nuslerp", {"weight": [0.3, 0.9]}, 2, True),
    ("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False}, 2, True),
    ("nuslerp", {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}, 2, False),
    ("multislerp", {"weight": [1.0, 0.5, 0.25]}, 3, True),
    ("karcher", {}, 3, False),
    ("nearswap", {"t": 0.01}, 1, True),
    ("passthrough", {"scale": 0.3}, 1, False),
]


@pytest.mark.parametrize(("name", "params", "count", "based"), MERGEKIT)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_mergekits_steps_in_sixteen_bits_in_any_blocks_and_on_torch(name, params, count, based, dtype, torch):
    draw = np.random.default_rng(0)
    shapes = {"a": (41, 67), "b": (5000,), "c": (3, 4, 5), "n": ()}
    common = {n: draw.standard_normal(s) for n, s in shapes.items()}
    models = [
        {n: np.asarray(x + 0.3 * draw.standard_normal(x.shape), dtype) for n, x in common.items()} for _ in range(count + 1)
    ]
    *models, base = models

    def run(models, base, elements):
        options = {"base": base if based else None, "arithmetic": "native", "threads": 1, "nonfinite": "propagate"}
        plan = prepare(models, f"mergekit:{name}", params=params, **options)
        plan.elements = elements
        return plan.run()

    whole = run(models, base, 1 << 22)
    assert all(x.dtype == dtype for x in whole.values())
    for elements in (1024, 300):
        assert_same(run(models, base, elements), whole)

    def there(model):
        kind = torch.bfloat16 if dtype == ml_dtypes.bfloat16 else torch.float16
        return {n: torch.from_numpy(np.array(x.view(np.int16))).view(kind) for n, x in model.items()}

    assert_same(run([there(m) for m in models], there(base), 1024), whole)
