"""Fusion of adapters of singular vectors and values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError
from refmerge.checkpoint import save
from refmerge.procedures.adapters.spectral_fusion import cayley, spectral_fusion

RELAXED = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = st.sampled_from(["additive", "rotation"])


def case(seed, kind, count=2, scale=0.3):
    """A weight and adapters of rank 2 of its singular vectors."""
    draw = np.random.default_rng(seed)
    m, n = (int(x) for x in draw.integers(2 * count, 12, 2))
    W = draw.standard_normal((m, n))
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    base = {"q.U": U, "q.S": S, "q.V": Vt.T}
    made = []
    for _ in range(count):
        rows = (2, 2) if kind == "rotation" else (m, n)
        A, B = (scale * draw.standard_normal((k, 2)) for k in rows)
        C = scale * draw.standard_normal(2) + (1 if kind == "rotation" else 0)
        made.append(base | {"q.spectral_A": A, "q.spectral_B": B, "q.spectral_C": C})
    return W, made


@RELAXED
@given(st.integers(0, 10**6), KINDS)
def test_in_columns_of_their_own_changes_add_up(seed, kind):
    W, made = case(seed, kind)
    alone = [spectral_fusion([a], kind=kind, at=[2 * n])["q.weight"] - W for n, a in enumerate(made)]
    together = spectral_fusion(made, kind=kind, fuse="together")["q.weight"]
    np.testing.assert_allclose(together, W + sum(alone), atol=1e-10)
    mean = spectral_fusion(made, kind=kind)["q.weight"]
    np.testing.assert_allclose(mean, W + sum(alone) / 2, atol=1e-10)
    other = spectral_fusion(made[::-1], kind=kind, at=[2, 0], fuse="together")["q.weight"]
    np.testing.assert_allclose(other, together, atol=1e-10)


@RELAXED
@given(st.integers(0, 10**6), KINDS)
def test_nothing_trained_changes_nothing(seed, kind):
    W, (a, _) = case(seed, kind, scale=0.0)
    np.testing.assert_allclose(spectral_fusion([a], kind=kind)["q.weight"], W, atol=1e-12)


@RELAXED
@given(st.integers(0, 10**6), st.floats(0, 1e3))
def test_a_rotation_keeps_singular_values(seed, scale):
    W, (a, _) = case(seed, "rotation", scale=scale)
    a = a | {"q.spectral_C": np.ones(2)}
    got = spectral_fusion([a], kind="rotation")["q.weight"]
    np.testing.assert_allclose(np.linalg.svd(got, compute_uv=False), np.linalg.svd(W, compute_uv=False), atol=1e-8)
    R = cayley(a["q.spectral_A"])
    np.testing.assert_allclose(R @ R.T, np.eye(2), atol=1e-9)
    assert np.linalg.det(R) > 0


def test_shifts_by_hand(tmp_path):
    """(2, 1) shifted by (1, -3) and (1, 3): 3, 0 and 3, 4; together 4, 1."""
    base = {"q.U": np.eye(2, dtype=np.float32), "q.S": np.array([2, 1], np.float32), "q.V": np.eye(2, dtype=np.float32)}
    paths = []
    for n, delta in enumerate(([1, -3], [1, 3])):
        paths.append(tmp_path / f"{n}.safetensors")
        save(base | {"q.delta": np.array(delta, np.float32)}, paths[-1])
    mean = spectral_fusion(paths, kind="shift")["q.weight"]
    assert (mean.tolist(), mean.dtype) == ([[3, 0], [0, 2]], np.float32)
    assert spectral_fusion(paths, kind="shift", fuse="together")["q.weight"].tolist() == [[4, 0], [0, 1]]
    assert spectral_fusion(paths[:1], kind="shift", alpha=2)["q.weight"].tolist() == [[4, 0], [0, 0]]


def test_what_is_refused():
    _, (a, b) = case(0, "additive")
    k = a["q.S"].size
    with pytest.raises(InputError, match=f"has {k} columns"):
        spectral_fusion([a], at=[k - 1])
    with pytest.raises(InputError, match="share columns"):
        spectral_fusion([a, b], fuse="together", at=[0, 1])
    with pytest.raises(InputError, match="U, S and V differ"):
        spectral_fusion([a, b | {"q.U": -b["q.U"], "q.V": -b["q.V"]}], fuse="together")
    with pytest.raises(InputError, match=r"adapter 1: 'q\.spectral_C' are missing"):
        spectral_fusion([a, {name: x for name, x in b.items() if name != "q.spectral_C"}])
    with pytest.raises(InputError, match=r"'q\.more' are missing or belong to no module"):
        spectral_fusion([a | {"q.more": np.ones(1)}])
    with pytest.raises(InputError, match="shapes do not fit"):
        spectral_fusion([a | {"q.spectral_A": np.ones((1, 2))}])
    with pytest.raises(UsageError, match="has no fraction"):
        spectral_fusion(case(0, "rotation")[1], kind="rotation", alpha=0.5)
    for wrong in ({"kind": "svd"}, {"fuse": "sum"}, {"at": [0]}):
        with pytest.raises(UsageError):
            spectral_fusion([a, b], **wrong)
    with pytest.raises(UsageError, match="at least one"):
        spectral_fusion([])
