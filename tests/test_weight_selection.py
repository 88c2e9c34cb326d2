"""What weight selection picks, by hand and as laws."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import UsageError, open_checkpoint, registry
from refmerge.checkpoint import save
from refmerge.procedures.averaging.weight_selection import uniform

weight_selection = registry.procedure("weight_selection")
SIZES = st.integers(0, 40)


@pytest.mark.parametrize(
    ("n", "m", "places"),
    [
        (6, 3, [0, 2, 4]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (6, 1, [0]),
        (6, 0, []),
        (0, 0, []),
        (5, 3, [0, 2, 4]),  # 0, 2, 4
        (4, 3, [0, 2, 3]),  # 0, 1.5, 3: a half goes to the even place
        (8, 3, [0, 4, 7]),  # 0, 3.5, 7
        (12, 5, [0, 3, 6, 8, 11]),  # 0, 2.75, 5.5, 8.25, 11
        (48, 23, [0, 2, 4, 6, 9, 11, 13, 15, 17, 19, 21, 24, 26, 28, 30, 32, 34, 36, 38, 41, 43, 45, 47]),
    ],
)
def test_uniform_places(n, m, places):
    assert uniform(n, m) == places


@given(SIZES, SIZES)
def test_uniform_places_are_spread(a, b):
    n, m = max(a, b), min(a, b)
    places = uniform(n, m)
    assert len(places) == m and all(0 <= p < n for p in places)
    assert all(p < q for p, q in pairwise(places))
    if m:
        assert places[0] == 0
        steps = {q - p for p, q in pairwise(places)}
        assert max(steps, default=0) - min(steps, default=0) <= 1
        assert n % m == 0 or places[-1] == n - 1


@given(st.lists(st.tuples(SIZES, SIZES), max_size=3), st.sampled_from(["uniform", "consecutive"]))
def test_each_axis_is_selected_for_itself(sizes, select):
    n, m = [max(s) for s in sizes], tuple(min(s) for s in sizes)
    x = np.arange(np.prod(n, dtype=int), dtype=np.float32).reshape(n)
    got = weight_selection({"x": x}, {"x": m}, select=select)["x"]
    axes = [uniform(a, b) if select == "uniform" else range(b) for a, b in zip(n, m)]
    expected = x[np.ix_(*(np.asarray(a, np.int64) for a in axes))] if sizes else x
    assert got.dtype == x.dtype and got.shape == m and np.array_equal(got, expected)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from(["uniform", "consecutive"]))
def test_by_way_of_a_model_in_between(m, a, b, select):
    x = np.arange(float(m * a * b))
    between = weight_selection({"x": x}, {"x": (m * a,)}, select=select)
    there = weight_selection(between, {"x": (m,)}, select=select)
    assert np.array_equal(there["x"], weight_selection({"x": x}, {"x": (m,)}, select=select)["x"])


@given(st.integers(1, 6), st.integers(1, 4))
def test_uniform_finds_a_model_whose_units_were_repeated(m, times):
    x = np.arange(float(m * m)).reshape(m, m)
    large = np.repeat(np.repeat(x, times, axis=0), times, axis=1)
    assert np.array_equal(weight_selection({"x": large}, {"x": x})["x"], x)


def test_first_layers_and_no_head():
    large = {f"layers.{i}.w": np.full((4, 4), float(i)) for i in range(4)} | {"head.w": np.ones((2, 4))}
    small = {f"layers.{i}.w": (2, 2) for i in range(2)} | {"head.w": (2, 2)}
    got = weight_selection(large, small)
    assert {name: x.tolist() for name, x in got.items()} == {
        "layers.0.w": [[0.0, 0.0], [0.0, 0.0]],
        "layers.1.w": [[1.0, 1.0], [1.0, 1.0]],
    }
    assert sorted(weight_selection(large, small, leave=())) == ["head.w", "layers.0.w", "layers.1.w"]


def test_what_fits_is_copied():
    large = {"x": np.ones(3), "count": np.array([3])}
    got = weight_selection(large, large)
    got["x"][0] = 7
    assert large["x"][0] == 1 and got["count"].tolist() == [3]


def test_of_torch_and_of_bfloat16():
    torch = pytest.importorskip("torch")
    x = np.arange(12.0).reshape(3, 4)
    got = weight_selection({"x": torch.from_numpy(x).bfloat16()}, {"x": torch.zeros(3, 2)})["x"]
    assert got.dtype == torch.bfloat16 and got.float().tolist() == x[:, ::2].tolist()
    got = weight_selection({"x": x.astype(ml_dtypes.bfloat16)}, {"x": (2, 4)})["x"]
    assert got.dtype == ml_dtypes.bfloat16 and got.astype(float).tolist() == x[::2].tolist()


def test_places_of_torch():
    """The authors' formula in torch: multiples, or linspace in float32, where it and exact numbers agree."""
    torch = pytest.importorskip("torch")
    differ = {}
    for n in range(1, 60):
        for m in range(1, n + 1):
            step = torch.arange(m) * (n // m) if n % m == 0 else torch.round(torch.linspace(0, n - 1, m)).long()
            if step.tolist() != uniform(n, m):
                differ[n, m] = [(k, a, b) for k, (a, b) in enumerate(zip(step.tolist(), uniform(n, m))) if a != b]
    assert all((k * (n - 1) * 2) % (m - 1) == 0 for (n, m), places in differ.items() for k, _, _ in places), "at halves only"


def test_of_files(tmp_path: Path):
    save({"x": np.arange(6.0), "head": np.zeros(2)}, tmp_path / "large.safetensors")
    save({"x": np.zeros(3), "head": np.zeros(1)}, tmp_path / "small.safetensors")
    with open_checkpoint(tmp_path / "large.safetensors") as large, open_checkpoint(tmp_path / "small.safetensors") as small:
        got = weight_selection(large, small)
        assert list(got) == ["x"] and got["x"].tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("large", "small", "options", "said"),
    [
        ({"x": np.ones(2)}, {"x": (3,)}, {}, "'x' of shape .3. cannot be selected from .2.*no axis may grow"),
        ({"x": np.ones(2)}, {"x": (2, 1)}, {}, "cannot be selected"),
        ({"x": np.ones(2)}, {"y": (2,)}, {}, "has no tensor 'y'; leave can"),
        ({"x": np.arange(4)}, {"x": (2,)}, {}, "holds int64.*leave can name it"),
        ({"x": np.ones(2)}, {"x": (2,)}, {"select": "random"}, "none of 'uniform', 'consecutive'"),
    ],
)
def test_refusals(large, small, options, said):
    with pytest.raises(UsageError, match=said):
        weight_selection(large, small, **options)
