"""Rescaling of ReLU units, and the representative of all models that permuting and rescaling make of one."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from refmerge import registry
from refmerge.checkpoint import open_checkpoint, save
from refmerge.errors import UsageError
from refmerge.nets import gpt2, llama, mlp, resnet, vgg
from refmerge.nets.layers import gelu
from refmerge.symmetry import Spec, architectures
from refmerge.symmetry.scales import Scales, relu

FEW = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**32 - 1)
canonicalize = registry.procedure("canonicalize")


def images(rng):
    return rng.normal(size=(2, 3, 8, 8))


NETS = {
    "mlp": lambda rng: (mlp.init(rng, [5, 7, 6, 4]), architectures.mlp, mlp.forward, rng.normal(size=(3, 5))),
    "vgg": lambda rng: (vgg.init(rng, [5, "M", 6, "M"], [7]), architectures.vgg, vgg.forward, images(rng)),
    "vgg, layer norm": lambda rng: (
        vgg.init(rng, [5, "M", 6, "M"], [7], places=4, norm="layer"), architectures.vgg, vgg.forward, images(rng)
    ),
    "vgg, plain": lambda rng: (
        vgg.init(rng, [5, 6, "M"], places=16, norm=None), architectures.vgg, vgg.forward, images(rng)
    ),
    "resnet": lambda rng: (resnet.init(rng, (4, 6), 2), architectures.resnet, resnet.forward, images(rng)),
    "resnet, zeros": lambda rng: (
        resnet.init(rng, (4, 6), 1, shortcut="zeros", norm="layer"), architectures.resnet, resnet.forward, images(rng)
    ),
    "resnet, bottlenecks": lambda rng: (
        resnet.init(rng, (3, 4), 1, bottleneck=True), architectures.resnet, resnet.forward, images(rng)
    ),
}  # fmt: skip


def drawn(name, seed):
    rng = np.random.default_rng(seed)
    model, architecture, forward, batch = NETS[name](rng)
    return model, architecture(model), partial(forward, batch=batch), rng


def factors(scales, spec, model, rng):
    sizes = spec.sizes(model)
    return {name: np.exp(rng.normal(size=sizes[name])) for name in scales.names}


def far(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(a))


# -------------------------------------------------------------------------------------------------------------- rescaling


@pytest.mark.parametrize("name", NETS)
@FEW
@given(seeds)
def test_scales_leave_the_function(name, seed):
    model, spec, forward, rng = drawn(name, seed)
    scales = relu(spec, model)
    assert scales.names == spec.permutations
    assert far(forward(model), forward(scales.apply(factors(scales, spec, model, rng), model))) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_scales_are_needed_everywhere(name):
    """With any one tensor left out, outputs change."""
    model, spec, forward, rng = drawn(name, 0)
    scales, before = relu(spec, model), forward(model)
    scaled = scales.apply(factors(scales, spec, model, rng), model)
    for tensor in {**scales.up, **scales.down}:
        assert far(before, forward(scaled | {tensor: model[tensor]})) > 1e-6, tensor


def test_powers_of_two_are_exact():
    model, spec, forward, _ = drawn("mlp", 0)
    scales, sizes = relu(spec, model), spec.sizes(model)
    c = {name: 2.0 ** np.arange(sizes[name]) for name in scales.names}
    there = scales.apply(c, model)
    assert np.array_equal(forward(there), forward(model))
    back = scales.apply({name: 1 / x for name, x in c.items()}, there)
    assert all(np.array_equal(back[n], model[n]) for n in model)


def test_gelu_is_not_homogeneous():
    model, spec, _, rng = drawn("mlp", 0)
    x, scales = rng.normal(size=(3, 5)), relu(spec, model)
    scaled = scales.apply(factors(scales, spec, model, rng), model)
    assert far(mlp.forward(model, x, activation=gelu), mlp.forward(scaled, x, activation=gelu)) > 1e-3


def test_scales_by_hand(torch):
    model = {"a.weight": np.array([[1.0, 2], [3, 4]], np.float32), "a.bias": np.array([5.0, 6], np.float32)}
    model |= {"b.weight": np.array([[8.0, 16]], np.float32)}
    spec = architectures.mlp(model)
    scales = relu(spec, model)
    assert scales == Scales({"a.weight": ["a", None], "a.bias": ["a"]}, {"b.weight": [None, "a"]})
    for tensors in (model, {n: torch.from_numpy(x) for n, x in model.items()}):
        got = scales.apply({"a": np.array([2.0, 0.5])}, tensors)
        assert [type(x) for x in got.values()] == [type(x) for x in tensors.values()]
        assert got["a.weight"].tolist() == [[2, 4], [1.5, 2]] and got["a.bias"].tolist() == [10, 3]
        assert got["b.weight"].tolist() == [[4, 32]] and str(got["b.weight"].dtype).endswith("float32")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"b": [1.0]}, "scale 'b' is not known; there are layers.0, layers.1"),
        ({"layers.0": [1.0, 2.0]}, "is not 7 positive numbers"),
        ({"layers.0": [0.0] * 7}, "is not 7 positive numbers"),
        ({"layers.0": [np.nan] * 7}, "is not 7 positive numbers"),
    ],
)
def test_no_scales(given, message):
    model, spec, _, _ = drawn("mlp", 0)
    with pytest.raises(UsageError, match=message):
        relu(spec, model).apply({n: np.array(c) for n, c in given.items()}, model)


def test_heads_have_no_relu():
    model = gpt2.init(np.random.default_rng(0), 12, 1)
    with pytest.raises(UsageError, match=r"c_attn.weight' has heads"):
        relu(architectures.gpt2(model, 3), model)


# ------------------------------------------------------------------------------------------------------- a representative


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", NETS)
@FEW
@given(seed=seeds)
def test_equivalent_models_have_one_representative(name, biases, seed):
    model, spec, forward, rng = drawn(name, seed)
    scales = relu(spec, model)
    other = scales.apply(factors(scales, spec, model, rng), spec.apply(spec.random(model, rng), model))
    a, b = (canonicalize(m, spec, biases=biases) for m in (model, other))
    assert far(forward(model), forward(a.model)) < 1e-11 and far(forward(model), forward(b.model)) < 1e-11
    for tensor in model:
        np.testing.assert_allclose(a.model[tensor], b.model[tensor], rtol=1e-8, atol=1e-9)
    assert a.mass[-1] == pytest.approx(b.mass[-1], rel=1e-12)


@pytest.mark.parametrize("name", NETS)
@FEW
@given(seed=seeds)
def test_the_representative(name, seed):
    model, spec, _, _ = drawn(name, seed)
    found = canonicalize(model, spec)
    scales = relu(spec, model)
    # the mass falls, the last one is the model's, and what comes in weighs as much as what goes out
    assert all(b <= a * (1 + 1e-14) for a, b in zip(found.mass, found.mass[1:])) and found.change <= 1e-12
    weights = {n: x for n, x in found.model.items() if n in {**scales.up, **scales.down} and not n.endswith("bias")}
    assert sum(np.sum(x**2) for x in weights.values()) == pytest.approx(found.mass[-1], rel=1e-12)
    own, readers = (Spec({n: axes[n] for n in weights if n in axes}) for axes in (scales.up, scales.down))
    for p in scales.names:
        np.testing.assert_allclose(
            np.sum(own.rows(p, weights) ** 2, axis=1), np.sum(readers.rows(p, weights) ** 2, axis=1), rtol=1e-9
        )
        assert np.all(np.diff(np.sum(spec.rows(p, found.model) ** 2, axis=1)) <= 1e-12)
    # it is made by the scales and permutations that are returned, and is its own representative
    again = spec.apply(found.permutations, scales.apply(found.scales, model))
    assert all(np.array_equal(again[n], found.model[n]) for n in model)
    twice = canonicalize(found.model, spec)
    assert len(twice.mass) <= 3 and twice.mass[0] == pytest.approx(twice.mass[-1], rel=1e-12)


def test_the_least_is_that_of_a_general_optimiser():
    """The sum of squares as a function of the logarithms of all factors is convex: any optimiser finds the same."""
    model, spec, _, _ = drawn("mlp", 3)
    scales, sizes = relu(spec, model), spec.sizes(model)

    def mass(z):
        cut = np.split(z, np.cumsum([sizes[n] for n in scales.names])[:-1])
        scaled = scales.apply({n: np.exp(part) for n, part in zip(scales.names, cut)}, model)
        return sum(np.sum(x**2) for n, x in scaled.items() if not n.endswith("bias"))

    best = minimize(mass, np.zeros(sum(sizes.values())), method="BFGS", options={"gtol": 1e-9})
    found = canonicalize(model, spec)
    assert found.mass[0] == pytest.approx(mass(np.zeros(sum(sizes.values()))), rel=1e-14)
    assert best.fun == pytest.approx(found.mass[-1], rel=1e-10)
    np.testing.assert_allclose(best.x, np.log(np.concatenate([found.scales[n] for n in scales.names])), atol=1e-5)


def test_by_hand():
    """The unit (8 | 2) becomes (4 | 4), the unit (1 | 1) stays: 70 becomes 34, and the heavier unit comes first."""
    model = {"a.weight": np.array([[1.0], [8]]), "b.weight": np.array([[1.0, 2]])}
    found = canonicalize(model, architectures.mlp(model))
    assert found.model["a.weight"].tolist() == [[4], [1]] and found.model["b.weight"].tolist() == [[4, 1]]
    assert found.scales["a"].tolist() == [1, 0.5] and found.permutations["a"].tolist() == [1, 0]
    assert found.mass == [70, 34, 34] and found.change == 0
    kept = canonicalize(model, architectures.mlp(model), order=False)
    assert kept.model["a.weight"].tolist() == [[1], [4]] and kept.permutations["a"].tolist() == [0, 1]
    sorted_only = canonicalize(model, architectures.mlp(model), scales=None)
    assert sorted_only.model["a.weight"].tolist() == [[8], [1]] and sorted_only.mass == []


def test_biases_counted_or_not():
    model = {"a.weight": np.array([[3.0]]), "a.bias": np.array([4.0]), "b.weight": np.array([[20.0]])}
    spec = architectures.mlp(model)
    counted = canonicalize(model, spec, biases=True).model
    assert [x.item() for x in counted.values()] == [6, 8, 10]
    np.testing.assert_allclose(
        [x.item() for x in canonicalize(model, spec).model.values()], [60**0.5, 4 * (20 / 3) ** 0.5, 60**0.5]
    )


def test_dead_units_are_left():
    """Nothing comes in, or nobody reads: there is no least, and the factor is 1."""
    model = {"a.weight": np.array([[0.0], [3], [1]]), "a.bias": np.array([1.0, 1, 1]), "b.weight": np.array([[2.0, 0, 16]])}
    found = canonicalize(model, architectures.mlp(model), order=False)
    assert found.scales["a"].tolist() == [1, 1, 4]


def test_equal_units_stay_in_order():
    model = {"a.weight": np.ones((3, 2)), "b.weight": np.ones((2, 3))}
    assert canonicalize(model, architectures.mlp(model)).permutations["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("groups", [1, 2, 4])
@FEW
@given(seed=seeds)
def test_heads_are_sorted_too(groups, seed):
    rng = np.random.default_rng(seed)
    model = llama.init(rng, 4, groups)
    spec = architectures.llama(model, 4, groups)
    a, b = (canonicalize(m, spec, scales=None) for m in (model, spec.apply(spec.random(model, rng), model)))
    assert all(np.array_equal(a.model[n], b.model[n]) for n in model)


def test_checkpoints(tmp_path):
    model, spec, _, _ = drawn("mlp", 0)
    single = {n: x.astype(np.float32) for n, x in model.items()}
    save(single, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as stored:
        found = canonicalize(stored, architectures.mlp(stored))
    expected = canonicalize(single, spec)
    assert all(np.array_equal(found.model[n], x) and x.dtype == np.float32 for n, x in expected.model.items())


def test_few_sweeps():
    model, spec, _, _ = drawn("mlp", 0)
    found = canonicalize(model, spec, max_sweeps=2)
    assert len(found.mass) == 3 and found.change > 1e-12
    assert len(canonicalize(model, spec, max_sweeps=0).mass) == 1


def test_refusals():
    model, spec, _, _ = drawn("mlp", 0)
    with pytest.raises(UsageError, match="scales = 'gelu' is none of 'relu', None, Scales"):
        canonicalize(model, spec, scales="gelu")
    with pytest.raises(UsageError, match=r"'layers.0.weight' holds NaN or infinity"):
        canonicalize(model | {"layers.0.weight": np.full((7, 5), np.nan)}, spec)
    with pytest.raises(UsageError, match="'more' is in the model and not in the spec"):
        canonicalize(model | {"more": np.zeros(1)}, spec)
