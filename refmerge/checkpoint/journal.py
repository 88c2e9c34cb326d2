"""What is known of an unfinished output: which merge it is of, and which of its tensors are safe on the disk.

A journal lies beside the hidden partial output, `.NAME.partial-<random>.journal`: a line that says which merge it is, then a
line with the names of more finished tensors each time, written only after their bytes have reached the disk. Where the
merge needs the results of others first, a line says of each that it is finished, and what its files are; unless they are
to be kept elsewhere they lie in `.NAME.partial-<random>.stages`, each with a journal of its own while it is written. Whoever
writes the output holds the journal locked, so that two runs never write to one.
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

__all__ = ["Journal", "beside", "discard", "stages", "take_up", "unfinished"]

PATIENCE = 10.0  # seconds: the workers of a run that was killed end a little later than it
_SUFFIX = ".journal"
_FORMAT = 1


class Journal:
    """An open journal, locked. partial: the output it speaks of. merge: part of the merge -> digest. finished: names of its
    tensors. made: name of a merge before it -> the fingerprint of its result, None where that was only begun."""

    def __init__(self, partial: Path, file: PositionedFile, merge: Mapping[str, str] | None = None) -> None:
        self.partial, self.merge = partial, dict(merge or {})
        self.finished: set[str] = set()
        self.made: dict[str, Any] = {}
        self._file, self._end = file, 0

    @property
    def holds_something(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self.finished or self.made or os.path.lexists(stages(self.partial)))

    @classmethod
    def create(cls, partial: Path, merge: Mapping[str, str]) -> Journal:
        """Begin the journal of an output that is laid out and has no tensors yet."""
        journal = cls(partial, create_exclusive(beside(partial)), merge)
        journal._file.lock()
        journal._append({"refmerge": _FORMAT, "merge": journal.merge})
        return journal

    def note(self, names: Iterable[str]) -> None:
        """These tensors have been synced."""
        names = sorted(names)
        self._append(names)
        self.finished.update(names)

    def note_made(self, name: str, fingerprint: Any) -> None:
        """The result of a merge before this one is in its place; or, None, is going to be there."""
        self._append({"made": name, "files": fingerprint})
        self.made[name] = fingerprint

    def _append(self, line: Any) -> None:
        data = json.dumps(line).encode() + b"\n"
        self._file.write_at(memoryview(data), self._end)
        self._file.sync()
        self._end += len(data)

    def _take(self, line: bytes, *, first: bool) -> bool:
        """Read a line of the file; whether it was written to its end."""
        try:
            entry = json.loads(line)
        except ValueError:
            return False
        if not line.endswith(b"\n"):
            return False
        if first and isinstance(entry, dict):
            self.merge = entry.get("merge", {}) if entry.get("refmerge") == _FORMAT else {}
        elif not first and isinstance(entry, list):
            self.finished.update(entry)
        elif not first and isinstance(entry, dict) and entry.keys() == {"made", "files"}:
            self.made[entry["made"]] = entry["files"]
        else:
            return False
        self._end += len(line)
        return True

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

    What has nothing finished is removed. UsageError where there are only outputs of other merges, saying in what they
    differ, or one that another process is writing.
    """
    found: list[Journal] = []
    others: list[str] = []
    try:
        for path in unfinished(target):
            journal = _opened(path)
            if not (journal.holds_something and os.path.lexists(journal.partial)):
                discard(journal.partial)
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
    found.sort(key=lambda journal: (len(journal.finished), len(journal.made)))
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
        journal = Journal(path.with_name(path.name.removesuffix(_SUFFIX)), file)
        for number, line in enumerate(bytes(data).splitlines(keepends=True)):
            if not journal._take(line, first=number == 0):
                break
        return journal
    except BaseException:
        file.close()
        raise


def beside(partial: Path) -> Path:
    """Where the journal of a partial output lies."""
    return partial.with_name(partial.name + _SUFFIX)


def stages(partial: Path) -> Path:
    """Where the results lie that a partial output needs first."""
    return partial.with_name(partial.name + ".stages")


def discard(partial: Path) -> None:
    """Remove a partial output, file or folder, and what it needed first, as far as possible: failing at it must not hide why
    it is being removed."""
    for path in (stages(partial), partial):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
