"""Where tasks are computed must not matter: the same bits and the same account of it in this thread, threads and processes;
and whatever ends a worker ends the merge with one clear error, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refmerge import executors
from refmerge.api import prepare
from refmerge.checkpoint import open_checkpoint, save
from refmerge.errors import InputError, ResourceError
from refmerge.method import method

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
SHAPES = {"a.weight": (300, 1001), "b.weight": (700, 300), "b.bias": (700,), "none": (0,), "number": ()}


def checkpoints(folder: Path, count: int = 3, dtype: object = np.float32) -> list[Path]:
    """A base and its fine-tunes, of more elements than are merged without workers."""
    draw = np.random.default_rng(0)
    base = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for k in range(count):
        tuned = {n: x + 0.1 * k * draw.standard_normal(x.shape).astype(np.float32) for n, x in base.items()}
        save({n: np.asarray(x).astype(dtype) for n, x in tuned.items()}, folder / f"{k}.safetensors")
    return [folder / f"{k}.safetensors" for k in range(count)]


def merged(paths: list[Path], name: str, out: Path, *, threads: int, elements: int, **params: object):
    plan = prepare(paths[1:], name, base=paths[0], threads=threads, params=params)
    plan.elements = elements
    plan.run(out)
    return {n: x.tobytes() for n, x in open_checkpoint(out).items()}, plan.ran


CASES = {
    "task_arithmetic": {},
    "ties": {},  # one group of all tensors, and a selection
    "mergekit:ties": {"weight": 0.5, "density": 0.3},
    "mergekit:dare_ties": {"weight": 0.5, "density": 0.5},  # draws that are remembered, and sums
    "mergekit:breadcrumbs": {"weight": 0.5, "density": 0.7},
    "model_stock": {},
    "widen": {},  # whole tensors
    "svc": {},  # and LAPACK
}


@needs_fork
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [4096, 100_000])
def test_the_same_bits_everywhere(name, elements, tmp_path, monkeypatch):
    paths = checkpoints(tmp_path, dtype=ml_dtypes.bfloat16)
    expected, account = merged(paths, name, tmp_path / "serial.safetensors", threads=1, elements=elements, **CASES[name])
    used = []
    for kind, forks in (("threads", False), ("processes", True)):
        run = getattr(executors, kind)
        monkeypatch.setattr(executors, kind, lambda *a, kind=kind, run=run: (used.append(kind), run(*a)))
        monkeypatch.setattr("refmerge.plan.can_fork", lambda forks=forks: forks)
        got, ran = merged(paths, name, tmp_path / f"{kind}.safetensors", threads=3, elements=elements, **CASES[name])
        assert got == expected
        assert (ran.passes, ran.bytes_read, ran.bytes_sampled) == (
            account.passes, account.bytes_read, account.bytes_sampled
        )  # fmt: skip
    assert used == ["threads", "processes"]


@needs_fork
def test_a_killed_worker_is_an_error(tmp_path):
    paths = checkpoints(tmp_path)
    parent = os.getpid()

    @method("killed", paper="none")
    def killed(models):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return models[0]

    with pytest.raises(ResourceError, match=r"a worker process ended by itself \(status -9\).*--threads"):
        prepare(paths, killed, threads=2).run(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", "2.safetensors"]


@needs_fork
def test_errors_of_a_worker_are_the_callers(tmp_path):
    paths = checkpoints(tmp_path)
    broken = dict(open_checkpoint(paths[2]))
    broken["b.weight"][3, 4] = np.nan
    save(broken, paths[2], overwrite=True)
    with pytest.raises(InputError, match=r"2\.safetensors: tensor 'b\.weight' has 1 non-finite value, .* at \(3, 4\)"):
        prepare(paths, "linear", threads=2).run(tmp_path / "out")

    @method("failing", paper="none")
    def failing(models):
        raise LookupError("of the method's own")

    with pytest.raises(LookupError, match="of the method's own") as caught:
        prepare(paths[:2], failing, threads=2).run(tmp_path / "out")
    assert "in failing" in "".join(caught.value.__notes__)  # where, though the traceback stayed in the worker


@needs_fork
def test_an_error_that_cannot_be_sent_is_told(tmp_path):
    paths = checkpoints(tmp_path)

    class Local(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    @method("failing", paper="none")
    def failing(models):
        raise Local("one", "two")

    with pytest.raises(RuntimeError, match="Local: one two"):
        prepare(paths, failing, threads=2).run(tmp_path / "out")


@needs_fork
def test_workers_end_with_their_parent(tmp_path):
    """Even when it is killed and can tell them nothing."""
    paths = checkpoints(tmp_path)
    script = textwrap.dedent(
        """
        import os, pathlib, sys, time
        from refmerge.api import prepare
        from refmerge.method import method

        @method("slow", paper="none")
        def slow(models):
            pathlib.Path(f"{os.getpid()}.worker").touch()
            time.sleep(0.2)
            return models[0]

        plan = prepare(sys.argv[1:], slow, threads=2)
        plan.elements = 4096
        plan.run("out")
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script, *map(str, paths)], cwd=tmp_path)
    until = time.monotonic() + 60
    while len(workers := list(tmp_path.glob("*.worker"))) < 2:
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{w.stem}").exists() for w in workers):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_no_fork_beside_other_threads():
    import threading

    started, stop = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (started.set(), stop.wait()))
    other.start()
    started.wait()
    try:
        assert not executors.can_fork()
    finally:
        stop.set()
        other.join()
    assert executors.can_fork() == (sys.platform == "linux" and threading.active_count() == 1)
