"""A merge that was interrupted goes on where it stopped, with the bytes of one that was not; and two never mix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import refmerge
from refmerge.checkpoint import journal, open_checkpoint, save, writer
from refmerge.checkpoint.files import PositionedFile
from refmerge.errors import InputError, ResourceError, UsageError
from refmerge.plan import Plan

sys.path.append(str(Path(__file__).parents[1]))  # `pytest` alone does not look for the folder `tests` there

from tests.reliability import crashes

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Stop(BaseException):
    """As an interrupt is: no Exception."""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "NOTE_SECONDS", 0.0)
    return crashes.models(tmp_path)


@pytest.fixture
def whole(models, tmp_path):
    crashes.merge(models, tmp_path / "whole")
    return crashes.digest(tmp_path / "whole")


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def interrupt(monkeypatch, models, out: Path, *, after: int = 2, error: BaseException | None = None, **options) -> None:
    """Make a merge stop after some tensors are noted."""
    notes, note = [], journal.Journal.note

    def stopping(self, names):
        note(self, names)
        notes.append(names)
        if len(notes) == after:
            raise error or Stop

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "note", stopping)
        with pytest.raises(type(error) if error else Stop) as caught:
            crashes.merge(models, out, resume=True, **options)
    assert f"{after} tensors are kept" in caught.value.__notes__[0]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "5GB"}], ids=["shards", "one file"])
def test_what_is_done_is_not_done_again(models, whole, tmp_path, monkeypatch, options):
    out = tmp_path / "out"
    interrupt(monkeypatch, models, out, **options)
    partial, noted = left(tmp_path)
    assert noted == f"{partial}.journal" and not out.exists()
    read, wanted = set(), PositionedFile.read_at
    infos = [i for p in models for i in open_checkpoint(p).tensors.values()]

    def reading(self, buffer, offset):
        read.update(i.name for i in infos if i.offset == offset and i.nbytes == len(buffer) > 3)
        return wanted(self, buffer, offset)

    monkeypatch.setattr(PositionedFile, "read_at", reading)
    crashes.merge(models, out, resume=True, **options)
    assert read.isdisjoint({"a", "b"}) and {"c", "f"} <= read
    assert left(tmp_path) == [] and (options or crashes.digest(out) == whole)
    crashes.merge(models, tmp_path / "anew", **options)
    assert crashes.digest(out) == crashes.digest(tmp_path / "anew")


def test_a_group_that_is_not_finished_is_computed_again(models, tmp_path, monkeypatch):
    """ties has one threshold for the whole model, so that all its tensors are needed."""
    interrupt(monkeypatch, models, tmp_path / "out", method="ties", after=2)
    crashes.merge(models, tmp_path / "out", "ties", resume=True, threads=2)
    crashes.merge(models, tmp_path / "anew", "ties")
    assert crashes.digest(tmp_path / "out") == crashes.digest(tmp_path / "anew")


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_do_not_depend_on_where_it_stopped(models, tmp_path, monkeypatch, seed):
    interrupt(monkeypatch, models, tmp_path / "out", method="dare_linear", after=3, density=0.5, seed=seed)
    crashes.merge(models, tmp_path / "out", "dare_linear", resume=True, density=0.5, seed=seed)
    crashes.merge(models, tmp_path / "anew", "dare_linear", density=0.5, seed=seed)
    assert crashes.digest(tmp_path / "out") == crashes.digest(tmp_path / "anew")


def test_without_resume_nothing_is_left_and_nothing_is_taken_up(models, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "note", lambda self, names: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            crashes.merge(models, tmp_path / "out")
    assert left(tmp_path) == []
    interrupt(monkeypatch, models, tmp_path / "out")
    before = left(tmp_path)
    crashes.merge(models, tmp_path / "out")
    assert crashes.digest(tmp_path / "out") == whole and left(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"lambda_": 0.5}, "recipe"),
        ({"method": "ties"}, "recipe"),
        ({"out_dtype": "float16"}, "recipe, layout of the output"),
        ({"max_shard_size": 700}, "layout of the output"),
        ({"nonfinite": "propagate"}, "recipe"),
        ({"seed": 1}, "recipe"),
        ("input", "inputs"),
        ("program", "program"),
    ],
    ids=str,
)
def test_another_merge_is_not_gone_on_with(models, whole, tmp_path, monkeypatch, change, part):
    interrupt(monkeypatch, models, tmp_path / "out")
    options = change if isinstance(change, dict) else {}
    if change == "input":
        os.utime(models[1] / "model.safetensors", ns=(1, 1))
    if change == "program":
        monkeypatch.setattr("refmerge.identity._program", lambda: ["another version"])
    before = left(tmp_path)
    with pytest.raises(UsageError, match=rf"of another merge \(different: {part}\)"):
        crashes.merge(models, tmp_path / "out", resume=True, **options)
    assert left(tmp_path) == before and not (tmp_path / "out").exists()


def test_what_passes_is_kept_and_what_does_not_is_not(models, whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, models, tmp_path / "out", error=ResourceError("the disk is full"))
    crashes.merge(models, tmp_path / "out", resume=True)
    assert crashes.digest(tmp_path / "out") == whole
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "note", lambda self, names: (_ for _ in ()).throw(InputError("changed")))
        with pytest.raises(InputError):
            crashes.merge(models, tmp_path / "again", resume=True)
    assert left(tmp_path) == []


def test_an_output_that_is_being_written_is_not_gone_on_with(models, tmp_path, monkeypatch):
    interrupt(monkeypatch, models, tmp_path / "out")
    (path,) = journal.unfinished(tmp_path / "out")
    program = f"""
from pathlib import Path
from refmerge.checkpoint.files import open_for_writing
file = open_for_writing(Path({str(path)!r}))
assert file.lock()
print("held", flush=True)
input()
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(journal, "PATIENCE", 0.0)
        with pytest.raises(UsageError, match="another process is writing"):
            crashes.merge(models, tmp_path / "out", resume=True)
    finally:
        other.communicate("\n")
    crashes.merge(models, tmp_path / "out", resume=True)
    assert left(tmp_path) == []


def torn(text: bytes) -> bytes:
    return text[:-3]


def doubtful(text: bytes) -> bytes:
    return text + b'["c"'


@pytest.mark.parametrize(
    "damage",
    [
        torn, doubtful, lambda text: b"", lambda text: b"{}\n", lambda text: b"\xff\0\n[[",
        lambda text: text + b'{"made": "x"}\n["b"]\n', lambda text: text + b"3\n",
    ],
)  # fmt: skip
def test_a_journal_counts_as_far_as_it_was_written(models, whole, tmp_path, monkeypatch, damage):
    interrupt(monkeypatch, models, tmp_path / "out")
    (path,) = journal.unfinished(tmp_path / "out")
    path.write_bytes(damage(path.read_bytes()))
    crashes.merge(models, tmp_path / "out", resume=True)
    assert crashes.digest(tmp_path / "out") == whole and left(tmp_path) == []


@pytest.mark.parametrize("damage", ["header", "size", "gone"])
def test_an_output_that_is_not_what_its_journal_says(models, tmp_path, monkeypatch, damage):
    interrupt(monkeypatch, models, tmp_path / "out")
    path = min((tmp_path / left(tmp_path)[0]).iterdir())
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data if damage == "header" else data[:-1])
    before = left(tmp_path)
    with pytest.raises(ResourceError, match=path.name if damage != "gone" else "cannot be written"):
        crashes.merge(models, tmp_path / "out", resume=True)
    assert left(tmp_path) == before and not (tmp_path / "out").exists()


def test_what_cannot_be_resumed(models, tmp_path):
    arrays = {"w": np.ones(3, np.float32)}
    with pytest.raises(UsageError, match="give out"):
        refmerge.merge(models[1:], "linear", resume=True)
    with pytest.raises(UsageError, match="resume is for models on disk"):
        refmerge.merge([arrays, arrays], "linear", out=tmp_path / "out", resume=True)
    assert left(tmp_path) == []


@needs_fork
@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (crashes.kill, {"every": 83}),
        (crashes.kill, {"every": 121, "overwrite": True, "method": "ties"}),
        (crashes.fail, {"every": 97}),
        (crashes.fail, {"every": 61, "overwrite": True, "single": True}),
        (crashes.fail, {"every": 111, "resume": False}),
        (crashes.kill, {"every": 211, "pipelines": True}),
        (crashes.fail, {"every": 191, "pipelines": True, "overwrite": True}),
    ],
)
def test_killed_or_failing_at_any_call(stop, options, tmp_path):
    """At one in so many calls to the system; `python -m tests.reliability crashes` tries them all."""
    with crashes.fast_folder(tmp_path) as folder:
        found = [what for _, what in crashes.points(folder, stop, **options)]
    assert len(found) > 3 and found[0] != "new"


# ------------------------------------------------------------------------------------------------- recipes of every kind


KINDS = {
    "slices": 173, "adapters": 149, "vocabularies": 157, "several merges": 389, "several merges, all kept": 599,
    "aligned": 181, "experts": 139,
}  # fmt: skip


@needs_fork
@pytest.mark.parametrize("stop", [crashes.kill, crashes.fail])
@pytest.mark.parametrize("kind", KINDS)
def test_recipes_of_every_kind_are_gone_on_with(kind, stop, tmp_path):
    assert KINDS.keys() == crashes.RECIPES.keys()
    with crashes.fast_folder(tmp_path) as folder:
        found = [what for _, what in crashes.points(folder, stop, every=KINDS[kind], kind=kind)]
    assert len(found) > 3 and "absent" in found


def stopped_recipe(monkeypatch, folder: Path, kind: str, after: int) -> None:
    """Stop a recipe when so many lines are in journals."""
    lines, append = [], journal.Journal._append

    def appending(self, line):
        append(self, line)
        lines.append(line)
        if len(lines) == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "_append", appending)
        with pytest.raises(Stop) as caught:
            crashes.run(folder, folder / "out", kind, resume=True)
    assert len(caught.value.__notes__) == 1 and "--resume goes on from" in caught.value.__notes__[0]


CHANGES = {
    "slices": ("layer_range: [1, 2]", "layer_range: [0, 1]"),
    "adapters": ("linear", "passthrough"),
    "vocabularies": ("union", "m1"),
    "several merges": ("density: 0.5", "density: 0.25"),
    "several merges, all kept": ("density: 0.5", "density: 0.25"),
    "aligned": ("git_rebasin", "git_rebasin, parameters: {sweeps: 1}"),
    "experts": ("noise_scale: 0.5", "noise_scale: 0.25"),
}


@pytest.mark.parametrize("change", ["recipe", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_recipe_is_not_gone_on_with(kind, change, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "NOTE_SECONDS", 0.0)
    crashes.recipe(tmp_path, kind)
    crashes.run(tmp_path, tmp_path / "whole", kind)
    stopped_recipe(monkeypatch, tmp_path, kind, after=3)
    before, path = left(tmp_path), tmp_path / "recipe.yml"
    changed = {
        "recipe": path,
        "input": tmp_path / ("lora/adapter_model.safetensors" if kind == "adapters" else "m1/model.safetensors"),
    }[change]
    content, status = changed.read_bytes(), changed.stat()
    if change == "recipe":
        old, new = CHANGES[kind]
        assert old in path.read_text()
        text = path.read_text().replace(old, new)
        path.write_text(text.replace(", {model: m1}]", "]") if kind == "adapters" else text)
    else:
        changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(changed, ns=(1, 1))
    with pytest.raises(UsageError, match=rf"of another merge \(different: .*{change}"):
        crashes.run(tmp_path, tmp_path / "out", kind, resume=True)
    assert left(tmp_path) == before and not (tmp_path / "out").exists()
    changed.write_bytes(content)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    crashes.run(tmp_path, tmp_path / "anew", kind)  # another output: nothing of the first one is taken
    crashes.run(tmp_path, tmp_path / "out", kind, resume=True)
    expected = crashes.digest(tmp_path / "whole")
    assert crashes.digest(tmp_path / "out") == crashes.digest(tmp_path / "anew") == expected and left(tmp_path) == []


def test_results_that_come_first_are_taken_as_they_were_noted(tmp_path, monkeypatch):
    """What was finished is not merged again; what is another file by now is."""
    monkeypatch.setattr(writer, "NOTE_SECONDS", 0.0)
    crashes.recipe(tmp_path, "several merges")
    crashes.run(tmp_path, tmp_path / "whole", "several merges")
    noting = journal.Journal.note_made

    def stopping(self, name, fingerprint):
        noting(self, name, fingerprint)
        raise Stop

    monkeypatch.setattr(journal.Journal, "note_made", stopping)
    with pytest.raises(Stop) as caught:
        crashes.run(tmp_path, tmp_path / "out", "several merges", resume=True)
    assert caught.value.__notes__ == ["what was begun is kept, and --resume goes on from it"]
    monkeypatch.setattr(journal.Journal, "note_made", noting)
    runs, run = [], Plan.run

    def running(self, out, **options):
        runs.append(Path(out).name)
        return run(self, out, **options)

    monkeypatch.setattr(Plan, "run", running)
    note = journal.Journal.note

    def stopping_at_first(self, names):
        note(self, names)
        raise Stop

    monkeypatch.setattr(journal.Journal, "note", stopping_at_first)
    with pytest.raises(Stop):
        crashes.run(tmp_path, tmp_path / "out", "several merges", resume=True)
    assert runs == ["out"]
    monkeypatch.setattr(journal.Journal, "note", note)
    (made,) = tmp_path.glob(".out.partial-*.stages/trimmed/model-00001-*.safetensors")
    os.utime(made, ns=(1, 1))
    crashes.run(tmp_path, tmp_path / "out", "several merges", resume=True)
    assert runs == ["out", "out", "trimmed"]
    assert crashes.digest(tmp_path / "out") == crashes.digest(tmp_path / "whole") and left(tmp_path) == []


def test_the_command_line_resumes(tmp_path):
    for k in range(3):
        save({f"w{i}": np.full(8, k + i, np.float32) for i in range(4)}, tmp_path / f"{k}.safetensors")
    (tmp_path / "recipe.yml").write_text(
        "refmerge: 1\nmerge_method: task_arithmetic\nbase_model: 0.safetensors\n"
        "models: [{model: 1.safetensors}, {model: 2.safetensors}]\n"
    )
    program = """
import os, sys, signal
from refmerge import cli
from refmerge.checkpoint import journal, writer
writer.NOTE_SECONDS = 0.0
note, count, number = journal.Journal.note, [0], getattr(signal, sys.argv.pop())
def stopping(self, names):
    note(self, names)
    count[0] += 1
    if count[0] == 2: os.kill(os.getpid(), number)
journal.Journal.note = stopping
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main()
"""
    command = [sys.executable, "-c", program, "merge", "recipe.yml", "out", "--resume"]
    for name, status, word in (("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")):
        done = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        kept = f"{2 if status == 130 else 4} tensors are kept, and --resume goes on from them"
        assert done.stderr.splitlines()[-1] == f"refmerge: {word}; {kept}"
    last = [sys.executable, "-m", "refmerge", "merge", "recipe.yml", "out", "--resume", "--json"]
    done = subprocess.run(last, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_read"] == 0
    assert open_checkpoint(tmp_path / "out")["w1"].tolist() == [4.0] * 8  # 1 + (2 - 1) + (3 - 1)
