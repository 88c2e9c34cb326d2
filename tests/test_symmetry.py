"""Specs: the grammar of axes, and the group of permutations that a spec has."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge.errors import UsageError
from refmerge.symmetry import Block, Nested, Slices, Spec, axes, compose, invert

seeds = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=30, deadline=None)


def grouped(seed, groups, queries, k, width):
    """Queries, values and output of grouped attention, and a fused tensor: every kind of entry."""
    rng = np.random.default_rng(seed)
    model = {
        "q": rng.normal(size=(groups * queries * k, width)), "v": rng.normal(size=(groups * k, width)),
        "o": rng.normal(size=(width, groups * queries * k)), "f": rng.normal(size=6 * k), "n": rng.normal(size=(3, 2)),
    }  # fmt: skip
    spec = Spec({
        "q": (Nested("G", Block("Q", k), queries * k), "R"), "v": (Nested("G", "V", k), "R"),
        "o": ("R", Nested("G", Block("Q", k, "V"), queries * k)), "n": None,
        "f": (Slices([Block("F", 2), "E", None], [2 * k, k, 3 * k]),),
    })  # fmt: skip
    return spec, model, rng


models = st.builds(grouped, seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def assert_same(a, b):
    assert a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


@FEW
@given(models)
def test_a_group_acts(drawn):
    spec, model, rng = drawn
    a, b = spec.random(model, rng), spec.random(model, rng)
    spec.check(a, model)
    assert_same(spec.apply(spec.identity(model), model), model)
    assert_same(spec.apply({}, model), model)
    assert_same(spec.apply(b, spec.apply(a, model)), spec.apply(spec.compose(a, b), model))
    assert_same(spec.apply(spec.invert(a), spec.apply(a, model)), model)
    assert_same(spec.compose(a, spec.invert(a)), spec.identity(model))
    assert_same(spec.compose(spec.invert(a), a), spec.identity(model))


@FEW
@given(models)
def test_rows_move_with_their_units(drawn):
    spec, model, rng = drawn
    perms = spec.random(model, rng)
    for name, p in perms.items():
        moved = spec.apply({name: p}, model)
        for block in np.ndindex(p.shape[:-1]):
            assert np.array_equal(spec.rows(name, model, block)[p[block]], spec.rows(name, moved, block))


@FEW
@given(models)
def test_entries_stay_in_their_tensor(drawn):
    spec, model, rng = drawn
    moved = spec.apply(spec.random(model, rng), model)
    for name in model:
        assert np.array_equal(np.sort(moved[name], axis=None), np.sort(model[name], axis=None))


def test_by_hand():
    """Unit i of the result is unit p[i] of the model."""
    spec = Spec({"w": ("P", None), "b": ("P",), "v": (None, Block("P", 2))})
    model = {"w": np.array([[1, 2], [3, 4], [5, 6]]), "b": np.array([1, 3, 5]), "v": np.array([[1, 2, 3, 4, 5, 6]])}
    moved = spec.apply({"P": np.array([2, 0, 1])}, model)
    assert moved["w"].tolist() == [[5, 6], [1, 2], [3, 4]]
    assert moved["b"].tolist() == [5, 1, 3]
    assert moved["v"].tolist() == [[5, 6, 1, 2, 3, 4]]
    assert spec.permutations == ["P"] and spec.sizes(model) == {"P": 3}
    assert spec.uses("P") == [("w", 0), ("b", 0), ("v", 1)]
    assert spec.rows("P", model).tolist() == [[1, 2, 1, 1, 2], [3, 4, 3, 3, 4], [5, 6, 5, 5, 6]]
    p, q, x = np.array([2, 0, 1]), np.array([0, 2, 1]), np.array([10, 20, 30])
    assert x[p][q].tolist() == x[compose(p, q)].tolist() == [30, 20, 10]
    assert x[p][invert(p)].tolist() == x.tolist()


def test_an_inner_permutation_of_each_block():
    """The row i of what is owned moves what comes to lie in block i."""
    spec = Spec({"x": (Nested("H", "Q", 2),)})
    moved = spec.apply({"H": np.array([1, 0]), "Q": np.array([[0, 1], [1, 0]])}, {"x": np.array([1, 2, 3, 4])})
    assert moved["x"].tolist() == [3, 4, 2, 1]
    assert spec.owners == {"H": (), "Q": ("H",)} and spec.shapes({"x": np.zeros(6)}) == {"H": (3,), "Q": (3, 2)}


def test_arrays_of_torch(torch):
    spec, model, rng = grouped(0, 2, 2, 3, 4)
    perms = spec.random(model, rng)
    moved = spec.apply(perms, {n: torch.from_numpy(x) for n, x in model.items()})
    assert_same({n: x.numpy() for n, x in moved.items()}, spec.apply(perms, model))


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"w": ("P", "P")}, "two axes of 'w'"),
        ({"w": (Nested("H", "Q", 2),), "v": ("Q",)}, "lies in 'H' elsewhere and in nothing on 'v'"),
    ],
)
def test_no_spec(axes, message):
    with pytest.raises(UsageError, match=message):
        Spec(axes)


@pytest.mark.parametrize(
    "entry, said",
    [
        (None, None),
        ("P", "P"),
        (Block("P", 4), {"block": "P", "k": 4}),
        (Nested("G", Block("Q", 2, "V"), 6), {"nested": "G", "k": 6, "inner": {"block": "Q", "k": 2, "inner": "V"}}),
        (Slices(["P", None]), {"slices": ["P", None]}),
        (Slices([Slices(["P"]), "Q"], [2, 3]), {"slices": [{"slices": ["P"]}, "Q"], "sizes": [2, 3]}),
    ],
)
def test_entries_as_data(entry, said):
    assert Spec({"x": (entry,), "y": None}).told() == {"x": [said], "y": None}
    assert axes.told(entry) == said and axes.read(said) == axes.read(json.loads(json.dumps(said))) == entry


@pytest.mark.parametrize(
    "said",
    [
        1, True, ["P"], {}, {"block": "P"}, {"block": 1, "k": 2}, {"block": "P", "k": "2"}, {"block": "P", "k": True},
        {"block": "P", "k": 2, "iner": "Q"}, {"nested": "P", "k": 2}, {"nested": "P", "k": 2, "inner": 3}, {"slices": "PQ"},
        {"slices": ["P"], "sizes": 2}, {"slices": ["P"], "sizes": ["2"]}, {"block": "P", "k": 2, "slices": []},
    ],
)  # fmt: skip
def test_what_is_no_entry(said):
    with pytest.raises(UsageError, match="is no entry of an axis: null, a name,"):
        axes.read(said)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"w": (2, 3), "b": (3,)}, "'P' has 2 units by axis 0 of 'w' and 3 by axis 0 of 'b'"),
        ({"w": (2, 3)}, "'b' is in the spec and not in the model"),
        ({"w": (2, 3), "b": (2,), "c": (1,)}, "'c' is in the model and not in the spec"),
        ({"w": (2, 3), "b": (2, 1)}, "'b' of shape .2, 1. has 1 entries"),
    ],
)
def test_a_model_that_does_not_fit(model, message):
    with pytest.raises(UsageError, match=message):
        Spec({"w": ("P", None), "b": ("P",)}).sizes({n: np.zeros(s) for n, s in model.items()})


@pytest.mark.parametrize(
    "entry, message",
    [
        (Block("P", 2), "5 places are not made of blocks of 2"),
        (Nested("P", None, 3), "5 places are not made of blocks of 3"),
        (Slices(["P", "Q"]), "5 places are not 2 slices"),
        (Slices(["P", "Q"], [2, 2]), "5 places are not slices of 2, 2"),
    ],
)
def test_an_axis_that_does_not_fit(entry, message):
    with pytest.raises(UsageError, match=f"axis 0 of 'x': {message}"):
        Spec({"x": (entry,)}).sizes({"x": np.zeros(5)})


@pytest.mark.parametrize(
    "perms, message",
    [
        ({"X": [0, 1]}, "'X' is not in the spec, which has P"),
        ({"P": [0, 1]}, "of shape .2., not int of .3."),
        ({"P": [0.0, 1.0, 2.0]}, "float64 of shape .3."),
        ({"P": [0, 1, 1]}, "does not hold each of 0 ... 2 once"),
        ({"P": [-1, 0, 1]}, "does not hold each of 0 ... 2 once"),
    ],
)
def test_no_permutation(perms, message):
    with pytest.raises(UsageError, match=message):
        Spec({"x": ("P",)}).apply({n: np.array(p) for n, p in perms.items()}, {"x": np.zeros(3)})
