"""How mergekit-evolve 0.1.5 (mergekit/evo/genome.py) makes a recipe of a genotype (layer groups, models, filters + 1,
parameters), for whoever brings one from there. Its slices are for mergekit: refmerge merges whole models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refmerge.errors import UsageError

PARAMETERS = {
    "linear": ["weight"],
    "task_arithmetic": ["weight"],
    "ties": ["weight", "density"],
    "dare_ties": ["weight", "density"],
    "slerp": ["t"],
}


def initial(definition: Mapping[str, Any], layers: int) -> np.ndarray:
    """Where its search starts: 1/N for the first parameter, 1 for the second."""
    step = definition.get("layer_granularity", 0)
    groups = layers // step if step > 0 else 1
    keys = PARAMETERS[definition["merge_method"]]
    start = np.ones((groups, len(definition["models"]), len(definition.get("filters") or []) + 1, len(keys)), np.float32)
    start[..., 0] = 1 / len(definition["models"])
    return start


def recipe(definition: Mapping[str, Any], layers: int, genotype: np.ndarray) -> dict[str, Any]:
    """mergekit's recipe of that genotype, as data."""
    method, models, base = definition["merge_method"], definition["models"], definition.get("base_model")
    g = np.asarray(genotype, np.float32).reshape(initial(definition, layers).shape)
    step = layers // len(g)
    outside = [] if base is None or base in models else [base]
    data: dict[str, Any] = {} if base is None else {"base_model": base}
    if method == "slerp":
        data["slices"] = [on_arc(models, group[:, 0, 0], i * step, (i + 1) * step, outside) for i, group in enumerate(g)]
    else:
        values = {}
        for k, key in enumerate(PARAMETERS[method]):
            x = g[..., k] if key == "weight" and definition.get("allow_negative_weights") else abs(g[..., k])
            values[key] = np.minimum(x, 1) if key == "density" else x
        filters = [*(definition.get("filters") or []), None]
        if definition.get("smooth"):
            data["models"] = [
                {"model": m, "parameters": {k: settings(v[:, i], filters) for k, v in values.items()}}
                for i, m in enumerate(models)
            ] + [{"model": m} for m in outside]
        else:
            data["slices"] = []
            for j in range(len(g)):
                place = {"layer_range": [j * step, (j + 1) * step]}
                sources = [
                    {**place, "model": m, "parameters": {k: settings(v[j : j + 1, i], filters) for k, v in values.items()}}
                    for i, m in enumerate(models)
                ]
                data["slices"].append({"sources": sources + [{**place, "model": m} for m in outside]})
    normalize = definition.get("normalize")
    normalize = method in ("ties", "dare_ties", "linear") if normalize is None else normalize
    return data | {
        "dtype": "bfloat16",
        "merge_method": method,
        "parameters": {"int8_mask": True, "normalize": normalize},
    }


def settings(values: np.ndarray, filters: Sequence[str | None]) -> Any:
    """(groups, filters) numbers as mergekit writes them: lists over groups, entries for filters."""
    runs = [[float(x) for x in values[:, f]] for f in range(len(filters))]
    plain = [run[0] if len(run) == 1 else run for run in runs]
    return (
        plain[0]
        if len(filters) == 1
        else [{"value": x} | ({} if f is None else {"filter": f}) for f, x in zip(filters, plain)]
    )


def on_arc(models: Sequence[str], genes: np.ndarray, first: int, last: int, outside: Sequence[str]) -> dict[str, Any]:
    """A slice of slerp: of the two models with the largest genes, from the larger one, to at most the middle."""
    if len(models) < 2:
        raise UsageError("slerp is searched between two models at least")
    a, b = np.argsort(-genes, kind="stable")[:2]
    t = 1 / (1 + np.exp(genes[a] - genes[b]))
    sources = [{"layer_range": [first, last], "model": m} for m in (models[a], models[b], *outside)]
    return {"base_model": models[a], "parameters": {"t": float(t)}, "sources": sources}
