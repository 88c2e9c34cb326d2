"""Weight-ensembling mixtures of experts: MLPs that are merged anew for each sample, by a router's coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refmerge.adaptive import Adam, Composition, cosine, entropy, fit, provider_for
from refmerge.errors import UsageError
from refmerge.numeric import like, scores
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
    stack,
    task_arithmetic,
    values,
)

__all__ = ["Routers", "fit_routers", "pruned", "wemoe"]


@procedure("wemoe", paper="arXiv:2402.00433")
def wemoe(
    models: Sequence[Any],
    base: Any,
    out: str | Path | None = None,
    *,
    modules: Sequence[str] = ("*.mlp",),
    scaling: float = 0.3,
    init_lambda: float = 0.3,
    depth: int = 2,
    prune: float = 0.0,
    shared: bool = False,
    position: int = 0,
    width: int | None = None,
    seed: int = 0,
    integers: Literal["equal", "base"] = "equal",
    overwrite: bool = False,
) -> Any:
    """WEMoE: the models merged by task arithmetic, but for their MLPs, which keep the base, all task vectors and a router.

    models, base: paths, open checkpoints, or mappings name -> array. Gives a mapping, or the open checkpoint at `out`;
    refmerge.nets.upscaled runs it, and `fit_routers` trains the routers.
    """
    models, base = opened(models, base, "wemoe")
    if not 0 <= prune < 1:
        raise UsageError(f"wemoe: prune = {prune!r} is outside of [0, 1)")
    if position % 2 or position < 0 or (position and not shared):
        raise UsageError(f"wemoe: position = {position!r}: an even number, of the input of one shared router")
    found = matching(base, modules, "wemoe")
    inside = {name: m for m in found for name in base if name.startswith(f"{m}.")}
    # 1. routers
    routers: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    for m in [""] if shared else found:
        first = m or found[0]
        inputs = inputs_of(base, first, width, "wemoe") + position
        made = router(m, inputs, inputs, len(models), depth, init_lambda, seed, "wemoe")
        routers |= made
        dtypes |= dict.fromkeys(made, example_of(base, [name for name in base if inside.get(name) == first]))
    if shared:
        widths = {inputs_of(base, m, width, "wemoe") for m in found}
        if len(widths) > 1:
            raise UsageError(f"wemoe: one shared router cannot read modules of {sorted(widths)} numbers")

    def parts() -> Iterator[tuple[str, Any]]:
        # 2. merge
        yield from task_arithmetic(models, base, [name for name in base if name not in inside], scaling, integers)
        # 3. upscale: the base's tensors, and the task vectors
        for name in inside:
            thetas, theta_0 = values(models, base, name, "wemoe")
            yield name, theta_0
            yield stacked(name, inside[name]), stack([pruned(theta - theta_0, prune) for theta in thetas])
        for name, x in routers.items():
            yield name, as_like(x, base, dtypes[name])

    specs = {name: spec(base, name) for name in base}
    for name, m in inside.items():
        dtype, shape = spec(base, name)
        specs[stacked(name, m)] = (dtype, (len(models), *shape))
    specs |= {name: (spec(base, dtypes[name])[0], x.shape) for name, x in routers.items()}
    return give(specs, parts(), out, [*models, base], overwrite, {})


def stacked(name: str, module: str) -> str:
    return f"{module}.task_vectors.{name.removeprefix(f'{module}.')}"


def pruned(tau: Any, ratio: float) -> Any:
    """tau where |tau| is above the quantile of that ratio of all |tau|, interpolated linearly, and 0 elsewhere; all of it
    for 0."""
    magnitudes = np.abs(scores(tau))
    if not ratio or not magnitudes.size:
        return tau
    return tau * like((magnitudes > np.quantile(magnitudes, ratio)).astype(np.float64), tau)


@dataclass(frozen=True)
class Routers:
    """params: all parameters, with the routers that were trained. losses: of each step."""

    params: dict[str, Any]
    losses: tuple[float, ...]


def fit_routers(
    params: Mapping[str, Any],
    logits: Callable[[Mapping[str, Any], int, Any], Any],
    batches: Sequence[Sequence[tuple[int, Any]]],
    *,
    lr: float = 0.001,
    schedule: Literal["cosine", "constant"] = "cosine",
    eps: float = 0.0,
    gradient: Any = None,
) -> Routers:
    """Train the routers of WEMoE and rank-one modules, and nothing else, on the entropy of predictions without labels.

    params: what `wemoe` or `rankone_moe` gives. logits: of (parameters, task, batch). batches: for each step a list of
    (task, batch). gradient: as for `adamerging`: of torch, jax, or differences in float64.
    """
    names = [n for n in params if n.startswith("gate.") or ".gate." in n]
    if not names:
        raise UsageError("fit_routers: there is no router among the parameters: upscale with wemoe or rankone_moe first")
    if schedule not in ("cosine", "constant"):
        raise UsageError(f"fit_routers: schedule = {schedule!r} is none of 'cosine', 'constant'")
    steps = list(batches)
    start = {names[0]: params[names[0]], **params}  # what gives the others their library and dtype

    def loss(theta: Any, x: Any, task: int, batch: Any) -> Any:
        return entropy(logits({**theta, **{name: x[name] for name in names}}, task, batch), eps)

    found = fit(
        Composition(start, (), {}, ()), steps, loss, who="fit_routers", prior=0.0,
        provider=provider_for(gradient, params[names[0]], "fit_routers"), optimiser=Adam(lr),
        rates=cosine(lr, len(steps)) if schedule == "cosine" else None,
        trained={name: scores(params[name]) for name in names}, of_task=lambda _: names,
    )  # fmt: skip
    return Routers({**params, **{name: like(found.trained[name], params[name]) for name in names}}, found.losses)
