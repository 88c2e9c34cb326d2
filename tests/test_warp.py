"""WARP against what it is made of: slerp of task vectors, one after another, and what shares an angle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import call, merge
from refmerge.methods.averaging.warp import layer


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.30.mlp.experts.4.w1", "model.layers.30"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("0.weight", "0.weight"),  # a number that no dot precedes is none of a layer, as in recipes
        ("layers.3", "layers.3"),
        ("x", "x"),
        ("", ""),
    ],
)
def test_layers(name, label):
    assert layer(name) == label


@given(st.integers(2, 5), st.integers(1, 9), st.integers(0, 10_000))
def test_arcs_one_after_another(count, size, seed):
    """The coefficients found from inner products are those of slerp on the vectors themselves."""
    draw = np.random.default_rng(seed)
    base, *models = draw.standard_normal((count + 1, size))
    s = models[0] - base
    for m, model in enumerate(models[1:], 2):
        s = call("slerp", [s, model - base], t=1 / m)
    np.testing.assert_allclose(call("warp", models, base), base + s, rtol=1e-6, atol=1e-6)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.permutations(range(6)), st.floats(0.125, 8))
def test_equal_lengths_stay(entries, order, weight):
    a = np.array(entries + [0.0] * (6 - len(entries)))
    b = a[order]
    norm = np.linalg.norm(a)
    if norm > 1e-3 and np.linalg.norm(a + b) > 1e-2 * norm:
        merged = call("warp", [a, b], np.zeros(6), weight=[1.0, weight])
        assert abs(np.linalg.norm(merged) - norm) < 1e-6 * norm


def test_a_layer_is_as_if_it_were_one_tensor():
    draw = np.random.default_rng(0)
    base, *models = ({f"model.layers.7.{k}": draw.standard_normal(5) for k in "ab"} for _ in range(4))
    merged = merge(models, "warp", base=base)
    together = call("warp", [np.concatenate(list(m.values())) for m in models], np.concatenate(list(base.values())))
    np.testing.assert_allclose(np.concatenate([merged[k] for k in base]), together, rtol=1e-12)
    apart = merge(models, "warp", base=base, over="tensor")
    assert not np.allclose(apart["model.layers.7.a"], merged["model.layers.7.a"])
