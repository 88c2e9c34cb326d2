"""How sharply the loss rises around a model where noise is added to one of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmerge.checkpoint.dtypes import FLOATS
from refmerge.errors import UsageError
from refmerge.numeric import exact_sum, like, scores
from refmerge.procedure import procedure
from refmerge.procedures.measures._common import Layers, layers_of, number, opened, whole_number, with_tensors
from refmerge.rng import key_for
from refmerge.sources import dtype_name

__all__ = ["Sharpness", "layerwise_sharpness"]


@dataclass(frozen=True)
class Sharpness:
    """loss: of the model. layers: layer -> mean rise of the loss under noise on that layer. whole: under noise on all."""

    loss: float
    layers: dict[str, float]
    whole: float


@procedure("layerwise_sharpness", paper="after arXiv:2410.16476")
def layerwise_sharpness(
    model: Any,
    loss: Callable[[Mapping[str, Any]], float],
    *,
    layers: Layers | None = None,
    rho: float = 0.01,
    adaptive: bool = True,
    draws: int = 20,
    seed: int = 0,
) -> Sharpness:
    """Average-case sharpness, layer by layer: how far the loss rises under Gaussian noise on one layer.

    loss: a function of a mapping name -> array. layers: label -> names of tensors, or a function name -> label; by default
    the names up to their last dot.
    """
    name = "layerwise_sharpness"
    whole_number(name, "draws", draws, 1)
    whole_number(name, "seed", seed, 0)
    if not rho >= 0:
        raise UsageError(f"{name}: rho = {rho!r} is below 0")
    (theta,) = opened([model])
    groups = layers_of(theta, layers, name)
    # 1. the model's own loss
    own = number(loss(theta), name)

    def rise(tensors: list[str]) -> float:
        # 2. noise on these tensors
        noisy = noise(theta, tensors, rho, adaptive, draws, seed)
        # 3. mean rise
        return exact_sum([number(loss(with_tensors(theta, x)), name) - own for x in noisy]) / draws

    every = list(dict.fromkeys(tensor for tensors in groups.values() for tensor in tensors))
    return Sharpness(own, {label: rise(tensors) for label, tensors in groups.items()}, rise(every))


def noise(
    theta: Mapping[str, Any], tensors: list[str], rho: float, adaptive: bool, draws: int, seed: int
) -> Iterator[dict[str, Any]]:
    """w + delta in w's library and dtype, delta normal with deviation rho, or rho |w|, for each draw; of floats alone."""
    for draw in range(draws):
        found = {}
        for tensor in tensors:
            x = theta[tensor]
            if dtype_name(x, tensor) not in FLOATS:
                continue
            w = scores(x)
            key = np.array(key_for(seed, tensor, draw), dtype=np.uint64)
            normal = np.random.Generator(np.random.Philox(key=key)).standard_normal(w.shape)
            found[tensor] = like(w + rho * (np.abs(w) if adaptive else 1.0) * normal, x)
        yield found
