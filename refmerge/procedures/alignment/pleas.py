"""PLeaS: two models in one of a width between theirs and twice theirs, and each layer refitted by least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from refmerge.errors import UsageError
from refmerge.numeric import host, scores
from refmerge.procedure import procedure
from refmerge.procedures.alignment.git_rebasin import assignment, cost
from refmerge.procedures.alignment.zipit import along, by_unit, of_axis, rounded, shared_sizes, through
from refmerge.symmetry import Spec

__all__ = [
    "Blocks", "Pleas", "allowed", "blocks_of", "distances", "inner_products", "matrices", "pleas", "ratios_for", "system",
    "weight_similarity", "work",
]  # fmt: skip

Model = Mapping[str, Any]
Semantics = Literal["paper", "official"]


class Blocks(NamedTuple):
    """Of one permutation: units m1[j] of the first model and m2[j] of the second become one; s1 and s2 stay their own. The
    wide model has them in this order: merged, s1, s2."""

    m1: np.ndarray
    m2: np.ndarray
    s1: np.ndarray
    s2: np.ndarray


@dataclass(frozen=True)
class Pleas:
    """merged: the wide model. heads: each model's own, behind what is merged, or empty; `merged | heads[k]` is a model for
    the task of model k. start: merged before the least squares. losses: tensor -> mean squared error before and after.
    perms, ratios, blocks: permutation -> what was matched, the share kept apart, the units merged and kept apart."""

    merged: dict[str, np.ndarray]
    heads: tuple[dict[str, np.ndarray], ...]
    start: dict[str, np.ndarray]
    losses: dict[str, tuple[float, float]]
    perms: dict[str, np.ndarray]
    ratios: dict[str, float]
    blocks: dict[str, Blocks]


@procedure("pleas", paper="arXiv:2407.02447")
def pleas(
    models: Sequence[Model],
    spec: Spec,
    similarity: Mapping[str, Any],
    inputs: Iterable[Sequence[Mapping[str, Any]]] | None = None,
    *,
    perms: Mapping[str, Any] | None = None,
    budget: float = 1.0,
    ratios: float | Mapping[str, float] | None = None,
    importance: Mapping[str, float] | None = None,
    uses: Mapping[str, float] | None = None,
    multihead: bool = False,
    transposed: Sequence[str] = (),
    semantics: Semantics = "paper",
) -> Pleas:
    """Merge the units of two models that are alike, keep the others side by side, and fit each layer to what both's give.

    models: two checkpoints, open or mappings name -> array. similarity: permutation -> how alike the first model's units
    (rows) are to the second's, from `distances` or `weight_similarity`. inputs: batches of what the layers read, in each a
    mapping weight -> rows for both models; without them nothing is fitted.
    """
    if len(models) != 2 or semantics not in ("paper", "official"):
        raise UsageError("pleas: two models, and semantics 'paper' or 'official'")
    sizes = shared_sizes(models, spec, similarity)
    check(similarity, perms, sizes)
    # 1. match
    if perms is None:
        perms = {p: assignment(scores(C), p) for p, C in similarity.items()}
    # 2. budget
    if ratios is None:
        ratios = ratios_for(budget, models[0], spec, similarity, importance=importance, uses=uses, transposed=transposed)
    rho = ratios if isinstance(ratios, Mapping) else dict.fromkeys(similarity, float(ratios))
    every(rho, "ratios", similarity)
    # 3. merge or keep apart
    blocks = {p: blocks_of(C, perms[p], rho[p], semantics=semantics) for p, C in similarity.items()}
    merge, unmerge = {}, {}
    for p, b in blocks.items():
        merge[p], unmerge[p] = matrices(b, sizes[p])
    # 4. wide weights
    start, heads = through(models, spec, merge, unmerge, multihead=multihead, transposed=transposed)
    if semantics == "official":
        start = official_start(start, models, spec, blocks, merge, unmerge, multihead, transposed)
    # 5. least squares
    merged, losses = dict(start), {}
    if inputs is not None:
        for name, (T, rows) in gathered(inputs, start, models, spec, merge, transposed).items():
            losses[name] = fit(merged, name, T, rows, allowed(name, models, spec, merge, transposed), transposed)
    return Pleas(merged, heads, start, losses, dict(perms), dict(rho), blocks)


def check(similarity: Mapping[str, Any], perms: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> None:
    """UsageError unless similarities are finite and square and permutations are permutations."""
    for p, C in similarity.items():
        n, C = sizes[p], host(C)
        if C.shape != (n, n) or not np.isfinite(C).all():
            raise UsageError(f"pleas: similarity {p!r} is {list(C.shape)}, not finite numbers for {n} units of each model")
        if perms is not None and (p not in perms or sorted(np.asarray(perms[p]).tolist()) != list(range(n))):
            raise UsageError(f"pleas: perms[{p!r}] does not hold each of 0 ... {n - 1} once")


def every(given: Mapping[str, Any], parameter: str, names: Iterable[str]) -> None:
    """UsageError unless there is something for each permutation."""
    if missing := [p for p in names if p not in given]:
        raise UsageError(f"pleas: {parameter} has nothing for permutation {missing[0]!r}")


# ------------------------------------------------------------------------------------------------------------- similarity


def distances(
    batches: Iterable[Sequence[Mapping[str, Any]]], names: Iterable[str] | Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """permutation -> minus the Euclidean distance of the activations of units of two models, summed over batches: in a batch
    a mapping name -> activations (rows, units) for both models. names: of permutations, under which activations lie, or
    permutation -> names of the activations whose distances are summed."""
    return summed(batches, names, lambda x, y: -cdist(x.T, y.T))


def inner_products(
    batches: Iterable[Sequence[Mapping[str, Any]]], names: Iterable[str] | Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """permutation -> sums of the products of the activations of units of two models; batches and names as for distances."""
    return summed(batches, names, lambda x, y: x.T @ y)


def summed(
    batches: Iterable[Sequence[Mapping[str, Any]]],
    names: Iterable[str] | Mapping[str, Sequence[str]],
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    names = names if isinstance(names, Mapping) else {name: (name,) for name in names}
    found: dict[str, list[np.ndarray]] = {p: [] for p in names}
    for first, second in batches:
        for p, taps in names.items():
            found[p] += [similarity(by_unit(first, tap), by_unit(second, tap)) for tap in taps]
    if not all(found.values()):
        raise UsageError("pleas: no samples")
    return {p: sum(each) for p, each in found.items()}


def weight_similarity(
    models: Sequence[Model], spec: Spec, perms: Mapping[str, np.ndarray], *,
    leave: Sequence[str] = ("running_mean", "running_var"),
) -> dict[str, np.ndarray]:  # fmt: skip
    """permutation -> inner products of all weights of the first model's units and of the second's, which is moved by all
    other permutations. leave: parts of the names of tensors that do not count."""
    held = {name: {q: p for q, p in perms.items() if q != name} for name in perms}
    return {name: cost(name, *models, spec, held[name], leave) for name in perms}


# ----------------------------------------------------------------------------------------------------------------- budget


def work(
    rho: Mapping[str, float], model: Model, spec: Spec, *, uses: Mapping[str, float] | None = None,
    transposed: Sequence[str] = (),
) -> float:  # fmt: skip
    """Multiplications of a wide model that keeps the share rho of each permutation's units apart. uses: how often a weight
    is used for one sample, 1 where it is not given: a convolution's once for each pixel that it gives."""
    total = 0.0
    for name, entries in spec.axes.items():
        shape = getattr(model, "tensors", model)[name].shape
        if entries is not None and len(shape) > 1:
            sides = {True: 0.0, False: 0.0}
            for axis, entry in enumerate(entries):
                p, _, reads = of_axis(entry, name, axis, rho, transposed)
                sides[reads] += rho.get(p, 0.0)
            a, b = sides.values()
            total += (uses or {}).get(name, 1.0) * float(np.prod(shape)) * ((1 + a) * (1 + b) - 2 * a * b)
    return total


def ratios_for(
    budget: float, model: Model, spec: Spec, names: Iterable[str], *, importance: Mapping[str, float] | None = None,
    uses: Mapping[str, float] | None = None, transposed: Sequence[str] = (),
) -> dict[str, float]:  # fmt: skip
    """The shares of units kept apart with which the wide model takes `budget` times the work of one: the same for all
    permutations, or those whose sum, weighted by `importance`, is largest (a local optimum, from there)."""
    names = list(names)
    if not budget >= 1:
        raise UsageError(f"pleas: budget = {budget} is the work of the wide model over that of one: at least 1")

    def left(shares: Sequence[float]) -> float:
        share = dict(zip(names, shares))
        one, wide = (work(rho, model, spec, uses=uses, transposed=transposed) for rho in (dict.fromkeys(names, 0.0), share))
        return budget - (wide / one if one else 1.0)

    low, high = 0.0, 1.0
    if left([high] * len(names)) >= 0:
        low = high
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if left([middle] * len(names)) >= 0 else (low, middle)
    shares = [low] * len(names)
    if importance is not None:
        every(importance, "importance", names)
        weight = np.array([importance[p] for p in names], np.float64)
        found = minimize(
            lambda x: -weight @ x, shares, jac=lambda x: -weight, method="SLSQP", bounds=[(0.0, 1.0)] * len(names),
            constraints={"type": "ineq", "fun": left},
        )  # fmt: skip
        tried = [float(x) for x in np.clip(found.x, 0.0, 1.0)]
        if left(tried) >= -1e-9 and weight @ tried > weight @ shares:
            shares = tried
    return dict(zip(names, shares))


# ----------------------------------------------------------------------------------------------------------------- blocks


def blocks_of(C: Any, p: Any, ratio: float, *, semantics: Semantics = "paper") -> Blocks:
    """Of n pairs (i, p[i]) the int(ratio n + 1e-4) that are least alike stay apart; of equal ones those of higher i."""
    C, p = host(C), np.asarray(p)
    if not 0 <= ratio <= 1:
        raise UsageError(f"pleas: ratio = {ratio} is a share: between 0 and 1")
    if semantics == "official":
        p = np.arange(len(p)) if abs(ratio - 1) < 1e-3 else p
        c = C[np.arange(len(p)), p]
        kept = c >= quantile(c, ratio)
    else:
        c = C[np.arange(len(p)), p]
        kept = np.zeros(len(p), bool)
        kept[np.argsort(-c, kind="stable")[: len(p) - int(ratio * len(p) + 1e-4)]] = True
    i = np.arange(len(p))
    return Blocks(i[kept], p[kept], i[~kept], p[~kept])


def quantile(c: np.ndarray, q: float) -> Any:
    """By linear interpolation in the dtype of c, as torch has it."""
    c = np.sort(c)
    rank = c.dtype.type(q) * c.dtype.type(len(c) - 1)
    low, high = c[int(np.floor(rank))], c[int(np.ceil(rank))]
    w = rank - np.floor(rank)
    return low + w * (high - low) if w < 0.5 else high - (high - low) * (1 - w)


def matrices(b: Blocks, n: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(M_1, M_2) and (U_1, U_2) of zipit: a merged unit is the mean of two, and stands for either; others are themselves."""
    m, s = len(b.m1), len(b.s1)
    merge, unmerge = [], []
    for k, (shared, own) in enumerate(((b.m1, b.s1), (b.m2, b.s2))):
        places = np.concatenate([np.arange(m), np.arange(m + k * s, m + (k + 1) * s)])
        U = np.zeros((n, m + 2 * s))
        U[np.concatenate([shared, own]), places] = 1
        M = U.T.copy()
        M[:m] *= 0.5
        merge.append(M)
        unmerge.append(U)
    return tuple(merge), tuple(unmerge)


def official_start(
    start: dict[str, np.ndarray], models: Sequence[Model], spec: Spec, blocks: Mapping[str, Blocks],
    merge: Mapping[str, Any], unmerge: Mapping[str, Any], multihead: bool, transposed: Sequence[str],
) -> dict[str, np.ndarray]:  # fmt: skip
    """What only reads takes the columns of units kept apart as they are; what has no permuted axis is the first model's."""
    weight = {p: np.repeat([1.0, 2.0], [len(b.m1), len(b.s1) + len(b.s2)]) for p, b in blocks.items()}
    doubled = {p: tuple(U * weight[p] for U in unmerge[p]) for p in unmerge}
    summed, _ = through(models, spec, merge, doubled, multihead=multihead, transposed=transposed)
    found = {}
    for name, x in start.items():
        axes = [of_axis(e, name, i, merge, transposed) for i, e in enumerate(spec.axes[name] or ())]
        if not any(p in merge for p, _, _ in axes):
            x = host(models[0][name]).copy()
        elif not any(p in merge and not reads for p, _, reads in axes):
            x = summed[name]
        found[name] = x
    return found


# ----------------------------------------------------------------------------------------------------------- least squares


class Layer(NamedTuple):
    """A linear layer or convolution of both models: weights (outputs, inputs, ...) and biases, or None; the permutation of
    its outputs and of its inputs, or None where that is not merged, with the places of each unit."""

    weights: list[np.ndarray]
    biases: list[np.ndarray] | None
    out: tuple[str | None, int]
    read: tuple[str | None, int]


def layer(name: str, models: Sequence[Model], spec: Spec, merge: Mapping[str, Any], transposed: Sequence[str]) -> Layer:
    if spec.axes.get(name) is None or len(spec.axes[name]) < 2:
        raise UsageError(f"pleas: {name!r} is no weight of a layer that reads inputs")
    sides: dict[bool, tuple[str | None, int]] = {True: (None, 1), False: (None, 1)}
    for axis, entry in enumerate(spec.axes[name]):
        p, k, reads = of_axis(entry, name, axis, merge, transposed)
        if p in merge:
            sides[reads] = p, k
    weights = [turned(scores(m[name]), name, transposed) for m in models]
    bias = bias_of(name)
    return Layer(weights, [scores(m[bias]) for m in models] if bias in models[0] else None, sides[False], sides[True])


def turned(W: np.ndarray, name: str, transposed: Sequence[str]) -> np.ndarray:
    """(outputs, inputs, ...), or back."""
    return np.swapaxes(W, 0, 1) if name in transposed else W


def bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def system(
    X: Sequence[Any],
    name: str,
    models: Sequence[Model],
    spec: Spec,
    merge: Mapping[str, Any],
    transposed: Sequence[str] = (),
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(inputs, targets) of one layer of the wide model where the models' layers read X, rows of as many numbers as a row
    of the weight has. A unit kept apart is its model's, a merged one the mean of two, and what is no unit the mean too."""
    found, (weights, biases, (p, k), (q, j)) = [], layer(name, models, spec, merge, transposed)
    for i, W in enumerate(weights):
        x, size = scores(X[i]), W[0].size
        if x.shape[-1:] != (size,) and x.shape[1:] != W.shape[1:]:
            raise UsageError(f"pleas: inputs of {name!r} are of shape {list(x.shape)}, not rows of {size} numbers")
        x = x.reshape(-1, size)
        y = x @ W.reshape(len(W), size).T + (0.0 if biases is None else biases[i])
        y = along(merge[p][i], y, 1, k) if p else y / len(X)
        x = along(merge[q][i], x.reshape(len(x), *W.shape[1:]), 1, j).reshape(len(x), -1) if q else x / len(X)
        found.append((x, y))
    return sum(x for x, _ in found), sum(y for _, y in found)


def gathered(
    inputs: Iterable[Sequence[Mapping[str, Any]]], shared: Iterable[str], models: Sequence[Model], spec: Spec,
    merge: Mapping[str, Any], transposed: Sequence[str],
) -> dict[str, tuple[np.ndarray, int]]:  # fmt: skip
    """weight of the shared tensors -> (a triangle with the inner products of all inputs, of a constant where there is a
    bias, and of targets; rows)."""
    found: dict[str, tuple[np.ndarray, int]] = {}
    for batch in inputs:
        for name in (n for n in batch[0] if n in shared):
            Z, Y = system([reads[name] for reads in batch], name, models, spec, merge, transposed)
            if bias_of(name) in models[0]:
                Z = np.concatenate([Z, np.ones((len(Z), 1))], axis=1)
            T = np.concatenate([Z, Y], axis=1)
            if not np.isfinite(T).all():
                raise UsageError(f"pleas: inputs of {name!r} are infinite or NaN")
            R, rows = found.get(name, (T[:0], 0))
            step = 4 * T.shape[1]
            for start in range(0, len(T), step):
                R = np.linalg.qr(np.concatenate([R, T[start : start + step]]), mode="r")
            found[name] = R, rows + len(T)
    return found


def allowed(
    name: str, models: Sequence[Model], spec: Spec, merge: Mapping[str, Any], transposed: Sequence[str] = (), *,
    semantics: Semantics = "paper",
) -> np.ndarray:  # fmt: skip
    """Which weights (outputs, inputs) of a wide layer are not 0: units that different models keep for themselves do not
    meet."""
    weights, _, (p, k), (q, j) = layer(name, models, spec, merge, transposed)
    out, read = [], []
    for i, W in enumerate(weights):
        out.append(np.repeat((merge[p][i] != 0).any(axis=1), k) if p else np.ones(W.shape[0], bool))
        read.append(np.repeat((merge[q][i] != 0).any(axis=1), j) if q else np.ones(W.shape[1], bool))
    mask = np.outer(out[0], read[0]) | np.outer(out[1], read[1])
    if semantics == "official":  # it counts inputs along the outputs' axis, and outputs along the inputs'
        mask = np.ones_like(mask)
        for mine, other in ((0, 1), (1, 0)):
            rows, columns = np.flatnonzero(read[mine] & ~read[other]), np.flatnonzero(out[other] & ~out[mine])
            mask[np.ix_(rows[rows < mask.shape[0]], columns[columns < mask.shape[1]])] = False
    return np.repeat(mask, int(np.prod(weights[0].shape[2:])), axis=1)


def fit(
    model: dict[str, np.ndarray], name: str, T: np.ndarray, rows: int, mask: np.ndarray, transposed: Sequence[str]
) -> tuple[float, float]:
    """Put into the model, in place of a layer's weight and bias, those with the least squared error that are nearest to
    them. Returns the mean squared error before and after."""
    W, bias = turned(scores(model[name]), name, transposed), bias_of(name)
    theta, free = W.reshape(len(W), -1), mask
    if bias in model:
        theta = np.concatenate([theta, scores(model[bias])[:, None]], axis=1)
        free = np.concatenate([free, np.ones((len(W), 1), bool)], axis=1)
    inputs, targets = T[:, : theta.shape[1]], T[:, theta.shape[1] :]

    def loss() -> float:
        return float(np.sum((inputs @ theta.T - targets) ** 2)) / (rows * len(W))

    before = loss()
    for kind in np.unique(free, axis=0):
        these = (free == kind).all(axis=1)
        residual = targets[:, these] - inputs @ theta[these].T
        step = np.linalg.lstsq(inputs[:, kind], residual, rcond=1e-10)[0]
        theta[np.ix_(these, kind)] += step.T
    after = loss()
    shape = W.shape
    model[name] = rounded(turned(theta[:, : W[0].size].reshape(shape), name, transposed), model[name], name)
    if bias in model:
        model[bias] = rounded(theta[:, -1], model[bias], bias)
    return before, after
