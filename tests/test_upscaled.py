"""Dense models upscaled into mixtures of experts: the authors' results, laws, whole networks, files, and refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, merge, open_checkpoint
from refmerge.checkpoint import save
from refmerge.nets import gpt2, llama, vit
from refmerge.nets.layers import Layers, gelu, relu
from refmerge.nets.upscaled import (
    Upscaled,
    chosen,
    layers_of,
    position_code,
    rank_one,
    routed,
    smile_logits,
    soft_top,
    weight_ensembling,
    weight_ensembling_weights,
)
from refmerge.nets.upscaled import smile as smile_layer
from refmerge.numeric import array_namespace
from refmerge.procedures.experts.rankone_moe import rankone_moe
from refmerge.procedures.experts.smile import smile
from refmerge.procedures.experts.wemoe import fit_routers, pruned, wemoe
from refmerge.testing import assert_same

DATA = Path(__file__).parent / "data" / "upscaled.npz"
FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10**6)

# --- The authors' results ---------------------------------------------------------------------------------------------
#
# Inputs and outputs of the modules named in `source`, in float64: an MLP c_proj(q(c_fc x)) with q(x) = x / (1 + exp(-1.702
# x)), a linear layer, and fc2(gelu(fc1 x)).


def cases(method):
    with np.load(DATA) as file:
        return sorted({key.partition("/")[0] for key in file.files if key.startswith(method)})


def case(tag):
    """Parameters, base, models and the rest, tensors of the module m."""
    with np.load(DATA) as file:
        found = {key.partition("/")[2]: file[key] for key in file.files if key.partition("/")[0] == tag}

    def part(prefix):
        return {f"m.{k.partition('/')[2]}": v for k, v in found.items() if k.partition("/")[0] == prefix}

    models = [part(f"model{t}") for t in range(len({k.partition("/")[0] for k in found if k.startswith("model")}))]
    gate = {f"m.gate.{k[2:].replace('fc.', 'fc2.')}": v for k, v in part("gate").items()}
    return json.loads(str(found["params"])), part("base"), models, found, gate


def quick_gelu(net, x):
    y = net.linear("m.c_fc", x)
    return net.linear("m.c_proj", y / (1 + array_namespace(y).exp(-1.702 * y)))


def perceptron(net, x):
    return net.linear("m.fc2", gelu(net.linear("m.fc1", x)))


def near(got, expected, tolerance=1e-12):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("tag", cases("wemoe"))
def test_wemoe_gives_what_the_authors_code_gives(tag, torch):
    params, base, models, found, gate = case(tag)
    out = wemoe(models, base, modules="m", depth=params["router_hidden_layers"], init_lambda=params["init_lambda"]) | gate
    x, y = found["x"], found["out/hidden"]
    if not params["batch_first"]:
        x, y = np.swapaxes(x, 0, 1), np.swapaxes(y, 0, 1)
    near(weight_ensembling_weights(out, "m", x), found["out/routing_weights"])
    near(weight_ensembling(out, "m", x, quick_gelu), y)
    there = {k: torch.from_numpy(v.copy()).requires_grad_(k in gate) for k, v in out.items()}
    weight_ensembling(there, "m", torch.from_numpy(x.copy()), quick_gelu).square().mean().backward()
    for key in (key for key in found if key.startswith("out/grad.")):
        near(there["m." + key.removeprefix("out/grad.")].grad.numpy(), found[key])


@pytest.mark.parametrize("tag", cases("smile"))
def test_smile_gives_what_the_authors_code_gives(tag):
    params, base, models, found, _ = case(tag)
    given = {key: params[key] for key in ("k", "gate_k", "routing_use_diff")}
    out = smile(models, base, layers="m", **given)
    near(smile_logits(out, "m", found["x"]).reshape(-1, 3), found["out/router_logits"])
    near(smile_layer(out, "m", found["x"], top_k=params["top_k"]), found["out/y"])


@pytest.mark.parametrize("tag", cases("rankone_moe"))
def test_rank_one_experts_give_what_the_authors_code_gives(tag):
    params, base, models, found, gate = case(tag)
    given = {"rank": params["rank_k"], "depth": params["router_hidden_layers"], "init_lambda": params["init_lambda"]}
    out = rankone_moe(models, base, modules="m", **given) | gate
    near(rank_one(out, "m", found["x"], perceptron), found["out/y"])


# --- Whole networks ---------------------------------------------------------------------------------------------------

run = partial(vit.forward, heads=2)


def vits(count, seed=0, dtype=np.float64, blocks=2):
    """A base, and models near to it."""
    draw = np.random.default_rng(seed)
    base = vit.init(draw, 8, blocks, hidden=12, outputs=3)

    def moved():
        return {n: (x + 0.3 * np.std(x) * draw.standard_normal(x.shape)).astype(dtype) for n, x in base.items()}

    images = draw.normal(size=(4, 3, 8, 8))
    return {n: x.astype(dtype) for n, x in base.items()}, [moved() for _ in range(count)], images


def static(models, base, weights, scaling=0.3):
    """Merged by hand: MLPs with these weights, all else with `scaling`."""
    merged = {}
    for name, x in base.items():
        for model, w in zip(models, weights):
            x = x + (w if ".mlp." in name else scaling) * (model[name] - base[name])
        merged[name] = x
    return merged


def test_a_constant_router_is_a_static_merge():
    base, models, images = vits(3)
    out = wemoe(models, base, depth=0, init_lambda=0.25)
    near(run(out, images, layers=Upscaled), run(static(models, base, [0.25] * 3), images))
    for t in range(3):
        own = {f"blocks.{i}.mlp.gate.weight": np.eye(3)[t] for i in range(2)}
        near(run(out | own, images, layers=Upscaled), run(static(models, base, np.eye(3)[t]), images))


def test_a_new_router_is_near_its_last_bias():
    base, models, images = vits(2)
    for depth in (1, 2):
        out = wemoe(models, base, depth=depth, init_lambda=0.3)
        got, expected = run(out, images, layers=Upscaled), run(static(models, base, [0.3, 0.3]), images)
        assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_each_sample_is_merged_by_itself():
    base, models, images = vits(2)
    out = wemoe(models, base)
    for name in [n for n in out if n.endswith("gate.fc2.weight")]:
        out[name] = np.random.default_rng(1).normal(size=out[name].shape) * 30
    whole = run(out, images, layers=Upscaled)
    near(np.concatenate([run(out, images[b : b + 1], layers=Upscaled) for b in range(4)]), whole)
    together = partial(Upscaled, by_batch=True)
    apart = np.concatenate([run(out, images[b : b + 1], layers=together) for b in range(4)])
    assert np.abs(run(out, images, layers=together) - apart).max() > 1e-4


def test_no_samples_give_none():
    base, models, images = vits(2)
    for out in (wemoe(models, base), rankone_moe(models, base, rank=2), smile(models, base)):
        assert run(out, images[:0], layers=Upscaled).shape == (0, 3)


def test_a_checkpoint_is_run_as_it_lies_on_disk(tmp_path):
    base, models, images = vits(2)
    stored = wemoe(models, base, tmp_path / "out")
    near(run(stored, images, layers=layers_of(stored)), run(dict(stored), images, layers=Upscaled), 0)


@FEW
@given(seeds)
def test_places_and_experts_may_change_places(seed):
    draw = np.random.default_rng(seed)
    shapes = {"m.c_fc.weight": (5, 3), "m.c_fc.bias": (5,), "m.c_proj.weight": (3, 5), "m.c_proj.bias": (3,)}
    base, a, b, c = ({n: draw.standard_normal(s) for n, s in shapes.items()} for _ in range(4))
    x, places, order = draw.standard_normal((2, 6, 3)), draw.permutation(6), draw.permutation(3)
    gate = {"m.gate.fc2.weight": draw.standard_normal((3, 3)), "m.gate.fc2.bias": draw.standard_normal(3)}
    out = wemoe([a, b, c], base, modules="m", depth=1) | gate
    w = weight_ensembling_weights(out, "m", x)
    np.testing.assert_allclose(weight_ensembling_weights(out, "m", x[:, places]), w, rtol=1e-9, atol=1e-12)
    turned = wemoe([[a, b, c][t] for t in order], base, modules="m", depth=1) | {n: g[order] for n, g in gate.items()}
    y = weight_ensembling(out, "m", x, quick_gelu)
    np.testing.assert_allclose(weight_ensembling(turned, "m", x, quick_gelu), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", ["wemoe", "sparse", "rankone_moe", "smile", "smile, dense"])
def test_array_libraries_agree(make, library):
    base, models, images = vits(2)
    make = {
        "wemoe": wemoe,
        "sparse": partial(wemoe, prune=0.8, shared=True, position=4),
        "rankone_moe": partial(rankone_moe, rank=3),
        "smile": partial(smile, k=3, gate_k=2),
        "smile, dense": partial(smile, k=0, average=True),
    }[make]
    expected, layers = make(models, base), partial(Upscaled, select=4)
    there = make(
        [{n: library.array(x) for n, x in m.items()} for m in models], {n: library.array(x) for n, x in base.items()}
    )
    assert list(there) == list(expected)
    for name, x in expected.items():
        assert library.owns(there[name])
        if ".experts." not in name and ".gate." not in name:
            np.testing.assert_allclose(library.host(there[name]), x, rtol=1e-12, atol=1e-14)
    got = run(there, library.array(images), layers=layers)
    assert library.owns(got)
    np.testing.assert_allclose(library.host(got), run(expected, images, layers=layers), rtol=1e-9, atol=1e-10)


def test_a_llama_is_upscaled_too():
    draw = np.random.default_rng(0)
    base = llama.init(draw, heads=2, groups=1, head_width=4, hidden=6)
    model = {n: x + 0.1 * draw.standard_normal(x.shape) for n, x in base.items()}
    tokens = draw.integers(0, 11, (2, 5))
    go = partial(llama.forward, heads=2, groups=1)
    out = wemoe([model], base, depth=0, init_lambda=1.0, scaling=1.0)
    near(go(out, tokens, layers=Upscaled), go(model, tokens), 1e-10)
    out = smile([model], base, k=99, leave=("*embed*",), average=True)
    near(go(out, tokens, layers=Upscaled), go(model, tokens), 1e-10)


def test_a_gpt2_whose_weights_lie_the_other_way():
    draw = np.random.default_rng(0)
    base = gpt2.init(draw, 8, 2)
    models = [{n: x + 0.1 * draw.standard_normal(x.shape) for n, x in base.items()} for _ in range(2)]
    tokens, go = draw.integers(0, 11, (2, 5)), partial(gpt2.forward, heads=2)
    out = wemoe(models, base, depth=1)
    assert out["transformer.h.0.mlp.gate.fc2.weight"].shape == (2, 8)
    for i in range(2):
        out[f"transformer.h.{i}.mlp.gate.fc2.weight"] *= 0
    near(go(out, tokens, layers=Upscaled), go(static(models, base, [0.3, 0.3]), tokens), 1e-10)
    out = rankone_moe(models, base, rank=8, depth=0)
    near(go(out, tokens, layers=Upscaled), go(static(models, base, [0.3, 0.3]), tokens), 1e-10)


# --- Sparse WEMoE -----------------------------------------------------------------------------------------------------


def test_pruning_by_hand():
    """|tau| = 0 1 2 3 4: the quantile of 0.5 is 2, that of 0.6 is 2.4; what lies on it goes."""
    tau = np.array([0.0, -1, 2, -3, 4])
    assert pruned(tau, 0.5).tolist() == [0, 0, 0, -3, 4]
    assert pruned(tau, 0.4).tolist() == [0, 0, 2, -3, 4]
    assert pruned(tau, 0.6).tolist() == [0, 0, 0, -3, 4]
    assert pruned(tau, 0.0).tolist() == tau.tolist()
    assert pruned(np.zeros((0, 3)), 0.5).shape == (0, 3)


@FEW
@given(seeds, st.floats(0.01, 0.99), st.integers(1, 40))
def test_pruning_is_torchs_quantile(seed, ratio, size):
    torch = pytest.importorskip("torch")
    tau = np.random.default_rng(seed).standard_normal(size)
    x = torch.from_numpy(tau)
    expected = x * (x.abs() > x.abs().quantile(ratio))
    kept = pruned(tau, ratio)
    at = torch.isclose(x.abs(), x.abs().quantile(ratio), rtol=1e-9, atol=0).numpy()  # rounding decides there
    assert np.array_equal(kept[~at], expected.numpy()[~at])


def test_the_code_of_a_layer_by_hand():
    assert position_code(0, 4).tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(position_code(3, 4), [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)], rtol=1e-12)


def test_one_router_for_all_layers():
    base, models, images = vits(2)
    out = wemoe(models, base, shared=True, position=4)
    assert [n for n in out if "gate" in n] == ["gate.fc1.weight", "gate.fc1.bias", "gate.fc2.weight", "gate.fc2.bias"]
    assert out["gate.fc1.weight"].shape == (12, 12) and out["gate.fc2.weight"].shape == (2, 12)
    out |= {"gate.fc1.weight": np.eye(12), "gate.fc2.weight": np.zeros((2, 12)), "gate.fc2.bias": np.array([0.0, 0.5])}
    out["gate.fc2.weight"][0, 2] = 1  # the first task's coefficient is the cosine of the layer, 1 and cos(1)
    merged = static(models, base, [1, 0.5])
    later = static(models, base, [np.cos(1), 0.5])
    expected = merged | {n: x for n, x in later.items() if n.startswith("blocks.1.mlp")}
    near(run(out, images, layers=Upscaled), run(expected, images))


# --- Routers that are trained -----------------------------------------------------------------------------------------


def scored(params, task, x):
    return run(params, x, layers=Upscaled)[:, : 3 - task]


def test_routers_are_trained_and_nothing_else(torch):
    base, models, images = vits(2, blocks=1)
    steps = [[(0, images[:2]), (1, images[2:])]] * 15
    out = wemoe(models, base)
    there = {n: torch.from_numpy(x) for n, x in out.items()}
    batches = [[(t, torch.from_numpy(x)) for t, x in step] for step in steps]
    found = fit_routers(there, scored, batches, lr=0.01)
    assert found.losses[-1] < found.losses[0] and len(found.losses) == 15
    for name, x in there.items():
        assert torch.equal(x, found.params[name]) == ("gate" not in name), name
    # One step by differences in float64 goes where autograd's goes; Adam's first step has the length lr everywhere.
    small = wemoe(models, base, depth=0)
    by_hand = fit_routers(small, scored, steps[:1], lr=0.01, schedule="constant")
    by_torch = fit_routers({n: torch.from_numpy(x) for n, x in small.items()}, scored, batches[:1], lr=0.01)
    name = "blocks.0.mlp.gate.weight"
    np.testing.assert_allclose(by_hand.params[name], by_torch.params[name].numpy(), rtol=1e-6)
    np.testing.assert_allclose(np.abs(by_hand.params[name] - 0.3), 0.01, rtol=1e-4)
    assert_same(fit_routers(small, scored, steps[:2], lr=0.0).params, small)


def test_what_cannot_be_trained():
    base, models, images = vits(1, blocks=1)
    with pytest.raises(UsageError, match="there is no router"):
        fit_routers(base, scored, [])
    with pytest.raises(UsageError, match="schedule = 'linear'"):
        fit_routers(wemoe(models, base), scored, [], schedule="linear")
    with pytest.raises(UsageError, match="float64"):
        narrow = {n: x.astype(np.float32) for n, x in wemoe(models, base, depth=0).items()}
        fit_routers(narrow, scored, [[(0, images)]])


# --- Rank-one experts -------------------------------------------------------------------------------------------------


@FEW
@given(seeds)
def test_all_parts_with_one_weight_are_the_change(seed):
    draw = np.random.default_rng(seed)
    shapes = {"m.fc1.weight": (5, 3), "m.fc1.bias": (5,), "m.fc2.weight": (3, 5), "m.fc2.bias": (3,)}
    base, a, b = ({n: draw.standard_normal(s) for n, s in shapes.items()} for _ in range(3))
    x = draw.standard_normal((2, 4, 3))
    out = rankone_moe([a, b], base, modules="m", rank=3, depth=0, init_lambda=0.5)
    assert out["m.gate.weight"].tolist() == [0.5] * 6
    merged = merge([a, b], "task_arithmetic", base=base, weight=0.5)
    np.testing.assert_allclose(rank_one(out, "m", x, perceptron), perceptron(Layers(merged), x), rtol=1e-9, atol=1e-9)


def test_a_soft_choice_by_hand():
    """The second largest of 3 1 2 is 2: at it the logistic function is 1/2, 1 above and 0 below by 1."""
    w = np.array([3.0, 1.0, 2.0])
    np.testing.assert_allclose(soft_top(w, 2), [3, 0, 1], atol=1e-12)
    np.testing.assert_allclose(soft_top(w, 2, sharpness=np.log(3)), [3 * 3 / 4, 1 / 4, 1], rtol=1e-12)
    np.testing.assert_allclose(soft_top(np.stack([w, -w]), 1)[1], [0, -0.5, 0], atol=1e-12)
    assert soft_top(np.array([1e4, -1e4, 0.0]), 1).tolist() == [5e3, 0, 0]
    assert np.abs(soft_top(np.array([1.9, 2.0, 2.1]), 2) - [0, 1, 2.1]).max() < 1e-4
    with pytest.raises(UsageError, match="more than the 3 experts"):
        soft_top(w, 4)


# --- SMILE ------------------------------------------------------------------------------------------------------------


def layer(draw, m, n):
    return {"l.weight": draw.standard_normal((m, n)), "l.bias": draw.standard_normal(m)}


@FEW
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from([-1, 0, 9]))
def test_one_expert_is_the_model_and_equal_experts_are(seed, m, n, k):
    draw = np.random.default_rng(seed)
    base, model, x = layer(draw, m, n), layer(draw, m, n), draw.standard_normal((2, 3, n))
    expected = Layers(model).linear("l", x)
    for count, top in ((1, 1), (3, 1), (3, 2), (3, 3)):
        out = smile([model] * count, base, k=k, gate_k=2)
        np.testing.assert_allclose(smile_layer(out, "l", x, top_k=top), expected, rtol=1e-8, atol=1e-8)


@FEW
@given(seeds, st.integers(1, 3))
def test_experts_may_change_places(seed, top):
    draw = np.random.default_rng(seed)
    base, *models = (layer(draw, 5, 4) for _ in range(4))
    x = draw.standard_normal((7, 4))
    y = smile_layer(smile(models, base, k=2, gate_k=2), "l", x, top_k=top)
    again = smile_layer(smile(models[::-1], base, k=2, gate_k=2), "l", x, top_k=top)
    np.testing.assert_allclose(again, y, rtol=1e-8, atol=1e-9)


def test_the_router_by_hand():
    """Changes e1 e1^T and 2 e2 e2^T: the rows of the router are +-e1 and +-e2, and logits |x1| and |x2|."""
    base = {"l.weight": np.zeros((2, 2))}
    models = [{"l.weight": np.diag([1.0, 0])}, {"l.weight": np.diag([0, 2.0])}]
    out = smile(models, base, k=1)
    x = np.array([[3.0, 1.0], [-1.0, 2.0], [1.0, -1.0]])
    np.testing.assert_allclose(smile_logits(out, "l", x), np.abs(x), rtol=1e-12)
    # alone, the chosen expert has weight 1; of equal logits the first is chosen
    np.testing.assert_allclose(smile_layer(out, "l", x), [[3, 0], [0, 4], [1, 0]], atol=1e-12)
    p = np.exp(np.abs(x)) / np.exp(np.abs(x)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(smile_layer(out, "l", x, top_k=2), p * x * [1, 2], rtol=1e-12)
    loud = smile_layer(out, "l", 10 * x, top_k=2) / 10
    assert not np.allclose(loud, smile_layer(out, "l", x, top_k=2))


@FEW
@given(seeds)
def test_a_router_of_all_directions_sees_the_length_alone(seed):
    draw = np.random.default_rng(seed)
    base, model, x = layer(draw, 3, 5), layer(draw, 3, 5), draw.standard_normal((4, 5))
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    out = smile([model, base], base, gate_k=9)
    assert out["l.gate.weight"].shape == (10, 5)
    np.testing.assert_allclose(smile_logits(out, "l", x), np.repeat(norm, 2, axis=1), rtol=1e-9)
    narrow = smile([model, base], base, gate_k=9, full_matrices=False)
    assert narrow["l.gate.weight"].shape == (6, 5)
    assert (smile_logits(narrow, "l", x)[:, 0] < norm[:, 0]).all()


def test_a_layer_that_nobody_changed_stays():
    draw = np.random.default_rng(0)
    base, model = layer(draw, 3, 3), layer(draw, 3, 3)
    other = {"o.weight": np.ones((2, 3)), "norm.weight": np.ones(3), "head.weight": np.eye(3), "ids": np.arange(2)}
    moved = {n: x + 1 for n, x in other.items()} | {"o.weight": other["o.weight"] + 1e-9}
    out = smile([model | moved, model | moved], base | other)
    assert [n for n in out if n not in base | other] == ["l.experts.u", "l.experts.svh", "l.experts.bias", "l.gate.weight"]
    for name in other:
        assert np.array_equal(out[name], other[name])
    averaged = smile([model | moved, model | other], base | other, average=True)
    assert np.array_equal(averaged["norm.weight"], np.full(3, 1.5)) and np.array_equal(averaged["o.weight"], np.ones((2, 3)))


# --- Files ------------------------------------------------------------------------------------------------------------

MAKERS = {
    "wemoe": partial(wemoe, prune=0.5),
    "shared": partial(wemoe, shared=True, depth=1),
    "rankone_moe": partial(rankone_moe, rank=2, select=3),
    "smile": partial(smile, k=2, gate_k=2, top_k=2),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_written_is_what_is_read_and_runs(name, dtype, tmp_path):
    base, models, images = vits(2, dtype=dtype)
    expected = MAKERS[name](models, base)
    for key, x in {"base": base, **dict(zip("ab", models))}.items():
        save(x, tmp_path / f"{key}.safetensors")
    files = [tmp_path / f"{key}.safetensors" for key in "ab"]
    stored = MAKERS[name](files, tmp_path / "base.safetensors", tmp_path / "out")
    assert_same(dict(stored), dict(sorted(expected.items())))
    stored = open_checkpoint(tmp_path / "out")
    how = {"rankone_moe": {"select": 3}, "smile": {"top_k": 2}}.get(name, {})
    wide = {n: x.astype(np.float64) for n, x in stored.items()}
    near(run(wide, images, layers=layers_of(stored)), run(wide, images, layers=partial(Upscaled, **how)), 0)
    with pytest.raises(UsageError, match="never written to"):
        MAKERS[name](files, tmp_path / "base.safetensors", files[0], overwrite=True)
    with pytest.raises(InputError, match="no upscaled checkpoint"):
        layers_of(open_checkpoint(files[0]))


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_refusals():
    base, models, _ = vits(2, blocks=1)
    for make in (wemoe, partial(rankone_moe, rank=8), smile):
        with pytest.raises(UsageError, match="models is a sequence"):
            make(models[0], base)
        with pytest.raises(UsageError, match="there is no model"):
            make([], base)
        with pytest.raises(InputError, match="'more' is not in the base"):
            make([models[0] | {"more": np.zeros(1)}], base)
        with pytest.raises(InputError, match=r"'norm.bias' is F64 of shape \[2\] in model 0 and F64 of shape \[8\]"):
            make([models[0] | {"norm.bias": np.zeros(2)}], base)
        with pytest.raises(UsageError, match=r"fc1\.weight' of model 1 is not finite"):
            make([models[0], models[1] | {"blocks.0.mlp.fc1.weight": np.full((12, 8), np.nan)}], base)
        with pytest.raises(UsageError, match=r"\*\.moe"):
            make(models, base, **{"layers" if make is smile else "modules": ["*.moe"]})
    with pytest.raises(UsageError, match="prune = 1"):
        wemoe(models, base, prune=1)
    with pytest.raises(UsageError, match="position = 3"):
        wemoe(models, base, shared=True, position=3)
    with pytest.raises(UsageError, match="position = 4"):
        wemoe(models, base, position=4)
    with pytest.raises(UsageError, match="depth = 3"):
        wemoe(models, base, depth=3)
    with pytest.raises(UsageError, match="say how many numbers it reads"):
        wemoe(models, base, modules="*.attn")
    assert wemoe(models, base, modules="*.attn", width=8)["blocks.0.attn.gate.fc1.weight"].shape == (8, 8)
    wider = {"x.fc1.weight": np.ones((2, 12))}
    with pytest.raises(UsageError, match=r"modules of \[8, 12\] numbers"):
        wemoe([m | wider for m in models], base | wider, modules=["*.mlp", "x"], shared=True)
    with pytest.raises(UsageError, match="rank = 9"):
        rankone_moe(models, base, rank=9)
    with pytest.raises(UsageError, match="select = 17"):
        rankone_moe(models, base, rank=8, select=17)
    with pytest.raises(UsageError, match="top_k = 3"):
        smile(models, base, top_k=3)
    with pytest.raises(UsageError, match="gate_k = 0"):
        smile(models, base, gate_k=0)
    with pytest.raises(UsageError, match="top_k = 3 is outside"):
        chosen(np.ones((1, 2)), 3)
    with pytest.raises(UsageError, match="an array of 2 axes"):
        weight_ensembling_weights(wemoe(models, base), "blocks.0.mlp", np.ones((2, 8)))
    whole = {"blocks.0.mlp.ids": np.arange(3)}
    with pytest.raises(UsageError, match="ids' holds no floating-point"):
        wemoe([m | whole for m in models], base | whole)


def test_choices_are_exactly_k_with_the_first_of_equal_ones():
    assert chosen(np.array([[1.0, 2, 2, 0], [0, 0, 0, 0]]), 2).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert relu(routed({"g.weight": np.ones(2)}, "g", np.zeros((1, 1, 3)))).tolist() == [1, 1]
