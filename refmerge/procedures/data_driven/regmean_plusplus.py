"""RegMean++: regression means layer by layer, on the inputs that the layers merged so far give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.api import merge
from refmerge.errors import UsageError
from refmerge.procedure import procedure
from refmerge.stats import Statistics

__all__ = ["Stage", "regmean_plusplus"]

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of a network. prefix: of the names of its tensors. run: (params, h, reads) -> h, which calls reads(module, x)
    with what each linear layer is about to read."""

    prefix: str
    run: Callable[[Params, Any, Callable[[str, Any], None]], Any]


@procedure("regmean_plusplus", paper="arXiv:2508.03121")
def regmean_plusplus(
    models: Sequence[Params], stages: Sequence[Stage], inputs: Sequence[Sequence[Any]], *, off_diagonal: float = 0.95,
    layout: str = "out_in",
) -> dict[str, Any]:  # fmt: skip
    """Merge stage by stage. inputs: for each model its batches of samples, as the first stage takes them."""
    check(models, stages, inputs)
    merged: dict[str, Any] = {}
    h = [list(batches) for batches in inputs]
    for i, stage in enumerate(stages):
        mine = [{n: x for n, x in m.items() if n.startswith(stage.prefix)} for m in models]
        # 1. Gram matrices of what each model's own stage reads, after merged stages
        stats = [seen(stage, m, h_k) for m, h_k in zip(models, h)]
        # 2. merge the stage
        merged |= merged_stage(mine, stats, off_diagonal, layout)
        # 3. through the merged stage
        if i + 1 < len(stages):
            h = [[stage.run(merged, x, nobody) for x in h_k] for h_k in h]
    # 4. what belongs to no stage
    rest = [{n: x for n, x in m.items() if n not in merged} for m in models]
    return merged | (merge(rest, "linear") if rest[0] else {})


def seen(stage: Stage, model: Params, batches: Sequence[Any]) -> Statistics:
    statistics = Statistics()
    for h in batches:
        stage.run(model, h, statistics.gram)
    return statistics


def nobody(module: str, x: Any) -> None:
    """Reads nothing."""


def merged_stage(parts: Sequence[Params], stats: Sequence[Statistics], off_diagonal: float, layout: str) -> Any:
    """regmean of a stage in which linear layers were seen, else the mean."""
    if not parts[0]:
        return {}
    if not any(stats):
        return merge(parts, "linear")
    kinds = [{n: matching(x, parts[0]) for n, x in s.items()} for s in stats]
    return merge(parts, "regmean", stats=kinds, off_diagonal=off_diagonal, layout=layout)


def matching(x: np.ndarray, part: Params) -> Any:
    """A statistic as an array of the models' library."""
    example = next(iter(part.values()))
    if isinstance(example, np.ndarray):
        return x
    from array_api_compat import array_namespace, device

    return array_namespace(example).asarray(x, device=device(example))


def check(models: Sequence[Params], stages: Sequence[Stage], inputs: Sequence[Sequence[Any]]) -> None:
    if not models or len(inputs) != len(models):
        raise UsageError(f"regmean_plusplus: {len(models)} models and inputs of {len(inputs)}: one list of batches for each")
    if any(not batches for batches in inputs):
        raise UsageError("regmean_plusplus: a model has no samples")
    for name in models[0]:
        claimed = [s.prefix for s in stages if name.startswith(s.prefix)]
        if len(claimed) > 1:
            raise UsageError(f"regmean_plusplus: tensor {name!r} belongs to two stages, {claimed[0]!r} and {claimed[1]!r}")
