"""Runs a method over the blocks of tensors: groups, passes, and who computes what next.

A `Work` says what is merged. It is cut into groups (what `group` ranges over) and blocks (what a method sees at a time).
Each block's inputs are decoded once into the work dtype, the method's text runs, and its result is rounded once on its way
out (block.py). Where the method asks the group something, all blocks of the group pass once more (group.py).

The `Scheduler` hands out `Task`s, runs of blocks, and takes back their `Outcome`s. Neither holds a weight, and a task says
all that is known of its group: an executor (executors.py) can compute it in this thread, in another one, or in another
process.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

from refmerge.blas import one_thread
from refmerge.block import run_block, run_model
from refmerge.errors import ResourceError
from refmerge.figures import Figures
from refmerge.fused import compiler
from refmerge.group import Log, Pause, Place, State, condense
from refmerge.kept import Kept
from refmerge.memory import of_whole
from refmerge.method import Method
from refmerge.numeric import LEAF, STRETCH, host
from refmerge.rng import Memo
from refmerge.sources import ArraySink, ArraySource, Scratch, Sink
from refmerge.work import Tensor, Work

__all__ = ["Ran", "Scheduler", "block_elements", "blocks_of", "run"]


MASKS = 32 << 20  # bytes of drawn masks that one thread or process keeps of a group from pass to pass
WORTH_A_SAMPLE = 1 << 17  # elements of a group; what a selection holds of a smaller one costs less than a sample
SAMPLES = (1 << 15, 1 << 20)  # elements that give a bracket of a few per cent, and of less than one
HUGE = 1 << 28  # elements of a group of which even that is too much to hold: it is given four times the sample
RUN = 1 << 20  # elements of one task: enough that handing it out costs nothing, few enough that all finish together


def block_elements(method: Method, models: int, block_bytes: int, threads: int, max_memory: int | None) -> int:
    """Elements of a block in view "flat" or "rows": whole stretches of a sum where memory allows."""
    count = block_bytes // 4
    if max_memory is not None:
        # Per element: what is read and decoded of each model, and about as many temporaries of the method's own.
        per_element = 4 * (3 * (models + method.takes_base) + 4)
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


@dataclass(frozen=True, slots=True)
class Task:
    """A run of blocks of one group: places, and for each what is known of the group (and of the tensor, in a larger one)."""

    group: int
    places: list[Place]
    states: list[State]
    of_tensor: list[State | None]
    first: bool

    @property
    def sampling(self) -> bool:
        return self.states[0].sampling


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task. stopped: for each block where it stopped, or None where its result is written. figures: of each
    that is written its part of the tensor's figures, where these are wanted."""

    stopped: list[Pause | None]
    figures: list[Any]


class Context:
    """What one thread or process needs to compute tasks: the work, the sinks, buffers of its own, and, within a `with`, its
    own stream where the backend has such."""

    def __init__(self, work: Work, sinks: Mapping[str, Sink]) -> None:
        self._work, self._sinks = work, sinks
        self._tensors = {t.name: t for t in work.tensors}
        self._scratch = Scratch(work.backend)
        self._masks: dict[int, Memo] = {}
        self._remembers = "group" in work.method.asks and "rng" in work.method.asks
        self._kept = Kept(next(iter(sinks.values())).folder)

    def __enter__(self) -> Context:
        self._scratch.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if self._work.fused:
            compiler.finish()
        self._kept.close()
        return self._scratch.__exit__(*error)

    def compute(self, task: Task) -> Outcome:
        """Run the method on the blocks of a task."""
        work, masks = self._work, None
        stopped: list[Pause | None] = []
        figures: list[Any] = []
        if self._remembers and task.states[0].blocks > 1:
            if task.group not in self._masks:
                self._masks = dict(list(self._masks.items())[-1:])  # the next group is begun before this one is done
                self._masks[task.group] = Memo(MASKS)
            masks = self._masks[task.group]
        name, stop = task.places[0].tensor, task.places[-1].stop
        if not task.sampling:
            for source in work.read:
                source.ahead(name, task.places[0].start, stop)
        for place, state, of_tensor in zip(task.places, task.states, task.of_tensor):
            tensor = self._tensors[place.tensor]
            whole = work.view(tensor) == "tensor"
            with self._kept.of(place.tensor) if whole and state.blocks > 1 else nullcontext():
                stopped.append(
                    run_block(
                        work, tensor, place, state, of_tensor, self._sinks, self._scratch, masks, first=task.first,
                        figures=figures if work.figures else None,
                    )
                )  # fmt: skip
            if whole:
                self._scratch.release()
        if not task.sampling:
            condense(task.places, stopped, task.states[0].size)
        return Outcome(stopped, figures)


class _Group:
    """The tensors over which `group` ranges together, their blocks, the log of questions, and what runs next."""

    def __init__(self, order: int, tensors: Sequence[Tensor], work: Work, elements: int) -> None:
        self.order, self.elements = order, elements
        self.places: list[Place] = []
        counts: dict[str, int] = {}
        for t in sorted(tensors, key=lambda t: t.name):
            for start, stop in blocks_of(t, work.view(t), elements):
                self.places.append(Place(len(self.places), t.name, start, stop, t.size))
                counts[t.name] = counts.get(t.name, 0) + 1
        self.log = Log(len(self.places), sum(t.size for t in tensors))
        several = len(tensors) > 1
        self._tensor_logs = {t.name: Log(counts.get(t.name, 0), t.size) for t in tensors} if several else {}
        self._logs = [self.log, *self._tensor_logs.values()]
        self._sampled = (
            "group" in work.method.asks
            and self.log.size > WORTH_A_SAMPLE
            and all(work.view(t) == "flat" for t in tensors)
        )
        self.passes = 0
        self.running = 0
        self.waiting: dict[int | None, deque[Place]] = {}  # whoever had a block in the last pass is to have it again
        self._had: dict[int, int] = {}
        self._paused: list[Place] = []
        if self.places:
            self._start_pass(self.places)

    def take(self, worker: int, fits: Callable[[str], bool]) -> Task | None:
        """A run of blocks for this worker: such as it had before, or nobody had, or at last another's; of a tensor for which
        there is memory."""
        queue = self.waiting.get(worker) or self.waiting.get(None)
        steal = queue is None or not queue
        if steal:
            queue = max(self.waiting.values(), key=len, default=None)
        if not queue or not fits((queue[-1] if steal else queue[0]).tensor):
            return None
        places = [queue.pop() if steal else queue.popleft()]
        while queue and len(places) * self.elements < RUN:
            near = queue[-1] if steal else queue[0]
            if near.tensor != places[0].tensor:
                break
            places.append(queue.pop() if steal else queue.popleft())
        places.sort(key=lambda p: p.ordinal)
        for p in places:
            self._had[p.ordinal] = worker
        self.running += len(places)
        tensor_log = self._tensor_logs.get(places[0].tensor)
        return Task(
            self.order, places, [self.log.state(p) for p in places],
            [tensor_log.state(p) if tensor_log else None for p in places], self.passes == 0,
        )  # fmt: skip

    def give(self, place: Place, pause: Pause | None) -> None:
        """Take note of where a block stopped."""
        self.running -= 1
        if pause is None:
            return
        if pause.asked is not None:
            log = self._tensor_logs[place.tensor] if pause.of_tensor else self.log
            log.add(place, pause.asked, pause.part)
        if not self.log.sampling:
            self._paused.append(self.places[place.ordinal])

    @property
    def asked(self) -> frozenset[str]:
        """The kinds of questions that were answered."""
        return frozenset(question.asked.kind for log in self._logs for question in log.answered)

    @property
    def wave_is_over(self) -> bool:
        return not self.running and not any(self.waiting.values())

    def _start_pass(self, places: list[Place]) -> None:
        """Queue a pass over these blocks. Where it is not known what they will ask, one sample runs first to see."""
        self._pass, samples = places, []
        if places and self._sampled and self.log.pending is None:
            samples = self._sample_places()
        for log in self._logs:
            log.sampling = bool(samples)
        self._rest = samples[1:]
        self._queue(samples[:1] or places)

    def _queue(self, places: Sequence[Place]) -> None:
        self.waiting = {}
        for p in places:
            self.waiting.setdefault(self._had.get(p.ordinal), deque()).append(p)

    def _sample_places(self) -> list[Place]:
        """A short stretch in the middle of each block: a thirty-second of the group in all, within bounds."""
        least, most = SAMPLES
        most = most if self.log.size < HUGE else 4 * most
        count = min(max(self.log.size // 32, least), most, self.log.size // 4)
        width = max(64, count // len(self.places))
        samples = []
        for p in self.places:
            start = p.start + max(0, p.stop - p.start - width) // 2
            samples.append(Place(p.ordinal, p.tensor, start, min(start + width, p.stop), p.size))
        return samples

    def end_of_wave(self) -> None:
        """All that was queued has run: queue the rest of the samples, or the pass itself, or the next pass."""
        if self.log.sampling:
            pending = [log.pending for log in self._logs if log.pending is not None]
            rest, self._rest = self._rest, []
            if rest and any(q.wants_samples for q in pending):
                self._queue(rest)
                return
            for log in self._logs:
                log.end_of_samples()
            self._queue(self._pass)
            return
        self.passes += 1
        complete = [log.pending is not None and log.pending.contributions == log.blocks for log in self._logs]
        if self._paused and not any(complete):
            # No pass would ever answer them.
            asked = self.log.pending.contributions if self.log.pending is not None else 0
            raise TypeError(f"{asked} of {self.log.blocks} blocks of a group asked a question that the others did not")
        for log in self._logs:
            log.end_of_pass()
        paused, self._paused = sorted(self._paused, key=lambda p: p.ordinal), []
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
    groups = [_Group(i, ts, work, elements) for i, ts in enumerate(members.values())]
    return [g for g in groups if g.places]


@dataclass
class Ran:
    """What a run took: the passes of the group that took most, the bytes of weights read in all passes, and of samples; and
    the kinds of questions that groups of several blocks were asked. figures: of each tensor, where they were wanted."""

    passes: int = 0
    bytes_read: int = 0
    bytes_sampled: int = 0
    asked: frozenset[str] = frozenset()
    figures: dict[str, Figures] = field(default_factory=dict)


@dataclass
class Scheduler:
    """Hands out tasks and takes back what came of them. Not safe for use by two threads at a time.

    A worker stays with the group that it began, so that a group's later passes find what is still in its caches; one with
    nothing left to do takes from the others. max_memory: what all tensors may take, in bytes, that are in hand at a time
    and that the method needs as a whole.
    """

    work: Work
    sinks: Mapping[str, Sink]
    elements: int
    ran: Ran
    max_memory: int | None = None

    def __post_init__(self) -> None:
        self._tensors = {t.name: t for t in self.work.tensors}
        groups = _groups(self.work, self.elements)
        self._groups = {g.order: g for g in groups}
        self._new = deque(groups)
        self._begun: dict[int, list[_Group]] = {}  # worker -> groups that it began and that are not done
        self._whole: list[Tensor] = []  # tensors that are being merged as a whole
        limited = self.max_memory is not None
        self._needs = {t.name: of_whole(self.work, t) for t in self.work.tensors if limited and self._is_whole(t)}
        self._in_hand = 0  # bytes of what has been handed out

    @property
    def done(self) -> bool:
        return not self._groups

    def _is_whole(self, t: Tensor) -> bool:
        return self.work.view(t) == "tensor" and t.size > 0

    def _tell(self) -> None:
        if self.work.working and self._whole:
            self.work.working(max(self._whole, key=lambda t: t.size))

    def _fits(self, tensor: str) -> bool:
        """Whether there is memory for it now; for one tensor alone there is."""
        assert self.max_memory is not None or not self._needs
        return not self._in_hand or self._in_hand + self._needs.get(tensor, 0) <= (self.max_memory or 0)

    def take(self, worker: int) -> Task | None:
        """The next task for this worker; None if there is none at the moment."""
        task = self._take(worker)
        if task is not None:
            self._in_hand += self._needs.get(task.places[0].tensor, 0)
            if self._is_whole(tensor := self._tensors[task.places[0].tensor]):
                self._whole.append(tensor)
                self._tell()
        return task

    def _take(self, worker: int) -> Task | None:
        mine = self._begun.setdefault(worker, [])
        for group in mine:
            if task := group.take(worker, self._fits):
                return task
        for group in self._new:
            if task := group.take(worker, self._fits):
                self._new.remove(group)
                mine.append(group)
                return task
        for groups in list(self._begun.values()):
            for group in groups:
                if task := group.take(worker, self._fits):
                    return task
        return None

    def give(self, task: Task, outcome: Outcome) -> None:
        """Take back a task: account for what was read and written, and begin the next pass where one has ended."""
        group, figures = self._groups[task.group], iter(outcome.figures)
        self._in_hand -= self._needs.get(task.places[0].tensor, 0)
        if (tensor := self._tensors[task.places[0].tensor]) in self._whole:
            self._whole.remove(tensor)
            self._tell()
        for place, pause in zip(task.places, outcome.stopped):
            count = place.stop - place.start
            moved = self.work.bytes_of(self._tensors[place.tensor], count)
            if task.sampling:
                self.ran.bytes_sampled += moved
            else:
                self.ran.bytes_read += moved
            if self.work.progress:
                self.work.progress(moved)
            if pause is None:
                for sink in self.sinks.values():
                    sink.record(place.tensor, place.start, count)
                if self.work.figures:
                    self._figures_of(place).add(place, next(figures))
            group.give(place, pause)
        if group.wave_is_over:
            group.end_of_wave()
            self.ran.passes = max(self.ran.passes, group.passes)
            if group.wave_is_over:  # nothing was left to queue
                self.ran.asked |= group.asked
                del self._groups[task.group]
                for begun in self._begun.values():
                    if group in begun:
                        begun.remove(group)


    def _figures_of(self, place: Place) -> Figures:
        if place.tensor not in self.ran.figures:
            read = self.work.read
            self.ran.figures[place.tensor] = Figures(place.size, len(read), len(read) > len(self.work.models))
        return self.ran.figures[place.tensor]


def run(
    work: Work, sinks: Mapping[str, Sink], *, elements: int, threads: int, processes: bool = False,
    max_memory: int | None = None,
) -> Ran:  # fmt: skip
    """Merge all tensors into the sinks (output name -> sink; "" where the method has one output).

    processes: compute in processes where the system can fork; sources and sinks must then be files. max_memory: so many
    tensors that must be whole are computed at a time as fit in these bytes.
    InputError for a non-finite input where the policy is "error".
    """
    whole = any(work.view(t) in ("tensor", "model") for t in work.tensors)
    products = any(getattr(source, "multiplies", False) for source in work.read)
    with one_thread() if whole or products else nullcontext():
        return _run(work, sinks, elements, threads, processes, max_memory)


def _run(
    work: Work, sinks: Mapping[str, Sink], elements: int, threads: int, processes: bool, max_memory: int | None
) -> Ran:
    from refmerge import executors  # it computes with this module's Context

    if work.tensors and work.view(work.tensors[0]) == "model":
        run_model(work, sinks)
        return Ran(1, sum(work.bytes_of(t, t.size) for t in work.tensors))
    moved = sum(work.bytes_of(t, t.size) for t in work.tensors)
    work = replace(work, tensors=_run_whole(work, sinks))
    moved -= sum(work.bytes_of(t, t.size) for t in work.tensors)
    size = sum(t.size for t in work.tensors)
    if size > 1 << 20:
        _keep_freed_pages()
    scheduler = Scheduler(work, sinks, elements, Ran(1 if moved else 0, moved), max_memory)
    if threads == 1 or size < 1 << 18:
        executors.serial(scheduler)
    elif processes:
        executors.processes(scheduler, threads)
    else:
        executors.threads(scheduler, threads)
    return scheduler.ran


def _run_whole(work: Work, sinks: Mapping[str, Sink]) -> list[Tensor]:
    """Merge what a kernel of the arrays' own device merges in one pass, whole tensors in the dtypes they have; return the
    tensors that are left: those it does not take, and those in which something is not finite, for their error."""
    into = getattr(work.kernels.get(work.method.name), "into", None)
    sink = sinks.get("")
    if into is None or set(work.method.asks) != {"models"} or not isinstance(sink, ArraySink):
        return list(work.tensors)
    sources = cast(Sequence[ArraySource], work.models)
    flags = sink.zeros(len(work.tensors), "int32")
    left = []
    for i, t in enumerate(work.tensors):
        flat = [s.flat(t.name) for s in sources]
        if t.work != "float32" or not into(sink.arrays[t.name], flags[i : i + 1], flat, **t.params):
            left.append(t)
        elif work.progress:
            work.progress(work.bytes_of(t, t.size))
    if work.nonfinite == "error":
        raised = host(flags)  # once: the device works on while the host asks for the next tensor
        left += [t for t, flag in zip(work.tensors, raised) if flag]
    return left


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


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(work: Work, max_memory: int | None, threads: int) -> None:
    """ResourceError if the smallest blocks, or a tensor that must stay whole, do not fit; it names the tensor that needs
    most. Sizes are estimates."""
    if max_memory is None or not work.tensors:
        return

    def need(t: Tensor) -> int:
        view = work.view(t)
        if view == "tensor" and t.size:
            return of_whole(work, t)
        whole = min(t.size, 4 * LEAF * threads) if view == "flat" else t.rows[1] if view == "rows" else t.size
        return whole * (8 if t.work == "float64" else 4) * (2 * len(work.read) + 2)

    largest = max(work.tensors, key=need)
    if (least := need(largest)) > max_memory:
        how = {"flat": f"in blocks on {threads} thread{'s' * (threads > 1)}", "rows": "in whole rows"}
        fewer = "; fewer --threads need less" if work.view(largest) == "flat" and threads > 1 else ""
        raise ResourceError(
            f"{work.method.name} needs tensor {largest.name!r} {how.get(work.view(largest), 'whole')}: --max-memory "
            f"{-(-least // 1000)}kB is the least, and {max_memory} bytes are given{fewer}"
        )
