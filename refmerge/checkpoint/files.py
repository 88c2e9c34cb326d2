"""Positioned reads and writes on regular files, safe to call from several threads at once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import os
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from refmerge.errors import InputError

CACHED = 1e9  # bytes a second; what is read faster was in memory already
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def shown(text: object) -> str:
    """Quoted, escaped and cut to a length for a message: names come from files that nobody has vetted."""
    text = str(text)
    return repr(text if len(text) <= 200 else text[:200] + "...")


def listed(names: Iterable[object]) -> str:
    """Names for a message, at most eight of them."""
    texts = [shown(n) for n in names]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")


@contextlib.contextmanager
def readable(path: object) -> Iterator[None]:
    """InputError for whatever the system says against reading what lies at `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error


class PositionedFile:
    """An open file, read or written at explicit offsets."""

    def __init__(self, descriptor: int, mode: str) -> None:
        self._file = io.FileIO(descriptor, mode)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._waited = True  # whether the last read had to wait for the disk

    def stat(self) -> os.stat_result:
        return os.fstat(self._descriptor)

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` (bytes) from `offset` on; returns how many bytes there were, fewer only at the file's end."""
        done, began = 0, time.perf_counter()
        while done < len(buffer):
            # One call may give less than asked: Linux stops at 2 GiB.
            got = self._read_some(buffer[done:], offset + done)
            if not got:
                break
            done += got
        self._waited = done < CACHED * (time.perf_counter() - began)
        return done

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data` (bytes) at `offset`."""
        done = 0
        while done < len(data):
            done += self._write_some(data[done:], offset + done)

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer)

    def _write_some(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, data, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.write(data)

    def will_read(self, offset: int, size: int) -> None:
        """Let the system fetch these bytes before they are asked for: several reads are then in flight at a time. Bytes that
        it has are not worth the call, which looks at each page."""
        if self._waited and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def begin_writing(self, offset: int, size: int) -> None:
        """Let the system begin to bring these bytes to the disk, so that `sync` has less to wait for in the end."""
        if sync_file_range := _sync_file_range():
            sync_file_range(self._descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), 2)  # SYNC_FILE_RANGE_WRITE

    def preallocate(self, size: int) -> None:
        """Give the file its length, and its blocks where the system can: a full disk then shows before the work."""
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except AttributeError:
            self._file.truncate(size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._file.truncate(size)

    def sync(self) -> None:
        """Wait until the data are on the disk itself."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self._descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(self._descriptor)

    def lock(self) -> bool:
        """Hold the file against every other process that asks for it, until this one ends; False if another has it.

        Windows locks bytes instead of files: one far behind what is ever written. A system with neither call has True.
        """
        try:
            import fcntl
        except ImportError:
            return self._lock_byte()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks at all, which is no reason to refuse the work.
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True

    def _lock_byte(self) -> bool:
        try:
            import msvcrt
        except ImportError:
            return True
        os.lseek(self._descriptor, 1 << 40, os.SEEK_SET)
        try:
            msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._file.close()


@functools.cache
def _sync_file_range() -> Any:
    """Linux's call of that name, which Python does not have; None elsewhere."""
    try:
        return ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None


def open_regular(path: Path) -> PositionedFile:
    """Open an existing regular file for reading; InputError for anything else, without blocking on a FIFO."""
    try:
        # stat first: merely opening some devices has effects; fstat again, as the name may have changed hands since.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{shown(path)}: not a regular file")
        descriptor = os.open(path, os.O_RDONLY | _BINARY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    file = PositionedFile(descriptor, "rb")
    try:
        with readable(path):
            regular = stat.S_ISREG(file.stat().st_mode)
        if not regular:
            raise InputError(f"{shown(path)}: not a regular file")
    except InputError:
        file.close()
        raise
    return file


def read_small(path: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes; InputError where it is larger or cannot be read."""
    file = open_regular(path)
    try:
        size = file.stat().st_size
        if size > limit:
            raise InputError(f"{shown(path)}: {size} bytes; at most {limit} are accepted")
        data = bytearray(size)
        if file.read_at(memoryview(data), 0) != size:
            raise InputError(f"{shown(path)}: became shorter while it was read")
        return bytes(data)
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    finally:
        file.close()


def create_exclusive(path: Path) -> PositionedFile:
    """Create a file that must not exist, with the mode that the umask leaves."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY | getattr(os, "O_NOFOLLOW", 0)
    return PositionedFile(os.open(path, flags, 0o666), "rb+")


def open_for_writing(path: Path) -> PositionedFile:
    """Open a file of our own that is there already."""
    return PositionedFile(os.open(path, os.O_RDWR | _BINARY | getattr(os, "O_NOFOLLOW", 0)), "rb+")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system lets a directory be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
