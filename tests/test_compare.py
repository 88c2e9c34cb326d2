"""Two checkpoints compared: numbers by hand, blocks beside whole arrays, and the command as a user meets it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, cli, compare, compare_measures, open_checkpoint, registry
from refmerge.checkpoint import save
from refmerge.compare_page import page
from refmerge.nets import mlp, resnet, vit
from refmerge.plots import draw_layers
from refmerge.symmetry import architectures


def opened(folder: Path, **models):
    found = []
    for name, model in models.items():
        save(model, folder / f"{name}.safetensors")
        found.append(open_checkpoint(folder / f"{name}.safetensors"))
    return found


A = {"w": np.array([[3.0, 4.0]], np.float32), "same": np.ones(2, np.float32), "n": np.array([1, 2, 3])}
B = {"w": np.array([[3.0, 0.0]], np.float32), "same": np.ones(2, np.float32), "n": np.array([1, 2, 4])}


def test_by_hand(tmp_path):
    found = compare.weights(*opened(tmp_path, a=A, b=B))
    w = found.tensors["w"]
    assert (w.norm, w.distance, w.relative, w.cosine, w.largest, w.differing) == ((5.0, 3.0), 4.0, 0.8, 0.6, 4.0, 1)
    assert w.changes is None and w.dtypes == ("F32", "F32") and w.shape == (1, 2)
    same = found.tensors["same"]
    assert (same.distance, same.relative, same.differing) == (0.0, 0.0, 0) and same.cosine == pytest.approx(1)
    n = found.tensors["n"]
    assert (n.differing, n.distance, n.norm) == (1, None, (None, None))
    assert found.whole.distance == 4.0 and found.whole.norm[0] == pytest.approx(math.sqrt(27))
    assert found.whole.cosine == pytest.approx(11 / math.sqrt(27 * 11))
    assert [x.name for x in found.most()] == ["n", "w"]  # what has no number first


def test_what_both_changed_of_a_base(tmp_path):
    zero = {"w": np.array([[0.0, 0.0]], np.float32), "n": np.array([1, 2, 3])}
    one, two, base = opened(tmp_path, a=A, b={**B, "w": np.array([[-4.0, 3.0]], np.float32)}, base=zero)
    found = compare.weights(one, two, base)
    assert found.tensors["w"].changes == 0.0  # (3, 4) and (-4, 3)
    assert found.tensors["same"].changes is None  # the base has none
    assert found.whole.changes == 0.0
    shifted = {"w": np.array([[3.0, 3.0]], np.float32)}
    found = compare.weights(one, two, *opened(tmp_path, other=shifted))
    assert found.tensors["w"].changes == 0.0 and found.tensors["w"].cosine == 0.0  # (0, 1) and (-7, 0)


def test_ratio_and_equal_entries_by_hand(tmp_path):
    found = compare.weights(*opened(tmp_path, a=A, b=B))
    w, same, n = (found.tensors[k] for k in ("w", "same", "n"))
    assert (w.ratio, w.equal) == (3 / 5, 1 / 2) and (same.ratio, same.equal) == (1.0, 1.0)
    assert (n.ratio, n.equal) == (None, 2 / 3)
    assert found.whole.equal == 3 / 4  # of the floats
    assert found.whole.ratio == pytest.approx(math.sqrt(11 / 27))
    assert "equal     75 % of the entries, differing 1\n" in found.text() and "|B| / |A| = 0.638285" in found.text()
    json.dumps(found.told(), allow_nan=False)


def test_ratios_that_are_none(tmp_path):
    one = {"zero": np.zeros(2), "tiny": np.array([1e-200]), "empty": np.zeros((0, 2)), "down": np.ones(2)}
    two = {"zero": np.ones(2), "tiny": np.array([1e150]), "empty": np.zeros((0, 2)), "down": np.zeros(2)}
    found = compare.weights(*opened(tmp_path, a=one, b=two)).tensors
    assert [found[k].ratio for k in ("zero", "tiny", "empty", "down")] == [None, None, None, 0.0]
    assert [found[k].equal for k in ("zero", "empty")] == [0.0, None]


def test_conflicts_of_sign_by_hand(tmp_path):
    base = np.array([1.0, 1.0, 1.0, 1.0, 1.0, -0.0, 1.0])
    a = np.array([2.0, 2.0, 0.0, 2.0, 1.0, 1e-320, np.nan])  # changes: + + - + 0 + NaN
    b = np.array([0.0, 3.0, -1.0, 0.5, 5.0, -1e-320, 0.0])  # changes: - + - - + - -
    one, two, origin = opened(tmp_path, a={"x": a, "y": base}, b={"x": b, "y": b}, base={"x": base, "y": base})
    found = compare.weights(one, two, origin)
    assert found.tensors["x"].conflicts == 3 / 5  # products of changes would be 0 for the sixth
    assert found.tensors["y"].conflicts is None  # A changed nothing
    assert found.whole.conflicts == 3 / 5
    assert "signs     60 % of the entries that both changed have opposite signs" in found.text()
    assert compare.weights(one, two).tensors["x"].conflicts is None
    assert "signs" not in compare.weights(one, two).text()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-2, 2, width=16)] * 3), min_size=1, max_size=40))
def test_conflicts_beside_a_count_of_entries(tmp_path_factory, entries):
    a, b, base = (np.array(x, np.float16) for x in zip(*entries))
    opposite = sum((x < z < y) or (y < z < x) for x, y, z in entries)
    both = sum(x != z and y != z for x, y, z in entries)
    models = opened(tmp_path_factory.mktemp("conflicts"), a={"x": a}, b={"x": b}, base={"x": base})
    found = compare.weights(*models)
    assert found.tensors["x"].conflicts == (opposite / both if both else None)
    assert found.tensors["x"].equal == sum(x == y for x, y, _ in entries) / len(entries)


def test_counts_of_what_is_not_finite(tmp_path):
    one = {"x": np.array([np.nan, np.inf, -np.inf, 1.0], np.float32), "y": np.ones(2)}
    two = {"x": np.array([np.nan, 0.0, 0.0, 1.0], np.float32), "y": np.array([np.nan, 1.0])}
    found = compare.weights(*opened(tmp_path, a=one, b=two))
    assert (found.tensors["x"].nan, found.tensors["x"].infinite) == ((1, 1), (2, 0))
    assert (found.tensors["y"].nan, found.tensors["y"].infinite) == ((0, 1), (0, 0))
    assert (found.whole.nan, found.whole.infinite) == ((1, 2), (2, 0))
    assert found.tensors["x"].equal == 0.5  # NaN twice is no difference
    assert "NaN, inf  in A: 1 NaN and 2 infinite entries in x\n" in found.text()
    assert "NaN, inf  in B: 2 NaN and 0 infinite entries in x, y\n" in found.text()
    told = json.loads(json.dumps(found.told(), allow_nan=False))
    assert told["tensors"]["x"]["infinite"] == [2, 0] and told["whole"]["nan"] == [1, 2]
    assert "NaN" not in compare.weights(*opened(tmp_path, other=A, third=B)).text()


# --- The effective rank -----------------------------------------------------------------------------------------------


def hadamard(n):
    return np.ones((1, 1)) if n == 1 else np.kron([[1.0, 1.0], [1.0, -1.0]], hadamard(n // 2))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (np.eye(5), 5.0),  # k equal singular values: k
        (1e200 * hadamard(8), 8.0),
        (np.outer([1.0, 2.0, 3.0], [4.0, 5.0]), 1.0),
        (np.diag([3.0, 1.0]), 4 / 3**0.75),  # exp of (3/4) log(4/3) + (1/4) log 4
        (np.array([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]), 3 / 2 ** (2 / 3)),
        (np.zeros((3, 2)), 0.0),
        (np.zeros((0, 4)), 0.0),
        (np.array([[np.nan, 1.0]]), None),
        (np.array([[np.inf, 1.0]]), None),
    ],
)
def test_effective_rank(matrix, expected):
    assert compare.effective_rank(matrix) == (expected if expected is None else pytest.approx(expected, rel=1e-12))


def test_ranks_of_matrices_up_to_a_size(tmp_path, monkeypatch):
    shapes = {"w": (4, 4), "low": (4, 3), "large": (3, 6), "b": (4,), "c": (1, 2, 2)}
    zero = {name: np.zeros(shape) for name, shape in shapes.items()}
    change = {"w": hadamard(4), "low": np.outer([1, 2, 3, 4.0], [1, 2, 3.0])}
    one, two = opened(tmp_path, a=zero, b=zero | change)
    monkeypatch.setattr(compare, "BLOCK", 5)  # a matrix comes in several blocks
    found = compare.weights(one, two, rank=16)
    ranks = {name: x.rank for name, x in found.tensors.items()}
    assert ranks["w"] == pytest.approx(4) and ranks["low"] == pytest.approx(1)
    assert (ranks["large"], ranks["b"], ranks["c"]) == (None, None, None) and found.too_large == ("large",)
    assert "singular values of A - B, of 2 matrices\n          not of 1 that are too large: large\n" in found.text()
    assert json.loads(json.dumps(found.told()))["too_large"] == ["large"]
    without = compare.weights(one, two)
    assert without.tensors["w"].rank is None and "rank" not in without.text() and "too_large" not in without.told()


def test_names_shapes_and_kinds(tmp_path):
    one = {"both": np.ones(1), "a": np.ones(1), "shape": np.ones((2, 3)), "kind": np.ones(2, np.float32)}
    two = {"both": np.ones(1), "b": np.ones(1), "shape": np.ones((3, 2)), "kind": np.ones(2, np.int32)}
    found = compare.weights(*opened(tmp_path, a=one, b=two))
    assert found.only == (("a",), ("b",)) and list(found.tensors) == ["both"]
    assert found.apart == {"shape": "[2, 3] and [3, 2]", "kind": "F32 and I32"}
    text = found.text()
    assert "only A    1: a" in text and "apart     shape: [2, 3] and [3, 2]" in text
    assert json.loads(json.dumps(found.told(), allow_nan=False))["only_b"] == ["b"]


def test_what_has_no_number(tmp_path):
    one = {"zero": np.zeros(2), "nan": np.array([np.nan, 1.0]), "inf": np.array([np.inf, 1.0]), "empty": np.zeros((0, 3))}
    two = {"zero": np.ones(2), "nan": np.array([np.nan, 2.0]), "inf": np.array([0.0, 1.0]), "empty": np.zeros((0, 3))}
    found = compare.weights(*opened(tmp_path, a=one, b=two))
    zero, nan, inf, empty = (found.tensors[k] for k in ("zero", "nan", "inf", "empty"))
    assert (zero.relative, zero.cosine, zero.distance) == (None, None, math.sqrt(2))
    assert (nan.distance, nan.cosine, nan.largest, nan.differing) == (None, None, 1.0, 1)  # NaN twice is no difference
    assert (inf.distance, inf.largest, inf.differing) == (None, None, 1)
    assert (empty.distance, empty.relative, empty.cosine) == (0.0, 0.0, None)
    json.dumps(found.told(), allow_nan=False)
    assert [x.name for x in found.most()] == ["inf", "nan", "zero"]


def test_infinities_of_both_signs_in_many_blocks(tmp_path):
    x, y = np.ones(300_000), np.full(300_000, np.inf)
    y[::2] = -np.inf
    found = compare.weights(*opened(tmp_path, a={"x": x}, b={"x": y})).tensors["x"]
    assert (found.norm[1], found.distance, found.cosine, found.differing) == (None, None, None, 300_000)


def test_dtypes_are_compared_by_value(tmp_path):
    x = np.array([1.0, 1.5, -0.0], np.float32)
    one, two = opened(tmp_path, a={"x": x}, b={"x": x.astype(ml_dtypes.bfloat16)})
    found = compare.weights(one, two)
    assert found.tensors["x"].differing == 0 and found.tensors["x"].dtypes == ("F32", "BF16")
    assert found.whole.dtypes == ("F32", "BF16")
    eight = opened(tmp_path, c={"x": x.astype(ml_dtypes.float8_e4m3fn)})
    assert compare.weights(one, *eight).tensors["x"].distance == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(1, 5000), st.sampled_from([np.float16, np.float32, np.float64]))
def test_blocks_do_not_change_a_bit(tmp_path_factory, seed, size, dtype):
    draw = np.random.default_rng(seed)
    models = {k: {"x": draw.standard_normal(size).astype(dtype), "y": draw.standard_normal(3)} for k in ("a", "b", "base")}
    one, two, base = opened(tmp_path_factory.mktemp("blocks"), **models)
    whole = compare.weights(one, two, base)
    x, y, z = (models[k]["x"].astype(np.float64) for k in ("a", "b", "base"))
    got = whole.tensors["x"]
    assert got.distance == pytest.approx(np.linalg.norm(x - y), rel=1e-12)
    assert got.norm == pytest.approx((np.linalg.norm(x), np.linalg.norm(y)), rel=1e-12)
    assert got.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9, abs=1e-12)
    p, q = x - z, y - z
    assert got.changes == pytest.approx(p @ q / np.linalg.norm(p) / np.linalg.norm(q), rel=1e-9, abs=1e-12)
    assert (got.largest, got.differing) == (np.abs(x - y).max(), np.count_nonzero(x != y))


def test_many_blocks(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    models = {k: {"x": draw.standard_normal((3, 100_000)).astype(np.float32)} for k in ("a", "b")}
    one, two = opened(tmp_path, **models)
    expected = compare.weights(one, two)
    read = []
    monkeypatch.setattr(compare, "BLOCK", 1 << 17)
    assert compare.weights(one, two, progress=read.append) == expected
    assert sum(read) == one.nbytes + two.nbytes and len(read) == 6


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    a, b = ({"x": np.full(1 << 22, v, np.float32), "n": np.full(1 << 22, v, np.int32)} for v in (0, 1))
    one, two = opened(tmp_path, a=a, b=b)
    tracemalloc.start()
    try:
        assert [x.differing for x in compare.weights(one, two).tensors.values()] == [1 << 22, 1 << 22]
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


def test_which_differ_most(tmp_path):
    one = {"a": np.array([10.0, 0.0]), "b": np.array([1.0, 0.0])}
    two = {"a": np.array([10.0, 2.0]), "b": np.array([0.0, 1.0])}
    found = compare.weights(*opened(tmp_path, a=one, b=two))
    for by, first in (("relative", "b"), ("distance", "a"), ("largest", "a"), ("differing", "b"), ("cosine", "b")):
        assert found.most(by)[0].name == first, by
    assert "most different, by distance" in found.text(by="distance") and "most different" not in found.text(top=0)


# --- With data --------------------------------------------------------------------------------------------------------


def units_exchanged(seed=0):
    """A network, the same with its units permuted, and data that it mostly gets right."""
    draw = np.random.default_rng(seed)
    one = {k: x.astype(np.float32) for k, x in mlp.init(draw, [4, 8, 3]).items()}
    spec = architectures.mlp(one)
    two = {k: np.asarray(x) for k, x in spec.apply(spec.random(one, draw), one).items()}
    x = draw.standard_normal((40, 4)).astype(np.float32)
    return one, two, x, np.argmax(mlp.forward(one, x), axis=1)


def test_the_loss_is_the_mean_cross_entropy(tmp_path):
    one, _, x, y = units_exchanged()
    np.savez(tmp_path / "data.npz", inputs=x, labels=y)
    z = np.asarray(mlp.forward(one, x), np.float64)
    expected = np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(40), y])
    for batch in (1, 7, 40, 256):
        of = compare.task("mlp", tmp_path / "data.npz", batch=batch)
        assert of.loss(one) == pytest.approx(expected, rel=1e-6) and of.error(one) == 0.0
    wide = {k: v.astype(np.float64) for k, v in one.items()}
    assert of.loss(wide) == pytest.approx(expected, rel=1e-6)
    assert of.samples == 40


def test_a_permuted_network_has_a_barrier_on_the_line(tmp_path):
    one, two, x, y = units_exchanged()
    np.savez(tmp_path / "data.npz", inputs=x, labels=y)
    of = compare.task("mlp", tmp_path / "data.npz")
    line = compare.along(opened(tmp_path, a=one, b=two), of, points=5, measures=["layers"])
    assert line.loss.losses[0] == pytest.approx(line.loss.losses[-1]) and line.loss.barrier > 0
    assert line.error.losses[0] == 0.0 and len(line.error.losses) == 5
    assert list(line.measures["layers"].rows) == ["layers.0", "layers.1"]
    assert compare.along(opened(tmp_path, c=one, d=one), of, points=3).loss.barrier == pytest.approx(0, abs=1e-9)
    bad = compare.along([one, {k: x * np.nan for k, x in two.items()}], of, points=3)
    assert json.loads(json.dumps(bad.told(), allow_nan=False))["barrier"] is None and bad.error.losses[-1] == 1.0


def test_networks_and_their_options():
    assert {"gpt2", "llama", "mlp", "resnet", "vgg", "vit"} <= set(compare.networks())
    assert compare.options_of("mlp", None, None) == {}
    assert compare.options_of("vit", {"num_attention_heads": 4}, None) == {"heads": 4}
    assert compare.options_of("gpt2", {"n_head": 2}, 3) == {"heads": 3}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert compare.options_of("llama", config, None) == {"heads": 4, "groups": 2}
    config |= {"num_experts_per_tok": 1, "norm_topk_prob": False}
    assert compare.options_of("moe", config, None) == {"heads": 4, "groups": 2, "chosen": 1, "normalize": False}
    for net, heads, said in (("vit", None, "--heads"), ("mlp", 2, "no heads"), ("cnn", None, "there are gpt2")):
        with pytest.raises(UsageError, match=said):
            compare.options_of(net, None, heads)


def test_a_transformer(tmp_path):
    draw = np.random.default_rng(0)
    model = {k: x.astype(np.float32) for k, x in vit.init(draw, outputs=3).items()}
    np.savez(tmp_path / "data.npz", inputs=draw.standard_normal((5, 3, 8, 8)), labels=np.array([0, 1, 2, 0, 1]))
    of = compare.task("vit", tmp_path / "data.npz", heads=2)
    assert math.isfinite(of.loss(model)) and 0 <= of.error(model) <= 1


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"inputs": np.ones((2, 4))}, "no array 'labels'"),
        ({"inputs": np.ones((2, 4)), "labels": np.ones(2)}, "whole numbers"),
        ({"inputs": np.ones((2, 4)), "labels": np.ones(3, int)}, "whole numbers, one or more for each"),
        ({"inputs": np.ones((0, 4)), "labels": np.ones(0, int)}, "whole numbers"),
    ],
)
def test_data_that_are_none(tmp_path, arrays, said):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=said):
        compare.task("mlp", tmp_path / "data.npz")


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "text.npz").write_text("no zip")
    np.save(tmp_path / "one.npy", np.ones(3))
    for file in ("text.npz", "one.npy", "gone.npz"):
        with pytest.raises(InputError, match=file):
            compare.task("mlp", tmp_path / file)


@pytest.mark.parametrize(
    ("inputs", "labels", "said"),
    [
        (np.ones((2, 5)), [0, 1], "cannot run these weights on these inputs"),
        (np.ones((2, 4)), [0, 3], "labels from 0 to 3 do not fit"),
        (np.ones((2, 4)), [0, -1], "labels from -1 to 0"),
        (np.ones((2, 4)), [[0, 1], [1, 1]], "do not fit 2 outputs"),
    ],
)
def test_data_that_do_not_fit_the_weights(tmp_path, inputs, labels, said):
    np.savez(tmp_path / "data.npz", inputs=inputs, labels=np.array(labels))
    with pytest.raises(UsageError, match=said):
        compare.task("mlp", tmp_path / "data.npz").loss(units_exchanged()[0])
    with pytest.raises(UsageError, match="is missing"):
        compare.task("vit", tmp_path / "data.npz", heads=1).loss(units_exchanged()[0])


# --- Measures ---------------------------------------------------------------------------------------------------------


KINDS = ("weight", "bias")


def measured(models, net, inputs, labels, *names, **how):
    return compare.along(models, compare.Task(compare.network(net), inputs, labels, **how), 3, names).measures


def test_the_command_knows_all_measures():
    (option,) = [x for x in cli.compare.params if x.name == "measures"]
    assert list(option.type.choices) == list(compare_measures.MEASURES)
    with pytest.raises(UsageError, match="no measure 'norm' \\(there are layers"):
        measured([{}, {}], "mlp", np.ones((1, 1)), np.zeros(1, int), "norm")


def test_layers_are_in_the_order_of_the_network(tmp_path):
    """A file has its names sorted, so that the head comes first."""
    draw = np.random.default_rng(0)
    sizes = {"fc2": (6, 5), "fc10": (5, 6), "head": (3, 5)}
    models = [
        {f"{k}.{part}": draw.standard_normal(n if part == "weight" else n[:1]) for k, n in sizes.items() for part in KINDS}
        for _ in range(2)
    ]
    x, y = draw.standard_normal((20, 5)), draw.integers(0, 3, 20)
    found = measured(opened(tmp_path, a=models[0], b=models[1]), "mlp", x, y, "shallow", "deep")
    assert list(found["shallow"].rows) == ["fc2", "fc10", "head"] and list(found["deep"].rows) == ["head", "fc10", "fc2"]
    full = compare.along(models, compare.Task(mlp.forward, x, y), 3).loss
    for name, last in (("shallow", "head"), ("deep", "fc2")):
        assert found[name].rows[last] == pytest.approx([full.losses[1] - (full.losses[0] + full.losses[2]) / 2] * 2)


def test_activations_of_a_permuted_network():
    one, two, x, y = units_exchanged()
    (table,) = measured([one, two], "mlp", x, y, "activations", batch=7).values()
    assert list(table.rows) == ["layers.0.weight", "layers.0", "layers.1.weight"]
    for name, row in table.rows.items():
        found = dict(zip(table.columns, row))
        assert [found[k] for k in ("cka", "debiased", "rbf", "matched")] == pytest.approx([1] * 4, abs=1e-6), name
        assert found["aligned"] < 0.9 if name != "layers.1.weight" else found["aligned"] == pytest.approx(1)


def test_activations_beside_numpy():
    one, _, x, y = units_exchanged(0)
    other = units_exchanged(1)[0]
    (table,) = measured([one, other], "mlp", x, y, "activations").values()
    a, b = (np.maximum(x @ m["layers.0.weight"].T + m["layers.0.bias"], 0) for m in (one, other))
    alive = (np.ptp(a, axis=0) > 0) & (np.ptp(b, axis=0) > 0)
    C = np.corrcoef(a.T[alive], b.T[alive])[: alive.sum(), alive.sum() :]
    assert table.rows["layers.0"][3] == pytest.approx(np.trace(C) / 8, rel=1e-5)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    expected = np.linalg.norm(a.T @ b) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert table.rows["layers.0"][0] == pytest.approx(expected, rel=1e-5)


def test_few_rows_of_many_activations(monkeypatch):
    monkeypatch.setattr(compare_measures, "ROWS", 12)
    draw = np.random.default_rng(0)
    model = resnet.init(draw, (4, 8), 1)
    of = compare.Task(resnet.forward, draw.standard_normal((6, 3, 8, 8)), np.zeros(6, int), batch=2)
    found = compare_measures.tapped(model, of)
    assert {len(x) for name, x in found.items() if name.startswith("layer")} == {12}
    assert len(found["fc.weight"]) == 6


def test_three_samples_have_no_debiased_likeness():
    one, two, x, y = units_exchanged()
    (table,) = measured([one, two], "mlp", x[:3], y[:3], "activations").values()
    assert all(row[1] is None for row in table.rows.values()) and "-" in table.text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", compare_measures.MEASURES)
def test_measures_of_weights_that_are_not_finite(name):
    if name == "quadratic":
        pytest.importorskip("torch")
    one, two, x, y = units_exchanged()
    two["layers.0.weight"][0, 0] = np.inf
    if name == "aligned":
        with pytest.raises(InputError, match="must be finite"):
            measured([one, two], "mlp", x, y, name)
        return
    found = measured([one, two], "mlp", x, y, name)[name]
    assert json.dumps(compare._finite(found.told()), allow_nan=False) and "nan" in found.text()


def test_stragglers_and_sharpness_are_those_of_the_functions():
    one, two, x, y = units_exchanged()
    of, layers = compare.Task(mlp.forward, x, y), {f"layers.{i}": [f"layers.{i}.{k}" for k in KINDS] for i in range(2)}
    found = measured([one, two], "mlp", x, y, "stragglers", "sharpness")
    scores = registry.procedure("straggler_score")(one, two, of.loss, layers=layers).scores
    assert {label: row[0] for label, row in found["stragglers"].rows.items()} == scores
    assert [row[0] for row in found["stragglers"].rows.values()] == sorted(scores.values(), reverse=True)
    sharp = [registry.procedure("layerwise_sharpness")(m, of.loss, layers=layers) for m in (one, two)]
    assert found["sharpness"].rows["layers.1"] == tuple(s.layers["layers.1"] for s in sharp)
    assert found["sharpness"].rows["all layers"] == tuple(s.whole for s in sharp)


def test_gradients_beside_differences():
    pytest.importorskip("torch")
    one, _, x, y = units_exchanged()
    model = {k: v.astype(np.float64) for k, v in one.items()}
    of = compare.Task(mlp.forward, x.astype(np.float64), y, batch=7)
    slopes = compare_measures.gradient(model, of)
    assert slopes.keys() == model.keys()
    for name, place in (("layers.0.weight", (3, 1)), ("layers.0.bias", (5,)), ("layers.1.weight", (2, 7))):
        sides = []
        for h in (1e-5, -1e-5):
            moved = {k: v.copy() for k, v in model.items()}
            moved[name][place] += h
            sides.append(of.loss(moved))
        assert slopes[name][place] == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_a_predicted_barrier():
    """From each end the loss of the line falls no further than to where a cubic with these slopes has its middle."""
    pytest.importorskip("torch")
    one, two, x, y = units_exchanged()
    models = [{k: v.astype(np.float64) for k, v in m.items()} for m in (one, two)]
    (table,) = measured(models, "mlp", x.astype(np.float64), y, "quadratic").values()
    of, h = compare.Task(mlp.forward, x.astype(np.float64), y), 1e-5

    def at(t):
        return of.loss({k: (1 - t) * models[0][k] + t * models[1][k] for k in models[0]})

    curvature = (at(1 + h) - at(1 - h) - at(h) + at(-h)) / (2 * h)
    assert table.rows["all layers"] == pytest.approx([max(0.0, -curvature / 8)] * 2, rel=1e-4, abs=1e-8)


def test_gradients_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    one, two, x, y = units_exchanged()
    with pytest.raises(UsageError, match=r"pip install 'refmerge\[torch\]'"):
        measured([one, two], "mlp", x, y, "quadratic")


@pytest.mark.parametrize("net", ["mlp", "vit"])
def test_a_permuted_network_is_aligned(net, tmp_path):
    draw = np.random.default_rng(0)
    if net == "mlp":
        one, two, x, y = units_exchanged()
        spec = None
    else:
        one = {k: v.astype(np.float32) for k, v in vit.init(draw, outputs=3).items()}
        spec = architectures.vit(one, 2)
        two = {k: np.asarray(v) for k, v in spec.apply(spec.random(one, draw), one).items()}
        x, y = draw.standard_normal((6, 3, 8, 8)), draw.integers(0, 3, 6)
    options = {} if spec is None else {"options": {"heads": 2}}
    for models in ([one, two], opened(tmp_path, a=one, b=two)):
        of = compare.Task(compare.network(net), x, y, **options)
        line = compare.along(models, of, 3, ["aligned"])
        (row,) = line.measures["aligned"].rows.values()
        assert row[0] == pytest.approx(0, abs=1e-6) and abs(line.loss.losses[1] - line.loss.losses[0]) > 1e-3
        assert line.paths().keys() == {"on the line", "aligned"}
    assert "units move" in line.text()


def test_around_the_barrier_of_networks_with_copied_halves():
    """Each network has its units twice, so that half of them, doubled, is the network."""
    draw = np.random.default_rng(0)
    models, (x, y) = [], units_exchanged()[2:]
    for _ in range(2):
        half = mlp.init(draw, [4, 6, 3])
        first, second = half["layers.0.weight"], half["layers.1.weight"]
        models.append({
            "layers.0.weight": np.concatenate([first, first]), "layers.0.bias": np.tile(half["layers.0.bias"], 2),
            "layers.1.weight": np.concatenate([second, second], axis=1) / 2, "layers.1.bias": half["layers.1.bias"],
        })  # fmt: skip
    of = compare.Task(mlp.forward, x, y)
    line = compare.along(models, of, 11, ["dropout"])
    table = line.measures["dropout"]
    losses = [of.loss(m) for m in models]
    assert table.rows["A, halved in its last hidden layer"] == pytest.approx(losses[:1], rel=1e-6)
    assert table.rows["B, halved in its last hidden layer"] == pytest.approx(losses[1:], rel=1e-6)
    assert table.rows["the highest on the path, above the worse of A and B"] == pytest.approx([0], abs=1e-7)
    assert line.paths().keys() == {"on the line", "through halves"}
    assert json.loads(json.dumps(line.told()))["dropout"]["A, halved in its last hidden layer"]["loss"] > 0


def test_networks_without_a_path_through_halves():
    draw = np.random.default_rng(0)
    models = [resnet.init(draw, (4, 8), 1) | {"bn1.num_batches_tracked": np.array(n)} for n in (5, 7)]
    with pytest.raises(UsageError, match="is neither weight nor bias of a layer"):
        measured(models, "resnet", draw.standard_normal((2, 3, 8, 8)), np.zeros(2, int), "dropout")


# --- By layer, and the page -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("attention", "self_attn.q_proj.weight attn.c_attn.bias attention.output.dense.weight self_attn.dense.weight"),
        ("attention", "layer.0.SelfAttention.q.weight self_attention.query_key_value.weight attention.self.key.bias"),
        ("mlp", "mlp.down_proj.weight intermediate.dense.weight output.dense.weight fc1.bias linear2.weight w1"),
        ("mlp", "block_sparse_moe.experts.3.w2.weight layer.1.DenseReluDense.wi.weight mlp.gate.weight ffn.0.weight"),
        ("norm", "input_layernorm.weight self_attn.q_norm.weight ln_1.bias attention.output.LayerNorm.bias bn2.running_var"),
        ("other", "mixer.in_proj.weight conv1.weight weight self_qk.weight ls1.gamma"),
    ],
)
def test_kinds_of_tensors(kind, names):
    assert [compare.kind_of(f".{name}") for name in names.split()] == [kind] * len(names.split())


def layered():
    """Three layers: two matrices of an mlp, a norm that stays, and an embedding outside."""
    one = {"embed.weight": np.ones(2, np.float32)}
    for i in range(3):
        one |= {f"model.layers.{i}.mlp.up.weight": np.array([[3.0]]), f"model.layers.{i}.mlp.down.weight": np.array([[4.0]])}
        one |= {f"model.layers.{i}.norm.weight": np.ones(2), f"model.layers.{i}.mlp.places": np.arange(2)}
    two = one | {"model.layers.1.mlp.up.weight": np.array([[0.0]]), "model.layers.2.mlp.down.weight": np.array([[-4.0]])}
    return one, two


def test_by_layer_by_hand(tmp_path):
    one, two = layered()
    found = compare.weights(*opened(tmp_path, a=one, b=two))
    groups = found.by_layer()
    assert list(groups) == ["model.layers."] and list(groups["model.layers."]) == ["mlp", "norm"]
    mlp = groups["model.layers."]["mlp"]  # (3, 4) beside (3, 4), (0, 4) and (3, -4)
    assert [mlp[i].relative for i in (0, 1, 2)] == pytest.approx([0, 3 / 5, 8 / 5])
    assert [mlp[i].cosine for i in (0, 1, 2)] == pytest.approx([1, 4 / 5, -7 / 25])
    norm = groups["model.layers."]["norm"][2]
    assert norm.relative == 0.0 and norm.cosine == pytest.approx(1)
    told = json.loads(json.dumps(found.told(), allow_nan=False))
    assert told["layers"]["model.layers."]["mlp"]["1"] == {"relative": mlp[1].relative, "cosine": mlp[1].cosine}


def test_layers_that_have_no_number(tmp_path):
    one = {"h.0.x": np.array([np.nan]), "h.0.y": np.ones(1), "h.1.x": np.zeros(1), "h.2.x": np.zeros(1), "h.3.x": np.ones(1)}
    two = one | {"h.2.x": np.ones(1), "h.3.x": np.zeros(1)}
    groups = compare.weights(*opened(tmp_path, a=one, b=two)).by_layer()["h."]["other"]
    assert groups == {i: compare.Group(relative, None) for i, relative in enumerate([None, 0.0, None, 1.0])}


def test_the_plot_of_layers():
    svg = draw_layers({"mlp": {2: 0.0, 3: 1.0, 5: 0.5, 6: None}, "none": {}, "<&>": {2: 1.0}}, "a < b", "x")
    root = ElementTree.fromstring(svg)
    dots = [(x.get("cx"), x.get("cy"), x.get("fill")) for x in root.iter() if x.tag.endswith("circle")]
    blue, green = "#2f6fb5", "#2e9461"  # 420 wide from 64, 220 high from 58; layers 2 to 6
    assert dots == [("64", "278", blue), ("169", "58", blue), ("379", "168", blue), ("64", "58", green)]
    lines = [x.get("d") for x in root.iter() if x.get("stroke-width") == "1.5"]
    assert lines == ["M64 278L169 58M379 168", "M64 58"]  # a gap where layer 4 would be
    words = [x.text for x in root.iter() if x.tag.endswith("text")]
    assert "mlp" in words and "<&>" in words and "none" not in words and words[0] == "a < b"


def test_plots_of_numbers_close_by_and_extreme():
    svg = draw_layers({"mlp": {0: 0.999991, 1: 0.999999}}, "close", "cosine")
    marks = [x.text for x in ElementTree.fromstring(svg).iter() if x.get("text-anchor") == "end"]
    assert len(set(marks)) == len(marks) > 3 and "0.999992" in marks
    for values in ([1.0], [0.0, 0.0], [1e300, 0.0], [1e300, 1e300], [5e-324, 0.0], [-1.0, 1.0], [1.0, math.inf]):
        svg = draw_layers({"mlp": dict(enumerate(values))}, "t", "x")
        assert "nan" not in svg and "inf" not in svg and ElementTree.fromstring(svg) is not None
    with pytest.raises(UsageError, match="none of which is finite"):
        draw_layers({"mlp": {0: None, 1: math.nan}, "norm": {}}, "t", "x")


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, and the rows of its table."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.rows = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.rows += [[]] if tag == "tr" else []

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in ("td", "th") and data.strip():
            self.rows[-1].append(data)


# All that a page has, whatever its tensors are called.
PAGE = {
    "html", "meta", "title", "style", "h1", "h2", "dl", "dt", "dd", "p", "figure", "svg", "desc", "rect", "text", "path",
    "circle", "div", "table", "tr", "th", "td",
}  # fmt: skip


def test_the_page(tmp_path):
    one, two = layered()
    found = compare.weights(*opened(tmp_path, a=one, b=two))
    got = Page(page(found, "a", "b"))
    tags = [tag for tag, _ in got.elements]
    assert tags.count("svg") == 2 and set(tags) == PAGE
    assert not [a for _, attributes in got.elements for a in attributes if a in ("src", "href") or a.startswith("on")]
    head, *rows = got.rows
    assert len(rows) == len(found.tensors) and all(len(row) == len(head) for row in rows)
    assert [row[0] for row in rows[:2]] == ["model.layers.2.mlp.down.weight", "model.layers.1.mlp.up.weight"]
    down = dict(zip(head, rows[0]))
    assert [down[key] for key in ("shape", "|A|", "relative", "cosine", "ratio")] == ["1 \u00d7 1", "4", "2", "-1", "1"]
    assert [down[key] for key in ("dtype", "differing", "equal")] == ["F64", "1", "0"]
    assert "NaN A" not in head  # no tensor has any
    odd = one | {"embed.weight": np.array([np.nan, np.inf], np.float16)}
    found = compare.weights(*opened(tmp_path, c=odd), open_checkpoint(tmp_path / "b.safetensors"))
    head, first, *_ = Page(page(found, "c", "b")).rows
    first = dict(zip(head, first))
    assert [first[key] for key in ("dtype", "relative", "NaN A", "infinite A", "NaN B")] == ["F16, F32", "-", "1", "1", "0"]


def test_names_on_the_page_are_text(tmp_path):
    bad = '<script src="x">alert(1)</script>&\x1b'
    one = {f"{bad}.{i}.w": np.array([1.0 + i]) for i in range(2)}
    found = compare.weights(*opened(tmp_path, a=one, b={name: 2 * x for name, x in one.items()}))
    text = page(found, f"a{bad}", "b\udc80", base=bad)
    assert {tag for tag, _ in Page(text).elements} == PAGE and "&lt;script" in text and "\x1b" not in text
    text.encode()  # no lone surrogate
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(), max_size=20))
def test_any_name_fits_on_the_page(name):
    tensors = {
        f"{name}.{i}.{name}": compare.Tensor(
            f"{name}.{i}.{name}", ("F32", "F32"), (1,), (1.0, 1.0), 1.0, 1.0, 0.5, differing=1
        )
        for i in range(2)
    }
    found = compare.Comparison(
        tensors, compare.Tensor("", ("F32", "F32"), ()), ((name,), ()), {name: "of two shapes"}, False
    )
    text = page(found, name, name)
    text.encode()
    assert {tag for tag, _ in Page(text).elements} <= PAGE
    assert len(Page(text).rows) == 3
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.partition("</svg>")[0] + "</svg>")


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ({"w": np.ones(2)}, "have no numbers of several layers"),
        ({"h.0.w": np.ones(2)}, "have no numbers of several layers"),
        ({"h.0.w": np.array([np.nan]), "h.1.w": np.array([np.nan])}, "h.N: no finite distance"),
        ({}, "0 in both"),
    ],
)
def test_pages_without_plots(tmp_path, one, said):
    text = page(compare.weights(*opened(tmp_path, a=one, b=one)), "a", "b")
    assert said in text and "<svg" not in text


# --- The command ------------------------------------------------------------------------------------------------------


def refmerge(*args, cwd):
    return subprocess.run(
        [sys.executable, "-m", "refmerge", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def folder(tmp_path):
    one, two, x, y = units_exchanged()
    save(one, tmp_path / "a.safetensors")
    save(two, tmp_path / "b.safetensors")
    np.savez(tmp_path / "data.npz", inputs=x, labels=y)
    return tmp_path


def test_the_command_without_data(folder):
    done = refmerge("compare", "a.safetensors", "b.safetensors", cwd=folder)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("tensors   4 in both, 1 of them equal\n") and "layers.0.weight" in done.stdout
    told = json.loads(refmerge("compare", "a.safetensors", "b.safetensors", "--json", cwd=folder).stdout)
    assert told["tensors"]["layers.1.bias"]["differing"] == 0 and told["whole"]["relative"] > 0
    based = refmerge("compare", "a.safetensors", "b.safetensors", "--base", "a.safetensors", cwd=folder)
    assert "changes   cosine - of what" in based.stdout  # A changed nothing


def test_the_command_with_ranks(folder):
    done = refmerge("compare", "a.safetensors", "b.safetensors", "--rank", "--base", "b.safetensors", cwd=folder)
    assert done.returncode == 0 and "changes  conflicts  rank\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    by = refmerge("compare", "a.safetensors", "b.safetensors", "--by", "distance", cwd=folder)
    assert "most different, by distance  distance  relative  " in by.stdout
    told = json.loads(refmerge("compare", "a.safetensors", "b.safetensors", "--rank", "--json", cwd=folder).stdout)
    assert 1 <= told["tensors"]["layers.0.weight"]["rank"] <= 4 and told["too_large"] == []
    few = refmerge("compare", "a.safetensors", "b.safetensors", "--rank", "--rank-limit", "1", cwd=folder)
    assert "of 0 matrices" in few.stdout and "not of 2 that are too large" in few.stdout


def test_the_command_writes_a_page(folder):
    arguments = ("compare", "a.safetensors", "b.safetensors", "--base", "a.safetensors", "--rank", "--html", "out.html")
    done = refmerge(*arguments, cwd=folder)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("tensors ")
    got = Page((folder / "out.html").read_text(encoding="utf-8"))
    assert {"changes", "conflicts", "rank"} <= set(got.rows[0]) and len(got.rows) == 5
    assert [tag for tag, _ in got.elements].count("svg") == 2  # layers.0 and layers.1


def test_the_command_with_data(folder):
    arguments = ("compare", "a.safetensors", "b.safetensors", "--data", "data.npz", "--net", "mlp", "--points", "5")
    done = refmerge(*arguments, "--layers", "--plot", "line.svg", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A         loss ") and "barrier   " in done.stdout and "layers.1" in done.stdout
    assert "\nlowest    " in done.stdout
    assert ElementTree.parse(folder / "line.svg").getroot().tag.endswith("svg")
    assert (folder / "line.svg").read_text(encoding="utf-8").count("stroke-dasharray") == 1
    more = ("--measure", "dropout", "--measure", "activations")
    told = json.loads(refmerge(*arguments, *more, "--plot", "two.svg", "--json", cwd=folder).stdout)
    assert told["samples"] == 40 and len(told["loss"]) == 5 and told["barrier"] > 0
    assert told["activations"]["layers.0"]["matched"] == pytest.approx(1) and "dropout" in told
    drawn = (folder / "two.svg").read_text(encoding="utf-8")
    assert "on the line: barrier" in drawn and "through halves: barrier" in drawn


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--data", "data.npz"], 2, "--data and --net want each other"),
        (["--net", "mlp"], 2, "--data and --net want each other"),
        (["--plot", "line.svg"], 2, "want --data and --net"),
        (["--measure", "dropout"], 2, "want --data and --net"),
        (["--data", "data.npz", "--net", "mlp", "--measure", "norm"], 2, "'norm' is not one of"),
        (["--data", "data.npz", "--net", "mlp", "--plot", "a.safetensors"], 2, "does not end in .svg"),
        (["--data", "data.npz", "--net", "mlp", "--plot", "gone/line.svg"], 2, "gone/line.svg cannot be written"),
        (["--data", "data.npz", "--net", "cnn"], 2, "there is no network 'cnn'"),
        (["--data", "gone.npz", "--net", "mlp"], 3, "gone.npz"),
        (["--data", "data.npz", "--net", "mlp", "--base", "a.safetensors"], 2, "--base is for weights"),
        (["--base", "gone.safetensors"], 3, "gone.safetensors"),
        (["--data", "data.npz", "--net", "mlp", "--rank"], 2, "--rank is for weights"),
        (["--rank-limit", "9"], 2, "--rank-limit wants --rank"),
        (["--data", "data.npz", "--net", "mlp", "--html", "o.html"], 2, "--html is for weights"),
        (["--html", "a.safetensors"], 2, "does not end in .html"),
        (["--html", "gone/o.html"], 2, "gone/o.html cannot be written"),
    ],
)
def test_errors_of_the_command(folder, options, status, said):
    before = (folder / "a.safetensors").read_bytes()
    done = refmerge("compare", "a.safetensors", "b.safetensors", *options, cwd=folder)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and (folder / "a.safetensors").read_bytes() == before
