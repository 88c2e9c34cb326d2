"""The element types of safetensors and exact conversion between them and the work dtypes float32 and float64.

Storage is little-endian, and so is every machine that refmerge runs on; elsewhere importing this module fails.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from refmerge.errors import InputError

if sys.byteorder != "little":
    raise ImportError("refmerge reads and writes little-endian files in place and needs a little-endian machine")

# In the order in which the safetensors crate ranks them: it writes tensors by falling rank, then by name.
DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WORDS = {dtype.name: name for name, dtype in DTYPES.items()}  # as array libraries, recipes and configs call them
OUTPUTS = {word: WORDS[word] for word in ("bfloat16", "float16", "float32", "float64")}  # what results may be asked for in

# Which float types hold every value of which others, smallest first; F16 stands before BF16, and is tried before it.
_HOLDS: dict[str, frozenset[str]] = {
    "F8_E4M3": frozenset({"F8_E4M3"}),
    "F8_E5M2": frozenset({"F8_E5M2"}),
    "F16": frozenset({"F8_E4M3", "F8_E5M2", "F16"}),
    "BF16": frozenset({"F8_E4M3", "F8_E5M2", "BF16"}),
    "F32": frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32"}),
    "F64": frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"}),
}
FLOATS = frozenset(_HOLDS)

_CHUNK = 1 << 15  # elements; keeps the temporaries of a conversion inside the processor's cache


def itemsize(dtype: str) -> int:
    """Bytes of one element of the safetensors type `dtype`."""
    return DTYPES[dtype].itemsize


def name_of(dtype: np.dtype | type) -> str:
    """The safetensors name of a NumPy or ml_dtypes dtype, in either byte order; InputError where there is none."""
    dtype = np.dtype(dtype)
    try:
        return _NAMES[dtype.newbyteorder("=")]
    except (KeyError, TypeError):
        raise InputError(f"dtype {dtype} has no safetensors type; known are {', '.join(DTYPES)}") from None


def promote(dtypes: Iterable[str]) -> str:
    """The smallest safetensors float type that holds every value of all of `dtypes` (BF16 and F16: F32).

    ValueError if there are none, or if one is not a float type.
    """
    wanted = frozenset(dtypes)
    if not wanted or not wanted <= FLOATS:
        raise ValueError(f"only float types can be promoted, got {sorted(wanted)}")
    return next(name for name, held in _HOLDS.items() if wanted <= held)


def decode(raw: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Widen stored floats exactly.

    raw: uint8, 1-D, contiguous, at any alignment; out: float32 or float64, 1-D, contiguous, one element per stored one.
    F64 goes to float64 only. ValueError where types or sizes do not fit.
    """
    _check(raw, dtype, out)
    if dtype == "F64" and out.dtype != np.float64:
        raise ValueError("F64 does not fit float32 exactly; decode it to float64")
    if dtype in _TABLED:
        codes, table = raw.view(_TABLED[dtype]), _widened(dtype, out.dtype.char)
        for i in range(0, out.size, _CHUNK):
            # mode="clip" is what lets take write to `out` without a copy; codes are never out of range.
            np.take(table, codes[i : i + _CHUNK], out=out[i : i + _CHUNK], mode="clip")
    else:
        with np.errstate(all="ignore"):  # a signalling NaN becomes a quiet one
            np.copyto(out, raw.view(DTYPES[dtype]), casting="unsafe")


def encode(x: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Round once, to the nearest storable value, ties to even.

    x: float32 or float64, 1-D, contiguous; out: uint8, 1-D, contiguous, at any alignment, of the stored size.
    NaN stays NaN; its payload is not kept. Beyond the largest finite value F16, BF16, F32 and F8_E5M2 round to infinity
    as IEEE 754 does. F8_E4M3 has no infinity: magnitudes above 464 and infinities give NaN, as in ml_dtypes.
    ValueError where types or sizes do not fit.
    """
    _check(out, dtype, x)
    stored = out.view(DTYPES[dtype])
    with np.errstate(all="ignore"):
        for i in range(0, x.size, _CHUNK):
            part = x[i : i + _CHUNK]
            if dtype.startswith("F8"):
                np.take(_narrowed(dtype), _odd_bfloat16(_odd_float32(part)), out=out[i : i + _CHUNK], mode="clip")
            else:
                # NumPy rounds float64 to float16 in one step; ml_dtypes goes through float32.
                np.copyto(stored[i : i + _CHUNK], _odd_float32(part) if dtype == "BF16" else part, casting="unsafe")


def finite(raw: np.ndarray, dtype: str) -> bool:
    """Whether stored floats hold no infinity and no NaN; raw: uint8, 1-D, contiguous.

    Read as integers, such values of either sign are the largest: a maximum of bits is cheaper than any test of floats.
    """
    if not raw.size:
        return True
    signed, positive, unsigned, negative = _least_nonfinite(dtype)
    return bool(raw.view(signed).max() < positive and raw.view(unsigned).max() < negative)


@functools.cache
def _least_nonfinite(dtype: str) -> tuple[np.dtype, int, np.dtype, int]:
    """The integer type and the least integer of an infinite or NaN value that is positive, and of one that is negative."""
    width = 8 * itemsize(dtype)
    special = np.array(np.nan if dtype == "F8_E4M3" else np.inf).astype(DTYPES[dtype])
    bits = int(special.view(f"u{width // 8}")) & (1 << width - 1) - 1
    return np.dtype(f"i{width // 8}"), bits, np.dtype(f"u{width // 8}"), bits | 1 << width - 1


def _check(raw: np.ndarray, dtype: str, x: np.ndarray) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{dtype} is not a float type")
    if x.dtype not in (np.float32, np.float64) or x.ndim != 1 or not x.flags.c_contiguous:
        raise ValueError(f"need a contiguous 1-D float32 or float64 array, got {x.dtype} of shape {x.shape}")
    if raw.dtype != np.uint8 or raw.ndim != 1 or not raw.flags.c_contiguous:
        raise ValueError(f"need a contiguous 1-D uint8 array of stored bytes, got {raw.dtype} of shape {raw.shape}")
    if raw.size != x.size * itemsize(dtype):
        raise ValueError(f"{raw.size} bytes are not {x.size} elements of {dtype}")


# One lookup is faster than the conversions that NumPy and ml_dtypes do in software.
_TABLED = {"F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F16": np.uint16}


@functools.cache
def _widened(dtype: str, work: str) -> np.ndarray:
    """What each stored code of `dtype` means, in the work dtype."""
    codes = np.arange(1 << 8 * itemsize(dtype)).astype(_TABLED[dtype])
    with np.errstate(all="ignore"):
        return codes.view(DTYPES[dtype]).astype(work)


@functools.cache
def _narrowed(dtype: str) -> np.ndarray:
    """The stored byte of an 8-bit float type for each of the 2**16 values of bfloat16."""
    with np.errstate(all="ignore"):
        return np.arange(1 << 16).astype(np.uint16).view(ml_dtypes.bfloat16).astype(DTYPES[dtype]).view(np.uint8)


# Rounding to odd: what is not representable goes to the neighbour whose last bit is 1. That bit then says "inexact" to
# a second rounding, to nearest with at least two bits fewer, and the two together round once (Boldo, Melquiond 2008).


def _odd_float32(x: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd; float32 as it is."""
    if x.dtype == np.float32:
        return x
    nearest = x.astype(np.float32)
    wanted, got = np.abs(x), np.abs(nearest)
    step = (wanted > got).astype(np.int32) - (wanted < got)  # 0 where exact and for NaN
    bits = nearest.view(np.int32)
    bits += step * (1 - (bits & 1))
    return nearest


def _odd_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, uint16, rounded to odd."""
    bits = x.view(np.uint32)
    codes = (bits >> 16).astype(np.uint16)
    codes |= (bits & 0xFFFF) != 0
    return codes
