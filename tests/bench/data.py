"""What the benchmark merges: checkpoints of a real model's shape, and a recipe for each method.

A checkpoint has Qwen2's tensor names and config.json, so that mergekit reads it too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from refmerge import registry
from refmerge.checkpoint import CheckpointWriter

Shapes = dict[str, tuple[int, ...]]

MODELS = 3
PER_MODEL = {
    "linear": "{weight: 0.3}",
    "task_arithmetic": "{weight: 0.3}",
    "model_stock": "{}",
    "ties": "{weight: 0.3, density: 0.5}",
    "breadcrumbs": "{weight: 0.3, density: 0.9, gamma: 0.01}",
    "dare_linear": "{weight: 0.3, density: 0.5}",
    "dare_ties": "{weight: 0.3, density: 0.5}",
    "della": "{weight: 0.3, density: 0.5, epsilon: 0.1}",
}
HEAD = 64  # columns of an attention head
EMBEDDING = "model.embed_tokens.weight"
CHUNK = 1 << 22


def qwen2(width: int, inner: int, key_value: int, layers: int, vocabulary: int) -> Shapes:
    """The tensors of a Qwen2 whose output layer is its embedding."""
    layer = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (key_value, width),
        "self_attn.k_proj.bias": (key_value,),
        "self_attn.v_proj.weight": (key_value, width),
        "self_attn.v_proj.bias": (key_value,),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    tensors: Shapes = {EMBEDDING: (vocabulary, width)}
    for n in range(layers):
        tensors |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {**tensors, "model.norm.weight": (width,)}


def elements(tensors: Shapes) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def shapes(millions: float) -> Shapes:
    """About so many parameters in Qwen2-0.5B's widths, a quarter of them in the embedding as far as whole layers allow;
    494 is that model itself. The least there is has one layer."""
    widths = {"width": 896, "inner": 4864, "key_value": 128}
    rest, layer = (elements(qwen2(**widths, layers=n, vocabulary=0)) for n in (0, 1))
    layer -= rest
    layers = max(1, round(millions * 1e6 * 0.73 / layer))
    left = millions * 1e6 - layers * layer - rest
    return qwen2(**widths, layers=layers, vocabulary=max(1, round(left / widths["width"])))


def config(tensors: Shapes) -> dict[str, object]:
    vocabulary, width = tensors[EMBEDDING]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": tensors["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in tensors),
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": tensors["model.layers.0.self_attn.k_proj.weight"][0] // HEAD,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    }


def write(folder: Path, tensors: Shapes) -> None:
    """A base and its fine-tunes in bfloat16, each where there is none yet. A task vector has a tenth of the base's
    deviation, which survives the rounding."""
    files = {"config.json": json.dumps(config(tensors), indent=2).encode()} if EMBEDDING in tensors else None
    for k in range(MODELS + 1):
        target = folder / (f"ft{k}" if k else "base")
        if target.exists():
            continue
        specs = {name: ("BF16", shape) for name, shape in tensors.items()}
        with CheckpointWriter(target, specs, extra_files=files) as writer:
            for i, (name, shape) in enumerate(tensors.items()):
                base, tune = np.random.default_rng([0, i]), np.random.default_rng([k, i])
                for start in range(0, math.prod(shape), CHUNK):
                    count = min(CHUNK, math.prod(shape) - start)
                    x = base.standard_normal(count, dtype=np.float32) * np.float32(0.02)
                    if k:
                        x += tune.standard_normal(count, dtype=np.float32) * np.float32(0.002)
                    writer.write(name, start, x.astype(ml_dtypes.bfloat16).view(np.uint8))


def make(folder: Path, millions: float) -> None:
    """Checkpoints of about so many parameters; what is there already stays as it is."""
    write(folder, shapes(millions))


def known_to_mergekit(method: str) -> bool:
    return method == "slerp" or method in PER_MODEL


def recipe(method: str, root: Path) -> str:
    """A recipe that mergekit reads as well where it has the method; else a native one with the method's defaults."""
    end = ["dtype: bfloat16", ""]
    if method == "slerp":
        both = [f"  - model: {root}/ft{k}" for k in (1, 2)]
        return "\n".join([f"merge_method: slerp\nbase_model: {root}/ft1\nmodels:", *both, "parameters: {t: 0.4}", *end])
    if method in PER_MODEL:
        head, needs_base, count = [], method != "linear", MODELS
    else:
        m = registry.get(method)
        head, needs_base, count = ["refmerge: 1"], m.needs_base, min(MODELS, m.models[1] or MODELS)
    lines = [*head, f"merge_method: {method}", *([f"base_model: {root}/base"] if needs_base else []), "models:"]
    lines += [f"  - {{model: {root}/ft{k}, parameters: {PER_MODEL.get(method, '{}')}}}" for k in range(1, count + 1)]
    return "\n".join([*lines, *end])
