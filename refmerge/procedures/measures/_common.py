"""What the measures share: losses as numbers, tensors by layer, and models in which some tensors are others'."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refmerge.api import merge, prepare
from refmerge.checkpoint import Checkpoint, open_checkpoint
from refmerge.errors import UsageError

__all__ = [
    "Layers", "between", "checked", "layers_of", "number", "one_of", "opened", "pair", "part", "whole_number",
    "with_tensors",
]  # fmt: skip

Model = Mapping[str, Any]
Layers = Mapping[str, Sequence[str]] | Callable[[str], str]


def number(value: Any, name: str) -> float:
    """A loss as a float, which may be NaN. UsageError for what is no number."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UsageError(f"{name}: a loss is a number, not {type(value).__name__}")


def whole_number(name: str, key: str, value: Any, least: int) -> int:
    """value, where it is a whole number not below least."""
    if type(value) is not int or value < least:
        raise UsageError(f"{name}: {key} = {value!r} is no whole number of {least} or more")
    return value


def one_of(name: str, key: str, value: Any, *known: str) -> None:
    """UsageError unless the value is a known one."""
    if value not in known:
        raise UsageError(f"{name}: {key} = {value!r} is none of {', '.join(map(repr, known))}")


def opened(models: Iterable[Any]) -> list[Model]:
    """Models as mappings: paths are opened as checkpoints."""
    return [open_checkpoint(m) if isinstance(m, str | Path) else m for m in models]


def pair(models: Any, name: str, options: Mapping[str, Any]) -> list[Model]:
    """Two models that can be interpolated, opened."""
    if isinstance(models, str | Path | Mapping) or len(models := list(models)) != 2:
        raise UsageError(f"{name}: models are two: write [a, b]")
    checked(models, options)
    return opened(models)


def checked(models: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Complain before the first loss of models that cannot be averaged."""
    prepare(models, "linear", **{key: x for key, x in options.items() if key in ("integers", "missing", "nonfinite")})


def between(a: Model, b: Model, t: float, options: Mapping[str, Any]) -> Model:
    """(1 - t) a + t b as refmerge.merge computes it, in the models' dtype; at the ends the models themselves."""
    if t in (0.0, 1.0):
        return b if t else a
    return merge([a, b], "linear", weight=[1 - t, t], normalize=False, **options)


def part(model: Model, tensors: Sequence[str]) -> dict[str, Any]:
    """Some tensors of a model."""
    return {name: model[name] for name in tensors}


def with_tensors(model: Model, others: Model) -> Model:
    """The model with other tensors under some of its names; a checkpoint's are read when they are asked for."""
    return ChainMap(dict(others), model) if isinstance(model, Checkpoint) else {**model, **others}  # type: ignore[arg-type]


def layers_of(model: Model, layers: Layers | None, name: str) -> dict[str, list[str]]:
    """Layer -> names of its tensors. Without layers: names that are the same up to their last dot, in the model's order; for
    a checkpoint, whose names are sorted, in the order of the numbers in them. UsageError for a name that is not there."""
    if isinstance(layers, Mapping):
        chosen = {label: [tensors] if isinstance(tensors, str) else list(tensors) for label, tensors in layers.items()}
        for label, tensors in chosen.items():
            for tensor in tensors:
                if tensor not in model:
                    raise UsageError(f"{name}: layer {label!r} has no tensor {tensor!r} in the model")
        return chosen
    label_of = layers if layers is not None else _up_to_the_last_dot
    found: dict[str, list[str]] = {}
    for tensor in sorted(model, key=_natural) if isinstance(model, Checkpoint) else model:
        found.setdefault(label_of(tensor), []).append(tensor)
    return found


def _up_to_the_last_dot(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _natural(tensor: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", tensor)]
