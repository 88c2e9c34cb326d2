"""The float32 path against exact rational arithmetic, within the bounds that spec/bounds.md states."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.bounds import BOUNDS, DTYPES, ETA, Sample, chosen, evaluated, furthest, merged, nearest

from refmerge import registry

ROWS, COLUMNS = 1, 6


def adversarial(dtype: str):
    """Entries of six kinds: any, subnormal, huge, the base's, its opposite, and a neighbour of it."""
    most = {"float32": 2.0**60, "bfloat16": 2.0**60, "float16": 2.0**10}[dtype]
    kind = DTYPES[dtype]
    least = float(ml_dtypes.finfo(kind).smallest_subnormal)
    free = st.one_of(
        st.floats(-most, most, width=32), st.floats(-2, 2, width=32), st.integers(-5, 5).map(lambda i: i * least),
        st.sampled_from([most, -most, 1.0, 1 + 2.0**-7, 0.0, -0.0]),
    )  # fmt: skip
    follower = st.one_of(free.map(lambda x: lambda b: x), st.sampled_from([
        lambda b: b, lambda b: -b, lambda b: np.nextafter(b, kind(1)), lambda b: b + kind(least), lambda b: b * kind(0.5),
    ]))  # fmt: skip

    @st.composite
    def rows(draw, models):
        def array(values):
            return np.array(values, dtype=kind).reshape(ROWS, COLUMNS)

        base = array([draw(free) for _ in range(COLUMNS)])
        return base, [array([draw(follower)(b) for b in base.flat]) for _ in range(models)]

    return rows


coefficient = st.floats(-4, 4).map(lambda c: c if abs(c) >= 2.0**-100 else 0.0)
share = st.floats(0.01, 0.99)


def parameters(name: str, models: int):
    """Values for the parameters that the measurement sets: coefficients of both signs, shares between 0 and 1."""
    drawn = {}
    for key, value in BOUNDS[name].params.items():
        one = share if key in ("density", "mu", "gamma", "trim") else coefficient
        if name == "linear":
            one = st.floats(0.01, 4)
        if name == "nearswap":
            one = st.floats(2.0**-100, 4)
        drawn[key] = st.lists(one, min_size=models, max_size=models) if isinstance(value, list) else one
    return drawn


@st.composite
def samples(draw, name: str, dtype: str) -> Sample:
    least, most = registry.get(name).models
    models = draw(st.integers(least, most or 3))
    base, others = draw(adversarial(dtype)(models))
    params = {key: draw(values) for key, values in parameters(name, models).items()}
    if name == "linear" and draw(st.booleans()):
        params = {"weight": [draw(coefficient) for _ in others], "normalize": False}
    bits = draw(st.lists(st.integers(0, 1), min_size=models * COLUMNS, max_size=models * COLUMNS))
    drawn = list(np.array(bits, np.float32).reshape(models, ROWS, COLUMNS))
    fisher = [np.abs(x.astype(np.float32)) for x in others]
    return Sample(base, others, params, drawn, fisher)


@pytest.mark.parametrize("name", BOUNDS)
@settings(max_examples=25)
@given(data=st.data())
def test_float32_is_within_the_bound(name, data):
    assert furthest(name, data.draw(samples(name, "float32"))) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BOUNDS)
@settings(max_examples=12)
@given(data=st.data())
def test_16_bits_are_nearest_to_a_value_within_the_bound(name, dtype, data):
    """So they are the nearest to the exact value wherever nothing that rounds otherwise lies within the bound of it."""
    s = chosen(name, data.draw(samples(name, dtype)))
    exact, limit = evaluated(name, s, ..., Fraction)
    for x, b, y in zip(exact.flat, limit.flat, merged(name, s, dtype).flat):
        assert nearest(x - b, dtype) <= y <= nearest(x + b, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@given(st.floats(-(2.0**17), 2.0**17) | st.floats(-1, 1).map(lambda x: x * 2.0**-133) | st.floats(-1, 1).map(lambda x: x * 2.0**-20))
def test_nearest_rounds_as_the_dtypes_do(dtype, x):
    x = float(np.float32(x)) if dtype == "bfloat16" else x  # ml_dtypes takes float64 through float32
    with np.errstate(all="ignore"):
        assert nearest(Fraction(x), dtype) == float(np.float64(x).astype(DTYPES[dtype]))
