"""Coefficients of task arithmetic that make the merged model sure of its predictions, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from refmerge.adaptive import Adam, Composition, Fit, blocks, entropy, fit, provider_for, task_vectors
from refmerge.api import merge
from refmerge.errors import UsageError
from refmerge.numeric import array_namespace
from refmerge.procedure import procedure

__all__ = ["adamerging"]


@procedure("adamerging", paper="arXiv:2310.02575")
def adamerging(
    models: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    logits: Callable[[Mapping[str, Any], int, Any], Any],
    batches: Iterable[Sequence[tuple[int, Any]]],
    *,
    per: Literal["tensor", "model"] = "tensor",
    density: float | None = None,
    prior: float = 0.3,
    lr: float = 0.001,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    eps: float = 0.0,
    gradient: Any = None,
) -> Fit:
    """AdaMerging: coefficients that minimise the entropy of the predictions on unlabelled inputs of all tasks.

    models, base: mappings name -> array. logits: of (parameters, task, batch), with the task's head. batches: for each step
    a list of (task, batch).
    """
    # 1. task vectors
    start, tau = task_vectors(models, base, "adamerging")
    # 2. trim and elect, in AdaMerging++
    if density is not None:
        tau = kept(tau, density)
    # 3. coefficients
    composition = Composition(start, tau, *blocks(tau[0], per, "adamerging"))
    provider = provider_for(gradient, composition.example, "adamerging")

    # 4. entropy
    def loss(params: Any, _: Any, task: int, batch: Any) -> Any:
        return entropy(logits(params, task, batch), eps)

    # 5. steps of Adam
    result = fit(
        composition, batches, loss, who="adamerging", prior=prior, provider=provider, optimiser=Adam(lr), clamp=clamp
    )
    if density is None:
        return result
    plus = {"method": "official:adamerging", "key": "lambdas", "params": {"K": 100 * density}}
    return replace(result, coefficients=replace(result.coefficients, **plus))


def kept(tau: list[dict[str, Any]], density: float) -> list[dict[str, Any]]:
    """What official:adamerging keeps of each task vector."""
    if not 0 <= density <= 1:
        raise UsageError(f"adamerging: density = {density!r} is outside of [0, 1]")
    zeros = {name: array_namespace(x).zeros_like(x) for name, x in tau[0].items()}
    ones = [[float(n == t) for n in range(len(tau))] for t in range(len(tau))]
    return [merge(tau, "official:adamerging", base=zeros, lambdas=one, K=100 * density) for one in ones]
