"""A spec from a forward pass: which axes of parameters meet.

The pass runs on arrays that have shapes and no values. Each axis is a *term*: a free one, of units that may change places as
long as all that meets them does; a fixed one; several one after the other (`Cat`), or blocks of blocks (`Product`). Arrays
that are added, multiplied or compared have equal axes where they meet; sums, means and maxima do not ask for an order;
whatever picks an entry by its place fixes it. What the batch brings and what the outputs give is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np

from refmerge.errors import UsageError
from refmerge.symmetry.axes import Block, Entry, Slices
from refmerge.symmetry.proof import changes
from refmerge.symmetry.spec import Model, Spec

__all__ = ["trace"]


def trace(forward: Callable[[Model, Any], Any], model: Model, batch: Any, *, tolerance: float = 1e-6) -> Spec:
    """The spec that a forward pass has by its own text, tested on the model with random permutations.

    forward: (parameters, batch) -> outputs, in the array API or in NumPy. A permutation is named after the first tensor
    that it moves. What is inside of heads moves alike in every head, as the text does not say that it need not. UsageError
    where the pass does what is not known here, or outputs change by more than `tolerance` of the largest.
    """
    params = {name: Traced([Free(n) for n in x.shape]) for name, x in model.items()}
    try:
        outputs = forward(params, Traced([Fixed(n) for n in np.shape(batch)]))
    except (AttributeError, TypeError) as e:  # a function or a method that knows nothing of Traced
        if "Traced" not in str(e):
            raise
        raise UsageError(f"trace: the pass does what is not known here ({e}): write the spec by hand") from e
    if not isinstance(outputs, Traced):
        raise UsageError(f"trace: the pass gives {type(outputs).__name__}, and not an array made of its parameters")
    for axis in outputs.axes:
        fix(axis)
    spec = _spec(params)
    found = changes(spec, model, lambda p: forward(p, batch), np.random.default_rng(0))
    if wrong := [f"{name!r} by {found[name]:.1e}" for name in found if not found[name] <= tolerance]:
        raise UsageError(f"trace: the outputs change with {', '.join(wrong)}: the pass does what its shapes do not tell")
    return spec


# ----------------------------------------------------------------------------------------------------------------- terms


class Term:
    """An axis, or a part of one, of `size` places."""

    size: int


class Free(Term):
    """Units that may be permuted. `bound`: what they turned out to be."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bound: Term | None = None if size > 1 else Fixed(size)


class Fixed(Term):
    def __init__(self, size: int) -> None:
        self.size = size


class Alike(Term):
    """Copies of one entry: they are the same in any order."""

    def __init__(self, size: int) -> None:
        self.size = size


class Product(Term):
    """For each unit of the first part, all of the next one."""

    def __init__(self, parts: Sequence[Term]) -> None:
        self.parts, self.size = parts, math.prod(p.size for p in parts)


class Cat(Term):
    """One part after the other."""

    def __init__(self, parts: Sequence[Term]) -> None:
        self.parts, self.size = parts, sum(p.size for p in parts)


def known(term: Term) -> Term:
    """What a term is by now, with nothing that stands for another at its top."""
    while isinstance(term, Free) and term.bound is not None:
        term = term.bound
    if isinstance(term, Product):
        return product([f for part in term.parts for f in factors(part)])
    if isinstance(term, Cat):
        return cat([p for part in term.parts for p in pieces(part)])
    return term


def factors(term: Term) -> list[Term]:
    term = known(term)
    return list(term.parts) if isinstance(term, Product) else [term]


def pieces(term: Term) -> list[Term]:
    term = known(term)
    return list(term.parts) if isinstance(term, Cat) else [term]


def product(parts: Sequence[Term]) -> Term:
    parts = [p for p in parts if p.size > 1]
    if all(isinstance(p, Fixed) for p in parts):
        return Fixed(math.prod(p.size for p in parts))
    return parts[0] if len(parts) == 1 else Product(parts)


def cat(parts: Sequence[Term]) -> Term:
    parts = [Free(p.size) if isinstance(p, Alike) else p for p in parts if p.size]
    if all(isinstance(p, Fixed) for p in parts):
        return Fixed(sum(p.size for p in parts))
    return parts[0] if len(parts) == 1 else Cat(parts)


def fix(term: Term) -> Term:
    """No unit of it moves."""
    term = known(term)
    if isinstance(term, Free):
        term.bound = Fixed(term.size)
    for part in term.parts if isinstance(term, Product | Cat) else ():
        fix(part)
    return Fixed(term.size)


def meet(a: Term, b: Term) -> Term:
    """Both are permuted alike."""
    a, b = known(a), known(b)
    if a is b or a.size != b.size:
        if a.size != b.size:
            raise UsageError(f"trace: an axis of {a.size} places meets one of {b.size}")
    elif isinstance(a, Alike) or isinstance(b, Alike):
        return b if isinstance(a, Alike) else a
    elif isinstance(a, Free):
        a.bound = product([Free(f.size) if isinstance(f, Alike) else f for f in factors(b)])
    elif isinstance(b, Free):
        return meet(b, a)
    elif isinstance(a, Product) and isinstance(b, Product):
        _together(list(a.parts), list(b.parts), _blocks)
    elif isinstance(a, Cat) and isinstance(b, Cat):
        _together(list(a.parts), list(b.parts), _cut)
    else:  # one is fixed, or they are of two kinds
        fix(a)
        fix(b)
    return known(a)


def _together(a: list[Term], b: list[Term], divide: Callable[[Term, int], list[Term] | None]) -> None:
    """Parts of equal sizes meet; of two that differ, the larger one is divided."""
    while a and b:
        small, large = (a, b) if a[0].size <= b[0].size else (b, a)
        if small[0].size < large[0].size:
            parts = divide(large[0], small[0].size)
            if parts is None:
                for part in (*a, *b):
                    fix(part)
                return
            large[:1] = parts
        meet(a.pop(0), b.pop(0))


def _blocks(term: Term, n: int) -> list[Term] | None:
    """The term as n blocks of the rest; None where it is not."""
    if term.size % n:
        return None
    first, *rest = factors(term)
    if first.size == n:
        return [first, product(rest)]
    if isinstance(first, Cat) or (first.size < n and n % first.size) or (first.size > n and first.size % n):
        fix(term)
        return [Fixed(n), Fixed(term.size // n)]
    if first.size < n:
        more, last = _blocks(product(rest), n // first.size) or [Fixed(0), Fixed(0)]
        return [product([first, *factors(more)]), last]
    outer, inner = _new(first, Product, n, first.size // n)
    return [outer, product([inner, *rest])]


def _cut(term: Term, n: int) -> list[Term] | None:
    """The term as its first n places and the rest."""
    first, *rest = pieces(term)
    if first.size < n:
        more = _cut(cat(rest), n - first.size)
        return None if more is None else [cat([first, *pieces(more[0])]), more[1]]
    if first.size == n:
        return [first, cat(rest)]
    if isinstance(first, Product):
        outer, *inner = first.parts
        k = math.prod(p.size for p in inner)
        halves = None if n % k else _cut(outer, n // k)
        if halves is None:
            fix(first)
            return [Fixed(n), cat([Fixed(first.size - n), *rest])]
        low, high = (product([*factors(half), *inner]) for half in halves)
    else:
        low, high = _new(first, Cat, n, first.size - n)
    return [low, cat([high, *rest])]


def _new(term: Term, kind: Any, *sizes: int) -> list[Term]:
    """A term that is no Product and no Cat as parts of these sizes."""
    if not isinstance(term, Free):
        return [Alike(n) if isinstance(term, Alike) else Fixed(n) for n in sizes]
    parts: list[Term] = [Free(n) for n in sizes]
    term.bound = kind(parts)
    return parts


# ---------------------------------------------------------------------------------------------------------------- arrays


class Traced:
    """An array of which the axes are known and nothing else."""

    dtype, device = np.dtype(np.float64), "cpu"

    def __init__(self, axes: Sequence[Term]) -> None:
        self.axes = list(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def ndim(self) -> int:
        return len(self.axes)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise UsageError("trace: the pass asks for values: write the spec by hand")

    __bool__ = __float__ = __int__ = __array__

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return NAMESPACE

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Any:
        """A function of NumPy, entry by entry."""
        if method != "__call__":
            raise UsageError(f"trace: np.{ufunc.__name__}.{method} is not known: write the spec by hand")
        return getattr(NAMESPACE, ufunc.__name__)(*inputs)

    def __array_function__(self, function: Any, _: Any, args: Any, given: Any) -> Any:
        """Another function of NumPy."""
        name = {"concatenate": "concat", "transpose": "permute_dims"}.get(function.__name__, function.__name__)
        return getattr(NAMESPACE, name)(*args, **given)

    @property
    def T(self) -> Traced:
        return Traced(self.axes[::-1])

    @property
    def mT(self) -> Traced:
        return Traced([*self.axes[:-2], self.axes[-1], self.axes[-2]])

    def reshape(self, *shape: Any) -> Traced:
        return _reshape(self, shape[0] if len(shape) == 1 else shape)

    def __getitem__(self, key: Any) -> Traced:
        key = key if isinstance(key, tuple) else (key,)
        given = sum(k is not None and k is not Ellipsis for k in key)
        rest = [slice(None)] * (self.ndim - given)
        at = key.index(Ellipsis) if Ellipsis in key else len(key)
        left = iter(self.axes)
        axes: list[Term] = []
        for k in (*key[:at], *rest, *key[at + 1 :]):
            if k is None:
                axes.append(Fixed(1))
                continue
            axis = next(left)
            if not isinstance(k, slice):
                fix(axis)
                continue
            start, stop, step = k.indices(axis.size)
            if step != 1:
                axis, start, stop = fix(axis), 0, len(range(start, stop, step))
            axes.append(_part(axis, start, max(start, stop)))
        return Traced(axes)


def _part(axis: Term, start: int, stop: int) -> Term:
    if isinstance(known(axis), Fixed | Alike):
        return _new(known(axis), Cat, stop - start)[0]
    if start > 0:
        axis = (_cut(axis, start) or [axis, fix(axis)])[1]
    if stop - start < axis.size:
        axis = (_cut(axis, stop - start) or [fix(axis)])[0]
    return axis


def _entrywise(*xs: Any) -> Traced:
    """Arrays entry by entry, with axes of one place repeated."""
    arrays = [NAMESPACE.asarray(x) for x in xs if isinstance(x, Traced) or np.ndim(x)]
    axes: list[Term] = []
    for i in range(1, max(x.ndim for x in arrays) + 1):
        here = [x.axes[-i] for x in arrays if x.ndim >= i]
        axes.append(reduce(meet, [axis for axis in here if axis.size > 1] or here[:1]))
    return Traced(axes[::-1])


for _operator in ("add", "sub", "mul", "truediv", "pow", "gt", "lt", "ge", "le", "eq", "ne", "and", "or"):
    setattr(Traced, f"__{_operator}__", lambda a, b: _entrywise(a, b))
    setattr(Traced, f"__r{_operator}__", lambda a, b: _entrywise(a, b))
for _operator in ("neg", "pos", "abs", "invert"):
    setattr(Traced, f"__{_operator}__", _entrywise)
setattr(Traced, "__matmul__", lambda a, b: _matmul(a, b))  # noqa: B010
for _method in ("sum", "mean", "max", "min", "std", "var", "prod", "all", "any"):
    setattr(Traced, _method, lambda x, axis=None, keepdims=False: _reduced(x, axis=axis, keepdims=keepdims))


def _matmul(a: Any, b: Any) -> Traced:
    a, b = NAMESPACE.asarray(a), NAMESPACE.asarray(b)
    if a.ndim == 1:
        return _matmul(a[None, :], b)[..., 0, :] if b.ndim > 1 else _reduced(_entrywise(a, b))
    if b.ndim == 1:
        return _matmul(a, b[:, None])[..., 0]
    meet(a.axes[-1], b.axes[-2])
    outer = _entrywise(Traced(a.axes[:-2]), Traced(b.axes[:-2])) if max(a.ndim, b.ndim) > 2 else Traced([])
    return Traced([*outer.axes, a.axes[-2], b.axes[-1]])


def _dot(a: Any, b: Any) -> Traced:
    if NAMESPACE.asarray(b).ndim > 2:
        raise UsageError("trace: np.dot of more than two dimensions is not known: write the spec by hand")
    return _matmul(a, b)


def _einsum(subscripts: str, *operands: Any) -> Traced:
    """Sums of products by letters: axes of one letter meet."""
    read, arrow, given = subscripts.replace(" ", "").partition("->")
    arrays, axes = list(map(NAMESPACE.asarray, operands)), dict[str, Term]()
    if not arrow or "." in subscripts or [len(part) for part in read.split(",")] != [x.ndim for x in arrays]:
        raise UsageError(f"trace: einsum of {subscripts!r} is not known: write the spec by hand")
    for letter, axis in zip(read.replace(",", ""), (axis for x in arrays for axis in x.axes)):
        axes[letter] = meet(axes[letter], axis) if letter in axes else axis
    return Traced([axes[letter] for letter in given])


def _reduced(x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
    """A sum, a mean or the like over some axes: they have no order."""
    gone = range(x.ndim) if axis is None else [a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    return Traced([Fixed(1) if i in gone else a for i, a in enumerate(x.axes) if keepdims or i not in gone])


def _reshape(x: Traced, shape: Any) -> Traced:
    shape = [shape] if isinstance(shape, int) else list(shape)
    if -1 in shape:
        shape[shape.index(-1)] = math.prod(x.shape) // math.prod(n for n in shape if n != -1)
    left = factors(product(x.axes))
    axes: list[Term] = []
    for n in shape:
        if n == 1:
            axes.append(Fixed(1))
            continue
        parts = _blocks(product(left), n)
        if parts is None:
            raise UsageError(f"trace: an array of shape {list(x.shape)} is reshaped to {shape}")
        axes.append(parts[0])
        left = factors(parts[1])
    return Traced(axes)


def _concat(parts: Sequence[Any], *, axis: int = 0) -> Traced:
    arrays: list[Traced] = list(map(NAMESPACE.asarray, parts))
    axis %= arrays[0].ndim
    axes = [reduce(meet, [x.axes[i] for x in arrays]) if i != axis else Fixed(0) for i in range(arrays[0].ndim)]
    axes[axis] = cat([p for x in arrays for p in pieces(x.axes[axis])])
    return Traced(axes)


def _take(x: Traced, places: Traced, *, axis: int = 0) -> Traced:
    fix(x.axes[axis])
    return Traced([*x.axes[:axis], *places.axes, *x.axes[axis % x.ndim + 1 :]])


def _broadcast_to(x: Traced, shape: Sequence[int]) -> Traced:
    axes: list[Term] = [*[Fixed(1)] * (len(shape) - x.ndim), *x.axes]
    return Traced([axis if axis.size == n else Alike(n) for axis, n in zip(axes, shape)])


def _moveaxis(x: Traced, source: int, destination: int) -> Traced:
    axes = list(x.axes)
    moved = axes.pop(source)
    axes.insert(destination % x.ndim, moved)
    return Traced(axes)


def _constant(shape: Any, *_: Any, **__: Any) -> Traced:
    """An array of one value."""
    return Traced([Alike(n) for n in ([shape] if isinstance(shape, int) else shape)])


class _Namespace:
    """What of the array API is understood."""

    __name__ = "traced"
    asarray = staticmethod(lambda x, **_: x if isinstance(x, Traced) else Traced([Fixed(n) for n in np.shape(x)]))
    astype = staticmethod(lambda x, *_, **__: x)
    matmul = staticmethod(_matmul)
    dot = staticmethod(_dot)
    einsum = staticmethod(_einsum)
    reshape = staticmethod(_reshape)
    concat = staticmethod(_concat)
    take = staticmethod(_take)
    broadcast_to = staticmethod(_broadcast_to)
    moveaxis = staticmethod(_moveaxis)
    permute_dims = staticmethod(lambda x, axes: Traced([x.axes[i] for i in axes]))
    matrix_transpose = staticmethod(lambda x: x.mT)
    shape, ndim = staticmethod(lambda x: x.shape), staticmethod(lambda x: x.ndim)
    float32, float64 = np.float32, np.float64

    def __getattr__(self, name: str) -> Any:
        if name in _ENTRYWISE:
            return _entrywise
        if name in _SYMMETRIC:
            return _reduced
        if name in ("zeros", "ones", "full", "empty"):
            return _constant
        raise UsageError(f"trace: xp.{name} is not known: write the spec by hand")


NAMESPACE = _Namespace()
_ENTRYWISE = {
    "abs", "absolute", "add", "clip", "cos", "divide", "equal", "erf", "exp", "expm1", "greater", "greater_equal",
    "isfinite", "less", "less_equal", "log", "log1p", "logaddexp", "maximum", "minimum", "multiply", "negative", "not_equal",
    "pow", "power", "reciprocal", "sign", "sin", "sqrt", "square", "subtract", "tanh", "where", "zeros_like", "ones_like",
}  # fmt: skip
_SYMMETRIC = {"all", "any", "max", "mean", "min", "prod", "std", "sum", "var"}


# ------------------------------------------------------------------------------------------------------------------ spec


def _spec(params: dict[str, Traced]) -> Spec:
    """The spec that the axes of parameters make. What nothing else meets was not read, or only as a sum, and stays."""
    names: dict[Free, str] = {}
    spec = Spec({tensor: [_entry(tensor, axis, names) for axis in x.axes] for tensor, x in params.items()})
    alone = [term for term, name in names.items() if len(spec.uses(name)) == 1]
    for term in alone:
        fix(term)
    return _spec(params) if alone else spec


def _entry(tensor: str, term: Term, names: dict[Free, str]) -> Entry:
    term = known(term)
    if isinstance(term, Free):
        return names.setdefault(term, _unused(tensor.removesuffix(".weight"), names))
    if isinstance(term, Cat):
        return Slices([_entry(tensor, part, names) for part in term.parts], [part.size for part in term.parts])
    if isinstance(term, Product):
        return _blocked(tensor, list(term.parts), names)
    return None


def _blocked(tensor: str, parts: list[Term], names: dict[Free, str]) -> Entry:
    first, *rest = parts
    if not rest:
        return _entry(tensor, first, names)
    outer, k = _entry(tensor, first, names), math.prod(p.size for p in rest)
    if isinstance(outer, str):
        return Block(outer, k, _blocked(tensor, rest, names))
    if isinstance(outer, Slices) and isinstance(first, Cat):
        return Slices([_blocked(tensor, [p, *rest], names) for p in first.parts], [p.size * k for p in first.parts])
    inner = _blocked(tensor, rest, names)
    return None if inner is None else Slices([inner] * first.size)


def _unused(name: str, names: dict[Free, str]) -> str:
    taken = set(names.values())
    return next(n for n in _numbered(name) if n not in taken)


def _numbered(name: str) -> Iterator[str]:
    yield name
    i = 2
    while True:
        yield f"{name}:{i}"
        i += 1
