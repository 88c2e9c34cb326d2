"""The value of a parameter for one tensor: scopes, filters, and gradients over the layers.

A setting in a recipe is a scalar, a list of scalars (a gradient), an entry `{value, filter}`, or a list of entries. Of
a list of entries the first whose filter is contained in the tensor's name counts; where none matches, the setting is
silent and the next scope is asked: the source's parameters, the slice's, the module's, the recipe's, the method's default.
A model's own parameters are looked up by the name that the tensor has in that model, shared ones by its name in the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refmerge.errors import RecipeError, UsageError
from refmerge.method import Method, Param
from refmerge.recipe.document import Path, Problems, quote
from refmerge.recipe.schema import did_you_mean

_LAYER = re.compile(r"\.(\d{1,9})\.")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def layer_index(name: str) -> int | None:
    """The first number between dots in a tensor's name: 12 for `model.layers.12.mlp.up_proj.weight`."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def layer_count(names: Iterable[str]) -> int:
    """The highest layer index among the names, plus one; 0 where no name has one."""
    return max((index + 1 for name in names if (index := layer_index(name)) is not None), default=0)


def position(name: str, layers: int) -> float:
    """Where a tensor lies in depth, from 0 to 1. The only layer of a model counts as 1, tensors outside layers as 0."""
    index = layer_index(name)
    if index is None:
        return 0.0
    return index / (layers - 1) if layers > 1 else 1.0


def interpolate(values: Sequence[Any], t: float) -> Any:
    """The gradient at depth t: linear between numbers; booleans and text change at once, at the next entry's place."""
    s = t * (len(values) - 1)
    i = math.trunc(s)
    if len(values) == 1 or not isinstance(values[0], float):
        return values[i]
    j = min(len(values) - 1, i + 1)
    f = s - i
    return (1 - f) * values[i] + f * values[j]


@dataclass(frozen=True)
class Choice:
    """One entry of a setting: a gradient (a scalar is one of length 1) for the tensors that its filter lets through."""

    values: tuple[Any, ...]
    filter: str | None = None

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name


Setting = tuple[Choice, ...]


@dataclass(frozen=True)
class Rule:
    """A parameter with its settings from the innermost scope outward; `model` is whose it is, None if it is shared."""

    key: str
    param: Param
    scopes: tuple[Setting, ...]
    model: str | None = None

    @property
    def has_gradient(self) -> bool:
        return any(len(choice.values) > 1 for setting in self.scopes for choice in setting)

    def value(self, name: str, t: float) -> Any:
        """The value for the tensor `name` at depth t. RecipeError where it is required and every scope is silent."""
        for setting in self.scopes:
            for choice in setting:
                if choice.matches(name):
                    return interpolate(choice.values, t)
        if self.param.required:
            whose = f" of {self.model}" if self.model else ""
            raise RecipeError(
                f"parameter {self.key}{whose} has no value for tensor {quote(name)}: "
                "none of its filters matches; add an entry without a filter"
            )
        return self.param.default


class Rules:
    """All parameters of a method for the models of one recipe."""

    def __init__(self, rules: Mapping[str, tuple[Rule, ...]]):
        self._rules = dict(rules)
        self._needs_depth = any(rule.has_gradient for group in rules.values() for rule in group)
        self._counted: tuple[Collection[str], int] = ((), 0)

    def for_tensor(self, name: str, names: Collection[str]) -> dict[str, Any]:
        """Keyword parameters for one of the checkpoint's names; one value per model is a list.

        RecipeError where a required parameter has no value for this tensor.
        """
        return self.at(name, position(name, self._count(names)) if self._needs_depth else 0.0)

    def at(self, name: str, t: float, inputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Keyword parameters for a tensor at depth t; `inputs` are its names in the models, where they are others."""
        found = {}
        for key, group in self._rules.items():
            per_model = group[0].param.per_model
            values = [rule.value(inputs[i] if inputs and per_model else name, t) for i, rule in enumerate(group)]
            found[key] = values if per_model else values[0]
        return found

    def _count(self, names: Collection[str]) -> int:
        """The number of layers, counted once for a checkpoint and not once for each of its tensors."""
        seen, layers = self._counted  # one assignment, so that threads see names and their count together
        if names is not seen and names != seen:
            layers = layer_count(names)
            self._counted = (names, layers)
        return layers


def recipe_key(name: str) -> str:
    """The recipe's spelling of a parameter: `lambda` for `lambda_`, which Python reserves."""
    return name.rstrip("_")


@dataclass(frozen=True)
class Checker:
    """Checks the settings of a recipe against a method's parameters; what is wrong is added to `problems`.

    data: the recipe as read. lenient: take numbers and truth values in the other spellings that mergekit takes: "1e-5",
    "yes", 1 for true.
    """

    method: Method
    data: Mapping[str, Any]
    problems: Problems
    lenient: bool

    @property
    def params(self) -> dict[str, Param]:
        return {recipe_key(name): param for name, param in self.method.params.items()}

    def rules(self, models: Sequence[tuple[str, Path | None]], outer: Sequence[Path] = ((),)) -> Rules:
        """The rules for these models: name and place of the entry in the recipe, None for one that is not in it.

        outer: the places of the scopes around the entries, from the innermost outward; () is the recipe itself.
        """
        shared = [self.settings(place, per_model=False) for place in outer]
        own = [{} if place is None else self.settings(place, per_model=True) for _, place in models]
        rules: dict[str, tuple[Rule, ...]] = {}
        for key, param in self.params.items():
            scopes = tuple(scope[key] for scope in shared if key in scope)
            if param.per_model:
                rules[param.name] = tuple(
                    Rule(key, param, ((inner[key],) if key in inner else ()) + scopes, model)
                    for (model, _), inner in zip(models, own, strict=True)
                )
            else:
                rules[param.name] = (Rule(key, param, scopes),)
            if param.required:
                self._check_given(rules[param.name], outer[0])
        return Rules(rules)

    def settings(self, place: Path, *, per_model: bool) -> dict[str, Setting]:
        """The settings of the entry at this place; those of a model where `per_model`, those of all else."""
        entry: Any = self.data
        for key in place:
            entry = entry[key]
        return self._settings(entry.get("parameters"), (*place, "parameters"), per_model)

    def _check_given(self, rules: tuple[Rule, ...], place: Path) -> None:
        for rule in rules:
            if not rule.scopes:
                whose = f" for {quote(rule.model)}" if rule.model else ""
                self.problems.add((*place, "parameters"), f"{self.method.name} needs the parameter {rule.key}{whose}")

    def _settings(self, written: Mapping[str, Any] | None, path: Path, own: bool) -> dict[str, Setting]:
        found = {}
        for key, setting in (written or {}).items():
            param = self.params.get(key)
            if param is None:
                self.check_names({key: setting}, path)
            elif own and not param.per_model:
                message = f"{key} is one value for all models: move it to the recipe's parameters"
                self.problems.add((*path, key), message)
            else:
                found[key] = tuple(self._choices(setting, (*path, key), param))
        return found

    def check_names(self, written: Mapping[str, Any], path: Path) -> None:
        """Problems for what is no parameter of the method."""
        for key in written.keys() - self.params.keys():
            hint = did_you_mean(str(key), self.params)
            self.problems.add((*path, key), f"{self.method.name} has no parameter {quote(key)}{hint}")

    def _choices(self, written: Any, path: Path, param: Param) -> Iterator[Choice]:
        if isinstance(written, list) and any(isinstance(v, dict) for v in written):
            for i, entry in enumerate(written):
                yield from self._choices(entry, (*path, i), param)
        elif isinstance(written, dict):
            yield Choice(self._values(written["value"], (*path, "value"), param), written.get("filter"))
        else:
            yield Choice(self._values(written, path, param))

    def _values(self, written: Any, path: Path, param: Param) -> tuple[Any, ...]:
        if not isinstance(written, list) or param.type in (tuple, object):
            return (self._value(written, path, param),)
        if param.type is int and len(written) > 1:
            self.problems.add(path, f"{recipe_key(param.name)} is a whole number and cannot change over the layers")
        return tuple(self._value(value, (*path, i), param) for i, value in enumerate(written))

    def _value(self, written: Any, path: Path, param: Param) -> Any:
        try:
            return param.check(_coerce(written, param) if self.lenient else written, self.method.name)
        except UsageError as e:
            self.problems.add(path, str(e).replace(param.name, recipe_key(param.name)))
            return None


def _coerce(value: Any, param: Param) -> Any:
    """The value in the parameter's type where it is another spelling of one; unchanged where it is not."""
    if param.type is bool:
        if isinstance(value, str):
            return _WORDS.get(value.lower(), value)
        return bool(value) if value in (0, 1) else value
    if param.type not in (int, float) or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        if not math.isfinite(number):
            return value
        value = number
    if param.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
