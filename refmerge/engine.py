"""Runs a method over the blocks of tensors: passes, work dtype, threads, writing through.

A `Work` says what is merged. It is cut into groups (what `group` ranges over) and blocks (what a method sees at a time).
Each block's inputs are decoded once into the work dtype, the method's text runs, and its result is rounded once on its way
out. Where the method asks the group something, all blocks of the group pass once more (see group.py).
"""

from __future__ import annotations

import ctypes
import heapq
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import is_numpy_array

from refmerge.checkpoint import itemsize
from refmerge.checkpoint.dtypes import DTYPES
from refmerge.errors import InputError, ResourceError
from refmerge.group import Group, Log, Pause, Place
from refmerge.method import Method, Over
from refmerge.numeric import LEAF, STRETCH, array_namespace, host
from refmerge.rng import Memo, Rng
from refmerge.sources import Scratch, Sink, Source

__all__ = ["Tensor", "Work", "block_elements", "blocks_of", "run"]


MASKS = 48 << 20  # bytes of drawn masks that a group keeps from pass to pass
WORTH_A_SAMPLE = 1 << 20  # elements of a group; what a selection holds of a smaller one costs less than a sample


@dataclass(frozen=True)
class Tensor:
    """One floating-point tensor to merge: its work dtype, its bound parameters (they may differ between tensors), and the
    safetensors dtype of the result."""

    name: str
    shape: tuple[int, ...]
    work: str
    params: Mapping[str, Any]
    out: str = "F64"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> tuple[int, int]:
        """(rows, row length) in view "rows": the last axis whole, more than two dimensions as shape[0] rows."""
        if len(self.shape) <= 1:
            return 1, self.size
        length = self.size // self.shape[0] if self.shape[0] else 0
        return self.shape[0], length


@dataclass
class Work:
    """A merge, ready to run. `stats`: per model the statistics file or mapping as a Source, or None."""

    method: Method
    models: Sequence[Source]
    base: Source | None
    tensors: Sequence[Tensor]
    over: Over
    seed: int = 0
    stats: Sequence[Source] | None = None
    nonfinite: str = "error"
    progress: Callable[[int], None] | None = None
    recorded: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        draws = [key for key, kind in self.method.stats.items() if kind == "draw"]
        self.recorded = bool(self.stats) and any(
            stat_name(t.name, key) in s.names() for s in self.stats or () for t in self.tensors for key in draws
        )

    def bytes_of(self, tensor: Tensor, count: int) -> int:
        """Bytes that reading `count` elements of a tensor takes, of all models and the base."""
        sources = [*self.models, *([self.base] if self.base is not None and self.method.needs_base else [])]
        return sum(count * itemsize(s.dtype(tensor.name)) for s in sources)


def stat_name(tensor: str, key: str) -> str:
    """The name under which a statistics file holds `key` of a tensor; the empty key is the tensor's own name."""
    return f"{tensor}.{key}" if key else tensor


@dataclass(frozen=True, slots=True)
class _Block:
    tensor: Tensor
    place: Place


def block_elements(method: Method, models: int, block_bytes: int, threads: int, max_memory: int | None) -> int:
    """Elements of a block in view "flat" or "rows": whole stretches of a sum where memory allows."""
    count = block_bytes // 4
    if max_memory is not None:
        # Per element: what is read and decoded of each model, and about as many temporaries of the method's own.
        per_element = 4 * (3 * (models + method.needs_base) + 4)
        count = min(count, max_memory // (per_element * max(threads, 1)))
    return count // STRETCH * STRETCH or max(count // LEAF, 4) * LEAF


def blocks_of(tensor: Tensor, view: str, elements: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of a tensor in C order; a tensor without elements has none."""
    if view == "tensor" and tensor.size:
        yield 0, tensor.size
        return
    step = elements
    if view == "rows":
        length = tensor.rows[1]
        step = max(1, elements // max(length, 1)) * max(length, 1)
    elif tensor.size <= elements * 3 // 2:  # a small rest is not worth a pass of its own
        step = tensor.size
    for start in range(0, tensor.size, max(step, 1)):
        yield start, min(start + step, tensor.size)


class _Group:
    """The tensors over which `group` ranges together, their blocks, the log of questions, and what runs next."""

    def __init__(self, order: int, tensors: Sequence[Tensor], method: Method, elements: int) -> None:
        self.order = order
        self.blocks: list[_Block] = []
        for t in sorted(tensors, key=lambda t: t.name):
            for start, stop in blocks_of(t, method.view_for(t.params, len(t.shape)), elements):
                self.blocks.append(_Block(t, Place(len(self.blocks), t.name, start, stop, t.size)))
        self.log = Log(len(self.blocks), sum(t.size for t in tensors))
        counts: dict[str, int] = {}
        for b in self.blocks:
            counts[b.tensor.name] = counts.get(b.tensor.name, 0) + 1
        several = len(tensors) > 1
        self.tensor_logs = {t.name: Log(counts.get(t.name, 0), t.size) for t in tensors} if several else {}
        self._logs = [self.log, *self.tensor_logs.values()]
        self._flat = all(method.view_for(t.params, len(t.shape)) == "flat" for t in tensors)
        self.asks = "group" in method.asks
        self.masks = Memo(MASKS) if self.asks and len(self.blocks) > 1 else None
        self.passes = 0
        self.running = 0
        self.waiting: list[_Block] = []
        self.paused: list[_Block] = []
        self._start_pass(self.blocks)

    def view(self, block: _Block) -> Group:
        log = self.tensor_logs.get(block.tensor.name)
        return Group(self.log, block.place, Group(log, block.place) if log else None)

    def _start_pass(self, blocks: list[_Block]) -> None:
        """Queue a pass over these blocks. Where it is not known what they will ask, one sample runs first to see."""
        self._pass, self._samples = blocks, []
        if blocks and self.log.pending is None and self.asks and self._flat and self.log.size > WORTH_A_SAMPLE:
            self._samples = self._sample_blocks()
        self._sampling(bool(self._samples))
        self.waiting = self._samples[:1] or blocks

    def _sampling(self, on: bool) -> None:
        for log in self._logs:
            log.sampling = on

    def _sample_blocks(self) -> list[_Block]:
        """A short stretch in the middle of each block, a thirty-second of the group in all."""
        width = max(64, self.log.size // 32 // len(self.blocks))
        samples = []
        for b in self.blocks:
            start = b.place.start + max(0, b.place.stop - b.place.start - width) // 2
            stop = min(start + width, b.place.stop)
            samples.append(_Block(b.tensor, Place(b.place.ordinal, b.place.tensor, start, stop, b.place.size)))
        return samples

    def end_of_wave(self) -> None:
        """All that was queued has run: queue the rest of the samples, or the pass itself, or the next pass."""
        if self._samples:
            pending = [log.pending for log in self._logs if log.pending is not None]
            rest = self._samples[1:] if len(self.waiting) == 1 else []
            if rest and any(q.wants_samples for q in pending):
                self.waiting = rest
                return
            for log in self._logs:
                log.end_of_samples()
            self._samples, self.paused, self.waiting = [], [], self._pass
            return
        self.passes += 1
        complete = [log.pending is not None and log.pending.contributions == log.blocks for log in self._logs]
        if self.paused and not any(complete):
            # No pass would ever answer them.
            asked = self.log.pending.contributions if self.log.pending is not None else 0
            raise TypeError(f"{asked} of {self.log.blocks} blocks of a group asked a question that the others did not")
        for log in self._logs:
            log.end_of_pass()
        paused, self.paused = sorted(self.paused, key=lambda b: b.place.ordinal), []
        self._start_pass(paused)


def _groups(work: Work, elements: int) -> list[_Group]:
    over = work.over
    if over == "tensor":
        members = {t.name: [t] for t in work.tensors}
    elif over == "model":
        members = {"": list(work.tensors)}
    else:
        assert callable(over)
        members = {}
        for t in work.tensors:
            members.setdefault(str(over(t.name)), []).append(t)
    groups = [_Group(i, ts, work.method, elements) for i, ts in enumerate(members.values())]
    return [g for g in groups if g.blocks]


@dataclass(frozen=True)
class Ran:
    """What a run took: the passes of the group that took most, the bytes of weights read in all passes, and of samples."""

    passes: int
    bytes_read: int
    bytes_sampled: int = 0


def run(work: Work, sinks: Mapping[str, Sink], *, elements: int, threads: int) -> Ran:
    """Merge all tensors into the sinks (output name -> sink; "" where the method has one output).

    InputError for a non-finite input where the policy is "error".
    """
    if work.tensors and work.method.view_for(work.tensors[0].params, len(work.tensors[0].shape)) == "model":
        _run_model(work, sinks)
        return Ran(1, sum(work.bytes_of(t, t.size) for t in work.tensors))
    groups = _groups(work, elements)
    size = sum(t.size for t in work.tensors)
    if size < 1 << 18:
        threads = 1
    if size > 1 << 26:
        _keep_freed_pages()
    scheduler = _Scheduler(work, sinks, groups)
    scheduler.run(threads)
    return Ran(max((g.passes for g in groups), default=0), scheduler.bytes_read, scheduler.bytes_sampled)


@cache
def _keep_freed_pages() -> None:
    """Tell glibc to keep what the method's temporaries free. It would give the top of its heap back to the kernel after
    every block and take it again page by page, which costs three times as much as the arithmetic."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    mallopt(trim_threshold, 256 << 20)
    mallopt(mmap_threshold, 32 << 20)


class _Scheduler:
    """Hands out blocks: the earliest group first, and within a group one pass after the other."""

    def __init__(self, work: Work, sinks: Mapping[str, Sink], groups: Sequence[_Group]) -> None:
        self._work, self._sinks = work, sinks
        self._open = len(groups)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.bytes_read = self.bytes_sampled = 0
        self._ready: list[tuple[int, int, int, _Group, _Block]] = []
        for g in groups:
            self._enqueue(g)

    def _enqueue(self, g: _Group) -> None:
        g.running = len(g.waiting)
        for b in g.waiting:
            heapq.heappush(self._ready, (g.order, g.passes, b.place.ordinal, g, b))

    def run(self, threads: int) -> None:
        workers = [threading.Thread(target=self._worker, daemon=True) for _ in range(threads - 1)]
        for w in workers:
            w.start()
        try:
            self._worker()
        except BaseException as e:  # an interrupt between two lines of the worker's own handling
            self._fail(e)
        for w in workers:
            w.join()
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _worker(self) -> None:
        scratch = Scratch()
        try:
            while (task := self._next()) is not None:
                group, block = task
                finished = _run_block(self._work, group, block, self._sinks, scratch)
                self._done(group, block, finished)
        except BaseException as e:  # whatever ends this thread, the others must not wait for its block
            self._fail(e)

    def _next(self) -> tuple[_Group, _Block] | None:
        with self._changed:
            while not self._ready and self._open and self._error is None:
                self._changed.wait()
            if not self._ready or self._error is not None:
                return None
            *_, group, block = heapq.heappop(self._ready)
            return group, block

    def _done(self, group: _Group, block: _Block, finished: bool) -> None:
        moved = self._work.bytes_of(block.tensor, block.place.stop - block.place.start)
        if self._work.progress:
            self._work.progress(moved)
        with self._changed:
            if group.log.sampling:
                self.bytes_sampled += moved
            else:
                self.bytes_read += moved
            if not finished:
                group.paused.append(block)
            group.running -= 1
            if group.running:
                return
        group.end_of_wave()  # outside the lock: sorting candidates takes a while, and no other block of it is running
        with self._changed:
            if group.waiting:
                self._enqueue(group)
            else:
                group.masks = None
                self._open -= 1
            self._changed.notify_all()


def _shaped(x: Any, tensor: Tensor, view: str) -> Any:
    if view == "tensor":
        return array_namespace(x).reshape(x, tensor.shape)
    if view == "rows":
        return array_namespace(x).reshape(x, (-1, max(tensor.rows[1], 1)))
    return x


def _run_block(
    work: Work, group: _Group, block: _Block, sinks: Mapping[str, Sink], scratch: Scratch
) -> bool:  # fmt: skip
    """Run the method on one block and write its result; False if it paused at a question."""
    method, t, place = work.method, block.tensor, block.place
    view = method.view_for(t.params, len(t.shape))
    span = (t.name, place.start, place.stop, t.work)

    def load(source: Source, slot: Any) -> Any:
        x = source.load(*span, slot, scratch)
        if work.nonfinite == "error" and group.passes == 0 and not all_finite(x):
            _report_nonfinite(source, t)
        return _shaped(x, t, view)

    models = [load(m, i) for i, m in enumerate(work.models)]
    args: dict[str, Any] = {"models": models}
    if work.base is not None and "base" in method.asks:
        args["base"] = load(work.base, "base")
    if "group" in method.asks:
        args["group"] = group.view(block)
    if "rng" in method.asks:
        recorded = _stats(work, t, span, view, scratch, {"draw"}) if work.recorded else None
        drawn = None if recorded is None else {i: next(iter(s.values())) for i, s in enumerate(recorded) if s}
        args["rng"] = Rng(work.seed, t.name, place.start, models[0], drawn, None if group.log.sampling else group.masks)
    if "stats" in method.asks:
        args["stats"] = _stats(work, t, span, view, scratch, {"whole", "element"})
    if "name" in method.asks:
        args["name"] = t.name
    try:
        with np.errstate(all="ignore"):
            result = method.run(*(args[a] for a in method.asks), **t.params)
    except Pause:
        return False
    if group.log.sampling:
        return False
    for output, sink in sinks.items():
        block_out = _output(method, result, output)
        _check_shape(method, block_out, t.name, models[0].shape)
        if work.nonfinite == "error" and not output:
            _check_range(method, block_out, t, place.start)
        sink.write(t.name, place.start, block_out, scratch)
    return True


def _output(method: Method, result: Any, output: str) -> Any:
    if not output:
        return result
    if not isinstance(result, Mapping) or output not in result:
        given = ", ".join(map(repr, result)) if isinstance(result, Mapping) else type(result).__name__
        raise TypeError(f"{method.name} declares the output {output!r} and returns {given}")
    return result[output]


def _check_shape(method: Method, x: Any, name: str, shape: Sequence[int]) -> None:
    """TypeError for a result that would leave elements unwritten, or write others."""
    if not hasattr(x, "shape"):
        raise TypeError(f"{method.name} returned {type(x).__name__} for tensor {name!r}, not an array")
    if tuple(x.shape) != tuple(shape):
        raise TypeError(f"{method.name} returned shape {tuple(x.shape)} for {tuple(shape)} of tensor {name!r}")


@cache
def _largest(dtype: str) -> float:
    """Every magnitude below it rounds to a finite number of the dtype."""
    top = DTYPES[dtype].type(ml_dtypes.finfo(DTYPES[dtype]).max)
    return float(top) + (float(top) - float(np.nextafter(top, DTYPES[dtype].type(0)))) / 2


def _check_range(method: Method, x: Any, t: Tensor, start: int) -> None:
    """InputError for a result that is not finite, or would not be in the dtype that it is kept in."""
    # bfloat16 reaches as far as float32, but for its last half ulp.
    narrow = t.out not in ("F64", "F32", "BF16") or (t.work == "float64" and t.out != "F64")
    xp = array_namespace(x)
    if math.prod(x.shape) == 0 or (all_finite(x) and not (narrow and float(xp.max(xp.abs(x))) >= _largest(t.out))):
        return
    values = np.abs(host(x).reshape(-1))
    first = int(np.flatnonzero(~(values < _largest(t.out)) if narrow else ~np.isfinite(values))[0])
    index = tuple(int(i) for i in np.unravel_index(start + first, t.shape))
    raise InputError(
        f"{method.name} gives {float(host(x).reshape(-1)[first])} for tensor {t.name!r} at {index}, which is not finite in "
        f"{t.out}; other parameters or a wider out_dtype may help, nonfinite='propagate' (--nonfinite propagate) writes it"
    )


def _stats(
    work: Work, t: Tensor, span: tuple[str, int, int, str], view: str, scratch: Scratch, kinds: set[str]
) -> list[dict[str, Any]]:
    """Per model the declared statistics of these kinds that its file has for this tensor, cut with the block."""
    found = []
    if work.stats is None:
        return [{} for _ in work.models]
    for i, source in enumerate(work.stats):
        mine: dict[str, Any] = {}
        for key, kind in work.method.stats.items():
            name = stat_name(t.name, key)
            if kind == "whole" and name not in source.names():
                name = stat_name(t.name.rpartition(".")[0], key)  # a layer's input statistics, under the module's name
            if kind not in kinds or name not in source.names():
                continue
            shape = source.shape(name)
            if kind == "whole":
                x = source.load(name, 0, math.prod(shape), span[3], ("stat", i, key), scratch)
                mine[key] = array_namespace(x).reshape(x, shape)
                continue
            if shape != t.shape:
                raise InputError(f"{source.label}: {name!r} has shape {shape}, its tensor {t.shape}")
            x = source.load(name, *span[1:], ("stat", i, key), scratch)
            if kind == "draw" and not bool(array_namespace(x).all((x == 0) | (x == 1))):
                raise InputError(f"{source.label}: {name!r} is a recorded draw and holds other values than 0 and 1")
            mine[key] = _shaped(x, t, view)
        found.append(mine)
    return found


def all_finite(x: Any) -> bool:
    """Whether no element is infinite or NaN. A sum tells at a tenth of the price, unless it overflows."""
    xp = np if is_numpy_array(x) else array_namespace(x)
    if math.prod(x.shape) == 0:
        return True
    with np.errstate(all="ignore"):
        return math.isfinite(float(xp.sum(x))) or bool(xp.all(xp.isfinite(x)))


def _report_nonfinite(source: Source, t: Tensor) -> None:
    """Raise the error that names the tensor, the first index and the count."""
    first, count, step, scratch = None, 0, 1 << 20, Scratch()
    for start in range(0, t.size, step):
        x = host(source.load(t.name, start, min(start + step, t.size), t.work, 0, scratch))
        bad = np.flatnonzero(~np.isfinite(x))
        if bad.size and first is None:
            first = (start + int(bad[0]), float(x[bad[0]]))
        count += bad.size
    assert first is not None
    index = tuple(int(i) for i in np.unravel_index(first[0], t.shape))
    raise InputError(
        f"{source.label}: tensor {t.name!r} has {count} non-finite value{'s' * (count != 1)}, the first {first[1]} at "
        f"{index}; nonfinite='propagate' (--nonfinite propagate) merges them"
    )


class _LazyModel(Mapping[str, Any]):
    """A whole model for methods of view "model": name -> array in its natural shape, loaded when asked for."""

    def __init__(self, source: Source, work: Mapping[str, str]) -> None:
        self._source, self._work = source, work  # name -> dtype to compute in

    def __getitem__(self, name: str) -> Any:
        shape = self._source.shape(name)
        x = self._source.load(name, 0, math.prod(shape), self._work[name], 0, Scratch())
        return array_namespace(x).reshape(x, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._work)

    def __len__(self) -> int:
        return len(self._work)


def _run_model(work: Work, sinks: Mapping[str, Sink]) -> None:
    method, size = work.method, sum(t.size for t in work.tensors)
    dtypes = {t.name: t.work for t in work.tensors}
    if work.nonfinite == "error":
        for source in [*work.models, *([work.base] if work.base else [])]:
            for t in work.tensors:
                if not all_finite(_LazyModel(source, dtypes)[t.name]):
                    _report_nonfinite(source, t)
    args: dict[str, Any] = {"models": [_LazyModel(m, dtypes) for m in work.models]}
    if work.base is not None:
        args["base"] = _LazyModel(work.base, dtypes)
    args["group"] = Group(Log(1, size), Place(0, "", 0, size, size))
    wide = "float64" if "float64" in dtypes.values() else "float32"
    args["stats"] = [_LazyModel(s, dict.fromkeys(sorted(s.names()), wide)) for s in work.stats or ()]
    args["name"] = ""
    if "rng" in method.asks:
        raise TypeError(f"{method.name}: rng draws for a tensor, a method of view 'model' has none")
    with np.errstate(all="ignore"):
        result = method.run(*(args[a] for a in method.asks), **work.tensors[0].params)
    scratch = Scratch()
    tensors = {t.name: t for t in work.tensors}
    for output, sink in sinks.items():
        model = _output(method, result, output)
        if tensors.keys() != model.keys():
            off = sorted(tensors.keys() ^ model.keys())
            raise TypeError(f"{method.name} returned other tensors than it got: {off} differ")
        for name, x in model.items():
            _check_shape(method, x, name, tensors[name].shape)
            if work.nonfinite == "error" and not output:
                _check_range(method, x, tensors[name], 0)
            sink.write(name, 0, array_namespace(x).reshape(x, (-1,)), scratch)


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(work: Work, max_memory: int | None, threads: int) -> None:
    """ResourceError if the smallest blocks, or a tensor that must stay whole, do not fit. Sizes are estimates: inputs and
    as many temporaries."""
    if max_memory is None:
        return
    for t in work.tensors:
        view = work.method.view_for(t.params, len(t.shape))
        flat = view == "flat"
        whole = min(t.size, 4 * LEAF * threads) if flat else t.rows[1] if view == "rows" else t.size
        need = whole * (8 if t.work == "float64" else 4) * (2 * (len(work.models) + work.method.needs_base) + 2)
        if need > max_memory:
            how = f"in blocks on {threads} threads" if flat else "in whole rows" if view == "rows" else "whole"
            raise ResourceError(
                f"{work.method.name} needs tensor {t.name!r} {how}: about {-(-need // 1000)} kB, more than the "
                f"{max_memory // 1000} kB of --max-memory"
            )
