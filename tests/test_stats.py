"""Statistics: what they mean, that parts add up, and that methods read them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refmerge
from refmerge.nets import mlp, moe
from refmerge.stats import Statistics


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_gram_by_hand():
    """(1, 2) and (3, 0): the mean of (1 2; 2 4) and (9 0; 0 0)."""
    s = Statistics()
    s.gram("l", [[1.0, 2.0], [3.0, 0.0]])
    assert s["l.gram"].tolist() == [[5, 1], [1, 2]]
    assert s.count("l.gram") == 2


def test_padding_does_not_count():
    s = Statistics()
    s.gram("l", [[[1.0, 2.0], [9.0, 9.0]], [[3.0, 0.0], [9.0, 9.0]]], mask=[[1, 0], [1, 0]])
    assert s["l.gram"].tolist() == [[5, 1], [1, 2]]
    with pytest.raises(refmerge.UsageError, match="mask"):
        s.gram("l", [[1.0, 2.0]], mask=[0.5])


def test_moments_by_hand():
    s = Statistics()
    s.moments("l", [[1.0, 2.0], [3.0, 0.0]])
    assert (s["l.mean"].tolist(), s["l.square"].tolist()) == ([2, 1], [5, 2])


def test_fisher_of_a_batch_is_no_square_of_a_sum():
    """Inputs 1 and gradients 1 and 2: (1 + 4) / 2, not (1 + 2)^2 / 2."""
    s = Statistics()
    s.fisher("l", [[1.0], [1.0]], [[1.0], [2.0]])
    assert (s["l.weight.fisher"].tolist(), s["l.bias.fisher"].tolist()) == ([[2.5]], [2.5])


def test_fisher_of_places_is_the_square_of_their_sum():
    """A sample's gradient is 1 * 1 + 2 * 3 = 7."""
    s = Statistics()
    s.fisher("l", [[[1.0], [3.0]]], [[[1.0], [2.0]]])
    assert (s["l.weight.fisher"].tolist(), s["l.bias.fisher"].tolist()) == ([[49]], [9])


def test_exact_fisher_is_that_of_finite_differences():
    draw = np.random.default_rng(0)
    params, x, h = mlp.init(draw, (3, 4, 2)), draw.standard_normal((5, 3)), 1e-6
    params = {k: v.astype(np.float64) for k, v in params.items()}

    def forward(p):
        return softmax(mlp.forward(p, x, activation=np.tanh))

    s, hidden = Statistics(), np.tanh(x @ params["layers.0.weight"].T + params["layers.0.bias"])
    p = forward(params)
    d = np.eye(2)[None] - p[:, None]
    s.fisher("layers.1", hidden, d, p)
    s.fisher("layers.0", x, (d @ params["layers.1.weight"]) * (1 - hidden**2)[:, None], p)
    for name, theta in params.items():
        for at in np.ndindex(theta.shape):
            logs = []
            for sign in (1, -1):
                moved = theta.copy()
                moved[at] += sign * h
                logs.append(np.log(forward(params | {name: moved})))
            expected = np.sum(p * ((logs[0] - logs[1]) / (2 * h)) ** 2) / len(x)
            assert s[f"{name}.fisher"][at] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_any_tensor_by_gradients_of_samples():
    s = Statistics()
    s.fisher_of({"w": [[1.0, 2.0], [3.0, 0.0]]})
    assert s["w.fisher"].tolist() == [5, 2]
    with_classes = Statistics()
    with_classes.fisher_of({"w": [[[2.0, 0.0], [0.0, 4.0]]]}, [[0.25, 0.75]])
    assert with_classes["w.fisher"].tolist() == [1, 12]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9))
def test_parts_add_up(seed, cut):
    """Cutting samples, batches and statistics changes nothing but rounding."""
    x = np.random.default_rng(seed).standard_normal((10, 3))
    whole, first, second = Statistics(), Statistics(), Statistics()
    whole.gram("l", x)
    first.gram("l", x[:cut])
    second.gram("l", x[cut:])
    first.add(second)
    assert first.count("l.gram") == 10
    np.testing.assert_allclose(first["l.gram"], whole["l.gram"], rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(whole["l.gram"], x.T @ x / 10, rtol=1e-13, atol=1e-14)


def test_files_keep_means_counts_and_definitions(tmp_path):
    from safetensors import safe_open

    s = Statistics()
    s.gram("l", [[1.0, 2.0], [3.0, 0.0]])
    s.save(tmp_path / "s.safetensors")
    with safe_open(str(tmp_path / "s.safetensors"), "numpy") as file:
        assert "mean over rows of x x^T" in file.metadata()["refmerge.statistics"]
    back = Statistics.load(tmp_path / "s.safetensors")
    assert (back["l.gram"].tolist(), back.count("l.gram")) == ([[5, 1], [1, 2]], 2)
    back.gram("l", [[2.0, 2.0]])
    assert back["l.gram"].tolist() == [[14 / 3, 2], [2, 8 / 3]]


def test_a_file_without_counts_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"l.gram": np.eye(2)}, tmp_path / "s.safetensors")
    with pytest.raises(refmerge.InputError, match=r"l\.gram.*no count"):
        Statistics.load(tmp_path / "s.safetensors")


def test_bad_batches_are_refused():
    s = Statistics()
    s.gram("l", [[1.0, 2.0]])
    with pytest.raises(refmerge.InputError, match=r"l\.gram"):
        s.gram("l", [[1.0, 2.0, 3.0]])
    with pytest.raises(refmerge.InputError, match="not finite"):
        s.gram("l", [[1.0, np.nan]])
    with pytest.raises(refmerge.UsageError, match="not of the same samples"):
        s.fisher("l", [[1.0]], [[1.0], [2.0]])


def test_taps_of_a_network_are_read_by_regmean(tmp_path):
    """The merged network's first layer is nearer to each model's on its own inputs than the mean is; by file, the same."""
    draw = np.random.default_rng(1)
    models = [{k: v.astype(np.float64) for k, v in mlp.init(draw, (4, 5, 2)).items()} for _ in range(2)]
    xs, stats = [draw.standard_normal((40, 4)) * scale for scale in ([1, 2, 3, 4], [4, 3, 2, 1])], []
    for model, x in zip(models, xs):
        stats.append(Statistics())
        mlp.forward(model, x, stats[-1].taps(), activation=np.tanh)
    merged = refmerge.merge(models, "regmean", stats=stats, off_diagonal=1.0)
    name = "layers.0.weight"

    def loss(w):
        return sum(np.sum((x @ (w - m[name]).T) ** 2) for x, m in zip(xs, models))

    mean = (models[0][name] + models[1][name]) / 2
    assert loss(merged[name]) < loss(mean)
    gradient = sum((merged[name] - m[name]) @ x.T @ x for x, m in zip(xs, models))
    assert np.max(np.abs(gradient)) < 1e-10
    for i, s in enumerate(stats):
        s.save(tmp_path / f"{i}.safetensors")
    from_files = refmerge.merge(
        models, "regmean", stats=[tmp_path / "0.safetensors", tmp_path / "1.safetensors"], off_diagonal=1.0
    )
    assert np.array_equal(from_files[name], merged[name])


# --- Routers ----------------------------------------------------------------------------------------------------------


def test_routing_by_hand():
    """Scores (3, 1, 2), (0, 2, 2) and one of padding: with two experts a token 0 and 2, then 1 and 2 are chosen."""
    s = Statistics()
    s.routing("r", [[[3.0, 1.0, 2.0], [0.0, 2.0, 2.0], [9.0, 9.0, 9.0]]], 2, mask=[[1, 1, 0]])
    assert s["r.routed"].tolist() == [0.5, 0.5, 1.0]
    assert (2 * s["r.logit_gram"]).tolist() == [[9, 3, 6], [3, 5, 6], [6, 6, 8]]
    top = Statistics()
    top.routing("r", [[0.0, 2.0, 2.0]], 1)  # of equal ones the first
    assert top["r.routed"].tolist() == [0, 1, 0]
    said = Statistics()
    said.routing("r", [[0.0, 2.0, 2.0]], 1, experts=[[2]])
    assert said["r.routed"].tolist() == [0, 0, 1]
    for chosen, experts in ((0, None), (4, None), (2, [[1]]), (1, [[3]]), (1, [[-1]])):
        with pytest.raises(refmerge.UsageError, match="routing of 'r'"):
            said.routing("r", [[0.0, 2.0, 2.0]], chosen, experts=experts)
    with pytest.raises(refmerge.InputError, match="not finite"):
        said.routing("r", [[np.nan, 2.0, 2.0]], 1)


def test_routers_are_counted_in_parts_through_taps(tmp_path):
    draw = np.random.default_rng(0)
    params, batch = moe.init(draw, 2, 1, 2, experts=5), draw.integers(0, 11, (6, 7))
    mask = np.arange(7) < draw.integers(1, 8, (6, 1))
    routers = {f"model.layers.{i}.block_sparse_moe.gate": 2 for i in (0, 1)}

    def counted(rows):
        s = Statistics()
        taps = s.routing_taps(routers, mask[rows])
        moe.forward(params, batch[rows], taps, heads=2, groups=1)
        assert not taps
        return s

    whole, parts = counted(slice(None)), counted(slice(0, 2))
    parts.save(tmp_path / "part.safetensors")
    parts = Statistics.load(tmp_path / "part.safetensors")
    parts.add(counted(slice(2, 6)))
    assert len(whole) == 4 and list(whole) == list(parts)
    plain = {}
    moe.forward(params, batch, plain, heads=2, groups=1)
    for router in routers:
        logits = plain[f"{router}.weight"][mask.reshape(-1)]
        assert whole.count(f"{router}.routed") == mask.sum() == len(logits)
        chosen = np.argsort(-logits, axis=1)[:, :2]
        np.testing.assert_allclose(whole[f"{router}.routed"], np.bincount(chosen.ravel(), minlength=5) / len(logits))
        np.testing.assert_allclose(whole[f"{router}.logit_gram"], logits.T @ logits / len(logits))
        for key in ("routed", "logit_gram"):
            np.testing.assert_allclose(parts[f"{router}.{key}"], whole[f"{router}.{key}"])
