"""Draws: Philox's published vectors, the digits it is specified to give, and the same numbers in every block and library.

The reference here is the cipher in Python integers, written from the paper and anchored to Random123's known answers.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refmerge import rng
from refmerge.errors import InputError, UsageError

# Random123, examples/kat_vectors: philox4x64, 10 rounds: (counter, key, answer)
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (2**64 - 1,) * 4,
        (2**64 - 1,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]
NAME = "model.layers.0.mlp.up_proj.weight"


def cipher(key, counter):
    """Philox-4x64-10 on Python integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
        x0, x1, x2, x3 = (p1 // 2**64) ^ x1 ^ k0, p1 % 2**64, (p0 // 2**64) ^ x3 ^ k1, p0 % 2**64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return x0, x1, x2, x3


@cache
def key(seed, name, model):
    digest = hashlib.sha256(seed.to_bytes(8, "little") + model.to_bytes(4, "little") + name.encode("utf-8")).digest()
    return int.from_bytes(digest[0:8], "little"), int.from_bytes(digest[8:16], "little")


@cache
def digit(seed, name, model, element, j):
    block = b"".join(w.to_bytes(8, "little") for w in cipher(key(seed, name, model), (element // 16, j, 0, 0)))
    return int.from_bytes(block[2 * (element % 16) :][:2], "little")


@cache
def fraction(seed, name, model, element):
    """The element's number in [0, 1), to 80 bits."""
    return sum(Fraction(digit(seed, name, model, element, j), 2 ** (16 * (j + 1))) for j in range(5))


def draws(library, count, *, start=0, seed=0, name=NAME, dtype=np.float32, recorded=None):
    return rng.Rng(seed, name, start, library.array(np.zeros(count, dtype)), recorded)


# --- The cipher --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "k", "answer"), KNOWN)
def test_published_vectors(counter, k, answer):
    assert cipher(k, counter) == answer  # the reference of this file
    before = sum(c << 64 * i for i, c in enumerate(counter)) - 1
    numpys = np.random.Philox(key=np.array(k, dtype=np.uint64), counter=before % 2**256)
    assert tuple(numpys.random_raw(4).tolist()) == answer
    if counter[2:] == (0, 0):
        assert rng.philox(k, counter[:2]) == answer


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("name", ["", "x", NAME, "größe"])
def test_key(seed, name):
    assert rng.key_for(seed, name, 3) == key(seed, name, 3)


# Starts at every place within a counter, and past 2**32 counters.
SPANS = [(0, 1), (0, 33), (1, 2), (3, 17), (15, 49), (2**33 + 1, 2**33 + 40), (2**37 + 5, 2**37 + 9), (7, 7)]


@pytest.mark.parametrize(("start", "stop"), SPANS)
@pytest.mark.parametrize("j", [0, 4])
def test_digits(library, start, stop, j):
    expected = [digit(5, "x", 2, e, j) for e in range(start, stop)]
    k = rng.key_for(5, "x", 2)
    example = library.array(np.zeros(1, np.float32))
    from array_api_compat import array_namespace, device

    general = rng.digits(k, start, stop, j, array_namespace(example), device(example))
    assert library.host(general).tolist() == expected
    assert rng.digits_numpy(k, start, stop, j).tolist() == expected
    assert [rng._digit_of(k, e, j) for e in range(start, stop)] == expected


# --- keep --------------------------------------------------------------------------------------------------------------

TRICKY = [
    0.0, 1.0, 0.5, 0.1, 0.9, 1 / 3, 1 / 65536, 2 / 65536, 32767 / 65536, 65535 / 65536, 65535.5 / 65536, 1e-9, 2.0**-27,
    2.0**-40, 5e-324, 1 - 2.0**-53, 1 - 2.0**-24, 0.1 + 2.0**-54,
]  # fmt: skip


@pytest.mark.parametrize("p", TRICKY)
def test_keep_is_digits_less_than_p(library, p):
    got = library.host(draws(library, 400, start=3, seed=11).keep(p, model=1))
    assert got.dtype == np.float32
    assert got.tolist() == [float(fraction(11, NAME, 1, 3 + e) < Fraction(p)) for e in range(400)]


def near(element, bits, offset):
    """A probability that agrees with the element's number in so many leading bits, and so is decided late."""
    u = fraction(0, NAME, 0, element)
    return float(Fraction((u.numerator * 2**bits // u.denominator) + offset, 2**bits))


@pytest.mark.parametrize("bits", [15, 16, 17, 31, 32, 33, 48, 49, 53])
@pytest.mark.parametrize("offset", [0, 1])
def test_keep_decided_by_later_digits(library, bits, offset):
    """p just at and above an element's own number: only its later digits can tell. One p each, and as one array."""
    elements = range(24)
    ps = [near(e, bits, offset) for e in elements]
    expected = [float(fraction(0, NAME, 0, e) < Fraction(p)) for e, p in zip(elements, ps)]
    array = library.array(np.array(ps))
    assert library.host(draws(library, 24).keep(array, model=0)).tolist() == expected
    one_by_one = [float(library.host(draws(library, 1, start=e).keep(p, model=0))[0]) for e, p in zip(elements, ps)]
    assert one_by_one == expected
    assert expected == [float(offset == 1)] * 24


def test_keep_takes_an_array_of_probabilities(library):
    ps = np.array([TRICKY[e % len(TRICKY)] for e in range(360)])
    got = library.host(draws(library, 360, start=5, dtype=np.float64).keep(library.array(ps), model=7))
    assert got.dtype == np.float64
    assert got.tolist() == [float(fraction(0, NAME, 7, 5 + e) < Fraction(p)) for e, p in enumerate(ps)]


def test_keep_has_the_blocks_shape_and_c_order(library):
    flat = library.host(draws(library, 60).keep(0.5, model=0))
    like = library.array(np.zeros((3, 4, 5), np.float32))
    got = rng.Rng(0, NAME, 0, like).keep(0.5, model=0)
    assert library.owns(got)
    assert library.host(got).shape == (3, 4, 5)
    assert library.host(got).reshape(-1).tolist() == flat.tolist()
    number = rng.Rng(0, NAME, 0, library.array(np.zeros((), np.float32))).keep(0.5, model=0)
    assert number.shape == ()
    assert float(number) == flat[0]


# --- One array, in whatever blocks -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), p=st.sampled_from(TRICKY))
@example(cuts=[1, 2, 3, 4, 5], p=0.5)
def test_blocks_are_slices_of_one_array(cuts, p):
    def block(a, b):
        return rng.Rng(0, NAME, a, np.zeros(b - a, np.float32))

    whole, edges = block(0, 300), [0, *sorted(cuts), 300]
    parts = [block(a, b) for a, b in pairwise(edges)]
    assert np.concatenate([r.keep(p, model=0) for r in parts]).tolist() == whole.keep(p, model=0).tolist()
    assert np.concatenate([r.uniform(model=0) for r in parts]).tolist() == whole.uniform(model=0).tolist()


@pytest.mark.parametrize("start", [1, 2, 3, 4, 1023, 16 * 4096 + 1])
def test_a_block_of_any_library_is_a_slice(library, start):
    count = 17
    whole = rng.Rng(3, NAME, 0, np.zeros(start + count, np.float64))
    block = draws(library, count, start=start, seed=3, dtype=np.float64)
    assert library.host(block.keep(0.3, model=0)).tolist() == whole.keep(0.3, model=0)[start:].tolist()
    assert library.host(block.uniform(model=0)).tolist() == whole.uniform(model=0)[start:].tolist()


# --- uniform -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 24), (np.float64, 53)])
def test_uniform_is_the_leading_bits(library, dtype, bits):
    got = library.host(draws(library, 200, start=2, seed=9, dtype=dtype).uniform(model=4))
    assert got.dtype == dtype
    for e, u in enumerate(got):
        exact = fraction(9, NAME, 4, 2 + e)
        assert Fraction(float(u)) == Fraction(exact.numerator * 2**bits // exact.denominator, 2**bits)


@pytest.mark.parametrize("p", [k / 2**16 for k in (0, 1, 7, 32768, 65535, 65536)] + [1 - 2.0**-24, 2.0**-20])
def test_keep_is_uniform_less_than_p(library, p):
    """For a p that the 24 bits of a float32 hold."""
    r = draws(library, 5000)
    u, kept = library.host(r.uniform(model=0)), library.host(r.keep(p, model=0))
    assert np.array_equal(kept == 1, u < p)


def test_mean_and_variance():
    """Sanity only: five standard deviations of the mean of a million draws."""
    n = 1 << 20
    r = rng.Rng(0, NAME, 0, np.zeros(n, np.float32))
    u = r.uniform(model=0).astype(np.float64)
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    for p in (0.1, 0.9):
        assert abs(r.keep(p, model=0).mean(dtype=np.float64) - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_different_streams():
    """Seed, tensor and model each give draws of their own, uncorrelated with the others and with a shift of themselves."""
    n = 1 << 16
    streams = [
        rng.Rng(seed, name, start, np.zeros(n, np.float64)).uniform(model=model) - 0.5
        for seed, name, model, start in
        [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (2**63, "a", 0, 0), (0, "a", 0, n), (0, "a", 0, 1)]
    ]  # fmt: skip
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs((a * b).mean()) < 5 / 12 / n**0.5


# --- Errors, and recorded draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(UsageError, match="seed"):
        rng.Rng(seed, "x", 0, np.zeros(1, np.float32))


def test_recorded_draws_take_the_place_of_ours(library):
    mine = library.array(np.array([1, 0, 0, 1], np.float32))
    r = draws(library, 4, recorded={1: mine})
    assert library.host(r.keep(0.5, model=1)).tolist() == [1, 0, 0, 1]
    with pytest.raises(InputError, match=f"'{NAME}' of model 0"):
        r.keep(0.5, model=0)
