"""Recipes of mixtures of experts: mergekit-moe's YAML, which has experts where others have models.

With `refmerge: 1` at the top the keys `seed` and `hidden_states` are known too, and paths are relative to the folder of the
recipe.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from refmerge.checkpoint import hub
from refmerge.errors import UsageError
from refmerge.recipe.document import Document, Problems, quote, read_documents
from refmerge.recipe.plan import read_text
from refmerge.recipe.schema import DType, ModelPath, did_you_mean, place_of

if TYPE_CHECKING:
    from refmerge.procedures.experts.moe_from_dense import Expert, Mixture

__all__ = ["MoeRecipe", "is_mixture", "prepare_moe"]

NATIVE = ("refmerge", "seed", "hidden_states")
_KINDS = {"string_type": "text", "list_type": "a list", "int_type": "a whole number", "float_type": "a number"}


def _number(value: Any) -> Any:
    return float(value) if type(value) is int else value


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


Prompt = Annotated[str, Field(min_length=1)]
Number = Annotated[float, BeforeValidator(_number)]


class MoeExpert(_Closed):
    """A model whose MLPs become experts."""

    source_model: ModelPath
    positive_prompts: list[Prompt] | None = None
    negative_prompts: list[Prompt] | None = None
    noise_scale: Number | None = None
    residual_scale: Number | None = None


class MoeRecipe(_Closed):
    """A mixture of experts made of dense models."""

    base_model: ModelPath
    experts: Annotated[list[MoeExpert], Field(min_length=1)]
    shared_experts: list[MoeExpert] | None = None
    gate_mode: Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"] = "hidden"
    experts_per_token: int = 2
    dtype: DType | None = None
    architecture: str | None = None
    refmerge: Literal[1] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    hidden_states: Annotated[str, Field(min_length=1)] | None = None


def is_mixture(data: Any) -> bool:
    """Whether a document is a recipe of a mixture: it has experts, and no merge method."""
    return isinstance(data, dict) and "experts" in data and "merge_method" not in data


def prepare_moe(
    recipe: str | os.PathLike[str], *, seed: int | None = None, download: bool = False, **options: Any
) -> Mixture | None:
    """Check a recipe of a mixture and the checkpoints that it names, without reading a weight; None for other recipes.

    seed goes before the recipe's own. download: fetch models of the Hub that are not in its cache. options: of
    `prepare_recipe`; UsageError for one that is set: weights are copied.
    """
    text, source = read_text(recipe)
    document, *others = read_documents(text, source)
    if others or not is_mixture(document.data):
        return None
    from refmerge.procedures.experts.moe_from_dense import Expert, prepare

    content = validate(document)
    unset = {"nonfinite": "error", "integers": "equal", "missing": "error", "allow_pickle": False, "figures": False}
    for key, value in options.items():
        if value != unset.get(key):
            raise UsageError(f"{key} = {value!r}: a mixture of experts copies weights, and computes none; leave it out")
    folder = Path(recipe).parent if content.refmerge else Path()

    def place(path: str) -> Path:
        return hub.find(path, folder, download=download)

    def expert(entry: MoeExpert) -> Expert:
        scales = {k: v for k in ("noise_scale", "residual_scale") if (v := getattr(entry, k)) is not None}
        prompts = (tuple(entry.positive_prompts or ()), tuple(entry.negative_prompts or ()))
        return Expert(place(entry.source_model), *prompts, **scales)

    return prepare(
        place(content.base_model), [expert(e) for e in content.experts], gate_mode=content.gate_mode,
        hidden_states=None if content.hidden_states is None else place(content.hidden_states),
        experts_per_token=content.experts_per_token, shared_experts=[expert(e) for e in content.shared_experts or ()],
        architecture=content.architecture, dtype=content.dtype, seed=content.seed or 0 if seed is None else seed,
    )  # fmt: skip


def validate(document: Document) -> MoeRecipe:
    """The recipe in a document. RecipeError lists everything that the schema refuses."""
    problems = Problems(document.source, document.marks)
    data = document.data
    if "refmerge" not in data:
        for key in (key for key in NATIVE if key in data):
            problems.add((key,), f"{quote(key)} belongs to native recipes, which have refmerge: 1 at the top")
    try:
        content = MoeRecipe.model_validate(data)
    except ValidationError as e:
        for error in e.errors(include_url=False):
            path = place_of(error["loc"], data)
            problems.add(path, _message(error, path))
        raise problems.error() from None
    problems.check()
    return content


def _message(error: Any, path: tuple[Any, ...]) -> str:
    key = next((quote(p) for p in reversed(path) if isinstance(p, str)), "the recipe")
    match error["type"]:
        case "extra_forbidden":
            fields = MoeExpert if len(path) > 2 else MoeRecipe
            return f"unknown key {key}{did_you_mean(str(path[-1]), fields.model_fields)}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "too_short" | "string_too_short":
            return f"{key} is empty"
        case "literal_error":
            return f"{key} is {error['ctx']['expected']}, not {quote(error['input'])}"
        case "model_type":
            return f"an entry of {key} must be a mapping with source_model"
        case kind:
            wanted = _KINDS.get(kind)
            return f"{key} must be {wanted}, not {quote(error['input'])}" if wanted else f"{key}: {error['msg']}"
