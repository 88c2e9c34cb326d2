"""What transformers makes of merged checkpoints: they load, and the text they write is that of a merge made in PyTorch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from refmerge.checkpoint import open_checkpoint
from refmerge.recipe.run import run_recipe
from refmerge.recipe.templates import TEMPLATES

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = ["<s>", "</s>", "<unk>", *"abcdefghij", "ab", "cd", "abcd", *(f"w{i}" for i in range(16))]


def small(kind, seed, layers=3, dtype=None):
    torch.manual_seed(seed)
    common = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=layers, n_head=4, n_positions=32, **common)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "qwen2":  # tied, and with a list of the layers' kinds in its config
        config = transformers.Qwen2Config(
            num_hidden_layers=layers, max_position_embeddings=32, tie_word_embeddings=True, use_sliding_window=True,
            sliding_window=4, max_window_layers=1, **sizes, **common,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(config)
    else:
        config = transformers.LlamaConfig(num_hidden_layers=layers, max_position_embeddings=32, **sizes, **common)
        model = transformers.LlamaForCausalLM(config)
    return model.to(dtype or torch.float32).eval()


def write(model, path):
    model.save_pretrained(path)


def continued(model):
    """What it writes after three tokens, always taking the likeliest."""
    with torch.no_grad():
        start = torch.tensor([[3, 7, 5]])
        return model.generate(start, max_new_tokens=12, do_sample=False, pad_token_id=1, eos_token_id=None)[0].tolist()


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture
def merge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(recipe, **options):
        (tmp_path / "r.yml").write_text(recipe)
        run_recipe("r.yml", "out", overwrite=True, **options)
        return loaded(tmp_path / "out")

    return run


@pytest.mark.parametrize("shard", ["5GB", "8kB"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_linear_merge_writes_what_pytorchs_does(merge, tmp_path, kind, shard):
    a, b = small(kind, 0), small(kind, 1)
    write(a, "a")
    write(b, "b")
    recipe = (
        "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 0.25}}, {model: ./b, parameters: {weight: 0.75}}]"
    )
    merged = merge(recipe, max_shard_size=shard)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard != "5GB")
    other = b.state_dict()
    with torch.no_grad():
        for name, x in a.state_dict().items():
            if x.data_ptr() != a.get_input_embeddings().weight.data_ptr() or "head" not in name:
                x.mul_(0.25).add_(0.75 * other[name])
    assert continued(merged) == continued(a)
    for name, x in merged.state_dict().items():
        torch.testing.assert_close(x, a.state_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_stack_of_layers_writes_what_pytorchs_does(merge, kind):
    a, b = small(kind, 0), small(kind, 1)
    write(a, "a")
    write(b, "b")
    merged = merge("""\
merge_method: passthrough
slices:
  - sources: [{model: ./a, layer_range: [0, 2]}]
  - sources: [{model: ./b, layer_range: [1, 3]}]
  - sources: [{model: ./a, layer_range: [2, 3]}]
""")
    made_of = [(a, 0), (a, 1), (b, 1), (b, 2), (a, 2)]
    wanted = small(kind, 2, layers=5)
    if kind == "qwen2":
        wanted.config.layer_types = [m.config.layer_types[i] for m, i in made_of]
        assert merged.config.layer_types == wanted.config.layer_types
        wanted = type(wanted)(wanted.config).eval()
    inner = {"gpt2": lambda m: m.transformer.h}.get(kind, lambda m: m.model.layers)
    state = {n: x for n, x in a.state_dict().items() if ".layers." not in n and ".h." not in n}
    wanted.load_state_dict(state, strict=False)
    for layer, (model, i) in zip(inner(wanted), made_of, strict=True):
        layer.load_state_dict(inner(model)[i].state_dict())
    assert len(inner(merged)) == 5
    assert continued(merged) == continued(wanted)


@pytest.mark.parametrize("semantics", ["", "refmerge: 1\n"])
def test_a_model_merged_with_itself_is_itself_to_the_bit(merge, semantics):
    a = small("llama", 0, dtype=torch.bfloat16)
    write(a, "a")
    write(a, "again")
    merge(semantics + "merge_method: linear\nmodels: [{model: ./a}, {model: ./again}]\nparameters: {weight: 0.5}")
    before, after = open_checkpoint("a"), open_checkpoint("out")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(before[n].dtype == after[n].dtype and before[n].tobytes() == after[n].tobytes() for n in before)


def tokenizer(words, special):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_union_of_tokenizers_is_one_for_transformers(merge, tmp_path):
    other = ["<unk>", "zz", "w3", "<s>", "</s>", "newword", *(t for t in VOCABULARY[3:] if t != "w3")]
    for name, words, special in (("a", VOCABULARY, []), ("b", other[:30], ["<|odd|>", "<|end|>"])):
        write(small("llama", 0), name)
        tokenizer(words, special).save_pretrained(name)
    merged = merge("merge_method: passthrough\nmodels: [{model: ./a}]\n")
    merged = merge(
        "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 1}\n"
        "base_model: ./a\ntokenizer_source: union\nchat_template: chatml\n"
    )
    both = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    alone = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "ab cd <s> w3 abcd"
    assert both(text)["input_ids"] == alone(text)["input_ids"]
    ids = both("ab<|odd|>zz newword<|end|>")["input_ids"]
    assert both.convert_ids_to_tokens(ids) == ["ab", "<|odd|>", "zz", "newword", "<|end|>"]
    assert {"<|odd|>", "<|end|>"} <= set(both.get_added_vocab())
    assert merged.get_input_embeddings().weight.shape[0] == len(both) == merged.config.vocab_size
    written = both.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert written == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    rows = merged.get_input_embeddings().weight.detach().numpy()
    b = open_checkpoint("b")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(rows[both.convert_tokens_to_ids("<|end|>")], b[31])


CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": " U "}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("name", "text", "prompt"),
    [
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n U <|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
         "<|im_start|>assistant\n"),
        ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
         "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "<s> [INST] S\n\n U  [/INST] A</s>", ""),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|] U \n[|assistant|]A[|endofturn|]\n", "[|assistant|]"),
        ("alpaca", "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n", "### Response:\n"),
    ],
)  # fmt: skip
def test_chat_templates(name, text, prompt):
    """As the families of models that they are named after have them."""
    chat = tokenizer(VOCABULARY, [])
    chat.chat_template = TEMPLATES[name]
    assert chat.apply_chat_template(CHAT, tokenize=False) == text
    asked = [*CHAT, {"role": "user", "content": "Q"}]
    assert chat.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).endswith(prompt)
    assert json.dumps(TEMPLATES[name])


def test_a_chat_that_a_template_refuses():
    chat = tokenizer(VOCABULARY, [])
    chat.chat_template = TEMPLATES["mistral"]
    with pytest.raises(Exception, match="take turns"):
        chat.apply_chat_template([*CHAT, {"role": "assistant", "content": "again"}], tokenize=False)
