"""Rows of routers: from draws, or from prompts, by their embeddings or by what a dense model makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.checkpoint import DTYPES, Checkpoint, open_checkpoint
from refmerge.checkpoint.layout import read_json
from refmerge.errors import InputError, UsageError
from refmerge.nets import llama
from refmerge.nets.layers import Layers
from refmerge.numeric import host, scores
from refmerge.rng import key_for

MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
DEGENERATE = 5.0  # condition number of a layer's rows above which they are nearly dependent
SMALLEST = 1e-8  # what a norm is at least, when it is divided by

Prompts = Sequence[Any]  # texts, or lists of token numbers
Pair = tuple[Prompts, Prompts]  # positive and negative


def rows(
    base: Checkpoint, mode: str, prompts: Sequence[Pair], names: Sequence[str], seed: int, states: Any = None
) -> np.ndarray:
    """Router rows, (layers, experts, width), in float64. prompts: of each expert. names: of each layer's router. states:
    instead of a run of the model, its states by name."""
    width = base.tensors[f"{llama.prefix(base)}embed_tokens.weight"].shape[1]
    shape = (len(names), len(prompts), width)
    if mode in ("random", "uniform_random"):
        return np.stack([drawn(mode, seed, name, shape[1:]) for name in names])
    if states is not None:
        found = given(states, shape)
    else:
        encode = encoder(base)
        tokens = [tuple([encode(p) for p in side] for side in pair) for pair in prompts]
        with np.errstate(all="ignore"):  # what is not finite is found below
            cheap = mode == "cheap_embed"
            found = embedded(base, tokens, len(names)) if cheap else hidden(base, tokens, mode == "hidden_avg")
    if not np.isfinite(found).all():
        raise UsageError(f"{base.path}: what prompts give is not finite, since its weights or states are not")
    found = unit(found)
    warn_degenerate(found)
    return found


def drawn(mode: str, seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """From the normal distribution, or evenly between -1/sqrt(width) and 1/sqrt(width)."""
    draw = np.random.Generator(np.random.Philox(key=np.array(key_for(seed, name, 0), dtype=np.uint64)))
    return draw.standard_normal(shape) if mode == "random" else (2 * draw.random(shape) - 1) / shape[-1] ** 0.5


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), SMALLEST)


def embedded(base: Checkpoint, tokens: Sequence[Sequence[Sequence[list[int]]]], layers: int) -> np.ndarray:
    """The unit vector along the sum of the embeddings of the positive prompts, less that of the negative ones."""
    name = f"{llama.prefix(base)}embed_tokens.weight"
    info = base.tensors[name]

    def row(token: int) -> np.ndarray:
        raw = np.empty(info.nbytes // info.shape[0], np.uint8)
        base.read(name, token * info.shape[1], (token + 1) * info.shape[1], raw)
        return scores(raw.view(DTYPES[info.dtype]))

    def along(side: Sequence[list[int]]) -> np.ndarray:
        total = sum((row(t) for prompt in side for t in checked(prompt, info.shape[0])), np.zeros(info.shape[1]))
        return unit(total)

    found = np.stack([along(positive) - along(negative) for positive, negative in tokens])
    return np.repeat(found[None], layers, axis=0)


def hidden(base: Checkpoint, tokens: Sequence[Sequence[Sequence[list[int]]]], average: bool) -> np.ndarray:
    """What each layer reads at the last token, or on average over a prompt; the mean over the positive prompts less that
    over the negative ones. All prompts are read in one pass over the weights, one tensor at a time."""
    how = options(base)
    window = how.pop("window")
    prompts = [prompt for pair in tokens for side in pair for prompt in side]
    vocabulary = base.tensors[f"{llama.prefix(base)}embed_tokens.weight"].shape[0]
    length = max(len(checked(prompt, vocabulary)) for prompt in prompts)
    if window and length > window:
        raise UsageError(f"a prompt has {length} tokens, more than the {window} of the base's sliding window: shorten it")
    batch = np.zeros((len(prompts), length), np.int64)
    for i, prompt in enumerate(prompts):  # what is behind a prompt's end is not seen by its places
        batch[i, : len(prompt)] = prompt
    states: list[Any] = []
    llama.forward(Wide(base), batch, states, layers=Residuals, **how)
    read = [scores(x) for x in states[0:-1:2]]  # the embedding, and what comes after each MLP but the last one
    found = np.empty((len(read), len(prompts), read[0].shape[-1]))
    for i, prompt in enumerate(prompts):
        for layer, x in enumerate(read):
            found[layer, i] = x[i, : len(prompt)].mean(axis=0) if average else x[i, len(prompt) - 1]
    result, start = [], 0
    for positive, negative in tokens:
        middle, stop = start + len(positive), start + len(positive) + len(negative)
        one = found[:, start:middle].mean(axis=1)
        result.append(one - found[:, middle:stop].mean(axis=1) if negative else one)
        start = stop
    return np.stack(result, axis=1)


class Residuals(Layers):
    """Layers that keep the residual stream alone, in a list: after the embedding and after each attention and MLP."""

    def __init__(self, params: Mapping[str, Any], states: list[Any]) -> None:
        super().__init__(params)
        self.states = states

    def units(self, entry: Any, x: Any, axis: int = -1) -> Any:
        if entry == "residual":
            self.states.append(x)
        return x


class Wide(Mapping[str, Any]):
    """A checkpoint whose tensors are read when they are asked for, 16-bit floats as float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> np.ndarray:
        return host(self._checkpoint[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint


def options(base: Checkpoint) -> dict[str, Any]:
    """What refmerge.nets.llama must be told of a model. UsageError for what it does not compute."""
    config = base.config or {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise unknown(f"its rotary positions are of type {kind!r}")
    if config.get("hidden_act", "silu") != "silu":
        raise unknown(f"its activation is {config['hidden_act']!r}")
    heads = config.get("num_attention_heads")
    if type(heads) is not int:
        raise InputError(f"{base.path}: config.json does not say num_attention_heads")
    windowed = config.get("use_sliding_window", config.get("model_type") == "mistral")
    return {
        "heads": heads,
        "groups": config.get("num_key_value_heads") or heads,
        "theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "eps": float(config.get("rms_norm_eps", 1e-6)),
        "window": config.get("sliding_window") if windowed else None,
    }


def unknown(what: str) -> UsageError:
    return UsageError(
        f"the base cannot be run here: {what}; give its states as hidden_states, or take gate_mode cheap_embed or random"
    )


def given(states: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """States from a file or mapping: `<expert>.positive` less `<expert>.negative`, where that is there."""
    states = states if isinstance(states, Mapping) else open_checkpoint(states)
    layers, experts, width = shape
    wanted = {f"{e}.{side}" for e in range(experts) for side in ("positive", "negative")}
    if odd := sorted({*states} - wanted):
        raise InputError(f"hidden_states: {odd[0]!r} is none of 0.positive, 0.negative ... {experts - 1}.negative")
    found = []
    for e in range(experts):
        if f"{e}.positive" not in states:
            raise InputError(f"hidden_states: there is no '{e}.positive', an array of shape {[layers, width]}")
        one = 0.0
        for side, sign in (("positive", 1), ("negative", -1)):
            if f"{e}.{side}" in states:
                x = scores(states[f"{e}.{side}"])
                if x.shape != (layers, width) or not np.isfinite(x).all():
                    raise InputError(f"hidden_states: '{e}.{side}' is not finite, or not of shape {[layers, width]}")
                one = one + sign * x
        found.append(one)
    return np.stack(found, axis=1)


def checked(prompt: list[int], vocabulary: int) -> list[int]:
    """Its tokens. UsageError where there are none, or the embedding does not have one."""
    if not prompt:
        raise UsageError("a prompt has no tokens")
    if not all(0 <= t < vocabulary for t in prompt):
        raise UsageError(f"a prompt has the token {max(prompt)}, and the base {vocabulary} tokens")
    return prompt


def encoder(base: Checkpoint) -> Callable[[Any], list[int]]:
    """What makes tokens of a prompt, by the base's tokenizer.json; lists of tokens stay."""
    loaded: list[Any] = []

    def encode(prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            return [int(t) for t in prompt]
        if not loaded:
            loaded.extend(tokenizer(base))
        made, bos = loaded
        return made.encode(bos + prompt, add_special_tokens=False).ids

    return encode


def tokenizer(base: Checkpoint) -> tuple[Any, str]:
    """The base's tokenizer, and the text of the token with which a prompt begins."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError("prompts need the package tokenizers: pip install 'refmerge[tokenizers]'") from None
    folder = base.directory
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise InputError(f"{base.path}: has no tokenizer.json, which prompts need")
    try:
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as e:  # the package raises no other type
        raise InputError(f"{folder / 'tokenizer.json'}: cannot be read: {e}") from None
    return made, beginning(folder)


def beginning(folder: Path) -> str:
    """The text of the token with which texts begin, where the tokenizer has one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            bos = read_json(folder / name).get("bos_token")
            bos = bos.get("content") if isinstance(bos, dict) else bos
            if isinstance(bos, str):
                return bos
    return ""


def warn_degenerate(found: np.ndarray) -> None:
    """A warning for layers in which some expert's row is nearly made of the others'."""
    numbers = [float(np.linalg.cond(x)) for x in found]
    bad = [i for i, c in enumerate(numbers) if not c <= DEGENERATE]
    if bad:
        which = "all layers" if len(bad) == len(numbers) else f"layer{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}"
        warnings.warn(
            f"the router rows of {which} are nearly dependent: prompts are too much alike, and experts will go unused",
            stacklevel=5,
        )
