"""What is no merge of tensors block by block: searches that score whole models, maps between architectures, fits.

A procedure is a plain function of whole checkpoints, open or in memory, and of what else it needs (a score function, data),
composed of methods (`refmerge.merge`) and of steps of its own. `@procedure` gives it its name and source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Procedure", "procedure"]


@dataclass(frozen=True)
class Procedure:
    """name: registry name. run: the function as written; calling the Procedure calls it. paper: its source. check: takes the
    same arguments and raises what can be told of them before a weight is read; None where there is no such thing."""

    name: str
    run: Callable[..., Any]
    paper: str
    check: Callable[..., None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.run) or ""


def procedure(
    name: str, *, paper: str, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Procedure]:
    """Declare a procedure."""
    return lambda run: Procedure(name, run, paper, check)
