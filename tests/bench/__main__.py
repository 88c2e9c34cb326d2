"""Times merges of checkpoints of a real model's shape, as ratios to a plain copy, a floor and mergekit in the same run.

    python -m tests.bench [--millions 494] [--methods linear,ties] [--runs 3] [--mergekit PATH/TO/mergekit-yaml] [--markdown]

A base and three fine-tunes in bfloat16, of Qwen2's shape, are written to a temporary folder, or to --keep FOLDER and used
again from there, whatever their size. Each run of a method is a copy, a merge by refmerge in a process of its own, a copy
again and, with --mergekit, a merge of the same recipe by mergekit as it runs by default, so that all see the same machine.
Numbers are medians of the runs, ratios are those of the medians. Quote the ratios: seconds belong to one machine at one
minute. The columns:

    seconds      of refmerge's whole process, with the interpreter's start, until the result is safe on the disk
    x copy       over reading the three fine-tunes and writing one of them, in 8 MiB pieces, by one thread, to the page cache
    x floor      over the bytes it moved at that copy's speed, and the sorting and drawing that it cannot do without, on as
                 many cores as it used; tests/bench/floors.py says what counts for which method
    GB/s         bytes of tensors read, in all passes, and written, over the seconds
    passes       over the weights
    MB           peak of anonymous memory, summed over the process and its children
    mergekit s   of mergekit's whole process
    faster       mergekit's seconds over refmerge's
    merge only   the same without what an empty merge takes each: the start of the program
    mergekit MB  as MB
    memory       refmerge's peak as a part of mergekit's

The empty merge is linear of three checkpoints: of one element for refmerge, of one small layer for mergekit, which wants a
model that it knows. Of `copy to disk` the seconds end when the copy is safe on the disk, as refmerge's do; mergekit
does not wait for that.

--cold has the kernel forget the inputs' pages before each copy and merge, so that they come from the disk. A method that
mergekit does not have (widen) is run from a native recipe with its defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from refmerge.checkpoint import open_checkpoint
from refmerge.errors import RefmergeError
from tests.bench.data import Shapes, elements, known_to_mergekit, make, qwen2, recipe, shapes, write
from tests.bench.floors import floor
from tests.bench.processes import Measured, measure

__all__ = ["Measured", "copy", "main", "make", "measure", "recipe", "shapes"]

METHODS = ("linear", "slerp", "task_arithmetic", "model_stock", "ties", "breadcrumbs", "dare_ties", "della")
PIECE = 8 << 20
COLUMNS = {"": 16, "seconds": 8, "x copy": 7, "x floor": 8, "GB/s": 6, "passes": 6, "MB": 7}
BESIDE_MERGEKIT = {"mergekit s": 10, "faster": 7, "merge only": 10, "mergekit MB": 11, "memory": 7}


class Copied(NamedTuple):
    seconds: float
    to_disk: float  # seconds until it is safe there
    moved: int  # bytes read and written


class Empty(NamedTuple):
    """Seconds of an empty merge."""

    refmerge: float
    mergekit: float


# --- Runs --------------------------------------------------------------------------------------------------------------


def input_files(root: Path) -> list[Path]:
    return sorted(file for model in ("base", "ft1", "ft2", "ft3") for file in (root / model).glob("*.safetensors"))


def copy(root: Path, target: Path) -> Copied:
    """Read three checkpoints and write one."""
    start, moved = time.perf_counter(), 0
    with open(target, "wb", buffering=0) as out:
        for file in input_files(root):
            if file.parent.name == "base":
                continue
            with open(file, "rb", buffering=0) as source:
                while piece := source.read(PIECE):
                    moved += len(piece)
                    if file.parent.name == "ft1":
                        moved += out.write(piece)
        taken = time.perf_counter() - start
        os.fsync(out.fileno())
        to_disk = time.perf_counter() - start
    target.unlink()
    return Copied(taken, to_disk, moved)


def forget(root: Path) -> None:
    """Have the kernel drop what it holds of the inputs; it keeps pages that are not on the disk yet."""
    for file in input_files(root):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Bench:
    """The tools that are measured, and the folders they work in."""

    def __init__(self, root: Path, work: Path, options: argparse.Namespace) -> None:
        self.root, self.work, self.options = root, work, options
        with open_checkpoint(root / "base") as base:
            self.tensors: Shapes = {name: info.shape for name, info in base.tensors.items()}

    def refmerge(self, recipe_file: Path) -> Measured:
        given = {"--threads": self.options.threads, "--max-memory": self.options.max_memory}
        more = [str(word) for option, value in given.items() if value for word in (option, value)]
        command = [sys.executable, "-m", "refmerge", "merge", str(recipe_file), str(self.work / "out"), "--json", "--quiet"]
        return self._measured([*command, *more])

    def mergekit(self, recipe_file: Path) -> Measured:
        return self._measured(
            [self.options.mergekit, str(recipe_file), str(self.work / "out"), "--no-copy-tokenizer", "--quiet"]
        )

    def _measured(self, command: Sequence[str]) -> Measured:
        try:
            return measure(command)
        finally:
            shutil.rmtree(self.work / "out", ignore_errors=True)

    def empty(self) -> Empty:
        """The median seconds of merges of next to nothing, after one that does not count: it finds nothing in any cache."""
        write(self.work / "element", {"x": (1,)})
        write(self.work / "layer", qwen2(width=128, inner=256, key_value=64, layers=1, vocabulary=256))
        for kind in ("element", "layer"):
            (self.work / f"{kind}.yml").write_text(recipe("linear", self.work / kind))
        ours, theirs = [], []
        for _ in range(1 + self.options.runs):
            ours.append(self.refmerge(self.work / "element.yml").seconds)
            if self.options.mergekit:
                theirs.append(self.mergekit(self.work / "layer.yml").seconds)
        return Empty(median(ours[1:]), median(theirs[1:]) if theirs else 0.0)

    def method(self, method: str, empty: Empty, copies: list[Copied]) -> dict[str, Any]:
        """The row of a method: column -> number. The copies made are added to `copies`."""
        recipe_file = self.work / "recipe.yml"
        recipe_file.write_text(recipe(method, self.root))
        compared = self.options.mergekit and known_to_mergekit(method)
        near: list[Copied] = []
        floors, ours, theirs = [], [], []
        told: dict[str, Any] = {}
        for _ in range(self.options.runs):
            before = self.copy()
            self._temper()
            ours.append(self.refmerge(recipe_file))
            after = self.copy()
            near += before, after
            told = json.loads(ours[-1].said)
            moved = told["bytes_read"] + told["bytes_written"]
            bandwidth = (before.moved + after.moved) / (before.seconds + after.seconds)
            known = {"models": told["models"], "threads": told["threads"]}
            floors.append(floor(method, self.tensors, moved=moved, bandwidth=bandwidth, **known))
            if compared:
                self._temper()
                theirs.append(self.mergekit(recipe_file))
        copies += near
        taken, peak = median(r.seconds for r in ours), median(r.peak for r in ours)
        row = {
            "": method,
            "seconds": taken,
            "x copy": taken / median(c.seconds for c in near),
            "x floor": taken / median(floors),
            "GB/s": moved / taken / 1e9,
            "passes": told["passes"],
            "MB": peak / 1e6 or None,
        }
        if compared:
            other, other_peak = median(r.seconds for r in theirs), median(r.peak for r in theirs)
            row |= {
                "mergekit s": other,
                "faster": other / taken,
                "merge only": ratio(other - empty.mergekit, taken - empty.refmerge),
                "mergekit MB": other_peak / 1e6 or None,
                "memory": ratio(peak, other_peak),
            }
        return row

    def copy(self) -> Copied:
        self._temper()
        return copy(self.root, self.work / "copy.bin")

    def _temper(self) -> None:
        if self.options.cold:
            forget(self.root)


def ratio(a: float, b: float) -> float | None:
    """None where the lower number is nothing, or noise below nothing."""
    return a / b if a > 0 and b > 0 else None


# --- The report --------------------------------------------------------------------------------------------------------

FORMS = {"passes": "{:d}", "MB": "{:.0f}", "mergekit MB": "{:.0f}", "memory": "{:.1%}", "faster": "{:.1f}x",
         "merge only": "{:.1f}x", "": "{}"}  # fmt: skip


class Table:
    """Lines of a table as they come, for a terminal or in Markdown."""

    def __init__(self, columns: dict[str, int], markdown: bool) -> None:
        self.columns, self.markdown = columns, markdown

    def line(self, cells: Sequence[str]) -> str:
        widths = self.columns.values()
        padded = [f"{c:{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |" if self.markdown else " ".join(padded)

    def head(self) -> str:
        named = self.line(list(self.columns))
        if not self.markdown:
            return named
        rules = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(self.columns.values())]
        return f"{named}\n{self.line(rules)}"

    def row(self, values: dict[str, Any]) -> str:
        """A dash where there is no number."""
        found = {name: values.get(name) for name in self.columns}
        return self.line(["-" if v is None else FORMS.get(name, "{:.2f}").format(v) for name, v in found.items()])


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mergekit_versions(program: str) -> str:
    """Of mergekit and torch, from the interpreter beside the program."""
    script = "from importlib.metadata import version as v; print('mergekit', v('mergekit') + ', torch', v('torch'))"
    try:
        argv = [str(Path(program).absolute().with_name("python")), "-c", script]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "mergekit"


def circumstances(a: argparse.Namespace, tensors: Shapes) -> str:
    versions = [f"Python {platform.python_version()}", f"NumPy {np.__version__}", f"refmerge {metadata.version('refmerge')}"]
    if a.mergekit:
        versions.append(mergekit_versions(a.mergekit))
    given = {"--threads": a.threads, "--max-memory": a.max_memory, "--cold": a.cold and ""}
    options = [f"{option} {value}".strip() for option, value in given.items() if value not in (None, False)]
    return "\n".join(
        [
            f"{datetime.date.today()}, {processor()}, {cores()} cores; {', '.join(versions)}.",
            f"A base and three fine-tunes of {elements(tensors) / 1e6:.0f} million parameters; medians of {a.runs} "
            f"run{'s' * (a.runs != 1)}{'; ' + ', '.join(options) if options else ''}.",
        ]
    )


def legend(compared: bool) -> str:
    said = (
        "x copy: over reading three checkpoints and writing one. x floor: over the bytes moved at the copy's speed and the\n"
        "sorting and drawing that cannot be avoided. MB: peak of anonymous memory of all processes."
    )
    return said + " merge only: faster,\nwithout the empty merge of each." if compared else said


def means(rows: Sequence[dict[str, Any]]) -> str:
    """The geometric means of how much faster; without an empty merge, of those methods where that can be told."""
    found = {name: [row[name] for row in rows if row.get(name)] for name in ("faster", "merge only")}
    words = [f"{name} {statistics.geometric_mean(ratios):.1f}x" for name, ratios in found.items() if ratios]
    return f"Geometric means of {len(found['faster'])} methods: {', '.join(words)}."


@contextlib.contextmanager
def folders(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where the checkpoints are and where results go, on the same disk."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="refmerge-bench-", dir=keep) as work:
        root = Path(work) / "checkpoints" if keep is None else keep.resolve()
        root.mkdir(exist_ok=True)
        yield root, Path(work).resolve()


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--millions", type=float, default=494, help="parameters of a model, in millions")
    p.add_argument("--methods", default=",".join(METHODS))
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--threads", type=int, help="refmerge's")
    p.add_argument("--max-memory", help="refmerge's")
    p.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the checkpoints there, or use those that are")
    p.add_argument("--mergekit", metavar="PATH", help="a mergekit-yaml to compare with")
    p.add_argument("--cold", action="store_true", help="read the inputs from the disk each time")
    p.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    a = p.parse_args()
    if a.runs < 1:
        p.error("--runs is 1 at least")
    if a.cold and not hasattr(os, "posix_fadvise"):
        p.error("--cold needs posix_fadvise, which this system does not have")
    if a.mergekit and not shutil.which(a.mergekit):
        p.error(f"--mergekit: {a.mergekit} is no program")
    for method in a.methods.split(","):
        try:
            recipe(method, Path())
        except RefmergeError as e:
            p.error(str(e))
    return a


def main() -> None:
    a = arguments()
    with folders(a.keep) as (root, work):
        make(root, a.millions)
        if a.mergekit and not (root / "base" / "config.json").exists():
            sys.exit(f"{root / 'base'} has no config.json, without which mergekit does not read it")
        bench = Bench(root, work, a)
        table = Table(COLUMNS | (BESIDE_MERGEKIT if a.mergekit else {}), a.markdown)
        print(f"{circumstances(a, bench.tensors)}\n\n{table.head()}", flush=True)
        empty = bench.empty()
        faster = ratio(empty.mergekit, empty.refmerge)
        started = {"": "empty merge", "seconds": empty.refmerge, "mergekit s": empty.mergekit or None, "faster": faster}
        print(table.row(started), flush=True)
        rows, copies = [], list[Copied]()
        for method in a.methods.split(","):
            rows.append(bench.method(method, empty, copies))
            print(table.row(rows[-1]), flush=True)
        taken, to_disk = median(c.seconds for c in copies), median(c.to_disk for c in copies)
        for name, x in {"plain copy": taken, "copy to disk": to_disk}.items():
            print(table.row({"": name, "seconds": x, "x copy": x / taken, "GB/s": copies[0].moved / x / 1e9}), flush=True)
        print(f"\n{legend(bool(a.mergekit))}")
        if any(row.get("faster") for row in rows):
            print(f"\n{means(rows)}")


if __name__ == "__main__":
    main()
