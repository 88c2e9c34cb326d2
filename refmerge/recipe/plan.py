"""Recipe -> what is merged: method, models in order, base, dtypes, and the parameters of every tensor."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal

from refmerge.checkpoint.dtypes import OUTPUTS
from refmerge.errors import RecipeError, UsageError
from refmerge.method import Method
from refmerge.recipe.document import MAX_BYTES, Document, Problems, quote, read_document
from refmerge.recipe.parameters import Checker, Rules
from refmerge.recipe.schema import MergekitRecipe, NativeRecipe, did_you_mean, validate

Semantics = Literal["mergekit", "refmerge"]
# Each model with its place in the recipe's list, the base, and what the user should know.
Models = tuple[list[tuple[str, int | None]], str | None, tuple[str, ...]]


@dataclass(frozen=True)
class Recipe:
    """A recipe that its schema accepts; `document` remembers where each part stands in the text."""

    document: Document
    content: MergekitRecipe | NativeRecipe

    @property
    def semantics(self) -> Semantics:
        return "refmerge" if isinstance(self.content, NativeRecipe) else "mergekit"


@dataclass(frozen=True)
class Alignment:
    """What is done to the models before they are merged. method: a procedure's name. to: the model that stays. spec: an
    architecture, None where names of tensors tell it."""

    method: str
    to: str
    spec: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """Everything that a recipe says, decided.

    method: registry name. models: paths as written, in order, without the base. stats: a path or None for each model,
    before them the base's where the method reads that too.
    align: what is done to models and base before. donor: the model whose config and tokenizer files the output gets.
    read_dtype: every input is cast to it at load. read_dtype and out_dtype are safetensors names. notes: what the recipe
    says and a merge does not act on.
    """

    method: str
    semantics: Semantics
    models: tuple[str, ...]
    base: str | None
    donor: str
    rules: Rules = field(repr=False, compare=False)
    written: Mapping[str, Any] = field(repr=False)
    align: Alignment | None = None
    stats: tuple[str | None, ...] | None = None
    read_dtype: str | None = None
    out_dtype: str | None = None
    work_dtype: str | None = None
    seed: int | None = None
    over: str | None = None
    notes: tuple[str, ...] = ()

    def parameters_for(self, name: str, names: Collection[str]) -> dict[str, Any]:
        """Keyword parameters for the tensor `name` of a checkpoint with these names; one value per model is a list.

        RecipeError where a required parameter has no value for this tensor.
        """
        return self.rules.for_tensor(name, names)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file. RecipeError if it cannot be read or is not a recipe."""
    return parse_recipe(*read_text(path))


def read_text(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The text of a recipe file, and what messages call it. RecipeError if it cannot be read."""
    source = str(path) if str(path).isprintable() else quote(str(path))
    try:
        with FilePath(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise RecipeError(f"{source}: {e.strerror or e}") from None
    try:
        # Cut short, a file that is too large may end inside a character; its size is the problem to report.
        text = content.decode("utf-8-sig", errors="replace" if len(content) > MAX_BYTES else "strict")
    except UnicodeDecodeError as e:
        raise RecipeError(f"{source}: not UTF-8 text (byte {e.start})") from None
    return text, source


def parse_recipe(text: str, source: str = "<recipe>") -> Recipe:
    """The recipe in a text. RecipeError lists all its problems with line and column."""
    document = read_document(text, source)
    return Recipe(document, validate(document))


def resolve(recipe: Recipe, method: Method | None = None) -> Resolved:
    """Decide everything that does not depend on the checkpoints; `method` stands in for the registry's.

    RecipeError lists all that does not fit the method: its models, its base, its parameters.
    """
    content = recipe.content
    problems = Problems(recipe.document.source, recipe.document.marks)
    method = method or _method(recipe, problems)
    checker = Checker(method, recipe.document.data, problems, lenient=recipe.semantics == "mergekit")
    _check_distinct(content, problems)
    if isinstance(content, NativeRecipe):
        models, base, notes = _native_models(content, method, problems)
    else:
        models, base, notes = _mergekit_models(content, method, checker)
    if method.needs_base and base is None:
        problems.add(("merge_method",), f"{method.name} needs a base_model")
    try:
        method.check_models(len(models), has_base=True)
    except UsageError as e:
        problems.add(("models",), f"{e}, not counting the base" if base is not None else str(e))
    rules = checker.rules(models)
    align = _align(content, [model for model, _ in models], base, problems) if isinstance(content, NativeRecipe) else None
    of_base = getattr(content, "base_stats", None)
    if of_base is not None and method.needs != "base and models":
        problems.add(("base_stats",), f"{method.name} reads no statistics of the base")
    problems.check()

    stats = tuple(getattr(entry, "stats", None) for entry in content.models)
    if method.needs == "base and models":
        stats = (of_base, *stats)
    return Resolved(
        method=method.name,
        semantics=recipe.semantics,
        models=tuple(model for model, _ in models),
        base=base,
        donor=content.base_model or models[0][0],
        rules=rules,
        written=_as_written(recipe.document.data),
        align=align,
        stats=stats if any(stats) else None,
        read_dtype=_dtype(content.dtype),
        out_dtype=_dtype(content.out_dtype or content.dtype),
        work_dtype=getattr(content, "work_dtype", None),
        seed=getattr(content, "seed", None),
        over=getattr(content, "over", None),
        notes=notes,
    )


def describe(resolved: Resolved) -> dict[str, Any]:
    """A summary that JSON can hold; the parameters are shown as the recipe writes them."""
    return {
        "method": resolved.method,
        "semantics": resolved.semantics,
        "models": list(resolved.models),
        "base": resolved.base,
        "align": None if resolved.align is None else asdict(resolved.align),
        "donor": resolved.donor,
        "stats": None if resolved.stats is None else list(resolved.stats),
        "read_dtype": resolved.read_dtype,
        "out_dtype": resolved.out_dtype,
        "work_dtype": resolved.work_dtype,
        "seed": resolved.seed,
        "over": resolved.over,
        **resolved.written,
        "notes": list(resolved.notes),
    }


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names. RecipeError where there is none of that name."""
    return _method(recipe, Problems(recipe.document.source, recipe.document.marks))


def _method(recipe: Recipe, problems: Problems) -> Method:
    from refmerge import registry

    name = recipe.content.merge_method
    where = ("merge_method",)
    if recipe.semantics == "mergekit":
        if ":" in name:
            problems.add(where, f"{quote(name)}: only a recipe with refmerge: 1 at its top names the tool of a method")
            raise problems.error()
        name = f"mergekit:{name}"
    try:
        return registry.get(name)
    except UsageError as e:
        problems.add(where, str(e))
        raise problems.error() from None


def _align(content: NativeRecipe, models: Sequence[str], base: str | None, problems: Problems) -> Alignment | None:
    """The alignment, if the recipe has one: a procedure whose first arguments are models and a spec."""
    from refmerge import registry

    align = content.align
    if align is None:
        return None
    try:
        signature = inspect.signature(registry.procedure(align.method).run).parameters
        if list(signature)[:2] != ["models", "spec"]:
            raise UsageError(f"{align.method} does not align models")
    except UsageError as e:
        problems.add(("align", "method"), str(e))
        return None
    known = [key for key, p in signature.items() if p.kind is p.KEYWORD_ONLY]
    given = {key: list(v) if isinstance(v, list) else v for key, v in (align.parameters or {}).items()}
    for key in given.keys() - known:
        problems.add(("align", "parameters", key), f"{align.method} has no parameter {quote(key)}{did_you_mean(key, known)}")
    everything = [*([] if base is None else [base]), *models]
    to = everything[0] if align.to is None else next((m for m in everything if _same(m, align.to)), None)
    if to is None:
        problems.add(("align", "to"), f"{quote(align.to)} is none of the models")
        return None
    return Alignment(align.method, to, align.spec, given)


def _same(a: str, b: str) -> bool:
    return os.path.normpath(a) == os.path.normpath(b)


def _check_distinct(content: MergekitRecipe | NativeRecipe, problems: Problems) -> None:
    seen: set[str] = set()
    for i, entry in enumerate(content.models):
        path = os.path.normpath(entry.model)
        if path in seen:
            problems.add(("models", i), f"model {quote(entry.model)} is listed twice")
        seen.add(path)


def _native_models(content: NativeRecipe, method: Method, problems: Problems) -> Models:
    """The models as listed. A base that is not the one thing it is declared to be is a problem."""
    base = content.base_model
    if base is not None and not method.takes_base:
        problems.add(("base_model",), f"{method.name} takes no base_model")
    for i, entry in enumerate(content.models):
        if base is not None and _same(entry.model, base):
            problems.add(("models", i), f"{quote(entry.model)} is the base_model: do not list it among models")
    return [(entry.model, i) for i, entry in enumerate(content.models)], base, ()


def _mergekit_models(content: MergekitRecipe, method: Method, checker: Checker) -> Models:
    """mergekit's reading: a listed base is the base where the method has one, and else a model like the others.

    A base that the method ignores and the recipe does not list is appended, as mergekit does.
    """
    base = content.base_model
    notes = []
    if content.chat_template is not None:
        notes.append("chat_template is not applied: the tokenizer files are copied as they are")
    models: list[tuple[str, int | None]] = []
    listed = False
    for i, entry in enumerate(content.models):
        is_base = base is not None and _same(entry.model, base)
        listed |= is_base
        if not (is_base and method.takes_base):
            models.append((entry.model, i))
        elif checker.own_settings(i):
            notes.append(f"the parameters of {quote(base)} are not used: it is the base")
    if base is not None and not method.takes_base and not listed:
        models.append((base, None))
        notes.append(f"{method.name} takes no base: {quote(base)} is merged as the last model")
    return models, base if method.takes_base else None, tuple(notes)


def _as_written(data: Mapping[str, Any]) -> dict[str, Any]:
    per_model = {entry["model"]: entry["parameters"] for entry in data["models"] if entry.get("parameters")}
    return {"parameters": data.get("parameters") or {}, "model_parameters": per_model}


def _dtype(name: str | None) -> str | None:
    return None if name is None else OUTPUTS[name.removeprefix("torch.")]
