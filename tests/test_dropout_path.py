"""The path through halved networks: its corners by hand, and what must hold on every piece."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, registry
from refmerge.checkpoint import save
from refmerge.nets import mlp

dropout_path = registry.procedure("dropout_path")
loss_barrier = registry.procedure("loss_barrier")


def test_one_hidden_layer_by_hand():
    """The seven pieces; units 2 and 3 are the first model's free ones."""
    one = {"in.weight": np.array([[1.0], [2], [3], [4]]), "out.weight": np.array([[1.0, 2, 3, 4]])}
    two = {"in.weight": np.array([[5.0], [6], [7], [8]]), "out.weight": np.array([[5.0, 6, 7, 8]])}
    path = dropout_path([one, two])
    assert path.pieces == ("top", "free", "top", "free", "same", "free", "top") and path.dropped == (1, 6)
    corners = [(p["in.weight"].ravel().tolist(), p["out.weight"].ravel().tolist()) for p in path.points]
    assert corners == [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3, 4], [2, 4, 0, 0]),
        ([1, 2, 5, 6], [2, 4, 0, 0]),
        ([1, 2, 5, 6], [0, 0, 10, 12]),
        ([5, 6, 5, 6], [0, 0, 10, 12]),
        ([5, 6, 5, 6], [10, 12, 0, 0]),
        ([5, 6, 7, 8], [10, 12, 0, 0]),
        ([5, 6, 7, 8], [5, 6, 7, 8]),
    ]


def test_halves_of_odd_layers_and_of_ones_choice():
    model = {"in.weight": np.arange(1.0, 6)[:, None], "out.weight": np.ones((1, 5))}
    assert dropout_path([model, model]).points[1]["out.weight"].tolist() == [[2.5, 2.5, 0, 0, 0]]
    path = dropout_path([model, model], keep=[[4]])
    assert path.points[1]["out.weight"].tolist() == [[0, 0, 0, 0, 5]]


@st.composite
def networks(draw):
    """Two perceptrons, their outputs, a loss that is convex in these, and units to keep."""
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    sizes = [2, *draw(st.lists(st.integers(2, 5), min_size=1, max_size=3)), 2]
    models = []
    for _ in range(2):
        model = mlp.init(seed, sizes)
        models.append({k: seed.standard_normal(x.shape) for k, x in model.items()})
    x, y = seed.standard_normal((5, 2)), seed.standard_normal((5, 2))
    output = lambda m: np.asarray(mlp.forward(m, x, activation=np.tanh))  # noqa: E731
    keep = [seed.permutation(n)[: draw(st.integers(1, n // 2))].tolist() for n in sizes[1:-1]]
    return models, output, lambda m: float(np.mean(np.abs(output(m) - y))), draw(st.sampled_from([None, keep]))


@given(networks())
@settings(max_examples=40)
def test_what_holds_on_every_piece(case):
    models, output, loss, keep = case
    path = dropout_path(models, keep=keep)
    hidden = len(models[0]) // 2 - 1
    assert len(path.pieces) == 8 * hidden - 1 and len(path.dropped) == 2 * hidden
    for end, model in zip((path.points[0], path.points[-1]), models):
        assert all(np.array_equal(end[k], model[k]) for k in model)
    last = f"layers.{hidden}."
    for kind, one, two in zip(path.pieces, path.points, path.points[1:]):
        middle = {k: (one[k] + two[k]) / 2 for k in one}
        changed = {k for k in one if not np.array_equal(one[k], two[k])}
        if kind == "top":
            assert all(k.startswith(last) for k in changed)
            assert loss(middle) <= max(loss(one), loss(two)) + 1e-9
        else:
            np.testing.assert_allclose(output(middle), output(one), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(output(two), output(one), rtol=1e-9, atol=1e-9)
            assert kind == "free" or all(k.startswith(last) for k in changed)
    highest = max(loss(path.points[i]) for i in (0, *path.dropped, -1))
    assert max(loss_barrier(path.points, loss, points=4).losses) <= highest + 1e-9


@given(networks())
@settings(max_examples=20)
def test_halved_networks_are_halved(case):
    """At the place dropped[h] the last h + 1 hidden layers are read at the units that stay alone, times n / m."""
    models, output, _, keep = case
    path = dropout_path(models, keep=keep)
    hidden = len(models[0]) // 2 - 1
    kept = keep or [list(range(models[0][f"layers.{h}.weight"].shape[0] // 2)) for h in range(hidden)]
    for model, places in ((models[0], path.dropped[:hidden]), (models[1], path.dropped[hidden:][::-1])):
        halved = dict(model)
        for h, place in zip(range(hidden - 1, -1, -1), places):
            name = f"layers.{h + 1}.weight"
            mask = np.zeros(halved[name].shape[1])
            mask[kept[h]] = len(mask) / len(kept[h])
            halved[name] = halved[name] * mask
            np.testing.assert_allclose(output(path.points[place]), output(halved), rtol=1e-9, atol=1e-9)


def test_repeated_units_have_no_barrier():
    draw = np.random.default_rng(0)
    models = []
    for _ in range(2):
        w, v = draw.standard_normal((3, 2)), draw.standard_normal((1, 3))
        models.append({"0.weight": np.concatenate([w, w]), "1.weight": np.concatenate([v, v], axis=1)})
    x = draw.standard_normal((9, 2))
    loss = lambda m: float(np.mean((np.tanh(x @ m["0.weight"].T) @ m["1.weight"].T - 1) ** 2))  # noqa: E731
    path = dropout_path(models)
    assert loss_barrier(path.points, loss, reference="max").barrier <= 1e-12
    assert loss_barrier(models, loss, reference="max").barrier >= 0


def test_convolutions_dtypes_and_checkpoints(tmp_path):
    model = {
        "conv1.weight": np.ones((4, 3, 3, 3), np.float32),
        "conv1.bias": np.ones(4, np.float32),
        "conv2.weight": np.ones((2, 4, 3, 3), np.float32),
    }
    path = dropout_path([model, model])
    assert path.points[1]["conv2.weight"][0, :, 0, 0].tolist() == [2, 2, 0, 0]
    assert path.points[1]["conv2.weight"].dtype == np.float32
    half = {k: x.astype(ml_dtypes.bfloat16) for k, x in model.items()}
    assert all(x.dtype == ml_dtypes.bfloat16 for point in dropout_path([half, half]).points for x in point.values())
    save(model, tmp_path / "m.safetensors")
    disk = dropout_path([tmp_path / "m.safetensors"] * 2)
    assert all(np.array_equal(one[k], two[k]) for one, two in zip(disk.points, path.points) for k in one)
    named = dropout_path([model, model], layers=[("conv1.weight", "conv1.bias"), "conv2.weight"])
    assert named.pieces == path.pieces


TWO = {"0.weight": np.ones((2, 1)), "1.weight": np.ones((1, 2))}


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ({**TWO, "norm.weight": np.ones(2)}, {}, "'norm.weight' is neither"),
        ({"0.weight": np.ones((2, 1))}, {}, "two layers or more"),
        ({"0.weight": np.ones((1, 1)), "1.weight": np.ones((1, 1))}, {}, "of the 1 units"),
        ({"0.weight": np.ones((2, 1)), "1.weight": np.ones((1, 4))}, {}, "cannot read 2 units"),
        (TWO, {"keep": [[0, 1]]}, r"\[0, 1\] cannot stay"),
        (TWO, {"keep": [[2]]}, r"\[2\] cannot stay"),
        (TWO, {"keep": [[]]}, r"\[\] cannot stay"),
        (TWO, {"keep": [[0], [0]]}, "1 hidden layers, not 2"),
        (TWO, {"layers": ["0.weight", "2.weight"]}, "no such tensor"),
    ],
)
def test_refusals(model, options, said):
    with pytest.raises(UsageError, match=said):
        dropout_path([model, model], **options)


def test_models_that_do_not_fit():
    with pytest.raises(UsageError, match="models are two"):
        dropout_path([TWO])
    with pytest.raises(InputError, match=r"'0.weight'"):
        dropout_path([TWO, {**TWO, "0.weight": np.ones((2, 3))}])
