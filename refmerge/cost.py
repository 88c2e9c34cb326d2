"""How long a merge will take on this machine, before a weight of it is read.

A merge reads, computes and writes each entry the same way, so its time grows linearly with the number of entries. `estimate`
merges small files of the same dtypes and row length by the same method, parameters, backend and number of processes, takes
the time of one more entry, and multiplies. Where a method sees whole tensors, time grows faster than they do: those of the
commonest shapes are tried smaller than they are. The files are in the system's cache by then: what a disk adds is for
`needs_per_second` to say.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.adapted import Adapted
from refmerge.api import prepare
from refmerge.checkpoint import CheckpointWriter, itemsize
from refmerge.checkpoint.dtypes import FLOATS, encode
from refmerge.errors import ResourceError
from refmerge.plan import Plan
from refmerge.sources import Source
from refmerge.work import Tensor

__all__ = ["Estimate", "estimate"]

START = 0.6  # seconds in which the interpreter starts, imports, reads a recipe and headers, and at last waits for the disk
FEW, MANY = 1, 3  # tensors for each worker in a small and a larger trial
LARGEST, SMALLEST, TOGETHER = 1 << 21, 1 << 18, 1 << 23  # entries of one of them, and of a small trial
BRIEF = 0.15  # seconds of a larger trial that is too small for the processor's caches not to matter
REPEATS = 3  # others on the machine only ever make a trial slower
PATIENCE = 2.0  # seconds after which no trial is repeated
COMMON = 3  # shapes of whole tensors that are tried
LEAST, ENOUGH = 32, 0.2  # the shorter side of the first that is tried, and seconds of the last
LONG = 32  # times as long as wide: a matrix that is longer takes so much longer


@dataclass(frozen=True)
class Estimate:
    """seconds: of the whole command, with the inputs in memory already. per_entry: nanoseconds of an entry.
    needs_per_second: bytes a second that the disk has to deliver for it to be no slower than that."""

    seconds: float
    per_entry: float
    needs_per_second: float


def estimate(plan: Plan) -> Estimate | None:
    """The time that the plan's merge from files to files takes here; None for other merges, and for what cannot be tried."""
    work = plan.work
    sources = work.read
    if not work.tensors or work.stats or not all(getattr(s, "files", False) for s in sources):
        return None
    # A temporary folder without room for the trials says nothing about the merge.
    first = sum(w.bytes_of(t, t.size) for w in plan.works for t in w.tensors)
    entries = sum(t.size for w in plan.works for t in w.tensors)
    with suppress(ResourceError), tempfile.TemporaryDirectory(prefix="refmerge-estimate-") as folder:
        if whole := [t for t in work.tensors if work.view(t) in ("tensor", "model") and t.size]:
            seconds = START + _of_whole(plan, whole, sources, Path(folder))
            return Estimate(seconds, (seconds - START) / entries * 1e9, first / seconds)
        trial = _Trial(plan, _typical(work.tensors), sources, Path(folder))
        many = MANY if trial.seconds(MANY * plan.threads) > BRIEF else 4 * MANY
        best, began = {FEW: math.inf, many: math.inf}, time.perf_counter()
        for repeat in range(REPEATS):
            for tensors in best:
                if not repeat or time.perf_counter() - began < PATIENCE:
                    best[tensors] = min(best[tensors], trial.seconds(tensors * plan.threads))
        # The difference of two sizes leaves out what does not grow: the start of processes, say.
        slope = max((best[many] - best[FEW]) / ((many - FEW) * plan.threads * trial.size), 0.0)
        seconds = START + slope * entries + _changes(plan)
        return Estimate(seconds, slope * 1e9, first / seconds)
    return None


def _changes(plan: Plan) -> float:
    """The time that adapters take, which the trials' files do not have."""
    once = sum(c.seconds() for c in plan.checkpoints if isinstance(c, Adapted))
    return once * plan.figures(estimate=True)["passes"] / plan.threads


def _typical(tensors: Any) -> Tensor:
    """A tensor of the row length, the dtypes and the parameters that most of the entries have."""
    sizes: Counter[tuple[Any, ...]] = Counter()
    first: dict[tuple[Any, ...], Tensor] = {}
    for t in tensors:
        kind = (t.rows[1], t.work, t.out, str(sorted(t.params.items(), key=lambda p: p[0])))
        sizes[kind] += t.size
        first.setdefault(kind, t)
    return first[sizes.most_common(1)[0][0]]


def _of_whole(plan: Plan, tensors: Sequence[Tensor], sources: list[Source], folder: Path) -> float:
    """Seconds that tensors take of which a method needs all, on the plan's threads: those of the commonest shapes are tried,
    others take so much less or more as decompositions do."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.rows, t.work, t.out), []).append(t)
    cubes = {kind: len(ts) * ts[0].size * min(ts[0].rows) for kind, ts in kinds.items()}
    tried = sorted(cubes, key=lambda kind: -cubes[kind])[:COMMON]
    each = {kind: _grown(plan, kinds[kind][0], sources, folder) for kind in tried}
    all_tried = sum(len(kinds[kind]) * seconds for kind, seconds in each.items())
    together = all_tried * sum(cubes.values()) / sum(cubes[kind] for kind in tried)
    return max(together / plan.threads, *each.values())


def _grown(plan: Plan, tensor: Tensor, sources: list[Source], folder: Path) -> float:
    """Seconds of one tensor: of a small one of its proportions, twice as long and wide, and so on until that takes long
    enough; each further doubling takes so many times longer as the last one did, from four to eight. Of a longer one a part
    is tried that is LONG times as long as wide."""
    short = min(tensor.rows)
    tried = min(tensor.rows[0], LONG * short), min(tensor.rows[1], LONG * short)
    longer = tensor.size / math.prod(tried)
    halvings = max(0, int(math.log2(short / LEAST)) if short > LEAST else 0)
    times: list[float] = []
    for h in range(halvings, -1, -1):
        trial = _Trial(plan, tensor, sources, folder, (max(1, tried[0] >> h), max(1, tried[1] >> h)))
        if not times:
            trial.seconds(1, threads=1)  # what is imported on the way does not count
        times.append(trial.seconds(1, threads=1))
        if times[-1] > (ENOUGH if len(times) > 2 else 5 * ENOUGH):
            break
    if len(times) < 3:
        return longer * times[-1] * 8**h
    before, last = times[-2] - times[0], times[-1] - times[0]  # the first is all start
    return longer * last * (min(max(last / before, 4.0), 8.0) if before > 0 else 8.0) ** h


class _Trial:
    """Small files like the plan's, and their merge."""

    def __init__(
        self, plan: Plan, tensor: Tensor, sources: list[Source], folder: Path, shape: tuple[int, int] | None = None
    ) -> None:
        self._plan, self._tensor, self._sources, self._folder = plan, tensor, sources, folder
        draw = np.random.default_rng(0)
        self._base = draw.standard_normal(1 << 18).astype(np.float32) * np.float32(0.02)
        self._tuned = [
            self._base + draw.standard_normal(1 << 18).astype(np.float32) * np.float32(0.002) for _ in sources
        ]

        width = max(tensor.rows[1], 1)
        rows = max(1, max(SMALLEST, min(LARGEST, tensor.size, TOGETHER // plan.threads)) // width)
        self._shape = shape or (rows, width)
        self.size = math.prod(self._shape)

    def _files(self, tensors: int) -> list[Path]:
        paths = []
        for k, (source, x) in enumerate(zip(self._sources, self._tuned)):
            stored = source.dtype(self._tensor.name)
            dtype = stored if stored in FLOATS else "F32"
            path = self._folder / f"{k}-{tensors}-{dtype}-{'x'.join(map(str, self._shape))}.safetensors"
            paths.append(path)
            if path.exists():
                continue
            raw = np.empty(x.size * itemsize(dtype), np.uint8)
            encode(x if dtype != "F64" else x.astype(np.float64), dtype, raw)
            with CheckpointWriter(path, {f"x{i}": (dtype, self._shape) for i in range(tensors)}) as writer:
                for i in range(tensors):
                    for start in range(0, self.size, x.size):
                        stop = min(start + x.size, self.size)
                        writer.write(f"x{i}", start, raw[: (stop - start) * itemsize(dtype)])
        return paths

    def seconds(self, tensors: int, threads: int | None = None) -> float:
        """The time to merge so many tensors, on the plan's threads. On one thread that is asked for, the processor's time,
        which other work on the machine does not change."""
        work, paths = self._plan.work, self._files(tensors)
        models = paths[: len(work.models)]
        plan = prepare(
            models, work.method, base=paths[-1] if len(paths) > len(models) else None, seed=work.seed, over=work.over,
            dtype=self._tensor.work if self._tensor.work in ("float32", "float64") else None,
            backend=self._plan.backend.name, out_dtype=self._tensor.out, threads=threads or self._plan.threads,
            max_memory=self._plan.max_memory,
            nonfinite=work.nonfinite, params=self._tensor.params,
        )  # fmt: skip
        plan.fused = self._plan.is_fused
        clock = time.process_time if threads == 1 else time.perf_counter
        start = clock()
        plan.run(self._folder / "merged.safetensors", overwrite=True)
        return clock() - start


