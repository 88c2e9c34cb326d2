"""Checkpoints of a few tensors in the layout of a language model, for tests of recipes."""

from __future__ import annotations

import json

import numpy as np

from refmerge.checkpoint import save

PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight")


def write(path, layers, number, stack="model.layers.", config=None, **extra):
    """A model whose tensors in layer i are number + i, whose embedding is number + 0.25 and whose head number + 0.75."""
    tensors = {f"{stack}{i}.{part}": np.full((2, 3), number + i, np.float32) for i in range(layers) for part in PARTS}
    tensors["model.embed_tokens.weight"] = np.full((5, 3), number + 0.25, np.float32)
    tensors["model.norm.weight"] = np.full(3, number + 0.5, np.float32)
    tensors["lm_head.weight"] = np.full((5, 3), number + 0.75, np.float32)
    tensors |= {name: np.asarray(x, np.float32) for name, x in extra.items()}
    config = {"num_hidden_layers": layers, "dtype": "float32"} if config is None else config
    save(tensors, path, extra_files={"config.json": json.dumps(config).encode()})
