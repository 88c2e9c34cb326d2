"""torch: blocks on the CPU or a CUDA device. 16-bit floats travel as they are and widen on the device.

Why CUDA is expected to give NumPy's bits for methods made of exact operations: eager operations are one kernel each, so a
product is rounded before it is added (no fused multiply-add); torch's kernels are built without fast-math, so divisions
are IEEE's and subnormals are kept; conversions to 16 bits round to nearest even. The payload of a NaN is not kept.
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

# torch widens these exactly and rounds float32 to them once, to nearest even; all other types are coded on the host.
_NATIVE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TorchBackend:
    """On the CPU."""

    block_bytes = 1 << 20

    def __init__(self, device: Any) -> None:
        import array_api_compat.torch as xp
        import torch
        from refmerge.backends.torch.kernels import KERNELS

        self._torch, self._device = torch, device or torch.device("cpu")
        self.name = f"torch:{device}" if device else "torch"
        self.xp = xp
        self.kernels = KERNELS

    def put(self, raw: np.ndarray, dtype: str, shape: tuple[int, ...], work: str, out: np.ndarray | None = None) -> Any:
        to = getattr(self._torch, work)
        if dtype in _NATIVE and raw.size and raw.flags.writeable and raw.ctypes.data % 8 == 0:
            host = self._torch.from_numpy(raw).view(getattr(self._torch, _NATIVE[dtype]))
            # A copy even where dtypes agree: `raw` is a buffer that the next block will overwrite. To a device, `to` waits
            # for the copy on the current stream; out of pinned memory the device makes it by itself.
            return host.to(self._device).to(to, copy=host.dtype == to and self._device.type == "cpu").reshape(shape)
        values = np.empty(int(np.prod(shape)), dtype=work)
        decode(raw, dtype, values)
        return self._torch.from_numpy(values).to(self._device).reshape(shape)

    def take(self, array: Any, dtype: str, out: np.ndarray) -> None:
        flat = array.detach().reshape(-1).contiguous()
        if dtype in _NATIVE and out.size and (flat.dtype == self._torch.float32 or dtype == "F64"):
            self._fetch(flat.to(getattr(self._torch, _NATIVE[dtype])).view(self._torch.uint8), out)
        else:
            encode(flat.cpu().numpy(), dtype, out)

    def _fetch(self, flat: Any, out: np.ndarray) -> None:
        self._torch.from_numpy(out).copy_(flat)  # from a device: waits on the current stream


class TorchCuda(TorchBackend):
    """On a CUDA device."""

    def __init__(self, device: Any) -> None:
        super().__init__(device)
        cuda = self._torch.cuda
        self.threads = threads()
        # What torch's allocator keeps for itself is as good as free.
        kept = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        self.block_bytes = block_bytes(cuda.mem_get_info(device)[0] + kept, self.threads)
        self._local = threading.local()

    def host(self, nbytes: int) -> np.ndarray:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True).numpy()

    @contextmanager
    def lane(self) -> Iterator[None]:
        with _streams(self._device.index).borrow() as stream, self._torch.cuda.stream(stream):
            yield

    def _fetch(self, flat: Any, out: np.ndarray) -> None:
        target = self._torch.from_numpy(out)
        if not out.size or target.is_pinned():
            target.copy_(flat)
            return
        stage = getattr(self._local, "stage", None)
        if stage is None or stage.numel() < out.size:
            stage = self._local.stage = self._torch.empty(out.size, dtype=self._torch.uint8, pin_memory=True)
        stage[: out.size].copy_(flat)
        target.copy_(stage[: out.size])


@cache
def _streams(index: int) -> Streams:
    import torch

    # torch's streams do not wait for the default stream, nor it for them.
    return Streams(lambda: torch.cuda.Stream(torch.device("cuda", index)))


def open(device: str | None) -> TorchBackend:
    try:
        import torch
    except ImportError:
        raise UsageError("backend torch needs PyTorch: pip install 'refmerge[torch]'") from None
    if not device:
        return TorchBackend(None)
    try:
        where = torch.device(device)
    except RuntimeError:
        raise UsageError(f"backend torch has no device {device!r}: write torch:cpu or torch:cuda:0") from None
    if where.type != "cuda":
        return TorchBackend(where)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (where.index or 0) >= count:
        raise UsageError(f"backend torch:{device}: this machine has {count} CUDA devices that torch can use")
    return TorchCuda(where if where.index is not None else torch.device("cuda", torch.cuda.current_device()))
