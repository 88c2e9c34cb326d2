import math
from functools import partial

import numpy as np

from refmerge.adapters import (
    dtype_of,
    factorised,
    factors_of,
    finite,
    listed,
    only_products,
    opened,
    same_modules,
    saved_alike,
)
from refmerge.api import call
from refmerge.compat.peft._steps import weighted
from refmerge.errors import InputError, UsageError
from refmerge.numeric import stacked_sum
from refmerge.procedure import procedure

BY_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BY_PRODUCT = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@procedure("lora_merge", paper="huggingface/peft@5d602fd src/peft/tuners/lora/model.py:add_weighted_adapter")
def lora_merge(
    adapters,
    *,
    weights,
    combination_type="svd",
    svd_rank=None,
    svd_clamp=None,
    density=None,
    majority_sign_method="total",
    missing="error",
    seed=0,
    draws=None,
    bugs=None,
):
    """One LoRA adapter made of several, as PEFT's add_weighted_adapter does it.

    adapters: paths, or Adapters (refmerge.adapters). draws: for each adapter a mapping of `<module>.lora_A`, `.lora_B` or
    `.delta` to recorded 0/1 draws of the dare types. bugs: "0.21.2" or "0.20.1" repeats what is wrong in that release.
    Returns an Adapter.
    """
    adapters, weights = opened(adapters, "lora_merge"), list(weights)
    check(adapters, weights, combination_type, density, majority_sign_method, missing, bugs)
    check_svd(svd_rank, svd_clamp)
    saved_alike(adapters, "lora_merge")
    only_products(adapters, "lora_merge")
    # 1. one adapter
    combination = "linear" if len(adapters) == 1 else combination_type
    if missing == "error":
        same_modules(adapters, "lora_merge", "; missing='skip' (--missing skip) merges each of those that have it")
    modules = sorted({m for a in adapters for m in a.modules})
    if combination in BY_FACTORS:
        equal_ranks(adapters, modules, combination)
    default_rank = max(f.rank for a in adapters for f in a.modules.values())
    kind = combination.removesuffix("_svd")
    rule = partial(combined, kind, density=density, majority=majority_sign_method, seed=seed, draws=draws)
    merged = {}
    for module in modules:
        here = [n for n, a in enumerate(adapters) if module in a.modules]
        factors, w = [adapters[n].modules[module] for n in here], [weights[n] for n in here]
        fits(factors, module)
        if combination == "cat":
            # 2. concatenation
            A = np.concatenate([w_n * f.scaling * f.matrices()[1] for w_n, f in zip(w, factors)])
            B = np.concatenate([f.matrices()[0] for f in factors], axis=1)
        elif combination in BY_FACTORS:
            # 3. factor by factor
            c = [w_n * f.scaling for w_n, f in zip(w, factors)]
            roots = [math.sqrt(abs(c_n)) for c_n in c]
            signed = [s if c_n >= 0 else -s for s, c_n in zip(roots, c)]
            A = rule([f.matrices()[1] for f in factors], signed, f"{module}.lora_A", here)
            B = rule([f.matrices()[0] for f in factors], roots, f"{module}.lora_B", here)
        else:
            # 4. through the product
            if bugs == "0.20.1":
                w = [w_n * f.scaling for w_n, f in zip(w, factors)]
            r = default_rank if svd_rank is None else svd_rank
            if combination == "svd" and svd_clamp is None:  # never larger than the factors side by side
                left = [w_n * f.scaling * f.matrices()[0] for w_n, f in zip(map(float, np.float32(w)), factors)]
                U, S, Vt = factorised(np.hstack(left), np.vstack([f.matrices()[1] for f in factors]), module)
            else:
                D = rule([f.product() for f in factors], w, f"{module}.delta", here)
                U, S, Vt = np.linalg.svd(finite(D, module), full_matrices=False)
            B, A = U[:, :r] * S[:r], Vt[:r]
            if svd_clamp is not None:
                high = np.quantile(np.concatenate([B.ravel(), A.ravel()]), svd_clamp)
                B, A = (np.minimum(np.maximum(x, -high), high) for x in (B, A))
        # 5. scaling
        rslora = bugs is not None and adapters[0].modules.get(module, factors[0]).rslora
        merged[module] = factors_of(B, A, factors[0], dtype_of(*factors), alpha=float(len(A)), rslora=rslora)
    return adapters[0].with_modules(merged)


def combined(kind, xs, w, name, here, *, density, majority, seed, draws):
    """Arrays of the adapters `here`, made one by the rule, under the name that draws depend on."""
    if kind in ("linear", "svd"):
        return stacked_sum(weighted(xs, w))
    more = {"majority_sign_method": majority} if kind in ("ties", "dare_ties") else {}
    stats = [{"mask": draws[n][name]} for n in here] if draws is not None and kind in ("dare_linear", "dare_ties") else None
    return call(f"peft:{kind}", xs, name=name, seed=seed, stats=stats, weights=w, density=density, **more)


def check(adapters, weights, combination, density, majority, missing, bugs):
    """UsageError for what cannot be meant."""
    if len(weights) != len(adapters):
        raise UsageError(f"lora_merge: {len(weights)} weights for {len(adapters)} adapters")
    for key, value, choices in (
        ("combination_type", combination, ("cat", *BY_FACTORS, *BY_PRODUCT)),
        ("majority_sign_method", majority, ("total", "frequency")),
        ("missing", missing, ("error", "skip")),
        ("bugs", bugs, (None, "0.20.1", "0.21.2")),
    ):
        if value not in choices:
            raise UsageError(f"lora_merge: {key} = {value!r} is none of {', '.join(map(repr, choices))}")
    if combination not in ("linear", "cat", "svd") and len(adapters) > 1 and density is None:
        raise UsageError(f"lora_merge: {combination} needs density, the fraction of entries that stay")
    if len({bool(a.config.get("fan_in_fan_out")) for a in adapters}) > 1:
        raise InputError("lora_merge: fan_in_fan_out differs between the adapters: they are of different bases")


def check_svd(svd_rank, svd_clamp):
    """UsageError for a rank or a quantile that is none."""
    if svd_rank is not None and (type(svd_rank) is not int or svd_rank < 1):
        raise UsageError(f"lora_merge: svd_rank = {svd_rank!r} is no positive whole number")
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise UsageError(f"lora_merge: svd_clamp = {svd_clamp!r} is outside [0, 1]")


def equal_ranks(adapters, modules, combination):
    """InputError lists the modules whose factors cannot be added."""
    ranks = {m: [a.modules[m].rank for a in adapters if m in a.modules] for m in modules}
    if odd := [f"{m}: {r}" for m, r in ranks.items() if len(set(r)) > 1]:
        raise InputError(
            f"lora_merge: {combination} adds factors, which needs equal ranks; {listed(odd)}; cat and svd do not"
        )


def fits(factors, module):
    """InputError unless they are of modules of one shape."""
    shapes = {(f.A.shape[1:], f.B.shape[0], f.embedding) for f in factors}
    if len(shapes) > 1:
        some = "; ".join(f"A {list(f.A.shape)}, B {list(f.B.shape)}" for f in factors)
        raise InputError(f"module {module!r}: the adapters are of different layers: {some}")
