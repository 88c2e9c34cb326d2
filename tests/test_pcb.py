"""PCB-Merging against its formulas, written out on whole vectors; what is kept; and names of tensors that do not matter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import UsageError, call, merge

RELAXED = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TOOLS = {"official:pcb": "att_ratio", "official_readme:pcb": "pcb_ratio", "official_vision:pcb": "att_ratio",
         "official_es:pcb": "pcb_ratio"}  # fmt: skip


def task_vectors(seed, count, size=40):
    return np.random.default_rng(seed).standard_normal((count, size))


def norm(x):
    span = x.max() - x.min()
    return (x - x.min()) / span if span else np.ones_like(x)


def softmax(x):
    e = np.exp(x)
    return e / e.sum()


def kept_scores(tau, density):
    """The paper's beta, with all but the best entries of each model dropped."""
    k, masked = int(density * tau[0].size), []
    for x in tau:
        beta = softmax(len(tau) * norm(x * x)) * sum(softmax(norm(x * y)) for y in tau)
        best = np.argsort(-beta, kind="stable")[:k]
        masked.append(np.where(np.isin(np.arange(x.size), best), beta, 0))
    return np.array(masked)


@RELAXED
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]))
def test_it_is_the_formula(seed, count, density):
    tau = task_vectors(seed, count)
    weight = list(np.random.default_rng(seed + 1).uniform(0.5, 1.5, count))
    beta = kept_scores(tau, density)
    total = beta.sum(axis=0)
    expected = np.where(total > 0, (beta * np.array(weight)[:, None] * tau).sum(axis=0) / np.where(total, total, 1), 0)
    got = call("pcb", list(tau), np.zeros(40), density=density, weight=weight, lambda_=0.5)
    np.testing.assert_allclose(got, 0.5 * expected, rtol=1e-9, atol=1e-12)


@RELAXED
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([0.05, 0.3, 1.0]))
def test_between_and_as_many_as_asked_for(seed, count, density):
    tau = task_vectors(seed, count)
    got = call("pcb", list(tau), np.zeros(40), density=density)
    low, high = np.minimum(tau.min(axis=0), 0), np.maximum(tau.max(axis=0), 0)
    assert np.all((got >= low - 1e-12) & (got <= high + 1e-12))
    assert np.count_nonzero(got) <= count * int(density * 40)
    alone = call("pcb", [tau[0]], np.zeros(40), density=density)
    assert np.count_nonzero(alone) == int(density * 40)
    np.testing.assert_allclose(alone[alone != 0], tau[0][alone != 0], rtol=1e-12)


@RELAXED
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_the_order_of_the_models_does_not_matter(seed, count):
    tau = list(task_vectors(seed, count))
    for entry, params in [("pcb", {"density": 0.25}), *((tool, {key: 0.25}) for tool, key in TOOLS.items())]:
        got = call(entry, tau[::-1], np.zeros(40), **params)
        np.testing.assert_allclose(got, call(entry, tau, np.zeros(40), **params), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("entry", "params"), [("pcb", {"density": 0.3}), *((t, {k: 0.3}) for t, k in TOOLS.items())])
def test_the_model_is_one_vector(entry, params):
    """How it is cut into tensors is all the same."""
    tau, base = task_vectors(3, 3), np.random.default_rng(4).standard_normal(40)
    whole = call(entry, list(base + tau), base, **params)

    def cut(x):
        return {"a": x[:7], "b": x[7:27].reshape(4, 5), "c": x[27:28].reshape(()), "d": x[28:]}

    got = merge([cut(base + t) for t in tau], entry, base=cut(base), **params)
    np.testing.assert_allclose(np.concatenate([got[n].reshape(-1) for n in "abcd"]), whole, rtol=1e-13)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5])
def test_ratios_that_the_scripts_cannot_have(tool, ratio):
    with pytest.raises(UsageError, match=r"in \(0, 1\]"):
        call(tool, [[1.0, 2.0]], [0.0, 0.0], **{TOOLS[tool]: ratio})
