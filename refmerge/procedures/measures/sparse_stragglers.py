"""WiSE-FT in which straggler layers change in few entries only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from refmerge.api import prepare
from refmerge.errors import UsageError
from refmerge.procedure import procedure
from refmerge.procedures.measures._common import Layers, layers_of, opened

__all__ = ["sparse_stragglers"]


@procedure("sparse_stragglers", paper="after arXiv:2410.16476")
def sparse_stragglers(
    zero_shot: Any,
    fine_tuned: Any,
    stragglers: Sequence[str],
    *,
    density: float = 0.5,
    alpha: float = 0.5,
    layers: Layers | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Mapping[str, Any]:
    """Interpolate a zero-shot model and its fine-tune, keeping only the largest changes of the straggler layers.

    stragglers: labels of layers, as straggler_score gives them. layers: as there. options: what else refmerge.merge takes.
    """
    # 1. the stragglers' tensors
    (theta_0,) = opened([zero_shot])
    groups = layers_of(theta_0, layers, "sparse_stragglers")
    if isinstance(stragglers, str) or not isinstance(stragglers, Collection):
        raise UsageError("sparse_stragglers: stragglers are a list of labels of layers")
    for label in stragglers:
        if label not in groups:
            raise UsageError(f"sparse_stragglers: there is no layer {label!r} (there are {', '.join(groups)})")
    sparse = {tensor for label in stragglers for tensor in groups[label]}
    # 2. trim their task vectors, and go part of the way: TIES of one model
    placing = {key: options.pop(key) for key in ("max_shard_size", "overwrite") if key in options}
    plan = prepare(
        [fine_tuned], "ties", base=zero_shot, over="tensor",
        params=lambda tensor, _: {"density": density if tensor in sparse else 1.0, "lambda_": alpha}, **options,
    )  # fmt: skip
    return plan.run(out, **placing)
