"""Whether a spec is right: outputs before and after a random permutation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refmerge.numeric import scores
from refmerge.symmetry.spec import Model, Spec

__all__ = ["changes"]


def changes(
    spec: Spec, model: Model, forward: Callable[[Model], Any], rng: np.random.Generator, *, draws: int = 3
) -> dict[str, float]:
    """How much each permutation of the spec, by itself, changes what `forward` gives for the model: the largest change of
    an output over a few random draws, in units of the largest output.

    A right spec changes outputs by a few roundings: less than 1e-12 in float64. A permutation of one unit is not tested.
    """
    before = scores(forward(model))
    size = float(np.max(np.abs(before), initial=0.0)) or 1.0
    found = dict.fromkeys(spec.permutations, 0.0)
    for _ in range(draws):
        for name, p in spec.random(model, rng).items():
            if np.array_equal(p, np.broadcast_to(np.arange(p.shape[-1]), p.shape)):
                p = np.roll(p, 1, axis=-1)
            after = scores(forward(spec.apply({name: p}, model)))
            found[name] = max(found[name], float(np.max(np.abs(after - before), initial=0.0)) / size)
    return found
