"""Merges that are killed, or that meet a failing disk, at the n-th call to the system, for n = 1, 2, ... until none is left.

Each merge runs in a process forked from this one, so that a hundred of them take seconds. What is found afterwards must be
the old output or the new one, whole; and `resume` must end with the bytes of a merge that nothing interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import refmerge
from refmerge.adapters import Adapter, Factors, write_adapter
from refmerge.checkpoint import open_checkpoint, save, writer
from refmerge.errors import RefmergeError
from refmerge.nets import llama
from refmerge.recipe.run import run_recipe

WRITES = ("open", "mkdir", "pwrite", "posix_fallocate", "fsync", "rename", "replace", "unlink", "rmdir")
READS = ("preadv", "fstat", "stat", "lstat", "listdir", "scandir")
CALLS = WRITES + READS
SHAPES = {"a": (40, 3), "b": (64,), "c": (5, 5, 5), "d": (), "e": (0, 3), "f": (300,)}
UNFINISHED = 77  # the status of a child that was not stopped: it made fewer calls


@contextmanager
def fast_folder(otherwise: Path | None = None) -> Iterator[Path]:
    """A folder in memory where the system has such, as syncing a disk a thousand times takes minutes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else otherwise
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def models(folder: Path, count: int = 3, *, pipelines: bool = False) -> list[Path]:
    """Small checkpoints with a config, in the Hub's layout; or pipelines of two of them and a scheduler."""
    draw = np.random.default_rng(0)
    paths = [folder / f"in{k}" for k in range(count)]
    for path in paths:
        for part in (path / "unet", path / "vae") if pipelines else (path,):
            arrays = {name: np.asarray(draw.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
            save(arrays | {"ids": np.arange(3)}, part, extra_files={"config.json": b"{}"})
        if pipelines:
            (path / "scheduler").mkdir()
            (path / "scheduler" / "scheduler_config.json").write_text("{}")
            classes = {"unet": ["x", "UNet"], "vae": ["x", "VAE"], "scheduler": ["x", "Euler"]}
            (path / "model_index.json").write_text(json.dumps(classes))
    return paths


def merge(paths: list[Path], out: Path, method: str = "task_arithmetic", **options: Any) -> None:
    options = {"threads": 1, "max_shard_size": 600} | options
    refmerge.merge(paths[1:], method, base=paths[0], out=out, **options)


# ------------------------------------------------------------------------------------------------- recipes of every kind


def _dense(folder: Path, seed: int) -> None:
    """A language model of two layers, as transformers has them."""
    params = llama.init(np.random.default_rng(seed), 2, 1, 2, head_width=2, width=4, hidden=6, tokens=4)
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4, "head_dim": 2}
    files = {"config.json": json.dumps(config).encode()}
    save({n: np.asarray(x, np.float32) for n, x in params.items()}, folder, extra_files=files)


def _adapter(folder: Path) -> None:
    draw = np.random.default_rng(9)
    factors = Factors(draw.standard_normal((2, 4)).astype(np.float32), draw.standard_normal((6, 2)).astype(np.float32), 4.0)
    write_adapter(Adapter({f"model.layers.{i}.mlp.up_proj": factors for i in range(2)}), folder)


def _tokenizers(folder: Path) -> None:
    for name, words in (("m0", "abcd"), ("m1", "dcbe"), ("m2", "abcd")):
        vocabulary = {"model": {"vocab": {word: i for i, word in enumerate(words)}}, "added_tokens": []}
        (folder / name / "tokenizer.json").write_text(json.dumps(vocabulary))


RECIPES = {
    "slices": """\
refmerge: 1
merge_method: linear
slices:
  - sources: [{model: m0, layer_range: [0, 2]}, {model: m1, layer_range: [0, 2]}]
  - sources: [{model: m2, layer_range: [1, 2]}, {model: m1, layer_range: [0, 1]}]
""",
    "adapters": """\
refmerge: 1
merge_method: linear
models: [{model: m0+lora}, {model: m1}]
""",
    "vocabularies": """\
refmerge: 1
merge_method: linear
tokenizer_source: union
models: [{model: m0}, {model: m1}]
""",
    "several merges": """\
refmerge: 1
merge_method: linear
models: [{model: trimmed}, {model: mean}, {model: m2+lora}]
---
refmerge: 1
name: trimmed
merge_method: ties
base_model: m0
parameters: {density: 0.5}
models: [{model: m1}, {model: m2}]
---
refmerge: 1
name: mean
merge_method: linear
models: [{model: m0}, {model: trimmed}]
out_dtype: bfloat16
""",
    "aligned": """\
refmerge: 1
merge_method: linear
models: [{model: m0}, {model: m1}]
align: {method: git_rebasin}
""",
    "experts": """\
refmerge: 1
base_model: m0
gate_mode: random
experts: [{source_model: m1}, {source_model: m2, noise_scale: 0.5}]
""",
}


RECIPES["several merges, all kept"] = RECIPES["several merges"]


def recipe(folder: Path, kind: str) -> list[Path]:
    """Write the inputs of a recipe of this kind and the recipe, `recipe.yml`; all paths that are there."""
    for i in range(3):
        _dense(folder / f"m{i}", i)
    if kind == "vocabularies":
        _tokenizers(folder)
    _adapter(folder / "lora")
    (folder / "recipe.yml").write_text(RECIPES[kind])
    return [*(folder / f"m{i}" for i in range(3)), folder / "lora", folder / "recipe.yml"]


def run(folder: Path, out: Path, kind: str, **options: Any) -> None:
    """Merge what `recipe` wrote."""
    options = {"max_shard_size": 300} | ({} if kind == "experts" else {"threads": 1}) | options
    if kind.endswith("all kept"):
        options["intermediates"] = folder / f"{out.name}-first"
    run_recipe(folder / "recipe.yml", out, **options)


# ------------------------------------------------------------------------------------------------------------ the points


def digest(out: Path) -> str:
    """Of a file, or of all files of a folder and their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]:
        total.update((path.relative_to(out).as_posix() if out.is_dir() else "").encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child; its exit status, 0 if it returned, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except RefmergeError as error:
            status = error.status
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stop_at(number: int, stop: Callable[[], None], calls: tuple[str, ...]) -> Callable[[], bool]:
    """Have the n-th of these calls, counted together, not happen and `stop` be called in its place. In a child only.

    Returns what tells whether there were so many calls.
    """
    made = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == number:
                stop()
            return call(*args, **kwargs)

        return counting

    for name in calls:
        if hasattr(os, name):
            setattr(os, name, wrapped(getattr(os, name)))
    return lambda: made >= number


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


class Broken(AssertionError):
    """A promise that was not kept; says at which call."""


def points(
    folder: Path, stop: Callable[[], None], *, calls: tuple[str, ...] = CALLS, every: int = 1, resume: bool = True,
    overwrite: bool = False, method: str = "task_arithmetic", single: bool = False, pipelines: bool = False,
    kind: str | None = None,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """(n, what was found) for each point at which a merge was stopped; Broken where a promise was.

    overwrite: over an older output. every: only each so many calls. kind: of recipe, in place of models that are merged by
    `method`. What is found is "old", "absent" or "new".
    """
    writer.NOTE_SECONDS = 0.0  # a line of the journal after each tensor
    paths = models(folder, pipelines=pipelines) if kind is None else recipe(folder, kind)
    out = folder / ("out.safetensors" if single else "out")

    def make(out: Path, **options: Any) -> None:
        merge(paths, out, method, **options) if kind is None else run(folder, out, kind, **options)

    make(folder / f"whole{out.suffix}")
    # What was to be kept stays, also where the merge failed after it.
    again = overwrite or (stop is fail and (kind or "").endswith("all kept"))
    expected = digest(folder / f"whole{out.suffix}")
    number = 1
    while True:
        if overwrite:
            save({"old": np.zeros(3)}, out)
            old = digest(out)

        def stopped(number: int = number) -> None:
            reached = stop_at(number, stop, calls)
            make(out, resume=resume, overwrite=overwrite)
            if not reached():
                os._exit(UNFINISHED)

        status = fork(stopped)
        wanted = {-signal.SIGKILL} if stop is kill else {3, 5, 0}
        if status not in (*wanted, UNFINISHED):
            raise Broken(f"call {number}: ended with status {status}")
        found = "absent"
        if os.path.lexists(out):
            seen = digest(out)
            found = "new" if seen == expected else "old" if overwrite and seen == old else "mixed"
        if found == "mixed" or (overwrite and found == "absent" and stop is fail):
            raise Broken(f"call {number}: the output is {found}")
        if status == UNFINISHED and found == "new":
            break
        if found != "new":
            if fork(lambda: make(out, resume=resume, overwrite=again)):
                raise Broken(f"call {number}: the merge could not be made again")
            if digest(out) != expected:
                raise Broken(f"call {number}: made again, the output has other bytes")
        if resume and any(p.name.endswith((".journal", ".stages")) for p in folder.iterdir() if found != "new"):
            raise Broken(f"call {number}: a journal or the result of a merge before is left")
        open_checkpoint(out).close()
        _clean(folder, keep=[*paths, folder / f"whole{out.suffix}", folder / "whole-first"])
        yield number, found
        number += every


def _clean(folder: Path, keep: list[Path]) -> None:
    for path in folder.iterdir():
        if path not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
