import re
from collections.abc import Mapping, Sequence

import numpy as np

from refmerge.api import merge
from refmerge.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, same_or_inside
from refmerge.checkpoint.dtypes import DTYPES
from refmerge.errors import InputError, UsageError
from refmerge.method import Method
from refmerge.methods.subspaces.low_rank_residual import decomposed, finite
from refmerge.methods.subspaces.wudi import significant
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.registry import get
from refmerge.sources import dtype_name, stored_bytes

FACTOR = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_([AB])(?:\.default)?(\.weight)?")


@procedure("core_space", paper="arXiv:2509.17786")
def core_space(
    adapters,
    base,
    out=None,
    *,
    method: str | Method = "task_arithmetic",
    isotropize: bool = False,
    lambda_: float = 1.0,
    scaling: float | Sequence[float] = 1.0,
    over: str = "tensor",
    stats=None,
    seed: int = 0,
    overwrite: bool = False,
    **params,
):
    """Merge LoRA adapters as small matrices in the space that their factors span, by any method, and add the result to the
    base: a mapping name -> NumPy array, or the checkpoint at `out`.

    adapters: paths, open checkpoints or mappings that hold `<layer>.lora_A` (r x n) and `<layer>.lora_B` (m x r), of any
    ranks, named as PEFT names them or with the base's own names. base: a path, an open checkpoint or a mapping. method and
    params: what merges the cores; stats, over and seed are for it.
    """
    base = base if isinstance(base, Mapping) else open_checkpoint(base)
    opened = [x if isinstance(x, Mapping) else open_checkpoint(x) for x in adapters]
    ours = method if isinstance(method, Method) else get(method)
    scaling = scaling if isinstance(scaling, Sequence) else [scaling] * len(opened)
    if not opened or len(scaling) != len(opened):
        raise UsageError(f"core_space: {len(scaling)} values of scaling for {len(opened)} adapters; it needs one for each")
    factors = [factors_of(adapter, base, t) for t, adapter in enumerate(opened)]
    layers = sorted({name for f in factors for name in f})
    # 1. bases
    U = {name: basis([f[name][1] for f in factors if name in f]) for name in layers}
    V = {name: basis([f[name][0].T for f in factors if name in f]) for name in layers}
    # 2. cores
    cores = [
        {name: c * core(f.get(name), U[name], V[name]) for name in layers} for c, f in zip(scaling, factors)
    ]
    # 3. merge
    zeros = {name: np.zeros_like(cores[0][name]) for name in layers} if ours.takes_base else None
    merged = merge(cores, ours, base=zeros, over=over, stats=stats, seed=seed, **params)
    # 4. isotropize
    if isotropize:
        merged = {name: isotropic(M) for name, M in merged.items()}
    # 5. turn back, and add
    delta = {name: lambda_ * (U[name] @ merged[name] @ V[name].T) for name in layers}
    return written(out, base, lambda name: added(base[name], delta.get(name), name), [base, *opened], overwrite)


def written(out, base, made, inputs, overwrite):
    """made(name) for all tensors of the base: a mapping, or, written one by one, the checkpoint at `out`."""
    if out is None:
        return {name: made(name) for name in base}
    for path in (c.path for c in inputs if isinstance(c, Checkpoint)):
        if same_or_inside(out, path):
            raise UsageError(f"output {str(out)!r} lies in an input, {str(path)!r}: inputs are never written to")
    specs = {name: (dtype_name(base[name], name), tuple(base[name].shape)) for name in base}
    with CheckpointWriter(out, specs, overwrite=overwrite) as writer:
        for name in specs:
            writer.write(name, 0, made(name).reshape(-1).view(np.uint8))
    return open_checkpoint(out)


def factors_of(adapter, base, t):
    """Tensor of the base -> (A, B) in float64. InputError for what is no pair of factors that fits it."""
    found = {}
    for key in sorted(adapter):
        named = FACTOR.fullmatch(key)
        if named is None:
            raise InputError(f"adapter {t}: {key!r} is no factor of LoRA (lora_A or lora_B); nothing else is merged")
        layer = named[1] if named[1] in base else f"{named[1]}.weight"
        if layer not in base:
            raise InputError(f"adapter {t}: {key!r} belongs to {layer!r}, which the base does not have")
        found.setdefault(layer, {})[named[2]] = finite(scores(adapter[key]), key)
    for layer, pair in found.items():
        shapes = [tuple(x.shape) for _, x in sorted(pair.items())]
        m_n = tuple(base[layer].shape)
        if len(shapes) != 2 or len(m_n) != 2 or shapes != [(shapes[0][0], m_n[1]), (m_n[0], shapes[0][0])]:
            raise InputError(
                f"adapter {t}: the factors of {layer!r} have shapes {', '.join(map(str, map(list, shapes)))}, which do not "
                f"make its {list(m_n)}: A is r x n, and B m x r"
            )
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def basis(factors):
    """The left singular vectors of matrices side by side."""
    return decomposed(np.concatenate(factors, axis=1))[0]


def core(factors, U, V):
    """U^T B A V; zeros for an adapter without this layer."""
    if factors is None:
        return np.zeros((U.shape[1], V.shape[1]))
    A, B = factors
    return (U.T @ B) @ (A @ V)


def isotropic(M):
    """All singular values that are not 0 become their mean."""
    U, S, V = significant(*decomposed(M))
    return (U * (np.sum(S) / max(len(S), 1))) @ V.T


def added(x, delta, name):
    """theta_0 + delta in float64, rounded once to the base's dtype."""
    dtype = dtype_name(x, name)
    if delta is None:
        return stored_bytes(x, dtype).view(DTYPES[dtype]).reshape(x.shape)
    return stored_bytes(scores(x) + delta, dtype).view(DTYPES[dtype]).reshape(x.shape)
