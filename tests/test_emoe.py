"""Emergent experts: clusters of one size, the dense model's function, choices by hand, files, and refusals."""

from __future__ import annotations

import itertools
import json
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, open_checkpoint
from refmerge.checkpoint import save
from refmerge.nets import llama, vit
from refmerge.nets.layers import Layers, silu
from refmerge.nets.upscaled import Upscaled, emergent, emergent_scores, layers_of
from refmerge.procedures.experts.emoe import balanced, distortion, emoe
from refmerge.testing import assert_same

FEW = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10**6)

# --- Clusters ---------------------------------------------------------------------------------------------------------


@FEW
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_clusters_have_one_size_and_every_step_is_no_worse(seed, count, size, width):
    points = np.random.default_rng(seed).standard_normal((count * size, width)).round(1)
    steps = [balanced(points, count, n, seed, "m") for n in range(1, 6)]
    for cluster in steps:
        assert np.bincount(cluster, minlength=count).tolist() == [size] * count
        first = [np.flatnonzero(cluster == c)[0] for c in range(count)]
        assert first == sorted(first)
    found = [distortion(points, cluster) for cluster in steps]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found))


@FEW
@given(seeds)
def test_two_pairs_of_a_pair_are_found(seed):
    """Of two tight groups far apart k-means++ draws one centre each, and the best parting is these groups."""
    draw = np.random.default_rng(seed)
    group = draw.permutation([0, 0, 0, 1, 1, 1])
    points = 1e-3 * draw.standard_normal((6, 2)) + 1e3 * group[:, None]
    cluster = balanced(points, 2, 10, seed, "m")
    assert np.array_equal(cluster == cluster[0], group == group[0]) and cluster[0] == 0


def test_equal_points_are_parted_too():
    assert np.bincount(balanced(np.ones((6, 2)), 3, 10, 0, "m")).tolist() == [2, 2, 2]


@FEW
@given(seeds)
def test_more_starts_are_no_worse_and_near_the_best(seed):
    points = np.random.default_rng(seed).standard_normal((6, 2))
    found = [distortion(points, balanced(points, 2, 100, seed, "m", starts)) for starts in (1, 3, 10)]
    assert found[2] <= found[1] <= found[0]
    halves = itertools.combinations(range(6), 3)
    best = min(distortion(points, np.isin(np.arange(6), half).astype(int)) for half in halves)
    assert best - 1e-9 <= found[2] <= 1.5 * best


# --- The function -----------------------------------------------------------------------------------------------------


def vits():
    draw = np.random.default_rng(0)
    return vit.init(draw, 8, 2, hidden=12, outputs=3), draw.normal(size=(4, 3, 8, 8))


def test_the_model_stays_and_all_experts_are_the_model():
    params, images = vits()
    out = emoe(params, experts=4, top_k=2)
    assert {n: (x.dtype, x.shape) for n, x in out.items()} == {n: (x.dtype, x.shape) for n, x in params.items()}
    assert any(not np.array_equal(out[n], params[n]) for n in params)
    run = partial(vit.forward, heads=2)
    expected = run(params, images)
    np.testing.assert_allclose(run(out, images), expected, rtol=1e-10, atol=1e-12)
    modules = ["blocks.0.mlp", "blocks.1.mlp"]
    whole = partial(Upscaled, experts=4, top_k=4, modules=modules)
    np.testing.assert_allclose(run(out, images, layers=whole), expected, rtol=1e-10, atol=1e-12)
    some = partial(Upscaled, experts=4, top_k=2, modules=modules)
    assert np.abs(run(out, images, layers=some) - expected).max() > 1e-3


def test_a_llama_too_in_any_library(library):
    draw = np.random.default_rng(0)
    params = llama.init(draw, 2, 1, 2, head_width=4, hidden=12)
    tokens = draw.integers(0, 11, (2, 5))
    run = partial(llama.forward, heads=2, groups=1)
    out = emoe({n: library.array(x) for n, x in params.items()}, experts=3, top_k=1)
    layers = partial(Upscaled, experts=3, top_k=1, modules=["model.layers.0.mlp", "model.layers.1.mlp"])
    got = library.host(run(out, library.array(tokens), layers=layers))
    host = {n: library.host(x) for n, x in out.items()}
    np.testing.assert_allclose(library.host(run(out, library.array(tokens))), run(params, tokens), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(got, run(host, tokens, layers=layers), rtol=1e-9, atol=1e-10)


def gated(net, x):
    return net.linear("m.down_proj", silu(net.linear("m.gate_proj", x)) * net.linear("m.up_proj", x))


@FEW
@given(seeds, st.integers(1, 3))
def test_it_is_the_masked_mlp(seed, top):
    """As the authors' code for Llama has it: the mean of what the gate's rows give decides, and other units are zero."""
    draw = np.random.default_rng(seed)
    params = {"m.gate_proj.weight": (6, 4), "m.up_proj.weight": (6, 4), "m.down_proj.weight": (4, 6)}
    params = {n: draw.standard_normal(s) for n, s in params.items()}
    out, x = emoe(params, experts=3, top_k=top, modules="m"), draw.standard_normal((2, 5, 4))
    keys, up, down = (out[f"m.{key}_proj.weight"] for key in ("gate", "up", "down"))
    score = (x @ keys.T).reshape(2, 5, 3, 2).mean(axis=-1)
    np.testing.assert_allclose(emergent_scores(out, "m.gate_proj", x, 3), score, rtol=1e-9, atol=1e-12)
    hidden = silu(x @ keys.T) * (x @ up.T)
    kept = np.argsort(np.argsort(-score, axis=-1), axis=-1) < top
    expected = (hidden * np.repeat(kept, 2, axis=-1)) @ down.T
    how = {"keys": "m.gate_proj", "values": "m.down_proj", "experts": 3, "top_k": top}
    np.testing.assert_allclose(emergent(Layers(out), x, gated, **how), expected, rtol=1e-9, atol=1e-11)
    taps = {}
    emergent(Layers(out, taps), x, gated, **how)
    assert set(taps) == set(params)


def test_the_bias_of_values_counts_once():
    params = {
        "m.fc1.weight": np.eye(2),
        "m.fc2.weight": np.eye(2),
        "m.fc2.bias": np.array([5.0, 7.0]),
        "m.fc1.bias": np.ones(2),
    }
    out = emoe(params, experts=2, top_k=1, modules="m")
    how = {"keys": "m.fc1", "values": "m.fc2", "experts": 2, "top_k": 1}
    x = np.array([[3.0, 1.0], [0.0, 2.0]])
    got = emergent(Layers(out), x, lambda net, x: net.linear("m.fc2", net.linear("m.fc1", x)), **how)
    assert got.tolist() == [[9, 7], [5, 10]]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_a_dense_model_that_says_its_experts(tmp_path):
    params, images = vits()
    params = {n: x.astype(ml_dtypes.bfloat16) for n, x in params.items()}
    (tmp_path / "in").mkdir()
    save(params, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    stored = emoe(tmp_path / "in", tmp_path / "out", experts=3, top_k=2)
    assert stored.config == {"model_type": "vit"}
    assert_same(dict(stored), dict(sorted(emoe(params, experts=3, top_k=2).items())))
    assert_same(dict(emoe(tmp_path / "in", tmp_path / "one.safetensors", experts=3, top_k=2)), dict(stored))
    wide = {n: x.astype(np.float64) for n, x in stored.items()}
    layers = partial(Upscaled, experts=3, top_k=2, modules=["blocks.0.mlp", "blocks.1.mlp"])
    expected = vit.forward(wide, images, heads=2, layers=layers)
    got = vit.forward(wide, images, heads=2, layers=layers_of(open_checkpoint(tmp_path / "out")))
    assert np.array_equal(got, expected)


def test_refusals(tmp_path):
    params, _ = vits()
    with pytest.raises(UsageError, match=r"the 12 units of 'blocks.0.mlp.fc1' cannot be parted into 5"):
        emoe(params, experts=5, top_k=1)
    with pytest.raises(UsageError, match=r"top_k = 3 is outside of \[1, 2\]"):
        emoe(params, experts=2, top_k=3)
    with pytest.raises(UsageError, match="starts = 0"):
        emoe(params, experts=2, top_k=1, starts=0)
    with pytest.raises(UsageError, match="no module matches"):
        emoe(params, experts=2, top_k=1, modules="*.moe")
    with pytest.raises(InputError, match="is no MLP that is known"):
        emoe(params, experts=2, top_k=1, modules="*.attn")
    more = {"blocks.0.mlp.scale": np.ones(12)}
    with pytest.raises(InputError, match=r"'blocks.0.mlp.scale' is none of an MLP"):
        emoe(params | more, experts=2, top_k=1)
    with pytest.raises(InputError, match=r"has shape \[8, 9\], and 'blocks.0.mlp.fc1' 12 units"):
        emoe(params | {"blocks.0.mlp.fc2.weight": np.ones((8, 9))}, experts=2, top_k=1)
    with pytest.raises(UsageError, match="is not finite"):
        emoe(params | {"blocks.1.mlp.fc1.weight": np.full((12, 8), np.inf)}, experts=2, top_k=1)
    with pytest.raises(UsageError, match="cannot be parted into 5"):
        emergent_scores(params, "blocks.0.mlp.fc1", np.ones((1, 8)), 5)
    save(params, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="never written to"):
        emoe(tmp_path / "m.safetensors", tmp_path / "m.safetensors", experts=2, top_k=1, overwrite=True)
