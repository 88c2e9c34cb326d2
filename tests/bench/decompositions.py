"""Times the methods of singular vectors as ratios to the decompositions that their definitions name.

    python -m tests.bench.decompositions [METHOD ...] [--models 3] [--shrink 1]

The matrices are those of one layer of Qwen2-0.5B, or a part of them by --shrink, random numbers in float32; all is merged in
memory on one thread. What is printed for each method, in seconds of the processor, the best of two:

    LAPACK     NumPy's thin singular value decompositions, in float64, of matrices as large as those of the definition, each
               decomposed once
    refmerge   the merge
    ratio      of the two

Iterations are left out: `doge`, `dop` and `wudi` are merged without steps of descent, `wudi` by its exact solver.
`core_space` merges adapters of rank 64 for these matrices, by task arithmetic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from threadpoolctl import threadpool_limits

from refmerge import merge
from refmerge.adapters import Adapter, Factors
from refmerge.procedures.subspaces.core_space import core_space

LAYER = {"q": (896, 896), "k": (128, 896), "v": (128, 896), "o": (896, 896), "gate": (4864, 896), "up": (4864, 896),
         "down": (896, 4864)}  # fmt: skip
RANK = 64  # of adapters
PARAMS = {"wudi": {"solver": "exact"}, "doge": {"steps": 0}, "dop": {"steps": 0}}


def bases(m: int, n: int, T: int) -> list[tuple[int, int]]:
    """Of T tasks side by side, left and right."""
    r = min(m, n) // T * T
    return [(m, r), (n, r)]


def decomposed(name: str, m: int, n: int, T: int) -> list[tuple[int, int]]:
    """The shapes that a definition decomposes for an m x n matrix of T models."""
    tasks = [(m, n)] * T
    shapes: dict[str, list[tuple[int, int]]] = {
        "iso_c": tasks[:1], "svc": tasks[:1], "tsvm": tasks + bases(m, n, T), "dc_merge": tasks + bases(m, n, T),
        "iso_cts": [*tasks, tasks[0], *bases(m, n, 1)], "knots": [(m, T * n)], "opcm": tasks[1:],
        "doge": [*tasks, bases(m, n, T)[0]], "dop": 2 * tasks[1:], "wudi": [(T * m, n)],
        "core_space": [(m, T * RANK), (n, T * RANK), (min(m, T * RANK), min(n, T * RANK))],
    }  # fmt: skip
    return shapes[name]


def seconds(f: Callable[[], object]) -> float:
    times = []
    for _ in range(2):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def adapter(shapes: Mapping[str, tuple[int, int]], draw: np.random.Generator) -> Adapter:
    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape, np.float32)

    return Adapter({k: Factors(normal(RANK, n), normal(m, RANK), RANK) for k, (m, n) in shapes.items()})


def measured(names: list[str], models: int, shrink: int) -> Iterator[tuple[str, float, float]]:
    """(method, seconds of LAPACK, seconds of the merge)."""
    draw = np.random.default_rng(0)
    shapes = {k: (m // shrink, n // shrink) for k, (m, n) in LAYER.items()}
    base = {k: draw.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    tuned = [{k: x + np.float32(0.1) * draw.standard_normal(x.shape, np.float32) for k, x in base.items()}
             for _ in range(models)]  # fmt: skip
    summed = {k: base[k] + sum(x[k] - base[k] for x in tuned) for k in base}
    for name in names:
        of = [shape for m, n in shapes.values() for shape in decomposed(name, m, n, models)]
        arrays = {shape: draw.standard_normal(shape) for shape in set(of)}
        with threadpool_limits(1):
            lapack = sum(seconds(lambda x=x: np.linalg.svd(x, full_matrices=False)) * of.count(s) for s, x in arrays.items())
            if name == "core_space":
                adapters = [adapter(shapes, draw) for _ in range(models)]
                yield name, lapack, seconds(lambda a=adapters: core_space(a))
                continue
        given = [summed, *tuned] if name == "svc" else tuned
        params = PARAMS.get(name, {})
        yield name, lapack, seconds(lambda g=given, n=name, p=params: merge(g, n, base=base, threads=1, **p))


def main() -> None:
    every = ["iso_c", "svc", "tsvm", "iso_cts", "dc_merge", "knots", "opcm", "doge", "dop", "wudi", "core_space"]
    parser = argparse.ArgumentParser(prog="python -m tests.bench.decompositions")
    parser.add_argument("methods", nargs="*", choices=[*every, []], metavar="METHOD")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=1)
    a = parser.parse_args()
    print("| | LAPACK | refmerge | ratio |\n|---|---|---|---|")
    for name, lapack, ours in measured(a.methods or every, a.models, a.shrink):
        print(f"| {name} | {lapack:.2f} | {ours:.2f} | {ours / max(lapack, 1e-9):.2f} |", flush=True)


if __name__ == "__main__":
    main()
