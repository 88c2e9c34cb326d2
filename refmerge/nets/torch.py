"""Modules of torch and transformers as pure functions of their parameters, with the taps of the networks here.

    forward = Forward(module)                       # or pretrained("./model") for a folder of transformers
    logits = forward(parameters(module), batch)     # torch arrays, through which gradients go; or NumPy's, and NumPy back
    forward(params, batch, statistics.taps())       # what linear layers read

Tapped are `torch.nn.Linear`, transformers' `Conv1D` (weights of shape (in, out)) and convolutions without groups, under the
names of their weights. The module runs as it does at inference, whatever mode it was in, and is left as it was. What depends
on more than parameters and batch is refused: random draws, and batch norms without running statistics.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.errors import InputError, UsageError
from refmerge.nets.layers import Params, as_rows
from refmerge.numeric import array_namespace, host

__all__ = ["Forward", "parameters", "pretrained"]


def parameters(module: Any) -> dict[str, Any]:
    """A module's parameters and buffers by the names that its checkpoint has, without their gradients."""
    return {name: x.detach() for name, x in module.state_dict().items()}


class Forward:
    """forward(params, batch, taps=None) of a torch.nn.Module.

    batch: an array, a tuple of positional arguments, or a mapping of keyword arguments. What comes back is a tensor: of an
    output that has several, `logits`, else `last_hidden_state`, else the first. params: of all tensors of the module; of
    tied ones one name is enough. Names may lack `prefix`, or have it where the module's do not, or be those under which
    tensors are `stored`, by the module's. Tensors whose names match a pattern in `ignored` may be there.

    shared: names of weights that several layers have. untapped: module -> why no taps are told of that linear layer.

    UsageError for a module that draws random numbers at inference or mixes the samples of a batch, InputError for tensors
    that are missing, unknown, of another shape, or tied in the module and different in params.
    """

    def __init__(
        self, module: Any, *, prefix: str = "", ignored: tuple[str, ...] = (), stored: Mapping[str, str] | None = None
    ) -> None:
        import torch

        if not isinstance(module, torch.nn.Module):
            raise UsageError(f"a torch.nn.Module is wanted, not {type(module).__name__}")
        for name, m in module.named_modules():
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
                raise UsageError(f"{name!r} is a batch norm without running statistics: samples depend on each other")
        self.module, self.prefix, self._ignored, self._stored = module, prefix, ignored, stored or {}
        self._tensors = {n: tuple(x.shape) for n, x in module.state_dict().items()}
        own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        groups: dict[int, list[str]] = {}
        for name, x in own:
            groups.setdefault(id(x), []).append(name)
        self._tied = {name: names for names in groups.values() for name in names}
        self._linear = {n: m for n, m in module.named_modules(remove_duplicate=False) if _kind(m)}
        # A weight that layers of other kinds read too has no statistics of inputs that would hold for all of its readers.
        self.untapped: dict[str, str] = {}
        for name in self._linear:
            readers = self._tied[_weight(name)]
            if other := [r for r in readers if r.rpartition(".")[0] not in self._linear]:
                self.untapped[name] = f"its weight is {other[0]!r} as well, which no linear layer reads"
        self._tapped = {n: m for n, m in self._linear.items() if n not in self.untapped}
        self.shared = frozenset(_weight(n) for n in self._tapped if len(self._tied[_weight(n)]) > 1)

    def __repr__(self) -> str:
        return f"Forward({type(self.module).__name__})"

    def __call__(self, params: Params, batch: Any, taps: Any = None) -> Any:
        import torch

        given = self._given(params)
        numpy = all(isinstance(params[name], np.ndarray) for name in given.values())
        tensors = {inner: _tensor(params[outer]) for inner, outer in given.items()}
        some = next((x for x in tensors.values() if x.is_floating_point()), torch.zeros(()))
        args, kwargs = _arguments(batch, some)
        with _as_at_inference(self.module), _no_draws(some.device, self), self._taps(taps, given):
            try:
                out = torch.func.functional_call(self.module, tensors, args, kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as e:
                reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
                raise InputError(f"{type(self.module).__name__} cannot run this batch: {reason}") from e
        out = _array_of(out)
        return host(out) if numpy else out

    def linear_layers(self, params: Params) -> list[str]:
        """The modules that taps are told of, as params names their weights."""
        given = self._given(params)
        return list(dict.fromkeys(self._name(_weight(n), given).rpartition(".")[0] for n in self._tapped))

    # Names.

    def _given(self, params: Params) -> dict[str, str]:
        """The module's name -> the name in params, for each tensor that params has. InputError where they do not fit."""
        outer = {n: next((there for there in self._names_of(n) if there in params), "") for n in self._tensors}
        who = type(self.module).__name__
        for name, there in outer.items():
            if not there and not any(outer[twin] for twin in self._tied.get(name, [name]) if twin in outer):
                raise InputError(f"{who} has a tensor {name!r}, which is not given")
            if there and tuple(params[there].shape) != self._tensors[name]:
                shapes = f"shape {list(params[there].shape)}, not {list(self._tensors[name])}"
                raise InputError(f"tensor {there!r} of {who} has {shapes}")
        unknown = sorted(params.keys() - set(outer.values()))
        if strange := [n for n in unknown if not any(re.search(pattern, n) for pattern in self._ignored)]:
            raise InputError(f"{who} has no tensor {strange[0]!r}")
        for names in {tuple(v): v for v in self._tied.values()}.values():
            twins = [outer[n] for n in names if outer.get(n)]
            if any(params[twins[0]] is not params[t] and not _equal(params[twins[0]], params[t]) for t in twins[1:]):
                raise InputError(f"{who} ties {twins[0]!r} and {twins[1]!r}, and they differ: no such model has both")
        # Of a tied tensor one name says all, and torch takes no two.
        return {name: there for name, there in outer.items() if there and there == self._first(name, outer)}

    def _first(self, name: str, outer: Mapping[str, str]) -> str:
        return next(outer[n] for n in self._tied.get(name, [name]) if outer.get(n))

    def twins(self, params: Params) -> dict[str, str]:
        """Names in params of tensors that the module ties to another one -> that one, which stands for all."""
        outer = {n: there for n in self._tensors for there in self._names_of(n) if there in params}
        firsts = {there: self._first(name, outer) for name, there in outer.items()}
        return {there: first for there, first in firsts.items() if there != first}

    def trained(self, params: Params) -> list[str]:
        """Names in params of the module's parameters, those that gradients are asked of; of tied ones the first."""
        own = {n for n, _ in self.module.named_parameters(remove_duplicate=False)}
        return [there for name, there in self._given(params).items() if name in own]

    def _names_of(self, name: str) -> list[str]:
        """What a tensor of the module may be called in params."""
        found = [name, *([self._stored[name]] if name in self._stored else [])]
        return [*found, name.removeprefix(self.prefix), self.prefix + name] if self.prefix else found

    def _name(self, weight: str, given: Mapping[str, str]) -> str:
        """The name in params of a weight; of a tied one the first that params has."""
        return self._first(weight, given)

    # Taps.

    @contextmanager
    def _taps(self, taps: Any, given: Mapping[str, str]) -> Iterator[None]:
        """Hooks on the linear layers as long as the module runs."""
        if taps is None:
            yield
            return
        handles = []
        try:
            for name, layer in self._tapped.items():
                weight = self._name(_weight(name), given)
                handles.append(layer.register_forward_hook(_hook(taps, weight, _kind(layer)), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _weight(module: str) -> str:
    return f"{module}.weight" if module else "weight"


def _hook(taps: Any, weight: str, kind: str) -> Any:
    read, gave = getattr(taps, "read", None), getattr(taps, "gave", None)

    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        axis = -3 if kind == "conv" else -1
        if read:
            read(weight, _patches(layer, x) if kind == "conv" else x)
        if gave:
            gave(weight, y, axis, "in_out" if kind == "conv1d" else "out_in")
        rows, above = as_rows(y, axis), taps.get(weight)
        taps[weight] = rows if above is None else array_namespace(rows).concat([above, rows], axis=0)
        return y.clone()  # what is done in place to the copy leaves what was noted down as it is

    return hook


def _kind(layer: Any) -> str:
    """Which kind of linear layer a module is, by the function that it runs; "" for others."""
    import torch

    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    kinds: dict[Any, str] = {torch.nn.Linear: "linear", torch.nn.Conv2d: "conv"}
    if pytorch_utils is not None:
        kinds[pytorch_utils.Conv1D] = "conv1d"
    kind = next((k for of, k in kinds.items() if isinstance(layer, of) and type(layer).forward is of.forward), "")
    if not kind or layer._parameters.get("weight") is None:
        return ""
    return "" if kind == "conv" and (layer.groups != 1 or layer.padding_mode != "zeros") else kind


def _patches(layer: Any, x: Any) -> Any:
    """What a convolution reads: (samples, rows, columns, inputs times places of the kernel)."""
    import torch

    x = torch.nn.functional.pad(x if x.ndim == 4 else x[None], layer._reversed_padding_repeated_twice)
    found = torch.nn.functional.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    sides = zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.stride)
    rows, columns = ((size - d * (k - 1) - 1) // s + 1 for size, k, d, s in sides)
    return found.transpose(1, 2).reshape(len(x), rows, columns, -1)


def _tensor(x: Any) -> Any:
    import torch

    if isinstance(x, torch.Tensor):
        return x
    return torch.from_numpy(np.array(host(x)))


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(host(a), host(b))


def _arguments(batch: Any, some: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as a call's arguments, beside the parameters: floats in their dtype, all on their device."""
    import torch

    def placed(x: Any) -> Any:
        if not isinstance(x, torch.Tensor | np.ndarray):
            return x
        x = (torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x).to(some.device)
        return x.to(some.dtype) if x.is_floating_point() else x

    if isinstance(batch, Mapping):
        return (), {name: placed(x) for name, x in batch.items()}
    return tuple(map(placed, batch if isinstance(batch, tuple) else (batch,))), {}


def _array_of(out: Any) -> Any:
    """The tensor of an output that is to be scored. UsageError where there is none."""
    import torch

    named = [getattr(out, key, None) for key in ("logits", "last_hidden_state")]
    first = next(iter(out), None) if isinstance(out, tuple | list) else None
    for x in (out, *named, first):
        if isinstance(x, torch.Tensor):
            return x
    raise UsageError(f"the module gives a {type(out).__name__} with no tensor called logits or last_hidden_state")


@contextmanager
def _as_at_inference(module: Any) -> Iterator[None]:
    """Every part of the module in eval mode, and afterwards in the mode in which it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def _no_draws(device: Any, forward: Forward) -> Iterator[None]:
    """UsageError where random numbers are drawn inside."""
    import torch

    def states() -> list[Any]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        raise UsageError(
            f"{type(forward.module).__name__} draws random numbers at inference, so that it is no function of its "
            f"parameters: dropout that is always on?"
        )


def pretrained(folder: str | Path) -> Forward:
    """The architecture that a folder's config.json names, of transformers, without its weights. Nothing is downloaded and no
    code from the folder is run. UsageError where transformers is not installed or does not know the architecture.

    Names are those of the checkpoint, also where transformers' modules have others. A tensor of a module that is stored in
    several pieces, as the experts of some mixtures are, has no name there: such checkpoints are refused when they are run.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("a model of transformers wants torch and transformers: pip install transformers torch") from None
    import torch

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{folder}: no config.json of transformers: {str(e).strip().splitlines()[0]}") from None
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise UsageError(f"{folder}: config.json names no architecture that transformers has ({', '.join(names) or 'none'})")
    config.use_cache = False
    with torch.random.fork_rng():
        module = kind(config)
    ignored = tuple(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    return Forward(module, prefix=f"{module.base_model_prefix}.", ignored=ignored, stored=_stored(module))


def _stored(module: Any) -> dict[str, str]:
    """The module's name -> the name under which transformers stores that tensor, where it is another one."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions below 5 store every tensor under its own name
        return {}
    own = module.state_dict()
    places: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, x in own.items():
        places.setdefault((x.data_ptr(), tuple(x.shape)), []).append(name)
    found = {}
    for there, x in revert_weight_conversion(module, own).items():
        names = places.get((x.data_ptr(), tuple(x.shape)), [])
        if there not in own and len(names) == 1:
            found[names[0]] = there
    return found
