"""What is done to every block whatever the method, as C: random digits, and a look for what is not finite."""

from __future__ import annotations

import ctypes

import numpy as np

from refmerge.fused import compiler

SOURCE = r"""
#include <stdint.h>
#include <string.h>

/* Philox-4x64-10 with the counters (first, high, 0, 0), (first + 1, high, 0, 0), ...: four words each */
void philox(uint64_t k0, uint64_t k1, uint64_t first, uint64_t high, long count, uint64_t *restrict out) {
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
int below16(const uint16_t *restrict x, long n, uint16_t limit) {
  uint16_t over = 0;
  for (long i = 0; i < n; i++) over |= (uint16_t)((x[i] & 0x7fffu) >= limit);
  return !over;
}

int below32(const uint32_t *restrict x, long n, uint32_t limit) {
  uint32_t over = 0;
  for (long i = 0; i < n; i++) over |= (x[i] & 0x7fffffffu) >= limit;
  return !over;
}

/* what lies in [low, high] goes to out; *above counts what is neither that nor below, NaN included */
long between(const float *restrict x, long n, float low, float high, uint64_t *above, float *restrict out) {
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
void name(const float *restrict values, const float *restrict x, long rows, long n, uint64_t *w, \
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

"""
SHORT = 2048  # entries of a row that is sorted by digits of 8 bits; longer ones by 11
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def _address(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def philox(key: tuple[int, int], first: int, high: int, blocks: int) -> np.ndarray | None:
    """The words of the blocks with counters (first, high, 0, 0) and so on, uint64; None where that was left undone."""
    if (library := compiler.library(SOURCE)) is None:
        return None
    words = np.empty(4 * blocks, np.uint64)
    library.philox(*map(ctypes.c_uint64, (*key, first, high)), ctypes.c_long(blocks), _address(words))
    return words


def finite(raw: np.ndarray, dtype: str) -> bool | None:
    """As checkpoint.dtypes.finite; None where that was left undone."""
    if dtype not in INFINITY or (library := compiler.library(SOURCE)) is None:
        return None
    if dtype == "F32":
        return bool(library.below32(_address(raw), ctypes.c_long(raw.size // 4), ctypes.c_uint32(INFINITY[dtype])))
    return bool(library.below16(_address(raw), ctypes.c_long(raw.size // 2), ctypes.c_uint16(INFINITY[dtype])))


def between(values: np.ndarray, low: float, high: float) -> tuple[int, np.ndarray] | None:
    """How many float32 values are above high, NaN among them, and those in [low, high] in their order; None where that was
    left undone."""
    fits = values.dtype == np.float32 and values.flags.c_contiguous
    if not fits or (library := compiler.library(SOURCE)) is None:
        return None
    inside, above = np.empty(values.size, np.float32), ctypes.c_uint64()
    library.between.restype = ctypes.c_long
    found = library.between(
        _address(values), ctypes.c_long(values.size), ctypes.c_float(low), ctypes.c_float(high), ctypes.byref(above),
        _address(inside),
    )  # fmt: skip
    return above.value, inside[:found].copy()


def at_ranks(values: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """values[r] at the entry of rank r in each row of a float32 matrix; None where that was left undone."""
    count, width = rows.shape
    fits = rows.dtype == values.dtype == np.float32 and width < 1 << 32
    if not fits or (library := compiler.library(SOURCE)) is None:
        return None
    values, rows = np.ascontiguousarray(values), np.ascontiguousarray(rows)
    spare, out = np.empty(2 * width, np.uint64), np.empty(rows.shape, np.float32)
    ranks = library.ranks_of_short if width < SHORT else library.ranks_of_long
    ranks(_address(values), _address(rows), ctypes.c_long(count), ctypes.c_long(width), _address(spare), _address(out))
    return out
