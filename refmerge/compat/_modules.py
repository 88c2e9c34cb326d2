"""Modules made of a model's tensors, for adapters of code that merges modules; runs in the tool's own Python."""

import tempfile
from fnmatch import fnmatchcase
from types import SimpleNamespace

import torch

EMBEDDINGS = ("*emb*", "*wte*", "*wpe*", "*shared*", "*relative_attention_bias*")


def module(model, embeddings=EMBEDDINGS):
    """A tree of modules that has these tensors in its state, under these names. One whose weight is a matrix is an embedding
    where the weight's name matches a glob, and else a linear layer."""
    root = torch.nn.Module()
    for name, x in model.items():
        *path, last = name.split(".")
        at = root
        for i, part in enumerate(path):
            if part not in at._modules:
                at.add_module(part, _made(".".join([*path[: i + 1], "weight"]), model, embeddings))
            at = at._modules[part]
        if x.is_floating_point():
            at.register_parameter(last, torch.nn.Parameter(x.clone(), requires_grad=False))
        else:
            at.register_buffer(last, x.clone())
    return root


def _made(weight, model, embeddings):
    if weight not in model or model[weight].ndim != 2:
        return torch.nn.Module()
    if any(fnmatchcase(weight, glob) for glob in embeddings):
        return torch.nn.Embedding(1, 1)
    return torch.nn.Linear(1, 1, bias=False)


def restored(compress_diff, save_diff, load_diff, model, base):
    """BitDelta: what is read back of the file to which the difference of a model was compressed."""
    based, compressed = module(base), module(model)
    compress_diff(based, module(model), compressed)
    for parameter in compressed.parameters():
        parameter.requires_grad_(True)  # what has none is not written
    based.device, based.config = torch.device("cpu"), SimpleNamespace()
    if "lm_head" not in based._modules:
        based.lm_head = SimpleNamespace(weight=torch.zeros(1))  # whose size becomes the configuration's vocabulary
    with tempfile.TemporaryDirectory() as folder:
        save_diff(compressed, f"{folder}/diff.pt")
        load_diff(based, f"{folder}/diff.pt")
    return dict(based.state_dict())
