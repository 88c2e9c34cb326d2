"""BitDelta: the nearest multiple of the signs, and the store that gives back what the method gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, call, merge
from refmerge.checkpoint import save
from refmerge.compat.official.bitdelta import pack
from refmerge.procedures.task_vectors.bitdelta_restore import bitdelta_restore
from refmerge.procedures.task_vectors.bitdelta_store import bitdelta_store
from refmerge.testing import assert_same

NAME = "layers.0.mlp.up_proj.weight"
SHAPES = {NAME: (7, 13), "conv": (4, 3, 5), "layers.0.mlp.up_proj.bias": (9,), "number": (), "none": (0, 3)}
RELAXED = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
changes = st.lists(st.integers(-16, 16).map(lambda n: n / 4), min_size=1, max_size=9).map(np.array)


def model(draw, dtype=np.float32):
    return {name: np.asarray(draw.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


# --- The method -------------------------------------------------------------------------------------------------------


@RELAXED
@given(changes, st.floats(-3, 3))
def test_the_scale_is_the_nearest(delta, other):
    got = call("bitdelta", [delta], np.zeros_like(delta), layers=["*"])
    B, alpha = np.where(delta >= 0, 1, -1), np.abs(delta).mean()
    squared = np.sum((delta - got) ** 2)
    np.testing.assert_allclose(squared, delta @ delta - delta.size * alpha**2, atol=1e-9)
    assert squared <= np.sum((delta - other * B) ** 2) + 1e-9
    assert alpha <= np.sqrt(np.mean(delta**2)) + 1e-12


@RELAXED
@given(changes)
def test_cut_down_twice_is_once(delta):
    base = np.zeros_like(delta)
    once = call("bitdelta", [delta], base, layers=["*"])
    np.testing.assert_allclose(call("bitdelta", [once], base, layers=["*"]), once, rtol=1e-15)


@pytest.mark.parametrize("entry", ["bitdelta", "official:bitdelta"])
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("model.layers.3.mlp.gate_proj.weight", True),
        ("mlp.deep.down_proj.weight", True),
        ("model.layers.3.mlp.fc1.weight", False),
        ("model.layers.3.attn.c_proj.weight", False),
        ("mlp_proj.weight", False),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_which_layers_are_cut_down(entry, name, cut):
    got = call(entry, [[2.0, -4.0]], [0.0, 0.0], name=name)
    assert got.tolist() == ([3.0, -3.0] if cut else [2.0, -4.0])


@pytest.mark.parametrize("n_bits", [8, 16, 32, 64])
def test_words_of_the_authors_file(n_bits):
    """Bit b of word (i, j) is the sign in row j and column n_bits i + b."""
    delta = np.random.default_rng(0).standard_normal((3, 2 * n_bits))
    words = pack(delta, n_bits)
    assert words.shape == (2, 3) and words.dtype.itemsize == n_bits // 8
    for j in range(3):
        for column in range(2 * n_bits):
            word = int(words[column // n_bits, j]) % (1 << n_bits)
            assert (word >> column % n_bits) & 1 == (delta[j, column] >= 0)
    with pytest.raises(UsageError, match="no multiple"):
        pack(delta[:, 1:], n_bits)


# --- The store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, ("*",), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_the_store_gives_the_methods_bits(tmp_path, dtype, layers):
    draw = np.random.default_rng(0)
    base, tuned = (model(draw, dtype) | {"ids": np.arange(3)} for _ in range(2))
    params = {} if layers is None else {"layers": layers}
    stored = bitdelta_store(tuned, base, tmp_path / "s.safetensors", **params)
    expected = merge([tuned], "bitdelta", base=base, **params)
    assert_same(bitdelta_restore(stored, base), expected)
    save(base, tmp_path / "base.safetensors")
    assert_same(dict(bitdelta_restore(stored.path, tmp_path / "base.safetensors", tmp_path / "out")), expected)
    cut = {NAME} if layers is None else set(SHAPES) if layers else set()
    size = np.dtype(dtype).itemsize
    work = 8 if dtype == np.float64 else 4
    floats = {n: x for n, x in base.items() if n != "ids"}
    assert stored.nbytes == sum(-(-x.size // 8) + work if n in cut else x.size * size for n, x in floats.items())


def test_other_dtypes_than_the_bases(tmp_path):
    draw = np.random.default_rng(0)
    base, tuned = model(draw, ml_dtypes.bfloat16), model(draw) | {"conv": draw.standard_normal((4, 3, 5))}
    stored = bitdelta_store(tuned, base, tmp_path / "s", layers=("*weight", "conv"))
    assert_same(bitdelta_restore(stored, base), merge([tuned], "bitdelta", base=base, layers=["*weight", "conv"]))


def test_torch_files_and_the_same_bytes(tmp_path, torch):
    draw = np.random.default_rng(0)
    base, tuned = model(draw), model(draw)
    save(base, tmp_path / "base.safetensors")
    save(tuned, tmp_path / "tuned.safetensors")
    arrays = bitdelta_store(tuned, base, tmp_path / "a.safetensors")
    files = bitdelta_store(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "b.safetensors")
    across = [{n: torch.from_numpy(x.copy()) for n, x in one.items()} for one in (tuned, base)]
    tensors = bitdelta_store(*across, tmp_path / "c.safetensors")
    assert arrays.path.read_bytes() == files.path.read_bytes() == tensors.path.read_bytes()


def test_a_scale_may_be_another(tmp_path):
    """One that was trained, say."""
    base, tuned = {NAME: np.zeros((1, 2), np.float32)}, {NAME: np.array([[2, -4]], np.float32)}
    stored = bitdelta_store(tuned, base, tmp_path / "s.safetensors")
    save(
        {**stored, f"scale/{NAME}": np.float32(2.5)[...]}, tmp_path / "t.safetensors",
        metadata={"bitdelta": stored.metadata["bitdelta"]},
    )  # fmt: skip
    assert bitdelta_restore(tmp_path / "t.safetensors", base)[NAME].tolist() == [[2.5, -2.5]]


def test_not_finite_and_integers(tmp_path):
    base = {NAME: np.zeros(3, np.float32), "ids": np.arange(2)}
    tuned = {NAME: np.array([1, np.nan, np.inf], np.float32), "ids": np.arange(2) + 1}
    with pytest.raises(InputError, match="integers='base'"):
        bitdelta_store(tuned, base, tmp_path / "s")
    with pytest.raises(InputError, match="nonfinite='propagate'"):
        bitdelta_store(tuned, base, tmp_path / "s", integers="base")
    assert list(tmp_path.iterdir()) == []
    stored = bitdelta_store(tuned, base, tmp_path / "s", integers="base", nonfinite="propagate")
    expected = merge([tuned], "bitdelta", base=base, integers="base", nonfinite="propagate")
    assert_same(bitdelta_restore(stored, base), expected)


def test_refusals(tmp_path):
    draw = np.random.default_rng(0)
    base, tuned = model(draw), model(draw)
    save(base, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match="is not in both model 0 and the base"):
        bitdelta_store(tuned | {"more": base["conv"]}, base, tmp_path / "s")
    with pytest.raises(InputError, match="different shapes"):
        bitdelta_store(tuned | {"conv": base["number"]}, base, tmp_path / "s")
    stored = bitdelta_store(tuned, base, tmp_path / "s")
    with pytest.raises(UsageError, match="overwrite=True"):
        bitdelta_store(tuned, base, tmp_path / "s")
    with pytest.raises(InputError, match="which the base does not have"):
        bitdelta_restore(stored, {"other": base["conv"]})
    with pytest.raises(InputError, match="stored against another base"):
        bitdelta_restore(stored, base | {NAME: base["conv"]})
    with pytest.raises(InputError, match="was not written by bitdelta_store"):
        bitdelta_restore(tmp_path / "base.safetensors", base)
    with pytest.raises(UsageError, match="inputs are never written to"):
        bitdelta_restore(stored, base, tmp_path / "s" / "x.safetensors")
