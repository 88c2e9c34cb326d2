"""Times the merging of experts on a mixture of Mixtral's names with about 0.5 billion parameters for each token.

    python -m tests.bench.experts [--layers 24] [--groups 4] [--keep FOLDER]

In each layer there are 8 experts of 2752 hidden units and width 1024 in bfloat16, of which 2 are chosen: 1.7 billion
parameters in 24 layers. They are noisy copies of one expert with their hidden units shuffled, written to a temporary folder,
or to --keep FOLDER and used again from there. The statistics of the routers are drawn. `msmoe` then merges them from disk to
disk in a process of its own, once without alignment and once with it. What is printed:

    copy          seconds that a plain copy of the input takes
    merging       seconds without alignment, and as a ratio to the copy
    aligning      seconds with it; products and assignments are those of matrices of float64 and of SciPy in it
    MB            peak of anonymous memory of the process above what it has before, and as a ratio to the bytes of one expert
    found         which part of the shuffle the alignment has undone
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

from refmerge import open_checkpoint
from refmerge.checkpoint import CheckpointWriter
from refmerge.experts import find
from refmerge.procedures.alignment import git_rebasin
from refmerge.procedures.experts.msmoe import msmoe
from refmerge.stats import Statistics
from tests.bench.__main__ import folders
from tests.bench.alignment import Clock, circumstances
from tests.bench.processes import anonymous, measure

EXPERTS, CHOSEN = 8, 2
SIZES = {"width": 1024, "inner": 2752, "key_value": 256, "vocabulary": 32000}
HEAD = 64
NOISE = 0.5  # of an expert's own, beside what all share


def shapes(layers: int, width: int, inner: int, key_value: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{k}_proj.weight": (n, width) for k, n in zip("qkv", (width, key_value, key_value))}
        found |= {f"{at}.self_attn.o_proj.weight": (width, width), f"{at}.block_sparse_moe.gate.weight": (EXPERTS, width)}
        for e in range(EXPERTS):
            parts = {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}
            found |= {f"{at}.block_sparse_moe.experts.{e}.{w}.weight": shape for w, shape in parts.items()}
        found |= {f"{at}.{k}_layernorm.weight": (width,) for k in ("input", "post_attention")}
    return found | {"model.norm.weight": (width,)}


def active(tensors: dict[str, tuple[int, ...]]) -> int:
    """Parameters that one token uses."""
    own = sum(int(np.prod(s)) for n, s in tensors.items() if ".experts." not in n)
    return own + sum(int(np.prod(s)) for n, s in tensors.items() if ".experts." in n) * CHOSEN // EXPERTS


def config(layers: int, width: int, inner: int, key_value: int, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": width // HEAD,
        "num_key_value_heads": key_value // HEAD, "vocab_size": vocabulary, "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip


def shuffle(layer: str, expert: int, units: int) -> np.ndarray:
    return np.random.default_rng([int(layer.rpartition(".")[2]), expert]).permutation(units)


def write(folder: Path, layers: int, sizes: dict[str, int]) -> None:
    """The model and its routers' statistics, where they are not there yet."""
    if (folder / "model").exists():
        return
    tensors, draw = shapes(layers, **sizes), np.random.default_rng(0)
    files = {"config.json": json.dumps(config(layers, **sizes), indent=2).encode()}

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return draw.standard_normal(shape, dtype=np.float32)

    with CheckpointWriter(folder / "model", {n: ("BF16", s) for n, s in tensors.items()}, extra_files=files) as writer:

        def put(name: str, x: np.ndarray) -> None:
            writer.write(name, 0, (0.02 * x).astype(ml_dtypes.bfloat16).reshape(-1).view(np.uint8))

        for name in (n for n in tensors if ".experts." not in n):
            put(name, normal(tensors[name]))
        for layer in (f"model.layers.{i}" for i in range(layers)):
            at = f"{layer}.block_sparse_moe.experts"
            for w, axis in (("w1", 0), ("w2", 1), ("w3", 0)):
                shared = normal(tensors[f"{at}.0.{w}.weight"])
                for e in range(EXPERTS):
                    x = np.take(shared, shuffle(layer, e, sizes["inner"]), axis=axis)
                    put(f"{at}.{e}.{w}.weight", x + NOISE * normal(x.shape))
    stats = Statistics()
    for i in range(layers):
        logits = draw.standard_normal((500, EXPERTS)) + np.linspace(1, 0, EXPERTS)
        stats.routing(f"model.layers.{i}.block_sparse_moe.gate", logits, CHOSEN)
    stats.save(folder / "stats.safetensors")


def run(folder: Path, out: Path, groups: int, align: str) -> dict[str, Any]:
    """Merge and say what took how long; the procedure's own calls are wrapped, so that all is one run."""
    products, assignments = Clock(), Clock()
    solve, add = git_rebasin.linear_sum_assignment, git_rebasin.add_product
    wrapped = {
        "add_product": lambda C, x, y: products(add, C, x, y),
        "linear_sum_assignment": lambda C: assignments(solve, C),
    }
    before, start = anonymous(os.getpid()), time.perf_counter()

    def progress(layer: str, group: int) -> None:
        print(f"{time.perf_counter() - start:8.1f} s  {layer}  {group}", file=sys.stderr)

    how = {"groups": groups, "grouping": "layer", "write": "reduced", "align": align, "progress": progress}
    with patch.multiple(git_rebasin, **wrapped):
        found = msmoe(folder / "model", folder / "stats.safetensors", out, **how)
    seconds, right = time.perf_counter() - start, []
    for layer, orders in found.orders.items():
        g = found.groups[layer]
        for e, order in orders.items():
            reference = g.dominant[g.labels[e]]
            right.append(np.mean(shuffle(layer, e, len(order))[order] == shuffle(layer, reference, len(order))))
    return {
        "seconds": seconds,
        "products": products.seconds,
        "assignments": assignments.seconds,
        "assigned": assignments.calls,
        "found": float(np.mean(right)) if right else None,
        "before": before,
    }


def report(told: dict[str, dict[str, Any]], peaks: dict[str, int], copied: float, expert: int) -> str:
    plain, aligned = told["none"], told["dominant"]
    lines = [
        f"copy          {copied:9.1f} s",
        f"merging       {plain['seconds']:9.1f} s, ratio {plain['seconds'] / copied:.2f}",
        f"MB            {peaks['none'] / 1e6:9.0f}, ratio {peaks['none'] / expert:.1f} to an expert of {expert / 1e6:.1f}",
        f"aligning      {aligned['seconds']:9.1f} s, of which products {aligned['products']:.1f} s and "
        f"{aligned['assigned']} assignments {aligned['assignments']:.1f} s",
        f"MB            {peaks['dominant'] / 1e6:9.0f}, ratio {peaks['dominant'] / expert:.1f}",
        f"found         {aligned['found']:9.1%}",
    ]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m tests.bench.experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--layers", type=int, default=24)
    p.add_argument("--groups", type=int, default=4, help="experts that stay in each layer")
    p.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the checkpoint there, or use the one that is")
    p.add_argument("--run", nargs=4, metavar=("FOLDER", "OUT", "GROUPS", "ALIGN"), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.run:
        print(json.dumps(run(Path(a.run[0]), Path(a.run[1]), int(a.run[2]), a.run[3])))
        return
    with folders(a.keep) as (root, work):
        write(root, a.layers, SIZES)
        tensors = shapes(a.layers, **SIZES)
        with open_checkpoint(root / "model") as model:
            expert, nbytes = next(iter(find(model).values())).nbytes, model.nbytes
        total, used = sum(int(np.prod(s)) for s in tensors.values()), active(tensors)
        print(
            f"{circumstances()}\n\n{total / 1e9:.2f} billion parameters, {used / 1e9:.2f} for a token, {nbytes / 1e9:.2f} GB"
        )
        start = time.perf_counter()
        shutil.copytree(root / "model", work / "copy")
        copied = time.perf_counter() - start
        shutil.rmtree(work / "copy")
        told, peaks = {}, {}
        for align in ("none", "dominant"):
            command = [
                sys.executable,
                "-m",
                "tests.bench.experts",
                "--run",
                str(root),
                str(work / align),
                str(a.groups),
                align,
            ]
            measured = measure(command)
            told[align] = json.loads(measured.said)
            peaks[align] = measured.peak - told[align]["before"]
            shutil.rmtree(work / align)
        print(report(told, peaks, copied, expert))


if __name__ == "__main__":
    main()
