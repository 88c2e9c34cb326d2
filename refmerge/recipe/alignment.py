"""The step of a recipe that brings models into one order of their units before they are merged: `align`."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from refmerge import registry
from refmerge.checkpoint import Checkpoint, open_checkpoint, save
from refmerge.errors import UsageError
from refmerge.plan import Plan
from refmerge.recipe.document import Problems, quote
from refmerge.recipe.schema import Align, did_you_mean
from refmerge.sources import DiskSource
from refmerge.symmetry.axes import read
from refmerge.symmetry.spec import Perms, Spec
from refmerge.symmetry.view import permuted

__all__ = ["Aligner", "Alignment", "alignment"]


@dataclass(frozen=True)
class Alignment:
    """What is done to the models before they are merged. method: a procedure's name. to: the model that stays. spec: the
    architecture and what its tensors do not tell, or the axes of all tensors; empty where names of tensors and config.json
    tell all."""

    method: str
    to: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)


def alignment(align: Align | None, models: Sequence[str], base: str | None, problems: Problems) -> Alignment | None:
    """The alignment, if the recipe has one: a procedure whose first arguments are models and a spec, with parameters that
    YAML can hold."""
    if align is None:
        return None
    try:
        run = registry.procedure(align.method).run
    except UsageError as e:
        problems.add(("align", "method"), str(e))
        return None
    given = {key: list(v) if isinstance(v, list) else v for key, v in (align.parameters or {}).items()}
    _check_method(align.method, run, given, problems)
    everything = [*([] if base is None else [base]), *models]
    to = everything[0] if align.to is None else next((m for m in everything if _same(m, align.to)), None)
    if to is None:
        problems.add(("align", "to"), f"{quote(align.to)} is none of the models")
        return None
    spec = {} if align.spec is None else {k: v for k, v in align.spec.model_dump().items() if v is not None}
    if "axes" in spec and len(spec) > 1:
        problems.add(("align", "spec"), "axes are those of an architecture of one's own: nothing else goes with them")
    for tensor, entries in spec.get("axes", {}).items():
        try:
            for entry in entries or ():
                read(entry)
        except UsageError as e:
            problems.add(("align", "spec", "axes", tensor), str(e))
    return Alignment(align.method, to, spec, given)


def _check_method(method: str, run: Callable[..., Any], given: Mapping[str, Any], problems: Problems) -> None:
    """Note what keeps a procedure from being called with models, a spec and what a recipe gives."""
    signature = inspect.signature(run).parameters
    if list(signature)[:2] != ["models", "spec"]:
        problems.add(("align", "method"), f"{method} does not align models")
        return
    kinds = _kinds(run)
    for key, p in list(signature.items())[2:]:
        if p.default is p.empty and key not in given:
            more = "" if key in kinds else ", which a recipe cannot give: call it in Python"
            problems.add(("align", "method"), f"{method} needs {key} too{more}")
    for key, value in given.items():
        place = ("align", "parameters", key)
        if key not in signature:
            problems.add(place, f"{method} has no parameter {quote(key)}{did_you_mean(key, kinds)}")
        elif key not in kinds:
            problems.add(place, f"{quote(key)} of {method} cannot be set in a recipe (what can: {', '.join(kinds)})")
        else:
            try:
                TypeAdapter(kinds[key], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError:
                problems.add(place, f"{quote(key)} of {method} must be {_said(kinds[key])}, not {quote(value)}")


def _kinds(run: Callable[..., Any]) -> dict[str, Any]:
    """The type of each parameter that a recipe can set: of numbers, text and lists of these, as its annotation or else its
    default says. How models are averaged and where that is written is the merge's."""
    hints, found = get_type_hints(run), {}
    for key, p in inspect.signature(run).parameters.items():
        kind = hints.get(key, type(p.default))
        if p.kind is p.KEYWORD_ONLY and key not in ("weight", "out") and kind is not type(None) and _is_plain(kind):
            found[key] = kind
    return found


def _is_plain(kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType, Sequence, list):
        return all(map(_is_plain, get_args(kind)))
    return get_origin(kind) is Literal or kind in (bool, int, float, str, type(None))


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _said(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_said(k) for k in get_args(kind) if k is not type(None)))
    return _WORDS.get(kind, "a list")


def _same(a: str, b: str) -> bool:
    return os.path.normpath(a) == os.path.normpath(b)


class Aligner:
    """Puts aligned checkpoints in place of a plan's when it is called. progress: told what is being done. kept: a file from
    which permutations are taken if it is there, and in which they are left for the next run if it is not. matrix: bytes of
    the largest matrix of all pairs of units; products: multiplications for all of these matrices, once, for one model."""

    def __init__(self, align: Alignment, models: Sequence[str], base: str | None, plan: Plan) -> None:
        """UsageError where the spec does not fit a model, or the procedure does not take the parameters."""
        found = {} if base is None or plan.work.base is None else {base: plan.work.base}
        found |= dict(zip(models, plan.work.models))
        sources = {align.to: found.pop(align.to), **found}  # the one that stays comes first
        self.names = list(sources)
        self._sources = [cast(DiskSource, s) for s in sources.values()]
        self._checkpoints = [s.checkpoint for s in self._sources]
        self._parameters, self._procedure = dict(align.parameters), registry.procedure(align.method)
        first, *others = self._checkpoints
        self._spec = _spec(align.spec, first, first.config)
        for name, checkpoint in zip(self.names[1:], others):
            axes = _spec(align.spec, checkpoint, checkpoint.config or first.config).axes
            if any(axes[tensor] != self._spec.axes[tensor] for tensor in axes.keys() & self._spec.axes.keys()):
                raise UsageError(f"align: the config.json of {name} has other heads than that of {align.to}")
            if odd := axes.keys() ^ self._spec.axes.keys():
                has, lacks = (name, align.to) if min(odd) in axes else (align.to, name)
                raise UsageError(f"align: tensor {min(odd)!r} is in {has} and not in {lacks}: aligned models have the same")
        shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
        sizes = {p: n for p, n in self._spec.sizes(first).items() if not self._spec.owners[p]}
        for checkpoint in others:
            self._spec.sizes(checkpoint)
        if self._procedure.check is not None:
            self._procedure.check(self._checkpoints, self._spec, **self._parameters)
        self.matrix = 8 * max(sizes.values(), default=0) ** 2
        self.products = sum(n * math.prod(shapes[tensor]) for p, n in sizes.items() for tensor, _ in self._spec.uses(p))
        self.progress: Callable[[str], None] | None = None
        self.kept: Path | None = None
        self._told: dict[str, Any] = {}

    def __call__(self) -> None:
        if self.kept is not None and self.kept.exists():
            models = self._taken_up(self.kept)
        else:
            more = {"progress": self._visited} if "progress" in inspect.signature(self._procedure.run).parameters else {}
            result = self._procedure(self._checkpoints, self._spec, **self._parameters, **more)
            models, self._told = result.models, _told(self.names, result)
            if self.kept is not None:
                self._keep(self.kept, result.permutations)
        for source, model in zip(self._sources, models, strict=True):
            if not isinstance(model, Checkpoint):
                raise UsageError(f"{self._procedure.name} gives no checkpoints: align in Python, and merge what it gives")
            source.checkpoint = model

    def said(self) -> list[Any] | None:
        """What decides the alignment beside the checkpoints, the one that stays first, as JSON can hold it; None where the
        procedure gives no permutations, which could be kept."""
        if "permutations" not in getattr(get_type_hints(self._procedure.run).get("return"), "__dataclass_fields__", ()):
            return None
        return [self._procedure.name, self._parameters, self.names, self._spec.told()]

    def _keep(self, file: Path, permutations: Sequence[Perms]) -> None:
        found = {f"{k} {p}": x for k, perms in enumerate(permutations) for p, x in perms.items()}
        save(found, file, metadata={"told": json.dumps(self._told)})

    def _taken_up(self, file: Path) -> list[Any]:
        with open_checkpoint(file) as found:
            perms = [{p: found[f"{k} {p}"] for p in self._spec.permutations} for k in range(len(self.names))]
            self._told = json.loads(found.metadata["told"])
        return [permuted(self._spec, p, checkpoint) for p, checkpoint in zip(perms, self._checkpoints)]

    def _visited(self, visit: Any) -> None:
        if self.progress is not None:
            self.progress(f"{self._procedure.name}: {self.names[visit.model]}, sweep {visit.sweep}, {visit.permutation}")

    def told(self) -> dict[str, Any]:
        """What the alignment did, of each model; empty before it was called."""
        return self._told


def _spec(said: Mapping[str, Any], model: Checkpoint, config: Mapping[str, Any] | None) -> Spec:
    from refmerge.symmetry.architectures import declared, detect

    if "axes" in said:
        return declared(model, {n: None if e is None else [read(x) for x in e] for n, e in said["axes"].items()})
    return detect(model, config, **said)


def _told(names: Sequence[str], result: Any) -> dict[str, Any]:
    """Of each model: how many units of each permutation moved, and what was made larger by that, before and after. Digits
    that depend on how a machine rounds are left out."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, perms in zip(names, getattr(result, "permutations", ())):
        here = {p: (int((x != range(x.shape[-1])).sum()), x.size) for p, x in sorted(perms.items())}
        found[name]["moved"] = {p: f"{moved} of {units}" for p, (moved, units) in here.items() if moved}
    for name, objective in zip(names, getattr(result, "objective", ())):
        if objective:
            found[name]["objective"] = [float(f"{x:.6g}") for x in (objective[0], objective[-1])]
    return {name: what for name, what in found.items() if any(what.values())}
