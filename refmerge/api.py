"""`refmerge.merge` and `refmerge.call`: merge checkpoints, mappings name -> array, or single arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from array_api_compat import is_array_api_obj, is_numpy_array, is_torch_array

from refmerge.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    itemsize,
    open_checkpoint,
    parse_size,
    promote,
    same_or_inside,
)  # fmt: skip
from refmerge.checkpoint.dtypes import DTYPES, FLOATS
from refmerge.engine import Ran, Tensor, Work, block_elements, check_memory, default_threads, run
from refmerge.errors import InputError, UsageError
from refmerge.method import Method, Over
from refmerge.registry import get, open_backend
from refmerge.sources import ArraySink, ArraySource, DiskSink, DiskSource, HostSink, HostSource, Source, dtype_name

__all__ = ["Plan", "call", "merge", "prepare"]

Model = str | Path | Checkpoint | Mapping[str, Any]
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def merge(
    models: Sequence[Model],
    method: str | Method,
    /,
    *,
    base: Model | None = None,
    stats: Sequence[Model | None] | None = None,
    seed: int = 0,
    over: Over | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    backend: str | None = None,
    out: str | Path | None = None,
    threads: int | None = None,
    max_memory: int | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    nonfinite: Literal["error", "propagate"] = "error",
    integers: Literal["equal", "base"] = "equal",
    missing: Literal["error", "base", "skip"] = "error",
    arithmetic: Literal["round_once", "native"] = "round_once",
    **params: Any,
) -> Any:
    """Merge models into one.

    models: in the caller's order, all of one kind: paths of checkpoints (or open ones), or mappings name -> array of one
        array library. base: the model that task vectors are taken from, where the method needs one.
    method: a registry name, "ties" for the paper's method or "mergekit:ties" for another tool's, or a Method.
    stats: per model a mapping or a path of named statistics, for methods that read some.
    over: what `group` ranges over: "tensor", "model", or a function tensor name -> label; None is the method's choice.
    dtype: "float32" or "float64" to compute in; None computes floats of 32 bits or less in float32, others in float64.
    out_dtype: "float64", "float32", "float16" or "bfloat16" for the result; None keeps the inputs' (promoted, if mixed).
    backend: "numpy", "torch", "torch:cuda:0", "cupy"; None is numpy for checkpoints and the arrays' own library otherwise.
    out: a directory, or a file that ends in .safetensors; None returns arrays.
    threads: None uses the cores that the process may use. max_memory: "500MB" bounds the blocks' memory.
    nonfinite: what to do with NaN and infinities in the inputs. integers: "equal" demands that integer and boolean tensors
        agree and copies them, "base" takes the base's (without one, the first model's).
    missing: what to do with tensors that not all models have: "base" copies the base's (without one, the first model's
        that has it), "skip" leaves them out.
    arithmetic: "native" rounds after each operation in the inputs' dtype, as tools do that merge in 16 bits.

    Returns a mapping name -> array of the inputs' library, or the open Checkpoint at `out`. A method with several outputs
    gives a mapping of these for each of its outputs; on disk, `out/<output>.safetensors`.
    UsageError, InputError and ResourceError say what is wrong, in which tensor, and what would allow it.
    """
    plan = prepare(
        models, method, base=base, stats=stats, seed=seed, over=over, dtype=dtype, out_dtype=out_dtype, backend=backend,
        threads=threads, max_memory=max_memory, nonfinite=nonfinite, integers=integers, missing=missing,
        arithmetic=arithmetic, params=params,
    )  # fmt: skip
    return plan.run(out, max_shard_size=max_shard_size, overwrite=overwrite)


def call(
    method: str | Method,
    models: Sequence[Any],
    /,
    base: Any = None,
    *,
    stats: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    name: str = "x",
    over: Over | None = None,
    dtype: str | None = None,
    **params: Any,
) -> Any:
    """Merge single arrays (or nested lists of numbers, in float64): one block, eager, steps in a debugger.

    stats: per model a mapping key -> array; the key "" is the statistic that bears the tensor's own name.
    Returns an array of the models' shape, dtype and library; for a method of several outputs a mapping of these.
    """
    if base is not None and isinstance(base, list | tuple):
        base = np.asarray(base, dtype=np.float64)
    arrays = [np.asarray(m, dtype=np.float64) if isinstance(m, list | tuple) else m for m in models]
    named = None
    if stats is not None:
        named = [{f"{name}.{key}" if key else name: x for key, x in s.items()} for s in stats]
    result = merge(
        [{name: m} for m in arrays], method, base=None if base is None else {name: base}, stats=named, seed=seed, over=over,
        dtype=dtype, threads=1, nonfinite="propagate", **params,
    )  # fmt: skip
    outputs = (get(method) if isinstance(method, str) else method).outputs
    return {o: result[o][name] for o in outputs} if outputs else result[name]


@dataclass
class Plan:
    """A merge that has been checked and can be run: what is read, computed and written, before any weight is read."""

    work: Work
    specs: dict[str, tuple[str, tuple[int, ...]]]
    copied: dict[str, Source]
    backend: Any
    threads: int
    elements: int
    on_disk: bool
    example: Any
    checkpoints: list[Checkpoint]
    donor: Checkpoint | None
    ran: Ran | None = None

    def run(
        self,
        out: str | Path | None = None,
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> Any:
        outputs = self.work.method.outputs or ("",)
        if out is None:
            sinks: dict[str, Any] = {}
            for o in outputs:
                plain = is_numpy_array(self.example) or self.example is None
                foreign = plain and (self.on_disk or self.backend is not None)
                specs = {n: self.specs[n] for n in self.specs if not o or n not in self.copied}
                sinks[o] = HostSink(specs, self.backend) if foreign else ArraySink(specs, self.example)
            self._fill(sinks)
            results = {o: s.result() for o, s in sinks.items()}
            return results if self.work.method.outputs else results[""]
        target = Path(out)
        for c in self.checkpoints:
            if same_or_inside(target, c.path):
                raise UsageError(f"output {str(target)!r} lies in an input, {str(c.path)!r}: inputs are never written to")
        backend = self.backend or open_backend("numpy")
        if self.work.method.outputs:
            for o in outputs:
                self._write(target / f"{o}.safetensors", {o: backend}, max_shard_size, overwrite, metadata, None, ())
            return target
        sidecars = self.donor.sidecars() if self.donor is not None else ()
        self._write(target, {"": backend}, max_shard_size, overwrite, metadata, extra_files, sidecars)
        return open_checkpoint(target)

    def figures(self, estimate: bool = False) -> dict[str, Any]:
        """What the merge moves: of the run that was made, or an estimate that traces the method's questions on small
        arrays. Bytes are those of the files; peak_memory is that of the blocks, the interpreter not counted."""
        tensors, work = self.work.tensors, self.work
        copied = sum(math.prod(s) * itemsize(d) for n, (d, s) in self.specs.items() if n in self.copied)
        ran = self.ran
        if ran is None or estimate:
            passes = passes_of(work.method, tensors[0], len(work.models), work.over) if tensors else 0
            read = 0
            for t in tensors:
                whole = work.over == "tensor" and t.size <= self.elements * 3 // 2
                read += work.bytes_of(t, t.size) * (1 if whole else passes)
            ran = Ran(passes, read)
        return {
            "method": work.method.name,
            "models": len(work.models),
            "tensors": len(tensors),
            "copied": len(self.copied),
            "parameters": sum(t.size for t in tensors),
            "passes": ran.passes,
            "bytes_read": ran.bytes_read + copied,
            "bytes_written": sum(math.prod(s) * itemsize(d) for d, s in self.specs.values()),
            "peak_memory": peak_memory(work, self.elements, self.threads),
            "threads": self.threads,
            "backend": "arrays" if self.backend is None else self.backend.name,
        }

    def _write(
        self,
        target: Path,
        outputs: Mapping[str, Any],
        max_shard_size: int | str,
        overwrite: bool,
        metadata: Mapping[str, str] | None,
        extra_files: Mapping[str, bytes] | None,
        sidecars: Sequence[Path],
    ) -> None:
        (output, backend), *_ = outputs.items()
        specs = {n: self.specs[n] for n in self.specs if not output or n not in self.copied}
        if target.suffix == ".safetensors":
            sidecars, extra_files = (), None
        if self.checkpoints and not any(isinstance(s, ArraySource) for s in self.work.models):
            backend = self.backend
        with CheckpointWriter(
            target, specs, max_shard_size=parse_size(max_shard_size), overwrite=overwrite, metadata=metadata,
            sidecars=sidecars, extra_files=extra_files,
        ) as writer:  # fmt: skip
            if isinstance(self.work.models[0], ArraySource):
                sink: Any = _StagedSink(writer, specs, self.example)
            else:
                sink = DiskSink(writer, specs, backend)
            self._fill({output: sink})

    def _fill(self, sinks: Mapping[str, Any]) -> None:
        self.ran = run(self.work, sinks, elements=self.elements, threads=self.threads)
        for name, source in self.copied.items():
            for output, sink in sinks.items():
                if not output:
                    sink.copy(name, source)


class _StagedSink:
    """Arrays in memory to a file: each block goes through an ArraySink's rounding of one tensor at a time."""

    def __init__(self, writer: CheckpointWriter, specs: Mapping[str, tuple[str, tuple[int, ...]]], example: Any) -> None:
        self._writer, self._specs, self._example = writer, specs, example

    def _bytes(self, x: Any) -> np.ndarray:
        if is_torch_array(x):
            import torch

            return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        x = x.get() if hasattr(x, "get") else np.asarray(x)
        return np.ascontiguousarray(x).reshape(-1).view(np.uint8)

    def write(self, name: str, start: int, block: Any, scratch: Any) -> None:
        sink = ArraySink({name: (self._specs[name][0], (math.prod(block.shape),))}, self._example)
        sink.write(name, 0, block, scratch)
        self._writer.write(name, start, self._bytes(sink.arrays[name]))

    def copy(self, name: str, source: Any) -> None:
        raw = self._bytes(source.array(name))
        if raw.size:
            self._writer.write(name, 0, raw)


def prepare(
    models: Sequence[Model],
    method: str | Method,
    /,
    *,
    base: Model | None = None,
    stats: Sequence[Model | None] | None = None,
    seed: int = 0,
    over: Over | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    max_memory: int | str | None = None,
    nonfinite: str = "error",
    integers: str = "equal",
    missing: str = "error",
    arithmetic: str = "round_once",
    read_dtype: str | None = None,
    donor: str | Path | None = None,
    params: Mapping[str, Any] | Callable[[str, Collection[str]], Mapping[str, Any]] = {},  # noqa: B006 (never changed)
) -> Plan:
    """Check everything that can be checked without reading a weight, and return the plan of the merge.

    As `merge`, and: `params` may be a function (tensor name, all names) -> parameters, and `read_dtype` a safetensors
    dtype to which every input value is rounded as it is read (another tool's `dtype:`). `donor` is the input whose config
    and tokenizer files the result gets: the base, else the first model.
    """
    m = get(method) if isinstance(method, str) else method
    _one_of("nonfinite", nonfinite, "error", "propagate")
    _one_of("integers", integers, "equal", "base")
    _one_of("missing", missing, "error", "base", "skip")
    _one_of("arithmetic", arithmetic, "round_once", "native")
    _one_of("dtype", dtype, None, "float32", "float64")
    if isinstance(over, str):
        _one_of("over", over, "tensor", "model")
    if isinstance(models, str | Path | Mapping) or is_array_api_obj(models):
        raise UsageError("models is a sequence: write [a, b], also for one model")
    models = list(models)
    m.check_models(len(models), base is not None)
    if not callable(params):
        m.bind(params, len(models))  # complain about parameters before any file is opened
    if stats is not None and len(stats) != len(models):
        raise UsageError(f"stats has {len(stats)} entries for {len(models)} models")

    everything = [*models, *([] if base is None else [base])]
    on_disk = [isinstance(x, str | Path | Checkpoint) for x in everything]
    if any(on_disk) and not all(on_disk):
        raise UsageError("models and base are a mixture of checkpoints on disk and arrays in memory: give all as one kind")
    opened: list[Checkpoint] = []
    sources: list[Source]
    example = None
    if all(on_disk):
        engine_backend = open_backend(backend or "numpy")
        opened = [_opened(x) for x in everything]
        sources = [DiskSource(c, engine_backend, read_dtype) for c in opened]
    else:
        arrays = _mappings(everything)
        example = _one_library(arrays)
        engine_backend = None
        if backend is not None:
            engine_backend = _backend_for(backend, example)
        labels = [f"model {i}" for i in range(len(models))] + ["base"] * (base is not None)
        if engine_backend is not None:
            sources = [HostSource(x, label, engine_backend) for x, label in zip(arrays, labels)]
        else:
            sources = [ArraySource(x, label) for x, label in zip(arrays, labels)]
    model_sources = sources[: len(models)]
    base_source = sources[-1] if base is not None else None

    names, copied = _names(sources, base_source, missing)
    floats = [n for n in names if n not in copied and any(s.dtype(n) in FLOATS for s in sources)]
    for name in names:
        if name in copied:
            continue
        shapes = {s.label: s.shape(name) for s in sources}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{list(shape)} in {label}" for label, shape in shapes.items())
            raise InputError(f"tensor {name!r} has different shapes: {listed}; only equal shapes can be merged")
        if name not in floats:
            keeper = base_source or sources[0]
            if integers == "equal" and not all(keeper.same(s, name) for s in sources if s is not keeper):
                raise InputError(
                    f"integer tensor {name!r} differs between the models and is not averaged; integers='base' "
                    f"(--integers base) takes {'the base' if base_source else 'the first model'}'s"
                )
            copied[name] = keeper
        elif not all(s.dtype(name) in FLOATS for s in sources):
            kinds = ", ".join(f"{s.dtype(name)} in {s.label}" for s in sources)
            if integers != "base":
                raise InputError(f"tensor {name!r} is integer in one model and floating in another: {kinds}; "
                                 "integers='base' (--integers base) takes the base's")  # fmt: skip
            copied[name] = base_source or sources[0]
    floats = [n for n in floats if n not in copied]

    over = m.over if over is None else over
    stored = {n: promote([s.dtype(n) for s in sources]) for n in floats}
    wide = any(d == "F64" for d in stored.values())
    tensors = []
    for n in floats:
        if arithmetic == "native" and not m.widens:
            work = str(DTYPES[stored[n]])
        elif m.work is not None:
            work = m.work
        else:
            # One dtype for all that share a group: a k-th largest compares values of all its tensors.
            work = dtype or ("float64" if stored[n] == "F64" or (wide and over != "tensor") else "float32")
        given = params(n, floats) if callable(params) else params
        tensors.append(Tensor(n, sources[0].shape(n), work, m.bind(given, len(models))))
    final = None if out_dtype is None else _DTYPES.get(out_dtype.removeprefix("torch."), out_dtype)
    if final is not None and final not in FLOATS:
        raise UsageError(f"out_dtype = {out_dtype!r} is none of {', '.join(_DTYPES)}")
    specs = {n: (final or stored[n], sources[0].shape(n)) for n in floats}
    for n, s in copied.items():
        specs[n] = (s.stored(n) if hasattr(s, "stored") else s.dtype(n), s.shape(n))

    workers = threads if threads is not None else default_threads()
    if workers < 1:
        raise UsageError(f"threads = {threads} is less than one")
    limit = None if max_memory is None else parse_size(max_memory)
    block_bytes = engine_backend.block_bytes if engine_backend is not None else 1 << 20
    work_ = Work(
        m, model_sources, base_source, tensors, over, seed, _stat_sources(stats, example, engine_backend), nonfinite
    )
    check_memory(work_, limit, workers)
    elements = block_elements(m, len(models), block_bytes, workers, limit)
    if all(on_disk) is False and threads == 1 and sum(t.size for t in tensors) <= 1 << 22:
        elements = max(elements, 1 << 22)
    given_by = opened[-1 if base is not None else 0] if opened else None
    if donor is not None:
        given_by = next((c for x, c in zip(everything, opened) if same_path(x, donor)), None) or open_checkpoint(donor)
    return Plan(
        work_,
        dict(sorted(specs.items())),
        copied,
        engine_backend,
        workers,
        elements,
        all(on_disk),
        example,
        opened,
        given_by,
    )


def same_path(model: Any, path: str | Path) -> bool:
    return isinstance(model, str | Path) and Path(model) == Path(path)


def passes_of(method: Method, tensor: Tensor, models: int, over: Over) -> int:
    """How often a method passes over a group of several blocks, counted on small random arrays with these parameters."""
    if method.view_for(tensor.params) in ("tensor", "model"):
        return 1
    draw = np.random.default_rng(0)
    arrays = [{"x": draw.standard_normal((48, 64)).astype(np.float32)} for _ in range(models + 1)]
    sources = [ArraySource(a, "") for a in arrays]
    small = Tensor("x", (48, 64), "float32", tensor.params)
    work = Work(method, sources[1:], sources[0], [small], "model" if over != "tensor" else over)
    sinks = {o: ArraySink({"x": ("F32", (48, 64))}, arrays[0]["x"]) for o in method.outputs or ("",)}
    return run(work, sinks, elements=1024, threads=1).passes


def peak_memory(work: Work, elements: int, threads: int) -> int:
    """Estimate of the blocks' memory: inputs as they are read and as they are computed with, and temporaries."""
    arrays = len(work.models) + work.method.needs_base
    peak = 0
    for t in work.tensors:
        view = work.method.view_for(t.params)
        whole = {"tensor": t.size, "model": sum(u.size for u in work.tensors), "rows": t.rows[1]}.get(view, 0)
        count = max(whole, min(t.size, elements * 3 // 2))
        peak = max(peak, count * (8 if t.work == "float64" else 4) * (3 * arrays + 4))
    return peak * (1 if not work.tensors or peak == 0 else min(threads, 8))


def _one_of(what: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        raise UsageError(f"{what} = {value!r} is none of {', '.join(map(repr, allowed))}")


def _opened(model: Any) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _mappings(models: Sequence[Any]) -> list[Mapping[str, Any]]:
    for model in models:
        if not isinstance(model, Mapping):
            raise UsageError(f"a model is a path or a mapping name -> array, not {type(model).__name__}")
    return list(models)


def _one_library(models: Sequence[Mapping[str, Any]]) -> Any:
    """An array of the library that all share. UsageError names both types of a mixture."""
    example, seen = None, None
    for model in models:
        for name, x in model.items():
            if not is_array_api_obj(x):
                raise UsageError(f"tensor {name!r} is no array but {type(x).__name__}")
            kind = type(x).__module__.partition(".")[0]
            if seen is not None and kind != seen[0]:
                raise UsageError(
                    f"arrays of two libraries: {seen[1]} and {type(x).__module__}.{type(x).__name__} ({name!r}); "
                    "convert one of them"
                )
            if seen is None:
                example, seen = x, (kind, f"{type(x).__module__}.{type(x).__name__}")
    return np.empty(0) if example is None else example


def _backend_for(backend: str, example: Any) -> Any:
    """The engine's backend for arrays in memory: None where the arrays already are of that backend's library."""
    opened = open_backend(backend)
    if is_numpy_array(example):
        return None if opened.name == "numpy" else opened
    library = type(example).__module__.partition(".")[0]
    if backend.partition(":")[0] != library:
        raise UsageError(f"the models are {library} arrays, backend {backend!r} would compute elsewhere: convert them first")
    return None


def _stat_sources(stats: Sequence[Model | None] | None, example: Any, backend: Any) -> list[Source] | None:
    if stats is None:
        return None
    sources: list[Source] = []
    for i, s in enumerate(stats):
        if isinstance(s, str | Path | Checkpoint):
            sources.append(DiskSource(_opened(s), backend or open_backend("numpy")))
        elif backend is not None:
            sources.append(HostSource(s or {}, f"stats of model {i}", backend))
        else:
            sources.append(ArraySource(s or {}, f"stats of model {i}"))
    return sources


def _names(sources: Sequence[Source], base: Source | None, missing: str) -> tuple[list[str], dict[str, Source]]:
    """The tensors of the result, and those of them that are copied because not all models have them."""
    everywhere = set.intersection(*(s.names() for s in sources)) if sources else set()
    anywhere = set.union(*(s.names() for s in sources)) if sources else set()
    partial = sorted(anywhere - everywhere)
    if not partial or missing == "skip":
        return sorted(everywhere), {}
    if missing == "base":
        donors = [*([base] if base else []), *sources]
        return sorted(anywhere), {n: next(s for s in donors if n in s.names()) for n in partial}
    first = partial[0]
    has = [s.label for s in sources if first in s.names()]
    lacks = [s.label for s in sources if first not in s.names()]
    more = f" and {len(partial) - 1} more ({', '.join(map(repr, partial[1:4]))}{', ...' if len(partial) > 4 else ''})"
    raise InputError(
        f"tensor {first!r}{more if len(partial) > 1 else ''} is missing from {', '.join(lacks)} and present in "
        f"{', '.join(has)}; missing='base' (--missing base) copies such tensors, missing='skip' leaves them out"
    )


def dtype_of(x: Any) -> str:
    """The safetensors name of an array's dtype."""
    return dtype_name(x)
