"""Layer-wise barriers: losses that the authors' code gave, by hand, and laws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import InputError, UsageError, open_checkpoint, registry
from refmerge.checkpoint import save
from refmerge.nets import mlp
from refmerge.procedures.measures.layerwise_barrier import with_layer

layerwise_barrier = registry.procedure("layerwise_barrier")
loss_barrier = registry.procedure("loss_barrier")
DATA = Path(__file__).parent / "data" / "layerwise_barrier.npz"

# link-er/layer-wise-lmc@638ca70 get_barrier and get_layer_barrier with amount=3, in torch, on three batches of 20 inputs:
# the losses and accuracies in its lists. The data file has the two networks, the inputs and the labels.
FULL = ([1.1385952234268188, 1.1153273582458496, 1.1769464413324993], [30.0, 31.666666666666668, 31.666666666666668])
LAYERS = {
    "fc1": (
        [1.1704670985539753, 1.1166496276855469, 1.1740979353586833, 1.106204907099406],
        [31.666666666666668, 30.0, 31.666666666666668, 30.0],
    ),
    "fc2": (
        [1.1562150319417317, 1.1178044080734253, 1.1654982964197795, 1.1189521551132202],
        [31.666666666666668, 30.0, 31.666666666666668, 26.666666666666668],
    ),
    "fc3": (
        [1.107811729113261, 1.1177995204925537, 1.1156819264094036, 1.1392610867818196],
        [28.333333333333332, 30.0, 31.666666666666668, 33.333333333333336],
    ),
}


def published():
    data = np.load(DATA)
    one, two = ({k.partition("/")[2]: data[k] for k in data.files if k.startswith(f"model{i}/")} for i in (0, 1))
    return [one, two], data["inputs"], data["labels"]


def test_losses_of_the_authors_code():
    models, x, y = published()

    def loss(m):
        """The mean of the means of batches of 20."""
        z = np.asarray(mlp.forward(m, x), dtype=np.float64)
        each = np.log(np.exp(z).sum(axis=1)) - z[np.arange(60), y]
        return float(each.reshape(3, 20).mean(axis=1).mean())

    def accuracy(m):
        return 100 * float(np.mean(np.argmax(mlp.forward(m, x), axis=1) == y))

    for score, which, better in ((loss, 0, "lower"), (accuracy, 1, "higher")):
        full = loss_barrier(models, score, points=3, better=better)
        np.testing.assert_allclose(full.losses, FULL[which], rtol=2e-6)
        found = layerwise_barrier(models, score, better=better)
        assert list(found.layers) == list(LAYERS)
        for label, layer in found.layers.items():
            listed = [layer.second[0], layer.first[1], layer.second[1], layer.first[2]]
            np.testing.assert_allclose(listed, LAYERS[label][which], rtol=2e-6)


def test_a_point_of_the_authors_code():
    """interpolate_layer_state_dicts(1, ..., 0.25): two values of its fc2.bias and one of its fc2.weight."""
    models, _, _ = published()
    got = with_layer(models, ["fc2.weight", "fc2.bias"], 0.25, into=1)
    assert got["fc2.bias"][:2].tolist() == [0.0010424256324768066, -0.10281442105770111]
    assert got["fc2.weight"][0, 0] == 0.09977884590625763
    assert all(got[k] is models[1][k] for k in ("fc1.weight", "fc3.bias"))
    assert with_layer(models, ["fc2.bias"], 0.0, into=1)["fc2.bias"] is models[0]["fc2.bias"]


# --- By hand ----------------------------------------------------------------------------------------------------------

ONE = {"a.weight": np.array([2.0]), "b.weight": np.array([0.5])}
TWO = {"a.weight": np.array([0.5]), "b.weight": np.array([2.0])}


def product(m):
    return (m["a.weight"].item() * m["b.weight"].item() - 1) ** 2


def test_a_product_of_two():
    found = layerwise_barrier([ONE, TWO], product)
    assert found.ends == (0.0, 0.0) and found.t == (0.0, 0.5, 1.0)
    assert found.layers["a"].first == (0.0, 0.140625, 0.5625)  # 1.25 / 2 - 1, 0.5 / 2 - 1
    assert found.layers["a"].second == (9.0, 2.25, 0.0)  # 2 * 2 - 1, 1.25 * 2 - 1
    assert found.layers["a"].barriers == (0.140625, 2.25)


def test_groups_grow_from_either_end():
    shallow = layerwise_barrier([ONE, TWO], product, cumulative="shallow").layers
    deep = layerwise_barrier([ONE, TWO], product, cumulative="deep").layers
    assert {k: v.tensors for k, v in shallow.items()} == {"a": ("a.weight",), "b": ("a.weight", "b.weight")}
    assert {k: v.tensors for k, v in deep.items()} == {"b": ("b.weight",), "a": ("b.weight", "a.weight")}
    assert shallow["b"].barriers == deep["a"].barriers == (0.31640625, 0.31640625)


def test_layers_of_a_checkpoint_are_in_the_order_of_their_numbers(tmp_path):
    model = {f"layers.{i}.weight": np.ones(1, np.float32) for i in range(12)}
    save(model, tmp_path / "m.safetensors")
    for given_ in (model, open_checkpoint(tmp_path / "m.safetensors"), str(tmp_path / "m.safetensors")):
        found = layerwise_barrier([given_, given_], lambda m: float(m["layers.3.weight"][0]))
        assert list(found.layers) == [f"layers.{i}" for i in range(12)]


def test_a_layer_without_a_dot_is_a_tensor():
    found = layerwise_barrier([{"x": np.ones(1), "y": np.ones(1)}] * 2, lambda m: 0.0)
    assert {k: v.tensors for k, v in found.layers.items()} == {"x": ("x",), "y": ("y",)}


def test_nan_stays_in_its_layer():
    found = layerwise_barrier([ONE, TWO], lambda m: math.nan if m["a.weight"].item() == 1.25 else 0.0)
    assert all(map(math.isnan, found.layers["a"].barriers)) and found.layers["b"].barriers == (0.0, 0.0)


@pytest.mark.parametrize(
    ("models", "options", "error", "said"),
    [
        ([ONE], {}, UsageError, "models are two"),
        ([ONE, TWO, ONE], {}, UsageError, "models are two"),
        (ONE, {}, UsageError, "models are two"),
        ([ONE, TWO], {"points": 2}, UsageError, "points = 2"),
        ([ONE, TWO], {"cumulative": True}, UsageError, "'no', 'shallow', 'deep'"),
        ([ONE, TWO], {"layers": {"c": ["c.weight"]}}, UsageError, "layer 'c' has no tensor 'c.weight'"),
        ([ONE, {"a.weight": np.ones(1)}], {}, InputError, "'b.weight'"),
    ],
)
def test_refusals(models, options, error, said):
    with pytest.raises(error, match=said):
        layerwise_barrier(models, product, **options)


# --- Laws -------------------------------------------------------------------------------------------------------------


@st.composite
def networks(draw):
    """Two networks of two layers, and a loss."""
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    models = [mlp.init(seed, [3, 4, 2]) for _ in range(2)]
    x, y = seed.standard_normal((6, 3)), seed.standard_normal((6, 2))
    return models, lambda m: float(np.mean((mlp.forward(m, x, activation=np.tanh) - y) ** 2))


@given(networks(), st.integers(3, 5))
def test_all_layers_together_are_the_full_barrier(pair, points):
    models, loss = pair
    (whole,) = layerwise_barrier(models, loss, layers=lambda name: "all", points=points).layers.values()
    full = loss_barrier(models, loss, points=points, reference="mean")
    np.testing.assert_allclose(whole.first, full.losses, rtol=1e-9)
    np.testing.assert_allclose(whole.second, full.losses, rtol=1e-9)
    assert whole.barriers[0] == pytest.approx(max(full.excess[1:-1]), rel=1e-9, abs=1e-12)
    for order in ("shallow", "deep"):
        *_, last = layerwise_barrier(models, loss, cumulative=order, points=points).layers.values()
        assert last.barriers == pytest.approx(whole.barriers, rel=1e-9, abs=1e-12)


@given(networks())
def test_exchanging_the_models_mirrors(pair):
    models, loss = pair
    there, back = (layerwise_barrier(m, loss, points=4) for m in (models, models[::-1]))
    assert back.ends == there.ends[::-1]
    for label, layer in there.layers.items():
        np.testing.assert_allclose(back.layers[label].first, layer.second[::-1], rtol=1e-9)
        np.testing.assert_allclose(back.layers[label].second, layer.first[::-1], rtol=1e-9)


@given(networks())
def test_equal_layers_change_nothing(pair):
    (one, two), loss = pair
    two = {**two, **{k: one[k] for k in one if k.startswith("layers.0")}}
    found = layerwise_barrier([one, two], loss)
    np.testing.assert_allclose(found.layers["layers.0"].first, [found.ends[0]] * 3, rtol=1e-12)
    np.testing.assert_allclose(found.layers["layers.0"].second, [found.ends[1]] * 3, rtol=1e-12)
    half = (found.ends[0] - found.ends[1]) / 2
    assert found.layers["layers.0"].barriers == pytest.approx((half, -half), rel=1e-9, abs=1e-12)


@given(networks())
def test_a_convex_layer_lies_below_the_line_between_its_own_ends(pair):
    models, loss = pair
    last = layerwise_barrier(models, loss, points=5).layers["layers.1"]  # the loss is quadratic in the last layer
    for losses in (last.first, last.second):
        for t, value in zip((0.25, 0.5, 0.75), losses[1:-1]):
            assert value <= (1 - t) * losses[0] + t * losses[-1] + 1e-9
