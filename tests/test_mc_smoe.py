"""MC-SMoE: the authors' split of a matrix, Eckart and Young's theorem, rows by one threshold, and back."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, open_checkpoint
from refmerge.checkpoint import save
from refmerge.experts import find
from refmerge.nets import moe
from refmerge.procedures.experts.mc_smoe import kept_rows, low_rank, mc_smoe, rank_of, sensitivity
from refmerge.procedures.experts.mc_smoe_restore import mc_smoe_restore
from refmerge.procedures.experts.msmoe import msmoe
from refmerge.procedures.experts.msmoe_restore import msmoe_restore

DATA = np.load(Path(__file__).parent / "data" / "msmoe.npz")
ABOUT = json.loads(str(DATA["about"]))["lowrank-00"]
RELAXED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)


def model(seed=0, dtype=np.float32, layers=1, experts=2):
    made = moe.init(np.random.default_rng(seed), 2, 1, layers, experts=experts, hidden=6, head_width=4)
    return {name: x.astype(dtype) for name, x in made.items()}


def matrices(params):
    return [name for name in params if ".experts." in name]


def test_official_split():
    W, bound = DATA["lowrank-00/model0/W"], ABOUT["tolerance"]
    rank = rank_of(W.shape, ABOUT["params"]["parameter_ratio"])
    assert rank == DATA["lowrank-00/out/reduced_rank"][0]
    L, R = low_rank(W, rank)
    for ours, theirs in ((L @ R, "LR"), (W - L @ R, "sparse_residual")):
        expected = DATA[f"lowrank-00/out/{theirs}"]
        assert np.max(np.abs(ours - expected)) <= bound * np.max(np.abs(expected))
    signs = np.sign(np.sum(L * DATA["lowrank-00/out/L"], axis=0))
    np.testing.assert_allclose(L * signs, DATA["lowrank-00/out/L"], atol=1e-5)  # float32 there


def test_ranks_by_hand():
    """0.15 * 24 * 16 / 40 = 1.44; a full ratio of a square is half of its side."""
    assert rank_of((24, 16), 0.15) == 2
    assert rank_of((8, 8), 1.0) == 4
    assert rank_of((2, 1), 1.0) == 1
    assert rank_of((8, 6), 0.15, rank_ratio=0.5) == 3
    assert rank_of((8, 6), 0.15, rank_ratio=0.0) == rank_of((0, 3), 1.0) == 0


def test_rows_by_hand():
    """Rows of 2 and of 4 entries, 10 in all. Half: the fifth smallest lies in the row of 3, and what is below it goes."""
    rows = {"a": np.array([1.0, 5, 2]), "b": np.array([3.0])}
    widths = {"a": 2, "b": 4}

    def kept(keep):
        return {name: x.tolist() for name, x in kept_rows(rows, widths, keep).items()}

    assert kept(0.5) == {"a": [1], "b": [0]}
    assert kept(0.25) == {"a": [1], "b": [0]}
    assert kept(0.1) == {"a": [1], "b": []}
    assert kept(0.75) == {"a": [0, 1, 2], "b": [0]}  # k = 2: the second smallest is in the row of 1
    assert kept(0.7) == {"a": [1, 2], "b": [0]}
    assert kept(1.0) == {"a": [0, 1, 2], "b": [0]}
    assert kept(0.0) == {"a": [], "b": []}
    assert kept_rows({"a": np.array([1.0, 2])}, {"a": 1}, 0.9)["a"].tolist() == [0, 1]  # k = 0
    assert kept_rows({"a": np.ones(3)}, {"a": 2}, 0.5)["a"].tolist() == [0, 1, 2]  # equal ones stay


def test_sensitivity_by_hand():
    one = sensitivity(None, np.array([2.0, -1]), np.array([3.0, 4]))
    np.testing.assert_allclose(one, [0.9, 0.6])
    np.testing.assert_allclose(sensitivity(one, np.array([0.0, 2]), np.array([1.0, 5])), [0.765, 2.01])


@RELAXED
@given(SEEDS, st.sampled_from([np.float32, ml_dtypes.bfloat16]), st.floats(0, 1), st.floats(0, 1))
def test_what_comes_back(tmp_path_factory, seed, dtype, ratio, keep):
    """Rows that stay come back up to rounding, the others are those of the product; all else is as it was."""
    params, folder = model(seed, dtype), tmp_path_factory.mktemp("store")
    stored = mc_smoe(params, folder / "stored.safetensors", ratio=ratio, keep=keep)
    back = mc_smoe_restore(stored)
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert back.keys() == params.keys()
    for name, x in params.items():
        if name not in matrices(params):
            assert np.array_equal(back[name], x)
            continue
        W, L, R, rows = x.astype(float), stored[f"left/{name}"], stored[f"right/{name}"], stored[f"rows/{name}"]
        assert L.shape[1] == rank_of(W.shape, ratio) and back[name].dtype == x.dtype
        np.testing.assert_allclose(back[name][rows].astype(float), W[rows], atol=4 * eps * np.abs(W).max())
        others = np.setdiff1d(np.arange(len(W)), rows)
        product = L.astype(float) @ R.astype(float)
        np.testing.assert_allclose(back[name][others].astype(float), product[others], atol=eps * np.abs(W).max() * 2)
    if keep == 1:
        assert all(len(stored[f"rows/{n}"]) == len(params[n]) for n in matrices(params))


@RELAXED
@given(SEEDS, st.floats(0, 1))
def test_low_rank_is_the_nearest(seed, ratio):
    W = np.random.default_rng(seed).standard_normal((7, 5))
    rank = rank_of(W.shape, ratio)
    L, R = low_rank(W, rank)
    S = np.linalg.svd(W, compute_uv=False)
    assert np.linalg.norm(W - L @ R) == pytest.approx(np.linalg.norm(S[rank:]), abs=1e-9)
    np.testing.assert_allclose(L.T @ L, np.diag(S[:rank]), atol=1e-9)
    np.testing.assert_allclose(R @ R.T, np.diag(S[:rank]), atol=1e-9)


def test_given_importance_chooses_the_rows(tmp_path):
    params = model()
    names = matrices(params)
    importance = {name: np.zeros(params[name].shape) for name in names}
    importance[names[0]][2] = 1.0
    stored = mc_smoe(params, tmp_path / "a", keep=0.01, importance=importance)
    assert stored[f"rows/{names[0]}"].tolist() == [2] and not any(len(stored[f"rows/{n}"]) for n in names[1:])
    save({n: x.mean(axis=1) for n, x in importance.items()}, tmp_path / "importance.safetensors")
    again = mc_smoe(params, tmp_path / "b", keep=0.01, importance=tmp_path / "importance.safetensors")
    assert all(np.array_equal(again[n], stored[n]) for n in stored)


def test_merged_then_compressed_and_all_the_way_back(tmp_path):
    params = model(layers=2, experts=4)
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    save(params, tmp_path / "model", extra_files={"config.json": json.dumps(config).encode()})
    routers = [m.router for m in find(params).values()]
    stats = {f"{r}.routed": np.array([4.0, 3, 2, 1]) for r in routers} | {f"{r}.logit_gram": np.eye(4) for r in routers}
    shared = msmoe(tmp_path / "model", stats, tmp_path / "shared", groups=2, write="shared").model
    stored = mc_smoe(tmp_path / "shared", tmp_path / "stored", ratio=0.5, keep=1.0)
    assert stored.config["model_type"] == "refmerge_low_rank_experts"
    with pytest.raises(UsageError, match="stored in factors"):
        mc_smoe(tmp_path / "stored", tmp_path / "twice")
    whole = mc_smoe_restore(tmp_path / "stored", tmp_path / "whole")
    assert whole.config == shared.config
    tied = msmoe_restore(tmp_path / "whole", tmp_path / "tied")
    assert tied.config == config and tied.tensors.keys() == params.keys()
    expected = msmoe(params, stats, groups=2).model
    for name, x in expected.items():
        np.testing.assert_allclose(tied[name], x, atol=1e-6)
    small = mc_smoe(tmp_path / "shared", tmp_path / "small")
    whole, less = (sum(c.tensors[n].nbytes for n in c if "experts." in n) for c in (shared, small))
    assert less < 0.6 * whole  # 16-bit places of rows and ranks rounded up weigh much in matrices of 6 x 8


def test_refusals(tmp_path):
    params = model()
    for options, message in (
        ({"ratio": 1.5}, r"ratio = 1.5 is outside \[0, 1\]"),
        ({"keep": -0.1}, r"keep = -0.1 is outside"),
        ({"rank_ratio": 2}, r"rank_ratio = 2 is outside"),
    ):
        with pytest.raises(UsageError, match=message):
            mc_smoe(params, tmp_path / "out", **options)
    names = matrices(params)
    importance = {n: np.ones(len(params[n])) for n in names[1:]} | {"odd": np.ones(2), names[1]: np.ones(99)}
    with pytest.raises(
        InputError, match=r"missing are .*w1\.weight'; of no expert's matrix are 'odd'; .* is of shape \[99\]"
    ):
        mc_smoe(params, tmp_path / "out", importance=importance)
    with pytest.raises(InputError, match="infinite or NaN, and has no singular values"):
        mc_smoe(params | {names[0]: np.full(params[names[0]].shape, np.inf, np.float32)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    save(params, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="was not written by mc_smoe"):
        mc_smoe_restore(tmp_path / "plain.safetensors")
    stored = mc_smoe(params, tmp_path / "stored.safetensors", keep=0.5)
    for name, change, message in (
        (f"right/{names[0]}", None, r"are missing 'right'"),
        (f"right/{names[0]}", np.zeros((1, 9), np.float32), "do not fit"),
        (f"rows/{names[0]}", np.full_like(stored[f"rows/{names[0]}"], 99), "rows that the matrix does not have"),
    ):
        bad = {n: (change if n == name else stored[n]) for n in stored if n != name or change is not None}
        if len(bad.get(f"rows/{names[0]}", [1])):
            save(bad, tmp_path / "bad.safetensors", metadata=stored.metadata, overwrite=True)
            with pytest.raises(InputError, match=message):
                mc_smoe_restore(open_checkpoint(tmp_path / "bad.safetensors"))
