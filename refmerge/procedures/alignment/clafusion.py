import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refmerge.errors import UsageError
from refmerge.numeric import host, like, scores
from refmerge.procedure import procedure
from refmerge.procedures.alignment.otfusion import Fusion, called, exact_plan, finite, ground_cost, otfusion
from refmerge.procedures.measures.cka import cca, cka

__all__ = ["CrossLayerFusion", "add_layers", "clafusion", "cost_matrix", "diagonal", "layer_map", "merge_layers"]


@dataclass(frozen=True)
class CrossLayerFusion:
    """What `clafusion` gives. map: for each hidden layer of the shallow model the number of its layer in the deep one, from
    1 on. costs: the matrix of each chunk. deep, shallow: the models, made equally deep. fusion: of the deep into the
    shallow one. swapped: whether the deep one is model 1."""

    map: np.ndarray
    costs: list
    deep: dict
    shallow: dict
    fusion: Fusion
    swapped: bool

    @property
    def merged(self):
        """In the order of the layers."""
        return {name: self.fusion.merged[name] for name in self.shallow}


@procedure("clafusion", paper="arXiv:2110.15538")
def clafusion(
    model0,
    model1,
    *,
    orders=None,
    measure="neurons",
    metric="euclidean",
    start=2,
    end=0,
    chunks=None,
    balance="add",
    relu="sum",
    activations=None,
    match="weights",
    fusion=None,
):
    """Fuse two networks of different depths: dynamic programming says which layers of the deep one are those of the shallow
    one; then layers are added to the shallow one, or merged in the deep one, and optimal transport fuses them.

    model0, model1: chains of layers, mappings name -> array in the order of the layers, or open checkpoints and `orders`.
    Returns a CrossLayerFusion, whose `merged` has the widths of the shallow model.
    """
    for key, value, choices in (
        ("measure", measure, ("neurons", "index", "activations")),
        ("balance", balance, ("add", "merge")),
        ("match", match, ("weights", "activations")),
    ):
        if value not in choices:
            raise UsageError(f"clafusion: {key} = {value!r} is none of {', '.join(map(repr, choices))}")
    if activations is None and "activations" in (measure, match):
        raise UsageError("clafusion: activations is a function of a model, and is needed for measure or match 'activations'")
    if (measure == "activations") != (metric != "euclidean"):
        raise UsageError(f"clafusion: metric = {metric!r} does not compare what measure = {measure!r} gives")
    deep, shallow = (ordered(model, order) for model, order in zip((model0, model1), orders or (None, None)))
    # 1. order
    swapped = len(layers_of(deep)) < len(layers_of(shallow))
    deep, shallow = (shallow, deep) if swapped else (deep, shallow)
    # 2. cost
    x, y = (measured(model, measure, activations) for model in (deep, shallow))
    groups = grouped(deep, shallow, chunks)
    costs = [cost_matrix([x[b[-1]] for b in one], [y[b[-1]] for b in other], metric) for one, other in groups]
    # 3. dynamic programming
    A, zeros = [], []
    for (one, other), C in zip(groups, costs):
        matched = [one[place - 1] for place in layer_map(C, start=start, end=end)]
        if [len(block) for block in matched] != [len(block) for block in other]:
            raise UsageError("clafusion: a block is matched with one of more or fewer layers, which chunks can keep apart")
        A += [layer + 1 for block in matched for layer in block]
        zeros += [layer + 1 for block in one if len(block) > 1 for layer in block]
    # 4. balance
    if balance == "add":
        shallow = add_layers(shallow, A, deep, residual=zeros)
    else:
        deep = merge_layers(deep, A, activations(deep) if activations else {}, shallow, relu=relu)
    # 5. fusion
    taps = [activations(shallow), activations(deep)] if match == "activations" else None
    found = otfusion([shallow, deep], list(shallow), activations=taps, **(fusion or {}))
    return CrossLayerFusion(np.array(A), costs, deep, shallow, found, swapped)


def ordered(model, order):
    """The tensors in the order of the layers. UsageError unless the order has all of them."""
    order = list(model if order is None else order)
    if len({*order}) < len(order) or {*order} != {*model}:
        raise UsageError("clafusion: an order of layers has each tensor of its model once")
    return {name: model[name] for name in order}


def layers_of(model):
    """The names of each layer's tensors: a weight of two or more axes, then its vectors."""
    layers = []
    for name, x in model.items():
        if len(x.shape) > 1:
            layers.append([name])
        elif layers:
            layers[-1].append(name)
        else:
            raise UsageError(f"clafusion: {name!r} belongs to no layer: the first tensor of a chain has two axes or more")
    return layers


def measured(model, measure, activations):
    """What each hidden layer is compared by: its width, its number, or its activations."""
    hidden = [layer[0] for layer in layers_of(model)[:-1]]
    if measure == "neurons":
        return [model[name].shape[0] for name in hidden]
    if measure == "index":
        return [number for number, _ in enumerate(hidden, 1)]
    return taken(activations(model), [called(name) for name in hidden])


def taken(activations, names):
    if missing := [name for name in names if name not in activations]:
        raise UsageError(f"clafusion: there are no activations of {missing[0]!r}")
    return [activations[name] for name in names]


def grouped(deep, shallow, chunks):
    """Chunks that are aligned apart: (blocks of the deep one, of the shallow one), a block being numbers of hidden layers
    from 0 on. Where they are not given, one of convolutions and one of the rest."""
    weights = [[model[layer[0]] for layer in layers_of(model)[:-1]] for model in (deep, shallow)]
    if chunks is None:
        convolutions = [sum(len(x.shape) > 2 for x in some) for some in weights]
        rest = [len(some) - c for some, c in zip(weights, convolutions)]
        chunks = [chunk for chunk in (convolutions, rest) if any(chunk)]
    groups, at = [], [0, 0]
    for chunk in chunks:
        group = []
        for side, blocks in enumerate(chunk):
            lengths = [1] * blocks if isinstance(blocks, int) else list(blocks)
            ends = at[side] + np.cumsum(lengths, dtype=int)
            group.append([list(range(end - length, end)) for end, length in zip(ends, lengths)])
            at[side] += sum(lengths)
        if len(group[0]) < len(group[1]) or not group[1]:
            raise UsageError(
                f"clafusion: a chunk has {len(group[0])} layers or blocks of the deep model and {len(group[1])} of the "
                "shallow one: there are as many or more, and at least one; chunks can say where others begin"
            )
        groups.append(group)
    if at != [len(some) for some in weights]:
        raise UsageError(f"clafusion: the chunks have {at} hidden layers, the models {[len(some) for some in weights]}")
    return groups


def cost_matrix(x, y, metric="euclidean", **ground):
    """C[i, j]: how unlike layer i of the deep model and layer j of the shallow one are.

    metric: "euclidean" is (x_i - y_j)^2 of numbers. Of activations (samples, units, ...), "cka" is 1 minus linear centred
    kernel alignment, "cca" 1 minus the mean squared canonical correlation, "wd" the least cost of moving the units of one to
    those of the other, by `ground_cost` with what else is given.
    """
    if metric == "euclidean":
        return (np.asarray(x, dtype=np.float64)[:, None] - np.asarray(y, dtype=np.float64)[None, :]) ** 2
    pairs = {"cka": alignment, "cca": lambda a, b: 1 - cca(flat(a), flat(b)), "wd": lambda a, b: distance(a, b, **ground)}
    if metric not in pairs:
        raise UsageError(f"clafusion: metric = {metric!r} is none of {', '.join(map(repr, ('euclidean', *pairs)))}")
    x, y = ([scores(a) for a in some] for some in (x, y))
    if len({a.shape[:1] for a in (*x, *y)}) > 1 or any(a.ndim < 2 or not a.size for a in (*x, *y)):
        raise UsageError("clafusion: activations are (samples, units, ...), of the same samples for all layers")
    return np.array([[pairs[metric](a, b) for b in y] for a in x])


def flat(x):
    """One row a sample."""
    return x.reshape(len(x), -1)


def alignment(a, b):
    """1 - CKA, 1 where all samples are alike."""
    value = cka(flat(a), flat(b))
    return 1.0 if math.isnan(value) else 1 - value


def distance(a, b, **ground):
    """<T, M> of uniform masses, units being points of as many entries as samples (and places)."""
    a, b = (np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in (a, b))
    M = ground_cost(a, b, **ground)
    return np.sum(exact_plan(np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b)), M) * M)


def layer_map(C, *, start=2, end=0, single="cost"):
    """A: for each of n shallow layers one of m >= n deep ones, in rising order, of the least sum of C[A_k, k]; from 1 on.

    The first start - 1 layers are matched with the first ones, the last `end` with the last ones. Of equal sums it is the
    one that has the smallest numbers. single: "first" matches a single shallow layer with the first, whatever it costs.
    """
    C = np.asarray(C, dtype=np.float64)
    if C.ndim != 2 or not 1 <= C.shape[1] <= C.shape[0] or not np.isfinite(C).all():
        raise UsageError(
            f"clafusion: a cost is a finite matrix (deep, shallow) with no more columns than rows, not {C.shape}"
        )
    if start < 1 or end < 0 or single not in ("cost", "first"):
        raise UsageError(f"clafusion: start = {start!r} from 1, end = {end!r} from 0, single = {single!r} 'cost' or 'first'")
    m, n = C.shape
    if n == 1 and single == "first":
        return np.array([1])
    first, end = min(start - 1, n), min(end, n)  # of those that are pinned
    A = np.arange(1, n + 1)
    A[n - end :] += m - n
    # F[k, j]: the least cost of the first k layers among the first j
    F = np.zeros((n + 1, m + 1))
    F[range(n + 1), range(n + 1)] = np.cumsum([0.0, *np.diag(C)])
    F[first, first:] = F[first, first]
    for k in range(first + 1, n - end + 1):
        for j in range(k + 1, m - end + 1):
            F[k, j] = min(F[k, j - 1], F[k - 1, j - 1] + C[j - 1, k - 1])
    j = m - end
    for k in range(n - end, first, -1):
        while j > k and F[k, j] == F[k, j - 1]:
            j -= 1
        A[k - 1], j = j, j - 1
    return A


def add_layers(model, A, deep, *, residual=()):
    """The shallow model, as deep as `deep`: its k-th hidden layer is at place A_k, and between them are identity layers.

    deep: a model, whose names and kernels the result has; or a number of hidden layers. residual: the numbers of layers in
    residual blocks, or True for all; a convolution added there is zero, for the shortcut is the identity.
    """
    layers = layers_of(model)
    m = deep if isinstance(deep, int) else len(layers_of(deep)) - 1
    A = checked(A, m, len(layers) - 1)
    zeros = range(1, m + 1) if residual is True else residual or ()
    result, k = [], 0
    for place in range(1, m + 2):
        if place == [*A, m + 1][k]:
            result.append([model[name] for name in layers[k]])
            k += 1
            continue
        near = layers[max(k - 1, 0)]  # before the first layer, one for the inputs
        W, units = model[near[0]], model[near[0]].shape[0 if k else 1]
        if any(not name.endswith("bias") for name in near[1:]):
            raise UsageError(f"clafusion: {near[1:]} are not one bias: nothing can be added after a norm")
        kernel = (3, 3)[: len(W.shape) - 2] if isinstance(deep, int) else deep[layers_of(deep)[place - 1][0]].shape[2:]
        if len(kernel) != len(W.shape) - 2:
            raise UsageError(
                f"clafusion: a layer of the other kind than {near[0]!r} would be added after it: chunks keeps apart"
            )
        x = np.zeros((units, units, *kernel))
        if not (kernel and place in zeros):
            x[(range(units), range(units), *(size // 2 for size in kernel))] = 1
        result.append([like(x, W), *(like(np.zeros(units), model[name]) for name in near[1:])])
    return named(result, [[f"{i}", f"{i}.bias"] for i in range(m + 1)] if isinstance(deep, int) else layers_of(deep))


def merge_layers(model, A, activations, shallow=None, *, relu="sum"):
    """The deep model, as deep as the shallow one: a hidden layer that is none of A becomes a part of the next one, its ReLU
    a diagonal matrix.

    activations: what such layers give before the ReLU, (samples, units): by layer, or a list for all hidden layers. shallow:
    a model, whose names the result has. relu: see `diagonal`.
    """
    layers = layers_of(model)
    A = checked(A, len(layers) - 1, len(A))
    if not isinstance(activations, Mapping) and len(activations) != len(layers) - 1:
        raise UsageError(f"clafusion: activations of {len(activations)} hidden layers, and there are {len(layers) - 1}")
    result, before = [], None
    for place, names in enumerate(layers, 1):
        W, *b = (finite(model, name) for name in names)
        is_merged = place < len(layers) and place not in A
        if len(b) > 1 or (len(W.shape) > 2 and (is_merged or before is not None)):
            raise UsageError(f"clafusion: {names[0]!r} is no linear layer, and no other can be merged")
        if before is not None:
            V, *a = before
            W, b = W @ V, [W @ x + y for x, y in zip(a, b)]
        if is_merged:
            by_name = isinstance(activations, Mapping)
            d = diagonal(taken(activations, [called(names[0])])[0] if by_name else activations[place - 1], relu)
            if d.shape != W.shape[:1]:
                raise UsageError(f"clafusion: activations of {names[0]!r} have {len(d)} units, and it gives {len(W)}")
            before = [d[:, None] * W, *(d * x for x in b)]
        else:
            before = None
            result.append([like(x, model[name]) for x, name in zip((W, *b), names)])
    return named(result, [[f"{i}", f"{i}.bias"] for i in range(len(A) + 1)] if shallow is None else layers_of(shallow))


def diagonal(z, relu="sum"):
    """d of diag(d) in place of a ReLU on z (samples, units). "sum": 1 where the sum over the samples is not below 0, else 0.
    "majority": 1 where half of the samples or more are above 0. "avg": the fraction of samples above 0."""
    z = scores(z)
    if z.ndim != 2 or not len(z):
        raise UsageError(f"clafusion: activations of a merged layer are (samples, units), at least one, not {list(z.shape)}")
    if relu == "sum":
        return (z.sum(axis=0) >= 0).astype(np.float64)
    if relu not in ("majority", "avg"):
        raise UsageError(f"clafusion: relu = {relu!r} is none of 'sum', 'majority', 'avg'")
    share = (z > 0).mean(axis=0)
    return share if relu == "avg" else (share >= 0.5).astype(np.float64)


def checked(A, m, n):
    """The map as whole numbers. UsageError unless it rises from 1 or more to m or less."""
    A = [int(place) for place in host(A)]
    if len(A) != n or sorted({*A}) != A or (A and not 1 <= A[0] <= A[-1] <= m):
        raise UsageError(f"clafusion: the map {A} does not give each of {n} layers one of {m}, in rising order")
    return A


def named(layers, names):
    """The tensors of all layers under names of theirs. UsageError where a layer has a bias here and none there."""
    names = [of[: len(tensors)] if of[0].isdigit() else of for of, tensors in zip(names, layers)]
    if odd := next((of for of, tensors in zip(names, layers) if len(of) != len(tensors)), None):
        raise UsageError(f"clafusion: both models have biases or none has, and {odd[0]!r} has {len(odd) - 1}")
    return {name: x for of, tensors in zip(names, layers) for name, x in zip(of, tensors)}
