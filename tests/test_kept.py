"""What is kept of whole tensors between the passes over a model: the same results, worked out once."""

from __future__ import annotations

import io
import os
import tempfile
from collections import Counter
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from refmerge import kept, merge
from refmerge.kept import Kept, once

ASKING = ["knots", "opcm", "official:knots"]  # of the whole model, after they have decomposed its matrices
SHAPES = {"a": (5, 7), "b": (9, 4), "c": (6, 6), "d": (3,)}


def models(count=4):
    draw = np.random.default_rng(5)
    return [{k: draw.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(count)]


@pytest.fixture
def decompositions(monkeypatch):
    """Counts NumPy's decompositions by the shape of the matrix."""
    calls, svd = Counter(), np.linalg.svd

    def counted(x, **options):
        calls[x.shape] += 1
        return svd(x, **options)

    monkeypatch.setattr(np.linalg, "svd", counted)
    return calls


def bits(model):
    return {name: x.tobytes() for name, x in model.items()}


class Full(io.RawIOBase):
    """A file on a disk that takes some bytes and is full."""

    def seek(self, offset, whence=0):
        return offset

    def write(self, data):
        raise OSError(28, "No space left on device")


class Cut(io.BytesIO):
    """A file that has lost its bytes when they are read again."""

    def readinto(self, buffer):
        return 0


class Broken(io.BytesIO):
    def readinto(self, buffer):
        raise OSError(5, "Input/output error")


def no_file(**options):
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("name", ASKING)
def test_each_matrix_is_decomposed_once(name, decompositions):
    base, *tuned = models()
    merge(tuned, name, base=base, threads=1)
    each = 2 if name == "opcm" else 1  # the second and the third model are added, projected
    matrices = sum(len(s) == 2 for s in SHAPES.values()) + (name == "knots")  # to which a vector counts, as a column
    assert sum(decompositions.values()) == each * matrices


@pytest.mark.parametrize("name", ASKING)
@pytest.mark.parametrize("file", [lambda **_: Full(), lambda **_: Cut(), lambda **_: Broken(), no_file])
def test_a_disk_that_fails_costs_time_alone(name, file, monkeypatch, decompositions):
    base, *tuned = models()
    whole = bits(merge(tuned, name, base=base, threads=1))
    once = sum(decompositions.values())
    monkeypatch.setattr(tempfile, "TemporaryFile", file)
    assert bits(merge(tuned, name, base=base, threads=1)) == whole
    assert sum(decompositions.values()) >= 3 * once


def test_half_of_what_is_free_at_most(monkeypatch):
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 8 * 10))
    here = Kept(None)
    here.put(("w", 1), np.ones(6))
    here.put(("w", 2), np.ones(6))
    here.put(("w", 3), np.ones(4))
    assert [here.get(("w", i)) is None for i in (1, 2, 3)] == [False, True, False]
    here.close()


@pytest.mark.parametrize("name", ASKING)
def test_files_are_merged_as_arrays_are_and_nothing_is_left(name, tmp_path, monkeypatch):
    base, *tuned = models()
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path, model in zip(paths, [base, *tuned]):
        save_file(model, path)
    folders, file = [], tempfile.TemporaryFile

    def noted(dir):
        folders.append(dir)
        return file(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", noted)
    (tmp_path / "out").mkdir()
    merge(paths[1:], name, base=paths[0], threads=1, out=tmp_path / "out" / "m.safetensors")
    assert folders and set(folders) == {tmp_path / "out"}
    assert os.listdir(tmp_path / "out") == ["m.safetensors"]
    assert bits(load_file(tmp_path / "out" / "m.safetensors")) == bits(merge(tuned, name, base=base, threads=1))


@pytest.mark.parametrize("threads", [1, 2])
def test_workers_keep_what_each_has_worked_out(threads, tmp_path):
    """Of tensors that are large enough for two workers."""
    draw = np.random.default_rng(6)
    given = [{k: draw.standard_normal((320, 300)).astype(np.float32) for k in "abc"} for _ in range(3)]
    for i, model in enumerate(given):
        save_file(model, tmp_path / f"{i}.safetensors")
    base, *tuned = (tmp_path / f"{i}.safetensors" for i in range(3))
    merge(tuned, "opcm", base=base, threads=threads, out=tmp_path / "m.safetensors")
    assert bits(load_file(tmp_path / "m.safetensors")) == bits(merge(given[1:], "opcm", base=given[0], threads=1))


arrays = hnp.arrays(
    st.sampled_from([np.float64, np.float32, np.int64]), hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
)


@given(st.lists(st.tuples(arrays, st.booleans()), min_size=1, max_size=4), st.booleans())
def test_what_comes_back_has_the_same_bits(drawn, alone):
    made = [x.T if turned else x for x, turned in drawn]
    calls = 0

    @once
    def f(scale):
        nonlocal calls
        calls += 1
        return made[0] if alone else tuple(made)

    here = Kept(None)
    for _ in range(3):
        with here.of("w"):
            again = f(1)
        again = [again] if alone else list(again)
        assert [(x.shape, x.dtype, x.tobytes()) for x in again] == [
            (x.shape, x.dtype, x.tobytes()) for x in (made[:1] if alone else made)
        ]
    assert calls == 1
    f(1)
    assert calls == 2  # outside of a merge nothing is kept
    here.close()


def test_calls_are_told_apart_by_tensor_and_order():
    @once
    def f(x):
        return np.array([x])

    here = Kept(None)
    for _ in range(2):
        for tensor in (1, 2):
            with here.of(str(tensor)):
                assert [int(f(10 * tensor + i)[0]) for i in range(3)] == [10 * tensor + i for i in range(3)]
    here.close()
