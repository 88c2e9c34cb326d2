"""The sum of scaled tensors in one pass over device memory, by Triton.

Imported only where there are CUDA tensors: Triton comes with torch's CUDA wheels.
"""

import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def _scaled_sum(xs, cs, out, flag, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(xs[0] + at, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    merged = cs[0] * x
    for i in tl.static_range(1, len(xs)):
        x = tl.load(xs[i] + at, mask=inside, other=0.0).to(tl.float32)
        finite = finite & (tl.abs(x) < float("inf"))
        merged = merged + cs[i] * x
    stored = merged.to(out.dtype.element_ty)
    tl.store(out + at, stored, mask=inside)
    finite = finite & (tl.abs(stored.to(tl.float32)) < float("inf"))
    if tl.min(finite.to(tl.int32), axis=0) == 0:
        tl.store(flag, 1)


def scaled_sum(xs, cs, out, flag):
    """out = c_1 x_1 + ... + c_N x_N, from left to right, each operation rounded to float32 and the result once to out's
    dtype; flag[0] becomes 1 where an input or a result is not finite. Flat and contiguous, all on one device."""
    n = out.numel()
    if n:
        # enable_fp_fusion: a product is to be rounded before it is added.
        _scaled_sum[(triton.cdiv(n, BLOCK),)](tuple(xs), tuple(cs), out, flag, n, BLOCK=BLOCK, enable_fp_fusion=False)
