"""A merge that has been checked and can be run: what is read, computed and written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_numpy_array

from refmerge.checkpoint import Checkpoint, CheckpointWriter, itemsize, open_checkpoint, parse_size, refuse_input
from refmerge.checkpoint.dtypes import OUTPUTS
from refmerge.engine import MASKS, Ran, block_elements, run
from refmerge.errors import UsageError
from refmerge.executors import can_fork
from refmerge.fused.compiler import command
from refmerge.method import Method, Over
from refmerge.registry import is_ours
from refmerge.sources import ArraySink, ArraySource, DiskSink, DiskSource, HostSink, Source, StagedSink
from refmerge.work import Tensor, Work, stat_name

__all__ = ["Plan"]

ARRAYS_BLOCK_BYTES = 1 << 19  # of arrays in memory, where no backend says more
# Threads of one interpreter wait for each other more than they compute in smaller ones; and whole rows end where they do,
# so that each border of blocks cuts a stretch of a sum.
LARGER_BLOCK_BYTES = 1 << 20
WORTH_COMPILING = 1 << 25  # entries; fewer are merged before a compiler has started
INTERPRETER = 38_000_000  # bytes of a process that has imported all this, beside its blocks

Specs = dict[str, tuple[str, tuple[int, ...]]]
_CONFIG_WORDS = {name: word for word, name in OUTPUTS.items()}


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
    inputs before the first block is read.
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
    before: Callable[[], None] | None = None
    ran: Ran | None = None

    def run(
        self,
        out: str | Path | None = None,
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> Any:
        """Merge into arrays, or into `out` and return the open Checkpoint; see `refmerge.merge`."""
        outputs = self.work.method.outputs or ("",)
        if out is None:
            arrays = {o: self._array_sink(self._specs_of(o)) for o in outputs}
            self.fill(arrays)
            results = {o: sink.result() for o, sink in arrays.items()}
            return results if self.work.method.outputs else results[""]
        target = Path(out)
        if self.work.method.outputs and target.suffix == ".safetensors":
            raise UsageError(f"{self.work.method.name} has several outputs: give a folder for them, not {str(target)!r}")
        refuse_input(target, [p for c in self.checkpoints for p in c.paths])
        with ExitStack() as writers:
            sinks = {}
            for o in outputs:
                single = bool(o) or target.suffix == ".safetensors"
                writer = CheckpointWriter(
                    target / f"{o}.safetensors" if o else target,
                    self._specs_of(o),
                    max_shard_size=parse_size(max_shard_size),
                    overwrite=overwrite,
                    metadata=metadata,
                    sidecars=() if single or self.donor is None else self.donor.sidecars(),
                    extra_files=None if single else self._config(),
                )
                sinks[o] = self._disk_sink(writers.enter_context(writer), self._specs_of(o))
            self.fill(sinks)
            for c in self.checkpoints:
                c.check_unchanged()
        return target if self.work.method.outputs else open_checkpoint(target)

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
        return DiskSink(writer, specs, self.backend)

    def _config(self) -> dict[str, bytes] | None:
        """The donor's config with the dtype of the result, where another one was asked for."""
        config = self.donor.config if self.donor is not None else None
        word = _CONFIG_WORDS.get(self.out_dtype or "")
        changed = {k: word for k in ("dtype", "torch_dtype") if config and word and k in config and config[k] != word}
        return {"config.json": (json.dumps({**config, **changed}, indent=2) + "\n").encode()} if config and changed else None

    @property
    def _on_files(self) -> bool:
        """Whether all that is read is files, and NumPy computes: then processes can."""
        stats = [s for s in self.work.stats or () if s.names()]
        sources = [*self.work.read, *stats]
        numpy = self.backend is not None and self.backend.name == "numpy"
        return numpy and all(isinstance(s, DiskSource) for s in sources)

    @property
    def is_fused(self) -> bool:
        """Whether blocks are computed by compiled programs, where the method sees no tensor as a whole."""
        if self.fused is not None:
            return self.fused
        size = sum(t.size for t in self.work.tensors if self.work.view(t) in ("flat", "rows") and t.work == "float32")
        # What another package's text does to its arrays is not known: an entry written in place, say, cannot be noted down.
        return self._on_files and size >= WORTH_COMPILING and command() is not None and is_ours(self.work.method)

    def _block_elements(self, processes: bool) -> int:
        if self.elements is not None:
            return self.elements
        block_bytes = self.block_bytes
        rows = any(self.work.view(t) == "rows" for t in self.work.tensors)
        if rows or self.is_fused or (self.threads > 1 and not processes):
            block_bytes = max(block_bytes, LARGER_BLOCK_BYTES)
        return block_elements(self.work.method, len(self.work.models), block_bytes, self.threads, self.max_memory)

    def fill(self, sinks: Mapping[str, Any]) -> None:
        """Merge into these sinks, one for each output of the method; "" where it has one."""
        if self.before is not None:
            self.before()
        processes = self._on_files and can_fork() and all(isinstance(s, DiskSink) for s in sinks.values())
        work = replace(self.work, fused=self.is_fused and all(isinstance(s, DiskSink) for s in sinks.values()))
        self.ran = run(
            work, sinks, elements=self._block_elements(processes), threads=self.threads, processes=processes
        )
        for name, source in self.copied.items():
            if "" in sinks:
                sinks[""].copy(name, source)

    def figures(self, estimate: bool = False) -> dict[str, Any]:
        """What the merge moves: in the run that was made, or as an estimate that counts the method's questions on small
        arrays. Bytes are those of the tensors; peak_memory is that of the blocks and of the interpreters, of which
        each process has one."""
        tensors, work = self.work.tensors, self.work
        elements = self._block_elements(self._on_files and can_fork())
        ran = self.ran
        if ran is None or estimate:
            passes = _passes(work.method, tensors[0], len(work.models), work.over) if tensors else 0
            one_block = [work.over == "tensor" and t.size <= elements * 3 // 2 for t in tensors]
            read = (work.bytes_of(t, t.size) * (1 if one else passes) for t, one in zip(tensors, one_block))
            ran = Ran(1 if all(one_block) else passes, sum(read))
        copied = sum(_nbytes(spec) for n, spec in self.specs.items() if n in self.copied)
        return {
            "method": work.method.name,
            "models": len(work.models),
            "tensors": len(tensors),
            "copied": len(self.copied),
            "parameters": sum(t.size for t in tensors),
            "passes": ran.passes,
            "bytes_read": ran.bytes_read + copied,
            "bytes_written": sum(_nbytes(s) for o in work.method.outputs or ("",) for s in self._specs_of(o).values()),
            "peak_memory": _peak_memory(work, elements, self.threads)
            + sum(getattr(c, "nbytes_kept", 0) for c in self.checkpoints)
            + INTERPRETER * (1 + self.threads * (self.threads > 1 and self._on_files and can_fork())),
            "threads": self.threads,
            "backend": "arrays" if self.backend is None else self.backend.name,
            "compiled": self.is_fused,
        }


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return math.prod(shape) * itemsize(dtype)


def _passes(method: Method, tensor: Tensor, models: int, over: Over) -> int:
    """How often a method passes over a group of several blocks, counted on small random arrays with these parameters."""
    if method.view_for(tensor.params, len(tensor.shape)) in ("tensor", "model"):
        return 1
    draw = np.random.default_rng(0)
    arrays = [{"x": draw.standard_normal((48, 64)).astype(np.float32)} for _ in range(models + 1)]
    sources = [ArraySource(a, "") for a in arrays]
    small = Tensor("x", (48, 64), "float32", tensor.params)
    keys = [key for key, kind in method.stats.items() if kind == "element"]
    stats = [ArraySource({stat_name("x", key): draw.random((48, 64)) for key in keys}, "") for _ in range(models + 1)]
    of = stats if method.needs == "base and models" else stats[1:]
    work = Work(method, sources[1:], sources[0], [small], "model" if over != "tensor" else over, stats=of if keys else None)
    sinks = {o: ArraySink({"x": ("F32", (48, 64))}, arrays[0]["x"]) for o in method.outputs or ("",)}
    return run(work, sinks, elements=1024, threads=1).passes


def _whole_stats(work: Work, t: Tensor) -> int:
    """Entries of the statistics that a block of this tensor sees as a whole, of all models."""
    keys = [key for key, kind in work.method.stats.items() if kind == "whole"]
    names = {stat_name(n, key) for key in keys for n in (t.name, t.name.rpartition(".")[0])}
    return sum(math.prod(s.shape(n)) for s in work.stats or () for n in names & s.names())


def _peak_memory(work: Work, elements: int, threads: int) -> int:
    """Estimate of the blocks' memory: inputs as they are read and as they are computed with, temporaries, kept masks."""
    arrays = len(work.read)
    peak = 0
    for t in work.tensors:
        view = work.view(t)
        whole = {"tensor": t.size, "model": sum(u.size for u in work.tensors), "rows": t.rows[1]}.get(view, 0)
        count = max(whole, min(t.size, elements * 3 // 2))
        peak = max(peak, count * (8 if t.work == "float64" else 4) * (3 * arrays + 4) + 4 * 8 * _whole_stats(work, t))
    masks = 0
    if {"group", "rng"} <= set(work.method.asks):  # a bit for each element that is drawn, from one pass to the next
        masks = min(MASKS, max((t.size for t in work.tensors), default=0) * len(work.models) // 8)
    return (peak + masks) * (1 if not work.tensors or peak == 0 else min(threads, 8))
