"""Layers, and what of them is written down for `taps`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from array_api_compat import device

from refmerge.numeric import array_namespace, host, like
from refmerge.symmetry.axes import Entry, names, places_of

__all__ = [
    "Layers", "Reads", "causal", "drawn", "gelu", "gelu_tanh", "in_order", "max_pool", "relu", "rotated", "silu", "softmax",
]  # fmt: skip

Params = Mapping[str, Any]


class Reads(dict[str, Any]):
    """Taps that have in `reads` too, under the name of its weight, what each linear layer and convolution reads: a row for
    each sample or place, with as many numbers as one row of the weight (outputs, inputs, ...) has.

    Any taps with a method `read` are given that, with the axes of samples and places still there. Those with a method `gave`
    are given after it what the layer gives: the array itself, through which gradients go, the axis of its units, and whether
    the weight is `out_in` or `in_out`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, Any] = {}

    def read(self, name: str, x: Any) -> None:
        self.reads[name] = array_namespace(x).reshape(x, (-1, x.shape[-1]))


class Layers:
    """The layers of a model by the names of their modules. What they give is written down in `taps`, if there is one."""

    def __init__(self, params: Params, taps: dict[str, Any] | None = None) -> None:
        self.params, self.taps = params, taps

    def linear(self, name: str, x: Any, weight: str = "weight", bias: str = "bias") -> Any:
        """W x + b, W of shape (out, in)."""
        w = self.params[f"{name}.{weight}"]
        self._in(f"{name}.{weight}", x)
        y = self._plus(x @ array_namespace(w).matrix_transpose(w), f"{name}.{bias}")
        return self._out(f"{name}.{weight}", self._gave(f"{name}.{weight}", y))

    def conv1d(self, name: str, x: Any) -> Any:
        """x W + b, W of shape (in, out), as GPT-2 has it."""
        self._in(f"{name}.weight", x)
        y = self._plus(x @ self.params[f"{name}.weight"], f"{name}.bias")
        return self._out(f"{name}.weight", self._gave(f"{name}.weight", y, layout="in_out"))

    def conv(self, name: str, x: Any, stride: int = 1, padding: int = 0) -> Any:
        """A convolution (out, in, height, width): for each place of the kernel, a matrix times the pixels below it."""
        w = self.params[f"{name}.weight"]
        xp, (n, _, height, width) = array_namespace(x), x.shape
        rows, columns = ((size + 2 * padding - k) // stride + 1 for size, k in zip((height, width), w.shape[2:]))
        x, total = padded(x, padding, 0.0), 0.0
        self._in(f"{name}.weight", x, windows(x, w.shape[2], w.shape[3], stride, rows, columns))
        for part, i, j in windows(x, w.shape[2], w.shape[3], stride, rows, columns):
            total = total + w[:, :, i, j] @ xp.reshape(part, (n, x.shape[1], rows * columns))
        y = xp.reshape(total, (n, w.shape[0], rows, columns))
        if f"{name}.bias" in self.params:
            y = y + self.params[f"{name}.bias"][:, None, None]
        return self._out(f"{name}.weight", self._gave(f"{name}.weight", y, axis=1), axis=1)

    def norm(self, name: str, x: Any, axis: int = -1, eps: float = 1e-5) -> Any:
        """The norm that has these parameters: batch norm by its running statistics where it has them; else, over the units
        of one place, layer norm where it has a bias, and else RMS norm."""
        xp, params = array_namespace(x), self.params
        shape = [1] * x.ndim
        shape[axis] = -1

        def along(key: str) -> Any:
            return xp.reshape(params[f"{name}.{key}"], tuple(shape))

        if f"{name}.running_mean" in params:
            y = (x - along("running_mean")) / xp.sqrt(along("running_var") + eps)
        else:
            if f"{name}.bias" in params:
                x = x - xp.mean(x, axis=axis, keepdims=True)
            y = x / xp.sqrt(xp.mean(x * x, axis=axis, keepdims=True) + eps)
        y = y * along("weight")
        if f"{name}.bias" in params:
            y = y + along("bias")
        return self._out(f"{name}.weight", y, axis)

    def module(self, name: str, x: Any, run: Callable[[Layers, Any], Any]) -> Any:
        """What the layers of the module of that name make of x: run(layers, x). Upscaled layers run them otherwise."""
        return run(self, x)

    def units(self, entry: Entry, x: Any, axis: int = -1) -> Any:
        """x, whose axis is one of the units of `entry`, for taps."""
        if self.taps is not None:
            rows = as_rows(x, axis)
            for name, _ in names(entry):
                places = places_of(entry, name, np.arange(rows.shape[1]))
                if places is not None:
                    self._below(name, units_of(rows, places))
        return x

    def _below(self, name: str, x: Any) -> None:
        assert self.taps is not None
        there = self.taps.get(name)
        self.taps[name] = x if there is None else array_namespace(x).concat([there, x], axis=x.ndim - 2)

    def _in(self, name: str, x: Any, parts: Iterable[tuple[Any, int, int]] = ()) -> None:
        """x, or the parts of an image below each place of a kernel, is what a layer reads."""
        if read := getattr(self.taps, "read", None):
            xp, below = array_namespace(x), [part for part, _, _ in parts]
            if below:
                x = xp.permute_dims(xp.stack(below, axis=2), (0, 3, 4, 1, 2))  # samples, rows, columns, channels, places
                x = xp.reshape(x, (*x.shape[:3], -1))
            read(name, x)

    def _gave(self, name: str, y: Any, axis: int = -1, layout: str = "out_in") -> Any:
        """y, which a linear layer gives."""
        if gave := getattr(self.taps, "gave", None):
            gave(name, y, axis, layout)
        return y

    def _out(self, name: str, y: Any, axis: int = -1) -> Any:
        if self.taps is not None:
            self._below(name, as_rows(y, axis))
        return y

    def _plus(self, y: Any, bias: str) -> Any:
        return y + self.params[bias] if bias in self.params else y


def as_rows(x: Any, axis: int) -> Any:
    """A matrix whose columns are the entries of that axis."""
    xp = array_namespace(x)
    return xp.reshape(xp.moveaxis(x, axis, -1), (-1, x.shape[axis]))


def units_of(rows: Any, places: np.ndarray) -> Any:
    """What units with several places give, as more rows: (owners ..., rows times places, units)."""
    xp, (*owners, units, count) = array_namespace(rows), places.shape
    columns = xp.take(rows, like_ints(places.reshape(-1), rows), axis=1)
    x = xp.reshape(columns, (rows.shape[0], *owners, units, count))
    x = xp.moveaxis(x, (0, -1), (-3, -2))  # owners, rows, places, units
    return xp.reshape(x, (*owners, rows.shape[0] * count, units))


def like_ints(values: np.ndarray, x: Any) -> Any:
    """Whole numbers as an array of x's library and device."""
    xp = array_namespace(x)
    return xp.asarray(values, device=device(x)) if xp is not np else values


# ----------------------------------------------------------------------------------------------------------- activations


def relu(x: Any) -> Any:
    return array_namespace(x).where(x > 0, x, array_namespace(x).zeros_like(x))


def silu(x: Any) -> Any:
    return x / (1 + array_namespace(x).exp(-x))


def gelu(x: Any) -> Any:
    """x times the share of a standard normal below x."""
    xp = array_namespace(x)
    if not hasattr(xp, "erf"):
        from scipy.special import erf

        return 0.5 * x * (1 + like(erf(host(0.5**0.5 * x)), x))
    return 0.5 * x * (1 + xp.erf(0.5**0.5 * x))


def gelu_tanh(x: Any) -> Any:
    """GPT-2's approximation of it."""
    return 0.5 * x * (1 + array_namespace(x).tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x: Any) -> Any:
    """Over the last axis."""
    xp = array_namespace(x)
    x = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return x / xp.sum(x, axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------- images


def windows(x: Any, height: int, width: int, stride: int, rows: int, columns: int) -> Iterable[tuple[Any, int, int]]:
    """For each place (i, j) of a kernel the pixels below it, one for each of the output's."""
    for i in range(height):
        for j in range(width):
            down, right = slice(i, i + stride * (rows - 1) + 1, stride), slice(j, j + stride * (columns - 1) + 1, stride)
            yield x[:, :, down, right], i, j


def padded(x: Any, by: int, value: float) -> Any:
    """With `by` pixels more on all four sides."""
    if not by:
        return x
    xp = array_namespace(x)
    for axis in (2, 3):
        shape = [*x.shape]
        shape[axis] = by
        edge = xp.full(tuple(shape), value, dtype=x.dtype, device=device(x))
        x = xp.concat([edge, x, edge], axis=axis)
    return x


def max_pool(x: Any, size: int, stride: int, padding: int = 0) -> Any:
    """The largest of size x size pixels."""
    rows, columns = ((n + 2 * padding - size) // stride + 1 for n in x.shape[2:])
    xp, largest = array_namespace(x), None
    for part, _, _ in windows(padded(x, padding, -float("inf")), size, size, stride, rows, columns):
        largest = part if largest is None else xp.where(part > largest, part, largest)
    return largest


# ------------------------------------------------------------------------------------------------------------- attention


def split(x: Any, heads: int) -> Any:
    """(samples, places, heads times k) -> (samples, heads, places, k)."""
    xp, (n, t, d) = array_namespace(x), x.shape
    return xp.permute_dims(xp.reshape(x, (n, t, heads, d // heads)), (0, 2, 1, 3))


def joined(x: Any) -> Any:
    """What undoes `split`."""
    xp, (n, heads, t, k) = array_namespace(x), x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (n, t, heads * k))


def attention(q: Any, k: Any, v: Any, heads: int, groups: int | None = None, hidden: Any = None, turn: Any = None) -> Any:
    """softmax(Q K^T / sqrt(k)) V in each head. groups: of heads that share keys and values. hidden: added to the scores.
    turn: what is done to queries and keys before."""
    groups = groups or heads
    q, k, v = split(q, heads), split(k, groups), split(v, groups)
    if turn is not None:
        q, k = turn(q), turn(k)
    xp, (n, _, t, width) = array_namespace(q), q.shape
    q = xp.reshape(q, (n, groups, heads // groups, t, width))
    scores = width**-0.5 * (q @ xp.matrix_transpose(k)[:, :, None, ...])
    weights = softmax(scores if hidden is None else scores + hidden)
    return joined(xp.reshape(weights @ v[:, :, None, ...], (n, heads, t, width)))


def causal(places: int, x: Any) -> Any:
    """Minus infinity where a place would look at a later one."""
    return like(np.triu(np.full((places, places), -np.inf), 1), x)


def rotated(x: Any, theta: float) -> Any:
    """Rotary positions: the pair of entries i and i + k/2 of place t is turned by t / theta^(2i/k)."""
    xp, (t, k) = array_namespace(x), x.shape[-2:]
    angles = np.outer(np.arange(t), theta ** (-np.arange(0, k, 2) / k))
    c, s = like(np.cos(angles), x), like(np.sin(angles), x)
    a, b = x[..., : k // 2], x[..., k // 2 :]
    return xp.concat([a * c - b * s, b * c + a * s], axis=-1)


# ------------------------------------------------------------------------------------------------------------ parameters


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers as numbers: layer 2 before layer 10."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def drawn(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Parameters of these shapes: matrices that keep the size of what goes through them, gains and variances about 1, the
    rest small. Everything depends on everything, so that a wrong permutation shows."""
    params = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape)
        if name.endswith("running_var"):
            params[name] = np.exp(0.3 * x)
        elif len(shape) > 1:
            params[name] = x / np.prod(shape[1:]) ** 0.5
        else:
            params[name] = 1 + 0.2 * x if name.endswith("weight") else 0.2 * x
    return params
