import re
from collections.abc import Mapping

import numpy as np

from refmerge.api import call, prepare
from refmerge.checkpoint import open_checkpoint
from refmerge.checkpoint.dtypes import DTYPES
from refmerge.errors import InputError, UsageError
from refmerge.matrices import decomposed
from refmerge.methods.subspaces.low_rank_residual import finite
from refmerge.methods.subspaces.wudi import significant
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.sources import dtype_name, stored_bytes


@procedure("esm", paper="arXiv:2602.20208")
def esm(models, base, inputs, *, others="tsvm", variant="vision", lambda_=1.0, tolerance=1e-5):
    """Essential Subspace Merging: each task keeps the directions in which it moves its layers' outputs most, seen on a few
    inputs; they are made orthonormal together, and what is strong is made stronger. Returns a mapping name -> NumPy array.

    models, base: paths, open checkpoints or mappings. inputs: for each model a mapping, matrix's name -> inputs of its layer
    in that model, in rows. others: what merges matrices without inputs. tolerance: singular values up to this times the
    largest count as zero.
    """
    models, base = [opened(m) for m in models], opened(base)
    plan = prepare(models, "task_arithmetic", base=base)
    if not 0 <= tolerance < 1:
        raise UsageError(f"esm: tolerance = {tolerance} is not in [0, 1)")
    seen = checked(inputs, base, len(models), variant)
    D = {}
    for tensor in plan.work.tensors:
        name, T = tensor.name, len(models)
        # 1. task vectors
        tau = [finite(scores(m[name]) - scores(base[name]), name) for m in models]
        if name in seen:
            # 2. essential directions
            k = max(1, tau[0].shape[0] // T)
            U, e = zip(*(essential(finite(scores(X[name]), name), tau_t, k, tolerance) for X, tau_t in zip(inputs, tau)))
            V = [U_t.T @ tau_t for U_t, tau_t in zip(U, tau)]
            # 3. scale tasks and inputs
            left, right = np.hstack([U_t * e_t for U_t, e_t in zip(U, e)]), [e_t[:, None] * V_t for e_t, V_t in zip(e, V)]
            if variant == "vision":
                right = polarised(right, [np.linalg.norm(tau_t) for tau_t in tau])
            # 4. make orthonormal
            P, Q = orthonormal(left, tolerance), orthonormal(np.vstack(right), tolerance)
            D[name] = (2.0 if variant == "vision" else 1.0) * P @ Q
        elif tau[0].ndim == 2:
            # 5. matrices without inputs
            D[name] = call(others, tau, np.zeros_like(tau[0]), name=name)
        else:
            # 6. all else
            D[name] = sum(tau) / T
    # 7. scale layers
    D = layered(D)
    # 8. add
    merged = {name: added(base[name], lambda_ * D[name], name) for name in D}
    return {name: merged[name] if name in merged else np.asarray(base[name]) for name in base}


def opened(model):
    return model if isinstance(model, Mapping) else open_checkpoint(model)


def checked(inputs, base, count, variant):
    """The matrices that have inputs. UsageError and InputError for what does not fit."""
    if variant not in ("vision", "language"):
        raise UsageError(f"esm: variant = {variant!r} is none of 'vision', 'language'")
    if len(inputs) != count:
        raise UsageError(f"esm: inputs of {len(inputs)} models for {count} models")
    if odd := sorted(set().union(*inputs).symmetric_difference(set(inputs[0]).intersection(*inputs))):
        raise InputError(f"esm: not all models have inputs for tensor {odd[0]!r}")
    for name in inputs[0]:
        if name not in base or len(base[name].shape) != 2:
            raise InputError(f"esm: inputs are given for {name!r}, which is no matrix of the base")
        for t, X in enumerate(inputs):
            if X[name].ndim != 2 or X[name].shape[1] != base[name].shape[1]:
                raise InputError(
                    f"esm: the inputs of model {t} for {name!r} have shape {list(X[name].shape)}; its layer takes rows of "
                    f"{base[name].shape[1]}"
                )
    return set(inputs[0])


def essential(X, tau, k, tolerance=1e-5):
    """The first k principal directions of what tau makes of the inputs, and a factor for each: the eigenvalue over the mean
    of the k, to the power 0.15, and over the mean of these. A direction in which nothing moves has 0."""
    _, S, V = significant(*decomposed(X @ tau.T), tolerance)
    e = np.zeros(k)
    e[: len(S)] = S[:k] ** 2
    e = (e * k / np.sum(e)) ** 0.15 if len(S) else e
    U = np.zeros((len(tau), k))
    U[:, : len(S)] = V[:, :k]
    return U, e / np.mean(e) if len(S) else e


def polarised(right, norms):
    """Each task times the square of its length over the mean length, and then each column likewise."""
    mean = np.mean(norms) or 1.0
    right = [(norm / mean) ** 2 * V for norm, V in zip(norms, right)]
    columns = np.linalg.norm(np.vstack(right), axis=0)
    return [(columns / (np.mean(columns) or 1.0)) ** 2 * V for V in right]


def orthonormal(X, tolerance):
    """The nearest matrix with orthonormal rows or columns, times the mean of X's singular values; 0 in directions in which X
    is 0."""
    U, S, V = significant(*decomposed(X), tolerance)
    return (np.sum(S) / max(min(X.shape), 1)) * (U @ V.T)


def layered(D):
    """Matrices whose names differ in numbers alone are of one kind: each times the square of its length over the kind's mean
    length."""
    lengths = {name: float(np.linalg.norm(x)) for name, x in D.items() if x.ndim == 2}
    kinds = {}
    for name in lengths:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(lengths[name])
    means = {name: np.mean(kinds[re.sub(r"\d+", "#", name)]) for name in lengths}
    return {name: (lengths[name] / (means[name] or 1.0)) ** 2 * x if name in lengths else x for name, x in D.items()}


def added(x, delta, name):
    """theta_0 + delta in float64, rounded once to the base's dtype."""
    dtype = dtype_name(x, name)
    return stored_bytes(scores(x) + delta, dtype).view(DTYPES[dtype]).reshape(x.shape)
