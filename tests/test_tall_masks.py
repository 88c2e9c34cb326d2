"""TALL-masks and Consensus Merging: laws of masks and counts, and the store that gives back what the method gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, call, merge, open_checkpoint
from refmerge.checkpoint import save
from refmerge.methods.task_vectors.tall_masks import mask
from refmerge.procedures.task_vectors.tall_masks_restore import tall_masks_restore
from refmerge.procedures.task_vectors.tall_masks_store import tall_masks_store
from refmerge.stores import unpacked
from refmerge.testing import assert_same

SHAPES = {"a.weight": (7, 13), "b.weight": (4, 3, 5), "bias": (9,), "number": (), "none": (0, 3)}
dyadic = st.integers(-16, 16).map(lambda n: n / 4)
RELAXED = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def model(draw, dtype=np.float32, shapes=SHAPES):
    return {name: np.asarray(draw.standard_normal(shape), dtype) for name, shape in shapes.items()}


@st.composite
def task_vectors(draw, least=1, most=5, size=6):
    count = draw(st.integers(least, most))
    return [np.array(draw(st.lists(dyadic, min_size=size, max_size=size))) for _ in range(count)]


# --- Masks ------------------------------------------------------------------------------------------------------------


@RELAXED
@given(task_vectors(), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]))
def test_masks_are_nested(tau, a, b):
    low, high = sorted((a, b))
    wide, narrow = (mask(tau[0], sum(tau), c) for c in (low, high))
    assert np.all(narrow <= wide)
    assert np.array_equal(mask(tau[0], sum(tau), 0.0), tau[0] != 0)


@RELAXED
@given(task_vectors(), dyadic)
def test_at_threshold_one_the_nearer_of_two(tau, base):
    base = np.full(6, base)
    got = call("tall_masks", [base + t for t in tau], base, threshold=1.0)
    assert np.array_equal(np.abs(got - base - tau[0]), np.minimum(np.abs(tau[0]), np.abs(sum(tau) - tau[0])))


@RELAXED
@given(task_vectors(least=2), st.sampled_from([0.2, 0.4, 1.0]), st.sampled_from(["sum", "ties"]))
def test_the_order_of_the_others_does_not_matter(tau, threshold, multitask):
    params = {"threshold": threshold, "multitask": multitask, "density": 0.5}
    turned = call("tall_masks", [tau[0], *reversed(tau[1:])], np.zeros(6), **params)
    assert_same(turned, call("tall_masks", tau, np.zeros(6), **params))


def test_disjoint_tasks_come_back():
    base, draw = model(np.random.default_rng(0)), np.random.default_rng(1)
    owner = {name: draw.integers(0, 4, shape) for name, shape in SHAPES.items()}
    models = [
        {n: np.where(owner[n] == t, x + np.float32(0.5), x).astype(np.float32) for n, x in base.items()} for t in range(3)
    ]
    for task, tuned in enumerate(models):
        for entry, extra in (("tall_masks", {"threshold": 0.5}), ("official:tall_masks", {"tall_mask_lambda": 0.5})):
            got = merge(models, entry, base=base, task=task, **extra)
            for name, x in tuned.items():
                np.testing.assert_allclose(got[name], x, rtol=0, atol=2e-7)


# --- Consensus --------------------------------------------------------------------------------------------------------


@RELAXED
@given(task_vectors(), st.sampled_from([0.2, 0.4, 1.0]), st.sampled_from(["sum", "ties"]))
def test_what_stays_at_more_stays_at_less(tau, threshold, multitask):
    params = {"threshold": threshold, "multitask": multitask, "density": 0.5}
    merged = [call("consensus", tau, np.zeros(6), k=k, **params) for k in range(len(tau) + 2)]
    for more, less in zip(merged[1:], merged):
        assert np.all((more == 0) | (more == less))
    assert not np.any(merged[-1])
    lower = call("consensus", tau, np.zeros(6), k=1, **params | {"threshold": threshold / 2})
    assert np.all((merged[1] == 0) | (merged[1] == lower))


@RELAXED
@given(task_vectors(), st.sampled_from([0.5, 1.0, -0.25]))
def test_no_consensus_is_task_arithmetic(tau, lambda_):
    base = np.ones(6)
    models = [base + t for t in tau]
    got = call("consensus", models, base, k=0, lambda_=lambda_)
    assert_same(got, call("task_arithmetic", models, base, lambda_=lambda_), signed_zero=False)


@RELAXED
@given(task_vectors(), st.sampled_from([0.2, 0.4, 1.0]), st.sampled_from(["sum", "ties"]))
def test_the_count_is_that_of_the_masks(tau, threshold, multitask):
    """By the definition: what each task's recovered model takes of the vector, counted."""
    vector = {"multitask": multitask, "density": 0.5}
    whole = call("consensus", tau, np.zeros(6), k=0, threshold=threshold, **vector)
    taken = [call("tall_masks", tau, np.zeros(6), task=t, threshold=threshold, **vector) for t in range(len(tau))]
    used = sum((x != 0).astype(int) for x in taken)
    for k in (1, 2, 3):
        expected = np.where(used >= k, whole, 0.0)
        got = call("consensus", tau, np.zeros(6), k=k, threshold=threshold, **vector)
        assert_same(got, expected, signed_zero=False)


# --- The store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multitask", ["sum", "ties"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_the_store_gives_the_methods_bits(tmp_path, dtype, multitask):
    draw = np.random.default_rng(0)
    base, *models = (model(draw, dtype) | {"ids": np.arange(3)} for _ in range(4))
    thresholds = [0.2, 0.5, 1.0]
    stored = tall_masks_store(models, base, tmp_path / "s.safetensors", threshold=thresholds, multitask=multitask)
    for task, threshold in enumerate(thresholds):
        expected = merge(models, "tall_masks", base=base, task=task, threshold=threshold, multitask=multitask)
        assert_same(tall_masks_restore(stored, task=task), expected)
        assert_same(dict(tall_masks_restore(stored.path, tmp_path / f"{task}", task=task)), expected)
    size = np.dtype(dtype).itemsize
    work = 8 if dtype == np.float64 else 4
    assert stored.nbytes == 24 + sum(x.size * (size + work) + 3 * -(-x.size // 8) for n, x in base.items() if n != "ids")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "s.safetensors"]


def test_the_file_is_that_small(tmp_path):
    """Eight fine-tunes of a million weights: what is promised is what lies on the disk, up to the header."""
    draw = np.random.default_rng(0)
    base, *models = ({"w": draw.standard_normal((1000, 1000)).astype(np.float32)} for _ in range(9))
    stored = tall_masks_store(models, base, tmp_path / "eight.safetensors")
    assert stored.nbytes == 9_000_000  # 4 + 4 + 8 / 8 bytes a weight, in place of 36
    assert 0 < (tmp_path / "eight.safetensors").stat().st_size - stored.nbytes < 1000
    again = tall_masks_store(models, base, tmp_path / "again.safetensors")
    assert stored.path.read_bytes() == again.path.read_bytes()
    assert_same(tall_masks_restore(stored, task=7), merge(models, "tall_masks", base=base, task=7))


def test_bits_of_a_store(tmp_path):
    base = {"x": np.zeros(9, np.float32)}
    models = [
        {"x": np.array([4, 0, 0, 1, 0, 0, 0, 0, 2], np.float32)},
        {"x": np.array([0, 3, 0, -2, 0, 0, 0, 0, 2], np.float32)},
    ]
    stored = tall_masks_store(models, base, tmp_path / "two", threshold=1.0)
    assert stored["mask/x"].tolist() == [[0b10000000, 0], [0b01010000, 0]]
    assert stored["multitask/x"].tolist() == [4, 3, 0, -1, 0, 0, 0, 0, 4]
    assert unpacked(stored, "x", 1).tolist() == [False, True, False, True, *[False] * 5]


def test_models_wider_than_their_base(tmp_path):
    draw = np.random.default_rng(0)
    base = model(draw, ml_dtypes.bfloat16)
    models = [model(draw, np.float16), model(draw, np.float32)]
    stored = tall_masks_store(models, base, tmp_path / "mixed")
    for task in (0, 1):
        assert_same(tall_masks_restore(stored, task=task), merge(models, "tall_masks", base=base, task=task))


def test_files_and_arrays_of_torch_are_stored_alike(tmp_path, torch):
    draw = np.random.default_rng(0)
    base, *models = (model(draw) for _ in range(3))
    for i, one in enumerate((base, *models)):
        save(one, tmp_path / f"{i}.safetensors")
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    tensors = [{n: torch.from_numpy(x.copy()) for n, x in one.items()} for one in (base, *models)]
    expected = dict(tall_masks_store(models, base, tmp_path / "arrays"))
    assert_same(dict(tall_masks_store(files[1:], files[0], tmp_path / "files")), expected)
    assert_same(dict(tall_masks_store(tensors[1:], tensors[0], tmp_path / "torch")), expected)


def test_not_finite_and_integers(tmp_path):
    base = {"x": np.zeros(3, np.float32), "ids": np.arange(2)}
    models = [{"x": np.array([1, np.nan, np.inf], np.float32), "ids": np.arange(2) + 1}]
    with pytest.raises(InputError, match="integers='base'"):
        tall_masks_store(models, base, tmp_path / "s")
    with pytest.raises(InputError, match="nonfinite='propagate'"):
        tall_masks_store(models, base, tmp_path / "s", integers="base")
    assert list(tmp_path.iterdir()) == []
    stored = tall_masks_store(models, base, tmp_path / "s", integers="base", nonfinite="propagate")
    expected = merge(models, "tall_masks", base=base, integers="base", nonfinite="propagate")
    assert_same(tall_masks_restore(stored), expected)


def test_refusals_of_the_store(tmp_path):
    base, *models = (model(np.random.default_rng(i)) for i in range(3))
    save(base, tmp_path / "base.safetensors")
    with pytest.raises(UsageError, match="threshold = -1"):
        tall_masks_store(models, base, tmp_path / "s", threshold=-1.0)
    with pytest.raises(UsageError, match="threshold has 3 values for 2 models"):
        tall_masks_store(models, base, tmp_path / "s", threshold=[0.1, 0.2, 0.3])
    with pytest.raises(UsageError, match="multitask"):
        tall_masks_store(models, base, tmp_path / "s", multitask="mean")
    with pytest.raises(UsageError, match="at least 1 model"):
        tall_masks_store([], base, tmp_path / "s")
    for odd in ([models[0], models[1] | {"more": base["bias"]}], [models[0], {"bias": base["bias"]}]):
        with pytest.raises(InputError, match="is not in both model 1 and the base"):
            tall_masks_store(odd, base, tmp_path / "s")
    with pytest.raises(UsageError, match="inputs are never written to"):
        tall_masks_store([tmp_path / "base.safetensors"], tmp_path / "base.safetensors", tmp_path / "base.safetensors")
    stored = tall_masks_store(models, base, tmp_path / "s")
    with pytest.raises(UsageError, match="overwrite=True"):
        tall_masks_store(models, base, tmp_path / "s")
    tall_masks_store(models, base, tmp_path / "s", overwrite=True, threshold=1.0)
    stored = open_checkpoint(tmp_path / "s")
    for task in (-1, 2):
        with pytest.raises(UsageError, match="none of 0 to 1"):
            tall_masks_restore(stored, task=task)
    with pytest.raises(UsageError, match="never written to"):
        tall_masks_restore(stored, tmp_path / "s" / "x.safetensors", task=0)
    with pytest.raises(InputError, match="was not written by tall_masks_store"):
        tall_masks_restore(tmp_path / "base.safetensors")
