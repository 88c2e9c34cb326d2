"""What is kept of a merge beside its weights: the recipe as written and as it was understood, what went in and came out, and
a card for people. None of it holds a time or a path that the recipe does not: the same merge leaves the same files."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import refmerge
from refmerge.checkpoint import Checkpoint, itemsize
from refmerge.checkpoint.files import read_small, readable, there
from refmerge.errors import InputError
from refmerge.pipelines import Arrangement
from refmerge.plan import Plan
from refmerge.recipe.parameters import recipe_key
from refmerge.recipe.plan import Recipe, Resolved, describe
from refmerge.recipe.tokenizers import json_bytes
from refmerge.registry import get
from refmerge.skipping import POLICY
from refmerge.sources import Source, StitchedSource

__all__ = ["alone", "keep_record"]

SMALL = 1 << 28  # bytes of inputs and outputs, so few that their hashes are made without being asked for
_CHUNK = 1 << 22
_OPTIONS = ("dtype", "nonfinite", "integers", "missing", "arithmetic")  # those on which the result depends
_LARGEST = 1 << 20  # bytes of a model card that is looked at
_LICENCES = re.compile(r"[A-Za-z0-9.+-]{1,40}")


def keep_record(
    recipes: Sequence[Recipe],
    resolved: Resolved,
    plan: Plan,
    models: Mapping[str, Checkpoint],
    inputs: Mapping[str, Checkpoint],
    options: Mapping[str, Any],
    hashes: bool | None,
) -> None:
    """Let a plan write its record: README.md, the recipe, refmerge_config.yaml, refmerge_report.json, and the recipe in the
    header of each file of weights.

    recipes: of the file, the last one is the plan's. models: as the recipe names them. inputs: those of all recipes of the
    file. options: what was asked for beside the recipe. hashes: whether files are hashed; None where that takes no time to
    speak of.
    """
    data = [r.document.data for r in recipes]
    source = Path(recipes[-1].document.source).parent
    filled = [_filled(r, plan if r is recipes[-1] else None) for r in recipes]
    told = json.dumps(data[0] if len(data) == 1 else data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    plan.metadata = {**plan.metadata, "refmerge_recipe": told}
    text = recipes[-1].text
    if resolved.semantics == "mergekit":
        plan.files = {**plan.files, "mergekit_config.yml": text.encode()}
    plan.files = {**plan.files, "README.md": _card(resolved, plan, models, text).encode()}
    size = sum(c.nbytes for c in inputs.values()) + sum(
        math.prod(shape) * itemsize(dtype) for dtype, shape in plan.specs.values()
    )
    wanted = size <= SMALL if hashes is None else hashes

    def report(folder: Path, written: Sequence[Path]) -> dict[str, bytes]:
        found = {
            "versions": {
                "refmerge": refmerge.__version__, "numpy": np.__version__, "ml_dtypes": ml_dtypes.__version__,
                "python": platform.python_version(),
            },
            "method": resolved.method,
            "backend": plan.backend.name,
            "seed": plan.work.seed,
            "options": {k: v for k, v in options.items() if k in _OPTIONS and v is not None},
            "inputs": {
                m: [_file(path, c.directory, wanted) for path in c.files]
                for m, c in inputs.items()
                if c.files or not c.coming
            },
            "outputs": [_file(path, folder, wanted) for path in written],
            "recipe": {k: v for k, v in describe(resolved).items() if k != "vocabulary" and v not in (None, [], {})},
            **_tensors(plan, {str(c.path): m for m, c in models.items()}),
            **({} if plan.before is None else {"alignment": plan.before.told()}),
            **({} if resolved.rows_from is None else {"vocabulary": resolved.rows_from}),
            **({} if plan.work.nonfinite != POLICY else {"skipped": _skipped(plan, models)}),
            **({} if plan.arranged is None else {"components": _components(plan.arranged, models)}),
        }  # fmt: skip
        # A merge whose own inputs are kept names them by where they are; the last one has all merges in its recipe.
        stays = [(m, c) for m, c in models.items() if c.coming and c.files and len(recipes) == 1]
        kept = {m: c.directory for m, c in stays if c.directory is not None}
        if resolved.semantics == "refmerge":  # whose paths are relative to the recipe's folder, and this will be another one
            names = {r.content.name for r in recipes}
            moved = [_moved(d, source, folder, names) for d in filled]
            kept = {m: Path(os.path.relpath(path, folder)) for m, path in kept.items()}
        else:
            moved = filled
        moved = [_renamed(d, kept) for d in moved]
        config = "---\n".join(map(_yaml, moved))
        return {"refmerge_config.yaml": config.encode(), "refmerge_report.json": json_bytes(found)}

    plan.report = report


def _filled(recipe: Recipe, plan: Plan | None) -> dict[str, Any]:
    """The recipe with what it leaves to defaults, and the seed of its plan: it makes the same."""
    data = dict(recipe.document.data)
    if plan is not None:
        method = plan.work.method
    else:
        method = get(f"mergekit:{data['merge_method']}" if recipe.semantics == "mergekit" else data["merge_method"])
    defaults = {
        recipe_key(name): list(p.default) if isinstance(p.default, tuple) else p.default
        for name, p in method.params.items()
        if not p.required and p.default is not None
    }
    if defaults:
        data["parameters"] = {**defaults, **(data.get("parameters") or {})}
    if data.get("dtype") is not None:
        data.setdefault("out_dtype", data["dtype"])
    if recipe.semantics == "refmerge":
        data.setdefault("seed", 0)
        if plan is not None:
            data["seed"] = plan.work.seed
    return data


_PATHS = ("model", "base_model", "base_stats", "stats", "to", "source", "tokenizer_source")


def alone(recipe: Recipe) -> Recipe:
    """One of several recipes in a file, with a text of its own."""
    return replace(recipe, text=_yaml(recipe.document.data))


def _renamed(value: Any, paths: Mapping[str, Path], key: str = "") -> Any:
    """A recipe with these paths in place of names of other merges."""
    if isinstance(value, dict):
        return {k: v if k == "parameters" else _renamed(v, paths, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, paths, key) for v in value]
    return str(paths[value]) if key in _PATHS and isinstance(value, str) and value in paths else value


def _moved(value: Any, source: Path, to: Path, names: Collection[str | None], key: str = "") -> Any:
    """A recipe of the folder `source` as one of the folder `to`: with other relative paths."""
    if isinstance(value, dict):
        keys = dict.fromkeys(value, "model") if key == "components" else {k: k for k in value}
        return {k: v if k == "parameters" else _moved(v, source, to, names, keys[k]) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(v, source, to, names, key) for v in value]
    if key not in _PATHS or not isinstance(value, str) or value in names:
        return value
    if not there(source / value):  # a word, or a name of the Hub, or models put together by a plus
        parts = value.split("+")
        return value if len(parts) == 1 else "+".join(_moved(part, source, to, names, key) for part in parts)
    return value if os.path.isabs(value) else os.path.relpath(source / value, to)


def _tensors(plan: Plan, names: Mapping[str, str]) -> dict[str, Any]:
    """Of every tensor of the result its dtype, shape, parameters and origin, and its figures where they were made.

    names: label of a source -> the model as the recipe names it. Sets of parameters are listed once each."""
    sets: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    for work in plan.works:
        for t in work.tensors:
            shown = json.dumps({recipe_key(k): v for k, v in t.params.items()}, default=str)
            number = sets.setdefault(shown, len(sets))
            dtype, shape = plan.specs[t.name]
            came = [_origin(s, t.name, names) for s in work.read]
            tensors[t.name] = {"dtype": dtype, "shape": list(shape), "parameters": number, "from": came}
            if plan.ran is not None and t.name in plan.ran.figures:
                tensors[t.name]["figures"] = plan.ran.figures[t.name].told()
    for name, source in plan.copied.items():
        dtype, shape = plan.specs[name]
        tensors[name] = {"dtype": dtype, "shape": list(shape), "copied": True, "from": [_origin(source, name, names)]}
    return {"parameters": [json.loads(s) for s in sets], "tensors": dict(sorted(tensors.items()))}


def _origin(source: Source, name: str, names: Mapping[str, str]) -> str | list[str]:
    """The model, with the tensor's name there where it is another one."""
    if isinstance(source, StitchedSource):
        inner, theirs = source.places[name]
        model = names.get(inner.label, inner.label)
        return model if theirs == name else [model, theirs]
    return names.get(source.label, source.label)


def _components(arranged: Arrangement, models: Mapping[str, Checkpoint]) -> dict[str, Any]:
    names = {c.label: m for m, c in models.items()}
    told = arranged.told()
    return {**told, "taken": {part: names.get(label, label) for part, label in told["taken"].items()}}


def _skipped(plan: Plan, models: Mapping[str, Checkpoint]) -> list[dict[str, Any]]:
    """The models that were left out of a tensor, with what is not finite there."""
    names = {str(c.path): m for m, c in models.items()}
    return [
        {
            "model": _origin(s.source, s.tensor, names), "tensor": s.tensor, "nonfinite": s.found.count,
            "first": list(s.found.index), "value": str(s.found.value), "tensors_without_it": s.size,
        }
        for s in plan.skipped
    ]  # fmt: skip


def _file(path: Path, folder: Path | None, hashed: bool) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix() if folder is not None and path.is_relative_to(folder) else path.name
    with readable(path):
        found: dict[str, Any] = {"file": name, "bytes": path.stat().st_size}
        blob = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", blob):  # in the Hub's cache the name of a large file is its hash
            found["sha256"] = blob
        elif hashed:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            found["sha256"] = digest.hexdigest()
        return found


def _yaml(data: Any) -> str:
    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    yaml.dump(data, out)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------------------- card


def _card(resolved: Resolved, plan: Plan, models: Mapping[str, Checkpoint], text: str) -> str:
    named = [hub for c in models.values() if (hub := _hub_name(c))]
    library = "transformers" if plan.arranged is None else "diffusers"
    front: dict[str, Any] = {"library_name": library, "tags": ["merge", "refmerge"]}
    if named:
        front["base_model"] = named
    if licence := _licence(models.values()):
        front["license"] = licence
    whose = "mergekit's" if resolved.semantics == "mergekit" else "its own"
    fence = _fence(text, 3)
    align = resolved.align
    before = "" if align is None else f" Units were brought into the order of {_code(align.to)} by `{align.method}` before."
    listed = "\n".join(f"- {_code(m)}{', the base' if m == resolved.base else ''}" for m in models)
    return f"""---
{_yaml(front)}---
# Merged model

Merged by `{resolved.method}` ({plan.work.method.paper}) with refmerge {refmerge.__version__}.{before}

## Models

{listed}

## Recipe

With {whose} semantics.

{fence}yaml
{text.strip(chr(10))}
{fence}

`refmerge_report.json` says where each tensor comes from.
"""


def _fence(text: str, least: int) -> str:
    """So many backticks that the text has no such run of them."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _code(model: str) -> str:
    fence = _fence(model, 1)
    return f"{fence}{' ' * (len(fence) > 1)}{''.join(filter(str.isprintable, model))}{' ' * (len(fence) > 1)}{fence}"


def _hub_name(checkpoint: Checkpoint) -> str | None:
    """ORG/NAME of a model of the Hub, from its place in the cache or from what its config says of itself."""
    for part in Path(checkpoint.path).absolute().parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    name = (checkpoint.config or {}).get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _licence(models: Iterable[Checkpoint]) -> str | None:
    """The licence that the cards of all models name, if it is one."""
    found = set()
    for c in models:
        path = None if c.directory is None else c.directory / "README.md"
        if path is None or not there(path):
            return None
        try:
            head = read_small(path, _LARGEST).decode("utf-8", "replace").split("---\n")
            front = YAML(typ="safe", pure=True).load(head[1]) if len(head) > 2 and not head[0].strip() else {}
        except (InputError, YAMLError, ValueError):
            return None
        named = front.get("license") if isinstance(front, dict) else None
        found.add(named if isinstance(named, str) and _LICENCES.fullmatch(named) else None)
    return found.pop() if len(found) == 1 else None
