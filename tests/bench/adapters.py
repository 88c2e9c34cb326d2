"""Times the extraction of an adapter and merges of models with adapters in them, beside mergekit if it is named.

    python -m tests.bench.adapters [--millions 494] [--rank 64] [--mergekit PATH/TO/mergekit-extract-lora] [--keep FOLDER]

Models are those of `python -m tests.bench`, and stay in --keep if that is given. Matrices of layers are extracted
and all else is saved whole, as mergekit does by default. Then a linear merge of the base with that adapter and of another
fine-tune is made from a recipe, and the same of two models without an adapter. Of each process: seconds, of the wall's
clock and of all cores together, and the peak of anonymous memory; of an extraction also its error.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
from pathlib import Path

from tests.bench.data import make
from tests.bench.processes import Measured, measure

PATTERN = "proj$"  # the matrices of Qwen2's and Llama's layers


def timed(argv: list[str]) -> tuple[Measured, float]:
    """A process's measurements, and the seconds of all cores that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = measure(argv)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def error_of(said: str) -> float:
    """The error over the norm of the change, of all modules that `refmerge extract --json` tells of."""
    modules = [m for m in json.loads(said)["modules"].values() if m["relative"]]
    sizes = math.fsum((m["error"] / m["relative"]) ** 2 for m in modules)
    return math.sqrt(math.fsum(m["error"] ** 2 for m in modules) / sizes) if sizes else 0.0


def recipe(folder: Path, models: list[str]) -> Path:
    path = folder / "recipe.yml"
    entries = [f"  - {{model: {m}, parameters: {{weight: 1}}}}" for m in models]
    path.write_text("\n".join(["merge_method: linear", "models:", *entries, ""]))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.adapters")
    parser.add_argument("--millions", type=float, default=494, help="parameters of a model")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--mergekit", help="mergekit-extract-lora")
    parser.add_argument("--keep", type=Path, help="where models are made, and stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(options.keep or folder, options.millions)
        base, tuned, other = ((options.keep or folder) / name for name in ("base", "ft1", "ft2"))
        rank, out = str(options.rank), folder / "adapter"
        ours = [sys.executable, "-m", "refmerge"]
        extract = [*ours, "extract", str(base), str(tuned), "--rank", rank, "--only", PATTERN, "--rest", "save", "--json"]
        runs = {
            "refmerge extract": [*extract, f"{out}-exact"],
            "refmerge extract --randomized": [*extract, "--randomized", f"{out}-random"],
        }
        if options.mergekit:
            pair = ["--model", str(tuned), "--base-model", str(base)]
            runs["mergekit-extract-lora"] = [options.mergekit, *pair, "--out-path", f"{out}-mergekit", "--max-rank", rank]
        plain = recipe(folder, [str(base), str(other)])
        runs["linear of two models"] = [*ours, "merge", str(plain), f"{out}-plain", "--quiet"]
        print(f"{'':32} {'seconds':>9} {'of cores':>9} {'MB':>7}")
        for name, argv in runs.items():
            show(name, *timed(argv))
        added = recipe(folder, [f"{base}+{out}-random", str(other)])
        show("linear of model+adapter and one", *timed([*ours, "merge", str(added), f"{out}-added", "--quiet"]))


def show(name: str, found: Measured, cores: float) -> None:
    error = f"  error {error_of(found.said):.4f}" if "extract" in name and "refmerge" in name else ""
    print(f"{name:32} {found.seconds:9.1f} {cores:9.1f} {found.peak / 1e6:7.0f}{error}", flush=True)


if __name__ == "__main__":
    main()
