"""Runs a method on one block: loads its inputs in the work dtype, hands over what the method asks for, writes the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from refmerge.checkpoint.dtypes import DTYPES
from refmerge.errors import InputError
from refmerge.figures import part_of
from refmerge.fused import Lazy
from refmerge.group import Group, Pause, Place, State
from refmerge.method import Method
from refmerge.numeric import array_namespace, host
from refmerge.rng import Memo, Rng
from refmerge.sources import DiskSink, NotFinite, Scratch, Sink, Source, all_finite
from refmerge.work import Tensor, Work, stat_name

__all__ = ["Nonfinite", "count_nonfinite", "report_nonfinite", "run_block", "run_model"]


def run_block(
    work: Work,
    tensor: Tensor,
    place: Place,
    state: State,
    of_tensor: State | None,
    sinks: Mapping[str, Sink],
    scratch: Scratch,
    masks: Memo | None,
    *,
    first: bool,
    figures: list[Any] | None = None,
) -> Pause | None:
    """Run the method on one block and write its result; the Pause where it stopped at a question.

    state, of_tensor: what is known of the group, and of the block's tensor where the group is larger. masks: those drawn in
    an earlier pass. first: no pass came before, so that the inputs are still to be checked. figures: gets the block's part
    of its tensor's figures, once it is written.
    """
    method, t = work.method, tensor
    view = work.view(t)
    span = (t.name, place.start, place.stop, t.work)
    strict = work.nonfinite == "error"

    def load(source: Source, slot: Any) -> Any:
        try:
            x = source.load(*span, slot, scratch, finite=strict and first, lazy=work.fused and view != "tensor")
        except NotFinite:
            report_nonfinite(source, t)
        return _shaped(x, t, view)

    models = [load(m, i) for i, m in enumerate(work.models)]
    args: dict[str, Any] = {"models": models}
    if "base" in method.asks:
        args["base"] = None if work.base is None else load(work.base, "base")
    if "group" in method.asks:
        args["group"] = Group(state, place, of_tensor)
    if "rng" in method.asks:
        recorded = _stats(work, t, span, view, scratch, {"draw"}) if work.recorded else None
        drawn = None if recorded is None else {i: next(iter(s.values())) for i, s in enumerate(recorded) if s}
        args["rng"] = Rng(work.seed, t.name, place.start, models[0], drawn, None if state.sampling else masks)
    if "stats" in method.asks:
        args["stats"] = _stats(work, t, span, view, scratch, {"whole", "element"})
    if "name" in method.asks:
        args["name"] = t.name
    try:
        with np.errstate(all="ignore"):
            result = method.run(*(args[a] for a in method.asks), **t.params)
    except Pause as pause:
        return pause.with_traceback(None)
    if state.sampling:
        return Pause(False, None)
    _write(method, result, t, place.start, models[0].shape, sinks, scratch, strict)
    if figures is not None:
        inputs = [*models, *([] if args.get("base") is None else [args["base"]])]
        sink = sinks[""]
        assert isinstance(sink, DiskSink)
        written = sink.written(t.name, place.stop - place.start, t.work, scratch, type(models[0]) is Lazy)
        row = t.rows[1] if view == "rows" else None
        with np.errstate(all="ignore"):
            figures.append(part_of(place, written, inputs, args.get("base") is not None, row))
    return None


def _write(
    method: Method, result: Any, t: Tensor, start: int, shape: Sequence[int], sinks: Mapping[str, Sink], scratch: Scratch,
    strict: bool,
) -> None:  # fmt: skip
    for output, sink in sinks.items():
        x = _output(method, result, output)
        _check_shape(method, x, t.name, shape)
        try:
            sink.write(t.name, start, x, scratch, finite=strict and not output)
        except NotFinite:
            _report_range(method, x, t, start)


def _output(method: Method, result: Any, output: str) -> Any:
    if not output:
        return result
    if not isinstance(result, Mapping) or output not in result:
        given = ", ".join(map(repr, result)) if isinstance(result, Mapping) else type(result).__name__
        raise TypeError(f"{method.name} declares the output {output!r} and returns {given}")
    return result[output]


def _check_shape(method: Method, x: Any, name: str, shape: Sequence[int]) -> None:
    """TypeError for a result that would leave elements unwritten, or write others."""
    if not hasattr(x, "shape"):
        raise TypeError(f"{method.name} returned {type(x).__name__} for tensor {name!r}, not an array")
    if tuple(x.shape) != tuple(shape):
        raise TypeError(f"{method.name} returned shape {tuple(x.shape)} for {tuple(shape)} of tensor {name!r}")


@cache
def _largest(dtype: str) -> float:
    """Every magnitude below it rounds to a finite number of the dtype."""
    top = DTYPES[dtype].type(ml_dtypes.finfo(DTYPES[dtype]).max)
    return float(top) + (float(top) - float(np.nextafter(top, DTYPES[dtype].type(0)))) / 2


def _report_range(method: Method, x: Any, t: Tensor, start: int) -> None:
    """Raise the error for a result that is not finite, or would not be in the dtype that it is kept in."""
    values = host(x).reshape(-1)
    first = int(np.flatnonzero(~(np.abs(values.astype(np.float64)) < _largest(t.out)))[0])
    index = tuple(int(i) for i in np.unravel_index(start + first, t.shape))
    raise InputError(
        f"{method.name} gives {float(values[first])} for tensor {t.name!r} at {index}, which is not finite in "
        f"{t.out}; other parameters or a wider out_dtype may help, nonfinite='propagate' (--nonfinite propagate) writes it"
    )


def _shaped(x: Any, tensor: Tensor, view: str) -> Any:
    if view == "tensor":
        return array_namespace(x).reshape(x, tensor.shape)
    if view == "rows":
        return array_namespace(x).reshape(x, (-1, max(tensor.rows[1], 1)))
    return x


def _stats(
    work: Work, t: Tensor, span: tuple[str, int, int, str], view: str, scratch: Scratch, kinds: set[str]
) -> list[dict[str, Any]]:
    """Per model the declared statistics of these kinds that its file has for this tensor, cut with the block."""
    found = []
    if work.stats is None:
        return [{} for _ in work.models]
    for i, source in enumerate(work.stats):
        mine: dict[str, Any] = {}
        for key, kind in work.method.stats.items():
            name = stat_name(t.name, key)
            if kind == "whole" and name not in source.names():
                name = stat_name(t.name.rpartition(".")[0], key)  # a layer's input statistics, under the module's name
            if kind not in kinds or name not in source.names():
                continue
            shape = source.shape(name)
            if kind == "whole":
                x = source.load(name, 0, math.prod(shape), span[3], ("stat", i, key), scratch)
                mine[key] = array_namespace(x).reshape(x, shape)
                continue
            if shape != t.shape:
                raise InputError(f"{source.label}: {name!r} has shape {shape}, its tensor {t.shape}")
            x = source.load(name, *span[1:], ("stat", i, key), scratch)
            if kind == "element" and work.nonfinite == "error" and not all_finite(x):
                raise InputError(f"{source.label}: {name!r} of tensor {t.name!r} has values that are not finite")
            if key == "fisher" and bool(array_namespace(x).any(x < 0)):
                raise InputError(f"{source.label}: {name!r} of tensor {t.name!r}, a mean of squares, has negative values")
            if kind == "draw" and not bool(array_namespace(x).all((x == 0) | (x == 1))):
                raise InputError(f"{source.label}: {name!r} is a recorded draw and holds other values than 0 and 1")
            mine[key] = _shaped(x, t, view)
        found.append(mine)
    return found


@dataclass(frozen=True)
class Nonfinite:
    """Values of a tensor that are NaN or infinite: how many, and index and value of the first."""

    count: int
    index: tuple[int, ...]
    value: float

    def told(self, source: Source, name: str) -> str:
        return (
            f"{source.told(name)} has {self.count} non-finite value{'s' * (self.count != 1)}, the first {self.value} at "
            f"{self.index}"
        )


def count_nonfinite(source: Source, t: Tensor) -> Nonfinite:
    """Count what is not finite in a tensor that has such values."""
    first, count, step, scratch = None, 0, 1 << 20, Scratch()
    for start in range(0, t.size, step):
        x = host(source.load(t.name, start, min(start + step, t.size), t.work, 0, scratch))
        bad = np.flatnonzero(~np.isfinite(x))
        if bad.size and first is None:
            first = (start + int(bad[0]), float(x[bad[0]]))
        count += bad.size
    assert first is not None
    return Nonfinite(count, tuple(int(i) for i in np.unravel_index(first[0], t.shape)), first[1])


def report_nonfinite(source: Source, t: Tensor) -> NoReturn:
    """Raise the error that names the tensor, the first index and the count."""
    raise InputError(
        f"{count_nonfinite(source, t).told(source, t.name)}; nonfinite='propagate' (--nonfinite propagate) merges them, and "
        "nonfinite='skip-model' (--nonfinite skip-model) merges a tensor from the models in which it is finite"
    )


class _LazyModel(Mapping[str, Any]):
    """A whole model for methods of view "model": name -> array in its natural shape, loaded when asked for."""

    def __init__(self, source: Source, work: Mapping[str, str]) -> None:
        self._source, self._work = source, work  # name -> dtype to compute in

    def __getitem__(self, name: str) -> Any:
        shape = self._source.shape(name)
        x = self._source.load(name, 0, math.prod(shape), self._work[name], 0, Scratch())
        return array_namespace(x).reshape(x, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._work)

    def __len__(self) -> int:
        return len(self._work)


def run_model(work: Work, sinks: Mapping[str, Sink]) -> None:
    """Run a method of view "model" on whole models and write its results."""
    method, size = work.method, sum(t.size for t in work.tensors)
    dtypes = {t.name: t.work for t in work.tensors}
    if work.nonfinite == "error":
        for source in [*work.models, *([work.base] if work.base else [])]:
            for t in work.tensors:
                if not all_finite(_LazyModel(source, dtypes)[t.name]):
                    report_nonfinite(source, t)
    args: dict[str, Any] = {"models": [_LazyModel(m, dtypes) for m in work.models]}
    args["base"] = None if work.base is None else _LazyModel(work.base, dtypes)
    args["group"] = Group(State(size, 1), Place(0, "", 0, size, size))
    wide = "float64" if "float64" in dtypes.values() else "float32"
    args["stats"] = [_LazyModel(s, dict.fromkeys(sorted(s.names()), wide)) for s in work.stats or ()]
    args["name"] = ""
    if "rng" in method.asks:
        raise TypeError(f"{method.name}: rng draws for a tensor, a method of view 'model' has none")
    with np.errstate(all="ignore"):
        result = method.run(*(args[a] for a in method.asks), **work.tensors[0].params)
    scratch = Scratch()
    tensors, first = {t.name: t for t in work.tensors}, next(iter(sinks.values()))
    for output, sink in sinks.items():
        model = _output(method, result, output)
        if tensors.keys() != model.keys():
            off = sorted(tensors.keys() ^ model.keys())
            raise TypeError(f"{method.name} returned other tensors than it got: {off} differ")
        for name, x in model.items():
            _check_shape(method, x, name, tensors[name].shape)
            flat = array_namespace(x).reshape(x, (-1,))
            try:
                sink.write(name, 0, flat, scratch, finite=work.nonfinite == "error" and not output)
            except NotFinite:
                _report_range(method, flat, tensors[name], 0)
            sink.record(name, 0, tensors[name].size)
            if work.progress and sink is first:
                work.progress(work.bytes_of(tensors[name], tensors[name].size))
