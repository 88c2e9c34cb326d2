"""From a recipe file to a checked plan, and from there to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from refmerge.api import prepare
from refmerge.checkpoint import Checkpoint, open_checkpoint
from refmerge.errors import UsageError
from refmerge.plan import Plan
from refmerge.recipe.assemble import assemble, layer_config
from refmerge.recipe.plan import Alignment, Resolved, load_recipe, resolve
from refmerge.registry import open_backend
from refmerge.sources import DiskSource

__all__ = ["prepare_recipe", "run_recipe"]


def prepare_recipe(
    recipe: str | os.PathLike[str], *, dtype: str | None = None, seed: int | None = None, **options: Any
) -> tuple[Resolved, Plan]:
    """Check a recipe and the checkpoints it names, without reading a weight.

    options: as those of `refmerge.api.prepare`; dtype and seed go before the recipe's own. A native recipe's paths are
    relative to its folder, another tool's to the working directory, as that tool has it.
    """
    resolved = resolve(load_recipe(recipe))
    folder = Path(recipe).parent if resolved.semantics == "refmerge" else Path()

    def place(path: str) -> Path:
        return folder / Path(path).expanduser()

    common: dict[str, Any] = {
        "seed": seed if seed is not None else resolved.seed or 0,
        "over": resolved.over,
        "dtype": dtype or resolved.work_dtype,
        "out_dtype": resolved.out_dtype,
        "read_dtype": resolved.read_dtype,
        **options,
    }
    if resolved.modules:
        return _prepare_assembled(resolved, place, common)
    plan = prepare(
        [place(m) for m in resolved.models],
        resolved.method,
        base=None if resolved.base is None else place(resolved.base),
        stats=None if resolved.stats is None else [None if s is None else place(s) for s in resolved.stats],
        params=resolved.parameters_for,
        donor=place(resolved.donor),
        **common,
    )
    if resolved.align is not None:
        plan.before = _alignment(resolved.align, resolved.models, resolved.base, plan)
    return resolved, plan


def _prepare_assembled(
    resolved: Resolved, place: Callable[[str], Path], common: dict[str, Any]
) -> tuple[Resolved, Plan]:
    """A recipe whose result is put together from parts of models."""
    read_dtype, backend = common.pop("read_dtype"), open_backend(common.get("backend") or "numpy")
    models = dict.fromkeys(p.model for m in resolved.modules for s in m.slices for p in s.everything)
    checkpoints = {model: open_checkpoint(place(model)) for model in models}
    donor = checkpoints.get(resolved.donor) or open_checkpoint(place(resolved.donor))
    sources = {model: DiskSource(c, backend, read_dtype) for model, c in checkpoints.items()}
    segments = assemble(resolved, checkpoints, lambda model, name, s: sources[model])
    if len(segments) > 1 and common["over"] == "model":
        raise UsageError("over: model takes all tensors together: give every slice the same number of models")
    plans = []
    for segment in segments:
        stitched, base = segment.sources()
        plans.append(prepare(stitched, resolved.method, base=base, donor=donor, params=segment.parameters_for, **common))
    plan = plans[0]
    plan.rest = [p.work for p in plans[1:]]
    plan.specs = dict(sorted(chain.from_iterable(p.specs.items() for p in plans)))
    plan.copied = dict(chain.from_iterable(p.copied.items() for p in plans))
    plan.checkpoints = (*checkpoints.values(), *([] if donor in checkpoints.values() else [donor]))
    plan.config, notes = layer_config(resolved, checkpoints, donor)
    return replace(resolved, notes=(*resolved.notes, *notes)), plan


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
    _, plan = prepare_recipe(recipe, **options)
    return plan.run(Path(out), max_shard_size=max_shard_size, overwrite=overwrite)
