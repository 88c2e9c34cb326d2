"""Which files make up a checkpoint: a single file, an index with its shards, or a folder as the Hub lays it out."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from refmerge.checkpoint.files import read_small, shown
from refmerge.checkpoint.header import MAX_HEADER, strict_json
from refmerge.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEXES = ".safetensors.index.json"  # what the names of indexes end in
PIPELINE = "model_index.json"  # what says which components a diffusers pipeline has
_DIFFUSION = "diffusion_pytorch_model"  # the weights of a component of a diffusers pipeline
_SHARD = r"(?:-\d{5}-of-\d{5})?"
# Weights of a variant, fp16 or non_ema, beside the plain ones or in their place: a file, a shard, an index.
_VARIANT = re.compile(
    rf"(?P<stem>{_DIFFUSION}|model){_SHARD}\.(?P<file>[A-Za-z]\w*){_SHARD}\.safetensors"
    rf"|(?P<of>{_DIFFUSION}|model)\.safetensors\.index\.(?P<index>[A-Za-z]\w*)\.json"
)

_PICKLES_AND_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".npz", ".tflite")
_KNOWN_SIDECARS = frozenset({
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.json", "vocab.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json",
})  # fmt: skip
# What describes how one particular model came to be is not true of a model merged from it.
_PROVENANCE = frozenset({
    "README.md", "mergekit_config.yml", "refmerge_config.yaml", "refmerge_report.json", "trainer_state.json",
    "adapter_config.json",
})  # fmt: skip
_SMALL = 16 << 20  # bytes; a file that we do not know by name and that is larger is taken for data


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a checkpoint. `weight_map`: tensor name -> shard, as an index has it; None without an index."""

    path: Path
    directory: Path | None
    files: tuple[Path, ...]
    weight_map: dict[str, Path] | None = None

    @property
    def weights(self) -> str:
        """What the only file of a folder with the same kind of model is called."""
        component = all(file.name.startswith(_DIFFUSION) for file in self.files)
        return f"{_DIFFUSION}.safetensors" if component and self.files else WEIGHTS


def locate(path: str | os.PathLike[str]) -> Layout:
    """Find the files of the checkpoint at `path`; InputError where there is none, or more than one reading of it."""
    given, path = path, Path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{shown(given)}: no such file or directory") from None
        raise InputError(f"{shown(given)}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        return _locate_in(path)
    if path.name.endswith(".safetensors"):
        return Layout(path, None, (path,))
    if path.name.endswith(".json"):
        return _indexed(path, path)
    allow = "; --allow-pickle reads pickled weights" if path.name.endswith((".bin", ".pt", ".pth", ".ckpt")) else ""
    raise InputError(f"{shown(path)}: only .safetensors files, their index .json and folders of them are read{allow}")


def _locate_in(folder: Path) -> Layout:
    names = _one_variant(folder, _list(folder))
    indexes = [name for name in names if _is_index(name)]
    index = INDEX if INDEX in indexes or not indexes else indexes[0]
    single = _of_index(index)
    if len(indexes) > 1 and INDEX not in indexes:
        listed = ", ".join(map(shown, indexes[:5]))
        raise InputError(f"{shown(folder)}: {len(indexes)} indexes ({listed}); give the path of the one that is meant")
    if indexes and single in names:
        raise InputError(
            f"{shown(folder)}: holds both {single} and {index}, which may be different models; "
            "give the path of the one that is meant"
        )
    if indexes:
        return _indexed(folder, folder / index)
    path = folder / WEIGHTS if WEIGHTS in names else _only_file(folder, names)
    return Layout(folder, folder, (contained(path, folder),))


def _one_variant(folder: Path, names: list[str]) -> list[str]:
    """The names without weights of variants, where there are plain ones. InputError for several variants and none plain."""
    found = {name: match for name in names if (match := _VARIANT.fullmatch(name))}
    stems = {match["stem"] or match["of"] for match in found.values()}
    if any(f"{stem}.safetensors{end}" in names for stem in stems for end in ("", ".index.json")):
        return [name for name in names if name not in found]
    variants = sorted({match["file"] or match["index"] for match in found.values()})
    if len(variants) > 1:
        raise InputError(
            f"{shown(folder)}: weights of the variants {', '.join(variants)}, and none that are plain; give the path of the "
            "file that is meant, or keep one variant"
        )
    return names


def _is_index(name: str) -> bool:
    match = _VARIANT.fullmatch(name)
    return name.endswith(INDEXES) or (match is not None and match["index"] is not None)


def _of_index(index: str) -> str:
    """The name of the only file that would stand for what the index lists."""
    match = _VARIANT.fullmatch(index)
    return index.removesuffix(".index.json") if match is None else f"{match['of']}.{match['index']}.safetensors"


def _only_file(folder: Path, names: list[str]) -> Path:
    found = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names:
        what = f"open {found[0]} itself to read its tensors" if found else "it has no safetensors file"
        raise InputError(f"{shown(folder)}: a PEFT adapter, not a model: model+adapter is one with it; {what}")
    if len(found) > 1:
        listed = ", ".join(map(shown, found[:5]))
        raise InputError(
            f"{shown(folder)}: {len(found)} safetensors files ({listed}) and no {INDEX} to say what belongs"
        )
    if not found:
        others = [name for name in names if name.endswith(_PICKLES_AND_OTHERS)]
        what = f"only {', '.join(map(shown, others[:5]))}" if others else "no weights"
        pickled = any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in others)
        allow = "; --allow-pickle reads pickled weights, by torch's restricted reader" if pickled else ""
        raise InputError(f"{shown(folder)}: holds {what}; only safetensors is read{allow}")
    return folder / found[0]


def _indexed(path: Path, index: Path) -> Layout:
    folder = index.parent
    weight_map = read_json(contained(index, folder)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{shown(index)}: weight_map does not map tensor names to file names")
    shards = {name: contained(_shard(index, name), folder) for name in sorted(set(weight_map.values()))}
    return Layout(path, folder, tuple(shards.values()), {name: shards[shard] for name, shard in weight_map.items()})


def _shard(index: Path, name: str) -> Path:
    def fail(reason: str) -> NoReturn:
        raise InputError(f"{shown(index)}: shard {shown(name)} {reason}")

    # Judged by the rules of both families of systems, so that an index means the same everywhere.
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if not name.endswith(".safetensors"):
        fail("is not a .safetensors file")
    if "\0" in name or ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        fail("must be a relative path without '..'")
    try:
        os.stat(index.parent / name)
    except (OSError, ValueError) as error:
        fail(f"cannot be opened: {getattr(error, 'strerror', None) or error}")
    return index.parent / name


def contained(path: Path, folder: Path) -> Path:
    """`path` itself if it resolves to something inside `folder`, or inside the same model's folder of a Hub cache.

    A downloaded folder must not be able to pull in, and so to publish, a file from elsewhere. InputError otherwise.
    """
    try:
        folder, resolved = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InputError(f"{shown(path)}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    # models--ORG--NAME/snapshots/COMMIT/file links to models--ORG--NAME/blobs/HASH.
    cache = next(
        (p for p in folder.parents if p.name.startswith("models--") and p / "snapshots" in folder.parents), None
    )
    if not any(resolved.is_relative_to(root) for root in (folder, cache) if root is not None):
        raise InputError(f"{shown(path)}: a link out of its folder, to {shown(resolved)}")
    return path


def holds_weights(folder: Path) -> bool:
    """Whether there is anything in the folder that is weights of some kind, or a network's config that wants some."""
    names = _list(folder)
    return "config.json" in names or any(_is_index(n) or n.endswith((".safetensors", *_PICKLES_AND_OTHERS)) for n in names)


def config(folder: Path | None) -> dict[str, Any] | None:
    """The folder's config.json, None where there is none; InputError if it is not a JSON object."""
    if folder is None or not os.path.lexists(folder / "config.json"):
        return None
    return read_json(contained(folder / "config.json", folder))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, without repeated keys; InputError otherwise.

    Infinity and NaN, which are not JSON, are taken in: the configurations of published models have them.
    """
    try:
        value = strict_json(read_small(path, MAX_HEADER), floats=True)
    except ValueError as error:
        raise InputError(f"{shown(path)}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: not a JSON object")
    return value


def sidecars(folder: Path) -> list[Path]:
    """The files beside the weights that a model merged from this one needs: configuration, tokenizer, code, licence."""
    found = []
    for name in _list(folder):
        path = folder / name
        if name.startswith(".") or name in _PROVENANCE or path.is_dir():
            continue
        if _is_index(name) or name.endswith((".safetensors", ".bin.index.json", *_PICKLES_AND_OTHERS)):
            continue
        if not path.is_file():  # a link to nothing, or no file that could be copied: the result would lack it
            raise InputError(f"{shown(contained(path, folder))}: not a regular file")
        if name in _KNOWN_SIDECARS or path.stat().st_size <= _SMALL:
            found.append(contained(path, folder))
    return found


def _list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{shown(folder)}: cannot be listed: {error.strerror}") from None
