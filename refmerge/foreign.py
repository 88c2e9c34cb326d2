"""LoRA files of image models, without a configuration: kohya's layout and diffusers'.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight     kohya: r x in, .lora_up.weight: out x r, and .alpha
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight             diffusers: .lora_B.weight, or .lora.down and .lora.up
    unet.down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight   diffusers, older

kohya writes a module's name with underscores for dots, so that it is found only beside a model: `matched` looks for it among
the names of a base. The U-Nets of Stable Diffusion have two sets of names, those of single files and diffusers'; each is
turned into the other by rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from refmerge.checkpoint.files import listed, shown
from refmerge.errors import InputError, UsageError

if TYPE_CHECKING:
    from refmerge.adapters import Adapter, Factors

__all__ = ["file_of", "matched", "matches", "parts_of", "single_names"]

# The part of a pipeline that a name begins with, in kohya's layout and in diffusers'.
KOHYA = {
    "lora_unet_": "unet", "lora_transformer_": "transformer", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
}  # fmt: skip
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
# Where a part lies in a file that holds all of them; in one of its own it stands at the top.
PLACES = {
    "unet": ("model.diffusion_model.", "unet.", ""),
    "transformer": ("model.diffusion_model.", "transformer.", ""),
    "text_encoder": (
        "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer.",
        "text_encoder.", "",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "text_encoder_2.", ""),
    "text_encoder_3": ("text_encoder_3.", ""),
}
ENDS = re.compile(
    r"(?P<module>.+?)(?:(?:\.lora_down|\.lora_A|\.lora\.down|_lora\.down)\.weight(?P<A>)"
    r"|(?:\.lora_up|\.lora_B|\.lora\.up|_lora\.up)\.weight(?P<B>)|\.alpha(?P<alpha>))"
)
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
SINGLE = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out", "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
# Modules of a layer of OpenCLIP's text encoder, which single files have, and what diffusers and kohya call them. The weights
# of its queries, keys and values are one tensor, in_proj_weight.
OPEN_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_RESNET_OF = {theirs: name for name, theirs in RESNET.items()}
_SINGLE_OF = {theirs: name for name, theirs in SINGLE.items()}


def parts_of(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], label: str
) -> dict[str, tuple[dict[str, np.ndarray], float | None]]:
    """Module, as the file calls it -> its A and B, and alpha. InputError lists what is neither."""
    found: dict[str, dict[str, np.ndarray]] = {}
    odd = []
    for name in sorted(tensors):
        match = ENDS.fullmatch(name)
        if match is None:
            odd.append(name)
            continue
        kind = next(key for key in ("A", "B", "alpha") if match[key] is not None)
        module = match["module"].replace(".processor.", ".")
        module += ".0" if module != match["module"] and module.endswith(".to_out") else ""
        found.setdefault(module, {})[kind] = tensors[name]
    if odd:
        raise InputError(f"{label}: {listed(odd)} are no LoRA factors in PEFT's, kohya's or diffusers' layout")
    if lone := [module for module, x in found.items() if not {"A", "B"} <= {*x}]:
        raise InputError(f"{label}: factors without their other half: {listed(lone)}")
    told = _told(metadata.get("lora_adapter_metadata", "{}"), label)
    return {module: (x, _alpha(module, x, told, label)) for module, x in found.items()}


def _told(text: str, label: str) -> dict[str, Any]:
    """diffusers' metadata. InputError where they are none, or say that the weights change by more than alpha / r B A."""
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise InputError(f"{label}: lora_adapter_metadata is not a JSON object")
    if on := [k for k, v in told.items() if v and k.rpartition(".")[2] in ("use_rslora", "use_dora", "lora_bias")]:
        raise InputError(f"{label}: lora_adapter_metadata sets {listed(on)}, which is understood in PEFT's folders alone")
    return told


def matches(pattern: str, module: str, label: str) -> bool:
    """PEFT's rule: a pattern is a regular expression that is the module's name or its end after a dot. InputError where it
    is none."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except (re.error, OverflowError) as error:
        raise InputError(f"{label}: pattern {shown(pattern)} is no regular expression: {error}") from None


def _alpha(module: str, x: Mapping[str, np.ndarray], told: Mapping[str, Any], label: str) -> float | None:
    """As the file has it beside the factors, or in diffusers' metadata; else None, which is the rank."""
    if "alpha" in x:
        if x["alpha"].size != 1:
            raise InputError(f"{label}: '{module}.alpha' is {list(x['alpha'].shape)}, and no number")
        return float(np.asarray(x["alpha"], np.float64).reshape(-1)[0])
    part, _, rest = module.partition(".")
    patterns = told.get(f"{part}.alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{label}: {part}.alpha_pattern is no mapping")
    alphas = [alpha for pattern, alpha in patterns.items() if matches(pattern, rest, label)]
    alpha = alphas[0] if alphas else told.get(f"{part}.lora_alpha")
    if not isinstance(alpha, int | float | None):
        raise InputError(f"{label}: alpha of {shown(module)} is {shown(alpha)}, and no number")
    return alpha


def file_of(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors of an adapter that is not in PEFT's layout, by their names in its file; alpha as kohya has it. UsageError
    where a scaling that diffusers' layout has no place for is not 1."""
    named: dict[str, np.ndarray] = {}
    scaled = []
    for module, f in adapter.modules.items():
        kohya = module.startswith(tuple(KOHYA))
        down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        named |= {f"{module}.{down}.weight": f.A, f"{module}.{up}.weight": f.B}
        if kohya:
            named[f"{module}.alpha"] = np.asarray(f.scaling * f.rank, np.float32)
        elif f.scaling != 1:
            scaled.append(module)
    if scaled:
        raise UsageError(f"diffusers' layout has no scaling, and those of {listed(scaled)} are not 1; refactor makes them 1")
    return named


def matched(adapter: Adapter, names: Iterable[str], label: str, part: str | None = None) -> Adapter:
    """The adapter with the names of the model's modules. part: the only one that is wanted, as unet; None is all of them.

    InputError lists the modules that are not in the model, and those for which it has several.
    """
    from dataclasses import replace

    if adapter.layout == "peft":
        if part is not None:
            raise UsageError(f"{label}: part = {part!r} is for adapters of several models, and this is PEFT's of one")
        return adapter
    wanted = {raw: _part(raw) for raw in adapter.modules}
    if part is not None:
        known = sorted({p for p, _ in wanted.values()})
        if part not in known:
            raise UsageError(f"{label}: has no part {part!r}, only {', '.join(known)}")
        wanted = {raw: (p, rest) for raw, (p, rest) in wanted.items() if p == part}
    index = {p: dict(_index(names, p)) for p in {p for p, _ in wanted.values()}}
    found = {raw: index[p].get(rest.replace(".", "_")) for raw, (p, rest) in wanted.items()}
    if missing := [raw for raw, place in found.items() if place is None]:
        hint = "" if part is not None else "; where the model is one part of several, part (--part) says which"
        raise InputError(f"{label}: the base has no module for {listed(missing)}{hint}")
    if len(set(found.values())) < len(found):
        twice = sorted(raw for raw, place in found.items() if list(found.values()).count(place) > 1)
        raise InputError(f"{label}: {listed(twice)} fit the same modules of the base; part (--part) says which are meant")
    modules: dict[str, Factors] = {}
    thirds: dict[str, dict[int, Factors]] = {}
    for raw, (module, third) in ((raw, place) for raw, place in found.items() if place is not None):
        if third is None:
            modules[module] = adapter.modules[raw]
        else:
            thirds.setdefault(module, {})[third] = adapter.modules[raw]
    modules |= {module: _stacked(factors) for module, factors in thirds.items()}
    return replace(adapter, modules=modules, layout="peft")


def _stacked(thirds: Mapping[int, Factors]) -> Factors:
    """The factors of a tensor that is three others, one below the other, from those of some of the three."""
    from refmerge.adapters import Factors

    rows, rank = max(len(f.B) for f in thirds.values()), sum(f.rank for f in thirds.values())
    B, at = np.zeros((3 * rows, rank)), 0
    for third, f in thirds.items():
        B[third * rows : third * rows + len(f.B), at : at + f.rank] = f.scaling * f.matrices()[0]
        at += f.rank
    return Factors(np.concatenate([f.matrices()[1] for f in thirds.values()]), B)


def _part(raw: str) -> tuple[str, str]:
    """The part that a name belongs to, and the rest of it; without a known beginning, the whole of the only model."""
    for prefix, part in KOHYA.items():
        if raw.startswith(prefix):
            return part, raw.removeprefix(prefix)
    part, _, rest = raw.partition(".")
    return (part, rest) if part in PARTS else ("unet", raw)


def _index(names: Iterable[str], part: str) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """(name with underscores, (module, which third of its rows or None)), for every name by which a module of that part may
    be called."""
    modules = [n[: -len("?weight")] for n in names if n.endswith((".weight", ".in_proj_weight"))]
    place = next(p for p in PLACES[part] if any(m.startswith(p) for m in modules) or not p)
    for module in modules:
        if module.startswith(place):
            bare = module.removeprefix(place)
            for name in {bare, *([_diffusers(bare), *single_names(bare)] if part == "unet" else [])}:
                yield name.replace(".", "_"), (module, None)
            if part.startswith("text_encoder") and bare.startswith("encoder.layers."):  # as transformers 5 saves CLIP's
                yield f"text_model.{bare}".replace(".", "_"), (module, None)
            for name, third in _of_open_clip(bare) if part != "unet" else ():
                yield name.replace(".", "_"), (module, third)


def _of_open_clip(name: str) -> list[tuple[str, int | None]]:
    """diffusers' names for a module of OpenCLIP's text encoder, and which third of its rows each is."""
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if found is None:
        return []
    layer = f"text_model.encoder.layers.{found[1]}."
    if found[2] == "attn.in_proj":
        return [(layer + third, i) for i, third in enumerate(THIRDS)]
    return [(layer + OPEN_CLIP[found[2]], None)] if found[2] in OPEN_CLIP else []


def _diffusers(name: str) -> str:
    """diffusers' name for a module of the first Stable Diffusion's U-Net: its blocks come in stages of three."""
    if name in SINGLE:
        return SINGLE[name]
    block = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)", name)
    middle = re.fullmatch(r"middle_block\.([012])\.(.+)", name)
    if middle:
        at, rest = int(middle[1]), middle[2]
        return f"mid_block.attentions.0.{rest}" if at == 1 else f"mid_block.resnets.{at // 2}.{RESNET.get(rest, rest)}"
    if block is None:
        return name
    side, at, sub, rest = block[1], int(block[2]), int(block[3]), block[4]
    stage, place = divmod(at - 1, 3) if side == "input_blocks" else divmod(at, 3)
    blocks = f"down_blocks.{stage}" if side == "input_blocks" else f"up_blocks.{stage}"
    if rest == "op":
        return f"{blocks}.downsamplers.0.conv"
    if sub and rest == "conv":
        return f"{blocks}.upsamplers.0.conv"
    return f"{blocks}.attentions.{place}.{rest}" if sub else f"{blocks}.resnets.{place}.{RESNET.get(rest, rest)}"


def single_names(name: str) -> list[str]:
    """What a module of diffusers' U-Net may be called in a single file: the inverse of `_diffusers`. An upsampler stands
    after the attention, or in its place where the stage has none."""
    if name in _SINGLE_OF:
        return [_SINGLE_OF[name]]
    kinds = "resnets|attentions|downsamplers|upsamplers"
    block = re.fullmatch(rf"(down|up|mid)_blocks?\.(?:(\d+)\.)?({kinds})\.(\d+)\.(.+)", name)
    if block is None:
        return []
    side, stage, kind, place, rest = block[1], int(block[2] or 0), block[3], int(block[4]), block[5]
    rest = _RESNET_OF.get(rest, rest) if kind == "resnets" else rest
    if side == "mid":
        return [f"middle_block.{1 if kind == 'attentions' else 2 * place}.{rest}"]
    if kind == "downsamplers":
        return [f"input_blocks.{3 * stage + 3}.0.op"]
    if kind == "upsamplers":
        return [f"output_blocks.{3 * stage + 2}.{sub}.conv" for sub in (1, 2)]
    at = f"input_blocks.{3 * stage + place + 1}" if side == "down" else f"output_blocks.{3 * stage + place}"
    return [f"{at}.{int(kind == 'attentions')}.{rest}"]
