"""The specs of known architectures: what they permute leaves the function as it is, and what they leave alone does not."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge.checkpoint import open_checkpoint, save
from refmerge.demo.digits import classify
from refmerge.errors import UsageError
from refmerge.nets import gpt2, llama, mlp, resnet, vgg, vit
from refmerge.symmetry import Block, Nested, Slices, Spec, architectures, changes

FEW = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def images(rng, size=8):
    return rng.normal(size=(2, 3, size, size))


def tokens(rng):
    return rng.integers(0, 11, (2, 6))


# name -> rng -> (parameters, spec, forward, batch)
NETS = {
    "mlp": lambda rng: (p := mlp.init(rng, [5, 7, 6, 4]), architectures.mlp(p), mlp.forward, rng.normal(size=(3, 5))),
    "vgg": lambda rng: (p := vgg.init(rng, [6, "M", 8, 7, "M"], [9]), architectures.vgg(p), vgg.forward, images(rng)),
    "vgg, pixels": lambda rng: (
        p := vgg.init(rng, [6, "M", 8, "M"], [9, 5], places=4, norm="layer"),
        architectures.vgg(p), vgg.forward, images(rng),
    ),
    "vgg, plain": lambda rng: (
        p := vgg.init(rng, [5, 6, "M"], places=16, norm=None), architectures.vgg(p), vgg.forward, images(rng)
    ),
    "resnet": lambda rng: (p := resnet.init(rng, (4, 6, 8), 2), architectures.resnet(p), resnet.forward, images(rng)),
    "resnet, zeros": lambda rng: (
        p := resnet.init(rng, (4, 6, 10), 2, shortcut="zeros", norm="layer"),
        architectures.resnet(p), resnet.forward, images(rng),
    ),
    "resnet, bottlenecks": lambda rng: (
        p := resnet.init(rng, (3, 4), 2, bottleneck=True, stem=7), architectures.resnet(p), resnet.forward, images(rng, 32)
    ),
    "vit": lambda rng: (
        p := vit.init(rng, 12), architectures.vit(p, 3), partial(vit.forward, heads=3), images(rng)
    ),
    "gpt2": lambda rng: (
        p := gpt2.init(rng, 12, tied=False), architectures.gpt2(p, 3), partial(gpt2.forward, heads=3), tokens(rng)
    ),
    "llama": lambda rng: (
        p := llama.init(rng, 6, 2), architectures.llama(p, 6, 2), partial(llama.forward, heads=6, groups=2), tokens(rng)
    ),
    "llama, a group for each head": lambda rng: (
        p := llama.init(rng, 3, 3), architectures.llama(p, 3), partial(llama.forward, heads=3), tokens(rng)
    ),
    "qwen": lambda rng: (
        p := llama.init(rng, 4, 2, width=20, bias=True, head_norms=True, tied=True),
        architectures.llama(p, 4, 2), partial(llama.forward, heads=4, groups=2), tokens(rng),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@FEW
@given(seeds)
def test_permutations_leave_the_function(name, seed):
    rng = np.random.default_rng(seed)
    params, spec, forward, batch = NETS[name](rng)
    before = forward(params, batch)
    perms = spec.random(params, rng)
    after = forward(spec.apply(perms, params), batch)
    assert np.max(np.abs(after - before)) <= 1e-12 * np.max(np.abs(before))


@pytest.mark.parametrize("name", NETS)
def test_each_permutation_by_itself(name):
    rng = np.random.default_rng(0)
    params, spec, forward, batch = NETS[name](rng)
    found = changes(spec, params, lambda p: forward(p, batch), rng)
    assert list(found) == spec.permutations and max(found.values()) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_units_move_in_every_tensor(name):
    """Each use of a permutation is needed: with any one of them left out, outputs change."""
    rng = np.random.default_rng(1)
    params, spec, forward, batch = NETS[name](rng)
    before = forward(params, batch)
    for p, shape in spec.shapes(params).items():
        if shape[-1] == 1:
            continue
        moved = spec.apply({p: np.broadcast_to(np.roll(np.arange(shape[-1]), 1), shape)}, params)
        for tensor, _ in spec.uses(p):
            wrong = forward(moved | {tensor: params[tensor]}, batch)
            assert np.max(np.abs(wrong - before)) > 1e-6 * np.max(np.abs(before)), (p, tensor)


@pytest.mark.parametrize("name", NETS)
def test_taps(name):
    """Units that no other permutation owns give what they gave, in their new places, and layers their outputs."""
    rng = np.random.default_rng(2)
    params, spec, forward, batch = NETS[name](rng)
    perms, before, after = spec.random(params, rng), {}, {}
    same = forward(params, batch, before)
    assert np.array_equal(same, forward(params, batch))
    owners = {owner for owned in spec.owners.values() for owner in owned}
    for p, q in perms.items():
        after.clear()
        forward(spec.apply({p: q}, params), batch, after)
        assert after[p].shape == before[p].shape == (*q.shape[:-1], before[p].shape[-2], q.shape[-1])
        moved = np.take_along_axis(before[p], q[..., None, :], axis=-1)
        assert np.allclose(moved, after[p], rtol=0, atol=1e-9), p
    for tensor, x in params.items():
        if (
            tensor.endswith("weight")
            and x.ndim > 1
            and "wte" not in tensor
            and "wpe" not in tensor
            and "embed" not in tensor
        ):
            assert before[tensor].shape[1] in x.shape
    assert owners <= before.keys()


# --------------------------------------------------------------------------------------------------------- what is not legal


def swapped(x, axis, i, j, k=1):
    """Blocks i and j of k places exchanged."""
    places = np.arange(x.shape[axis]).reshape(-1, k)
    places[[i, j]] = places[[j, i]]
    return np.take(x, places.reshape(-1), axis=axis)


@pytest.fixture
def grouped():
    """Four heads in two groups, and how far outputs move when tensors of layer 0 are changed."""
    rng = np.random.default_rng(0)
    params, batch = llama.init(rng, 4, 2), tokens(rng)
    before = llama.forward(params, batch, heads=4, groups=2)

    def moved(change):
        at = "model.layers.0.self_attn."
        new = {
            f"{at}{key}.weight": change(key, params[f"{at}{key}.weight"]) for key in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        return np.max(np.abs(llama.forward(params | new, batch, heads=4, groups=2) - before))

    return architectures.llama(params, 4, 2), params, moved


def test_queries_stay_with_their_keys(grouped):
    """Heads 0 and 1 share keys and values, and 2 and 3. Heads 0 and 1 may change places, 0 and 2 may not."""
    spec, params, moved = grouped
    axis = {"q_proj": 0, "o_proj": 1}
    for other, right in ((1, True), (2, False)):
        far = moved(lambda key, x: swapped(x, axis[key], 0, other, 8) if key in axis else x)  # noqa: B023
        assert far < 1e-12 if right else far > 1e-3
    with pytest.raises(UsageError, match=r"'queries.0' is int64 of shape \[4\], not int of \[2, 2\]"):
        spec.apply({"queries.0": np.array([2, 1, 0, 3])}, params)


def test_rotary_pairs_stay(grouped):
    """Entries 0 and 4 of a head of eight are a pair: neither they nor two pairs may change places, though values may."""
    spec, params, moved = grouped

    def inside(x, i, j, axis=0):
        """Entries i and j of every head."""
        heads = np.arange(x.shape[axis]).reshape(-1, 8)
        heads[:, [i, j]] = heads[:, [j, i]]
        return np.take(x, heads.reshape(-1), axis=axis)

    def pairs(x):
        return inside(inside(x, 0, 1), 4, 5)

    assert moved(lambda key, x: inside(x, 0, 4) if key in ("q_proj", "k_proj") else x) > 1e-3
    assert moved(lambda key, x: pairs(x) if key in ("q_proj", "k_proj") else x) > 1e-3
    axis = {"v_proj": 0, "o_proj": 1}
    assert moved(lambda key, x: inside(x, 0, 4, axis[key]) if key in axis else x) < 1e-12
    with pytest.raises(UsageError, match=r"'keys.0' is not in the spec"):
        spec.apply({"keys.0": np.arange(8)}, params)


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"q_proj": (Nested("G", "K", 8), None), "k_proj": (Nested("G", "K", 8), None)}, "K"),
        ({"q_proj": (Block("H", 8), None), "o_proj": (None, Block("H", 8))}, "H"),
        ({"v_proj": (Block("G", 8), None)}, "G"),
    ],
)
def test_wrong_specs_are_told(change, culprit):
    """Inside of rotary heads, queries across groups, values without keys."""
    rng = np.random.default_rng(0)
    groups = 4 if culprit == "K" else 2
    params, batch = llama.init(rng, 4, groups, layers=1), tokens(rng)
    wrong = {f"model.layers.0.self_attn.{key}.weight": axes for key, axes in change.items()}
    spec = Spec({name: wrong.get(name) for name in params})
    found = changes(spec, params, lambda p: llama.forward(p, batch, heads=4, groups=groups), rng)
    assert found[culprit] > 1e-3


def test_a_wrong_spec_of_a_convolutional_network():
    """A channel that is flattened is four inputs and not every fourth."""
    rng = np.random.default_rng(0)
    params, spec, forward, batch = NETS["vgg, pixels"](rng)
    name = "classifier.0.weight"
    assert spec.axes[name] == ("classifier.0", Block("features.4", 4))
    wrong = Spec({**spec.axes, name: ("classifier.0", Slices(["features.4"] * 4))})
    found = changes(wrong, params, lambda p: forward(p, batch), rng)
    assert found["features.4"] > 1e-3 and max(found[p] for p in found if p != "features.4") < 1e-12


# ----------------------------------------------------------------------------------------------------------------- by hand


def test_a_multilayer_perceptron():
    spec = architectures.mlp({f"{n}.{key}": 0 for n in ("fc1", "fc2", "fc10", "head") for key in ("weight", "bias")})
    assert spec.axes == {
        "fc1.weight": ("fc1", None), "fc1.bias": ("fc1",), "fc2.weight": ("fc2", "fc1"), "fc2.bias": ("fc2",),
        "fc10.weight": ("fc10", "fc2"), "fc10.bias": ("fc10",), "head.weight": (None, "fc10"), "head.bias": (None,),
    }  # fmt: skip
    named = architectures.mlp({"in.weight": 0, "out.weight": 0}, layers=["in", "out"])
    assert named.axes == {"in.weight": ("in", None), "out.weight": (None, "in")}


def test_old_channels_between_new_ones():
    """A shortcut without parameters carries 4 channels into the middle of 8."""
    params = resnet.init(np.random.default_rng(0), (4, 8), 1, shortcut="zeros")
    spec = architectures.resnet(params)
    middle = Slices(["layer2.low", "layer1", "layer2.high"], [2, 4, 2])
    assert spec.axes["fc.weight"] == (None, middle)
    assert spec.axes["layer2.0.conv2.weight"] == (middle, "layer2.0.conv1", None, None)
    assert spec.sizes(params)["layer1"] == 4


def test_heads_by_hand():
    params = llama.init(np.random.default_rng(0), 6, 2, layers=1)
    spec = architectures.llama(params, 6, 2)
    assert spec.shapes(params) == {
        "ffn.0": (24,), "groups.0": (2,), "queries.0": (2, 3), "residual": (48,), "values.0": (2, 8),
    }  # fmt: skip
    params = gpt2.init(np.random.default_rng(0), 12, 1)
    assert architectures.gpt2(params, 3).shapes(params) == {
        "ffn.0": (48,), "heads.0": (3,), "keys.0": (3, 4), "residual": (12,), "values.0": (3, 4),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, more",
    [
        ("resnet", {"bn1.num_batches_tracked": (), "layer1.0.bn1.num_batches_tracked": ()}),
        ("vgg", {"features.1.num_batches_tracked": ()}),
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.1.attn.masked_bias": ()}),
        ("llama", {"model.layers.1.self_attn.rotary_emb.inv_freq": (4,)}),
    ],
)
def test_buffers_stay(name, more):
    rng = np.random.default_rng(0)
    params, spec, _, _ = NETS[name](rng)
    buffers = {n: np.arange(np.prod(shape, dtype=int)).reshape(shape) for n, shape in more.items()}
    found = architectures.detect(params | buffers, CONFIGS.get(name))
    assert {n: a for n, a in found.axes.items() if n not in buffers} == spec.axes
    moved = found.apply(found.random(params | buffers, rng), params | buffers)
    assert all(np.array_equal(moved[n], x) for n, x in buffers.items())


KINDS: dict[str, dict] = {
    "GPT2LMHead": {}, "LlamaForCausal": {"attention_bias": True, "mlp_bias": True}, "Qwen2ForCausal": {},
    "Qwen3ForCausal": {}, "MistralForCausal": {}, "Phi3ForCausal": {"pad_token_id": 0}, "Olmo2ForCausal": {},
    "Gemma2ForCausal": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers(torch, kind):
    """The networks of transformers themselves, permuted by their own names and configs, give what they gave."""
    transformers, rng = pytest.importorskip("transformers"), np.random.default_rng(0)
    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 3} if kind.startswith("GPT2") else {
        "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config_of = getattr(transformers, kind.partition("For")[0].partition("LM")[0] + "Config")
    config = config_of(vocab_size=11, **sizes, **KINDS[kind])
    torch.manual_seed(0)
    net = getattr(transformers, f"{kind}{'Model' if kind.startswith('GPT2') else 'LM'}")(config).double().eval()
    for parameter in net.parameters():  # gains of 1 and biases of 0 would hide what is wrong
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = {n: x for n, x in net.state_dict().items() if n != "lm_head.weight" or not config.tie_word_embeddings}
    batch = torch.from_numpy(tokens(rng))
    with torch.no_grad():
        before = net(batch).logits
        spec = architectures.detect(model, config.to_dict())
        net.load_state_dict(spec.apply(spec.random(model, rng), model), strict=False)
        after = net(batch).logits
    tolerance = 1e-12 if kind.startswith("GPT2") else 1e-5  # their RMS norm computes in float32
    assert torch.max(torch.abs(after - before)) < tolerance * torch.max(torch.abs(before))


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel", "DeiTForImageClassificationWithTeacher"])
def test_vision_transformers_of_transformers(torch, kind, tmp_path):
    """From file to file, whose names are not those of its modules."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind[:4].removesuffix('F').removesuffix('M')}Config")(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    net = getattr(transformers, kind)(config).double().eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    net.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as model:
        spec = architectures.detect(model)
        moved = spec.apply(spec.random(model, np.random.default_rng(0)), model)
    assert len(spec.permutations) == 9
    save(moved, tmp_path, overwrite=True, extra_files={"config.json": config.to_json_string().encode()})
    other = type(net).from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8).double()
        before, after = ((y.logits if "logits" in y else y.pooler_output).numpy() for y in (net(x), other(x)))
    np.testing.assert_allclose(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_residual_networks_of_transformers(torch, kind):
    transformers, rng = pytest.importorskip("transformers"), np.random.default_rng(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type=kind)
    torch.manual_seed(0)
    net = transformers.ResNetForImageClassification(config).double().eval()
    for x in (*net.parameters(), *(b for n, b in net.named_buffers() if "running" in n)):
        x.data = torch.abs(x + 0.1 * torch.randn_like(x)) if x.ndim == 1 else x + 0.1 * torch.randn_like(x)
    model, x = net.state_dict(), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        before = net(x).logits
        spec = architectures.detect(model)
        net.load_state_dict(spec.apply(spec.random(model, rng), model))
        after = net(x).logits
    inner = [f"layer{block}.conv{i + 1}" for block in ("1.0", "1.1", "2.0") for i in range(1 + (kind == "bottleneck"))]
    assert spec.permutations == sorted(["layer1", "layer2", *inner])
    assert torch.max(torch.abs(after - before)) < 1e-12 * torch.max(torch.abs(before))


# ---------------------------------------------------------------------------------------------------------------- detection


CONFIGS = {
    "vit": {"num_heads": 3},
    "gpt2": {"n_head": 3},
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "llama, a group for each head": {"num_attention_heads": 3},
    "qwen": {"num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("name", NETS)
def test_detection(name):
    params, spec, _, _ = NETS[name](np.random.default_rng(0))
    assert architectures.detect(params, CONFIGS.get(name)) == spec
    assert architectures.detect(params, CONFIGS.get(name), name.partition(",")[0].replace("qwen", "llama")) == spec


def test_detection_on_disk(tmp_path):
    params, spec, forward, batch = NETS["llama"](np.random.default_rng(0))
    save(params, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"num_attention_heads": 6, "num_key_value_heads": 2}')
    with open_checkpoint(tmp_path / "m") as model:
        found = architectures.detect(model)
        assert found.axes == spec.axes and found.sizes(model) == spec.sizes(params)
        perms = found.random(model, np.random.default_rng(1))
        moved = found.apply(perms, model)
    assert np.allclose(forward(moved, batch), forward(params, batch), rtol=1e-12)


def test_the_demo_is_a_multilayer_perceptron():
    from importlib import resources

    model = open_checkpoint(str(resources.files("refmerge.demo") / "base.safetensors"))
    spec, rng = architectures.detect(model), np.random.default_rng(0)
    assert spec.sizes(model) == {"layer1": 48, "layer2": 48}
    pictures = rng.integers(0, 17, (50, 8, 8))
    moved = spec.apply(spec.random(model, rng), model)
    assert np.array_equal(classify(moved, pictures), classify(dict(model), pictures))
    assert np.array_equal(mlp.forward(moved, pictures.reshape(50, 64) / 16).argmax(axis=1), classify(moved, pictures))


def test_refusals():
    rng = np.random.default_rng(0)
    params = llama.init(rng, 4, 2)
    with pytest.raises(UsageError, match=r"how many heads there are is in no tensor.*num_attention_heads"):
        architectures.detect(params)
    with pytest.raises(UsageError, match="no architecture 'lama'"):
        architectures.detect(params, architecture="lama")
    with pytest.raises(UsageError, match="4 heads in 4 groups do not fit"):
        architectures.llama(params, 4)
    with pytest.raises(UsageError, match="are not 5 parts"):
        architectures.llama(params, 5, 2)
    for name, first in {
        "llama": "layers.0.self_attn.k_proj.weight", "gpt2": "h.0.attn.c_proj.weight", "resnet": "conv1.weight",
        "vit": "blocks.0.attn.qkv.weight", "vgg": "features.0.weight",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=f"{name}: the model has no tensor '{first}'"):
            architectures.detect({}, {"num_attention_heads": 4}, name)
    with pytest.raises(UsageError, match=r"mlp: the model has no tensor whose name ends in .weight"):
        architectures.detect({})
    with pytest.raises(UsageError, match=r"of no known architecture \(mlp, .*\); 'encoder.norm.weight' is none of an mlp"):
        architectures.detect({"encoder.norm.weight": np.ones(3), "encoder.fc.weight": np.ones((3, 3))})
    with pytest.raises(UsageError, match=r"mlp has no heads to be given \(known here: layers\)"):
        architectures.detect({"fc1.weight": np.ones((3, 3))}, heads=2)
    for names in (["encoder", "decoder"], ["encoder.0", "encoder.1", "decoder.0"]):
        with pytest.raises(UsageError, match=r"mlp: names do not tell in which order decoder.*: give layers, the first"):
            architectures.detect({f"{name}.weight": np.ones((3, 3)) for name in names})
    more = params | {"model.layers.0.mlp.experts.0.weight": np.zeros((2, 2))}
    with pytest.raises(UsageError, match=r"experts.0.weight' is none of this architecture"):
        architectures.llama(more, 4, 2)
