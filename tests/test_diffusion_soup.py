"""Shards of a soup: what is removed by averaging again was never there, and what is subtracted nearly so."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import refmerge
from refmerge import testing

RECIPES = Path(__file__).parent.parent / "spec" / "recipes"
DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


@st.composite
def shards(draw, least=2):
    """Models of shards, with entries of all sizes and one dtype."""
    count, dtype = draw(st.integers(least, 6)), draw(st.sampled_from(DTYPES))
    seeded = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    scale = np.exp2(seeded.integers(-8, 9, 12))
    return [{"a": (seeded.standard_normal(12) * scale).astype(dtype)} for _ in range(count)]


@settings(max_examples=100, deadline=None)
@given(shards(), shards(), st.data())
def test_a_shard_that_is_removed_was_never_there(models, others, data):
    """The bits that come out do not depend on what shard i held, although it was in the soup before."""
    i = data.draw(st.integers(0, len(models) - 1))
    rest = models[:i] + models[i + 1 :]
    never = refmerge.merge(rest, "linear")
    for secret in (models[i], {"a": others[0]["a"].astype(models[0]["a"].dtype)}):
        in_the_soup = [*models[:i], secret, *models[i + 1 :]]
        refmerge.merge(in_the_soup, "linear")
        testing.assert_same(refmerge.merge(in_the_soup[:i] + in_the_soup[i + 1 :], "linear"), never)


def weighted(models, weights, **options):
    return refmerge.merge(models, "linear", weight=weights, **options)["a"]


@settings(max_examples=200, deadline=None)
@given(shards(least=3), st.data())
def test_what_is_subtracted_is_gone_but_for_the_rounding_of_the_soup(models, data):
    """Within half an ulp of the soup, N / (N - 1) times as large, and half an ulp of the result."""
    n, i = len(models), data.draw(st.integers(0, len(models) - 1))
    dtype = models[0]["a"].dtype
    soup = refmerge.merge(models, "linear", dtype="float64")
    rest = models[:i] + models[i + 1 :]
    exact = np.sum([np.asarray(m["a"], np.longdouble) for m in rest], axis=0) / (n - 1)
    got = weighted([soup, models[i]], [float(n), -1.0], dtype="float64")
    half = float(ml_dtypes.finfo(dtype).eps) / 2  # of an ulp, relative: what one rounding can do
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    largest = np.max([np.abs(np.asarray(m["a"], np.float64)) for m in models], axis=0)
    allowed = (half * np.abs(np.asarray(soup["a"], np.float64)) + tiny) * n / (n - 1) + half * np.abs(exact) + tiny
    assert np.all(np.abs(np.asarray(got, np.longdouble) - exact) <= allowed + 8 * n * 2.0**-52 * largest)


@settings(max_examples=100, deadline=None)
@given(shards(least=3))
def test_add_and_take_back(models):
    """In float64 the soup comes back, up to rounding, whatever the shard that was added and taken back."""
    models = [{"a": m["a"].astype(np.float64)} for m in models]
    *first, last = models
    n = len(first)
    soup = refmerge.merge(first, "linear")
    more = {"a": weighted([soup, last], [float(n), 1.0])}
    largest = np.max([np.abs(m["a"]) for m in models], axis=0)
    assert np.all(np.abs(more["a"] - refmerge.merge(models, "linear")["a"]) <= 4 * 2.0**-52 * largest)
    back = weighted([more, last], [n + 1.0, -1.0])
    assert np.all(np.abs(back - soup["a"]) <= 8 * n * 2.0**-52 * largest)


def test_the_last_shard_cannot_be_taken_out():
    one = [{"a": np.ones(2)}]
    with pytest.raises(refmerge.UsageError, match="the weights sum to 0"):
        weighted([one[0], one[0]], [1.0, -1.0])
    with pytest.raises(refmerge.UsageError, match="0 given"):
        refmerge.merge([], "linear")


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for k in range(1, 5):
        (tmp_path / f"shard_{k}").mkdir()
        x = {"a": draw.standard_normal((8, 33)).astype(ml_dtypes.bfloat16), "b": draw.standard_normal(5).astype(np.float32)}
        save_file(x, tmp_path / f"shard_{k}" / "model.safetensors")
        (tmp_path / f"shard_{k}" / "config.json").write_text("{}")
    for recipe in RECIPES.glob("diffusion_soup*.yml"):
        shutil.copy(recipe, tmp_path)
    return tmp_path


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_recipes(folder):
    """Removed from a soup, and never there: the same files, byte for byte. Added, subtracted: nearly."""

    def run(recipe, out):
        return refmerge.run_recipe(folder / f"{recipe}.yml", folder / out) and refmerge.open_checkpoint(folder / out)

    shutil.move(folder / "shard_2", folder / "away")
    run("diffusion_soup_remove", "never")
    shutil.move(folder / "away", folder / "shard_2")
    soup = run("diffusion_soup", "soup")
    added = run("diffusion_soup_add", "added")
    removed = run("diffusion_soup_remove", "removed")
    subtracted = run("diffusion_soup_subtract", "subtracted")
    assert bytes_of(folder / "removed") == bytes_of(folder / "never")
    assert bytes_of(folder / "subtracted") != bytes_of(folder / "never")
    four = refmerge.merge([folder / f"shard_{k}" for k in range(1, 5)], "linear")
    for name, ulp in (("a", 2.0**-8), ("b", 2.0**-23)):
        for got, expected in ((added, four), (subtracted, removed)):
            off = np.abs(got[name].astype(np.float64) - expected[name].astype(np.float64))
            assert np.all(off <= 4 * ulp * np.max(np.abs(soup[name].astype(np.float64))))
