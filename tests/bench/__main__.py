"""Times merges of checkpoints of a real model's shape, as ratios to a plain copy of the same bytes in the same run.

    python -m tests.bench [--millions 494] [--methods linear,ties] [--runs 3] [--threads 2] [--keep FOLDER]

A base and three fine-tunes in bfloat16 are written to a temporary folder (or FOLDER, and used again from there). For each
method: the median of the runs' wall seconds, of a process of its own, against reading three inputs and writing one output
in 8 MiB pieces; bytes moved a second; passes over the weights; and the peak of anonymous memory. Quote the ratios: seconds
belong to one machine at one minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from refmerge.checkpoint import CheckpointWriter

PER_MODEL = {
    "linear": "{weight: 0.3}",
    "task_arithmetic": "{weight: 0.3}",
    "ties": "{weight: 0.3, density: 0.5}",
    "dare_linear": "{weight: 0.3, density: 0.5}",
    "dare_ties": "{weight: 0.3, density: 0.5}",
    "della": "{weight: 0.3, density: 0.5, epsilon: 0.1}",
    "breadcrumbs": "{weight: 0.3, density: 0.9, gamma: 0.01}",
    "model_stock": "{}",
}
METHODS = ("linear", "slerp", *list(PER_MODEL)[1:])


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """A transformer's tensors: an embedding of about a quarter of the parameters, then layers, matrices and norms."""
    width = 896
    tensors: dict[str, tuple[int, ...]] = {"embed.weight": (int(millions * 1e6 * 0.27 / width), width)}
    layer = {
        "attn.weight": (2 * width, width),
        "up.weight": (9728, width),
        "down.weight": (width, 4864),
        "norm.weight": (width,),
    }
    size = sum(int(np.prod(s)) for s in layer.values())
    for n in range(max(1, int(millions * 1e6 * 0.73 / size))):
        tensors |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    return tensors


def make(folder: Path, millions: float) -> None:
    tensors = shapes(millions)
    for k in range(4):
        target = folder / (f"ft{k}" if k else "base")
        if target.exists():
            continue
        with CheckpointWriter(target, {name: ("BF16", shape) for name, shape in tensors.items()}) as writer:
            for i, (name, shape) in enumerate(tensors.items()):
                base, tune = np.random.default_rng([0, i]), np.random.default_rng([k, i])
                for start in range(0, int(np.prod(shape)), 1 << 22):
                    count = min(1 << 22, int(np.prod(shape)) - start)
                    x = base.standard_normal(count, dtype=np.float32) * np.float32(0.02)
                    if k:
                        x += tune.standard_normal(count, dtype=np.float32) * np.float32(0.002)
                    writer.write(name, start, x.astype(ml_dtypes.bfloat16).view(np.uint8))


def recipe(method: str, root: Path) -> str:
    if method == "slerp":
        return f"merge_method: slerp\nbase_model: {root}/ft1\nmodels: [{{model: {root}/ft2}}]\nparameters: {{t: 0.4}}\n"
    lines = [f"merge_method: {method}", *([] if method == "linear" else [f"base_model: {root}/base"]), "models:"]
    lines += [f"  - {{model: {root}/ft{k}, parameters: {PER_MODEL[method]}}}" for k in (1, 2, 3)]
    return "\n".join([*lines, ""])


def measure(argv: list[str]) -> tuple[float, float, str]:
    """(wall seconds, peak anonymous bytes where the system tells, output) of a process."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):  # it has just ended, or this is no Linux
            lines = status.read_text().splitlines()
            peak = max(peak, next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")))
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(argv)} failed")
    assert process.stdout is not None
    return time.perf_counter() - start, peak * 1024.0, process.stdout.read()


def copy(root: Path) -> float:
    """Seconds to read three checkpoints and write one."""
    start = time.perf_counter()
    with open(root / "copy.bin", "wb") as out:
        for k in (1, 2, 3):
            for file in sorted((root / f"ft{k}").glob("*.safetensors")):
                with open(file, "rb", buffering=0) as source:
                    while piece := source.read(8 << 20):
                        if k == 1:
                            out.write(piece)
    (root / "copy.bin").unlink()
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--millions", type=float, default=494, help="parameters of a model, in millions")
    p.add_argument("--methods", default=",".join(METHODS))
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--threads", type=int)
    p.add_argument("--keep", type=Path)
    a = p.parse_args()
    root = (a.keep or Path(tempfile.mkdtemp(prefix="refmerge-bench-"))).resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        make(root, a.millions)
        copies = [copy(root) for _ in range(a.runs)]
        plain = statistics.median(copies)
        print(f"{'method':16} {'seconds':>8} {'x copy':>7} {'GB/s':>6} {'passes':>6} {'anon MB':>8}")
        print(f"{'plain copy':16} {plain:8.2f} {1:7.2f}")
        for method in a.methods.split(","):
            (root / "recipe.yml").write_text(recipe(method, root))
            rows = []
            for _ in range(a.runs):
                shutil.rmtree(root / "out", ignore_errors=True)
                threads = ["--threads", str(a.threads)] if a.threads else []
                command = [sys.executable, "-m", "refmerge", "merge", str(root / "recipe.yml"), str(root / "out"), "--json"]
                wall, peak, said = measure([*command, *threads])
                rows.append((wall, peak, json.loads(said)))
            wall, peak = (statistics.median(r[i] for r in rows) for i in (0, 1))
            told = rows[0][2]
            rate = (told["bytes_read"] + told["bytes_written"]) / wall / 1e9
            print(
                f"{method:16} {wall:8.2f} {wall / plain:7.2f} {rate:6.2f} {told['passes']:6} {peak / 1e6:8.0f}", flush=True
            )
    finally:
        if a.keep is None:
            shutil.rmtree(root)
        else:
            shutil.rmtree(root / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
