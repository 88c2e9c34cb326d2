"""From a recipe file to a checked plan, and from there to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from refmerge.adapted import open_model, reference
from refmerge.api import prepare
from refmerge.checkpoint import Checkpoint
from refmerge.errors import UsageError
from refmerge.method import Method
from refmerge.plan import Plan
from refmerge.recipe.moe import prepare_moe
from refmerge.recipe.plan import Alignment, Resolved, load_recipe, resolve
from refmerge.sources import DiskSource

__all__ = ["prepare_recipe", "run_recipe"]


def prepare_recipe(
    recipe: str | os.PathLike[str],
    *,
    method: Method | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> tuple[Resolved, Plan]:
    """Check a recipe and the checkpoints it names, without reading a weight.

    method: stands in for the one that the recipe names. options: as those of `refmerge.api.prepare`; dtype and seed go
    before the recipe's own. A native recipe's paths are
    relative to its folder, another tool's to the working directory, as that tool has it.
    """
    resolved = resolve(load_recipe(recipe), method)
    folder = Path(recipe).parent if resolved.semantics == "refmerge" else Path()

    def place(path: str) -> Path:
        return folder / Path(path).expanduser()

    @cache
    def model(path: str) -> Path | Checkpoint:
        return open_model(path, folder) if len(reference(path, folder)) > 1 else place(path)

    plan = prepare(
        [model(m) for m in resolved.models],
        method or resolved.method,
        base=None if resolved.base is None else model(resolved.base),
        stats=None if resolved.stats is None else [None if s is None else place(s) for s in resolved.stats],
        seed=seed if seed is not None else resolved.seed or 0,
        over=resolved.over,
        dtype=dtype or resolved.work_dtype,
        out_dtype=resolved.out_dtype,
        read_dtype=resolved.read_dtype,
        params=resolved.parameters_for,
        donor=model(resolved.donor),
        **options,
    )
    if resolved.align is not None:
        plan.before = _alignment(resolved.align, resolved.models, resolved.base, plan)
    return resolved, plan


def _alignment(align: Alignment, models: Sequence[str], base: str | None, plan: Plan) -> Callable[[], None]:
    """What puts aligned checkpoints in place of the plan's. UsageError, already now, where the spec does not fit one."""
    from refmerge.registry import procedure
    from refmerge.symmetry.architectures import detect

    found = {} if base is None or plan.work.base is None else {base: plan.work.base}
    found |= dict(zip(models, plan.work.models))
    sources = [found.pop(align.to), *found.values()]  # the one that stays comes first
    checkpoints = [cast(DiskSource, s).checkpoint for s in sources]
    spec = detect(checkpoints[0], architecture=align.spec)
    for checkpoint in checkpoints:
        spec.sizes(checkpoint)

    def run() -> None:
        aligned = procedure(align.method)(checkpoints, spec, **align.parameters).models
        for source, model in zip(sources, aligned, strict=True):
            if not isinstance(model, Checkpoint):
                raise UsageError(f"{align.method} gives no checkpoints: align in Python, and merge what it gives")
            cast(DiskSource, source).checkpoint = model

    return run


def run_recipe(
    recipe: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    **options: Any,
) -> Any:
    """Run a recipe into `out` and return the open Checkpoint, as `refmerge merge RECIPE OUT` does."""
    plan = prepare_moe(recipe, **options) or prepare_recipe(recipe, **options)[1]
    return plan.run(Path(out), max_shard_size=max_shard_size, overwrite=overwrite)
