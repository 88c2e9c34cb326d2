"""M-SMoE: the authors' numbers, what their code does otherwise, laws, and smaller models that transformers loads.

tests/data/msmoe.npz holds what functions of UNITES-Lab/MC-SMoE@4a195b1 gave; `about` says which and with what parameters.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmerge import InputError, UsageError, open_checkpoint
from refmerge.checkpoint import save
from refmerge.experts import RULES, Rule, find
from refmerge.nets import moe
from refmerge.nets.layers import Layers
from refmerge.procedures.experts.msmoe import (
    aligned_by_activations,
    aligned_by_weights,
    assigned,
    dominant_experts,
    grouped,
    groups_of,
    merge_experts,
    msmoe,
    orders_of,
    similarity_of_logits,
    weights_of,
    zip_experts,
)
from refmerge.procedures.experts.msmoe_restore import msmoe_restore
from refmerge.stats import Statistics

DATA = np.load(Path(__file__).parent / "data" / "msmoe.npz")
ABOUT = json.loads(str(DATA["about"]))
PARTS = {"wi.weight": 0, "wo.weight": 1}
RELAXED = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 10**6)
RUN = {"mixtral": {"heads": 2, "groups": 1}, "qwen": {"heads": 2, "groups": 1}}


def expert(case, e):
    return {part: DATA[f"{case}/model{e}/{part}"] for part in PARTS}


def near(ours, theirs, case):
    assert np.max(np.abs(ours - theirs)) <= ABOUT[case]["tolerance"] * max(np.max(np.abs(theirs)), 1e-30)


def model_and_stats(seed=0, style="mixtral", layers=2, experts=4, dtype=np.float32, chosen=2, **how):
    """A small language model, and what its routers do on random tokens."""
    draw = np.random.default_rng(seed)
    model = moe.init(draw, 2, 1, layers, experts=experts, style=style, hidden=8, head_width=4, **how)
    stats, batch = Statistics(), draw.integers(0, 11, (4, 8))
    routers = {m.router: chosen for m in find(model).values()}
    moe.forward(model, batch, stats.routing_taps(routers), chosen=chosen, **RUN[style])
    return {name: x.astype(dtype) for name, x in model.items()}, stats


def switch(seed=0, experts=4, units=5, width=3):
    """A block of Switch Transformers, and usage that falls by halves."""
    draw = np.random.default_rng(seed)
    model = {"l.0.mlp.router.classifier.weight": draw.standard_normal((experts, width))}
    for e in range(experts):
        model[f"l.0.mlp.experts.expert_{e}.wi.weight"] = draw.standard_normal((units, width))
        model[f"l.0.mlp.experts.expert_{e}.wo.weight"] = draw.standard_normal((width, units))
    logits = draw.standard_normal((20, experts))
    stats = {"l.0.mlp.router.classifier.routed": 0.5 ** np.arange(experts)}
    return model, stats | {"l.0.mlp.router.classifier.logit_gram": logits.T @ logits / 20}


# --- The authors' numbers ---------------------------------------------------------------------------------------------


def test_official_groups():
    case = "group-00"
    usage = {str(n): DATA[f"{case}/stat/usage/{n}"].astype(np.float64) for n in (0, 1)}
    logits = {str(n): DATA[f"{case}/stat/router_logits/{n}"].astype(np.float64) for n in (0, 1)}
    similarity = {n: similarity_of_logits(x.T @ x) for n, x in logits.items()}
    for semantics in ("official", "paper"):  # no ties here
        found = grouped(usage, similarity, groups=ABOUT[case]["params"]["num_average_groups"], semantics=semantics)
        for n, g in found.items():
            near(g.similarity, DATA[f"{case}/out/similarity/{n}"], case)
            assert g.labels.tolist() == DATA[f"{case}/out/group/{n}"].tolist()
            assert list(g.dominant) == DATA[f"{case}/out/dominant/{n}"].tolist()


@pytest.mark.parametrize("case", ["merge-00", "merge-03"])
def test_official_merges(case):
    usage, labels = DATA[f"{case}/stat/usage"].astype(np.float64), DATA[f"{case}/stat/group"]
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label).tolist()

        def read(e, part):
            return expert(case, e)[part]

        orders = orders_of(read, PARTS, members, members[0])
        for e, order in orders.items():
            assert order.tolist() == DATA[f"{case}/perm/{e}"].tolist()
        weights = weights_of(usage[members], epsilon=ABOUT[case]["params"]["eps"])
        for part, axis in PARTS.items():
            merged = merge_experts(read, part, axis, members, weights, orders)
            for e in members:
                near(merged, DATA[f"{case}/out/{e}/{part}"], case)


def test_official_alignment_by_activations():
    a, b, hidden = expert("act-00", 0), expert("act-00", 1), DATA["act-00/stat/hidden"]
    for eps in (0.0, 1e-7):
        assert aligned_by_activations(a, b, hidden, eps=eps).tolist() == DATA["act-00/perm/ff"].tolist()
    assert aligned_by_activations(a, b, hidden[:1]).tolist() == list(range(9))


def test_official_zip():
    p = ABOUT["zip-00"]["params"]
    both = [expert("zip-00", 0), expert("zip-00", 1)]
    made = zip_experts(both, p["average_coefs"], DATA["zip-00/stat/hidden"], alpha=p["alpha_for_repeated_merging"], eps=1e-7)
    for part, x in made.items():
        near(x, DATA[f"zip-00/out/{part}"], "zip-00")


def test_zipping_by_hand():
    """Units (2), (3) of one expert and (-1), (2) of another with columns 0: 3 and 2 have the largest product, then theirs,
    2.5, and 2; what is left is their mean and -1."""
    a = {"wi.weight": np.array([[2.0], [3.0]]), "wo.weight": np.zeros((1, 2))}
    b = {"wi.weight": np.array([[-1.0], [2.0]]), "wo.weight": np.zeros((1, 2))}
    assert zip_experts([a, b])["wi.weight"].ravel().tolist() == pytest.approx([7 / 3, -1])
    weighted = zip_experts([a, b], [1, 1, 1, 3])
    assert weighted["wi.weight"].ravel().tolist() == pytest.approx([(2 * 1 + 3 * 1 + 2 * 3) / 5, -1])
    assert np.isfinite(zip_experts([a, b], [0, 0])["wi.weight"]).all()
    with pytest.raises(UsageError, match="3 weights for 2 experts of 2 units"):
        zip_experts([a, b], [1, 2, 3])
    with pytest.raises(UsageError, match="no experts to zip"):
        zip_experts([])


# --- What the authors' code does otherwise: the flags of the page -----------------------------------------------------


def test_flag_threshold():
    """Shares 1/2, 1/4, 1/4 and two groups: the third largest is 1/4, and only what is above it is dominant."""
    usage = {"0": np.array([0.5, 0.25, 0.25])}
    assert dominant_experts(usage, 2) == {"0": [0, 1]}
    assert dominant_experts(usage, 2, semantics="official") == {"0": [0]}


def test_flag_all_groups():
    """As many groups as experts: the threshold is the smallest share, and that expert is merged."""
    usage = {"0": np.array([0.5, 0.3, 0.2])}
    assert dominant_experts(usage, 3) == {"0": [0, 1, 2]}
    assert dominant_experts(usage, 3, semantics="official") == {"0": [0, 1]}


def test_flag_one_each():
    usage = {"0": np.array([1.0, 0.0]), "1": np.array([1.0, 0.0])}
    assert dominant_experts(usage, 1) == {"0": [0], "1": [0]}
    assert assigned(np.array([0.4, 0.3, 0.2, 0.1]), np.eye(4), [0]).tolist() == [0, 0, 0, 0]
    with pytest.raises(UsageError, match="no threshold is left"):
        dominant_experts({"0": np.array([1.0])}, 1, semantics="official")


def test_flag_ids():
    """Cores 5 and 3 of six experts: the loop over numbers from 2 up leaves 0 and 1 with their own number as group."""
    usage = np.array([0.05, 0.04, 0.03, 0.2, 0.02, 0.66])
    similarity = np.full((6, 6), 0.5)
    similarity[[0, 1, 2, 4], 3] = 0.9
    np.fill_diagonal(similarity, 1.0)
    assert assigned(usage, similarity, [5, 3]).tolist() == [1, 1, 1, 1, 1, 0]
    assert assigned(usage, similarity, [5, 3], by_id=True).tolist() == [0, 1, 1, 1, 1, 0]
    found = grouped({"0": usage}, {"0": similarity}, groups=2, grouping="layer", semantics="official")
    assert found["0"].labels.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("epsilon, weights", [
    (0.0, [0.75, 0.25]), (1e-7, [0.0075 / 0.0100001, 0.0025 / 0.0100001]), (1e-3, [0.0075 / 0.011, 0.0025 / 0.011]),
])  # fmt: skip
def test_flag_denominator(epsilon, weights):
    """Two experts that take 1 % of the tokens: with 1e-3 the merged one is a tenth too small."""
    assert weights_of(np.array([0.0075, 0.0025]), epsilon=epsilon) == pytest.approx(weights, rel=1e-12)


def test_flag_unused():
    assert weights_of(np.zeros(2)) == [0.5, 0.5]
    assert weights_of(np.zeros(2), epsilon=1e-7) == [0, 0]


def test_flag_reference():
    """Usage makes expert 1 dominant: its units keep their order, or those of expert 0 do."""
    model, stats = switch(experts=2)
    stats["l.0.mlp.router.classifier.routed"] = np.array([0.25, 0.75])
    first, second = ([model[f"l.0.mlp.experts.expert_{e}.{part}"] for part in PARTS] for e in (0, 1))
    order = aligned_by_weights(dict(zip(PARTS, first)), dict(zip(PARTS, second)), PARTS)
    assert order.tolist() != list(range(5))
    dominant = msmoe(model, stats, groups=1).model["l.0.mlp.experts.expert_0.wi.weight"]
    lowest = msmoe(model, stats, groups=1, align="lowest").model["l.0.mlp.experts.expert_0.wi.weight"]
    np.testing.assert_allclose(lowest, 0.25 * first[0] + 0.75 * second[0][order])
    np.testing.assert_allclose(dominant[order], lowest)
    none = msmoe(model, stats, groups=1, align="none").model["l.0.mlp.experts.expert_0.wi.weight"]
    np.testing.assert_allclose(none, 0.25 * first[0] + 0.75 * second[0])


def test_flag_rounding():
    """Two experts with one weight, 129/128, shares 3/8 and 1/4. In bfloat16 a product is rounded to 97/256 in place of
    96.75/256, the sum to 162/256 in place of 161.5/256, and the quotient by 5/8 to 130/128."""
    x, shares = ml_dtypes.bfloat16(129 / 128), np.array([0.375, 0.25])
    products = [ml_dtypes.bfloat16(float(x) * u) for u in shares]
    theirs = ml_dtypes.bfloat16(float(ml_dtypes.bfloat16(float(products[0]) + float(products[1]))) / 0.625)
    ours = merge_experts(lambda e, _: np.float32(x), "", None, [0, 1], weights_of(shares))
    assert (float(theirs), float(ours)) == (130 / 128, 129 / 128)


# --- Groups -----------------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """Columns (1, 0), (1, 1), (-2, 0), (0, 0) of logits."""
    logits = np.array([[1.0, 1, -2, 0], [0, 1, 0, 0]])
    half = (0.5**0.5 + 1) / 2
    expected = [[1, half, 0, 0.5], [half, 1, 1 - half, 0.5], [0, 1 - half, 1, 0.5], [0.5, 0.5, 0.5, 1]]
    np.testing.assert_allclose(similarity_of_logits(logits.T @ logits), expected)
    np.testing.assert_allclose(similarity_of_logits(1e-20 * logits.T @ logits), expected, atol=1e-12)


def test_global_groups_by_hand():
    """Three layers, two groups on average: each layer's first, then the three largest of the others: .4, .3, .2."""
    usage = {"a": np.array([0.4, 0.6]), "b": np.array([0.5, 0.2, 0.3]), "c": np.array([0.9, 0.1])}
    assert dominant_experts(usage, 2) == {"a": [1, 0], "b": [0, 2, 1], "c": [0]}
    assert dominant_experts(usage, 1) == {"a": [1], "b": [0], "c": [0]}


@RELAXED
@given(SEEDS, st.integers(1, 4), st.integers(1, 6), st.data())
def test_groups_are_a_partition_around_the_most_used(seed, layers, experts, data):
    draw = np.random.default_rng(seed)
    count = data.draw(st.integers(1, experts))
    usage = {str(n): draw.dirichlet(np.full(experts, 0.3)).round(2) for n in range(layers)}
    usage = {n: u / u.sum() for n, u in usage.items()}
    logits = {n: draw.standard_normal((9, experts)) for n in usage}
    similarity = {n: similarity_of_logits(x.T @ x) for n, x in logits.items()}
    for grouping in ("layer", "global"):
        found = grouped(usage, similarity, groups=count, grouping=grouping)
        assert sum(len(g.dominant) for g in found.values()) == layers * count
        for n, g in found.items():
            assert grouping == "global" or len(g.dominant) == count
            assert sorted(e for k in range(len(g.dominant)) for e in g.members(k)) == list(range(experts))
            others = [u for e, u in enumerate(usage[n]) if e not in g.dominant]
            assert min(usage[n][list(g.dominant)]) >= max(others, default=0)
            for e in range(experts):
                assert similarity[n][e, g.dominant[g.labels[e]]] == max(similarity[n][e, list(g.dominant)])
    # The experts' numbers do not matter, where no two are used alike
    turn = draw.permutation(experts)
    for n, u in usage.items():
        if len(set(u.tolist())) == experts:
            g = grouped({n: u}, similarity, groups=count, grouping="layer")[n]
            turned = similarity[n][np.ix_(turn, turn)]
            h = grouped({n: u[turn]}, {n: turned}, groups=count, grouping="layer")[n]
            assert h.labels.tolist() == g.labels[turn].tolist()


def test_a_capacity_sends_on_to_the_next_most_alike():
    usage, similarity = np.array([0.4, 0.3, 0.2, 0.1]), np.eye(4)
    similarity[2:, 0], similarity[2:, 1] = 0.9, 0.1
    assert assigned(usage, similarity, [0, 1]).tolist() == [0, 1, 0, 0]
    assert assigned(usage, similarity, [0, 1], capacity=2).tolist() == [0, 1, 0, 1]
    with pytest.raises(UsageError, match="2 groups of at most 1 do not hold the 4 experts"):
        assigned(usage, similarity, [0, 1], capacity=1)


# --- Merged experts ---------------------------------------------------------------------------------------------------


def test_merged_by_hand():
    """Usage 3/4 and 1/4, one unit each."""
    model = {"l.0.mlp.router.classifier.weight": np.array([[4.0, 0], [0, 8]])}
    for e, (wi, wo) in enumerate((([[4.0, 8]], [[1.0], [2]]), ([[8.0, 0]], [[5.0], [-2]]))):
        model |= {f"l.0.mlp.experts.expert_{e}.{p}": np.array(x) for p, x in zip(PARTS, (wi, wo))}
    stats = {"l.0.mlp.router.classifier.routed": [0.75, 0.25], "l.0.mlp.router.classifier.logit_gram": np.eye(2)}
    tied = msmoe(model, stats, groups=1).model
    assert tied.keys() == model.keys()
    for e in (0, 1):
        assert tied[f"l.0.mlp.experts.expert_{e}.wi.weight"].tolist() == [[5, 6]]
        assert tied[f"l.0.mlp.experts.expert_{e}.wo.weight"].tolist() == [[2], [1]]
    small = msmoe(model, stats, groups=1, grouping="layer", write="reduced").model
    assert small["l.0.mlp.router.classifier.weight"].tolist() == [[3, 2]]
    assert len(small) == 3
    small = msmoe(model, stats, groups=1, grouping="layer", write="reduced", router="dominant", weighting="equal").model
    assert small["l.0.mlp.router.classifier.weight"].tolist() == [[4, 0]]
    assert small["l.0.mlp.experts.expert_0.wi.weight"].tolist() == [[6, 4]]


@RELAXED
@given(SEEDS, st.sampled_from(["mixtral", "qwen"]), st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16]))
def test_one_group_for_each_expert_changes_no_bit(seed, style, dtype):
    model, stats = model_and_stats(seed, style, layers=1, dtype=dtype)
    for grouping in ("layer", "global"):
        merged = msmoe(model, stats, groups=4, grouping=grouping).model
        assert all(np.array_equal(merged[n].view(np.uint8), x.view(np.uint8)) for n, x in model.items())


@RELAXED
@given(SEEDS)
def test_shuffled_copies_of_one_expert_give_it_back(seed):
    model, stats = switch(seed)
    draw, base = np.random.default_rng(seed), {p: model[f"l.0.mlp.experts.expert_0.{p}"] for p in PARTS}
    for e in range(1, 4):
        turn = draw.permutation(5)
        model[f"l.0.mlp.experts.expert_{e}.wi.weight"] = base["wi.weight"][turn]
        model[f"l.0.mlp.experts.expert_{e}.wo.weight"] = base["wo.weight"][:, turn]
    merged, x = msmoe(model, stats, groups=1).model, draw.standard_normal((7, 3))
    for part in PARTS:
        np.testing.assert_allclose(merged[f"l.0.mlp.experts.expert_2.{part}"], base[part], rtol=1e-12)
    before, after = (moe.mixture(Layers(m), "l.0", x, chosen=2) for m in (model, merged))
    np.testing.assert_allclose(before, after, rtol=1e-9, atol=1e-12)


@RELAXED
@given(SEEDS, st.sampled_from(["dominant", "lowest", "first"]))
def test_the_order_of_hidden_units_does_not_matter(seed, align):
    """Shuffled units of one expert leave the function of the merged model."""
    model, stats = switch(seed)
    shuffled, draw = dict(model), np.random.default_rng(seed)
    turn, e = draw.permutation(5), int(draw.integers(0, 4))
    shuffled[f"l.0.mlp.experts.expert_{e}.wi.weight"] = model[f"l.0.mlp.experts.expert_{e}.wi.weight"][turn]
    shuffled[f"l.0.mlp.experts.expert_{e}.wo.weight"] = model[f"l.0.mlp.experts.expert_{e}.wo.weight"][:, turn]
    x = draw.standard_normal((7, 3))
    one, other = (
        moe.mixture(Layers(msmoe(m, stats, groups=2, align=align).model), "l.0", x, chosen=2) for m in (model, shuffled)
    )
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@RELAXED
@given(SEEDS)
def test_merged_weights_lie_between_their_members(seed):
    model, stats = switch(seed)
    found = msmoe(model, stats, groups=2, align="none")
    for group in range(2):
        members = found.groups["l.0"].members(group)
        for part in PARTS:
            stack = np.stack([model[f"l.0.mlp.experts.expert_{e}.{part}"] for e in members])
            x = found.model[f"l.0.mlp.experts.expert_{members[0]}.{part}"]
            assert np.all(x <= stack.max(axis=0) + 1e-12) and np.all(x >= stack.min(axis=0) - 1e-12)


def test_gated_experts_move_all_three_matrices_together():
    model, stats = model_and_stats(layers=1)
    found = msmoe(model, stats, groups=1)
    (dominant,), u = found.groups["model.layers.0"].dominant, found.groups["model.layers.0"].usage
    at = "model.layers.0.block_sparse_moe.experts"
    for part, axis in RULES["mixtral"].parts.items():
        expected = sum(
            u[e] * np.take(model[f"{at}.{e}.{part}"].astype(np.float64),
                           found.orders["model.layers.0"].get(e, np.arange(8)), axis=axis)
            for e in range(4)
        )  # fmt: skip
        np.testing.assert_allclose(found.model[f"{at}.0.{part}"], expected, rtol=1e-5, atol=1e-6)
    assert set(found.orders["model.layers.0"]) == set(range(4)) - {dominant}


# --- Files, and transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["mixtral", "qwen"])
def test_tied_shared_and_restored_compute_the_same(style, tmp_path):
    model, stats = model_and_stats(style=style, dtype=ml_dtypes.bfloat16, **({"shared": 5} if style == "qwen" else {}))
    count, kind = RULES[style].count, {"mixtral": "mixtral", "qwen": "qwen2_moe"}[style]
    config = {"model_type": kind, "num_experts_per_tok": 2, count: 4, "num_attention_heads": 2}
    save(model, tmp_path / "model", extra_files={"config.json": json.dumps(config).encode()}, max_shard_size=4000)
    stats.save(tmp_path / "stats.safetensors")
    merge = partial(msmoe, tmp_path / "model", tmp_path / "stats.safetensors", groups=2)
    tied = merge(tmp_path / "tied").model
    assert tied.config == config and tied.tensors.keys() == model.keys()
    shared = merge(tmp_path / "shared", write="shared").model
    assert shared.config["model_type"] == "refmerge_shared_experts" and shared.nbytes < tied.nbytes
    in_memory = msmoe(model, stats, groups=2, write="shared").model
    assert all(np.array_equal(in_memory[n], shared[n]) for n in shared)
    back = msmoe_restore(tmp_path / "shared", tmp_path / "back")
    assert back.config == config and back.tensors.keys() == model.keys()
    assert all(np.array_equal(back[n], tied[n]) for n in tied)
    batch = np.random.default_rng(1).integers(0, 11, (2, 5))
    outputs = [
        moe.forward({n: np.asarray(m[n], np.float64) for n in m}, batch, **moe.options(config), **{"groups": 1})
        for m in (tied, shared)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-9)
    with pytest.raises(UsageError, match="share experts already"):
        msmoe(tmp_path / "shared", stats, groups=2)
    with pytest.raises(InputError, match="nothing to restore"):
        msmoe_restore(tmp_path / "tied")
    with pytest.raises(UsageError, match="lies in an input"):
        merge(tmp_path / "model" / "out")
    with pytest.raises(UsageError, match="exists"):
        merge(tmp_path / "tied")


@pytest.mark.parametrize("write", ["tied", "shared", "reduced"])
def test_tensors_of_torch_are_taken(torch, write):
    """Merged they are NumPy's, in their type."""
    model, stats = model_and_stats(dtype=ml_dtypes.bfloat16)
    theirs = {n: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for n, x in model.items()}
    how = {"groups": 2, "grouping": "layer", "write": write}
    one, other = (msmoe(m, stats, **how).model for m in (model, theirs))
    assert one.keys() == other.keys()
    assert all(other[n].dtype == x.dtype and np.array_equal(other[n], x) for n, x in one.items())


KINDS = {
    "Mixtral": ("mixtral", {"num_local_experts": 4}, {}),
    "Qwen2Moe": ("qwen", {"num_experts": 4, "shared_expert_intermediate_size": 5}, {"shared": 5, "bias": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", ["reduced", "tied"])
def test_transformers_loads_what_is_written(torch, kind, write, tmp_path):
    """Its outputs are those of the weights merged here, directly, by one line of NumPy."""
    transformers = pytest.importorskip("transformers")
    style, given, drawn = KINDS[kind]
    model, stats = model_and_stats(style=style, **drawn)
    config = getattr(transformers, f"{kind}Config")(
        **given, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, vocab_size=11, num_experts_per_tok=2,
    )  # fmt: skip
    save(model, tmp_path / "model", extra_files={"config.json": config.to_json_string().encode()})
    found = msmoe(tmp_path / "model", stats, tmp_path / "out", groups=3, grouping="layer", align="none", write=write)
    net, told = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    counted = getattr(net.config, RULES[style].count)
    assert counted == (3 if write == "reduced" else 4)
    direct = {n: x.astype(np.float64) for n, x in model.items()}
    for layer, mixture in find(model).items():
        g = found.groups[layer]
        rows = direct[f"{mixture.router}.weight"]
        means = {}
        for k in range(3):
            u = g.usage * (g.labels == k) / g.usage[g.labels == k].sum()
            means[k] = {p: sum(u[e] * direct[mixture.name(e, p)] for e in range(4)) for p in mixture.rule.parts}
            means[k]["row"] = u @ rows
        if write == "reduced":
            direct[f"{mixture.router}.weight"] = np.stack([means[k]["row"] for k in range(3)])
        for e in range(4):
            for p in mixture.rule.parts:
                direct[mixture.name(e, p)] = means[e if write == "reduced" and e < 3 else g.labels[e]][p]
    batch = np.random.default_rng(1).integers(0, 11, (2, 5))
    with torch.no_grad():
        got = net.eval()(torch.from_numpy(batch)).logits.numpy()
    np.testing.assert_allclose(got, moe.forward(direct, batch, **moe.options(net.config.to_dict())), rtol=1e-3, atol=1e-4)


def test_transformers_loads_a_smaller_switch(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwitchTransformersConfig(
        d_model=8, d_kv=4, d_ff=6, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=11, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    net = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    net.save_pretrained(tmp_path / "model")
    draw, stats = np.random.default_rng(0), Statistics()
    for mixture in find(open_checkpoint(tmp_path / "model")).values():
        stats.routing(mixture.router, draw.standard_normal((50, 4)), 1)
    found = msmoe(tmp_path / "model", stats, tmp_path / "out", groups=2, grouping="layer", write="reduced")
    small, told = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and small.config.num_experts == 2
    block = small.encoder.block[1].layer[1].mlp.eval()
    x = draw.standard_normal((1, 6, 8)).astype(np.float32)
    with torch.no_grad():
        got = block(torch.from_numpy(x)).numpy()
    expected = moe.mixture(Layers(found.model), "encoder.block.1.layer.1", x, chosen=1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert sorted(found.groups) == ["decoder.block.1.layer.2", "encoder.block.1.layer.1"]


# --- What is refused --------------------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    model, stats = model_and_stats(layers=2)
    for options, message in (
        ({"groups": 0}, r"groups = 0 is no whole number in \[1, 4\]"),
        ({"groups": 5}, r"groups = 5 is no whole number in \[1, 4\]"),
        ({"groups": 2, "grouping": "all"}, "grouping = 'all' is none of"),
        ({"groups": 2, "write": "smaller"}, "write = 'smaller' is none of"),
        ({"groups": 2, "write": "reduced"}, "as many experts in each layer: grouping='layer'"),
        (
            {"groups": 2, "write": "reduced", "grouping": "layer", "layers": ["*.1"]},
            "all layers merged, and layers leaves out 'model.layers.0'",
        ),
        ({"groups": 2, "layers": ["*.7"]}, r"no layer with experts is called '\*\.7'; there are 'model\.layers\.0'"),
        ({"groups": 2, "similarity": "taste"}, "similarity = 'taste' is none of"),
        ({"groups": 2, "align": "best"}, "align = 'best' is none of"),
        ({"groups": 2, "semantics": "mine"}, "semantics = 'mine' is none of"),
        ({"groups": 2, "capacity": 0}, "capacity = 0 is no whole number above 0"),
        ({"groups": 1, "capacity": 2}, "1 groups of at most 2 do not hold the 4 experts of 'model.layers.0'"),
        ({"groups": 2, "epsilon": -1.0}, "epsilon = -1.0 is below 0"),
        ({"groups": 2, "capacity": 2, "semantics": "official"}, "code has no capacity with grouping='layer'"),
    ):
        with pytest.raises(UsageError, match=message):
            msmoe(model, stats, tmp_path / "out", **{"grouping": "layer"} | options if "capacity" in options else options)
    for odd, message in (
        ((3, stats), "a model is a path"),
        ((model, 3), "statistics are a Statistics, a mapping or a path"),
    ):
        with pytest.raises(UsageError, match=message):
            msmoe(*odd, groups=2)
    with pytest.raises(UsageError, match=r"no rule 'gpt' \(there are mixtral, qwen, switch\)"):
        msmoe(model, stats, groups=2, rule="gpt")
    few = {n: x for n, x in stats.items() if "layers.1" not in n} | {
        "model.layers.9.block_sparse_moe.gate.routed": np.ones(4)
    }
    with pytest.raises(InputError, match=r"missing are 'model\.layers\.1.*of no router of the model are 'model\.layers\.9"):
        msmoe(model, few, groups=2)
    wrong = dict(stats) | {"model.layers.0.block_sparse_moe.gate.routed": np.ones(3)}
    with pytest.raises(InputError, match=r"gate\.routed is of shape \[3\] for 4 experts"):
        msmoe(model, wrong, groups=2)
    bad = dict(model)
    bad["model.layers.0.block_sparse_moe.experts.1.w1.weight"] = np.full((8, 8), np.nan, np.float32)
    for align in ("dominant", "none"):
        with pytest.raises(InputError, match=r"experts\.1\.w1\.weight' has values that are infinite or NaN"):
            msmoe(bad, stats, tmp_path / "out", groups=1, align=align)
    bad = model | {"model.layers.0.block_sparse_moe.gate.weight": np.full((4, 8), np.inf, np.float32)}
    with pytest.raises(InputError, match=r"gate\.weight' has values that are infinite or NaN"):
        msmoe(bad, stats, tmp_path / "out", groups=2, grouping="layer", write="reduced")
    config = {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 4}
    save(model, tmp_path / "model", extra_files={"config.json": json.dumps(config).encode()})
    with pytest.raises(UsageError, match=r"2 experts are chosen for a token .* needs as many groups, and there are 1"):
        msmoe(tmp_path / "model", stats, tmp_path / "out", groups=1, grouping="layer", write="reduced")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_layers_that_are_left_out_stay_as_they_are():
    model, stats = model_and_stats()
    merged = msmoe(model, stats, groups=1, layers=["*.1"], semantics="official")
    assert len(merged.groups["model.layers.0"].dominant) == 4 and len(merged.groups["model.layers.1"].dominant) == 1
    for name, x in model.items():
        assert np.array_equal(merged.model[name], x) or ".layers.1.block_sparse_moe.experts." in name


def test_other_similarities():
    model, stats = model_and_stats(layers=1)
    at = "model.layers.0.block_sparse_moe"
    rows = model[f"{at}.gate.weight"].astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    g = groups_of(model, stats, groups=2, similarity="router")["model.layers.0"]
    np.testing.assert_allclose(g.similarity, (rows @ rows.T / np.outer(norms, norms) + 1) / 2, rtol=1e-9)
    flat = np.stack([
        np.concatenate([model[f"{at}.experts.{e}.{w}.weight"].ravel() for w in ("w1", "w2", "w3")]) for e in range(4)
    ]).astype(np.float64)  # fmt: skip
    norms = np.linalg.norm(flat, axis=1)
    g = groups_of(model, {f"{at}.gate.routed": np.ones(4)}, groups=2, similarity="weights")["model.layers.0"]
    np.testing.assert_allclose(g.similarity, (flat @ flat.T / np.outer(norms, norms) + 1) / 2, rtol=1e-9)


def test_a_rule_of_one_s_own_with_biases(tmp_path):
    rule = Rule(
        "mine", block="ffn", router="gate.wg", expert="experts.expert_{}", count="num_experts", chosen=1,
        parts={"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1, "fc2.bias": None},
    )  # fmt: skip
    draw = np.random.default_rng(0)
    shapes = {"fc1.weight": (5, 3), "fc1.bias": (5,), "fc2.weight": (3, 5), "fc2.bias": (3,)}
    first = {part: draw.standard_normal(shape) for part, shape in shapes.items()}
    turn = np.array([3, 0, 4, 1, 2])
    second = {p: first[p] if a is None else np.take(first[p], turn, axis=a) for p, a in rule.parts.items()}
    model = {"layers.3.ffn.gate.wg.weight": np.eye(2, 3)}
    for e, parts in enumerate((first, second)):
        model |= {f"layers.3.ffn.experts.expert_{e}.{part}": x for part, x in parts.items()}
    stats = {"layers.3.ffn.gate.wg.routed": [0.5, 0.5], "layers.3.ffn.gate.wg.logit_gram": np.eye(2)}
    with pytest.raises(InputError, match=r"no mixture of experts that 'mixtral' or 'qwen' or 'switch' would know.*--rule"):
        msmoe(model, stats, groups=1)
    merged = msmoe(model, stats, groups=1, rule=rule).model
    for part, x in first.items():
        np.testing.assert_allclose(merged[f"layers.3.ffn.experts.expert_1.{part}"], x)
    more, wider = model | {"layers.3.ffn.gate.wg.offset": np.zeros(2)}, replace(rule, others=("gate.wg.offset",))
    assert "layers.3.ffn.gate.wg.offset" in msmoe(more, stats, groups=1, rule=wider).model
    with pytest.raises(UsageError, match=r"weight and bias of a router, and there are 'layers\.3\.ffn\.gate\.wg\.offset'"):
        msmoe(more, stats, groups=1, grouping="layer", write="reduced", rule=wider)
