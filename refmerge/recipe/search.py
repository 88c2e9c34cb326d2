"""A search that starts from a recipe: `refmerge search`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refmerge.checkpoint import hub
from refmerge.errors import RecipeError, UsageError
from refmerge.recipe.plan import Resolved, load_recipe, method_of, resolve
from refmerge.registry import get, procedure
from refmerge.scoring import Score

__all__ = ["search"]

OF_ALL = ("backend", "dtype", "threads", "max_memory", "nonfinite", "integers", "missing", "overwrite")


def search(
    recipe: str | os.PathLike[str], out: str | os.PathLike[str], score: Score, *, greedy: bool = False,
    seed: int | None = None, names: Sequence[str] | None = None, download: bool = False, allow_pickle: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """Search for the merge of a recipe's models that scores best, and write it to `out`.

    Without `greedy` by evolutionary_merge, over the parameters `names`, or those of weight, density and t that the method
    has and the recipe does not give; what it gives is fixed. With `greedy` by greedy_soup of the models, averaged by the
    recipe's method. download: fetch models of the Hub that are not in its cache. options: theirs. Gives what they give.
    RecipeError for a recipe that says more than a search takes.
    """
    loaded = load_recipe(recipe)
    method = method_of(loaded)
    # What a recipe must say, a search may look for.
    open_ones = {k: replace(p, default=1.0) if p.required and p.type is float else p for k, p in method.params.items()}
    resolved = resolve(loaded, replace(method, params=MappingProxyType(open_ones)))
    fixed = given(resolved, os.fspath(recipe))
    folder = Path(recipe).parent if resolved.semantics == "refmerge" else Path()

    def place(path: str) -> str:
        return str(hub.find(path, folder, download=download).absolute())

    models = [place(m) for m in resolved.models]
    base = None if resolved.base is None else place(resolved.base)
    shared: dict[str, Any] = {key: options.pop(key) for key in OF_ALL if options.get(key) is not None}
    shared |= {"allow_pickle": True} if allow_pickle else {}
    shared |= {"over": resolved.over, "out_dtype": resolved.out_dtype}
    shared["dtype"] = shared.get("dtype") or resolved.work_dtype
    if resolved.stats is not None:
        shared["stats"] = [None if s is None else place(s) for s in resolved.stats]
    if greedy:
        if shared.pop("stats", None):
            raise UsageError("a greedy soup averages some of the models, and these have stats: use another search")
        base_too = {} if base is None else {"base": base}
        own = {"method": resolved.method, "seed": seed or resolved.seed or 0}
        return procedure("greedy_soup")(models, score, out=out, **base_too, **own, **fixed, **shared, **options)
    numbers = method.params
    searched = [k for k in ("weight", "density", "t") if k in numbers and k not in fixed] if names is None else list(names)
    return procedure("evolutionary_merge")(
        models, score, method=resolved.method, base=base, search=searched, seed=seed or resolved.seed or 0, out=out,
        **fixed, **shared, **options,
    )  # fmt: skip


def given(resolved: Resolved, source: str) -> dict[str, Any]:
    """The parameters that a recipe fixes: one value for all models and tensors. RecipeError for what is more than that."""
    more = {"align": resolved.align, "dtype": resolved.read_dtype, "slices, modules and tokenizer": resolved.modules}
    if left := [key for key, value in more.items() if value]:
        raise RecipeError(f"{source}: a search takes whole models as they are: leave out {left[0]}")
    if resolved.written["model_parameters"]:
        raise RecipeError(f"{source}: a search looks for what is a model's own: leave out its parameters")
    known, fixed = get(resolved.method).params, {}
    for key, value in resolved.written["parameters"].items():
        if not isinstance(value, bool | int | float | str):
            raise RecipeError(f"{source}: {key} has several values; what a search does not look for has one")
        fixed[f"{key}_" if f"{key}_" in known else key] = value
    return fixed
