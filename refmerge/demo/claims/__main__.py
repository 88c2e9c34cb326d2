"""`python -m refmerge.demo.claims`: all experiments, their numbers as JSON, and the page made of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from refmerge.demo.claims import SEEDS, collected, experiments, measured, parts
from refmerge.demo.claims.page import page

NAMES = ("results.json", "results.md")
LARGEST = 10**7  # a hundred times that, and more, still seeds a RandomState


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m refmerge.demo.claims", description=(__doc__ or "").strip())
    parser.add_argument("folder", nargs="?", type=Path, help=f"where {' and '.join(NAMES)} go; none: print")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="default: 0 1 2 3 4")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(parts())}, or one of their experiments")
    parser.add_argument("--list", action="store_true", help="name all experiments")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--page", action="store_true", help=f"make {NAMES[1]} of the folder's {NAMES[0]} alone")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(experiments()))
        return
    wanted = options.only or parts()
    if unknown := [name for name in wanted if name not in (*parts(), *experiments())]:
        parser.error(f"there is no {unknown[0]!r}: --list names what there is, and parts are {', '.join(parts())}")
    if wrong := [seed for seed in options.seeds if not 0 <= seed <= LARGEST]:
        parser.error(f"a seed is a whole number from 0 to {LARGEST}, not {wrong[0]}")
    if options.workers < 1:
        parser.error("it takes at least one process: --workers 1")
    if options.page and options.folder is None:
        parser.error("--page needs the folder with the numbers")
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"there is no folder {options.folder}")
    if options.page:
        stored = options.folder / NAMES[0]
        if not stored.is_file():
            parser.error(f"there is no {stored}")
        try:
            results = json.loads(stored.read_text(encoding="utf-8"))
            text = page(results)
        except (ValueError, KeyError, TypeError, IndexError):
            parser.error(f"{stored} is not what this command writes")
    else:
        jobs = [(mine, seed) for mine in shares(wanted) for seed in dict.fromkeys(options.seeds)]
        results = collected(run(jobs, options.workers))
        text = page(results)
        if options.folder is not None:
            (options.folder / NAMES[0]).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8", newline="\n")
    if options.folder is None:
        print(text)
    else:
        (options.folder / NAMES[1]).write_text(text, encoding="utf-8", newline="\n")


def run(jobs: Sequence[tuple[list[str], int]], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(seed, numbers) of each job, in processes of one thread each."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in single}
    os.environ.update(single)  # processes that are started now have it
    try:
        with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
            for (names, seed), numbers in zip(jobs, pool.map(measured, *zip(*jobs))):
                print(f"{names[0].partition('.')[0]}, seed {seed}", file=sys.stderr, flush=True)
                yield seed, numbers
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def shares(wanted: Sequence[str]) -> list[list[str]]:
    """The experiments of each part that are wanted, for one process."""
    chosen = [name for name in experiments() if name in wanted or name.partition(".")[0] in wanted]
    found = [[name for name in chosen if name.partition(".")[0] == part] for part in parts()]
    return [names for names in found if names]


if __name__ == "__main__":
    main()
