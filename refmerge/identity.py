"""What decides every byte of a merge, as digests: whether a merge that was interrupted is the one that is asked for now."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import refmerge.backends
from refmerge.checkpoint import Checkpoint
from refmerge.sources import DiskSource, Source

if TYPE_CHECKING:
    from refmerge.plan import Plan

__all__ = ["of_merge"]


def of_merge(plan: Plan, options: Mapping[str, Any]) -> dict[str, str] | None:
    """Digests of the program, the inputs, the recipe and the layout of the output (`options`); None where the inputs are not
    files alone, or something is done to them first. Threads and block sizes are not among them: they change no bit."""
    work = plan.work
    sources = [*work.models, *([] if work.base is None else [work.base]), *(work.stats or [])]
    if plan.before is not None or not all(_is_file(s) for s in sources):
        return None
    recipe = {
        "method": [work.method.name, _text(work.method.run)],
        "backend": plan.backend.name,
        "models": len(work.models),
        "base": work.base is not None,
        "seed": work.seed,
        "nonfinite": work.nonfinite,
        "group": work.over if not callable(work.over) else [str(work.over(t.name)) for t in work.tensors],
        "tensors": [
            [t.name, t.shape, t.work, t.out, sorted((k, repr(v)) for k, v in t.params.items())] for t in work.tensors
        ],
        "reads": [getattr(s, "cast", None) for s in sources],
        "copied": sorted((name, sources.index(source)) for name, source in plan.copied.items()),
    }
    files = [s.checkpoint.fingerprint() for s in sources if isinstance(s, DiskSource)]
    layout = {"tensors": sorted(plan.specs.items()), **options}
    parts = {"program": _program(), "inputs": files, "recipe": recipe, "layout of the output": layout}
    return {part: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest() for part, said in parts.items()}


def _is_file(source: Source) -> bool:
    """Whether all that its values depend on is known by its fingerprint: a kind of checkpoint must have its own."""
    if isinstance(source, DiskSource):
        return type(source.checkpoint) is Checkpoint or "fingerprint" in vars(type(source.checkpoint))
    return not source.names()


@cache
def _program() -> list[str]:
    """The text of this package, and NumPy's version."""
    here = Path(__file__).parent
    texts = hashlib.sha256()
    for root in (here, Path(str(refmerge.backends.__file__)).parent):
        for folder, folders, files in os.walk(root):
            folders.sort()
            for name in sorted(name for name in files if name.endswith(".py")):
                with open(os.path.join(folder, name), "rb") as file:
                    texts.update(file.read())
    return [texts.hexdigest(), np.__version__]


@cache
def _text(run: Any) -> str:
    """The text of a method, which may be another package's; nothing where it is nowhere written down."""
    try:
        return inspect.getsource(run)
    except (OSError, TypeError):
        return ""
