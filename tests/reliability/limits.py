"""What opening a file costs at the most: files at the limits and beyond them.

python -m tests.reliability.limits FILE WHOSE     one file, in a process of its own; prints seconds, peak and outcome as JSON

WHOSE is "", as it is opened; "own", without the safetensors package's check; or "package", that check alone.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from refmerge.checkpoint import header, open_checkpoint
from refmerge.checkpoint.header import MAX_HEADER, MAX_NAME, MAX_TENSORS
from refmerge.errors import InputError
from tests.reliability.fuzz import peak


def _tensors(count: int, name: str = "{}", shape: str = "0") -> bytes:
    entry = '"%s":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}'
    return ("{" + ",".join(entry % (name.format(i), shape) for i in range(count)) + "}").encode()


def files() -> dict[str, bytes]:
    """Headers: what the limits allow, and what they do not."""
    long = "{:0200}"
    room = MAX_HEADER // (len(_tensors(1, long)) - 1)
    fields = b'{"__metadata__":{"x":"%s"}}'
    return {
        f"metadata of {MAX_HEADER / 1e6:.0f} MB": fields % (b"x" * (MAX_HEADER - len(fields) + 2)),
        f"{MAX_TENSORS:,} tensors": _tensors(MAX_TENSORS),
        f"{room:,} tensors with names of 200 bytes": _tensors(room, long),
        "metadata of 95 MB": fields % (b"x" * 95_000_000),
        "1,000,000 tensors": _tensors(1_000_000),
        f"{MAX_TENSORS + 1:,} tensors": _tensors(MAX_TENSORS + 1),
        "2,000 dimensions": _tensors(1, shape=",".join("1" * 2000) + ",0"),
        "a dimension of 10^18": _tensors(1, shape="0,1000000000000000000"),
        f"a name of {MAX_NAME + 1} bytes": _tensors(1, "x" * (MAX_NAME + 1)),
    }


def measure() -> dict[str, dict[str, float | str]]:
    """Each file: bytes of its header, seconds of the processor, bytes of memory above what the program takes, outcome; and
    the memory of the two parsers that look at it one after the other, each by itself."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        for name, text in files().items():
            path.write_bytes(struct.pack("<Q", len(text)) + text)
            command = [sys.executable, "-m", "tests.reliability.limits", str(path)]
            told = {}
            for whose in ("", "own", "package"):
                done = subprocess.run([*command, whose], capture_output=True, text=True, check=True)
                told[whose] = json.loads(done.stdout)
            parts = {whose: told[whose]["memory"] for whose in ("own", "package")}
            found[name] = {"header": len(text), **told[""], **(parts if told[""]["outcome"] == "read" else {})}
    return found


if __name__ == "__main__":
    small = Path(sys.argv[1]).with_name("small.safetensors")
    small.write_bytes(struct.pack("<Q", 2) + b"{}")
    open_checkpoint(small)
    if sys.argv[2] == "own":
        header._check_with_safetensors = lambda path: None
    before, start = peak(), time.process_time()
    try:
        header._check_with_safetensors(Path(sys.argv[1])) if sys.argv[2] == "package" else open_checkpoint(sys.argv[1])
        outcome = "read"
    except (InputError, ValueError):
        outcome = "refused"
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "memory": peak() - before, "outcome": outcome}))
