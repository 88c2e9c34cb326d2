"""A small part of what `python -m tests.reliability` measures: spec/reliability.md has the figures of a whole run."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import refmerge
from refmerge.api import prepare
from refmerge.checkpoint import Checkpoint, open_checkpoint, save
from refmerge.checkpoint.files import PositionedFile, sync_directory
from refmerge.errors import InputError, RecipeError, RefmergeError, ResourceError, UsageError
from refmerge.recipe.run import prepare_recipe, run_recipe

sys.path.append(str(Path(__file__).parents[1]))  # `pytest` alone does not look for the folder `tests` there

from tests.reliability import containment, corpus, fuzz, recipes

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


@pytest.fixture
def models(tmp_path):
    """A base and two fine-tunes with integers, and a recipe of them."""
    draw = np.random.default_rng(0)
    for name in ("base", "one", "two"):
        arrays = {n: draw.standard_normal((3, 4)).astype(np.float32) for n in ("a", "b")}
        save(arrays | {"ids": np.arange(4)}, tmp_path / name, extra_files={"config.json": b"{}", "tokenizer.json": b"{}"})
    (tmp_path / "recipe.yml").write_text(recipes.NATIVE)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- What comes in -----------------------------------------------------------------------------------------------------


def test_the_corpus_grown_by_mutation(tmp_path):
    """Each file is refused by one printable line that names it, or read as the safetensors package reads it."""
    assert len(corpus.MALFORMED) >= 68
    found = [fuzz.look(tmp_path / "x.safetensors", content) for content in corpus.grown(900)]
    assert found.count("read") > 30 and found.count("refused") > 500


@posix
def test_nothing_outside_a_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    signal.alarm(120)  # a FIFO that is opened for reading waits for ever
    try:
        wrong = [what for what, allowed, read in containment.cases(tmp_path / "x") if allowed != read]
    finally:
        signal.alarm(0)
    assert not wrong


class Canary:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "config.json", "tokenizer.json"])
def test_no_pickle_is_loaded(models, name):
    """Wherever it lies, and under whichever name."""
    canary, data = models / "loaded", pickle.dumps(Canary(models / "loaded"))
    for path in (models / "one").iterdir():
        path.unlink()
    if name != "model.safetensors" and not name.endswith((".bin", ".pt")):
        save({"a": np.ones(3, np.float32)}, models / "spare")
        shutil.copy(models / "spare" / "model.safetensors", models / "one")
    (models / "one" / name).write_bytes(data)
    try:
        refmerge.merge([models / "one", models / "one"], "linear", out=models / "out")
    except InputError as error:
        assert name in str(error) or "pickle" in str(error)
    else:
        assert name == "tokenizer.json"  # copied as it is, and not looked into
    pickle.loads(data) if not canary.exists() else pytest.fail("the pickle was loaded")
    assert canary.exists()


def test_recipes_are_closed(models):
    assert len(recipes.REFUSED) >= 60
    prepare_recipe(models / "recipe.yml")
    before = listing(models)
    for text in recipes.REFUSED:
        (models / "recipe.yml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            run_recipe(models / "recipe.yml", models / "out")
        message = str(caught.value)
        assert "recipe.yml" in message and "\x1b" not in message and len(message) < 3000, text
        assert listing(models) == before


# --- Before the first weight -------------------------------------------------------------------------------------------


def _missing(models: Path) -> dict:
    save({"a": np.ones((3, 4), np.float32), "ids": np.arange(4)}, models / "two", overwrite=True)
    return {}


def _shape(models: Path) -> dict:
    save({n: np.ones((3, 5), np.float32) for n in "ab"} | {"ids": np.arange(4)}, models / "two", overwrite=True)
    return {}


def _integer(models: Path) -> dict:
    save({n: np.ones((3, 4), np.int32) for n in "ab"} | {"ids": np.arange(4)}, models / "two", overwrite=True)
    return {}


def _exists(models: Path) -> dict:
    save({}, models / "out")
    return {}


def _link(models: Path) -> dict:
    (models / "out").symlink_to("nowhere")
    return {}


def _sidecar(models: Path) -> dict:
    (models / "base" / "tokenizer.json").unlink()
    (models / "base" / "tokenizer.json").symlink_to("nowhere")
    return {}


def _options(**options: object):
    def fault(models: Path) -> dict:
        return options

    return fault


FAULTS = {
    "a tensor is missing": _missing,
    "shapes differ": _shape,
    "integers and floats": _integer,
    "the output exists": _exists,
    "the output is a link": _link,
    "the tokenizer is a link to nothing": _sidecar,
    "too little memory": _options(max_memory="100B"),
    "a parameter out of range": _options(lambda_=float("nan")),
    "an unknown parameter": _options(wieght=1),
    "an unknown backend": _options(backend="tpu"),
    "a bad shard size": _options(max_shard_size="many"),
    "a bad dtype": _options(out_dtype="float8"),
    "statistics that are not wanted": _options(stats=[{"x": np.ones(1)}] * 2),
    "no threads": _options(threads=0),
    "the output in an input": _options(out="one/deep"),
    "the output over an input": _options(out="two", overwrite=True),
    "no room": _options(),
    "no right to write": _options(),
}


@posix
@pytest.mark.parametrize("name", FAULTS)
def test_everything_is_checked_before_the_first_weight(models, monkeypatch, name):
    options = {"out": "out"} | FAULTS[name](models)
    floats: list[str] = []
    read = Checkpoint.read

    def counting(self, tensor, start, stop, out):
        floats.extend([tensor] if self.tensors[tensor].dtype == "F32" else [])
        return read(self, tensor, start, stop, out)

    monkeypatch.setattr(Checkpoint, "read", counting)
    if name == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    if name == "no right to write":
        monkeypatch.setattr(
            os, "mkdir", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
        )
    before = listing(models)
    with pytest.raises(RefmergeError):
        refmerge.merge(
            [models / "one", models / "two"], "task_arithmetic", base=models / "base",
            **options | {"out": models / options["out"]},
        )  # fmt: skip
    assert floats == [] and listing(models) == before


# --- What goes out -----------------------------------------------------------------------------------------------------


def test_the_same_bytes_for_any_threads_shards_and_blocks(tmp_path):
    draw = np.random.default_rng(1)
    shapes = {"x.w": (200, 700), "x.b": (700,), "y.w": (300, 500), "y.b": (1,), "z": ()}
    for name in ("base", "one", "two"):
        arrays = {
            n: np.asarray(draw.standard_normal(shape), np.float32).astype(ml_dtypes.bfloat16) for n, shape in shapes.items()
        }
        save(arrays, tmp_path / name, max_shard_size=150_000 if name == "one" else "5GB")
    for method, params in (("linear", {}), ("ties", {"density": 0.3}), ("dare_ties", {"density": 0.3})):
        seen = set()
        for threads, shards, elements in product([1, 2, 8], ["5GB", 90_000], [4096, None]):
            if threads == 8 and elements:
                continue
            base = tmp_path / "base" if method != "linear" else None
            plan = prepare([tmp_path / "one", tmp_path / "two"], method, base=base, threads=threads, params=params)
            plan.elements = elements
            with plan.run(tmp_path / "out", max_shard_size=shards, overwrite=True) as merged:
                total = hashlib.sha256(b"".join(name.encode() + array.tobytes() for name, array in merged.items()))
            seen.add(total.hexdigest())
        assert len(seen) == 1, method


@pytest.mark.parametrize("change", ["cut", "longer", "replaced", "touched", "gone"])
def test_inputs_that_change_underfoot(models, monkeypatch, change):
    """At the first weight that is read: one error, no crash and no output."""
    path, read = models / "two" / "model.safetensors", Checkpoint.read

    def changing(self, tensor, start, stop, out):
        monkeypatch.setattr(Checkpoint, "read", read)
        match change:
            case "cut":
                os.truncate(path, path.stat().st_size - 50)
            case "longer":
                path.write_bytes(path.read_bytes() + b"x")
            case "replaced":
                save({"a": np.zeros((3, 4), np.float32)}, models / "other")
                os.replace(models / "other" / "model.safetensors", path)
            case "touched":
                os.utime(path, ns=(1, 1))
            case "gone":
                path.unlink()
        return read(self, tensor, start, stop, out)

    arguments = {"base": models / "base", "out": models / "out", "integers": "base", "threads": 1}
    monkeypatch.setattr(Checkpoint, "read", changing)
    with pytest.raises(InputError, match=r"two/model\.safetensors"):
        refmerge.merge([models / "one", models / "two"], "task_arithmetic", **arguments)
    assert not [name for name in listing(models) if "out" in name]


OFFLINE = """
import sys
def hook(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"network: {event}")
sys.addaudithook(hook)
from refmerge import cli
cli.main()
"""


def test_no_network_and_the_same_bytes_in_every_process(models):
    """Nothing touches a socket, and no order of sets or dictionaries gets into a file."""
    seen = []
    for seed in "01":
        command = [sys.executable, "-c", OFFLINE, "merge", "recipe.yml", f"out{seed}", "--max-shard-size", "60"]
        done = subprocess.run(command, cwd=models, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        seen.append({p.name: p.read_bytes() for p in (models / f"out{seed}").iterdir()})
    assert seen[0] == seen[1] and len(seen[0]) > 4


NASTY = "\x1b[2J\u202e\x9b31mw\r\b\u2028"


@pytest.mark.parametrize("command", ["inspect", "compare", "plan", "merge"])
def test_what_is_printed_cannot_steer_a_terminal(models, capfd, command):
    from refmerge.cli import main

    config = b'{"model_type": "\\u001b[2J\\u202e", "architectures": ["\\u001b]0;x\\u0007"]}'
    for name in ("one", "two"):
        save({NASTY: np.ones((3, 4), np.float32)}, models / name / NASTY, extra_files={"config.json": config})
        (models / f"{name}.safetensors").write_bytes(corpus.packed({NASTY: corpus.u8(0, 4, strides=[1])}))
    paths = [str(models / name / NASTY) for name in ("one", "two")]
    text = f"refmerge: 1\nmerge_method: linear\nmodels: [{{model: {paths[0]!r}}}, {{model: {paths[1]!r}}}]\n"
    (models / "recipe.yml").write_text(text.replace("'", '"'))
    arguments = {
        "inspect": [paths[0]],
        "compare": paths,
        "plan": [str(models / "recipe.yml"), "--tensor", "*", "--no-time"],
        "merge": [str(models / "recipe.yml"), str(models / "out")],
    }[command]
    runs = [(arguments, 0), ([str(models / "one.safetensors"), str(models / "two.safetensors")][: len(arguments)], None)]
    for given, status in runs:
        with pytest.raises(SystemExit) as ended:
            main([command, *given])
        out, err = capfd.readouterr()
        assert status is None or ended.value.code == status, err
        assert all(c.isprintable() or c == "\n" for c in out + err)
        assert status is None or command in ("merge", "compare") or r"\x1b[2J\u202e\x9b31mw" in out


# --- Systems without some calls ----------------------------------------------------------------------------------------

LACKING = {
    "Windows": ["preadv", "pwrite", "posix_fallocate", "posix_fadvise", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK",
                "O_CLOEXEC", "fork", "sched_getaffinity", "fchmod"],
    "macOS": ["posix_fallocate", "posix_fadvise", "sched_getaffinity"],
}  # fmt: skip


@pytest.mark.parametrize("system", LACKING)
def test_the_same_bytes_without_what_a_system_lacks(models, monkeypatch, system):
    """A merge, an overwriting one and a resumed one, where the calls are not there."""
    from refmerge import engine, executors
    from refmerge.checkpoint import files

    rows = 20_000  # enough for several workers
    for k, name in enumerate(("base", "one", "two")):
        arrays = {"w": np.arange(12 * rows, dtype=np.float32).reshape(rows, 12) % (7 + k), "b": np.ones(5, np.float32)}
        save(arrays | {"ids": np.arange(4)}, models / name, overwrite=True, max_shard_size=500_000)
    arguments = {"base": models / "base", "threads": 2, "max_shard_size": 300_000}
    inputs = [models / "one", models / "two"]
    refmerge.merge(inputs, "ties", out=models / "whole", **arguments)
    for name in LACKING[system]:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(files, "_sync_file_range", lambda: None)
    monkeypatch.setattr(engine, "_keep_freed_pages", lambda: None)
    if system == "macOS":
        fcntl = pytest.importorskip("fcntl")
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", fcntl.F_GETFD, raising=False)
    assert not executors.can_fork()
    if system == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setattr(os, "replace", _not_while_open(os.replace))
        monkeypatch.setattr(os, "rename", _not_while_open(os.rename))
    for _ in range(2):
        refmerge.merge(inputs, "ties", out=models / "out", overwrite=True, resume=True, **arguments)
    assert {p.name: p.read_bytes() for p in (models / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (models / "whole").iterdir()
    }


@pytest.mark.parametrize("lacks", ["fork", "preadv", "pwrite"])
def test_no_worker_is_forked_that_would_share_a_place_in_a_file(monkeypatch, lacks):
    from refmerge import executors

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(executors.threading, "active_count", lambda: 1)
    for name in ("fork", "preadv", "pwrite"):
        monkeypatch.setattr(os, name, None, raising=False)
    assert executors.can_fork()
    monkeypatch.delattr(os, lacks)
    assert not executors.can_fork()


def test_how_many_cores_where_the_system_does_not_say_which(monkeypatch):
    from refmerge.engine import default_threads

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    assert default_threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_threads() == 1


def test_nothing_is_compiled_where_there_are_no_users(monkeypatch):
    from refmerge.fused import compiler

    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.delenv("REFMERGE_COMPILE", raising=False)
    assert compiler.command.__wrapped__() == sys.executable
    monkeypatch.delattr(os, "getuid", raising=False)
    assert compiler.command.__wrapped__() is None


@posix
def test_a_sync_that_a_file_system_does_not_have(tmp_path, monkeypatch):
    """macOS asks for more than fsync, and network file systems know less; a disk that fails is still an error."""
    import fcntl

    asked, synced = [], []
    file = PositionedFile(os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT), "rb+")

    def said(number, into):
        def call(*arguments):
            into.append(arguments)
            if number:
                raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    for number, more in ((0, 0), (errno.ENOTSUP, 1), (errno.EINVAL, 1)):
        monkeypatch.setattr(fcntl, "fcntl", said(number, asked))
        monkeypatch.setattr(os, "fsync", said(0, synced))
        synced.clear()
        file.sync()
        assert asked[-1][1] == 51 and len(synced) == more
    monkeypatch.setattr(fcntl, "fcntl", said(errno.EIO, asked))
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    for number in (errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "fsync", said(number, synced))
        sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", said(errno.EIO, synced))
    with pytest.raises(OSError, match="Input/output"):
        sync_directory(tmp_path)
    file.close()


def test_positions_without_the_calls_that_name_them(tmp_path, monkeypatch):
    """Threads that read and write one file at once, with a lock and a seek."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "pwrite", raising=False)
    file = PositionedFile(os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT), "rb+")
    size = 4096

    def both(k):
        file.write_at(memoryview(bytes([k % 251]) * size), k * size)
        buffer = bytearray(size)
        return file.read_at(memoryview(buffer), k * size) == size and buffer == bytes([k % 251]) * size

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(both, range(200)))
    assert file.read_at(memoryview(bytearray(size)), 200 * size) == 0
    file.close()


def _not_while_open(call):
    """As on Windows, where neither a file that is open can be renamed nor a folder with such a file in it."""

    def renaming(source, target):
        for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
            try:
                path = os.readlink(f"/proc/self/fd/{descriptor}")
            except OSError:
                continue
            for given in (source, target):
                if path == str(given) or path.startswith(f"{given}{os.sep}"):
                    raise PermissionError(errno.EACCES, f"{path} is open")
        return call(source, target)

    return renaming


def test_a_lock_by_bytes(tmp_path, monkeypatch):
    """As Windows has it, and as a system has it that knows no locks."""
    import types

    held = []
    fake = types.SimpleNamespace(LK_NBLCK=2, locking=lambda fd, mode, count: held.append(os.lseek(fd, 0, os.SEEK_CUR)))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    file = PositionedFile(os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT), "rb+")
    assert file.lock() and held == [1 << 40]
    fake.locking = lambda *_: (_ for _ in ()).throw(PermissionError())
    assert not file.lock()
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    assert file.lock()
    file.close()


def test_a_device_without_float64_says_so(monkeypatch):
    """As Apple's GPUs are: the dtype of an oracle is refused, and not taken for float32."""
    torch = pytest.importorskip("torch")
    from refmerge.backends.torch import TorchBackend

    def narrow(*shape, dtype=None, device=None):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    monkeypatch.setattr(torch, "zeros", narrow)
    backend = TorchBackend(torch.device("cpu"))
    monkeypatch.setattr("refmerge.api.open_backend", lambda name: backend)
    model = {"w": np.ones(3, np.float32)}
    assert refmerge.merge([model, model], "linear", backend="torch:cpu")["w"].tolist() == [1.0] * 3
    with pytest.raises(UsageError, match=r"torch:cpu has no float64 \(Cannot convert"):
        refmerge.merge([model, model], "linear", backend="torch:cpu", dtype="float64")
    wide = {"w": np.ones(3)}
    with pytest.raises(UsageError, match=r"tensor 'w'.*--backend numpy"):
        refmerge.merge([wide, wide], "linear", backend="torch:cpu")


def test_a_full_disk_is_an_error_of_the_disk(models, monkeypatch):
    monkeypatch.setattr(PositionedFile, "preallocate", lambda self, size: None)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ResourceError, match="No space left"):
        refmerge.merge([models / "one", models / "two"], "linear", out=models / "out")
    assert "out" not in listing(models) and open_checkpoint(models / "one")


def test_the_page_is_what_was_measured():
    """`python -m tests.reliability --write` makes it from the results that are kept."""
    import json

    from tests.reliability import __main__ as command

    made = command.page(json.loads(command.STORE.read_text("utf-8")))
    assert made == command.PAGE.read_text("utf-8") and "<" not in made
