"""Opens mutated files, in processes with little memory and little time, and tells what came of them.

    python -m tests.reliability.fuzz FIRST COUNT     one such process; prints its counts as JSON

Each file is refused by one InputError that names it, or read whole; then it must hold what the safetensors package reads
from it. Anything else ends the process: another exception, more memory than the limit, or more seconds than the limit for
one file.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import safetensors

from refmerge.checkpoint import open_checkpoint
from refmerge.errors import InputError
from tests.reliability import corpus

MEMORY = 1 << 30  # bytes of address space
SECONDS = 5  # of the processor, for one file


class Wrong(AssertionError):
    """A file that was neither refused properly nor read whole."""


def look(path: Path, content: bytes) -> str:
    """ "refused" or "read"; Wrong otherwise."""
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            ours = {name: array.tobytes() for name, array in checkpoint.items()}
    except InputError as error:
        message = str(error)
        if path.name not in message or not message.isprintable() or len(message) > 1000:
            raise Wrong(f"a message that is unclear or not safe to print: {message[:2000]!r}") from None
        return "refused"
    theirs = {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(content)}
    if ours != theirs:
        raise Wrong("read, but not as the safetensors package reads it")
    return "read"


def limited() -> None:
    """Have this process end where it takes too much memory, or too long for one file (again and again, by `again`)."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def run(numbers: range) -> dict[str, float]:
    """Look at these mutants; counts, and the longest time of one in seconds of the processor."""
    import signal

    found: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        path = Path(folder) / "x.safetensors"
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            start = time.process_time()
            try:
                found[look(path, corpus.mutant(number))] += 1
            except BaseException as error:
                raise Wrong(f"mutant {number}: {type(error).__name__}: {error}") from error
            longest = max(longest, time.process_time() - start)
    return {**found, "longest": longest}


def many(count: int, batch: int = 20_000) -> dict[str, float]:
    """`run` in limited processes, so many mutants in all. Wrong where one ended badly."""
    total: Counter[str] = Counter()
    longest = peak = 0.0
    for first in range(0, count, batch):
        command = [sys.executable, "-m", "tests.reliability.fuzz", str(first), str(min(batch, count - first))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Wrong(f"mutants from {first} on: status {done.returncode}: {done.stderr[-2000:]}")
        told = json.loads(done.stdout)
        longest, peak = max(longest, told.pop("longest")), max(peak, told.pop("peak"))
        total.update(told)
        with contextlib.suppress(BrokenPipeError):
            print(f"\r{first + batch} mutants", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {**total, "longest": longest, "peak": peak}


def peak() -> int:
    """The most bytes that this program had in memory. (What getrusage says counts the process that it was forked from.)"""
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("VmHWM:") + 1])


if __name__ == "__main__":
    limited()
    first, count = map(int, sys.argv[1:])
    found = run(range(first, first + count))
    print(json.dumps({**found, "peak": peak()}))
