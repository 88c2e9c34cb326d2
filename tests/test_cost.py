"""The estimate of a merge's time. How long anything takes is no matter of tests; what is tried and how it is scaled is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refmerge import cost
from refmerge.api import prepare
from refmerge.checkpoint import save
from refmerge.errors import ResourceError

SHAPES = {"embed": (300, 96), "norm": (96,), "down": (96, 40)}


def plan_of(folder, name="ties", count=3, dtype=np.float32, **options):
    for k in range(count):
        save({n: np.full(s, k, np.float32).astype(dtype) for n, s in SHAPES.items()}, folder / f"{k}.safetensors")
    paths = [folder / f"{k}.safetensors" for k in range(count)]
    return prepare(paths[1:], name, base=paths[0], **options)


def test_the_difference_of_two_sizes_is_scaled(tmp_path, monkeypatch):
    """A merge that takes 50 ms and 3 ns an entry: what does not grow is left out, and the start of the command added."""
    monkeypatch.setattr(cost._Trial, "seconds", lambda self, tensors: 0.05 + 3e-9 * tensors * self.size)
    plan = plan_of(tmp_path, threads=2)
    entries = 300 * 96 + 96 + 96 * 40
    found = cost.estimate(plan)
    assert found is not None
    assert found.per_entry == pytest.approx(3.0)
    assert found.seconds == pytest.approx(cost.START + 3e-9 * entries)
    assert found.needs_per_second == pytest.approx(3 * 4 * entries / found.seconds)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("name", ["linear", "ties", "mergekit:dare_ties"])
def test_a_trial_merges_what_the_plan_would(name, dtype, tmp_path, monkeypatch):
    for constant, value in {"LARGEST": 1 << 14, "SMALLEST": 1 << 12, "REPEATS": 1}.items():
        monkeypatch.setattr(cost, constant, value)
    tried, elsewhere = [], tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def watched(models, method, **options):
        tried.append(plan := prepare(models, method, **options))
        return plan

    monkeypatch.setattr(cost, "prepare", watched)
    params = {"params": {"weight": 0.5, "density": 0.5}} if name.startswith("mergekit") else {}
    plan = plan_of(tmp_path, name, dtype=dtype, threads=1, **params)
    found = cost.estimate(plan)
    assert found is not None and np.isfinite(found.seconds)
    for trial in tried:
        assert trial.work.method is plan.work.method
        assert [dict(t.params) for t in trial.work.tensors] == [dict(plan.work.tensors[0].params)] * len(trial.work.tensors)
        assert {t.work for t in trial.work.tensors} == {plan.work.tensors[0].work}
        assert {(t.out, t.rows[1]) for t in trial.work.tensors} == {(plan.work.tensors[0].out, 96)}  # most are rows of 96
        assert trial.work.bytes_of(trial.work.tensors[0], 1) == plan.work.bytes_of(plan.work.tensors[0], 1)
    assert not list(elsewhere.iterdir())


def test_whole_tensors_are_tried_small(tmp_path, monkeypatch):
    """Decompositions that take 50 ms and 100 ns for each of m n min(m, n): the largest is far from being made."""
    tried = []

    def seconds(trial, tensors, threads):
        tried.append(trial._shape)
        return 0.05 + 1e-7 * tensors * threads * trial.size * min(trial._shape)

    monkeypatch.setattr(cost._Trial, "seconds", seconds)
    for k in range(2):
        layers = {"up": np.zeros((1024, 512), np.float16), "down": np.zeros((512, 1024), np.float16)}
        save(layers, tmp_path / f"{k}.safetensors")
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for threads in (1, 2):
        found = cost.estimate(prepare(paths[1:], "iso_c", base=paths[0], threads=threads))
        assert found is not None
        assert found.seconds == pytest.approx(cost.START + 2e-7 * 1024 * 512 * 512 / threads, rel=0.05)
    assert max(tried) == (256, 128)


@pytest.mark.parametrize("name", ["widen", "tsvm", "wudi"])
def test_whole_tensors_are_merged_as_planned(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "ENOUGH", 0.0)
    found = cost.estimate(plan_of(tmp_path, name, threads=2))
    assert found is not None and np.isfinite(found.seconds)


def test_no_estimate_where_there_is_no_room_to_try(tmp_path, monkeypatch):
    def full(*_):
        raise ResourceError("no room")

    monkeypatch.setattr(cost._Trial, "seconds", full)
    assert cost.estimate(plan_of(tmp_path)) is None


def test_no_estimate_of_what_is_not_read_from_files():
    x = {"x": np.ones(4, np.float32)}
    assert cost.estimate(prepare([x, x], "linear")) is None
