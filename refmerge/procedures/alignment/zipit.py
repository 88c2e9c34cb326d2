"""ZipIt!: a feature space that models share, made by merging correlated features of one model or of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp

from refmerge.checkpoint import FLOATS
from refmerge.checkpoint.dtypes import DTYPES
from refmerge.errors import UsageError
from refmerge.numeric import host, scores
from refmerge.procedure import procedure
from refmerge.sources import dtype_name, stored_bytes
from refmerge.symmetry import Block, Spec
from refmerge.symmetry.axes import names as permutations_of

__all__ = [
    "Zipped", "average_matrix", "by_unit", "correlation", "covariances", "identity_features", "optimal_features",
    "permute_features", "through", "with_constant", "zip_features", "zipit",
]  # fmt: skip

Semantics = Literal["paper", "official"]


@dataclass(frozen=True)
class Zipped:
    """merged: the tensors that all models share. heads: each model's own, behind the last zipped layer, or empty;
    `merged | heads[k]` is a model for the task of model k. merge, unmerge: permutation -> M_k and U_k of each model."""

    merged: dict[str, np.ndarray]
    heads: tuple[dict[str, np.ndarray], ...]
    merge: dict[str, tuple[np.ndarray, ...]]
    unmerge: dict[str, tuple[np.ndarray, ...]]


@procedure("zipit", paper="arXiv:2305.03053")
def zipit(
    models: Sequence[Mapping[str, Any]],
    spec: Spec,
    covariance: Mapping[str, Any],
    *,
    alpha: float = 0.3,
    beta: float = 0.125,
    match: Literal["zip", "permute", "identity", "optimal"] = "zip",
    keep: int | Mapping[str, int] | None = None,
    multihead: bool = False,
    transposed: Sequence[str] = (),
    semantics: Semantics = "paper",
) -> Zipped:
    """Merge models of one architecture by features that are alike, in one model or in several.

    models: checkpoints, open or mappings name -> array. covariance: permutation of the spec -> covariance of the features of
    all models, the first model's first, as `covariances` makes it. Only these permutations are zipped: layers behind them
    stay each model's own, in `heads`.
    """
    if match not in MATCHES:
        raise UsageError(f"zipit: match = {match!r} is none of {', '.join(map(repr, MATCHES))}")
    if semantics not in ("paper", "official"):
        raise UsageError(f"zipit: semantics = {semantics!r} is none of 'paper', 'official'")
    if keep is not None and match != "zip":
        raise UsageError(f"zipit: keep goes with match = 'zip': {match!r} has as many features as one model")
    sizes = shared_sizes(models, spec, covariance)
    merge, unmerge = {}, {}
    for name, sigma in covariance.items():
        if np.shape(sigma) != (len(models) * sizes[name],) * 2:
            raise UsageError(
                f"zipit: covariance {name!r} is of shape {list(np.shape(sigma))}: {len(models)} models of {sizes[name]} "
                f"units have {len(models) * sizes[name]} features"
            )
        # 1. correlation
        S = correlation(sigma, semantics=semantics)
        # 2. zip
        if match == "zip":
            few = keep.get(name) if isinstance(keep, Mapping) else keep
            U = zip_features(S, len(models), alpha=alpha, beta=beta, keep=few, semantics=semantics)
        else:
            U = MATCHES[match](S, len(models))
        # 3. merge and unmerge matrices
        M = average_matrix(U, semantics=semantics)
        merge[name] = tuple(np.split(M, len(models), axis=1))
        unmerge[name] = tuple(np.split(U, len(models), axis=0))
    # 4. weights
    merged, heads = through(models, spec, merge, unmerge, multihead=multihead, transposed=transposed)
    return Zipped(merged, heads, merge, unmerge)


# ------------------------------------------------------------------------------------------------------------ statistics


def by_unit(features: Mapping[str, Any], name: str) -> np.ndarray:
    """The activations of that name as a float64 matrix: a row for each sample and place, a column for each unit, which are
    the last axis. UsageError where there are none, or they are not finite."""
    if name not in features:
        raise UsageError(f"there are no activations of {name!r}, but of {', '.join(features) or 'nothing'}")
    x = scores(features[name])
    if not np.isfinite(x).all():
        raise UsageError(f"activations of {name!r} are infinite or NaN and have no statistics")
    return x.reshape(-1, x.shape[-1])


def covariances(batches: Iterable[Sequence[Mapping[str, Any]]], names: Iterable[str]) -> dict[str, np.ndarray]:
    """name -> covariance of the features of all models, the first model's first: in a batch a mapping name -> activations
    for each model, all of the same samples. Every sample and place counts alike, whatever the batches."""
    names = tuple(names)
    count, mean, outer = dict.fromkeys(names, 0), {}, {}
    for batch in batches:
        for name in names:
            X = np.concatenate([by_unit(features, name) for features in batch], axis=1)
            if len(X):
                m = np.where((X[0] == X).all(axis=0), X[0], X.mean(axis=0))  # of equal numbers the mean is rounded
                if not count[name]:
                    mean[name], outer[name] = np.zeros_like(m), np.zeros((m.size, m.size))
                n = count[name] + len(X)
                Y, d = X - m, m - mean[name]
                outer[name] += Y.T @ Y + np.outer(d, d) * (count[name] * len(X) / n)
                mean[name] = mean[name] + d * (len(X) / n)
                count[name] = n
    if not all(count.values()):
        raise UsageError("zipit: there are no samples")
    return {name: outer[name] / count[name] for name in names}


def correlation(covariance: Any, *, semantics: Semantics = "paper") -> np.ndarray:
    """Covariance over the product of the standard deviations, and 0 where one of them is 0."""
    sigma = scores(covariance)
    if not np.isfinite(sigma).all() or (np.diag(sigma) < 0).any():
        raise UsageError("zipit: a covariance is finite and has no negative variances")
    std = np.sqrt(np.diag(sigma))
    if semantics == "official":
        return sigma / np.maximum(np.outer(std, std), 1e-7)
    dead = std == 0
    std = np.where(dead, 1.0, std)
    return np.where(dead[:, None] | dead, 0.0, sigma / std[:, None] / std)


# -------------------------------------------------------------------------------------------------------------- matching


def zip_features(
    S: Any, count: int, *, alpha: float = 0.3, beta: float = 0.125, keep: int | None = None, semantics: Semantics = "paper"
) -> np.ndarray:
    """U: a row for each feature of the `count` models, a column for each merged feature, 1 where it is a member.

    S: similarities of the features, the first model's first; what is on the diagonal does not matter. keep: how many merged
    features there are to be, as many as one model has if not given.
    """
    if not 0 <= beta <= 1 or (not 0 <= alpha <= 1 and semantics == "paper"):
        raise UsageError(f"zipit: alpha and beta lie in [0, 1], not {alpha} and {beta}")
    S = scores(S).copy()
    if np.isnan(S).any():
        raise UsageError("zipit: a similarity is NaN")
    if len(S) % count:
        raise UsageError(f"zipit: {len(S)} features are not those of {count} models of one width")
    n = len(S) // count
    few = n if keep is None else keep
    if type(few) is not int or not 1 <= few <= len(S):
        raise UsageError(f"zipit: keep = {keep!r} is no whole number from 1 to the {len(S)} features that there are")
    owner = np.repeat(np.arange(count), n)
    kept = np.ones(len(S), bool)
    U = np.eye(len(S))
    budget = np.full(count, int((len(S) - few) // count * beta + 1e-4))
    if semantics == "official":
        budget = np.maximum(budget, 1)  # it is looked at after a merge only
    apart = ~np.eye(len(S), dtype=bool)  # pairs of features that are still two
    barred = within(owner, budget <= 0)
    for _ in range(len(S) - few):
        # the pair that is most alike, of equal ones the first; a barred one only where no other is left
        pairs = apart & ~barred
        if not pairs.any() and semantics == "paper":
            pairs = apart
        r, c = sorted(divmod(int(np.argmax(np.where(pairs, S, -np.inf))), len(S)))
        if not pairs.any():
            r = c = int(np.argmax(kept))  # the authors' code takes the first feature for a pair, and loses it
        # becomes one feature, as like another as the less like of its two, times alpha
        U[:, r] += U[:, c]
        for T, bars in ((S, barred), (S.T, barred.T)):
            T[r] = np.minimum(T[r], T[c]) * (1.0 if alpha <= 0 and semantics == "official" else alpha)
            bars[r] |= bars[c]
        if alpha <= 0 and semantics == "official":
            rows, columns = official_bars(np.flatnonzero(kept), owner, r, c, n)
            barred[rows, r] = barred[r, columns] = True
        apart[c, :] = apart[:, c] = kept[c] = False
        # and merges inside of a model are counted
        if owner[r] == owner[c]:
            budget[owner[r]] -= 1
            barred |= within(owner, budget <= 0)
    return U[:, kept]


def within(owner: np.ndarray, spent: np.ndarray) -> np.ndarray:
    """The pairs of features of one model, of the models whose budget is spent."""
    return (owner[:, None] == owner) & spent[owner]


def official_bars(living: np.ndarray, owner: np.ndarray, r: int, c: int, n: int) -> list[np.ndarray]:
    """What the authors' code bars from a merged feature for alpha <= 0: the places that its two models had in the beginning,
    in a matrix that rows, and then columns, have left since."""
    ranges = [slice(owner[i] * n, (owner[i] + 1) * n) for i in (r, c)]
    return [np.concatenate([x[s] for s in ranges]) for x in (living, living[living != c])]


def permute_features(S: Any, count: int) -> np.ndarray:
    """U that merges each feature of the first model with one of each other model, so that similarities sum to the most."""
    n = len(S) // count
    chosen = [linear_sum_assignment(scores(S)[:n, k * n : (k + 1) * n], maximize=True)[1] for k in range(1, count)]
    return np.concatenate([np.eye(n)] + [np.eye(n)[p].T for p in chosen])


def identity_features(S: Any, count: int) -> np.ndarray:
    """U that merges features of the same place: the average of the models."""
    return np.concatenate([np.eye(len(S) // count)] * count)


def optimal_features(S: Any, count: int) -> np.ndarray:
    """U of two models that merges features in pairs, inside of a model or across, so that similarities sum to the most."""
    S = scores(S)
    if count != 2:
        raise UsageError(f"zipit: match = 'optimal' makes pairs: of two models, not of {count}")
    first, second = np.triu_indices(len(S), 1)
    ends = np.zeros((len(S), len(first)))
    ends[first, np.arange(len(first))] = ends[second, np.arange(len(first))] = 1
    found = milp(
        -S[first, second], constraints=LinearConstraint(ends, 1, 1), integrality=np.ones(len(first)), bounds=Bounds(0, 1)
    )
    return ends[:, found.x > 0.5]


MATCHES = {"zip": zip_features, "permute": permute_features, "identity": identity_features, "optimal": optimal_features}


def average_matrix(U: np.ndarray, *, semantics: Semantics = "paper") -> np.ndarray:
    """M: a merged feature is the mean of its members."""
    return (U / (U.sum(axis=0) + (1e-5 if semantics == "official" else 0.0))).T


def with_constant(U: np.ndarray, count: int) -> np.ndarray:
    """U with a constant behind each model's features and one behind the merged ones, for a layer that reads its bias."""
    parts = [
        np.block([[u, np.zeros((len(u), 1))], [np.zeros((1, u.shape[1])), np.ones((1, 1))]]) for u in np.split(U, count)
    ]
    return np.concatenate(parts)


# --------------------------------------------------------------------------------------------------------------- weights


def through(
    models: Sequence[Mapping[str, Any]],
    spec: Spec,
    merge: Mapping[str, Sequence[np.ndarray]],
    unmerge: Mapping[str, Sequence[np.ndarray]],
    *,
    multihead: bool = False,
    transposed: Sequence[str] = (),
) -> tuple[dict[str, np.ndarray], tuple[dict[str, np.ndarray], ...]]:
    """(shared tensors, each model's own): what writes merged features is sum_k M_k W_k U_k, what only reads them is
    W_k U_k and averaged, or each model's own.

    multihead: nothing that writes no merged feature is averaged. transposed: tensors stored (inputs, outputs), such as
    embeddings: axis 0 reads and axis 1 writes. Of all others axis 1 reads and the rest writes.
    """
    shared_sizes(models, spec, merge)
    everything = set(merge) == set(spec.permutations) and not multihead
    merged: dict[str, np.ndarray] = {}
    heads: tuple[dict[str, np.ndarray], ...] = tuple({} for _ in models)
    for name in models[0]:
        example = models[0][name]
        if dtype_name(example, name) not in FLOATS:
            merged[name] = equal([m[name] for m in models], name)
            continue
        parts = [finite(scores(m[name]), name) for m in models]
        axes = [of_axis(e, name, i, merge, transposed) for i, e in enumerate(spec.axes[name] or ())]
        for axis, (p, k, reads) in enumerate(axes):
            if p in merge:
                matrices = unmerge[p] if reads else merge[p]
                parts = [along(A.T if reads else A, x, axis, k) for A, x in zip(matrices, parts)]
        writes = [p in merge for p, _, reads in axes if p and not reads]
        if any(writes):
            if any(p not in merge for p, _, _ in axes if p):
                missing = next(p for p, _, _ in axes if p and p not in merge)
                raise UsageError(f"tensor {name!r} writes what is zipped and {missing!r}, which is not: zip it too")
            merged[name] = rounded(sum(parts), example, name)
        elif everything:
            if len({x.shape for x in parts}) > 1:
                raise UsageError(
                    f"tensor {name!r} is of shape {list(parts[0].shape)} and of other shapes in other models: "
                    "multihead=True keeps each model's own"
                )
            merged[name] = rounded(sum(parts) * (1 / len(parts)), example, name)
        else:
            for k, x in enumerate(parts):
                heads[k][name] = rounded(x, models[k][name], name)
    return merged, heads if heads[0] else ()


def along(A: np.ndarray, x: np.ndarray, axis: int, k: int) -> np.ndarray:
    """A x for the units on one axis, each of which has k places in a row."""
    x = np.moveaxis(x, axis, 0)
    y = np.tensordot(A, x.reshape(A.shape[1], k, *x.shape[1:]), axes=1)
    return np.moveaxis(y.reshape(-1, *x.shape[1:]), 0, axis)


def of_axis(entry: Any, name: str, axis: int, zipped: Any, transposed: Sequence[str]) -> tuple[str | None, int, bool]:
    """(permutation, places of a unit, whether the tensor reads it) of one axis."""
    reads = axis == (0 if name in transposed else 1)
    match entry:
        case None:
            return None, 1, reads
        case str():
            return entry, 1, reads
        case Block(p, k, None):
            return p, k, reads
    if any(p in zipped for p, _ in permutations_of(entry)):
        raise UsageError(f"axis {axis} of tensor {name!r} is {entry}: only whole axes and plain blocks can be merged")
    return f"axis {axis} of {name!r}", 1, reads


def shared_sizes(models: Sequence[Mapping[str, Any]], spec: Spec, zipped: Iterable[str]) -> dict[str, int]:
    """Permutation -> its number of units, the same in all models. UsageError where they differ or are not the spec's."""
    if not models:
        raise UsageError("no models")
    every = [spec.sizes(m) for m in models]
    for p in zipped:
        if p not in every[0]:
            raise UsageError(f"permutation {p!r} is not in the spec, which has {', '.join(every[0]) or 'none'}")
        if spec.owners[p]:
            raise UsageError(f"permutation {p!r} lies in blocks of {', '.join(spec.owners[p])} and cannot be zipped")
        if len({sizes[p] for sizes in every}) > 1:
            raise UsageError(f"{p!r} has {', '.join(str(sizes[p]) for sizes in every)} units: merge models of one width")
    return every[0]


def finite(x: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise UsageError(f"tensor {name!r} has entries that are infinite or NaN: they would spread to whole rows")
    return x


def equal(xs: Sequence[Any], name: str) -> np.ndarray:
    """The one value of a tensor of integers, which is never merged."""
    xs = [host(x) for x in xs]
    if not all(np.array_equal(x, xs[0]) for x in xs):
        raise UsageError(f"tensor {name!r} holds integers that differ: leave it out of the models, or make them equal")
    return xs[0].copy()


def rounded(x: np.ndarray, example: Any, name: str) -> np.ndarray:
    """Float64 as the dtype of a tensor of the models, rounded once."""
    dtype = dtype_name(example, name)
    return stored_bytes(x, dtype).view(DTYPES[dtype]).reshape(x.shape)
