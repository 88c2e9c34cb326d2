from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from refmerge.adapters import (
    Adapter,
    dtype_of,
    factors_of,
    listed,
    only_products,
    read_adapter,
    same_modules,
    saved_alike,
)
from refmerge.checkpoint import FLOATS, promote
from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores, total, tree_sum
from refmerge.procedure import procedure
from refmerge.procedures.adapters.lora_merge import fits
from refmerge.sources import dtype_name, rounded

COUNTS = {"negate": (1, 1), "analogy": (3, 3), "detox": (2, 2)}


@procedure("pem", paper="arXiv:2306.14870")
def pem(
    modules,
    *,
    operation="add",
    kind="lora",
    on="factors",
    weights=None,
    scale=1.0,
    side="B",
    base=None,
    fisher=None,
    fisher_normalization=True,
    fisher_floor=1e-6,
    fisher_favor_target_model=True,
    leave=("head", "classifier"),
):
    """Add, negate or combine by analogy parameter-efficient modules of one base, without training.

    modules: Adapters or their paths, or mappings name -> array: LoRA factors, vectors of (IA)^3, or whole models. Returns
    the same kind.
    """
    given = [read_adapter(m) if isinstance(m, str | Path) else m for m in modules]
    check(given, operation, kind, on, side, base, fisher)
    if on == "product":
        return on_products(given, operation, weights, scale)
    models = [factors_by_name(m) if isinstance(m, Adapter) else m for m in given]
    names = same_names(models)
    c = coefficients(operation, weights, len(given))
    # 1. neutral element
    neutral = {"lora": lambda name: 0.0, "ia3": lambda name: 1.0, "full": lambda name: scores(base[name])}[kind]
    if base is not None and (odd := [name for name in names if name not in base]):
        raise InputError(f"pem: the base has no {listed(odd)}")
    F = None if fisher is None else fisher_of(fisher, names, fisher_normalization, fisher_floor, fisher_favor_target_model)
    result = {}
    for name in names:
        x, half = [scores(m[name]) for m in models], part_of(name) if kind == "lora" and operation != "add" else None
        if operation == "add" and "lora" not in name and any(part in name for part in leave):
            result[name] = models[-1][name]
            continue
        if not {dtype_name(m[name], name) for m in models} <= FLOATS:
            raise InputError(f"pem: tensor {name!r} holds whole numbers, which have no sum of shares; leave them out")
        if operation == "add":
            # 2. addition
            share = c if F is None else [c_n * F_n[name] for c_n, F_n in zip(c, F)]
            whole = 1.0 if F is None else total(share)
            if F is not None and not np.all(whole):
                raise InputError(f"pem: tensor {name!r}: no module has Fisher information somewhere; fisher_floor above 0")
            merged = total(s * x_n for s, x_n in zip(share, x)) / whole
        elif operation == "negate":
            # 3. negation
            zero = neutral(name)
            merged = x[0] if half is not None and half != side else zero - scale * (x[0] - zero)
        elif operation == "analogy":
            # 4. analogy
            sign = 1.0 if half == "A" else -1.0
            zero = neutral(name)
            merged = zero + c[0] * (x[0] - zero) + c[1] * (x[1] - zero) + sign * c[2] * (x[2] - zero)
        else:
            # 5. detoxification
            d = -x[1] if half == "A" else x[1]
            merged = c[0] * x[0] + c[1] * (c[0] * x[0] + d)
        result[name] = rounded(np.asarray(merged), promote({dtype_name(m[name], name) for m in models}))
    return as_given(given, result)


def check(given, operation, kind, on, side, base, fisher):
    """UsageError for what cannot be meant."""
    for key, value, choices in (
        ("operation", operation, ("add", "negate", "analogy", "detox")),
        ("kind", kind, ("lora", "ia3", "full")),
        ("on", on, ("factors", "product")),
        ("side", side, ("A", "B")),
    ):
        if value not in choices:
            raise UsageError(f"pem: {key} = {value!r} is none of {', '.join(map(repr, choices))}")
    least, most = COUNTS.get(operation, (1, len(given)))
    if not least <= len(given) <= most:
        raise UsageError(f"pem: {operation} takes {least} module{'s' if least > 1 else ''}, not {len(given)}")
    adapters = [isinstance(m, Adapter) for m in given]
    if any(adapters) != all(adapters) or not all(a or isinstance(m, Mapping) for a, m in zip(adapters, given)):
        raise UsageError("pem: modules are Adapters, or mappings name -> array, and not both")
    if (on == "product" and not all(adapters)) or (all(adapters) and kind != "lora"):
        raise UsageError("pem: Adapters are of kind 'lora', and only they have products")
    if operation == "detox" and kind != "lora":
        raise UsageError("pem: detox is published for LoRA alone; analogy and weights below zero are there for others")
    if (kind == "full") != (base is not None) and operation != "add":
        raise UsageError("pem: base is what whole models (kind='full') are compared with, and nothing else is")
    if fisher is not None and (operation != "add" or on != "factors" or len(fisher) != len(given)):
        raise UsageError("pem: fisher weighs the factors of an addition: one mapping for each module")
    if all(adapters):
        same_modules(given, "pem")
        saved_alike(given, "pem")
        only_products(given, "pem")


def factors_by_name(adapter):
    """`<module>.lora_A` and `.lora_B` -> array."""
    return {f"{m}.lora_{part}": getattr(f, part) for m, f in adapter.modules.items() for part in "AB"}


def same_names(models):
    """The names of all modules. InputError lists what does not match."""
    union = sorted({name for m in models for name in m})
    if odd := [name for name in union if any(name not in m for m in models)]:
        raise InputError(f"pem: not in all modules: {listed(odd)}")
    shapes = {name: [tuple(m[name].shape) for m in models] for name in union}
    if odd := [f"{name}: {', '.join(map(str, s))}" for name, s in shapes.items() if len(set(s)) > 1]:
        raise InputError(f"pem: factors are added only where their shapes, and so their ranks, are equal: {listed(odd)}")
    return union


def coefficients(operation, weights, count):
    """One for each module, which sum to 1; for an analogy c_0 and c_1 may stand for c_0, c_1, c_1. Those of detox are taken
    as they are."""
    if operation == "negate":
        if weights is not None:
            raise UsageError("pem: a negation has a scale and no weights")
        return None
    if operation == "analogy" and weights is None:
        weights = (1.0, 1.0)
    w = [float(x) for x in ([1.0] * count if weights is None else weights)]
    if operation == "detox":
        w = w if weights is not None else [1.0, -1.0]
    elif sum(w) == 0:
        raise UsageError("pem: the weights sum to 0 and cannot be normalised")
    else:
        w = [x / sum(w) for x in w]
    w = [*w, w[1]] if operation == "analogy" and len(w) == 2 else w
    if len(w) != count:
        raise UsageError(f"pem: {len(w)} weights for {count} modules")
    return w


def fisher_of(fisher, names, normalization, floor, favor_target_model):
    """Each module's Fisher information, at least `floor` (of the last alone, or of all), over its norm over all tensors,
    which is taken before."""
    F = []
    for n, f in enumerate(fisher):
        if odd := sorted({*names} ^ {*f}):
            raise InputError(f"pem: names of module {n} and of its fisher differ: {listed(odd)}")
        x = {name: scores(f[name]) for name in names}
        norm = float(np.sqrt(total(tree_sum(v * v) for v in x.values()))) if normalization else 1.0
        low = floor if n == len(fisher) - 1 or not favor_target_model else -np.inf
        F.append({name: np.maximum(v, low) / norm for name, v in x.items()})
    return F


def part_of(name):
    """Which factor a tensor is. InputError where it is none."""
    found = [part for part in "AB" if f"lora_{part}" in name or f"lora_embedding_{part}" in name]
    if len(found) != 1:
        raise InputError(f"pem: tensor {name!r} is no factor of LoRA: its name has neither lora_A nor lora_B in it")
    return found[0]


def as_given(given, result):
    """Adapters again, where adapters were given."""
    if not isinstance(given[0], Adapter):
        return result
    made = {}
    for module in given[0].modules:
        f = one_scaling(given, module)
        made[module] = replace(f, A=result[f"{module}.lora_A"], B=result[f"{module}.lora_B"])
    return given[0].with_modules(made)


def one_scaling(adapters, module):
    """The first adapter's factors. InputError where the scaling, which is beside the factors, differs."""
    factors = [a.modules[module] for a in adapters]
    if len({f.scaling for f in factors}) > 1:
        some = ", ".join(str(f.scaling) for f in factors)
        raise InputError(f"pem: module {module!r}: scalings {some} differ, and factors are added without them; on='product'")
    return factors[0]


def on_products(adapters, operation, weights, scale):
    """The same of the changes B A themselves, exactly: the factors side by side, so that ranks add up."""
    c = coefficients(operation, weights, len(adapters))
    if operation == "negate":
        c = [-scale]
    elif operation == "analogy":
        c = [c[0], c[1], -c[2]]
    merged = {}
    for module in same_modules(adapters, "pem"):
        factors = [a.modules[module] for a in adapters]
        fits(factors, module)
        A = np.concatenate([f.matrices()[1] for f in factors])
        B = np.concatenate([c_n * f.scaling * f.matrices()[0] for c_n, f in zip(c, factors)], axis=1)
        merged[module] = factors_of(B, A, factors[0], dtype_of(*factors))
    return adapters[0].with_modules(merged)


def cross_terms(adapters, weights=None):
    """Of an addition of factors, for each module its change as (own, crossed), scaling included: sum of c_n^2 B_n A_n, and
    the sum of c_i c_j B_i A_j over i != j, which is in no module."""
    c = coefficients("add", weights, len(adapters))
    terms = {}
    for module in same_modules(adapters, "pem"):
        s = one_scaling(adapters, module).scaling
        factors = [a.modules[module].matrices() for a in adapters]
        own = s * total(c_n**2 * (B @ A) for c_n, (B, A) in zip(c, factors))
        both = s * (total(c_n * B for c_n, (B, _) in zip(c, factors)) @ total(c_n * A for c_n, (_, A) in zip(c, factors)))
        terms[module] = own, both - own
    return terms
