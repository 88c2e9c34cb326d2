"""Steps of the procedures that make mixtures of experts out of dense models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.adaptive import is_floating
from refmerge.api import merge
from refmerge.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, refuse_input
from refmerge.errors import InputError, UsageError
from refmerge.nets.layers import in_order
from refmerge.nets.upscaled import METADATA
from refmerge.numeric import array_namespace, like
from refmerge.rng import key_for
from refmerge.sources import all_finite, dtype_name, stored_bytes

READING = ("gate_proj", "up_proj", "fc1", "c_fc", "w1", "wi", "wi_0")  # layers that read what their module reads
Specs = dict[str, tuple[str, tuple[int, ...]]]


def opened(models: Sequence[Any], base: Any, who: str) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """Models and base as mappings. InputError unless all have the same tensors, of one dtype and shape each."""
    if isinstance(models, str | Path | Mapping):
        raise UsageError(f"{who}: models is a sequence: write [a, b], also for one model")
    given = [x if isinstance(x, Mapping) else open_checkpoint(x) for x in [*models, base]]
    if len(given) < 2:
        raise UsageError(f"{who}: there is no model")
    start = given[-1]
    for t, model in enumerate(given[:-1]):
        for name in sorted({*model} ^ {*start}):
            where = f"model {t}" if name in start else "the base"
            raise InputError(f"{who}: tensor {name!r} is not in {where}; leave it out of all or add it to all")
        for name in start:
            one, other = spec(model, name), spec(start, name)
            if one != other:
                raise InputError(
                    f"{who}: tensor {name!r} is {one[0]} of shape {list(one[1])} in model {t} and {other[0]} of shape "
                    f"{list(other[1])} in the base; they must agree"
                )
    return given[:-1], start


def spec(model: Mapping[str, Any], name: str) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and the shape of a tensor, which of a checkpoint is not read for that."""
    if isinstance(model, Checkpoint):
        return model.tensors[name].dtype, model.tensors[name].shape
    return dtype_name(model[name], name), tuple(model[name].shape)


def matching(names: Iterable[str], patterns: Sequence[str], who: str, key: str = "modules") -> list[str]:
    """The modules, prefixes of the names of tensors, that match a pattern; of nested ones the outermost, in order."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    modules: set[str] = set()
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts)))
        found = next((p for p in prefixes if any(fnmatchcase(p, pattern) for pattern in patterns)), None)
        if found is not None:
            modules.add(found)
    if not modules:
        raise UsageError(f"{who}: no module matches {key} = {patterns}; give globs of module names, such as '*.mlp'")
    return in_order(modules)


def values(models: Sequence[Mapping[str, Any]], base: Mapping[str, Any], name: str, who: str) -> tuple[list[Any], Any]:
    """A floating-point tensor of each model and of the base. UsageError where a number is not finite, or there is none."""
    found = [model[name] for model in [*models, base]]
    if not is_floating(found[-1]):
        raise UsageError(f"{who}: tensor {name!r} holds no floating-point numbers, and lies in a module that is upscaled")
    for t, x in enumerate(found):
        if not all_finite(x):
            whose = "" if not models else " of the base" if t == len(models) else f" of model {t}"
            raise UsageError(f"{who}: tensor {name!r}{whose} is not finite")
    return found[:-1], found[-1]


def task_arithmetic(
    models: Sequence[Mapping[str, Any]], base: Mapping[str, Any], names: Iterable[str], weight: float, integers: str
) -> Iterator[tuple[str, Any]]:
    """Each tensor merged by task_arithmetic with this weight, one after the other."""
    for name in names:
        alone = [{name: model[name]} for model in models]
        yield from merge(alone, "task_arithmetic", base={name: base[name]}, weight=weight, integers=integers).items()


def router(
    module: str, inputs: int, hidden: int, experts: int, depth: int, init_lambda: float, seed: int, who: str
) -> dict[str, np.ndarray]:
    """A router as it is before any training: weights drawn with deviation 0.01, the last biases init_lambda, others 0."""
    gate = f"{module}.gate" if module else "gate"
    if depth not in (0, 1, 2):
        raise UsageError(f"{who}: depth = {depth!r} is none of 0, 1, 2")
    if depth == 0:
        return {f"{gate}.weight": np.full(experts, init_lambda)}

    def drawn(name: str, *shape: int) -> np.ndarray:
        key = np.array(key_for(seed, name, 0), dtype=np.uint64)
        return 0.01 * np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)

    first = {}
    if depth == 2:
        first = {f"{gate}.fc1.weight": drawn(f"{gate}.fc1.weight", hidden, inputs), f"{gate}.fc1.bias": np.zeros(hidden)}
    last = drawn(f"{gate}.fc2.weight", experts, hidden if depth == 2 else inputs)
    return {**first, f"{gate}.fc2.weight": last, f"{gate}.fc2.bias": np.full(experts, init_lambda)}


def inputs_of(base: Mapping[str, Any], module: str, width: int | None, who: str) -> int:
    """How many numbers a module reads: `width`, or as many as a layer of it that is known to read them."""
    if width is not None:
        return width
    for layer in READING:
        if f"{module}.{layer}.weight" in base:
            shape, bias = spec(base, f"{module}.{layer}.weight")[1], f"{module}.{layer}.bias"
            turned = bias in base and spec(base, bias)[1] != shape[:1]  # (in, out), as GPT-2 has it
            return int(shape[0] if turned else shape[-1])
    raise UsageError(f"{who}: none of {', '.join(READING)} is in {module!r}: say how many numbers it reads, width=...")


def example_of(base: Mapping[str, Any], names: Iterable[str]) -> str:
    """The tensor whose dtype and library a module's router has: the first matrix, else the first tensor."""
    names = list(names)
    return next((name for name in names if len(spec(base, name)[1]) > 1), names[0])


def give(
    specs: Specs, made: Iterable[tuple[str, Any]], out: str | Path | None, inputs: Iterable[Any], overwrite: bool,
    how: Mapping[str, Any], sidecars: Sequence[Path] = (),
) -> Any:  # fmt: skip
    """What is made, name by name: a dictionary, or the open checkpoint at `out`, whose header says how it is run."""
    if out is None:
        return dict(made)
    refuse_input(out, [c.path for c in inputs if isinstance(c, Checkpoint)])
    metadata = {METADATA: json.dumps(how, sort_keys=True)}
    with CheckpointWriter(out, specs, overwrite=overwrite, metadata=metadata, sidecars=sidecars) as writer:
        for name, x in made:
            writer.write(name, 0, stored_bytes(x, specs[name][0]))
    return open_checkpoint(out)


def stack(xs: Sequence[Any]) -> Any:
    return array_namespace(*xs).stack(list(xs), axis=0)


def as_like(values: np.ndarray, base: Mapping[str, Any], name: str) -> Any:
    """Host numbers as an array of the library and dtype of a tensor."""
    return like(values, base[name])
