"""RegMean++: its laws on small random networks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import registry
from refmerge.procedures.data_driven.regmean_plusplus import Stage
from refmerge.stats import Statistics

regmean_plusplus = registry.procedure("regmean_plusplus")
seeds = st.integers(0, 1000)


def layer(name, activation=np.tanh):
    def run(params, h, reads):
        reads(name, h)
        return activation(h @ params[f"{name}.weight"].T + params[f"{name}.bias"])

    return Stage(f"{name}.", run)


STAGES = [layer("a"), layer("b"), layer("c")]


def network(draw):
    found = {}
    for name, n, m in (("a", 3, 4), ("b", 4, 4), ("c", 4, 2)):
        found |= {f"{name}.weight": draw.standard_normal((m, n)), f"{name}.bias": draw.standard_normal(m)}
    return found


def setting(seed, count=2):
    draw = np.random.default_rng(seed)
    return [network(draw) for _ in range(count)], [[draw.standard_normal((30, 3))] for _ in range(count)]


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-7, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_equal_models_give_themselves(seed):
    (model, _), x = setting(seed)
    close(regmean_plusplus([model, model], STAGES, x), model)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_order_and_batches_do_not_matter(seed):
    models, x = setting(seed, 3)
    expected = regmean_plusplus(models, STAGES, x)
    close(regmean_plusplus(models[::-1], STAGES, x[::-1]), expected)
    close(regmean_plusplus(models, STAGES, [[b[0][:7], b[0][7:]] for b in x]), expected)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_one_stage_is_regmean(seed):
    models, x = setting(seed)

    def run(params, h, reads):
        for stage in STAGES:
            h = stage.run(params, h, reads)
        return h

    stats = []
    for model, batches in zip(models, x):
        stats.append(Statistics())
        run(model, batches[0], stats[-1].gram)
    expected = refmerge.merge(models, "regmean", stats=stats, off_diagonal=0.95)
    close(regmean_plusplus(models, [Stage("", run)], x), expected)


def test_a_shared_first_stage_gives_regmeans_second():
    models, x = setting(5)
    for key in ("a.weight", "a.bias"):
        models[1][key] = models[0][key]
    stats = []
    for model, (batch,) in zip(models, x):
        stats.append(Statistics())
        h = batch
        for stage in STAGES[:2]:
            h = stage.run(model, h, stats[-1].gram)
    expected = refmerge.merge(models, "regmean", stats=stats, off_diagonal=0.95)
    merged = regmean_plusplus(models, STAGES, x)
    np.testing.assert_allclose(merged["b.weight"], expected["b.weight"], rtol=1e-8, atol=1e-10)


def test_what_belongs_to_no_stage_is_averaged():
    models, x = setting(6)
    models = [m | {"norm": np.full(2, float(i))} for i, m in enumerate(models)]
    assert regmean_plusplus(models, STAGES, x)["norm"].tolist() == [0.5, 0.5]


def test_what_is_refused():
    models, x = setting(7)
    with pytest.raises(refmerge.UsageError, match="2 models and inputs of 1"):
        regmean_plusplus(models, STAGES, x[:1])
    with pytest.raises(refmerge.UsageError, match="no samples"):
        regmean_plusplus(models, STAGES, [x[0], []])
    with pytest.raises(refmerge.UsageError, match=r"'a\.bias' belongs to two stages|'a\.weight' belongs to two stages"):
        regmean_plusplus(models, [Stage("a", STAGES[0].run), *STAGES], x)
    few = [[b[0][:1]] for b in x]
    with pytest.raises(refmerge.UsageError, match=r"'a\.weight'.*singular"):
        regmean_plusplus(models, STAGES, few, off_diagonal=1.0)
