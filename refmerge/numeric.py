"""The exact primitives that methods share. Array libraries are told apart here and nowhere else.

Rules (spec/README.md, "Numbers"): models are summed by an explicit left fold; sums over elements are trees of a fixed
shape, so that no block size, thread count or library changes a bit; transcendental functions and square roots are
taken of host numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import array_api_compat
import ml_dtypes  # noqa: F401 (NumPy knows bfloat16 by name)
import numpy as np
from array_api_compat import device, is_cupy_array, is_numpy_array, is_torch_array

from refmerge.fused import LANES, LEAF, NARROW, STRETCH, Lazy, compute, mask, run, stretch_sums, support
from refmerge.native import Rounded

__all__ = [
    "array_namespace", "at_least_float32", "at_precision", "at_ranks", "by_columns", "clamp", "divided", "exact_sum",
    "expansion", "host", "hosts", "in_float32", "in_float64", "indicator", "keys_of", "leaf_sums", "like", "mean", "ranks",
    "rounded_like", "scores", "stacked_sum", "top_along", "total", "tree_sum", "value_of",
]  # fmt: skip


def array_namespace(*xs: Any) -> Any:
    """The array API namespace of arrays: NumPy itself for its own, which is one since 2.1, where array-api-compat's wrapper
    takes a tenth of a second to import; array-api-compat's for all others. TypeError for a mixture."""
    if all(type(x) is np.ndarray for x in xs):
        return np
    for x in xs:
        if type(x) is Lazy:
            return x.__array_namespace__()
    return array_api_compat.array_namespace(*xs)


def total(xs: Iterable[Any]) -> Any:
    """x_1 + x_2 + ... by a left fold: torch's own sum over a stacked axis rounds in another order."""
    first, *rest = xs
    for x in rest:
        first = first + x
    return first


def stacked_sum(xs: Iterable[Any]) -> Any:
    """The sum over a stack of tensors, for tools that make one: it begins with 0, so that it is never -0.0, and 16-bit
    tensors are added in float32 and rounded once."""
    xs = list(xs)
    if isinstance(xs[0], Rounded):
        return Rounded(total(x.values for x in xs) + 0.0, xs[0].dtype)
    xp = array_namespace(xs[0])
    if is_torch_array(xs[0]) and xs[0].dtype in (xp.float16, xp.bfloat16):
        return xp.astype(total(xp.astype(x, xp.float32) for x in xs) + 0.0, xs[0].dtype)
    return total(xs) + 0.0


def mean(xs: Sequence[Any]) -> Any:
    """(1/N) x_1 + ... + (1/N) x_N, the coefficient computed on the host."""
    return total((1 / len(xs)) * x for x in xs)


def clamp(x: float, low: float, high: float) -> float:
    """A host number held inside [low, high]; NaN stays NaN."""
    return low if x < low else high if x > high else x


def at_precision(value: Any, x: Any) -> Any:
    """A host number (or NumPy array of them) rounded to the dtype of x, for tools that hold such numbers in tensors."""
    rounded = np.asarray(value, dtype=np.float64).astype(_in_numpy(x.dtype)).astype(np.float64)
    return rounded if isinstance(value, np.ndarray | np.generic) else float(rounded)


@cache
def _in_numpy(dtype: Any) -> np.dtype:
    """NumPy's dtype of the same name as a library's."""
    return np.dtype(str(dtype).rpartition(".")[2])


def divided(x: Any, number: float) -> Any:
    """x / number, the quotient rounded once on all libraries, and where x has 16 bits once more: torch multiplies by the
    reciprocal on a device, and not on a CPU."""
    if isinstance(x, Rounded | Lazy) or is_numpy_array(x):
        return x / float(number)
    wide = at_least_float32(x)
    quotient = wide / array_namespace(wide).full_like(wide, float(number))
    return quotient if wide is x else array_namespace(x).astype(quotient, x.dtype)


def indicator(condition: Any, like: Any) -> Any:
    """1 where the condition holds and 0 elsewhere, in the dtype of `like`: a mask is a factor, as the papers write it."""
    rounded = isinstance(like, Rounded)  # whose tests are NumPy's
    return (array_namespace(like) if rounded else array_namespace(condition, like)).astype(condition, like.dtype)


# ---------------------------------------------------------------------------------------------------------------- host


def host(x: Any) -> np.ndarray:
    """The array in host memory, as NumPy; 16-bit and smaller floats widened to float32."""
    if is_torch_array(x):
        x = x.detach().cpu()
        x = (x if x.dtype.itemsize >= 4 or not x.dtype.is_floating_point else x.float()).numpy()
    elif is_cupy_array(x):
        x = x.get()
    else:
        x = np.asarray(x)
    if x.dtype.kind in "fV" and x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float32)
    return x


def hosts(xs: Sequence[Any]) -> list[np.ndarray]:
    """`host` of several arrays, which are computed in one pass where they are not there yet."""
    compute(*(x for x in xs if type(x) is Lazy))
    return [host(x) for x in xs]


def scores(x: Any) -> np.ndarray:
    """A float64 copy in host memory. Scores on which a discrete choice rests are computed once, in one place, so that all
    backends choose alike."""
    return host(x).astype(np.float64)


def like(values: np.ndarray, x: Any) -> Any:
    """Host values as an array of x's library, dtype and device."""
    if type(x) is Lazy:
        is_mask = values.dtype == bool and values.shape == x.shape
        return mask(values, x.shape) if is_mask else values.astype(x.dtype, copy=False)
    if is_numpy_array(x):
        return values.astype(x.dtype, copy=False)
    xp = array_namespace(x)
    return xp.astype(xp.asarray(values, device=device(x)), x.dtype, copy=False)


# ---------------------------------------------------------------------------------------------------------------- sums


def _halve(x: Any, axis: int, to: int = 1) -> Any:
    """Sum along an axis of 2^k entries by halving: x[:512] + x[512:], and so on down to `to` entries."""
    width = x.shape[axis]
    index: list[Any] = [slice(None)] * x.ndim
    while width > to:
        width //= 2
        low, high = index.copy(), index.copy()
        low[axis], high[axis] = slice(0, width), slice(width, 2 * width)
        x = x[tuple(low)] + x[tuple(high)]
    return x


def _leaves(rows: Sequence[Any]) -> Any:
    """(n, stretches, LANES) sums of the columns of n arrays (stretches, height, LANES), each a tree over the height.

    Rows are halved in the arrays' own dtype down to NARROW, where what is left is an eighth, and from there in float64.
    """
    xp = array_namespace(rows[0])
    narrow = [_halve(x, 1, to=NARROW) for x in rows]
    return _halve(xp.astype(xp.stack(narrow), xp.float64), 2)


def leaf_sums(*xs: Any) -> list[np.ndarray]:
    """Sums of the leaves of 1-d arrays of one length that begin at a stretch: for each array, in host memory, 64 of float64
    for each stretch of 65536 elements.

    A stretch, filled up with zeros, is 1024 rows of 64 elements, and each of its columns is a leaf, summed by halving.
    """
    if not xs:
        return []
    if all(type(x) is Lazy for x in xs):
        return _lazy_sums(xs)
    arrays = [at_least_float32(x if type(x) is not Lazy else host(x)) for x in xs]
    xp, size = array_namespace(arrays[0]), arrays[0].shape[0]
    whole = size // STRETCH * STRETCH
    leaves = []
    if whole:
        leaves.append(_leaves([xp.reshape(x[:whole], (-1, LEAF, LANES)) for x in arrays]))
    if size > whole:
        used = -(-(size - whole) // LANES)
        height = 1 << (used - 1).bit_length()  # rows of zeros above it add nothing
        padded = []
        for x in arrays:
            rest = xp.zeros((height * LANES,), dtype=x.dtype, device=device(x))
            rest[: size - whole] = x[whole:]
            padded.append(xp.reshape(rest, (1, height, LANES)))
        leaves.append(_leaves(padded))
    if not leaves:
        return [np.zeros(0) for _ in arrays]
    joined = host(leaves[0] if len(leaves) == 1 else xp.concat(leaves, axis=1))
    return [x.reshape(-1) for x in joined]


def _lazy_sums(xs: Sequence[Lazy]) -> list[np.ndarray]:
    """Whole stretches without arrays in between, where that can be; the rest of a tensor as arrays."""
    whole = xs[0].size // STRETCH * STRETCH
    found = stretch_sums(xs) if whole else None
    if found is None:
        return leaf_sums(*hosts(xs))
    if whole == xs[0].size:
        return found
    rest = leaf_sums(*(run(x, slice(whole, None)) for x in xs))
    return [np.concatenate(both) for both in zip(found, rest)]


def at_least_float32(x: Any) -> Any:
    """x as it is, 16-bit floats widened to float32: a product of them is then not rounded to 16 bits before it is summed."""
    if isinstance(x, Rounded):
        return x.values
    xp = array_namespace(x)
    return x if x.dtype in (xp.float32, xp.float64) else xp.astype(x, xp.float32)


def in_float32(x: Any) -> Any:
    """x in float32: 16-bit floats widened, float64 rounded."""
    if isinstance(x, Rounded):
        return x.values
    xp = array_namespace(x)
    return x if x.dtype == xp.float32 else xp.astype(x, xp.float32)


def rounded_like(x: Any, other: Any) -> Any:
    """x in the dtype of another array, rounded where that is narrower."""
    if isinstance(other, Rounded):
        return x if isinstance(x, Rounded) else Rounded(x, other.dtype)
    return x if x.dtype == other.dtype else array_namespace(x).astype(x, other.dtype)


def in_float64(x: Any) -> Any:
    """x in float64, where products of float32 are exact."""
    if isinstance(x, Rounded):
        x = x.values
    xp = array_namespace(x)
    return xp.astype(x, xp.float64, copy=False)


def tree_sum(x: Any, axis: int | None = None) -> Any:
    """Sum over one axis in float64: halving trees over leaves of 1024, then a left fold over the leaves.

    Without an axis the correctly rounded sum of the leaf sums of x in C order, as a Python float.
    """
    xp = array_namespace(x)
    if axis is None:
        return exact_sum(leaf_sums(xp.reshape(x, (-1,)))[0].tolist())
    axis %= x.ndim
    n = x.shape[axis]
    shape = [s for i, s in enumerate(x.shape) if i != axis]
    result = xp.zeros(tuple(shape), dtype=xp.float64, device=device(x))
    for start in range(0, n, LEAF):
        index: list[Any] = [slice(None)] * x.ndim
        index[axis] = slice(start, min(start + LEAF, n))
        part = xp.astype(x[tuple(index)], xp.float64)
        if n - start < LEAF:
            pad = [*part.shape]
            pad[axis] = LEAF - part.shape[axis]
            part = xp.concat([part, xp.zeros(tuple(pad), dtype=xp.float64, device=device(x))], axis=axis)
        leaf = xp.squeeze(_halve(part, axis), axis=axis)
        result = leaf if start == 0 else result + leaf
    return result


def exact_sum(values: Sequence[float]) -> float:
    """The correctly rounded sum, in whatever order the values come; infinities and NaN as in IEEE arithmetic."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        if all(map(math.isfinite, values)):  # only a partial sum overflowed
            from fractions import Fraction

            exact = sum(map(Fraction, values))
            try:
                return float(exact)
            except OverflowError:
                return math.inf if exact > 0 else -math.inf
        special = {v for v in values if not math.isfinite(v)}
        return special.pop() if len(special) == 1 else math.nan


def expansion(values: Sequence[float]) -> list[float]:
    """A few floats whose exact sum is that of `values`: what is kept of a block until all blocks are summed."""
    parts: list[float] = []
    while True:
        try:
            rest = math.fsum([*values, *(-p for p in parts)])
        except (OverflowError, ValueError):
            return [v for v in values if v]
        if rest == 0 or not math.isfinite(rest):
            return parts if rest == 0 else [*parts, rest]
        parts.append(rest)


def by_columns(f: Callable[..., Sequence[np.ndarray]], *matrices: Any) -> np.ndarray:
    """Scores of the columns of matrices: f of float64 host copies of a strip of columns at a time, so that no whole matrix
    is copied. f gives a sequence of arrays of one number a column; they come back stacked."""
    rows, columns = matrices[0].shape
    width = max(1, (1 << 20) // max(rows, 1))
    strips = []
    with np.errstate(all="ignore"):
        for start in range(0, max(columns, 1), width):
            stop = min(start + width, columns)
            strips.append(np.stack(f(*(scores(x[:, start:stop]) for x in matrices))))
    return np.concatenate(strips, axis=-1)


# ------------------------------------------------------------------------------------------------------- order and ranks


def _order_key(x: Any) -> Any:
    """x with -0.0 as 0.0: adding zero is exact otherwise."""
    return x + 0.0


RANKED = 1 << 16  # entries of as many rows as are ranked at a time: what is made of them stays in cache
PACKED = 768  # columns up to which sorting keys with their places is faster than sorting digits


def ranks(x: Any, axis: int = -1) -> np.ndarray:
    """Ascending ranks 0..n-1 along an axis on the host (int64), stable: ties in index order, NaN last."""
    x = host(x)
    return _at_ranks(np.arange(x.shape[axis]), x, axis)


def at_ranks(values: np.ndarray, x: Any, axis: int = -1) -> Any:
    """values[r] at each entry of x that has rank r along the axis, as an array like x."""
    return like(_at_ranks(like(values, host(x)), host(x), axis, type(x) is Lazy), x)


def _at_ranks(values: np.ndarray, x: np.ndarray, axis: int, compiled: bool = False) -> np.ndarray:
    if x.size == 0:
        return np.empty(x.shape, values.dtype)
    across = np.moveaxis(x, axis, -1)
    rows = np.ascontiguousarray(across).reshape(-1, x.shape[axis])
    if compiled and (found := support.at_ranks(values, rows)) is not None:
        return np.moveaxis(found.reshape(across.shape), -1, axis)
    result = np.empty(rows.shape, values.dtype)
    step = max(1, RANKED // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        strip = rows[start : start + step]
        result[start : start + step].reshape(-1)[_ascending(strip)] = np.tile(values, len(strip))
    return np.moveaxis(result.reshape(across.shape), -1, axis)


def _ascending(rows: np.ndarray) -> np.ndarray:
    """The places in a matrix (C order) of the entries of its first row in ascending order, then of its second, ..."""
    n = rows.shape[1]
    starts = np.arange(0, rows.size, n)[:, None]
    if rows.dtype != np.float32 or rows.size >= 1 << 32:
        return (np.argsort(_order_key(rows) if rows.dtype.kind == "f" else rows, axis=1, kind="stable") + starts).reshape(-1)
    if n <= PACKED:
        packed = keys_of(rows).astype(np.uint64)
        packed <<= np.uint64(32)
        packed |= np.arange(rows.size, dtype=np.uint64).reshape(rows.shape)
        packed.sort(axis=1)
        packed &= np.uint64(0xFFFFFFFF)
        return packed.view(np.int64).reshape(-1)
    order = _nearly_ascending(rows, starts)
    if order is not None:
        return order
    # NumPy sorts 16-bit integers digit by digit: by the lower halves, then, stably, by the upper ones.
    key = keys_of(rows)
    order = np.argsort(key.astype(np.uint16), axis=1, kind="stable")
    order += starts
    key >>= np.uint32(16)
    again = np.argsort(key.astype(np.uint16).take(order), axis=1, kind="stable")
    again += starts
    return order.take(again).reshape(-1)


def _nearly_ascending(rows: np.ndarray, starts: np.ndarray) -> np.ndarray | None:
    """As `_ascending`, by one sort of 16-bit codes that are linear in the values: the few neighbours that share a code and
    came in the wrong order are then exchanged until there are none. None where they are not few, or a value not finite."""
    low, high = rows.min(), rows.max()
    with np.errstate(all="ignore"):
        scale = np.float32(65535) / (high - low)
        if not (np.isfinite(scale) and scale > 0):
            return None
        codes = ((rows - low) * scale).astype(np.uint16)
    order = np.argsort(codes, axis=1, kind="stable")
    order += starts
    flat = order.reshape(-1)
    values = rows.take(order)
    for _ in range(16):
        wrong = values[:, 1:] < values[:, :-1]
        at = np.flatnonzero(wrong)
        if not at.size:
            return flat
        if at.size > rows.size // 8:
            return None
        at += at // wrong.shape[1]  # of a pair the left one, counted in whole rows
        at = at[np.concatenate([[True], np.diff(at) > 1])]  # of pairs that overlap, the first
        flat[at], flat[at + 1] = flat[at + 1], flat[at]
        line = values.reshape(-1)
        line[at], line[at + 1] = line[at + 1], line[at]
    return None


def keys_of(x: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of floats of 32 or 64 bits: -0.0 and 0.0 alike, and every NaN alike, above infinity."""
    bits = _order_key(x).view(f"u{x.itemsize}")
    first, nan = _key_range(8 * x.itemsize)
    sign = bits.view(f"i{x.itemsize}") >> (8 * x.itemsize - 1)  # all ones where negative
    bits ^= sign.view(bits.dtype) | bits.dtype.type(1 << (8 * x.itemsize - 1))  # then all bits are turned, else the sign
    bits -= bits.dtype.type(first)  # now -inf is 0, and NaN of both signs is above inf
    return np.minimum(bits, bits.dtype.type(nan), out=bits)


def value_of(key: int, width: int) -> float:
    """The float of a key of so many bits."""
    first, nan = _key_range(width)
    if key == nan:
        return math.nan
    bits, top = key + first, 1 << (width - 1)
    bits = bits - top if bits >= top else ~bits & (2 * top - 1)
    return float(np.array(bits, dtype=f"u{width // 8}").view(f"f{width // 8}")[()])


def _key_range(width: int) -> tuple[int, int]:
    """(what is taken from the turned bits so that -inf becomes 0, the key of NaN, one above that of inf)."""
    mantissa = (1 << {32: 23, 64: 52}[width]) - 1
    return mantissa, (1 << width) - 2 * (mantissa + 1) + 2


def top_along(x: Any, k: int, axis: int = -1) -> Any:
    """0/1 mask of the k largest entries along an axis, exactly k, ties to the lower index, NaN as the largest."""
    values = _order_key(host(x))
    # Descending with ties to the lower index: ascending stable ranks of the reversed axis, counted from the end.
    back = np.flip(ranks(np.flip(values, axis=axis), axis=axis), axis=axis)
    return like((back >= values.shape[axis] - k).astype(np.float32), x)
