"""Coefficients that data choose: the trajectories of the authors' code, providers against each other, by hand, and laws."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import refmerge
from refmerge import InputError, UsageError, registry
from refmerge.adaptive import (
    Adam,
    Coefficients,
    Composition,
    Step,
    blocks,
    contracted,
    cosine,
    cross_entropy,
    differences,
    entropy,
    log_softmax,
)  # fmt: skip
from refmerge.nets import mlp
from refmerge.numeric import array_namespace
from refmerge.procedures.data_driven.atlas import lp_norm, tangent
from refmerge.procedures.data_driven.model_tinting import confident
from refmerge.recipe.plan import load_recipe, resolve

adamerging, model_tinting, atlas = map(registry.procedure, ("adamerging", "model_tinting", "atlas"))
DATA = Path(__file__).parent / "data"

# --- The authors' trajectories ----------------------------------------------------------------------------------------
#
# The data files have the models, batches and heads, and the raw coefficients and losses of every step that the code named in
# `source` took in float64. The network: z = W2 LN(tanh(W1 x + b1)), a head's logits W z / |z| + b.

ORDER = ["scale_unused", "fc1.weight", "fc1.bias", "ln.weight", "ln.bias", "fc2.weight"]
unused = pytest.mark.filterwarnings("ignore:.*does not depend on")


def features(params, x):
    xp = array_namespace(x)
    h = xp.tanh(x @ xp.matrix_transpose(params["fc1.weight"]) + params["fc1.bias"])
    m = xp.mean(h, axis=-1, keepdims=True)
    h = (h - m) / xp.sqrt(xp.mean((h - m) ** 2, axis=-1, keepdims=True) + 1e-5)
    return (h * params["ln.weight"] + params["ln.bias"]) @ xp.matrix_transpose(params["fc2.weight"])


def with_head(head, z):
    xp = array_namespace(z)
    y = z / xp.sqrt(xp.sum(z * z, axis=-1, keepdims=True)) @ xp.matrix_transpose(head["head.weight"])
    return y + head["head.bias"] if "head.bias" in head else y


def case(method, tag, library):
    """params, base, models, statistics and traces of one run."""
    with np.load(DATA / f"{method}.npz") as file:
        found = {key.partition("/")[2]: file[key] for key in file.files if key.partition("/")[0] == tag}

    def part(prefix):
        named = {k.partition("/")[2]: v for k, v in found.items() if k.partition("/")[0] == prefix}
        return {k: library.array(v) if v.dtype.kind == "f" else v for k, v in named.items()}

    def parts(prefix):
        count = len({k.partition("/")[0] for k in found if k.startswith(prefix)})
        return [part(f"{prefix}{k}") for k in range(count)]

    traces = {k: v for k, v in found.items() if k.startswith(("trace/", "out/"))}
    return json.loads(str(found["params"])), part("base"), parts("model"), parts("stat"), traces


def tags(method):
    with np.load(DATA / f"{method}.npz") as file:
        return sorted({key.partition("/")[0] for key in file.files})


@pytest.fixture(params=["numpy", "torch"])
def exact(request):
    """Differences on NumPy, autograd on torch."""
    from tests.conftest import open_library

    return open_library(request.param)


def in_order(fit, path):
    rows = range(1) if fit.coefficients.labels == ("model",) else [fit.coefficients.labels.index(name) for name in ORDER]
    return np.stack(path)[:, list(rows)]


@unused
@pytest.mark.parametrize("tag", tags("adamerging"))
def test_adamerging_goes_where_the_authors_code_goes(tag, exact):
    params, base, models, stats, trace = case("adamerging", tag, exact)
    n = params["batches_per_task_per_step"]
    steps = [[(k, s["batches"][n * i + j]) for k, s in enumerate(stats) for j in range(n)] for i in range(params["steps"])]
    options = {
        "eps": params.get("entropy_eps", 0.0),
        "clamp": params["clamp"] and tuple(params["clamp"]),
        "lr": params["lr"],
    }
    if params.get("ties_keep_percent"):
        options["density"] = params["ties_keep_percent"] / 100
    fit = adamerging(
        models, base, lambda p, task, x: with_head(stats[task], features(p, x)), steps,
        per="model" if params["variant"].startswith("task") else "tensor", **options,
    )  # fmt: skip
    path = in_order(fit, fit.path)
    expected = trace["trace/lambda_raw"]
    assert np.abs(path - (expected if expected.shape == path.shape else expected.transpose(0, 2, 1))).max() < 1e-7
    assert np.abs(np.array(fit.losses) - trace["trace/loss"]).max() < 1e-7


@unused
@pytest.mark.parametrize("tag", tags("model_tinting"))
def test_model_tinting_goes_where_the_authors_code_goes(tag, exact):
    params, base, models, stats, trace = case("model_tinting", tag, exact)
    heads = [{k: v for k, v in s.items() if k.startswith("head.")} for s in stats]
    steps = [(k, stats[k]["batches"][i]) for i, order in enumerate(params["task_order"]) for k in order]
    fit = model_tinting(
        models, heads, base, lambda p, head, x: with_head(head, features(p, x)), steps, lr=params["lr"],
        clamp=params["clamp"] and tuple(params["clamp"]),
    )  # fmt: skip
    assert np.abs(in_order(fit, fit.path[:: len(models)]) - trace["trace/lambda_raw"]).max() < 1e-7
    assert np.abs(np.array(fit.losses) - trace["trace/loss"]).max() < 1e-7
    for k in range(len(models)):
        for key in ("weight", "bias"):
            assert np.abs(fit.trained[f"{k}/head.{key}"] - trace[f"out/head{k}.{key}"]).max() < 1e-7


@unused
@pytest.mark.parametrize("tag", tags("atlas"))
def test_atlas_goes_where_the_authors_code_goes(tag, exact):
    params, base, models, stats, trace = case("atlas", tag, exact)
    steps = [[(k, (s["batches"][i], s["labels"][i])) for k, s in enumerate(stats)] for i in range(params["steps"])]
    sign = (-1, 1) if params["mode"] == "negation" else (1,) * len(stats)
    fit = atlas(
        models, base, lambda p, task, batch: with_head(stats[task], features(p, batch[0])), steps,
        loss=lambda z, task, batch: sign[task] * cross_entropy(z, batch[1]), lr=params["lr"],
        weight_decay=params["weight_decay"], clip=params["clip_grad_norm"], lp=params["lp_reg"],
    )  # fmt: skip
    assert np.abs(in_order(fit, fit.path).transpose(0, 2, 1) - trace["trace/coef"]).max() < 1e-7
    assert np.abs(np.array(fit.losses) - trace["trace/loss"]).max() < 1e-7


# --- Providers against each other -------------------------------------------------------------------------------------


def toy(seed, models=3, kind=np.float64):
    draw = np.random.default_rng(seed)
    base = {k: v.astype(kind) for k, v in mlp.init(draw, [4, 5, 3]).items()}
    tuned = [{k: (v + 0.3 * draw.standard_normal(v.shape)).astype(kind) for k, v in base.items()} for _ in range(models)]
    return base, tuned, draw.standard_normal((models, 6, 4)).astype(kind), draw.integers(0, 3, (models, 6))


def smooth(params, x):
    xp = array_namespace(x)
    return mlp.forward(params, x, activation=xp.tanh)


def by_hand(params, x, y):
    """Loss and gradients of that network, by the chain rule."""
    h = np.tanh(x @ params["layers.0.weight"].T + params["layers.0.bias"])
    z = h @ params["layers.1.weight"].T + params["layers.1.bias"]
    dz = (np.exp(log_softmax(z)) - np.eye(3)[y]) / len(x)
    da = dz @ params["layers.1.weight"] * (1 - h * h)
    return cross_entropy(z, y), {
        "layers.1.weight": dz.T @ h, "layers.1.bias": dz.sum(0), "layers.0.weight": da.T @ x, "layers.0.bias": da.sum(0),
    }  # fmt: skip


def gradients_of(seed, per, torch=None):
    base, models, x, y = toy(seed)
    c = np.random.default_rng(seed).uniform(0, 0.6, ({"tensor": 4, "model": 1}[per], 3))

    def step(convert):
        tau = [{k: convert(m[k] - base[k]) for k in base} for m in models]
        start = {k: convert(v) for k, v in base.items()}
        composition = Composition(start, tau, *blocks(sorted(base), per, "x"))
        examples = [(k, (convert(x[k]), y[k])) for k in range(3)]
        return Step(composition, examples, lambda p, _, task, batch: cross_entropy(smooth(p, batch[0]), batch[1]))

    numpy = step(lambda v: v)
    own = contracted(lambda p, task, batch: by_hand(p, *batch))
    found = [differences(numpy, {"coefficients": c}), own(numpy, {"coefficients": c})]
    if torch is not None:
        from refmerge.adaptive import autograd

        found.append(autograd(step(torch.tensor), {"coefficients": c}))
    return found


@pytest.mark.parametrize("per", ["tensor", "model"])
@pytest.mark.parametrize("seed", range(3))
def test_providers_agree(seed, per, torch):
    (value, g), (value_own, own), (value_torch, auto) = gradients_of(seed, per, torch)
    assert abs(value - value_torch) < 1e-14 and abs(value - value_own) < 1e-14
    assert np.abs(auto["coefficients"] - own["coefficients"]).max() < 1e-14
    assert np.abs(g["coefficients"] - own["coefficients"]).max() < 1e-9


def test_jax_agrees():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    from refmerge.adaptive import jax_grad

    base, models, x, y = toy(0)
    results = []
    for convert, provider in ((np.asarray, differences), (jax.numpy.asarray, jax_grad)):
        tau = [{k: convert(m[k] - base[k]) for k in base} for m in models]
        composition = Composition({k: convert(v) for k, v in base.items()}, tau, *blocks(sorted(base), "tensor", "x"))
        loss = lambda p, _, task, batch: cross_entropy(smooth(p, batch[0]), batch[1])  # noqa: E731
        step = Step(composition, [(k, (convert(x[k]), y[k])) for k in range(3)], loss)
        results.append(provider(step, {"coefficients": np.full((4, 3), 0.3)}))
    assert abs(results[0][0] - results[1][0]) < 1e-12
    assert np.abs(results[0][1]["coefficients"] - results[1][1]["coefficients"]).max() < 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_the_gradient_of_a_model_is_the_sum_over_its_tensors(seed):
    _, (_, whole) = gradients_of(seed, "model")
    base, models, x, y = toy(seed)
    c = np.random.default_rng(seed).uniform(0, 0.6, (1, 3))
    tau = [{k: m[k] - base[k] for k in base} for m in models]
    composition = Composition(base, tau, *blocks(sorted(base), "tensor", "x"))
    own = contracted(lambda p, task, batch: by_hand(p, *batch))
    _, parts = own(Step(composition, [(k, (x[k], y[k])) for k in range(3)], None), {"coefficients": np.repeat(c, 4, 0)})
    assert np.allclose(parts["coefficients"].sum(0), whole["coefficients"][0], rtol=1e-12, atol=1e-14)


def test_differences_are_for_float64():
    base, models, x, _ = toy(0, kind=np.float32)
    with pytest.raises(UsageError, match="differences need models in float64"):
        adamerging(models, base, lambda p, task, x: smooth(p, x), [[(0, x[0])]])


def test_float32_goes_by_torch(torch):
    base, models, x, _ = toy(1, kind=np.float32)
    convert = lambda tree: {k: torch.tensor(v) for k, v in tree.items()}  # noqa: E731
    steps = [[(k, torch.tensor(x[k])) for k in range(3)]] * 4
    fit = adamerging([*map(convert, models)], convert(base), lambda p, task, x: smooth(p, x), steps)
    assert fit.merge([*map(convert, models)], convert(base))["layers.0.weight"].dtype == torch.float32
    base, models, x, _ = toy(1)
    wide = adamerging(models, base, lambda p, task, x: smooth(p, x), [[(k, x[k]) for k in range(3)]] * 4)
    assert np.abs(fit.raw - wide.raw).max() < 1e-5
    assert fit.merge([*map(convert, models)], convert(base))["layers.0.weight"].dtype == torch.float64


# --- Losses and Adam --------------------------------------------------------------------------------------------------


def test_entropy_of_what_is_certain():
    z = np.array([[0.0, -np.inf], [0.0, 0.0]])
    assert entropy(z) == pytest.approx(0.5 * np.log(2))
    assert entropy(z[:1], eps=1e-8) == pytest.approx(-1e-8, rel=1e-6)


def test_adam_is_torchs(torch):
    draw = np.random.default_rng(0)
    for decay in (0.0, 0.1):
        x = torch.tensor(draw.standard_normal(5), requires_grad=True)
        theirs, ours, state = torch.optim.AdamW([x], lr=0.01, weight_decay=decay), {"x": x.detach().numpy().copy()}, {}
        for _ in range(6):
            g = draw.standard_normal(5)
            x.grad = torch.tensor(g)
            theirs.step()
            ours, state = Adam(0.01, weight_decay=decay).step(ours, {"x": g}, state)
            assert np.abs(ours["x"] - x.detach().numpy()).max() < 1e-15


def test_a_cosine():
    assert cosine(2.0, 2) == [2.0, pytest.approx(1.0)]


# --- By hand ----------------------------------------------------------------------------------------------------------

BASE = {"w": np.zeros((2, 3))}
MODELS = [{"w": np.array([[2.0, 0, 0], [-2, 0, 0]])}, {"w": np.array([[0, -1.0, 0], [0, 1, 0]])}]
STEP = [(0, np.array([[1.0, 0.5, 0]])), (1, np.array([[0.25, 1.0, 0]]))]


def linear(params, task, x):
    return x @ params["w"].T


def test_a_step_by_hand():
    """The difference of the logits is d = 4 c0 - c1 = 0.9 on one input and c0 - 2 c1 = -0.3 on the other. The entropy
    changes with -d s(1 - s), s = 1 / (1 + exp(-d)): by -0.184952 and 0.073337. So the gradient is (-0.666465, 0.038275)."""
    s = [1 / (1 + np.exp(-d)) for d in (0.9, -0.3)]
    a, b = (-d * p * (1 - p) for d, p in zip((0.9, -0.3), s))
    fit = adamerging(MODELS, BASE, linear, [STEP])
    assert np.abs(fit.gradients[0] - [[4 * a + b, -a - 2 * b]]).max() < 1e-9
    assert np.abs(fit.raw - [[0.301, 0.299]]).max() < 1e-8
    assert fit.losses[0] == pytest.approx(sum(-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in s))


def test_outside_of_the_clamp_there_is_no_way_back():
    fit = adamerging(MODELS, BASE, linear, [STEP] * 300, lr=0.01)
    assert fit.raw[0, 0] > 1 and fit.raw[0, 1] < 0 and fit.coefficients.values.tolist() == [[1.0, 0.0]]
    assert np.array_equal(fit.merge(MODELS, BASE)["w"], MODELS[0]["w"])
    on = adamerging(MODELS, BASE, linear, [STEP], prior=1.0)
    assert on.raw[0, 0] > 1, "on the bound there is a gradient"


def test_unused_coefficients_are_named():
    more = [{**m, "v": np.ones(2)} for m in (BASE, *MODELS)]
    with pytest.warns(UserWarning, match="adamerging: the loss does not depend on v: merged with the coefficient that"):
        fit = adamerging(more[1:], more[0], linear, [STEP])
    assert fit.coefficients.of("v") == [0.3, 0.3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamerging(MODELS, BASE, linear, [STEP])
        adamerging(MODELS, BASE, linear, [])


def test_the_confident_ones():
    """Agreement stays; of the others those of whose class the individual model is at least as sure."""
    individual = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.25, 0.75]])
    merged = np.array([[0.6, 0.4], [0.7, 0.3], [0.4, 0.6], [0.75, 0.25]])
    assert confident(individual, merged).tolist() == [0, 2, 3]


def test_a_batch_of_which_nothing_is_kept_changes_nothing():
    """The individual model says the second class with p = 0.55, the merged one, which is the other model, the first one."""
    models = [{"w": np.array([0.0, 0.2])}, {"w": np.array([4.0, 0.0])}]
    base, heads = {"w": np.zeros(2)}, [{"b": np.zeros(2)}] * 2
    forward = lambda p, head, x: x * p["w"] + head["b"]  # noqa: E731
    batch = np.ones((1, 2))
    fit = model_tinting(models, heads, base, forward, [(0, batch), (1, batch)], targets="confident")
    assert np.isnan(fit.losses[0]) and np.array_equal(fit.path[0], fit.path[1]) and np.isfinite(fit.path[2]).all()
    assert not fit.trained["0/b"].any() and fit.trained["1/b"].any()


def test_the_norm_over_tasks():
    value, slope = lp_norm(np.array([[3.0, -4.0], [0.0, 0.0]]), 2)
    assert value == 1.25 and np.allclose(slope, [[0.15, -0.2], [0, 0]])
    value, slope = lp_norm(np.array([[3.0, -4.0], [0.0, 0.0]]), 1)
    assert value == 1.75 and np.allclose(slope, [[0.25, -0.25], [0, 0]])


# --- Laws -------------------------------------------------------------------------------------------------------------


def run(seed, procedure=adamerging, steps=4, models=None, **options):
    base, tuned, x, y = toy(seed)
    tuned = tuned if models is None else [tuned[k] for k in models]
    if procedure is atlas:
        examples = [[(k, (x[k], y[k])) for k in range(3)]] * steps
        return atlas(tuned, base, lambda p, task, batch: smooth(p, batch[0]), examples, **options)
    return adamerging(tuned, base, lambda p, task, x: smooth(p, x), [[(k, x[k]) for k in range(3)]] * steps, **options)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(3)))
def test_permuted_models_permute_the_coefficients(seed, order):
    one, other = run(seed), run(seed, models=order)
    assert np.abs(one.raw[:, list(order)] - other.raw).max() < 1e-6


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_equal_models_have_equal_coefficients(seed):
    fit = run(seed, models=[0, 0, 1])
    assert np.abs(fit.raw[:, 0] - fit.raw[:, 1]).max() < 1e-6


@pytest.mark.parametrize("procedure", [adamerging, atlas])
def test_without_a_step_or_a_rate_it_is_task_arithmetic(procedure):
    base, models, _, _ = toy(0)
    for options in ({"steps": 0}, {"lr": 0.0}):
        fit = run(0, procedure, prior=0.3, **options)
        merged, expected = fit.merge(models, base), refmerge.merge(models, "task_arithmetic", base=base, weight=0.3)
        assert all(np.array_equal(merged[k], expected[k]) for k in base)


def test_constant_logits_leave_everything_where_it_is():
    with pytest.warns(UserWarning, match="does not depend on w"):
        fit = adamerging(MODELS, BASE, lambda p, task, x: 0 * (x @ p["w"].T), [STEP] * 3)
    assert np.array_equal(fit.raw, [[0.3, 0.3]])


@unused
def test_decay_alone_shrinks():
    base, models, x, y = toy(0)
    forward = lambda p, task, batch: 0 * smooth(p, batch[0])  # noqa: E731
    fit = atlas(models, base, forward, [[(0, (x[0], y[0]))]] * 3, prior=1.0, lr=0.1, weight_decay=0.5)
    assert np.allclose(fit.raw, 0.95**3, rtol=1e-14)


@unused
@pytest.mark.parametrize("seed", range(3))
def test_parts_with_equal_coefficients_are_blocks(seed):
    """And their gradients add up to the block's."""
    base, _, _, _ = toy(seed)
    draw = np.random.default_rng(seed)
    groups = {k: draw.integers(0, 2, v.shape) for k, v in base.items()}
    whole = run(seed, atlas, steps=1)
    split = run(seed, atlas, steps=1, parts={k: [g == 0, g == 1] for k, g in groups.items()})
    for row, name in enumerate(whole.coefficients.labels):
        rows = [r for r, label in enumerate(split.coefficients.labels) if label.startswith(name)]
        assert np.abs(split.gradients[0][rows].sum(0) - whole.gradients[0][row]).max() < 1e-8
    with pytest.raises(UsageError, match=r"fit no merge of whole ones: use composition\.theta of the fit"):
        split.merge([base] * 3, base)
    ours, theirs = (f.composition.theta(np.full(f.raw.shape, 0.5)) for f in (split, whole))
    assert all(np.allclose(ours[k], theirs[k], rtol=1e-15) for k in base)


def test_the_tangent_is_the_model_where_that_is_linear(exact):
    base, models, x, y = toy(0)
    only = ["layers.0.weight", "layers.0.bias"]
    base, *models = ({k: exact.array(m[k]) for k in only} for m in (base, *models))
    forward = lambda p, task, batch: mlp.forward(p, batch[0])  # noqa: E731 (one layer, which is linear)
    steps = [[(k, (exact.array(x[k]), y[k])) for k in range(3)]] * 5
    plain, linear_one = (atlas(models, base, forward, steps, lr=0.01, linearised=flag) for flag in (False, True))
    assert np.abs(plain.raw - linear_one.raw).max() < 1e-8


def test_the_tangent_is_torchs(torch):
    """f(theta_0) + J delta at coefficients away from 0, by differences and by torch along delta as a whole."""
    base, models, x, _ = toy(0)
    tau = [{k: m[k] - base[k] for k in base} for m in models]
    composition = Composition(base, tau, *blocks(sorted(base), "tensor", "x"))
    c = np.random.default_rng(0).standard_normal((4, 3))
    ours = tangent(composition, lambda p, task, batch: smooth(p, batch))(c, 0, ((0, 0), x[0]))
    delta = {k: torch.tensor(v - base[k]) for k, v in composition.theta(c).items()}
    start = {k: torch.tensor(v) for k, v in base.items()}
    z, slope = torch.func.jvp(lambda p: smooth(p, torch.tensor(x[0])), (start,), (delta,))
    assert np.abs(ours - (z + slope).numpy()).max() < 1e-8


def test_the_tangent_starts_as_the_model_does(exact):
    base, models, x, y = toy(0)
    base, *models = ({k: exact.array(v) for k, v in m.items()} for m in (base, *models))
    forward = lambda p, task, batch: smooth(p, batch[0])  # noqa: E731
    steps = [[(k, (exact.array(x[k]), y[k])) for k in range(3)]] * 5
    plain, linear_one = (atlas(models, base, forward, steps, lr=0.1, linearised=flag) for flag in (False, True))
    assert np.abs(plain.gradients[0] - linear_one.gradients[0]).max() < 1e-8
    assert np.abs(plain.raw - linear_one.raw).max() > 1e-3


# --- The result -------------------------------------------------------------------------------------------------------


@unused
@pytest.mark.parametrize("density", [None, 0.2])
@pytest.mark.parametrize("per", ["tensor", "model"])
def test_the_recipe_merges_files_as_the_fit_merges_arrays(density, per, tmp_path):
    base, models, _, _ = toy(0)
    fit = run(0, density=density, per=per)
    for name, model in (("base", base), ("a", models[0]), ("b", models[1]), ("c", models[2])):
        (tmp_path / name).mkdir()
        save_file(model, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    fit.coefficients.save(tmp_path / "fit.yml", ["./a", "./b", "./c"], "./base")
    merged = refmerge.run_recipe(tmp_path / "fit.yml", tmp_path / "merged")
    again = fit.merge([tmp_path / name for name in "abc"], tmp_path / "base", out=tmp_path / "again")
    expected = fit.merge(models, base)
    for key in base:
        assert np.array_equal(merged[key], expected[key]) and np.array_equal(again[key], expected[key])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_name_within_another_is_told_apart(data):
    names = data.draw(st.lists(st.text("ab.", min_size=1, max_size=4), min_size=2, max_size=6, unique=True))
    values = np.array([data.draw(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=2)) for _ in names])
    coefficients = Coefficients(tuple(names), values, prior=0.25)
    with tempfile.TemporaryDirectory() as folder:
        coefficients.save(Path(folder) / "x.yml", ["./a", "./b"], "./base")
        resolved = resolve(load_recipe(Path(folder) / "x.yml"))
    for name, row in zip(names, values):
        assert resolved.parameters_for(name, names)["weight"] == row.tolist()
    assert resolved.parameters_for("other", names)["weight"] == [0.25, 0.25]


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per": "layer"}, UsageError, "per = 'layer' is none of 'tensor', 'model'"),
        ({"density": 2.0}, UsageError, r"density = 2.0 is outside of \[0, 1\]"),
        ({"gradient": "spsa"}, UsageError, "gradient = 'spsa' is none of 'differences', 'torch', 'jax', nor a function"),
        ({"gradient": "torch"}, UsageError, "gradient = 'torch' needs models that are torch arrays"),
        ({"batches": [STEP[0]]}, UsageError, r"step 0 is a list of \(task, batch\)"),
        ({"batches": [[]]}, UsageError, "step 0 has no examples"),
        ({"models": BASE}, UsageError, r"models is a sequence: write \[a, b\]"),
        ({"models": []}, UsageError, "there is no model to merge"),
        ({"models": [{"v": np.zeros(3)}]}, InputError, "tensor 'v' is not in the base"),
        ({"models": [{"w": np.zeros(3)}]}, InputError, r"tensor 'w' has shape \[3\] in model 0 and \[2, 3\] in the base"),
        ({"logits": lambda p, task, x: p["w"][:, :2] / 0.0}, InputError, "the gradient of step 0 is not finite"),
    ],
)
def test_what_is_refused(options, error, message):
    with np.errstate(all="ignore"), pytest.raises(error, match=message) as caught:
        given = {"models": MODELS, "base": BASE, "logits": linear, "batches": [STEP]} | options
        adamerging(given.pop("models"), given.pop("base"), given.pop("logits"), given.pop("batches"), **given)
    assert "\n" not in str(caught.value)


def test_what_the_others_refuse():
    base, models, x, y = toy(0)
    forward = lambda p, task, batch: smooth(p, batch[0])  # noqa: E731
    steps = [[(0, (x[0], y[0]))]] * 2
    with pytest.raises(UsageError, match="1 learning rates for more steps"):
        atlas(models, base, forward, steps, lr=[0.1])
    with pytest.raises(UsageError, match="parts has 'q', which is no floating-point tensor"):
        atlas(models, base, forward, steps, parts={"q": []})
    with pytest.raises(UsageError, match=r"mask 0 of 'layers.0.bias' has shape \[2\], not \[5\]"):
        atlas(models, base, forward, steps, parts={"layers.0.bias": [np.ones(2)]})
    with pytest.raises(UsageError, match="no heads, no linearised model"):
        atlas(models, base, forward, steps, linearised=True, gradient=contracted(lambda *_: (0.0, {})))
    with pytest.raises(UsageError, match="a loss is one number, not ndarray"):
        atlas(models, base, forward, steps, loss=lambda z, task, batch: z)
    with pytest.raises(UsageError, match="targets = 'gold' is none of"):
        model_tinting(models, [{}] * 3, base, forward, [], targets="gold")
    with pytest.raises(UsageError, match="1 heads for 3 models"):
        model_tinting(models, [{}], base, forward, [])
    for task in (3, -1):
        with pytest.raises(UsageError, match=f"task {task} is none of 0 to 2, the places of the models") as caught:
            model_tinting(models, [{}] * 3, base, lambda *_: 1 / 0, [(task, x[0])])
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="these are coefficients of 2 models, 3 given"):
        Coefficients(("w",), np.zeros((1, 2))).recipe(["a", "b", "c"], "base")
