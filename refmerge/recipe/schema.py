"""The closed schema of a recipe: every key is known, or the recipe is refused with all its problems at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from refmerge.checkpoint.dtypes import OUTPUTS
from refmerge.recipe.document import Document, Path, Problems, quote

_SETTING = "a number, true or false, text, a list of these, or entries with value and filter"
_UNSUPPORTED = {
    "slices": "slices is not supported yet: only whole models can be merged, listed under models",
    "modules": "modules is not supported yet: only whole models can be merged, listed under models",
    "tokenizer": "tokenizer is not supported yet: vocabularies are not realigned, and the tokenizer files are copied "
    "from base_model or else from the first model; leave the key out if that is what you want",
    "tokenizer_source": "tokenizer_source is not supported yet: vocabularies are not realigned, and the tokenizer "
    "files are copied from base_model or else from the first model; leave the key out if that is what you want",
}


def _form(value: Any) -> str:
    if isinstance(value, dict | Condition):
        return "condition"
    if isinstance(value, list):
        return "conditions" if any(isinstance(v, dict | Condition) for v in value) else "gradient"
    return "scalar"


def _model_path(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("a model given as a mapping is not supported yet: give its path")
    if isinstance(value, str) and "@" in value:
        raise ValueError(f"{quote(value)}: path@revision is not supported yet")
    return value


def _version(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError(f"refmerge: {quote(value)} is not a version of the recipe format: only 1 is")
    return value


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
ModelPath = Annotated[str, BeforeValidator(_model_path), Field(min_length=1)]
DType = Literal[
    "bfloat16", "float16", "float32", "float64", "torch.bfloat16", "torch.float16", "torch.float32", "torch.float64"
]
Template = Literal["auto", "alpaca", "chatml", "exaone", "llama3", "mistral"]


class ModelEntry(_Closed):
    """One model and the parameters that are its own."""

    model: ModelPath
    parameters: Parameters | None = None


class NativeModelEntry(ModelEntry):
    """One model of a native recipe; `stats` is the path of a safetensors file with its statistics."""

    stats: Annotated[str, Field(min_length=1)] | None = None


class Align(_Closed):
    """What brings the models' units into one order before they are merged."""

    method: Annotated[str, Field(min_length=1, description="A procedure of models and a spec, such as git_rebasin")]
    spec: Literal["mlp", "vgg", "resnet", "vit", "gpt2", "llama"] | None = Field(
        None, description="The architecture, where the names of tensors do not tell"
    )
    to: ModelPath | None = Field(None, description="The model that stays: base_model or else the first one if absent")
    parameters: dict[str, Value] | None = None


class MergekitRecipe(_Closed):
    """A recipe in mergekit's YAML, with mergekit's semantics."""

    merge_method: Annotated[str, Field(min_length=1)]
    models: Annotated[list[ModelEntry], Field(min_length=1)]
    base_model: ModelPath | None = None
    parameters: Parameters | None = None
    dtype: DType | None = None
    out_dtype: DType | None = None
    chat_template: Template | None = None


class NativeRecipe(_Closed):
    """A native recipe: the papers' semantics, or another tool's for a method named `tool:method`."""

    refmerge: Annotated[Literal[1], BeforeValidator(_version)]
    merge_method: Annotated[str, Field(min_length=1)]
    models: Annotated[list[NativeModelEntry], Field(min_length=1)]
    base_model: ModelPath | None = None
    base_stats: Annotated[str, Field(min_length=1)] | None = None
    align: Align | None = None
    parameters: Parameters | None = None
    dtype: DType | None = None
    out_dtype: DType | None = None
    work_dtype: Literal["float32", "float64"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    over: Literal["tensor", "model"] | None = None


def validate(document: Document) -> MergekitRecipe | NativeRecipe:
    """The recipe in a document. RecipeError lists everything that the schema refuses."""
    problems = Problems(document.source, document.marks)
    data = document.data
    if not isinstance(data, dict):
        problems.add((), "a recipe is a mapping with the keys merge_method and models")
        raise problems.error()
    if "experts" in data and "merge_method" not in data:
        problems.add(("experts",), "a recipe with experts is no merge: only refmerge merge and refmerge plan take it")
        raise problems.error()
    kind = NativeRecipe if "refmerge" in data else MergekitRecipe
    for key in _UNSUPPORTED.keys() & data.keys():
        problems.add((key,), _UNSUPPORTED[key])
    whole = not {"slices", "modules"} & data.keys()
    try:
        recipe = kind.model_validate({k: v for k, v in data.items() if k not in _UNSUPPORTED})
    except ValidationError as e:
        for error in e.errors(include_url=False):
            if error["loc"] != ("models",) or error["type"] != "missing" or whole:
                path = place_of(error["loc"], data)
                problems.add(path, _message(error, path, kind))
        raise problems.error() from None
    problems.check()
    return recipe


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
        case _ if path == ("chat_template",) and isinstance(given, str):
            return f"a chat_template other than {', '.join(get_args(Template))} is not supported yet"
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
        fields = Align.model_fields
    elif "parameters" in path:
        fields = Condition.model_fields
    elif path[0] == "models":
        fields = (NativeModelEntry if kind is NativeRecipe else ModelEntry).model_fields
    else:
        fields = kind.model_fields
    if key == "chat_template":
        return "chat_template is not supported yet"
    if kind is MergekitRecipe and key in (*NativeRecipe.model_fields, "stats"):
        return f"{quote(key)} belongs to native recipes, which have refmerge: 1 at the top and the papers' semantics"
    return f"unknown key {quote(key)}{did_you_mean(str(key), fields)}"
