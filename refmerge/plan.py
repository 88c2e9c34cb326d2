"""A merge that has been checked and can be run: what is read, computed and written."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from array_api_compat import is_numpy_array

from refmerge.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    check_target,
    itemsize,
    open_checkpoint,
    parse_size,
    refuse_input,
    refuse_overlap,
)
from refmerge.checkpoint.dtypes import OUTPUTS
from refmerge.checkpoint.layout import PIPELINE, WEIGHTS
from refmerge.engine import MASKS, Ran, block_elements, run
from refmerge.errors import RefmergeError, ResourceError, UsageError
from refmerge.executors import can_fork
from refmerge.fused.compiler import command
from refmerge.identity import of_merge
from refmerge.memory import of_block, of_compiled, of_whole
from refmerge.pipelines import Arrangement
from refmerge.registry import is_ours
from refmerge.skipping import POLICY, Skipped, sound, told
from refmerge.sources import ArraySink, ArraySource, ByteSource, DiskSink, HostSink, Source, StagedSink
from refmerge.work import Tensor, Work, stat_name

__all__ = ["Plan"]

ARRAYS_BLOCK_BYTES = 1 << 19  # of arrays in memory, where no backend says more
# Threads of one interpreter wait for each other more than they compute in smaller ones; and whole rows end where they do,
# so that each border of blocks cuts a stretch of a sum.
LARGER_BLOCK_BYTES = 1 << 20
# A program makes no arrays on the way, so that what counts is what each block costs beside its numbers: running the text,
# and the notes that are kept of every block of a group. Where a group is a tensor and is asked for sums alone, which need
# none either, most tensors of a language model are one block, and are read once.
COMPILED_BLOCK_BYTES = 1 << 22
SUMMED_BLOCK_BYTES = 1 << 24
WORTH_COMPILING = 1 << 25  # entries; fewer are merged before a compiler has started
INTERPRETER = 38_000_000  # bytes of a process that has imported all this, beside its blocks

_NOT_RESUMED = (
    "resume is for models on disk that are merged into one model: not for arrays, several outputs, or what is aligned first "
    "by other than permutations"
)
HELD = 1 << 28  # bytes of another merge's result that are in memory together, where it is not written
Specs = dict[str, tuple[str, tuple[int, ...]]]
_CONFIG_WORDS = {name: word for word, name in OUTPUTS.items()}


class Coming(Protocol):
    """A checkpoint that a stage makes, as the merges after it have it. streams: whether its tensors are merged when they
    are read, into memory, and it is never written."""

    @property
    def streams(self) -> bool: ...

    def take(self, folder: Path, kept: bool) -> Checkpoint:
        """It is there now, in this folder, where it may be kept. ResourceError where that is another one."""

    def held(self, names: Collection[str]) -> AbstractContextManager[None]:
        """Within it these tensors are in memory."""

    def close(self) -> None: ...


_Coming = dict[Coming, Specs]


@dataclass
class Stage:
    """A merge whose result is an input of another. written: why that is written before it is read; empty where it is not.
    recipe: what it was planned from."""

    name: str
    plan: Plan
    result: Coming
    written: str = ""
    recipe: Any = None

    def make(self, folder: Path, made: Mapping[str, Any], kept: bool, **options: Any) -> Checkpoint:
        """Write the result to this folder, unless it is there already: `made` says as what. options: of Plan.run."""
        if not self._is_there(folder, made):
            self.plan.run(folder, **options)
        return self.result.take(folder, kept)

    def _is_there(self, folder: Path, made: Mapping[str, Any]) -> bool:
        """Whether the folder holds the result that `made` speaks of."""
        with suppress(RefmergeError):
            return made.get(self.name) is not None and open_checkpoint(folder).fingerprint() == made[self.name]
        return False


class Before(Protocol):
    """What is done to the inputs of a plan before the first block is read. progress: told what is being done. matrix: bytes
    of the largest thing that it holds; products: multiplications that it takes at least, for each model. kept: a file from
    which what it found is taken, or in which it is left for a run that goes on with this one. told: what was done, for the
    report. said: what decides it beside the inputs; None where nothing can be kept."""

    progress: Callable[[str], None] | None
    kept: Path | None
    matrix: int
    products: int

    def __call__(self) -> None: ...

    def told(self) -> dict[str, Any]: ...

    def said(self) -> list[Any] | None: ...


@dataclass
class Plan:
    """What `refmerge.api.prepare` makes of a call; `run` does it.

    work: the floating-point tensors, their parameters, and the method. copied: name -> the source that an integer tensor,
    or one that not all models have, is copied from. specs: name -> (safetensors dtype, shape) of the result.
    backend: where blocks of checkpoints are computed; None where the inputs are arrays that stay in their library.
    example: an array of that library. checkpoints: the inputs on disk; donor: the one whose config and tokenizer files the
    result gets. out_dtype: the dtype that was asked for. block_bytes: of a block in the work dtype, as the backend has it.
    max_memory: what all blocks may take, in bytes. elements: of a block; None leaves it to what computes. fused: whether
    blocks of files are computed by compiled programs; None where they are worth compiling. before: what is done to the
    inputs before the first block is read. rest: works beside the first, of the same method on other numbers of models.
    stages: merges that come first, and whose results are inputs of this one.
    config: of the result, where it is not the donor's. sidecars: files that are copied, the donor's where None. files: name
    -> content of what else lies in a folder beside the weights. report: called with the folder and its files of weights when
    all is written, for more such files. metadata: of the files of weights. wants_figures: whether each tensor's are made,
    for the report. arranged: what becomes of each component, where the inputs are pipelines. notes: what the user should
    know. parts: what was run of work and rest, where the inputs were looked at for values that are not finite, and skipped:
    the models that were left out.
    """

    work: Work
    specs: Specs
    copied: dict[str, Source]
    backend: Any
    threads: int
    block_bytes: int = ARRAYS_BLOCK_BYTES
    max_memory: int | None = None
    elements: int | None = None
    fused: bool | None = None
    example: Any = None
    checkpoints: tuple[Checkpoint, ...] = ()
    donor: Checkpoint | None = None
    out_dtype: str | None = None
    before: Before | None = None
    rest: Sequence[Work] = ()
    stages: Sequence[Stage] = ()
    config: dict[str, Any] | None = None
    sidecars: Sequence[Path] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    report: Callable[[Path, Sequence[Path]], Mapping[str, bytes]] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    arranged: Arrangement | None = None
    notes: Sequence[str] = ()
    wants_figures: bool = False
    ran: Ran | None = None
    parts: Sequence[Work] = ()
    skipped: Sequence[Skipped] = ()

    @property
    def works(self) -> list[Work]:
        return [*self.parts] or [self.work, *self.rest]

    @property
    def all_plans(self) -> list[Plan]:
        """Those of the stages, in order, and this one."""
        return [*(stage.plan for stage in self.stages), self]

    def run(
        self,
        out: str | Path | None = None,
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        resume: bool = False,
        metadata: Mapping[str, str] | None = None,
        intermediates: str | Path | None = None,
    ) -> Any:
        """Merge into arrays, or into `out` and return the open Checkpoint; see `refmerge.merge`. intermediates: a folder in
        which the results of the stages are kept, each under its name."""
        outputs = self.work.method.outputs or ("",)
        self.ran = None
        if self.wants_figures:
            self._check_figures(out, resume)
        if intermediates is not None and not self.stages:
            raise UsageError(f"{str(intermediates)!r} is for results of merges before the last one, and there are none")
        if out is None:
            if resume:
                raise UsageError("resume goes on with what an earlier run left on the disk: give out")
            arrays = {o: self._array_sink(self._specs_of(o)) for o in outputs}
            with self.staged(keep=intermediates, overwrite=overwrite):
                self.fill(arrays)
            results = {o: sink.result() for o, sink in arrays.items()}
            return results if self.work.method.outputs else results[""]
        target = Path(out)
        if self.work.method.outputs and target.suffix == ".safetensors":
            raise UsageError(f"{self.work.method.name} has several outputs: give a folder for them, not {str(target)!r}")
        if self.arranged is not None and target.suffix == ".safetensors":
            raise UsageError(f"a pipeline of several components is a folder, and {str(target)!r} is a file")
        self._refuse_inputs(target)
        limit, metadata = parse_size(max_shard_size), {**self.metadata, **(metadata or {})}
        merge = None if self.work.method.outputs else of_merge(self, {"shards": limit, "metadata": metadata})
        if resume and merge is None:
            raise UsageError(_NOT_RESUMED)
        with ExitStack() as writers:
            sinks, files = {}, self._files()
            for o in outputs:
                single = bool(o) or target.suffix == ".safetensors"
                writer = CheckpointWriter(
                    target / f"{o}.safetensors" if o else target,
                    self._specs_of(o),
                    max_shard_size=limit,
                    overwrite=overwrite,
                    merge=merge,
                    resume=resume,
                    metadata=metadata,
                    sidecars={} if single else self._sidecars(),
                    extra_files=None if single else files,
                    weights=WEIGHTS if single else self._weights(),
                )
                folder, written = writer.partial, writer.paths
                sinks[o] = self._disk_sink(writers.enter_context(writer), self._specs_of(o))
                done = self._done(writer.finished)
                writer.reuse(done)
            if self.before is not None and merge is not None:
                self.before.kept = writer.on_the_way("alignment.safetensors")
            options = {"max_shard_size": limit, "resume": resume and merge is not None}
            with self.staged(writer, keep=intermediates, overwrite=overwrite, **options):
                self.fill(sinks, done)
                for c in (c for p in self.all_plans for c in p.checkpoints):
                    c.check_unchanged()
                if self.report is not None and not single:
                    files |= self.report(folder, written)
        return target if self.work.method.outputs else open_checkpoint(target)

    def _check_figures(self, out: str | Path | None, resume: bool) -> None:
        """UsageError where there would be no report, or not all figures in it."""
        if out is None or Path(out).suffix == ".safetensors" or self.work.method.outputs:
            raise UsageError("figures are in the report, which lies beside the weights of one model: give a folder for it")
        if any(w.view(t) == "model" for w in self.works for t in w.tensors):
            raise UsageError(f"{self.work.method.name} sees whole models, and figures are made of blocks: leave figures out")
        if resume:
            raise UsageError("figures and resume exclude each other: of tensors that are finished nothing is read again")

    def _refuse_inputs(self, target: Path) -> None:
        refuse_input(target, [path for p in self.all_plans for c in p.checkpoints if not c.coming for path in c.paths])

    @contextmanager
    def staged(
        self, writer: CheckpointWriter | None = None, *, keep: str | Path | None = None, overwrite: bool = False,
        **options: Any,
    ) -> Iterator[None]:  # fmt: skip
        """Within it the stages that are written have been run: to the folder `keep`, where they stay, else to where the
        writer of the result has what is needed on the way, or to the system's temporary folder. overwrite: what is in
        `keep`. options: of `run`."""
        made = {} if writer is None else writer.made
        written = [stage for stage in self.stages if keep is not None or not stage.result.streams]
        if keep is not None:
            self._check_kept(Path(keep), writer, made, overwrite)
        with ExitStack() as stack:
            folder = Path(keep) if keep is not None else None
            if written and folder is None and writer is None:
                folder = stack.enter_context(_temporary())
            for stage in written:
                place = folder / stage.name if folder is not None else cast(CheckpointWriter, writer).on_the_way(stage.name)
                kept = keep is not None
                if writer is not None and kept and stage.name not in made:
                    writer.note_made(stage.name, None)
                found = stage.make(place, made, kept, overwrite=overwrite or not kept or stage.name in made, **options)
                stack.callback(stage.result.close)
                if writer is not None and made.get(stage.name) != (files := found.fingerprint()):
                    writer.note_made(stage.name, files)
            yield

    def _check_kept(
        self, folder: Path, writer: CheckpointWriter | None, made: Mapping[str, Any], overwrite: bool
    ) -> None:
        """UsageError where a result of a stage cannot be kept, before the first is made."""
        for stage in self.stages:
            place = folder / stage.name
            if writer is not None:
                refuse_overlap(place, writer.target)
            self._refuse_inputs(place)
            if stage.name not in made:  # else it is there, or was begun when nothing was
                check_target(place, overwrite)

    def _done(self, finished: frozenset[str]) -> frozenset[str]:
        """Which of the finished tensors need not be computed again: those of whose group every tensor is finished."""
        groups: dict[Any, set[str]] = {}
        for work in self.works:
            for t in work.tensors:
                groups.setdefault((id(work), work.group_of(t)), set()).update({t.name} if t.size else ())
        done = frozenset().union(*(group for group in groups.values() if group <= finished))
        return done | (finished & self.copied.keys())

    def _specs_of(self, output: str) -> Specs:
        """What is copied belongs to the model; one of several outputs holds what the method made."""
        return {n: spec for n, spec in self.specs.items() if not output or n not in self.copied}

    def _array_sink(self, specs: Specs) -> ArraySink | HostSink:
        if self.backend is not None and (self.example is None or is_numpy_array(self.example)):
            return HostSink(specs, self.backend)
        return ArraySink(specs, self.example)

    def _disk_sink(self, writer: CheckpointWriter, specs: Specs) -> DiskSink | StagedSink:
        if isinstance(self.work.models[0], ArraySource):
            return StagedSink(writer, specs, self.example)
        return DiskSink(writer, specs, self.backend, writer.target.parent)

    def side_files(self) -> tuple[dict[str, Path], dict[str, bytes]]:
        """What lies beside the weights: files that are copied and contents, by name; contents win."""
        return self._sidecars(), self._files()

    def _weights(self) -> str | dict[str, str]:
        """What the only file of weights is called, in each component of a pipeline."""
        if self.arranged is None:
            return WEIGHTS if self.donor is None else self.donor.weights
        weights = {name: c.components[name].weights for name, c in self.arranged.donors.items()}
        return {name: w.weights for name, w in weights.items() if w is not None}

    def _sidecars(self) -> dict[str, Path]:
        paths = self.sidecars
        if paths is None:
            paths = self.donor.sidecars() if self.donor is not None else ()
        found = {path.name: path for path in paths}
        for name, c in self.arranged.donors.items() if self.arranged is not None else ():
            found |= {f"{name}/{path.name}": path for path in c.components[name].sidecars()}
        return found

    def _files(self) -> dict[str, bytes]:
        """What lies beside the weights and is not copied; the config of the result, with its dtype, if not the donor's."""
        files = dict(self.files)
        if self.donor is not None and self.arranged is None:
            files |= self._config("config.json", self.donor, self.config, self.out_dtype)
        elif self.arranged is not None:
            files[PIPELINE] = _json(self.arranged.index)
            for name, c in self.arranged.donors.items():
                weights, merged = c.components[name].weights, name in self.arranged.merged
                if weights is not None:
                    files |= self._config(f"{name}/config.json", weights, None, self.out_dtype if merged else None)
        return files

    @staticmethod
    def _config(name: str, donor: Checkpoint, config: dict[str, Any] | None, dtype: str | None) -> dict[str, bytes]:
        """The config under this name, where it is not as it is in the donor's folder."""
        config = config or donor.config
        word = _CONFIG_WORDS.get(dtype or "")
        if config and word:
            config = {**config, **{k: word for k in ("dtype", "torch_dtype") if k in config}}
        return {name: _json(config)} if config and (config != donor.config or donor.rewritten) else {}

    @property
    def _on_files(self) -> bool:
        """Whether all that is read is files, and NumPy computes: then processes can."""
        sources = [s for w in self.works for s in (*w.read, *(s for s in w.stats or () if s.names()))]
        numpy = self.backend is not None and self.backend.name == "numpy"
        return numpy and all(getattr(s, "files", False) for s in sources)

    @property
    def is_fused(self) -> bool:
        """Whether blocks are computed by compiled programs, where the method sees no tensor as a whole."""
        if self.fused is not None:
            return self.fused
        size = sum(t.size for w in self.works for t in w.tensors if w.view(t) in ("flat", "rows") and t.work == "float32")
        # What another package's text does to its arrays is not known: an entry written in place, say, cannot be noted down.
        return self._on_files and size >= WORTH_COMPILING and command() is not None and is_ours(self.work.method)

    def _block_elements(self, work: Work, processes: bool) -> int:
        if self.elements is not None:
            return self.elements
        block_bytes = self.block_bytes
        rows = any(work.view(t) == "rows" for t in work.tensors)
        if rows or (self.threads > 1 and not processes):
            block_bytes = max(block_bytes, LARGER_BLOCK_BYTES)
        if self.is_fused and work.tensors:
            sums = work.over == "tensor" and not rows and _trial(work).asked == {"sum"}
            block_bytes = max(block_bytes, SUMMED_BLOCK_BYTES if sums else COMPILED_BLOCK_BYTES)
        return block_elements(work.method, len(work.models), block_bytes, self.threads, self.max_memory)

    def fill(self, sinks: Mapping[str, Any], done: frozenset[str] = frozenset()) -> None:
        """Merge into these sinks, one for each output of the method; "" where it has one. done: tensors to leave out."""
        if self.before is not None:
            self.before()
        processes = self._on_files and can_fork() and all(isinstance(s, DiskSink) for s in sinks.values())
        fused = self.is_fused and all(isinstance(s, DiskSink) for s in sinks.values())
        self.ran = self.ran or Ran()
        if self.work.nonfinite == POLICY:
            self._skip_models()
        for work in self.works:
            elements = self._block_elements(work, processes)
            for tensors, coming in self._batches(work, done):
                part = replace(work, tensors=tensors, fused=fused, figures=self.wants_figures)
                part.recorded = work.recorded
                with _held(coming):
                    ran = run(
                        part, sinks, elements=elements, threads=self.threads, processes=processes,
                        max_memory=self.max_memory,
                    )  # fmt: skip
                self.ran = _both(self.ran, ran)
        for name, source in self.copied.items():
            if "" in sinks and name not in done:
                with self.at_hand([source], name):
                    sinks[""].copy(name, source)

    def at_hand(self, sources: Sequence[Source], name: str) -> AbstractContextManager[None]:
        """Within it these sources of the plan can be read for this tensor, wherever its values come from."""
        return _held(self._coming(sources, name))

    def _batches(self, work: Work, done: frozenset[str]) -> list[tuple[list[Tensor], _Coming]]:
        """The tensors of a work that are not done, in parts, each with what of other merges' results is to be in memory for
        it: HELD bytes at the most, or one tensor's."""
        parts: list[tuple[list[Tensor], _Coming]] = [([], {})]
        filled = 0
        for t in work.tensors:
            if t.name in done:
                continue
            needs = self._coming(work.read, t.name)
            size = sum(_nbytes(spec) for tensors in needs.values() for spec in tensors.values())
            if parts[-1][0] and size and filled + size > HELD:
                parts.append(([], {}))
                filled = 0
            parts[-1][0].append(t)
            filled += size
            for c, tensors in needs.items():
                parts[-1][1].setdefault(c, {}).update(tensors)
        return parts

    def _coming(self, sources: Sequence[Source], name: str) -> _Coming:
        """What is read of results that stream, for a tensor of this plan."""
        found: _Coming = {}
        if any(getattr(c, "streams", False) for c in self.checkpoints):
            for c, theirs in (origin for s in sources for origin in cast(ByteSource, s).origins(name)):
                if getattr(c, "streams", False):
                    found.setdefault(cast(Any, c), {})[theirs] = (c.tensors[theirs].dtype, c.tensors[theirs].shape)
        return found

    def _held_bytes(self) -> int:
        """What is in memory at the most of other merges' results, and of those that these read."""
        total = 0
        for stage in self.stages:
            if not stage.written:
                sizes = [_nbytes(spec) for spec in stage.plan.specs.values()]
                total += min(sum(sizes), max(HELD, *sizes))
        return total

    def _skip_models(self) -> None:
        """Put in place of the works their parts, each without the models whose values are not finite there."""
        found = [sound(work, self.threads) for work in (self.work, *self.rest)]
        self.parts = [part for parts, _ in found for part in parts]
        self.skipped = [skipped for _, of in found for skipped in of]
        for line in told(self.skipped):
            warnings.warn(line, stacklevel=2)

    def figures(self, estimate: bool = False) -> dict[str, Any]:
        """What the merge moves: in the run that was made, or as an estimate that counts the method's questions on small
        arrays. Bytes are those of the tensors; block_memory is that of the blocks, which max_memory bounds, and peak_memory
        that of all: blocks, adapters, and the interpreters, of which each process has one."""
        method = self.work.method
        processes = self._on_files and can_fork()
        ran = self.ran
        if ran is None or estimate:
            ran = Ran()
            for work in self.works:
                ran = _both(ran, _expected(work, self._block_elements(work, processes)))
        copied = sum(_nbytes(spec) for n, spec in self.specs.items() if n in self.copied)
        strict = self.work.nonfinite == POLICY  # then all is read once more, before anything is merged
        looked_at = sum(w.bytes_of(t, t.size) for w in (self.work, *self.rest) for t in w.tensors) if strict else 0
        at_once = (self.threads, self.max_memory, self.is_fused)
        memory = max(_peak_memory(w, self._block_elements(w, processes), *at_once) for w in self.works)
        return {
            "method": method.name,
            "models": max(len(w.models) for w in self.works),
            "tensors": sum(len(w.tensors) for w in self.works),
            "copied": len(self.copied),
            "parameters": sum(t.size for w in self.works for t in w.tensors),
            "passes": ran.passes,
            "bytes_read": ran.bytes_read + copied + looked_at,
            "bytes_written": sum(_nbytes(s) for o in method.outputs or ("",) for s in self._specs_of(o).values()),
            "block_memory": memory,
            "peak_memory": memory
            + self._held_bytes()
            + sum(getattr(c, "nbytes_kept", 0) for c in self.checkpoints)
            + INTERPRETER * (1 + self.threads * (self.threads > 1 and processes)),
            "threads": self.threads,
            "backend": "arrays" if self.backend is None else self.backend.name,
            "compiled": self.is_fused,
        }


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder for results that are inputs of another merge whose output is not on the disk. It is removed in any case."""
    import tempfile  # which few merges want

    try:
        folder = tempfile.mkdtemp(prefix="refmerge-")
    except OSError as e:
        raise ResourceError(f"{tempfile.gettempdir()!r}: cannot be written: {e.strerror}") from e
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(coming: _Coming) -> Iterator[None]:
    with ExitStack() as stack:
        for c, tensors in coming.items():
            stack.enter_context(c.held(tensors.keys()))
        yield


def _both(a: Ran, b: Ran) -> Ran:
    passes, sampled = max(a.passes, b.passes), a.bytes_sampled + b.bytes_sampled
    return Ran(passes, a.bytes_read + b.bytes_read, sampled, a.asked | b.asked, a.figures | b.figures)


def _expected(work: Work, elements: int) -> Ran:
    """What a work will take, from the questions that its method asks of small arrays."""
    tensors = work.tensors
    passes = _trial(work).passes if tensors else 0
    one_block = [work.over == "tensor" and t.size <= elements * 3 // 2 for t in tensors]
    read = (work.bytes_of(t, t.size) * (1 if one else passes) for t, one in zip(tensors, one_block))
    return Ran(1 if all(one_block) else passes, sum(read))


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return math.prod(shape) * itemsize(dtype)


def _trial(like: Work) -> Ran:
    """What a method asks of a group of several blocks, and how often it passes over it: seen on small random arrays, with
    the parameters of the first tensor."""
    method, first, models, over = like.method, like.tensors[0], len(like.models), like.over
    whole = like.view(first) in ("tensor", "model")
    if whole and (over != "model" or "group" not in method.asks or len(like.tensors) == 1):
        return Ran(1)
    draw = np.random.default_rng(0)
    shape = (12, 16) if whole else (48, 64)
    tensors = [Tensor(t.name, shape, "float32", first.params) for t in like.tensors[: 1 + whole]]
    arrays = [{t.name: draw.standard_normal(shape).astype(np.float32) for t in tensors} for _ in range(models + 1)]
    sources = [ArraySource(a, "") for a in arrays]
    keys = [stat_name(t.name, key) for key, kind in method.stats.items() if kind == "element" for t in tensors]
    stats = [ArraySource({key: draw.random(shape) for key in keys}, "") for _ in range(models + 1)]
    of = stats if method.needs == "base and models" else stats[1:]
    over = "model" if over != "tensor" else over
    work = Work(method, sources[1:], sources[0], tensors, over, stats=of if keys else None, nonfinite="propagate")
    specs = {t.name: ("F32", shape) for t in tensors}
    sinks = {o: ArraySink(specs, arrays[0][first.name]) for o in method.outputs or ("",)}
    try:
        return run(work, sinks, elements=1024, threads=1)
    except RefmergeError:  # the merge itself will say it, with a tensor's own name
        return Ran(1)


def _whole_stats(work: Work, t: Tensor) -> int:
    """Entries of the statistics that a block of this tensor sees as a whole, of all models."""
    keys = [key for key, kind in work.method.stats.items() if kind == "whole"]
    names = {stat_name(n, key) for key in keys for n in (t.name, t.name.rpartition(".")[0])}
    return sum(math.prod(s.shape(n)) for s in work.stats or () for n in names & s.names())


def _peak_memory(work: Work, elements: int, threads: int, max_memory: int | None, fused: bool) -> int:
    """Estimate of the memory of all blocks that are computed at a time, and of kept masks."""
    threads = min(threads, 8)
    sums = fused and bool(work.tensors) and _trial(work).asked <= {"sum"}
    peak, wholes = 0, []
    for t in work.tensors:
        view = work.view(t)
        if view == "tensor" and t.size:
            wholes.append(of_whole(work, t) + 4 * 8 * _whole_stats(work, t))
            continue
        whole = {"model": sum(u.size for u in work.tensors), "rows": t.rows[1]}.get(view, 0)
        count = max(whole, min(t.size, elements * 3 // 2))
        compiled = fused and view == "flat" and t.work == "float32"
        block = of_compiled(work, t, count, sums) if compiled else of_block(work, t, count)
        peak = max(peak, block + 4 * 8 * _whole_stats(work, t))
    masks = 0
    if {"group", "rng"} <= set(work.method.asks):  # a bit for each element that is drawn, from one pass to the next
        masks = min(MASKS, max((t.size for t in work.tensors), default=0) * len(work.models) // 8)
    largest = sorted(wholes)[-threads:]
    at_once = sum(largest) if max_memory is None else min(sum(largest), max([max_memory, *largest[-1:]]))
    return max((peak + masks) * threads if peak else 0, at_once)
