"""Models of different vocabularies brought to one: for each row of an embedding, whose row it is.

A model's own row of a token goes where the result has the token. Where a model has no such token, its row is a copy of one
that has: of the only model with it, of the base's, or the mean of all that have it; or what the recipe says. Then the rows
are merged like those of any tensor. A tensor is read row by row from where the rows are; nothing is kept in memory.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from refmerge.checkpoint import FLOATS, Checkpoint, decode, encode, itemsize, promote
from refmerge.checkpoint.files import shown
from refmerge.errors import InputError, UsageError
from refmerge.recipe.layers import place_of
from refmerge.recipe.schema import TokenEntry, Tokenizer, TokenRow, ZeroRow
from refmerge.recipe.tokenizers import Vocabulary, read_vocabulary, same_files, table, union
from refmerge.sources import ByteSource, DiskSource

__all__ = ["AlignedSource", "Alignment", "align", "check_alike", "vocabulary_tensors"]

_POSITIONS = re.compile(r"position|wpe|pos_emb|token_type|segment")
_OWN, _ZERO, _MEAN, _PADDING = -1, -2, -3, -4  # whose row, where it is not another model's by its number


@dataclass(frozen=True)
class Rows:
    """Where each row of one model's aligned tensor comes from.

    whose: for each row the number of a model among `sources`, _ZERO, _MEAN (see `means`) or _PADDING (the mean of all
    tokens' rows). row: the number of the row there. count: of tokens.
    """

    sources: tuple[DiskSource, ...]
    whose: np.ndarray
    row: np.ndarray
    means: Mapping[int, tuple[tuple[int, int], ...]]
    count: int

    @cached_property
    def digest(self) -> str:
        """Of all but the sources."""
        said = json.dumps([sorted(self.means.items()), self.count]).encode()
        return hashlib.sha256(self.whose.tobytes() + self.row.tobytes() + said).hexdigest()


@dataclass
class Alignment:
    """One vocabulary for all models of a recipe.

    vocabulary: of the result. donor: the model whose tokenizer files it is made from. rows: of the result's embeddings.
    ids: for each model the numbers of its tokens in it. native: whether rows without a token are kept.
    """

    vocabulary: Vocabulary
    donor: Checkpoint
    source: str
    rows: int
    ids: Mapping[str, Mapping[str, int]]
    all_ids: Mapping[str, Mapping[str, int]]
    entries: Mapping[str, TokenEntry]
    native: bool
    tensors: Mapping[str, set[str]]
    notes: list[str] = field(default_factory=list)
    _made: dict[tuple[tuple[str, ...], str | None, tuple[int, ...]], dict[str, Rows]] = field(default_factory=dict)

    def source_of(
        self, model: str, name: str, models: Sequence[str], base: str | None, sources: Mapping[str, DiskSource]
    ) -> ByteSource:
        """Where a model's values of a tensor are read, beside those of these models."""
        if name not in self.tensors[model]:
            return sources[model]
        having = [m for m in models if name in self.tensors[m]]
        rows = self._rows_of(model, name, having, base, sources)
        return AlignedSource(sources[model], name, rows, [sources[m] for m in having])

    def _rows_of(
        self, model: str, name: str, models: Sequence[str], base: str | None, sources: Mapping[str, DiskSource]
    ) -> Rows:
        heights = tuple(sources[m].shape(name)[0] for m in models)
        key = (tuple(models), base, heights)
        if key not in self._made:
            table = _Table(self, models, base, heights)
            self._made[key] = {m: table.rows(i, tuple(sources[m] for m in models)) for i, m in enumerate(models)}
        return self._made[key][model]

    def config(self, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A config.json with the number of rows of the result."""
        path = vocabulary_key(config)
        if config is None or path is None:
            return None if config is None else dict(config)
        new = copy.deepcopy(dict(config))
        inner: dict[str, Any] = new
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = self.rows
        return new

    def told(self) -> dict[str, Any]:
        """Whose each row is, for tensors of the same models: by token, of those that not all models have as their own."""
        found = [
            {"models": list(models), "base": base, **_Table(self, models, base, heights).told()}
            for models, base, heights in self._made
        ]
        return {"source": self.source, "rows": self.rows, "tokens": len(self.vocabulary.ids), "tables": found}


class _Table:
    """Rows of the tensors that have the same models, base and heights."""

    def __init__(self, aligned: Alignment, models: Sequence[str], base: str | None, heights: Sequence[int]) -> None:
        self.aligned, self.models, self.base, self.heights = aligned, list(models), base, heights
        self.tokens = aligned.vocabulary.ids

    def own(self, i: int, token: str) -> int:
        return self.aligned.ids[self.models[i]].get(token, -1)

    def default(self, token: str) -> tuple[tuple[int, int], ...]:
        """The rows whose mean a model gets that lacks the token: (model, row). None of them is zero."""
        entry = self.aligned.entries.get(token)
        if entry is not None:
            return self._by_rule(token, entry)
        having = [i for i in range(len(self.models)) if self.own(i, token) >= 0]
        if self.base in self.models and self.models.index(self.base) in having and len(having) > 1:
            having = [self.models.index(self.base)]
        return tuple((i, self.own(i, token)) for i in having)

    def _by_rule(self, token: str, entry: TokenEntry) -> tuple[tuple[int, int], ...]:
        source = entry.source
        if isinstance(source, ZeroRow):
            return ()
        if source is None:
            lack = [m for i, m in enumerate(self.models) if self.own(i, token) < 0]
            what = "force wants one" if entry.force else f"{', '.join(lack)} lack it"
            raise UsageError(f"tokenizer: token {token!r} has no source, and {what}")
        model = source.model if isinstance(source, TokenRow) else source
        i = next((j for j, m in enumerate(self.models) if os.path.normpath(m) == os.path.normpath(model)), None)
        if i is None:
            raise UsageError(f"tokenizer: the source of token {token!r}, {shown(model)}, is not merged where its row is")
        if isinstance(source, TokenRow) and source.token_id is not None:
            if source.token_id >= self.heights[i]:
                raise UsageError(f"tokenizer: {model} has {self.heights[i]} rows, none with token_id {source.token_id}")
            return ((i, source.token_id),)
        wanted = source.token if isinstance(source, TokenRow) else token
        row = self.aligned.ids[self.models[i]].get(wanted or "", -1)
        if row < 0:
            raise UsageError(f"tokenizer: {model} has no token {wanted!r}, the source of {token!r}")
        return ((i, row),)

    @cached_property
    def borrowed(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Token -> the rows it is made of where it is no model's own: of all tokens that some model lacks, or are forced."""
        found = {}
        for token in self.tokens:
            entry = self.aligned.entries.get(token)
            if (entry is not None and entry.force) or any(self.own(i, token) < 0 for i in range(len(self.models))):
                found[token] = self.default(token)
        return found

    def is_own(self, i: int, token: str) -> bool:
        entry = self.aligned.entries.get(token)
        return self.own(i, token) >= 0 and not (entry is not None and entry.force)

    def rows(self, i: int, sources: tuple[DiskSource, ...]) -> Rows:
        count = len(self.tokens)
        whose = np.full(self.aligned.rows, _PADDING, np.int32)
        row = np.zeros(self.aligned.rows, np.int64)
        means: dict[int, tuple[tuple[int, int], ...]] = {}
        for token, at in self.tokens.items():
            if self.is_own(i, token):
                whose[at], row[at] = i, self.own(i, token)
                continue
            parts = self.borrowed[token]
            if len(parts) == 1:
                whose[at], row[at] = parts[0]
            else:
                whose[at] = _MEAN if parts else _ZERO
                means[at] = parts
        if self.aligned.native:
            self._keep_padding(i, whose, row)
        return Rows(sources, whose, row, means, count)

    def _keep_padding(self, i: int, whose: np.ndarray, row: np.ndarray) -> None:
        """Rows without a token are the model's own of that number, or the base's, where those have no token either."""
        order = [i, *([self.models.index(self.base)] if self.base in self.models else []), *range(len(self.models))]
        taken = [set(self.aligned.all_ids[m].values()) for m in self.models]
        for at in np.flatnonzero(whose == _PADDING):
            giver = next((j for j in order if at < self.heights[j] and int(at) not in taken[j]), None)
            if giver is not None:
                whose[at], row[at] = giver, at

    def told(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for token, parts in self.borrowed.items():
            lacking = [m for i, m in enumerate(self.models) if not self.is_own(i, token)]
            made[token] = {
                "id": self.tokens[token],
                "in": lacking,
                "from": [{"model": self.models[j], "row": row} for j, row in parts] or "zero",
            }
        return {"own_in_all": len(self.tokens) - len(made), "others": made}


class AlignedSource(ByteSource):
    """A tensor with a row for each token, with the rows of the result's vocabulary.

    own: the model as it is. rows: where each row comes from. others: the models whose rows those may be.
    """

    files = True

    def __init__(self, own: DiskSource, name: str, rows: Rows, others: Sequence[DiskSource]) -> None:
        kinds = {s.dtype(name) for s in others}
        if not kinds <= FLOATS:
            raise InputError(f"{own.told(name)} is not of floating-point numbers and cannot be given other rows")
        widths = {s.shape(name)[1:] for s in others}
        if len(widths) > 1:
            listed = ", ".join(f"{list(s.shape(name))} in {s.label}" for s in others)
            raise InputError(f"tensor {name!r} has rows of different shapes: {listed}")
        super().__init__(own._backend)
        self._own, self._name, self._rows, self._kind = own, name, rows, promote(kinds)
        self.label = own.label
        self._inner = own.shape(name)[1:]
        self._width = math.prod(self._inner)
        self._padding: np.ndarray | None = None

    def names(self) -> set[str]:
        return {self._name}

    def origins(self, name: str) -> list[tuple[Checkpoint, str]]:
        return [(source.checkpoint, name) for source in (self._own, *self._rows.sources)]

    def rule(self, name: str) -> Any:
        return [[source.cast for source in (self._own, *self._rows.sources)], self._kind, self._rows.digest]

    def shape(self, name: str) -> tuple[int, ...]:
        return (len(self._rows.whose), *self._inner)

    def stored(self, name: str) -> str:
        return self._kind

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        size = itemsize(self._kind)
        for first, last, at in self._runs(start, stop):
            begin = max(start, at * self._width)
            end = min(stop, (at + last - first) * self._width)
            part = out[(begin - start) * size : (end - start) * size]
            self._read_run(at, begin - at * self._width, end - at * self._width, part)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Stretches of rows that lie one after the other in one place: first and last row there, and the row here."""
        whose, row = self._rows.whose, self._rows.row
        at, end = start // self._width, -(-stop // self._width)
        while at < end:
            length = 1
            while (
                at + length < end
                and whose[at] >= 0
                and whose[at + length] == whose[at]
                and row[at + length] == row[at] + length
            ):
                length += 1
            yield int(row[at]), int(row[at]) + length, at
            at += length

    def _read_run(self, at: int, start: int, stop: int, out: np.ndarray) -> None:
        whose = int(self._rows.whose[at])
        if whose >= 0:
            offset = int(self._rows.row[at]) * self._width
            source = self._rows.sources[whose]
            if source.dtype(self._name) == source.stored(self._name) == self._kind:
                source.read(self._name, offset + start, offset + stop, out)
            else:
                encode(self._values(whose, offset + start, offset + stop), self._kind, out)
        elif whose == _ZERO:
            out[:] = 0
        else:
            values = self._mean(at) if whose == _MEAN else self._padding_row()
            encode(values[start:stop], self._kind, out)

    def _values(self, model: int, start: int, stop: int) -> np.ndarray:
        """Elements of a model's tensor in float64, as they are read."""
        source, count = self._rows.sources[model], stop - start
        stored, as_read = source.stored(self._name), source.dtype(self._name)
        raw = np.empty(count * itemsize(stored), np.uint8)
        source.read(self._name, start, stop, raw)
        values = np.empty(count, np.float64)
        decode(raw, stored, values)
        if as_read != stored:
            rounded = np.empty(count * itemsize(as_read), np.uint8)
            encode(values, as_read, rounded)
            decode(rounded, as_read, values)
        return values

    def _mean(self, at: int) -> np.ndarray:
        parts = self._rows.means[at]
        rows = [self._values(model, row * self._width, (row + 1) * self._width) for model, row in parts]
        return np.sum(rows, axis=0) / len(rows)

    def _padding_row(self) -> np.ndarray:
        """The mean of the rows of all tokens, as mergekit fills what is there for a round number of rows."""
        if self._padding is None:
            total = np.zeros(self._width)
            raw = np.empty(self._width * itemsize(self._kind), np.uint8)
            values = np.empty(self._width)
            for at in range(self._rows.count):
                self.read(self._name, at * self._width, (at + 1) * self._width, raw)
                decode(raw, self._kind, values)
                total += values
            self._padding = total / self._rows.count
        return self._padding


def vocabulary_tensors(checkpoint: Checkpoint, globs: Sequence[str] | None, patterns: Sequence[str] | None) -> set[str]:
    """The tensors with a row for each token: those that the globs name, else those outside of layers with as many rows as
    config.json says there are tokens, but for embeddings of positions."""
    if globs is not None:
        return {name for name in checkpoint.tensors if any(fnmatchcase(name, glob) for glob in globs)}
    rows = vocabulary_size(checkpoint)
    return {
        name
        for name, info in checkpoint.tensors.items()
        if info.shape[:1] == (rows,)
        and (len(info.shape) > 1 or name.endswith("bias"))
        and place_of(name, patterns) is None
        and not _POSITIONS.search(name)
    }


def vocabulary_key(config: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Where config.json says how many tokens there are."""
    for path in (("vocab_size",), ("text_config", "vocab_size")):
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if type(value) is int:
            return path
    return None


def vocabulary_size(checkpoint: Checkpoint) -> int | None:
    path = vocabulary_key(checkpoint.config)
    value: Any = checkpoint.config
    for key in path or ():
        value = value[key]
    return value if path else None


def align(
    wanted: Tokenizer,
    models: Mapping[str, Checkpoint],
    base: str | None,
    opened: Any,
    native: bool,
    globs: Sequence[str] | None,
    patterns: Sequence[str] | None,
) -> Alignment:
    """The one vocabulary that a recipe wants.

    models: all that it names, in their order. base: its base_model. opened: (path) -> Checkpoint, for one that it does not
    merge. InputError where tokenizers or the tensors of vocabularies cannot be told.
    """
    first = base if base is not None else next(iter(models))
    order = {first: models[first], **models}
    notes: list[str] = []
    found: dict[str, Vocabulary | None] = {m: read_vocabulary(c) for m, c in order.items()}
    if found[first] is None:
        raise InputError(f"{models[first].path}: has no tokenizer.json, and the others' tokens are brought into its order")
    for m, v in found.items():
        if v is None:
            if native:
                raise InputError(f"{models[m].path}: has no tokenizer.json to say what its rows are")
            notes.append(f"{m} has no tokenizer: its rows are taken to be those of {first}")
    tensors = {m: vocabulary_tensors(c, globs, patterns) for m, c in models.items()}
    for m, names in tensors.items():
        if not names:
            raise InputError(
                f"{models[m].path}: no tensor has a row for each of the {vocabulary_size(models[m])} tokens of config.json; "
                "`vocabulary: [GLOB, ...]` names those that have"
            )
    full = {m: v or found[first] for m, v in found.items()}
    heights = {m: max(models[m].tensors[n].shape[0] for n in tensors[m]) for m in models}
    sizes = {m: vocabulary_size(c) or heights[m] for m, c in models.items()}
    below = {m: {t: i for t, i in v.ids.items() if i < sizes[m]} for m, v in full.items() if v is not None}

    own = full[first]
    assert own is not None
    stripped = own.below(sizes[first])
    donor, source = order[first], wanted.source
    if source == "union":
        others = [
            replace(v, ids=below[m], added={t: e for t, e in v.added.items() if t in below[m]})
            for m, v in full.items()
            if m != first and v is not None
        ]
        vocabulary = union([stripped, *others])
    elif source == "base":
        vocabulary = stripped
    else:
        same = (c for m, c in order.items() if os.path.normpath(m) == os.path.normpath(source))
        donor = next(same, None) or opened(source)
        there = read_vocabulary(donor)
        if there is None:
            raise InputError(f"{donor.path}: has no tokenizer.json")
        vocabulary = there
    entries = dict(wanted.tokens or {})
    vocabulary = vocabulary.with_tokens((token, None) for token in entries)

    rows = max(vocabulary.ids.values(), default=-1) + 1
    if native:
        rows = max(rows, heights[first])
    elif heights[first] > rows:
        notes.append(
            f"{heights[first] - rows} rows of {first} without a token are left out, as mergekit does; with refmerge: 1 at "
            "the top they are kept"
        )
    step = wanted.pad_to_multiple_of or 1
    return Alignment(
        vocabulary=vocabulary,
        donor=donor,
        source=source,
        rows=-(-rows // step) * step,
        ids=below,
        all_ids={m: v.ids for m, v in full.items() if v is not None},
        entries=entries,
        native=native,
        tensors=tensors,
        notes=notes,
    )


def check_alike(
    models: Mapping[str, Checkpoint], native: bool, globs: Sequence[str] | None, patterns: Sequence[str] | None
) -> list[str]:
    """Notes on models whose tokens differ and that are merged row by row.

    InputError, with a table of the differences, where their embeddings have different numbers of rows, or, in a native
    recipe, where a token's row is another token's in another model: the recipe has to say what it wants.
    """
    heights = {}
    for m, c in models.items():
        names = vocabulary_tensors(c, globs, patterns)
        heights[m] = max((c.tensors[n].shape[0] for n in names), default=None)
    known = {h for h in heights.values() if h is not None}
    if len(known) < 2 and same_files(list(models.values())):
        return []
    try:
        found = {m: read_vocabulary(c) for m, c in models.items()}
    except InputError:
        found = dict.fromkeys(models)
    told = table([(m, heights[m], v) for m, v in found.items()])
    how = "tokenizer_source: base, union or a model's path brings them into one order"
    if len(known) > 1:
        raise InputError(f"the vocabularies have different sizes, and the recipe does not say what to do: {how}\n{told}")
    some = [v for v in found.values() if v is not None]
    if all(v.ids == some[0].ids for v in some[1:]):
        return []
    if native:
        raise InputError(
            f"the models' tokens differ, and the recipe does not say what to do: {how}; tokenizer_source: rows merges the "
            f"rows as they are\n{told}"
        )
    return [f"the models' tokens differ, and their rows are merged by number, as mergekit does; {how}\n{told}"]
