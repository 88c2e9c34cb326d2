"""otfusion: what the authors' functions gave, its laws, specs and chains, and the picture of its page.

tests/data/otfusion.npz holds small random networks, for each the options under the authors' names, and the plans and layers
that sidak/otfusion@eb73ad6 (and for copy_* hsgser/clafusion@9050167) gave with POT 0.9.7.post1: their functions
get_wassersteinized_layers_modularized and get_acts_wassersteinized_layers_modularized were called with the networks'
parameters and activations, and what `ot.emd` and `ot.bregman.sinkhorn` returned was noted down. All arrays lie one after the
other in `numbers`; `index` is JSON that has their names and shapes.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import refmerge
from refmerge import open_checkpoint, registry
from refmerge.checkpoint import Checkpoint
from refmerge.errors import UsageError
from refmerge.nets import gpt2, llama, mlp, resnet, vgg, vit
from refmerge.procedures.alignment.otfusion import (
    chain,
    corrected,
    exact_plan,
    from_official,
    ground_cost,
    sinkhorn_plan,
)
from refmerge.symmetry import Block, Spec, architectures

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.draw_alignment import FOLDER
from tests.draw_transport import PICTURES

otfusion = registry.procedure("otfusion")
DATA = Path(__file__).parent / "data" / "otfusion.npz"


def read(file):
    """(options of each case, arrays by name)."""
    data = np.load(file)
    index = json.loads(data["index"].tobytes())
    ends = np.cumsum([int(np.prod(shape)) for shape in index["shapes"].values()])
    pieces = np.split(data["numbers"], ends[:-1])
    return index["options"], {name: x.reshape(s) for (name, s), x in zip(index["shapes"].items(), pieces)}


OPTIONS, ARRAYS = read(DATA)


def part(case, which):
    start = f"{case}/{which}/"
    return {name.removeprefix(start): x for name, x in ARRAYS.items() if name.startswith(start)}


def spread(sizes, seed=0, scale=1.0):
    """A chain without biases of these widths."""
    rng = np.random.default_rng(seed)
    return {f"fc{i}.weight": scale * rng.standard_normal((m, n)) for i, (n, m) in enumerate(itertools.pairwise(sizes), 1)}


def same(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_allclose(x, b[name], rtol=tolerance, atol=tolerance)


# --- The authors' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS)
def test_the_authors_results(case):
    options = dict(OPTIONS[case])
    keywords = from_official(options, clafusion=options.pop("clafusion"))
    models, acts = ([part(case, f"{what}{i}") for i in (1, 0)] for what in ("model", "acts"))
    found = otfusion(models, list(models[0]), activations=acts if acts[0] else None, **keywords)
    for T, expected in zip(found.transports[0].plans.values(), part(case, "plan").values(), strict=True):
        np.testing.assert_allclose(T, expected, atol=1e-5 * expected.max(), rtol=0)
    for name, expected in part(case, "out").items():
        assert found.merged[name].dtype == np.float32
        np.testing.assert_allclose(found.merged[name], expected, atol=2e-6 * np.max(np.abs(expected)), rtol=0)


def test_the_authors_defaults_and_what_is_refused():
    defaults = from_official({})
    assert (defaults["exact"], defaults["normalize"], defaults["squared"], defaults["correction"]) == (
        False,
        "log",
        True,
        "none",
    )
    assert from_official({"correction": True, "proper_marginals": True})["correction"] == "columns"
    assert from_official({"correction": True})["correction"] == "constant"
    assert from_official({"correction": True, "geom_ensemble_type": "acts"})["correction"] == "rows"
    for option in ("unbalanced", "gromov", "update_acts", "act_bug"):
        with pytest.raises(UsageError, match=option):
            from_official({option: True})


# --- Plans ------------------------------------------------------------------------------------------------------------

COSTS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32)).map(
    lambda a: np.random.default_rng(a[2]).random((a[0], a[1]))
)


def uniform(M):
    return tuple(np.full(n, 1 / n) for n in M.shape)


def random_masses(M, seed=1):
    masses = [np.random.default_rng(seed + n).random(n) + 0.1 for n in M.shape]
    return tuple(m / m.sum() for m in masses)


def is_plan(T, mu, nu, tolerance=1e-12):
    assert T.min() >= 0
    np.testing.assert_allclose(T.sum(axis=1), mu, atol=tolerance)
    np.testing.assert_allclose(T.sum(axis=0), nu, atol=tolerance)


@given(COSTS, st.booleans())
@settings(deadline=None, max_examples=60)
def test_an_exact_plan_is_a_plan_with_few_entries_that_no_other_beats(M, equal):
    mu, nu = uniform(M) if equal else random_masses(M)
    T = exact_plan(mu, nu, M)
    is_plan(T, mu, nu)
    if equal and M.shape[0] == M.shape[1]:
        assert np.count_nonzero(T) == len(T)
    assert np.count_nonzero(T > 1e-15) <= sum(M.shape) - 1
    soft = sinkhorn_plan(mu, nu, M, reg=0.5)
    is_plan(soft, mu, nu, 1e-6)
    for other in (np.outer(mu, nu), soft):
        assert np.sum(T * M) <= np.sum(other * M) + 1e-7


@given(st.integers(1, 5), st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_an_assignment_is_the_best_permutation(n, seed):
    M = np.random.default_rng(seed).random((n, n))
    best = min(sum(M[p[j], j] for j in range(n)) for p in itertools.permutations(range(n)))
    assert np.sum(exact_plan(*uniform(M), M) * M) == pytest.approx(best / n, abs=1e-12)


@given(st.integers(1, 3), st.integers(2, 3), st.integers(0, 2**32), st.booleans())
@settings(deadline=None, max_examples=30)
def test_assignments_of_repeated_units_are_what_the_linear_program_gives(n, times, seed, turned):
    M = np.random.default_rng(seed).random((n * times, n))
    M = M.T if turned else M
    mu, nu = uniform(M)
    off = mu * (1 + 1e-13 * np.arange(len(mu)))  # no longer equal, so that the program is asked
    np.testing.assert_allclose(exact_plan(off / off.sum(), nu, M), exact_plan(mu, nu, M), atol=1e-9)


@given(COSTS, st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_costs_in_other_units_have_the_same_plan(M, c):
    mu, nu = uniform(M)
    np.testing.assert_allclose(exact_plan(mu, nu, c * M), exact_plan(mu, nu, M), atol=1e-12)
    np.testing.assert_allclose(sinkhorn_plan(mu, nu, c * M, reg=0.1 * c), sinkhorn_plan(mu, nu, M, reg=0.1), atol=1e-9)


def test_reg_goes_from_the_exact_plan_to_the_mean_of_all():
    M = np.array([[0.0, 1, 3], [2, 0.5, 1], [3, 2, 0.25]])
    mu, nu = uniform(M)
    np.testing.assert_allclose(sinkhorn_plan(mu, nu, M, reg=1e-3), exact_plan(mu, nu, M), atol=1e-12)
    np.testing.assert_allclose(sinkhorn_plan(mu, nu, M, reg=1e9), np.outer(mu, nu), atol=1e-9)


def test_sinkhorn_by_hand():
    """The plan of ((0, 1), (1, 0)) is 1 / (2 + 2 exp(-1 / reg)) on the diagonal."""
    half = np.array([0.5, 0.5])
    M = np.array([[0.0, 1], [1, 0]])
    for kernel in ("log", "float32"):
        T = sinkhorn_plan(half, half, M, reg=1.0, kernel=kernel)
        np.testing.assert_allclose(np.diag(T), 1 / (2 + 2 * np.exp(-1)), rtol=1e-6)
    assert np.array_equal(sinkhorn_plan(half, half, M + 10, reg=0.01, kernel="float32"), np.zeros((2, 2)))
    np.testing.assert_allclose(sinkhorn_plan(half, half, M + 10, reg=0.01), np.eye(2) / 2, atol=1e-12)


def test_ties_are_as_scipy_has_them():
    mu = np.full(4, 0.25)
    assert np.array_equal(exact_plan(mu, mu, np.ones((4, 4))), np.eye(4) / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [0.5, 0.5], [[1.0]]), "shape"),
        (([1.0], [0.5], [[1.0]]), "one sum"),
        (([1.0], [1.0], [[np.nan]]), "NaN"),
        (([1.0, 0.0], [1.0], [[1.0], [1.0]]), "above 0"),
    ],
)
def test_problems_that_have_no_plan(arguments, message):
    for solve in (exact_plan, sinkhorn_plan):
        with pytest.raises(UsageError, match=message):
            solve(*arguments)


# --- Costs and corrections --------------------------------------------------------------------------------------------


def test_costs_by_hand():
    x, y = [[0.0, 0], [3, 4]], [[3.0, 4], [0, 5]]
    assert ground_cost(x, y, squared=True).tolist() == [[25, 25], [0, 10]]
    np.testing.assert_allclose(ground_cost(x, y), [[5, 5], [0, np.sqrt(10)]])
    np.testing.assert_allclose(ground_cost(x, y, metric="cosine"), [[1, 1], [0, 0.2]], atol=1e-15)
    assert ground_cost(x, y, squared=True, divide=5).tolist() == [[5, 5], [0, 2]]
    np.testing.assert_allclose(ground_cost(x, y, unit_rows=True, squared=True), [[1, 1], [0, 0.4]], atol=1e-8)
    scaled = {"max": 25, "mean": 15, "median": 10}  # of 0, 10, 25, 25 the lower median
    for normalize, scale in scaled.items():
        np.testing.assert_allclose(
            ground_cost(x, y, squared=True, normalize=normalize), np.array([[25, 25], [0, 10]]) / scale
        )
    np.testing.assert_allclose(ground_cost(x, y, squared=True, normalize="log"), np.log([[26, 26], [1, 11]]))
    assert ground_cost(x, y, squared=True, clip=(5, 20)).tolist() == [[20, 20], [5, 10]]
    assert ground_cost([[1.0]], [[1.0]], normalize="max").tolist() == [[0]]


def test_corrections_by_hand():
    T = np.array([[0.5, 0.0], [0.25, 0.25]])
    np.testing.assert_allclose(corrected(T), [[2 / 3, 0], [1 / 3, 1]])
    np.testing.assert_allclose(corrected(T, "rows"), [[1, 0], [0.5, 0.5]])
    assert corrected(T, "constant").tolist() == [[1, 0], [0.5, 0.5]]
    assert corrected(T, "none") is T
    with pytest.raises(UsageError, match="equal widths"):
        corrected(np.ones((3, 2)) / 6, "rows")


# --- Laws of fusion ---------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(2, 6), min_size=3, max_size=5)


@given(SIZES, st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_permuting_the_units_of_either_model(sizes, seed):
    a, b = spread(sizes, seed), spread(sizes, seed + 1)
    spec = chain(a)
    p, q = (spec.random(model, np.random.default_rng(seed + 2 + i)) for i, model in enumerate((a, b)))
    merged = otfusion([a, b], spec).merged
    same(otfusion([a, spec.apply(q, b)], spec).merged, merged)
    same(otfusion([spec.apply(p, a), b], spec).merged, spec.apply(p, merged))


@given(SIZES, st.integers(0, 2**32), st.sampled_from([{}, {"metric": "cosine"}, {"normalize": "log", "squared": True}]))
@settings(deadline=None, max_examples=30)
def test_where_plans_are_permutations_the_transported_model_computes_the_same(sizes, seed, how):
    a, b = spread(sizes, seed), spread(sizes, seed + 1)
    found = otfusion([a, b], **how)
    x = np.random.default_rng(seed).standard_normal((8, sizes[0]))
    np.testing.assert_allclose(mlp.forward(found.models[1], x), mlp.forward(b, x), rtol=1e-9, atol=1e-9)
    same(chain(a).apply(found.transports[0].permutations, b), found.models[1], 1e-9)


def test_weights_and_equal_models():
    a, b = spread([4, 6, 5, 3]), spread([4, 6, 5, 3], 1)
    found = otfusion([a, b], weight=[1.0, 0.0])
    assert found.models[0] is a
    assert all(np.array_equal(x, a[name]) for name, x in found.merged.items())
    same(otfusion([a, b], weight=[0, 1]).merged, found.models[1])
    same(otfusion([a, a]).merged, a, 1e-12)
    same(otfusion([a, b]).merged, {name: (found.models[1][name] + a[name]) / 2 for name in a})
    (transport,) = found.transports
    assert transport.objectives == {P: np.sum(T * transport.costs[P]) for P, T in transport.plans.items()}


def test_more_than_two_models_all_come_to_the_first():
    a, b, c = (spread([4, 6, 5, 3], seed) for seed in range(3))
    found = otfusion([a, b, c])
    for k, other in ((1, b), (2, c)):
        same(otfusion([a, other]).models[1], found.models[k])
    same(found.merged, {name: (a[name] + found.models[1][name] + found.models[2][name]) / 3 for name in a})


RNG = np.random.default_rng(7)
NETWORKS = {
    "mlp": (mlp.init(RNG, [5, 7, 6, 3]), {}),
    "vgg": (vgg.init(RNG, [4, "M", 6, "M"], [5], places=4), {}),
    "resnet": (resnet.init(RNG, (4, 6), 2), {}),
    "resnet, shortcuts of zeros": (resnet.init(RNG, (4, 6), 2, shortcut="zeros"), {}),
    "vit": (vit.init(RNG), {"heads": 2}),
    "gpt2": (gpt2.init(RNG, tied=False), {"heads": 2}),
    "llama": (llama.init(RNG), {"heads": 4, "groups": 2}),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_permuted_copy_is_found_again(name, by_name):
    model, heads = NETWORKS[name]
    model = {n: model[n] for n in (sorted(model) if by_name else model)}
    spec = architectures.ARCHITECTURES[name.partition(",")[0]](model, **heads)
    perms = {P: p for P, p in spec.random(model, np.random.default_rng(3)).items() if not spec.owners[P]}
    copy = spec.apply(perms, model)
    found = otfusion([copy, model], spec)
    same(found.merged, copy)
    assert found.transports[0].permutations.keys() == perms.keys()
    assert all(np.array_equal(found.transports[0].permutations[P], p) for P, p in perms.items())


@pytest.mark.parametrize(("name", "forward"), [("mlp", mlp.forward), ("vgg", vgg.forward), ("resnet", resnet.forward)])
def test_a_permuted_copy_is_found_by_activations(name, forward):
    model, _ = NETWORKS[name]
    spec = architectures.ARCHITECTURES[name](model)
    copy = spec.apply(spec.random(model, np.random.default_rng(3)), model)
    batch = np.random.default_rng(4).standard_normal((40, 5) if name == "mlp" else (40, 3, 8, 8))
    taps = [{}, {}]
    for params, tap in zip((copy, model), taps):
        forward(params, batch, tap)
    same(otfusion([copy, model], spec, activations=taps).merged, copy)


def test_fused_networks_of_other_widths_have_the_first_ones_shapes():
    a, b = mlp.init(RNG, [5, 6, 7, 3]), mlp.init(RNG, [5, 9, 4, 3])
    for how in ({}, {"exact": False, "reg": 0.1}, {"masses": "l2"}):
        found = otfusion([a, b], architectures.mlp(a), **how)
        assert {name: x.shape for name, x in found.merged.items()} == {name: x.shape for name, x in a.items()}
        for K in found.transports[0].maps.values():
            np.testing.assert_allclose(K.sum(axis=0), 1)
    a, b = resnet.init(RNG, (6, 4), 2), resnet.init(RNG, (4, 6), 2)
    merged = otfusion([a, b], architectures.resnet(a)).merged
    assert {name: x.shape for name, x in merged.items()} == {name: x.shape for name, x in a.items()}


# --- Chains and specs -------------------------------------------------------------------------------------------------


def test_a_chain_is_the_spec_of_its_layers():
    model = {
        "a.weight": np.ones((4, 3, 3, 3)),
        "a.bias": np.ones(4),
        "b.weight": np.ones((5, 4, 1, 1)),
        "count": np.ones(()),
        "c.weight": np.ones((6, 20)),
        "d.weight": np.ones((2, 6)),
        "d.bias": np.ones(2),
    }
    axes = {
        "a.weight": ("a", None, None, None),
        "a.bias": ("a",),
        "b.weight": ("b", "a", None, None),
        "count": (),
        "c.weight": ("c", Block("b", 4)),
        "d.weight": (None, "c"),
        "d.bias": (None,),
    }
    assert chain(model) == Spec(axes)
    assert chain(model, output="transport") == Spec(axes | {"d.weight": ("d", "c"), "d.bias": ("d",)})
    assert list(chain(model, list(reversed(model))).axes) == list(reversed(model))


def test_shortcuts_read_what_they_go_around():
    shapes = {"a": (4, 3, 3), "b": (6, 4, 3), "c": (6, 6, 3), "s": (6, 4, 1), "d": (6, 6, 3), "e": (6, 6, 3), "out": (2, 6)}
    model = {f"{name}.weight": np.ones((*s[:2], *[s[2]] * 2) if len(s) > 2 else s) for name, s in shapes.items()}
    read = {name.removesuffix(".weight"): axes[1] for name, axes in chain(model, shortcuts=True).axes.items()}
    assert read == {"a": None, "b": "a", "c": "b", "s": "a", "d": "s + c", "e": "d", "out": "e"}
    with pytest.raises(UsageError, match="no layer before it"):
        chain({name: model[name] for name in ("a.weight", "s.weight")}, shortcuts=True)


def test_residual_streams_have_one_map_in_a_spec():
    model = resnet.init(np.random.default_rng(0), (3, 4), 2)
    spec = architectures.resnet(model)
    assert otfusion([model, model], spec).transports[0].plans.keys() == set(spec.permutations)
    assert len(spec.permutations) == 6  # two streams and four blocks


def test_written_by_says_what_is_compared():
    """Weights of shape (inputs, outputs): the first axis of the second layer is not where its outputs are."""
    a = {"1": np.array([[2.0, 1]]), "2": np.array([[5.0, 5], [5, 5]])}
    b = {"1": np.array([[1.0, 2]]), "2": np.array([[5.0, 5], [5, 5]])}
    spec = Spec({"1": (None, "P"), "2": ("P", None)})
    assert otfusion([a, b], spec).transports[0].permutations["P"].tolist() == [0, 1]
    assert otfusion([a, b], spec, written_by={"P": ["1"]}).transports[0].permutations["P"].tolist() == [1, 0]
    with pytest.raises(UsageError, match="written_by names 'Q'"):
        otfusion([a, b], spec, written_by={"Q": ["1"]})


def test_what_cannot_be_ordered_is_matched_by_activations():
    """Each of two sets needs the other before it."""
    spec = Spec({"w": ("P", "Q")})
    a = {"w": np.array([[4.0, 3], [2, 1]])}
    b = {"w": np.array([[1.0, 2], [3, 4]])}
    with pytest.raises(UsageError, match="activations need none"):
        otfusion([a, b], spec)
    acts = {"P": np.array([[0.0, 1]]), "Q": np.array([[0.0, 1]])}
    turned = {P: x[:, ::-1] for P, x in acts.items()}
    assert np.array_equal(otfusion([a, b], spec, activations=[turned, acts]).merged["w"], a["w"])


def test_given_plans_are_used():
    a, b = spread([2, 2, 1]), spread([2, 2, 1], 1)
    T = np.array([[0.0, 0.5], [0.5, 0]])
    found = otfusion([a, b], plans=[{"fc1": T}])
    assert np.array_equal(found.models[1]["fc1.weight"], b["fc1.weight"][::-1])
    assert np.array_equal(found.transports[0].plans["fc1"], T)
    with pytest.raises(UsageError, match="plan of 'fc1'"):
        otfusion([a, b], plans=[{"fc1": np.ones((3, 2))}])


# --- Inputs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """Two models of other widths, in memory and in files, with a counter."""
    models = [spread([3, n, 2], seed) | {"0.steps": np.array([seed])} for seed, n in enumerate((4, 6))]
    models = [{name: x.astype(np.float32) if name != "0.steps" else x for name, x in model.items()} for model in models]
    for name, model in zip("ab", models):
        save_file(model, tmp_path / f"{name}.safetensors")
    return models, [tmp_path / f"{name}.safetensors" for name in "ab"]


def test_open_checkpoints_are_views(stored, tmp_path):
    models, paths = stored
    order = list(models[0])
    expected = otfusion(models, order)
    assert expected.merged["0.steps"] == expected.models[1]["0.steps"] == 0
    found = otfusion(paths, order)
    assert found.merged is None
    assert isinstance(found.models[1], Checkpoint)
    for name, x in expected.models[1].items():
        assert np.array_equal(found.models[1][name], x) and found.models[1][name].dtype == x.dtype
        assert found.models[1].tensors[name].shape == x.shape
    merged = otfusion([open_checkpoint(path) for path in paths], order, out=tmp_path / "merged").merged
    assert all(np.array_equal(merged[name], x) for name, x in expected.merged.items())
    whole = found.models[1]["fc1.weight"].reshape(-1).view(np.uint8)
    piece = np.empty(12, np.uint8)
    found.models[1].read("fc1.weight", 2, 5, piece)
    assert np.array_equal(piece, whole[8:20])


def test_a_recipe_aligns_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [mlp.init(np.random.default_rng(seed), [3, 4, 2]) for seed in range(2)]
    for name, model in zip("ab", models):
        (tmp_path / name).mkdir()
        save_file({n: x.astype(np.float32) for n, x in model.items()}, tmp_path / name / "model.safetensors")
    align = "{method: otfusion, parameters: {exact: false, reg: 0.5}}"
    text = f"{{refmerge: 1, merge_method: linear, models: [{{model: ./a}}, {{model: ./b}}], align: {align}}}"
    (tmp_path / "r.yml").write_text(text)
    refmerge.run_recipe("r.yml", "merged")
    aligned = otfusion([tmp_path / "a", tmp_path / "b"], architectures.mlp(models[0]), exact=False, reg=0.5)
    expected = refmerge.merge(aligned.models, "linear", out=tmp_path / "expected")
    merged = open_checkpoint("merged")
    assert all(np.array_equal(merged[name], expected[name]) for name in models[0])


def test_dtypes():
    a, b = (spread([3, 4, 2], seed) for seed in (0, 1))
    narrow = {n: x.astype(ml_dtypes.bfloat16) for n, x in a.items()}
    found = otfusion([narrow, b])
    assert {x.dtype for model in (found.merged, found.models[1]) for x in model.values()} == {np.dtype(ml_dtypes.bfloat16)}
    wide = otfusion([{n: x.astype(np.float64) for n, x in narrow.items()}, b]).models[1]
    assert all(np.array_equal(x, wide[n].astype(ml_dtypes.bfloat16)) for n, x in found.models[1].items())


def test_torch(torch):
    models = [{n: torch.from_numpy(x).to(torch.float32) for n, x in spread([3, 4, 2], seed).items()} for seed in (0, 1)]
    found = otfusion(models)
    for model in (found.merged, found.models[1]):
        assert all(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in model.values())


def test_spec_or_chain_but_not_both():
    a = spread([2, 3, 1])
    with pytest.raises(UsageError, match="chains of layers"):
        otfusion([a, a], chain(a), output="transport")


def test_kinds_and_numbers_of_models(stored):
    models, paths = stored
    with pytest.raises(UsageError, match="all checkpoints or all mappings"):
        otfusion([models[0], paths[1]], list(models[0]))
    with pytest.raises(UsageError, match="1 models"):
        otfusion(models[:1])
    for keywords in ({"activations": [{}]}, {"plans": [{}, {}]}):
        with pytest.raises(UsageError, match=next(iter(keywords))):
            otfusion(models, **keywords)


@pytest.mark.parametrize(
    ("change", "keywords", "message"),
    [
        ({"fc1.weight": np.full((3, 2), np.nan)}, {}, "'fc1.weight' is NaN"),
        ({"fc1.weight": np.ones((3, 4))}, {}, "axis 1 of 'fc1.weight', .* 2 places here and 4 in model 1"),
        ({"fc2.weight": np.ones((2, 3))}, {}, "axis 0 of 'fc2.weight'"),
        ({"fc2.weight": np.ones((1, 5))}, {}, "'fc1' has 3 units"),
        ({"fc3.weight": np.ones((1, 1))}, {}, "'fc3.weight' is in the model and not in the spec"),
        ({"fc1.weight": np.ones((0, 2)), "fc2.weight": np.ones((1, 0))}, {}, "'fc1' has no units"),
        ({"fc1.weight": np.ones((5, 2)), "fc2.weight": np.ones((1, 5))}, {"correction": "rows"}, "equal widths"),
        ({}, {"spec": ["fc1.weight"]}, "each tensor once"),
        ({}, {"metric": "angular"}, "metric = 'angular'"),
        ({}, {"normalize": "std"}, "normalize = 'std'"),
        ({}, {"masses": "l3"}, "masses = 'l3'"),
        ({}, {"correction": "both"}, "correction = 'both'"),
        ({}, {"output": "none"}, "output = 'none'"),
        ({}, {"exact": False, "reg": 0.0}, "reg = 0.0"),
        ({}, {"exact": False, "kernel": "float16"}, "kernel = 'float16'"),
        ({}, {"activations": [{}, {}]}, "no activations of 'fc1'"),
        ({}, {"activations": [{"fc1": np.ones((5, 3))}, {"fc1": np.ones((5, 4))}]}, "3 units"),
        ({}, {"activations": [{"fc1": np.ones((5, 3))}, {"fc1": np.full((5, 3), np.inf)}]}, "NaN or infinite"),
        ({}, {"activations": [{"fc1": np.ones((5, 3))}, {"fc1": np.ones((4, 3))}]}, "samples the same"),
    ],
)
def test_errors(change, keywords, message):
    model = spread([2, 3, 1])
    with pytest.raises(UsageError, match=message):
        otfusion([model, model | change], **keywords)


def test_inputs_that_are_not_aligned_must_fit():
    a, b = spread([3, 4, 4, 2]), spread([3, 6, 6, 2])
    with pytest.raises(UsageError, match="align_inputs is off"):
        otfusion([a, b], align_inputs=False)


# --- The pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_what_the_command_draws(name):
    stored = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert stored == PICTURES[name](), "python -m tests.draw_transport"
    assert f"({name}.svg)" in (FOLDER / f"{name}.md").read_text(encoding="utf-8")
