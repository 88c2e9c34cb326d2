"""Modules of torch and transformers as networks: their outputs, inputs of linear layers and gradients are those of
refmerge.nets and of torch itself; what is no function of its parameters is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import refmerge
from refmerge import InputError, UsageError, registry
from refmerge.adaptive import contracted, entropy
from refmerge.cli import main
from refmerge.collect import Batch, collect
from refmerge.nets import gpt2, mlp
from refmerge.nets.layers import Reads
from refmerge.nets.torch import Forward, parameters, pretrained
from refmerge.stats import Statistics

adamerging = registry.procedure("adamerging")
EVERYTHING = ["outputs", "kfac", "fisher"]


@pytest.fixture
def transformers(torch):
    found = pytest.importorskip("transformers", reason="transformers is not installed")
    found.logging.set_verbosity_error()
    return found


def seeded(torch, make):
    """A module in float64 with weights that are the same in every run, biases among them, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double().train()
        with torch.no_grad():
            for x in module.parameters():
                x.add_(0.1 * torch.randn_like(x))
    return module


def small_bert(torch, transformers, **more):
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=10,
        max_position_embeddings=9, num_labels=3, **more,
    )  # fmt: skip
    return seeded(torch, lambda: transformers.BertForSequenceClassification(config))


def small_gpt2(torch, transformers):
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    return seeded(torch, lambda: transformers.GPT2LMHeadModel(config))


def agree(found, expected, atol=1e-12):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=atol, err_msg=name)
        assert found.count(name) == expected.count(name), name


# --- Against the networks here ------------------------------------------------------------------------------------------


def test_a_perceptron_has_the_statistics_of_ours(torch):
    """Also where an activation works in place, on what a layer has just given."""
    rng = np.random.default_rng(0)
    params, x, y = mlp.init(rng, [4, 6, 5, 3]), rng.standard_normal((7, 4)), rng.integers(0, 3, 7)
    module = torch.nn.Sequential()
    for i in range(3):
        module.add_module(f"layers.{i}".replace(".", "_"), torch.nn.Linear(*params[f"layers.{i}.weight"].shape[::-1]))
        if i < 2:
            module.add_module(f"relu{i}", torch.nn.ReLU(inplace=True))
    own = {name.replace("layers.", "layers_"): v for name, v in params.items()}
    forward = Forward(module.double())
    assert np.allclose(forward(own, x), mlp.forward(params, x), rtol=1e-13)
    for likelihood in ("exact", "sampled", "given"):
        ours = collect(mlp.forward, params, [Batch(x, y)], EVERYTHING, likelihood=likelihood)
        theirs = collect(forward, own, [Batch(x[:3], y[:3]), Batch(x[3:], y[3:])], EVERYTHING, likelihood=likelihood)
        assert len(ours) == 3 * 9
        for name in ours:
            np.testing.assert_allclose(theirs[name.replace("layers.", "layers_")], ours[name], rtol=1e-12, atol=1e-15)


def test_gpt2_is_ours(torch, transformers):
    """Weights of shape (in, out); the head is the embedding, of whose inputs there are no statistics; taps alike."""
    module = small_gpt2(torch, transformers)
    forward, params = Forward(module), parameters(module)
    tokens = np.random.default_rng(0).integers(0, 11, (3, 6))
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
    ours = {name: x.numpy() for name, x in params.items() if name != "lm_head.weight"}
    mine, theirs = Reads(), Reads()
    expected = gpt2.forward(ours, tokens, mine, heads=3)
    assert np.abs(forward(params, tokens, theirs).numpy() - expected).max() < 1e-12
    assert np.abs(forward(ours, tokens) - expected).max() < 1e-12
    assert theirs.reads.keys() == mine.reads.keys() and len(theirs.reads) == 8
    for name, x in theirs.reads.items():
        assert np.abs(x.numpy() - mine.reads[name]).max() < 1e-12 and np.abs(theirs[name].numpy() - mine[name]).max() < 1e-12
    with pytest.warns(UserWarning, match="inputs of 'lm_head': its weight is 'transformer.wte.weight' as well"):
        found = collect(forward, params, [Batch(tokens, mask=mask)], EVERYTHING, likelihood="next")
    known = collect(
        lambda p, x, t=None: gpt2.forward(p, x, t, heads=3), ours, [Batch(tokens, mask=mask)], EVERYTHING, likelihood="next"
    )
    assert np.array_equal(found["lm_head.weight.fisher"], found["transformer.wte.weight.fisher"])
    for name in known:
        np.testing.assert_allclose(found[name], known[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert set(found) == {*known, "lm_head.weight.fisher"}


def test_a_bert_has_the_fisher_of_torch(torch, transformers):
    """Every parameter, embeddings and norms among them, from a backward pass for each sample and class."""
    module = small_bert(torch, transformers)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 13, (3, 5)), np.array([[1] * 5, [1] * 3 + [0] * 2, [1] * 2 + [0] * 3])
    batch = Batch({"input_ids": ids, "attention_mask": mask}, mask=mask)
    found = collect(Forward(module), parameters(module), [batch], ["fisher", "kfac"])
    assert module.training and all(x.grad is None for x in module.parameters())
    module.eval()
    expected = {name: 0.0 for name, _ in module.named_parameters()}
    for i in range(3):
        logits = module(input_ids=torch.tensor(ids[i : i + 1]), attention_mask=torch.tensor(mask[i : i + 1])).logits
        for log in torch.log_softmax(logits, -1)[0]:
            slopes = torch.autograd.grad(log, list(module.parameters()), retain_graph=True, allow_unused=True)
            for (name, _), g in zip(module.named_parameters(), slopes):
                expected[name] += 0.0 if g is None else log.exp().item() * g.numpy() ** 2 / 3
    for name, f in expected.items():
        np.testing.assert_allclose(found[f"{name}.fisher"], f, rtol=1e-9, atol=1e-16, err_msg=name)
    assert found.count("bert.encoder.layer.0.output.dense.gradient_gram") == mask.sum()
    assert found.count("classifier.gram") == 3


def test_convolutions_read_patches(torch):
    """Strides, dilation and padding: weights times what is read are what is given."""
    x = np.random.default_rng(0).standard_normal((2, 3, 7, 6))
    for options in (
        {"padding": 1},
        {"stride": (2, 1), "dilation": 2, "padding": (2, 1)},
        {"padding": "same", "dilation": 2},
        {"bias": False},
    ):
        module = seeded(torch, lambda options=options: torch.nn.Sequential(torch.nn.Conv2d(3, 4, (3, 2), **options)))
        params, taps = parameters(module), Reads()
        Forward(module)(params, x, taps)
        given = taps.reads["0.weight"] @ params["0.weight"].reshape(4, -1).T + params.get("0.bias", 0)
        assert (given - taps["0.weight"]).abs().max() < 1e-12


# --- Weights that are shared, layers that run twice ------------------------------------------------------------------------


def test_tied_linear_layers_are_one(torch):
    """Their rows are pooled under the name that the checkpoint has, and their gradients added before the square."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    module = seeded(torch, Tied)
    forward, params, x = Forward(module), parameters(module), np.random.default_rng(0).standard_normal((4, 3))
    assert forward.shared == {"a.weight", "b.weight"}
    w = params["a.weight"].numpy()
    found = collect(forward, params, [Batch(x)], ["fisher", "gram"])
    np.testing.assert_allclose(found["a.gram"], (x.T @ x + np.tanh(x @ w.T).T @ np.tanh(x @ w.T)) / 8, rtol=1e-12)
    given = torch.tensor(w, requires_grad=True)
    expected = 0
    for row in torch.from_numpy(x):
        for log in torch.log_softmax(torch.tanh(row @ given.T) @ given.T, -1):
            expected = expected + log.exp().item() * torch.autograd.grad(log, given, retain_graph=True)[0].numpy() ** 2 / 4
    np.testing.assert_allclose(found["a.weight.fisher"], expected, rtol=1e-10)
    assert np.array_equal(found["b.weight.fisher"], found["a.weight.fisher"]) and "b.gram" not in found
    only = {"b.weight": params["b.weight"]}
    assert set(collect(forward, only, [Batch(x)])) == {"b.gram"}
    with pytest.raises(InputError, match=r"Tied ties 'a.weight' and 'b.weight', and they differ"):
        forward({"a.weight": w, "b.weight": w + 1}, x)


def test_a_module_that_runs_twice(torch):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.a(input=self.a(x))

    module, x = seeded(torch, Twice), np.random.default_rng(0).standard_normal((5, 2))
    params, s = parameters(module), Statistics()
    taps = s.taps()
    Forward(module)(params, x, taps)
    w, b = params["a.weight"].numpy(), params["a.bias"].numpy()
    y = x @ w.T + b
    assert s.count("a.gram") == 10
    np.testing.assert_allclose(s["a.gram"], (x.T @ x + y.T @ y) / 10, rtol=1e-12)
    np.testing.assert_allclose(taps["a.weight"], np.concatenate([y, y @ w.T + b]), rtol=1e-12)


def test_a_layer_that_hides_its_inputs_is_named(torch):
    """The output projection of torch's attention is not run as a module."""

    class Attends(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = torch.nn.MultiheadAttention(4, 2, batch_first=True), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0][:, 0])

    module, x = seeded(torch, Attends), np.random.default_rng(0).standard_normal((3, 5, 4))
    with pytest.warns(UserWarning, match="inputs of 'attention.out_proj': no sample went through it"):
        found = collect(Forward(module), parameters(module), [Batch(x)], ["gram", "fisher"])
    assert {"head.gram", "attention.out_proj.weight.fisher", "attention.in_proj_weight.fisher"} <= set(found)


# --- Modes, draws, and what does not fit ----------------------------------------------------------------------------------


def test_dropout_is_off_and_the_module_as_it_was(torch):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2)).double()
    module[1].eval()
    before, params, x = torch.get_rng_state(), parameters(module), np.ones((2, 3))
    forward = Forward(module)
    assert np.array_equal(forward(params, x), forward(params, x))
    assert module.training and not module[1].training and module[2].training
    assert torch.equal(torch.get_rng_state(), before) and not any(m._forward_hooks for m in module.modules())


def test_gradients_go_to_the_parameters(torch):
    module = torch.nn.Linear(3, 2)
    params = {name: x.clone().requires_grad_(True) for name, x in parameters(module).items()}
    Forward(module)(params, np.ones((4, 3))).sum().backward()
    assert params["weight"].grad.tolist() == [[4.0] * 3] * 2 and module.weight.grad is None


def test_what_is_no_function_is_refused(torch):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)

        def forward(self, x):
            return torch.nn.functional.dropout(self.a(x))

    with pytest.raises(UsageError, match="Noisy draws random numbers at inference"):
        Forward(Noisy())(parameters(Noisy()), np.ones((1, 2)))
    with pytest.raises(UsageError, match="'1' is a batch norm without running statistics"):
        Forward(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, track_running_stats=False)))
    with pytest.raises(UsageError, match=r"a torch\.nn\.Module is wanted, not function"):
        Forward(lambda x: x)


@pytest.mark.parametrize(
    ("change", "x", "says"),
    [
        ({"bias": None}, np.ones((1, 3)), "Linear has a tensor 'bias', which is not given"),
        ({"bias": np.ones(3)}, np.ones((1, 3)), r"tensor 'bias' of Linear has shape \[3\], not \[2\]"),
        ({"scale": np.ones(3)}, np.ones((1, 3)), "Linear has no tensor 'scale'"),
        ({}, np.ones((1, 4)), "Linear cannot run this batch: mat1 and mat2"),
        ({}, {"inputs": np.ones((1, 3))}, "Linear cannot run this batch: .*unexpected keyword argument 'inputs'"),
    ],
)
def test_what_does_not_fit_is_named(change, x, says, torch):
    params = {k: v for k, v in ({"weight": np.ones((2, 3)), "bias": np.ones(2)} | change).items() if v is not None}
    with pytest.raises(InputError, match=says) as caught:
        Forward(torch.nn.Linear(3, 2))(params, x)
    assert "\n" not in str(caught.value)


def test_torch_is_imported_by_who_needs_it():
    code = "import sys, refmerge.nets.torch, refmerge.collect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- Folders of transformers ----------------------------------------------------------------------------------------------


def cli(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def test_folders_merge_by_fisher_and_regmean(torch, transformers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "ab":
        module = small_bert(torch, transformers).float()
        with torch.no_grad():
            for x in module.parameters():
                x.add_(0.1 * torch.from_numpy(rng.standard_normal(tuple(x.shape))).float())
        module.save_pretrained(name)
        ids = rng.integers(0, 13, (6, 5))
        save_file(
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": rng.integers(0, 3, 6)},
            f"{name}.data.safetensors",
        )
        done = cli(
            "collect", name, f"{name}.stats.safetensors", "--data", f"{name}.data.safetensors", "--kinds", "gram,fisher",
            "--likelihood", "given",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    for method in ("fisher", "regmean"):
        entries = "".join(f"  - {{model: ./{n}, stats: ./{n}.stats.safetensors}}\n" for n in "ab")
        (tmp_path / "r.yml").write_text(f"refmerge: 1\nmerge_method: {method}\nmodels:\n{entries}")
        done = cli("merge", "r.yml", method)
        assert done.exit_code == 0, done.output
        again = transformers.BertForSequenceClassification.from_pretrained(method)
        merged, mean = refmerge.open_checkpoint(method), refmerge.merge(["a", "b"], "linear")
        name = "bert.encoder.layer.0.output.dense.weight"
        assert np.array_equal(again.state_dict()[name].numpy(), merged[name]) and not np.array_equal(
            merged[name], mean[name]
        )


def test_coefficients_of_a_transformer_become_a_recipe(torch, transformers, tmp_path, monkeypatch):
    """AdaMerging on torch's gradients, and on those by tensor; the recipe merges the folders as the fit merges arrays."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        module = small_bert(torch, transformers).float()
        with torch.no_grad():
            for x in module.parameters():
                x.add_(0.1 * torch.from_numpy(rng.standard_normal(tuple(x.shape))).float())
        module.save_pretrained(name)
    forward = pretrained("base")
    base, *models = (
        {k: torch.from_numpy(v) for k, v in load_file(f"{name}/model.safetensors").items()} for name in ("base", "a", "b")
    )
    steps = [[(k, rng.integers(0, 13, (4, 5))) for k in range(2)] for _ in range(3)]

    def by_tensor(params, task, batch):
        given = {k: x.detach().requires_grad_(True) for k, x in params.items()}
        loss = entropy(forward(given, batch))
        found = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
        return loss.detach(), {k: g for k, g in zip(given, found) if g is not None}

    fits = [
        adamerging(models, base, lambda p, task, x: forward(p, x), steps, lr=0.05, gradient=gradient)
        for gradient in (None, contracted(by_tensor))
    ]
    assert np.abs(fits[0].gradients[0] - fits[1].gradients[0]).max() < 1e-6
    assert np.abs(fits[0].raw - 0.3).max() > 0.1
    fits[0].coefficients.save("fit.yml", ["./a", "./b"], "./base")
    done = cli("merge", "fit.yml", "merged")
    assert done.exit_code == 0, done.output
    merged, expected = refmerge.open_checkpoint("merged"), fits[0].merge(models, base)
    for name, x in fits[0].composition.theta(fits[0].coefficients.values).items():
        assert np.array_equal(merged[name], expected[name].numpy())
        np.testing.assert_allclose(merged[name], x.numpy(), rtol=1e-5, atol=1e-6)
    assert transformers.BertForSequenceClassification.from_pretrained("merged").num_labels == 3


def test_names_without_their_prefix(torch, transformers, tmp_path):
    """A base model's file read by the model with a head, as transformers reads it."""
    module = small_gpt2(torch, transformers)
    module.save_pretrained(tmp_path / "whole")
    params = load_file(tmp_path / "whole" / "model.safetensors")
    tokens = np.random.default_rng(0).integers(0, 11, (2, 4))
    forward = pretrained(tmp_path / "whole")
    expected = forward(params, tokens)
    short = {name.removeprefix("transformer."): x for name, x in params.items()}
    assert np.array_equal(forward(short, tokens), expected)
    s = Statistics()
    forward(short | {"h.0.attn.bias": np.ones(1)}, tokens, s.taps())
    assert "h.0.attn.c_attn.gram" in s and "transformer.h.0.attn.c_attn.gram" not in s


def test_names_under_which_tensors_are_stored(torch, transformers, tmp_path):
    """Statistics have the checkpoint's names, whatever the module calls its parts."""
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=10,
        image_size=4,
        patch_size=2,
        num_labels=3,
    )
    seeded(torch, lambda: transformers.ViTForImageClassification(config)).save_pretrained(tmp_path)
    params = load_file(tmp_path / "model.safetensors")
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    s = collect(pretrained(tmp_path), params, [Batch({"pixel_values": images})], ["fisher", "gram"])
    assert {f"{name}.fisher" for name in params} == {name for name in s if name.endswith(".fisher")}
    assert {name.removesuffix(".gram") for name in s if name.endswith(".gram")} == {
        name.removesuffix(".weight") for name, x in params.items() if x.ndim in (2, 4)
    }


def test_batch_norm_has_running_statistics_and_no_gradients_of_them(torch):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 2), torch.nn.BatchNorm2d(2), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    module, x = seeded(torch, lambda: net), np.random.default_rng(0).standard_normal((3, 3, 3, 3))
    s = collect(Forward(module), parameters(module), [Batch(x)], ["fisher"])
    assert set(s) == {f"{name}.fisher" for name, _ in module.named_parameters()}


def test_folders_that_are_none(torch, transformers, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json of transformers"):
        pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Dreams"]}')
    with pytest.raises(UsageError, match=r"names no architecture that transformers has \(GPT2Dreams\)"):
        pretrained(tmp_path)
