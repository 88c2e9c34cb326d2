"""How often DELLA's entries stay, by their rank: what recorded masks cannot show."""

from __future__ import annotations

import numpy as np
import pytest

from refmerge import call

PLAIN = {"density": 0.4, "epsilon": 0.3, "lambda_": 1.0}
ENTRIES = {
    "della": PLAIN,
    "official:della": {"weight": 1.0, "density": 0.4, "window_size": 0.6},
    "mergekit:della": {"weight": 1.0, "density": 0.4, "epsilon": 0.3},
    "della_linear": PLAIN,
    "mergekit:della_linear": {"weight": 1.0, "density": 0.4, "epsilon": 0.3},
}


def kept_by_rank(entry, x, axis, **params):
    """The share of entries that stay among those of rank 0, 1, ... along the axis."""
    kept = call(entry, [x], np.zeros_like(x), seed=1, **params) != 0
    rank = np.argsort(np.argsort(np.abs(x), axis=axis), axis=axis)
    return [float(np.mean(kept[rank == r])) for r in range(x.shape[axis])]


def like_probabilities(shares, expected, count):
    return all(abs(s - q) < 6 * np.sqrt(q * (1 - q) / count) for s, q in zip(shares, expected, strict=True))


@pytest.mark.parametrize("entry", ENTRIES)
def test_rows_of_a_matrix(entry):
    x = np.random.default_rng(0).standard_normal((20_000, 4)).astype(np.float32)
    assert like_probabilities(kept_by_rank(entry, x, 1, **ENTRIES[entry]), [0.1, 0.3, 0.5, 0.7], 20_000)


def test_a_tensor_of_three_axes():
    """Ours are rows of all that belongs to one index of the first axis, mergekit's run along the second."""
    x = np.random.default_rng(0).standard_normal((5_000, 4, 2)).astype(np.float32)
    by_eight = kept_by_rank("della", x.reshape(5_000, 8), 1, **PLAIN)
    assert like_probabilities(by_eight, 0.1 + 0.6 / 7 * np.arange(8), 5_000)
    matrix = x.reshape(5_000, 8)
    as_matrix = call("della", [matrix], np.zeros_like(matrix), seed=1, **PLAIN)
    assert np.array_equal(call("della", [x], np.zeros_like(x), seed=1, **PLAIN).reshape(5_000, 8), as_matrix)
    along = kept_by_rank("mergekit:della", x, 1, **ENTRIES["mergekit:della"])
    assert like_probabilities(along, [0.1, 0.3, 0.5, 0.7], 10_000)


def test_a_negative_epsilon_of_mergekit_turns_the_ranks_round():
    x = np.random.default_rng(0).standard_normal((20_000, 3)).astype(np.float32)
    shares = kept_by_rank("mergekit:della", x, 1, weight=1.0, density=0.4, epsilon=-0.3)
    assert like_probabilities(shares, [0.7, 0.4, 0.1], 20_000)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("shape", [(), (1,), (400, 1), (20, 1, 20)])
def test_an_entry_alone_in_its_row_stays_with_the_density(entry, shape):
    """The authors' code and mergekit divide 0 by 0 there."""
    x = np.ones(shape, np.float32)
    got = call(entry, [x], np.zeros_like(x), seed=3, **ENTRIES[entry])
    assert got.shape == shape
    if entry.startswith("mergekit:") or shape != (20, 1, 20):
        assert x.size < 400 or like_probabilities([float(np.mean(got != 0))], [0.4], 400)
