"""clafusion: layer maps against brute force and against the authors' results, laws of added and merged layers, the whole.

tests/data/clafusion.npz (laid out as tests/data/otfusion.npz) holds what functions of hsgser/clafusion@9050167 gave: maps of
`align`, with start_layer_idx and free_end_layers as start and end; costs of `get_cost_matrix` for activations x and y; and
`merge_layers_in_larger_network` with method "avg" for a network whose first layer has 8 of its 784 columns here.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from refmerge import open_checkpoint, registry
from refmerge.errors import UsageError
from refmerge.nets import mlp, vgg
from refmerge.procedures.alignment.clafusion import add_layers, cost_matrix, diagonal, layer_map, merge_layers

clafusion, otfusion = registry.procedure("clafusion"), registry.procedure("otfusion")
DATA = np.load(Path(__file__).parent / "data" / "clafusion.npz")
INDEX = json.loads(DATA["index"].tobytes())
ENDS = np.cumsum([int(np.prod(shape)) for shape in INDEX["shapes"].values()])
ARRAYS = {n: x.reshape(s) for (n, s), x in zip(INDEX["shapes"].items(), np.split(DATA["numbers"], ENDS[:-1]))}


def spread(sizes, seed=0, bias=False):
    rng = np.random.default_rng(seed)
    model = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        model[f"layers.{i}.weight"] = rng.standard_normal((m, n))
        if bias:
            model[f"layers.{i}.bias"] = rng.standard_normal(m)
    return model


def taps(model):
    """What each layer gives before its ReLU, for 30 inputs."""
    found, order = {}, [name for name in model if name.endswith("weight")]
    x = np.random.default_rng(5).standard_normal((30, model[order[0]].shape[1]))
    for name in order:
        x = x @ model[name].T + model.get(name.replace("weight", "bias"), 0.0)
        found[name.removesuffix(".weight")] = x
        x = np.maximum(x, 0)
    return found


# --- The authors' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", INDEX["options"])
def test_the_authors_maps(case):
    C, expected = ARRAYS[f"{case}/cost"], ARRAYS[f"{case}/map"]
    assert layer_map(C, single="first", **INDEX["options"][case]).tolist() == expected.tolist()


@pytest.mark.parametrize("metric", ["cka", "cca", "wd"])
def test_the_authors_costs(metric):
    x, y = ([ARRAYS[f"costs/{side}{i}"] for i in range(n)] for side, n in (("x", 4), ("y", 2)))
    y = y[:1] if metric == "cca" else y  # the other has a lower rank than columns, on which theirs depends on LAPACK
    np.testing.assert_allclose(cost_matrix(x, y, metric), ARRAYS[f"costs/{metric}"][:, : len(y)], atol=1e-12)


def test_the_authors_merged_layers():
    model = {f"h{i}.weight": ARRAYS[f"merged/model0/h{i}.weight"] for i in range(5)}
    before = [ARRAYS[f"merged/before/{i}"] for i in range(4)]
    got = merge_layers(model, ARRAYS["merged/map"], before, relu="avg")
    assert list(got) == ["0", "1", "2"]
    for name, x in got.items():
        expected = ARRAYS[f"merged/out/{name}"]
        np.testing.assert_allclose(x, expected, atol=2e-6 * np.max(np.abs(expected)))


def test_the_quirk_of_a_single_layer():
    C = [[9.0], [4.0], [1.0]]
    assert layer_map(C, start=1).tolist() == [3]
    assert layer_map(C, start=1, single="first").tolist() == layer_map(C).tolist() == [1]
    assert layer_map(C, end=1).tolist() == [3]


# --- Maps -------------------------------------------------------------------------------------------------------------

MATRICES = st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32), st.booleans()).map(
    lambda a: (
        np.random.default_rng(a[2]).random((a[0] + a[1], a[0]))
        if a[3]
        else np.random.default_rng(a[2]).integers(0, 3, (a[0] + a[1], a[0])).astype(float)
    )
)


@given(MATRICES, st.integers(1, 4), st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_no_admissible_map_costs_less(C, start, end):
    m, n = C.shape
    A = layer_map(C, start=start, end=end)
    pinned = {k: k for k in range(1, min(start - 1, n) + 1)} | {k: m - n + k for k in range(n - min(end, n) + 1, n + 1)}
    maps = [B for B in itertools.combinations(range(1, m + 1), n) if all(B[k - 1] == place for k, place in pinned.items())]
    costs = {B: sum(C[place - 1, k] for k, place in enumerate(B)) for B in maps}
    assert tuple(A.tolist()) in costs
    assert costs[tuple(A.tolist())] <= min(costs.values()) + 1e-12
    assert all(place > k for k, place in enumerate(A))
    exact = bool((np.round(C) == C).all())
    if exact:  # of equal sums the map of the smallest numbers, beginning with the last
        best = [B for B in maps if costs[B] == min(costs.values())]
        assert tuple(A.tolist()) == min(best, key=lambda B: B[::-1])
    assert exact or layer_map(C + 8.0, start=start, end=end).tolist() == A.tolist()


def test_ties_and_pins_by_hand():
    assert layer_map(np.zeros((5, 3)), start=1).tolist() == [1, 2, 3]
    C = np.array([[9.0, 9], [0, 9], [9, 0]])
    assert layer_map(C, start=1).tolist() == [2, 3]
    assert layer_map(C).tolist() == layer_map(C, end=1).tolist() == [1, 3]
    assert layer_map(np.ones((3, 3))).tolist() == [1, 2, 3]


def test_costs_by_hand():
    assert cost_matrix([4, 2], [1]).tolist() == [[9], [1]]
    same = np.array([[0.0, 1], [1, 0], [1, 1]])
    np.testing.assert_allclose(cost_matrix([same, 3 * same[:, ::-1] + 2], [same], "cka"), [[0], [0]], atol=1e-12)
    assert cost_matrix([np.ones((3, 2))], [same], "cka").tolist() == [[1]]
    np.testing.assert_allclose(cost_matrix([same @ [[2.0, 1], [0, 1]]], [same], "cca"), [[0]], atol=1e-12)
    # units (0, 1, 1) and (1, 0, 1) against two at (0, 0, 1): 1 each
    np.testing.assert_allclose(cost_matrix([same], [np.array([[0.0], [0], [1]])], "wd"), [[1]])
    np.testing.assert_allclose(cost_matrix([2 * same], [np.zeros((3, 1))], "wd", squared=True), [[8]])


# --- Layers that are added or merged ----------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(0, 3), st.booleans(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_added_layers_keep_the_function(n, more, bias, seed):
    model = spread([3, *[4, 2, 5][:n], 2], seed, bias)
    m = n + more
    rest = np.random.default_rng(seed).choice(np.arange(2, m + 1), n - 1, replace=False)
    A = [1, *sorted(rest.tolist())]
    deep = add_layers(model, A, spread([3, *[2] * m, 2], bias=bias))
    x = np.random.default_rng(seed).standard_normal((7, 3))
    np.testing.assert_array_equal(mlp.forward(deep, x), mlp.forward(model, x))
    numbered = add_layers(model, A, m)
    assert [x.shape for x in numbered.values()] == [x.shape for x in deep.values()]


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["sum", "majority", "avg"]))
@settings(deadline=None, max_examples=40)
def test_merged_layers_that_are_always_positive_keep_the_function(seed, bias, relu):
    model = {name: np.abs(x) for name, x in spread([3, 4, 3, 5, 2], seed, bias).items()}
    x = np.random.default_rng(seed).random((7, 3)) + 0.1
    before = [np.ones((2, n)) for n in (4, 3, 5)]
    for A in ([1], [2], [3], [1, 3], [2, 3], [1, 2, 3]):
        merged = merge_layers(model, A, before, spread([3, *[1] * len(A), 2], bias=bias), relu=relu)
        np.testing.assert_allclose(mlp.forward(merged, x), mlp.forward(model, x), rtol=1e-12)


def test_diagonals_by_hand():
    z = np.array([[3.0, -1, 0, -2], [-3, 1, 0, 1], [1, -1, 0, 0], [1, 0, 0, 0]])
    assert diagonal(z, "sum").tolist() == [1, 0, 1, 0]
    assert diagonal(z, "majority").tolist() == [1, 0, 0, 0]
    assert diagonal(z, "avg").tolist() == [0.75, 0.25, 0, 0.25]
    assert diagonal(np.array([[-1.0], [1.0]]), "majority").tolist() == [1]


def test_biases_are_folded():
    model = {"a.weight": [[2.0]], "a.bias": [1.0], "b.weight": [[3.0]], "b.bias": [1.0]}
    merged = merge_layers({name: np.array(x) for name, x in model.items()}, [], [np.ones((1, 1))])
    assert {name: x.tolist() for name, x in merged.items()} == {"0": [[6.0]], "0.bias": [4.0]}


def test_convolutions_are_added():
    model = {"c.weight": np.ones((2, 3, 3, 3), np.float32), "fc.weight": np.ones((1, 2), np.float32)}
    plain, zeros = (add_layers(model, [1], 2, residual=residual)["1"] for residual in ((), True))
    assert plain.dtype == np.float32 and plain.shape == (2, 2, 3, 3)
    assert np.array_equal(plain[:, :, 1, 1], np.eye(2)) and plain.sum() == 2
    assert not zeros.any() and zeros.shape == (2, 2, 3, 3)
    deep = {"1": np.ones((4, 3, 3, 3)), "2": np.ones((4, 4, 5, 5)), "3": np.ones((1, 4))}
    assert add_layers(model, [1], deep)["2"].shape == (2, 2, 5, 5)
    assert add_layers(model, [1], deep, residual=[1])["2"].sum() == 2
    assert not add_layers(model, [1], deep, residual=[2])["2"].any()


def test_an_identity_of_the_inputs():
    model = spread([3, 2, 1])
    first = add_layers(model, [2], 2)["0"]
    assert np.array_equal(first, np.eye(3))


# --- The whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("balance", ["add", "merge"])
@pytest.mark.parametrize("match", ["weights", "activations"])
def test_fusing_networks_of_two_depths(swap, bias, balance, match):
    deep, shallow = spread([3, 6, 5, 6, 4, 2], 0, bias), spread([3, 5, 4, 2], 1, bias)
    models = (shallow, deep) if swap else (deep, shallow)
    found = clafusion(*models, balance=balance, activations=taps, match=match, fusion={"weight": [0.25, 0.75]})
    assert found.swapped == swap
    assert found.map.tolist() == [1, 4]  # 4 is 4 wide
    expected = add_layers(shallow, [1, 4], deep) if balance == "add" else shallow
    assert {name: x.shape for name, x in found.merged.items()} == {name: x.shape for name, x in expected.items()}
    acts = [taps(found.shallow), taps(found.deep)] if match == "activations" else None
    again = otfusion([found.shallow, found.deep], list(found.shallow), activations=acts, weight=[0.25, 0.75])
    assert all(np.array_equal(x, found.merged[name]) for name, x in again.merged.items())


def test_equal_depths_are_just_fused():
    a, b = spread([3, 6, 5, 2]), spread([3, 4, 5, 2], 1)
    found = clafusion(a, b)
    assert found.map.tolist() == [1, 2]
    assert all(np.array_equal(x, found.merged[name]) for name, x in otfusion([b, a]).merged.items())


@pytest.mark.parametrize("metric", ["cka", "cca", "wd"])
def test_a_network_is_found_in_itself_with_layers_added(metric):
    model = spread([3, 6, 5, 4, 2])
    deep = add_layers(model, [1, 3, 5], spread([3, 2, 2, 2, 2, 2, 2]))
    found = clafusion(deep, model, measure="activations", metric=metric, activations=taps)
    assert found.map.tolist()[0] == 1
    assert np.allclose([C[place - 1, k] for C in found.costs for k, place in enumerate(found.map)], 0, atol=1e-7)
    x = np.random.default_rng(0).standard_normal((9, 3))
    found = clafusion(deep, model)  # by widths: the first of equals, which is the layer itself
    assert found.map.tolist() == [1, 3, 5]
    np.testing.assert_allclose(mlp.forward(found.merged, x), mlp.forward(model, x), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_permuting_units_of_the_deep_model(seed):
    from refmerge.procedures.alignment.otfusion import chain

    deep, shallow = spread([3, 6, 5, 4, 2], seed), spread([3, 5, 4, 2], seed + 1)
    spec = chain(deep)
    moved = spec.apply(spec.random(deep, np.random.default_rng(seed)), deep)
    one, other = (clafusion(model, shallow).merged for model in (deep, moved))
    for name, x in one.items():
        np.testing.assert_allclose(x, other[name], rtol=1e-12, atol=1e-12)


def test_chunks_of_convolutions():
    """VGG-13 and VGG-11 in small: two stretches between poolings, and linear layers at the end."""
    rng = np.random.default_rng(0)
    deep = vgg.init(rng, [3, 3, "M", 4, 4, "M"], [5], places=4, norm=None)
    shallow = vgg.init(rng, [3, "M", 4, "M"], [5], places=4, norm=None)
    found = clafusion(deep, shallow, chunks=[(2, 1), (2, 1), (1, 1)])
    assert found.map.tolist() == [1, 3, 5]
    assert found.merged.keys() == deep.keys()
    images = rng.standard_normal((2, 3, 8, 8))
    np.testing.assert_allclose(vgg.forward(found.shallow, images), vgg.forward(shallow, images), rtol=1e-12)
    assert (
        clafusion(deep, shallow, chunks=[(4, 2), (1, 1)]).map.tolist() == clafusion(deep, shallow).map.tolist() == [1, 3, 5]
    )


def test_blocks_of_residual_networks():
    """Two stages of 3 and 2 blocks against 2 and 1: stem, (conv1, conv2), and in the second stage a shortcut after them."""

    def net(blocks, seed):
        rng = np.random.default_rng(seed)
        shapes, n = {"conv1": (4, 3, 3, 3)}, 4
        for stage, count in enumerate(blocks, 1):
            m = 4 + 2 * (stage - 1)
            for b in range(count):
                name = f"layer{stage}.{b}"
                shapes |= {f"{name}.conv1": (m, n, 3, 3), f"{name}.conv2": (m, m, 3, 3)}
                shapes |= {f"{name}.shortcut.0": (m, n, 1, 1)} if n != m else {}
                n = m
        return {f"{name}.weight": rng.standard_normal(s) for name, s in (shapes | {"linear": (2, n)}).items()}

    deep, shallow = net((3, 2), 0), net((2, 1), 1)
    chunks = [(1, 1), ([2, 2, 2], [2, 2]), ([3, 2], [3])]
    found = clafusion(deep, shallow, chunks=chunks, fusion={"shortcuts": True})
    assert found.map.tolist() == [1, 2, 3, 4, 5, 8, 9, 10]
    assert found.merged.keys() == deep.keys()
    assert not found.shallow["layer1.2.conv2.weight"].any() and not found.shallow["layer2.1.conv1.weight"].any()
    assert np.array_equal(found.shallow["layer2.0.shortcut.0.weight"], shallow["layer2.0.shortcut.0.weight"])
    with pytest.raises(UsageError, match="more or fewer layers"):
        clafusion(deep, shallow, chunks=[*chunks[:2], ([2, 3], [3])])


def test_open_checkpoints_have_orders(tmp_path):
    deep, shallow = spread([3, 6, 5, 2]), spread([3, 5, 2], 1)
    deep = {name.replace("layers.0", "z"): x for name, x in deep.items()}  # sorted, it comes last
    for name, model in (("deep", deep), ("shallow", shallow)):
        save_file(model, tmp_path / f"{name}.safetensors")
    opened = [open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("deep", "shallow")]
    found = clafusion(*opened, orders=(list(deep), None)).merged
    assert all(np.array_equal(x, found[name]) for name, x in clafusion(deep, shallow).merged.items())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"measure": "depth"}, "measure = 'depth'"),
        ({"metric": "cka"}, "does not compare"),
        ({"measure": "activations", "metric": "cka"}, "function of a model"),
        ({"measure": "activations", "activations": taps}, "does not compare"),
        ({"measure": "activations", "metric": "cos", "activations": taps}, "metric = 'cos'"),
        ({"measure": "activations", "metric": "cka", "activations": lambda m: {}}, "no activations of 'layers.0'"),
        ({"balance": "drop"}, "balance = 'drop'"),
        ({"match": "names"}, "match = 'names'"),
        ({"balance": "merge"}, "no activations of 'layers.1'"),
        ({"balance": "merge", "relu": "mean", "activations": taps}, "relu = 'mean'"),
        ({"start": 0}, "start = 0"),
        ({"chunks": [(2, 1)]}, "hidden layers"),
        ({"chunks": [(1, 0), (2, 1)]}, "1 layers or blocks of the deep model and 0"),
        ({"orders": (["layers.0.weight"], None)}, "each tensor of its model once"),
        ({"fusion": {"metric": "angular"}}, "metric = 'angular'"),
    ],
)
def test_errors(keywords, message):
    with pytest.raises(UsageError, match=message):
        clafusion(spread([3, 4, 5, 4, 2]), spread([3, 4, 2]), **keywords)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: add_layers(m, [2, 1], 3), "rising order"),
        (lambda m: add_layers(m, [1, 4], 3), "rising order"),
        (lambda m: add_layers(m, [1], 3), "rising order"),
        (lambda m: add_layers({"a": np.ones((2, 3)), "a.norm": np.ones(2), "b": np.ones((1, 2))}, [1], 2), "after a norm"),
        (lambda m: add_layers({"scale": np.ones(3), **m}, [1, 2], 3), "belongs to no layer"),
        (lambda m: add_layers(m, [1, 2], spread([3, 1, 1, 1, 1], bias=True)), "biases"),
        (lambda m: merge_layers(m, [1], [np.ones((5, 4)), np.ones((5, 3))]), "3 units, and it gives 5"),
        (lambda m: merge_layers(m, [1], [np.ones((5, 4))]), "activations of 1 hidden layers"),
        (lambda m: merge_layers(m, [1], [np.ones((0, 4)), np.ones((0, 5))]), "at least one"),
        (
            lambda m: merge_layers({"c": np.ones((1, 1, 3, 3)), "d": np.ones((1, 1))}, [], [np.ones((1, 1))]),
            "no linear layer",
        ),
        (lambda m: layer_map(np.ones((2, 3))), "no more columns"),
        (lambda m: layer_map([[np.nan]]), "finite"),
        (lambda m: cost_matrix([np.ones((3, 2))], [np.ones((4, 2))], "cka"), "same samples"),
    ],
)
def test_errors_of_steps(call, message):
    with pytest.raises(UsageError, match=message):
        call(spread([3, 4, 5, 2]))
