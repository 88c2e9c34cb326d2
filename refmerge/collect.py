"""Statistics of a model, gathered by running it on data: `refmerge collect`.

    statistics = collect(forward, params, batches, ["gram", "fisher"])

forward(params, batch, taps) is a network of refmerge.nets, a module of torch (refmerge.nets.torch), or any function that
tells taps what its linear layers read (`taps.read`) and give (`taps.gave`), as refmerge.nets.layers.Layers does. Without
gradients it runs on arrays of any library; those are torch's. Nothing here shuffles, and all draws depend on the seed and
the place of a sample alone: statistics of parts of the data add up to those of the whole.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import device, is_torch_array

from refmerge.adaptive import is_floating
from refmerge.checkpoint import Checkpoint
from refmerge.errors import InputError, UsageError
from refmerge.numeric import array_namespace, host, like, scores
from refmerge.stats import Statistics

__all__ = ["KINDS", "LIKELIHOODS", "Batch", "batches_of", "collect", "forward_of", "gathered"]

KINDS = {
    "gram": "Gram matrices of what linear layers read",
    "moments": "mean and mean square of what they read",
    "outputs": "means and Gram matrices of what they read and give, from which covariances are made",
    "kfac": "Gram matrices of what they read, and of the gradients by what they give",
    "fisher": "the diagonal of the Fisher information of all parameters",
}
ALSO = {"outputs": ("gram", "moments"), "kfac": ("gram",)}
LIKELIHOODS = {
    "exact": "all classes, by the probability that the model gives them",
    "sampled": "a class drawn from the model's probabilities",
    "given": "the labels in the data",
    "next": "each place's next token",
}
BUFFERS = ("running_mean", "running_var")  # of batch norms: they are counted, not trained


@dataclass(frozen=True)
class Batch:
    """inputs: what the network reads, an array or a mapping of named ones, samples first. labels: whole numbers, for each
    sample or place; negative ones do not count. mask: 1 where a place counts, 0 where it is padding."""

    inputs: Any
    labels: Any = None
    mask: Any = None

    def __len__(self) -> int:
        some = next(iter(self.inputs.values())) if isinstance(self.inputs, Mapping) else self.inputs
        return int(some.shape[0])

    def part(self, start: int, stop: int) -> Batch:
        """Some of its samples."""

        def cut(x: Any) -> Any:
            if isinstance(x, Mapping):
                return {name: cut(v) for name, v in x.items()}
            return None if x is None else x[start:stop]

        return Batch(cut(self.inputs), cut(self.labels), cut(self.mask))


def collect(
    forward: Callable[..., Any],
    params: Mapping[str, Any],
    batches: Iterable[Batch],
    kinds: Sequence[str] = ("gram",),
    *,
    likelihood: str = "exact",
    layers: str = "*",
    seed: int = 0,
    first: int = 0,
    progress: Callable[[int], None] = lambda samples: None,
) -> Statistics:
    """Statistics of these kinds over all batches.

    kinds: of KINDS. likelihood: of LIKELIHOODS, for those that need gradients. layers: a glob of modules, and for "fisher"
    of tensors. first: the place of the first sample in the data that it is a part of, which draws depend on. progress: is
    told how many samples are done. params: arrays of any library; torch's where there are gradients, else they become so.

    UsageError for kinds that are none, gradients without torch, labels that do not fit; InputError for layers that no input
    went through, and values that are not finite.
    """
    wanted = set()
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"there is no kind of statistic {kind!r} (there are {', '.join(KINDS)})")
        wanted |= {kind, *ALSO.get(kind, ())}
    if not wanted:
        raise UsageError(f"no kind of statistic is asked for (there are {', '.join(KINDS)})")
    if likelihood not in LIKELIHOODS:
        raise UsageError(f"likelihood = {likelihood!r} is none of {', '.join(LIKELIHOODS)}")
    slopes = wanted & {"kfac", "fisher"}
    facts = {"likelihood": likelihood} | ({"seed": str(seed)} if likelihood == "sampled" else {}) if slopes else {}
    statistics = Statistics(facts)
    run = _Gradients(forward, params, statistics, wanted, layers, likelihood, seed) if slopes else None
    seen: set[str] = set()
    done = 0
    for batch in batches:
        taps = _Taps(statistics, wanted, layers, batch.mask)
        if run is None:
            with np.errstate(all="ignore"):
                forward(params, _beside(batch.inputs, params), taps)
        else:
            run.batch(batch, taps, first + done)
        seen |= taps.seen
        done += len(batch)
        progress(len(batch))
    if run is not None:
        run.finish()
    if not done:
        raise UsageError("there are no samples: nothing was gathered")
    if not seen and wanted != {"fisher"}:
        raise InputError(f"no linear layer that matches {layers!r} was seen: nothing was gathered")
    if wanted != {"fisher"}:
        _warn(forward, params, seen, layers)
    return statistics


def _warn(forward: Any, params: Mapping[str, Any], seen: set[str], layers: str) -> None:
    """Say which linear layers of a module of torch have no statistics."""
    reasons = dict(getattr(forward, "untapped", {}))
    if hasattr(forward, "linear_layers"):
        reasons |= dict.fromkeys([m for m in forward.linear_layers(params) if m not in seen], "no sample went through it")
    for module, reason in reasons.items():
        if fnmatchcase(module, layers):
            warnings.warn(f"there are no statistics of the inputs of {module!r}: {reason}", stacklevel=3)


@dataclass
class _Call:
    """One time that a linear layer ran. x, y: what it read and gave."""

    weight: str
    x: Any
    y: Any = None
    axis: int = -1
    layout: str = "out_in"

    @property
    def module(self) -> str:
        return self.weight.rpartition(".")[0]

    @property
    def bias(self) -> str:
        return f"{self.weight.removesuffix('weight')}bias"


class _Taps(dict[str, Any]):
    """Taps that put what layers read and give into statistics, and hold both where gradients are wanted."""

    def __init__(self, statistics: Statistics, kinds: set[str], layers: str, mask: Any) -> None:
        super().__init__()
        self.statistics, self.kinds, self.layers = statistics, kinds, layers
        self.mask = None if mask is None else host(mask)
        self.calls: list[_Call] = []
        self.seen: set[str] = set()
        self._open: _Call | None = None

    def __setitem__(self, name: str, x: Any) -> None:
        """Matrices of units are not wanted."""

    def read(self, weight: str, x: Any) -> None:
        module = weight.rpartition(".")[0]
        self._open = None
        if not fnmatchcase(module, self.layers):
            return
        self.seen.add(module)
        if "gram" in self.kinds:
            self.statistics.gram(module, x, self.mask_of(x.shape, module))
        if "moments" in self.kinds:
            self.statistics.moments(module, x, self.mask_of(x.shape, module))
        if self.kinds & {"outputs", "kfac", "fisher"}:
            self._open = _Call(weight, x.detach().clone() if is_torch_array(x) else x)

    def gave(self, weight: str, y: Any, axis: int = -1, layout: str = "out_in") -> None:
        call, self._open = self._open, None
        if call is None or call.weight != weight:
            return
        call.y, call.axis, call.layout = y, axis, layout
        if "outputs" in self.kinds:
            rows = array_namespace(y).moveaxis(y, axis, -1)
            self.statistics.outputs(call.module, call.x, rows, self.mask_of(call.x.shape, call.module))
        if self.kinds & {"kfac", "fisher"}:
            self.calls.append(call)

    def mask_of(self, shape: Sequence[int], module: str) -> np.ndarray | None:
        """The batch's mask for rows of this shape; None for a layer that reads each sample once."""
        if self.mask is None or (len(shape) == 2 and self.mask.ndim > 1 and shape[0] == len(self.mask)):
            return None
        ends = self.mask.ndim
        if tuple(shape[:ends]) != self.mask.shape or len(shape) <= ends:
            raise InputError(
                f"layer {module!r} reads rows of shape {list(shape)}, which the mask of {list(self.mask.shape)} places does "
                f"not fit; layers='...' (--layers) leaves it out"
            )
        return np.broadcast_to(self.mask.reshape(self.mask.shape + (1,) * (len(shape) - 1 - ends)), tuple(shape[:-1]))


class _Gradients:
    """Gradients of the log-likelihood, by torch: by what layers give in whole batches; and by parameters of which that does
    not tell all, sample by sample."""

    def __init__(
        self, forward: Any, params: Mapping[str, Any], statistics: Statistics, kinds: set[str], layers: str, likelihood: str,
        seed: int,
    ) -> None:  # fmt: skip
        try:
            import torch
        except ImportError:
            raise UsageError("kfac and fisher want gradients, and those want torch: pip install torch") from None
        self.forward, self.statistics, self.kinds, self.layers = forward, statistics, kinds, layers
        self.likelihood, self.seed = likelihood, seed
        self.twins: dict[str, str] = forward.twins(params) if hasattr(forward, "twins") else {}
        self.params = {}
        for name, x in params.items():
            if name not in self.twins:
                self.params[name] = x.detach() if is_torch_array(x) else torch.from_numpy(np.array(host(x)))
        known = forward.trained(params) if hasattr(forward, "trained") else [
            n for n, x in self.params.items() if x.is_floating_point() and not n.endswith(BUFFERS)
        ]  # fmt: skip
        self.params |= {n: self.params[n].clone().requires_grad_(True) for n in known}
        self.trained = [n for n in known if fnmatchcase(n, layers) or fnmatchcase(n.rpartition(".")[0], layers)]
        self.by_taps: set[str] | None = None  # tensors all of whose gradient goes through taps

    def batch(self, batch: Batch, taps: _Taps, first: int) -> None:
        import torch

        z = self.outputs(batch, taps)
        losses, p = self.log_likelihoods(z, batch, first)
        calls, part = [call for call in taps.calls if call.y.requires_grad], Statistics()
        masks = [taps.mask_of(call.x.shape, call.module) if "kfac" in self.kinds else None for call in calls]
        for call in calls:
            call.x = scores(call.x)
            if len(call.x) != len(batch):
                if len(batch) > 1:
                    raise UsageError(
                        f"layer {call.module!r} reads {len(call.x)} rows of {len(batch)} samples, and whose they are is not "
                        f"known; batches of one sample (--batch 1) have no such doubt"
                    )
                call.x = call.x[None]
        for c, value in enumerate(losses if calls else []):
            found = torch.autograd.grad(value, [call.y for call in calls], retain_graph=True, allow_unused=True)
            slopes = [_like_inputs(g, call) for g, call in zip(found, calls)]
            weights = None if p is None else p[:, c : c + 1]
            if "kfac" in self.kinds:
                for call, g, mask in zip(calls, slopes, masks):
                    part.gradient_gram(call.module, g if p is None else g[:, None], mask, weights)
            if "fisher" in self.kinds:
                layers = by_layer(calls, slopes)
                if self.by_taps is None:
                    self.by_taps = self.whole(layers, value)
                for weight in layers.keys() & self.by_taps:
                    call, x, g = layers[weight]
                    part.fisher(
                        call.module, x, g if p is None else g[:, None], weights, bias=call.bias in self.by_taps,
                        layout=call.layout, shape=tuple(self.params[weight].shape),
                    )  # fmt: skip
        for name in part:
            if count := part.count(name):
                self.statistics.sum(name, part[name] * count, count / len(losses))
        if "fisher" not in self.kinds:
            return
        for name in self.by_taps or ():
            if f"{name}.fisher" not in part:  # no sample went through it: gradients of 0
                self.statistics.sum(f"{name}.fisher", np.zeros(tuple(self.params[name].shape)), len(batch))
        if rest := [name for name in self.trained if name not in (self.by_taps or ())]:
            for i in range(len(batch)):
                self.sample(batch.part(i, i + 1), rest, first + i)

    def outputs(self, batch: Batch, taps: Any = None) -> Any:
        """What the network gives, (samples, classes) or (samples, places, classes)."""
        z = self.forward(self.params, _beside(batch.inputs, self.params), taps)
        if not is_torch_array(z) or z.ndim not in (2, 3) or len(z) != len(batch):
            what = f"shape {list(z.shape)}" if hasattr(z, "shape") else f"type {type(z).__name__}"
            raise UsageError(
                f"a likelihood is of outputs (samples, classes) or (samples, places, classes), torch arrays for "
                f"{len(batch)} samples, and these are of {what}"
            )
        return z

    def log_likelihoods(self, z: Any, batch: Batch, first: int) -> tuple[list[Any], Any]:
        """Sums over samples of log p, one for each class, with the probabilities of classes; or one of given labels, and
        None."""
        import torch

        logs = torch.log_softmax(z, dim=-1)
        if self.likelihood == "exact":
            if z.ndim != 2:
                raise UsageError(
                    "likelihood = 'exact' is a sum over all classes of a sample, and these outputs have places: 'sampled', "
                    "'given' or 'next' take one class for each"
                )
            return [logs[:, c].sum() for c in range(z.shape[-1])], scores(logs.exp())
        labels = self.labels(z, batch, first)
        if labels.shape != tuple(z.shape[:-1]):
            raise UsageError(f"labels of shape {list(labels.shape)} do not fit outputs of shape {list(z.shape)}")
        if labels.size and labels.max() >= z.shape[-1]:
            raise UsageError(f"there is a label {labels.max()}, and the network gives {z.shape[-1]} classes")
        counts = torch.from_numpy(labels >= 0).to(z.device)
        picked = torch.gather(logs, -1, torch.from_numpy(labels.clip(0)).to(z.device)[..., None])[..., 0]
        return [torch.where(counts, picked, torch.zeros_like(picked)).sum()], None

    def labels(self, z: Any, batch: Batch, first: int) -> np.ndarray:
        """A class for each sample or place, -1 where none counts."""
        if self.likelihood == "sampled":
            total = np.cumsum(scores(_softmax(z)), axis=-1)
            drawn = np.zeros(total.shape[:-1], dtype=np.int64)
            for i, row in enumerate(total):
                u = np.random.default_rng([self.seed, first + i]).random(row.shape[:-1]) * row[..., -1]
                drawn[i] = (row <= u[..., None]).sum(axis=-1)
            drawn = np.minimum(drawn, z.shape[-1] - 1)
            return drawn if batch.mask is None or z.ndim == 2 else np.where(host(batch.mask) > 0, drawn, -1)
        if self.likelihood == "given":
            if batch.labels is None:
                raise UsageError("likelihood = 'given' wants labels in the data, and there are none")
            labels = host(batch.labels)
            if labels.dtype.kind not in "iu":
                raise UsageError(f"labels are whole numbers, not {labels.dtype}")
            return labels.astype(np.int64)
        tokens = host(batch.inputs.get("input_ids", 0.0) if isinstance(batch.inputs, Mapping) else batch.inputs)
        if tokens.dtype.kind not in "iu" or tokens.ndim != 2:
            raise UsageError("likelihood = 'next' is of tokens (samples, places): whole numbers as inputs or input_ids")
        found = np.full(tokens.shape, -1, dtype=np.int64)
        found[:, :-1] = tokens[:, 1:]
        if batch.mask is not None:
            both = host(batch.mask) > 0
            both[:, :-1] &= both[:, 1:]
            found = np.where(both, found, -1)
        return found

    def whole(self, layers: Mapping[str, tuple[_Call, Any, Any]], value: Any) -> set[str]:
        """The weights and biases whose gradient is all in what taps were told of: not those that are read elsewhere too."""
        import torch

        found: set[str] = set()
        for weight, (call, x, g) in layers.items():
            if weight.rpartition(".")[2] != "weight" or weight not in self.trained:
                continue
            x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            mine, most = (g.T @ x, g.sum(axis=0)), (np.abs(g).T @ np.abs(x), np.abs(g).sum(axis=0))
            same = []
            for name, part, bound in zip((weight, call.bias), mine, most):
                if name not in self.trained:
                    continue
                if call.layout == "in_out" and name == weight:
                    part, bound = part.T, bound.T
                total = torch.autograd.grad(value, self.params[name], retain_graph=True, allow_unused=True)[0]
                apart = part if total is None else part - scores(total).reshape(part.shape)
                if np.all(np.abs(apart) <= 1e4 * torch.finfo(self.params[name].dtype).eps * bound):
                    same.append(name)
            found |= {*same} if weight in same else set()
        return found

    def sample(self, one: Batch, names: Sequence[str], place: int) -> None:
        """Squares of a single sample's gradients by these tensors."""
        import torch

        losses, p = self.log_likelihoods(self.outputs(one), one, place)
        sums: dict[str, Any] = {}
        for c, value in enumerate(losses):
            found = torch.autograd.grad(
                value, [self.params[n] for n in names], retain_graph=c + 1 < len(losses), allow_unused=True
            )
            for name, g in zip(names, found):
                square = np.zeros(tuple(self.params[name].shape)) if g is None else scores(g) ** 2
                square = square if p is None else p[0, c] * square
                sums[name] = square if name not in sums else sums[name] + square
        for name, square in sums.items():
            self.statistics.sum(f"{name}.fisher", square, 1)

    def finish(self) -> None:
        """Tensors that are tied to another have what that has."""
        for name, twin in self.twins.items():
            if (there := f"{twin}.fisher") in self.statistics:
                count = self.statistics.count(there)
                self.statistics.sum(f"{name}.fisher", self.statistics[there] * count, count)


def _like_inputs(g: Any, call: _Call) -> np.ndarray:
    """The gradient by what a call gave, None for zeros, in float64: its units last, and samples first as in its inputs."""
    xp = array_namespace(call.y)
    slope = scores(xp.moveaxis(xp.zeros_like(call.y) if g is None else g, call.axis, -1))
    return slope if len(slope) == len(call.x) else slope[None]


def by_layer(calls: Sequence[_Call], slopes: Sequence[np.ndarray]) -> dict[str, tuple[_Call, np.ndarray, np.ndarray]]:
    """For each weight its first call, and inputs (samples, places, in) and gradients (samples, places, out) of all."""
    found: dict[str, tuple[_Call, np.ndarray, np.ndarray]] = {}
    for call, g in zip(calls, slopes):
        x, g = (v.reshape(len(v), -1, v.shape[-1]) for v in (call.x, g))
        if call.weight in found:
            first, x_before, g_before = found[call.weight]
            call, x, g = first, np.concatenate([x_before, x], axis=1), np.concatenate([g_before, g], axis=1)
        found[call.weight] = call, x, g
    return found


def _beside(inputs: Any, params: Mapping[str, Any]) -> Any:
    """Inputs as arrays of the parameters' library and device, floats in their dtype."""
    if isinstance(inputs, Mapping):
        return {name: _beside(x, params) for name, x in inputs.items()}
    some = next((x for x in params.values() if is_floating(x)), None)
    if some is None or not hasattr(inputs, "dtype"):
        return inputs
    xp, values = array_namespace(some), host(inputs)
    if values.dtype.kind == "f":
        return like(values, some)
    return values if isinstance(some, np.ndarray) else xp.asarray(values, device=device(some))


def _softmax(z: Any) -> Any:
    import torch

    return torch.softmax(z.detach().double(), dim=-1)


# ------------------------------------------------------------------------------------------ what the command line names


def gathered(
    checkpoint: Checkpoint, net: str, data: str, kinds: Sequence[str], *, likelihood: str = "exact", layers: str = "*",
    batch: int = 32, start: int = 0, stop: int | None = None, seed: int = 0, dtype: str | None = None,
    on: str | None = None, options: Mapping[str, Any] | None = None, progress: Callable[[int], None] = lambda samples: None,
) -> Statistics:  # fmt: skip
    """Statistics of a checkpoint: `collect` with the network and the data by their names, as `forward_of` and `batches_of`
    have them. dtype: to compute in; else float64 where a tensor is of that, and float32. on: a device of torch."""
    forward = forward_of(net, checkpoint, checkpoint.config, options)
    params: dict[str, Any] = {name: host(checkpoint[name]) for name in checkpoint}
    wide = dtype or ("float64" if any(x.dtype == np.float64 for x in params.values()) else "float32")
    params = {name: x.astype(wide) if x.dtype.kind == "f" else x for name, x in params.items()}
    if on is not None or hasattr(forward, "twins"):
        params = _on(on or "cpu", params)
    try:
        return collect(
            forward, params, batches_of(data, batch, start, stop), kinds, likelihood=likelihood, layers=layers, seed=seed,
            first=start, progress=progress,
        )  # fmt: skip
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as e:
        reason = f"tensor {e} is missing" if isinstance(e, KeyError) else str(e).strip().splitlines()[0]
        raise InputError(f"{net} cannot run {checkpoint.path} on {data}: {reason}") from e


def _on(place: str, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """As torch arrays on a device. UsageError where there is none."""
    try:
        import torch

        return {name: torch.from_numpy(x).to(place) for name, x in params.items()}
    except ImportError:
        raise UsageError("a device is torch's, which is not installed: pip install torch") from None
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"device {place!r}: {str(e).strip().splitlines()[0]}") from e


def forward_of(
    net: str, params: Mapping[str, Any], config: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """forward(params, batch, taps) by its name.

    net: a network of refmerge.nets; `module:function` of anybody's, a forward or a torch.nn.Module; or a folder with a
    config.json of transformers. options: what else a network of refmerge.nets or a function is told; of heads of attention
    config knows, too. UsageError where there is no such thing or option.
    """
    from refmerge.compare import network, networks, options_of

    options = dict(options or {})
    if os.path.isdir(net):
        if options:
            raise UsageError(f"{net} is a model of transformers, which config.json describes: it takes no {min(options)!r}")
        from refmerge.nets.torch import pretrained

        return pretrained(net)
    if ":" in net:
        forward = named(net)
        if not callable(forward):
            raise UsageError(f"{net} is a {type(forward).__name__}, and a function (params, batch, taps) is wanted")
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(forward, torch.nn.Module):
            from refmerge.nets.torch import Forward

            forward = Forward(forward)
    elif net in networks():
        forward = network(net)
        options = options_of(net, config, options.get("heads")) | options
    else:
        raise UsageError(
            f"there is no network {net!r} (there are {', '.join(networks())}; module:function, of your own; or a folder "
            f"with the config.json of transformers)"
        )
    if not options:
        return forward
    known = [key for key, p in inspect.signature(forward).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - set(known)):
        raise UsageError(f"{net} has no option {unknown[0]!r} (there are {', '.join(known) or 'none'})")
    return lambda given, batch, taps=None: forward(given, batch, taps, **options)


def named(path: str) -> Any:
    """What `module:name` is, modules of the working directory among them. UsageError where there is none."""
    module, _, name = path.partition(":")
    there = os.getcwd()
    sys.path.insert(0, there)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as e:
        raise UsageError(f"{path}: {e}") from e
    finally:
        sys.path.remove(there)
    return found


def batches_of(data: str, size: int = 32, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Batches of so many samples, from `start` to `stop`, of a file; or those that a `module:function` gives.

    A file, .npz or .safetensors, has `inputs`, or arrays by the names under which a model takes them (input_ids,
    attention_mask ...), and beside them `labels` and `mask`; without a mask attention_mask is one. An .npy has inputs alone.
    A function gives batches: mappings of such arrays, or arrays. InputError for what cannot be read or does not fit.
    """
    if ":" in data and not os.path.exists(data):
        if start or stop is not None:
            raise UsageError(f"{data} gives batches as they are: samples are chosen there, and not by place")
        for given in named(data)():
            yield as_batch(given, data)
        return
    whole = as_batch(_arrays(Path(data)), data)
    stop = len(whole) if stop is None else min(stop, len(whole))
    for place in range(start, stop, size):
        yield whole.part(place, min(place + size, stop))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file. InputError where it cannot be read."""
    if path.suffix == ".safetensors":
        from refmerge.checkpoint import open_checkpoint

        with open_checkpoint(path) as file:
            return {name: file[name] for name in file}
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"inputs": found}
        with found:
            return {name: found[name] for name in found}
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{path}: cannot be read as .npz, .npy or .safetensors: {e}") from e


def as_batch(given: Any, whose: str) -> Batch:
    """A batch of an array or of named arrays. InputError for those that are not of the same samples."""
    if isinstance(given, Batch):
        return given
    if not isinstance(given, Mapping):
        if not hasattr(given, "shape") or not given.shape:
            raise InputError(f"{whose}: a batch is an array, or a mapping of arrays, not {type(given).__name__}")
        return Batch(given)
    arrays = {str(name): x for name, x in given.items()}
    counts = {name: x.shape[0] if getattr(x, "shape", ()) else None for name, x in arrays.items()}
    if len(set(counts.values())) != 1 or None in counts.values():
        told = ", ".join(f"{name} {list(getattr(x, 'shape', ()))}" for name, x in arrays.items())
        raise InputError(f"{whose}: arrays of the same samples are wanted, and these are {told or 'none'}")
    labels, mask = arrays.pop("labels", None), arrays.pop("mask", None)
    if "inputs" in arrays and len(arrays) > 1:
        other = next(name for name in arrays if name != "inputs")
        raise InputError(f"{whose}: there are inputs and {other!r}: arrays by name leave out inputs, and it stands alone")
    if not arrays:
        raise InputError(f"{whose}: there are no inputs")
    if mask is None and getattr(arrays.get("attention_mask"), "ndim", 0) == 2:
        mask = arrays["attention_mask"]
    return Batch(arrays.get("inputs", arrays), labels, mask)


def option(text: str) -> tuple[str, Any]:
    """`eps=1e-6` or `activation=gelu` as a name and a value: JSON, an activation of refmerge.nets, or text."""
    from refmerge.nets import layers

    key, sign, value = text.partition("=")
    if not sign:
        raise UsageError(f"an option is NAME=VALUE, not {text!r}")
    if key == "activation":
        known = {"relu": layers.relu, "gelu": layers.gelu, "gelu_tanh": layers.gelu_tanh, "silu": layers.silu, "tanh": tanh}
        if value not in known:
            raise UsageError(f"activation = {value!r} is none of {', '.join(known)}")
        return key, known[value]
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def tanh(x: Any) -> Any:
    return array_namespace(x).tanh(x)
