"""What a process and its children take: wall time, and anonymous memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

INTERVAL = 0.02  # seconds between two looks at the memory


class Measured(NamedTuple):
    seconds: float
    peak: int  # bytes; 0 where the system does not tell
    said: str


def family(pid: int) -> Iterator[int]:
    """The process and all that descends from it; none of it may be there any more."""
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                    yield from family(int(child))


def anonymous(pid: int) -> int:
    """Anonymous bytes in memory, which the kernel cannot drop as it can a mapped file's pages; of the process and all its
    children. A page that a forked process shares with its parent counts for both: the sum is never too small."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total * 1024


def measure(argv: Sequence[str]) -> Measured:
    """Run a process to its end; exit with what it said where it fails."""
    peak, ended = 0, threading.Event()

    def watch(pid: int) -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, anonymous(pid))
            ended.wait(INTERVAL)

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(argv, stdout=out, stderr=errors)
        watcher = threading.Thread(target=watch, args=(process.pid,), daemon=True)
        watcher.start()
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            taken = time.perf_counter() - start
            ended.set()
            watcher.join()
        out.seek(0)
        errors.seek(0)
        if status:
            sys.exit(f"{' '.join(argv)} failed:\n{errors.read().decode(errors='replace')[-2000:]}")
        return Measured(taken, peak, out.read().decode())
