"""Models left out of a tensor for their NaN and infinities: the policy nonfinite="skip-model".

What a method sees at a time, a group, is one tensor, or the whole model where its questions range over that (thresholds of
TIES, say). A model with a value that is not finite somewhere in a group is left out of all of that group, which comes out as
the method merges the other models: their weights, their number, their draws.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from refmerge.block import Nonfinite, count_nonfinite, report_nonfinite
from refmerge.checkpoint import itemsize
from refmerge.errors import InputError, UsageError
from refmerge.sources import NotFinite, Scratch, Source
from refmerge.work import Tensor, Work

__all__ = ["POLICY", "Skipped", "sound", "told"]

POLICY = "skip-model"
_STRETCH = 1 << 22  # elements that are looked at in one go: an interrupt waits for so many
_LISTED = 3  # tensors of a model that a message names


@dataclass(frozen=True)
class Skipped:
    """A model left out. source: where its values are. tensor, found: one in which some are not finite. group, size: the
    group that is merged without it, and of how many tensors it is."""

    source: Source
    tensor: str
    found: Nonfinite
    group: str
    size: int


def sound(work: Work, threads: int) -> tuple[list[Work], list[Skipped]]:
    """The work in parts, each of models whose values are finite, and what was left out for that. All weights are read once.

    InputError for a base with values that are not finite, and for a group in which fewer models are left than the method
    merges.
    """
    bad = _search(work, threads)
    for t in work.tensors:
        if work.base is not None and (t.name, work.base) in bad:
            report_nonfinite(work.base, t)
    groups: dict[str, list[Tensor]] = {}
    for t in work.tensors:
        groups.setdefault(work.group_of(t), []).append(t)
    parts: dict[tuple[int, ...], list[Tensor]] = {}
    skipped: list[Skipped] = []
    for label, tensors in groups.items():
        spoilt = {i: ts for i, m in enumerate(work.models) if (ts := [t for t in tensors if (t.name, m) in bad])}
        left = tuple(i for i in range(len(work.models)) if i not in spoilt)
        if spoilt:
            _check(work, tensors, spoilt, left)
        for source, t in ((work.models[i], t) for i, ts in spoilt.items() for t in ts):
            skipped.append(Skipped(source, t.name, count_nonfinite(source, t), label, len(tensors)))
        parts.setdefault(left, []).extend(tensors)
    return [_part(work, left, tensors) for left, tensors in parts.items()], skipped


def _search(work: Work, threads: int) -> set[tuple[str, Source]]:
    """(tensor, source) of all in which something is not finite."""
    bad: set[tuple[str, Source]] = set()
    own = threading.local()

    def look(stretch: tuple[Tensor, Source, int, int]) -> None:
        t, source, start, stop = stretch
        if not hasattr(own, "scratch"):
            own.scratch = Scratch()
        try:
            source.load(t.name, start, stop, t.work, 0, own.scratch, finite=True)
        except NotFinite:
            bad.add((t.name, source))
        if work.progress:
            work.progress((stop - start) * itemsize(source.dtype(t.name)))

    pool = ThreadPoolExecutor(threads)
    try:
        for _ in pool.map(look, _stretches(work)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return bad


def _stretches(work: Work) -> Iterator[tuple[Tensor, Source, int, int]]:
    for t in work.tensors:
        for source in work.read:
            for start in range(0, t.size, _STRETCH):
                yield t, source, start, min(start + _STRETCH, t.size)


def _check(work: Work, tensors: Sequence[Tensor], spoilt: Mapping[int, list[Tensor]], left: tuple[int, ...]) -> None:
    """InputError where the models that are left are fewer than the method merges."""
    try:
        work.method.check_models(len(left), has_base=work.base is not None)
    except UsageError as error:
        t = next(iter(spoilt.values()))[0]
        more = f" and the {len(tensors) - 1} merged with it" if len(tensors) > 1 else ""
        raise InputError(
            f"tensor {t.name!r}{more}: without the models that have values that are not finite "
            f"({', '.join(work.models[i].label for i in spoilt)}) {len(left)} of {len(work.models)} are left, and {error}; "
            "nonfinite='propagate' (--nonfinite propagate) merges all of them"
        ) from None


def _part(work: Work, left: tuple[int, ...], tensors: Sequence[Tensor]) -> Work:
    """The merge of these tensors from the models that are left."""
    per_model = [key for key, p in work.method.params.items() if p.per_model]
    of_base = work.method.needs == "base and models"
    kept = [
        replace(t, params={**t.params, **{key: tuple(t.params[key][i] for i in left) for key in per_model}}) for t in tensors
    ]
    stats = work.stats
    if stats is not None:
        stats = [*stats[:of_base], *(stats[i + of_base] for i in left)]
    return replace(work, models=[work.models[i] for i in left], tensors=kept, stats=stats, nonfinite="error")


def told(skipped: Sequence[Skipped]) -> list[str]:
    """A line for each model that was left out somewhere."""
    lines = []
    for source in dict.fromkeys(s.source for s in skipped):
        of = [s for s in skipped if s.source is source]
        named = "; ".join(s.found.told(source, s.tensor) for s in of[:_LISTED])
        rest = len(of) - _LISTED
        more = f"; {rest} more tensor{'s' * (rest > 1)} with some" if rest > 0 else ""
        count = sum({s.group: s.size for s in of}.values())
        lines.append(f"{named}{more}: {count} tensor{'s' * (count != 1)} merged from the other models")
    return lines
