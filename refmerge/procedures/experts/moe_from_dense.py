"""A Mixtral, Qwen2-MoE or Qwen3-MoE checkpoint whose experts are the MLPs of dense models."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refmerge.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    TensorInfo,
    itemsize,
    open_checkpoint,
    parse_size,
    refuse_input,
)
from refmerge.checkpoint.dtypes import OUTPUTS
from refmerge.checkpoint.header import identity
from refmerge.errors import InputError, UsageError
from refmerge.identity import known, of_output
from refmerge.nets import llama
from refmerge.numeric import scores
from refmerge.procedure import procedure
from refmerge.procedures.experts._gates import MODES, rows
from refmerge.rng import key_for
from refmerge.sources import stored_bytes

__all__ = ["Expert", "Mixture", "moe_from_dense", "prepare"]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MATRICES = {f"{p}.weight" for p in PROJECTIONS}
MLP = re.compile(r"(?:model\.)?layers\.\d+\.mlp\.")
WORDS = {name: word for word, name in OUTPUTS.items()}
# What a config says by leaving it out, where a mixture's config says another thing by that.
LEFT_OUT = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # what prompts are read with
NOT_KEPT = ("auto_map", "pretraining_tp", "attention_bias", "mlp_bias", "transformers_version")


@dataclass(frozen=True)
class Expert:
    """A model whose MLPs become experts. model: a path or an open checkpoint. prompts: texts, or lists of tokens, that it
    is for, and that it is not for. noise_scale: deviation of normal noise on its MLPs. residual_scale: of its down_proj."""

    model: Any
    positive_prompts: Sequence[Any] = ()
    negative_prompts: Sequence[Any] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0


@dataclass(frozen=True)
class Form:
    """An architecture of mixtures. types: of the dense models. shared: how many shared experts it has. block: the module of
    the experts. projections: what an expert's matrices are called. config: its entries. count: the entry for the number of
    experts. biases: layers of attention that have one."""

    name: str
    types: tuple[str, ...]
    shared: int
    block: str
    projections: Mapping[str, str]
    config: Mapping[str, Any]
    count: str
    biases: tuple[str, ...] = ()

    def router(self, layer: str) -> str:
        return f"{layer}.{self.block}.gate.weight"

    def expert(self, layer: str, e: int, projection: str) -> str:
        return f"{layer}.{self.block}.experts.{e}.{self.projections[projection]}.weight"


OWN = {p: p for p in PROJECTIONS}
SPARSE = {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []}
FORMS = (
    Form(
        "mixtral", ("llama", "mistral"), 0, "block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "num_local_experts",
    ),
    Form(
        "qwen", ("llama", "mistral", "qwen2"), 1, "mlp", OWN,
        {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "qkv_bias": True, **SPARSE}, "num_experts",
        ("q_proj", "k_proj", "v_proj"),
    ),
    Form(
        "qwen3", ("qwen3",), 0, "mlp", OWN,
        {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **SPARSE}, "num_experts",
    ),
)  # fmt: skip


@procedure("moe_from_dense", paper="arcee-ai/mergekit 0.1.5 mergekit-moe")
def moe_from_dense(
    base: Any,
    experts: Sequence[Any],
    out: str | Path,
    *,
    gate_mode: Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"] = "hidden",
    hidden_states: Any = None,
    experts_per_token: int = 2,
    shared_experts: Sequence[Any] = (),
    architecture: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    resume: bool = False,
) -> Checkpoint:
    """Write a mixture of experts made of dense models, which transformers loads. Returns it, open.

    base: the folder of the model whose other tensors, config and tokenizer the mixture has. experts, shared_experts:
    folders, or `Expert`s with prompts. hidden_states: a file or mapping with the states that the router's rows are made of,
    where they are not to be computed here. resume: go on where an earlier run of the same call stopped, if one did; and if
    this one is interrupted, leave what is done beside `out` to be gone on with.
    """
    plan = prepare(
        base, experts, gate_mode=gate_mode, hidden_states=hidden_states, experts_per_token=experts_per_token,
        shared_experts=shared_experts, architecture=architecture, dtype=dtype, seed=seed,
    )  # fmt: skip
    return plan.run(out, max_shard_size=max_shard_size, overwrite=overwrite, resume=resume)


@dataclass
class Mixture:
    """A mixture that has been checked and can be written. specs: name -> (safetensors dtype, shape) of what is written.
    sources: name -> the expert, or None for the base, and the name there; routers have none. notes: for the user."""

    base: Checkpoint
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    form: Form
    gate_mode: str
    hidden_states: Any
    config: dict[str, Any]
    seed: int
    specs: dict[str, tuple[str, tuple[int, ...]]]
    sources: dict[str, tuple[Expert | None, str]]
    routers: tuple[str, ...]
    notes: list[str] = field(default_factory=list)

    @property
    def everything(self) -> tuple[Expert, ...]:
        return self.experts + self.shared

    def run(
        self, out: str | Path, *, max_shard_size: int | str = "5GB", overwrite: bool = False, resume: bool = False
    ) -> Checkpoint:
        """Write it to a folder, tensor by tensor, and return it, open."""
        if str(out).endswith(".safetensors"):
            raise UsageError(f"a mixture of experts needs a folder, with its config beside it, not {str(out)!r}")
        inputs = [self.base, *(e.model for e in self.everything)]
        refuse_input(out, [c.path for c in inputs])
        merge = self._identity(inputs, parse_size(max_shard_size))
        if resume and merge is None:
            raise UsageError("resume is for mixtures of models and states on disk: hidden_states is a mapping in memory")
        config = (json.dumps(self.config, indent=2) + "\n").encode()
        with CheckpointWriter(
            out, self.specs, max_shard_size=max_shard_size, overwrite=overwrite, sidecars=self.base.sidecars(),
            extra_files={"config.json": config}, merge=merge, resume=resume,
        ) as writer:  # fmt: skip
            writer.reuse(writer.finished)
            left = self.specs.keys() - writer.finished
            # 1. rows of the routers
            routers: Iterable[tuple[str, np.ndarray]] = ()
            if left - self.sources.keys():
                prompts = [(e.positive_prompts, e.negative_prompts) for e in self.everything]
                found = rows(self.base, self.gate_mode, prompts, self.routers, self.seed, self.hidden_states)
                routers = self.router_bytes(found)
            # 2. write: the base's tensors, the experts', the routers
            for name in self.sources:
                if name in left:
                    writer.write(name, 0, self.bytes_of(name))
            for name, raw in routers:
                if name in left:
                    writer.write(name, 0, raw)
            for c in inputs:
                c.check_unchanged()
                c.close()
        return open_checkpoint(out)

    def _identity(self, inputs: Sequence[Checkpoint], shards: int) -> dict[str, str] | None:
        """What decides every byte of it; None where that is not in files alone."""
        states = self.hidden_states
        if states is not None and not isinstance(states, Mapping):
            states = open_checkpoint(states)
        read = [*inputs, *([] if states is None else [states])]
        if not all(isinstance(c, Checkpoint) and known(c) for c in read):
            return None
        tokens = [path for path in self.base.sidecars() if path.name in TOKENIZER]
        experts = [
            [_plain(e.positive_prompts), _plain(e.negative_prompts), float(e.noise_scale), float(e.residual_scale)]
            for e in self.everything
        ]
        numbers = {id(e): i for i, e in enumerate(self.everything)}
        sources = [[name, numbers.get(id(e)), there] for name, (e, there) in self.sources.items()]
        return of_output(
            inputs=[*(c.fingerprint() for c in read), *([p.name, *identity(os.stat(p))[2:]] for p in tokens)],
            recipe=[self.form.name, self.gate_mode, int(self.seed), experts, self.routers, sources, self.config],
            layout=[shards, sorted(self.specs.items())],
        )

    def bytes_of(self, name: str) -> np.ndarray:
        """A tensor as it is stored: its source's bytes where nothing is changed, else rounded once. Biases that no source
        has are zeros."""
        expert, there = self.sources[name]
        checkpoint = self.base if expert is None else expert.model
        dtype, shape = self.specs[name]
        if there not in checkpoint:
            return np.zeros(math.prod(shape) * itemsize(dtype), np.uint8)
        x = checkpoint[there]
        noise = expert.noise_scale if expert is not None else 0.0
        scale = expert.residual_scale if expert is not None and there.endswith("down_proj.weight") else 1.0
        if noise == 0 and scale == 1 and checkpoint.tensors[there].dtype == dtype:
            return x.reshape(-1).view(np.uint8)
        x = scores(x)
        if noise:
            key = np.array(key_for(self.seed, name, 0), dtype=np.uint64)
            x = x + noise * np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)
        return stored_bytes(scale * x, dtype)

    def router_bytes(self, found: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for i, name in enumerate(self.routers):
            yield name, stored_bytes(found[i, : len(self.experts)], self.specs[name][0])
            if self.shared:
                gate = shared_gate(name)
                yield gate, stored_bytes(found[i, len(self.experts) :], self.specs[gate][0])

    def described(self) -> dict[str, Any]:
        """A summary that JSON can hold."""
        return {
            "architecture": self.form.name,
            "base": str(self.base.path),
            "experts": [str(e.model.path) for e in self.experts],
            "shared_experts": [str(e.model.path) for e in self.shared],
            "gate_mode": self.gate_mode,
            "config": self.config,
            "notes": self.notes,
        }

    def figures(self) -> dict[str, Any]:
        """What is moved: tensors, and their bytes."""
        read = [(self.base if e is None else e.model, there) for e, there in self.sources.values()]
        return {
            "method": f"moe_from_dense ({self.form.name}, {self.gate_mode})",
            "models": len(self.everything),
            "tensors": len(self.specs),
            "parameters": sum(math.prod(shape) for _, shape in self.specs.values()),
            "bytes_read": sum(c.tensors[there].nbytes for c, there in read if there in c),
            "bytes_written": sum(math.prod(shape) * itemsize(dtype) for dtype, shape in self.specs.values()),
        }


def prepare(
    base: Any,
    experts: Sequence[Any],
    *,
    gate_mode: str = "hidden",
    hidden_states: Any = None,
    experts_per_token: int = 2,
    shared_experts: Sequence[Any] = (),
    architecture: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Mixture:
    """Check everything that can be checked without reading a weight. The arguments are those of `moe_from_dense`."""
    if gate_mode not in MODES:
        raise UsageError(f"gate_mode = {gate_mode!r} is none of {', '.join(MODES)}")
    if dtype is not None and dtype.removeprefix("torch.") not in OUTPUTS:
        raise UsageError(f"dtype = {dtype!r} is none of {', '.join(OUTPUTS)}")
    base = opened(base)
    routed, shared = (tuple(map(expert_of, given)) for given in (experts, shared_experts))
    if type(experts_per_token) is not int or not 1 <= experts_per_token <= len(routed):
        raise UsageError(
            f"experts_per_token = {experts_per_token!r} is outside of [1, {len(routed)}], the number of experts"
        )
    if hidden_states is not None and gate_mode not in ("hidden", "hidden_last", "hidden_avg"):
        raise UsageError(f"hidden_states are for the gate modes hidden, hidden_last and hidden_avg, not {gate_mode}")
    form = form_for(base, routed, shared, architecture)
    notes = check_prompts(routed, shared, gate_mode, hidden_states)
    wanted = None if dtype is None else OUTPUTS[dtype.removeprefix("torch.")]
    layout = Layout(base, form, wanted)
    layout.add_base()
    for i in range(llama.depth(base)):
        layout.add_layer(i, routed, shared)
    for expert in [*routed, *shared]:
        if llama.depth(expert.model) != llama.depth(base):
            raise InputError(
                f"{expert.model.path}: has {llama.depth(expert.model)} layers, and the base {llama.depth(base)}"
            )
    config = config_for(base, form, len(routed), experts_per_token, wanted)
    return Mixture(
        base, routed, shared, form, gate_mode, hidden_states, config, seed, layout.specs, layout.sources,
        tuple(layout.routers), notes,
    )  # fmt: skip


@dataclass
class Layout:
    """Names, dtypes and shapes of a mixture, and where each tensor comes from. dtype: of all floating-point tensors, where
    the base's are not to stay."""

    base: Checkpoint
    form: Form
    dtype: str | None
    specs: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    sources: dict[str, tuple[Expert | None, str]] = field(default_factory=dict)
    routers: list[str] = field(default_factory=list)

    def add(self, name: str, like: TensorInfo, shape: tuple[int, ...], source: tuple[Expert | None, str]) -> None:
        self.specs[name] = (self.dtype if self.dtype and like.dtype in WORDS else like.dtype, shape)
        self.sources[name] = source

    def add_base(self) -> None:
        """All but the MLPs. InputError for what the mixture has no place for."""
        for name, info in self.base.tensors.items():
            module, _, key = name.rpartition(".")
            bias = key == "bias" and ".self_attn." in name and module.rpartition(".")[2] not in self.form.biases
            if bias or (MLP.match(name) and name.split(".mlp.")[1] not in MATRICES):
                raise InputError(f"{self.base.path}: tensor {name!r} has no place in a {self.form.name} mixture")
            if not MLP.match(name):
                self.add(name, info, info.shape, (None, name))

    def add_layer(self, i: int, routed: Sequence[Expert], shared: Sequence[Expert]) -> None:
        """The experts and routers of a layer. InputError where an expert has other shapes than the base."""
        at = f"layers.{i}"
        layer = f"{llama.prefix(self.base)}{at}"
        for key in self.form.biases:
            weight, bias = tensor(self.base, f"{layer}.self_attn.{key}.weight"), f"{layer}.self_attn.{key}.bias"
            if bias not in self.base:  # which the mixture has: zeros
                self.add(bias, weight, weight.shape[:1], (None, bias))
        for projection in PROJECTIONS:
            like = tensor(self.base, f"{layer}.mlp.{projection}.weight")
            named = [(self.form.expert(layer, e, projection), expert) for e, expert in enumerate(routed)]
            named += [(f"{layer}.mlp.shared_expert.{projection}.weight", expert) for expert in shared]
            for name, expert in named:
                found = tensor(expert.model, f"{llama.prefix(expert.model)}{at}.mlp.{projection}.weight")
                if found.shape != like.shape:
                    shapes = f"{list(found.shape)}, and {list(like.shape)} in the base"
                    raise InputError(f"{expert.model.path}: tensor {found.name!r} has shape {shapes}")
                self.add(name, like, like.shape, (expert, found.name))
        embedding, router = tensor(self.base, f"{llama.prefix(self.base)}embed_tokens.weight"), self.form.router(layer)
        self.routers.append(router)
        for name, count in [(router, len(routed)), *([(shared_gate(router), 1)] if shared else [])]:
            self.specs[name] = (self.dtype or embedding.dtype, (count, embedding.shape[1]))


def opened(model: Any) -> Checkpoint:
    """The checkpoint, which must have a config.json."""
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if checkpoint.config is None:
        raise InputError(f"{checkpoint.path}: has no config.json; a mixture is made of folders as transformers writes them")
    if "quantization_config" in checkpoint.config:
        raise InputError(f"{checkpoint.path}: is quantised; a mixture is made of models that are not")
    return checkpoint


def expert_of(given: Any) -> Expert:
    """An expert with its model opened. UsageError for numbers that cannot be."""
    expert = given if isinstance(given, Expert) else Expert(given)
    for key in ("noise_scale", "residual_scale"):
        value = getattr(expert, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{key} = {value!r} is no finite number")
    for key in ("positive_prompts", "negative_prompts"):
        if isinstance(getattr(expert, key), str):
            raise UsageError(f"{key} is a list of prompts: write [{getattr(expert, key)!r}]")
    return replace(expert, model=opened(expert.model))


def tensor(model: Checkpoint, name: str) -> TensorInfo:
    """What is known of a floating-point tensor. InputError where there is none of that name."""
    if name not in model.tensors:
        raise InputError(f"{model.path}: there is no tensor {name!r}; a mixture is made of models like Llama")
    if model.tensors[name].dtype not in WORDS:
        raise InputError(f"{model.path}: tensor {name!r} is {model.tensors[name].dtype}, not one of {', '.join(OUTPUTS)}")
    return model.tensors[name]


def form_for(base: Checkpoint, routed: Sequence[Expert], shared: Sequence[Expert], architecture: str | None) -> Form:
    """The architecture that is asked for, or the first that fits. UsageError where none does, which says why."""
    models = [base, *(e.model for e in (*routed, *shared))]
    types = {(model.config or {}).get("model_type") for model in models}
    if len(types) > 1:
        raise InputError(f"the models are of different types: {', '.join(sorted(map(str, types)))}")
    (found,) = types
    asked = [form for form in FORMS if architecture is None or form.name.startswith(architecture.lower())]
    if not asked:
        raise UsageError(f"architecture = {architecture!r} is none of {', '.join(form.name for form in FORMS)}")
    fits = [form for form in asked if found in form.types and form.shared == len(shared)]
    if not fits:
        has = ", ".join(f"{f.name} of {' or '.join(f.types)} with {f.shared or 'no'} shared expert" for f in asked)
        raise UsageError(f"no architecture has models of type {found!r} and {len(shared)} shared experts ({has})")
    return fits[0]


def check_prompts(
    routed: Sequence[Expert], shared: Sequence[Expert], gate_mode: str, hidden_states: Any
) -> list[str]:  # fmt: skip
    """What the user should know. UsageError where rows of the router cannot be made of the prompts."""
    if gate_mode in ("random", "uniform_random"):
        return ["routers are drawn at random: prompts are not used"] if any(e.positive_prompts for e in routed) else []
    if hidden_states is not None:
        return []
    for e, expert in enumerate((*routed, *shared)):
        if not expert.positive_prompts:
            raise UsageError(
                f"{'the shared expert' if e >= len(routed) else f'expert {e}'} has no positive_prompts, of which gate_mode "
                f"{gate_mode} makes its router's row; random needs none"
            )
    first = (list(routed[0].positive_prompts), list(routed[0].negative_prompts))
    if len(routed) > 1 and all((list(e.positive_prompts), list(e.negative_prompts)) == first for e in routed):
        raise UsageError("all experts have the same prompts, and so would all have the same row in the router")
    same = len({e.model.path for e in routed}) == 1 and len(routed) > 1 and not any(e.noise_scale for e in routed)
    return ["all experts are the same model: before it is trained, the mixture gives what that gives"] if same else []


def config_for(base: Checkpoint, form: Form, experts: int, experts_per_token: int, dtype: str | None) -> dict[str, Any]:
    """The mixture's config: the base's, with what it says by leaving it out, and the mixture's own entries."""
    given = base.config or {}
    config = {k: v for k, v in given.items() if k not in NOT_KEPT}
    said = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": None}
    if "rope_parameters" not in given:
        said["rope_theta"] = 10000.0
    said |= {"num_key_value_heads": given.get("num_attention_heads"), **LEFT_OUT[given["model_type"]]}
    config |= {k: v for k, v in said.items() if k not in given}
    config |= form.config
    config |= {form.count: experts, "num_experts_per_tok": experts_per_token}
    if form.name != "mixtral":
        config["moe_intermediate_size"] = given["intermediate_size"]
    if form.shared:
        config["shared_expert_intermediate_size"] = given["intermediate_size"]
        config["use_sliding_window"] = given.get("use_sliding_window", False)
    if dtype is not None:
        config |= {k: WORDS[dtype] for k in ("dtype", "torch_dtype") if k in given} or {"torch_dtype": WORDS[dtype]}
    return config


def _plain(prompts: Sequence[Any]) -> list[Any]:
    return [p if isinstance(p, str) else [int(token) for token in p] for p in prompts]


def shared_gate(router: str) -> str:
    return router.replace(".gate.weight", ".shared_expert_gate.weight")
