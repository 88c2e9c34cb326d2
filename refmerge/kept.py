"""What a method works out of a whole tensor before it asks about the model, kept until it is merged with the answer.

A question about the model is answered in passes, and each of them runs the method's text again. A decomposition costs so
much more than reading its result that it is worth a file: one without a name, which is gone with the process however that
ends.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Kept", "once"]

_here = threading.local()  # .tensor: the one that this thread merges, a _Tensor or None


@dataclass
class _Tensor:
    """A tensor that is being merged: where its results are kept, and how many there have been in this pass."""

    kept: Kept
    name: str
    calls: int = 0


def once(f: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function of a whole tensor that returns a NumPy array or a tuple of such: computed in the first pass over the
    model, and remembered in the others. It is called in the same order in each of them."""

    @wraps(f)
    def remembered(*args: Any) -> Any:
        tensor = getattr(_here, "tensor", None)
        if tensor is None:
            return f(*args)
        tensor.calls += 1
        key = (tensor.name, tensor.calls)
        if (before := tensor.kept.get(key)) is not None:
            return before
        result = f(*args)
        tensor.kept.put(key, result)
        return result

    return remembered


class Kept:
    """Results of one thread or process, in a file; folder: where its disk is to be used, or None for the system's choice.

    It takes at most half of what the disk has free. What it does not take, or a disk that fails, costs only time.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: Any = None
        self._room: int | None = None
        self._end = 0
        self._known: dict[tuple[str, int], tuple[type, list[tuple[int, np.dtype[Any], tuple[int, ...]]]]] = {}

    @contextlib.contextmanager
    def of(self, tensor: str) -> Iterator[None]:
        """While this tensor is merged."""
        before = getattr(_here, "tensor", None)
        _here.tensor = _Tensor(self, tensor)
        try:
            yield
        finally:
            _here.tensor = before

    def get(self, key: tuple[str, int]) -> Any:
        if key not in self._known:
            return None
        kind, arrays = self._known[key]
        found = []
        try:
            for offset, dtype, shape in arrays:
                x = np.empty(shape, dtype)
                self._file.seek(offset)
                if self._file.readinto(_bytes(x)) != x.nbytes:
                    return None
                found.append(x)
        except OSError:
            return None
        return tuple(found) if kind is tuple else found[0]

    def put(self, key: tuple[str, int], result: Any) -> None:
        import tempfile  # few merges come here

        arrays = result if isinstance(result, tuple) else (result,)
        size = sum(x.nbytes for x in arrays)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (it ends with this object)
                self._room = shutil.disk_usage(self._folder or tempfile.gettempdir()).free // 2
            assert self._room is not None
            if self._end + size > self._room:
                return
            places = []
            self._file.seek(self._end)
            for x in arrays:
                places.append((self._end, x.dtype, x.shape))
                self._file.write(_bytes(np.ascontiguousarray(x)))
                self._end += x.nbytes
            self._file.flush()
        except OSError:
            self._room = 0
            return
        self._known[key] = (type(result), places)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def _bytes(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1).view(np.uint8)
