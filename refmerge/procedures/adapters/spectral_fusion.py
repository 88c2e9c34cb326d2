from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refmerge.adapters import listed
from refmerge.checkpoint import open_checkpoint, promote
from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores, total
from refmerge.procedure import procedure
from refmerge.sources import dtype_name, rounded

PARTS = {"additive": ("spectral_A", "spectral_B", "spectral_C"), "shift": ("delta",)}
PARTS["rotation"] = PARTS["additive"]


@procedure("spectral_fusion", paper="arXiv:2405.13952")
def spectral_fusion(adapters, *, kind="additive", fuse="mean", at=None, alpha=1.0):
    """Weights that adapters of a base's singular vectors or values make together: a mapping `<module>.weight` -> array.

    adapters: mappings or paths of safetensors files, with `<module>.U`, `.S`, `.V` of the base's weight U diag(S) V^T, and
    what was trained: `.spectral_A`, `.spectral_B` and `.spectral_C`, or of kind shift `.delta`.
    """
    adapters = [open_checkpoint(a) if isinstance(a, str | Path) else a for a in adapters]
    check(adapters, kind, fuse, at, alpha)
    fused = {}
    for module in modules_of(adapters, kind):
        given = [part_of(a, module, kind, n) for n, a in enumerate(adapters)]
        # 1. columns
        r = 0 if kind == "shift" else given[0]["spectral_A"].shape[1]
        places = [n * r if at is None else at[n] for n in range(len(adapters))]
        inside(places, [g["spectral_A"].shape[1] if r else 0 for g in given], len(given[0]["S"]), module, fuse)
        if fuse == "mean":
            # 2. each by itself
            each = [product(*changed([g], [p], kind, alpha), kind) for g, p in zip(given, places)]
            # 3. mean
            W = (1.0 / len(each)) * total(each)
        else:
            # 4. all at once
            same_base(given, module)
            W = product(*changed(given, places, kind, alpha), kind)
        dtype = promote({dtype_name(a[f"{module}.U"], f"{module}.U") for a in adapters})
        fused[f"{module}.weight"] = rounded(np.ascontiguousarray(W), dtype)
    return fused


def check(adapters, kind, fuse, at, alpha):
    """UsageError for what cannot be meant."""
    for key, value, choices in (("kind", kind, ("additive", "rotation", "shift")), ("fuse", fuse, ("mean", "together"))):
        if value not in choices:
            raise UsageError(f"spectral_fusion: {key} = {value!r} is none of {', '.join(map(repr, choices))}")
    if not adapters or not all(isinstance(a, Mapping) for a in adapters):
        raise UsageError("spectral_fusion: adapters are paths or mappings name -> array, and at least one")
    if at is not None and (kind == "shift" or len(at) != len(adapters)):
        raise UsageError("spectral_fusion: at is the first column of each adapter, and a shift is of all columns")
    if kind == "rotation" and alpha != 1:
        raise UsageError(f"spectral_fusion: a rotation has no fraction: alpha is 1, not {alpha!r}")


def modules_of(adapters, kind):
    """The modules of all adapters. InputError lists tensors that are missing in one, and those that belong to none."""
    wanted = ("U", "S", "V", *PARTS[kind])
    union = sorted({name.removesuffix(".U") for a in adapters for name in a if name.endswith(".U")})
    names = {f"{module}.{part}" for module in union for part in wanted}
    for n, a in enumerate(adapters):
        if odd := sorted(names ^ set(a)):
            raise InputError(f"spectral_fusion: adapter {n}: {listed(odd)} are missing or belong to no module of this kind")
    return union


def part_of(adapter, module, kind, n):
    """The module's arrays in float64. InputError where their shapes do not fit."""
    x = {part: scores(adapter[f"{module}.{part}"]) for part in ("U", "S", "V", *PARTS[kind])}
    k = x["S"].size
    good = x["S"].ndim == 1 and x["U"].ndim == x["V"].ndim == 2 and x["U"].shape[1] == x["V"].shape[1] == k
    if kind == "shift":
        good = good and x["delta"].shape == (k,)
    elif good:
        r = x["spectral_C"].size
        square = kind == "rotation"
        tall = {"spectral_A": r if square else len(x["U"]), "spectral_B": r if square else len(x["V"])}
        good = x["spectral_C"].ndim == 1 and all(x[part].shape == (rows, r) for part, rows in tall.items())
    if not good:
        shapes = ", ".join(f"{part} {list(v.shape)}" for part, v in x.items())
        raise InputError(f"spectral_fusion: adapter {n}, module {module!r}: shapes do not fit: {shapes}")
    return x


def inside(places, ranks, columns, module, fuse):
    """InputError where columns do not exist, or two adapters that are fused at once want the same."""
    taken = [range(p, p + r) for p, r in zip(places, ranks)]
    if any(p < 0 or t.stop > columns for p, t in zip(places, taken)):
        raise InputError(
            f"spectral_fusion: module {module!r} has {columns} columns, and {places} + {ranks} are not among them"
        )
    if fuse == "together" and sum(map(len, taken)) > len({c for t in taken for c in t}):
        raise InputError(
            f"spectral_fusion: module {module!r}: adapters that are fused together share columns; at says others"
        )


def same_base(given, module):
    """InputError unless U, S and V are those of one base: other signs of singular vectors are other coordinates."""
    if any(not np.array_equal(g[part], given[0][part]) for g in given for part in "USV"):
        raise InputError(
            f"spectral_fusion: module {module!r}: U, S and V differ between the adapters; fuse='mean' allows that"
        )


def changed(given, places, kind, alpha):
    """U, S and V with every adapter in its own columns."""
    U, S, V = (given[0][part].copy() for part in "USV")
    for g, p in zip(given, places):
        if kind == "shift":
            S += alpha * g["delta"]
            continue
        at = slice(p, p + g["spectral_C"].size)
        if kind == "additive":
            U[:, at] += alpha * g["spectral_A"]
            S[at] += alpha * g["spectral_C"]
            V[:, at] += alpha * g["spectral_B"]
        else:
            U[:, at] = U[:, at] @ cayley(g["spectral_A"])
            S[at] = S[at] * g["spectral_C"]
            V[:, at] = V[:, at] @ cayley(g["spectral_B"])
    return U, S, V


def product(U, S, V, kind):
    """U diag(S) V^T, a shifted S not below 0."""
    return (U * (np.maximum(S, 0.0) if kind == "shift" else S)) @ V.T


def cayley(X):
    """(I - K) (I + K)^-1 with K = (X - X^T) / 2: a rotation, whatever X is."""
    K = 0.5 * (X - X.T)
    eye = np.eye(len(X))
    return np.linalg.solve((eye + K).T, (eye - K).T).T
