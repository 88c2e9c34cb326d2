"""M-SMoE: the experts of a mixture merged in groups that its router scores alike, around those that it uses most."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refmerge.adapters import listed
from refmerge.errors import InputError, UsageError
from refmerge.experts import (
    SHARED,
    SLOTS,
    Mixture,
    Output,
    Rule,
    configured,
    dtype_of,
    find,
    opened,
    refused_by_others,
    routing_of,
)
from refmerge.numeric import host, scores, total
from refmerge.procedure import procedure
from refmerge.procedures.experts._units import aligned_by_activations, aligned_by_weights, permuted, zip_experts
from refmerge.sources import all_finite

__all__ = [
    "Grouped", "Merged", "aligned_by_activations", "aligned_by_weights", "assigned", "dominant_experts", "grouped",
    "groups_of", "merge_experts", "msmoe", "orders_of", "similarity_of_logits", "similarity_of_weights", "told",
    "weights_of", "zip_experts",
]  # fmt: skip

Semantics = Literal["paper", "official"]
REPORT = "refmerge_report.json"
BLOCK = 1 << 16  # entries that are added together
Read = Callable[[int, str], np.ndarray]


@dataclass(frozen=True)
class Grouped:
    """The groups of a layer's experts. labels: the group of each expert. dominant: of each group the expert that it was made
    around, the most used first. usage: the share of each expert. similarity: of each with each. merged: False for a layer
    that was to be left as it is."""

    labels: np.ndarray
    dominant: tuple[int, ...]
    usage: np.ndarray
    similarity: np.ndarray
    merged: bool = True

    def members(self, group: int) -> list[int]:
        """The experts of a group, ascending."""
        return np.flatnonzero(self.labels == group).tolist()


@dataclass(frozen=True)
class Merged:
    """model: a mapping name -> array, or the open checkpoint that was written. groups: layer -> Grouped. orders: layer ->
    expert -> the order in which its hidden units were merged, for those that were aligned."""

    model: Any
    groups: dict[str, Grouped]
    orders: dict[str, dict[int, np.ndarray]]


@procedure("msmoe", paper="arXiv:2310.01334")
def msmoe(
    model: Any,
    stats: Any,
    out: str | Path | None = None,
    *,
    groups: int,
    grouping: Literal["global", "layer"] = "global",
    layers: Sequence[str] = ("*",),
    capacity: int | None = None,
    similarity: Literal["logits", "router", "weights"] = "logits",
    align: Literal["dominant", "lowest", "first", "none"] = "dominant",
    columns: bool = True,
    weighting: Literal["usage", "equal"] = "usage",
    epsilon: float | None = None,
    write: Literal["tied", "shared", "reduced"] = "tied",
    router: Literal["mean", "dominant"] = "mean",
    semantics: Semantics = "paper",
    rule: Rule | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> Merged:
    """Merge the experts of a mixture in groups: those that the router scores alike, weighted by how often it chooses them.

    model: a path, an open checkpoint, or a mapping name -> array. stats: where its routers send tokens (refmerge.stats), a
    Statistics, a mapping or a path. out: a folder, or a file that ends in .safetensors; None for a mapping in memory.
    Experts are read and written one by one.
    """
    model = opened(model)
    mixtures = find(model, rule)
    check(mixtures, write, grouping, layers, align, weighting, router, epsilon)
    # 1. usage and similarity; 2. dominant experts; 3. groups
    found = groups_of(
        model, stats, groups=groups, grouping=grouping, layers=layers, capacity=capacity, similarity=similarity,
        semantics=semantics, rule=rule,
    )  # fmt: skip
    if epsilon is None:
        epsilon = 1e-7 if semantics == "official" else 0.0
    kept = {layer: len(g.dominant) for layer, g in found.items()}
    specs, files = layout(model, mixtures, kept, write)
    files[REPORT] = (json.dumps(told(found), indent=1) + "\n").encode()
    orders: dict[str, dict[int, np.ndarray]] = {}
    with Output(model, specs, out, files, max_shard_size=max_shard_size, overwrite=overwrite) as output:
        changed = {name for m in mixtures.values() for names in m.experts for name in names.values()}
        if write == "reduced":
            changed |= {f"{m.router}.{key}" for m in mixtures.values() for key in ("weight", "bias")}
        for name in (n for n in getattr(model, "tensors", model) if n not in changed):
            output.copy(name)
        for layer, mixture in mixtures.items():
            g, read, orders[layer] = found[layer], reader(model, mixture), {}
            for group, dominant in enumerate(g.dominant):
                members = g.members(group)
                # 4. align
                reference = {"dominant": dominant, "lowest": members[0], "first": 0, "none": None}[align]
                if reference is not None and len(members) > 1:
                    orders[layer] |= orders_of(read, mixture.rule.parts, members, reference, columns=columns)
                # 5. merge
                weights = weights_of(g.usage[members], weighting, epsilon) if g.merged else [1.0]
                slots = {"tied": members}.get(write, [group])
                for part, axis in mixture.rule.parts.items():
                    merged = merge_experts(read, part, axis, members, weights, orders[layer])
                    for slot in slots:
                        output.put(mixture.name(slot, part), merged)
                if progress is not None:
                    progress(layer, group)
            # 6. the router
            if write == "shared":
                output.put(f"{mixture.router}.{SLOTS}", g.labels.astype(np.int64))
            elif write == "reduced":
                for key in (k for k in ("weight", "bias") if f"{mixture.router}.{k}" in model):
                    name = f"{mixture.router}.{key}"
                    output.put(name, reduced(finite(host(model[name]), name), g, router, weighting))
    return Merged(output.result, found, orders)


def told(groups: Mapping[str, Grouped]) -> dict[str, Any]:
    """The groups, for programs, and for the file REPORT that lies in a folder beside the merged experts."""
    return {
        layer: {"labels": g.labels.tolist(), "dominant": list(g.dominant), "usage": g.usage.tolist(), "merged": g.merged}
        for layer, g in groups.items()
    }


def check(
    mixtures: Mapping[str, Mixture], write: str, grouping: str, layers: Sequence[str], align: str, weighting: str,
    router: str, epsilon: float | None,
) -> None:  # fmt: skip
    """UsageError for what cannot be, before a weight is read."""
    for name, value, known in (
        ("write", write, ("tied", "shared", "reduced")),
        ("align", align, ("dominant", "lowest", "first", "none")),
        ("weighting", weighting, ("usage", "equal")),
        ("router", router, ("mean", "dominant")),
    ):
        if value not in known:
            raise UsageError(f"msmoe: {name} = {value!r} is none of {', '.join(map(repr, known))}")
    if epsilon is not None and not epsilon >= 0:
        raise UsageError(f"msmoe: epsilon = {epsilon!r} is below 0")
    if shared := [m.router for m in mixtures.values() if m.shared]:
        raise UsageError(f"msmoe: scores of {listed(shared)} share experts already: msmoe_restore gives each its own first")
    if write == "reduced" and grouping != "layer":
        raise UsageError(
            "msmoe: write='reduced' wants as many experts in each layer: grouping='layer', or write='tied' for other numbers"
        )
    if write == "reduced" and (left := [m for m in mixtures if not _matches(m, layers)]):
        raise UsageError(f"msmoe: write='reduced' wants all layers merged, and layers leaves out {listed(left)}")


def _matches(layer: str, layers: Sequence[str]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in layers)


# ----------------------------------------------------------------------------------------------------------------- groups


def groups_of(
    model: Any, stats: Any, *, groups: int, grouping: str = "global", layers: Sequence[str] = ("*",),
    capacity: int | None = None, similarity: str = "logits", semantics: Semantics = "paper", rule: Rule | str | None = None,
) -> dict[str, Grouped]:  # fmt: skip
    """The groups that `msmoe` would merge, layer by layer. Experts are read only for similarity="weights"."""
    model = opened(model)
    mixtures = find(model, rule)
    if similarity not in ("logits", "router", "weights"):
        raise UsageError(f"msmoe: similarity = {similarity!r} is none of 'logits', 'router', 'weights'")
    routing = routing_of(stats, mixtures, ("routed", "logit_gram") if similarity == "logits" else ("routed",))
    # 1. usage and similarity
    usage = {layer: r["routed"] / r["routed"].sum() for layer, r in routing.items()}
    likeness = {layer: _similarity(model, m, routing[layer], similarity) for layer, m in mixtures.items()}
    how = {"groups": groups, "grouping": grouping, "layers": layers, "capacity": capacity, "semantics": semantics}
    return grouped(usage, likeness, **how)


def grouped(
    usage: Mapping[str, np.ndarray], similarity: Mapping[str, np.ndarray], *, groups: int, grouping: str = "global",
    layers: Sequence[str] = ("*",), capacity: int | None = None, semantics: Semantics = "paper",
) -> dict[str, Grouped]:  # fmt: skip
    """The groups of the experts of each layer, from their usage, which sums to 1, and similarities. Of a layer that `layers`
    leaves out each expert is a group."""
    if grouping not in ("global", "layer"):
        raise UsageError(f"msmoe: grouping = {grouping!r} is none of 'global', 'layer'")
    if semantics not in ("paper", "official"):
        raise UsageError(f"msmoe: semantics = {semantics!r} is none of 'paper', 'official'")
    most = min(map(len, usage.values()))
    if type(groups) is not int or not 1 <= groups <= most:
        raise UsageError(f"msmoe: groups = {groups!r} is no whole number in [1, {most}], the number of experts")
    if capacity is not None and (type(capacity) is not int or capacity < 1):
        raise UsageError(f"msmoe: capacity = {capacity!r} is no whole number above 0")
    by_id = semantics == "official" and grouping == "layer"
    if by_id and capacity is not None:
        raise UsageError("msmoe: the authors' code has no capacity with grouping='layer'")
    if unknown := [p for p in layers if not any(fnmatchcase(layer, p) for layer in usage)]:
        raise UsageError(f"msmoe: no layer with experts is called {listed(unknown)}; there are {listed(usage)}")
    chosen = {layer: u for layer, u in usage.items() if _matches(layer, layers)}
    # 2. dominant experts
    dominant = dominant_experts(chosen, groups, grouping, semantics)
    # 3. groups
    found = {}
    for layer, u in usage.items():
        heads = dominant.get(layer, np.argsort(-u, kind="stable").tolist())
        limit = capacity if layer in chosen else None
        labels = assigned(u, similarity[layer], heads, limit, by_id=by_id, layer=layer)
        found[layer] = Grouped(labels, tuple(heads), u, similarity[layer], layer in chosen)
    return found


def _similarity(model: Any, mixture: Mixture, routing: Mapping[str, np.ndarray], by: str) -> np.ndarray:
    if by == "logits":
        return similarity_of_logits(routing["logit_gram"])
    if by == "router":
        return similarity_of_weights([host(row) for row in host(model[f"{mixture.router}.weight"])])
    return similarity_of_weights([[model[e[part]] for part in mixture.rule.parts] for e in mixture.experts])


def similarity_of_logits(gram: np.ndarray) -> np.ndarray:
    """(cos + 1) / 2 of the columns of logits, whose inner products are `gram`; 1 with itself. The cosine with a column of
    zeros is 0."""
    norms = np.sqrt(np.diag(gram))
    lengths = np.outer(norms, norms)
    cosine = np.divide(gram, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    similarity = (np.clip(cosine, -1, 1) + 1) / 2
    np.fill_diagonal(similarity, 1.0)
    return similarity


def similarity_of_weights(experts: Sequence[Any]) -> np.ndarray:
    """The same of all weights of each expert, one tensor or a list of them."""
    vectors = [np.concatenate([scores(x).reshape(-1) for x in (e if isinstance(e, list) else [e])]) for e in experts]
    return similarity_of_logits(np.array([[float(x @ y) for y in vectors] for x in vectors]))


def dominant_experts(
    usage: Mapping[str, np.ndarray], groups: int, grouping: str = "global", semantics: Semantics = "paper"
) -> dict[str, list[int]]:
    """The dominant experts of each layer, the most used first, of equal ones the lower: `groups` of each layer, or as many
    on average over all layers, where at least one of each is."""
    order = {layer: np.argsort(-u, kind="stable") for layer, u in usage.items()}
    if grouping == "layer":
        return {layer: o[:groups].tolist() for layer, o in order.items()}
    pooled = {layer: u.copy() for layer, u in usage.items()}
    for layer, u in pooled.items():
        u[order[layer][0]] = 1.0
    wanted = groups * len(usage)
    if semantics == "official":
        ranked = np.sort(np.concatenate([*pooled.values()]))[::-1]
        threshold = ranked[wanted - 1 if wanted == len(ranked) else wanted]
        if threshold == 1.0:
            raise UsageError(
                "msmoe: so many experts have a share of 1 that no threshold is left; fewer groups, or other data"
            )
        return {layer: order[layer][: np.count_nonzero(u > threshold)].tolist() for layer, u in pooled.items()}
    # Each layer's most used expert first, then the others by their share; of equal ones the earlier layer's.
    ranks = [(rank > 0, -float(u[e]), i, rank, layer) for i, (layer, u) in enumerate(pooled.items())
             for rank, e in enumerate(order[layer])]  # fmt: skip
    kept = [layer for *_, layer in sorted(ranks)[:wanted]]
    return {layer: order[layer][: kept.count(layer)].tolist() for layer in usage}


def assigned(
    usage: np.ndarray, similarity: np.ndarray, dominant: Sequence[int], capacity: int | None = None, *, by_id: bool = False,
    layer: str = "",
) -> np.ndarray:  # fmt: skip
    """The group of each expert. Group g is that of dominant[g]; each other expert, the most used first, joins the one that
    it is most like, of equal ones the first. capacity: members of a group at most. by_id: the authors' loop by expert in
    place of rank, which passes over experts with numbers below that of groups and leaves them their own number as group."""
    order, K = np.argsort(-usage, kind="stable"), len(dominant)
    if capacity is not None and capacity * K < len(usage):
        raise UsageError(f"msmoe: {K} groups of at most {capacity} do not hold the {len(usage)} experts of {layer!r}")
    labels = np.arange(len(usage))
    labels[list(dominant)] = np.arange(K)
    room = np.full(K, len(usage) if capacity is None else capacity) - 1
    for e in range(K, len(usage)) if by_id else order[K:]:
        open_groups = np.flatnonzero(room > 0)
        labels[e] = open_groups[np.argmax(similarity[e, [dominant[g] for g in open_groups]])]
        room[labels[e]] -= 1
    return labels


# ------------------------------------------------------------------------------------------------------------------ merge


def reader(model: Any, mixture: Mixture) -> Read:
    """(expert, part) -> its array, in NumPy. InputError for NaN or infinity."""

    def read(expert: int, part: str) -> np.ndarray:
        name = mixture.experts[expert][part]
        x = model[name]
        return finite(x if isinstance(x, np.ndarray) else host(x), name)

    return read


def finite(x: np.ndarray, name: str) -> np.ndarray:
    """x itself. InputError for NaN or infinity."""
    if not all_finite(x):
        raise InputError(f"tensor {name!r} has values that are infinite or NaN")
    return x


def orders_of(
    read: Read, parts: Mapping[str, int | None], members: Sequence[int], reference: int, *, columns: bool = True
) -> dict[int, np.ndarray]:
    """The order of hidden units of each member, the reference aside, in which it fits the reference best. read: (expert,
    part) -> array. parts: as in a Rule."""
    a = {part: read(reference, part) for part in parts}
    others = [e for e in members if e != reference]
    return {e: aligned_by_weights(a, {part: read(e, part) for part in parts}, parts, columns=columns) for e in others}


def weights_of(usage: np.ndarray, weighting: str = "usage", epsilon: float = 0.0) -> list[float]:
    """What each member of a group counts: u_i / (sum u + epsilon); alike where none was ever chosen and epsilon is 0."""
    u = np.ones_like(usage) if weighting == "equal" else usage
    if not u.sum() and not epsilon:
        u = np.ones_like(usage)
    return (u / (u.sum() + epsilon)).tolist()


def merge_experts(
    read: Read, part: str, axis: int | None, members: Sequence[int], weights: Sequence[float],
    orders: Mapping[int, np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """w_1 W_1 + w_2 W_2 + ... of one part of the members, each with its hidden units, along `axis`, in its order: at least
    float32, computed in blocks that stay in cache. The very weights where there is one of weight 1."""
    if list(weights) == [1.0]:
        return read(members[0], part)
    parts = [permuted(read(e, part), axis, (orders or {}).get(e)) for e in members]
    merged = np.empty(parts[0].shape, np.result_type(np.float32, *(x.dtype for x in parts if x.dtype.kind == "f")))
    flat, whole = [np.ascontiguousarray(x).reshape(-1) for x in parts], merged.reshape(-1)
    for start in range(0, whole.size, BLOCK):
        block = slice(start, start + BLOCK)
        whole[block] = total(w * host(x[block]) for w, x in zip(weights, flat))
    return merged


def reduced(rows: np.ndarray, g: Grouped, router: str, weighting: str) -> np.ndarray:
    """A row of the router for each group: that of its dominant expert, or the mean of all, weighted as they are."""
    if router == "dominant":
        return rows[list(g.dominant)]
    members = [g.members(group) for group in range(len(g.dominant))]
    weights = [weights_of(g.usage[m], weighting) for m in members]
    return np.stack([merge_experts(lambda e, _: rows[e], "", None, m, w) for m, w in zip(members, weights)])


# ----------------------------------------------------------------------------------------------------------------- layout


def layout(
    model: Any, mixtures: Mapping[str, Mixture], kept: Mapping[str, int], write: str
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, bytes]]:
    """What is written: name -> (dtype, shape), and config.json where it changes."""
    tensors: Mapping[str, Any] = getattr(model, "tensors", model)
    specs = {name: (dtype_of(x, name), tuple(x.shape)) for name, x in tensors.items()}
    config = getattr(model, "config", None)
    if write == "tied":
        return specs, {}
    for layer, mixture in mixtures.items():
        for e, names in enumerate(mixture.experts):
            if e >= kept[layer]:
                for name in names.values():
                    del specs[name]
        if write == "shared":
            specs[f"{mixture.router}.{SLOTS}"] = ("I64", (len(mixture.experts),))
        else:
            both = [f"{mixture.router}.{key}" for key in ("weight", "bias")]
            if odd := [n for n in specs if n.startswith(f"{mixture.router}.") and n not in both]:
                raise UsageError(f"msmoe: write='reduced' knows weight and bias of a router, and there are {listed(odd)}")
            for name in (n for n in both if n in specs):
                specs[name] = (specs[name][0], (kept[layer], *specs[name][1][1:]))
    if config is None:
        return specs, {}
    if write == "shared":
        return specs, refused_by_others(config, SHARED)
    rule = next(iter(mixtures.values())).rule
    count = next(iter(kept.values()))
    if rule.count not in config:
        raise InputError(f"{model.path}: config.json says no {rule.count}, the number of experts that is to be changed")
    if count < rule.chosen_of(config):
        raise UsageError(
            f"msmoe: {rule.chosen_of(config)} experts are chosen for a token ({rule.chosen}): write='reduced' needs as many "
            f"groups, and there are {count}"
        )
    return specs, configured(config, {rule.count: count})
