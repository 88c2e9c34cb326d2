"""Where tasks are computed: in this thread, in threads, or in processes. All run the same code on the same tasks.

NumPy lets go of the interpreter's lock during each operation and takes it again after it; with blocks that fit a core's own
cache an operation is so short that two threads spend half their time on waking each other. Processes do not, so checkpoints
are merged by processes where the system can fork, and by threads with larger blocks elsewhere.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from refmerge.engine import Context, Scheduler
from refmerge.errors import RefmergeError, ResourceError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["can_fork", "processes", "serial", "threads"]

AHEAD = 2  # tasks a process has in hand, so that it need not wait for the next


def serial(scheduler: Scheduler) -> None:
    """Compute everything here and now."""
    with Context(scheduler.work, scheduler.sinks) as context:
        while not scheduler.done:
            task = scheduler.take(0)
            assert task is not None
            scheduler.give(task, context.compute(task))


def threads(scheduler: Scheduler, count: int) -> None:
    """Compute in threads of this process, this one among them."""
    changed = threading.Condition()
    errors: list[BaseException] = []

    def fail(error: BaseException) -> None:
        with changed:
            errors.append(error)
            changed.notify_all()

    def work(worker: int) -> None:
        try:
            with Context(scheduler.work, scheduler.sinks) as context:
                while True:
                    task = None
                    with changed:
                        while not errors and not scheduler.done and (task := scheduler.take(worker)) is None:
                            changed.wait()
                    if task is None or errors:
                        return
                    outcome = context.compute(task)
                    with changed:
                        scheduler.give(task, outcome)
                        changed.notify_all()
        except BaseException as error:  # whatever ends this thread, the others must not wait for its task
            fail(error)

    others = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(1, count)]
    for thread in others:
        thread.start()
    try:
        work(0)
    except BaseException as error:  # an interrupt between two lines of the worker's own handling
        fail(error)
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def can_fork() -> bool:
    """Whether workers can be forked from this process: on Linux, and with no other thread of Python's that might hold a lock
    at that moment. Forked workers share the places of open files, so that reads and writes must name theirs."""
    calls = all(hasattr(os, name) for name in ("fork", "preadv", "pwrite"))
    return sys.platform == "linux" and calls and threading.active_count() == 1


def processes(scheduler: Scheduler, count: int) -> None:
    """Compute in processes forked from this one, which hands out tasks and merges the parts of answers."""
    from multiprocessing import get_context
    from multiprocessing.connection import wait

    fork = get_context("fork")
    workers: dict[Any, tuple[int, Any]] = {}
    in_hand: dict[int, list[Any]] = {i: [] for i in range(count)}
    try:
        with _no_signals():
            for i in range(count):
                ours, theirs = fork.Pipe()
                process = fork.Process(target=_serve, args=(theirs, [*workers, ours], scheduler), daemon=True)
                process.start()
                theirs.close()
                workers[ours] = (i, process)
        while not scheduler.done:
            for tasks in range(AHEAD):  # nobody gets a second one before all have one
                for pipe, (i, _) in workers.items():
                    if len(in_hand[i]) == tasks and (task := scheduler.take(i)) is not None:
                        in_hand[i].append(task)
                        pipe.send(task)
            for pipe in cast("list[Connection]", wait(list(workers))):
                i, process = workers[pipe]
                scheduler.give(in_hand[i].pop(0), _received(pipe, process))
    finally:
        for pipe, (i, process) in workers.items():
            if in_hand[i]:  # it is computing what nobody will take
                process.kill()
            pipe.close()
        for _, process in workers.values():
            process.join()


@contextmanager
def _no_signals() -> Iterator[None]:
    """Hold back what would interrupt this thread: an exception raised in the middle of a fork is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(pipe: Connection, process: Any) -> Any:
    try:
        outcome = pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise ResourceError(
            f"a worker process ended by itself (status {process.exitcode}); if the system killed it for want of memory, "
            "fewer threads (--threads) or --max-memory need less"
        ) from None
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _serve(pipe: Connection, inherited: list[Connection], scheduler: Scheduler) -> None:
    """A worker's life: compute what comes until the pipe is closed, and report errors instead of raising them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    for end in inherited:  # the parent's: while a copy is open here, no worker would see that the parent is gone
        end.close()
    with suppress(EOFError, ConnectionError), Context(scheduler.work, scheduler.sinks) as context:
        while True:
            task = pipe.recv()
            try:
                outcome: Any = context.compute(task)
            except BaseException as error:
                outcome = _portable(error)
            pipe.send(outcome)


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent to another process; with a note of where it was raised, unless it is one of our own, which
    say all by themselves."""
    if not isinstance(error, RefmergeError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}")
