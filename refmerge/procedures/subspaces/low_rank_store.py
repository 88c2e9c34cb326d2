from collections.abc import Mapping
from typing import Literal

import numpy as np

from refmerge.api import prepare
from refmerge.checkpoint import CheckpointWriter, name_of, open_checkpoint, parse_size
from refmerge.errors import UsageError
from refmerge.matrices import decomposed
from refmerge.methods.subspaces.low_rank_residual import as_matrix, finite, low_rank_residual
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.stores import refuse


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
    plan = prepare([model], low_rank_residual, base=base, integers=integers, missing="skip")
    refuse(plan, base, out)
    shapes = {t.name: as_matrix(np.empty(t.shape, np.bool_)).shape for t in plan.work.tensors}
    kinds = {t.name: np.dtype(t.work) for t in plan.work.tensors}
    # 1. residuals, and their singular values
    values = {name: np.linalg.svd(residual(model, base, name), compute_uv=False) for name in shapes}
    # 2. allocate ranks
    lengths = {name: [-(-n * bits // 8) for n in shape] for name, shape in shapes.items()}
    price = {name: sum(length) + kinds[name].itemsize for name, length in lengths.items()}
    ranks = {name: r for name, r in allocated(values, shapes, price, left_over).items() if r}
    # 3. quantise, and write
    layout = {f"scale/{name}": (name_of(kinds[name]), (r,)) for name, r in ranks.items()}
    for i, side in enumerate(("left", "right")):
        layout |= {f"{side}/{name}": ("U8", (r, lengths[name][i])) for name, r in ranks.items()}
    with CheckpointWriter(out, layout, overwrite=overwrite, metadata={"bits": str(bits)}) as writer:
        for name, r in ranks.items():
            U, S, V = decomposed(residual(model, base, name))
            u, v = U[:, :r].T, V[:, :r].T
            q, p = quantised(u, bits), quantised(v, bits)
            sigma = (S[:r] * along(u, q) * along(v, p)).astype(kinds[name])
            for side, x in (("scale", sigma), ("left", packed(q, bits)), ("right", packed(p, bits))):
                writer.write(f"{side}/{name}", 0, x.reshape(-1).view(np.uint8))
    return open_checkpoint(out)


def residual(model, base, name):
    """R = theta - theta_0 in float64, as a matrix."""
    return finite(as_matrix(scores(model[name]) - scores(base[name])), name)


def allocated(values, shapes, price, budget):
    """How many terms of each tensor are kept: those that take the most from the squared error for each byte come first, of
    equal ones the tensor with the lower name, and what does not fit any more is passed over."""
    terms = []
    for name, S in values.items():
        noise = max(shapes[name]) * np.finfo(np.float64).eps * max(S, default=0.0)  # what rounding makes of a zero
        terms += [(-(float(s) ** 2) / price[name], name, i) for i, s in enumerate(S) if s > noise]
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
