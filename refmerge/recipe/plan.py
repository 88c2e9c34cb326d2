"""Recipe -> what is merged: method, models in order, base, dtypes, and the parameters of every tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal

from refmerge.checkpoint.dtypes import OUTPUTS
from refmerge.errors import RecipeError, UsageError
from refmerge.method import Method
from refmerge.recipe.alignment import Alignment, alignment
from refmerge.recipe.document import MAX_BYTES, Document, Path, Problems, quote, read_document, read_documents
from refmerge.recipe.parameters import Checker, Rules
from refmerge.recipe.references import plain
from refmerge.recipe.schema import MergekitRecipe, ModuleEntry, NativeRecipe, SliceEntry, Tokenizer, did_you_mean, validate

Semantics = Literal["mergekit", "refmerge"]
Entry = tuple[str, Path | None]  # a model, and where its entry stands in the recipe; None for one that is not in it
# The models without the base, the base, and what the user should know.
Models = tuple[list[Entry], str | None, tuple[str, ...]]


@dataclass(frozen=True)
class Recipe:
    """A recipe that its schema accepts; `document` remembers where each part stands in the text. text: of the whole file."""

    document: Document
    content: MergekitRecipe | NativeRecipe
    text: str = ""

    @property
    def semantics(self) -> Semantics:
        return "refmerge" if isinstance(self.content, NativeRecipe) else "mergekit"


@dataclass(frozen=True)
class Piece:
    """Layers [start, stop) of a model; all of them where `stop` is None."""

    model: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Slice:
    """Layers of the result. pieces: those that are merged, without the base's. base_model: as the recipe declares it, also
    where the method has no base."""

    pieces: tuple[Piece, ...]
    base: Piece | None
    rules: Rules = field(repr=False, compare=False)
    base_model: str | None = None

    @property
    def everything(self) -> tuple[Piece, ...]:
        return (*self.pieces, *([] if self.base is None else [self.base]))


@dataclass(frozen=True)
class Module:
    """A part of the network: slices one upon the other. `whole`: of models as they are, whose layers keep their numbers.
    `after`: who is merged after the last layer, where that is not the last slice's sources."""

    name: str
    slices: tuple[Slice, ...]
    prefix: tuple[str, ...] | None = None
    whole: bool = False
    after: Slice | None = None


@dataclass(frozen=True)
class Resolved:
    """Everything that a recipe says, decided.

    method: registry name. models: paths as written, in order, without the base. stats: a path or None for each model,
    before them the base's where the method reads that too.
    modules: what the result is made of, where it is not simply the models. layers: patterns of the names of layers.
    vocabulary: globs of the tensors with a row for each token. tokenizer: what their rows are to be, as the recipe has it;
    None where they are merged as they are, which `rows_as_they_are` says is wanted. base_model: as declared, whether the
    method has a base or not. rows_from: whose row each token's is, once the models were looked at.
    align: what is done to models and base before. donor: the model whose config and tokenizer files the output gets.
    components: of pipelines, component -> the model from which it is taken as it is, or None to leave it out.
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
    name: str | None = None
    modules: tuple[Module, ...] = ()
    layers: tuple[str, ...] | None = None
    vocabulary: tuple[str, ...] | None = None
    tokenizer: Tokenizer | None = None
    rows_as_they_are: bool = False
    base_model: str | None = None
    rows_from: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    chat_template: str | None = None
    align: Alignment | None = None
    components: Mapping[str, str | None] | None = None
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
    """Read the recipe in a file. RecipeError if it cannot be read or is not one recipe."""
    return parse_recipe(*read_text(path))


def load_recipes(path: str | os.PathLike[str]) -> list[Recipe]:
    """Read the recipes in a file, in an order in which they can be run: the last one makes the result, those before it have
    names by which others call them. RecipeError as of `load_recipe`, and where they cannot be brought into such an order."""
    text, source = read_text(path)
    return parse_recipes(text, source)


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
    return _valid(read_document(text, source), text)


def _valid(document: Document, text: str) -> Recipe:
    content = validate(document, _also_wrong)
    return Recipe(replace(document, data=plain(document.data)), content, text)


def parse_recipes(text: str, source: str = "<recipe>") -> list[Recipe]:
    """As `load_recipes`, of a text."""
    documents = read_documents(text, source)
    recipes = _all_or_errors([partial(_valid, d, text) for d in documents])
    if len(recipes) == 1:
        return recipes
    by_name: dict[str, Recipe] = {}
    unnamed = [r for r in recipes if r.content.name is None]
    for recipe in recipes:
        name = recipe.content.name
        problems = Problems(source, recipe.document.marks)
        if name in by_name:
            problems.add(("name",), f"another merge is named {quote(name)}")
        elif name is not None and (name in (".", "..") or any(c in name for c in "/\\")):
            problems.add(("name",), f"{quote(name)} is no name of a merge: it has to be one of a folder, too")
        elif name is None and recipe is not unnamed[0]:
            problems.add((), "two merges without a name: the one that makes the result has none, all others are named")
        problems.check()
        if name is not None:
            by_name[name] = recipe
    uses = {id(r): [name for name in by_name if name in _models_of(r.content)] for r in recipes}
    final = unnamed[0] if unnamed else None
    if final is None:
        used = {name for names in uses.values() for name in names}
        ends = [r for r in recipes if r.content.name not in used]
        if len(ends) != 1:
            raise RecipeError(f"{source}: all merges have names, and not one of them makes the result: leave out its name")
        final = ends[0]
    return _ordered(final, by_name, uses, source, recipes)


def _ordered(
    final: Recipe, by_name: Mapping[str, Recipe], uses: Mapping[int, list[str]], source: str, recipes: Sequence[Recipe]
) -> list[Recipe]:
    """The recipes in an order in which they can be run. RecipeError for a circle, and for one that nothing leads to."""
    order: list[Recipe] = []
    open_: list[Recipe] = []

    def visit(recipe: Recipe) -> None:
        if any(r is recipe for r in order):
            return
        if any(r is recipe for r in open_):
            names = " -> ".join(str(r.content.name) for r in [*open_, recipe])
            raise RecipeError(f"{source}: merges that wait for each other: {names}")
        open_.append(recipe)
        for name in uses[id(recipe)]:
            visit(by_name[name])
        order.append(open_.pop())

    visit(final)
    for recipe in recipes:
        if not any(r is recipe for r in order):
            problems = Problems(source, recipe.document.marks)
            problems.add(("name",), f"{quote(recipe.content.name)} is used by no other merge")
            raise problems.error()
    return order


def _all_or_errors(makers: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of them makes. RecipeError with all their problems, where there are some."""
    made, errors = [], []
    for make in makers:
        try:
            made.append(make())
        except RecipeError as e:
            errors.append(e)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RecipeError("\n".join(map(str, errors)))
    return made


def resolve_all(recipes: Sequence[Recipe], method: Method | None = None) -> list[Resolved]:
    """Each recipe decided; `method` stands in for the last one's. RecipeError with the problems of all."""
    return _all_or_errors([partial(resolve, r, method if r is recipes[-1] else None) for r in recipes])


def _models_of(content: MergekitRecipe | NativeRecipe) -> set[str]:
    """All models that a recipe names."""
    found: set[str | None] = {content.base_model, content.tokenizer_source}
    found |= {entry.model for entry in content.models or ()}
    found |= {*(getattr(content, "components", None) or {}).values()}
    modules = [*(content.modules or {}).values(), ModuleEntry(slices=content.slices, prefix=None)]
    for module in modules:
        found |= {entry.model for entry in module.models or ()}
        for s in module.slices or ():
            found |= {s.base_model, *(source.model for source in s.sources)}
    if content.tokenizer is not None:
        found.add(content.tokenizer.source)
    return {model for model in found if model is not None}


def resolve(recipe: Recipe, method: Method | None = None) -> Resolved:
    """Decide everything that does not depend on the checkpoints; `method` stands in for the registry's.

    RecipeError lists all that does not fit the method: its models, its base, its parameters.
    """
    content = recipe.content
    problems = Problems(recipe.document.source, recipe.document.marks)
    method = method or _method(recipe, problems)
    checker = Checker(method, recipe.document.data, problems, lenient=recipe.semantics == "mergekit")
    reader = _Reader(content, method, problems, checker)
    modules, rules = reader.modules(), Rules({})
    everything: list[str] = []
    if content.models is not None:
        models, base = reader.models(content.models, ("models",))
        rules = checker.rules(models)
        everything = [model for model, _ in models]
        if needs_places(content):
            modules = (Module("default", (Slice(*pieces(everything, base), rules, content.base_model),), whole=True),)
    else:
        base = content.base_model if method.takes_base else None
        pieces_of = [p.model for m in modules for s in m.slices for p in s.pieces]
        everything = list(dict.fromkeys(pieces_of))
    align = alignment(getattr(content, "align", None), everything, base, problems)
    if align is not None and modules:
        problems.add(("align",), "align is for whole models, listed under models, without tokenizer or layers")
    of_base = getattr(content, "base_stats", None)
    if of_base is not None and method.needs != "base and models":
        problems.add(("base_stats",), f"{method.name} reads no statistics of the base")
    problems.check()

    stats = tuple(getattr(entry, "stats", None) for entry in content.models or ())
    if method.needs == "base and models":
        stats = (of_base, *stats)
    if any(stats) and modules:
        problems.add(("models",), "stats go with whole models, without tokenizer or layers")
        problems.check()
    tokenizer = _tokenizer(content)
    return Resolved(
        method=method.name,
        semantics=recipe.semantics,
        models=tuple(everything),
        base=base,
        donor=content.base_model or everything[0],
        rules=rules,
        written=_as_written(recipe.document.data),
        name=content.name,
        modules=modules,
        layers=None if content.layers is None else tuple(content.layers),
        vocabulary=None if content.vocabulary is None else tuple(content.vocabulary),
        tokenizer=tokenizer,
        rows_as_they_are=_tokenizer(content) is None and (content.tokenizer or content.tokenizer_source) is not None,
        base_model=content.base_model,
        chat_template=content.chat_template,
        align=align,
        components=getattr(content, "components", None),
        stats=stats if any(stats) else None,
        read_dtype=_dtype(content.dtype),
        out_dtype=_dtype(content.out_dtype or content.dtype),
        work_dtype=getattr(content, "work_dtype", None),
        seed=getattr(content, "seed", None),
        over=getattr(content, "over", None),
        notes=tuple(dict.fromkeys(reader.notes)),
    )


def needs_places(content: MergekitRecipe | NativeRecipe) -> bool:
    """Whether whole models are merged by what is known of the places of their tensors, and not name by name alone."""
    return content.layers is not None or _tokenizer(content) is not None


def _tokenizer(content: MergekitRecipe | NativeRecipe) -> Tokenizer | None:
    """What the recipe says of the vocabulary; None where rows are merged as they are."""
    tokenizer = content.tokenizer
    if content.tokenizer_source is not None:
        tokenizer = Tokenizer(source=content.tokenizer_source)
    rows = isinstance(content, NativeRecipe) and tokenizer is not None and tokenizer.source == "rows"
    return None if rows else tokenizer


def pieces(models: Sequence[str], base: str | None) -> tuple[tuple[Piece, ...], Piece | None]:
    """Whole models and a whole base as pieces."""
    return tuple(map(Piece, models)), None if base is None else Piece(base)


def describe(resolved: Resolved) -> dict[str, Any]:
    """A summary that JSON can hold; the parameters are shown as the recipe writes them."""
    return {
        "method": resolved.method,
        "semantics": resolved.semantics,
        "models": list(resolved.models),
        "base": resolved.base,
        "align": None if resolved.align is None else asdict(resolved.align),
        "components": None if resolved.components is None else dict(resolved.components),
        "donor": resolved.donor,
        "tokenizer": None if resolved.tokenizer is None else resolved.tokenizer.model_dump(exclude_none=True),
        "chat_template": resolved.chat_template,
        "vocabulary": resolved.rows_from,
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
    found = _named(recipe.content.merge_method, recipe.semantics, problems)
    if found is None:
        raise problems.error()
    return found


def _named(name: str, semantics: Semantics, problems: Problems) -> Method | None:
    """The method of that name. A problem, and None, where there is none."""
    from refmerge import registry

    if semantics == "mergekit" and ":" in name:
        message = f"{quote(name)}: only a recipe with refmerge: 1 at its top names the tool of a method"
        problems.add(("merge_method",), message)
        return None
    try:
        return registry.get(f"mergekit:{name}" if semantics == "mergekit" else name)
    except UsageError as e:
        message = str(e)
    theirs = [n.removeprefix("mergekit:") for n in registry.names() if n.startswith("mergekit:")]
    if semantics == "mergekit" and name not in theirs:
        ours = f"; a recipe with refmerge: 1 at its top has {name}" if name in registry.names() else ""
        message = f"mergekit has no method {quote(name)}{did_you_mean(name, theirs)}{ours}"
    problems.add(("merge_method",), message)
    return None


def _also_wrong(data: Mapping[str, Any], problems: Problems) -> None:
    """What can be said of a recipe that its schema refuses: no such method, or no such parameter of it."""
    name = data.get("merge_method")
    method = _named(name, "refmerge" if "refmerge" in data else "mergekit", problems) if isinstance(name, str) else None
    if method is not None:
        checker = Checker(method, data, problems, lenient=True)
        for place, written in _parameters(data, ()):
            checker.check_names(written, place)


def _parameters(data: Any, place: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """All mappings of a method's parameters in a recipe, and where they stand."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if key == "parameters" and isinstance(value, dict):
            yield (*place, key), value
        elif place or key in ("models", "slices", "modules"):
            yield from _parameters(value, (*place, key))


def _same(a: str, b: str) -> bool:
    return os.path.normpath(a) == os.path.normpath(b)


@dataclass
class _Reader:
    """Who is merged with whom, in each part of a recipe."""

    content: MergekitRecipe | NativeRecipe
    method: Method
    problems: Problems
    checker: Checker
    notes: list[str] = field(default_factory=list)

    def models(self, entries: Sequence[Any], place: Path) -> tuple[list[Entry], str | None]:
        """Whole models, and the base. A base that is not the one thing it is declared to be is a problem."""
        self._check_distinct([entry.model for entry in entries], place)
        base, native = self.content.base_model, isinstance(self.content, NativeRecipe)
        if native and base is not None and not self.method.takes_base:
            self.problems.add(("base_model",), f"{self.method.name} takes no base_model")
        models: list[Entry] = []
        listed = False
        for i, entry in enumerate(entries):
            is_base = base is not None and _same(entry.model, base)
            listed |= is_base
            if native and is_base:
                message = f"{quote(entry.model)} is the base_model: do not list it among models"
                self.problems.add((*place, i), message)
            if not (is_base and self.method.takes_base):
                models.append((entry.model, (*place, i)))
            elif self.checker.settings((*place, i), per_model=True):
                self.notes.append(f"the parameters of {quote(base)} are not used: it is the base")
        if not native and base is not None and not self.method.takes_base and not listed:
            # As mergekit does with a base that the method ignores and the recipe does not list.
            models.append((base, None))
            self.notes.append(f"{self.method.name} takes no base: {quote(base)} is merged as the last model")
        base = base if self.method.takes_base else None
        if self.method.needs_base and base is None:
            self.problems.add(("merge_method",), f"{self.method.name} needs a base_model")
        self._check_count(len(models), base, place)
        return models, base

    def modules(self) -> tuple[Module, ...]:
        """The modules of a recipe that has some, or slices."""
        content = self.content
        if content.slices is not None:
            return (self._stacked("default", content.slices, ("slices",), [()]),)
        return tuple(self._module(name, entry, ("modules", name)) for name, entry in (content.modules or {}).items())

    def _module(self, name: str, entry: ModuleEntry, place: Path) -> Module:
        prefix = None if entry.prefix is None else tuple(entry.prefix)
        if entry.slices is not None:
            return self._stacked(name, entry.slices, (*place, "slices"), [place, ()], prefix)
        models, base = self.models(entry.models or (), (*place, "models"))
        rules = self.checker.rules(models, [place, ()])
        whole = Slice(*pieces([m for m, _ in models], base), rules, self.content.base_model)
        return Module(name, (whole,), prefix, whole=True)

    def _stacked(
        self, name: str, entries: Sequence[SliceEntry], place: Path, outer: Sequence[Path],
        prefix: tuple[str, ...] | None = None,
    ) -> Module:  # fmt: skip
        slices = tuple(self._slice(entry, (*place, i), outer) for i, entry in enumerate(entries))
        first, last = entries[0], entries[-1]
        count, after = len(first.sources), None
        if isinstance(self.content, MergekitRecipe) and len(last.sources) > count:
            # mergekit pairs the last slice's models with as many names as the first slice has models.
            after = self._slice(last.model_copy(update={"sources": last.sources[:count]}), (*place, len(entries) - 1), outer)
            self.notes.append(
                f"after the last layer only the first {count} sources of the last slice are merged, as many as the first "
                "slice has, as mergekit has it; with refmerge: 1 at the top all of them are"
            )
        return Module(name, slices, prefix, after=after)

    def _slice(self, entry: SliceEntry, place: Path, outer: Sequence[Path]) -> Slice:
        self._check_distinct([source.model for source in entry.sources], (*place, "sources"))
        if entry.residual_weight is not None:
            self.notes.append("residual_weight has no effect")
        base_model = entry.base_model or self.content.base_model
        base, models, found = None, [], []
        for i, source in enumerate(entry.sources):
            piece = Piece(source.model, *source.layer_range)
            if self.method.takes_base and base_model is not None and _same(source.model, base_model):
                base = piece
                if self.checker.settings((*place, "sources", i), per_model=True):
                    self.notes.append(f"the parameters of {quote(source.model)} are not used: it is the base")
            else:
                found.append(piece)
                models.append((source.model, (*place, "sources", i)))
            first = entry.sources[0].layer_range
            if piece.stop - piece.start != first[1] - first[0]:  # type: ignore[operator]
                message = f"all sources of a slice have as many layers: {source.layer_range} is not as long as {first}"
                self.problems.add((*place, "sources", i, "layer_range"), message)
        if self.method.needs_base and base_model is None:
            self.problems.add(("merge_method",), f"{self.method.name} needs a base_model")
        elif self.method.needs_base and base is None:
            whose = f"the base, {quote(base_model)},"
            message = f"{self.method.name} needs the layers of {whose} among the sources of each slice"
            self.problems.add((*place, "sources"), message)
        self._check_count(len(models), base_model if base is not None else None, (*place, "sources"))
        return Slice(tuple(found), base, self.checker.rules(models, [place, *outer]), base_model)

    def _check_distinct(self, models: Sequence[str], place: Path) -> None:
        seen: set[str] = set()
        for i, model in enumerate(models):
            path = os.path.normpath(model)
            if path in seen:
                self.problems.add((*place, i), f"model {quote(model)} is listed twice")
            seen.add(path)

    def _check_count(self, count: int, base: str | None, place: Path) -> None:
        try:
            self.method.check_models(count, has_base=True)
        except UsageError as e:
            self.problems.add(place, f"{e}, not counting the base" if base is not None else str(e))


def _as_written(data: Mapping[str, Any]) -> dict[str, Any]:
    per_model = {entry["model"]: entry["parameters"] for entry in data.get("models") or () if entry.get("parameters")}
    made_of = {key: data[key] for key in ("slices", "modules", "layers") if data.get(key) is not None}
    return {"parameters": data.get("parameters") or {}, "model_parameters": per_model, **made_of}


def _dtype(name: str | None) -> str | None:
    return None if name is None else OUTPUTS[name.removeprefix("torch.")]
