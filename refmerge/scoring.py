"""What searches have in common that score one merge after another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refmerge.errors import UsageError

__all__ = ["number", "scored"]


def number(value: Any, who: str) -> float:
    """A score as a float, which may be NaN. UsageError for what is no number."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UsageError(f"{who}: a score is a number, not {type(value).__name__}")


def scored(merged: Callable[[Path | None], Any], score: Callable[[Any], float], out: str | Path | None) -> float:
    """The score of what `merged` makes: in memory, or, where the result is to be written, of a checkpoint beside its place.

    merged: a function of a path, or of None, that gives tensors or the open checkpoint there.
    """
    if out is None:
        return score(merged(None))
    target = Path(out).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.trial-", dir=target.parent) as folder:
        with merged(Path(folder) / target.name) as candidate:
            return score(candidate)
