"""Straggler scores, layer-wise sharpness and sparse stragglers: by hand and as laws."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refmerge
from refmerge import InputError, UsageError, registry
from refmerge.checkpoint import save
from refmerge.nets import mlp
from refmerge.rng import key_for

straggler_score = registry.procedure("straggler_score")
layerwise_sharpness = registry.procedure("layerwise_sharpness")
sparse_stragglers = registry.procedure("sparse_stragglers")
loss_barrier = registry.procedure("loss_barrier")

ZERO = {"a.weight": np.array([1.0]), "b.weight": np.array([1.0])}
FINE = {"a.weight": np.array([2.0]), "b.weight": np.array([0.5])}


def product(m):
    return (m["a.weight"].item() * m["b.weight"].item() - 1) ** 2


@st.composite
def networks(draw):
    """A zero-shot model, its fine-tune, and a loss."""
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    one = mlp.init(seed, [3, 4, 2])
    two = {k: x + 0.5 * seed.standard_normal(x.shape) for k, x in one.items()}
    x, y = seed.standard_normal((6, 3)), seed.standard_normal((6, 2))
    return one, two, lambda m: float(np.mean((mlp.forward(m, x, activation=np.tanh) - y) ** 2))


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    found = straggler_score(ZERO, FINE, product, points=3)
    assert found.ends == (0.0, 0.0) and found.alpha == (0.0, 0.5, 1.0)
    assert found.losses == {"a": (0.25, 0.0625, 0.0), "b": (1.0, 0.25, 0.0)}  # products 1/2, 3/4 and 2, 3/2
    assert found.scores == {"a": 0.25, "b": 1.0} and found.layers == ("b", "a")
    assert straggler_score(ZERO, FINE, product, tolerance=0.25).layers == ("b",)
    kept = straggler_score(ZERO, FINE, product, points=3, rest="zero_shot")
    assert kept.losses == {"a": (0.0, 0.25, 1.0), "b": (0.0, 0.0625, 0.25)}


def test_the_line_is_between_the_whole_models():
    zero, fine = ({"x": np.array([v]), "idle": np.array([v])} for v in (1.0, 3.0))
    assert straggler_score(zero, fine, lambda m: m["x"].item()).scores == {"x": 0.0, "idle": 2.0}
    assert straggler_score(zero, fine, lambda m: -m["x"].item(), better="higher").scores == {"x": 0.0, "idle": 2.0}


def test_a_layer_without_a_loss_comes_first():
    found = straggler_score(ZERO, FINE, lambda m: math.nan if m["a.weight"].item() == 1.5 else product(m), points=3)
    assert math.isnan(found.scores["a"]) and found.layers == ("a", "b")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points": 1}, "points = 1"),
        ({"rest": "base"}, "'fine_tuned', 'zero_shot'"),
        ({"layers": {"c": ["c"]}}, "no tensor 'c'"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(UsageError, match=said):
        straggler_score(ZERO, FINE, product, **options)


@given(networks())
def test_laws_of_the_scores(given_):
    zero, fine, loss = given_
    found = straggler_score(zero, fine, loss, points=5)
    assert all(score >= 0 for score in found.scores.values())
    changed = straggler_score(zero, fine, lambda m: 3 * loss(m) + 1, points=5)
    assert changed.scores == pytest.approx({k: 3 * v for k, v in found.scores.items()}, abs=1e-9)
    back = straggler_score(fine, zero, loss, points=5, rest="zero_shot")
    assert back.scores == pytest.approx(found.scores, abs=1e-9)
    finer = straggler_score(zero, fine, loss, points=9)
    assert all(finer.scores[k] >= v - 1e-12 for k, v in found.scores.items())
    (whole,) = straggler_score(zero, fine, loss, layers=lambda name: "all", points=5).scores.values()
    assert whole == pytest.approx(loss_barrier([zero, fine], loss, points=5).barrier, abs=1e-12)


# --- Sharpness --------------------------------------------------------------------------------------------------------


def bowl(m):
    return float(m["x"][0] ** 2 + 4 * m["y"][0] ** 2)


def test_the_noise_is_the_generators():
    """The draws by NumPy's own generator, with the key that the number rules give."""
    model = {"x": np.array([2.0]), "y": np.array([1.0])}
    found = layerwise_sharpness(model, bowl, rho=0.5, draws=2, seed=7)
    keys = [np.array(key_for(7, "x", draw), np.uint64) for draw in (0, 1)]
    noise = [np.random.Generator(np.random.Philox(key=key)).standard_normal(1)[0] for key in keys]
    assert found.loss == 8.0
    assert found.layers["x"] == pytest.approx(sum((2 + 0.5 * 2 * n) ** 2 - 4 for n in noise) / 2)


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_mean_of_a_quadratic_loss(adaptive):
    """rho^2 / 2 times the trace, of the weights squared where adaptive."""
    draw = np.random.default_rng(0)
    model, h = {"w.weight": draw.standard_normal((20, 20))}, draw.uniform(0, 2, (20, 20))
    found = layerwise_sharpness(model, lambda m: float(np.sum(h * (m["w.weight"] - model["w.weight"]) ** 2) / 2), rho=0.1)
    scale = model["w.weight"] ** 2
    if not adaptive:
        found = layerwise_sharpness(
            model, lambda m: float(np.sum(h * (m["w.weight"] - model["w.weight"]) ** 2) / 2), rho=0.1, adaptive=False
        )
        scale = np.ones_like(h)
    assert found.layers["w"] == pytest.approx(0.005 * np.sum(h * scale), rel=0.1)
    assert found.whole == found.layers["w"]


@given(networks())
def test_laws_of_sharpness(given_):
    zero, _, loss = given_
    found = layerwise_sharpness(zero, loss, draws=3)
    assert layerwise_sharpness(zero, loss, draws=3, rho=0.0).layers == dict.fromkeys(found.layers, 0.0)
    alone = layerwise_sharpness(zero, loss, draws=3, layers={"one": ["layers.0.weight", "layers.0.bias"]})
    assert alone.layers["one"] == alone.whole == found.layers["layers.0"]
    scaled = layerwise_sharpness(zero, lambda m: 2 * loss(m) + 1, draws=3)
    assert scaled.layers == pytest.approx({k: 2 * v for k, v in found.layers.items()}, rel=1e-9, abs=1e-12)
    relu = lambda m: float(np.sum(mlp.forward(m, np.ones((2, 3)))))  # noqa: E731
    one = layerwise_sharpness(zero, relu, draws=2).layers
    rescaled = {k: x * (4 if k.startswith("layers.0") else 0.25 if k.endswith("weight") else 1) for k, x in zero.items()}
    assert layerwise_sharpness(rescaled, relu, draws=2).layers == pytest.approx(one, rel=1e-9, abs=1e-12)


def test_dtypes_integers_and_checkpoints(tmp_path):
    model = {"w": np.ones(4, ml_dtypes.bfloat16), "n": np.array([3])}
    seen = []
    layerwise_sharpness(model, lambda m: seen.append(m) or 0.0, draws=1)
    assert all(m["w"].dtype == ml_dtypes.bfloat16 and m["n"].tolist() == [3] for m in seen)
    save({"w": np.ones(4, np.float32)}, tmp_path / "m.safetensors")
    total = lambda m: float(m["w"].sum())  # noqa: E731
    in_memory = layerwise_sharpness({"w": np.ones(4, np.float32)}, total)
    assert layerwise_sharpness(str(tmp_path / "m.safetensors"), total) == in_memory
    for options, said in (({"draws": 0}, "draws = 0"), ({"rho": -1.0}, "rho = -1.0"), ({"seed": -1}, "seed = -1")):
        with pytest.raises(UsageError, match=said):
            layerwise_sharpness(model, total, **options)


def test_torch_weights():
    torch = pytest.importorskip("torch")
    ours = layerwise_sharpness({"w": np.ones(4, np.float32)}, lambda m: float(m["w"].sum()))
    theirs = layerwise_sharpness({"w": torch.ones(4)}, lambda m: float(m["w"].sum()))
    assert theirs == ours
    model = {"a": torch.ones(4, dtype=torch.bfloat16), "b": torch.ones(2, 3), "n": torch.tensor([3])}
    seen = []
    found = layerwise_sharpness(model, lambda m: seen.append(m) or float(m["a"].sum() + m["b"].sum()), rho=0.1, draws=3)
    assert len(seen) == 13 and all(isinstance(x, torch.Tensor) for m in seen for x in m.values())
    assert {(name, x.dtype) for m in seen for name, x in m.items()} == {(name, x.dtype) for name, x in model.items()}
    assert all(m["n"] is model["n"] for m in seen)
    narrow = {"a": np.ones(4, ml_dtypes.bfloat16), "b": np.ones((2, 3), np.float32), "n": np.array([3])}
    noisy = []
    layerwise_sharpness(narrow, lambda m: noisy.append(m) or 0.0, rho=0.1, draws=3)
    for m, x in zip(seen, noisy):
        assert all(np.array_equal(m[name].float().numpy(), x[name].astype(np.float32)) for name in model)
    assert found.layers["n"] == 0.0 != found.layers["a"]


def test_each_tensor_is_read_once_for_a_draw(tmp_path, monkeypatch):
    save({"a": np.ones(4, np.float32), "n": np.array([3])}, tmp_path / "m.safetensors")
    model, read = refmerge.open_checkpoint(tmp_path / "m.safetensors"), []
    get = type(model).__getitem__
    monkeypatch.setattr(type(model), "__getitem__", lambda self, name: read.append(name) or get(self, name))
    layerwise_sharpness(model, lambda m: 0.0, draws=3)
    assert sorted(read) == ["a"] * 6 + ["n"] * 6  # as a layer, and in the whole


# --- Sparse stragglers ------------------------------------------------------------------------------------------------

BASE = {"a.weight": np.array([4.0, 1.0, 0.0, 2.0]), "b.weight": np.array([1.0, 1.0])}
TUNED = {"a.weight": np.array([4.5, 3.0, -1.0, 2.0]), "b.weight": np.array([0.0, 3.0])}


def test_half_of_the_changes_by_hand():
    found = sparse_stragglers(BASE, TUNED, ["a"])
    assert found["a.weight"].tolist() == [4.0, 2.0, -0.5, 2.0] and found["b.weight"].tolist() == [0.5, 2.0]
    assert sparse_stragglers(BASE, TUNED, ["a", "b"], alpha=1.0)["b.weight"].tolist() == [1.0, 3.0]
    assert sparse_stragglers(BASE, TUNED, ["a"], density=0.0)["a.weight"].tolist() == BASE["a.weight"].tolist()


def test_to_disk(tmp_path):
    for name, model in (("zero", BASE), ("fine", TUNED)):
        save(model, tmp_path / f"{name}.safetensors")
    paths = tmp_path / "zero.safetensors", tmp_path / "fine.safetensors"
    out = sparse_stragglers(*paths, ["a"], out=tmp_path / "out.safetensors")
    assert out["a.weight"].tolist() == [4.0, 2.0, -0.5, 2.0]
    sparse_stragglers(*paths, ["b"], out=tmp_path / "out.safetensors", overwrite=True)


@pytest.mark.parametrize(
    ("stragglers", "said"), [(["c"], "no layer 'c' .there are a, b."), ("a", "a list of labels"), (3, "a list of labels")]
)
def test_labels(stragglers, said):
    with pytest.raises(UsageError, match=said):
        sparse_stragglers(BASE, TUNED, stragglers)


def test_models_that_do_not_fit():
    with pytest.raises(InputError, match=r"'a.weight'"):
        sparse_stragglers(BASE, {**TUNED, "a.weight": np.ones(3)}, ["a"])


@given(networks(), st.floats(0, 1), st.floats(0, 1))
def test_laws_of_sparse_stragglers(given_, density, alpha):
    zero, fine, _ = given_
    plain = refmerge.merge([fine], "wise_ft", base=zero, alpha=alpha)
    for got in (
        sparse_stragglers(zero, fine, [], density=density, alpha=alpha),
        sparse_stragglers(zero, fine, ["layers.0", "layers.1"], density=1.0, alpha=alpha),
    ):
        for name in plain:
            np.testing.assert_allclose(got[name], plain[name], rtol=1e-12, atol=1e-12)
    both = sparse_stragglers(zero, fine, ["layers.0", "layers.1"], density=density, alpha=alpha)
    one = sparse_stragglers(zero, fine, ["layers.1"], density=density, alpha=alpha)
    for name in both:
        assert np.array_equal(both[name], one[name]) or name.startswith("layers.0")
        assert np.linalg.norm(both[name] - zero[name]) <= np.linalg.norm(plain[name] - zero[name]) + 1e-12
    at_zero = sparse_stragglers(zero, fine, ["layers.0"], density=density, alpha=0.0)
    assert all(np.array_equal(at_zero[name], zero[name]) for name in zero)
