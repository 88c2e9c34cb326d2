import numpy as np

from refmerge.adapters import Adapter, dtype_of, factors_of, finite, only_products, opened, same_modules, saved_alike, split
from refmerge.api import call
from refmerge.errors import InputError, UsageError
from refmerge.matrices import decomposed
from refmerge.methods.subspaces.wudi import significant
from refmerge.procedure import procedure

NOISE = 1e-5  # of factors in float32, beside the largest singular value


@procedure("core_space", paper="arXiv:2509.17786")
def core_space(
    adapters, *, method="task_arithmetic", isotropize=False, weights=None, missing="error", seed=0, draws=None, **params
):
    """One LoRA adapter made of several, by any method that merges matrices, in the small space that their factors span.

    adapters: paths, or Adapters (refmerge.adapters), of any ranks. method, params: what merges the cores, whose base is 0.
    draws: for each adapter a mapping module -> recorded 0/1 draws of its core. Returns an Adapter.
    """
    adapters = opened(adapters, "core_space")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    check(adapters, weights, missing)
    merged = {}
    for module in sorted({m for a in adapters for m in a.modules}):
        here = [n for n, a in enumerate(adapters) if module in a.modules]
        factors = [adapters[n].modules[module] for n in here]
        B, A = zip(*(f.matrices() for f in factors))
        fits(B, A, module)
        # 1. bases
        U = decomposed(finite(np.hstack(B), module))[0]
        V = decomposed(finite(np.vstack(A), module).T)[0]
        # 2. cores
        cores = [weights[n] * f.scaling * (U.T @ B_t) @ (A_t @ V) for n, f, B_t, A_t in zip(here, factors, B, A)]
        # 3. merge
        stats = None if draws is None else [{"mask": draws[n][module]} for n in here]
        M = call(method, cores, np.zeros_like(cores[0]), name=module, seed=seed, stats=stats, **params)
        # 4. singular values
        X, S, Y = significant(*decomposed(finite(M, module)))
        if isotropize:
            X, S, Y = significant(X, S, Y, NOISE)
            S = np.full_like(S, np.mean(S)) if S.size else S
        # 5. turn back
        merged[module] = factors_of(*split(U @ X, S, (V @ Y).T, "both"), factors[0], dtype_of(*factors))
    config = {k: v for k, v in adapters[0].config.items() if k != "target_modules"}
    return Adapter(merged, config, saved_alike(adapters, "core_space"))


def check(adapters, weights, missing):
    """UsageError for what cannot be meant, InputError for adapters that do not go together."""
    if len(weights) != len(adapters):
        raise UsageError(f"core_space: {len(weights)} weights for {len(adapters)} adapters")
    if missing not in ("error", "skip"):
        raise UsageError(f"core_space: missing = {missing!r} is none of 'error', 'skip'")
    only_products(adapters, "core_space")
    saved_alike(adapters, "core_space")
    if missing == "error":
        same_modules(adapters, "core_space")
    if len({bool(a.config.get("fan_in_fan_out")) for a in adapters}) > 1:
        raise InputError("core_space: fan_in_fan_out differs between the adapters: they are of different bases")


def fits(B, A, module):
    """InputError unless the factors are of modules of one shape."""
    shapes = [(len(B_t), A_t.shape[1]) for B_t, A_t in zip(B, A)]
    if len(set(shapes)) > 1:
        listed = "; ".join(f"{m} x {n}" for m, n in shapes)
        raise InputError(f"module {module!r}: the adapters are of different layers: {listed}")
