"""What the backends of devices share: how large a block is there, how many threads feed it, and those threads' streams.

How a merge from host to host keeps a device busy. Each worker thread of the engine takes one block through all its steps:
it reads into pinned memory (`host`), copies to the device (`put`), runs the method, and copies back (`take`). It does so
inside `lane`, on a stream of its own, so that one thread's copy in, another's kernels and a third's copy out run at the
same time, while the others read and write. No thread waits for another's stream.

Why no buffer is written while it is still being copied from: `put` returns when its copy has arrived, and `take` when its
bytes are in host memory. Each waits for its own stream only. So a thread may read the next block into the same buffer as
soon as it has the next block, whether the last one ended in a result, a pause at a question, or an error. Waiting costs a
thread a fifth of the time that filling the buffer took, and other threads use it.

Why no stream reads what another still writes: arrays are made, used and freed on one thread's stream. What goes from one
block to another (parts of sums, histograms, masks) goes through host memory. So torch's caching allocator and CuPy's pool,
which reuse memory in the order of a stream, need no record_stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STRIDE = 65536 * 8  # bytes of a stretch of a sum in float64: blocks of whole stretches leave no pieces to be put together
LEAST, MOST = 16 << 20, 64 << 20  # smaller ones are all launches; larger ones only pin more host memory
ARRAYS = 16  # of one block on the device: inputs, as they come and in the work dtype, and a method's temporaries


def block_bytes(free: int, threads: int) -> int:
    """Bytes of a block in the work dtype, when `threads` blocks are to fit in `free` bytes of device memory at a time."""
    return max(LEAST, min(MOST, free // (ARRAYS * threads))) // STRIDE * STRIDE


def threads() -> int:
    """Worker threads for one device. Filling and emptying pinned buffers, at some 10 GB/s a core, is slower than the bus
    at 50; six threads that copy most of the time fill it, and more would only pin more memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(6, cores))


class Streams:
    """Streams that threads borrow and give back, since both libraries keep a pool of memory for each stream there was."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._idle = make, []  # type: tuple[Callable[[], Any], list[Any]]

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        try:
            stream = self._idle.pop()  # pop and append of a list are atomic
        except IndexError:
            stream = self._make()
        try:
            yield stream
        finally:
            self._idle.append(stream)
