"""Beside PEFT itself: what it writes is read and applied as it does, and what is written here it loads."""

from __future__ import annotations

import numpy as np
import pytest

from refmerge.adapted import adapted
from refmerge.adapters import read_adapter, write_adapter
from refmerge.checkpoint import save
from refmerge.procedures.adapters.lora_extraction import lora_extraction
from refmerge.procedures.adapters.lora_merge import lora_merge
from refmerge.procedures.adapters.refactor import refactor

torch = pytest.importorskip("torch", reason="PEFT's side is computed by torch")
peft = pytest.importorskip("peft", reason="compares with PEFT")
transformers = pytest.importorskip("transformers", reason="compares with PEFT on a model of transformers")


class Layers(torch.nn.Module):
    """One layer of every kind that LoRA is made for."""

    def __init__(self):
        super().__init__()
        nn, turned = torch.nn, transformers.pytorch_utils.Conv1D
        self.table, self.lin, self.lin2, self.head = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.square, self.conv, self.line = turned(6, 6), nn.Conv2d(3, 5, (2, 3)), nn.Conv1d(3, 5, 2)

    def forward(self, x):
        return x


MODULES = ["table", "lin", "lin2", "conv", "line"]
WAYS = {
    "plain": {"target_modules": MODULES, "lora_alpha": 3},
    "patterns": {"target_modules": MODULES, "rank_pattern": {"lin2": 3, "^conv": 1}, "alpha_pattern": {"lin2": 5}},
    "rslora": {"target_modules": MODULES, "use_rslora": True, "modules_to_save": ["head"]},
    "dora": {"target_modules": MODULES, "use_dora": True, "lora_alpha": 3},
    "turned": {"target_modules": ["square"], "fan_in_fan_out": True, "use_dora": True},
    "biases": {"target_modules": ["lin", "conv"], "lora_bias": True, "lora_alpha": 3},
    "all biases": {"target_modules": ["lin", "conv"], "bias": "all"},
    "lora biases": {"target_modules": ["lin"], "bias": "lora_only"},
}


def trained(model, seed=0, **config):
    """The model with an adapter, all of whose tensors are random."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **config}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.rand_like(parameter)
    return wrapped


def arrays(model):
    return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_applied_as_peft_merges(tmp_path, way):
    torch.manual_seed(1)
    model = Layers()
    save(arrays(model), tmp_path / "base.safetensors")
    wrapped = trained(model, **WAYS[way])
    wrapped.save_pretrained(tmp_path / "lora")
    merged = arrays(wrapped.merge_and_unload())
    read = adapted(tmp_path / "base.safetensors", tmp_path / "lora")
    for name, expected in merged.items():
        np.testing.assert_allclose(read[name], expected, rtol=2e-6, atol=1e-6, err_msg=name)
    # Written here, it is the same to PEFT.
    write_adapter(read_adapter(tmp_path / "lora"), tmp_path / "again")
    fresh = Layers()
    fresh.load_state_dict({n: torch.from_numpy(x) for n, x in read._of.items()})
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").merge_and_unload()
    for name, x in arrays(again).items():
        np.testing.assert_allclose(x, merged[name], rtol=2e-6, atol=1e-6, err_msg=name)


def tiny():
    """A language model with random weights."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False)).eval()


def answers(model, adapter):
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(model, adapter).eval()
        return wrapped(torch.arange(12).reshape(2, 6)).logits.numpy()


@pytest.mark.filterwarnings("ignore")
def test_a_language_model(tmp_path):
    """Merged, re-factored and extracted adapters are loaded by PEFT, and its answers are those of the applied checkpoint."""
    names = ["q_proj", "v_proj", "down_proj", "lm_head"]
    for i, name in enumerate(("a", "b")):
        trained(tiny(), seed=i, target_modules=names, lora_alpha=2 + i).save_pretrained(tmp_path / name)
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    merged = lora_merge([tmp_path / "a", tmp_path / "b"], weights=[0.5, -1.0], combination_type="cat")
    write_adapter(merged, tmp_path / "merged")
    exact = adapted(tmp_path / "base", tmp_path / "a", tmp_path / "b", weights=[0.5, -1.0])
    tuned = tiny()
    tuned.load_state_dict({n: torch.from_numpy(exact[n]) for n in exact})
    with torch.no_grad():
        expected = tuned(torch.arange(12).reshape(2, 6)).logits.numpy()
    np.testing.assert_allclose(answers(tiny(), tmp_path / "merged"), expected, rtol=1e-4, atol=1e-5)
    write_adapter(refactor(merged, rank=4)[0], tmp_path / "same")  # two adapters of rank 2 have rank 4 together
    np.testing.assert_allclose(answers(tiny(), tmp_path / "same"), expected, rtol=1e-4, atol=1e-5)
    extracted, fits = lora_extraction(exact, tmp_path / "base", rank=4)
    assert max(fit.relative for fit in fits.values()) < 1e-5
    write_adapter(extracted, tmp_path / "extracted")
    np.testing.assert_allclose(answers(tiny(), tmp_path / "extracted"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_merged_as_peft_does(tmp_path, kind):
    for i, name in enumerate(("a", "b")):
        trained(Layers(), seed=i, target_modules=["lin", "lin2", "table"], lora_alpha=2 + i).save_pretrained(tmp_path / name)
    model = Layers()
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
    wrapped.load_adapter(tmp_path / "b", adapter_name="b")
    options = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
    wrapped.add_weighted_adapter(["a", "b"], [0.7, -0.4], "m", combination_type=kind, **options)
    ours = lora_merge([tmp_path / "a", tmp_path / "b"], weights=[0.7, -0.4], combination_type=kind, **options)
    for module in ours.modules:
        theirs = wrapped.base_model.model.get_submodule(module).get_delta_weight("m").numpy(force=True)
        np.testing.assert_allclose(ours.delta(module), theirs, atol=2e-6, err_msg=module)
