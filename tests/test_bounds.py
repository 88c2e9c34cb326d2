"""The float32 path against exact rational arithmetic, within the bounds that spec/bounds.md states."""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))
from refmerge import registry
from tests import bounds as page
from tests.bounds import BOUNDS, DTYPES, Sample, chosen, evaluated, furthest, merged, misrounded, nearest

SHAPE = (2, 16)


@st.composite
def adversarial(draw, models: int, dtype: str):
    """(base, models, draws) of a few numbers, ordinary, subnormal and huge, in all combinations; entries of a model may be
    the base's own, its opposite, its neighbours, and half of it."""
    kind, most = DTYPES[dtype], 2.0**60 if dtype != "float16" else 2.0**10
    least = float(ml_dtypes.finfo(kind).smallest_subnormal)
    number = st.floats(-most, most, width=32) | st.floats(-2, 2, width=32) | st.integers(-5, 5).map(lambda i: i * least)
    numbers = np.array([*draw(st.lists(number, min_size=3, max_size=6)), most, -most, 1, 1 + 2.0**-7, 0.0, -0.0], kind)
    choice = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = choice.choice(numbers, SHAPE)
    others = []
    for _ in range(models):
        kinds = [
            choice.choice(numbers, SHAPE),
            base,
            -base,
            np.nextafter(base, kind(1)),
            base + kind(least),
            base * kind(0.5),
        ]
        others.append(np.choose(choice.integers(0, len(kinds), SHAPE), kinds))
    return base, others, [choice.integers(0, 2, SHAPE).astype(np.float32) for _ in others]


coefficient = st.floats(-4, 4).map(lambda c: c if abs(c) >= 2.0**-100 else 0.0)
share = st.floats(0.01, 0.99)
DOMAINS = {
    "density": share, "mu": share, "gamma": share.map(lambda x: x / 4), "trim": share, "epsilon": st.floats(0, 0.25),
    "t": st.floats(2.0**-100, 4), "blocks": st.just(1), "threshold": st.floats(0.01, 4), "k": st.integers(0, 4),
    "task": st.just(0), "r": share, "alpha of ramplus_tl": share, "epsilon of ram": st.floats(0, 4),
    "epsilon of ramplus_tl": st.floats(0, 4),
}  # fmt: skip


def parameters(name: str, models: int):
    """Values for the parameters that the measurement sets: coefficients of both signs, shares between 0 and 1."""
    drawn = {}
    for key, value in BOUNDS[name].params.items():
        one = DOMAINS.get(f"{key} of {name}", DOMAINS.get(key, coefficient))
        if name == "linear":
            one = st.floats(0.01, 4)
        if name.startswith("della") and key == "density":
            one = st.floats(0.3, 0.7)
        drawn[key] = st.lists(one, min_size=models, max_size=models) if isinstance(value, list) else one
    if "layers" in drawn:
        drawn["layers"] = st.just(["*"])
    return drawn


@st.composite
def samples(draw, name: str, dtype: str) -> Sample:
    least, most = registry.get(name).models
    models = draw(st.integers(least, most or 3))
    base, others, drawn = draw(adversarial(models, dtype))
    params = {key: draw(values) for key, values in parameters(name, models).items()}
    if name == "linear" and draw(st.booleans()):
        params = {"weight": [draw(coefficient) for _ in others], "normalize": False}
    return Sample(base, others, params, drawn)


@pytest.mark.parametrize("name", BOUNDS)
@settings(max_examples=8)
@given(data=st.data())
def test_float32_is_within_the_bound(name, data):
    assert furthest(name, data.draw(samples(name, "float32"))) <= 1


@pytest.mark.parametrize("name", BOUNDS)
@settings(max_examples=6)
@given(dtype=st.sampled_from(["bfloat16", "float16"]), data=st.data())
def test_16_bits_are_nearest_to_a_value_within_the_bound(name, dtype, data):
    """So they are the nearest to the exact value wherever nothing that rounds otherwise lies within the bound of it."""
    s = chosen(name, data.draw(samples(name, dtype)))
    exact, limit = evaluated(name, s, ..., Fraction)
    for x, b, y in zip(exact.flat, limit.flat, merged(name, s, dtype).flat):
        assert nearest(x - b, dtype) <= y <= nearest(x + b, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@settings(max_examples=40)
@given(
    st.floats(-(2.0**17), 2.0**17)
    | st.floats(-1, 1).map(lambda x: x * 2.0**-133)
    | st.floats(-1, 1).map(lambda x: x * 2.0**-20)
)
def test_nearest_rounds_as_the_dtypes_do(dtype, x):
    x = float(np.float32(x)) if dtype == "bfloat16" else x  # ml_dtypes takes float64 through float32
    with np.errstate(all="ignore"):
        assert nearest(Fraction(x), dtype) == float(np.float64(x).astype(DTYPES[dtype]))


def test_page_states_the_bounds():
    written = (Path(__file__).parent.parent / "spec" / "bounds.md").read_text(encoding="utf-8")
    assert written.startswith(page.HEAD + page.TABLE), "python -m tests.bounds"
    for name in BOUNDS:
        assert f"/{name}.md) | {page.stated(name)} | " in written.replace("\\|", "|"), "python -m tests.bounds"


def test_every_method_of_entries_has_a_bound_or_a_reason():
    methods = [registry.get(name) for name in registry.names() if ":" not in name]
    entries = {m.name for m in methods if callable(m.view) or m.view == "flat"}
    assert entries <= BOUNDS.keys() | page.UNBOUNDED.keys() and not BOUNDS.keys() & page.UNBOUNDED.keys()
    written = (Path(__file__).parent.parent / "spec" / "bounds.md").read_text(encoding="utf-8")
    assert page.unbounded() in written, "python -m tests.bounds"


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "della"])
def test_misrounded_counts_what_exact_rounding_of_every_entry_counts(name):
    s = chosen(name, page.fine_tunes(name, "bfloat16", (8, 32)))
    exact, _ = evaluated(name, s, ..., Fraction)
    result = merged(name, s, "bfloat16")
    assert misrounded(name, s, "bfloat16") == sum(nearest(x, "bfloat16") != y for x, y in zip(exact.flat, result.flat))


def test_a_wrong_formula_is_far_outside_the_bound():
    s = page.fine_tunes("task_arithmetic", "float32", (1, 16))
    other = replace(s, params={**s.params, "lambda_": 0.7 + 1e-5})
    exact, limit = evaluated("task_arithmetic", chosen("task_arithmetic", other), ..., Fraction)
    result = merged("task_arithmetic", s, "float32")
    assert any(abs(Fraction(float(y)) - x) > b for x, b, y in zip(exact.flat, limit.flat, result.flat))
