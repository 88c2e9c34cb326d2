import numpy as np

from refmerge.adapters import (
    Fit,
    chosen_rank,
    dtype_of,
    factors_of,
    finite,
    leading,
    only_products,
    opened,
    same_modules,
    saved_alike,
    split,
)
from refmerge.api import merge
from refmerge.errors import UsageError
from refmerge.procedure import procedure
from refmerge.procedures.adapters.lora_merge import fits as fits_together
from refmerge.registry import get


@procedure("delta_merge", paper="Eckart and Young, The approximation of one matrix by another of lower rank, 1936")
def delta_merge(
    adapters, method, *, parameters=None, rank=None, energy=None, scale="both", missing="error", over=None, seed=0
):
    """What a method makes of the changes that adapters make, as an adapter again, with scaling 1: (Adapter, module -> Fit).

    adapters: paths, or Adapters. method: a name, or a Method; of one with a base, the base is a change of 0.
    """
    adapters, method = opened(adapters, "delta_merge"), get(method) if isinstance(method, str) else method
    check(method, missing)
    only_products(adapters, "delta_merge")
    saved_alike(adapters, "delta_merge")
    if missing == "error":
        same_modules(adapters, "delta_merge", "; missing='zero' (--missing skip) takes them for changes of 0")
    modules = sorted({m for a in adapters for m in a.modules})
    over = over or method.over
    together = [[m] for m in modules] if over == "tensor" else [modules]
    made, fits = {}, {}
    for group in together:
        # 1. changes
        tau = [{f"{m}.weight": change(a, m, adapters) for m in group} for a in adapters]
        # 2. merge
        zero = {name: np.zeros_like(x) for name, x in tau[0].items()} if method.takes_base else None
        merged = merge(tau, method, base=zero, seed=seed, over=over, nonfinite="propagate", **(parameters or {}))
        for m in group:
            # 3. factors
            owner = next(a for a in adapters if m in a.modules)
            like, D = owner.modules[m], finite(merged[f"{m}.weight"], m)
            D = D.T if owner.turned(m) else D.reshape(len(D), -1)
            U, S, Vt = leading(D, rank)
            r = chosen_rank(S, rank, energy)
            dtype = dtype_of(*(a.modules[m] for a in adapters if m in a.modules))
            new = made[m] = factors_of(*split(U[:, :r], S[:r], Vt[:r], scale), like, dtype)
            # 4. error
            fits[m] = Fit(r, float(np.linalg.norm(D - new.product())), float(np.linalg.norm(D)))
    return adapters[0].with_modules(made), fits


def check(method, missing):
    """UsageError for what cannot be meant."""
    if missing not in ("error", "zero"):
        raise UsageError(f"delta_merge: missing = {missing!r} is none of 'error', 'zero'")
    if method.outputs or "stats" in method.asks:
        raise UsageError(
            f"delta_merge: {method.name} needs more than changes, or gives more than one: merge whole models by it"
        )


def change(adapter, module, adapters):
    """scaling * B A as the model stores it, in float64; 0 of an adapter that leaves the module as it is."""
    having = [a for a in adapters if module in a.modules]
    fits_together([a.modules[module] for a in having], module)
    return adapter.delta(module) if module in adapter.modules else np.zeros_like(having[0].delta(module))
