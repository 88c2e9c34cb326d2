from collections.abc import Mapping
from typing import Literal

import numpy as np

from refmerge.api import prepare
from refmerge.checkpoint import CheckpointWriter, open_checkpoint, parse_size, same_or_inside
from refmerge.errors import UsageError
from refmerge.methods.subspaces.low_rank_residual import as_matrix, decomposed, low_rank_residual
from refmerge.numeric import scores
from refmerge.procedure import procedure


@procedure("low_rank_store", paper="arXiv:2305.18425")
def low_rank_store(
    model,
    base,
    out,
    *,
    budget: int | str,
    bits: int = 8,
    integers: Literal["equal", "base"] = "equal",
    overwrite: bool = False,
):
    """Write what fine-tuning changed as sums of products of two vectors, in whole numbers of `bits` bits, and as many of
    them as fit into `budget` bytes. Returns the open checkpoint; `low_rank_restore` adds it to the base.

    model, base: a path or an open checkpoint, or a mapping name -> array. out: a folder, or a file that ends in
    .safetensors.
    """
    model, base = (x if isinstance(x, Mapping) else open_checkpoint(x) for x in (model, base))
    if type(bits) is not int or not 2 <= bits <= 16:
        raise UsageError(f"low_rank_store: bits = {bits!r} is no whole number in [2, 16]")
    left_over = parse_size(budget)
    plan = prepare([model], low_rank_residual, base=base, integers=integers)
    for c in plan.checkpoints:
        if same_or_inside(out, c.path):
            raise UsageError(f"output {str(out)!r} lies in an input, {str(c.path)!r}: inputs are never written to")
    tensors = {t.name: as_matrix(np.empty(t.shape, np.bool_)).shape for t in plan.work.tensors}
    wide = {t.name: "F64" if t.work == "float64" else "F32" for t in plan.work.tensors}
    # 1. residuals, and their singular values
    values = {name: decomposed(residual(model, base, name), name)[1] for name in tensors}
    # 2. allocate ranks
    price = {name: sum(-(-n * bits // 8) for n in tensors[name]) + int(wide[name][1:]) // 8 for name in tensors}
    ranks = allocated(values, tensors, price, left_over)
    # 3. quantise, and write
    layout = {}
    for name, r in ranks.items():
        if r:
            layout[f"scale/{name}"] = (wide[name], (r,))
            for side, n in zip(("left", "right"), tensors[name]):
                layout[f"{side}/{name}"] = ("U8", (r, -(-n * bits // 8)))
    with CheckpointWriter(out, layout, overwrite=overwrite, metadata={"bits": str(bits)}) as writer:
        for name, r in ranks.items():
            if r:
                U, S, Vt = decomposed(residual(model, base, name), name)
                q, p = quantised(U[:, :r].T, bits), quantised(Vt[:r], bits)
                scale = (S[:r] * along(U[:, :r].T, q) * along(Vt[:r], p)).astype(f"f{int(wide[name][1:]) // 8}")
                for key, x in (("scale", scale), ("left", packed(q, bits)), ("right", packed(p, bits))):
                    writer.write(f"{key}/{name}", 0, x.reshape(-1).view(np.uint8))
    return open_checkpoint(out)


def residual(model, base, name):
    """R = W - W_0 in float64, as a matrix."""
    return as_matrix(scores(model[name]) - scores(base[name]))


def allocated(values, shapes, price, budget):
    """How many terms of each tensor are kept: those that take the most from the squared error for each byte come first, of
    equal ones the tensor with the lower name, and what does not fit any more is passed over."""
    terms = []
    for name, S in values.items():
        noise = max(shapes[name]) * np.finfo(np.float64).eps * max(S, default=0.0)  # what rounding makes of a zero
        terms += [(-float(s) ** 2 / price[name], name, i) for i, s in enumerate(S) if s > noise]
    ranks = dict.fromkeys(values, 0)
    for _, name, i in sorted(terms):
        if ranks[name] == i and price[name] <= budget:
            ranks[name] += 1
            budget -= price[name]
    return ranks


def quantised(x, bits):
    """Whole numbers |q| < 2^(bits-1) for each row of x, the largest as large as can be."""
    top = 2 ** (bits - 1) - 1
    return np.clip(np.rint(x / (np.max(np.abs(x), axis=1, keepdims=True) / top)), -top, top)


def along(x, q):
    """The coefficient of each row q that comes nearest to the row x."""
    return np.sum(x * q, axis=1) / np.sum(q * q, axis=1)


def packed(q, bits):
    """Rows of whole numbers, raised by 2^(bits-1) - 1 to be none below zero, as rows of bits, the highest first."""
    codes = np.ascontiguousarray(q + (2 ** (bits - 1) - 1), dtype=">u2")
    planes = np.unpackbits(codes.view(np.uint8).reshape(*q.shape, 2), axis=2)[:, :, 16 - bits :]
    return np.packbits(planes.reshape(len(q), -1), axis=1)
