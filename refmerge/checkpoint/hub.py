"""Models of the Hugging Face Hub by their names: out of its cache on this machine, and over the network only if asked.

`org/name`, or `org/name@revision` with a branch, tag or commit. The cache is that of huggingface_hub, found by the same
environment variables, and read without that package; a path that exists goes before any name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from refmerge.checkpoint.files import shown
from refmerge.errors import InputError, UsageError

__all__ = ["cache", "find"]

_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*(?<![.-])")
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*")
_WEIGHTS = ("*.safetensors", "*/*.safetensors")


def find(model: str | os.PathLike[str], folder: Path = Path(), *, download: bool = False) -> Path:
    """The path that a model's name or path means; relative paths start from `folder`.

    What exists is a path. What does not, and looks like a name of the Hub, is looked for in the cache; `download` fetches it
    where it is not there. InputError where it is nowhere; a path that does not exist is left to whoever opens it.
    """
    text = str(model)
    path = folder / Path(text).expanduser()
    if os.path.lexists(path):
        return path
    name, at, revision = text.rpartition("@")
    name, revision = (name, revision) if at else (text, "main")
    if at and os.path.lexists(folder / Path(name).expanduser()):
        raise UsageError(f"{shown(text)}: {shown(name)} is a path, and only models of the Hub have revisions")
    if not at and name.endswith((".safetensors", ".json")):
        return path
    if isinstance(model, Path) or not _NAME.fullmatch(name) or "--" in name or not ("/" in name or at):
        return path
    if not re.fullmatch(r"[\w.][\w./-]*", revision) or ".." in revision:
        raise UsageError(f"{shown(text)}: {shown(revision)} is no revision")
    found = _cached(name, revision)
    if found is not None and _whole(found):
        return found
    if _offline():
        raise InputError(f"{shown(text)}: neither a path nor in the cache {shown(cache())}, and HF_HUB_OFFLINE is set")
    if not download:
        raise InputError(
            f"{shown(text)}: no such file or directory, and no such model in the Hub's cache {shown(cache())}; "
            "if it is one of the Hub's, --download fetches it"
        )
    return _download(name, revision, text)


def cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if os.environ.get(variable):
            return Path(os.path.expandvars(os.environ[variable])).expanduser() / below
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "huggingface" / "hub"


def _cached(name: str, revision: str) -> Path | None:
    """The folder of a revision in the cache: a branch or tag by what it meant when it was last asked for, or a commit."""
    root = cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = (root / "refs" / revision).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
        return None
    if (root / "snapshots" / commit).is_dir():
        return root / "snapshots" / commit
    begun = sorted(root.glob(f"snapshots/{commit}*"))
    return begun[0] if len(begun) == 1 else None


def _whole(snapshot: Path) -> bool:
    """Whether weights are there: other programs fetch a config alone."""
    return any(path for pattern in _WEIGHTS for path in snapshot.glob(pattern))


def _offline() -> bool:
    set_to = (os.environ.get(variable, "") for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in set_to)


def _download(name: str, revision: str, text: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(f"{shown(text)}: --download needs huggingface_hub: pip install 'refmerge[hub]'") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # of many libraries: HTTP, files, the Hub's own
        raise InputError(f"{shown(text)}: cannot be fetched: {shown(str(error).strip().partition(chr(10))[0])}") from error
