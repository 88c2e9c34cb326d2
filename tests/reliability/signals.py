"""Merges that are interrupted at random times, resumed, and compared with one that was left alone."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from refmerge.checkpoint import save
from tests.reliability.crashes import Broken, digest

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
# Says when it has begun: before that, it is the interpreter that is interrupted.
_READY = """
from refmerge import cli
from refmerge.checkpoint import writer
from refmerge.recipe import run
writer.NOTE_SECONDS = 0.05
prepare = run.prepare_recipe
def ready(*arguments, **options):
    print("ready", flush=True)
    return prepare(*arguments, **options)
run.prepare_recipe = ready
cli.main()
"""


def run(folder: Path, count: int) -> dict[str, float]:
    """Send `count` signals, each to a merge that was begun or resumed; how many met one at work, and the longest stop: by
    the clock, and in seconds of the processor, which other work on the machine does not change."""
    draw = np.random.default_rng(0)
    for k in range(3):
        arrays = {f"w{i}": draw.standard_normal(1 << 20).astype(np.float32) for i in range(8)}
        save(arrays, folder / f"{k}.safetensors")
    (folder / "recipe.yml").write_text(
        "refmerge: 1\nmerge_method: mergekit:dare_ties\nbase_model: 0.safetensors\nmodels:\n"
        "  - {model: 1.safetensors, parameters: {weight: 0.5, density: 0.5}}\n"
        "  - {model: 2.safetensors, parameters: {weight: 0.5, density: 0.5}}\n"
    )
    command = [sys.executable, "-c", _READY, "merge", "recipe.yml"]
    environment = os.environ | {"REFMERGE_COMPILE": "0"}
    start = time.monotonic()
    subprocess.run([*command, "whole"], cwd=folder, env=environment, check=True, capture_output=True)
    usual, expected = time.monotonic() - start, digest(folder / "whole")
    out, choose = folder / "out", random.Random(0)
    met, finished, longest, work = 0, 0, 0.0, 0.0
    for _ in range(count):
        number = choose.choice(list(STATUS))
        process = subprocess.Popen(
            [*command, "out", "--resume", "--quiet"], cwd=folder, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        time.sleep(choose.random() * usual * 0.7)
        before = spent(process.pid)
        os.kill(process.pid, number)  # Popen's own call would take note of its end, and of no usage
        sent = time.monotonic()
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        _, ended, usage = os.wait4(process.pid, 0)
        watchdog.cancel()
        status = process.returncode = os.waitstatus_to_exitcode(ended)
        if status == STATUS[number]:
            met += 1
            longest = max(longest, time.monotonic() - sent)
            work = max(work, usage.ru_utime + usage.ru_stime - before)
        elif status and not (out.exists() and status == -number):  # the interpreter was already on its way out
            raise Broken(f"{signal.Signals(number).name}: status {status}: {process.stderr.read()!r}")
        if out.exists():
            finished += 1
            if digest(out) != expected:
                raise Broken(f"{signal.Signals(number).name}: the output has other bytes")
            shutil.rmtree(out)
    subprocess.run([*command, "out", "--resume"], cwd=folder, env=environment, check=True, capture_output=True)
    if digest(out) != expected or any(p.name.startswith(".out") for p in folder.iterdir()):
        raise Broken("in the end the output has other bytes, or something is left beside it")
    return {"signals": count, "met": met, "finished": finished + 1, "longest": longest, "processor": work}


def spent(process: int) -> float:
    """Seconds of the processor that a process and its workers have taken."""
    total = 0
    for one in [process, *map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]:
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")
