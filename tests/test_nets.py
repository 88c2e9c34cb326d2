"""Networks against torch's own modules, against transformers where it is installed, and across array libraries."""

from functools import partial

import numpy as np
import pytest

from refmerge.checkpoint import save
from refmerge.errors import UsageError
from refmerge.nets import gpt2, llama, mlp, moe, resnet, vgg, vit
from refmerge.nets.layers import Layers, gelu, gelu_tanh, in_order, max_pool, relu, silu


def images(rng, size=8):
    return rng.normal(size=(2, 3, size, size))


def tokens(rng):
    return rng.integers(0, 11, (2, 6))


NETS = {
    "mlp": lambda rng: (mlp.init(rng, [5, 7, 6, 4]), mlp.forward, rng.normal(size=(3, 5))),
    "vgg": lambda rng: (vgg.init(rng, [6, "M", 8, "M"], [9], places=4), vgg.forward, images(rng)),
    "resnet": lambda rng: (resnet.init(rng, (4, 6), 1), resnet.forward, images(rng)),
    "resnet, zeros": lambda rng: (resnet.init(rng, (4, 6), 1, shortcut="zeros", norm="layer"), resnet.forward, images(rng)),
    "resnet, bottlenecks": lambda rng: (resnet.init(rng, (3,), 1, bottleneck=True, stem=7), resnet.forward, images(rng, 16)),
    "vit": lambda rng: (vit.init(rng, 12, 1), partial(vit.forward, heads=3), images(rng)),
    "gpt2": lambda rng: (gpt2.init(rng, 12, 1), partial(gpt2.forward, heads=3), tokens(rng)),
    "llama": lambda rng: (
        llama.init(rng, 4, 2, 1, head_norms=True, bias=True), partial(llama.forward, heads=4, groups=2), tokens(rng)
    ),
    "moe": lambda rng: (moe.init(rng, 4, 2, 1), partial(moe.forward, heads=4, groups=2), tokens(rng)),
    "moe, shared": lambda rng: (
        moe.init(rng, 4, 2, 1, style="qwen", shared=7, bias=True), partial(moe.forward, heads=4, groups=2), tokens(rng)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_array_libraries_agree(name, library):
    params, forward, batch = NETS[name](np.random.default_rng(0))
    there, taps = {n: library.array(x) for n, x in params.items()}, {}
    got = forward(there, library.array(batch), taps)
    assert library.owns(got)
    known = {}
    expected = forward(params, batch, known)
    np.testing.assert_allclose(library.host(got), expected, rtol=1e-11, atol=1e-12)
    assert list(taps) == list(known)
    for key, x in taps.items():
        assert library.owns(x)
        np.testing.assert_allclose(library.host(x), known[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETS)
def test_gradients_go_through(name, torch):
    params, forward, batch = NETS[name](np.random.default_rng(0))
    there = {n: torch.from_numpy(x).requires_grad_("running" not in n) for n, x in params.items()}
    forward(there, torch.from_numpy(batch)).square().sum().backward()
    for n, x in there.items():
        if "running" not in n and "k_proj.bias" not in n:
            assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0, n


@pytest.mark.parametrize("name", NETS)
def test_single_precision_stays(name):
    params, forward, batch = NETS[name](np.random.default_rng(0))
    batch = batch if batch.dtype.kind == "i" else batch.astype(np.float32)
    assert forward({n: x.astype(np.float32) for n, x in params.items()}, batch).dtype == np.float32


# -------------------------------------------------------------------------------------------------------- torch's modules


def tensors(torch, params):
    return {n: torch.from_numpy(x) for n, x in params.items()}


def close(got, expected):
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_mlp_is_a_sequence(torch):
    nn, rng = torch.nn, np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    params, x = {n: p.detach().numpy() for n, p in net.state_dict().items()}, rng.normal(size=(3, 5))
    close(mlp.forward(params, x), net(torch.from_numpy(x)))


@pytest.mark.parametrize("norm", ["batch", None])
def test_vgg_is_two_sequences(torch, norm):
    nn, rng = torch.nn, np.random.default_rng(0)
    params = vgg.init(rng, [6, "M", 8, 7, "M"], [9, 5], places=4, norm=norm)

    def block(n, m):
        return [nn.Conv2d(n, m, 3, padding=1), *([nn.BatchNorm2d(m)] if norm else []), nn.ReLU()]

    net = nn.Module()
    net.features = nn.Sequential(*block(3, 6), nn.MaxPool2d(2, 2), *block(6, 8), *block(8, 7), nn.MaxPool2d(2, 2))
    net.classifier = nn.Sequential(
        nn.Linear(28, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 10)
    )
    net.double().eval().load_state_dict(tensors(torch, params), strict=False)
    assert {n for n in net.state_dict() if "num_batches" not in n} == params.keys()
    x = images(rng)
    close(vgg.forward(params, x), net.classifier(net.features(torch.from_numpy(x)).flatten(1)))


@pytest.mark.parametrize("bottleneck, shortcut, norm, stem", [
    (False, "conv", "batch", 3), (True, "conv", "batch", 7), (False, "zeros", "layer", 3),
])  # fmt: skip
def test_resnet_layer_by_layer(torch, bottleneck, shortcut, norm, stem):
    F, rng = torch.nn.functional, np.random.default_rng(0)
    params = resnet.init(rng, (4, 6), 2, bottleneck=bottleneck, shortcut=shortcut, norm=norm, stem=stem)
    p = tensors(torch, params)

    def normed(name, x):
        if norm == "batch":
            return F.batch_norm(x, *(p[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2], p[f"{name}.weight"], p[f"{name}.bias"])
        return x.movedim(-1, 1)

    def conv(name, x, stride):
        return F.conv2d(x, p[f"{name}.weight"], stride=stride, padding=p[f"{name}.weight"].shape[-1] // 2)

    x = images(rng, 16)
    y = F.relu(normed("bn1", conv("conv1", torch.from_numpy(x), 2 if stem == 7 else 1)))
    y = F.max_pool2d(y, 3, 2, 1) if stem == 7 else y
    for name, stride in (("layer1.0", 1), ("layer1.1", 1), ("layer2.0", 2), ("layer2.1", 1)):
        z = F.relu(normed(f"{name}.bn1", conv(f"{name}.conv1", y, 1 if bottleneck else stride)))
        z = normed(f"{name}.bn2", conv(f"{name}.conv2", z, stride if bottleneck else 1))
        if bottleneck:
            z = normed(f"{name}.bn3", conv(f"{name}.conv3", F.relu(z), 1))
        if f"{name}.downsample.0.weight" in p:
            y = normed(f"{name}.downsample.1", conv(f"{name}.downsample.0", y, stride))
        elif y.shape != z.shape:
            y = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        y = F.relu(y + z)
    close(resnet.forward(params, x), F.linear(y.mean(dim=(2, 3)), p["fc.weight"], p["fc.bias"]))


def encoder(torch, p, block, names, d, heads, activation, eps, turned):
    """torch's own layer of a transformer with these parameters. turned: weights are (in, out)."""
    layer = torch.nn.TransformerEncoderLayer(
        d, heads, p[f"{block}.{names['linear1']}.bias"].shape[0], 0.0, activation, eps, batch_first=True, norm_first=True
    )
    state = {}
    for theirs, ours in names.items():
        w, b = (p[f"{block}.{ours}.{key}"] for key in ("weight", "bias"))
        dot = "_" if theirs.endswith("in_proj") else "."
        state |= {f"{theirs}{dot}weight": w.T if turned and w.ndim == 2 else w, f"{theirs}{dot}bias": b}
    layer.double().eval().load_state_dict(state)
    return layer


def test_vit_is_torch_s_encoder(torch):
    F, rng = torch.nn.functional, np.random.default_rng(0)
    params, x = vit.init(rng, 12, 2, patches=4), images(rng)
    p = tensors(torch, params)
    names = {
        "self_attn.in_proj": "attn.qkv", "self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2",
        "norm1": "norm1", "norm2": "norm2",
    }  # fmt: skip
    y = F.conv2d(torch.from_numpy(x), p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4)
    y = torch.cat([p["cls_token"].expand(2, 1, 12), y.flatten(2).transpose(1, 2)], dim=1) + p["pos_embed"]
    for i in range(2):
        y = encoder(torch, p, f"blocks.{i}", names, 12, 3, "gelu", 1e-6, False)(y)
    y = F.layer_norm(y, (12,), p["norm.weight"], p["norm.bias"], 1e-6)[:, 0]
    close(vit.forward(params, x, heads=3), F.linear(y, p["head.weight"], p["head.bias"]))


def test_gpt2_is_torch_s_encoder_with_a_mask(torch):
    F, rng = torch.nn.functional, np.random.default_rng(0)
    params, x = gpt2.init(rng, 12, 2), tokens(rng)
    p = tensors(torch, params)
    names = {
        "self_attn.in_proj": "attn.c_attn", "self_attn.out_proj": "attn.c_proj", "linear1": "mlp.c_fc",
        "linear2": "mlp.c_proj", "norm1": "ln_1", "norm2": "ln_2",
    }  # fmt: skip
    y = p["transformer.wte.weight"][torch.from_numpy(x)] + p["transformer.wpe.weight"][:6]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6).double()
    for i in range(2):
        activation = partial(F.gelu, approximate="tanh")
        y = encoder(torch, p, f"transformer.h.{i}", names, 12, 3, activation, 1e-5, True)(y, src_mask=mask)
    y = F.layer_norm(y, (12,), p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
    close(gpt2.forward(params, x, heads=3), y @ p["transformer.wte.weight"].T)


def test_llama_layer_by_layer(torch):
    """Rotations as products of complex numbers, attention as torch has it for groups."""
    F, rng = torch.nn.functional, np.random.default_rng(0)
    params, x = llama.init(rng, 4, 2, bias=True, head_norms=True, width=20), tokens(rng)
    p = tensors(torch, params)

    def turned(x):
        z = torch.complex(x[..., :4], x[..., 4:])
        angles = torch.arange(6).double()[:, None] * 500.0 ** (-torch.arange(4).double() / 4)
        z = z * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], dim=-1)

    def heads(name, x, normed=None):
        y = F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"]).unflatten(-1, (-1, 8)).transpose(1, 2)
        return y if normed is None else turned(F.rms_norm(y, (8,), p[f"{normed}.weight"], 1e-6))

    y = p["model.embed_tokens.weight"][torch.from_numpy(x)]
    for i in range(2):
        at = f"model.layers.{i}."
        z = F.rms_norm(y, (20,), p[f"{at}input_layernorm.weight"], 1e-6)
        q, k = (heads(f"{at}self_attn.{c}_proj", z, f"{at}self_attn.{c}_norm") for c in "qk")
        z = F.scaled_dot_product_attention(q, k, heads(f"{at}self_attn.v_proj", z), is_causal=True, enable_gqa=True)
        y = y + F.linear(z.transpose(1, 2).flatten(2), p[f"{at}self_attn.o_proj.weight"])
        z = F.rms_norm(y, (20,), p[f"{at}post_attention_layernorm.weight"], 1e-6)
        gate, up, down = (p[f"{at}mlp.{key}_proj.weight"] for key in ("gate", "up", "down"))
        y = y + (F.silu(z @ gate.T) * (z @ up.T)) @ down.T
    y = F.rms_norm(y, (20,), p["model.norm.weight"], 1e-6) @ p["lm_head.weight"].T
    close(llama.forward(params, x, heads=4, groups=2, theta=500.0), y)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_llama_is_that_of_transformers(torch, kind):
    transformers, rng = pytest.importorskip("transformers"), np.random.default_rng(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=11, tie_word_embeddings=False, attn_implementation="eager", rms_norm_eps=1e-6,
    )  # fmt: skip
    net = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    params = llama.init(rng, 4, 2, bias=kind == "Qwen2", head_norms=kind == "Qwen3")
    assert net.state_dict().keys() == params.keys()
    net.load_state_dict(tensors(torch, params))
    x = tokens(rng)
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).logits
    np.testing.assert_allclose(llama.forward(params, x, heads=4, groups=2), expected.numpy(), rtol=1e-5, atol=1e-5)


MIXTURES = {
    "Mixtral": ({"num_local_experts": 4}, {}),
    "Qwen2Moe": ({"num_experts": 4, "shared_expert_intermediate_size": 7}, {"style": "qwen", "shared": 7, "bias": True}),
    "Qwen3Moe": ({"num_experts": 4, "norm_topk_prob": True}, {"style": "qwen", "head_norms": True}),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_are_those_of_transformers(torch, kind, tmp_path):
    transformers, rng = pytest.importorskip("transformers"), np.random.default_rng(0)
    given, drawn = MIXTURES[kind]
    width = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 11}
    size = {"intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{kind}Config")(**given, **width, **size, attn_implementation="eager")
    params = moe.init(rng, 4, 2, **drawn)
    config.architectures = [f"{kind}ForCausalLM"]
    save({n: x.astype(np.float32) for n, x in params.items()}, tmp_path / "model", extra_files={
        "config.json": config.to_json_string().encode()
    })  # fmt: skip
    net = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(tmp_path / "model").eval()
    x = tokens(rng)
    with torch.no_grad():
        expected = net(torch.from_numpy(x), output_router_logits=True)
    taps, params = {}, {n: x.astype(np.float32).astype(np.float64) for n, x in params.items()}
    got = moe.forward(params, x, taps, **moe.options(config.to_dict()))
    np.testing.assert_allclose(got, expected.logits.numpy(), rtol=1e-5, atol=1e-5)
    block = "block_sparse_moe" if kind == "Mixtral" else "mlp"
    for i, logits in enumerate(expected.router_logits):
        np.testing.assert_allclose(taps[f"model.layers.{i}.{block}.gate.weight"], logits.numpy(), rtol=1e-5, atol=1e-5)


def test_a_switch_block_is_that_of_transformers(torch):
    transformers, rng = pytest.importorskip("transformers"), np.random.default_rng(0)
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    block = SwitchTransformersSparseMLP(transformers.SwitchTransformersConfig(d_model=6, d_ff=9, num_experts=4)).eval()
    params = {f"l.mlp.{n}": rng.normal(size=p.shape).astype(np.float32) for n, p in block.state_dict().items()}
    block.load_state_dict({n.removeprefix("l.mlp."): torch.from_numpy(x) for n, x in params.items()})
    x = rng.normal(size=(2, 20, 6)).astype(np.float32)
    with torch.no_grad():
        expected = block(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(moe.mixture(Layers(params), "l", x, chosen=1), expected, rtol=1e-4, atol=1e-5)


def test_a_mixture_by_hand():
    """Probabilities 1/2, 1/3, 1/6; experts that multiply by 1, 2, 3 what is above 0."""
    params = {"l.mlp.router.classifier.weight": np.log([[3.0], [2.0], [1.0]])}
    for e in range(3):
        params |= {f"l.mlp.experts.expert_{e}.wi.weight": np.eye(1), f"l.mlp.experts.expert_{e}.wo.weight": [[e + 1.0]]}
    params, x = {n: np.asarray(v) for n, v in params.items()}, np.array([[1.0]])

    def given(**how):
        return float(moe.mixture(Layers(params), "l", x, **how)[0, 0])

    assert given(chosen=1) == pytest.approx(1 / 2)
    assert given(chosen=2) == pytest.approx(1 / 2 + 2 / 3)
    assert given(chosen=2, normalize=True) == pytest.approx((3 * 1 + 2 * 2) / 5)
    params["l.mlp.router.classifier.experts"] = np.array([2, 2, 0])
    assert given(chosen=3) == pytest.approx(3 * 5 / 6 + 1 / 6)
    with pytest.raises(UsageError, match="chosen = 4 of the 3 experts"):
        given(chosen=4)
    with pytest.raises(UsageError, match="layer 'k' has no router"):
        moe.mixture(Layers(params), "k", x)


def test_gpt2_is_that_of_transformers(torch):
    transformers, rng = pytest.importorskip("transformers"), np.random.default_rng(0)
    config = transformers.GPT2Config(n_embd=12, n_layer=2, n_head=3, vocab_size=11, n_positions=8)
    net = transformers.GPT2LMHeadModel(config).double().eval()
    params, x = gpt2.init(rng, 12), tokens(rng)
    net.load_state_dict(tensors(torch, params), strict=False)
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).logits
    np.testing.assert_allclose(gpt2.forward(params, x, heads=3), expected.numpy(), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------- by hand


def test_activations_by_hand():
    x = np.array([-2.0, 0.0, 1.0])
    assert relu(x).tolist() == [0, 0, 1]
    np.testing.assert_allclose(silu(x), [-0.2384058440442351, 0, 0.7310585786300049])
    np.testing.assert_allclose(gelu(x), [-0.04550026389635842, 0, 0.8413447460685429])
    np.testing.assert_allclose(gelu_tanh(x), [-0.0454023059, 0, 0.8411919906], atol=1e-10)


def test_a_convolution_by_hand():
    """Two pixels of padding are zeros: the corner of the second channel's kernel sees one pixel."""
    params = {"features.0.weight": np.zeros((2, 1, 3, 3)), "classifier.0.weight": np.eye(2)}
    params["features.0.weight"][0, 0, 1, 1] = 2
    params["features.0.weight"][1, 0] = 1
    x = np.array([[[[1.0, 2], [3, 4]]]])
    taps = {}
    assert vgg.forward(params, x, taps).tolist() == [[8, 10]]
    assert taps["features.0.weight"].tolist() == [[2, 10], [4, 10], [6, 10], [8, 10]]
    assert taps["features.0"].tolist() == [[8, 10]]


def test_pooling_by_hand():
    x = np.arange(16.0).reshape(1, 1, 4, 4) - 20
    assert max_pool(x, 2, 2)[0, 0].tolist() == [[-15, -13], [-7, -5]]
    assert max_pool(x, 3, 2, 1)[0, 0].tolist() == [[-15, -13], [-7, -5]]


def test_names_with_numbers():
    assert in_order(["b.10", "b.9", "a.11"]) == ["a.11", "b.9", "b.10"]
    assert mlp.order({f"{n}.weight": 0 for n in ("head", "fc10", "fc9")}) == ["fc9", "fc10", "head"]


def test_images_of_another_size():
    params = vgg.init(np.random.default_rng(0), [4, "M"], places=4)
    with pytest.raises(UsageError, match="4 channels of 4 x 4 pixels do not go into 16 inputs"):
        vgg.forward(params, np.zeros((1, 3, 8, 8)))


def test_layers_in_another_order():
    params = mlp.init(np.random.default_rng(0), [4, 4, 4])
    x = np.eye(4)
    turned = {n.replace("0", "x").replace("1", "0").replace("x", "1"): p for n, p in params.items()}
    assert np.array_equal(mlp.forward(turned, x, layers=["layers.1", "layers.0"]), mlp.forward(params, x))
