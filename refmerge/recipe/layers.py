"""Where a tensor stands in a network, found from its name: in which module, in which layer, or before or after all layers.

No architecture is known here, so none is unknown. What the rules below cannot tell, a recipe says: `layers` is how the names
of layers begin, a module's `prefix` how those of its tensors do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refmerge.errors import InputError

__all__ = ["Place", "count_keys", "find_layers", "in_modules", "is_first", "place_of"]

_LAYER = re.compile(r"(.*?\.)(\d{1,9})(\..*)")
# What computes the input of the first layer; all else outside of layers comes after the last one.
_FIRST = re.compile(
    r"embed(?!_out)|embd|wte|wpe|shared\.|rotary|relative_pe|conv[12]\.|patch_|ln_pre|layernorm_pre|pre_layernorm"
)
_REST = ("default", "text_decoder", "decoder")  # modules that have the tensors which are in no other one
_PREFIXES = {
    "vision_tower": ("vision_tower.", "vision_model.", "visual.", "model.vision_tower.", "model.visual."),
    "vision_model": ("vision_model.", "vision_tower.", "model.vision_model."),
    "multi_modal_projector": (
        "multi_modal_projector.", "model.multi_modal_projector.", "visual.merger.", "model.visual.merger.",
        "model.visual.deepstack_merger_list.",
    ),
}  # fmt: skip
_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers",
    "depth",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A tensor in a layer: what stands before the layer's number, the number, and what stands after it."""

    stack: str
    layer: int
    rest: str

    def moved(self, layer: int) -> str:
        """Its name in another layer."""
        return f"{self.stack}{layer}{self.rest}"


def place_of(name: str, patterns: Sequence[str] | None = None) -> Place | None:
    """Where a tensor stands, None outside of layers: the layer is the first number between dots, or the one at {} in a
    pattern with which the name begins."""
    if patterns is None:
        found = _LAYER.fullmatch(name)
        return Place(found[1], int(found[2]), found[3]) if found else None
    for pattern in patterns:
        before, _, after = pattern.partition("{}")
        found = re.fullmatch(f"({re.escape(before)})(\\d{{1,9}})({re.escape(after)}.*)", name)
        if found:
            return Place(found[1], int(found[2]), found[3])
    return None


def find_layers(
    names: Collection[str], patterns: Sequence[str] | None, config: Mapping[str, Any] | None, label: str
) -> dict[str, Place]:
    """The tensors in the layers that slices are cut from. InputError where a model has none, or several stacks of them."""
    places = {name: place for name in names if (place := place_of(name, patterns)) is not None}
    stacks: dict[str, set[int]] = {}
    for place in places.values():
        stacks.setdefault(place.stack, set()).add(place.layer)
    if not stacks:
        raise InputError(f"{label}: no tensor's name has the number of a layer; `layers: PATTERN` says where it stands")
    if len(stacks) > 1:
        counts = {value for _, value in count_keys(config or {})}
        likely = [stack for stack, layers in stacks.items() if max(layers) + 1 in counts]
        if len(likely) != 1:
            listed = ", ".join(f"{stack}{{}} ({max(layers) + 1})" for stack, layers in sorted(stacks.items()))
            raise InputError(
                f"{label}: has layers in several places: {listed}; say in the recipe which are meant, `layers: PATTERN`, "
                "or give each a module of its own"
            )
        places = {name: place for name, place in places.items() if place.stack == likely[0]}
    return places


def is_first(name: str) -> bool:
    """Whether a tensor outside of layers comes before the first one: an embedding, say."""
    return _FIRST.search(name) is not None


def in_modules(names: Iterable[str], modules: Mapping[str, Sequence[str] | None], label: str) -> dict[str, set[str]]:
    """Module -> the names of its tensors; modules: their prefixes, None for those that the module's name has.

    InputError for tensors that are in none: no tensor is left out silently.
    """
    if list(modules) == ["default"]:
        return {"default": set(names)}
    known = {m: tuple(p or _PREFIXES.get(m, (f"{m}.", f"model.{m}."))) for m, p in modules.items()}
    rest = next((m for m in _REST if m in modules and modules[m] is None), None)
    found: dict[str, set[str]] = {m: set() for m in modules}
    lost = []
    for name in sorted(names):
        # The longest prefix is the one that says most: visual.merger. before visual.
        fits = [(len(p), m) for m, prefixes in known.items() for p in prefixes if name.startswith(p)]
        module = max(fits)[1] if fits else rest
        if module is None:
            lost.append(name)
        else:
            found[module].add(name)
    if lost:
        raise InputError(
            f"{label}: {len(lost)} tensors are in none of the modules {', '.join(modules)}, {lost[0]!r} for one; "
            "a module's `prefix` says how the names of its tensors begin"
        )
    return found


def count_keys(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], int]]:
    """Where a config.json says how many layers there are: path of keys, number."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from count_keys(value, (*path, key))
        elif key in _COUNTS and type(value) is int:
            yield (*path, key), value
