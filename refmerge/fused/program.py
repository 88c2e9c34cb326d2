"""Programs of Lazy arrays, as C, through the system's compiler.

One loop computes all that a block is asked for: stored numbers are widened, the text's operations done, the results rounded
and stored, or summed in the tree of numeric.leaf_sums. Operations are not contracted (a product and a sum round twice, as in
the text), and no flag lets the compiler reorder any.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.fused import compiler

if TYPE_CHECKING:
    from refmerge.fused.graph import Lazy

LANES, HEIGHT = 64, 1024  # of a stretch, see numeric.leaf_sums
STRETCH = LANES * HEIGHT
NARROW = 128  # rows to which a stretch is halved in float32
TILE = 1024  # elements of one of the eight parts of a stretch that are added at a time

IN_C = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}", "abs": "fabsf({0})",
    "sign": "{0} > 0 ? 1.0f : {0} < 0 ? -1.0f : {0} == 0 ? 0.0f : {0}",
    "max": "{0} >= {1} || {0} != {0} ? {0} : {1}", "min": "{0} <= {1} || {0} != {0} ? {0} : {1}",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "eq": "{0} == {1}", "ne": "{0} != {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "not": "!{0}", "isnan": "{0} != {0}", "where": "{0} ? {1} : {2}",
    "float": "(float){0}",
}  # fmt: skip
TESTS = {"lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "isnan"}
TYPES = {"F32": "float", "BF16": "uint16_t", "F16": "_Float16", "BOOL": "uint8_t"}
WIDENED = {"F32": "{0}", "BF16": "widened({0})", "F16": "(float){0}", "BOOL": "{0}"}
NARROWED = {"F32": "{0}", "BF16": "bfloat16({0})", "F16": "(_Float16){0}", "BOOL": "{0}"}

PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
static inline float widened(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
static inline uint16_t bfloat16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t nearest = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = (u >> 16 & 0x8000u) | 0x7fc0u;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : nearest);
}
"""

Step = tuple[Any, ...]


class _Program:
    """Steps (operation, places of the operands), in an order in which they can be done; and what they are done to."""

    def __init__(self, wanted: Sequence[Lazy]) -> None:
        self.steps: list[Step] = []
        self.leaves: list[np.ndarray] = []
        self.consts: list[float] = []
        place: dict[int, int] = {}
        for root in wanted:
            stack = [root]
            while stack:
                x = stack[-1]
                if id(x) in place:
                    stack.pop()
                    continue
                ready = True
                for a in x.args:
                    if id(a) not in place:
                        stack.append(a)
                        ready = False
                if not ready:
                    continue
                stack.pop()
                op = x.op
                if op == "same":
                    place[id(x)] = place[id(x.args[0])]
                    continue
                if op == "leaf":
                    self.steps.append((op, len(self.leaves), x.stored))
                    self.leaves.append(x.value)
                elif op == "const":
                    self.steps.append((op, len(self.consts)))
                    self.consts.append(x.value)
                else:
                    self.steps.append((op, *(place[id(a)] for a in x.args)))
                place[id(x)] = len(self.steps) - 1
        self.results = tuple(place[id(x)] for x in wanted)


LEAST = 1 << 16  # elements of a block for which a compiler is started; what it made is used for smaller ones too

_kernels: dict[Any, Callable[..., Any] | None] = {}


def _kernel(key: Any, source: Callable[[], str], size: int) -> Any:
    """The compiled function for a program; None while there is none."""
    found = _kernels.get(key)
    if found is None:
        if size < LEAST and not compiler.waits:
            return None
        library = compiler.library(source())
        if library is not None:
            found = _kernels[key] = library.run
            found.restype = None
    return found


def _addresses(arrays: Sequence[np.ndarray]) -> Any:
    return (ctypes.c_void_p * max(len(arrays), 1))(*[x.ctypes.data for x in arrays])


def _call(function: Any, count: int, program: _Program, *outs: Any) -> None:
    consts = np.array(program.consts, np.float32)
    function(ctypes.c_long(count), _addresses(program.leaves), ctypes.c_void_p(consts.ctypes.data), *outs)


def elementwise(wanted: Sequence[Lazy], kinds: Sequence[str]) -> Callable[[Sequence[np.ndarray]], None] | None:
    """What computes these arrays into others of these dtypes."""
    program = _Program(wanted)
    key = ("elementwise", tuple(program.steps), program.results, tuple(kinds))
    function = _kernel(key, lambda: _elementwise(program, kinds), wanted[0].size)
    if function is None:
        return None

    def run(outs: Sequence[np.ndarray]) -> None:
        _call(function, wanted[0].size, program, _addresses(outs))

    return run


def sums(wanted: Sequence[Lazy]) -> Callable[[], list[np.ndarray]] | None:
    """What sums these arrays of whole stretches; see numeric.leaf_sums."""
    program = _Program(wanted)
    function = _kernel(("sums", tuple(program.steps), program.results), lambda: _sums(program), wanted[0].size)
    if function is None:
        return None

    def run() -> list[np.ndarray]:
        stretches = wanted[0].size // STRETCH
        out = np.empty((len(wanted), stretches * LANES), np.float64)
        rows = np.empty((len(wanted), NARROW * LANES), np.float64)  # of one stretch, as its tree is added up
        _call(function, stretches, program, ctypes.c_void_p(out.ctypes.data), ctypes.c_void_p(rows.ctypes.data))
        return list(out)

    return run


def _body(program: _Program, at: str) -> list[str]:
    """The statements that compute v0, v1, ... of the element at an index."""
    lines, kinds = [], []
    for i, (op, *args) in enumerate(program.steps):
        if op == "leaf":
            k, stored = args
            kinds.append("int32_t" if stored == "BOOL" else "float")
            value = WIDENED[stored].format(f"p{k}[{at}]")
        elif op == "const":
            kinds.append("float")
            value = f"c{args[0]}"
        else:
            kinds.append("int32_t" if op in TESTS else "float")
            value = IN_C[op].format(*(f"v{a}" for a in args))
        lines.append(f"const {kinds[i]} v{i} = {value};")
    return lines


def _inputs(program: _Program) -> list[str]:
    stored = [step[2] for step in program.steps if step[0] == "leaf"]
    lines = [f"const {TYPES[kind]} *restrict p{k} = in[{k}];" for k, kind in enumerate(stored)]
    return lines + [f"const float c{k} = c[{k}];" for k in range(len(program.consts))]


def _elementwise(program: _Program, kinds: Sequence[str]) -> str:
    outs = [f"{TYPES[kind]} *restrict o{j} = out[{j}];" for j, kind in enumerate(kinds)]
    stores = [f"o{j}[i] = {NARROWED[kind].format(f'v{v}')};" for j, (v, kind) in enumerate(zip(program.results, kinds))]
    return "\n".join([
        PRELUDE,
        "void run(long n, const void *const *in, const float *c, void *const *out) {",
        *_inputs(program), *outs,
        "for (long i = 0; i < n; i++) {", *_body(program, "i"), *stores, "}",
        "}",
    ])  # fmt: skip


# How the eight parts of a stretch are added: (part, tile, whether it is the first there), or one tile to another.
PAIRS: tuple[tuple[Any, ...], ...] = (
    (0, "a", True), (4, "a", False), (2, "b", True), (6, "b", False), ("a", "b"), (1, "b", True), (5, "b", False),
    (3, "d", True), (7, "d", False), ("b", "d"), ("a", "b"),
)  # fmt: skip


def _sums(program: _Program) -> str:
    """Of each stretch the eight parts that the first three halvings add, a tile at a time; then the rest in double."""
    n, rows = len(program.results), NARROW * LANES
    lines = [
        PRELUDE,
        "void run(long stretches, const void *const *in, const float *c, double *out, double *restrict w) {",
        *_inputs(program),
        "for (long s = 0; s < stretches; s++) {",
        f"for (long t = 0; t < {rows}; t += {TILE}) {{",
        *(f"float {tile}{j}[{TILE}];" for tile in "abd" for j in range(n)),
    ]
    for what, tile, *first in PAIRS:
        if not first:
            lines += [f"for (int i = 0; i < {TILE}; i++) {what}{j}[i] += {tile}{j}[i];" for j in range(n)]
            continue
        lines += [
            f"for (int i = 0; i < {TILE}; i++) {{",
            f"const long e = s * {STRETCH} + {what * rows} + t + i;",
            *_body(program, "e"),
            *(f"{tile}{j}[i] {'=' if first[0] else '+='} v{v};" for j, v in enumerate(program.results)),
            "}",
        ]
    lines += [f"for (int i = 0; i < {TILE}; i++) w[{j * rows} + t + i] = (double)a{j}[i];" for j in range(n)]
    lines += ["}"]
    for j in range(n):
        lines += [
            f"for (int h = {rows // 2}; h >= {LANES}; h /= 2)",
            f"for (int i = 0; i < h; i++) w[{j * rows} + i] += w[{j * rows} + i + h];",
            f"memcpy(out + ({j} * stretches + s) * {LANES}, w + {j * rows}, sizeof(double) * {LANES});",
        ]
    return "\n".join([*lines, "}", "}"])
