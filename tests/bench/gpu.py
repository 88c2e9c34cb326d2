"""Checks and times a CUDA device in one call, and prints tables in Markdown to be kept with the date.

    python -m tests.bench.gpu [--backend torch:cuda:0] [--millions 494] [--cpu]

A machine with a network needs `pip install -e ".[torch,cupy]"` before. One without, whose Python has torch or CuPy already:

    python3 -m pip install --no-index --no-deps --no-build-isolation -e .
    python3 -m tests.bench.gpu --backend torch:cuda:0,cupy

which also wants NumPy, ml_dtypes and array-api-compat there (a folder with array_api_compat in it on PYTHONPATH will do).

First it merges the same checkpoints by NumPy and by the device, from disk to disk, in several blocks and threads, in three
dtypes, and counts the bytes that differ: there must be none. Then it times, each as a median of a few runs after one that
does not count: a copy within the device (bytes read and written); copies between pinned host memory and the device;
linear of arrays that are on the device already, as a share of the copy; merges of arrays in host memory to arrays in host
memory, as a share of copying the same bytes in and out through pinned memory, one after the other; and singular values
decompositions against LAPACK on two cores. Shares under those that are aimed at are marked `(below)`; only a check that
fails, or an error, makes the exit status 1. Without a CUDA device it is 2.

--cpu rehearses all of it with torch on the CPU and small sizes. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import refmerge
from refmerge import registry
from refmerge.api import prepare
from refmerge.checkpoint import open_checkpoint, save
from refmerge.errors import UsageError
from tests.bench.__main__ import shapes

CHECKED = {
    "linear": {"weight": [0.5, 0.3, 0.25]},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"lambda_": 0.4},
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.6},
    "breadcrumbs": {"density": 0.7, "gamma": 0.01},
    "model_stock": {},
    "della": {},
}
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}
GOALS = {"resident": 0.8, "host": 0.6, "svd": 20.0}
BUDGET = 270  # seconds after which no further timing is begun


class Failed(Exception):
    """Something that must be equal is not."""


# --- Devices -----------------------------------------------------------------------------------------------------------


class Torch:
    def __init__(self, spec: str) -> None:
        import torch

        self.torch, self.spec, self.backend = torch, spec, registry.open_backend(spec)
        self.cuda = ":cuda" in spec
        self.device = torch.device(self.backend.name.partition(":")[2] or "cpu")

    def said(self) -> str:
        name = self.torch.cuda.get_device_name(self.device) if self.cuda else f"{platform.processor() or 'CPU'}"
        return f"{name}; torch {self.torch.__version__}, CUDA {self.torch.version.cuda}"

    def sync(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize(self.device)

    def array(self, x: np.ndarray) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return self.torch.from_numpy(x.view(np.int16)).to(self.device).view(self.torch.bfloat16)
        return self.torch.from_numpy(x).to(self.device, copy=True)

    def copy(self, a: Any, b: Any) -> None:
        b.copy_(a)

    def fetched(self, x: Any) -> np.ndarray:
        return x.cpu().view(self.torch.int16 if x.dtype.itemsize == 2 else self.torch.int32).numpy()

    def empty_like(self, x: Any) -> Any:
        return self.torch.empty_like(x)

    def flag(self) -> Any:
        return self.torch.zeros(1, dtype=self.torch.int32, device=self.device)

    def send(self, host: np.ndarray, to: Any) -> None:
        to.copy_(self.torch.from_numpy(host), non_blocking=True)

    def fetch(self, x: Any, host: np.ndarray) -> None:
        self.torch.from_numpy(host).copy_(x, non_blocking=True)

    def svd(self) -> dict[str, Callable[[Any], Any]]:
        linalg = self.torch.linalg
        ways: dict[str, Callable[[Any], Any]] = {"svd": lambda a: linalg.svd(a, full_matrices=False)}
        if self.cuda:
            for driver in ("gesvd", "gesvdj"):
                ways[f"svd, {driver}"] = lambda a, d=driver: linalg.svd(a, full_matrices=False, driver=d)
        return ways

    def residual(self, a: Any, usv: Any) -> float:
        u, s, v = usv
        return float((a - (u * s[..., None, :]) @ v).norm() / a.norm())


class Cupy(Torch):
    def __init__(self, spec: str) -> None:
        self.backend = registry.open_backend(spec)  # a good error where there is no CuPy
        import cupy

        self.cupy, self.spec, self.cuda = cupy, spec, True
        self.index = int(self.backend.name.partition(":")[2])
        cupy.cuda.Device(self.index).use()

    def said(self) -> str:
        runtime = self.cupy.cuda.runtime
        name = runtime.getDeviceProperties(self.index)["name"].decode()
        return f"{name}; cupy {self.cupy.__version__}, CUDA {runtime.runtimeGetVersion()}"

    def sync(self) -> None:
        self.cupy.cuda.Device(self.index).synchronize()

    def array(self, x: np.ndarray) -> Any:
        return self.cupy.asarray(x)

    def copy(self, a: Any, b: Any) -> None:
        b.data.copy_from_device_async(a.data, a.nbytes, self.cupy.cuda.get_current_stream())

    def fetched(self, x: Any) -> np.ndarray:
        return x.get().view(np.int16 if x.dtype.itemsize == 2 else np.int32)

    def empty_like(self, x: Any) -> Any:
        return self.cupy.empty_like(x)

    def flag(self) -> Any:
        return self.cupy.zeros(1, np.int32)

    def send(self, host: np.ndarray, to: Any) -> None:
        to.set(host, stream=self.cupy.cuda.get_current_stream())

    def fetch(self, x: Any, host: np.ndarray) -> None:
        x.get(out=host, blocking=False)

    def svd(self) -> dict[str, Callable[[Any], Any]]:
        return {"svd": lambda a: self.cupy.linalg.svd(a, full_matrices=False)}

    def residual(self, a: Any, usv: Any) -> float:
        u, s, v = usv
        return float(self.cupy.linalg.norm(a - (u * s[..., None, :]) @ v) / self.cupy.linalg.norm(a))


def opened(spec: str) -> Any:
    return (Cupy if spec.startswith("cupy") else Torch)(spec)


# --- Data --------------------------------------------------------------------------------------------------------------


def model(sizes: dict[str, tuple[int, ...]], k: int, dtype: Any) -> dict[str, np.ndarray]:
    """The base (k = 0) or a fine-tune: random values, drawn once and repeated from another place in each tensor."""
    draw = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)
    draw = draw if k == 0 else draw + np.random.default_rng(k).standard_normal(1 << 20, dtype=np.float32) * np.float32(0.002)
    draw = draw.astype(dtype)
    made = {}
    for i, (name, shape) in enumerate(sizes.items()):
        made[name] = np.resize(np.roll(draw, 1009 * i), shape)
    return made


def small(millions: float) -> dict[str, tuple[int, ...]]:
    """Tensors for the checks: larger than several blocks, smaller than one, of odd sizes, and without elements."""
    rows = max(3, int(millions * 1e6 / 1000))
    return {"embed": (rows, 1000), "odd": (rows // 3 + 1, 333), "norm": (997,), "number": (), "none": (0, 4)}


# --- Checks ------------------------------------------------------------------------------------------------------------


def merged(paths: list[Path], base: Path, method: str, backend: str, out: Path, elements: int, threads: int | None) -> Any:
    m = registry.get(method)
    paths = paths[: m.models[1] or len(paths)]
    options = {"base": base} if m.needs_base else {}
    plan = prepare(paths, m, backend=backend, threads=threads, seed=7, params=CHECKED[method], **options)
    plan.elements = elements  # smaller than usual, so that there are several
    return plan.run(out, overwrite=True)


def differing(a: Path, b: Path) -> tuple[int, int]:
    """(bytes that differ, all bytes) of two checkpoints."""
    one, other = open_checkpoint(a), open_checkpoint(b)
    off = total = 0
    for name in one.tensors:
        x, y = (np.ascontiguousarray(c[name]).reshape(-1).view(np.uint8) for c in (one, other))
        off, total = off + int(np.count_nonzero(x != y)), total + x.size
    return off, total


def check(spec: str, root: Path, millions: float) -> tuple[list[str], bool]:
    """Rows of a table, and whether all is equal."""
    sizes, right, rows = small(millions), True, []
    elements = max(4096, int(millions * 1e6) // 7 // 1024 * 1024)  # seven blocks and a rest, their borders across leaves
    known = [m for m in CHECKED if m in registry.names()]
    for word, dtype in DTYPES.items():
        paths = [root / f"{word}{k}.safetensors" for k in range(4)]
        for k, path in enumerate(paths):
            if not path.exists():
                save(model(sizes, k, dtype), path)
        for method in known:
            expected, got = root / f"{word}-{method}.safetensors", root / "device.safetensors"
            if not expected.exists():
                merged(paths[1:], paths[0], method, "numpy", expected, 1 << 18, None)
            merged(paths[1:], paths[0], method, spec, got, elements, 5)
            off, total = differing(expected, got)
            right &= off == 0
            rows.append(f"| {method} | {word} | {off} of {total} | {'equal' if off == 0 else '**differs**'} |")
            say(rows[-1])
    off, total = subnormals(spec, root)
    flushes = spec.startswith("cupy")
    right &= off == 0 or flushes
    verdict = "equal" if off == 0 else "differs, as CuPy flushes them" if flushes else "**differs**"
    rows.append(f"| linear, subnormals | fp32 | {off} of {total} | {verdict} |")
    say(rows[-1])
    return rows, right


def subnormals(spec: str, root: Path) -> tuple[int, int]:
    x = np.arange(1 << 16, dtype=np.uint32)
    for k in (0, 1, 2, 3):
        save({"x": (x * (127 - k)).view(np.float32)}, root / f"sub{k}.safetensors")
    paths = [root / f"sub{k}.safetensors" for k in range(4)]
    for backend, out in (("numpy", "a"), (spec, "b")):
        merged(paths[1:], paths[0], "linear", backend, root / f"sub-{out}.safetensors", 1 << 14, 2)
    return differing(root / "sub-a.safetensors", root / "sub-b.safetensors")


# --- Times -------------------------------------------------------------------------------------------------------------


def seconds(device: Any, f: Callable[[], Any], runs: int = 5, calls: int = 1) -> float:
    """Median of the wall seconds of a call, the device's work included."""
    f()
    device.sync()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            f()
        device.sync()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def rates(device: Any, nbytes: int) -> dict[str, float]:
    """Bytes a second: of a copy on the device (read and written), into it, and out of it."""
    x = device.array(np.random.default_rng(1).standard_normal(nbytes // 4, dtype=np.float32))
    y = device.empty_like(x)
    host = getattr(device.backend, "host", lambda n: np.empty(n, np.uint8))
    there, back = host(nbytes // 4 * 4).view(np.float32), host(nbytes // 4 * 4).view(np.float32)
    there[:], back[:] = 1.5, 0
    found = {"copy": 2 * x.nbytes / seconds(device, lambda: device.copy(x, y), calls=10)}
    found["in"] = x.nbytes / seconds(device, lambda: device.send(there, x), calls=4)
    found["out"] = x.nbytes / seconds(device, lambda: device.fetch(y, back), calls=4)
    return found


def shown(share: float, goal: float) -> str:
    return f"{share:.0%}{'' if share >= goal else ' (below)'}"


def resident(device: Any, rows: int, copy: float) -> list[str]:
    """linear of arrays that are on the device: by refmerge.merge, and by the kernel alone."""
    found = []
    for word in ("fp32", "bf16") if not isinstance(device, Cupy) else ("fp32", "fp16"):
        for count in (2, 3):
            sizes = {f"layers.{i}": (rows, 4096) for i in range(4)}
            models = [{n: device.array(x) for n, x in model(sizes, k, DTYPES[word]).items()} for k in range(1, count + 1)]
            moved = (count + 1) * sum(x.nbytes for x in models[0].values())
            weight = CHECKED["linear"]["weight"][:count]

            def whole(models: Any = models, weight: Any = weight) -> Any:
                return refmerge.merge(models, "linear", weight=weight)

            took = seconds(device, whole)
            found.append(
                f"| linear of {count}, {word}, refmerge.merge | {moved / took / 1e9:.0f} GB/s | "
                f"{shown(moved / took / copy, GOALS['resident'])} of the copy |"
            )
            say(found[-1])
            into = getattr(device.backend.kernels.get("linear"), "into", None)
            flat = {n: [m[n].reshape(-1) for m in models] for n in sizes}
            outs = {n: device.empty_like(xs[0]) for n, xs in flat.items()}
            flag = device.flag()
            options = {"weight": weight, "normalize": True}
            if into is None or not into(outs["layers.0"], flag, flat["layers.0"], **options):
                say("no kernel here")
                continue

            def kernel(
                into: Any = into, flat: Any = flat, outs: Any = outs, flag: Any = flag, options: Any = options
            ) -> None:
                for name, xs in flat.items():
                    into(outs[name], flag, xs, **options)

            took = seconds(device, kernel)
            expected = whole()
            for name, y in outs.items():
                if not np.array_equal(device.fetched(y), device.fetched(expected[name].reshape(-1))) or int(flag[0]):
                    raise Failed(f"the kernel of linear gives other bits than the method: {word}, {count} models")
            found.append(
                f"| linear of {count}, {word}, the kernel alone | {moved / took / 1e9:.0f} GB/s | "
                f"{shown(moved / took / copy, GOALS['resident'])} of the copy |"
            )
            say(found[-1])
    return found


def host_to_host(device: Any, millions: float, rate: dict[str, float], late: Callable[[], bool]) -> list[str]:
    """Arrays in host memory, merged on the device into arrays in host memory."""
    sizes = shapes(millions) if millions >= 20 else small(millions)
    models = [model(sizes, k, ml_dtypes.bfloat16) for k in range(4)]
    usual = getattr(device.backend, "threads", 2)
    jobs = [("linear", usual), ("slerp", usual), ("ties", usual), ("linear", 3), ("linear", 2 * usual)]
    found = []
    for method, threads in jobs:
        if late():
            found.append(f"| {method}, {threads} threads | not run: out of time | |")
            continue
        m = registry.get(method)
        options = {"base": models[0]} if m.needs_base else {}

        def run(m: Any = m, options: Any = options, threads: int = threads) -> Any:
            given = models[1 : 1 + (m.models[1] or 3)]
            plan = prepare(given, m, backend=device.spec, threads=threads, params=CHECKED[m.name], **options)
            plan.run()
            return plan

        figures = run().figures()
        took = seconds(device, run, runs=3)
        copies = figures["bytes_read"] / rate["in"] + figures["bytes_written"] / rate["out"]
        moved = figures["bytes_read"] + figures["bytes_written"]
        found.append(
            f"| {method}, {threads} threads, {figures['passes']} passes | {moved / took / 1e9:.1f} GB/s | "
            f"{shown(copies / took, GOALS['host'])} of pinned copies |"
        )
        say(found[-1])
    return found


LAPACK = """
import os, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import numpy as np
n = int(sys.argv[1])
a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
np.linalg.svd(a[:64, :64])
start = time.perf_counter()
np.linalg.svd(a, full_matrices=False)
print(time.perf_counter() - start)
"""


def decompositions(device: Any, n: int, batch: int, late: Callable[[], bool]) -> list[str]:
    """On the CPU one of half the size, times eight: the whole one takes minutes."""
    two = {f"{lib}_NUM_THREADS": "2" for lib in ("OPENBLAS", "MKL", "OMP")}
    cpu = subprocess.run(
        [sys.executable, "-c", LAPACK, str(n // 2)], env={**os.environ, **two}, capture_output=True, text=True, check=True
    )
    one = float(cpu.stdout) * 8
    found = [f"| NumPy, 2 cores, {n}x{n} (8 times one of {n // 2}) | {one:.2f} s | 1 |"]
    say(found[-1])
    a = device.array(np.random.default_rng(0).standard_normal((batch, n, n), dtype=np.float32))
    for name, f in device.svd().items():
        if late():
            found.append(f"| {name} | not run: out of time | |")
            continue
        f(a[:, :64, :64])
        device.sync()
        start = time.perf_counter()
        usv = f(a)
        device.sync()
        took = (time.perf_counter() - start) / batch
        ratio, residual = one / took, device.residual(a, usv)
        below = "" if ratio >= GOALS["svd"] else " (below)"
        found.append(f"| {name}, {batch} of {n}x{n}, residual {residual:.1e} | {took:.2f} s each | {ratio:.1f}x{below} |")
        say(found[-1])
    return found


# --- The report --------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.CalledProcessError):
        return "no nvidia-smi"


def versions() -> str:
    found = []
    for name in ("refmerge", "numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "array-api-compat"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def report(spec: str, a: argparse.Namespace, root: Path, late: Callable[[], bool]) -> bool:
    device = opened(spec)
    right, parts = True, []

    def part(title: str, head: str, make: Callable[[], list[str]]) -> None:
        """A table; one that fails is reported and the others still run."""
        nonlocal right
        if late():
            parts.append(f"{title}: not run, out of time\n")
            return
        try:
            rows = make()
        except Exception as e:  # anything a driver may throw: the rest of the report is worth having
            traceback.print_exc()
            right = False
            rows = [f"| **failed** | {type(e).__name__}: {' '.join(str(e).split())[:200]} |" + " |" * (head.count("|") - 3)]
        parts.append("\n".join([f"{title}\n", head, "|---" * (head.count("|") - 1) + "|", *rows, ""]))

    def checks() -> list[str]:
        nonlocal right
        rows, equal = check(spec, root, a.check)
        right &= equal
        return rows

    rate: dict[str, float] = {}

    def copies() -> list[str]:
        rate.update(rates(device, a.copy))
        return [f"| {word} | {x / 1e9:.1f} GB/s |" for word, x in rate.items()]

    part("Bytes that differ from NumPy's", "| method | dtype | bytes | |", checks)
    part("Copies: on the device, into it, out of it", "| copy | rate |", copies)
    if rate:
        part("Arrays on the device", "| merge | rate | share |", lambda: resident(device, a.rows, rate["copy"]))
        part("Host to host, bf16", "| merge | rate | share |", lambda: host_to_host(device, a.millions, rate, late))
    part("Decompositions, float32", "| | time | against NumPy |", lambda: decompositions(device, a.svd, a.batch, late))
    date = datetime.datetime.now(datetime.UTC).date()
    print(f"### {spec}, {date}\n\n{device.said()}; {driver()}; {os.cpu_count()} cores; {versions()}")
    block, threads = device.backend.block_bytes >> 20, getattr(device.backend, "threads", None)
    print(f"Blocks of {block} MiB, {threads} threads; models of {a.millions:g} million parameters.\n")
    print("\n".join(parts), flush=True)
    return right


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backend", default="torch:cuda:0", help="one or more, with commas")
    p.add_argument("--millions", type=float, help="parameters of the models that are timed")
    p.add_argument("--cpu", action="store_true", help="rehearse with torch on the CPU")
    a = p.parse_args(argv)
    sizes = {"check": 0.2, "copy": 1 << 24, "rows": 64, "svd": 128, "batch": 2} if a.cpu else {}
    sizes = {"check": 12.0, "copy": 1 << 30, "rows": 16384, "svd": 4096, "batch": 2} | sizes
    for name, value in sizes.items():
        setattr(a, name, value)
    a.millions = a.millions or (0.5 if a.cpu else 494)
    specs = ["torch"] if a.cpu else a.backend.split(",")
    for spec in specs:
        try:
            registry.open_backend(spec)
        except UsageError as e:
            print(f"no device to measure: {e}")
            return 2
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="refmerge-gpu-") as root:
        # each backend has its share of the time
        right = [
            report(spec, a, Path(root), lambda i=i: time.monotonic() - start > BUDGET * (i + 1) / len(specs))
            for i, spec in enumerate(specs)
        ]
    print(f"{'All equal' if all(right) else 'FAILED'}; {time.monotonic() - start:.0f} s.")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
