"""Soft trees: their symmetries, the matching beside brute force, and what comes out."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import UsageError, registry
from refmerge.procedures.alignment.soft_trees import adjust, operations, outputs, split_weights

soft_trees = registry.procedure("soft_trees")
SHAPES = [
    ("non_oblivious", 1, 2), ("non_oblivious", 3, 4), ("non_oblivious", 7, 8), ("oblivious", 1, 2), ("oblivious", 3, 8),
    ("decision_list", 1, 2), ("decision_list", 3, 4), ("modified_decision_list", 3, 3),
]  # fmt: skip


def drawn(seed, trees, splits, leaves, features=2, classes=2):
    return {
        "w": seed.standard_normal((trees, splits, features)),
        "b": seed.standard_normal((trees, splits)),
        "pi": seed.standard_normal((trees, leaves, classes)),
    }


@st.composite
def ensembles(draw):
    """A kind of tree, two ensembles of it, and inputs."""
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    tree, splits, leaves = draw(st.sampled_from(SHAPES))
    trees = draw(st.integers(1, 4))
    return tree, drawn(seed, trees, splits, leaves), drawn(seed, trees, splits, leaves), seed.standard_normal((6, 2)), seed


def whole(e, x, tree):
    return outputs(e, x, tree=tree).sum(axis=0)


def inner(a, b, tree):
    """The weighted inner product of trees of equal number, written down once more."""
    n = split_weights(tree, a["b"].shape[1])
    return np.einsum("mnf,mnf,n->m", a["w"], b["w"], n) + (a["b"] * b["b"] * n).sum(1) + (a["pi"] * b["pi"]).sum((1, 2))


# --- A tree, by hand --------------------------------------------------------------------------------------------------


def logistic(z):
    return 1 / (1 + np.exp(-z))


def test_outputs_by_hand():
    x = np.array([[2.0]])
    e = {"w": np.array([[[1.0], [0.5], [-1.0]]]), "b": np.array([[0.0, 1.0, 0.5]]), "pi": np.array([[[1.0], [2], [3], [4]]])}
    s = [logistic(2.0), logistic(2.0), logistic(-1.5)]
    perfect = s[0] * (s[1] * 1 + (1 - s[1]) * 2) + (1 - s[0]) * (s[2] * 3 + (1 - s[2]) * 4)
    assert outputs(e, x, tree="non_oblivious").item() == pytest.approx(perfect)
    listed = s[0] * 1 + (1 - s[0]) * (s[1] * 2 + (1 - s[1]) * (s[2] * 3 + (1 - s[2]) * 4))
    assert outputs(e, x, tree="decision_list").item() == pytest.approx(listed)
    modified = {**e, "pi": e["pi"][:, :3]}
    empty = (1 - s[0]) * (1 - s[1]) * (1 - s[2]) * 4
    assert outputs(modified, x, tree="modified_decision_list").item() == pytest.approx(listed - empty)
    oblivious = {"w": e["w"][:, :2], "b": e["b"][:, :2], "pi": e["pi"]}
    both = s[0] * (s[1] * 1 + (1 - s[1]) * 2) + (1 - s[0]) * (s[1] * 3 + (1 - s[1]) * 4)
    assert outputs(oblivious, x, tree="oblivious").item() == pytest.approx(both)


def test_weights_of_splits():
    assert split_weights("non_oblivious", 7).tolist() == [8, 4, 4, 2, 2, 2, 2]
    assert split_weights("oblivious", 3).tolist() == [8, 8, 8]
    assert split_weights("decision_list", 3).tolist() == split_weights("modified_decision_list", 3).tolist() == [4, 3, 2]


@pytest.mark.parametrize(
    ("tree", "splits", "count"),
    [("non_oblivious", 1, 2), ("non_oblivious", 3, 8), ("non_oblivious", 7, 128), ("oblivious", 2, 8),
     ("oblivious", 3, 48), ("decision_list", 3, 2), ("modified_decision_list", 3, 1)],
)  # fmt: skip
def test_how_many_operations(tree, splits, count):
    found = operations(tree, splits)
    assert len(found) == len(set(found)) == count
    assert found[0].splits == tuple(range(splits)) and set(found[0].signs) == {1}
    assert found[0].leaves == tuple(range(len(found[0].leaves)))


def test_an_oblivious_root_by_hand():
    """The published rule: flipped at depth d, leaf l becomes leaf l xor 2^(D - 1 - d)."""
    for u in operations("oblivious", 3, order=False):
        mask = sum(1 << (2 - d) for d, sign in enumerate(u.signs) if sign < 0)
        assert u.leaves == tuple(leaf ^ mask for leaf in range(8))


def test_a_pair_by_hand():
    a = {"w": np.array([[[4.0]]]), "b": np.array([[0.5]]), "pi": np.array([[[1.0], [0]]])}
    b = {"w": np.array([[[-4.0]]]), "b": np.array([[-0.5]]), "pi": np.array([[[0.0], [1]]])}
    found = soft_trees(a, b, tree="non_oblivious")
    assert (found.before, found.objective) == (-32.5, 33.5)
    assert all(np.array_equal(found.aligned[key], b[key]) and np.array_equal(found.merged[key], b[key]) for key in b)
    kept = soft_trees(a, b, tree="non_oblivious", flip=False)
    assert kept.objective == kept.before == -32.5 and kept.merged["w"].item() == 0.0
    assert soft_trees(a, b, tree="non_oblivious", flip=False, lambda_=0.25).merged["w"].item() == -2.0


# --- Laws -------------------------------------------------------------------------------------------------------------


@given(ensembles())
def test_operations_leave_the_function(case):
    tree, a, _, x, seed = case
    known = operations(tree, a["b"].shape[1])
    y = whole(a, x, tree)
    for u in known:
        changed = adjust(a, seed.permutation(len(a["b"])), (u,) * len(a["b"]))
        np.testing.assert_allclose(whole(changed, x, tree), y, rtol=1e-9, atol=1e-9)


@given(ensembles(), st.booleans())
def test_the_matching_is_the_best_there_is(case, activations):
    """Beside all permutations, and all operations of each tree."""
    tree, a, b, x, _ = case
    trees = len(a["b"])
    known = operations(tree, a["b"].shape[1])
    found = soft_trees(a, b, tree=tree, inputs=x if activations else None)
    np.testing.assert_allclose(whole(found.aligned, x, tree), whole(a, x, tree), rtol=1e-9, atol=1e-9)
    assert found.objective >= found.before - 1e-9
    S = np.array([[max(inner(one(a, m, u), one(b, n), tree)[0] for u in known) for n in range(trees)] for m in range(trees)])
    got = inner(found.aligned, b, tree)
    np.testing.assert_allclose(got, S[found.permutation, np.arange(trees)], rtol=1e-9, atol=1e-9)
    if activations:
        y, z = (outputs(e, x, tree=tree).reshape(trees, -1) for e in (a, b))
        S = y @ z.T
        assert found.before == pytest.approx(np.trace(S))
    else:
        assert found.objective == pytest.approx(got.sum()) and found.before == pytest.approx(inner(a, b, tree).sum())
    best = max(sum(S[m, n] for m, n in enumerate(p)) for p in permutations(range(trees)))
    assert found.objective == pytest.approx(best, rel=1e-9, abs=1e-9)


def one(e, m, u=None):
    tree = {key: x[m : m + 1] for key, x in e.items()}
    return tree if u is None else adjust(tree, np.array([0]), (u,))


@given(ensembles(), st.booleans())
def test_a_shuffled_ensemble_is_found(case, activations):
    tree, a, _, x, seed = case
    known = operations(tree, a["b"].shape[1])
    trees = len(a["b"])
    shuffled = adjust(a, seed.permutation(trees), tuple(known[i] for i in seed.integers(0, len(known), trees)))
    found = soft_trees(shuffled, a, tree=tree, inputs=x if activations else None)
    for key in a:
        np.testing.assert_array_equal(found.aligned[key], a[key])
        np.testing.assert_allclose(found.merged[key], a[key], rtol=1e-12)


@given(ensembles())
@settings(max_examples=30)
def test_fewer_operations_never_fit_better(case):
    tree, a, b, _, _ = case
    most = soft_trees(a, b, tree=tree).objective
    for options in ({"flip": False}, {"order": False}, {"flip": False, "order": False}):
        assert soft_trees(a, b, tree=tree, **options).objective <= most + 1e-9


def test_operations_are_closed():
    for tree, splits in (("non_oblivious", 3), ("oblivious", 2), ("decision_list", 2)):
        known = set(operations(tree, splits))
        e = drawn(np.random.default_rng(0), 1, splits, len(next(iter(known)).leaves))
        made = {u: tuple(adjust(e, np.array([0]), (u,))[key].tobytes() for key in ("w", "b", "pi")) for u in known}
        for u in known:
            for v in known:
                twice = adjust(adjust(e, np.array([0]), (u,)), np.array([0]), (v,))
                assert tuple(twice[key].tobytes() for key in ("w", "b", "pi")) in made.values()


def test_depth_one_is_a_perceptron():
    """Units with sigmoid, output weights pi_1 - pi_2; a flip is their change of sign."""
    e = drawn(np.random.default_rng(0), 3, 1, 2)
    x = np.random.default_rng(1).standard_normal((5, 2))
    hidden = logistic(np.einsum("mnf,xf->xm", e["w"], x) + e["b"][:, 0])
    expected = hidden @ (e["pi"][:, 0] - e["pi"][:, 1]) + e["pi"][:, 1].sum(axis=0)
    np.testing.assert_allclose(whole(e, x, "non_oblivious"), expected, rtol=1e-12)


def test_float32_stays():
    a, b = ({k: x.astype(np.float32) for k, x in drawn(np.random.default_rng(i), 2, 3, 4).items()} for i in (0, 1))
    found = soft_trees(a, b, tree="non_oblivious")
    assert all(x.dtype == np.float32 for e in (found.aligned, found.merged) for x in e.values())


GOOD = drawn(np.random.default_rng(0), 2, 3, 4)


@pytest.mark.parametrize(
    ("a", "options", "said"),
    [
        (GOOD, {"tree": "perfect"}, "'non_oblivious', 'oblivious'"),
        (GOOD, {"tree": "oblivious"}, "3 splits and 4 leaves"),
        ({**GOOD, "pi": GOOD["pi"][:, :, 0]}, {"tree": "non_oblivious"}, "trees, leaves, classes"),
        ({"w": GOOD["w"], "b": GOOD["b"]}, {"tree": "non_oblivious"}, "a mapping with w, b and pi"),
        ({**GOOD, "b": GOOD["b"] * np.nan}, {"tree": "non_oblivious"}, "not finite"),
        (drawn(np.random.default_rng(0), 3, 3, 4), {"tree": "non_oblivious"}, "differ in shape"),
        (GOOD, {"tree": "non_oblivious", "inputs": np.ones((4, 3))}, "samples by 2 features"),
    ],
)
def test_refusals(a, options, said):
    with pytest.raises(UsageError, match=said):
        soft_trees(a, GOOD, **options)


def test_too_many_operations():
    deep = drawn(np.random.default_rng(0), 1, 7, 128)
    with pytest.raises(UsageError, match=r"6.45e\+05 operations"):
        soft_trees(deep, deep, tree="oblivious")
    assert soft_trees(deep, deep, tree="oblivious", order=False).permutation.tolist() == [0]
    perfect = drawn(np.random.default_rng(0), 2, 31, 32)  # 2^31 sets of flips, and found all the same
    assert soft_trees(perfect, perfect, tree="non_oblivious").permutation.tolist() == [0, 1]
