"""Times weight matching of two checkpoints of a language model's shape, as a ratio to the products and assignments in it.

    python -m tests.bench.alignment [--millions 494] [--keep FOLDER]

A base and its fine-tunes of Qwen2's shape, as `python -m tests.bench` writes them, are written to a temporary folder, or to
--keep FOLDER and used again from there. The first fine-tune's units are shuffled, all that may be: the residual stream, the
inner units, the heads and what lies in them. It is then matched with the base, in a process of its own, from the two open
checkpoints. What is printed:

    products      seconds in products of matrices of float64, and how many multiplications and additions they make a second
    assignments   seconds in SciPy's linear_sum_assignment
    ratio         seconds of the whole matching over the two together. What lies between is reading, permuting, widening to
                  float64 and adding up
    processor     the same in seconds of all cores, which other programs disturb less: with OMP_NUM_THREADS=1, that no thread
                  waits for another at work
    MB            peak of anonymous memory of the process, and the largest cost matrix's
    found         which part of the shuffle the matching has undone

Before the residual stream is matched, costs are noise, on which assignments take longest; the first sweep has some of that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy

from refmerge import open_checkpoint
from refmerge.checkpoint import Checkpoint, save
from refmerge.procedures.alignment import git_rebasin
from refmerge.symmetry import Spec
from refmerge.symmetry.architectures import detect
from refmerge.symmetry.view import Permuted
from tests.bench.__main__ import cores, folders, processor
from tests.bench.data import make
from tests.bench.processes import measure


class Clock:
    """Seconds, by the clock and of the processor, and calls of what it wraps."""

    def __init__(self) -> None:
        self.seconds, self.processor, self.calls, self.work = 0.0, 0.0, 0, 0

    def __call__(self, f: Any, *args: Any) -> Any:
        start, used = time.perf_counter(), time.process_time()
        result = f(*args)
        self.processor += time.process_time() - used
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result


def shuffled(spec: Spec, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return spec.random(checkpoint, np.random.default_rng(0))


def match(a: Path, b: Path) -> dict[str, Any]:
    """Match b with a and say what took how long. The procedure's own calls are wrapped, so that all is one run."""
    products, assignments = Clock(), Clock()
    solve = git_rebasin.linear_sum_assignment

    def add_product(C: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        for i in range(0, len(C), git_rebasin.BAND):
            C[i : i + git_rebasin.BAND] += products(np.matmul, x[i : i + git_rebasin.BAND], y.T)
        products.work += 2 * x.size * len(y)

    wrapped = {"add_product": add_product, "linear_sum_assignment": lambda C: assignments(solve, C)}
    with patch.multiple(git_rebasin, **wrapped), open_checkpoint(a) as first, open_checkpoint(b) as second:
        spec = detect(first, first.config)
        largest = max(n for name, n in spec.sizes(first).items() if not spec.owners[name])
        start, used, visits = time.perf_counter(), time.process_time(), []

        def progress(visit: git_rebasin.Visit) -> None:
            visits.append(visit)
            seconds = time.perf_counter() - start
            print(f"{seconds:8.1f} s  sweep {visit.sweep}  {visit.permutation:12} {visit.gain:.6g}", file=sys.stderr)

        found = git_rebasin.weight_matching(first, second, spec, progress=progress)
        seconds, processor = time.perf_counter() - start, time.process_time() - used
        undone = spec.invert(shuffled(spec, second))
        right = {q: float(np.mean(found.permutations[q] == undone[q])) for q in undone}
    return {
        "seconds": seconds,
        "processor": [processor, products.processor, assignments.processor],
        "products": products.seconds,
        "work": products.work,
        "assignments": assignments.seconds,
        "assigned": assignments.calls,
        "largest": largest,
        "sweeps": 1 + max(v.sweep for v in visits),
        "objective": [found.objective[0], found.objective[-1]],
        "found": float(np.mean(list(right.values()))),
    }


def circumstances() -> str:
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    return f"{datetime.date.today()}, {processor()}, {cores()} cores; {versions}."


def report(told: dict[str, Any], peak: int) -> str:
    bare = told["products"] + told["assignments"]
    whole, *parts = told["processor"]
    return "\n".join(
        [
            f"matching      {told['seconds']:9.1f} s, {told['sweeps']} sweeps",
            f"products      {told['products']:9.1f} s, {told['work'] / told['products'] / 1e9:.0f} GFLOP/s",
            f"assignments   {told['assignments']:9.1f} s, {told['assigned']} of them",
            f"ratio         {told['seconds'] / bare:9.2f}",
            f"processor     {whole:9.1f} s, {parts[0]:.1f} and {parts[1]:.1f} of them; ratio {whole / sum(parts):.2f}",
            f"MB            {peak / 1e6:9.0f}, of which {told['largest'] ** 2 * 8 / 1e6:.0f} are the largest cost matrix",
            f"found         {told['found']:9.1%}",
            f"objective     {told['objective'][0]:.6g} to {told['objective'][1]:.6g}",
        ]
    )


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m tests.bench.alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--millions", type=float, default=494, help="parameters of a model, in millions")
    p.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the checkpoints there, or use those that are")
    p.add_argument("--match", nargs=2, type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.match:
        print(json.dumps(match(*a.match)))
        return
    with folders(a.keep) as (root, work):
        make(root, a.millions)
        with open_checkpoint(root / "base") as base, open_checkpoint(root / "ft1") as tune:
            spec = detect(base, base.config)
            save(Permuted(tune, spec, shuffled(spec, tune)), work / "shuffled")
        command = [sys.executable, "-m", "tests.bench.alignment", "--match", str(root / "base"), str(work / "shuffled")]
        measured = measure(command)
        print(f"{circumstances()}\n\n{report(json.loads(measured.said), measured.peak)}")


if __name__ == "__main__":
    main()
