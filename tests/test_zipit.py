"""ZipIt: results of the authors' code, numbers by hand, and laws.

tests/data/zipit.npz holds what gstoica27/ZipIt@1b6ca40 gave on a CPU: `features/<i>`, a covariance and the merge and unmerge
matrices of match_tensors_zipit or match_tensors_permute with the parameters in `cases`; `model/<i>`, two or three MLPs
through ModelMerge.transform (nodes 3 and 6 are what fc2 and fc3 read).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import UsageError, open_checkpoint, registry
from refmerge.checkpoint import save
from refmerge.nets import mlp, resnet, vgg
from refmerge.procedures.alignment.git_rebasin import git_rebasin
from refmerge.procedures.alignment.zipit import (
    average_matrix,
    correlation,
    covariances,
    identity_features,
    optimal_features,
    permute_features,
    with_constant,
    zip_features,
)
from refmerge.symmetry import Block, Slices, Spec, architectures

zipit = registry.procedure("zipit")
FEW = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)
OFFICIAL = np.load(Path(__file__).parent / "data" / "zipit.npz")
CASES = json.loads(str(OFFICIAL["cases"]))
MLP = Spec({
    "fc1.weight": ("3", None), "fc1.bias": ("3",), "fc2.weight": ("6", "3"), "fc2.bias": ("6",), "fc3.weight": (None, "6"),
    "fc3.bias": (None,),
})  # fmt: skip


# --- The authors' code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(CASES)))
def test_official_features(i):
    case, (sigma, U, M) = CASES[i], (OFFICIAL[f"features/{i}/{key}"] for key in ("covariance", "unmerge", "merge"))
    S = correlation(sigma, semantics="official")
    if case["match"] == "zip":
        got = zip_features(S, case["count"], alpha=case["alpha"], beta=case["beta"], semantics="official")
    else:
        got = permute_features(S, case["count"])
    np.testing.assert_allclose(average_matrix(got, semantics="official"), M, rtol=0, atol=1e-7)
    assert np.array_equal(with_constant(got, case["count"]) if case["constant"] else got, U)


def test_some_official_features_are_lost():
    """Cases that cover what happens when no pair is left."""
    lost = [i for i in range(len(CASES)) if (OFFICIAL[f"features/{i}/unmerge"].sum(axis=1) == 0).any()]
    assert {CASES[i]["alpha"] > 0 for i in lost} == {True, False}


def official_model(i):
    found = {}
    for key in OFFICIAL.files:
        if key.startswith(f"model/{i}/"):
            group, _, name = key.removeprefix(f"model/{i}/").partition("/")
            found.setdefault(group, {})[name] = OFFICIAL[key]
    models = [found[f"model{k}"] for k in range(len([g for g in found if g.startswith("model")]))]
    return models, found, *OFFICIAL[f"model/{i}/ab"].tolist()


@pytest.mark.parametrize("i", [0, 3])
def test_official_models(i):
    models, found, alpha, beta = official_model(i)
    sigma = {p: found["stat"][f"covariance/{p}"] for p in ("3", "6")}
    got = zipit(models, MLP, sigma, alpha=alpha, beta=beta, semantics="official")
    assert got.heads == () and got.merged["fc1.weight"].dtype == np.float32
    for name, x in found["out"].items():
        np.testing.assert_allclose(got.merged[name], x, rtol=0, atol=2e-6 * np.abs(x).max())
    for p in sigma:
        for k in range(len(models)):
            assert np.array_equal(got.unmerge[p][k], found["out_unmerge"][f"{p}/{k}"])
            np.testing.assert_allclose(got.merge[p][k] * len(models), found["out_merge"][f"{p}/{k}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("i", [0, 3])
def test_official_covariances(i):
    models, found, *_ = official_model(i)
    batches = np.split(found["stat"]["inputs"].astype(np.float64), np.cumsum(found["stat"]["batch_sizes"])[:-1])

    def features(model, x):
        hidden = np.maximum(x @ model["fc1.weight"].T + model["fc1.bias"], 0)
        return {"3": hidden, "6": np.maximum(hidden @ model["fc2.weight"].T + model["fc2.bias"], 0)}

    got = covariances([[features(m, x) for m in models] for x in batches], ["3", "6"])
    for p, sigma in got.items():
        expected = found["stat"][f"covariance/{p}"]
        np.testing.assert_allclose(sigma, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# --- By hand ----------------------------------------------------------------------------------------------------------

# Features a1 a2 a3 b1 b2 b3.
S = np.array([
    [1.0, 0.0, 0.0, 0.0, 0.9, 0.0],
    [0.0, 1.0, 0.8, 0.1, 0.0, 0.2],
    [0.0, 0.8, 1.0, 0.3, 0.0, 0.0],
    [0.0, 0.1, 0.3, 1.0, 0.0, 0.5],
    [0.9, 0.0, 0.0, 0.0, 1.0, 0.0],
    [0.0, 0.2, 0.0, 0.5, 0.0, 1.0],
])  # fmt: skip


def groups(U):
    return [[int(i) for i in np.flatnonzero(column)] for column in U.T]


def test_within_and_across():
    assert groups(zip_features(S, 2, beta=1.0)) == [[0, 4], [1, 2], [3, 5]]  # .9, then .8 and .5, one in each model
    # no budget: .9; .3, for the .8 is barred; then .2
    assert groups(zip_features(S, 2, beta=0.0)) == [[0, 4], [1, 5], [2, 3]]
    assert groups(zip_features(S, 2, beta=0.0, semantics="official")) == [[0, 4], [1, 2], [3, 5]]


def test_alpha_decides_who_is_taken_again():
    T = np.full((4, 4), 0.1)
    T[0, 1] = T[1, 0] = T[0, 2] = T[2, 0] = T[1, 2] = T[2, 1] = 0.9
    T[0, 3] = T[3, 0] = 0.5
    # a1, a2 and b1 are alike; b2 is like a1 by a half. (a1, a2) is .9, then with b1 alpha times .9; a1 has .5 with b2 and a2
    # has .1, so that the merged feature has alpha times .1 with it.
    assert groups(zip_features(T, 2, alpha=1.0, beta=1.0)) == [[0, 1, 2], [3]]
    T[2, 3] = T[3, 2] = 0.5
    assert groups(zip_features(T, 2, alpha=0.3, beta=1.0)) == [[0, 1], [2, 3]]  # .3 times .9 is less than .5
    assert groups(zip_features(T, 2, alpha=0.0, beta=1.0)) == [[0, 1], [2, 3]]


def test_a_barred_pair_merges_where_no_other_is_left():
    """Three models of two features, a1 with b1, b2 with c1, c2 with a2: two groups are wanted, and any two of the three hold
    two features of one model."""
    T = np.zeros((6, 6))
    for i, j, s in ((0, 2, 0.9), (3, 4, 0.8), (1, 5, 0.7)):
        T[i, j] = T[j, i] = s
    assert groups(zip_features(T, 3, beta=0.0)) == [[0, 1, 2, 5], [3, 4]]  # all have 0 then: the first


def test_greedy_and_optimal():
    T = np.array([[1, 0, 0.9, 0.8], [0, 1, 0.8, 0], [0.9, 0.8, 1, 0], [0.8, 0, 0, 1]])
    assert groups(zip_features(T, 2, beta=0.0)) == [[0, 2], [1, 3]]
    assert groups(permute_features(T, 2)) == [[0, 3], [1, 2]]
    assert sorted(groups(optimal_features(T, 2))) == [[0, 3], [1, 2]]
    T[0, 1] = T[1, 0] = T[2, 3] = T[3, 2] = 0.85
    assert sorted(groups(optimal_features(T, 2))) == [[0, 1], [2, 3]]
    assert groups(identity_features(T, 2)) == [[0, 2], [1, 3]]


TWO = Spec({"fc1.weight": ("P", None), "fc2.weight": (None, "P")})
A = {"fc1.weight": np.array([[1.0], [2.0], [4.0]]), "fc2.weight": np.array([[1.0, 2.0, 3.0]])}
B = {"fc1.weight": np.array([[8.0], [3.0], [6.0]]), "fc2.weight": np.array([[4.0, 5.0, 6.0]])}


def test_weights_by_hand():
    got = zipit([A, B], TWO, {"P": S}, beta=1.0)
    assert got.merged["fc1.weight"].tolist() == [[2.0], [3.0], [7.0]]  # (1 + 3)/2, (2 + 4)/2, (8 + 6)/2
    assert got.merged["fc2.weight"].tolist() == [[3.0, 2.5, 5.0]]  # (1 + 5)/2, (2 + 3 + 0)/2, (0 + 4 + 6)/2
    got = zipit([A, B], TWO, {"P": S}, beta=1.0, multihead=True)
    assert list(got.merged) == ["fc1.weight"]
    assert [h["fc2.weight"].tolist() for h in got.heads] == [[[1.0, 5.0, 0.0]], [[5.0, 0.0, 10.0]]]


def test_wider_and_narrower_than_one_model():
    got = zipit([A, B], TWO, {"P": S}, beta=1.0, keep={"P": 5})
    assert groups(np.concatenate(got.unmerge["P"])) == [[0, 4], [1], [2], [3], [5]]
    assert got.merged["fc1.weight"].ravel().tolist() == [2.0, 2.0, 4.0, 8.0, 6.0]
    assert got.merged["fc2.weight"].tolist() == [[3.0, 1.0, 1.5, 2.0, 3.0]]  # (1 + 5)/2, then halves
    assert groups(zip_features(S, 2, beta=1.0, keep=4)) == [[0, 4], [1, 2], [3], [5]]
    assert groups(zip_features(S, 2, beta=0.0, keep=4)) == [[0, 4], [1], [2, 3], [5]]
    assert zip_features(S, 2, beta=1.0, keep=6).tolist() == np.eye(6).tolist()
    assert zip_features(S, 2, beta=1.0, keep=1).tolist() == [[1.0]] * 6


@FEW
@given(seeds, st.integers(2, 3))
def test_all_features_kept_give_the_mean_of_the_outputs(seed, count):
    rng = np.random.default_rng(seed)
    models, x = [mlp.init(rng, [4, 5, 6, 3]) for _ in range(count)], rng.normal(size=(7, 4))
    sigma = {p: np.cov(rng.normal(size=(count * n, 40)), bias=True) for p, n in (("layers.0", 5), ("layers.1", 6))}
    got = zipit(models, architectures.mlp(models[0]), sigma, keep={"layers.0": 5 * count, "layers.1": 6 * count})
    expected = sum(mlp.forward(m, x) for m in models) / count
    np.testing.assert_allclose(mlp.forward(got.merged, x), expected, rtol=1e-9, atol=1e-12)


def test_transposed():
    def turn(model):
        return {name: x.T for name, x in model.items()}

    spec = Spec({"fc1.weight": (None, "P"), "fc2.weight": ("P", None)})
    got = zipit([turn(A), turn(B)], spec, {"P": S}, beta=1.0, transposed=("fc1.weight", "fc2.weight"))
    assert got.merged["fc1.weight"].tolist() == [[2.0, 3.0, 7.0]]
    assert got.merged["fc2.weight"].tolist() == [[3.0], [2.5], [5.0]]


def test_blocks():
    """A unit that is two inputs of the next layer takes both along."""
    spec = Spec({"fc1.weight": ("P", None), "fc2.weight": (None, Block("P", 2))})
    models = [m | {"fc2.weight": np.concatenate([m["fc2.weight"], -m["fc2.weight"]]).T.reshape(1, 6)} for m in (A, B)]
    got = zipit(models, spec, {"P": S}, beta=1.0)
    assert got.merged["fc2.weight"].tolist() == [[3.0, -3.0, 2.5, -2.5, 5.0, -5.0]]


def test_correlation():
    sigma = np.array([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    assert correlation(sigma).tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
    small = np.diag([1e-8, 1e-8])
    np.testing.assert_allclose(correlation(small), np.eye(2), atol=1e-15)
    assert correlation(small, semantics="official")[0, 0] == pytest.approx(0.1)


def test_a_constant_feature_has_no_variance():
    x = np.stack([np.arange(7.0), np.full(7, 0.1)], axis=1)
    for batches in ([x], [x[:3], x[3:]], [x[:1], x[1:1], x[1:]]):
        sigma = covariances([[{"P": part}] for part in batches], ["P"])["P"]
        assert sigma[1].tolist() == [0.0, 0.0] and sigma[0, 0] == pytest.approx(4.0)


# --- Laws -------------------------------------------------------------------------------------------------------------


def drawn(seed, count, n):
    rng = np.random.default_rng(seed)
    return rng, correlation(np.atleast_2d(np.cov(rng.normal(size=(count * n, 3 * n + 4)), bias=True)))


@FEW
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 1e-4, 0.3, 1.0]), st.floats(0, 1), st.data())
def test_merged_features_are_a_partition(seed, count, n, alpha, beta, data):
    _, S = drawn(seed, count, n)
    keep = data.draw(st.one_of(st.none(), st.integers(1, count * n)))
    U, few = zip_features(S, count, alpha=alpha, beta=beta, keep=keep), keep or n
    assert U.shape == (count * n, few) and set(U.ravel()) <= {0.0, 1.0} and (U.sum(axis=1) == 1).all()
    np.testing.assert_allclose(average_matrix(U) @ U, np.eye(few), atol=1e-15)


@FEW
@given(seeds, st.integers(1, 3), st.integers(1, 5), st.sampled_from([0.3, 1.0]), st.floats(0, 1))
def test_the_order_of_units_does_not_matter(seed, count, n, alpha, beta):
    rng, S = drawn(seed, count, n)
    p = np.concatenate([k * n + rng.permutation(n) for k in range(count)])
    before, after = (
        zip_features(S, count, alpha=alpha, beta=beta),
        zip_features(S[np.ix_(p, p)], count, alpha=alpha, beta=beta),
    )
    assert {tuple(c) for c in before[p].T} == {tuple(c) for c in after.T}


@FEW
@given(seeds, st.integers(2, 3), st.integers(3, 6))
def test_without_a_discount_it_is_complete_linkage(seed, count, n):
    """Groups are as alike as the two least alike of their features, while no budget is spent."""
    _, S = drawn(seed, count, n)
    found, budget = [[i] for i in range(count * n)], [(count - 1) * n // count] * count
    while len(found) > n:
        pairs = [(a, b) for a in found for b in found if a < b]
        a, b = max(pairs, key=lambda pair: S[np.ix_(*pair)].min())
        found = sorted([g for g in found if g not in (a, b)] + [sorted(a + b)])
        if min(a) // n == min(b) // n:
            budget[min(a) // n] -= 1
    if min(budget) > 0:
        assert groups(zip_features(S, count, alpha=1.0, beta=1.0)) == found


@FEW
@given(seeds, st.integers(1, 3))
def test_identical_models(seed, count):
    """Every unit is paired with its copies, unless it is dead. (Of three copies the third joins for alpha times 1.)"""
    rng = np.random.default_rng(seed)
    model = mlp.init(rng, [5, 4, 3, 2])
    taps = {}
    mlp.forward(model, rng.normal(size=(50, 5)), taps)
    spec = architectures.mlp(model)
    names = [p for p in spec.permutations if (taps[p].var(axis=0) > 0).all()]
    got = zipit([model] * count, spec, covariances([[taps] * count], spec.permutations), alpha=1.0, beta=0.0)
    if len(names) == len(spec.permutations):
        x = rng.normal(size=(7, 5))
        np.testing.assert_allclose(mlp.forward(got.merged, x), mlp.forward(model, x), atol=1e-12)


def told_apart(features):
    """Whether no unit is dead and no two are perfectly correlated."""
    units = features.reshape(-1, features.shape[-1])
    if not (units.var(axis=0) > 0).all():
        return False
    return bool((np.corrcoef(units.T) - np.eye(units.shape[1]) < 1 - 1e-9).all())


@example(seed=2227601)  # two units that answer to one sample
@FEW
@given(seeds)
def test_models_with_permuted_units_are_one_model(seed):
    """Unless a unit is dead, or two of one model cannot be told apart, as those that answer to one and the same sample."""
    rng = np.random.default_rng(seed)
    model = vgg.init(rng, [5, "M", 4, "M"], [6], places=4)
    spec = architectures.vgg(model)
    models = [model] + [spec.apply(spec.random(model, rng), model) for _ in range(2)]
    x = rng.normal(size=(30, 3, 8, 8))
    features = []
    for m in models:
        vgg.forward(m, x, taps := {})
        features.append(taps)
    if all(told_apart(features[0][p]) for p in spec.permutations):
        got = zipit(models, spec, covariances([features], spec.permutations), alpha=1.0, beta=0.0)
        np.testing.assert_allclose(vgg.forward(got.merged, x), vgg.forward(model, x), atol=1e-10)


@FEW
@given(seeds)
def test_identity_is_the_average(seed):
    rng = np.random.default_rng(seed)
    models = [resnet.init(rng, (3, 4), 1) for _ in range(3)]
    spec = architectures.resnet(models[0])
    sigma = {p: np.eye(3 * n) for p, n in spec.sizes(models[0]).items()}
    got = zipit(models, spec, sigma, match="identity").merged
    for name, x in refmerge.merge(models, "linear").items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-12)


@FEW
@given(seeds)
def test_permute_is_rebasin_by_correlation(seed):
    rng = np.random.default_rng(seed)
    models = [mlp.init(rng, [5, 6, 4, 2]) for _ in range(2)]
    spec, features, x = architectures.mlp(models[0]), [], rng.normal(size=(40, 5))
    for m in models:
        mlp.forward(m, x, taps := {})
        features.append(taps)
    got = zipit(models, spec, covariances([features], spec.permutations), match="permute").merged
    other = git_rebasin(models, spec, by="activations", activations=features, criterion="correlation").merged
    for name, x in other.items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-12)


@FEW
@given(seeds, st.integers(1, 3))
def test_partial_zip(seed, count):
    """The shared trunk gives merged features; what a head reads of them are its model's columns, added."""
    rng = np.random.default_rng(seed)
    models = [mlp.init(rng, [5, 6, 4, k + 2]) for k in range(count)]  # heads of different sizes
    spec, features, x = architectures.mlp(models[0]), [], rng.normal(size=(40, 5))
    for m in models:
        mlp.forward(m, x, taps := {})
        features.append(taps)
    sigma = covariances([features], ["layers.0"])
    got = zipit(models, spec, sigma)
    assert sorted(got.merged) == ["layers.0.bias", "layers.0.weight"]
    hidden = np.maximum(x @ got.merged["layers.0.weight"].T + got.merged["layers.0.bias"], 0)
    for k, m in enumerate(models):
        second = np.maximum(hidden @ (m["layers.1.weight"] @ got.unmerge["layers.0"][k]).T + m["layers.1.bias"], 0)
        expected = second @ m["layers.2.weight"].T + m["layers.2.bias"]
        np.testing.assert_allclose(mlp.forward(got.merged | got.heads[k], x), expected, atol=1e-12)
    if count > 1:
        everything = covariances([features], spec.permutations)
        with pytest.raises(UsageError, match="of other shapes in other models: multihead=True"):
            zipit(models, spec, everything)
        assert sorted(zipit(models, spec, everything, multihead=True).heads[1]) == ["layers.2.bias", "layers.2.weight"]


@FEW
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_covariances_do_not_depend_on_the_batches(seed, lengths):
    rng = np.random.default_rng(seed)
    x = 1 + rng.normal(size=(sum(lengths), 2, 6))  # samples, places, units of both models
    parts = np.split(x, np.cumsum(lengths)[:-1])
    got = covariances([[{"P": part[..., :3]}, {"P": part[..., 3:]}] for part in parts], ["P"])["P"]
    np.testing.assert_allclose(got, np.cov(x.reshape(-1, 6).T, bias=True), atol=1e-13)
    assert np.array_equal(got, got.T)


# --- Files, dtypes, refusals ------------------------------------------------------------------------------------------


def test_open_checkpoints_and_bfloat16(tmp_path):
    import ml_dtypes

    paths = []
    for i, m in enumerate((A, B)):
        save({name: x.astype(ml_dtypes.bfloat16) for name, x in m.items()}, tmp_path / f"{i}.safetensors")
        paths.append(tmp_path / f"{i}.safetensors")
    with open_checkpoint(paths[0]) as a, open_checkpoint(paths[1]) as b:
        got = zipit([a, b], TWO, {"P": S}, beta=1.0).merged
    assert got["fc2.weight"].dtype == ml_dtypes.bfloat16
    assert got["fc2.weight"].astype(float).tolist() == [[3.0, 2.5, 5.0]]


def test_integers_must_be_equal():
    spec = Spec({**TWO.axes, "steps": ()})
    a, b = A | {"steps": np.array(3)}, B | {"steps": np.array(3)}
    assert zipit([a, b], spec, {"P": S}).merged["steps"] == 3
    with pytest.raises(UsageError, match="'steps' holds integers that differ"):
        zipit([a, b | {"steps": np.array(4)}], spec, {"P": S})


FUSED = Spec({"fc1.weight": (Slices(["P", "P"]), None), "fc2.weight": (None, "P")})


@pytest.mark.parametrize(
    ("models", "spec", "sigma", "options", "said"),
    [
        ([], TWO, {"P": S}, {}, "no models"),
        ([A, B], TWO, {"Q": S}, {}, "'Q' is not in the spec, which has P"),
        ([A, B], TWO, {"P": S[:5, :5]}, {}, r"shape \[5, 5\]: 2 models of 3 units have 6 features"),
        ([A, B], TWO, {"P": np.where(S == 0.9, np.nan, S)}, {}, "a covariance is finite"),
        ([A, B], TWO, {"P": S}, {"beta": 2.0}, r"alpha and beta lie in \[0, 1\]"),
        ([A, B], TWO, {"P": S}, {"alpha": -1.0}, r"alpha and beta lie in \[0, 1\]"),
        ([A, B], TWO, {"P": S}, {"match": "kmeans"}, "none of 'zip', 'permute', 'identity', 'optimal'"),
        ([A, B], TWO, {"P": S}, {"semantics": "code"}, "none of 'paper', 'official'"),
        ([A, B], TWO, {"P": S}, {"keep": 7}, "keep = 7 is no whole number from 1 to the 6 features"),
        ([A, B], TWO, {"P": S}, {"keep": {"P": 0}}, "keep = 0 is no whole number"),
        ([A, B], TWO, {"P": S}, {"keep": 3, "match": "permute"}, "keep goes with match = 'zip'"),
        ([A, B, A], TWO, {"P": np.eye(9)}, {"match": "optimal"}, "of two models, not of 3"),
        ([A, B | {"fc1.weight": np.full((3, 1), np.inf)}], TWO, {"P": S}, {}, "'fc1.weight' has entries that are infinite"),
        ([A, {"fc1.weight": np.ones((2, 1)), "fc2.weight": np.ones((1, 2))}], TWO, {"P": S}, {}, "'P' has 3, 2 units"),
        (
            [{"fc1.weight": np.ones((6, 1)), "fc2.weight": np.ones((1, 3))}] * 2, FUSED, {"P": S}, {},
            "axis 0 of tensor 'fc1.weight' is Slices",
        ),
    ],
)  # fmt: skip
def test_refusals(models, spec, sigma, options, said):
    with pytest.raises(UsageError, match=said):
        zipit(models, spec, sigma, **options)


def test_features_of_models_of_one_width():
    with pytest.raises(UsageError, match="6 features are not those of 4 models"):
        zip_features(S, 4)


def test_layers_are_zipped_from_the_first_on():
    rng = np.random.default_rng(0)
    models = [mlp.init(rng, [5, 6, 4, 2]) for _ in range(2)]
    with pytest.raises(UsageError, match=r"'layers.1.weight' writes what is zipped and 'layers.0', which is not"):
        zipit(models, architectures.mlp(models[0]), {"layers.1": np.eye(8)})


def test_activations_are_finite_and_there():
    with pytest.raises(UsageError, match="infinite or NaN"):
        covariances([[{"P": np.array([[np.nan]])}]], ["P"])
    with pytest.raises(UsageError, match="no samples"):
        covariances([], ["P"])
    with pytest.raises(UsageError, match="no activations of 'P', but of Q"):
        covariances([[{"Q": np.ones((2, 1))}]], ["P"])
