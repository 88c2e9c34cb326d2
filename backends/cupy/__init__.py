"""CuPy: blocks on a CUDA device. 16-bit floats travel as they are and widen on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmerge.checkpoint.dtypes import decode, encode
from refmerge.errors import UsageError

_NATIVE = {"F64": "float64", "F32": "float32", "F16": "float16"}


class CupyBackend:
    block_bytes = 1 << 26

    def __init__(self, index: int) -> None:
        import array_api_compat.cupy as xp
        import cupy
        from refmerge.backends.cupy.kernels import KERNELS

        self._cupy, self._device = cupy, cupy.cuda.Device(index)
        self.name = f"cupy:{index}"
        self.xp = xp
        self.kernels = KERNELS

    def put(self, raw: np.ndarray, dtype: str, shape: tuple[int, ...], work: str, out: np.ndarray | None = None) -> Any:
        self._device.use()  # for this thread from here on: the method's own arrays are to be made there as well
        if dtype == "BF16":  # a bfloat16 is the upper half of a float32
            bits = self._cupy.asarray(raw.view(np.uint16)).astype(self._cupy.uint32)
            return (bits << 16).view(self._cupy.float32).astype(work, copy=False).reshape(shape)
        if dtype in _NATIVE:
            return self._cupy.asarray(raw.view(_NATIVE[dtype])).astype(work, copy=False).reshape(shape)
        values = np.empty(int(np.prod(shape)), dtype=work)
        decode(raw, dtype, values)
        return self._cupy.asarray(values).reshape(shape)

    def take(self, array: Any, dtype: str, out: np.ndarray) -> None:
        with self._device:
            if dtype in _NATIVE:  # CUDA's own conversions round to nearest even, from float64 as well
                out[:] = self._cupy.asnumpy(array.reshape(-1).astype(_NATIVE[dtype])).view(np.uint8)
            else:
                encode(self._cupy.asnumpy(array.reshape(-1)), dtype, out)


def open(device: str | None) -> CupyBackend:
    try:
        import cupy
    except ImportError:
        raise UsageError("backend cupy needs CuPy: pip install 'refmerge[cupy]'") from None
    index = device.removeprefix("cuda:") if device else "0"
    if not index.isdigit():
        raise UsageError(f"backend cupy has no device {device!r}: write cupy or cupy:0")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if int(index) >= count:
        raise UsageError(f"backend cupy:{index}: this machine has {count} CUDA devices that CuPy can use")
    return CupyBackend(int(index))
