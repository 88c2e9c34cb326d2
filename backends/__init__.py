"""Backends: where blocks of a merge live and how bytes get there and back. They hold no arithmetic.

A backend is a module with `open(device: str | None) -> Backend`, registered in the entry-point group
`refmerge.backends`. `open` raises `refmerge.errors.UsageError` where its library or device is not there.

A backend of a device may have three more members, which whoever runs blocks looks for (backends/device.py):

host(nbytes) -> uint8 array: host memory that the device copies from and to by itself (pinned), for buffers.
lane() -> context manager: what a worker thread holds while it runs blocks, such as a stream of its own.
threads: how many worker threads keep the device busy, where the caller does not say.

One that cannot compute in a work dtype says so in `without`, a mapping dtype -> reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

import numpy as np


class Backend(Protocol):
    """Six members and no arithmetic.

    name: as a user writes it, "torch:cuda:0".
    xp: the array API namespace of its arrays (array-api-compat's).
    block_bytes: how many bytes of the work dtype a block holds by default.
    kernels: method name -> fast twin (see backends/<name>/kernels).
    """

    name: str
    xp: ModuleType
    block_bytes: int
    kernels: Mapping[str, Any]

    def put(self, raw: np.ndarray, dtype: str, shape: tuple[int, ...], work: str, out: np.ndarray | None = None) -> Any:
        """Bytes of a tensor (uint8, 1-d; safetensors dtype name) as an array of the work dtype, exactly.

        `raw` may be overwritten as soon as `put` returns. `out` is host memory of the work dtype that the backend may decode
        into; the array may then share it.
        """

    def take(self, array: Any, dtype: str, out: np.ndarray) -> None:
        """The array's values as bytes of `dtype` into `out` (uint8, 1-d), rounded once to nearest even.

        The bytes are there when `take` returns.
        """
