"""The system's C compiler, and what it has compiled before.

A source is compiled once on a machine: results are kept in the user's cache directory, named by the source, the compiler and
the processor. While one is being compiled nobody waits: its program is run by NumPy until then.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import threading
from functools import cache
from pathlib import Path
from typing import Any

# No contraction, no reordering, no flushing of subnormals: each operation rounds as IEEE 754 has it. Not trapping lets both
# sides of a choice be computed; no result depends on it.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC", "-w")
waits = False  # for tests: compile at once


@cache
def command() -> str | None:
    """The compiler of a POSIX system; None where there is none or REFMERGE_COMPILE=0 forbids it."""
    if os.environ.get("REFMERGE_COMPILE") == "0" or not hasattr(os, "getuid"):
        return None
    return shutil.which(os.environ.get("CC") or "cc")


@cache
def _identity() -> str:
    found = Path(command() or "").resolve()
    size = found.stat()
    processor = platform.machine() + platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            processor = f.read(1 << 13).partition("\n\n")[0]
        processor = "".join(line for line in processor.splitlines() if line.startswith(("model name", "flags", "Features")))
    except OSError:
        pass
    return f"{found} {size.st_size} {size.st_mtime_ns} {processor} {FLAGS}"


@cache
def folder() -> Path | None:
    """Where compiled programs are kept: a directory that is ours alone, or None."""
    import tempfile  # only merges that are large enough come here

    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    for candidate in (root / "refmerge", Path(tempfile.gettempdir()) / f"refmerge-{os.getuid()}"):
        try:
            candidate = candidate.expanduser()
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = candidate.lstat()
            ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            if ours and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return candidate
        except (OSError, RuntimeError):  # the latter where nobody has a home
            continue
    return None


class _Job:
    """One source on its way to a library."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.library: Any = None
        home = folder()
        self.failed = home is None
        if home is not None:
            self.target = home / (hashlib.sha256(f"{_identity()}\n{source}".encode()).hexdigest()[:32] + ".so")
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None

    def look(self) -> Any:
        """The library, where it is there by now."""
        if self.library is not None or self.failed:
            return self.library
        if self._process is not None:
            if waits:
                self._process.wait()
            status = self._process.poll()
            if status is None:
                return None
            self._finish(status)
        elif not self.target.exists():
            self._begin()
            return self.look() if waits and self._process is not None else None
        if not self.failed and self.target.exists():
            try:
                self.library = ctypes.CDLL(str(self.target))
            except OSError:
                self.failed = True
        return self.library

    def finish(self) -> None:
        if self._process is not None:
            self._finish(self._process.wait())

    def _begin(self) -> None:
        claim = self.target.with_suffix(".claim")
        try:
            if claim.exists() and not _lives(claim.read_text(encoding="utf-8")):
                claim.unlink(missing_ok=True)
            with open(claim, "x", encoding="utf-8") as f:
                f.write(str(os.getpid()))
        except FileExistsError:
            return  # another process is at it
        except OSError:
            self.failed = True
            return
        import tempfile

        try:
            self._scratch = Path(tempfile.mkdtemp(dir=self.target.parent))
            (self._scratch / "program.c").write_text(self.source, encoding="utf-8")
            self._process = subprocess.Popen(
                [command() or "cc", *FLAGS, "program.c", "-o", "program.so", "-lm"],
                cwd=self._scratch, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError:
            self.failed = True

    def _finish(self, status: int) -> None:
        assert self._scratch is not None
        self._process = None
        self.failed = status != 0
        try:
            if not self.failed:
                os.replace(self._scratch / "program.so", self.target)
            shutil.rmtree(self._scratch, ignore_errors=True)
            self.target.with_suffix(".claim").unlink(missing_ok=True)
        except OSError:
            self.failed = True


_jobs: dict[str, _Job] = {}
_one_at_a_time = threading.Lock()  # threads share the jobs


def _lives(pid: str) -> bool:
    """Whether there is a process of that number; what is not written yet, is."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def finish() -> None:
    """Wait for what this process has begun to compile, so that the next one finds it."""
    with _one_at_a_time:
        for job in _jobs.values():
            job.finish()


def library(source: str) -> Any:
    """The compiled C source; None while it is being compiled, and where it cannot be."""
    if command() is None:
        return None
    with _one_at_a_time:
        job = _jobs.get(source)
        if job is None:
            job = _jobs[source] = _Job(source)
        return job.look()
