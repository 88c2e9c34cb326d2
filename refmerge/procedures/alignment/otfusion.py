import threading
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from refmerge.api import merge
from refmerge.checkpoint import Checkpoint, itemsize, open_checkpoint
from refmerge.errors import UsageError
from refmerge.numeric import like, scores
from refmerge.procedure import procedure
from refmerge.procedures.alignment._transport import exact_plan, ground_cost, sinkhorn_plan
from refmerge.procedures.averaging.weight_selection import shapes
from refmerge.sources import stored_bytes
from refmerge.symmetry import Block, Nested, Slices, Spec
from refmerge.symmetry.axes import names, places_of

__all__ = [
    "Fusion", "Transport", "chain", "corrected", "exact_plan", "from_official", "ground_cost", "otfusion", "sinkhorn_plan",
]  # fmt: skip


@dataclass(frozen=True)
class Transport:
    """How one model comes to the first. By permutation of the spec, of a chain by layer: costs M, plans T, and maps K, the
    plans as they are applied. Rows are the model's units, columns those of the first."""

    costs: dict
    plans: dict
    maps: dict

    @cached_property
    def objectives(self):
        """<T, M>: what each plan costs."""
        return {P: float(np.sum(T * self.costs[P])) for P, T in self.plans.items()}

    @cached_property
    def permutations(self):
        """p for each plan that is a permutation: the model's unit p[i] goes to unit i of the first one."""
        hard = {P: T > 0 for P, T in self.plans.items() if T.shape[0] == T.shape[1]}
        return {P: np.argmax(T, axis=0) for P, T in hard.items() if all(np.all(T.sum(axis=a) == 1) for a in (0, 1))}


@dataclass(frozen=True)
class Fusion:
    """models: the first as it is, the others transported; open checkpoints as views that compute what is read. merged: their
    average, None for open checkpoints without `out`. transports: one for each model but the first."""

    models: tuple
    merged: dict | Checkpoint | None
    transports: tuple


@procedure("otfusion", paper="arXiv:1910.05653")
def otfusion(
    models,
    spec=None,
    *,
    weight=None,
    activations=None,
    metric="euclidean",
    squared=False,
    unit_rows=False,
    divide=1.0,
    normalize="none",
    clip=None,
    masses="uniform",
    exact=True,
    reg=0.01,
    iterations=1000,
    kernel="log",
    plans=None,
    correction="columns",
    eps=0.0,
    align_inputs=True,
    output="identity",
    shortcuts=False,
    written_by=None,
    out=None,
):
    """Fuse models, which may have different widths: optimal transport says, layer by layer, which units of a model are
    averaged into which of the first one's, and there the models are averaged.

    models: mappings name -> array, open checkpoints, or paths. spec: a refmerge.symmetry.Spec; or the names of all tensors
    of a chain of layers, in order; without it the tensors in the first model's order are that chain. Returns a Fusion.
    """
    models = [open_checkpoint(model) if isinstance(model, str | Path) else model for model in models]
    if len(models) < 2:
        raise UsageError(f"otfusion: {len(models)} models: it takes two at least")
    if isinstance(spec, Spec) and (output != "identity" or shortcuts):
        raise UsageError("otfusion: output and shortcuts are for chains of layers: a spec says which axes are permuted")
    spec = spec if isinstance(spec, Spec) else chain(models[0], spec, output=output, shortcuts=shortcuts)
    check(models, spec, activations, plans)
    by_weights, scale = activations is None, {"divide": divide, "normalize": normalize, "clip": clip}
    first, *others = models
    transports = []
    for k, model in enumerate(others, 1):
        Ms, Ts, K = {}, {}, {}
        for P, tensors in in_order(spec, written_by or {}, by_weights or masses != "uniform"):
            # 1. input alignment
            W, V = rows(model, spec, P, tensors, {}), rows(first, spec, P, tensors, {})
            A = rows(model, spec, P, tensors, K)
            # 2. ground cost
            x, y = (A, V) if by_weights else (units(activations[i], P, models[i], spec) for i in (k, 0))
            M = ground_cost(x, y, metric=metric, squared=squared, unit_rows=unit_rows, **scale)
            # 3. masses
            kind = masses if is_read(P, spec, tensors) else "uniform"
            mu, nu = mass(W, kind, M.shape[0]), mass(V, kind, M.shape[1])
            # 4. coupling
            if P in (plans[k - 1] if plans else ()):
                T = given(plans[k - 1][P], P, M.shape)
            elif exact:
                T = exact_plan(mu, nu, M)
            else:
                T = sinkhorn_plan(mu, nu, M, reg=reg, iterations=iterations, kernel=kernel)
            # 5. correction
            Ms[P], Ts[P], K[P] = M, T, corrected(T, correction, eps)
        transports.append(Transport(Ms, Ts, K))
    # 6. transport
    kept = last_layer(spec) if output == "second" else ()
    moves = [partial(transported, model, first, spec, t.maps, align_inputs, kept) for model, t in zip(others, transports)]
    is_open = isinstance(first, Checkpoint)
    moved = [View(m, first, f) if is_open else {name: f(name) for name in first} for m, f in zip(others, moves)]
    # 7. average
    shares = [1 / len(models)] * len(models) if weight is None else list(weight)
    wanted = out is not None or not is_open
    merged = merge([first, *moved], "linear", weight=shares, normalize=False, out=out) if wanted else None
    return Fusion((first, *moved), merged, tuple(transports))


def transported(model, first, spec, K, align_inputs, kept, name):
    """A tensor in the first model's frame, K^T x along every axis: in float64, rounded once to the first one's dtype.
    Integers, and tensors that are kept, are the first one's."""
    target = first[name]
    if name in kept or "float" not in str(target.dtype):
        return target
    x, entries = finite(model, name), spec.axes[name] or ()
    is_matched = any(part in K for entry in entries[:1] for P, _ in names(entry) for part in parts(P))
    for axis, entry in enumerate(entries):
        if align_inputs or axis == 0 or not is_matched:
            x = along(x, axis, entry, K)
    if x.shape != tuple(target.shape):
        raise UsageError(f"otfusion: {name!r} becomes {list(x.shape)} and meets {list(target.shape)}: align_inputs is off")
    return like(x, target)


class View(Checkpoint):
    """An open checkpoint whose tensors are those of a function of their names, called when they are read."""

    def __init__(self, checkpoint, first, tensor):
        self.__dict__.update(checkpoint.__dict__)
        self.tensors, self.nbytes = first.tensors, first.nbytes
        self._tensor, self._last, self._turn = tensor, ("", np.empty(0, np.uint8)), threading.Lock()

    def read(self, name, start, stop, out):
        dtype = self.tensors[name].dtype
        with self._turn:
            if self._last[0] != name:
                self._last = name, stored_bytes(self._tensor(name), dtype)
            out[:] = self._last[1][start * itemsize(dtype) : stop * itemsize(dtype)]

    def ahead(self, name, start, stop):
        """Nothing: a tensor is read as a whole."""


def chain(model, order=None, *, output="identity", shortcuts=False):
    """The spec of a chain of layers: each tensor of two or more axes is a layer (outputs, inputs, kernel ...) that reads
    what the one before gives, and a vector belongs to the layer before it.

    order: the tensors' names; else they are in the model's order. output: whether the last layer's outputs are matched by
    "identity", or by "transport" like all others; "second" is "identity" here. shortcuts: 1 x 1 convolutions that change the
    number of channels read what the last other one that changes it read, and the layer after them the mean of both maps.
    """
    if output not in ("identity", "transport", "second"):
        raise UsageError(f"otfusion: output = {output!r} is none of 'identity', 'transport', 'second'")
    shape = shapes(model)
    order = list(shape if order is None else order)
    if len({*order}) < len(order) or {*order} != shape.keys():
        raise UsageError("otfusion: the order of a chain has each tensor once")
    layers = [name for name in order if len(shape[name]) > 1]
    axes, out, n = {}, None, {}
    reads = readings({name: shape[name] for name in layers}, shortcuts)
    for name in order:
        if name in reads:
            out = None if name == layers[-1] and output != "transport" else called(name)
            n[called(name)] = shape[name][0]
            read = reads[name]
            if read is not None and len(shape[name]) == 2 and shape[name][1] > n[parts(read)[0]]:
                read = Block(read, shape[name][1] // n[parts(read)[0]])  # a channel's pixels, flattened
            axes[name] = (out, read, *[None] * (len(shape[name]) - 2))
        else:
            axes[name] = (out,) * len(shape[name])
    return Spec(axes)


def readings(layers, shortcuts):
    """name -> whose units a layer's inputs are, None for the first one."""
    found, read, aside, main = {}, None, None, None
    for name, (outs, ins, *kernel) in layers.items():
        is_shortcut = False
        if shortcuts and kernel and read is not None:
            is_shortcut = outs != ins and set(kernel) == {1}
            if is_shortcut and aside is None:
                raise UsageError(f"otfusion: {name!r} is a shortcut, and no layer before it changes the number of channels")
            if is_shortcut:
                main, read = read, aside
            elif outs != ins:
                aside = read
            elif main is not None:
                read = f"{read} + {main}"
        main = main if is_shortcut else None
        found[name], read = read, called(name)
    return found


def called(name):
    """What the units of a layer are called: the tensor's name without .weight."""
    return name.removesuffix(".weight")


def parts(name):
    """A name "a + b" in a spec is the mean of two maps."""
    return name.split(" + ")


def last_layer(spec):
    """The tensors of a chain from its last weight on."""
    order = list(spec.axes)
    return order[max((i for i, name in enumerate(order) if len(spec.axes[name]) > 1), default=len(order)) :]


def check(models, spec, activations, plans):
    """UsageError unless models, and what comes with them, fit the spec and one another."""
    if len({isinstance(model, Checkpoint) for model in models}) > 1:
        raise UsageError("otfusion: models are all checkpoints or all mappings of arrays")
    for key, values, count in (("activations", activations, len(models)), ("plans", plans, len(models) - 1)):
        if values is not None and len(values) != count:
            raise UsageError(f"otfusion: {key} has {len(values)} mappings, and there is one for each of {count} models")
    first = shapes(models[0])
    for k, model in enumerate(models):
        if empty := [P for P, n in spec.sizes(model).items() if not n]:
            raise UsageError(f"otfusion: {empty[0]!r} has no units, of which there is no mean")
        for name, shape in shapes(model).items():
            for axis, (n, m) in enumerate(zip(first[name], shape)):
                if n != m and (spec.axes[name] is None or spec.axes[name][axis] is None):
                    raise UsageError(
                        f"otfusion: axis {axis} of {name!r}, which is not matched, has {n} places here and {m} in model {k}"
                    )


def in_order(spec, written_by, by_weights):
    """(permutation, the tensors whose slices its units are) in an order in which their other axes are matched before.

    Those are the tensors of several axes along whose first one, where outputs are, the permutation lies. Next comes the
    permutation that has some whose other axes are matched, and of which the fewest wait. If there is none it is the first
    that has such a tensor along any axis. Permutations inside of heads are not matched.
    """
    todo = [P for P, owners in spec.owners.items() if not owners and len(parts(P)) == 1]
    if unknown := sorted({*written_by} - {*todo}):
        raise UsageError(f"otfusion: written_by names {unknown[0]!r}, and what is matched is {', '.join(todo) or 'nothing'}")
    found = []
    while todo:
        uses = {P: [use for use in spec.uses(P) if len(spec.axes[use[0]]) > 1] for P in todo}
        made = {P: [(n, a) for n, a in uses[P] if (n in written_by[P] if P in written_by else a == 0)] for P in todo}
        waits = {P: sum(waiting(use, spec, todo) for use in made[P]) for P in todo}
        able = [P for P in todo if waits[P] < len(made[P]) and not (P in written_by and waits[P])]
        others = [P for P in todo if P not in written_by and not all(waiting(use, spec, todo) for use in uses[P])]
        if by_weights and not able and not others:
            raise UsageError(
                f"otfusion: each tensor of {todo[0]!r} has other units that are not matched yet: written_by can name those "
                "that count, and activations need none"
            )
        P = min(able, key=waits.get) if able else (others or todo)[0]
        ready = [n for n, a in (made if able else uses)[P] if not waiting((n, a), spec, todo)]
        found.append((P, ready if by_weights else []))
        todo.remove(P)
    return found


def waiting(use, spec, todo):
    """Whether another axis of the tensor has a permutation that is still to do."""
    name, axis = use
    others = [entry for a, entry in enumerate(spec.axes[name]) if a != axis]
    return any({*parts(P)} & {*todo} for entry in others for P, _ in names(entry))


def is_read(P, spec, tensors):
    """Whether a layer reads the units of P: those of an output are not weighed."""
    readers = [name for name, axes in spec.axes.items() if len(axes or ()) > 1 and name not in tensors]
    return any(P in parts(used) for name in readers for entry in spec.axes[name] for used, _ in names(entry))


def rows(model, spec, P, tensors, K):
    """A float64 matrix: row i is all that belongs to unit i of P in these tensors, transported along their other axes."""
    found = [np.zeros((spec.sizes(model)[P], 0))]
    for name in tensors:
        x, entries = finite(model, name), spec.axes[name]
        axis = next(a for tensor, a in spec.uses(P) if tensor == name)
        for other, entry in enumerate(entries):
            x = x if other == axis else along(x, other, entry, K)
        places = places_of(entries[axis], P, np.arange(x.shape[axis]))
        found.append(np.take(np.moveaxis(x, axis, 0), places.reshape(-1), axis=0).reshape(len(places), -1))
    return np.concatenate(found, axis=1)


def units(activations, P, model, spec):
    """The activations of P's units as the rows of a matrix: arrays (samples, units, ...)."""
    n = spec.sizes(model)[P]
    if P not in activations:
        raise UsageError(
            f"otfusion: no activations of {P!r}, there are those of {', '.join(map(repr, activations)) or 'none'}"
        )
    x = scores(activations[P])
    if x.ndim < 2 or x.shape[1] != n:
        raise UsageError(f"otfusion: activations of {P!r} are (samples, {n} units, ...), not {list(x.shape)}")
    if not np.isfinite(x).all():
        raise UsageError(f"otfusion: activations of {P!r} are NaN or infinite somewhere: no option allows it")
    return np.moveaxis(x, 1, 0).reshape(n, -1)


def mass(W, kind, n):
    """How much each unit weighs: 1 / n, or as the l1 or l2 norm of its row, which has 1e-9 added."""
    if kind == "uniform":
        return np.full(n, 1 / n)
    if kind not in ("l1", "l2"):
        raise UsageError(f"otfusion: masses = {kind!r} is none of 'uniform', 'l1', 'l2'")
    norm = np.linalg.norm(W, ord=int(kind[1]), axis=1) + 1e-9
    return norm / norm.sum()


def given(T, P, shape):
    """A plan that was made elsewhere."""
    T = scores(T)
    if T.shape != shape or not np.isfinite(T).all():
        raise UsageError(f"otfusion: the plan of {P!r} is finite and of shape {list(shape)}, not {list(T.shape)}")
    return T


def corrected(T, correction="columns", eps=0.0):
    """K: the plan as it is applied. "columns": columns divided by their sums, so that each place gets a mean of units.
    "constant": all divided by 1 / n, n columns. "rows": rows divided by their sums. "none": T. eps is added to divisors."""
    if correction == "rows" and T.shape[0] != T.shape[1]:
        raise UsageError(
            f"otfusion: correction = {correction!r} is for equal widths, not {T.shape[0]} and {T.shape[1]}: 'columns'"
        )
    if correction == "columns":
        return T / (T.sum(axis=0) + eps)
    if correction == "rows":
        return T / (T.sum(axis=1, keepdims=True) + eps)
    if correction == "constant":
        return T / (1 / T.shape[1] + eps)
    if correction != "none":
        raise UsageError(f"otfusion: correction = {correction!r} is none of 'columns', 'rows', 'constant', 'none'")
    return T


def along(x, axis, entry, K):
    """x transported along one axis."""
    return np.moveaxis(carried(np.moveaxis(x, axis, 0), entry, K), 0, axis)


def carried(x, entry, K):
    """x transported along its first axis. What has no map stays where it is, as do permutations inside of heads."""
    match entry:
        case str():
            maps = [K[P] for P in parts(entry) if P in K]
            return np.tensordot(sum(maps).T / len(maps), x, axes=1) if maps else x
        case Block(P, k, inner) | Nested(P, inner, k):
            x = carried(x.reshape(-1, k, *x.shape[1:]), P, K)
            x = np.moveaxis(carried(np.moveaxis(x, 1, 0), inner, K), 0, 1)
            return x.reshape(-1, *x.shape[2:])
        case Slices(pieces, sizes):
            cuts = len(pieces) if sizes is None else np.cumsum(sizes)[:-1]
            return np.concatenate([carried(piece, e, K) for piece, e in zip(np.split(x, cuts), pieces)])
    return x


def finite(model, name):
    """The tensor in float64. UsageError where it is not finite."""
    x = scores(model[name])
    if not np.isfinite(x).all():
        raise UsageError(f"otfusion: tensor {name!r} is NaN or infinite somewhere: no option allows it")
    return x


def from_official(params, *, clafusion=False):
    """The keywords of `otfusion([model 1, model 0], ...)` for options of the authors' command line, under their names and
    with their defaults; with `clafusion` for CLAFusion's copy of the code.

    What does not touch the fusion is passed over. Activations are given beside them where geom_ensemble_type is "acts".
    """
    get = DEFAULTS | dict(params)
    if refused := [key for key in ("unbalanced", "gromov", "update_acts", "act_bug") if get[key]]:
        raise UsageError(f"otfusion: {refused[0]} is a trial in the authors' code, not part of the method, and is not here")
    acts = get["geom_ensemble_type"] == "acts"
    counted = get["ground_metric_eff"] and get["dist_normalize"] and get["activation_histograms"]
    kept = {"average": "identity", "second": "second"}[get["skip_last_layer_type"] if acts else "average"]
    correction = "columns" if get["proper_marginals"] or (clafusion and acts) else "rows" if acts else "constant"
    return {
        "weight": [get["ensemble_step"], 1 - get["ensemble_step"]],
        "metric": get["ground_metric"],
        "squared": not get["not_squared"],
        "unit_rows": get["normalize_wts"] and not acts,
        "divide": get["act_num_samples"] if counted else 1.0,
        "normalize": get["ground_metric_normalize"],
        "clip": (get["reg"] * get["clip_min"], get["reg"] * get["clip_max"]) if get["clip_gm"] else None,
        "masses": get["importance"] or "uniform",
        "exact": get["exact"],
        "reg": get["reg"],
        "kernel": "float32",
        "correction": correction if get["correction"] else "none",
        "eps": 1e-7,
        "align_inputs": get["past_correction"],
        "output": kept if get["skip_last_layer"] else "transport",
        "shortcuts": get["handle_skips"] and (acts or clafusion),
    }


DEFAULTS = {
    "act_bug": False,
    "act_num_samples": 100,
    "activation_histograms": False,
    "clip_gm": False,
    "clip_max": 5,
    "clip_min": 0,
    "correction": False,
    "dist_normalize": False,
    "ensemble_step": 0.5,
    "exact": False,
    "geom_ensemble_type": "wts",
    "gromov": False,
    "ground_metric": "euclidean",
    "ground_metric_eff": False,
    "ground_metric_normalize": "log",
    "handle_skips": False,
    "importance": None,
    "normalize_wts": False,
    "not_squared": False,
    "past_correction": False,
    "proper_marginals": False,
    "reg": 1e-2,
    "skip_last_layer": False,
    "skip_last_layer_type": "average",
    "unbalanced": False,
    "update_acts": False,
}
