"""fisher, regmean and mats: laws that need statistics of their own, and errors that name the tensor."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge import pages, registry
from refmerge.api import prepare
from refmerge.laws import statistics
from refmerge.methods.data_driven.mats import conjugate_gradients
from refmerge.numeric import total
from refmerge.testing import assert_same
from tests.conftest import Case

seeds = st.integers(0, 1000)


def layers(seed, count=2, out=3, inputs=4):
    """(weights, Gram matrices of inputs, of gradients) of one layer."""
    draw = np.random.default_rng(seed)
    W = [draw.standard_normal((out, inputs)) for _ in range(count)]
    G, H = ([x.T @ x / 9 for x in draw.standard_normal((count, 9, n))] for n in (inputs, out))
    return W, G, H


def closed(W, G):
    return np.linalg.solve(total(G), total(G_n @ W_n.T for W_n, G_n in zip(W, G))).T


@pytest.mark.parametrize("seed", range(5))
def test_fisher_is_the_closed_form_on_disk_and_in_memory(seed, tmp_path):
    from safetensors.numpy import save_file

    draw = np.random.default_rng(seed)
    models = [{"a": draw.standard_normal((3, 2)), "b": draw.standard_normal(5)} for _ in range(3)]
    F = [{f"{k}.fisher": draw.random(x.shape) for k, x in m.items()} for m in models]
    norms = [np.sqrt(sum(np.sum(x**2) for x in f.values())) for f in F]
    merged = refmerge.merge(models, "fisher", stats=F)
    for name, x in merged.items():
        P = [f[f"{name}.fisher"] / norm for f, norm in zip(F, norms)]
        P[0] = np.maximum(F[0][f"{name}.fisher"], 1e-6) / norms[0]
        expected = total(p * m[name] for p, m in zip(P, models)) / total(P)
        np.testing.assert_allclose(x, expected, rtol=1e-12)
    for i, (m, f) in enumerate(zip(models, F)):
        save_file(m, tmp_path / f"{i}.safetensors")
        save_file(f, tmp_path / f"{i}.stats.safetensors")
    stats = [tmp_path / f"{i}.stats.safetensors" for i in range(3)]
    there = refmerge.merge([tmp_path / f"{i}.safetensors" for i in range(3)], "fisher", stats=stats, out=tmp_path / "out")
    for name, x in merged.items():
        assert np.array_equal(np.asarray(there[name]), x)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1.0, 0.9, 0.1]))
def test_regmean_is_the_least_squares_solution(seed, alpha):
    W, G, _ = layers(seed, 3)
    G_s = [alpha * G_n + (1 - alpha) * np.diag(np.diag(G_n)) for G_n in G]
    merged = refmerge.call("regmean", W, stats=[{"gram": G_n} for G_n in G], off_diagonal=alpha)
    np.testing.assert_allclose(merged, closed(W, G_s), rtol=1e-9, atol=1e-11)
    slope = total((merged - W_n) @ G_n for W_n, G_n in zip(W, G_s))
    assert np.max(np.abs(slope)) < 1e-10
    turned = refmerge.call(
        "regmean", [W_n.T for W_n in W], stats=[{"gram": g} for g in G], off_diagonal=alpha, layout="in_out"
    )
    np.testing.assert_allclose(turned, merged.T, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_regmean_turns_with_its_inputs(seed):
    W, G, _ = layers(seed)
    Q = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((4, 4)))[0]
    merged = refmerge.call("regmean", W, stats=[{"gram": g} for g in G], off_diagonal=1.0)
    turned = refmerge.call("regmean", [w @ Q.T for w in W], stats=[{"gram": Q @ g @ Q.T} for g in G], off_diagonal=1.0)
    np.testing.assert_allclose(turned, merged @ Q.T, rtol=1e-8, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_mats_converges_to_the_closed_forms(seed):
    W, G, H = layers(seed)
    exact = {"tolerance": 1e-14, "iterations": 500}
    grams = [{"gram": g} for g in G]
    by_gram = refmerge.call("mats", W, stats=grams, objective="gram", **exact)
    regmean = refmerge.call("regmean", W, stats=grams, off_diagonal=1.0)
    np.testing.assert_allclose(by_gram, regmean, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(refmerge.call("mats", W, stats=grams, objective="gram", solver="direct"), regmean)
    both = [{"gram": g, "gradient_gram": h} for g, h in zip(G, H)]
    kfac = refmerge.call("mats", W, stats=both, **exact)
    np.testing.assert_allclose(kfac, refmerge.call("mats", W, stats=both, solver="direct"), rtol=1e-5, atol=1e-7)
    same = [{"gram": g, "gradient_gram": np.eye(3)} for g in G]
    np.testing.assert_allclose(refmerge.call("mats", W, stats=same, solver="direct"), regmean, rtol=1e-9, atol=1e-11)
    F = [{"fisher": w * w + 0.1} for w in W]
    fisher = refmerge.call("fisher", W, stats=F, normalize=False, floor=0.0)
    np.testing.assert_allclose(refmerge.call("mats", W, stats=F, objective="fisher", solver="direct"), fisher, rtol=1e-12)
    np.testing.assert_allclose(refmerge.call("mats", W, stats=F, objective="fisher", **exact), fisher, rtol=1e-6, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_conjugate_gradients_come_nearer_with_every_step(seed):
    """As SciPy's do, step by step; measured by A the error never grows."""
    from scipy.sparse.linalg import LinearOperator, cg

    W, G, H = layers(seed)

    def A(X):
        return total(h @ X @ g for g, h in zip(G, H))

    B, start = A(W[0]), W[1]
    errors = []
    for k in range(8):
        X = conjugate_gradients(A, B, start, k, 1e-5)
        theirs, _ = cg(LinearOperator((12, 12), matvec=lambda v: A(v.reshape(3, 4)).reshape(-1)), B.reshape(-1),
                       x0=start.reshape(-1), maxiter=k, rtol=1e-5) if k else (start.reshape(-1), 0)  # fmt: skip
        np.testing.assert_allclose(X.reshape(-1), theirs, rtol=1e-6, atol=1e-8)
        errors.append(float(np.vdot(X - W[0], A(X - W[0]))))
    assert all(later <= earlier * (1 + 1e-9) + 1e-12 for earlier, later in pairwise(errors))


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(["average", "base", "task_arithmetic", "zero"]))
def test_mats_does_not_depend_on_order_or_a_common_factor(seed, start):
    W, G, H = layers(seed, 3)
    base = np.ones((3, 4))
    stats = [{"gram": g, "gradient_gram": h} for g, h in zip(G, H)]
    expected = refmerge.call("mats", W, base, stats=stats, iterations=3, start=start)
    moved = refmerge.call("mats", W[::-1], base, stats=stats[::-1], iterations=3, start=start)
    scaled = refmerge.call("mats", W, base, stats=[s | {"gram": 8 * s["gram"]} for s in stats], iterations=3, start=start)
    for other in (moved, scaled):
        np.testing.assert_allclose(other, expected, rtol=1e-8, atol=1e-9)


MODELS = [{"enc.q.weight": np.ones((2, 3)), "enc.q.bias": np.ones(2)}] * 2
GOOD = {"enc.q.gram": np.eye(3)}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"enc.q.gram": np.eye(2)}, r"'enc.q.weight'.*model 1 is 2 by 2.*3 by 3"),
        ({"enc.q.gram": np.ones((3, 2))}, r"'enc.q.weight'.*model 1.*not square"),
        ({"enc.q.gram": np.triu(np.ones((3, 3)))}, r"'enc.q.weight'.*model 1 is not symmetric"),
        ({"enc.q.gram": np.diag([1.0, np.nan, 1.0])}, r"'enc.q.weight'.*model 1.*not finite"),
        ({}, r"'enc.q.weight'.*model 0 have.*model 1 do not"),
    ],
)
def test_bad_gram_matrices_are_named(bad, says):
    for name, params in (("regmean", {}), ("mats", {"objective": "gram"})):
        with pytest.raises(refmerge.UsageError, match=says):
            refmerge.merge(MODELS, name, stats=[GOOD, bad], **params)


def test_singular_sums_are_named():
    dead = {"enc.q.gram": np.diag([1.0, 0.0, 2.0])}
    with pytest.raises(refmerge.UsageError, match=r"'enc.q.weight'.*rank 2 where 3.*off_diagonal"):
        refmerge.merge(MODELS, "regmean", stats=[dead, dead])
    with pytest.raises(refmerge.UsageError, match=r"'enc.q.weight'.*rank 2.*cg"):
        refmerge.merge(MODELS, "mats", stats=[dead, dead], objective="gram", solver="direct")


def test_missing_statistics_are_named():
    F = {"enc.q.weight.fisher": np.ones((2, 3)), "enc.q.bias.fisher": np.ones(2)}
    with pytest.raises(refmerge.UsageError, match=r"'enc.q.bias' has no statistic 'enc.q.bias.fisher' in stats of model 1"):
        refmerge.merge(MODELS, "fisher", stats=[F, {"enc.q.weight.fisher": np.ones((2, 3))}], normalize=False)
    with pytest.raises(refmerge.UsageError, match="fisher rests on statistics"):
        refmerge.merge(MODELS, "fisher")
    with pytest.raises(refmerge.UsageError, match=r"regmean reads <tensor>.gram from stats, and none of that is there"):
        refmerge.merge(MODELS, "regmean", stats=[{}, {}])
    with pytest.raises(refmerge.InputError, match=r"'enc.q.bias.fisher' has shape \(3,\)"):
        refmerge.merge(MODELS, "fisher", stats=[F, F | {"enc.q.bias.fisher": np.ones(3)}])
    with pytest.raises(refmerge.UsageError, match="1 models and the base, which comes first"):
        refmerge.merge(MODELS[:1], "wise_ft:fisher", base=MODELS[0], stats=[{}])


def test_vectors_and_embeddings_are_averaged():
    """A bias under a module that has a Gram matrix is no weight of it."""
    models = [{"l.weight": np.eye(2), "l.bias": np.full(2, b), "e": np.full((3, 2), b)} for b in (1.0, 3.0)]
    merged = refmerge.merge(models, "regmean", stats=[{"l.gram": np.eye(2)}] * 2)
    assert (merged["l.bias"].tolist(), merged["e"].tolist()) == ([2, 2], [[2, 2]] * 3)


# --- Every entry that rests on statistics -----------------------------------------------------------------------------

NEEDY = [name for name in registry.names() if registry.get(name).needs]


def trial(name, dtype=np.float32):
    """The arguments of refmerge.merge for an entry: two tensors that it may cut, and one vector."""
    m, count, given_ = Case(name).arguments()
    draw = np.random.default_rng(1)
    shapes = {"fc.weight": (40, 30), "out.weight": (7, 40), "fc.bias": (40,)}
    models = [{n: draw.standard_normal(s).astype(dtype) for n, s in shapes.items()} for _ in range(count + 1)]
    first = ["base"] if m.needs == "base and models" else []
    stats = [statistics(m, x, draw) for x in models[: count + len(first)]]
    base = models.pop() if m.takes_base else None
    return m, models[:count], base, stats, given_


@pytest.mark.parametrize("name", NEEDY)
def test_any_blocks_and_threads(name):
    m, models, base, stats, given_ = trial(name)
    whole = refmerge.merge(models, m, base=base, stats=stats, threads=1, **given_)
    for elements, threads in ((1024, 1), (130, 1), (256, 3)):
        plan = prepare(models, m, base=base, stats=stats, threads=threads, params=given_)
        plan.elements = elements
        assert_same(plan.run(), whole)


@pytest.mark.parametrize("name", NEEDY)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_other_libraries(name, foreign, dtype):
    m, models, base, stats, given_ = trial(name, dtype)
    expected = refmerge.merge(models, m, base=base, stats=stats, threads=1, **given_)

    def put(model):
        return model and {n: foreign.array(x) for n, x in model.items()}

    merged = refmerge.merge([*map(put, models)], m, base=put(base), stats=[*map(put, stats)], threads=1, **given_)
    assert all(foreign.owns(x) for x in merged.values())
    plain = name.rpartition(":")[2]
    assert_same({n: foreign.host(x) for n, x in merged.items()}, expected, ulps=pages.page(plain).front["ulps"])
