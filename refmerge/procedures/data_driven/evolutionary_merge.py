"""A search over the parameters of a recipe for the best score, by CMA-ES."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.adaptive import plain
from refmerge.api import merge, prepare
from refmerge.checkpoint import Checkpoint, open_checkpoint, refuse_input
from refmerge.cmaes import CMA
from refmerge.errors import UsageError
from refmerge.method import Method
from refmerge.plan import Plan
from refmerge.procedure import procedure
from refmerge.recipe.document import Problems
from refmerge.recipe.parameters import Checker, recipe_key
from refmerge.registry import get
from refmerge.scoring import Log, check_command, judged, scored

__all__ = ["Search", "Space", "Trial", "evolutionary_merge"]


@dataclass(frozen=True)
class Trial:
    """genes: the vector. score: of the merge that it makes."""

    genes: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class Search:
    """merged: the merge of the best genes, as refmerge.merge gives it. recipe: theirs, as YAML. score: of it. trials: all,
    in their order, the start first. best: the place of the best among them."""

    merged: Any
    recipe: str
    score: float
    trials: tuple[Trial, ...]
    best: int

    def plot(self) -> str:
        """The scores and the best so far, as SVG."""
        from refmerge.plots import draw_search

        return draw_search([t.score for t in self.trials])


@dataclass(frozen=True)
class Space:
    """Where genes stand in a recipe: of each parameter in `search`, for each model (or once, if it is one value for all) and
    filter, as many as there are groups of layers, between which values are interpolated. fixed: other
    parameters. settings: other keys of the recipe. stats: files of statistics, one for each model or none."""

    method: Method
    models: tuple[str, ...]
    base: str | None
    search: tuple[str, ...]
    groups: int
    filters: tuple[str, ...]
    negative: bool
    fixed: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    stats: tuple[str | None, ...] = ()

    def entries(self) -> list[tuple[str, int | None, str | None]]:
        """(parameter, model or None, filter or None) of each run of `groups` genes."""
        return [
            (key, place, which)
            for key in self.search
            for place in (range(len(self.models)) if self.method.params[key].per_model else [None])
            for which in (*self.filters, None)
        ]

    def start(self) -> np.ndarray:
        """1/N for weights, 1/2 for t, and 1 for all else."""
        at = {"weight": 1 / len(self.models), "t": 0.5}
        return np.repeat([at.get(key, 1.0) for key, _, _ in self.entries()], self.groups)

    def value(self, key: str, gene: float) -> float:
        """The magnitude of a gene, in the parameter's domain; of a weight, with `negative`, the gene itself."""
        low, high = self.method.params[key].domain or (-math.inf, math.inf)
        x = gene if self.negative and key == "weight" else abs(gene)
        return float(min(max(x, low), high))

    def recipe(self, genes: Sequence[float]) -> dict[str, Any]:
        """The recipe that genes make, as data."""
        own: list[dict[str, Any]] = [{} for _ in self.models]
        shared: dict[str, Any] = {recipe_key(k): v for k, v in self.fixed.items()}
        for i, (key, place, which) in enumerate(self.entries()):
            run = [self.value(key, g) for g in genes[i * self.groups : (i + 1) * self.groups]]
            value = run if len(run) > 1 else run[0]
            target = shared if place is None else own[place]
            if self.filters:
                entry = {"value": value} if which is None else {"value": value, "filter": which}
                target.setdefault(recipe_key(key), []).append(entry)
            else:
                target[recipe_key(key)] = value
        data: dict[str, Any] = {"refmerge": 1, "merge_method": self.method.name}
        if self.base is not None:
            data["base_model"] = self.base
        data["models"] = [{"model": m, "parameters": p} if p else {"model": m} for m, p in zip(self.models, own)]
        for entry, stats in zip(data["models"], self.stats):
            entry |= {} if stats is None else {"stats": stats}
        return data | ({"parameters": shared} if shared else {}) | self.settings

    def params(self, genes: Sequence[float]) -> Callable[..., Mapping[str, Any]]:
        """What that recipe says of a tensor."""
        problems = Problems("the recipe of these genes")
        rules = Checker(self.method, self.recipe(genes), problems, lenient=False).rules(
            [(m, ("models", place)) for place, m in enumerate(self.models)]
        )
        problems.check()
        return rules.for_tensor


@procedure("evolutionary_merge", paper="arXiv:2403.13187")
def evolutionary_merge(
    models: Sequence[Any],
    score: Callable[[Mapping[str, Any]], float] | str | Sequence[str],
    *,
    method: str = "linear",
    base: Any = None,
    search: Sequence[str] | None = None,
    groups: int = 1,
    filters: Sequence[str] = (),
    negative: bool = False,
    sigma: float = 1 / 6,
    evaluations: int = 100,
    population: int | None = None,
    seed: int = 0,
    log: str | Path | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Search:
    """Evolutionary merging: CMA-ES over weights, densities and the like, for the merge that scores best.

    models: as for refmerge.merge. score: a function of a mapping name -> array, more is better; or a command, which gets the
    path of a checkpoint as its last argument and prints the score as its last line. options: what else refmerge.merge takes.
    """
    # 1. genes
    of_merge = inspect.signature(merge).parameters.keys()
    fixed = {key: x for key, x in options.items() if key not in of_merge}
    options = {key: x for key, x in options.items() if key in of_merge}
    space = space_of(models, base, method, search, groups, filters, negative, fixed)
    settings = {"over": options.get("over"), "work_dtype": options.get("dtype"), "out_dtype": options.get("out_dtype")}
    settings = {key: x for key, x in settings.items() if isinstance(x, str)} | ({"seed": seed} if seed else {})
    stats = [str(s) if isinstance(s, str | Path) else None for s in options.get("stats") or ()]
    if len(stats) > len(space.models) and stats[0] is not None:
        settings["base_stats"] = stats[0]
    space = replace(space, settings=settings, stats=tuple(stats[-len(space.models) :]))
    check(score, sigma, evaluations, population, out, models, options.get("overwrite", False))
    given = [open_checkpoint(m) if isinstance(m, str | Path) else m for m in models]
    start = open_checkpoint(base) if isinstance(base, str | Path) else base
    write = {k: options.pop(k) for k in ("max_shard_size", "overwrite") if k in options}

    def planned(genes: Sequence[float]) -> Plan:
        return prepare(given, space.method, base=start, params=space.params(genes), seed=seed, **options)

    def merged(genes: Sequence[float], out: Any = None) -> Any:
        return planned(genes).run(out, **write)

    first = planned(space.start())
    if out is not None:
        refuse_input(out, [p for c in first.checkpoints for p in c.paths])
    about = {"recipe": space.recipe(space.start()), "sigma": sigma, "population": population}
    record = Log(log, about, "genes", "evolutionary_merge")

    def trial(genes: np.ndarray) -> Trial:
        x = tuple(map(float, genes))
        judge = lambda candidate: judged(score, candidate, "evolutionary_merge")  # noqa: E731
        return Trial(x, record.score(x, lambda: scored(lambda path: merged(x, path), judge, out)))

    # 2. the start
    trials = [trial(space.start())]
    # 3. generations
    state = CMA.start(space.start(), sigma, population)
    while len(trials) < evaluations:
        draws = np.random.default_rng([seed, state.generation]).standard_normal((state.population, len(state.mean)))
        samples = state.ask(draws)
        new = [trial(genes) for genes in samples[: evaluations - len(trials)]]
        trials += new
        if len(new) == len(samples):
            state = state.tell(samples, np.array([-t.score for t in new]))
    # 4. the best
    known = [i for i, t in enumerate(trials) if not math.isnan(t.score)]
    if not known:
        raise UsageError("evolutionary_merge: every trial scores NaN: there is no best one")
    best = max(known, key=lambda i: trials[i].score)
    text = written(space.recipe(trials[best].genes))
    return Search(merged(trials[best].genes, out), text, trials[best].score, tuple(trials), best)


def space_of(
    models: Any, base: Any, method: str, search: Any, groups: int, filters: Any, negative: bool, fixed: Mapping[str, Any]
) -> Space:
    """The space, checked."""
    who = "evolutionary_merge"
    if isinstance(models, str | Path | Mapping) or not (models := list(models)):
        raise UsageError(f"{who}: models is a sequence of at least one: write [a, b]")
    m = get(method)
    numbers = [key for key, p in m.params.items() if p.type is float]
    search = [key for key in ("weight", "density", "t") if key in numbers] if search is None else [*search]
    if not search or any(key not in numbers for key in search):
        raise UsageError(f"{who}: search = {search!r}: {method} has the numbers {', '.join(numbers) or 'none'}")
    if both := sorted({*search} & fixed.keys()):
        raise UsageError(f"{who}: {both[0]} is searched for and given: leave one out")
    if type(groups) is not int or groups < 1:
        raise UsageError(f"{who}: groups = {groups!r} is no whole number above 0")
    names = [path_of(x, f"./model_{i}") for i, x in enumerate(models)]
    start = None if base is None else path_of(base, "./base")
    return Space(m, tuple(names), start, tuple(search), groups, tuple(filters), negative, fixed)


def path_of(model: Any, otherwise: str) -> str:
    return str(model.path if isinstance(model, Checkpoint) else model if isinstance(model, str | Path) else otherwise)


def check(
    score: Any, sigma: float, evaluations: int, population: int | None, out: Any, models: Any, overwrite: bool
) -> None:
    """Complain before the first score."""
    who = "evolutionary_merge"
    if out is not None and Path(out).exists() and not overwrite:
        raise UsageError(f"{who}: output {str(out)!r} exists; overwrite=True replaces it")
    if not sigma > 0 or not math.isfinite(sigma):
        raise UsageError(f"{who}: sigma = {sigma!r} is no number above 0")
    if type(evaluations) is not int or evaluations < 1:
        raise UsageError(f"{who}: evaluations = {evaluations!r} is no whole number above 0")
    if population is not None and (type(population) is not int or population < 2):
        raise UsageError(f"{who}: population = {population!r} is no whole number above 1")
    check_command(score, models, out, who)


def written(data: Mapping[str, Any]) -> str:
    """A recipe as YAML."""
    lines = []
    for key, value in data.items():
        if key == "models":
            lines += ["models:", *(f"  - {flow(entry)}" for entry in value)]
        else:
            lines.append(f"{key}: {flow(value)}")
    return "\n".join([*lines, ""])


def flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    return plain(value) if isinstance(value, float) else json.dumps(value)
