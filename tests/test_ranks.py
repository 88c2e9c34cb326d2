"""Ranks along an axis against their plain definition: a stable sort, then a stable sort of its order."""

from __future__ import annotations

import numpy as np
import pytest

from refmerge import numeric
from refmerge.numeric import PACKED, RANKED, at_ranks, ranks
from refmerge.testing import assert_same

NANS = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC00000, 0xFFFFFFFF], np.uint32).view(np.float32)
TINY = np.array([1, 2, 0x007FFFFF, 0x00800000], np.uint32).view(np.float32)
SPECIAL = np.concatenate(
    [NANS, TINY, -TINY, np.float32([0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 3.4e38, -3.4e38, 1 + 2.0**-23, 1 + 2.0**-16])]
)
WIDTHS = [1, 2, 3, 100, PACKED - 1, PACKED, PACKED + 1, 5000, RANKED + 3]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # signalling NaN


def plain(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """NumPy's sort takes the zeros for equal and every NaN for the largest."""
    return np.argsort(np.argsort(x, axis=axis, kind="stable"), axis=axis, kind="stable")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_ranks_are_those_of_a_stable_sort(width, dtype):
    draw = np.random.default_rng(width)
    rows = 3 if width > 100 else 2 * RANKED // 100 + 1  # some in more than one strip
    for x in (
        draw.standard_normal((rows, width)),
        np.round(draw.standard_normal((rows, width)) * 2) / 2,  # ties and zeros of both signs
        draw.choice(SPECIAL, (rows, width)),
        np.zeros((rows, width)),
        np.full((rows, width), np.nan),
    ):
        x = x.astype(dtype)
        before = x.copy()
        got = ranks(x)
        assert got.dtype == np.int64
        assert np.array_equal(got, plain(x))
        assert x.tobytes() == before.tobytes()


def test_neighbours_in_every_bit_keep_their_order():
    """All float32 numbers with one bit set, and those next to them: each digit of a key matters."""
    bits = np.array([[1 << k, (1 << k) + 1, (1 << k) - 1] for k in range(31)], np.uint32).reshape(-1)
    x = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    for wide in (x, np.tile(x, 1 + PACKED // x.size)):
        shuffled = np.random.default_rng(0).permutation(wide)
        assert np.array_equal(ranks(shuffled), plain(shuffled))


@pytest.mark.parametrize("axis", range(-3, 3))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_along_any_axis(axis, dtype):
    x = np.random.default_rng(0).choice(SPECIAL, (5, 6, 900)).astype(dtype)
    assert np.array_equal(ranks(x, axis=axis), plain(x, axis))
    turned = x.transpose(2, 0, 1)[::2]
    assert np.array_equal(ranks(turned, axis=axis), plain(turned, axis))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (0, 0), (1,), (1, 1), (4, 1), (2, 0, 3)])
def test_ranks_of_little(shape):
    assert_same(ranks(np.ones(shape, np.float32)), np.zeros(shape, np.int64))
    assert_same(at_ranks(np.full(shape[-1], 0.5), np.ones(shape, np.float32)), np.full(shape, 0.5, np.float32))


def test_ranks_of_integers_and_small_floats():
    x = np.array([[3, -(2**62), 2**62, 2**62 + 1, 3]])
    assert ranks(x).tolist() == [[1, 0, 3, 4, 2]]
    assert ranks(np.array([1.0, -2.0, 1.0, np.nan], np.float16)).tolist() == [1, 0, 2, 3]


def test_numbers_at_ranks(library):
    """They come in the library and dtype of what is ranked."""
    x = np.array([[3.0, -0.0, 0.0, np.nan, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0]], np.float32)
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    got = at_ranks(values, library.array(x))
    assert library.owns(got)
    assert_same(library.host(got), values[ranks(x)].astype(np.float32))
    got = at_ranks(values[:2], library.array(x.astype(np.float64)), axis=0)
    assert_same(library.host(got), values[ranks(x, axis=0)])


def test_top_along_takes_the_lower_index_of_many_columns():
    x = np.round(np.random.default_rng(0).standard_normal((3, 2000)) * 2).astype(np.float32)
    order = np.argsort(-x, axis=1, kind="stable")
    for k in (0, 1, 700, 2000):
        expected = np.zeros_like(x)
        np.put_along_axis(expected, order[:, :k], 1, axis=1)
        assert_same(numeric.top_along(x, k), expected)
