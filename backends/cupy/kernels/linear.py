"""linear in one pass over device memory. The method's own text, operation by operation, passes over it five times."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refmerge.method import PerModel
from refmerge.methods.averaging.linear import linear as reference
from refmerge.numeric import total


def linear(models, *, weight: PerModel[float] = 1.0, normalize: bool = True):
    import cupy

    if models[0].dtype != np.float32:
        return reference.run(models, weight=weight, normalize=normalize)
    out, flag = cupy.empty(models[0].shape, np.float32), cupy.empty(1, np.int32)
    flat = [x.reshape(-1) for x in models]
    if not into(out.reshape(-1), flag, flat, weight=weight, normalize=normalize):
        return reference.run(models, weight=weight, normalize=normalize)
    return out


def into(out: Any, flag: Any, models: Any, *, weight: Any, normalize: bool) -> bool:
    """The merge of flat arrays of float32 or float16, computed in float32 and written into `out`, flat as well. flag[0]
    becomes 1 where something is not finite, and stays as it was elsewhere. False, and nothing done, where the method's
    text is needed: for what is not contiguous, wider, or refused."""
    everything = [out, *models]
    w = total(weight)
    if any(x.dtype not in (np.float32, np.float16) or not x.flags.c_contiguous for x in everything):
        return False
    if normalize and w == 0:
        return False
    c = [np.float32(w_n / w if normalize else w_n) for w_n in weight]
    with out.device:
        _kernel(tuple(str(x.dtype) for x in everything))(*models, *c, out, flag)
    return True


def source(n: int) -> tuple[str, str]:
    """(a name, the operation) of the kernel for n models. Instructions are spelled out: so they are neither fused nor do
    they flush subnormals, as CuPy's own kernels do."""
    lines = ["float p, s, x; unsigned int e = 0;"]
    for i in range(n):
        lines += [
            f"x = (float)x{i};",
            "e |= (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u;",
            f'asm("mul.rn.f32 %0, %1, %2;" : "=f"(p) : "f"(c{i}), "f"(x));',
            'asm("add.rn.f32 %0, %1, %2;" : "=f"(s) : "f"(s), "f"(p));' if i else "s = p;",
        ]
    lines += ["y = s;", "x = (float)y;", "e |= (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u;", "if (e) flag[0] = 1;"]
    return f"refmerge_linear_{n}", "\n".join(lines)


@cache
def _kernel(dtypes: tuple[str, ...]) -> Any:
    import cupy

    out, *models = dtypes
    ins = [f"{t} x{i}" for i, t in enumerate(models)] + [f"float32 c{i}" for i in range(len(models))]
    name, operation = source(len(models))
    return cupy.ElementwiseKernel(", ".join(ins), f"{out} y, raw int32 flag", operation, name)


linear.ulps = 0
linear.into = into
