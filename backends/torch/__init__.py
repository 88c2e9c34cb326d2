"""torch: blocks on the CPU or a CUDA device. 16-bit floats travel as they are and widen on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmerge.checkpoint.dtypes import decode, encode
from refmerge.errors import UsageError

# torch widens these exactly and rounds float32 to them once, to nearest even; all other types are coded on the host.
_NATIVE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TorchBackend:
    def __init__(self, device: str | None) -> None:
        import array_api_compat.torch as xp
        import torch
        from refmerge.backends.torch.kernels import KERNELS

        self._torch, self._device = torch, torch.device(device or "cpu")
        self.name = f"torch:{self._device}" if device else "torch"
        self.xp = xp
        self.block_bytes = 1 << 20 if self._device.type == "cpu" else 1 << 26
        self.kernels = KERNELS

    def put(self, raw: np.ndarray, dtype: str, shape: tuple[int, ...], work: str, out: np.ndarray | None = None) -> Any:
        to = getattr(self._torch, work)
        if dtype in _NATIVE and raw.flags.writeable and raw.ctypes.data % 8 == 0:
            host = self._torch.from_numpy(raw).view(getattr(self._torch, _NATIVE[dtype]))
            # A copy even where dtypes agree: `raw` is a buffer that the next block will overwrite.
            return host.to(self._device).to(to, copy=host.dtype == to and self._device.type == "cpu").reshape(shape)
        values = np.empty(int(np.prod(shape)), dtype=work)
        decode(raw, dtype, values)
        return self._torch.from_numpy(values).to(self._device).reshape(shape)

    def take(self, array: Any, dtype: str, out: np.ndarray) -> None:
        flat = array.detach().reshape(-1).contiguous()
        if dtype in _NATIVE and (flat.dtype == self._torch.float32 or dtype == "F64"):
            to = getattr(self._torch, _NATIVE[dtype])
            out[:] = flat.to(to).cpu().contiguous().view(self._torch.uint8).numpy()
        else:
            encode(flat.cpu().numpy(), dtype, out)


def open(device: str | None) -> TorchBackend:
    try:
        import torch
    except ImportError:
        raise UsageError("backend torch needs PyTorch: pip install 'refmerge[torch]'") from None
    try:
        where = torch.device(device or "cpu")
    except RuntimeError:
        raise UsageError(f"backend torch has no device {device!r}: write torch:cpu or torch:cuda:0") from None
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            raise UsageError(f"backend torch:{device}: this machine has {count} CUDA devices that torch can use")
    return TorchBackend(device)
