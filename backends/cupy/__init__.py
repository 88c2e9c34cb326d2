"""CuPy: blocks on a CUDA device. 16-bit floats travel as they are and widen on the device.

Why NumPy's bits are expected for methods made of exact operations: operations are one kernel each, so a product is rounded
before it is added, and divisions are IEEE's (CuPy passes neither fast-math nor -prec-div=false). With one exception: CuPy
compiles all its kernels with -ftz=true, so operations on float32 take subnormals (below 1.2e-38) for zero and give zero in
their place (cupy#8382). `put` and `take` keep them: they convert by integers and by instructions that do not flush. So a
result may differ from NumPy's where a subnormal goes in, comes out or lies between, the products of tiny numbers that
`group.sum` adds among them. float64 has no flush: `dtype="float64"` avoids it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from refmerge.backends.device import Streams, block_bytes, threads

from refmerge.checkpoint.dtypes import decode, encode
from refmerge.errors import UsageError

_NATIVE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16"}
_PINNED = 1  # cudaMemoryTypeHost


class CupyBackend:
    def __init__(self, index: int) -> None:
        import array_api_compat.cupy as xp
        import cupy
        from refmerge.backends.cupy.kernels import KERNELS

        self._cupy, self._device = cupy, cupy.cuda.Device(index)
        self.name = f"cupy:{index}"
        self.xp = xp
        self.kernels = KERNELS
        self.threads = threads()
        with self._device:  # what CuPy's pool keeps for itself is as good as free
            free = cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()
        self.block_bytes = block_bytes(free, self.threads)
        self._local = threading.local()

    def host(self, nbytes: int) -> np.ndarray:
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    @contextmanager
    def lane(self) -> Iterator[None]:
        with self._device, _streams(self._device.id).borrow() as stream, stream:
            yield

    def put(self, raw: np.ndarray, dtype: str, shape: tuple[int, ...], work: str, out: np.ndarray | None = None) -> Any:
        self._device.use()  # for this thread from here on: the method's own arrays are to be made there as well
        if dtype not in _NATIVE:
            values = np.empty(int(np.prod(shape)), dtype=work)
            decode(raw, dtype, values)
            return self._send(values).reshape(shape)
        x = self._send(raw.view(_NATIVE[dtype]))
        if dtype == "BF16":
            x = widened(x, self._cupy)
        if work == "float64" and x.dtype == np.float32:
            x = _exact("float32", "float64", "cvt.f64.f32")(x)
        return x.astype(work, copy=False).reshape(shape)

    def take(self, array: Any, dtype: str, out: np.ndarray) -> None:
        with self._device:
            flat = self._cupy.ascontiguousarray(array.reshape(-1))
            if dtype == "BF16" and flat.dtype == np.float32:
                flat = narrowed(flat.view(np.uint32), self._cupy)
            elif dtype == "F64" and flat.dtype == np.float32:
                flat = _exact("float32", "float64", "cvt.f64.f32")(flat)
            elif dtype == "F32" and flat.dtype == np.float64:
                flat = _exact("float64", "float32", "cvt.rn.f32.f64")(flat)
            elif dtype == "F16":  # CUDA's own conversion rounds to nearest even, from float64 as well
                flat = flat.astype(np.float16)
            elif dtype not in _NATIVE or dtype == "BF16":
                encode(self._cupy.asnumpy(flat), dtype, out)
                return
            self._fetch(flat.view(np.uint8), out)

    def _send(self, values: np.ndarray) -> Any:
        """To the device; waits for the copy on the current stream, so that the buffer is free again."""
        placed, stream = self._cupy.empty(values.shape, values.dtype), self._cupy.cuda.get_current_stream()
        placed.set(values, stream=stream)  # asarray would copy to pinned memory of its own first
        stream.synchronize()
        return placed

    def _fetch(self, flat: Any, out: np.ndarray) -> None:
        """To host memory, through a pinned buffer where `out` is none; waits on the current stream."""
        if not out.size or self._cupy.cuda.runtime.pointerGetAttributes(out.ctypes.data).type == _PINNED:
            flat.get(out=out)
            return
        stage = getattr(self._local, "stage", None)
        if stage is None or stage.size < out.size:
            stage = self._local.stage = self.host(out.size)
        flat.get(out=stage[: out.size])
        out[:] = stage[: out.size]


def widened(codes: Any, xp: Any) -> Any:
    """The float32 of each bfloat16, which is its upper half, given and taken as bits."""
    return (codes.astype(xp.uint32) << 16).view(xp.float32)


def narrowed(bits: Any, xp: Any) -> Any:
    """The bfloat16 nearest to each float32, ties to even, both as bits; every NaN stays one."""
    odd = (bits >> 16) & 1
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return xp.where(is_nan, (bits >> 16) | 0x40, (bits + 0x7FFF + odd) >> 16).astype(xp.uint16)


@cache
def _exact(given: str, wanted: str, instruction: str) -> Any:
    """A conversion by one instruction of its own, which keeps subnormals."""
    import cupy

    letter = {"float32": "f", "float64": "d"}
    code = f'asm("{instruction} %0, %1;" : "={letter[wanted]}"(y) : "{letter[given]}"(x));'
    return cupy.ElementwiseKernel(f"{given} x", f"{wanted} y", code, f"refmerge_{given}_{wanted}")


@cache
def _streams(index: int) -> Streams:
    import cupy

    def make() -> Any:
        with cupy.cuda.Device(index):
            return cupy.cuda.Stream(non_blocking=True)

    return Streams(make)


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
