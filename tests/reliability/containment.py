"""Folders that would have a reader take in what lies outside of them, or wait for ever."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from refmerge.checkpoint import open_checkpoint
from refmerge.errors import InputError
from tests.reliability.corpus import packed, u8

INDEX = "model.safetensors.index.json"
PLACES = ("model.safetensors", "one.safetensors", INDEX, "config.json", "tokenizer.json")
NAMES = (
    "../out/one.safetensors", "sub/../../out/one.safetensors", "./../out/one.safetensors", "..\\out\\one.safetensors",
    "sub/..\\..\\out\\one.safetensors", "{outside}/one.safetensors", "\\one.safetensors", "C:one.safetensors",
    "C:\\one.safetensors", "c:/one.safetensors", "\\\\host\\share\\one.safetensors", "//host/share/one.safetensors",
    "\\\\?\\C:\\one.safetensors", "one.safetensors\0", "one\0.safetensors", "one.bin", "one.safetensors/", "", ".", "..",
    "~/one.safetensors", "file:///one.safetensors", "ONE.safetensors", "one.safetensors ", "one.safetensors/.",
)  # fmt: skip


def _folder(root: Path) -> Path:
    """A model of two shards with all that may lie beside them, and what it must not reach, in `out`."""
    shutil.rmtree(root, ignore_errors=True)
    for name in ("m", "out"):
        (root / name / "sub").mkdir(parents=True)
        for shard, tensor in (("one", "a"), ("two", "b")):
            (root / name / f"{shard}.safetensors").write_bytes(packed({tensor: u8(0, 4)}))
        (root / name / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
        (root / name / "config.json").write_text("{}")
        (root / name / "tokenizer.json").write_text("{}")
        (root / name / "model.safetensors").write_bytes(packed({"c": u8(0, 4)}))
    return root / "m"


def _reads(folder: Path) -> bool:
    """Whether the model and what belongs to it is read; anything but that and an InputError is raised."""
    try:
        with open_checkpoint(folder) as checkpoint:
            dict(checkpoint)
            checkpoint.sidecars()
    except InputError:
        return False
    return True


def cases(root: Path) -> Iterator[tuple[str, bool, bool]]:
    """(what, whether it may be read, whether it is)."""
    for name in NAMES:
        folder = _folder(root)
        (folder / "model.safetensors").unlink()
        name = name.replace("{outside}", str(root / "out"))
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name, "b": "two.safetensors"}}))
        yield f"name {name!r}", False, _reads(folder)
    for place in PLACES:
        for kind in ("file", "link within", "link out", "absolute link out", "link through a folder out", "hard link",
                     "FIFO", "socket", "link to a FIFO", "dangling link", "circle of links", "folder"):  # fmt: skip
            folder = _folder(root)
            (folder / (INDEX if place == "model.safetensors" else "model.safetensors")).unlink()
            path, outside = folder / place, root / "out" / place
            content = path.read_bytes()
            path.unlink()
            match kind:
                case "file":
                    path.write_bytes(content)
                case "link within":
                    (folder / "data").write_bytes(content)
                    path.symlink_to("data")
                case "link out":
                    path.symlink_to(f"../out/{place}")
                case "absolute link out":
                    path.symlink_to(outside)
                case "link through a folder out":
                    (folder / "linked").symlink_to("../out")
                    path.symlink_to(f"linked/{place}")
                case "hard link":
                    os.link(outside, path)
                case "FIFO":
                    os.mkfifo(path)
                case "socket":
                    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
                case "link to a FIFO":
                    os.mkfifo(folder / "fifo")
                    path.symlink_to("fifo")
                case "dangling link":
                    path.symlink_to("nowhere")
                case "circle of links":
                    path.symlink_to(place)
                case "folder":
                    path.mkdir()
            # A hard link is the file itself: whoever made it could read that. A folder is no file of the tokenizer.
            allowed = kind in ("file", "link within", "hard link") or (kind == "folder" and place == "tokenizer.json")
            yield f"{place}: {kind}", allowed, _reads(folder)
