"""EMR-Merging: what holds of a recovered model, and the store that gives back what the method gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, call, merge, open_checkpoint
from refmerge.checkpoint import save
from refmerge.methods.task_vectors.emr import unified
from refmerge.methods.task_vectors.ties import elect, elected
from refmerge.procedures.task_vectors.emr_restore import emr_restore
from refmerge.procedures.task_vectors.emr_store import emr_store
from refmerge.testing import assert_same

SHAPES = {"a.weight": (7, 13), "b.weight": (4, 3, 5), "bias": (9,), "number": (), "none": (0, 3), "rescaler": (2,)}
dyadic = st.integers(-16, 16).map(lambda n: n / 4)
RELAXED = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def model(draw, dtype=np.float32, shapes=SHAPES):
    return {name: np.asarray(draw.standard_normal(shape), dtype) for name, shape in shapes.items()}


@st.composite
def task_vectors(draw, least=1, most=5, size=6):
    count = draw(st.integers(least, most))
    return [np.array(draw(st.lists(dyadic, min_size=size, max_size=size))) for _ in range(count)]


# --- The recovered model ----------------------------------------------------------------------------------------------


@RELAXED
@given(task_vectors())
def test_it_is_as_far_from_the_base_as_the_tasks_own(tau):
    got = call("emr", tau, np.zeros(6))
    own = np.abs(tau[0]).sum()
    agrees = np.any(elect(tau) * tau[0] > 0)
    np.testing.assert_allclose(np.abs(got).sum(), own if agrees else 0, rtol=1e-12)


@RELAXED
@given(task_vectors())
def test_what_the_mask_leaves_has_the_elected_sign_and_the_largest_magnitude(tau):
    gamma = elect(tau)
    tau_uni = unified(tau, gamma)
    for tau_t in tau:
        left = elected(tau_t, gamma) * tau_uni
        assert np.all(left * gamma >= 0)
        assert np.all((left == 0) | (np.abs(left) >= np.abs(tau_t)) & (left * tau_t > 0))
    largest = [max((abs(t[i]) for t in tau if t[i] * gamma[i] > 0), default=0.0) for i in range(6)]
    assert np.array_equal(np.abs(tau_uni), largest)


@RELAXED
@given(task_vectors(least=2), st.sampled_from(["entries", "tensors"]))
def test_the_order_of_the_others_does_not_matter(tau, average):
    turned = call("emr", [tau[0], *reversed(tau[1:])], np.zeros(6), average=average)
    assert_same(turned, call("emr", tau, np.zeros(6), average=average), signed_zero=False)


@pytest.mark.parametrize("average", ["entries", "tensors"])
def test_disjoint_tasks_come_back(average):
    base, draw = model(np.random.default_rng(0)), np.random.default_rng(1)
    owner = {name: draw.integers(0, 4, shape) for name, shape in SHAPES.items()}
    models = [
        {n: np.where(owner[n] == t, x + np.float32(0.5), x).astype(np.float32) for n, x in base.items()} for t in range(3)
    ]
    for entry in ("emr", "official:emr"):
        params = {"average": average} if entry == "emr" else {"flat": average == "entries"}
        shapes = {n for n, s in SHAPES.items() if 0 not in s}
        for task in range(3):
            got = merge(models, entry, base=base, task=task, **params)
            for name in shapes:
                np.testing.assert_allclose(got[name], models[task][name], rtol=0, atol=1e-6)


def test_one_tensor_averages_alike():
    """The two averages, and a tensor by itself, are one thing where there is one tensor."""
    base, *models = np.random.default_rng(2).standard_normal((4, 5, 6))
    expected = call("emr", models, base, task=2)
    np.testing.assert_allclose(call("emr", models, base, task=2, average="tensors"), expected, rtol=1e-14)
    np.testing.assert_allclose(call("official:emr", models, base, task=2), expected, atol=1e-6)


# --- The store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["entries", "tensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_the_store_gives_the_methods_bits(tmp_path, dtype, average):
    draw = np.random.default_rng(0)
    base, *models = (model(draw, dtype) | {"ids": np.arange(3)} for _ in range(4))
    stored = emr_store(models, base, tmp_path / "s.safetensors", average=average)
    for task in range(3):
        expected = merge(models, "emr", base=base, task=task, average=average)
        assert_same(emr_restore(stored, task=task), expected)
        assert_same(dict(emr_restore(stored.path, tmp_path / f"{task}", task=task)), expected)
    size = np.dtype(dtype).itemsize
    work = 8 if dtype == np.float64 else 4
    tensors = sum(x.size * (size + work) + 3 * -(-x.size // 8) for n, x in base.items() if n != "ids")
    assert stored.nbytes == 24 + 24 + tensors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "s.safetensors"]


def test_more_than_a_leaf_of_a_sum(tmp_path):
    draw = np.random.default_rng(0)
    base, *models = (model(draw, shapes={"w": (300, 500), "v": (70000,)}) for _ in range(3))
    stored = emr_store(models, base, tmp_path / "s.safetensors")
    again = emr_store(models, base, tmp_path / "again.safetensors")
    assert stored.path.read_bytes() == again.path.read_bytes()
    for task in range(2):
        assert_same(emr_restore(stored, task=task), merge(models, "emr", base=base, task=task))


def test_files_and_arrays_of_torch_are_stored_alike(tmp_path, torch):
    draw = np.random.default_rng(0)
    base, *models = (model(draw) for _ in range(3))
    for i, one in enumerate((base, *models)):
        save(one, tmp_path / f"{i}.safetensors")
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    tensors = [{n: torch.from_numpy(x.copy()) for n, x in one.items()} for one in (base, *models)]
    expected = dict(emr_store(models, base, tmp_path / "arrays"))
    assert_same(dict(emr_store(files[1:], files[0], tmp_path / "files")), expected)
    assert_same(dict(emr_store(tensors[1:], tensors[0], tmp_path / "torch")), expected)


def test_mixed_dtypes(tmp_path):
    draw = np.random.default_rng(0)
    base = model(draw, ml_dtypes.bfloat16)
    models = [model(draw), model(draw) | {"bias": draw.standard_normal(9)}]
    stored = emr_store(models, base, tmp_path / "s")
    for task in (0, 1):
        assert_same(emr_restore(stored, task=task), merge(models, "emr", base=base, task=task))


def test_not_finite_and_integers(tmp_path):
    base = {"x": np.zeros(3, np.float32), "ids": np.arange(2)}
    models = [{"x": np.array([1, np.nan, np.inf], np.float32), "ids": np.arange(2) + 1}]
    with pytest.raises(InputError, match="integers='base'"):
        emr_store(models, base, tmp_path / "s")
    with pytest.raises(InputError, match="nonfinite='propagate'"):
        emr_store(models, base, tmp_path / "s", integers="base")
    assert list(tmp_path.iterdir()) == []
    stored = emr_store(models, base, tmp_path / "s", integers="base", nonfinite="propagate")
    expected = merge(models, "emr", base=base, integers="base", nonfinite="propagate")
    assert_same(emr_restore(stored), expected)


def test_refusals_of_the_store(tmp_path):
    base, *models = (model(np.random.default_rng(i)) for i in range(3))
    save(base, tmp_path / "base.safetensors")
    with pytest.raises(UsageError, match="average"):
        emr_store(models, base, tmp_path / "s", average="models")
    with pytest.raises(UsageError, match="at least 1 model"):
        emr_store([], base, tmp_path / "s")
    for odd in ([models[0], models[1] | {"more": base["bias"]}], [models[0], {"bias": base["bias"]}]):
        with pytest.raises(InputError, match="is not in both model 1 and the base"):
            emr_store(odd, base, tmp_path / "s")
    with pytest.raises(UsageError, match="inputs are never written to"):
        emr_store([tmp_path / "base.safetensors"], tmp_path / "base.safetensors", tmp_path / "base.safetensors")
    emr_store(models, base, tmp_path / "s")
    with pytest.raises(UsageError, match="overwrite=True"):
        emr_store(models, base, tmp_path / "s")
    emr_store(models, base, tmp_path / "s", overwrite=True, average="tensors")
    stored = open_checkpoint(tmp_path / "s")
    for task in (-1, 2):
        with pytest.raises(UsageError, match="none of 0 to 1"):
            emr_restore(stored, task=task)
    with pytest.raises(UsageError, match="never written to"):
        emr_restore(stored, tmp_path / "s" / "x.safetensors", task=0)
    with pytest.raises(InputError, match="was not written by emr_store"):
        emr_restore(tmp_path / "base.safetensors")
