"""Every law that a page names holds, on inputs that bite; blocks and backends hold for all methods."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from refmerge import pages, registry
from refmerge.laws import ALWAYS, LAWS, Trial
from refmerge.method import PerModel, method

CASES = [(name, law) for name in pages.names() for law in sorted({*ALWAYS, *pages.page(name).front["laws"]})]


@pytest.mark.parametrize(("name", "law"), CASES)
def test_law(name, law):
    front = pages.page(name).front
    ulps = front["ulps"] if law == "backends" else front.get("law_ulps", {}).get(law, LAWS[law].ulps)
    examples = 12 if front["family"] == "subspaces" else 40  # decompositions cost ten times what others do

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data):
        LAWS[law].check(Trial(registry.get(name), data.draw, ulps))

    run()


def test_laws_say_something():
    assert all(law.says.endswith(".") for law in LAWS.values())


def _wrong(x, models):
    """Wrong in every way at once: not linear, and other numbers for other blocks, libraries and numbers of models."""
    return x * x + 3.0 * len(models) + x.shape[0] + len(type(x).__module__)


@method("broken", paper="none", stats={"mask": "draw"})
def broken(models, base, *, density: float = 0.5, lambda_: float = 1.0, alpha: float = 0.5):
    return _wrong(models[0], models)


@method("broken_pair", paper="none", models=(2, 2))
def broken_pair(models, *, weight: PerModel[float] = 1.0, t: float = 0.5):
    return weight[0] * _wrong(models[0], models)


@pytest.mark.parametrize("law", sorted(LAWS))
def test_a_law_can_fail(law):
    """A law that cannot fail tests nothing."""
    subject = broken_pair if law in ("norm", "weight_scale") else broken

    @settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
    @given(data=st.data())
    def run(data):
        LAWS[law].check(Trial(subject, data.draw, LAWS[law].ulps))

    with pytest.raises(AssertionError):
        run()
