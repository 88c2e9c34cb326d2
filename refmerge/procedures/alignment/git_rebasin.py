"""Git Re-Basin: models moved into one basin by reordering their hidden units, and averaged there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from refmerge.api import merge
from refmerge.checkpoint import Checkpoint, open_checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.procedures.alignment.convergent_matching import moments
from refmerge.rng import key_for
from refmerge.symmetry import axes as grammar
from refmerge.symmetry.axes import Block, Nested, Slices
from refmerge.symmetry.spec import Perms, Spec
from refmerge.symmetry.view import Mean, pairs, permuted

__all__ = [
    "Matching", "Rebasin", "Visit", "activation_matching", "assignment", "cost", "git_rebasin", "merge_many",
    "straight_through", "torch_gradient", "weight_matching",
]  # fmt: skip

CHUNK = 1 << 22  # elements of a factor of a product in float64
BAND = 512  # rows of a cost matrix to which products are added together


@dataclass(frozen=True)
class Visit:
    """One assignment: of which model, in which sweep, of which permutation, and by how much <A, pi(B)> grew."""

    sweep: int
    permutation: str
    gain: float
    model: int = 1


@dataclass(frozen=True)
class Matching:
    """permutations of b that bring it close to a. visits, in order. objective: <a, pi(b)> at the start and after each visit.
    losses: those of the steps of `straight_through`."""

    permutations: dict[str, np.ndarray]
    visits: tuple[Visit, ...] = ()
    objective: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rebasin:
    """models: each with its units reordered; open checkpoints as views that permute what is read. permutations: of each
    model. merged: their average, None for open checkpoints without `out`. visits: of all models, in order. objective: for
    each model <A, pi(B)> at the start and after each visit, where A is what it was matched with; nothing for the first,
    which stays, unless by "many". losses: of "straight_through"."""

    models: tuple[Any, ...]
    permutations: tuple[dict[str, np.ndarray], ...]
    merged: Any
    visits: tuple[Visit, ...]
    objective: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...] = ()


def check(
    models: Any, spec: Any, *, by: str = "weights", order: Any = None, start: Any = None, seed: int = 0, sweeps: int = 100,
    turns: Any = None, activations: Any = None, criterion: str = "inner", gradient: Any = None, loss: Any = None, **_: Any,
) -> None:  # fmt: skip
    """Complain of arguments of git_rebasin before the first product. No weight is read."""
    if not isinstance(spec, Spec):
        raise UsageError(f"git_rebasin: spec is a refmerge.symmetry.Spec, not {type(spec).__name__}")
    if by not in ("weights", "activations", "straight_through", "many"):
        raise UsageError(f"git_rebasin: by = {by!r} is none of 'weights', 'activations', 'straight_through', 'many'")
    if len(models) < 2:
        raise UsageError(f"git_rebasin: {len(models)} models: it takes two at least")
    sizes = spec.sizes(models[0])
    for k, model in enumerate(models[1:], 1):
        try:
            here = spec.sizes(model)
        except UsageError as e:
            raise UsageError(f"git_rebasin: model {k} does not fit: {e}") from None
        if here != sizes:
            name = next(name for name, n in here.items() if n != sizes[name])
            raise UsageError(f"git_rebasin: {name!r} has {sizes[name]} units in model 0 and {here[name]} in model {k}")
        for name, x in getattr(model, "tensors", model).items():
            shape = tuple(getattr(models[0], "tensors", models[0])[name].shape)
            if tuple(x.shape) != shape:
                raise InputError(
                    f"git_rebasin: tensor {name!r} is {list(shape)} in model 0 and {list(x.shape)} in model {k}"
                )
    if start is not None:
        if by not in ("weights", "straight_through") or len(start) != len(models) - 1:
            raise UsageError(
                "git_rebasin: start has permutations for each model but the first, by weights or straight_through"
            )
        for p, model in zip(start, models[1:]):
            spec.check(p, model)
    if (by == "activations") != (activations is not None):
        raise UsageError(
            "git_rebasin: activations go with by='activations', one mapping permutation -> array for each model"
        )
    if activations is not None and len(activations) != len(models):
        raise UsageError(f"git_rebasin: activations of {len(activations)} models for {len(models)}")
    if criterion not in ("inner", "e_ab", "covariance", "correlation"):
        raise UsageError(f"git_rebasin: criterion = {criterion!r} is none of 'inner', 'e_ab', 'covariance', 'correlation'")
    if by == "straight_through" and (gradient is None) == (loss is None):
        raise UsageError("git_rebasin: straight_through takes gradient or, for finite differences, loss: one of them")
    if by != "straight_through" and (gradient is not None or loss is not None):
        raise UsageError("git_rebasin: gradient and loss go with by='straight_through'")
    if turns is not None and by != "many":
        raise UsageError("git_rebasin: turns go with by='many'")
    check_search(seed, sweeps)
    if order is not None:
        in_turn([name for name in spec.permutations if not spec.owners[name]], order, 0, seed)


@procedure("git_rebasin", paper="arXiv:2209.04836", check=check)
def git_rebasin(
    models: Sequence[Any],
    spec: Spec,
    *,
    by: Literal["weights", "activations", "straight_through", "many"] = "weights",
    order: Sequence[str] | Sequence[Sequence[str]] | None = None,
    start: Sequence[Perms] | None = None,
    seed: int = 0,
    sweeps: int = 100,
    tolerance: float = 1e-12,
    leave: Sequence[str] = ("running_mean", "running_var"),
    turns: Sequence[Sequence[int]] | None = None,
    activations: Sequence[Any] | None = None,
    criterion: Literal["inner", "e_ab", "covariance", "correlation"] = "inner",
    gradient: Callable[[Mapping[str, np.ndarray], int], Any] | None = None,
    loss: Callable[[Mapping[str, np.ndarray], int], float] | None = None,
    steps: int = 100,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight: Sequence[float] | None = None,
    out: str | Path | None = None,
    progress: Callable[[Visit], None] | None = None,
) -> Rebasin:
    """Reorder the hidden units of models so that they fit the first one's, and average them.

    models: mappings name -> array, open checkpoints, or paths. spec: which axes are permuted together (refmerge.symmetry).
    by: what is matched: weights; activations on shared data; what a loss at the midpoint says ("straight_through"); or, of
    many models, each with the mean of the others ("many").
    """
    models = [open_checkpoint(m) if isinstance(m, str | Path) else m for m in models]
    check(
        models, spec, by=by, order=order, start=start, seed=seed, sweeps=sweeps, turns=turns, activations=activations,
        criterion=criterion, gradient=gradient, loss=loss,
    )  # fmt: skip
    first, *others = models
    how = {"order": order, "seed": seed, "sweeps": sweeps, "tolerance": tolerance, "leave": leave, "progress": progress}
    starts = [spec.identity(first) | dict(p) for p in start or [{}] * len(others)]

    # 1. match
    if by == "many":
        found = merge_many(models, spec, turns=turns, **how)
    elif by == "activations":
        told = {"criterion": criterion, "progress": progress}
        found = [activation_matching(activations[0], x, spec, model=k, **told) for k, x in enumerate(activations[1:], 1)]
    elif by == "straight_through":
        how |= {"gradient": gradient, "loss": loss, "steps": steps, "learning_rate": learning_rate, "momentum": momentum}
        numbered = enumerate(zip(others, starts), 1)
        found = [straight_through(first, b, spec, start=p, model=k, **how) for k, (b, p) in numbered]
    else:
        found = [weight_matching(first, b, spec, start=p, model=k, **how) for k, (b, p) in enumerate(zip(others, starts), 1)]
    if by != "many":
        found = [Matching({}), *found]
    perms = [spec.identity(first) | m.permutations for m in found]

    # 2. reorder
    aligned = [
        model if k == 0 and by != "many" else permuted(spec, p, model) for k, (model, p) in enumerate(zip(models, perms))
    ]

    # 3. average
    coefficients = {} if weight is None else {"weight": list(weight), "normalize": False}
    in_memory = not any(isinstance(m, Checkpoint) for m in models)
    merged = merge(aligned, "linear", out=out, **coefficients) if in_memory or out is not None else None
    return Rebasin(
        tuple(aligned), tuple(perms), merged, tuple(v for m in found for v in m.visits), tuple(m.objective for m in found),
        tuple(x for m in found for x in m.losses),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- weight matching


def weight_matching(
    a: Mapping[str, Any], b: Mapping[str, Any], spec: Spec, *, order: Sequence[Any] | None = None,
    start: Perms | None = None, seed: int = 0, sweeps: int = 100, tolerance: float = 1e-12, leave: Sequence[str] = (),
    model: int = 1, progress: Callable[[Visit], None] | None = None,
) -> Matching:  # fmt: skip
    """Coordinate descent: one permutation at a time, the best with all others as they are, until a sweep gains nothing."""
    check_search(seed, sweeps)
    perms = spec.identity(b) | dict(start or {})
    roots = [name for name in spec.permutations if not spec.owners[name]]
    beside = neighbours(spec)
    settled = set[str]()  # those whose cost has not changed since they were visited
    visits, objective = list[Visit](), [inner_product(a, b, spec, perms, leave)]
    for sweep in range(sweeps):
        gained = False
        for name in in_turn(roots, order, sweep, seed):
            gain = 0.0
            if name not in settled:
                new, gain = visit(name, a, b, spec, perms, leave)
                if any(not np.array_equal(new[q], perms[q]) for q in new):
                    settled -= beside[name]
                perms |= new
                settled.add(name)
            gained |= gain > tolerance
            visits.append(Visit(sweep, name, gain, model))
            objective.append(objective[-1] + gain)
            if progress is not None:
                progress(visits[-1])
        if not gained:
            break
    return Matching(perms, tuple(visits), tuple(objective))


def check_search(seed: int, sweeps: int) -> None:
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise UsageError(f"git_rebasin: seed = {seed!r} is no whole number in [0, 2**64)")
    if type(sweeps) is not int or sweeps < 1:
        raise UsageError(f"git_rebasin: sweeps = {sweeps!r} is no whole number above 0")


def in_turn(roots: Sequence[str], order: Sequence[Any] | None, sweep: int, seed: int) -> Sequence[str]:
    """Who is visited in a sweep: as `order` says, one list or one for each sweep, of which the last holds on; else in an
    order drawn from (seed, sweep)."""
    if order is None:
        return sorted(roots, key=lambda name: key_for(seed, name, sweep))
    turn = order if all(isinstance(name, str) for name in order) else order[min(sweep, len(order) - 1)]
    if sorted(turn) != sorted(roots):
        raise UsageError(f"git_rebasin: order names {list(turn)}: each of {', '.join(roots)} once in a sweep")
    return turn


def neighbours(spec: Spec) -> dict[str, set[str]]:
    """For each permutation that none owns those that it shares a tensor with."""
    beside: dict[str, set[str]] = {name: set() for name in spec.permutations}
    for entries in spec.axes.values():
        together = {(owners or (name,))[0] for e in entries or () for name, owners in grammar.names(e)}
        for name in together:
            beside[name] |= together - {name}
    return beside


def visit(
    name: str, a: Any, b: Any, spec: Spec, perms: Perms, leave: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], float]:
    """The best permutation of one name, with those that it owns, all others held; and what the objective gains by it."""
    held = {q: p for q, p in perms.items() if q != name and name not in spec.owners[q]}
    old = perms[name]
    C = cost(name, a, b, spec, held, leave)
    inside, blocks_a, blocks_b = blocks(name, a, b, spec, held, leave)
    if inside is None:
        new = assignment(C, name, spec)
        return {name: new}, _sum(C, new) - _sum(C, old)
    # What lies in the blocks has permutations of its own: each block of a is matched with each of b
    before, found = _sum(C, old), {}
    within = sorted(q for q in spec.permutations if name in spec.owners[q])
    turn = [q for q in inside.permutations if not inside.owners[q]]
    for i, j in np.ndindex(C.shape):
        own = {q: perms[q][i] for q in within} if old[i] == j else None
        found[i, j] = weight_matching(blocks_a[i], blocks_b[j], inside, start=own, order=turn)
        C[i, j] += found[i, j].objective[-1]
        before += found[i, j].objective[0] if own else 0.0
    new = assignment(C, name, spec)
    owned = {q: np.stack([found[i, int(j)].permutations[q] for i, j in enumerate(new)]) for q in within}
    return {name: new, **owned}, _sum(C, new) - before


def cost(name: str, a: Any, b: Any, spec: Spec, held: Perms, leave: Sequence[str] = ()) -> np.ndarray:
    """C[i, j]: the inner product of all that unit i of a has with what unit j of b has, b with `held` applied. What moves by
    itself inside of a unit's block is left out: see `blocks`."""
    n = spec.sizes(a)[name]
    C = np.zeros((n, n))
    step = max(1, CHUNK // max(1, n))
    for tensor, axis, places, inner in _places(name, a, spec, leave):
        if inner is None:
            for x, y in pairs(tensor, a, b, spec, held, whole=axis == 0):
                x, y = _units(x, axis, places), _units(y, axis, places)
                for s in range(0, x.shape[1], step):
                    add_product(C, x[:, s : s + step].astype(np.float64), y[:, s : s + step].astype(np.float64))
    return C


def add_product(C: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """C += x y^T, in bands, so that no second matrix of its size is needed."""
    for i in range(0, len(C), BAND):
        C[i : i + BAND] += x[i : i + BAND] @ y.T


def blocks(
    name: str, a: Any, b: Any, spec: Spec, held: Perms, leave: Sequence[str] = ()
) -> tuple[Spec | None, list[Any], list[Any]]:
    """What a permutation's blocks hold that have permutations of their own: (the spec of one block, the blocks of a as
    models, those of b); None where there is no such thing."""
    n, axes = spec.sizes(a)[name], {}
    of_a, of_b = [{} for _ in range(n)], [{} for _ in range(n)]
    for part, (tensor, axis, places, inner) in enumerate(_places(name, a, spec, leave)):
        if inner is not None:
            axes[f"{tensor} {part}"] = (inner, None)
            ((x, y),) = pairs(tensor, a, b, spec, held, whole=True)
            for z, models in ((x, of_a), (y, of_b)):
                for model, block in zip(models, _units(z, axis, places).astype(np.float64)):
                    model[f"{tensor} {part}"] = block.reshape(places.shape[1], -1)
    return (Spec(axes) if axes else None), of_a, of_b


def assignment(C: np.ndarray, name: str = "", spec: Spec | None = None) -> np.ndarray:
    """The permutation p with the greatest sum of C[i, p[i]], SciPy's where several have it. C is as before afterwards."""
    if not np.isfinite(C).all():
        where = f": {', '.join(tensor for tensor, _ in spec.uses(name))} must be finite" if spec is not None else ""
        raise InputError(f"git_rebasin: the cost of permutation {name!r} is not finite{where}")
    np.negative(C, out=C)  # asked for the greatest sum, SciPy would do so in a copy
    _, p = linear_sum_assignment(C)
    np.negative(C, out=C)
    return p


def inner_product(a: Any, b: Any, spec: Spec, perms: Perms, leave: Sequence[str] = ()) -> float:
    """<a, pi(b)> over all tensors but those that are left."""
    total = 0.0
    for tensor in (t for t in spec.axes if not _left(t, leave)):
        for x, y in pairs(tensor, a, b, spec, perms):
            x, y = x.reshape(-1), y.reshape(-1)
            for s in range(0, len(x), CHUNK):
                total += float(x[s : s + CHUNK].astype(np.float64) @ y[s : s + CHUNK].astype(np.float64))
    return total


def _places(name: str, model: Any, spec: Spec, leave: Sequence[str]) -> Iterator[tuple[str, int, np.ndarray, grammar.Entry]]:
    """Wherever a permutation acts: tensor, axis, the places of its units there, and what moves inside of them by itself."""
    for tensor, axis in spec.uses(name):
        if not _left(tensor, leave):
            places = np.arange(getattr(model, "tensors", model)[tensor].shape[axis])
            for found, inner in grammar.occurrences((spec.axes[tensor] or ())[axis], name, places):
                yield tensor, axis, found, inner


def _left(tensor: str, leave: Sequence[str]) -> bool:
    return any(part in tensor for part in leave)


def _units(x: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """What each unit has of a tensor, as rows, in the tensor's dtype."""
    x = np.moveaxis(x, axis, 0)
    if not np.array_equal(places.reshape(-1), np.arange(len(x))):
        x = x[places.reshape(-1)]
    return x.reshape(len(places), -1)


def _sum(C: np.ndarray, p: np.ndarray) -> float:
    return float(C[np.arange(len(p)), p].sum())


# ------------------------------------------------------------------------------------------------------ activation matching


def activation_matching(
    a: Mapping[str, Any], b: Mapping[str, Any], spec: Spec, *, criterion: str = "inner", **how: Any
) -> Matching:
    """One assignment for each permutation, by activations of both models on the same samples.

    a, b: mappings permutation -> activations, samples x units, or a list of such batches; what else they hold is not
    looked at, so that the `taps` of refmerge.nets will do. A permutation without activations stays as it is. Of one that is
    owned the activations have an axis for each owner before these two; a unit with several places has as many rows for each
    sample. how: model and progress, as for weight_matching.
    """
    axes: dict[str, Any] = {}
    likeness, places = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for name in (q for q in spec.permutations if not spec.owners[q]):
        for entry in entries(name, spec, a.keys() | b.keys()):
            innermost = [q for q, _ in grammar.names(entry)][-1]
            if not (innermost in a and innermost in b):
                raise UsageError(f"git_rebasin: one model has activations of {innermost!r} and the other has not")
            found = moments(*(in_places(z[innermost], entry, innermost) for z in (a, b)))
            # Likenesses are matched with the identity as weights are with weights, since C = C I
            axes[innermost] = (entry, None)
            likeness[innermost], places[innermost] = getattr(found, criterion), np.eye(len(found.mean_b))
    if not axes:
        raise UsageError(f"git_rebasin: there are activations of none of {', '.join(spec.permutations)}")
    return weight_matching(likeness, places, Spec(axes), **how)


def entries(name: str, spec: Spec, there: Collection[str]) -> list[grammar.Entry]:
    """What moves along activations of a permutation that none owns: where activations of those that it owns are there, for
    each of these the blocks with the most permutations in them, else the permutation itself."""
    blocks = [e for tensor, axis in spec.uses(name) for e in nested((spec.axes[tensor] or ())[axis], name)]
    found: list[grammar.Entry] = []
    for q in (q for q in spec.permutations if name in spec.owners[q] and q in there):
        best = max(blocks, key=lambda e: (q in inside(e), len(inside(e))))
        if best not in found:
            found.append(best)
    return found or ([name] if name in there else [])


def nested(entry: grammar.Entry, name: str) -> Iterator[Nested]:
    """The Nested entries of a permutation that none owns, wherever in an entry."""
    match entry:
        case Nested(outer, inner, _) if outer == name and inner is not None:
            yield entry
        case Block(_, _, inner):
            yield from nested(inner, name)
        case Slices(parts):
            for part in parts:
                yield from nested(part, name)


def inside(entry: grammar.Entry) -> set[str]:
    return {q for q, _ in grammar.names(entry)}


def in_places(x: Any, entry: grammar.Entry, name: str) -> list[np.ndarray]:
    """Batches of samples x places of an entry, from the activations of the innermost permutation in it."""
    batches = []
    for z in map(scores, x if isinstance(x, list | tuple) else [x]):
        owners = z.shape[:-2] if isinstance(entry, Nested) else ()
        z = z.reshape(*owners, -1, z.shape[-1])
        where = np.arange(z.shape[0] * entry.k if isinstance(entry, Nested) else z.shape[-1])
        units = grammar.places_of(entry, name, where)
        if units is None or units.shape[:-1] != (*owners, z.shape[-1]) or z.shape[-2] % units.shape[-1]:
            raise UsageError(f"git_rebasin: activations of {name!r} of shape {list(z.shape)} do not fit its blocks")
        z = z.reshape(*owners, -1, units.shape[-1], z.shape[-1])  # owners, samples, places, units
        flat = np.empty((z.shape[-3], len(where)))
        flat[:, units] = np.moveaxis(z, (-3, -2), (0, -1))
        batches.append(flat)
    return batches


# --------------------------------------------------------------------------------------------------------------- merge many


def merge_many(
    models: Sequence[Mapping[str, Any]], spec: Spec, *, turns: Sequence[Sequence[int]] | None = None, seed: int = 0,
    sweeps: int = 100, tolerance: float = 1e-12, leave: Sequence[str] = (), **how: Any,
) -> list[Matching]:  # fmt: skip
    """MergeMany: each model in turn is matched with the mean of all the others, until a pass brings none closer to it.

    turns: the order of the models, for each pass, of which the last holds on; else drawn from (seed, pass). how: as for
    weight_matching.
    """
    check_search(seed, sweeps)
    perms = [spec.identity(model) for model in models]
    visits: list[list[Visit]] = [[] for _ in models]
    objective: list[list[float]] = [[] for _ in models]
    for turn in range(sweeps):
        closer = False
        for k in models_in_turn(len(models), turns, turn, seed):
            others = Mean([permuted(spec, p, m) for i, (p, m) in enumerate(zip(perms, models)) if i != k])
            here = permuted(spec, perms[k], models[k])
            alike = {"seed": seed, "sweeps": sweeps, "tolerance": tolerance, "leave": leave, **how}
            found = weight_matching(others, here, spec, model=k, **alike)
            far, near = (distance(others, here, spec, p, leave) for p in ({}, found.permutations))
            closer |= near < far - tolerance
            perms[k] = spec.compose(perms[k], found.permutations)
            visits[k] += found.visits
            objective[k] += found.objective
        if not closer:
            break
    return [Matching(p, tuple(v), tuple(o)) for p, v, o in zip(perms, visits, objective)]


def models_in_turn(count: int, turns: Sequence[Sequence[int]] | None, turn: int, seed: int) -> Sequence[int]:
    """Which model is matched when in a pass: as `turns` says, the last of which holds on; else drawn from (seed, pass)."""
    if turns is None:
        return sorted(range(count), key=lambda k: key_for(seed, f"model {k}", turn))
    if sorted(now := turns[min(turn, len(turns) - 1)]) != list(range(count)):
        raise UsageError(f"git_rebasin: turns names {list(now)}: each of {', '.join(map(str, range(count)))} once in a pass")
    return now


def distance(a: Any, b: Any, spec: Spec, perms: Perms, leave: Sequence[str] = ()) -> float:
    """The Euclidean distance of a from pi(b) over all tensors but those that are left."""
    total = 0.0
    for tensor in (t for t in spec.axes if not _left(t, leave)):
        for x, y in pairs(tensor, a, b, spec, perms):
            total += float(np.sum((x.astype(np.float64) - y.astype(np.float64)) ** 2))
    return float(np.sqrt(total))


# --------------------------------------------------------------------------------------------------------- straight through


def straight_through(
    a: Mapping[str, Any], b: Mapping[str, Any], spec: Spec, *, gradient: Callable[..., Any] | None = None,
    loss: Callable[..., float] | None = None, steps: int = 100, learning_rate: float = 0.01, momentum: float = 0.9,
    start: Perms | None = None, **how: Any,
) -> Matching:  # fmt: skip
    """Permutations of b by the loss at the midpoint: free weights T, which say by weight matching how b is permuted, follow
    the gradient that the permuted b would have.

    gradient: (weights, step) -> (loss, mapping name -> gradient). loss: (weights, step) -> loss, in whose place finite
    differences are taken. Both get the midpoint of a and the permuted b, in float64. The permutations with the least loss
    are kept.
    """
    gradient = gradient or finite_differences(loss)
    a, b = ({name: scores(m[name]) for name in m} for m in (a, b))
    T, velocity = dict(a), {name: np.zeros_like(x) for name, x in a.items()}
    perms, losses, visits = spec.identity(b) | dict(start or {}), [], []
    kept, least = perms, math.inf
    for step in range(steps):
        # the forward takes pi(b), matched with T; the backward goes to T as if it were that
        found = weight_matching(T, b, spec, start=perms, **how)
        perms, visits = found.permutations, [*visits, *found.visits]
        moved = spec.apply(perms, b)
        value, slope = gradient({name: 0.5 * (a[name] + moved[name]) for name in a}, step)
        losses.append(float(value))
        if losses[-1] < least:
            kept, least = perms, losses[-1]
        for name in T:
            velocity[name] = 0.5 * scores(slope[name]) + momentum * velocity[name]
            T[name] = T[name] - learning_rate * velocity[name]
    leave = how.get("leave", ())
    ends = (inner_product(a, b, spec, dict(start or {}), leave), inner_product(a, b, spec, kept, leave))
    return Matching(kept, tuple(visits), ends, tuple(losses))


def finite_differences(loss: Callable[..., float]) -> Callable[..., Any]:
    """A loss with its gradient by central differences, two evaluations for each weight: for small models."""

    def gradient(weights: Mapping[str, np.ndarray], step: int) -> tuple[float, dict[str, np.ndarray]]:
        slopes = {name: np.zeros_like(x) for name, x in weights.items()}
        for name, x in weights.items():
            for place in np.ndindex(x.shape):
                h = 2.0**-17 * max(1.0, abs(float(x[place])))
                sides = []
                for side in (h, -h):
                    moved = x.copy()
                    moved[place] += side
                    sides.append(float(loss({**weights, name: moved}, step)))
                slopes[name][place] = (sides[0] - sides[1]) / (2 * h)
        return float(loss(weights, step)), slopes

    return gradient


def torch_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of torch tensors with its gradient by autograd, as `straight_through` takes it: loss(weights, step), weights a
    mapping name -> float64 tensor, gives one number. What it does not depend on has the gradient 0."""
    try:
        import torch
    except ImportError:
        raise UsageError("torch_gradient wants torch: pip install 'refmerge[torch]'") from None

    def gradient(weights: Mapping[str, np.ndarray], step: int) -> tuple[float, dict[str, np.ndarray]]:
        given = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in weights.items()}
        value = loss(given, step)
        found = torch.autograd.grad(value, list(given.values()), allow_unused=True)
        slopes = {
            name: np.zeros(x.shape) if slope is None else slope.numpy() for (name, x), slope in zip(weights.items(), found)
        }
        return float(value.detach()), slopes

    return gradient
