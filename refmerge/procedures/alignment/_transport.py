"""Optimal transport between the units of two layers, in float64: what it costs, and the plan."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from refmerge.errors import UsageError

METRICS = ("euclidean", "cosine")
SCALES = ("none", "log", "max", "mean", "median")


def ground_cost(x, y, *, metric="euclidean", squared=False, unit_rows=False, divide=1.0, normalize="none", clip=None):
    """M: what it costs to match each row of x with each row of y.

    metric: "euclidean", of which `squared` is the square, or "cosine", 1 minus the cosine; a row of zeros is at right angles
    to all. unit_rows: rows are divided by their lengths before. divide: a number that squared distances are divided by.
    normalize: M becomes log(1 + M), or is divided by its max, mean or (lower) median where that is not 0. clip: (low, high)
    that it is then held within.
    """
    for key, value, choices in (("metric", metric, METRICS), ("normalize", normalize, SCALES)):
        if value not in choices:
            raise UsageError(f"otfusion: {key} = {value!r} is none of {', '.join(map(repr, choices))}")
    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    if x.ndim != 2 or x.shape[1:] != y.shape[1:]:
        raise UsageError(f"otfusion: rows of {list(x.shape)} and {list(y.shape)} are not as long: are samples the same?")
    if unit_rows:
        x, y = (a / (np.linalg.norm(a, axis=1, keepdims=True) + 1e-9) for a in (x, y))
    if metric == "cosine":
        lengths = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
        M = np.maximum(1 - (x @ y.T) / np.where(lengths > 0, lengths, 1.0), 0.0)
    else:
        M = cdist(x, y, "sqeuclidean") / divide
        M = M if squared else np.sqrt(M)
    if normalize == "log":
        M = np.log1p(M)
    elif normalize != "none" and M.size:
        scale = {"max": M.max, "mean": M.mean, "median": lambda: np.sort(M, axis=None)[(M.size - 1) // 2]}[normalize]()
        M = M / scale if scale else M
    return M if clip is None else np.clip(M, *clip)


def exact_plan(mu, nu, M):
    """A plan T >= 0 of least cost <T, M> whose rows sum to mu and whose columns sum to nu.

    Equal masses whose numbers divide each other are an assignment (SciPy's; of equal optima the one that it finds), others a
    linear program (SciPy's HiGHS, dual simplex).
    """
    mu, nu, M = _problem(mu, nu, M)
    n0, n1 = M.shape
    most = max(n0, n1)
    if np.ptp(mu) == np.ptp(nu) == 0 and most % min(n0, n1) == 0:
        i, j = linear_sum_assignment(np.repeat(np.repeat(M, most // n0, axis=0), most // n1, axis=1))
        T = np.zeros((n0, n1))
        np.add.at(T, (i * n0 // most, j * n1 // most), min(mu[0], nu[0]))
        return T
    i, j = np.indices(M.shape).reshape(2, -1)
    places = np.tile(np.arange(M.size), 2)
    sums = csr_array((np.ones(2 * M.size), (np.concatenate([i, n0 + j]), places)))[:-1]  # the last one follows from the rest
    scale = np.max(np.abs(M), initial=0.0) or 1.0
    found = linprog(
        M.reshape(-1) / scale,
        A_eq=sums,
        b_eq=np.concatenate([mu, nu])[:-1],
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if found.x is None:
        raise UsageError(f"otfusion: no plan was found: {found.message}")
    return np.maximum(found.x.reshape(n0, n1), 0.0)


def sinkhorn_plan(mu, nu, M, *, reg=0.01, iterations=1000, tolerance=1e-9, kernel="log"):
    """The plan of least <T, M> + reg sum T log T, by Sinkhorn's iteration in the logarithms.

    It begins with equal scales, and sets the columns' sums, then the rows'. After the first step and every tenth one more it
    stops if the columns' sums are closer to nu than `tolerance`, as a vector. kernel: "float32" iterates on exp(-M / reg)
    itself in float32, as the authors' code does: where that is 0 the plan is wrong, or of another sum than 1.
    """
    if kernel not in ("log", "float32"):
        raise UsageError(f"otfusion: kernel = {kernel!r} is none of 'log', 'float32'")
    if not reg > 0 or iterations < 1:
        raise UsageError(f"otfusion: reg = {reg!r} is above 0 and iterations = {iterations!r} at least 1")
    mu, nu, M = _problem(mu, nu, M)
    if kernel == "float32":
        return _scaled(mu, nu, np.exp(M.astype(np.float32) / -reg), iterations, tolerance)
    K = -M / reg
    f = np.full(len(mu), -np.log(len(mu)))
    for step in range(iterations):
        g = np.log(nu) - _log_sum(K + f[:, None], 0)
        f = np.log(mu) - _log_sum(K + g, 1)
        if step % 10 == 0 and np.linalg.norm(np.exp(K + f[:, None] + g).sum(axis=0) - nu) < tolerance:
            break
    return np.exp(K + f[:, None] + g)


def _scaled(mu, nu, K, iterations, tolerance):
    """diag(u) K diag(v), the iteration given up at the step before a division by 0."""
    u, v = (np.full(n, np.float32(1 / n)) for n in K.shape)
    rows = (1 / mu)[:, None] * K
    with np.errstate(all="ignore"):
        for step in range(iterations):
            before = u, v
            sums = K.T @ u
            v = nu / sums
            u = 1 / (rows @ v)
            if not (sums.all() and np.isfinite(u).all() and np.isfinite(v).all()):
                u, v = before
                break
            if step % 10 == 0 and np.linalg.norm(u @ K * v - nu) < tolerance:
                break
    return u[:, None] * K * v


def _log_sum(x, axis):
    most = x.max(axis=axis, keepdims=True)
    return np.squeeze(most, axis) + np.log(np.exp(x - most).sum(axis=axis))


def _problem(mu, nu, M):
    """The arrays in float64. UsageError unless they are a transport problem."""
    mu, nu, M = (np.asarray(x, dtype=np.float64) for x in (mu, nu, M))
    if M.shape != (len(mu), len(nu)) or M.size == 0:
        raise UsageError(f"otfusion: a cost of shape {list(M.shape)} for {len(mu)} and {len(nu)} masses")
    if not np.isfinite(M).all():
        raise UsageError("otfusion: a cost that is NaN or infinite: no option allows it")
    if not (np.min(mu) > 0 and np.min(nu) > 0 and np.isclose(mu.sum(), nu.sum(), rtol=1e-9, atol=0)):
        raise UsageError(f"otfusion: masses are above 0 and have one sum, these have {mu.sum():.9g} and {nu.sum():.9g}")
    return mu, nu, M
