"""diffusers pipelines: a folder whose model_index.json names components, each of a class and in a folder of its own.

    model_index.json          {"unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [null, null], ...}
    unet/                     config.json and weights: one file, shards with an index, or those of a variant (fp16)
    scheduler/, tokenizer/    files without weights

An open pipeline is a checkpoint with the tensors of all its components, those of unet as `unet.<name>`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.checkpoint import layout
from refmerge.checkpoint.files import readable, shown
from refmerge.checkpoint.layout import PIPELINE
from refmerge.checkpoint.reader import Checkpoint
from refmerge.errors import InputError, RefmergeError, together

__all__ = ["Component", "Pipeline", "open_pipeline", "part_of"]


_WEIGHTLESS = ("Scheduler", "Tokenizer", "Processor", "Extractor")  # what names of classes without weights end in


@dataclass(frozen=True)
class Component:
    """library, kind: the class, as model_index.json has it. weights: None where it has none, as a scheduler."""

    name: str
    library: str | None
    kind: str
    folder: Path
    weights: Checkpoint | None

    def sidecars(self) -> list[Path]:
        """The files of its folder that a component merged from it needs, sorted; never weights or an index."""
        with readable(self.folder):
            return layout.sidecars(self.folder)


def part_of(name: str) -> str:
    """The component of a tensor of a pipeline."""
    return name.partition(".")[0]


def open_pipeline(path: Path, open_component: Callable[[Path], Checkpoint]) -> Pipeline:
    """Open a pipeline and all its components. InputError with everything that is wrong with it.

    A component that is [null, null] is absent. Schedulers, tokenizers and their like have no weights, nor has one whose
    folder has neither weights nor a config.json.
    """
    index = layout.read_json(layout.contained(path / PIPELINE, path))
    found: dict[str, Component] = {}
    errors: list[RefmergeError] = []
    for name, said in index.items():
        if name.startswith("_") or not isinstance(said, list) or said == [None, None]:
            continue
        try:
            found[name] = _component(path, name, said, open_component)
        except InputError as error:
            errors.append(error)
    if not found and not errors:
        raise InputError(f"{shown(path / PIPELINE)}: names no components")
    if errors:
        raise together(errors)
    return Pipeline(path, index, found)


def _component(path: Path, name: str, said: list[Any], open_component: Callable[[Path], Checkpoint]) -> Component:
    library, kind = said if len(said) == 2 else (None, None)
    if not name.isidentifier() or not isinstance(kind, str) or not isinstance(library, str | None):
        raise InputError(f"{shown(path / PIPELINE)}: {shown(name)} is no component: one is name: [library, class]")
    folder = path / name
    if not folder.is_dir():
        raise InputError(f"{shown(path)}: component {name} ({shown(kind)}) has no folder")
    layout.contained(folder, path)
    if os.path.lexists(folder / PIPELINE):
        raise InputError(f"{shown(folder)}: a component, and a pipeline itself")
    weightless = kind.removesuffix("Fast").endswith(_WEIGHTLESS) or not layout.holds_weights(folder)
    weights = None if weightless else open_component(folder)
    return Component(name, library, kind, folder, weights)


class Pipeline(Checkpoint):
    """An open pipeline. index: its model_index.json. components: by name, without those that are absent."""

    def __init__(self, path: Path, index: Mapping[str, Any], components: Mapping[str, Component]) -> None:
        files = chain.from_iterable(c.weights.files for c in components.values() if c.weights is not None)
        super().__init__(layout.Layout(path, path, tuple(files)), {}, {}, None)
        self.index, self.components = dict(index), dict(components)
        self._parts = {name: c.weights for name, c in components.items() if c.weights is not None}
        named = {f"{part}.{n}": t for part, weights in self._parts.items() for n, t in weights.tensors.items()}
        self.tensors = {name: replace(t, name=name) for name, t in sorted(named.items())}
        self.nbytes = sum(weights.nbytes for weights in self._parts.values())
        self._identities = dict(chain.from_iterable(w._identities.items() for w in self._parts.values()))
        self.rewritten = any(weights.rewritten for weights in self._parts.values())
        self.note = "; ".join(weights.note for weights in self._parts.values() if weights.note)

    def through(self, change: Callable[[Checkpoint], Checkpoint]) -> Pipeline:
        """The pipeline with each component's weights put through a function; itself where that changes none."""
        changed = {name: change(weights) for name, weights in self._parts.items()}
        if all(changed[name] is weights for name, weights in self._parts.items()):
            return self
        return Pipeline(self.path, self.index, {n: replace(c, weights=changed.get(n)) for n, c in self.components.items()})

    def _place(self, name: str) -> tuple[Checkpoint, str]:
        part, _, theirs = name.partition(".")
        if name not in self.tensors:
            raise KeyError(name)
        return self._parts[part], theirs

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        part, theirs = self._place(name)
        part.read(theirs, start, stop, out)

    def exact(self, name: str, start: int, stop: int) -> np.ndarray | None:
        part, theirs = self._place(name)
        return part.exact(theirs, start, stop)

    def ahead(self, name: str, start: int, stop: int) -> None:
        part, theirs = self._place(name)
        part.ahead(theirs, start, stop)

    def kept_as(self, name: str) -> str:
        part, theirs = self._place(name)
        return part.kept_as(theirs)

    def fingerprint(self) -> list[list[Any]]:
        return [["pipeline"], *chain.from_iterable(weights.fingerprint() for weights in self._parts.values())]

    def close(self) -> None:
        for weights in self._parts.values():
            weights.close()
