"""Models that a recipe writes as mappings, as text: `{model: {path, revision}, lora: {path, revision}}` is mergekit's other
way of writing `path@revision+path@revision`, for programs that write recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refmerge.recipe.document import quote

__all__ = ["plain", "text_of"]

_PLACES = ("model", "base_model", "source_model", "tokenizer_source", "source", "to")
_NAMED = ("tokens", "modules")  # mappings whose keys are names that the recipe gives


def text_of(model: Any) -> Any:
    """A model that is a mapping as text; all else as it is. ValueError says what the mapping may hold."""
    if not isinstance(model, Mapping):
        return model
    for key in model:
        if key == "override_architecture":
            raise ValueError("override_architecture has no place here: tensors are merged by their names, leave it out")
        if key in ("path", "revision"):
            raise ValueError(f"{key} belongs one level deeper: {{model: {{path: ..., revision: ...}}, lora: ...}}")
        if key not in ("model", "lora"):
            raise ValueError(f"a model given as a mapping has the keys model and lora, and not {quote(key)}")
    if "model" not in model:
        raise ValueError("a model given as a mapping needs the key model: a path, or {path, revision}")
    parts = [_part(key, model[key]) for key in ("model", "lora") if model.get(key) is not None or key == "model"]
    return "+".join(parts)


def _part(key: str, value: Any) -> str:
    """`path@revision`."""
    if isinstance(value, Mapping):
        for inner, given in value.items():
            if inner not in ("path", "revision"):
                raise ValueError(f"{key} of a model given as a mapping has path and revision, and not {quote(inner)}")
            if not isinstance(given, str) and (inner == "path" or given is not None):
                raise ValueError(f"{inner} of {key} must be text, not {quote(given)}")
        if not value.get("path"):
            raise ValueError(f"{key} of a model given as a mapping needs a path")
        return "@".join(filter(None, (value["path"], value.get("revision"))))
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} of a model given as a mapping is a path, or {{path, revision}}, not {quote(value)}")
    return value


def plain(data: Any) -> Any:
    """The data of a recipe that its schema accepts, with every model as text."""
    if isinstance(data, list):
        return [plain(entry) for entry in data]
    if not isinstance(data, dict):
        return data
    found = {}
    for key, value in data.items():
        if key in _PLACES and isinstance(value, dict) and "kind" not in value:
            found[key] = text_of(value)
        elif key in _NAMED and isinstance(value, dict):
            found[key] = {name: plain(entry) for name, entry in value.items()}
        else:
            found[key] = value if key == "parameters" else plain(value)
    return found
