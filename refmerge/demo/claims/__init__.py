"""The papers' claims, tried on small networks: `python -m refmerge.demo.claims`, and what it wrote down in spec/results.md.

`world` has the tasks and the models, `table` every method on them, `papers` the claims with their experiments, which lie by
family in `averaging`, `task_vectors`, `data_driven`, `alignment` and `adapters`; `page` makes the text.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from refmerge import __version__
from refmerge.demo.claims import table
from refmerge.demo.claims.page import identity
from refmerge.demo.claims.papers import CLAIMS
from refmerge.demo.claims.world import images

__all__ = ["SEEDS", "collected", "experiments", "measured", "parts"]

TABLE = "table"

SEEDS = [0, 1, 2, 3, 4]


def experiments() -> list[str]:
    """What can be asked for by itself: the rows of the table, and what measures claims."""
    measures = dict.fromkeys(identity(c) for found in CLAIMS.values() for c in found if c.measure is not table.best)
    return [*(f"{TABLE}.{row.name}" for row in table.ROWS), *measures]


def parts() -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in experiments()))


def measured(names: Sequence[str], seed: int) -> dict[str, Any]:
    """The numbers of one seed, of experiments by their names: rows of the table, and numbers of claims."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last layer, which all models share, has coefficients without an effect
        rows = {row.name: table.result(row.name, seed) for row in table.ROWS if f"{TABLE}.{row.name}" in names}
        measures = {identity(c): c.measure for found in CLAIMS.values() for c in found if identity(c) in names}
        return {"table": rows, "claims": {name: measure(seed) for name, measure in measures.items()}}


def collected(found: Iterable[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """What is stored: of all (seed, numbers), rounded, with a list over the seeds in place of each number."""
    results: dict[str, Any] = {"made": made(), "seeds": [], "images": sizes(), "table": {}, "claims": {}}
    for seed, numbers in found:
        if seed not in results["seeds"]:
            results["seeds"].append(seed)
        for name, row in numbers["table"].items():
            results["table"].setdefault(name, []).append([None if x is None else round(x, 4) for x in row])
        for name, measures in numbers["claims"].items():
            for key, value in measures.items():
                results["claims"].setdefault(name, {}).setdefault(key, []).append(round(value, 4))
    return results


def sizes() -> dict[str, int]:
    data = images()
    return {"train": len(data.train), "val": len(data.val), "test": len(data.test)}


def made() -> str:
    """With what."""
    return (
        f"Made by refmerge {__version__}, NumPy {np.__version__}, SciPy {version('scipy')}, Python "
        f"{platform.python_version()} on {platform.machine()}. The seeds fix everything but how a BLAS rounds, and training "
        "makes more of that: elsewhere the last digits move."
    )
