"""What is done to every block whatever the method, as C: random digits, and a look for what is not finite."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from refmerge.fused import compiler

SOURCE = r"""
#include <stdint.h>
#include <string.h>

/* Philox-4x64-10 with the counters (first, high, 0, 0), (first + 1, high, 0, 0), ...: four words each */
static void philox(uint64_t k0, uint64_t k1, uint64_t first, uint64_t high, long count, uint64_t *restrict out) {
  for (long i = 0; i < count; i++) {
    uint64_t x0 = first + (uint64_t)i, x1 = high, x2 = 0, x3 = 0, a0 = k0, a1 = k1;
    for (int r = 0; r < 10; r++) {
      unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * x0, b = (unsigned __int128)0xCA5A826395121157u * x2;
      x0 = (uint64_t)(b >> 64) ^ x1 ^ a0; x1 = (uint64_t)b;
      x2 = (uint64_t)(a >> 64) ^ x3 ^ a1; x3 = (uint64_t)a;
      a0 += 0x9E3779B97F4A7C15u; a1 += 0xBB67AE8584CAA73Bu;
    }
    out[4 * i] = x0; out[4 * i + 1] = x1; out[4 * i + 2] = x2; out[4 * i + 3] = x3;
  }
}

/* whether the magnitudes of all words of 16 or 32 bits lie below a limit */
static int below16(const uint16_t *restrict x, long n, uint16_t limit) {
  uint16_t over = 0;
  for (long i = 0; i < n; i++) over |= (uint16_t)((x[i] & 0x7fffu) >= limit);
  return !over;
}

static int below32(const uint32_t *restrict x, long n, uint32_t limit) {
  uint32_t over = 0;
  for (long i = 0; i < n; i++) over |= (x[i] & 0x7fffffffu) >= limit;
  return !over;
}

/* what lies in [low, high] goes to out; *above counts what is neither that nor below, NaN included */
static long between(const float *restrict x, long n, float low, float high, uint64_t *above, float *restrict out) {
  long found = 0, at_most = 0;
  uint8_t in[1024];
  for (long i = 0; i < n; i += 1024) {
    const float *y = x + i;
    long m = n - i < 1024 ? n - i : 1024;
    int32_t sum = 0;
    for (long j = 0; j < m; j++) {
      int32_t below = y[j] <= high;
      sum += below;
      in[j] = (uint8_t)(below & (y[j] >= low));
    }
    at_most += sum;
    for (long j = m; j < (m + 7) / 8 * 8; j++) in[j] = 0;
    for (long g = 0; g < m; g += 8) {  /* few are inside: eight at a time are passed over */
      uint64_t word;
      memcpy(&word, in + g, 8);
      if (word)
        for (int j = 0; j < 8; j++)
          if (in[g + j]) out[found++] = y[g + j];
    }
  }
  *above = (uint64_t)(n - at_most);
  return found;
}

/* values[r] at the entry of rank r of each row: stable, -0.0 equal to 0.0, NaN last; w holds 2 n words */
#define RANKS(name, BITS) \
static void name(const float *restrict values, const float *restrict x, long rows, long n, uint64_t *w, \
                 float *restrict out) { \
  enum { DIGITS = (32 + BITS - 1) / BITS, SIZE = 1 << BITS }; \
  static _Thread_local uint32_t count[DIGITS][SIZE]; \
  for (long row = 0; row < rows; row++, x += n, out += n) { \
    uint64_t *a = w, *b = w + n; \
    memset(count, 0, sizeof count); \
    for (long i = 0; i < n; i++) { \
      float f = x[i] + 0.0f; \
      uint32_t u; memcpy(&u, &f, 4); \
      u = f != f ? 0xffffffffu : u ^ (u >> 31 ? 0xffffffffu : 0x80000000u); \
      a[i] = (uint64_t)u << 32 | (uint32_t)i; \
      for (int d = 0; d < DIGITS; d++) count[d][u >> d * BITS & (SIZE - 1)]++; \
    } \
    for (int d = 0; d < DIGITS; d++) { \
      uint32_t *c = count[d], sum = 0; \
      if (c[a[0] >> (32 + d * BITS) & (SIZE - 1)] == n) continue;  /* the same digit everywhere */ \
      for (int i = 0; i < SIZE; i++) { uint32_t m = c[i]; c[i] = sum; sum += m; } \
      for (long i = 0; i < n; i++) b[c[a[i] >> (32 + d * BITS) & (SIZE - 1)]++] = a[i]; \
      uint64_t *t = a; a = b; b = t; \
    } \
    for (long i = 0; i < n; i++) out[(uint32_t)a[i]] = values[i]; \
  } \
}
RANKS(ranks_of_short, 8)
RANKS(ranks_of_long, 11)

long run(int what, uint64_t *a, long n, void *x) {
  if (what == 0) { philox(a[0], a[1], a[2], a[3], n, x); return 1; }
  if (what == 4) {
    const float *values = (const float *)a[0], *rows = (const float *)a[1];
    long width = (long)a[2];
    (width < 2048 ? ranks_of_short : ranks_of_long)(values, rows, n, width, (uint64_t *)a[3], x);
    return 1;
  }
  if (what == 3) {
    float ends[2]; memcpy(ends, &a[0], 8);
    return between((const float *)a[1], n, ends[0], ends[1], &a[2], x);
  }
  return what == 1 ? below16(x, n, (uint16_t)a[0]) : below32(x, n, (uint32_t)a[0]);
}
"""
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

_function: list[Any] = []


def _call(what: int, numbers: Any, count: int, x: np.ndarray) -> int | None:
    if not _function:
        found = compiler.function(SOURCE)
        if found is None:
            return None
        found.restype = ctypes.c_long
        _function.append(found)
    given = numbers if isinstance(numbers, ctypes.Array) else (ctypes.c_uint64 * len(numbers))(*numbers)
    return int(_function[0](ctypes.c_int(what), given, ctypes.c_long(count), ctypes.c_void_p(x.ctypes.data)))


def philox(key: tuple[int, int], first: int, high: int, blocks: int) -> np.ndarray | None:
    """The words of the blocks with counters (first, high, 0, 0) and so on, uint64; None where that was left undone."""
    words = np.empty(4 * blocks, np.uint64)
    return words if _call(0, (*key, first, high), blocks, words) is not None else None


def finite(raw: np.ndarray, dtype: str) -> bool | None:
    """As checkpoint.dtypes.finite; None where that was left undone."""
    if dtype not in INFINITY:
        return None
    width = 4 if dtype == "F32" else 2
    found = _call(1 if width == 2 else 2, (INFINITY[dtype],), raw.size // width, raw)
    return None if found is None else bool(found)


def between(values: np.ndarray, low: float, high: float) -> tuple[int, np.ndarray] | None:
    """How many float32 values are above high, NaN among them, and those in [low, high] in their order; None where that was
    left undone."""
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        return None
    ends = int(np.array([low, high], np.float32).view(np.uint64)[0])
    numbers = (ctypes.c_uint64 * 3)(ends, values.ctypes.data, 0)
    inside = np.empty(values.size, np.float32)
    found = _call(3, numbers, values.size, inside)
    return None if found is None else (int(numbers[2]), inside[:found].copy())


def at_ranks(values: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """values[r] at the entry of rank r in each row of a float32 matrix; None where that was left undone."""
    if rows.dtype != np.float32 or values.dtype != np.float32 or rows.shape[1] >= 1 << 32:
        return None
    values, spare = np.ascontiguousarray(values), np.empty(2 * rows.shape[1], np.uint64)
    numbers = (ctypes.c_uint64 * 4)(values.ctypes.data, rows.ctypes.data, rows.shape[1], spare.ctypes.data)
    out = np.empty(rows.shape, np.float32)
    return out if _call(4, numbers, rows.shape[0], out) is not None else None
