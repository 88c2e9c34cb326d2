"""Arrays that are not there yet: what a method's text does to a block is noted down, and computed in one pass over it.

A `Lazy` stands for a block of float32 numbers or of truth values. Operators and the functions of `NAMESPACE` note what is to
be done; whatever else somebody does with it (an index, a NumPy function, an attribute) computes it and goes on with a NumPy
array, so that any text that runs on arrays runs on these. The program of a result is compiled (program.py) where a compiler
is at hand, and else run by NumPy, operation by operation. Both do the same correctly rounded operations in the same order
and give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refmerge.checkpoint.dtypes import decode
from refmerge.fused import program

FLOAT, BOOL = np.dtype(np.float32), np.dtype(bool)

# What NumPy does for each operation; the compiler has the same list in C.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "sign": np.sign, "max": np.maximum, "min": np.minimum, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal, "and": np.logical_and, "or": np.logical_or,
    "not": np.logical_not, "isnan": np.isnan, "where": np.where, "float": lambda x: x.astype(np.float32),
}  # fmt: skip
LOGIC = {"and", "or", "not"}
_OF_UFUNC = {f: name for name, f in OPERATIONS.items() if isinstance(f, np.ufunc)}
BITWISE = {np.bitwise_and: "and", np.bitwise_or: "or", np.invert: "not"}  # of truth values


class Lazy(np.lib.mixins.NDArrayOperatorsMixin):
    """A block of numbers to come: an operation and its operands, or, with none, an array or a number.

    op: a key of OPERATIONS, "leaf" (value: an array, stored: the dtype that its elements have), "const" (value: a float) or
    "same" (its operand in another shape).
    """

    __slots__ = ("args", "dtype", "op", "shape", "stored", "value")
    __array_priority__ = 1000.0

    def __init__(self, op: str, args: tuple[Lazy, ...], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.op, self.args, self.shape, self.dtype = op, args, shape, dtype
        self.value: Any = None
        self.stored = ""

    # What there is to know of an array.

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return NAMESPACE

    # What computes it.

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        (x,) = compute(self)
        return x if dtype is None else x.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if type(kwargs.get("out", (None,))[0]) is Lazy:  # x += y: a new array under the old name
            del kwargs["out"]
        if method == "__call__" and not kwargs and ufunc in _OF_UFUNC:
            return operation(_OF_UFUNC[ufunc], *inputs)
        booleans = all(getattr(x, "dtype", None) == BOOL for x in inputs)
        if method == "__call__" and not kwargs and booleans and ufunc in BITWISE:
            return operation(BITWISE[ufunc], *inputs)
        return getattr(ufunc, method)(*(np.asarray(x) if isinstance(x, Lazy) else x for x in inputs), **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __getitem__(self, index: Any) -> Any:
        first = index[0] if isinstance(index, tuple) and index[1:] == (Ellipsis,) else index
        if isinstance(first, slice) and first.start is None and first.step is None and first.stop == 1 and self.ndim == 1:
            return run(self, slice(0, 1))  # a tool's way to get a number into a tensor
        return np.asarray(self)[index]

    def __bool__(self) -> bool:
        return bool(np.asarray(self))

    def __float__(self) -> float:
        return float(np.asarray(self))

    def __iter__(self) -> Any:
        return iter(np.asarray(self))

    __hash__ = object.__hash__


def _noting(op: str, turned: bool = False) -> Callable[[Lazy, Any], Any]:
    return (lambda x, y: operation(op, y, x)) if turned else (lambda x, y: operation(op, x, y))


# What texts do most, without the mixin's way through a ufunc, which takes as long again.
for _name, _op in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div"}.items():
    setattr(Lazy, f"__{_name}__", _noting(_op))
    setattr(Lazy, f"__r{_name}__", _noting(_op, turned=True))
for _op in ("lt", "le", "gt", "ge"):
    setattr(Lazy, f"__{_op}__", _noting(_op))


def leaf(value: np.ndarray, stored: str, shape: tuple[int, ...]) -> Lazy:
    """An array in memory, 1-d: of bfloat16 or float16 bits as uint16, of float32, or of 0 and 1 in uint8 or bool."""
    x = Lazy("leaf", (), shape, BOOL if stored == "BOOL" else FLOAT)
    x.value, x.stored = value, stored
    return x


def mask(value: np.ndarray, shape: tuple[int, ...]) -> Lazy:
    """Truth values in memory as the numbers 0 and 1."""
    return _as_float(leaf(value.reshape(-1), "BOOL", shape))


def _operand(x: Any, shape: tuple[int, ...]) -> Lazy | None:
    """What can stand beside arrays of this shape in a program; None for what NumPy has to see."""
    if isinstance(x, Lazy):
        return x if x.shape == shape else None
    if type(x) is float or type(x) is int or isinstance(x, np.float32):
        return _const(float(x))
    if isinstance(x, np.ndarray) and x.dtype == FLOAT:
        if x.size == 1 and x.ndim <= len(shape):
            return _const(float(x.reshape(-1)[0]))
        if x.shape == shape:
            return leaf(np.ascontiguousarray(x).reshape(-1), "F32", shape)
    if isinstance(x, np.ndarray) and x.dtype == BOOL and x.shape == shape:
        return leaf(np.ascontiguousarray(x).reshape(-1), "BOOL", shape)
    return None


def _const(value: float, shape: tuple[int, ...] = ()) -> Lazy:
    x = Lazy("const", (), shape, FLOAT)
    with np.errstate(all="ignore"):
        x.value = np.float32(value)
    return x


def operation(op: str, *operands: Any) -> Any:
    """The operation, noted down; or its result by NumPy, where it is none of float32 and truth values of one shape."""
    shape = next((x.shape for x in operands if isinstance(x, Lazy)), None)
    if shape is None:
        return OPERATIONS[op](*operands)
    args = [_operand(x, shape) for x in operands]
    known = [x for x in args if x is not None]
    if len(known) < len(args) or not _typed(op, known, operands):
        return OPERATIONS[op](*(np.asarray(x) if isinstance(x, Lazy) else x for x in operands))
    if op == "where":
        known[1:] = map(_as_float, known[1:])
    elif op not in LOGIC and op != "float":
        known = [*map(_as_float, known)]
    return Lazy(op, tuple(known), shape, BOOL if op in program.TESTS else FLOAT)


def _typed(op: str, args: Sequence[Any], operands: Sequence[Any]) -> bool:
    """Whether NumPy would compute this in float32, or in truth values where the operation is one of logic."""
    are_tests = [x.dtype == BOOL for x in args]
    if op in LOGIC or op == "float":
        return all(are_tests)
    floats = [x.dtype == FLOAT and type(o) not in (int, float) for x, o in zip(args, operands)]  # Python's numbers are weak
    return are_tests[0] and any(floats[1:]) if op == "where" else any(floats)


def _as_float(x: Lazy) -> Lazy:
    return Lazy("float", (x,), x.shape, FLOAT) if x.dtype == BOOL else x


# --------------------------------------------------------------------------------------------------------- the functions


class _Namespace:
    """The functions of the array API on Lazy arrays: those noted down, and NumPy's own for the rest."""

    where = staticmethod(lambda c, x, y: operation("where", c, x, y))

    @staticmethod
    def astype(x: Any, dtype: Any, *, copy: bool = True) -> Any:
        if isinstance(x, Lazy) and np.dtype(dtype) == FLOAT:
            return _as_float(x)
        return np.asarray(x).astype(dtype, copy=copy)

    @staticmethod
    def reshape(x: Any, shape: Any) -> Any:
        if not isinstance(x, Lazy):
            return np.reshape(x, shape)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if -1 in shape:
            known = math.prod(n for n in shape if n != -1)
            shape = tuple(x.size // known if n == -1 and known else n for n in shape)
        if shape == x.shape:
            return x
        if math.prod(shape) != x.size:
            raise ValueError(f"cannot reshape {x.shape} to {shape}")
        return Lazy("same", (x,), shape, x.dtype)

    @staticmethod
    def full_like(x: Any, value: Any, *, dtype: Any = None) -> Any:
        if not isinstance(x, Lazy):
            return np.full_like(x, value, dtype=dtype)
        dtype = np.dtype(x.dtype if dtype is None else dtype)
        return _const(value, x.shape) if dtype == FLOAT else np.full(x.shape, value, dtype=dtype)

    def ones_like(self, x: Any, *, dtype: Any = None) -> Any:
        return self.full_like(x, 1, dtype=dtype)

    def zeros_like(self, x: Any, *, dtype: Any = None) -> Any:
        return self.full_like(x, 0, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)  # dtypes, too, are NumPy's


NAMESPACE = _Namespace()

# ---------------------------------------------------------------------------------------------------------- the numbers


def run(x: Lazy, part: slice | None = None) -> np.ndarray:
    """The numbers by NumPy; or some of them, in one dimension."""
    done: dict[int, Any] = {}
    stack = [x]
    with np.errstate(all="ignore"):
        while stack:
            node = stack[-1]
            if id(node) in done:
                stack.pop()
                continue
            if missing := [a for a in node.args if id(a) not in done]:
                stack.extend(missing)
                continue
            stack.pop()
            values = [done[id(a)] for a in node.args]
            if node.op == "leaf":
                done[id(node)] = _decoded(node, part or slice(None))
            elif node.op == "const":
                done[id(node)] = node.value
            elif node.op == "same":
                done[id(node)] = values[0]
            else:
                done[id(node)] = OPERATIONS[node.op](*values)
    result = done[id(x)]
    if np.ndim(result) == 0:  # of numbers alone
        result = np.full(len(range(*(part or slice(None)).indices(x.size))), result)
    return result.reshape(x.shape) if part is None else result


def _decoded(x: Lazy, part: slice) -> np.ndarray:
    value = x.value[part]
    if x.stored in ("BF16", "F16"):
        wide = np.empty(value.size, np.float32)
        decode(value.view(np.uint8), x.stored, wide)
        return wide
    return value.view(bool) if x.stored == "BOOL" else value


def compute(*xs: Lazy) -> list[np.ndarray]:
    """The numbers of all, in one pass where they are compiled. What was computed is an array from then on."""
    wanted = [x for x in xs if not _there(x)]
    if wanted:
        outs = [np.empty(x.size, x.dtype) for x in wanted]
        kernel = program.elementwise(wanted, ["BOOL" if x.dtype == BOOL else "F32" for x in wanted])
        if kernel is not None:
            kernel(outs)
        else:
            outs = [run(x).reshape(-1) for x in wanted]
        for x, out in zip(wanted, outs):
            x.op, x.args, x.value, x.stored = "leaf", (), out, "BOOL" if x.dtype == BOOL else "F32"
    return [x.value.reshape(x.shape) for x in xs]


def _there(x: Lazy) -> bool:
    return x.op == "leaf" and x.stored in ("F32", "BOOL")


def store(x: Lazy, dtype: str, out: np.ndarray) -> bool:
    """Round the numbers to a dtype of 16 or 32 bits and write them, as bytes. False where that was left undone."""
    kernel = program.elementwise([x], [dtype]) if dtype in ("BF16", "F16", "F32") else None
    if kernel is None:
        return False
    kernel([out])
    return True


def stretch_sums(xs: Sequence[Lazy]) -> list[np.ndarray] | None:
    """As numeric.leaf_sums, of the whole stretches and without arrays in between; None where that was left undone."""
    kernel = program.sums(xs)
    return None if kernel is None else kernel()
