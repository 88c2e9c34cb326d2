"""PLeaS: results of the authors' code, numbers by hand, and laws.

tests/data/pleas.npz holds what SewoongLab/PLeaS-Merging@8662119 gave on a CPU for two MLPs: `pleas-wm-00`, weight matching
with its last costs; `pleas-partial-00` and `-03`, blocks, the partly merged model, and the inputs, targets and gradient
masks of the least squares. Names are as in its state dicts, and permutations are called by their first axis.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import UsageError, open_checkpoint, registry
from refmerge.checkpoint import save
from refmerge.nets import mlp, resnet, vgg
from refmerge.nets.layers import Reads
from refmerge.procedures.alignment.git_rebasin import git_rebasin
from refmerge.procedures.alignment.pleas import (
    allowed,
    blocks_of,
    distances,
    inner_products,
    matrices,
    ratios_for,
    system,
    weight_similarity,
    work,
)
from refmerge.symmetry import Spec, architectures

pleas = registry.procedure("pleas")
FEW = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
OFFICIAL = np.load(Path(__file__).parent / "data" / "pleas.npz")


# --- The authors' code ------------------------------------------------------------------------------------------------


def official(case):
    """(groups of tensors, parameters, the spec that was traced)."""
    found = {}
    for key in OFFICIAL.files:
        if key.startswith(f"{case}|") and not key.endswith("|params"):
            group, _, name = key.removeprefix(f"{case}|").partition("/")
            found.setdefault(group, {})[name] = OFFICIAL[key]
    params = json.loads(str(OFFICIAL[f"{case}|params"]))
    axes = {name: [None] * x.ndim for name, x in found["model0"].items()}
    for p, uses in params["spec"].items():
        for tensor, _, axis in (use.rpartition(":") for use in uses):
            axes[tensor][int(axis)] = p
    return found, params, Spec(axes)


def activations(model, x):
    """What each layer reads, and what units give before and after ReLU."""
    reads, taps = {}, {}
    for layer in ("fc1", "fc2", "fc"):
        reads[f"{layer}.weight"] = x
        taps[f"{layer}.weight:0 before"] = x = x @ model[f"{layer}.weight"].astype(float).T + model[f"{layer}.bias"]
        taps[f"{layer}.weight:0 after"] = x = np.maximum(x, 0)
    return reads, taps


@pytest.mark.parametrize("case", ["pleas-partial-00", "pleas-partial-03"])
def test_official_partial_merge(case):
    found, params, spec = official(case)
    models = [found["model0"], found["model1"]]
    (read_0, taps_0), (read_1, taps_1) = (activations(m, found["stat"]["inputs"].astype(float)) for m in models)
    costs = {p: found["stat"][f"cost/{p}"] for p in spec.permutations}
    nodes = {p: [f"{p} before", f"{p} after"] for p in costs}  # its graph has both
    for p, C in distances([[taps_0, taps_1]], nodes).items():
        np.testing.assert_allclose(C, costs[p], rtol=0, atol=1e-6 * np.abs(C).max())
    got = pleas(models, spec, costs, [[read_0, read_1]], ratios=params["ratios"], semantics="official")
    merge = {}
    for p, b in got.blocks.items():
        assert np.array_equal(got.perms[p], found["perm"][p])
        for side, units in b._asdict().items():
            assert np.array_equal(units, found["out_block"][f"{p}/{side}"])
        merge[p] = matrices(b, len(costs[p]))[0]
    for name, x in found["out"].items():
        assert np.array_equal(got.start[name], x)
    for layer in ("fc1", "fc2", "fc"):
        name = f"{layer}.weight"
        X, Y = system([read_0[name], read_1[name]], name, models, spec, merge)
        np.testing.assert_allclose(X, found["out_ls_in"][layer], rtol=0, atol=2e-6 * np.abs(X).max())
        np.testing.assert_allclose(Y, found["out_ls_target"][layer], rtol=0, atol=2e-6 * np.abs(Y).max())
        mask = found["out_mask"][name]
        assert np.array_equal(allowed(name, models, spec, merge, semantics="official"), mask)
    wrong = allowed("fc2.weight", models, spec, merge) != found["out_mask"]["fc2.weight"]
    assert wrong.sum() == (0 if case.endswith("00") else 40)  # of 169


def test_official_weight_matching():
    found, params, spec = official("pleas-wm-00")
    models = [found["model0"], found["model1"]]
    order = [[params["perm_names"][i] for i in sweep] for sweep in found["stat0"]["order"]]
    got = git_rebasin(models, spec, order=order)
    perms = got.permutations[1]
    for p in perms:
        assert np.array_equal(perms[p], found["perm"][p])
    for name, x in found["out"].items():
        assert np.array_equal(got.models[1][name], x)
    in_place = {p: np.arange(len(q)) for p, q in perms.items()}
    right, wrong = 0.0, 0.0
    for p, C in weight_similarity(models, spec, perms).items():
        last = found["out_cost"][p]  # of units of the permuted second model
        np.testing.assert_allclose(C[:, perms[p]], last, rtol=0, atol=2e-6 * np.abs(last).max())
        right, wrong = right + C[in_place[p], perms[p]].sum(), wrong + last[in_place[p], perms[p]].sum()
    first = weight_similarity(models, spec, perms)["fc1.weight:0"]
    p = perms["fc1.weight:0"]
    assert first[np.arange(10), p].sum() == pytest.approx(2.065, abs=1e-3)
    assert found["out_cost"]["fc1.weight:0"][np.arange(10), p].sum() == pytest.approx(-0.25, abs=0.01)
    assert right > wrong


# --- By hand ----------------------------------------------------------------------------------------------------------

TWO = Spec({"fc1.weight": ("P", None), "fc2.weight": (None, "P")})
A = {"fc1.weight": np.array([[1.0], [2.0]]), "fc2.weight": np.array([[20.0, 6.0]])}
B = {"fc1.weight": np.array([[1.0], [3.0]]), "fc2.weight": np.array([[8.0, 2.0]])}
C = {"P": np.array([[0.1, 0.9], [0.5, 0.2]])}


def reads(model, x):
    return {"fc1.weight": x, "fc2.weight": np.maximum(x @ model["fc1.weight"].T, 0)}


def test_weights_by_hand():
    x = np.array([[1.0], [2.0]])
    got = pleas([A, B], TWO, C, [[reads(A, x), reads(B, x)]], ratios=0.5)
    assert got.perms["P"].tolist() == [1, 0]
    assert [units.tolist() for units in got.blocks["P"]] == [[0], [1], [1], [0]]
    assert got.merged["fc1.weight"].tolist() == [[2.0], [2.0], [1.0]]  # (1 + 3)/2; 2; 1
    assert got.start["fc2.weight"].tolist() == [[11.0, 3.0, 4.0]]  # (20 + 2)/2; 6/2; 8/2
    # 11 * 2 + 3 * 2 + 4 * 1 = 32 and not (20 + 12 + 8 + 6)/2 = 23, so 9/9 of (2, 2, 1) goes
    np.testing.assert_allclose(got.merged["fc2.weight"], [[9.0, 1.0, 3.0]], atol=1e-12)
    before, after = got.losses["fc2.weight"]
    assert before == pytest.approx((81 + 4 * 81) / 2) and after < 1e-20
    official = pleas([A, B], TWO, C, ratios=0.5, semantics="official")
    assert official.start["fc2.weight"].tolist() == [[11.0, 6.0, 8.0]]


def test_blocks_by_hand():
    C = np.array([[0.1, 0.9, 0.0], [0.5, 0.2, 0.0], [0.0, 0.0, 0.7]])
    p = np.array([1, 0, 2])  # 0.9, 0.5, 0.7
    for ratio, separate in ((0.0, 0), (0.3, 0), (1 / 3, 1), (0.5, 1), (0.7, 2), (0.999, 2), (1.0, 3)):
        b = blocks_of(C, p, ratio)
        assert b.s1.tolist() == [[], [1], [1, 2], [0, 1, 2]][separate] and b.s2.tolist() == p[b.s1].tolist()
    for ratio, separate in ((0.0, 0), (0.3, 1), (0.5, 1), (0.7, 2), (1.0, 2)):
        assert len(blocks_of(C, p, ratio, semantics="official").s1) == separate
    ties = blocks_of(np.ones((6, 6)), np.arange(6), 0.5)
    assert ties.m1.tolist() == [0, 1, 2]
    assert len(blocks_of(np.ones((6, 6)), np.arange(6), 0.5, semantics="official").m1) == 6


def test_what_only_reads_is_averaged_and_biases_too():
    spec = Spec({**TWO.axes, "fc2.bias": (None,)})
    models = [A | {"fc2.bias": np.array([1.0])}, B | {"fc2.bias": np.array([3.0])}]
    assert pleas(models, spec, C).merged["fc2.bias"].tolist() == [2.0]
    assert pleas(models, spec, C, semantics="official").merged["fc2.bias"].tolist() == [1.0]


def test_heads():
    got = pleas([A, B], TWO, C, ratios=0.5, multihead=True)
    assert list(got.merged) == ["fc1.weight"]
    assert [h["fc2.weight"].tolist() for h in got.heads] == [[[20.0, 6.0, 0.0]], [[2.0, 0.0, 8.0]]]


def test_distances():
    one = [{"P": np.array([[0.0, 1.0], [0.0, 1.0]])}, {"P": np.array([[3.0, 1.0], [4.0, 1.0]])}]
    assert distances([one], ["P"])["P"].tolist() == [[-5.0, -(2**0.5)], [-(13**0.5), 0.0]]
    assert distances([one, one], ["P"])["P"][0, 0] == -10.0
    assert inner_products([one], ["P"])["P"].tolist() == [[0.0, 0.0], [7.0, 2.0]]
    assert inner_products([one, one], {"Q": ["P", "P"]})["Q"][1].tolist() == [28.0, 8.0]


def test_work():
    three = {"a": np.ones((4, 3)), "b": np.ones((6, 4)), "c": np.ones((2, 6))}
    spec = Spec({"a": ("P", None), "b": ("Q", "P"), "c": (None, "Q")})
    assert work({}, three, spec) == 12 + 24 + 12
    assert work({"P": 0.5}, three, spec) == 1.5 * 12 + 1.5 * 24 + 12
    assert work({"P": 1.0, "Q": 1.0}, three, spec) == 2 * 48  # two networks side by side
    assert work({"P": 0.5, "Q": 0.5}, three, spec, uses={"a": 10}) == 1.5 * 120 + (1.5 * 1.5 - 0.5) * 24 + 1.5 * 12
    assert max(ratios_for(1.0, three, spec, ["P", "Q"]).values()) < 1e-11
    assert ratios_for(2.0, three, spec, ["P", "Q"]) == {"P": 1.0, "Q": 1.0}
    image = {"a": np.ones((4, 3, 3, 3)), "b": np.ones((6, 4, 3, 3))}
    spec = Spec({"a": ("P", None, None, None), "b": ("Q", "P", None, None)})
    assert work({"P": 0.5, "Q": 0.5}, image, spec) == 1.5 * 108 + 1.75 * 216
    only_b = {"b": np.ones((6, 4))}
    spec = Spec({"b": ("Q", "P")})
    assert ratios_for(1.75, only_b, spec, ["P", "Q"])["P"] == pytest.approx(0.5)  # 1 + 2 r - r^2


# --- Laws -------------------------------------------------------------------------------------------------------------

NETS = {
    "mlp": (mlp, lambda rng: mlp.init(rng, [5, 6, 7, 4]), (5,)),
    "vgg": (vgg, lambda rng: vgg.init(rng, [4, "M", 5, "M"], [6], places=4), (3, 8, 8)),
    "vgg, plain": (vgg, lambda rng: vgg.init(rng, [4, "M", 5], [6], norm=None), (3, 6, 6)),
    "resnet": (resnet, lambda rng: resnet.init(rng, (3, 4), 1), (3, 8, 8)),
}


def drawn(name, seed, samples=20):
    """(forward, two models, their spec, inputs, their taps)."""
    net, init, shape = NETS[name]
    rng = np.random.default_rng(seed)
    models = [init(rng), init(rng)]
    x, taps = rng.normal(size=(samples, *shape)), [Reads(), Reads()]
    for m, t in zip(models, taps):
        net.forward(m, x, t)
    return net.forward, models, architectures.detect(models[0]), x, taps


@pytest.mark.parametrize("name", NETS)
def test_reads(name):
    """What a layer reads, times its weight, is what it gives."""
    _, (model, _), _, _, (taps, _) = drawn(name, 0)
    assert taps.reads.keys() == {n for n, x in model.items() if x.ndim > 1}
    for weight, X in taps.reads.items():
        y = X @ model[weight].reshape(len(model[weight]), -1).T
        np.testing.assert_allclose(y + model.get(weight.replace("weight", "bias"), 0), taps[weight], atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_with_nothing_merged_the_outputs_are_averaged(name):
    forward, models, spec, x, taps = drawn(name, 1)
    got = pleas(models, spec, distances([taps], spec.permutations), [[t.reads for t in taps]], budget=2.0)
    assert set(got.ratios.values()) == {1.0}
    expected = (forward(models[0], x) + forward(models[1], x)) / 2
    np.testing.assert_allclose(forward(got.start, x), expected, atol=1e-12)
    np.testing.assert_allclose(forward(got.merged, x), expected, atol=1e-6)
    assert max(after for _, after in got.losses.values()) < 1e-20
    heads = pleas(models, spec, distances([taps], spec.permutations), budget=2.0, multihead=True)
    for k in range(2):
        np.testing.assert_allclose(forward(heads.merged | heads.heads[k], x), forward(models[k], x), atol=1e-12)


@FEW
@given(st.sampled_from(sorted(NETS)), seeds)
def test_with_all_merged_it_is_the_average_of_aligned_models(name, seed):
    _, models, spec, _, taps = drawn(name, seed)
    got = pleas(models, spec, distances([taps], spec.permutations))
    aligned = spec.apply(got.perms, models[1])
    for tensor, x in refmerge.merge([models[0], aligned], "linear").items():
        np.testing.assert_allclose(got.merged[tensor], x, rtol=0, atol=1e-14)


@FEW
@given(st.sampled_from(sorted(NETS)), seeds)
def test_a_model_with_itself(name, seed):
    _, (model, _), spec, _, (taps, _) = drawn(name, seed)
    got = pleas([model, model], spec, distances([[taps, taps]], spec.permutations), [[taps.reads] * 2])
    if all(np.array_equal(p, np.arange(len(p))) for p in got.perms.values()):  # not: dead units, which are alike
        for tensor, x in model.items():
            np.testing.assert_allclose(got.merged[tensor], x, rtol=0, atol=1e-5)


@FEW
@given(st.sampled_from(sorted(NETS)), seeds, st.floats(0, 1))
def test_least_squares_is_no_worse_and_the_width_is_right(name, seed, ratio):
    _, models, spec, _, taps = drawn(name, seed, samples=6)
    batches = [[t.reads for t in taps]]
    got = pleas(models, spec, distances([taps], spec.permutations), batches, ratios=ratio)
    for tensor, (before, after) in got.losses.items():
        assert after <= before * (1 + 1e-9) + 1e-24, tensor
    for p, n in spec.sizes(models[0]).items():
        tensor, axis = next((t, a) for t, a in spec.uses(p) if t.endswith("weight"))
        assert got.merged[tensor].shape[axis] == n + int(ratio * n + 1e-4)
        assert sorted([*got.blocks[p].m2, *got.blocks[p].s2]) == list(range(n))


@FEW
@given(st.sampled_from(sorted(NETS)), seeds, st.integers(1, 5))
def test_batches_do_not_matter(name, seed, cut):
    _, models, spec, _, taps = drawn(name, seed)

    def parts(t):
        rows = {w: len(X) // 20 for w, X in t.reads.items()}
        return [{w: X[s * rows[w] : e * rows[w]] for w, X in t.reads.items()} for s, e in ((0, cut), (cut, 20))]

    C = distances([taps], spec.permutations)
    whole = pleas(models, spec, C, [[t.reads for t in taps]], ratios=0.5)
    cut_up = pleas(models, spec, C, list(zip(*map(parts, taps))), ratios=0.5)
    for tensor, (_, after) in whole.losses.items():
        assert cut_up.losses[tensor][1] == pytest.approx(after, rel=1e-6, abs=1e-18)


@FEW
@given(seeds, st.floats(0, 1))
def test_each_block_of_outputs_is_a_least_squares_solution_of_its_own(seed, ratio):
    _, models, spec, _, taps = drawn("mlp", seed, samples=60)
    got = pleas(models, spec, distances([taps], spec.permutations), [[t.reads for t in taps]], ratios=ratio)
    merge = {p: matrices(b, len(got.perms[p]))[0] for p, b in got.blocks.items()}
    X, Y = system([t.reads["layers.1.weight"] for t in taps], "layers.1.weight", models, spec, merge)
    free = allowed("layers.1.weight", models, spec, merge)
    W, b = got.merged["layers.1.weight"], got.merged["layers.1.bias"]
    assert not W[~free].any() and (free.all() or ratio > 0)
    loss = np.mean((X @ W.T + b - Y) ** 2)
    for i in range(len(W)):
        Z = np.column_stack([X[:, free[i]], np.ones(len(X))])
        best, *_ = np.linalg.lstsq(Z, Y[:, i], rcond=None)
        assert np.mean((X @ W[i] + b[i] - Y[:, i]) ** 2) <= np.mean((Z @ best - Y[:, i]) ** 2) + 1e-9 * max(loss, 1e-12)


def test_the_nearest_solution():
    """With fewer samples than inputs there are many. As with gradient descent from the start, the step of each row lies in
    what the rows of inputs span, and ends where the gradient is 0."""
    _, models, spec, _, taps = drawn("mlp", 3, samples=4)
    got = pleas(models, spec, distances([taps], spec.permutations), [[t.reads for t in taps]], ratios=0.5)
    merge = {p: matrices(b, len(got.perms[p]))[0] for p, b in got.blocks.items()}
    for name in ("layers.1.weight", "layers.2.weight"):
        bias = name.replace("weight", "bias")
        X, Y = system([t.reads[name] for t in taps], name, models, spec, merge)
        X, free = np.column_stack([X, np.ones(4)]), allowed(name, models, spec, merge)
        theta, start = (np.column_stack([m[name], m[bias]]) for m in (got.merged, got.start))
        for i, kind in enumerate(np.column_stack([free, np.ones(len(free), bool)])):
            rows, step = X[:, kind], (theta - start)[i, kind]
            assert len(step) > 4 and np.abs(step).max() > 1e-3
            np.testing.assert_allclose(step @ np.linalg.pinv(rows) @ rows, step, atol=1e-9)
            np.testing.assert_allclose((rows @ theta[i, kind] - Y[:, i]) @ rows, 0, atol=1e-9)


@FEW
@given(seeds, st.floats(0, 1))
def test_the_order_of_the_second_models_units_does_not_matter(seed, ratio):
    forward, models, spec, x, taps = drawn("mlp", seed)
    moved = spec.apply(spec.random(models[1], np.random.default_rng(seed)), models[1])
    forward(moved, x, other := Reads())
    a = pleas(models, spec, distances([taps], spec.permutations), ratios=ratio)
    b = pleas([models[0], moved], spec, distances([[taps[0], other]], spec.permutations), ratios=ratio)
    alive = all((taps[k][p].var(axis=0) > 0).all() for k in range(2) for p in spec.permutations)
    if alive:
        for tensor, w in a.merged.items():
            np.testing.assert_allclose(b.merged[tensor], w, atol=1e-14)


@FEW
@given(st.sampled_from(sorted(NETS)), st.floats(1, 2), seeds)
def test_budgets_are_kept(name, budget, seed):
    _, (model, _), spec, _, _ = drawn(name, 0)
    names = spec.permutations
    weights = dict(zip(names, np.random.default_rng(seed).uniform(0, 1, len(names))))
    one = ratios_for(budget, model, spec, names)
    best = ratios_for(budget, model, spec, names, importance=weights)
    for shares in (one, best):
        assert work(shares, model, spec) <= budget * work({}, model, spec) * (1 + 1e-8)
        assert all(0 <= r <= 1 for r in shares.values())
    assert sum(weights[p] * best[p] for p in names) >= sum(weights[p] * one[p] for p in names) - 1e-12


def test_transposed_and_bfloat16_and_files(tmp_path):
    import ml_dtypes

    spec = Spec({"fc1.weight": (None, "P"), "fc2.weight": ("P", None)})
    for i, m in enumerate((A, B)):
        save({n: np.ascontiguousarray(x.T).astype(ml_dtypes.bfloat16) for n, x in m.items()}, tmp_path / f"{i}.safetensors")
    x = np.array([[1.0], [2.0]])
    with open_checkpoint(tmp_path / "0.safetensors") as a, open_checkpoint(tmp_path / "1.safetensors") as b:
        got = pleas([a, b], spec, C, [[reads(A, x), reads(B, x)]], ratios=0.5, transposed=("fc1.weight", "fc2.weight"))
    assert got.merged["fc2.weight"].dtype == ml_dtypes.bfloat16
    assert got.merged["fc1.weight"].astype(float).tolist() == [[2.0, 2.0, 1.0]]
    assert got.merged["fc2.weight"].astype(float).tolist() == [[9.0], [1.0], [3.0]]


def test_integers_stay():
    spec = Spec({**TWO.axes, "steps": ()})
    models = [m | {"steps": np.array(3)} for m in (A, B)]
    assert pleas(models, spec, C, semantics="official").merged["steps"] == 3


INFINITE = {"P": np.full((2, 2), np.inf)}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pleas([A], TWO, C), "two models"),
        (lambda: pleas([A, B], TWO, C, semantics="code"), "semantics 'paper' or 'official'"),
        (lambda: pleas([A, B], TWO, INFINITE), r"similarity 'P' is \[2, 2\], not finite numbers for 2 units"),
        (lambda: pleas([A, B], TWO, C, perms={"P": [0, 0]}), r"perms\['P'\] does not hold each of 0 ... 1 once"),
        (lambda: pleas([A, B], TWO, C, ratios=1.5), "ratio = 1.5 is a share"),
        (lambda: pleas([A, B], TWO, C, ratios={"Q": 0.5}), "ratios has nothing for permutation 'P'"),
        (lambda: pleas([A, B], TWO, C, importance={}), "importance has nothing for permutation 'P'"),
        (lambda: pleas([A, B], TWO, C, budget=0.5), "budget = 0.5 .* at least 1"),
        (lambda: pleas([A, B], TWO, C, [[{"fc2.weight": np.ones((3, 3))}] * 2]), r"'fc2.weight' are of shape \[3, 3\]"),
        (lambda: pleas([A, B], TWO, C, [[{"fc2.weight": np.full((3, 2), np.nan)}] * 2]), "infinite or NaN"),
        (lambda: distances([], ["P"]), "no samples"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(UsageError, match=said):
        call()
