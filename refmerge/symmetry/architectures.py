"""The specs of known architectures, from a model's tensor names and shapes; weights are not read.

A permutation has the name of the layer that makes its units (`fc1`, `layer1.0.conv1`). In transformers it says what it is:
`residual`, and of layer l `ffn.l`, `heads.l`, inside of each head `keys.l` and `values.l`, and where heads share keys and
values `groups.l` and, inside of each, `queries.l`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from refmerge.errors import UsageError
from refmerge.nets import gpt2 as gpt2_net
from refmerge.nets import llama as llama_net
from refmerge.nets import mlp as mlp_net
from refmerge.nets import resnet as resnet_net
from refmerge.nets import vgg as vgg_net
from refmerge.symmetry.axes import Block, Entry, Nested, Slices
from refmerge.symmetry.spec import Model, Spec

__all__ = ["ARCHITECTURES", "declared", "detect", "gpt2", "llama", "mlp", "resnet", "vgg", "vit"]

Axes = Mapping[str, Sequence[Entry] | None]
_RESNET_BLOCK = "encoder.stages.0.layers.0.layer.0.convolution."  # in names of transformers' ResNet


def mlp(model: Model, layers: Sequence[str] | None = None) -> Spec:
    """refmerge.nets.mlp: the hidden units of each layer. layers: their names in their order, where that is not the one of
    their numbers."""
    axes: dict[str, Sequence[Entry] | None] = {}
    before: Entry = None
    order = list(layers or mlp_net.order(model))
    if not order:
        raise UsageError("mlp: the model has no tensor whose name ends in .weight")
    for name in order:
        units = None if name == order[-1] else name
        axes |= {f"{name}.weight": (units, before), f"{name}.bias": (units,)}
        before = units
    return _spec("mlp", model, axes)


def vgg(model: Model) -> Spec:
    """refmerge.nets.vgg: the channels of each convolution, which its norm shares, and the hidden units at the end. A channel
    is one or several neighbouring inputs of the first linear layer."""
    shapes, channels = _shapes(model), 1
    _needs("vgg", shapes, "features.0.weight", "classifier.0.weight")
    axes: dict[str, Sequence[Entry] | None] = {}
    before: Entry = None
    for name, norm, _ in vgg_net.convolutions(shapes):
        axes |= {f"{name}.weight": (name, before, None, None), f"{name}.bias": (name,), **_norm(norm, name)}
        before, channels = name, shapes[f"{name}.weight"].shape[0]
    for name in (dense := vgg_net.modules(shapes, "classifier")):
        pixels = shapes[f"{name}.weight"].shape[1] // channels if name == dense[0] else 1
        units = None if name == dense[-1] else name
        axes |= {f"{name}.weight": (units, Block(str(before), pixels) if pixels > 1 else before), f"{name}.bias": (units,)}
        before = units
    return _spec("vgg", model, axes)


def resnet(model: Model) -> Spec:
    """refmerge.nets.resnet (torchvision's names), or the ResNet of transformers, whose permutations have the names that they
    would have there: the residual stream of each stage, and the channels inside of each block."""
    shapes = _shapes(model)
    if any(_RESNET_BLOCK in name for name in shapes):
        named = {name: _as_torchvision(name) for name in shapes}
        spec = resnet({called: shapes[name] for name, called in named.items()})
        return Spec({name: spec.axes[called] for name, called in named.items()})
    _needs("resnet", shapes, "conv1.weight", "layer1.0.conv1.weight")
    units = resnet_net.blocks(shapes)
    axes: dict[str, Sequence[Entry] | None] = {
        "conv1.weight": (units[0].before, None, None, None), **_norm("bn1", units[0].before),
    }  # fmt: skip
    for block in units:
        before = block.before
        for i, conv in enumerate(block.convs, 1):
            after = block.after if i == len(block.convs) else conv
            axes |= {f"{conv}.weight": (after, before, None, None), **_norm(f"{block.name}.bn{i}", after)}
            before = after
        if block.shortcut is not None:
            axes |= {f"{block.shortcut}.0.weight": (block.after, block.before, None, None)}
            axes |= _norm(f"{block.shortcut}.1", block.after)
    head = resnet_net.head(shapes)
    return _spec("resnet", model, axes | {f"{head}.weight": (None, units[-1].after), f"{head}.bias": (None,)})


def _as_torchvision(name: str) -> str:
    """The name that a tensor of transformers' ResNet has in torchvision's."""
    name = name.removeprefix("resnet.").replace("embedder.embedder.convolution", "conv1")
    name = name.replace("embedder.embedder.normalization", "bn1").replace("classifier.1.", "fc.")
    block = re.fullmatch(
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.(\d+))\.(convolution|normalization)\.(.+)", name
    )
    if block is None:
        return name
    stage, number, kind, layer, part, key = block.groups()
    if kind == "shortcut":
        of = f"downsample.{0 if part == 'convolution' else 1}"
    else:
        of = f"{'conv' if part == 'convolution' else 'bn'}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{number}.{of}.{key}"


def vit(model: Model, heads: int) -> Spec:
    """refmerge.nets.vit (timm's names), or the ViT and DeiT of transformers: residual stream, heads, what is inside of a
    head, hidden units."""
    shapes = _shapes(model)
    at = next((n.partition("encoder.layer.")[0] for n in shapes if "encoder.layer.0.attention.attention." in n), None)
    query = "blocks.0.attn.qkv.weight" if at is None else f"{at}encoder.layer.0.attention.attention.query.weight"
    head = _width("vit", shapes, query, 0, 3 * heads if at is None else heads)
    keys, values = Nested("heads.{l}", "keys.{l}", head), Nested("heads.{l}", "values.{l}", head)
    if at is not None:
        return _spec("vit", model, _vit_of_transformers(at, keys, values))
    qkv = Slices([keys, keys, values])
    axes: Axes = {
        "cls_token": (None, None, "residual"),
        "pos_embed": (None, None, "residual"),
        "patch_embed.proj.weight": ("residual", None, None, None),
        "patch_embed.proj.bias": ("residual",),
        "blocks.{l}.attn.qkv.weight": (qkv, "residual"),
        "blocks.{l}.attn.qkv.bias": (qkv,),
        "blocks.{l}.attn.proj.weight": ("residual", values),
        "blocks.{l}.attn.proj.bias": ("residual",),
        "blocks.{l}.mlp.fc1.weight": ("ffn.{l}", "residual"),
        "blocks.{l}.mlp.fc1.bias": ("ffn.{l}",),
        "blocks.{l}.mlp.fc2.weight": ("residual", "ffn.{l}"),
        "blocks.{l}.mlp.fc2.bias": ("residual",),
        **_norm("blocks.{l}.norm1", "residual"),
        **_norm("blocks.{l}.norm2", "residual"),
        **_norm("norm", "residual"),
        "head.weight": (None, "residual"),
        "head.bias": (None,),
    }
    return _spec("vit", model, axes)


def _vit_of_transformers(at: str, keys: Entry, values: Entry) -> Axes:
    """As they are saved: queries, keys and values apart, and, in front of all but the last layers, the model's name."""
    axes: dict[str, Sequence[Entry] | None] = {
        **{f"embeddings.{token}": (None, None, "residual") for token in ("cls_token", "distillation_token", "mask_token")},
        "embeddings.position_embeddings": (None, None, "residual"),
        "embeddings.patch_embeddings.projection.weight": ("residual", None, None, None),
        "embeddings.patch_embeddings.projection.bias": ("residual",),
        **_norm("encoder.layer.{l}.layernorm_before", "residual"),
        **_norm("encoder.layer.{l}.layernorm_after", "residual"),
        **_norm("layernorm", "residual"),
        "pooler.dense.weight": (None, "residual"),
        "pooler.dense.bias": (None,),
    }
    layers: dict[str, tuple[Entry, Entry]] = {
        "attention.attention.query": (keys, "residual"),
        "attention.attention.key": (keys, "residual"),
        "attention.attention.value": (values, "residual"),
        "attention.output.dense": ("residual", values),
        "intermediate.dense": ("ffn.{l}", "residual"),
        "output.dense": ("residual", "ffn.{l}"),
    }
    for name, (rows, columns) in layers.items():
        axes |= {f"encoder.layer.{{l}}.{name}.weight": (rows, columns), f"encoder.layer.{{l}}.{name}.bias": (rows,)}
    axes = {at + name: entries for name, entries in axes.items()}
    for head in ("classifier", "cls_classifier", "distillation_classifier"):
        axes |= {f"{head}.weight": (None, "residual"), f"{head}.bias": (None,)}
    return axes


def gpt2(model: Model, heads: int) -> Spec:
    """refmerge.nets.gpt2, weights of shape (in, out) and one for queries, keys and values."""
    at = gpt2_net.prefix(model)
    head = _width("gpt2", _shapes(model), f"{at}h.0.attn.c_proj.weight", 0, heads)
    keys, values = Nested("heads.{l}", "keys.{l}", head), Nested("heads.{l}", "values.{l}", head)
    qkv = Slices([keys, keys, values])
    axes: Axes = {
        "wte.weight": (None, "residual"),
        "wpe.weight": (None, "residual"),
        "h.{l}.attn.c_attn.weight": ("residual", qkv),
        "h.{l}.attn.c_attn.bias": (qkv,),
        "h.{l}.attn.c_proj.weight": (values, "residual"),
        "h.{l}.attn.c_proj.bias": ("residual",),
        "h.{l}.attn.bias": None,  # the causal mask
        "h.{l}.attn.masked_bias": None,
        "h.{l}.mlp.c_fc.weight": ("residual", "ffn.{l}"),
        "h.{l}.mlp.c_fc.bias": ("ffn.{l}",),
        "h.{l}.mlp.c_proj.weight": ("ffn.{l}", "residual"),
        "h.{l}.mlp.c_proj.bias": ("residual",),
        **_norm("h.{l}.ln_1", "residual"),
        **_norm("h.{l}.ln_2", "residual"),
        **_norm("ln_f", "residual"),
    }
    return _spec("gpt2", model, {at + name: a for name, a in axes.items()} | {"lm_head.weight": (None, "residual")})


def llama(model: Model, heads: int, groups: int | None = None) -> Spec:
    """refmerge.nets.llama, and its kin with more norms or fused tensors: Gemma 2 and 3, OLMo 2, Phi-3. Heads that share keys
    and values (groups of them: as many as keys have heads, else all) move with these, and among each other. What is inside
    of a head of queries and keys stays: each pair of entries there is turned by an angle of its own. What is inside of one
    of values is free."""
    groups, shapes, at = groups or heads, _shapes(model), llama_net.prefix(model)
    if (fused := f"{at}layers.0.self_attn.qkv_proj.weight") in shapes:
        head = _width("llama", shapes, fused, 0, heads + 2 * groups)
        fits = True
    else:
        _needs("llama", shapes, f"{at}layers.0.self_attn.k_proj.weight")
        head = _width("llama", shapes, f"{at}layers.0.self_attn.q_proj.weight", 0, heads)
        fits = shapes[f"{at}layers.0.self_attn.k_proj.weight"].shape[0] == groups * head
    if heads % groups or not fits:
        raise UsageError(f"llama: {heads} heads in {groups} groups do not fit the shapes of queries and keys")
    shared = heads // groups * head  # entries of all heads that share keys and values
    queries = Nested("groups.{l}", Block("queries.{l}", head), shared)
    outputs = Nested("groups.{l}", Block("queries.{l}", head, "values.{l}"), shared)
    keys, values = Block("groups.{l}", head), Nested("groups.{l}", "values.{l}", head)
    qkv = Slices([queries, keys, values], [heads * head, groups * head, groups * head])
    norm = f"{at}layers.0.self_attn.q_norm.weight"
    by_heads = norm not in shapes or shapes[norm].shape == (head,)  # one norm that all heads share; else one over all heads
    axes: Axes = {
        "embed_tokens.weight": (None, "residual"),
        "layers.{l}.self_attn.q_proj.weight": (queries, "residual"),
        "layers.{l}.self_attn.k_proj.weight": (keys, "residual"),
        "layers.{l}.self_attn.v_proj.weight": (values, "residual"),
        "layers.{l}.self_attn.q_proj.bias": (queries,),
        "layers.{l}.self_attn.k_proj.bias": (keys,),
        "layers.{l}.self_attn.v_proj.bias": (values,),
        "layers.{l}.self_attn.qkv_proj.weight": (qkv, "residual"),
        "layers.{l}.self_attn.q_norm.weight": (None if by_heads else queries,),
        "layers.{l}.self_attn.k_norm.weight": (None if by_heads else keys,),
        "layers.{l}.self_attn.o_proj.weight": ("residual", outputs),
        "layers.{l}.self_attn.o_proj.bias": ("residual",),
        "layers.{l}.self_attn.rotary_emb.inv_freq": None,
        "layers.{l}.mlp.gate_proj.weight": ("ffn.{l}", "residual"),
        "layers.{l}.mlp.up_proj.weight": ("ffn.{l}", "residual"),
        "layers.{l}.mlp.down_proj.weight": ("residual", "ffn.{l}"),
        "layers.{l}.mlp.gate_up_proj.weight": (Slices(["ffn.{l}", "ffn.{l}"]), "residual"),
        "layers.{l}.mlp.gate_proj.bias": ("ffn.{l}",),
        "layers.{l}.mlp.up_proj.bias": ("ffn.{l}",),
        "layers.{l}.mlp.down_proj.bias": ("residual",),
        "layers.{l}.input_layernorm.weight": ("residual",),
        "layers.{l}.post_attention_layernorm.weight": ("residual",),
        "layers.{l}.pre_feedforward_layernorm.weight": ("residual",),
        "layers.{l}.post_feedforward_layernorm.weight": ("residual",),
        "norm.weight": ("residual",),
    }
    return _spec("llama", model, {at + name: a for name, a in axes.items()} | {"lm_head.weight": (None, "residual")})


ARCHITECTURES: dict[str, Callable[..., Spec]] = {
    "mlp": mlp, "vgg": vgg, "resnet": resnet, "vit": vit, "gpt2": gpt2, "llama": llama,
}  # fmt: skip


def detect(
    model: Model, config: Mapping[str, Any] | None = None, architecture: str | None = None, **given: Any
) -> Spec:  # fmt: skip
    """The spec of the architecture, or else of the one that the model's names tell. config: as in config.json, of which the
    numbers of heads are wanted; that of an open checkpoint where it is not given. given: of these numbers (heads, groups),
    or the order of an mlp's layers, goes before what is found. UsageError where they are not known."""
    config = config or dict(getattr(model, "config", None) or {})
    name = architecture or _told_by_names(model)
    if name not in ARCHITECTURES:
        raise UsageError(f"no architecture {name!r} (available: {', '.join(ARCHITECTURES)})")
    known = [key for key in inspect.signature(ARCHITECTURES[name]).parameters if key != "model"]
    if unknown := given.keys() - known:
        raise UsageError(f"{name} has no {min(unknown)} to be given (known here: {', '.join(known) or 'none'})")
    wanted: dict[str, Any] = {}
    for parameter, keys in _HEADS.get(name, {}).items():
        wanted[parameter] = next((config[key] for key in keys if config.get(key) is not None), None)
    wanted |= given
    if "heads" in wanted and wanted["heads"] is None:
        key = _HEADS[name]["heads"][0]
        raise UsageError(f"{name}: how many heads there are is in no tensor: give heads, or a config with {key}")
    if name == "mlp" and "layers" not in wanted and not _are_counted(order := mlp_net.order(model)):
        raise UsageError(f"mlp: names do not tell in which order {', '.join(order)} come: give layers, the first one first")
    return ARCHITECTURES[name](model, **wanted)


def declared(model: Model, axes: Axes) -> Spec:
    """The spec of the model's tensors whose axes are declared by name, with {l} for the number of a layer there and in the
    names of permutations. UsageError for a tensor that is not among them."""
    return _spec("spec", model, axes)


def _told_by_names(model: Model) -> str:
    """The architecture that has such names. UsageError for names of none."""
    found = next((a for a, signs in _SIGNS.items() if any(s in name for s in signs for name in model)), None)
    if found is not None:
        return found
    for name, x in _shapes(model).items():
        if (name.rpartition(".")[2], len(x.shape)) not in (("weight", 2), ("bias", 1)):
            raise UsageError(
                f"the tensors are of no known architecture ({', '.join(ARCHITECTURES)}); {name!r} is none of an mlp: "
                "write a spec"
            )
    return "mlp"


def _are_counted(layers: Sequence[str]) -> bool:
    """Whether layers differ by their numbers alone, but for a last one without."""
    numbered = {re.sub(r"\d+", "#", name) for name in layers if any(c.isdigit() for c in name)}
    return len(numbered) < 2 and sum(not any(c.isdigit() for c in name) for name in layers) < 2


# Part of a name that no other architecture has.
_SIGNS = {
    "llama": ("layers.0.self_attn.q_proj.", "layers.0.self_attn.qkv_proj."), "gpt2": ("h.0.attn.c_attn.",),
    "vit": ("blocks.0.attn.qkv.", "embeddings.patch_embeddings.projection."), "resnet": ("layer1.0.conv1.", _RESNET_BLOCK),
    "vgg": ("features.0.",),
}  # fmt: skip
# Where a config.json says how many heads there are.
_HEADS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"heads": ("num_attention_heads",), "groups": ("num_key_value_heads",)},
    "gpt2": {"heads": ("n_head", "num_attention_heads")},
    "vit": {"heads": ("num_heads", "num_attention_heads")},
}


def _spec(architecture: str, model: Model, axes: Axes) -> Spec:
    """The spec of the model's tensors, whose names are those of `axes` with a number in place of {l}. UsageError for any
    other tensor."""
    templates = {re.compile(re.escape(name).replace(r"\{l\}", r"(\d+)")): a for name, a in axes.items()}
    found: dict[str, Sequence[Entry] | None] = {}
    for name in model:
        for template, entries in templates.items():
            if match := template.fullmatch(name):
                found[name] = entries if not match.groups() else _named(entries, match[1])
                break
        else:
            none = "not declared" if architecture == "spec" else "none of this architecture"
            raise UsageError(f"{architecture}: tensor {name!r} is {none}: leave it out, or write a spec that has it")
    return Spec(found)


def _named(entries: Sequence[Entry] | None, number: str) -> Sequence[Entry] | None:
    return None if entries is None else [_numbered(entry, number) for entry in entries]


def _numbered(entry: Entry, number: str) -> Entry:
    """The entry of layer `number`."""
    match entry:
        case str():
            return entry.replace("{l}", number)
        case Block(name, k, inner):
            return Block(name.replace("{l}", number), k, _numbered(inner, number))
        case Nested(name, inner, k):
            return Nested(name.replace("{l}", number), _numbered(inner, number), k)
        case Slices(parts):
            return Slices([_numbered(part, number) for part in parts], entry.sizes)
    return None


def _norm(name: str | None, units: Entry) -> dict[str, Sequence[Entry] | None]:
    """A norm of any kind over these units."""
    if name is None:
        return {}
    keys = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": (units,) for key in keys} | {f"{name}.num_batches_tracked": ()}


class _Shape:
    """What has a shape and nothing else."""

    def __init__(self, shape: Iterable[int]) -> None:
        self.shape = tuple(shape)


def _shapes(model: Model) -> dict[str, _Shape]:
    """The model without its weights, which an open checkpoint would read for their shapes."""
    tensors: Mapping[str, Any] = getattr(model, "tensors", model)
    return {name: _Shape(x.shape) for name, x in tensors.items()}


def _needs(architecture: str, shapes: Mapping[str, _Shape], *names: str) -> None:
    for name in names:
        if name not in shapes:
            raise UsageError(f"{architecture}: the model has no tensor {name!r}")


def _width(architecture: str, shapes: Mapping[str, _Shape], name: str, axis: int, parts: int) -> int:
    """How wide one of so many parts of an axis is."""
    _needs(architecture, shapes, name)
    n = shapes[name].shape[axis]
    if parts < 1 or n % parts:
        raise UsageError(f"{architecture}: the {n} places of axis {axis} of {name!r} are not {parts} parts of one size")
    return n // parts
