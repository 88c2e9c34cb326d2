"""What several releases of the safetensors package and refmerge say of the same files.

Each release is a folder that `pip install --no-deps --target FOLDER safetensors==VERSION` made; they run in processes of
their own. A file counts as accepted where its header is; what refmerge refuses and a release accepts is listed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from refmerge.checkpoint import open_checkpoint
from refmerge.errors import InputError
from tests.reliability import corpus

RELEASES = ("0.4.5", "0.5.3", "0.6.2", "0.7.0", "0.8.0")
_LOOK = """
import json, sys
from pathlib import Path
from safetensors import safe_open
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
        found[path.name] = True
    except BaseException:
        found[path.name] = False
print(json.dumps(found))
"""
_WRITE = """
import sys
import numpy as np
from safetensors.numpy import save_file
draw = np.random.default_rng(0)
for i, kind in enumerate([np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]):
    for j, shape in enumerate([(), (0,), (7,), (3, 5), (2, 1, 4)]):
        save_file({"a": np.ascontiguousarray(draw.integers(0, 2, shape).astype(kind)), "b\\u00e9": np.zeros(3, kind)},
                  f"{sys.argv[1]}/{i}-{j}.safetensors", {"format": "pt", "k": "v"})
"""


def install(folder: Path, releases: tuple[str, ...] = RELEASES) -> dict[str, Path]:
    """The releases from the package index."""
    for release in releases:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--target"]
        if not (folder / release).exists():
            subprocess.run([*pip, str(folder / release), f"safetensors=={release}"], check=True)
    return {release: folder / release for release in releases}


def _python(code: str, argument: Path, release: Path) -> str:
    command = [sys.executable, "-c", code, str(argument)]
    environment = {**os.environ, "PYTHONPATH": str(release)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def compare(releases: dict[str, Path], mutants: int = 2000) -> dict[str, dict[str, object]]:
    """For each release: how many files both accept, both refuse, only it accepts (and which of the corpus), only we accept;
    and how many files of its own, and of ours, are read alike by the other."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        folder.mkdir()
        files = {f"m{i:03} {what}": content for i, (what, content) in enumerate(corpus.MALFORMED.items())}
        files |= {f"v{i:03} {what}": content for i, (what, content) in enumerate(corpus.VALID.items())}
        files |= {f"x{n:06}": corpus.mutant(n) for n in range(mutants)}
        named = {}
        for i, (what, content) in enumerate(files.items()):
            path = folder / f"{i:06}.safetensors"
            path.write_bytes(content)
            named[path.name] = what
        ours = {path.name: _opens(path) for path in folder.iterdir()}
        for release, where in releases.items():
            theirs = json.loads(_python(_LOOK, folder, where))
            looser = sorted(named[n] for n in named if theirs[n] and not ours[n])
            written = Path(name) / release
            written.mkdir()
            _python(_WRITE, written, where)
            found[release] = {
                "both accept": sum(theirs[n] and ours[n] for n in named),
                "both refuse": sum(not theirs[n] and not ours[n] for n in named),
                "only it accepts": len(looser),
                "only refmerge accepts": sorted(named[n] for n in named if ours[n] and not theirs[n]),
                "looser": [what[5:] for what in looser if what[0] in "mv"],
                "its files read": [sum(_opens(p) for p in written.iterdir()), len(list(written.iterdir()))],
                "ours read": _reads_ours(Path(name) / f"ours-{release}", where),
            }
    return found


def _opens(path: Path) -> bool:
    try:
        with open_checkpoint(path) as checkpoint:
            dict(checkpoint)
    except InputError:
        return False
    return True


def _reads_ours(folder: Path, release: Path) -> list[int]:
    import numpy as np

    from refmerge.checkpoint import DTYPES, save

    folder.mkdir()
    for i, dtype in enumerate(DTYPES.values()):
        for j, shape in enumerate([(), (0,), (7,), (3, 5)]):
            save({"a": np.zeros(shape, dtype), "b": np.ones(3, np.float32)}, folder / f"{i}-{j}.safetensors")
    told = json.loads(_python(_LOOK, folder, release))
    return [sum(told.values()), len(told)]
