"""REPAIR: results of the authors' notebook, of torch's batch norms, numbers by hand, and laws.

tests/data/repair.npz holds what the cells of KellerJordan/REPAIR@e90263d notebooks/Train-Merge-REPAIR-VGG11.ipynb gave on a
CPU for two convolutions with ReLU: correlations, permutations, the second model aligned, goals, the statistics of the added
norms, and the repaired model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import UsageError, registry
from refmerge.nets import mlp, resnet, vgg
from refmerge.nets.layers import Layers, relu
from refmerge.procedures.alignment.git_rebasin import assignment
from refmerge.procedures.alignment.repair import batch_correlation, closed_form, statistics_of
from refmerge.symmetry import Spec, architectures

repair = registry.procedure("repair")
FEW = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
OFFICIAL = np.load(Path(__file__).parent / "data" / "repair.npz")


# --- The authors' notebook --------------------------------------------------------------------------------------------


def two_convolutions(params, batch, taps=None):
    net, x = Layers(params, taps), batch
    for name in ("0", "2"):
        x = net.units(name, relu(net.conv(name, x, padding=1)), axis=1)
    return x


def group(name):
    return {key.partition("/")[2]: OFFICIAL[key] for key in OFFICIAL.files if key.startswith(f"{name}/")}


def test_a_constant_unit_is_correlated_with_nothing():
    """0.1 squared and averaged three times is less than the square of their average, by one rounding."""
    x = np.column_stack([np.full(3, 0.1), [1.0, 2.0, 3.0]])
    with np.errstate(all="raise"):
        found = batch_correlation([x], [x])
    assert np.abs(found[0]).max() < 1e-9 and found[1, 1] > 0.99


def test_official():
    a, b, out = group("model0"), group("model1"), group("out")
    batches = np.split(group("stat")["inputs"].astype(float), np.cumsum(group("stat")["batch_sizes"])[:-1])
    spec = Spec(
        {"0.weight": ("0", None, None, None), "0.bias": ("0",), "2.weight": ("2", "0", None, None), "2.bias": ("2",)}
    )

    def activations(model, name):
        for x in batches:
            two_convolutions({n: w.astype(float) for n, w in model.items()}, x, taps := {})
            yield taps[name]

    perms = {}
    for p in ("0", "2"):
        corr = batch_correlation(activations(a, p), activations(b, p))
        np.testing.assert_allclose(corr, group("out_corr")[p], rtol=0, atol=1e-6)
        perms[p] = assignment(corr)
        assert np.array_equal(perms[p], group("perm")[p])
    aligned = spec.apply(perms, b)
    for name, x in group("aligned1").items():
        assert np.array_equal(aligned[name], x)
    merged = refmerge.merge([a, aligned], "linear")
    got = repair(merged, [a, aligned], two_convolutions, batches, layers={"0": "0.weight", "2": "2.weight"})
    for p in ("0", "2"):
        for mine, theirs in (
            (got.goal[p][0], group("out_goal")[f"{p}.mean"]), (got.goal[p][1], group("out_goal")[f"{p}.std"]),
            (got.measured[p].mean, group("out_bn")[f"{p}.running_mean"]),
            (got.measured[p].var, group("out_bn")[f"{p}.running_var"]),
        ):  # fmt: skip
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
    for name, x in out.items():
        assert got.model[name].dtype == np.float32
        np.testing.assert_allclose(got.model[name], x, rtol=0, atol=2e-6 * np.abs(x).max())


def test_torch_resets_norms_alike():
    """momentum None, reset, train mode: three batches of different sizes."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    rng = np.random.default_rng(0)
    params = vgg.init(rng, [4, 5, "M"], norm="batch")
    features = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.BatchNorm2d(5),
    ]
    net = nn.Sequential(*features).double()
    state = {n.removeprefix("features."): torch.from_numpy(x) for n, x in params.items() if n.startswith("features.")}
    net.load_state_dict(state, strict=False)
    batches = [rng.normal(size=(n, 3, 6, 6)) for n in (5, 2, 3)]
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    with torch.no_grad():
        for x in batches:
            net.train()(torch.from_numpy(x))
    got = repair(params, [], vgg.forward, batches)
    assert list(got.measured) == ["features.1", "features.4"] and got.goal == {}
    for name, x in net.state_dict().items():
        if "num_batches" not in name:
            np.testing.assert_allclose(got.model[f"features.{name}"], x.numpy(), atol=1e-12)


def test_torch_repairs_alike():
    """Norms put behind the layers, in train mode, and fused."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    rng = np.random.default_rng(1)
    a, b = (mlp.init(rng, [5, 4, 6, 3]) for _ in range(2))
    batches = [rng.normal(size=(n, 5)) for n in (9, 4)]
    merged = refmerge.merge([a, b], "linear")
    alpha = 0.25
    stats = [statistics_of(m, mlp.forward, batches, ["layers.0.weight", "layers.1.weight"]) for m in (a, b)]
    layers = []
    for name in ("layers.0", "layers.1"):
        linear, norm = nn.Linear(*merged[f"{name}.weight"].shape[::-1]), nn.BatchNorm1d(len(merged[f"{name}.bias"]))
        norm.momentum = None
        first, second = (s[f"{name}.weight"] for s in stats)
        for parameter, x in (
            (linear.weight, merged[f"{name}.weight"]), (linear.bias, merged[f"{name}.bias"]),
            (norm.weight, (1 - alpha) * first.var**0.5 + alpha * second.var**0.5),
            (norm.bias, (1 - alpha) * first.mean + alpha * second.mean),
        ):  # fmt: skip
            parameter.data = torch.from_numpy(x)
        layers += [linear, norm, nn.ReLU()]
    net = nn.Sequential(*layers).double().train()
    with torch.no_grad():
        for x in batches:
            net(torch.from_numpy(x))
        got = repair(merged, [a, b], mlp.forward, batches, alpha=alpha)
        assert list(got.measured) == ["layers.0", "layers.1"]
        x = rng.normal(size=(7, 5))
        hidden = net.eval()(torch.from_numpy(x)).numpy()
    expected = hidden @ merged["layers.2.weight"].T + merged["layers.2.bias"]
    np.testing.assert_allclose(mlp.forward(got.model, x), expected, atol=1e-12)


# --- By hand ----------------------------------------------------------------------------------------------------------

X = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
FIRST = {"fc.weight": np.array([[6.0, 8.0], [3.0, 4.0]]), "fc.bias": np.array([1.0, 5.0])}
SECOND = {"fc.weight": np.array([[6.0, -8.0], [3.0, 4.0]]), "fc.bias": np.array([3.0, 5.0])}


def one_layer(params, batch, taps=None):
    y = batch @ params["fc.weight"].T + params["fc.bias"]
    if taps is not None:
        taps["fc.weight"] = y
    return y


def test_by_hand():
    """Deviations of 10 and 10 average to 6: the row grows by 10/6. The second unit is the same in both."""
    merged = refmerge.merge([FIRST, SECOND], "linear")
    got = repair(merged, [FIRST, SECOND], one_layer, [X], layers={"fc": "fc.weight"}, eps=0.0)
    np.testing.assert_allclose(got.model["fc.weight"], [[10.0, 0.0], [3.0, 4.0]], atol=1e-12)
    np.testing.assert_allclose(got.model["fc.bias"], [2.0, 5.0], atol=1e-12)
    mean, std = got.goal["fc"]
    np.testing.assert_allclose(mean, [2.0, 5.0])
    np.testing.assert_allclose(std, np.array([10.0, 5.0]) * (4 / 3) ** 0.5)  # unbiased
    np.testing.assert_allclose(got.measured["fc"].var, np.array([36.0, 25.0]) * 4 / 3)


def test_a_dead_unit():
    """It stays finite, and gives the goal's mean: what it gave is constant, and so is what it gives."""
    merged = {"fc.weight": np.array([[0.0, 0.0], [3.0, 4.0]]), "fc.bias": np.array([7.0, 5.0])}
    got = repair(merged, [FIRST, SECOND], one_layer, [X], layers={"fc": "fc.weight"})
    assert got.model["fc.weight"][0].tolist() == [0.0, 0.0] and got.model["fc.bias"][0] == 2.0


def test_every_batch_counts_alike():
    batches = [X[:2], np.concatenate([X, X])]
    got = statistics_of(FIRST, one_layer, batches, ["fc.weight"])["fc.weight"]
    # unit 0: 14, -2 and 14, -2, 2, -14 twice, without the bias: means 6 and 0, variances 128 and 100 * 8/7
    assert got.mean[0] == pytest.approx(1 + 3) and got.var[0] == pytest.approx((128 + 800 / 7) / 2)


# --- Laws -------------------------------------------------------------------------------------------------------------


def plain(rng, channels=(4, "M", 5)):
    return vgg.init(rng, channels, [6], norm=None)


@FEW
@given(seeds)
def test_a_model_that_is_right_stays(seed):
    rng = np.random.default_rng(seed)
    model, x = plain(rng), rng.normal(size=(6, 3, 6, 6))
    got = repair(model, [model, model], vgg.forward, [x], eps=0.0)
    assert list(got.measured) == ["features.0", "features.3", "classifier.0"]
    first = got.model["features.0.weight"]
    np.testing.assert_allclose(first, model["features.0.weight"], rtol=1e-10)
    # each layer reads what a layer gives whose batches were normed by their biased variance: n - 1 over n is not 1
    np.testing.assert_allclose(vgg.forward(got.model, x), vgg.forward(model, x), rtol=0.2, atol=0.2)


@FEW
@given(seeds, st.floats(0, 1))
def test_the_first_layer_has_the_goals_statistics(seed, alpha):
    rng = np.random.default_rng(seed)
    a, b = plain(rng), plain(rng)
    batches = [rng.normal(size=(n, 3, 6, 6)) for n in (4, 7)]
    merged = refmerge.merge([a, b], "linear", weight=[1 - alpha, alpha], normalize=False)
    got = repair(merged, [a, b], vgg.forward, batches, alpha=alpha, eps=0.0)
    now = statistics_of(got.model, vgg.forward, batches, ["features.0.weight"])["features.0.weight"]
    mean, std = got.goal["features.0"]
    np.testing.assert_allclose(now.mean, mean, atol=1e-12)
    np.testing.assert_allclose(np.sqrt(now.var), std, atol=1e-12)


@FEW
@given(seeds, st.sampled_from(["plain", "norms"]))
def test_the_scale_of_a_merged_layer_does_not_matter(seed, kind):
    rng = np.random.default_rng(seed)
    if kind == "plain":
        a, b, merged = plain(rng), plain(rng), plain(rng)
        scaled = dict(merged)
        c = np.exp(rng.normal(size=5))
        scaled["features.3.weight"] = c[:, None, None, None] * merged["features.3.weight"]
        scaled["features.3.bias"] = c * merged["features.3.bias"] + rng.normal(size=5)  # nor does its mean
    else:
        a = b = merged = vgg.init(rng, [4, "M", 5], [6])
        keys = [f"features.{i}.running_{what}" for i in (1, 5) for what in ("mean", "var")]
        scaled = merged | {key: np.exp(rng.normal(size=merged[key].shape)) for key in keys if key in merged}
    x = [rng.normal(size=(n, 3, 6, 6)) for n in (4, 3)]
    one, other = (repair(m, [a, b], vgg.forward, x, eps=0.0).model for m in (merged, scaled))
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-9, atol=1e-12)


@FEW
@given(seeds)
def test_units_may_be_permuted(seed):
    rng = np.random.default_rng(seed)
    a, b = (vgg.init(rng, [4, "M", 5], [6], norm=None) for _ in range(2))
    merged, spec = refmerge.merge([a, b], "linear"), architectures.vgg(a)
    perms, x = spec.random(a, rng), [rng.normal(size=(5, 3, 6, 6))]
    one = repair(merged, [a, b], vgg.forward, x).model
    other = repair(*(f for f in (spec.apply(perms, merged), [spec.apply(perms, m) for m in (a, b)])), vgg.forward, x).model
    for name, w in spec.apply(perms, one).items():
        np.testing.assert_allclose(other[name], w, atol=1e-10)


def test_norms_of_a_residual_network():
    """All norms, those of shortcuts too; with one batch, its outputs are normed exactly."""
    rng = np.random.default_rng(0)
    model, x = resnet.init(rng, (3, 4), 1), rng.normal(size=(8, 3, 8, 8))
    got = repair(model, [], resnet.forward, [x])
    norms = {n.removesuffix(".running_var") for n in model if n.endswith("running_var")}
    assert got.measured.keys() == norms
    resnet.forward(got.model, x, taps := {})
    n = len(taps["bn1.weight"])
    np.testing.assert_allclose(taps["bn1.weight"].mean(axis=0), model["bn1.bias"], atol=1e-12)
    expected = np.abs(model["bn1.weight"]) * (1 - 1 / n) ** 0.5
    np.testing.assert_allclose(taps["bn1.weight"].std(axis=0), expected, rtol=1e-3)


def test_averaging_loses_variance_and_repair_brings_it_back():
    rng = np.random.default_rng(0)
    a, b = (mlp.init(rng, [20, 40, 40, 40, 5]) for _ in range(2))
    x = rng.normal(size=(500, 20))
    merged = refmerge.merge([a, b], "linear")
    got = repair(merged, [a, b], mlp.forward, [x])
    taps = ["layers.0.weight", "layers.2.weight"]
    spread = {}
    for name, m in (("a", a), ("merged", merged), ("repaired", got.model)):
        spread[name] = [np.sqrt(s.var).mean() for s in statistics_of(m, mlp.forward, [x], taps).values()]
    assert spread["merged"][1] < 0.6 * spread["a"][1] < spread["repaired"][1]


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batches": []}, "no batches"),
        ({"parents": [FIRST]}, "'fc' has no norm with running statistics: its goal needs both parents"),
        ({"layers": {"fc": "fc.out"}}, "there are no activations of 'fc.out', but of fc.weight"),
        ({"layers": {"fd": "fc.weight"}}, "the model has no fd.weight"),
        ({"layers": {}}, "forward taps no layers"),
        ({"batches": [X[:1]]}, "a batch has one row of 'fc.weight'"),
        ({"batches": [X * np.inf]}, "infinite or NaN"),
        ({"merged": {"fc.weight": FIRST["fc.weight"]}}, "layer 'fc' has no bias"),
    ],
)
def test_refusals(change, said):
    call = {"merged": FIRST, "parents": [FIRST, SECOND], "batches": [X], "layers": {"fc": "fc.weight"}} | change
    with np.errstate(invalid="ignore"), pytest.raises(UsageError, match=said):
        repair(call["merged"], call["parents"], one_layer, call["batches"], layers=call["layers"])


def test_a_norm_needs_a_tap_before_it():
    def forward(params, batch, taps=None):
        return Layers(params, taps).norm("bn", batch)

    model = {f"bn.{key}": np.ones(2) for key in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(UsageError, match="no tap has what norm 'bn' reads"):
        repair(model, [], forward, [X])


def test_correlation_by_the_batches_own_deviations():
    """5 / (2 + eps) of a unit with itself that is 0, 2 and 4, 6; with its negative the same below 0."""
    x = [np.array([[0.0, 0.0], [2.0, -2.0]]), np.array([[4.0, -4.0], [6.0, -6.0]])]
    found = batch_correlation(x, x, deviations="batches")
    np.testing.assert_allclose(found, np.array([[1, -1], [-1, 1]]) * 5 / 2.0001, rtol=1e-12)
    np.testing.assert_allclose(batch_correlation(x, x), np.array([[1, -1], [-1, 1]]) * 5 / 5.0001, rtol=1e-12)
    for batches, how, said in (
        (x, "all", "none of 'moments', 'batches'"), ([], "moments", "no batches"), ([x[0][:1]], "batches", "one row"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            batch_correlation(batches, batches, deviations=how)


def linear(params, batch, taps):
    taps["fc.weight"] = batch @ params["fc.weight"].T + params["fc.bias"]


FOUR = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def test_closed_form_by_hand():
    """(6, 8) and (6, -8) have the deviation 10 and the correlation -0.28, so that of the average is 6."""
    a = {"fc.weight": np.array([[6.0, 8.0], [3.0, 4.0]]), "fc.bias": np.array([1.0, 5.0])}
    b = {"fc.weight": np.array([[6.0, -8.0], [3.0, 4.0]]), "fc.bias": np.array([3.0, 5.0])}
    merged = refmerge.merge([a, b], "linear")
    layers = {"fc": "fc.weight"}
    got = closed_form(merged, [a, b], linear, [FOUR], layers=layers)
    np.testing.assert_allclose(got.model["fc.weight"], [[10, 0], [3, 4]], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.model["fc.bias"], [2, 5], rtol=1e-12)
    np.testing.assert_allclose(got.measured["fc"].var, np.array([36.0, 25.0]) * 4 / 3, rtol=1e-12)
    # a correlation of 0 is told: 10 over the root of 50, and the root of 1 + 3 under it
    told = closed_form(merged, [a, b], linear, [FOUR], layers=layers, correlation={"fc": [0.0, 1.0]}, eps=3.0)
    np.testing.assert_allclose(told.model["fc.weight"], [[6 * 2**0.5 / 2, 0], [1.5, 2]], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(told.model["fc.bias"], [2 - 2**0.5 * 2 + 2**0.5 / 2 * 2, 2.5], rtol=1e-12)


def test_closed_form_of_units_that_cancel():
    a = {"fc.weight": np.array([[1.0, 0.0]]), "fc.bias": np.array([2.0])}
    b = {"fc.weight": np.array([[-1.0, 0.0]]), "fc.bias": np.array([4.0])}
    got = closed_form(refmerge.merge([a, b], "linear"), [a, b], linear, [FOUR], layers={"fc": "fc.weight"})
    assert got.model["fc.weight"].tolist() == [[0.0, 0.0]] and got.model["fc.bias"].tolist() == [3.0]


@FEW
@given(seeds, st.floats(0, 1))
def test_closed_form_is_repair_in_the_first_layer(seed, alpha):
    rng = np.random.default_rng(seed)
    a, b = (mlp.init(rng, [5, 4, 3]) for _ in range(2))
    x = rng.normal(size=(30, 5))
    merged = refmerge.merge([a, b], "linear", weight=[1 - alpha, alpha], normalize=False)
    one = closed_form(merged, [a, b], mlp.forward, [x], alpha=alpha)
    other = repair(merged, [a, b], mlp.forward, [x], alpha=alpha, eps=0.0)
    for name in merged:
        np.testing.assert_allclose(one.model[name], other.model[name], rtol=1e-7, atol=1e-9)


def test_refusals_of_closed_form():
    a = {"fc.weight": np.eye(2), "fc.bias": np.zeros(2)}
    layers = {"fc": "fc.weight"}
    for given_, said in (({"correlation": {}}, "nothing for layer 'fc'"), ({"correlation": {"fc": [1.0]}}, "for 2 units")):
        with pytest.raises(UsageError, match=said):
            closed_form(a, [a, a], linear, [FOUR], layers=layers, **given_)
    with pytest.raises(UsageError, match="no batches"):
        closed_form(a, [a, a], linear, [], layers=layers)
    model = resnet.init(np.random.default_rng(0), (4, 8), 1)
    with pytest.raises(UsageError, match="is a norm, whose statistics are measured"):
        closed_form(model, [model, model], resnet.forward, [np.zeros((2, 3, 8, 8))])
