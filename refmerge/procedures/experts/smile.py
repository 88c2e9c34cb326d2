"""SMILE: linear layers with low-rank experts and a router that is read off singular vectors, without data or training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.api import merge
from refmerge.checkpoint import FLOATS
from refmerge.errors import UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.procedures.experts._upscaling import as_like, give, opened, spec, values

__all__ = ["factors", "smile"]

UNCHANGED = 1e-8  # largest magnitude of a change that counts as none, as in the authors' code


@procedure("smile", paper="arXiv:2408.10174")
def smile(
    models: Sequence[Any],
    base: Any,
    out: str | Path | None = None,
    *,
    layers: Sequence[str] = ("*",),
    leave: Sequence[str] = ("*embed*", "*wte", "*wpe", "*head"),
    k: int = 128,
    gate_k: int = 1,
    top_k: int = 1,
    routing_use_diff: bool = True,
    full_matrices: bool = True,
    average: bool = False,
    overwrite: bool = False,
) -> Any:
    """SMILE: the base's linear layers, each with what every model changed in it, cut to rank k, as an expert, and a router
    of the gate_k leading right singular vectors of each.

    models, base: paths, open checkpoints, or mappings name -> array. Gives a mapping, or the open checkpoint at `out`;
    refmerge.nets.upscaled runs it. A layer is a module with a matrix `weight` whose name matches one of `layers` and none of
    `leave`.
    """
    models, base = opened(models, base, "smile")
    if gate_k < 1:
        raise UsageError(f"smile: gate_k = {gate_k!r} is less than 1")
    if not 1 <= top_k <= len(models):
        raise UsageError(f"smile: top_k = {top_k!r} is outside of [1, {len(models)}], the number of experts")
    found = [
        name.removesuffix(".weight") for name in base if name.endswith(".weight") and len(spec(base, name)[1]) == 2
        and matches(name.removesuffix(".weight"), layers) and not matches(name.removesuffix(".weight"), leave)
    ]  # fmt: skip
    if not found:
        raise UsageError(f"smile: no linear layer matches layers = {list(layers)} and not leave = {list(leave)}")
    specs = {name: spec(base, name) for name in base}
    # 1. task vectors; a layer that no model has changed stays as it is
    changed = []
    for layer in found:
        thetas, theta_0 = values(models, base, f"{layer}.weight", "smile")
        if any(np.max(np.abs(scores(theta) - scores(theta_0)), initial=0) > UNCHANGED for theta in thetas):
            changed.append(layer)
            specs |= experts_of(base, layer, len(models), k, rows_of(base, layer, gate_k, full_matrices))

    def parts() -> Iterator[tuple[str, Any]]:
        inside = {f"{layer}.{key}" for layer in found for key in ("weight", "bias")}
        for name in base:
            if average and name not in inside and spec(base, name)[0] in FLOATS:
                yield from merge([{name: m[name]} for m in models], "linear").items()
            else:
                yield name, base[name]
        for layer in changed:
            weight, bias = f"{layer}.weight", f"{layer}.bias"
            thetas, theta_0 = values(models, base, weight, "smile")
            tau = [theta - theta_0 for theta in thetas]
            g = rows_of(base, layer, gate_k, full_matrices)
            # 2. experts
            U, SVh, V = factors(tau, k, g) if k > 0 or routing_use_diff else (None, None, None)
            if k > 0:
                yield f"{layer}.experts.u", as_like(U, base, weight)
                yield f"{layer}.experts.svh", as_like(SVh, base, weight)
            else:
                yield f"{layer}.experts.weight", as_like(np.stack([scores(x) for x in tau]), base, weight)
            if bias in base:
                biases, b_0 = values(models, base, bias, "smile")
                yield f"{layer}.experts.bias", as_like(np.stack([scores(b - b_0) for b in biases]), base, bias)
            # 3. router
            if not routing_use_diff:
                V = factors(thetas, 0, g)[2]
            yield f"{layer}.gate.weight", as_like(V.reshape(-1, V.shape[-1]), base, weight)

    return give(specs, parts(), out, [*models, base], overwrite, {"top_k": top_k})


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def rows_of(base: Any, layer: str, gate_k: int, full: bool) -> int:
    """How many rows of the router an expert has."""
    m, n = spec(base, f"{layer}.weight")[1]
    return min(gate_k, n) if full else min(gate_k, m, n)


def experts_of(base: Any, layer: str, count: int, k: int, rows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of what a layer gets."""
    dtype, (m, n) = spec(base, f"{layer}.weight")
    found = {f"{layer}.gate.weight": (dtype, (count * rows, n))}
    if k > 0:
        r = min(k, m, n)
        found |= {f"{layer}.experts.u": (dtype, (count, m, r)), f"{layer}.experts.svh": (dtype, (count, r, n))}
    else:
        found[f"{layer}.experts.weight"] = (dtype, (count, m, n))
    if f"{layer}.bias" in base:
        found[f"{layer}.experts.bias"] = (spec(base, f"{layer}.bias")[0], (count, m))
    return found


def factors(matrices: Sequence[Any], k: int, rows: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U and S V^T of the k leading singular parts of each matrix, and the leading rows of V^T, stacked, in float64.

    Of matrices m x n at most min(m, n) parts, and at most n rows, where those beyond min(m, n) span what is left.
    """
    found: tuple[list[np.ndarray], ...] = ([], [], [])
    for x in matrices:
        U, S, Vh = np.linalg.svd(scores(x), full_matrices=rows > min(x.shape))
        r = max(0, min(k, len(S)))
        for part, whole in zip(found, (U[:, :r], S[:r, None] * Vh[:r], Vh[:rows])):
            part.append(whole)
    U, SVh, V = map(np.stack, found)
    return U, SVh, V
