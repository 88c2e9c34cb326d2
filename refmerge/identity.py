"""What decides every byte of an output, as digests: whether one that was interrupted is the one that is asked for now."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import refmerge.backends
from refmerge.checkpoint import Checkpoint
from refmerge.sources import DiskSource
from refmerge.work import Work

if TYPE_CHECKING:
    from refmerge.plan import Plan

__all__ = ["known", "of_merge", "of_output"]


def of_output(*, inputs: Any, recipe: Any, layout: Any) -> dict[str, str]:
    """Digests of the program and of these, which JSON can hold."""
    parts = {"program": _program(), "inputs": inputs, "recipe": recipe, "layout of the output": layout}
    return {part: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest() for part, said in parts.items()}


def of_merge(plan: Plan, options: Mapping[str, Any]) -> dict[str, str] | None:
    """Digests of the program, the inputs, the recipe and the layout of the output (`options`), those of the merges before
    it among them; None where the inputs are not files alone, or something is done to them first that cannot be kept.
    Threads and block sizes are not among them: they change no bit."""
    inputs, recipes = [], []
    for one in plan.all_plans:
        checkpoints: dict[Checkpoint, int] = {}
        works = [_work(work, checkpoints) for work in one.works]
        before = None if one.before is None else one.before.said()
        if (one.before is not None and before is None) or None in works or not all(known(c) for c in checkpoints):
            return None
        inputs.append([c.fingerprint() for c in checkpoints])
        copied = [[name, *_from(source, name, checkpoints)] for name, source in sorted(one.copied.items())]
        makes = sorted(one.specs.items())
        recipes.append({
            "before": before, "works": works, "copied": copied, "backend": one.backend.name, "makes": makes
        })  # fmt: skip
    return of_output(inputs=inputs, recipe=recipes, layout={"tensors": sorted(plan.specs.items()), **options})


def known(checkpoint: Checkpoint) -> bool:
    """Whether all that its values depend on is known by its fingerprint: a kind of checkpoint must have its own, and what it
    is a view of, too."""
    of = getattr(checkpoint, "_of", None)
    own = type(checkpoint) is Checkpoint or "fingerprint" in vars(type(checkpoint))
    return own and (of is None or known(of))


def _work(work: Work, checkpoints: dict[Checkpoint, int]) -> dict[str, Any] | None:
    """What a work computes, of which tensors of which of the checkpoints, which it numbers; None if not of these alone."""
    sources = [*work.models, *([] if work.base is None else [work.base])]
    stats = [s if s.names() else None for s in work.stats or ()]
    if not all(getattr(s, "files", False) for s in (*sources, *filter(None, stats))):
        return None
    return {
        "method": [work.method.name, _text(work.method.run)],
        "models": len(work.models),
        "base": work.base is not None,
        "seed": work.seed,
        "nonfinite": work.nonfinite,
        "group": work.over if not callable(work.over) else [str(work.over(t.name)) for t in work.tensors],
        "tensors": [
            [t.name, t.shape, t.work, t.out, sorted((k, repr(v)) for k, v in t.params.items())] for t in work.tensors
        ],
        "reads": [_reads(s, [t.name for t in work.tensors], checkpoints) for s in sources],
        "stats": [s and _reads(s, sorted(s.names()), checkpoints) for s in stats],
    }


def _reads(source: Any, names: Sequence[str], checkpoints: dict[Checkpoint, int]) -> list[Any]:
    """Where a source has its tensors from; a checkpoint's are its own."""
    return [_from(source, name, checkpoints) for name in ([""] if isinstance(source, DiskSource) else names)]


def _from(source: Any, name: str, checkpoints: dict[Checkpoint, int]) -> list[Any]:
    places = [[checkpoints.setdefault(c, len(checkpoints)), theirs] for c, theirs in source.origins(name)]
    return [places, source.rule(name)]


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
