"""Essential Subspace Merging: the authors' results, and laws.

tests/data/esm.npz holds what esm_merge of ESM-ViT and MergingMethod.esm of ESM-RoBERTa gave in kiddo127/ESM@fc82fe7 for
three models with random inputs: base, models, inputs and merged weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError
from refmerge.checkpoint import save
from refmerge.method import method
from refmerge.numeric import like, scores
from refmerge.procedures.subspaces.esm import esm

DATA = np.load(Path(__file__).parent / "data" / "esm.npz")
RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)
PLAIN = {"others": "task_arithmetic"}


@method("tsv", paper="none", view="tensor")
def tsv(models):
    """The authors' TSV: int(d / T) terms of each, their vectors made orthonormal."""
    triples = [np.linalg.svd(scores(m), full_matrices=False) for m in models]
    k = min(models[0].shape) // len(models)
    left, right = (polar(np.concatenate(x, axis=1)) for x in zip(*((u[:, :k], vt[:k].T) for u, _, vt in triples)))
    return like((left * np.concatenate([s[:k] for _, s, _ in triples])) @ right.T, models[0])


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def part(prefix):
    return {k.removeprefix(prefix): DATA[k] for k in DATA.files if k.startswith(prefix)}


def random(seed, count=2, shape=(6, 4), rows=9):
    draw = np.random.default_rng(seed)
    base = {"1.fc": draw.standard_normal(shape), "2.fc": draw.standard_normal(shape), "bias": draw.standard_normal(3)}
    models = [{k: x + (1 + t) * draw.standard_normal(x.shape) for k, x in base.items()} for t in range(count)]
    inputs = [{k: draw.standard_normal((rows, shape[1])) for k in ("1.fc", "2.fc")} for _ in range(count)]
    return base, models, inputs


@pytest.mark.parametrize("variant", ["vision", "language"])
def test_authors(variant):
    models, inputs = ([part(f"{variant}/{kind}{t}/") for t in range(3)] for kind in ("model", "inputs"))
    got = esm(models, part(f"{variant}/base/"), inputs, others=tsv, variant=variant)
    expected = part(f"{variant}/out/")
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, atol=1e-12 * np.max(np.abs(x)))


@RELAXED
@given(SEEDS, st.sampled_from(["vision", "language"]))
def test_order_and_turns(seed, variant):
    base, models, inputs = random(seed)
    merged = esm(models, base, inputs, variant=variant, **PLAIN)
    swapped = esm(models[::-1], base, inputs[::-1], variant=variant, **PLAIN)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((6, 6)))[0]

    def turned(m):
        return {k: Q @ x if x.ndim == 2 else x for k, x in m.items()}

    outputs = esm([turned(m) for m in models], turned(base), inputs, variant=variant, **PLAIN)
    for name, x in merged.items():
        size = np.max(np.abs(x))
        np.testing.assert_allclose(swapped[name], x, atol=1e-8 * size)
        np.testing.assert_allclose(outputs[name], turned(merged)[name], atol=1e-8 * size)


@RELAXED
@given(SEEDS)
def test_inputs_matter_by_their_gram_matrix(seed):
    """Other rows with the same X^T X, and any multiple of it: directions and ratios of eigenvalues are the same."""
    base, models, inputs = random(seed)
    draw = np.random.default_rng(seed)
    Q = np.linalg.qr(draw.standard_normal((12, 9)))[0]
    other = [{k: 3 * Q @ X for k, X in x.items()} for x in inputs]
    for variant in ("vision", "language"):
        one, two = (esm(models, base, x, variant=variant, **PLAIN) for x in (inputs, other))
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-8 * np.max(np.abs(one[name])))


def test_vectors_are_averaged_and_lambda_scales():
    base, models, inputs = random(0)
    full, half = (esm(models, base, inputs, lambda_=x, **PLAIN) for x in (1.0, 0.5))
    np.testing.assert_allclose(full["bias"], (models[0]["bias"] + models[1]["bias"]) / 2, rtol=1e-12)
    for name in base:
        np.testing.assert_allclose(half[name] - base[name], (full[name] - base[name]) / 2, atol=1e-12)


def test_by_hand():
    """Two tasks that share nothing: unit vectors on both sides, of lengths 2 and 1."""
    base, models = {"x": np.zeros((2, 2))}, [{"x": np.diag([2.0, 0.0])}, {"x": np.diag([0.0, 1.0])}]
    inputs = [{"x": np.eye(2)[[t]]} for t in range(2)]
    np.testing.assert_allclose(esm(models, base, inputs, variant="language")["x"], 1.5 * np.eye(2), atol=1e-12)
    # Tasks: (4/3)^2 2 and (2/3)^2 1, then columns (16/9)^2 and (2/9)^2; 8192/729 and 16/729, their mean, twice.
    np.testing.assert_allclose(esm(models, base, inputs)["x"], 8208 / 729 * np.eye(2), rtol=1e-12)


def test_rank_deficient_inputs():
    base, models, _ = random(1)
    zero = [{k: np.zeros((1, 4)) for k in ("1.fc", "2.fc")}] * 2
    still = esm(models, base, zero, **PLAIN)
    np.testing.assert_allclose(still["1.fc"], base["1.fc"])
    one = [{k: np.ones((1, 4)) for k in ("1.fc", "2.fc")}] * 2
    changed = esm(models, base, one, **PLAIN)
    assert np.linalg.matrix_rank(changed["1.fc"] - base["1.fc"], tol=1e-9) == 2
    same = esm([models[0]] * 2, base, one, **PLAIN)
    assert np.linalg.matrix_rank(same["1.fc"] - base["1.fc"], tol=1e-9) == 1
    nothing = esm([base] * 2, base, one, **PLAIN)
    np.testing.assert_allclose(nothing["2.fc"], base["2.fc"])


@RELAXED
@given(SEEDS, st.integers(1, 3), st.sampled_from(["vision", "language"]), st.sampled_from([0.0, 10.0]))
def test_changes_of_low_rank_give_the_same_in_float32_and_float64(seed, rank, variant, weights):
    draw = np.random.default_rng(seed)
    base = (weights * draw.standard_normal((14, 10))).astype(np.float32).astype(float)
    models = [base + draw.standard_normal((14, rank)) @ draw.standard_normal((rank, 10)) for _ in range(2)]
    inputs = [{"fc": draw.standard_normal((30, 10))} for _ in models]
    narrow, wide = (
        esm([{"fc": m.astype(d)} for m in models], {"fc": base.astype(d)}, inputs, variant=variant)["fc"] - base
        for d in (np.float32, np.float64)
    )
    assert np.linalg.norm(narrow - wide) <= 1e-3 * np.linalg.norm(wide)
    assert np.linalg.matrix_rank(wide, tol=1e-6 * np.linalg.norm(wide)) == 2 * rank


def test_files_dtypes_and_integers(tmp_path):
    base, models, inputs = random(2)
    small = [{k: x.astype(np.float32) for k, x in m.items()} | {"ids": np.arange(3)} for m in (base, *models)]
    for i, m in enumerate(small):
        save(m, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    got, expected = (esm(x[1:], x[0], inputs, **PLAIN) for x in (paths, small))
    for name, x in expected.items():
        assert np.array_equal(got[name], x) and got[name].dtype == small[0][name].dtype


def test_refusals():
    base, models, inputs = random(0)
    with pytest.raises(UsageError, match="inputs of 1 models for 2 models"):
        esm(models, base, inputs[:1])
    with pytest.raises(UsageError, match=r"tolerance = 1\.0 is not in"):
        esm(models, base, inputs, tolerance=1.0)
    with pytest.raises(UsageError, match="variant = 'audio'"):
        esm(models, base, inputs, variant="audio")
    with pytest.raises(InputError, match=r"not all models have inputs for tensor '2\.fc'"):
        esm(models, base, [inputs[0], {"1.fc": inputs[1]["1.fc"]}])
    with pytest.raises(InputError, match="'bias', which is no matrix"):
        esm(models, base, [{"bias": np.ones((2, 3))}] * 2)
    with pytest.raises(InputError, match=r"model 0 for '1\.fc' have shape \[2, 3\]; its layer takes rows of 4"):
        esm(models, base, [{"1.fc": np.ones((2, 3))}] * 2)
    with pytest.raises(UsageError, match=r"'1\.fc'"):
        esm(models, base, [{"1.fc": np.full((2, 4), np.nan)}] * 2)
