"""Mixtures of rank-one experts: the singular parts of what fine-tuning changed, each with a coefficient of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from refmerge.errors import UsageError
from refmerge.procedure import procedure
from refmerge.procedures.experts._upscaling import (
    as_like,
    example_of,
    give,
    inputs_of,
    matching,
    opened,
    router,
    spec,
    task_arithmetic,
    values,
)
from refmerge.procedures.experts.smile import factors

__all__ = ["rankone_moe"]


@procedure("rankone_moe", paper="tanganke/fusion_bench@54c9e8c fusion_bench/models/rankone_moe.py")
def rankone_moe(
    models: Sequence[Any],
    base: Any,
    out: str | Path | None = None,
    *,
    modules: Sequence[str] = ("*.mlp",),
    rank: int = 32,
    select: int = 0,
    scaling: float = 0.3,
    init_lambda: float = 0.3,
    depth: int = 2,
    width: int | None = None,
    seed: int = 0,
    integers: Literal["equal", "base"] = "equal",
    overwrite: bool = False,
) -> Any:
    """Rank-one experts: the models merged by task arithmetic, but for the matrices of their MLPs, which keep the base, the
    leading singular parts of each model's change, and one router for all matrices of a module.

    models, base: paths, open checkpoints, or mappings name -> array. Gives a mapping, or the open checkpoint at `out`.
    """
    models, base = opened(models, base, "rankone_moe")
    found = matching(base, modules, "rankone_moe")
    inside = {name: m for m in found for name in base if name.startswith(f"{m}.")}
    matrices = [name for name in inside if name.endswith(".weight") and len(spec(base, name)[1]) == 2]
    for name in matrices:
        least = min(spec(base, name)[1])
        if not 1 <= rank <= least:
            raise UsageError(f"rankone_moe: rank = {rank!r} is outside of [1, {least}], the ranks that {name!r} can have")
    count = len(models) * rank
    if not 0 <= select <= count:
        raise UsageError(f"rankone_moe: select = {select!r} is outside of [0, {count}], the number of experts")
    # 1. routers
    routers, dtypes = {}, {}
    for m in found:
        own = [name for name in matrices if inside[name] == m]
        if not own:
            raise UsageError(f"rankone_moe: there is no matrix in module {m!r}")
        made = router(m, inputs_of(base, m, width, "rankone_moe"), 2 * count, count, depth, init_lambda, seed, "rankone_moe")
        routers |= made
        dtypes |= dict.fromkeys(made, example_of(base, own))

    def parts() -> Iterator[tuple[str, Any]]:
        # 2. merge: also the biases of the modules, with init_lambda
        biases = [name for name in inside if name not in matrices]
        yield from task_arithmetic(models, base, [name for name in base if name not in inside], scaling, integers)
        yield from task_arithmetic(models, base, biases, init_lambda, integers)
        # 3. decompose
        for name in matrices:
            thetas, theta_0 = values(models, base, name, "rankone_moe")
            yield name, theta_0
            U, SVh, _ = factors([theta - theta_0 for theta in thetas], rank)
            yield expert(name, inside[name], "u"), as_like(U, base, name)
            yield expert(name, inside[name], "svh"), as_like(SVh, base, name)
        for name, x in routers.items():
            yield name, as_like(x, base, dtypes[name])

    specs = {name: spec(base, name) for name in base}
    for name in matrices:
        dtype, (rows, columns) = spec(base, name)
        specs[expert(name, inside[name], "u")] = (dtype, (len(models), rows, rank))
        specs[expert(name, inside[name], "svh")] = (dtype, (len(models), rank, columns))
    specs |= {name: (spec(base, dtypes[name])[0], x.shape) for name, x in routers.items()}
    return give(specs, parts(), out, [*models, base], overwrite, {"select": select})


def expert(name: str, module: str, key: str) -> str:
    layer = name.removeprefix(f"{module}.").removesuffix(".weight")
    return f"{module}.experts.{layer}.{key}"
