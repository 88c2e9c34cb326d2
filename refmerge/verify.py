"""Whether a checkpoint is what a recipe makes of its inputs: computed again in blocks and compared with what is stored.

Nothing is written and no second model is held. Where a tensor differs, the same recipe is tried with other semantics: the
paper's, another tool's, with arithmetic in 16 bits; and with other choices among tied entries, where a selection has some.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from refmerge.checkpoint import DTYPES, FLOATS, Checkpoint, encode, itemsize, open_checkpoint
from refmerge.errors import RefmergeError, UsageError
from refmerge.group import Group, Place, State
from refmerge.method import Method
from refmerge.numeric import host
from refmerge.plan import Plan
from refmerge.recipe.run import prepare_recipe
from refmerge.registry import get, names
from refmerge.sources import WORK, DiskSink, Scratch
from refmerge.testing import ulps_between
from refmerge.work import Tensor, Work

__all__ = ["RECIPES", "ROUNDING", "Finding", "Verification", "find_recipe", "verify"]

# Where a merge leaves its recipe beside the weights, the fullest first.
RECIPES = ("refmerge_config.yaml", "mergekit_config.yml")
ROUNDING = 4  # units in the last place by which results of the same operations in another order may differ
MOST_TIED = 6  # arrays in which entries may be tied: the choices among them are powers of two

Verdict = Literal["equal", "rounding", "ties", "differs"]
_RECORD = np.dtype(
    [(key, "<i8") for key in ("tensor", "differing", "beyond", "ulps", "worst")] + [("stored", "<f8"), ("computed", "<f8")]
)


@dataclass(frozen=True)
class Finding:
    """One tensor. differing: entries whose bits are not those computed; beyond: those that are more than ROUNDING units in
    the last place away. ulps: by how many units the worst is away, at the index `worst`, where `stored` is in the file and
    `computed` would be. tied: other choices among tied entries give the stored bits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    differing: int = 0
    beyond: int = 0
    ulps: int = 0
    worst: tuple[int, ...] = ()
    stored: float = 0.0
    computed: float = 0.0
    tied: bool = False

    @property
    def verdict(self) -> Verdict:
        if not self.differing:
            return "equal"
        return "ties" if self.tied else "differs" if self.beyond else "rounding"

    def text(self) -> str:
        """For people: how many entries differ, and the one that does most."""
        if not self.differing:
            return f"{_shown(self.name)}: equal"
        away = f"by {self.ulps} ulp{'s' * (self.ulps != 1)} of {self.dtype} at {self.worst}"
        values = f"{self.stored:.9g} stored, {self.computed:.9g} computed"
        return f"{_shown(self.name)}: {self.differing} of {math.prod(self.shape)} entries, {away}: {values}"


@dataclass(frozen=True)
class Verification:
    """What came of it. recipe: its file. semantics: the registry's name of what the recipe asks for, and in which arithmetic
    it was computed. findings: by tensor. explained: tensor -> the semantics that gives its bits, of those that differ from
    what the recipe asks for. missing, extra: tensors that the file lacks, and that the recipe does not make. apart: tensor
    -> why it cannot be compared."""

    recipe: str
    semantics: str
    findings: dict[str, Finding]
    explained: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    apart: dict[str, str] = field(default_factory=dict)

    def count(self, verdict: Verdict) -> int:
        return sum(f.verdict == verdict for f in self.findings.values())

    @property
    def exact(self) -> bool:
        """Whether every bit is what the recipe gives."""
        return not (self.missing or self.extra or self.apart) and self.count("equal") == len(self.findings)

    @property
    def ok(self) -> bool:
        """Whether nothing differs by more than rounding and choices among ties."""
        return not (self.missing or self.extra or self.apart) and not self.count("differs")

    def told(self) -> dict[str, Any]:
        """For programs."""
        tensors = {
            name: {
                "verdict": f.verdict, "dtype": f.dtype, "shape": list(f.shape), "differing": f.differing, "beyond": f.beyond,
                "ulps": f.ulps, "worst": list(f.worst), "stored": f.stored, "computed": f.computed,
            }
            for name, f in self.findings.items()
        }  # fmt: skip
        return {
            "recipe": self.recipe, "semantics": self.semantics, "exact": self.exact, "ok": self.ok, "tensors": tensors,
            "explained": self.explained, "missing": list(self.missing), "extra": list(self.extra), "apart": self.apart,
        }  # fmt: skip

    def text(self, top: int = 20) -> str:
        """For people: what was found, and the tensors that differ but by ties, the worst first."""
        order: tuple[Verdict, ...] = ("differs", "rounding", "ties")
        off = sorted(
            (f for f in self.findings.values() if f.verdict in order[:2]),
            key=lambda f: (order.index(f.verdict), -f.ulps, f.name),
        )
        lines = [f"recipe     {self.recipe}, as {self.semantics} has it"]
        lines.append(f"equal      {self.count('equal')} of {len(self.findings)} tensors, to the bit")
        said = {
            "rounding": f"{ROUNDING} ulps at most",
            "ties": "but for which of several tied entries were kept",
            "differs": "by more",
        }
        lines += [f"{v:10} {self.count(v)}, {said[v]}" for v in reversed(order) if self.count(v)]
        for what, listed in (("missing", self.missing), ("extra", self.extra)):
            some = ", ".join(map(_shown, listed[:5])) + (", ..." if len(listed) > 5 else "")
            lines += [f"{what:10} {len(listed)}: {some}"] if listed else []
        lines += [f"apart      {_shown(name)}: {why}" for name, why in self.apart.items()]
        by = {s: [n for n, found in self.explained.items() if found == s] for s in dict.fromkeys(self.explained.values())}
        lines += [f"explained  {len(tensors)} of them to the bit by {s}" for s, tensors in by.items()]
        lines += [f"  {f.text()}" for f in off[:top]]
        lines += [f"  and {len(off) - top} more" for _ in range(len(off) > top)]
        return "\n".join(lines)


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def find_recipe(merged: str | os.PathLike[str]) -> Path:
    """The recipe that a merge left in its directory. UsageError where there is none."""
    folder = Path(merged)
    for name in RECIPES if folder.is_dir() else ():
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"{merged}: no {' and no '.join(RECIPES)} beside the weights: --recipe says how it was made")


def verify(
    merged: str | os.PathLike[str] | Checkpoint, recipe: str | os.PathLike[str] | None = None, **options: Any
) -> Verification:
    """Compute what `recipe` makes and compare it with the checkpoint, bit by bit and without writing.

    merged: a path, or an open checkpoint. recipe: None takes the one that lies in its directory. options: as for
    `refmerge.recipe.prepare_recipe` (threads, max_memory, nonfinite, ...).
    RecipeError, InputError and UsageError as a merge has them.
    """
    path = merged.path if isinstance(merged, Checkpoint) else Path(merged)
    recipe = find_recipe(path) if recipe is None else recipe
    checkpoint = merged if isinstance(merged, Checkpoint) else open_checkpoint(merged)
    readings = _readings(recipe, options)
    name, plan = readings[0]
    if plan.work.method.outputs:
        raise UsageError(f"{name} has several outputs, and a checkpoint is one: merge again and compare each")
    specs = plan.specs
    apart = {
        n: f"{_said(checkpoint.tensors[n].dtype, checkpoint.tensors[n].shape)} is stored, {_said(*spec)} made"
        for n, spec in specs.items()
        if n in checkpoint.tensors and spec != (checkpoint.tensors[n].dtype, tuple(checkpoint.tensors[n].shape))
    }
    there = [n for n in specs if n in checkpoint.tensors and n not in apart]
    read: list[tuple[str, dict[str, Finding], list[str]]] = []
    for reading, plan in readings:
        found = _examined(plan, checkpoint, there)
        read.append((reading, found, [n for n, f in found.items() if f.verdict in ("rounding", "differs")]))
        if not read[-1][2]:
            break
    name, findings, left = min(read, key=lambda r: len(r[2]))
    explained = {n: reading for reading, found, _ in read for n in left if not found[n].differing}
    left = [n for n in left if n not in explained]
    tried = _others(recipe, options)
    while left and (other := next(tried, None)) is not None:
        theirs, plan = other
        same = [n for n in left if plan.specs.get(n) == specs[n]]
        with plan.staged():
            by_them = _compared(plan, checkpoint, same)
        explained |= {n: theirs for n, f in by_them.items() if not f.differing}
        left = [n for n in left if n not in explained]
    return Verification(
        str(recipe), name, findings, explained,
        missing=tuple(n for n in specs if n not in checkpoint.tensors),
        extra=tuple(n for n in checkpoint.tensors if n not in specs),
        apart=apart,
    )  # fmt: skip


def _said(dtype: str, shape: Iterable[int]) -> str:
    return f"{dtype} {list(shape)}"


def _readings(recipe: str | os.PathLike[str], options: Mapping[str, Any]) -> list[tuple[str, Plan]]:
    """What the recipe may have been understood as, the likelier first: (what it is called, plan). mergekit computes in the
    dtype that the recipe names, each of several merges in its own, and refmerge in float32 and rounds once."""
    stated, plan = prepare_recipe(recipe, **options)
    own = (stated.method, plan)
    if stated.semantics == "mergekit" and (native := _in_16_bits(recipe, options)) is not None:
        return [(f"{stated.method} in its own 16 bits", native), own]
    return [own]


def _in_16_bits(recipe: str | os.PathLike[str], options: Mapping[str, Any]) -> Plan | None:
    """The recipe's plan with each operation rounded to the inputs' dtype; None where that has more than 16 bits."""
    try:
        plan = prepare_recipe(recipe, **{**options, "arithmetic": "native"})[1]
    except UsageError:  # inputs with scales
        return None
    return plan if any(t.work not in WORK for p in plan.all_plans for w in p.works for t in w.tensors) else None


def _others(recipe: str | os.PathLike[str], options: Mapping[str, Any]) -> Iterator[tuple[str, Plan]]:
    """The same recipe as others have it."""
    stated, _ = prepare_recipe(recipe, **options)
    native, sixteen = {**options, "arithmetic": "native"}, _in_16_bits(recipe, options)
    if sixteen is not None and stated.semantics != "mergekit":
        yield f"{stated.method} in 16 bits", sixteen
    mine = get(stated.method)
    for name in names():
        if name == mine.name or name.rpartition(":")[2] != mine.name.rpartition(":")[2]:
            continue
        other = _with_all_parameters(get(name), mine)
        for how, arithmetic in (("", options), *([(" in 16 bits", native)] if sixteen is not None else [])):
            try:
                yield name + how, prepare_recipe(recipe, method=other, **arithmetic)[1]
            except RefmergeError:  # it takes other parameters, or other models: this recipe is none for it
                break


def _with_all_parameters(method: Method, other: Method) -> Method:
    """The method, with those of another's parameters that it lacks; it does not look at them."""
    spare = {name: p for name, p in other.params.items() if name not in method.params}

    def run(*args: Any, **params: Any) -> Any:
        return method.run(*args, **{name: value for name, value in params.items() if name not in spare})

    return replace(method, params=MappingProxyType({**method.params, **spare}), run=run) if spare else method


# ------------------------------------------------------------------------------------------------------------ the blocks


class _Comparer:
    """Takes the place of a checkpoint's writer: what would be written is compared with what a checkpoint holds.

    Blocks come in any order, from threads and from processes: each that differs leaves a record in a file that all of them
    append to.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Sequence[str]) -> None:
        self._checkpoint, self._numbers = checkpoint, {name: i for i, name in enumerate(tensors)}
        self._file = tempfile.TemporaryFile(mode="ab+", buffering=0)  # noqa: SIM115 (close is in reach)

    def put(self, name: str, start: int, raw: np.ndarray) -> None:
        if name not in self._numbers:
            return
        info = self._checkpoint.tensors[name]
        stored = np.empty_like(raw)
        count = raw.size // itemsize(info.dtype)
        self._checkpoint.read(name, start, start + count, stored)
        if np.array_equal(stored, raw):
            return
        away = ulps(stored, raw, info.dtype)
        if not away.any():  # NaN of other bits
            return
        worst = int(np.argmax(away))
        values = [float(x.view(DTYPES[info.dtype])[worst]) for x in (stored, raw)]
        beyond = np.count_nonzero(away > ROUNDING) if info.dtype in FLOATS else np.count_nonzero(away)
        apart = min(int(away[worst]), 1 << 62)
        record = (self._numbers[name], np.count_nonzero(away), beyond, apart, start + worst, *values)
        self._file.write(np.array([record], _RECORD).tobytes())

    write = put

    def record(self, name: str, start: int, count: int) -> None:
        """Nothing is kept account of."""

    def records(self) -> np.ndarray:
        self._file.seek(0)
        return np.frombuffer(self._file.read(), _RECORD)

    def close(self) -> None:
        self._file.close()


def ulps(a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    """How many numbers of a dtype lie from one to the other, entry by entry; at least 1 where bits differ, 0 for two NaN. a,
    b: bytes. Entries that are no floats are 1 away where they differ."""
    kind = DTYPES[dtype]
    differs = a.view(f"u{kind.itemsize}") != b.view(f"u{kind.itemsize}")
    if dtype not in FLOATS:
        return differs.astype(np.uint64)
    x, y = a.view(kind), b.view(kind)
    with np.errstate(all="ignore"):
        nan = np.isnan(x) & np.isnan(y)
    return np.where(differs & ~nan, np.maximum(ulps_between(x, y), 1), 0)


def _examined(plan: Plan, checkpoint: Checkpoint, tensors: Sequence[str]) -> dict[str, Finding]:
    """Compare these tensors, and where they differ try other choices among ties."""
    with plan.staged():
        findings = _compared(plan, checkpoint, tensors)
        for n in [n for n, f in findings.items() if f.differing and f.beyond]:
            if _equal_up_to_ties(plan, checkpoint, findings[n]):
                findings[n] = replace(findings[n], tied=True)
    return findings


def _compared(plan: Plan, checkpoint: Checkpoint, tensors: Sequence[str]) -> dict[str, Finding]:
    """Compute these tensors and compare them with the stored ones. The plan's stages have been run."""
    if plan.work.over == "tensor":  # else the others have a say in it
        wanted = set(tensors)
        works = [replace(w, tensors=[t for t in w.tensors if t.name in wanted]) for w in plan.works]
        copied = {n: s for n, s in plan.copied.items() if n in wanted}
        plan = replace(plan, work=works[0], rest=works[1:], copied=copied)
    comparer = _Comparer(checkpoint, tensors)
    try:
        plan.fill({"": DiskSink(comparer, plan.specs, plan.backend)})
        records = comparer.records()
    finally:
        comparer.close()
    findings = {n: Finding(n, *plan.specs[n]) for n in tensors}
    for i in np.unique(records["tensor"]):
        of = records[records["tensor"] == i]
        worst, found = of[np.argmax(of["ulps"])], findings[tensors[i]]
        findings[found.name] = replace(
            found, differing=int(of["differing"].sum()), beyond=int(of["beyond"].sum()), ulps=int(worst["ulps"]),
            worst=tuple(int(x) for x in np.unravel_index(int(worst["worst"]), found.shape)),
            stored=float(worst["stored"]), computed=float(worst["computed"]),
        )  # fmt: skip
    return findings


# -------------------------------------------------------------------------------------------------------------- the ties


class _Choosing(Group):
    """A group that is one tensor in memory, whose selections keep all of the entries that are tied, or none of them.

    keep: for each array that is asked about, in order; none is kept where the list ends. tied: which entries of each of them
    are, and due: how many of these a selection keeps.
    """

    def __init__(self, size: int, keep: Sequence[bool] = ()) -> None:
        super().__init__(State(size, 1), Place(0, "", 0, size, size))
        self._keep = keep
        self.tied: list[np.ndarray] = []
        self.due: list[int] = []

    def top(self, *xs: Any, k: int | Sequence[int]) -> Any:
        masks = []
        for x, count in zip(xs, self._ks(xs, k)):
            count = min(max(count, 0), self.size)
            keep = len(self.tied) < len(self._keep) and self._keep[len(self.tied)]
            kth = self.kth_largest(x, k=count) if 0 < count < self.size else math.nan
            above = x > kth if 0 < count < self.size else np.full(x.shape, count > 0)
            self.tied.append(np.asarray(x == kth))
            self.due.append(count - int(np.count_nonzero(above)))
            masks.append((above | (x == kth) if keep else above).astype(x.dtype))
        return masks[0] if isinstance(k, int) and len(masks) == 1 else tuple(masks)


def _equal_up_to_ties(plan: Plan, checkpoint: Checkpoint, finding: Finding) -> bool:
    """Whether each entry has the bits that some choice among tied entries gives it, and no selection has to have kept more
    of them, or fewer, than it keeps."""
    work, tensor = next(((w, t) for w in plan.works for t in w.tensors if t.name == finding.name), (plan.work, None))
    asks = set(work.method.asks)
    if tensor is None or work.over != "tensor" or "group" not in asks or asks & {"rng", "stats"}:
        return False
    if work.view(tensor) != "flat":
        return False
    stored = np.empty(tensor.size * itemsize(finding.dtype), np.uint8)
    checkpoint.read(tensor.name, 0, tensor.size, stored)

    def fits(group: _Choosing) -> np.ndarray:
        with plan.at_hand(work.read, tensor.name):
            return ulps(stored, _whole(work, tensor, group, finding.dtype), finding.dtype) == 0

    everywhere = fits(seen := _Choosing(tensor.size))
    count = len(seen.tied)
    if not 0 < count <= MOST_TIED:
        return False
    kept, dropped = (np.zeros((count, tensor.size), bool) for _ in range(2))  # whether that choice fits, for each selection
    for keep in itertools.product([False, True], repeat=count):
        here = fits(_Choosing(tensor.size, keep))
        everywhere |= here
        for j in range(count):
            (kept if keep[j] else dropped)[j] |= here
    return bool(everywhere.all()) and all(
        np.count_nonzero(tied & ~dropped[j]) <= seen.due[j] <= np.count_nonzero(tied & kept[j])
        for j, tied in enumerate(seen.tied)
    )


def _whole(work: Work, tensor: Tensor, group: Group, dtype: str) -> np.ndarray:
    """The bytes of a tensor that is merged in one block."""
    span, scratch = (tensor.name, 0, tensor.size, tensor.work), Scratch(work.backend)
    args = {
        "models": [m.load(*span, i, scratch) for i, m in enumerate(work.models)],
        "base": None if work.base is None else work.base.load(*span, "base", scratch),
        "group": group,
        "name": tensor.name,
    }
    with np.errstate(all="ignore"):
        result = work.method.run(*(args[a] for a in work.method.asks), **tensor.params)
    raw = np.empty(tensor.size * itemsize(dtype), np.uint8)
    encode(np.ascontiguousarray(host(result)).reshape(-1), dtype, raw)
    return raw
