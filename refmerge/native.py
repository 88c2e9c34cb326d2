"""Arrays that round after every operation, for `arithmetic="native"` on NumPy.

Tools that merge 16-bit tensors in 16 bits compute each operation in float32 and round its result, as torch does. A
`Rounded` array does the same, so that a method's text gives such a tool's bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np


def _plain(x: Any) -> Any:
    if isinstance(x, Rounded):
        return x.values
    if isinstance(x, list | tuple):
        return type(x)(map(_plain, x))
    return x


def _binary(f: Callable[[Any, Any], Any], swap: bool = False) -> Callable[[Rounded, Any], Any]:
    def operation(self: Rounded, other: Any) -> Any:
        a, b = self.values, _plain(other)
        return self._like(f(b, a) if swap else f(a, b))

    return operation


class Rounded:
    """float32 values that are all values of `dtype`, and an operator of the array API for each of NumPy's."""

    __array_ufunc__ = None  # NumPy's scalars leave the operators to this class
    device = "cpu"

    def __init__(self, values: np.ndarray, dtype: np.dtype) -> None:
        self.values, self.dtype = values.astype(dtype).astype(np.float32), np.dtype(dtype)

    def _like(self, result: np.ndarray) -> Any:
        return Rounded(result, self.dtype) if np.asarray(result).dtype.kind == "f" else result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return _namespace(self.dtype)

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    size = property(lambda self: self.values.size)
    T = property(lambda self: self._like(self.values.T))

    def __getitem__(self, index: Any) -> Any:
        return self._like(self.values[index])

    def __float__(self) -> float:
        return float(self.values)

    def __neg__(self) -> Any:
        return self._like(-self.values)

    def __abs__(self) -> Any:
        return self._like(abs(self.values))

    __add__, __radd__ = _binary(operator.add), _binary(operator.add, swap=True)
    __sub__, __rsub__ = _binary(operator.sub), _binary(operator.sub, swap=True)
    __mul__, __rmul__ = _binary(operator.mul), _binary(operator.mul, swap=True)
    __truediv__, __rtruediv__ = _binary(operator.truediv), _binary(operator.truediv, swap=True)
    __lt__, __le__ = _binary(operator.lt), _binary(operator.le)
    __gt__, __ge__ = _binary(operator.gt), _binary(operator.ge)
    __eq__, __ne__ = _binary(operator.eq), _binary(operator.ne)  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class _Namespace:
    """NumPy's namespace of the array API; what it makes of Rounded arrays is rounded too."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        import array_api_compat.numpy as numpy_namespace  # brings numpy.f2py with it: not for `import refmerge`

        found = getattr(numpy_namespace, name)
        if isinstance(found, type) or not callable(found):
            return found

        def function(*args: Any, **kwargs: Any) -> Any:
            rounded = any(isinstance(a, Rounded) for x in args for a in (x if isinstance(x, list | tuple) else (x,)))
            result = found(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
            is_array = rounded and isinstance(result, np.ndarray | np.generic)
            return Rounded(np.asarray(result), self._dtype) if is_array and result.dtype.kind == "f" else result

        return function

    def astype(self, x: Any, dtype: Any, *, copy: bool = True) -> Any:
        values = np.asarray(_plain(x))
        return Rounded(values, self._dtype) if np.dtype(dtype) == self._dtype else values.astype(dtype, copy=copy)


@cache
def _namespace(dtype: np.dtype) -> _Namespace:
    return _Namespace(dtype)
