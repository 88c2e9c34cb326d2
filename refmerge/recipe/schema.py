"""The closed schema of a recipe: every key is known, or the recipe is refused with all its problems at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from refmerge.checkpoint.dtypes import OUTPUTS
from refmerge.recipe.document import Document, Path, Problems, quote
from refmerge.recipe.references import text_of

_SETTING = "a number, true or false, text, a list of these, or entries with value and filter"
_CONTENTS = ("models", "slices", "modules")


def _form(value: Any) -> str:
    if isinstance(value, dict | Condition):
        return "condition"
    if isinstance(value, list):
        return "conditions" if any(isinstance(v, dict | Condition) for v in value) else "gradient"
    return "scalar"


def _version(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError(f"refmerge: {quote(value)} is not a version of the recipe format: only 1 is")
    return value


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


Scalar = bool | int | float | str
Gradient = Annotated[list[Scalar], Field(min_length=1, description="Values spread evenly over the layers")]
Value = Annotated[Annotated[Scalar, Tag("scalar")] | Annotated[Gradient, Tag("gradient")], Discriminator(_form)]


class Condition(_Closed):
    """A value for the tensors whose name contains `filter`; for all tensors where that is absent or `*`."""

    value: Value
    filter: str | None = None


Setting = Annotated[
    Annotated[Scalar, Tag("scalar")]
    | Annotated[Gradient, Tag("gradient")]
    | Annotated[Condition, Tag("condition")]
    | Annotated[list[Condition], Tag("conditions")],
    Discriminator(_form),
]
Parameters = dict[str, Setting]
_PART = {"anyOf": [
    {"type": "string", "minLength": 1},
    {"type": "object", "properties": {"path": {"type": "string"}, "revision": {"type": ["string", "null"]}},
     "required": ["path"], "additionalProperties": False},
]}  # fmt: skip
_MODEL = {"anyOf": [
    {"type": "string", "minLength": 1, "description": "path@revision+adapter"},
    {"type": "object", "properties": {"model": _PART, "lora": {"anyOf": [*_PART["anyOf"], {"type": "null"}]}},
     "required": ["model"], "additionalProperties": False},
]}  # fmt: skip
ModelPath = Annotated[str, BeforeValidator(text_of), Field(min_length=1), WithJsonSchema(_MODEL)]
DType = Literal[
    "bfloat16", "float16", "float32", "float64", "torch.bfloat16", "torch.float16", "torch.float32", "torch.float64"
]


def _layer_pattern(value: Any) -> Any:
    if isinstance(value, str) and value.count("{}") != 1:
        raise ValueError(f"layers: {quote(value)} needs {{}} once, where the number of the layer stands")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _range(value: Any) -> Any:
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and 0 <= v < 1 << 31 for v in value):
        raise ValueError(f"layer_range is [first, one after the last], not {quote(value)}")
    if value[0] >= value[1]:
        raise ValueError(f"layer_range {quote(value)} has no layers: its end is one after the last")
    return value


def _row(value: Any) -> Any:
    a_model = isinstance(value, dict) and "model" in value and not {"kind", "token", "token_id"} & value.keys()
    if isinstance(value, dict) and not a_model and value.get("kind") not in ("zero", "model_token"):
        raise ValueError("the source of a token is a model, {kind: zero}, or {kind: model_token, model: ..., token: ...}")
    return value


class ModelEntry(_Closed):
    """One model and the parameters that are its own."""

    model: ModelPath
    parameters: Parameters | None = None


class SourceEntry(_Closed):
    """The layers [start, end) of one model."""

    model: ModelPath
    layer_range: Annotated[list[int], BeforeValidator(_range)]
    parameters: Parameters | None = None


class SliceEntry(_Closed):
    """Layers of the result: those of its sources, merged with each other. `residual_weight` has no effect in mergekit."""

    sources: Annotated[list[SourceEntry], Field(min_length=1)]
    base_model: ModelPath | None = None
    residual_weight: float | int | None = None
    parameters: Parameters | None = None


class ModuleEntry(_Closed):
    """A part of the network with layers of its own: whole models, or slices."""

    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    parameters: Parameters | None = None
    prefix: Annotated[list[str], BeforeValidator(_listed)] | None = Field(
        None, description="How the names of its tensors begin, where its name does not say"
    )


class ZeroRow(_Closed):
    """A row of zeros."""

    kind: Literal["zero"]


class TokenRow(_Closed):
    """The row of one of a model's tokens, by the token or by its number."""

    kind: Literal["model_token"]
    model: ModelPath
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None


def _row_form(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", "path")
    return kind if kind in ("zero", "model_token") else "path"


class TokenEntry(_Closed):
    """Where the row of a token comes from in models that lack it, or in all with `force`."""

    source: (
        Annotated[
            Annotated[ZeroRow, Tag("zero")] | Annotated[TokenRow, Tag("model_token")] | Annotated[ModelPath, Tag("path")],
            Discriminator(_row_form),
            BeforeValidator(_row),
        ]
        | None
    ) = None
    force: bool = False


class Tokenizer(_Closed):
    """The vocabulary of the result; `source` is union, base, rows or a model."""

    source: ModelPath = "union"
    tokens: dict[str, TokenEntry] | None = None
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class NativeModelEntry(ModelEntry):
    """One model of a native recipe; `stats` is the path of a safetensors file with its statistics."""

    stats: Annotated[str, Field(min_length=1)] | None = None


class Architecture(_Closed):
    """A known architecture, and what of it the names and shapes of tensors and config.json do not tell; or, of another one,
    the axes of all tensors (refmerge.symmetry.axes)."""

    architecture: Literal["mlp", "vgg", "resnet", "vit", "gpt2", "llama"] | None = None
    heads: Annotated[int, Field(ge=1)] | None = None
    groups: Annotated[int, Field(ge=1, description="Heads of keys and values")] | None = None
    layers: Annotated[list[str], Field(min_length=1, description="Of an mlp, in their order")] | None = None
    axes: Annotated[
        dict[str, list[Any] | None], Field(min_length=1, description="Tensor, with {l} for a number -> what moves each axis")
    ] | None = None


def _architecture(value: Any) -> Any:
    return {"architecture": value} if isinstance(value, str) else value


class Align(_Closed):
    """What brings the models' units into one order before they are merged."""

    method: Annotated[str, Field(min_length=1, description="A procedure of models and a spec, such as git_rebasin")]
    spec: Annotated[Architecture | None, BeforeValidator(_architecture, json_schema_input_type=str | Architecture)] = Field(
        None, description="The architecture, where the names of tensors do not tell"
    )
    to: ModelPath | None = Field(None, description="The model that stays: base_model or else the first one if absent")
    parameters: dict[str, Value] | None = None


class _Recipe(_Closed):
    """What both kinds of recipes have: exactly one of models, slices and modules, and how vocabularies are brought together.

    name: what other documents of the file call this merge. layers: how names of tensors in layers begin, with {} for the
    number of the layer. vocabulary: globs of the tensors that have a row for each token.
    """

    merge_method: Annotated[str, Field(min_length=1)]
    models: Annotated[list[ModelEntry], Field(min_length=1)] | None = None
    base_model: ModelPath | None = None
    slices: Annotated[list[SliceEntry], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, ModuleEntry], Field(min_length=1)] | None = None
    parameters: Parameters | None = None
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer_source: ModelPath | None = None
    tokenizer: Tokenizer | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1)] | None = None
    layers: Annotated[list[Annotated[str, BeforeValidator(_layer_pattern)]], BeforeValidator(_listed)] | None = None
    vocabulary: list[str] | None = None


class MergekitRecipe(_Recipe):
    """A recipe in mergekit's YAML, with mergekit's semantics."""


class NativeRecipe(_Recipe):
    """A native recipe: the papers' semantics, or another tool's for a method named `tool:method`. components: of pipelines,
    component -> the model from which it is taken as it is, or null to leave it out."""

    refmerge: Annotated[Literal[1], BeforeValidator(_version)]
    models: Annotated[list[NativeModelEntry], Field(min_length=1)] | None = None  # type: ignore[assignment]
    base_stats: Annotated[str, Field(min_length=1)] | None = None
    align: Align | None = None
    components: Annotated[dict[str, ModelPath | None], Field(min_length=1)] | None = None
    work_dtype: Literal["float32", "float64"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    over: Literal["tensor", "model"] | None = None


def validate(
    document: Document, more: Callable[[Mapping[str, Any], Problems], None] | None = None
) -> MergekitRecipe | NativeRecipe:
    """The recipe in a document. RecipeError lists everything that the schema refuses, and what `more` finds in one."""
    problems = Problems(document.source, document.marks)
    data = document.data
    if not isinstance(data, dict):
        problems.add((), "a recipe is a mapping with the keys merge_method and models")
        raise problems.error()
    if "experts" in data and "merge_method" not in data:
        problems.add(("experts",), "a recipe with experts is no merge: only refmerge merge and refmerge plan take it")
        raise problems.error()
    kind = NativeRecipe if "refmerge" in data else MergekitRecipe
    _check_contents(data, problems)
    try:
        recipe: Any = kind.model_validate(data)
    except ValidationError as e:
        for error in e.errors(include_url=False):
            path = place_of(error["loc"], data)
            problems.add(path, _message(error, path, kind))
        recipe = None
    if recipe is None or problems.found:
        if more is not None:
            more(data, problems)
        raise problems.error()
    return recipe


def _check_contents(data: dict[str, Any], problems: Problems) -> None:
    """Exactly one of models, slices and modules; one of models and slices in a module; one instruction for tokenizers."""
    given = [key for key in _CONTENTS if data.get(key) is not None]
    if not given:
        problems.add((), "'models' is missing (or slices, or modules)")
    for key in given[1:]:
        problems.add((key,), f"a recipe has one of models, slices and modules: {given[0]} is there already")
    modules = data.get("modules")
    for name, module in modules.items() if isinstance(modules, dict) else ():
        if isinstance(module, dict) and (module.get("models") is None) == (module.get("slices") is None):
            problems.add(("modules", name), f"module {quote(name)} needs models or slices, and not both")
    if data.get("tokenizer") is not None and data.get("tokenizer_source") is not None:
        problems.add(("tokenizer_source",), "tokenizer and tokenizer_source exclude each other")
    tokenizer = data.get("tokenizer")
    tokens = tokenizer.get("tokens") if isinstance(tokenizer, dict) else None
    for token, entry in tokens.items() if isinstance(tokens, dict) else ():
        source = entry.get("source") if isinstance(entry, dict) else None
        if not isinstance(source, dict) or source.get("kind") != "model_token":
            continue
        if ("token" in source) == ("token_id" in source):
            problems.add(("tokenizer", "tokens", token, "source"), "model_token wants one of token and token_id")


def schema_json() -> dict[str, Any]:
    """The JSON Schema of recipes."""
    return TypeAdapter(NativeRecipe | MergekitRecipe).json_schema()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What follows the mention of a word that is not known: a suggestion if one is near, and what there is."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"{f'; did you mean {near[0]!r}?' if near else ''} (known here: {', '.join(known) or 'none'})"


def place_of(loc: tuple[Any, ...], data: Any) -> Path:
    """Where in the text an error lies: pydantic's location without the names of the union branches it tried."""
    path: list[Any] = []
    for i, part in enumerate(loc):
        if isinstance(data, dict) and (part in data or i == len(loc) - 1):
            path.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            path.append(part)
            data = data[part]
    return tuple(path)


def _message(error: Any, path: Path, kind: type[BaseModel]) -> str:
    key = next((quote(p) for p in reversed(path) if isinstance(p, str)), "the recipe")
    given = error["input"]
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(path, kind)
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "too_short" | "string_too_short":
            return f"{key} is empty"
        case _ if path[:1] == ("refmerge",):
            return f"refmerge: {quote(given)} is not a version of the recipe format: only 1 is"
        case _ if path[-1:] in (("dtype",), ("out_dtype",)):
            return f"{key} is one of {', '.join(OUTPUTS)}, not {quote(given)}"
        case "literal_error":
            return f"{key} is {error['ctx']['expected']}, not {quote(given)}"
        case "greater_than_equal" | "less_than":
            return f"{key} is out of range: {quote(given)}"
        case "string_type":
            if "parameters" not in path or path[-1] == "filter":
                return f"{key} must be text, not {quote(given)}"
        case "int_type":
            if "parameters" not in path:
                return f"{key} must be a whole number, not {quote(given)}"
        case "list_type":
            return f"{key} must be a list, not {quote(given)}"
        case "model_type" | "dict_type":
            if path[-1] == "parameters" or "parameters" not in path:
                what = f"an entry of {key}" if isinstance(path[-1], int) else key
                return f"{what} must be a mapping"
    setting = _SETTING if path[0] != "align" else "a number, true or false, text, or a list of these"
    return f"{key} must be {setting}, not {quote(given)}"


def _unknown_key(path: Path, kind: type[BaseModel]) -> str:
    key = path[-1]
    if path[0] == "align":
        fields = (Architecture if path[1:2] == ("spec",) else Align).model_fields
    elif "parameters" in path:
        fields = Condition.model_fields
    elif path[0] == "tokenizer":
        fields = (Tokenizer, TokenEntry, TokenRow)[len(path) // 2 - 1 if len(path) < 5 else 2].model_fields
    elif "sources" in path:
        fields = SourceEntry.model_fields
    elif "slices" in path:
        fields = SliceEntry.model_fields
    elif "models" in path:
        fields = (NativeModelEntry if kind is NativeRecipe and path[0] == "models" else ModelEntry).model_fields
    elif path[0] == "modules":
        fields = ModuleEntry.model_fields
    else:
        fields = kind.model_fields
    if kind is MergekitRecipe and key in (NativeRecipe.model_fields.keys() - MergekitRecipe.model_fields.keys() | {"stats"}):
        return f"{quote(key)} belongs to native recipes, which have refmerge: 1 at the top and the papers' semantics"
    return f"unknown key {quote(key)}{did_you_mean(str(key), fields)}"
