"""Which units of two networks compute the same, by the correlation of their activations: one to one, one to many, by sparse
prediction, and in clusters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure

__all__ = [
    "Moments", "Prediction", "UnitMatching", "convergent_matching", "loops", "moments", "one_to_one", "semi_matching",
    "sparse_prediction", "spectral_clusters",
]  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """What two networks' activations on the same samples say of each other, of n_a and n_b units.

    count: samples. mean_a, mean_b: of each unit. scatter_a, scatter_b: the units' sums of squared differences from their
    mean, 0 for a unit that is constant. scatter: n_a x n_b sums of the products of these differences.
    """

    count: int
    mean_a: np.ndarray
    mean_b: np.ndarray
    scatter_a: np.ndarray
    scatter_b: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """With the divisor count - 1; that of one sample is 0."""
        return self.scatter / max(self.count - 1, 1)

    @property
    def std_a(self) -> np.ndarray:
        return np.sqrt(self.scatter_a / max(self.count - 1, 1))

    @property
    def std_b(self) -> np.ndarray:
        return np.sqrt(self.scatter_b / max(self.count - 1, 1))

    @property
    def correlation(self) -> np.ndarray:
        """Pearson's; 0 where a unit is constant."""
        spread = np.sqrt(self.scatter_a)[:, None] * np.sqrt(self.scatter_b)
        return np.divide(self.scatter, spread, out=np.zeros_like(self.scatter), where=spread > 0)

    @property
    def inner(self) -> np.ndarray:
        """The mean of the products a b, uncentred."""
        return self.scatter / self.count + np.outer(self.mean_a, self.mean_b)

    @property
    def e_ab(self) -> np.ndarray:
        """The same with the covariance's divisor count - 1, as Git Re-Basin's scripts have it."""
        return self.covariance + np.outer(self.mean_a, self.mean_b)


@dataclass(frozen=True)
class Prediction:
    """b is predicted as a @ weights + bias. error: mean squared error of each unit of b. steps: sweeps that it took."""

    weights: np.ndarray
    bias: np.ndarray
    error: np.ndarray
    steps: int

    @property
    def used(self) -> np.ndarray:
        """How many units of a each unit of b is predicted from."""
        return np.count_nonzero(self.weights, axis=0)


@dataclass(frozen=True)
class UnitMatching:
    """match[i]: the unit of b that unit i of a is paired with, -1 where b has too few. semi[i]: the one it is most like,
    which others may have as well. value, semi_value: their sums of correlations. loops: the cycles of match, where both
    networks have as many units. clusters: of each unit of a, then of each of b, or None. prediction: or None."""

    correlation: np.ndarray
    match: np.ndarray
    semi: np.ndarray
    value: float
    semi_value: float
    loops: tuple[tuple[int, ...], ...] | None
    clusters: np.ndarray | None
    prediction: Prediction | None


@procedure("convergent_matching", paper="arXiv:1511.07543")
def convergent_matching(
    a: Any, b: Any = None, *, ignore_diagonal: bool = False, clusters: int | None = None, decay: float | None = None
) -> UnitMatching:
    """Match the units of two networks by how their activations correlate.

    a, b: activations on the same samples, arrays whose last axis is the units' and whose others are all samples; or lists of
    such arrays, batches. Without b the units of one network are matched among themselves.
    """
    a, b = _batches(a), None if b is None else _batches(b)
    # 1. correlation
    found = moments(a, a if b is None else b)
    C = found.correlation
    # 2. one-to-one
    match = one_to_one(C, ignore_diagonal=ignore_diagonal)
    # 3. semi-matching
    semi = semi_matching(C, ignore_diagonal=ignore_diagonal)
    # 4. clusters
    groups = None
    if clusters is not None:
        together = a if b is None else [np.concatenate(pair, axis=1) for pair in zip(a, b)]
        groups = spectral_clusters(moments(together, together).correlation, clusters)
    # 5. sparse prediction
    prediction = None if decay is None else sparse_prediction(a, a if b is None else b, decay)
    paired = np.flatnonzero(match >= 0)
    return UnitMatching(
        C,
        match,
        semi,
        float(C[paired, match[paired]].sum()),
        float(C[np.arange(len(C)), semi].sum()),
        loops(match) if C.shape[0] == C.shape[1] else None,
        groups,
        prediction,
    )


# ------------------------------------------------------------------------------------------------------------ activations


def _batches(x: Any) -> list[np.ndarray]:
    """Activations as float64 matrices, samples x units, one for each batch. UsageError for what has no samples or units."""
    given = list(x) if isinstance(x, list | tuple) and all(hasattr(part, "shape") for part in x) else [x]
    if not given or any(np.ndim(part) < 2 for part in given):
        raise UsageError("activations are an array of samples x units, or a list of such batches")
    batches = [scores(part) for part in given]
    batches = [part.reshape(-1, part.shape[-1]) for part in batches]
    if len({part.shape[1] for part in batches}) > 1:
        raise UsageError(
            f"activations: batches have {sorted({part.shape[1] for part in batches})} units: one network has one number"
        )
    if not sum(map(len, batches)):
        raise UsageError("activations: there is no sample")
    for part in batches:
        if not np.isfinite(part).all():
            raise InputError(
                f"activations: unit {int(np.argwhere(~np.isfinite(part))[0][1])} has a value that is not finite"
            )
    return batches


def moments(a: Any, b: Any) -> Moments:
    """The moments of two networks' activations, in two passes over their batches: means, then products of differences."""
    a, b = _batches(a), _batches(b)
    if [len(x) for x in a] != [len(x) for x in b]:
        raise UsageError(f"activations: {sum(map(len, a))} samples of a and {sum(map(len, b))} of b, or in other batches: "
                         "both networks see the same")  # fmt: skip
    count = sum(map(len, a))
    mean_a, constant_a = _means(a, count)
    mean_b, constant_b = _means(b, count)
    scatter_a, scatter_b, scatter = np.zeros(len(mean_a)), np.zeros(len(mean_b)), np.zeros((len(mean_a), len(mean_b)))
    for x, y in zip(a, b):
        x, y = np.where(constant_a, 0.0, x - mean_a), np.where(constant_b, 0.0, y - mean_b)
        scatter_a += (x * x).sum(axis=0)
        scatter_b += (y * y).sum(axis=0)
        scatter += x.T @ y
    return Moments(count, mean_a, mean_b, scatter_a, scatter_b, scatter)


def _means(batches: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the mean of each unit, whether it has but one value: then the mean is that value)."""
    first = batches[0][0] if len(batches[0]) else next(x[0] for x in batches if len(x))
    constant = np.all([(x == first).all(axis=0) for x in batches], axis=0)
    return np.where(constant, first, sum(x.sum(axis=0) for x in batches) / count), constant


# -------------------------------------------------------------------------------------------------------- matching of units


def one_to_one(C: np.ndarray, *, ignore_diagonal: bool = False) -> np.ndarray:
    """The assignment of rows to columns with the greatest sum of C, SciPy's where several have it: match[i] is the column of
    row i. Of more rows than columns some have -1. ignore_diagonal: no row gets the column of its own number."""
    C = _allowed(C, ignore_diagonal)
    rows, columns = linear_sum_assignment(C, maximize=True)
    match = np.full(len(C), -1)
    match[rows] = columns
    return match


def semi_matching(C: np.ndarray, *, ignore_diagonal: bool = False) -> np.ndarray:
    """For each row the column where C is largest, the first of equal ones; a column may be taken any number of times."""
    return np.argmax(_allowed(C, ignore_diagonal), axis=1)


def _allowed(C: np.ndarray, ignore_diagonal: bool) -> np.ndarray:
    C = np.array(C, dtype=np.float64)
    if C.ndim != 2 or not C.size:
        raise UsageError(f"a matching needs a matrix with rows and columns, not one of shape {list(C.shape)}")
    if not np.isfinite(C).all():
        i, j = np.argwhere(~np.isfinite(C))[0]
        raise InputError(f"the similarity of unit {i} and unit {j} is not finite")
    if ignore_diagonal:
        if C.shape[0] != C.shape[1]:
            raise UsageError(f"ignore_diagonal: {C.shape[0]} units and {C.shape[1]} are not the same units")
        if len(C) == 1:
            raise UsageError("ignore_diagonal: a single unit has no other to be matched with")
        np.fill_diagonal(C, -np.inf)
    return C


def loops(match: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The cycles of a permutation, each from its least unit on, by their least units."""
    found, seen = [], set[int]()
    for first in range(len(match)):
        if first not in seen:
            cycle, unit = [], first
            while unit not in seen:
                seen.add(unit)
                cycle.append(unit)
                unit = int(match[unit])
            found.append(tuple(cycle))
    return tuple(found)


# --------------------------------------------------------------------------------------------------------- sparse prediction


def sparse_prediction(a: Any, b: Any, decay: float, *, steps: int = 10_000, tolerance: float = 1e-12) -> Prediction:
    """Each unit of b as a weighted sum of few units of a: the least of mean squared error / 2 + decay * sum |weights|.

    Coordinate descent from 0, unit by unit of a, until no weight moves the prediction by more than `tolerance` of the
    largest deviation of a unit of b. A constant unit of a has the weight 0.
    """
    if not decay >= 0:
        raise UsageError(f"sparse_prediction: decay = {decay!r} is no number from 0 on")
    a, b = _batches(a), _batches(b)
    own, cross = moments(a, a), moments(a, b)
    G, c = own.scatter / own.count, cross.scatter / own.count
    variance, target = cross.scatter_b / own.count, np.sqrt(cross.scatter_b / own.count)
    W, largest, taken = np.zeros_like(c), np.max(target, initial=0.0), 0
    units = np.flatnonzero(np.diag(G) > 0)
    while taken < steps:
        moved, taken = 0.0, taken + 1
        for i in units:
            rho = c[i] - G[i] @ W + G[i, i] * W[i]
            w = np.sign(rho) * np.maximum(np.abs(rho) - decay, 0.0) / G[i, i] + 0.0  # no -0
            moved = max(moved, float(np.max(np.abs(w - W[i]), initial=0.0)) * float(np.sqrt(G[i, i])))
            W[i] = w
        if moved <= tolerance * largest:
            break
    error = np.maximum(variance - 2 * (W * c).sum(axis=0) + (W * (G @ W)).sum(axis=0), 0.0)
    return Prediction(W, cross.mean_b - own.mean_a @ W, error, taken)


# ------------------------------------------------------------------------------------------------------------------ clusters


def spectral_clusters(C: np.ndarray, clusters: int, *, steps: int = 300) -> np.ndarray:
    """Groups of units that are alike, by a symmetric matrix of likenesses: the cluster of each unit, numbered as they first
    come. Negative likenesses count as 0. A unit that is like none, not even itself, is in no cluster: -1."""
    S = np.maximum(_allowed(C, False), 0.0)
    if S.shape[0] != S.shape[1] or not np.allclose(S, S.T, rtol=1e-9, atol=1e-12):
        raise UsageError("spectral_clusters: the matrix is not symmetric: give the correlations of all units with all")
    degree = S.sum(axis=1)
    alive = np.flatnonzero(degree > 0)
    if type(clusters) is not int or not 1 <= clusters <= len(alive):
        raise UsageError(
            f"spectral_clusters: clusters = {clusters!r} is no whole number from 1 to {len(alive)}, the units there are"
        )
    scale = 1 / np.sqrt(degree[alive])
    # L u = lambda D u has the eigenvectors of I - D^-1/2 S D^-1/2, times D^-1/2
    _, vectors = np.linalg.eigh(np.eye(len(alive)) - scale[:, None] * S[np.ix_(alive, alive)] * scale)
    points = scale[:, None] * vectors[:, :clusters]
    labels = np.full(len(S), -1)
    labels[alive] = _in_order(_k_means(points, clusters, int(np.argmax(degree[alive])), steps))
    return labels


def _k_means(points: np.ndarray, clusters: int, first: int, steps: int) -> np.ndarray:
    """Lloyd's iteration; the centres start at point `first` and then at whatever point is furthest from all before."""
    centres = [points[first]]
    while len(centres) < clusters:
        centres.append(points[np.argmax(_nearest(points, centres).min(axis=1))])
    labels = np.argmin(_nearest(points, centres), axis=1)
    for _ in range(steps):
        centres = [points[labels == k].mean(axis=0) if np.any(labels == k) else centres[k] for k in range(clusters)]
        before, labels = labels, np.argmin(_nearest(points, centres), axis=1)
        if np.array_equal(before, labels):
            break
    return labels


def _nearest(points: np.ndarray, centres: Iterable[np.ndarray]) -> np.ndarray:
    """Squared distances of the points, as rows, from the centres."""
    return np.stack([((points - c) ** 2).sum(axis=1) for c in centres], axis=1)


def _in_order(labels: np.ndarray) -> np.ndarray:
    """The same clusters, numbered as they first come."""
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(int(k), len(numbers)) for k in labels])
