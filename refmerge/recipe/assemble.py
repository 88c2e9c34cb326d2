"""Slices and modules of a recipe -> which tensor of the result is merged from which tensors, with which parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from refmerge.checkpoint import Checkpoint
from refmerge.errors import InputError
from refmerge.recipe.layers import Place, count_keys, find_layers, in_modules, is_first, place_of
from refmerge.recipe.plan import Module, Piece, Resolved, Slice
from refmerge.sources import ByteSource, StitchedSource

__all__ = ["Segment", "assemble", "layer_config", "tied_heads"]

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass
class Segment:
    """Tensors of the result that are merged from equally many models.

    models, base: name in the result -> the source and the name there. params: name -> keyword parameters.
    """

    models: list[dict[str, tuple[ByteSource, str]]]
    base: dict[str, tuple[ByteSource, str]] | None
    params: dict[str, dict[str, Any]] = field(default_factory=dict)

    def parameters_for(self, name: str, names: Collection[str]) -> dict[str, Any]:
        return self.params[name]

    def sources(self) -> tuple[list[StitchedSource], StitchedSource | None]:
        return [StitchedSource(m) for m in self.models], None if self.base is None else StitchedSource(self.base)


def assemble(
    resolved: Resolved,
    checkpoints: Mapping[str, Checkpoint],
    source_of: Callable[[str, str, Slice], ByteSource],
    tied: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Segment]:
    """The result's tensors, in segments of as many models each.

    checkpoints: model as the recipe writes it -> its checkpoint. source_of: (model, name of a tensor, slice) -> where that
    model's values of it are read. tied: model -> a tensor that it does not store -> the one that it is. InputError where a
    model has not the layers or the modules that the recipe names.
    """
    segments: dict[tuple[int, bool], Segment] = {}
    for module, parts in _modules(resolved, checkpoints).items():
        for s, name, spot in _spots(resolved, module, parts, checkpoints):
            key = (len(s.pieces), s.base is not None)
            if key not in segments:
                segments[key] = Segment([{} for _ in s.pieces], None if s.base is None else {})
            segment = segments[key]
            tables = [*segment.models, *([] if segment.base is None else [segment.base])]
            for table, piece, theirs in zip(tables, s.everything, spot.names):
                if theirs in parts[piece.model]:
                    table[name] = source_of(piece.model, theirs, s), theirs
                elif twin := (tied or {}).get(piece.model, {}).get(theirs):
                    table[name] = source_of(piece.model, twin, s), twin
            segment.params[name] = s.rules.at(name, spot.t, spot.names[: len(s.pieces)])
    return list(segments.values())


def tied_heads(checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[str, str]]:
    """Model -> the head that others store and it does not -> its embedding, to which its config says that it is tied."""
    heads = {name for c in checkpoints.values() for name in c.tensors if name.endswith("lm_head.weight")}
    found: dict[str, dict[str, str]] = {}
    for model, c in checkpoints.items():
        embeddings = [name for name in c.tensors if name.endswith(_EMBEDDINGS)]
        if len(embeddings) == 1 and (c.config or {}).get("tie_word_embeddings", True) is not False:
            found |= {model: dict.fromkeys(heads - c.tensors.keys(), embeddings[0])}
    return {model: names for model, names in found.items() if names}


def layer_config(
    resolved: Resolved, checkpoints: Mapping[str, Checkpoint], donor: Checkpoint
) -> tuple[dict[str, Any] | None, list[str]]:
    """The donor's config with the number of layers of the result, and lists with an entry for each layer put together from
    the first sources' configs; and notes of what could not be said. None where the layers are the donor's."""
    config, notes = donor.config, []
    if config is None:
        return None, []
    new: dict[str, Any] = _copy(config)
    parts = _modules(resolved, checkpoints)
    for module, names in parts.items():
        if module.whole:
            continue
        counts = {}
        for s in module.slices:
            for piece in s.everything:
                counts[piece.model] = _count(_layers_of(resolved, piece.model, names, checkpoints))
        made = [(s.everything[0].model, s.everything[0].start + i) for s in module.slices for i in range(_length(s))]
        of_donor = next((c for m, c in counts.items() if checkpoints[m] is donor), None)
        keys = [path for path, n in count_keys(config) if n == (of_donor or next(iter(counts.values())))]
        keys = _keys_of(module, keys)
        if not keys:
            notes.append(f"config.json: no key says how many layers {module.name} has; {len(made)} is not written there")
        for path in keys:
            _put(new, path, len(made))
        for path, value in list(_lists(config)):
            if path[:-1] not in [key[:-1] for key in keys] or len(value) != of_donor:
                continue
            found = [_get(checkpoints[m].config, path) for m, _ in made]
            fit = [isinstance(x, list) and len(x) == counts[m] for x, (m, _) in zip(found, made)]
            if all(fit):
                _put(new, path, [x[i] for x, (_, i) in zip(found, made)])
            else:
                notes.append(f"config.json: {'.'.join(path)} has an entry for each layer, and not in all models: unchanged")
    return (new if new != config else None), notes


# -------------------------------------------------------------------------------------------------------------- where


@dataclass(frozen=True)
class _Spot:
    """Depth within the slice, and the tensor's names in the slice's pieces, the base's last."""

    t: float
    names: tuple[str, ...]


def _modules(resolved: Resolved, checkpoints: Mapping[str, Checkpoint]) -> dict[Module, dict[str, set[str]]]:
    """Module -> model -> the names of its tensors there."""
    prefixes = {m.name: m.prefix for m in resolved.modules}
    models = dict.fromkeys(p.model for m in resolved.modules for s in m.slices for p in s.everything)
    found = {model: in_modules(checkpoints[model].tensors, prefixes, str(checkpoints[model].path)) for model in models}
    return {
        module: {p.model: found[p.model][module.name] for s in module.slices for p in s.everything}
        for module in resolved.modules
    }


def _spots(
    resolved: Resolved, module: Module, names: Mapping[str, set[str]], checkpoints: Mapping[str, Checkpoint]
) -> Iterator[tuple[Slice, str, _Spot]]:
    """Slice, name in the result, and spot of every tensor of a module."""
    if module.whole:
        yield from _whole(resolved, module.slices[0], names)
        return
    layers = {model: _layers_of(resolved, model, names, checkpoints) for model in names}
    for s in module.slices:
        for piece in s.everything:
            _check_range(piece, _count(layers[piece.model]), checkpoints)
    first, last = module.slices[0], module.after or module.slices[-1]
    for s, wanted in ((first, True), (last, False)):
        outside = sorted({n for p in s.everything for n in names[p.model] if n not in layers[p.model]})
        for name in outside:
            if is_first(name) == wanted:
                yield s, name, _Spot(0.0, (name,) * len(s.everything))
    layer = 0
    for s in module.slices:
        length = _length(s)
        for i in range(length):
            t = i / (length - 1) if length > 1 else 1.0
            templates = dict.fromkeys(
                Place(p.stack, 0, p.rest)
                for piece in s.everything
                for p in layers[piece.model].values()
                if p.layer == piece.start + i
            )
            for template in templates:
                theirs = tuple(template.moved(piece.start + i) for piece in s.everything)
                yield s, template.moved(layer), _Spot(t, theirs)
            layer += 1


def _whole(resolved: Resolved, s: Slice, names: Mapping[str, set[str]]) -> Iterator[tuple[Slice, str, _Spot]]:
    """Tensors of whole models, which keep their names."""
    everything = sorted(set().union(*(names[p.model] for p in s.everything)))
    places = {name: place_of(name, resolved.layers) for name in everything}
    counts: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            counts[place.stack] = max(counts.get(place.stack, 0), place.layer + 1)
    for name, place in places.items():
        if place is None:
            t = 0.0
        else:
            t = place.layer / (counts[place.stack] - 1) if counts[place.stack] > 1 else 1.0
        yield s, name, _Spot(t, (name,) * len(s.everything))


def _layers_of(
    resolved: Resolved, model: str, names: Mapping[str, set[str]], checkpoints: Mapping[str, Checkpoint]
) -> dict[str, Place]:
    checkpoint = checkpoints[model]
    return find_layers(names[model], resolved.layers, checkpoint.config, str(checkpoint.path))


def _count(layers: Mapping[str, Place]) -> int:
    return max(place.layer for place in layers.values()) + 1


def _length(s: Slice) -> int:
    stop = s.everything[0].stop
    assert stop is not None
    return stop - s.everything[0].start


def _check_range(piece: Piece, count: int, checkpoints: Mapping[str, Checkpoint]) -> None:
    if piece.stop is not None and piece.stop > count:
        where = checkpoints[piece.model].path
        raise InputError(f"{where}: layer_range [{piece.start}, {piece.stop}] of a model that has {count} layers")


# ------------------------------------------------------------------------------------------------------------- config


def _keys_of(module: Module, keys: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of the keys with the right number those that speak of this module."""
    if module.name == "default":
        return keys
    word = {"vision_tower": "vision", "vision_model": "vision", "text_decoder": "text"}.get(module.name, module.name)
    named = [key for key in keys if any(word in part for part in key)]
    if module.name in ("text_decoder", "encoder"):  # for which keys speak that name no part
        named += [key for key in keys if len(key) == 1 and not any(w in key[0] for w in ("encoder", "decoder", "vision"))]
    return named


def _lists(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _lists(value, (*path, key))
        elif isinstance(value, list) and "layer" in key:
            yield (*path, key), value


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in config.items()}


def _get(config: Mapping[str, Any] | None, path: tuple[str, ...]) -> Any:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value
