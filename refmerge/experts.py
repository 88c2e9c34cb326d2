"""Where a checkpoint keeps its mixtures of experts: rules of names, and the mixtures that are found by one.

A rule knows a style of checkpoints by the names of its tensors. `RULES` has those of Mixtral, of Qwen-MoE (which OLMoE and
others share) and of Switch Transformers; another style is read by a rule of one's own:

    mine = Rule(
        "mine", block="ffn", router="gate.wg", expert="experts.expert_{}",
        parts={"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1, "fc2.bias": None}, count="num_experts", chosen=1,
    )

where the tensors are `<layer>.ffn.gate.wg.weight`, `<layer>.ffn.experts.expert_7.fc1.weight` and so on. `Rule.load` reads
one from a TOML file with these keys.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from refmerge.adapters import listed
from refmerge.checkpoint import DTYPES, FLOATS, Checkpoint, CheckpointWriter, itemsize, open_checkpoint, refuse_input
from refmerge.errors import InputError, UsageError
from refmerge.nets import llama, moe
from refmerge.numeric import host
from refmerge.sources import dtype_name, stored_bytes
from refmerge.stats import Statistics

__all__ = [
    "RULES", "Mixture", "Output", "Rule", "configured", "dtype_of", "find", "known_again", "opened", "refused_by_others",
    "route", "routing_of",
]  # fmt: skip

STACKED = re.compile(r"(.+\.)?experts\.(gate_up_proj|down_proj|gate_proj|up_proj)(\.weight)?")
SLOTS = "experts"  # <router>.experts: the expert of each score, where several scores share one
KIND = "refmerge_stored_as"  # in config.json: what a checkpoint is that other tools must not take for a model
FACTORS = "refmerge_low_rank_experts"  # model_type, and a key of the metadata, of experts that are stored in factors
SHARED = "refmerge_shared_experts"  # model_type of a checkpoint whose routers' scores share experts
TOKENS = 4096  # that go through a model together
CHUNK = 1 << 22  # bytes that are copied together


@dataclass(frozen=True)
class Rule:
    """How a style of checkpoints names its mixtures. name: of the style. block: the mixture's module below its layer, whose
    name is what comes before. router, expert: modules below the block; "{}" stands for the number of the expert. parts: the
    tensors below an expert, each with its axis of hidden units, None where it has none. count: the key of config.json that
    says how many experts there are. chosen: the key, or the number itself, of how many a token is sent to. others: patterns,
    as of file names, of what else is below the block and no matter of merging, such as shared experts."""

    name: str
    block: str
    router: str
    expert: str
    parts: Mapping[str, int | None]
    count: str
    chosen: str | int
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.expert.count("{}") != 1:
            raise UsageError(f"rule {self.name!r}: expert = {self.expert!r} has not one {{}} for the number of the expert")
        if not self.parts or any(axis not in (0, 1, None) for axis in self.parts.values()):
            raise UsageError(
                f"rule {self.name!r}: parts say of each tensor of an expert 0, 1 or None: its axis of hidden units"
            )
        if not any(axis is not None for axis in self.parts.values()):
            raise UsageError(f"rule {self.name!r}: no part has an axis of hidden units")

    @classmethod
    def load(cls, path: str | Path) -> Rule:
        """A rule from a TOML file with the fields as keys; in `parts` "none" stands for None."""
        try:
            found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path}: cannot be read as a rule in TOML: {error}") from None
        keys = {f.name for f in fields(cls)}
        missing = keys - {"others"} - found.keys()
        if missing or not found.keys() <= keys or not isinstance(found.get("parts"), dict):
            what = (
                f"lacks {listed(sorted(missing))}" if missing else f"has {listed(sorted(found.keys() - keys)) or 'no parts'}"
            )
            raise UsageError(f"{path}: a rule has the keys {', '.join(sorted(keys))}; this one {what}")
        parts = {part: None if axis == "none" else axis for part, axis in found.pop("parts").items()}
        return cls(**found | {"others": tuple(found.get("others", ())), "parts": parts})

    def pattern(self) -> re.Pattern[str]:
        """Of the names of experts' tensors: layer, expert, part."""
        expert = re.escape(self.expert).replace(re.escape("{}"), r"(?P<expert>0|[1-9]\d*)")
        return re.compile(rf"(?P<layer>.+)\.{re.escape(self.block)}\.{expert}\.(?P<part>.+)")

    def chosen_of(self, config: Mapping[str, Any] | None) -> int:
        """How many experts a token is sent to. UsageError where the config does not say it."""
        found = self.chosen if isinstance(self.chosen, int) else (config or {}).get(self.chosen)
        if type(found) is not int or found < 1:
            raise UsageError(
                f"rule {self.name!r}: how many experts a token is sent to is not in config.json ({self.chosen})"
            )
        return found


_GATED = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "mixtral", "block_sparse_moe", "gate", "experts.{}", {"w1.weight": 0, "w2.weight": 1, "w3.weight": 0},
            "num_local_experts", "num_experts_per_tok",
        ),
        Rule(
            "qwen", "mlp", "gate", "experts.{}", _GATED, "num_experts", "num_experts_per_tok",
            ("shared_expert.*", "shared_expert_gate.*"),
        ),
        Rule(
            "switch", "mlp", "router.classifier", "experts.expert_{}", {"wi.weight": 0, "wo.weight": 1}, "num_experts", 1,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """The mixture of a layer. rule: by which it was found. router: the full name of its module. experts: of each expert the
    full names of its parts. shapes, dtypes: of the parts, in all experts the same. slots: the expert of each score of the
    router; 0, 1, 2, ... unless scores share experts (shared)."""

    layer: str
    rule: Rule
    router: str
    experts: tuple[dict[str, str], ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    slots: tuple[int, ...]
    shared: bool = False

    @property
    def units(self) -> int:
        """Hidden units of an expert."""
        return next(self.shapes[part][axis] for part, axis in self.rule.parts.items() if axis is not None)

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return sum(int(np.prod(shape)) * itemsize(self.dtypes[part]) for part, shape in self.shapes.items())

    def name(self, expert: int, part: str) -> str:
        """The name of a part of the expert of that number, there or not."""
        return f"{self.layer}.{self.rule.block}.{self.rule.expert.format(expert)}.{part}"


def find(model: Mapping[str, Any], rule: Rule | str | None = None) -> dict[str, Mixture]:
    """The mixtures of a model by layer, in the order of their numbers; weights are not read. rule: a Rule, or the name of
    one of RULES; else the first of these that fits any name. InputError lists what does not fit: experts that lack a part or
    are of another shape, gaps in their numbers, routers of another size, tensors of a mixture that no rule knows."""
    if FACTORS in getattr(model, "metadata", {}):
        raise UsageError("the experts are stored in factors: mc_smoe_restore multiplies them out first")
    tensors: Mapping[str, Any] = getattr(model, "tensors", model)
    if isinstance(rule, str):
        if rule not in RULES:
            raise UsageError(f"experts: there is no rule {rule!r} (there are {', '.join(RULES)})")
        rule = RULES[rule]
    candidates = [rule] if rule is not None else [*RULES.values()]
    fitting = [r for r in candidates if any((m := r.pattern().fullmatch(n)) and m["part"] in r.parts for n in tensors)]
    if not fitting:
        raise InputError(_none_found(tensors, candidates))
    rule, pattern = fitting[0], fitting[0].pattern()
    layers: dict[str, dict[int, dict[str, str]]] = {}
    stray = []
    for name in tensors:
        match = pattern.fullmatch(name)
        if match and match["part"] in rule.parts:
            layers.setdefault(match["layer"], {}).setdefault(int(match["expert"]), {})[match["part"]] = name
        elif match or ("expert" in name and not _beside(rule, name)):
            stray.append(name)
    problems = [f"not in the rule {rule.name!r}: {listed(sorted(stray))}"] if stray else []
    found = {}
    for layer in sorted(layers, key=_by_number):
        mixture, wrong = _mixture(model, tensors, rule, layer, layers[layer])
        problems += wrong
        found[layer] = mixture
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise InputError(f"experts: {'; '.join(problems[:6])}{more}")
    return {layer: mixture for layer, mixture in found.items() if mixture is not None}


def _mixture(
    model: Mapping[str, Any], tensors: Mapping[str, Any], rule: Rule, layer: str, experts: dict[int, dict[str, str]]
) -> tuple[Mixture | None, list[str]]:
    """A layer's mixture, or None, and what is wrong with it."""
    block, wrong = f"{layer}.{rule.block}", []
    if gaps := sorted(set(range(max(experts) + 1)) - set(experts)):
        wrong.append(f"{block} has experts up to {max(experts)} and lacks {listed(map(str, gaps))}")
    if lacking := [f"{block}.{rule.expert.format(e)}.{part}" for e in sorted(experts) for part in rule.parts
                   if part not in experts[e]]:  # fmt: skip
        wrong.append(f"missing are {listed(lacking)}")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for part, name in ((part, name) for e in sorted(experts) for part, name in experts[e].items()):
        shape, dtype = tuple(tensors[name].shape), dtype_of(tensors[name], name)
        if (shapes.setdefault(part, shape), dtypes.setdefault(part, dtype)) != (shape, dtype):
            wrong.append(f"{name} is {dtype} {list(shape)}, and {dtypes[part]} {list(shapes[part])} in the first expert")
        elif dtype not in FLOATS:
            wrong.append(f"{name} is {dtype}: only experts of floats can be merged")
    if not lacking and not wrong:
        units = {p: shapes[p][axis] if axis < len(shapes[p]) else 0 for p, axis in rule.parts.items() if axis is not None}
        if len(set(units.values())) > 1 or not all(units.values()):
            wrong.append(f"{block}: experts have {', '.join(f'{n} hidden units by {p}' for p, n in units.items())}")
    router = f"{block}.{rule.router}"
    if odd := [n for n in tensors if n.startswith(f"{block}.") and not _known(rule, n, block, router)]:
        wrong.append(f"below {block} are {listed(sorted(odd))}, which the rule {rule.name!r} does not know")
    scores: tuple[int, ...] = tuple(tensors[f"{router}.weight"].shape) if f"{router}.weight" in tensors else ()
    shared = f"{router}.{SLOTS}" in tensors
    slots = tuple(int(s) for s in np.asarray(model[f"{router}.{SLOTS}"]).reshape(-1)) if shared else tuple(sorted(experts))
    if len(scores) != 2:
        wrong.append(f"{router}.weight is missing" if not scores else f"{router}.weight is of shape {list(scores)}")
    elif scores[0] != len(slots) or set(slots) != set(experts):
        wrong.append(f"{router} scores {scores[0]} experts, and there are {len(experts)}")
    elif f"{router}.bias" in tensors and tuple(tensors[f"{router}.bias"].shape) != scores[:1]:
        wrong.append(f"{router}.bias is of shape {list(tensors[f'{router}.bias'].shape)} for {scores[0]} experts")
    if wrong:
        return None, wrong
    return Mixture(layer, rule, router, tuple(experts[e] for e in sorted(experts)), shapes, dtypes, slots, shared), []


def _known(rule: Rule, name: str, block: str, router: str) -> bool:
    match = rule.pattern().fullmatch(name)
    return (
        name in {f"{router}.weight", f"{router}.bias", f"{router}.{SLOTS}"}
        or bool(match and match["part"] in rule.parts)
        or any(fnmatchcase(name[len(block) + 1 :], other) for other in rule.others)
    )


def _beside(rule: Rule, name: str) -> bool:
    """Whether a name with "expert" in it is one that the rule leaves alone, or the list of a router's experts."""
    patterns = [f"*.{rule.block}.{other}" for other in (*rule.others, f"{rule.router}.{SLOTS}")]
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _none_found(tensors: Mapping[str, Any], rules: Iterable[Rule]) -> str:
    named = [n for n in tensors if "expert" in n or "moe" in n.lower()]
    text = f"no mixture of experts that {' or '.join(repr(r.name) for r in rules)} would know"
    if stacked := [n for n in tensors if STACKED.fullmatch(n)]:
        return f"{text}: {listed(stacked[:1])} has all experts in one tensor; only experts of tensors of their own are read"
    if named:
        return f"{text}: there are {listed(sorted(named)[:3])}; a Rule of your own (--rule) says what they are"
    return f"{text}, and no tensor with expert in its name"


def _by_number(layer: str) -> list[Any]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", layer)]


def dtype_of(tensor: Any, name: str) -> str:
    """The safetensors type of an array, or of a tensor of an open checkpoint."""
    return tensor.dtype if isinstance(tensor.dtype, str) else dtype_name(tensor, name)


# ------------------------------------------------------------------------------------------------- what procedures ask for


def opened(model: Any) -> Mapping[str, Any]:
    """A mapping, opened where it is a path. UsageError for anything else."""
    if isinstance(model, str | Path):
        return open_checkpoint(model)
    if not isinstance(model, Mapping):
        raise UsageError(f"experts: a model is a path, an open checkpoint or a mapping, not {type(model).__name__}")
    return model


def routing_of(
    stats: Any, mixtures: Mapping[str, Mixture], need: tuple[str, ...] = ("routed", "logit_gram")
) -> dict[str, dict[str, np.ndarray]]:
    """layer -> {"routed", "logit_gram"}, of a Statistics, a mapping of their names, or a path. InputError lists the routers
    that have none, statistics of routers that are not there, and those of another size."""
    found = Statistics.load(stats) if isinstance(stats, str | Path) else stats
    if not isinstance(found, Mapping):
        raise UsageError(f"experts: statistics are a Statistics, a mapping or a path, not {type(found).__name__}")
    wanted = {f"{m.router}.{key}": (m, key) for m in mixtures.values() for key in need}
    problems = []
    if missing := sorted(wanted.keys() - {*found}):
        problems.append(f"missing are {listed(missing)}")
    routers = {m.router for m in mixtures.values()}
    if odd := sorted(n for n in found if n.endswith((".routed", ".logit_gram")) and n.rpartition(".")[0] not in routers):
        problems.append(f"of no router of the model are {listed(odd)}")
    routing: dict[str, dict[str, np.ndarray]] = {layer: {} for layer in mixtures}
    for name, (mixture, key) in wanted.items():
        if name in found:
            x, n = np.asarray(found[name], np.float64), len(mixture.slots)
            if x.shape != ((n,) if key == "routed" else (n, n)):
                problems.append(f"{name} is of shape {list(x.shape)} for {n} experts")
            elif not np.isfinite(x).all() or (key == "routed" and (x.min() < 0 or not x.sum())):
                problems.append(f"{name} has values that are not finite, or negative, or nothing but 0")
            routing[mixture.layer][key] = x
    if problems:
        raise InputError(f"routing statistics: {'; '.join(problems)}")
    return routing


class Wide(Mapping[str, np.ndarray]):
    """A model whose tensors are at least float32 when they are read, each anew: what a forward pass on an open checkpoint
    takes. others: tensors in place of the model's."""

    def __init__(self, model: Mapping[str, Any], others: Mapping[str, np.ndarray]) -> None:
        self._model, self._others = model, others

    def __getitem__(self, name: str) -> np.ndarray:
        return self._others[name] if name in self._others else host(self._model[name])

    def __iter__(self) -> Iterator[str]:
        return iter({*self._model, *self._others})

    def __len__(self) -> int:
        return len({*self._model, *self._others})


def route(model: Any, tokens: Any, mask: Any = None, *, batch: int | None = None) -> Statistics:
    """Where the routers of a language model send tokens: one of Mixtral's or Qwen-MoE's kind, with a config.json.

    model: a path or an open checkpoint, of which one tensor at a time is in memory. tokens: whole numbers (samples, places).
    mask: of that shape, 1 where a place counts. batch: samples that go through together, else as many as have 4096 places.
    UsageError for other models, whose statistics a framework's own forward pass can write (`Statistics.routing`).
    """
    model = opened(model)
    mixtures, config = find(model), getattr(model, "config", None)
    if config is None:
        raise UsageError("experts: a model is run by what its config.json says, and there is none")
    try:
        options = moe.options(config)
    except UsageError as error:
        instead = "let its own framework run it, and give the scores to refmerge.stats.Statistics.routing"
        raise UsageError(f"{error}: {instead}") from None
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise UsageError(f"experts: tokens are whole numbers (samples, places), not {tokens.dtype} of {list(tokens.shape)}")
    embedding = f"{llama.prefix(model)}embed_tokens.weight"
    shape: tuple[int, ...] = getattr(model, "tensors", model)[embedding].shape if embedding in model else ()
    if len(shape) != 2:
        raise InputError(f"experts: tensor {embedding!r} is {f'of shape {list(shape)}' if shape else 'missing'}")
    words, width = shape
    if not 0 <= tokens.min() <= tokens.max() < words:
        raise UsageError(
            f"experts: tokens are from 0 to {words - 1}, and here they are from {tokens.min()} to {tokens.max()}"
        )
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and tokens.shape[1] > window:
        raise UsageError(f"experts: samples of {tokens.shape[1]} places, and attention looks back {window}: cut them")
    if mask is not None and np.shape(mask) != tokens.shape:
        raise UsageError(f"experts: a mask of shape {list(np.shape(mask))} for tokens of {list(tokens.shape)}")
    found = Statistics()
    routers = {m.router: options["chosen"] for m in mixtures.values()}
    batch = batch or max(1, TOKENS // tokens.shape[1])
    mute = Wide(model, {"lm_head.weight": np.zeros((1, width), np.float32)})  # nobody asks which word comes next
    for start in range(0, len(tokens), batch):
        rows = slice(start, start + batch)
        taps = found.routing_taps(routers, None if mask is None else np.asarray(mask)[rows])
        try:
            moe.forward(mute, tokens[rows], taps, **options)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            reason = f"tensor {error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"experts: the model cannot be run: {reason}") from error
    return found


def configured(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, bytes]:
    """config.json with these changes, as a file to write."""
    return {"config.json": (json.dumps({**config, **changes}, indent=2, ensure_ascii=False) + "\n").encode()}


def refused_by_others(config: Mapping[str, Any], kind: str) -> dict[str, bytes]:
    """config.json under a model_type that no other tool knows, so that none takes the checkpoint for a model."""
    return configured(config, {"model_type": kind, KIND: {k: config[k] for k in ("model_type", KIND) if k in config}})


def known_again(config: Mapping[str, Any], kind: str) -> dict[str, bytes]:
    """config.json as it was before `refused_by_others`. InputError where it was not that kind."""
    if config.get("model_type") != kind or not isinstance(config.get(KIND), dict):
        raise InputError(f"config.json has model_type {config.get('model_type')!r}, and {kind!r} is to be restored")
    return configured({k: v for k, v in config.items() if k not in ("model_type", KIND)}, config[KIND])


class Output:
    """Where tensors go: into a mapping in memory, or a checkpoint at `out`. specs: name -> (safetensors dtype, shape).

    A context manager; `result` is the mapping or the open checkpoint, after the end.
    """

    def __init__(
        self, model: Mapping[str, Any], specs: Mapping[str, tuple[str, tuple[int, ...]]], out: str | Path | None,
        extra_files: Mapping[str, bytes] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self._model, self._specs, self._out = model, specs, out
        self.result: Any = {}
        self._writer = None
        if out is not None:
            sidecars = []
            if isinstance(model, Checkpoint):
                refuse_input(out, [model.path])
                sidecars = model.sidecars()
            if str(out).endswith(".safetensors"):
                sidecars, extra_files = [], None
            self._writer = CheckpointWriter(out, specs, sidecars=sidecars, extra_files=extra_files, **options)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)
            if kind is None:
                assert self._out is not None
                self.result = open_checkpoint(self._out)

    def put(self, name: str, x: Any) -> None:
        """A whole tensor, rounded once to its dtype."""
        dtype, shape = self._specs[name]
        raw = stored_bytes(x, dtype)
        if self._writer is not None:
            self._writer.write(name, 0, raw)
        else:
            self.result[name] = raw.view(DTYPES[dtype]).reshape(shape)

    def copy(self, name: str, source: str | None = None) -> None:
        """A tensor of the model, bit for bit; on disk in stretches."""
        source = source or name
        if self._writer is None or not isinstance(self._model, Checkpoint):
            return self.put(name, self._model[source])
        tensor = self._model.tensors[source]
        step = max(1, CHUNK // itemsize(tensor.dtype))
        for start in range(0, tensor.size, step):
            stop = min(start + step, tensor.size)
            raw = np.empty((stop - start) * itemsize(tensor.dtype), np.uint8)
            self._model.read(source, start, stop, raw)
            self._writer.write(name, start, raw)
        return None
