"""The models that mergekit made the results in tests/data/mergekit of: tiny Llamas whose every value is a fraction of 2^16,
computed from its place, and tokenizers of a few letters."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from refmerge.checkpoint import save

HIDDEN, INNER = 8, 12
TOKENS = {
    "base": ["<s>", "</s>", "<unk>", *"abcdefgh"],
    "a": ["<s>", "</s>", "<unk>", *"abcdefgh"],
    "b": ["<s>", "</s>", "<unk>", *"abcdefgh"],
    "code": ["<unk>", "<s>", "</s>", *"hgfe", "{", "}", "ab", "<|im|>"],
}
ROWS = {"base": 14, "a": 14, "b": 14, "code": 11}  # three rows of the first ones have no token
LAYERS = 4


def values(model: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """a and b lie near the base; code is by itself."""

    def hashed(text: str) -> np.ndarray:
        i = np.arange(int(np.prod(shape)), dtype=np.uint64)
        x = (i + np.uint64(zlib.crc32(text.encode()))) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(29)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        return ((x >> np.uint64(48)).astype(np.float32) - 32768).reshape(shape)

    if model in ("a", "b"):
        return (hashed(f"base:{name}") + np.floor(hashed(f"{model}:{name}") / 16)) / np.float32(65536)
    return hashed(f"{model}:{name}") / np.float32(65536)


def write(folder: Path) -> None:
    """Write all models into a folder."""
    for model in TOKENS:
        rows = ROWS[model]
        shapes = {
            "model.embed_tokens.weight": (rows, HIDDEN),
            "lm_head.weight": (rows, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
        for i in range(LAYERS):
            at = f"model.layers.{i}."
            shapes |= {at + f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
            shapes |= {at + f"mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
            shapes |= {at + "mlp.down_proj.weight": (HIDDEN, INNER)}
            shapes |= {at + f"{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": rows,
            "max_position_embeddings": 32, "tie_word_embeddings": False, "dtype": "float32",
        }  # fmt: skip
        tokens = TOKENS[model]
        special = [t for t in tokens if t.startswith("<")]
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "added_tokens": [
                {"id": tokens.index(t), "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True} for t in special
            ],
            "model": {
                "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [],
            },
        }  # fmt: skip
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        files = {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": settings}
        save(
            {name: values(model, name, shape) for name, shape in shapes.items()},
            folder / model,
            extra_files={name: json.dumps(content).encode() for name, content in files.items()},
        )
