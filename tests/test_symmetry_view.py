"""Models that are permuted, or averaged, where they are read: the same numbers as in memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import open_checkpoint
from refmerge.checkpoint import save
from refmerge.symmetry import Block, Nested, Spec, view

FEW = settings(max_examples=30, deadline=None)
SPEC = Spec({
    "in": ("P", None), "bias": ("P",), "fold": (None, Block("P", 2), "R"), "heads": (Nested("H", "V", 3), "R"),
    "out": ("R", Nested("H", "V", 3)), "count": None, "one": (),
})  # fmt: skip


def model(seed: int, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"in": (5, 3), "bias": (5,), "fold": (7, 10, 4), "heads": (6, 4), "out": (4, 6)}
    floats = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return floats | {"count": np.array([3, 4]), "one": np.array(2.5, dtype)}


@pytest.fixture(scope="module", params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    arrays = model(0, request.param)
    save(arrays, folder / "model.safetensors")
    with open_checkpoint(folder / "model.safetensors") as checkpoint:
        yield arrays, checkpoint


@FEW
@given(seed=st.integers(0, 2**32 - 1), small=st.sampled_from([0, 1 << 20]), data=st.data())
def test_any_stretch_is_read_as_from_the_permuted_model(opened, seed, small, data):
    arrays, checkpoint = opened
    perms = SPEC.random(arrays, np.random.default_rng(seed))
    expected, seen = SPEC.apply(perms, arrays), view.Permuted(checkpoint, SPEC, perms)
    name = data.draw(st.sampled_from(sorted(arrays)))
    start = data.draw(st.integers(0, arrays[name].size))
    stop = data.draw(st.integers(start, arrays[name].size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "SMALL", small)  # by rows, or whole
        raw = np.empty((stop - start) * arrays[name].itemsize, np.uint8)
        seen.read(name, start, stop, raw)
        assert raw.tobytes() == expected[name].reshape(-1)[start:stop].tobytes()
        assert seen[name].dtype == arrays[name].dtype and np.array_equal(seen[name], expected[name])


def test_a_view_of_a_view_composes(opened):
    arrays, checkpoint = opened
    p, q = (SPEC.random(arrays, np.random.default_rng(seed)) for seed in (1, 2))
    twice = view.Permuted(view.Permuted(checkpoint, SPEC, p), SPEC, q)
    once = SPEC.apply(SPEC.compose(p, q), arrays)
    assert all(np.array_equal(twice[name], once[name]) for name in arrays)


def test_views_are_merged_from_disk_to_disk(opened, tmp_path):
    arrays, checkpoint = opened
    perms = SPEC.random(arrays, np.random.default_rng(3))
    merged = refmerge.merge([checkpoint, view.Permuted(checkpoint, SPEC, perms)], "linear", out=tmp_path / "merged")
    expected = refmerge.merge([arrays, SPEC.apply(perms, arrays)], "linear")
    assert all(np.array_equal(merged[name], expected[name]) for name in arrays)


def test_a_view_wants_permutations_of_its_model(opened):
    _, checkpoint = opened
    with pytest.raises(refmerge.UsageError, match="'P' is int64 of shape"):
        view.Permuted(checkpoint, SPEC, {"P": np.arange(4)})


@pytest.mark.parametrize("stretch", [1, 5, 1 << 22])
def test_pairs_are_the_tensors(opened, stretch, monkeypatch):
    monkeypatch.setattr(view, "STRETCH", stretch)
    arrays, checkpoint = opened
    perms = SPEC.random(arrays, np.random.default_rng(4))
    expected = SPEC.apply(perms, arrays)
    for name in arrays:
        for whole in (False, True):
            found = list(view.pairs(name, arrays, checkpoint, SPEC, perms, whole=whole))
            assert len(found) == 1 or not whole
            for part, of in zip(zip(*found), (arrays, expected)):
                joined = np.concatenate(part) if arrays[name].ndim else part[0]
                assert np.array_equal(joined, of[name])


def test_the_mean_of_models(opened):
    arrays, checkpoint = opened
    other = model(1)
    mean = view.Mean([checkpoint, other])
    assert sorted(mean) == sorted(arrays) and len(mean) == len(arrays)
    for name in arrays:
        expected = (arrays[name].astype(np.float64) + other[name].astype(np.float64)) / 2
        assert np.array_equal(mean[name], expected)
        if arrays[name].ndim:
            assert np.array_equal(view.stretch(mean, name, 1, 2), expected[1:2])
