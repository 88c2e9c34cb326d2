"""The contract of a merge method: a plain function whose signature declares what it needs.

Positional names are a closed vocabulary: `models` (sequence of arrays, in the caller's order), `base`, `stats`, `group`,
`rng`, `name`. `base=None`, last of them, is a base that may be left out: the method then gets None. Keyword-only arguments
are the parameters. `@method` reads that signature once into a frozen `Method`; the engine, the tests and the check of the
pages read nothing else.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from refmerge.errors import UsageError

__all__ = ["Method", "Param", "PerModel", "method", "same_as"]

VOCABULARY = ("models", "base", "stats", "group", "rng", "name")
View = Literal["flat", "rows", "tensor", "model"]
Over = str | Callable[[str], str]

T = TypeVar("T")

if TYPE_CHECKING:
    from typing import TypeAlias

    PerModel: TypeAlias = T | Sequence[T]
else:

    class PerModel:
        """`PerModel[float]`: a parameter that takes one value for all models or one per model."""

        def __class_getitem__(cls, kind):
            return _OnePerModel(kind)


@dataclass(frozen=True)
class _OnePerModel:
    kind: type

    def __call__(self):  # typing.get_type_hints accepts only callables as annotations
        raise TypeError("PerModel is an annotation")


@dataclass(frozen=True)
class Param:
    """One parameter of a method: `domain` is a closed interval or None, `per_model` says that a list is allowed."""

    name: str
    type: type
    default: Any = inspect.Parameter.empty
    per_model: bool = False
    domain: tuple[float, float] | None = None
    choices: tuple[Any, ...] | None = None
    optional: bool = False

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def check(self, value: Any, method: str) -> Any:
        """The value in the parameter's type; UsageError if it is another type or outside the domain."""
        kind: Any = self.type
        if value is None and self.optional:
            return None
        if self.type is float and (type(value) is int or isinstance(value, np.number)):
            value = float(value)
        if self.type in (int, bool) and isinstance(value, np.integer | np.bool_):
            value = value.item()
        if self.type is tuple and isinstance(value, list):
            value = tuple(value)
        if self.type is object:
            return value
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            wanted = "list" if self.type is tuple else self.type.__name__
            raise UsageError(f"{method}: {self.name} = {value!r} is not of type {wanted}")
        if self.type is float and math.isnan(value):
            raise UsageError(f"{method}: {self.name} is NaN")
        if self.domain is not None and not self.domain[0] <= value <= self.domain[1]:
            low, high = self.domain
            raise UsageError(f"{method}: {self.name} = {value!r} is outside [{low}, {high}]")
        if self.choices is not None and value not in self.choices:
            known = ", ".join(map(repr, self.choices))
            raise UsageError(f"{method}: {self.name} = {value!r} is none of {known}")
        return value


@dataclass(frozen=True)
class Method:
    """What `@method` makes of a function.

    name: registry name, `tool:name` for another tool's semantics.
    run: the function as written; calling the Method calls it.
    asks: the positional names of its signature, in order, a subset of the vocabulary.
    params: name -> Param, in the order of the signature.
    view: what must stay whole: "flat", "rows", "tensor", "model", or a function that says which: its arguments are names of
        parameters, and `ndim` for the number of the tensor's dimensions.
    over: what `group` ranges over unless the caller says otherwise: "tensor", "model", or a function name -> label.
    models: least and greatest number of models (None: no bound).
    stats: key -> "whole" | "element" | "draw": what `stats` may carry for a tensor and whether it is cut with a block.
    outputs: names of several outputs, or empty where the function returns one array.
    work: the dtype in which the method insists on computing, or None.
    widens: whether 16-bit inputs are computed in float32 even where arithmetic="native" is asked for.
    optional_base: whether the base may be left out.
    least: the dtype that results have at least where the caller asks for none, or None: that of the inputs; or a function of
        parameters, by their names, that says which.
    needs: whether statistics may be left out (""), must be given for each model ("models"), or for the base too, first
        ("base and models").
    """

    name: str
    run: Callable[..., Any]
    paper: str
    asks: tuple[str, ...]
    params: Mapping[str, Param]
    view: View | Callable[..., View] = "flat"
    over: Over = "tensor"
    models: tuple[int, int | None] = (1, None)
    stats: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    work: str | None = None
    widens: bool = False
    optional_base: bool = False
    least: str | Callable[..., str | None] | None = None
    needs: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    @property
    def takes_base(self) -> bool:
        return "base" in self.asks

    @property
    def needs_base(self) -> bool:
        return self.takes_base and not self.optional_base

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.run) or ""

    def view_for(self, params: Mapping[str, Any], ndim: int = 2) -> View:
        """The view for these bound parameters of a tensor of so many dimensions."""
        if not callable(self.view):
            return self.view
        facts = {**params, "ndim": ndim}
        return self.view(**{key: facts[key] for key in _names(self.view)})

    def least_for(self, params: Mapping[str, Any]) -> str | None:
        """`least` for these bound parameters."""
        if not callable(self.least):
            return self.least
        return self.least(**{key: params[key] for key in _names(self.least)})

    def check_models(self, count: int, has_base: bool) -> None:
        """UsageError unless `count` models, with or without a base, can be merged by this method."""
        least, most = self.models
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
            raise UsageError(f"{self.name} merges {wanted} model{'s' * (wanted != '1')}, {count} given")
        if self.needs_base and not has_base:
            raise UsageError(f"{self.name} needs a base model: give base=")

    def bind(self, given: Mapping[str, Any], count: int) -> dict[str, Any]:
        """All parameters checked and complete, those per model as tuples of `count` values. UsageError otherwise."""
        for key in given:
            if key not in self.params:
                near = difflib.get_close_matches(key, self.params, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                known = ", ".join(self.params) or "none"
                raise UsageError(f"{self.name} has no parameter {key!r}{hint} (its parameters: {known})")
        bound = {}
        for key, param in self.params.items():
            if key not in given and param.required:
                raise UsageError(f"{self.name} needs the parameter {key}")
            value = given.get(key, param.default)
            if not param.per_model:
                bound[key] = param.check(value, self.name)
                continue
            values = tuple(value) if isinstance(value, list | tuple) else (value,) * count
            if len(values) != count:
                raise UsageError(f"{self.name}: {key} has {len(values)} values for {count} models")
            bound[key] = tuple(param.check(v, self.name) for v in values)
        return bound


@functools.cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _param(p: inspect.Parameter, hint: Any, where: str) -> Param:
    per_model = isinstance(hint, _OnePerModel)
    if per_model:
        hint = hint.kind
    arms = [a for a in typing.get_args(hint) if a is not type(None)] if typing.get_origin(hint) is not Literal else []
    optional = bool(arms) and len(arms) < len(typing.get_args(hint))
    choices = None
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    elif optional:
        hint = arms[0]
    if hint is None:
        hint = type(p.default)
    if len(arms) > 1:
        hint = object  # a union: the method itself knows what to make of the value
    elif typing.get_origin(hint) is not None:
        hint = typing.get_origin(hint)
    if hint not in (float, int, bool, str, tuple, object):
        raise TypeError(
            f"{where}: parameter {p.name} needs a default or an annotation of float, int, bool, str or tuple"
        )
    return Param(p.name, hint, p.default, per_model, choices=choices, optional=optional)


def _check_declaration(
    name: str,
    params: Mapping[str, Param],
    view: View | Callable[..., View],
    over: Over,
    stats: Mapping[str, str],
    domain: Mapping[str, tuple[float, float]],
) -> None:
    """TypeError for what would otherwise be read as something else, or never be looked at."""
    if not callable(view) and view not in typing.get_args(View):
        raise TypeError(f"{name}: view {view!r} is none of {', '.join(map(repr, typing.get_args(View)))}")
    if not callable(over) and over not in ("tensor", "model"):
        raise TypeError(f"{name}: over {over!r} is none of 'tensor', 'model'")
    for key, kind in stats.items():
        if kind not in ("whole", "element", "draw"):
            raise TypeError(f"{name}: stats {key!r} is {kind!r}, none of 'whole', 'element', 'draw'")
    for key in domain:
        if key not in params:
            raise TypeError(f"{name}: domain of {key!r}, which is no parameter")


def method(
    name: str,
    *,
    paper: str,
    models: tuple[int, int | None] = (1, None),
    view: View | Callable[..., View] = "flat",
    over: Over = "tensor",
    stats: Mapping[str, str] | None = None,
    outputs: tuple[str, ...] = (),
    domain: Mapping[str, tuple[float, float]] | None = None,
    work: str | None = None,
    widens: bool = False,
    least: str | Callable[..., str | None] | None = None,
    needs: Literal["", "models", "base and models"] = "",
) -> Callable[[Callable[..., Any]], Method]:
    """Declare a merge method. TypeError where the signature is not the contract's (see the module's docstring)."""

    def wrap(fn: Callable[..., Any]) -> Method:
        hints = typing.get_type_hints(fn)
        asks, params, optional_base = [], {}, False
        for p in inspect.signature(fn).parameters.values():
            if p.kind is p.POSITIONAL_OR_KEYWORD:
                if p.name not in VOCABULARY:
                    raise TypeError(
                        f"{name}: {p.name!r} is none of {', '.join(VOCABULARY)}; parameters are keyword-only"
                    )
                if p.default is not p.empty and (p.name != "base" or p.default is not None):
                    raise TypeError(f"{name}: {p.name} = {p.default!r}: only base may have a default, None")
                optional_base |= p.default is None
                asks.append(p.name)
            elif p.kind is p.KEYWORD_ONLY:
                params[p.name] = _param(p, hints.get(p.name), name)
            else:
                raise TypeError(f"{name}: *{p.name} is not part of the contract")
        if "models" not in asks:
            raise TypeError(f"{name}: a method takes `models`")
        _check_declaration(name, params, view, over, stats or {}, domain or {})
        for key, interval in (domain or {}).items():
            params[key] = replace(params[key], domain=interval)
        return Method(
            name, fn, paper, tuple(asks), MappingProxyType(params), view=view, over=over, models=models,
            stats=MappingProxyType(dict(stats or {})), outputs=outputs, work=work, widens=widens,
            optional_base=optional_base, least=least, needs=needs,
        )  # fmt: skip

    return wrap


def same_as(ours: Method, name: str, *, source: str, **theirs: str | tuple[str, Any]) -> Method:
    """Another tool's entry for a method on which it agrees with `ours`: their parameter name = our name, or (our name,
    their default). Parameters not named are not theirs and keep our default."""
    renamed, ours_of = {}, {}
    for their, target in theirs.items():
        our, default = target if isinstance(target, tuple) else (target, ours.params[target].default)
        p = ours.params[our]
        renamed[their] = replace(p, name=their, default=default)
        ours_of[their] = our

    def run(*args: Any, **kwargs: Any) -> Any:
        fixed = {k: p.default for k, p in ours.params.items() if k not in ours_of.values()}
        if any(ours.params[k].per_model for k in fixed):
            count = len(args[ours.asks.index("models")])
            fixed = {k: (v,) * count if ours.params[k].per_model else v for k, v in fixed.items()}
        return ours.run(*args, **fixed, **{ours_of[k]: v for k, v in kwargs.items()})

    def view_for(**facts: Any) -> View:
        bound = {k: p.default for k, p in ours.params.items()} | {ours_of[k]: v for k, v in facts.items() if k in ours_of}
        return ours.view_for(bound, facts["ndim"])

    view_for.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in (*renamed, "ndim")]
    )
    view = view_for if callable(ours.view) else ours.view
    run.__doc__ = ours.doc
    run.__wrapped__ = ours.run  # type: ignore[attr-defined]
    return replace(ours, name=name, run=run, paper=source, params=MappingProxyType(renamed), view=view)
