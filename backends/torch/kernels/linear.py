"""linear in one pass over device memory. The method's own text, operation by operation, passes over it five times."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refmerge.method import PerModel
from refmerge.methods.averaging.linear import linear as reference
from refmerge.numeric import total


def linear(models, *, weight: PerModel[float] = 1.0, normalize: bool = True):
    import torch

    if not (models[0].is_cuda and models[0].dtype == torch.float32 and _triton()):
        return reference.run(models, weight=weight, normalize=normalize)
    out = torch.empty(models[0].shape, dtype=torch.float32, device=models[0].device)
    flag = torch.empty(1, dtype=torch.int32, device=out.device)
    if not into(out.view(-1), flag, [x.reshape(-1) for x in models], weight=weight, normalize=normalize):
        return reference.run(models, weight=weight, normalize=normalize)
    return out


def into(out: Any, flag: Any, models: Any, *, weight: Any, normalize: bool) -> bool:
    """The merge of flat tensors of any floating dtype up to 32 bits, computed in float32 and written into `out`, flat as
    well. flag[0] becomes 1 where something is not finite, and stays as it was elsewhere. False, and nothing done, where
    the method's text is needed: for what is not contiguous on one CUDA device, wider, or refused."""
    import torch

    everything = [out, flag, *models]
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    if not (_triton() and all(x.is_cuda and x.device == out.device and x.is_contiguous() for x in everything)):
        return False
    w = total(weight)
    if any(x.dtype not in narrow for x in (out, *models)) or (normalize and w == 0):
        return False
    from refmerge.backends.torch.kernels._fused import scaled_sum

    c = [float(np.float32(w_n / w if normalize else w_n)) for w_n in weight]
    with torch.cuda.device(out.device):
        scaled_sum(models, c, out, flag)
    return True


@cache
def _triton() -> bool:
    """Whether there is a Triton whose kernels take tuples."""
    try:
        import triton
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


linear.ulps = 0
linear.into = into
