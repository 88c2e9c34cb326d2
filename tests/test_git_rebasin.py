"""Git Re-Basin: the authors' results, numbers by hand, every optimum against all permutations, and laws.

tests/data/git_rebasin.npz holds what samuela/git-re-basin@ef40098 gave on small inputs, run under jax 0.4.20 (x64 but for
case 09) and SciPy 1.11: of `src/weight_matching.py:weight_matching` the models, the order in which permutations were
visited, the gain of each visit and the permutations (00, 06, 09); of `src/online_stats.py` and the assignment of the scripts
`*_activation_matching.py` two matrices of activations, their statistics and permutations (act); of
`src/mnist_mlp_wm_many.py:match_many` four models, the order of the models in each pass, and the mean (many). Each array was
stored under `case/` and the name that it had there.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import InputError, UsageError, open_checkpoint, registry
from refmerge.checkpoint import save
from refmerge.nets import llama, mlp, vit
from refmerge.procedures.alignment import git_rebasin as module
from refmerge.procedures.alignment.convergent_matching import moments
from refmerge.procedures.alignment.git_rebasin import (
    assignment,
    distance,
    inner_product,
    merge_many,
    neighbours,
    straight_through,
    weight_matching,
)
from refmerge.symmetry import Block, Nested, Spec, architectures, compose, invert

git_rebasin = registry.procedure("git_rebasin")
OFFICIAL = np.load(Path(__file__).parent / "data" / "git_rebasin.npz")
FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def official(case: str, group: str) -> dict[str, np.ndarray]:
    prefix = f"{case}/{group}/"
    return {key.removeprefix(prefix): OFFICIAL[key] for key in OFFICIAL.files if key.startswith(prefix)}


def flax_mlp(hidden: int) -> Spec:
    """Kernels are of shape (in, out), and in that code's order of tensors."""
    units = [None, *(f"P_{i}" for i in range(hidden)), None]
    axes = {f"Dense_{i}/kernel": (a, b) for i, (a, b) in enumerate(itertools.pairwise(units))}
    return Spec(axes | {f"Dense_{i}/bias": (b,) for i, b in enumerate(units[1:])})


def network(seed: int, sizes=(3, 6, 5, 2)) -> tuple[dict[str, np.ndarray], Spec]:
    model = mlp.init(np.random.default_rng(seed), sizes)
    return model, architectures.mlp(model)


def two(seed: int, sizes=(3, 6, 5, 2)):
    a, spec = network(seed, sizes)
    return a, network(seed + 1, sizes)[0], spec


# --- The authors' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "hidden", "digits"), [("00", 1, 11), ("06", 1, 11), ("09", 2, 3)])
def test_weight_matching_of_the_authors(case, hidden, digits):
    a, b, spec = official(case, "model0"), official(case, "model1"), flax_mlp(hidden)
    order = [[f"P_{i}" for i in turn] for turn in OFFICIAL[f"{case}/stat0/order"]]
    found = git_rebasin([a, b], spec, order=order)
    for name, p in official(case, "perm").items():
        assert np.array_equal(found.permutations[1][name], p)
    np.testing.assert_allclose([v.gain for v in found.visits], OFFICIAL[f"{case}/stat0/gains"], atol=10.0**-digits)
    for name, x in official(case, "out").items():
        assert np.array_equal(found.models[1][name], x)


def test_activation_matching_of_the_authors():
    a, b = OFFICIAL["act/stat0/act"], OFFICIAL["act/stat1/act"]
    found = moments(np.split(a, [30, 60]), np.split(b, [30, 60]))
    for key, ours in (("cov", "covariance"), ("E_ab", "e_ab"), ("pearson", "correlation"), ("std_a",) * 2, ("std_b",) * 2):
        np.testing.assert_allclose(getattr(found, ours), OFFICIAL[f"act/out/{key}"], rtol=2e-6, atol=1e-6)
    spec, models = Spec({"x": ("P",)}), [{"x": np.zeros(a.shape[1])}] * 2
    for key, criterion in (("E_ab", "e_ab"), ("pearson", "correlation")):
        given = {"by": "activations", "activations": [{"P": a}, {"P": b}], "criterion": criterion}
        assert np.array_equal(git_rebasin(models, spec, **given).permutations[1]["P"], OFFICIAL[f"act/perm/{key}"])


def test_merge_many_of_the_authors():
    models = [official("many", f"model{k}") for k in range(4)]
    found = git_rebasin(models, flax_mlp(1), by="many", turns=OFFICIAL["many/stat0/order"].tolist())
    for name, x in official("many", "out").items():
        np.testing.assert_allclose(found.merged[name], x, rtol=2e-6, atol=1e-6)


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_one_hidden_layer_by_hand():
    """C = rows of both layers: unit 0 of A, (2, 0 | 1), has 2 * 0 + 0 * 3 + 1 * 2 = 2 with unit 0 of B, (0, 3 | 2)."""
    spec = Spec({"fc1.weight": ("P", None), "fc2.weight": (None, "P")})
    a = {"fc1.weight": np.array([[2.0, 0], [0, 2]]), "fc2.weight": np.array([[1.0, 2]])}
    b = {"fc1.weight": np.array([[0.0, 3], [4, 0]]), "fc2.weight": np.array([[2.0, 1]])}
    assert module.cost("P", a, b, spec, {}).tolist() == [[2, 9], [10, 2]]
    found = git_rebasin([a, b], spec)
    assert found.permutations[1]["P"].tolist() == [1, 0]
    assert found.models[1]["fc1.weight"].tolist() == [[4, 0], [0, 3]]
    assert found.merged["fc1.weight"].tolist() == [[3, 0], [0, 2.5]]
    assert found.merged["fc2.weight"].tolist() == [[1, 2]]
    assert found.objective == ((), (4.0, 19.0, 19.0))
    assert [(v.sweep, v.permutation, v.gain) for v in found.visits] == [(0, "P", 15.0), (1, "P", 0.0)]


def test_straight_through_by_hand():
    """One weight for each unit. T starts at A = (1, 0), with which B = (2, 3) is matched as (3, 2): the midpoint is (2, 1).
    The slope (4, -8) moves T by -0.5 * 0.5 * (4, -8) to (0, 2), with which B is matched as it is: (1.5, 1.5). Momentum 0.5
    keeps half of the velocity, and T goes on that way."""
    spec, a, b = Spec({"w": ("P",)}), {"w": np.array([1.0, 0])}, {"w": np.array([2.0, 3])}
    seen = []

    def gradient(weights, step):
        seen.append(weights["w"].tolist())
        return float(2 - step), {"w": np.array([4.0, -8.0])}

    found = straight_through(a, b, spec, gradient=gradient, steps=3, learning_rate=0.5, momentum=0.5)
    assert seen == [[2.0, 1.0], [1.5, 1.5], [1.5, 1.5]]
    assert found.losses == (2.0, 1.0, 0.0)
    assert found.permutations["P"].tolist() == [0, 1]


def test_the_permutations_of_the_least_loss_are_kept():
    """Not those of the last step, as in the authors' code, whose best dictionary is the one that goes on changing."""
    spec, a, b = Spec({"w": ("P",)}), {"w": np.array([1.0, 0])}, {"w": np.array([2.0, 3])}
    slope = {"w": np.array([4.0, -8.0])}
    found = straight_through(a, b, spec, gradient=lambda w, step: (float(step), slope), steps=2, learning_rate=0.5)
    assert found.losses == (0.0, 1.0) and found.permutations["P"].tolist() == [1, 0]


def test_finite_differences_are_the_gradient():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    a, b, spec = two(0, (3, 4, 2))

    def loss(weights, step):
        return float(np.mean((mlp.forward(weights, x) - y) ** 2))

    value, slopes = module.finite_differences(loss)(a, 0)
    w, v = a["layers.0.weight"], a["layers.1.weight"]
    z = x @ w.T + a["layers.0.bias"]
    back = 2 * (mlp.forward(a, x) - y) / y.size
    assert value == loss(a, 0)
    np.testing.assert_allclose(slopes["layers.1.weight"], back.T @ np.maximum(z, 0), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(slopes["layers.0.weight"], ((back @ v) * (z > 0)).T @ x, rtol=1e-6, atol=1e-8)
    found = git_rebasin([a, b], spec, by="straight_through", loss=loss, steps=3, learning_rate=0.1)
    assert len(found.losses) == 3
    merged = loss(found.merged, 0)
    assert merged == pytest.approx(min(found.losses), rel=1e-12)


def test_gradients_of_torch_are_those_of_differences():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    a, b, spec = two(0, (3, 4, 2))
    wide = torch.from_numpy(x), torch.from_numpy(y)
    known = module.finite_differences(lambda w, step: float(np.mean((mlp.forward(w, x) - y) ** 2)))
    gradient = module.torch_gradient(lambda w, step: torch.mean((mlp.forward(w, wide[0]) - wide[1]) ** 2))
    (value, slopes), (expected, others) = gradient(a | {"idle": np.ones(2)}, 0), known(a, 0)
    assert value == pytest.approx(expected, rel=1e-12) and slopes["idle"].tolist() == [0.0, 0.0]
    for name, slope in others.items():
        np.testing.assert_allclose(slopes[name], slope, rtol=1e-6, atol=1e-8)
    found = [git_rebasin([a, b], spec, by="straight_through", gradient=g, steps=4) for g in (gradient, known)]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-6)
    assert all(np.array_equal(p, found[1].permutations[1][name]) for name, p in found[0].permutations[1].items())


def test_gradients_want_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"pip install 'refmerge\[torch\]'"):
        module.torch_gradient(lambda weights, step: None)


def test_who_is_beside_whom():
    model = llama.init(np.random.default_rng(0), layers=1)
    beside = neighbours(architectures.llama(model, 4, 2))
    assert beside["residual"] == {"ffn.0", "groups.0"} and beside["ffn.0"] == {"residual"} == beside["groups.0"]


# --- Against the plain loop, and against all permutations --------------------------------------------------------------


def plain(a, b, spec, order):
    """The definition without its shortcuts: every permutation in every sweep, whole matrices, SciPy's maximum."""
    from scipy.optimize import linear_sum_assignment

    perms, objective = spec.identity(b), []
    for _ in range(100):
        before = sum(float(np.sum(x * spec.apply(perms, b)[name])) for name, x in a.items())
        for name in order:
            others = spec.apply({q: p for q, p in perms.items() if q != name}, b)
            perms[name] = linear_sum_assignment(spec.rows(name, a) @ spec.rows(name, others).T, maximize=True)[1]
        objective.append(sum(float(np.sum(x * spec.apply(perms, b)[name])) for name, x in a.items()))
        if objective[-1] <= before + 1e-9:
            return perms, objective[-1]
    raise AssertionError


@FEW
@given(SEEDS, st.permutations(["layers.0", "layers.1", "layers.2"]))
def test_the_plain_loop_finds_the_same(seed, order):
    a, b, spec = two(seed, (3, 6, 5, 4, 2))
    perms, objective = plain(a, b, spec, order)
    found = weight_matching(a, b, spec, order=order)
    assert all(np.array_equal(found.permutations[name], p) for name, p in perms.items())
    assert found.objective[-1] == pytest.approx(objective, rel=1e-12)


@FEW
@given(SEEDS)
def test_one_permutation_is_the_best_of_all(seed):
    a, b, spec = two(seed, (2, 4, 3))
    found = weight_matching(a, b, spec)
    every = [inner_product(a, b, spec, {"layers.0": np.array(p)}) for p in itertools.permutations(range(4))]
    assert found.objective[-1] == pytest.approx(max(every), rel=1e-12)
    assert inner_product(a, b, spec, found.permutations) == pytest.approx(max(every), rel=1e-12)


@FEW
@given(SEEDS)
def test_blocks_and_what_is_in_them_are_the_best_of_all(seed):
    """Two heads with queries' and values' permutations of their own: 2 * (6 * 6) * (6 * 6) ways."""
    rng = np.random.default_rng(seed)
    keys, values = Nested("H", "K", 3), Nested("H", "V", 3)
    spec = Spec({"q": (keys, None), "k": (keys, None), "v": (values, None), "o": (None, values), "scale": ("H",)})
    shapes = {"q": (6, 2), "k": (6, 2), "v": (6, 2), "o": (2, 6), "scale": (2,)}
    a, b = ({name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(2))
    found = weight_matching(a, b, spec)
    spec.check(found.permutations, a)
    inner = list(itertools.product(itertools.permutations(range(3)), repeat=2))
    best = -np.inf
    for heads in itertools.permutations(range(2)):
        # K and V do not meet in any tensor: each has its best by itself
        parts = [
            max(inner_product({**a, **gone}, b, spec, {"H": np.array(heads), q: np.array(p)}) for p in inner)
            for q, gone in (("K", {"v": 0 * a["v"], "o": 0 * a["o"]}), ("V", {"q": 0 * a["q"], "k": 0 * a["k"]}))
        ]
        scale = float(a["scale"] @ b["scale"][list(heads)])  # which is in both parts
        best = max(best, sum(parts) - scale)
    assert found.objective[-1] == pytest.approx(best, rel=1e-10, abs=1e-10)
    assert inner_product(a, b, spec, found.permutations) == pytest.approx(best, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_shuffled_transformer_is_found_again(kind):
    """Residual stream, hidden units, heads, groups of heads, and what is in them, by weights and by activations."""
    rng = np.random.default_rng(0)
    if kind == "llama":
        model = llama.init(rng, heads=4, groups=2, layers=2, width=16, tokens=30, bias=True)
        spec, batch = architectures.llama(model, 4, 2), rng.integers(0, 30, (6, 9))

        def forward(params, taps=None):
            return llama.forward(params, batch, taps, heads=4, groups=2)
    else:
        model = vit.init(rng)
        spec, batch = architectures.vit(model, 2), rng.standard_normal((6, 3, 8, 8))

        def forward(params, taps=None):
            return vit.forward(params, batch, taps, heads=2)

    perms = spec.random(model, rng)
    shuffled = spec.apply(perms, model)
    noisy = {name: x + 0.01 * rng.standard_normal(x.shape) for name, x in shuffled.items()}
    undone = spec.invert(perms)
    found = git_rebasin([model, noisy], spec)
    assert all(np.array_equal(found.permutations[1][name], p) for name, p in undone.items())
    taps = [{}, {}]
    for params, t in zip((model, shuffled), taps):
        forward(params, t)
    by_activations = git_rebasin([model, shuffled], spec, by="activations", activations=taps, criterion="correlation")
    assert all(np.array_equal(by_activations.permutations[1][name], p) for name, p in undone.items())
    np.testing.assert_allclose(forward(found.models[1]), forward(noisy), rtol=1e-10, atol=1e-10)


# --- Laws -------------------------------------------------------------------------------------------------------------


@FEW
@given(SEEDS, SEEDS)
def test_the_objective_rises_and_is_a_distance(seed, order):
    a, b, spec = two(seed)
    found = weight_matching(a, b, spec, seed=order)
    assert all(v.gain >= -1e-12 for v in found.visits)
    assert found.objective[-1] >= found.objective[0]
    aligned = spec.apply(found.permutations, b)
    squares = [sum(float(np.sum(x * x)) for x in m.values()) for m in (a, b)]
    apart = sum(float(np.sum((x - aligned[name]) ** 2)) for name, x in a.items())
    assert apart == pytest.approx(sum(squares) - 2 * found.objective[-1], rel=1e-10)
    assert distance(a, b, spec, found.permutations) == pytest.approx(apart**0.5, rel=1e-10)
    for name, x in b.items():
        assert np.array_equal(np.sort(x, axis=None), np.sort(aligned[name], axis=None))
    batch = np.random.default_rng(seed).standard_normal((4, 3))
    np.testing.assert_allclose(mlp.forward(aligned, batch), mlp.forward(b, batch), rtol=1e-12, atol=1e-12)


@FEW
@given(SEEDS)
def test_a_shuffle_is_undone(seed):
    a, spec = network(seed, (8, 6, 5, 4))
    perms = spec.random(a, np.random.default_rng(seed))
    found = git_rebasin([a, spec.apply(perms, a)], spec, seed=seed % 1000)
    if found.objective[1][-1] >= inner_product(a, a, spec, {}) - 1e-9:  # no other optimum was in the way
        assert all(np.array_equal(found.permutations[1][name], invert(p)) for name, p in perms.items())
        assert all(np.array_equal(found.models[1][name], x) for name, x in a.items())


@FEW
@given(SEEDS, st.sampled_from([0.25, 4.0]))
def test_scale_does_not_matter(seed, scale):
    a, b, spec = two(seed)
    found = weight_matching(a, b, spec)
    for pair in ((a, {k: scale * x for k, x in b.items()}), ({k: scale * x for k, x in a.items()}, b)):
        again = weight_matching(*pair, spec)
        assert all(np.array_equal(again.permutations[name], p) for name, p in found.permutations.items())


@FEW
@given(SEEDS)
def test_a_shuffled_second_model_is_aligned_alike(seed):
    """Where the start is moved with it."""
    a, b, spec = two(seed)
    sigma = spec.random(b, np.random.default_rng(seed))
    found = weight_matching(a, b, spec)
    moved = weight_matching(a, spec.apply(sigma, b), spec, start=spec.invert(sigma))
    for name, p in found.permutations.items():
        assert np.array_equal(compose(sigma[name], moved.permutations[name]), p)


@FEW
@given(SEEDS)
def test_of_one_hidden_layer_the_other_way_round_is_the_inverse(seed):
    a, b, spec = two(seed, (3, 6, 2))
    there, back = weight_matching(a, b, spec), weight_matching(b, a, spec)
    assert np.array_equal(invert(there.permutations["layers.0"]), back.permutations["layers.0"])


def test_equal_models_stay_and_take_one_sweep():
    a, spec = network(0)
    found = git_rebasin([a, a], spec)
    assert {v.sweep for v in found.visits} == {0}
    assert all(np.array_equal(p, np.arange(len(p))) for p in found.permutations[1].values())
    assert all(np.array_equal(found.merged[name], x) for name, x in a.items())


def test_many_equal_models_are_themselves():
    a, spec = network(0)
    found = git_rebasin([a, a, a], spec, by="many")
    assert all(np.array_equal(m[name], a[name]) for m in found.models for name in a)


@FEW
@given(SEEDS)
def test_many_models_come_closer_to_each_other(seed):
    models = [network(seed + k)[0] for k in range(3)]
    spec = network(seed)[1]
    found = merge_many(models, spec, seed=seed % 1000)
    aligned = [spec.apply(m.permutations, x) for m, x in zip(found, models)]

    def spread(xs):
        return sum(distance(x, y, spec, {}) ** 2 for x, y in itertools.combinations(xs, 2))

    assert spread(aligned) <= spread(models) + 1e-9
    again = merge_many(aligned, spec, seed=seed % 1000)
    assert spread([spec.apply(m.permutations, x) for m, x in zip(again, aligned)]) <= spread(aligned) + 1e-9


def test_the_order_can_decide():
    a, b, spec = two(0, (2, 6, 6, 6, 2))
    ends = {weight_matching(a, b, spec, order=list(o)).objective[-1] for o in itertools.permutations(spec.permutations)}
    assert len(ends) > 1
    drawn = {weight_matching(a, b, spec, seed=seed).objective[-1] for seed in range(12)}
    assert len(drawn) > 1  # the order changes from sweep to sweep


def test_an_order_may_be_of_each_sweep():
    a, b, spec = two(1)
    turns = [["layers.1", "layers.0"], ["layers.0", "layers.1"]]
    found = weight_matching(a, b, spec, order=turns)
    assert [v.permutation for v in found.visits[:4]] == [*turns[0], *turns[1]]
    assert all(v.permutation == turns[1][i % 2] for i, v in enumerate(found.visits[2:]))


# --- Files, tensors that are left, and what is refused -----------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    model = llama.init(np.random.default_rng(0), layers=1, tied=True)
    other = llama.init(np.random.default_rng(1), layers=1, tied=True)
    models = [{name: x.astype(np.float32) for name, x in m.items()} for m in (model, other)]
    for name, m in zip("ab", models):
        save(m, tmp_path / f"{name}.safetensors")
    return models, tmp_path


def test_files_are_matched_and_merged_as_arrays_are(files):
    models, folder = files
    spec = architectures.llama(models[0], 4, 2)
    expected = git_rebasin(models, spec)
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    found = git_rebasin(paths, spec, out=folder / "merged")
    for name, p in expected.permutations[1].items():
        assert np.array_equal(found.permutations[1][name], p)
    for name in models[0]:
        assert np.array_equal(found.models[1][name], expected.models[1][name])
        assert np.array_equal(found.merged[name], expected.merged[name])
    assert git_rebasin(paths, spec).merged is None
    many = git_rebasin(paths, spec, by="many")
    assert all(np.array_equal(x, many.models[0][name]) for name, x in git_rebasin(models, spec, by="many").models[0].items())
    with open_checkpoint(folder / "a.safetensors") as a:
        assert all(np.array_equal(a[name], x) for name, x in models[0].items())


def test_the_size_of_pieces_does_not_matter(files, monkeypatch):
    models, folder = files
    spec = architectures.llama(models[0], 4, 2)
    expected = weight_matching(*models, spec)
    monkeypatch.setattr(module, "CHUNK", 50)
    monkeypatch.setattr(module, "BAND", 3)
    monkeypatch.setattr("refmerge.symmetry.view.STRETCH", 7)
    found = weight_matching(open_checkpoint(folder / "a.safetensors"), open_checkpoint(folder / "b.safetensors"), spec)
    assert all(np.array_equal(found.permutations[name], p) for name, p in expected.permutations.items())
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-12)


def test_progress_is_told_as_it_comes():
    a, b, spec = two(0)
    told = []
    found = git_rebasin([a, b], spec, progress=told.append)
    assert tuple(told) == found.visits and {v.model for v in told} == {1}


def test_statistics_move_and_are_not_matched():
    """The variance, a hundred times the weights, would decide alone: it is largest in unit 1 of both."""
    spec = Spec({"w": ("P", None), "bn.running_var": ("P",)})
    a = {"w": np.array([[1.0], [0.0]]), "bn.running_var": np.array([100.0, 400.0])}
    b = {"w": np.array([[0.0], [1.0]]), "bn.running_var": np.array([100.0, 400.0])}
    found = git_rebasin([a, b], spec)
    assert found.models[1]["w"].tolist() == [[1], [0]]
    assert found.models[1]["bn.running_var"].tolist() == [400, 100]
    assert git_rebasin([a, b], spec, leave=()).permutations[1]["P"].tolist() == [0, 1]


def test_weights_of_the_average():
    a, b, spec = two(0)
    found = git_rebasin([a, b], spec, weight=[0.75, 0.25])
    expected = refmerge.merge(list(found.models), "linear", weight=[0.75, 0.25])
    assert all(np.array_equal(found.merged[name], x) for name, x in expected.items())


def test_torch_is_matched_as_numpy_is():
    torch = pytest.importorskip("torch")
    a, b, spec = two(0)
    found = git_rebasin([{k: torch.from_numpy(x) for k, x in m.items()} for m in (a, b)], spec)
    expected = git_rebasin([a, b], spec)
    assert all(np.array_equal(found.permutations[1][name], p) for name, p in expected.permutations[1].items())
    assert all(np.array_equal(found.merged[name].numpy(), x) for name, x in expected.merged.items())


def test_ties_are_scipys():
    assert assignment(np.zeros((4, 4))).tolist() == [0, 1, 2, 3]
    assert assignment(np.array([[1.0, 1.0], [1.0, 1.0]])).tolist() == [0, 1]
    C = np.array([[0.0, 2.0], [1.0, 0.5]])
    assert assignment(C).tolist() == [1, 0] and C.tolist() == [[0, 2], [1, 0.5]]


A, B, SPEC = two(0)
ACTS = [{"layers.0": np.ones((4, 6))}] * 2


@pytest.mark.parametrize(
    ("models", "options", "error", "said"),
    [
        ([A], {}, UsageError, "1 models: it takes two"),
        ([A, B], {"by": "magic"}, UsageError, "by = 'magic' is none of"),
        ([A, {**B, "x": np.ones(2)}], {}, UsageError, "'x' is in the model and not in the spec"),
        ([A, two(0, (3, 7, 5, 2))[0]], {}, UsageError, "'layers.0' has 6 units in model 0 and 7 in model 1"),
        ([A, two(0, (4, 6, 5, 2))[0]], {}, InputError, r"'layers.0.weight' is \[6, 3\] in model 0 and \[6, 4\] in model 1"),
        ([A, B], {"seed": -1}, UsageError, "seed = -1 is no whole number in"),
        ([A, B], {"sweeps": 0}, UsageError, "sweeps = 0 is no whole number above 0"),
        ([A, B], {"order": ["layers.0"]}, UsageError, "each of layers.0, layers.1 once"),
        (
            [A, {**B, "layers.0.bias": np.full(6, np.nan)}],
            {},
            InputError,
            "permutation 'layers.0' is not finite: layers.0.w",
        ),
        ([A, B], {"by": "activations"}, UsageError, "activations go with by='activations'"),
        ([A, B], {"activations": ACTS}, UsageError, "activations go with by='activations'"),
        ([A, B], {"by": "activations", "activations": ACTS[:1]}, UsageError, "activations of 1 models for 2"),
        ([A, B], {"by": "activations", "activations": [{}, ACTS[0]]}, UsageError, "activations of 'layers.0' and the other"),
        ([A, B], {"by": "activations", "activations": [{}, {}]}, UsageError, "activations of none of layers.0"),
        ([A, B], {"by": "activations", "activations": ACTS, "criterion": "x"}, UsageError, "criterion = 'x' is none of"),
        ([A, B], {"by": "straight_through"}, UsageError, "gradient or, for finite differences, loss"),
        ([A, B], {"start": [{}, {}]}, UsageError, "start has permutations for each model but the first"),
        ([A, B], {"start": [{"layers.0": [0, 0, 1, 2, 3, 4]}]}, UsageError, "does not hold each of 0"),
        ([A, B], {"by": "many", "turns": [[0]]}, UsageError, "turns names .0.: each of 0, 1 once"),
        ([A, B], {"turns": [[0, 1]]}, UsageError, "turns go with by='many'"),
        ([A, B], {"loss": lambda w, step: 0.0}, UsageError, "gradient and loss go with by='straight_through'"),
    ],
)
def test_refusals(models, options, error, said):
    with pytest.raises(error, match=said):
        git_rebasin(models, SPEC, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"by": "activations", "activations": [*ACTS, ACTS[0]]},
        {"by": "straight_through", "loss": lambda w, step: 0.0, "steps": 1},
    ],
)
def test_visits_say_whose_they_are(options):
    told = []
    found = git_rebasin([A, B, A], SPEC, progress=told.append, **options)
    assert tuple(told) == found.visits
    assert {v.model for v in told} == {1, 2}


def test_a_spec_is_a_spec():
    with pytest.raises(UsageError, match=r"spec is a refmerge\.symmetry\.Spec, not dict"):
        git_rebasin([A, B], {"layers.0.weight": ("P", None)})


def test_blocks_of_a_flattened_image():
    """A channel's pixels lie side by side: they move together, and all count."""
    spec = Spec({"conv": ("P", None), "dense": (None, Block("P", 2))})
    a = {"conv": np.zeros((2, 1)), "dense": np.array([[1.0, 2, 0, 0]])}
    b = {"conv": np.zeros((2, 1)), "dense": np.array([[0.0, 0, 1, 2]])}
    assert module.cost("P", a, b, spec, {}).tolist() == [[0, 5], [0, 0]]
    assert git_rebasin([a, b], spec).models[1]["dense"].tolist() == [[1, 2, 0, 0]]


def test_a_recipe_aligns_by_it(tmp_path):
    """A model and a shuffled copy of it: their average is the model, where they have been aligned."""
    model = {k: x.astype(np.float32) for k, x in llama.init(np.random.default_rng(0), layers=1, tied=True).items()}
    spec = architectures.llama(model, 4, 2)
    config = b'{"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}'
    save(model, tmp_path / "a", extra_files={"config.json": config})
    shuffled = spec.apply(spec.random(model, np.random.default_rng(1)), model)
    save(shuffled, tmp_path / "b", extra_files={"config.json": config})
    recipe = "refmerge: 1\nmerge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nalign: {method: git_rebasin}\n"
    (tmp_path / "recipe.yml").write_text(recipe)
    merged = refmerge.run_recipe(tmp_path / "recipe.yml", tmp_path / "merged")
    assert all(np.array_equal(merged[name], x) for name, x in model.items())
