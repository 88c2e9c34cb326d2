"""refmerge: the reference implementation of model merging."""

from __future__ import annotations

from typing import Any

import refmerge.methods  # noqa: F401 (first, so that a later import of the package does not hide the function of that name)
from refmerge.api import call, merge
from refmerge.checkpoint import open_checkpoint
from refmerge.errors import InputError, RefmergeError, ResourceError, UsageError
from refmerge.method import Method, PerModel, method
from refmerge.registry import get
from refmerge.registry import names as methods

__version__ = "0.1.0"
__all__ = [
    "InputError", "Method", "PerModel", "RefmergeError", "ResourceError", "UsageError", "__version__", "call", "get",
    "merge", "method", "methods", "open_checkpoint", "run_recipe",
]  # fmt: skip


def run_recipe(recipe: Any, out: Any, **options: Any) -> Any:
    """Run a recipe file into a checkpoint, as `refmerge merge RECIPE OUT` does. See `refmerge.recipe`."""
    from refmerge.recipe.run import run_recipe as run

    return run(recipe, out, **options)
