"""`refmerge.merge` and `refmerge.call`: merge checkpoints, mappings name -> array, or single arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from array_api_compat import is_array_api_obj, is_cupy_array, is_numpy_array, is_torch_array

from refmerge.adapted import open_model
from refmerge.checkpoint import Checkpoint, check_target, parse_size, promote
from refmerge.checkpoint.dtypes import DTYPES, FLOATS, OUTPUTS
from refmerge.checkpoint.pipeline import part_of
from refmerge.checkpoint.scaled import as_values
from refmerge.engine import check_memory, default_threads
from refmerge.errors import InputError, RefmergeError, UsageError, together
from refmerge.method import Method, Over
from refmerge.pipelines import arrange
from refmerge.plan import ARRAYS_BLOCK_BYTES, Plan
from refmerge.registry import get, open_backend
from refmerge.skipping import POLICY
from refmerge.sources import ArraySource, DiskSource, HostSource, Source, StitchedSource
from refmerge.work import Tensor, Work, stat_name

__all__ = ["call", "merge", "prepare"]

Model = str | Path | Checkpoint | Mapping[str, Any]


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
    resume: bool = False,
    nonfinite: Literal["error", "propagate", "skip-model"] = "error",
    integers: Literal["equal", "base"] = "equal",
    missing: Literal["error", "base", "skip"] = "error",
    arithmetic: Literal["round_once", "native"] = "round_once",
    components: Mapping[str, str | Path | Checkpoint | None] | None = None,
    allow_pickle: bool = False,
    **params: Any,
) -> Any:
    """Merge models into one.

    models: in the caller's order, all of one kind: paths of checkpoints (or open ones), or mappings name -> array of one
        array library. The path "model+adapter" is a model with a LoRA adapter in it. Of diffusers pipelines each component
        is a model, whose tensors are called "unet.<name>".
    base: the model that task vectors are taken from, where the method needs one.
    method: a registry name, "ties" for the paper's method or "mergekit:ties" for another tool's, or a Method.
    stats: per model a mapping or a path of named statistics, for methods that read some.
    over: what `group` ranges over: "tensor", "model", or a function tensor name -> label; None is the method's choice.
    dtype: "float32" or "float64" to compute in; None computes floats of 32 bits or less in float32, others in float64.
    out_dtype: "float64", "float32", "float16" or "bfloat16" for the result; None keeps the inputs' (promoted, if mixed).
    backend: "numpy", "torch", "torch:cuda:0", "cupy"; None is numpy for checkpoints and the arrays' own library otherwise.
    out: a directory, or a file that ends in .safetensors; None returns arrays.
    resume: go on where an earlier run of the same merge into `out` stopped, if one did; and if this one is interrupted,
        leave what is done beside `out` to be gone on with.
    threads: None uses the cores that the process may use. max_memory: "500MB" bounds the blocks' memory.
    nonfinite: what to do with NaN and infinities in the inputs: "skip-model" merges each tensor from the models in which it
        is finite, with a warning that names the others. integers: "equal" demands that integer and boolean tensors
        agree and copies them, "base" takes the base's (without one, the first model's).
    missing: what to do with tensors that not all models have: "base" copies the base's (without one, the first model's
        that has it), "skip" leaves them out; the same of components of pipelines.
    arithmetic: "native" rounds after each operation in the inputs' dtype, as tools do that merge in 16 bits.
    components: of pipelines, component -> the pipeline from which it is taken as it is, or None to leave it out.
    allow_pickle: read models that are pickled (.bin, .pt), too, by torch's weights_only reader.

    Returns a mapping name -> array of the inputs' library, or the open Checkpoint at `out`. A method with several outputs
    gives a mapping of these for each of its outputs; on disk, `out/<output>.safetensors`.
    UsageError, InputError and ResourceError say what is wrong, in which tensor, and what would allow it.
    """
    plan = prepare(
        models, method, base=base, stats=stats, seed=seed, over=over, dtype=dtype, out_dtype=out_dtype, backend=backend,
        threads=threads, max_memory=max_memory, nonfinite=nonfinite, integers=integers, missing=missing,
        arithmetic=arithmetic, components=components, allow_pickle=allow_pickle, out=out, overwrite=overwrite,
        params=params,
    )  # fmt: skip
    return plan.run(out, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume)


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
        named = [
            {stat_name(name, key): np.asarray(x, float) if isinstance(x, list) else x for key, x in s.items()} for s in stats
        ]
    result = prepare(
        [{name: m} for m in arrays], method, base=None if base is None else {name: base}, stats=named, seed=seed, over=over,
        dtype=dtype, threads=1, nonfinite="propagate", params=params,
    ).run()  # fmt: skip
    outputs = (get(method) if isinstance(method, str) else method).outputs
    return {o: result[o][name] for o in outputs} if outputs else result[name]


def prepare(
    models: Sequence[Model | StitchedSource],
    method: str | Method,
    /,
    *,
    base: Model | StitchedSource | None = None,
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
    components: Mapping[str, str | Path | Checkpoint | None] | None = None,
    allow_pickle: bool = False,
    read_dtype: str | None = None,
    donor: str | Path | Checkpoint | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    params: Mapping[str, Any] | Callable[[str, Collection[str]], Mapping[str, Any]] = {},  # noqa: B006 (never changed)
) -> Plan:
    """Check everything that can be checked without reading a weight, and return the plan of the merge. Last, and only if
    nothing else is wrong, integer tensors are read and compared.

    As `merge`, and: `params` may be a function (tensor name, all names) -> parameters, and `read_dtype` a safetensors
    dtype to which every input value is rounded as it is read (another tool's `dtype:`). `donor` is the input whose config
    and tokenizer files the result gets: the base, else the first model. Models may be StitchedSources, of that dtype already
    and of this backend. `out` is where the result is to be, if that is to be checked already.
    """
    m = get(method) if isinstance(method, str) else method
    if not isinstance(m, Method):
        raise UsageError(f"a method is a name or what @method makes of a function, not {type(m).__name__}")
    _one_of("nonfinite", nonfinite, "error", "propagate", POLICY)
    _one_of("integers", integers, "equal", "base")
    _one_of("missing", missing, "error", "base", "skip")
    _one_of("arithmetic", arithmetic, "round_once", "native")
    _one_of("dtype", dtype, None, "float32", "float64")
    if not callable(over):
        _one_of("over", over, None, "tensor", "model")
    seed = int(seed) if isinstance(seed, np.integer) else seed
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise UsageError(f"seed = {seed!r} is no whole number in [0, 2**64)")
    if isinstance(models, str | Path | Mapping) or is_array_api_obj(models):
        raise UsageError("models is a sequence: write [a, b], also for one model")
    models = list(models)
    m.check_models(len(models), base is not None)
    if not callable(params):
        m.bind(params, len(models))  # complain about parameters before any file is opened
    _check_count(m, len(models), stats)
    problems: list[RefmergeError] = []
    if out is not None and not m.outputs:
        with _noted(problems):
            check_target(out, overwrite)

    everything = [*models, *([] if base is None else [base])]
    sources, used, example = _sources(everything, len(models), backend, read_dtype, allow_pickle)
    base_source = sources[-1] if base is not None else None
    opened = [s.checkpoint for s in sources if isinstance(s, DiskSource)]
    given_by = opened[-1 if base is not None else 0] if opened else None
    if isinstance(donor, Checkpoint):
        given_by = donor
    elif donor is not None:
        given_by = next((c for x, c in zip(everything, opened) if same_path(x, donor)), None) or _opened(donor, allow_pickle)
    over = m.over if over is None else over
    arranged = None
    if components is not None and not any(c.components for c in opened):
        raise UsageError("components are those of diffusers pipelines, and no model is one")
    if given_by is not None and any(c.components for c in opened):
        whose = {n: None if c is None else _opened(c, allow_pickle) for n, c in (components or {}).items()}
        arranged = arrange(opened, given_by, whose, missing, problems)
        for s in sources:
            cast(DiskSource, s).parts = arranged.merged
        over = part_of if over == "model" else over
    names, copied = _names(sources, base_source, missing, problems)
    whole = _integers([n for n in names if n not in copied], sources, base_source, integers, problems)
    copied |= whole
    floats = [n for n in names if n not in copied]
    for n in floats:
        with _noted(problems):
            _same_shape(n, sources)

    scaled = [s.label for s in sources if isinstance(s, DiskSource) and s.checkpoint.rewritten]
    if arithmetic == "native" and scaled:
        raise UsageError(f"arithmetic = 'native' rounds in the inputs' dtype, and {scaled[0]} is in 8 bits with scales")
    out_name = None if out_dtype is None else OUTPUTS.get(out_dtype, out_dtype)
    if out_name is not None and out_name not in FLOATS:
        raise UsageError(f"out_dtype = {out_dtype!r} is none of {', '.join(OUTPUTS)}")
    stored = {n: promote([s.dtype(n) for s in sources]) for n in floats}
    kept: dict[str, str] = {}
    of_part = _by_part(floats, arranged is not None)
    wide = any(d == "F64" for d in stored.values())
    tensors = []
    for n in floats:
        if arithmetic == "native" and not m.widens:
            work_dtype = str(DTYPES[stored[n] if over == "tensor" else promote(stored.values())])
        else:
            # One dtype for all that share a group: a k-th largest compares values of all its tensors.
            needed = "float64" if stored[n] == "F64" or (wide and over != "tensor") else "float32"
            work_dtype = m.work or dtype or needed
        bound = dict[str, Any]()
        with _noted(problems):
            bound = m.bind(params(n, of_part[n]) if callable(params) else params, len(models))
        if problems:
            continue
        least = m.least_for(bound)
        kept[n] = out_name or promote([stored[n], OUTPUTS[least]] if least else [stored[n]])
        tensors.append(Tensor(n, sources[0].shape(n), work_dtype, bound, kept[n]))

    if problems:
        raise together(problems)
    for t in tensors:
        if (reason := getattr(used, "without", {}).get(t.work)) is not None:
            raise UsageError(
                f"backend {used.name} has no {t.work} ({reason}), in which tensor {t.name!r} is to be computed: "
                "--backend numpy has it"
            )
    # Arrays on a device are merged by the caller's thread, on the caller's stream: nothing else is in order with them.
    beside = _beside(example) if used is None else None
    usual = 1 if beside else getattr(used, "threads", None) or default_threads()
    workers = usual if threads is None else threads
    if type(workers) is not int or workers < 1:
        raise UsageError(f"threads = {threads!r} is no whole number above 0")
    limit = None if max_memory is None else parse_size(max_memory)
    stat_sources = _stat_sources(stats, used, example)
    _check_stats(m, floats, stat_sources)
    work = Work(m, sources[: len(models)], base_source, tensors, over, seed, stat_sources, nonfinite, backend=used)
    if beside is not None:
        work.kernels, workers = beside.kernels, 1
    check_memory(work, limit, workers)
    _check_copies(whole if integers == "equal" else {}, copied, sources)
    for part, c in ({} if arranged is None else arranged.taken).items():
        taken = DiskSource(c, used)
        copied |= {n: taken for n in c.tensors if part_of(n) == part}
    specs = {n: (kept[n], sources[0].shape(n)) for n in floats}
    specs |= {n: (s.stored(n), s.shape(n)) for n, s in copied.items()}
    statistics = [s.checkpoint for s in stat_sources or () if isinstance(s, DiskSource)]
    others = dict.fromkeys(c for c in ([] if arranged is None else arranged.donors.values()) if c not in opened)
    return Plan(
        work=work,
        specs=dict(sorted(specs.items())),
        copied=copied,
        backend=used,
        threads=workers,
        max_memory=limit,
        block_bytes=getattr(used or beside, "block_bytes", ARRAYS_BLOCK_BYTES),
        example=example,
        checkpoints=(*opened, *statistics, *others),
        donor=given_by,
        out_dtype=out_name,
        arranged=arranged,
        notes=() if arranged is None else arranged.notes,
    )


def _by_part(names: Sequence[str], in_parts: bool) -> dict[str, Collection[str]]:
    """For each tensor those of its model: all, or the same component's."""
    if not in_parts:
        return dict.fromkeys(names, names)
    parts: dict[str, list[str]] = {}
    for n in names:
        parts.setdefault(part_of(n), []).append(n)
    return {n: parts[part_of(n)] for n in names}


def same_path(model: Any, path: Any) -> bool:
    return isinstance(model, str | Path) and isinstance(path, str | Path) and Path(model) == Path(path)


@contextmanager
def _noted(problems: list[RefmergeError]) -> Iterator[None]:
    """An error within is put to the problems, so that what comes after is looked at, too."""
    try:
        yield
    except RefmergeError as e:
        problems.append(e)


def _one_of(what: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        raise UsageError(f"{what} = {value!r} is none of {', '.join(map(repr, allowed))}")


def _sources(
    everything: Sequence[Any], models: int, backend: str | None, read_dtype: str | None, allow_pickle: bool
) -> tuple[list[Source], Any, Any]:
    """(models and base as sources, the backend that computes their blocks or None, an example of arrays in memory)."""
    if any(isinstance(x, StitchedSource) for x in everything):
        return list(everything), open_backend(backend or "numpy"), None
    on_disk = [isinstance(x, str | Path | Checkpoint) for x in everything]
    if any(on_disk) and not all(on_disk):
        raise UsageError("models and base are a mixture of checkpoints on disk and arrays in memory: give all as one kind")
    if all(on_disk):
        used = open_backend(backend or "numpy")
        return [DiskSource(_opened(x, allow_pickle), used, read_dtype) for x in everything], used, None
    for model in everything:
        if not isinstance(model, Mapping):
            raise UsageError(f"a model is a path or a mapping name -> array, not {type(model).__name__}")
    labels = [f"model {i}" if i < models else "base" for i in range(len(everything))]
    example = _one_library(everything)
    used = None if backend is None else _backend_for(backend, example)
    if used is None:
        return [ArraySource(x, label) for x, label in zip(everything, labels)], None, example
    return [HostSource(x, label, used) for x, label in zip(everything, labels)], used, example


def _opened(model: Any, allow_pickle: bool = False) -> Checkpoint:
    return as_values(model) if isinstance(model, Checkpoint) else open_model(model, allow_pickle=allow_pickle)


def _integers(
    names: Sequence[str], sources: Sequence[Source], base: Source | None, policy: str, problems: list[RefmergeError]
) -> dict[str, Source]:
    """The tensors that are not floating-point everywhere, with the source they are copied from. A problem if the dtypes are
    of two kinds and the policy is not "base"."""
    keeper, copied = base or sources[0], {}
    for name in names:
        kinds = [s.dtype(name) in FLOATS for s in sources]
        if all(kinds):
            continue
        copied[name] = keeper
        if len({s.shape(name) for s in sources}) > 1:
            with _noted(problems):
                _same_shape(name, sources)
            continue
        if policy == "equal" and any(kinds):
            listed = ", ".join(f"{s.dtype(name)} in {s.label}" for s in sources)
            problem = f"tensor {name!r} is integer in one model and floating in another ({listed})"
            problems.append(InputError(f"{problem}; {_TAKES_ONE}"))
    return copied


_TAKES_ONE = "integers='base' (--integers base) takes the base's, or without one the first model's"


def _check_copies(equal: Mapping[str, Source], copied: Mapping[str, Source], sources: Sequence[Source]) -> None:
    """InputError where integer tensors are to be equal and differ, or a tensor that some models lack is tied to another."""
    for name, keeper in equal.items():
        if not all(keeper.same(s, name) for s in sources if s is not keeper):
            raise InputError(f"integer tensor {name!r} differs between the models and is not averaged; {_TAKES_ONE}")
    everywhere = set.intersection(*(s.names() for s in sources)) if sources else set()
    _refuse_tied(sorted(copied.keys() - everywhere), everywhere, sources)


def _same_shape(name: str, sources: Sequence[Source]) -> None:
    shapes = [s.shape(name) for s in sources]
    if len(set(shapes)) > 1:
        listed = ", ".join(f"{list(shape)} in {s.label}" for shape, s in zip(shapes, sources))
        raise InputError(f"tensor {name!r} has different shapes: {listed}; only equal shapes can be merged")


def _one_library(models: Sequence[Mapping[str, Any]]) -> Any:
    """An array of the library that all share. UsageError names both types of a mixture."""
    example, seen = None, None
    for model in models:
        for name, x in model.items():
            if not isinstance(name, str):
                raise UsageError(f"a tensor's name is text, not {name!r}")
            if not is_array_api_obj(x) or isinstance(x, np.ma.MaskedArray):
                raise UsageError(f"tensor {name!r} is no array but {type(x).__name__}")
            if is_torch_array(x) and (x.is_meta or "strided" not in str(x.layout)):
                raise UsageError(f"tensor {name!r} holds no plain array of values ({x.layout} on {x.device}): make it dense")
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


def _beside(example: Any) -> Any:
    """The backend of the device that arrays in memory are on already; None where they are in host memory."""
    if example is not None and is_torch_array(example) and example.is_cuda:
        return open_backend(f"torch:{example.device}")
    if example is not None and is_cupy_array(example):
        return open_backend(f"cupy:{example.device.id}")
    return None


def _stat_sources(stats: Sequence[Model | None] | None, backend: Any, example: Any) -> list[Source] | None:
    """Statistics as sources of the models' kind: files beside checkpoints, arrays of one library beside arrays."""
    if stats is None:
        return None
    sources: list[Source] = []
    for i, s in enumerate(stats):
        label = f"stats of model {i}"
        if isinstance(s, str | Path | Checkpoint):
            if example is not None and not is_numpy_array(example):
                raise UsageError(f"{label} are a file and the models {type(example).__module__} arrays: load the file first")
            sources.append(DiskSource(_opened(s), backend or open_backend("numpy")))
        elif backend is not None:
            sources.append(HostSource(s or {}, label, backend))
        else:
            _one_library([{"the models": example}, s or {}])
            sources.append(ArraySource(s or {}, label))
    return sources


def _check_count(m: Method, count: int, stats: Sequence[Any] | None) -> None:
    """UsageError unless there are statistics for each model, where the method wants some."""
    first = m.needs == "base and models"
    of = "the base and each model" if first else "each model"
    if stats is None and m.needs:
        wanted = ", ".join(stat_name("<tensor>", key) for key in m.stats)
        raise UsageError(f"{m.name} rests on statistics ({wanted}): give stats=, one mapping or path for {of}")
    if stats is not None and len(stats) != count + first:
        models = f"{count} models" + (" and the base, which comes first" if first else "")
        raise UsageError(f"stats has {len(stats)} entries for {models}")


def _check_stats(m: Method, names: Sequence[str], stats: Sequence[Source] | None) -> None:
    """UsageError for statistics of which the method reads none: they were meant to have an effect. A warning for those of
    layers and tensors that are not there."""
    if stats is None or not (m.needs == "models" or any(s.names() for s in stats)):
        return
    if not m.stats:
        raise UsageError(f"{m.name} reads no statistics: leave stats out")
    present = set.union(*(s.names() for s in stats))
    modules = {n.rpartition(".")[0] for n in names}
    if not any(stat_name(n, key) in present for key in m.stats for n in [*names, *modules]):
        wanted = ", ".join(stat_name("<tensor>", key) for key in m.stats)
        raise UsageError(f"{m.name} reads {wanted} from stats, and none of that is there ({names_of(present)})")
    known = {*names, *modules}
    if strays := sorted(n for n in present if not {n, n.rpartition(".")[0], n.partition("/")[2]} & known):
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        warnings.warn(f"{m.name}: statistics of what is not merged are not read: {strays[0]!r}{more}", stacklevel=5)


def names_of(present: Collection[str]) -> str:
    return f"{min(present)!r}, ..." if present else "nothing is"


def _refuse_tied(partial: Sequence[str], everywhere: set[str], sources: Sequence[Source]) -> None:
    """InputError where a tensor that some models lack is a copy of another one: kept as it is, it would no longer be."""
    for name in partial:
        for s in sources:
            if name not in s.names():
                continue
            alike = (e for e in sorted(everywhere) if s.shape(e) == s.shape(name) and s.stored(e) == s.stored(name))
            twin = next((e for e in alike if s.same(s, name, e)), None)
            if twin is not None:
                raise InputError(
                    f"tensor {name!r} of {s.label} is {twin!r} once more, and not all models store it: a copy would not be "
                    f"tied to the merged {twin!r}; missing='skip' (--missing skip) leaves it out"
                )


def _names(
    sources: Sequence[Source], base: Source | None, missing: str, problems: list[RefmergeError]
) -> tuple[list[str], dict[str, Source]]:
    """The tensors of the result, and those of them that are copied because not all models have them."""
    everywhere = set.intersection(*(s.names() for s in sources)) if sources else set()
    anywhere = set.union(*(s.names() for s in sources)) if sources else set()
    partial = sorted(anywhere - everywhere)
    if missing == "skip" and anywhere and not everywhere:
        raise InputError(f"no tensor is in all of {', '.join(s.label for s in sources)}: nothing would be left")
    if not partial or missing == "skip":
        return sorted(everywhere), {}
    if missing == "base":
        donors = [*([base] if base else []), *sources]
        return sorted(anywhere), {n: next(s for s in donors if n in s.names()) for n in partial}
    first = partial[0]
    has = [s.label for s in sources if first in s.names()]
    lacks = [s.label for s in sources if first not in s.names()]
    more = f" (and {len(partial) - 1} more: {', '.join(map(repr, partial[1:4]))}{', ...' if len(partial) > 4 else ''})"
    problems.append(
        InputError(
            f"tensor {first!r}{more if len(partial) > 1 else ''} is missing from {', '.join(lacks)} and present in "
            f"{', '.join(has)}; missing='base' (--missing base) copies such tensors, missing='skip' leaves them out, "
            "as is right for a tied one that some models store twice"
        )
    )
    return sorted(everywhere), {}
