"""Which components of diffusers pipelines are merged, and whose the others are."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refmerge.checkpoint import Checkpoint
from refmerge.checkpoint.files import readable, shown
from refmerge.checkpoint.layout import read_json
from refmerge.errors import InputError, RefmergeError, UsageError

__all__ = ["Arrangement", "arrange"]

_OF_NO_CONSEQUENCE = ("dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Arrangement:
    """The components of a merged pipeline. merged: names of those that are. donors: component -> whose files it has, and
    whose weights where it is not merged. left_out: those that some have and the result has not. index: the model_index.json.
    notes: in what files differ of which one is kept."""

    merged: frozenset[str]
    donors: Mapping[str, Checkpoint]
    left_out: Sequence[str] = ()
    index: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def taken(self) -> dict[str, Checkpoint]:
        """Component -> whose weights are copied."""
        found = {name: c for name, c in self.donors.items() if name not in self.merged}
        return {name: c for name, c in found.items() if c.components[name].weights is not None}

    def told(self) -> dict[str, Any]:
        """For a plan: what is done with each component."""
        taken = {name: c.label for name, c in self.donors.items() if name not in self.merged}
        return {"merged": sorted(self.merged), "taken": taken, "left_out": list(self.left_out)}


@dataclass
class _Arranging:
    models: Sequence[Checkpoint]
    donor: Checkpoint
    missing: str
    donors: dict[str, Checkpoint] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)
    unlike: list[str] = field(default_factory=list)

    def decide(self, name: str) -> None:
        """What becomes of a component of which the caller says nothing."""
        of = {m.label: m.components.get(name) for m in self.models}
        kinds = {None if c is None else c.kind for c in of.values()}
        weightless = all(c is None or c.weights is None for c in of.values())
        if len(kinds) == 1 and not weightless:
            if lone := [label for label, c in of.items() if c is not None and c.weights is None]:
                self.unlike.append(f"{name} (without weights in {', '.join(lone)})")
            self.merged.add(name)
            self.donors[name] = self.donor
        elif len(kinds) == 1:
            self.donors[name] = self.donor
        elif self.missing != "error" and (weightless or None in kinds):
            if name in self.donor.components and (weightless or self.missing == "base"):
                self.donors[name] = self.donor
        else:
            listed = (f"missing from {label}" if c is None else f"{c.kind} in {label}" for label, c in of.items())
            self.unlike.append(f"{name} ({', '.join(listed)})")


def arrange(
    models: Sequence[Checkpoint],
    donor: Checkpoint,
    components: Mapping[str, Checkpoint | None],
    missing: str,
    problems: list[RefmergeError],
) -> Arrangement:
    """Decide what becomes of each component of these pipelines.

    models: those that are merged, the base among them. donor: whose files the result has. components: those of which the
    caller says whose they are, or None for nobody's. missing: as of `refmerge.merge`. What does not fit, all together, is
    put to the problems.
    """
    if plain := [m.label for m in models if not m.components]:
        raise InputError(
            f"{next(m.label for m in models if m.components)} is a diffusers pipeline of several components, and "
            f"{', '.join(plain)} is none: one component is merged by the path of its folder, such as sd/unet"
        )
    deciding = _Arranging(models, donor, missing)
    every = sorted({name for m in models for name in m.components} | components.keys())
    for name in every:
        if name not in components:
            deciding.decide(name)
        elif (source := components[name]) is not None:
            if name not in source.components:
                known = ", ".join(sorted(source.components)) or "none: it is no pipeline"
                problems.append(UsageError(f"components: {source.label} has no {shown(name)} (it has {known})"))
            deciding.donors[name] = source
        elif not any(name in m.components for m in models):
            known = ", ".join(sorted({n for m in models for n in m.components}))
            problems.append(UsageError(f"components: no model has {shown(name)} (known here: {known})"))
    if deciding.unlike:
        problems.append(
            InputError(
                f"components that not all pipelines have alike: {'; '.join(deciding.unlike)}; components: {{name: model}} "
                "in a native recipe says whose is taken as it is, and null that nobody's is; missing='base' (--missing "
                "base) takes the base's, or without one the first model's, where it is missing somewhere or has no weights; "
                "missing='skip' leaves out what has weights and is missing somewhere"
            )
        )
    if problems:
        return Arrangement(frozenset(), {})
    gone = [name for name in every if name not in deciding.donors]
    made = {name: [c.components[name].library, c.components[name].kind] for name, c in deciding.donors.items()}
    index = {**getattr(donor, "index", {}), **made, **{name: [None, None] for name in gone}}
    notes = [note for name, c in deciding.donors.items() if name not in components for note in _differ(name, c, models)]
    return Arrangement(frozenset(deciding.merged), deciding.donors, gone, index, notes)


def _differ(name: str, donor: Checkpoint, models: Sequence[Checkpoint]) -> list[str]:
    """Notes of the files of a component that are not the same in all models."""
    notes = []
    ours = {path.name: path for path in donor.components[name].sidecars()}
    for m in models:
        for theirs in m.components[name].sidecars() if name in m.components and m is not donor else ():
            told = _difference(ours[theirs.name], theirs) if theirs.name in ours else None
            if told is not None:
                notes.append(f"{name}/{theirs.name} of {m.label} differs{told}: that of {donor.label} is kept")
    return notes


def _difference(a: Path, b: Path) -> str | None:
    """In what two files differ that should say the same; None where it is nothing of consequence."""
    with readable(b):
        if filecmp.cmp(a, b, shallow=False):
            return None
    if not a.name.endswith("config.json"):
        return ""
    one, other = read_json(a), read_json(b)
    keys = sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))
    keys = [k for k in keys if not k.startswith("_") and k not in _OF_NO_CONSEQUENCE]
    return f" in {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" if keys else None
