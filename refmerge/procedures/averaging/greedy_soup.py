"""A soup of those models that a score says help: each is tried once, or over and over, and kept if the score allows."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from refmerge.api import merge, prepare
from refmerge.checkpoint import Checkpoint, open_checkpoint, refuse_input
from refmerge.errors import UsageError
from refmerge.procedure import procedure
from refmerge.scoring import Log, Score, check_command, judged, number, scored

__all__ = ["Soup", "Trial", "greedy_soup"]


@dataclass(frozen=True)
class Trial:
    """model: its place in the list. score: of the soup with it. taken: whether it stayed in."""

    model: int
    score: float
    taken: bool


@dataclass(frozen=True)
class Soup:
    """merged: the average of the ingredients, as refmerge.merge gives it. ingredients: places in the list of models, in
    the order in which they were taken, a place for each time. score: of the soup. scores: of each model alone."""

    merged: Any
    ingredients: tuple[int, ...]
    score: float
    scores: tuple[float, ...]
    trials: tuple[Trial, ...]

    def plot(self) -> str:
        """The scores of the trials and the best so far, as SVG."""
        from refmerge.plots import draw_search

        return draw_search([t.score for t in self.trials])


@procedure("greedy_soup", paper="arXiv:2203.05482")
def greedy_soup(
    models: Sequence[Any],
    score: Score,
    *,
    rule: Literal["strict", "at_least", "repeats"] = "strict",
    trials: int = 20,
    scores: Sequence[float] | None = None,
    method: Any = "linear",
    log: str | Path | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Soup:
    """Add models to an average one by one, the best first, and keep those with which it does not score worse.

    models: as for refmerge.merge: paths, open checkpoints, or mappings name -> array. score: a function of a mapping name ->
    array, more is better; or a command, which gets the path of a checkpoint as its last argument and prints the score as its
    last line. options: what else refmerge.merge takes.
    """
    models = models if isinstance(models, str | Path | Mapping) else list(models)
    check(models, rule, trials, scores, method, out, options)
    check_command(score, models, out, "greedy_soup")
    names = [path_of(m, i) for i, m in enumerate(models)]
    record = Log(log, {"models": names, "method": str(method), "rule": rule}, "models", "greedy_soup")
    models = [open_checkpoint(m) if isinstance(m, str | Path) else m for m in models]

    def judge(model: Any) -> float:
        return judged(score, model, "greedy_soup")

    # 1. scores of the models alone
    if scores is None:
        given = [m if isinstance(m, Checkpoint) else dict(m) for m in models]
        alone = [record.score([k], partial(judge, m)) for k, m in enumerate(given)]
    else:
        alone = [number(s, "greedy_soup") for s in scores]
    if all(map(math.isnan, alone)):
        raise UsageError("greedy_soup: every model scores NaN: there is no best one to start from")

    # 2. the best first, NaN last; of equal ones the later first under the strict rule, else the earlier
    def rank(k: int) -> tuple[bool, float]:
        return (False, 0.0) if math.isnan(alone[k]) else (True, alone[k])

    places = range(len(models))
    order = sorted(places, key=rank)[::-1] if rule == "strict" else sorted(places, key=rank, reverse=True)

    # 3. trials
    def trial(ingredients: Sequence[int]) -> float:
        def merged(path: Path | None) -> Any:
            return merge([models[i] for i in ingredients], method, out=path, **options)

        return record.score(ingredients, lambda: scored(merged, judge, out))

    queue, soup, best, made = deque(order), [], -math.inf, []
    most, in_vain = trials if rule == "repeats" else len(models), 0
    while len(made) < most and in_vain < len(models):
        k = queue.popleft()
        s = trial([*soup, k]) if soup else alone[k]
        taken = not soup or (s > best if rule == "strict" else s >= best)
        made.append(Trial(k, s, taken))
        if taken:
            soup.append(k)
            best = s
        if rule == "repeats":
            queue.append(k)
            in_vain = 0 if taken else in_vain + 1  # after a whole round in vain the next would repeat it

    # 4. the soup
    merged = merge([models[i] for i in soup], method, out=out, **options)
    return Soup(merged, tuple(soup), best, tuple(alone), tuple(made))


def check(models: Any, rule: str, trials: int, scores: Any, method: Any, out: Any, options: Mapping[str, Any]) -> None:
    """Complain before the first score of what would come up only after many."""
    if rule not in ("strict", "at_least", "repeats"):
        raise UsageError(f"greedy_soup: rule = {rule!r} is none of 'strict', 'at_least', 'repeats'")
    if type(trials) is not int or trials < 1:
        raise UsageError(f"greedy_soup: trials = {trials!r} is no whole number above 0")
    of_merge = inspect.signature(merge).parameters.keys()
    of_both = inspect.signature(prepare).parameters.keys() & of_merge - {"params"}
    params = {key: x for key, x in options.items() if key not in of_merge}
    plan = prepare(models, method, **{key: x for key, x in options.items() if key in of_both}, params=params)
    if scores is not None and len(scores) != len(models):
        raise UsageError(f"greedy_soup: {len(scores)} scores for {len(models)} models")
    if out is None:
        return
    if Path(out).exists() and not options.get("overwrite", False):
        raise UsageError(f"greedy_soup: output {str(out)!r} exists; overwrite=True replaces it")
    refuse_input(out, [p for c in plan.checkpoints for p in c.paths])


def path_of(model: Any, place: int) -> str:
    """What a log calls a model."""
    return str(model.path if isinstance(model, Checkpoint) else model if isinstance(model, str | Path) else place)
