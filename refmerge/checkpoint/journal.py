"""What is known of an unfinished output: which merge it is of, and which of its tensors are safe on the disk.

A journal lies beside the hidden partial output, `.NAME.partial-<random>.journal`: a line that says which merge it is, then a
line with the names of more finished tensors each time, written only after their bytes have reached the disk. Whoever writes
the output holds the journal locked, so that two runs never write to one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from refmerge.checkpoint.files import PositionedFile, create_exclusive, open_for_writing, shown
from refmerge.errors import UsageError

__all__ = ["Journal", "beside", "take_up", "unfinished"]

PATIENCE = 10.0  # seconds: the workers of a run that was killed end a little later than it
_SUFFIX = ".journal"
_FORMAT = 1


class Journal:
    """An open journal, locked. partial: the output it speaks of. merge: part of the merge -> digest. finished: names."""

    def __init__(self, partial: Path, file: PositionedFile, merge: Mapping[str, str], finished: set[str], end: int) -> None:
        self.partial, self.merge, self.finished = partial, dict(merge), finished
        self._file, self._end = file, end

    @classmethod
    def create(cls, partial: Path, merge: Mapping[str, str]) -> Journal:
        """Begin the journal of an output that is laid out and has no tensors yet."""
        journal = cls(partial, create_exclusive(beside(partial)), merge, set(), 0)
        journal._file.lock()
        journal._append({"refmerge": _FORMAT, "merge": journal.merge})
        return journal

    def note(self, names: Iterable[str]) -> None:
        """These tensors have been synced."""
        names = sorted(names)
        self._append(names)
        self.finished.update(names)

    def _append(self, line: Any) -> None:
        data = json.dumps(line).encode() + b"\n"
        self._file.write_at(memoryview(data), self._end)
        self._file.sync()
        self._end += len(data)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The output is finished, or gone."""
        self.close()
        with contextlib.suppress(OSError):
            beside(self.partial).unlink()


def unfinished(target: Path) -> list[Path]:
    """The journals of partial outputs beside `target`, which need not exist."""
    prefix = f".{target.name}.partial-"
    try:
        names = sorted(os.listdir(target.parent))
    except OSError:
        return []
    return [target.parent / name for name in names if name.startswith(prefix) and name.endswith(_SUFFIX)]


def take_up(target: Path, merge: Mapping[str, str]) -> Journal | None:
    """The journal of the output of this very merge that an earlier run left unfinished; None where there is none.

    What has no finished tensor is removed. UsageError where there are only outputs of other merges, saying in what they
    differ, or one that another process is writing.
    """
    found: list[Journal] = []
    others: list[str] = []
    try:
        for path in unfinished(target):
            journal = _opened(path)
            if not journal.finished or not os.path.lexists(journal.partial):
                _discard(journal.partial)
                journal.remove()
            elif journal.merge != merge:
                parts = [part for part in merge if journal.merge.get(part) != merge[part]]
                others.append(f"{shown(journal.partial)} is of another merge (different: {', '.join(parts)})")
                journal.close()
            else:
                found.append(journal)
        if not found and others:
            raise UsageError(
                f"{'; '.join(others)}: remove it and its journal, or leave --resume out to start anew beside it"
            )
    except BaseException:
        for journal in found:
            journal.close()
        raise
    found.sort(key=lambda journal: len(journal.finished))
    for journal in found[:-1]:
        journal.close()
    return found[-1] if found else None


def _opened(path: Path) -> Journal:
    """A journal as it is on the disk, locked. What its last writer did not finish writing does not count."""
    file = open_for_writing(path)
    try:
        until = time.monotonic() + PATIENCE
        while not file.lock():
            if time.monotonic() > until:
                raise UsageError(f"{shown(path)}: another process is writing this output")
            time.sleep(0.1)
        data = bytearray(file.stat().st_size)
        file.read_at(memoryview(data), 0)
        partial = path.with_name(path.name.removesuffix(_SUFFIX))
        merge: dict[str, str] = {}
        finished: set[str] = set()
        end = 0
        for number, line in enumerate(bytes(data).splitlines(keepends=True)):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or isinstance(entry, dict) != (number == 0):
                break
            if number == 0:
                merge = entry.get("merge", {}) if entry.get("refmerge") == _FORMAT else {}
            else:
                finished.update(entry)
            end += len(line)
        return Journal(partial, file, merge, finished, end)
    except BaseException:
        file.close()
        raise


def beside(partial: Path) -> Path:
    """Where the journal of a partial output lies."""
    return partial.with_name(partial.name + _SUFFIX)


def _discard(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            partial.unlink()
