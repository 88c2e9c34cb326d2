"""NumPy: blocks in host memory, decoded and encoded by ml_dtypes."""

from __future__ import annotations

import numpy as np

from refmerge.checkpoint.dtypes import decode, encode


class NumpyBackend:
    name = "numpy"
    xp = np
    block_bytes = 1 << 19  # what is read, decoded and computed of four models stays in or near a core's own cache

    def __init__(self) -> None:
        from refmerge.backends.numpy.kernels import KERNELS

        self.kernels = KERNELS

    def put(
        self, raw: np.ndarray, dtype: str, shape: tuple[int, ...], work: str, out: np.ndarray | None = None
    ) -> np.ndarray:
        if out is None:
            out = np.empty(int(np.prod(shape)), dtype=work)
        decode(raw, dtype, out)
        return out.reshape(shape)

    def take(self, array: np.ndarray, dtype: str, out: np.ndarray) -> None:
        encode(np.ascontiguousarray(array).reshape(-1), dtype, out)


def open(device: str | None) -> NumpyBackend:
    from refmerge.errors import UsageError

    if device not in (None, "cpu"):
        raise UsageError(f"backend numpy has no device {device!r}: it computes on the CPU")
    return NumpyBackend()
