"""Two models compared: their weights, tensor by tensor in blocks, and their loss along the line between them.

`weights` needs no data and bounded memory. `along` needs inputs with labels and one of the networks of refmerge.nets.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.checkpoint import DTYPES, FLOATS, Checkpoint, decode, itemsize
from refmerge.errors import InputError, UsageError
from refmerge.numeric import STRETCH, exact_sum, expansion, host, leaf_sums
from refmerge.recipe.layers import place_of

if TYPE_CHECKING:
    from refmerge.compare_measures import Measure
    from refmerge.procedures.measures.loss_barrier import Barrier

__all__ = ["Comparison", "Line", "Task", "Tensor", "along", "network", "networks", "options_of", "task", "weights"]

FINER = ("cosine", "ratio")  # numbers near 1, shown with more digits
RANKED = 1 << 24  # entries of the largest matrix whose rank is found unless more are allowed: 4096 by 4096
KINDS = ("attention", "mlp", "norm", "other")
_NORM = re.compile(r"norm|^ln(_|\d|$)|^bn\d*$", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|^(q|k|v|o|qkv|query|key|value)(_proj)?$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|moe|expert|^dense|^(gate|up|down)(_up)?_proj$|^(fc|linear|w)_?\d|^intermediate$|^output$",
    re.IGNORECASE,
)
BLOCK = STRETCH  # elements of a tensor at a time: whole stretches of the sums, in cache


@dataclass(frozen=True)
class Tensor:
    """What is found out of a tensor that both models have. norm: of both. distance: |a - b|; relative: in |a|. cosine: of
    the angle between them. ratio: |b| / |a|. largest: the largest difference of entries, NaN aside. differing: how many
    entries differ; equal: the share of those that do not, NaN twice among them. nan, infinite: how many of them each has.
    changes: cosine of a - base and b - base. conflicts: of the entries that both changed of the base, the share that they
    changed with opposite signs. rank: the effective rank of a - b. None where there is no such number: for integers, zeros,
    what is not finite."""

    name: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    norm: tuple[float | None, float | None] = (None, None)
    distance: float | None = None
    relative: float | None = None
    cosine: float | None = None
    ratio: float | None = None
    largest: float | None = None
    differing: int = 0
    equal: float | None = None
    nan: tuple[int, int] = (0, 0)
    infinite: tuple[int, int] = (0, 0)
    changes: float | None = None
    conflicts: float | None = None
    rank: float | None = None


@dataclass(frozen=True)
class Group:
    """All tensors of one kind in a layer as one: |a - b| in |a|, and the cosine. None as of a tensor."""

    relative: float | None
    cosine: float | None


@dataclass(frozen=True)
class Comparison:
    """tensors: those that both have in one shape, by name. whole: of all their floating-point entries together. only: names
    that one model alone has. apart: name -> why the two cannot be compared. from_base: whether there was a base. ranked:
    whether ranks were asked for; too_large: the matrices that were too large for that."""

    tensors: dict[str, Tensor]
    whole: Tensor
    only: tuple[tuple[str, ...], tuple[str, ...]]
    apart: dict[str, str]
    from_base: bool
    ranked: bool = False
    too_large: tuple[str, ...] = ()

    def most(self, by: str = "relative") -> list[Tensor]:
        """Tensors that differ, the most different first: by relative, distance, largest, differing or cosine. Before them
        those that have no such number: of integers, or with values that are not finite."""
        differing = [x for x in self.tensors.values() if x.differing]
        if by == "cosine":
            return sorted(differing, key=lambda x: (x.cosine is not None, x.cosine or 0.0, x.name))
        return sorted(differing, key=lambda x: (getattr(x, by) is not None, -(getattr(x, by) or 0.0), x.name))

    def by_layer(self) -> dict[str, dict[str, dict[int, Group]]]:
        """How the names of layers begin -> kind, of KINDS -> layer -> what is found out of its floating-point tensors."""
        members: dict[tuple[str, str, int], list[Tensor]] = {}
        for x in self.tensors.values():
            place = place_of(x.name)
            if place is not None and x.dtypes[0] in FLOATS:
                members.setdefault((place.stack, kind_of(place.rest), place.layer), []).append(x)
        found: dict[str, dict[str, dict[int, Group]]] = {}
        for stack, kind, layer in sorted(members, key=lambda key: (key[0], KINDS.index(key[1]), key[2])):
            found.setdefault(stack, {}).setdefault(kind, {})[layer] = _group(members[stack, kind, layer])
        return found

    def told(self) -> dict[str, Any]:
        """For programs."""

        def facts(x: Tensor) -> dict[str, Any]:
            return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(x).items() if key != "name"}

        whole = {key: value for key, value in facts(self.whole).items() if key not in ("shape", "rank")}
        only = {f"only_{which}": list(names) for which, names in zip("ab", self.only)}
        tensors = {name: facts(x) for name, x in self.tensors.items()}
        layers = {
            stack: {kind: {str(layer): vars(group) for layer, group in layers.items()} for kind, layers in kinds.items()}
            for stack, kinds in self.by_layer().items()
        }
        found = {"tensors": tensors, "whole": whole, **only, "apart": self.apart, "layers": layers}
        return found | ({"too_large": list(self.too_large)} if self.ranked else {})

    def summary(self) -> list[tuple[str, str]]:
        """What there is to say of the models as a whole: label, sentence."""
        whole = self.whole
        equal = sum(not x.differing for x in self.tensors.values())
        found = [("tensors", f"{len(self.tensors)} in both, {equal} of them equal")]
        for which, names in zip("AB", self.only):
            found += [(f"only {which}", f"{len(names)}: {some(names)}")] if names else []
        found += [("apart", f"{shown(name)}: {why}") for name, why in self.apart.items()]
        for i, which in enumerate("AB"):
            odd = [x.name for x in self.tensors.values() if x.nan[i] or x.infinite[i]]
            if odd:
                counts = f"{whole.nan[i]:,} NaN and {whole.infinite[i]:,} infinite entries in"
                found.append(("NaN, inf", f"in {which}: {counts} {some(odd)}"))
        norms = f"|A| = {digits(whole.norm[0])}, |B| = {digits(whole.norm[1])}, |B| / |A| = {digits(whole.ratio, 6)}"
        found.append(("distance", f"|A - B| = {digits(whole.distance)}, {norms}, relative {digits(whole.relative)}"))
        found.append(("cosine", digits(whole.cosine, 6)))
        found.append(("equal", f"{percent(whole.equal)} of the entries, differing {whole.differing:,}"))
        if self.from_base:
            found.append(("changes", f"cosine {digits(whole.changes, 6)} of what A and B changed of the base"))
            found.append(("signs", f"{percent(whole.conflicts)} of the entries that both changed have opposite signs"))
        if self.ranked:
            ranks = sum(x.rank is not None for x in self.tensors.values())
            found.append(("rank", f"effective, exp of the entropy of the singular values of A - B, of {ranks} matrices"))
        if self.too_large:
            found.append(("", f"not of {len(self.too_large)} that are too large: {some(self.too_large)}"))
        return found

    def columns(self) -> list[str]:
        """Numbers of a tensor that a narrow table shows."""
        based, ranked = ["changes", "conflicts"] * self.from_base, ["rank"] * self.ranked
        return ["relative", "cosine", "ratio", "largest", "differing", *based, *ranked]

    def text(self, top: int = 20, by: str = "relative") -> str:
        """For people."""
        lines = [f"{label:8}  {said}" for label, said in self.summary()]
        listed = self.most(by)[:top]
        if listed:
            columns = self.columns()
            columns = columns if by in columns else [by, *columns]
            rows = [[f"most different, by {by}", *columns]]
            for x in listed:
                rows.append([shown(x.name), *(digits(getattr(x, key), 6 if key in FINER else 3) for key in columns)])
            widths = [max(map(len, column)) for column in zip(*rows)]
            lines.append("")
            for first, *others in rows:
                lines.append("  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(others, widths[1:]))]))
        return "\n".join(lines)


def kind_of(name: str) -> str:
    """Attention, mlp, norm or other: what a tensor in a layer is for, by what its name says after the layer's number. A
    norm within attention is a norm, and a dense layer within it attention."""
    parts = name.strip(".").split(".")
    module = parts[:-1] or parts
    if _NORM.search(module[-1]):
        return "norm"
    if any(map(_ATTENTION.search, module)):
        return "attention"
    return "mlp" if any(map(_MLP.search, module)) else "other"


def _group(tensors: Sequence[Tensor]) -> Group:
    of_a, of_b = (together([x.norm[i] for x in tensors]) for i in (0, 1))
    distance = together([x.distance for x in tensors])
    if of_a is None or of_b is None or distance is None:
        return Group(None, None)
    relative = _quotient(distance, of_a) if distance else 0.0
    if not (of_a and of_b):
        return Group(relative, None)
    shares = [(x.cosine or 0.0) * ((x.norm[0] or 0.0) / of_a) * ((x.norm[1] or 0.0) / of_b) for x in tensors]
    return Group(relative, max(-1.0, min(1.0, math.fsum(shares))))


def together(norms: Sequence[float | None]) -> float | None:
    """The norm of tensors one after the other."""
    known = [x for x in norms if x is not None]
    return math.hypot(*known) if len(known) == len(norms) else None


def digits(x: float | None, significant: int = 3) -> str:
    """A number for people; a dash where there is none."""
    return "-" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:.{significant}g}"


def shown(name: str) -> str:
    """A name that is safe on a terminal and in a file of UTF-8."""
    return name if name.isprintable() else repr(name)


def some(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (", ..." if len(names) > 5 else "")


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.4g} %"


def weights(
    a: Checkpoint,
    b: Checkpoint,
    base: Checkpoint | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
    rank: int | None = None,
) -> Comparison:
    """Compare checkpoints tensor by tensor, a block of each at a time. progress is told the bytes that were read. rank: how
    many entries a matrix may have to be held whole, for the effective rank of its difference; None for no ranks."""
    only = tuple(sorted(a.tensors.keys() - b.tensors.keys())), tuple(sorted(b.tensors.keys() - a.tensors.keys()))
    tensors, apart, too_large, sums = {}, {}, [], _Sums()
    for name in a.tensors:
        if name not in b.tensors:
            continue
        one, other = a.tensors[name], b.tensors[name]
        if one.shape != other.shape:
            apart[name] = f"{list(one.shape)} and {list(other.shape)}"
        elif (one.dtype in FLOATS) != (other.dtype in FLOATS):
            apart[name] = f"{one.dtype} and {other.dtype}"
        elif one.dtype in FLOATS:
            here = _Sums()
            from_base = base if base is not None and _as(base, name, one.shape) else None
            fits = rank is not None and len(one.shape) == 2 and one.size <= rank
            if rank is not None and len(one.shape) == 2 and not fits:
                too_large.append(name)
            difference = np.empty(one.size if fits else 0)
            start = 0
            for block in blocks(name, one.size, [a, b] + ([from_base] if from_base is not None else []), progress):
                wide = [*map(widened, block)]
                here.add(*wide)
                if fits:
                    with np.errstate(all="ignore"):
                        np.subtract(wide[0], wide[1], out=difference[start : start + wide[0].size])
                    start += wide[0].size
            sums.join(here)
            found = here.tensor(name, (one.dtype, other.dtype), one.shape)
            tensors[name] = replace(found, rank=effective_rank(difference.reshape(one.shape))) if fits else found
        else:
            tensors[name] = _integers(name, a, b, progress)
    dtypes = tuple("+".join(sorted({x.dtypes[i] for x in tensors.values()} & FLOATS)) for i in (0, 1))
    whole = sums.tensor("", (dtypes[0], dtypes[1]), ())
    return Comparison(tensors, whole, (only[0], only[1]), apart, base is not None, rank is not None, tuple(too_large))


def effective_rank(x: np.ndarray) -> float | None:
    """exp of the entropy of the singular values, divided by their sum, of a matrix in float64: between 1 and its rank, k for
    k equal ones. 0 for zeros, None for what is not finite.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    if not np.isfinite(x).all():
        return None
    if not x.any():
        return 0.0
    values = np.linalg.svd(x / np.abs(x).max(), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _as(base: Checkpoint, name: str, shape: tuple[int, ...]) -> bool:
    found = base.tensors.get(name)
    return found is not None and found.shape == shape and found.dtype in FLOATS


def blocks(
    name: str, size: int, models: list[Checkpoint], progress: Callable[[int], None]
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Blocks of a tensor: of each model its dtype, and the bytes."""
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        found = []
        for model in models:
            dtype = model.tensors[name].dtype
            raw = np.empty((stop - start) * itemsize(dtype), np.uint8)
            model.read(name, start, stop, raw)
            found.append((dtype, raw))
            progress(raw.size)
        yield found


def widened(block: tuple[str, np.ndarray]) -> np.ndarray:
    """Floats, in float64."""
    dtype, raw = block
    wide = np.empty(raw.size // itemsize(dtype), np.float64)
    decode(raw, dtype, wide)
    return wide


def _integers(name: str, a: Checkpoint, b: Checkpoint, progress: Callable[[int], None]) -> Tensor:
    differing = 0
    for block in blocks(name, a.tensors[name].size, [a, b], progress):
        x, y = (raw.view(DTYPES[dtype]) for dtype, raw in block)
        differing += int(np.count_nonzero(x != y))
    size, dtypes = a.tensors[name].size, (a.tensors[name].dtype, b.tensors[name].dtype)
    return Tensor(name, dtypes, a.tensors[name].shape, differing=differing, equal=_share(size - differing, size))


class _Sums:
    """Sums over the entries of a tensor or of many: exact, so that the order in which they come does not matter."""

    KEYS = ("aa", "bb", "ab", "dd", "pp", "qq", "pq")

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self.largest = 0.0
        self.counts: Counter[str] = Counter()

    def add(self, a: np.ndarray, b: np.ndarray, base: np.ndarray | None = None) -> None:
        nans = np.isnan(a), np.isnan(b)
        for which, x, nan in zip("ab", (a, b), nans):
            self.counts[f"nan {which}"] += int(np.count_nonzero(nan))
            self.counts[f"infinite {which}"] += int(np.count_nonzero(np.isinf(x)))
        self.counts["size"] += a.size
        self.counts["differing"] += int(np.count_nonzero((a != b) & ~(nans[0] & nans[1])))
        with np.errstate(all="ignore"):
            d = a - b
            products = {"aa": a * a, "bb": b * b, "ab": a * b, "dd": d * d}
            if base is not None:
                p, q = a - base, b - base
                products |= {"pp": p * p, "qq": q * q, "pq": p * q}
                opposite = (p > 0) & (q < 0) | (p < 0) & (q > 0)
                alike = (p > 0) & (q > 0) | (p < 0) & (q < 0)
                self.counts["opposite"] += int(np.count_nonzero(opposite))
                self.counts["alike"] += int(np.count_nonzero(alike))
            size = np.abs(d)
            size = size[~np.isnan(size)]
        self.largest = max(self.largest, float(size.max()) if size.size else 0.0)
        for key, sums in zip(products, leaf_sums(*products.values())):
            self._add(key, sums.tolist())

    def _add(self, key: str, sums: Sequence[float]) -> None:
        parts = expansion([*self.parts.get(key, ()), *sums])
        self.parts[key] = parts if len(parts) < 64 else [exact_sum(parts)]  # many only where infinities of both signs met

    def join(self, other: _Sums) -> None:
        for key, parts in other.parts.items():
            self._add(key, parts)
        self.largest = max(self.largest, other.largest)
        self.counts.update(other.counts)

    def tensor(self, name: str, dtypes: tuple[str, str], shape: tuple[int, ...]) -> Tensor:
        total = {key: exact_sum(self.parts.get(key, ())) for key in self.KEYS}
        norm = _root(total["aa"]), _root(total["bb"])
        distance = _root(total["dd"])
        counts = self.counts
        return Tensor(
            name, dtypes, shape, norm, distance,
            relative=0.0 if distance == 0 and norm[0] is not None else _quotient(distance, norm[0]),
            cosine=_cosine(total["ab"], total["aa"], total["bb"]),
            ratio=_quotient(norm[1], norm[0]),
            largest=self.largest if math.isfinite(self.largest) else None,
            differing=counts["differing"],
            equal=_share(counts["size"] - counts["differing"], counts["size"]),
            nan=(counts["nan a"], counts["nan b"]),
            infinite=(counts["infinite a"], counts["infinite b"]),
            changes=_cosine(total["pq"], total["pp"], total["qq"]) if "pp" in self.parts else None,
            conflicts=_share(counts["opposite"], counts["opposite"] + counts["alike"]),
        )  # fmt: skip


def _quotient(x: float | None, y: float | None) -> float | None:
    return x / y if x is not None and y and math.isfinite(x / y) else None


def _share(part: int, of: int) -> float | None:
    return part / of if of else None


def _root(x: float) -> float | None:
    return math.sqrt(x) if math.isfinite(x) else None


def _cosine(ab: float, aa: float, bb: float) -> float | None:
    if not (math.isfinite(ab) and math.isfinite(aa) and math.isfinite(bb) and aa > 0 and bb > 0):
        return None
    return max(-1.0, min(1.0, ab / (math.sqrt(aa) * math.sqrt(bb))))


# ------------------------------------------------------------------------------------------------------------- with data


def networks() -> list[str]:
    """The architectures that a loss can be computed of."""
    package = importlib.import_module("refmerge.nets")
    modules = [importlib.import_module(f"refmerge.nets.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    return sorted(m.__name__.rpartition(".")[2] for m in modules if hasattr(m, "forward"))


def network(name: str) -> Callable[..., Any]:
    """The forward of that name. UsageError where there is none."""
    if name not in networks():
        raise UsageError(f"there is no network {name!r} (there are {', '.join(networks())})")
    return importlib.import_module(f"refmerge.nets.{name}").forward


@dataclass
class Task:
    """A network's losses and errors on labelled inputs, and what else can be found out of a model by running it.

    batch: how many inputs are run at a time. options: of forward, such as heads.
    """

    forward: Callable[..., Any]
    inputs: np.ndarray
    labels: np.ndarray
    batch: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)
    _last: tuple[Any, tuple[float, float]] | None = field(default=None, init=False, repr=False)

    @property
    def samples(self) -> int:
        return self.labels.size

    def loss(self, model: Mapping[str, Any]) -> float:
        """The mean cross-entropy."""
        return self._both(model)[0]

    def error(self, model: Mapping[str, Any]) -> float:
        """The share of wrong answers."""
        return self._both(model)[1]

    def _both(self, model: Mapping[str, Any]) -> tuple[float, float]:
        if self._last is None or self._last[0] is not model:  # both are asked of one model in turn
            self._last = model, _evaluate(self.run(model))
        return self._last[1]

    def run(self, model: Mapping[str, Any], taps: Any = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Outputs and labels of each batch. taps: a dictionary that the network writes into, emptied before each."""
        params = {name: host(model[name]) for name in model}
        wide = any(x.dtype == np.float64 for x in params.values())
        for x, y in self.batches():
            if taps is not None:
                taps.clear()
            if x.dtype.kind == "f":
                x = x.astype(np.float64 if wide else np.float32)
            with np.errstate(all="ignore"):
                z = self.fitting(np.asarray(self.outputs(params, x, taps), dtype=np.float64), y)
            yield z, y

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.inputs), self.batch):
            yield self.inputs[start : start + self.batch], self.labels[start : start + self.batch].reshape(-1)

    def outputs(self, params: Mapping[str, Any], x: Any, taps: Any = None) -> Any:
        """What the network gives. UsageError where weights and inputs do not fit it."""
        try:
            return self.forward(params, x, taps, **self.options)
        except (KeyError, ValueError, TypeError, IndexError) as e:
            reason = f"tensor {e} is missing" if isinstance(e, KeyError) else str(e)
            net = self.forward.__module__.rpartition(".")[2]
            raise UsageError(f"{net} cannot run these weights on these inputs: {reason}") from e

    @staticmethod
    def fitting(z: Any, y: np.ndarray) -> Any:
        """Outputs as rows, one for each label. UsageError where they do not fit."""
        z = z.reshape(-1, z.shape[-1])
        if len(z) != len(y) or y.min() < 0 or y.max() >= z.shape[1]:
            raise UsageError(
                f"labels from {y.min()} to {y.max()} do not fit {len(z)} outputs of {z.shape[1]} classes for {len(y)}"
            )
        return z


def task(net: str, data: str | Path, *, batch: int = 256, **options: Any) -> Task:
    """Cross-entropy and share of errors of a network of refmerge.nets on the inputs and labels in an .npz file, in float32
    for weights of 32 bits or fewer. options: of its forward, such as heads."""
    return Task(network(net), *_labelled(data), batch, options)


def options_of(net: str, config: Mapping[str, Any] | None, heads: int | None) -> dict[str, Any]:
    """What else the forward of a network must be told: the number of heads, as said or from a config. UsageError where it is
    not known, or there is none to tell."""
    wanted = inspect.signature(network(net)).parameters
    if "heads" not in wanted:
        if heads is not None:
            raise UsageError(f"{net} has no heads of attention")
        return {}
    known = config or {}
    heads = heads or known.get("num_attention_heads") or known.get("n_head")
    if type(heads) is not int or heads < 1:
        raise UsageError(f"{net} wants the number of heads: --heads, or num_attention_heads in config.json")
    said = {"groups": known.get("num_key_value_heads"), "chosen": known.get("num_experts_per_tok")}
    said["normalize"] = known.get("norm_topk_prob")
    return {"heads": heads} | {key: x for key, x in said.items() if key in wanted and isinstance(x, int)}


def _labelled(data: str | Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = np.load(data, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise InputError(f"{data}: is a single array, and an .npz with inputs and labels is wanted")
        with found:
            if missing := {"inputs", "labels"} - set(found):
                raise InputError(f"{data}: there is no array {sorted(missing)[0]!r}; inputs and labels are wanted")
            inputs, labels = found["inputs"], found["labels"]
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{data}: cannot be read as .npz: {e}") from e
    if labels.dtype.kind not in "iu" or not labels.size or len(labels) != len(inputs):
        raise InputError(
            f"{data}: labels are whole numbers, one or more for each of the inputs; these are {labels.dtype} of shape "
            f"{list(labels.shape)} for inputs of shape {list(inputs.shape)}"
        )
    return inputs, labels


def _evaluate(found: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Mean cross-entropy and share of errors of batches of outputs and labels."""
    losses, wrong = [], 0
    for z, y in found:
        with np.errstate(all="ignore"):
            z = z - z.max(axis=1, keepdims=True)
            of_label = z[np.arange(len(y)), y]
            losses += (np.log(np.exp(z).sum(axis=1)) - of_label).tolist()
        wrong += int(np.count_nonzero(~(np.argmax(z, axis=1) == y) | np.isnan(of_label)))
    return exact_sum(losses) / len(losses), wrong / len(losses)


@dataclass(frozen=True)
class Line:
    """loss, error: barriers on the line between two models. measures: what else was asked for, by name. samples: of the
    data."""

    loss: Barrier
    error: Barrier
    measures: dict[str, Measure]
    samples: int

    def paths(self) -> dict[str, Barrier]:
        """The losses that there is a plot of: on the line, and on another path where a measure has one."""
        others = {m.path_label: m.path for m in self.measures.values() if m.path is not None}
        return {"on the line": self.loss, **others} if others else {"": self.loss}

    def told(self) -> dict[str, Any]:
        """For programs: what is not finite is None."""
        found = {
            "samples": self.samples, "t": self.loss.t, "loss": self.loss.losses, "barrier": self.loss.barrier,
            "at": self.loss.at, "error": self.error.losses, "error_barrier": self.error.barrier, "error_at": self.error.at,
        }  # fmt: skip
        return _finite(found | {name: measure.told() for name, measure in self.measures.items()})

    def text(self) -> str:
        """For people."""
        lines = [
            f"{which:8}  loss {digits(self.loss.losses[i], 4)}, {100 * self.error.losses[i]:.1f} % of {self.samples} wrong"
            for which, i in (("A", 0), ("B", -1))
        ]
        points = len(self.loss.t)
        lines.append(
            f"barrier   {digits(self.loss.barrier, 4)} in the loss, at t = {digits(self.loss.at)} of {points} points"
        )
        lines.append(f"          {100 * self.error.barrier:.1f} % in the error, at t = {digits(self.error.at)}")
        lowest = min(range(len(self.loss.t)), key=lambda i: _key(self.loss.losses[i]))
        wrong = f"{100 * self.error.losses[lowest]:.1f} % wrong"
        lines.append(f"lowest    {digits(self.loss.losses[lowest], 4)}, {wrong}, at t = {digits(self.loss.t[lowest])}")
        return "\n".join([*lines, *(f"\n{measure.text()}" for measure in self.measures.values())])


def _key(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def along(models: Sequence[Any], of: Task, points: int = 25, measures: Sequence[str] = ()) -> Line:
    """The barriers of loss and error on the line between two models, and what measures of refmerge.compare_measures say.
    Counters and other integers between the ends are the first model's, and weights that are not finite pass."""
    from refmerge.compare_measures import LENIENT, MEASURES
    from refmerge.procedures.measures.loss_barrier import barrier_of, loss_barrier

    if unknown := [name for name in measures if name not in MEASURES]:
        raise UsageError(f"there is no measure {unknown[0]!r} (there are {', '.join(MEASURES)})")
    errors: list[float] = []

    def loss(model: Mapping[str, Any]) -> float:
        errors.append(of.error(model))
        return of.loss(model)

    found = loss_barrier(models, loss, points=points, **LENIENT)
    error = barrier_of(found.t, errors)
    with np.errstate(all="ignore"):
        more = {name: MEASURES[name](models, of) for name in dict.fromkeys(measures)}
    return Line(found, error, more, of.samples)
