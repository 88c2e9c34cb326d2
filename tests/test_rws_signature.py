"""Signatures that are kept by themselves: what `rws` computes, to the bit, in codes; and laws of quantised signatures."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import testing
from refmerge.api import prepare
from refmerge.compat.official.rws import select_layers
from refmerge.procedures.task_vectors.rws_signature import patch, rws_signature

LEVELS = st.sampled_from([2, 3, 4, 16, 255, 256, 257, 65536])


def three(seed: int, dtype: str = "float32") -> tuple[dict, dict, dict, dict]:
    """base, clean, and two robust models, of random entries in tensors of several shapes."""
    draw = np.random.default_rng(seed)
    shapes = {"conv1.w": (3, 2, 2), "conv2.w": (5,), "fc.w": (), "fc.b": (1,)}
    return tuple({k: draw.standard_normal(s).astype(dtype) for k, s in shapes.items()} for _ in range(4))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    levels=LEVELS,
    dtype=st.sampled_from(["float32", "float64", "float16", ml_dtypes.bfloat16]),
    weights=st.lists(st.sampled_from([1.0, 0.5, 0.3, -0.7, 2.0]), min_size=2, max_size=2),
)
def test_patching_with_signatures_is_rws(seed, levels, dtype, weights):
    base, clean, *robust = three(seed, dtype)
    kept = [rws_signature(x, clean, base, levels=levels) for x in robust]
    merged = refmerge.merge([clean, *robust], "rws", base=base, weight=[1.0, *weights], levels=levels)
    testing.assert_same(patch(clean, *kept, weight=weights), merged)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), levels=LEVELS)
def test_codes(seed, levels):
    base, clean, robust, _ = three(seed, "float64")
    kept = rws_signature(robust, clean, base, levels=levels)
    for name in clean:
        code, (low, step) = kept[f"{name}.codes"], kept[f"{name}.scale"]
        assert code.dtype == (np.uint8 if levels <= 256 else np.uint16) and code.shape == clean[name].shape
        a, r = (np.ravel(x[name] - base[name]) for x in (clean, robust))
        v = r - (a @ r) / (a @ a) * a
        assert code.min() == 0 and code.max() == (levels - 1 if step else 0)
        off = np.abs(low + step * np.ravel(code) - v)
        assert np.all(off <= step / 2 + 1e-14 * np.abs(v).max(initial=1))
        assert abs(v @ a) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), weight=st.sampled_from([1.0, 0.25, -3.0]))
def test_a_patch_can_be_taken_off(seed, weight):
    base, clean, robust, _ = three(seed, "float64")
    kept = rws_signature(robust, clean, base)
    back = patch(patch(clean, kept, weight=weight), kept, weight=-weight)
    for name, x in clean.items():
        np.testing.assert_allclose(back[name], x, rtol=0, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    levels=LEVELS,
    elements=st.sampled_from([100, 1024, 3000]),
    entry=st.sampled_from(["", "official:"]),
)
def test_quantised_signatures_do_not_depend_on_blocks(seed, levels, elements, entry):
    draw = np.random.default_rng(seed)
    shapes = {"a": (70, 70), "bn": (9,), "b": (3, 1025)}
    base, *models = [{k: draw.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(4)]
    if entry:
        params = {"quantization": max(levels, 3), "weight": 0.5, "key_list": ["a"]}
        params["quantization_method"] = ("linear", "tanh")[seed % 2]
    else:
        params = {"levels": levels, "weight": [1.0, 0.3, -0.7], "layers": ["a", "bn"]}
    plan = prepare(models, f"{entry}rws", base=base, params=params)
    plan.elements, plan.threads = elements, 2
    whole = refmerge.merge(models, f"{entry}rws", base=base, threads=1, **params)
    testing.assert_same(plan.run(), whole)


def test_libraries_quantise_alike():
    torch = pytest.importorskip("torch")
    for seed in range(5):
        base, *models = three(seed)
        put = [{k: torch.from_numpy(np.array(x)) for k, x in m.items()} for m in (base, *models)]
        for params in ({"levels": 5}, {"levels": 256, "weight": 0.3}):
            ours = refmerge.merge(models, "rws", base=base, **params)
            testing.assert_same(refmerge.merge(put[1:], "rws", base=put[0], **params), ours)


def test_by_hand():
    """a = (2, 2, 0, 0), r = (3, -1, 4, 0): v = r - a / 2 = (2, -2, 4, 0); with 4 levels in steps of 2."""
    kept = rws_signature({"w": np.array([3.0, -1, 4, 0])}, {"w": np.array([2.0, 2, 0, 0])}, {"w": np.zeros(4)}, levels=4)
    assert kept["w.codes"].tolist() == [2, 0, 3, 1] and kept["w.scale"].tolist() == [-2, 2]
    assert patch({"w": np.ones(4), "n": np.arange(2)}, kept, weight=-1)["w"].tolist() == [-1, 3, -3, 1]


def test_files(tmp_path):
    base, clean, robust, _ = three(1)
    save = pytest.importorskip("safetensors.numpy").save_file
    for name, model in (("base", base), ("clean", clean), ("robust", robust)):
        save(model, tmp_path / f"{name}.safetensors")
    opened = [refmerge.open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("robust", "clean", "base")]
    kept = rws_signature(*opened, layers=["conv*"], levels=16)
    assert sorted(kept) == ["conv1.w.codes", "conv1.w.scale", "conv2.w.codes", "conv2.w.scale"]
    save(kept, tmp_path / "fog.safetensors")
    testing.assert_same(patch(opened[1], refmerge.open_checkpoint(tmp_path / "fog.safetensors")), patch(clean, kept))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"levels": 1}, "levels = 1 is no whole number from 2 to 65536"),
        ({"levels": 2.0}, "levels = 2.0 is no whole number"),
        ({"layers": ["block*"]}, "none of layers"),
        ({"robust": {}}, "'x' is in the clean model and not in the robust one"),
        ({"base": {"x": np.zeros(3)}}, "different shapes: [2] in the robust model"),
        ({"robust": {"x": np.array([1.0, np.nan])}}, "'x' has a signature that is not finite"),
    ],
)
def test_what_cannot_be(change, message):
    given = {"robust": {"x": np.ones(2)}, "clean": {"x": np.arange(2.0)}, "base": {"x": np.zeros(2)}} | change
    with pytest.raises(refmerge.RefmergeError) as refused:
        rws_signature(given.pop("robust"), given.pop("clean"), given.pop("base"), **given)
    assert message in str(refused.value)


def test_what_cannot_be_patched():
    kept = rws_signature({"x": np.ones(2)}, {"x": np.arange(2.0)}, {"x": np.zeros(2)})
    with pytest.raises(refmerge.InputError, match="'x' of a signature is not in the model"):
        patch({"y": np.ones(2)}, kept)
    with pytest.raises(refmerge.InputError, match="another shape"):
        patch({"x": np.ones(3)}, kept)
    with pytest.raises(refmerge.UsageError, match="2 weights for 1 signatures"):
        patch({"x": np.ones(2)}, kept, weight=[1, 2])


def test_the_authors_layers():
    """Of vgg16 convolutions, of resnet50 the stem and then blocks, in the order of the numbers in the names."""
    four, one = np.zeros((1, 1, 1, 1)), np.zeros(1)
    vgg = {f"features.{i}.{part}": x for i in (10, 0, 2) for part, x in (("weight", four), ("bias", one))}
    assert select_layers(vgg | {"classifier.0.weight": one}, 2) == [
        "features.0.weight", "features.0.bias", "features.2.weight", "features.2.bias",
    ]  # fmt: skip
    assert select_layers(vgg, 3)[-1] == "features.10.bias"
    resnet = {f"layer{i}.{j}.conv{k}.weight": four for i in (2, 1) for j in (1, 0) for k in (2, 1)}
    resnet |= {"conv1.weight": four, "bn1.weight": one, "fc.weight": one}
    assert select_layers(resnet, 3, "resnet50") == [
        "conv1.weight", *(f"layer1.{j}.conv{k}.weight" for j in (0, 1) for k in (1, 2, 3)),
    ]  # fmt: skip
    with pytest.raises(refmerge.UsageError, match="keep_num = 0"):
        select_layers(vgg, 0)
