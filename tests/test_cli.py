"""The command line as a user meets it: output, exit status, and what is on disk afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

BASE = {"layers.0.w": np.zeros((2, 3), np.float32), "norm": np.ones(3, np.float32)}
ONE = {"layers.0.w": np.array([[4, 1, 0], [0, 0, 2]], np.float32), "norm": np.ones(3, np.float32)}
TWO = {"layers.0.w": np.array([[2, -3, 0], [0, 1, 0]], np.float32), "norm": np.ones(3, np.float32)}
RECIPE = """\
refmerge: 1
merge_method: task_arithmetic
base_model: base.safetensors
models:
  - model: one.safetensors
  - model: two.safetensors
parameters:
  lambda: 0.5
"""
MERGED = np.array([[3, -1, 0], [0, 0.5, 1]], np.float32)  # half of the sum, by hand


def refmerge(*args: str | Path, cwd: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refmerge", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120,
        **kwargs,  # type: ignore[call-overload]
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tensors in (("base", BASE), ("one", ONE), ("two", TWO)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def only_inputs(folder: Path) -> bool:
    """Nothing was written: not a partial output either."""
    return sorted(p.name for p in folder.iterdir()) == [
        "base.safetensors",
        "one.safetensors",
        "recipe.yml",
        "two.safetensors",
    ]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of an error."""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("refmerge: ")
    return line


def test_merge(folder: Path) -> None:
    done = refmerge("merge", "recipe.yml", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 tensors by task_arithmetic to out" in done.stdout
    out = load_file(folder / "out" / "model.safetensors")
    np.testing.assert_array_equal(out["layers.0.w"], MERGED)
    np.testing.assert_array_equal(out["norm"], BASE["norm"])


def test_merge_to_a_file_in_another_dtype(folder: Path) -> None:
    (folder / "recipe.yml").write_text(RECIPE + "out_dtype: float16\n")
    assert refmerge("merge", "recipe.yml", "out.safetensors", "--quiet", cwd=folder).stdout == ""
    out = load_file(folder / "out.safetensors")
    assert out["layers.0.w"].dtype == np.float16
    np.testing.assert_array_equal(out["layers.0.w"], MERGED.astype(np.float16))


def test_merge_json(folder: Path) -> None:
    told = json.loads(refmerge("merge", "recipe.yml", "out", "--json", cwd=folder).stdout)
    assert told["bytes_read"] == 3 * 9 * 4 and told["bytes_written"] == 9 * 4 and told["passes"] == 1


def test_native_paths_are_relative_to_the_recipe(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    assert refmerge("merge", "../recipe.yml", "out", cwd=folder / "elsewhere").returncode == 0


def test_sharded_output_is_the_same_model(folder: Path) -> None:
    assert refmerge("merge", "recipe.yml", "out", "--max-shard-size", "25", cwd=folder).returncode == 0
    index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    shown = refmerge("inspect", "out", "--json", cwd=folder)
    assert json.loads(shown.stdout)["dtypes"]["F32"] == {"tensors": 2, "parameters": 9, "bytes": 36}


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_the_bar_ends_full(folder: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "refmerge", "merge", "recipe.yml", "out"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=theirs, timeout=120)
    os.close(theirs)
    assert done.returncode == 0 and b"108/108 bytes" in os.read(ours, 1 << 16)
    os.close(ours)


def test_existing_output(folder: Path) -> None:
    assert refmerge("merge", "recipe.yml", "out", cwd=folder).returncode == 0
    before = (folder / "out" / "model.safetensors").stat().st_ino
    refused = refmerge("merge", "recipe.yml", "out", cwd=folder)
    assert refused.returncode == 2 and "overwrite" in one_line(refused)
    assert (folder / "out" / "model.safetensors").stat().st_ino == before
    assert refmerge("merge", "recipe.yml", "out", "--overwrite", cwd=folder).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "options", "status", "words"),
    [
        (RECIPE.replace("task_arithmetic", "task_arithmetics"), [], 2, ["task_arithmetics", "did you mean"]),
        (RECIPE.replace("lambda", "lamda"), [], 2, ["lamda", "lambda"]),
        (RECIPE.replace("one.safetensors", "gone.safetensors"), [], 3, ["gone.safetensors"]),
        (RECIPE, ["--backend", "tpu"], 2, ["tpu", "numpy"]),
        (RECIPE, ["--max-shard-size", "many"], 2, ["many"]),
        (RECIPE, ["--max-memory", "0.5.1GB"], 2, ["0.5.1GB"]),
        ("merge_method: [", [], 2, ["recipe.yml"]),
        ("", [], 2, ["recipe.yml"]),
    ],
)
def test_errors_are_one_line(folder: Path, recipe: str, options: list[str], status: int, words: list[str]) -> None:
    (folder / "recipe.yml").write_text(recipe)
    done = refmerge("merge", "recipe.yml", "out", *options, cwd=folder)
    assert done.returncode == status
    line = one_line(done)
    assert all(w in line for w in words), line
    assert only_inputs(folder)


@pytest.mark.parametrize(
    ("two", "words"),
    [
        ({"layers.0.w": np.zeros((2, 4), np.float32), "norm": np.ones(3, np.float32)}, ["'layers.0.w'", "[2, 3]", "[2, 4]"]),
        ({"layers.0.w": TWO["layers.0.w"]}, ["'norm'", "two.safetensors", "--missing"]),
        ({**TWO, "extra": np.ones(1, np.float32)}, ["'extra'", "two.safetensors", "--missing"]),
        ({**TWO, "norm": np.array([1, np.nan, np.inf], np.float32)}, ["'norm'", "2 non-finite", "(1,)", "--nonfinite"]),
    ],
)
def test_inputs_that_do_not_fit(folder: Path, two: dict[str, np.ndarray], words: list[str]) -> None:
    save_file(two, folder / "two.safetensors")
    done = refmerge("merge", "recipe.yml", "out", cwd=folder)
    assert done.returncode == 3
    line = one_line(done)
    assert all(w in line for w in words), line
    assert only_inputs(folder)


def test_options_allow_what_errors_name(folder: Path) -> None:
    save_file({"layers.0.w": TWO["layers.0.w"]}, folder / "two.safetensors")
    assert refmerge("merge", "recipe.yml", "kept", "--missing", "base", cwd=folder).returncode == 0
    assert refmerge("merge", "recipe.yml", "left", "--missing", "skip", cwd=folder).returncode == 0
    np.testing.assert_array_equal(load_file(folder / "kept" / "model.safetensors")["norm"], BASE["norm"])
    assert set(load_file(folder / "left" / "model.safetensors")) == {"layers.0.w"}


def test_integer_tensors(folder: Path) -> None:
    for name, tensors, ids in (("base", BASE, 1), ("one", ONE, 1), ("two", TWO, 2)):
        save_file({**tensors, "ids": np.array([ids], np.int64)}, folder / f"{name}.safetensors")
    refused = refmerge("merge", "recipe.yml", "out", cwd=folder)
    assert refused.returncode == 3 and "'ids'" in one_line(refused) and "--integers base" in refused.stderr
    assert refmerge("merge", "recipe.yml", "out", "--integers", "base", cwd=folder).returncode == 0
    assert load_file(folder / "out" / "model.safetensors")["ids"].tolist() == [1]


def test_output_inside_an_input_is_refused(folder: Path) -> None:
    done = refmerge("merge", "recipe.yml", "one.safetensors", "--overwrite", cwd=folder)
    assert done.returncode == 2 and "never written to" in one_line(done)
    np.testing.assert_array_equal(load_file(folder / "one.safetensors")["layers.0.w"], ONE["layers.0.w"])


def test_plan_reads_no_weight_and_writes_nothing(folder: Path) -> None:
    told = json.loads(refmerge("plan", "recipe.yml", "--json", cwd=folder).stdout)
    assert told["models"] == ["one.safetensors", "two.safetensors"] and told["parameters"] == {"lambda": 0.5}
    assert told["figures"]["bytes_read"] == 3 * 9 * 4 and told["figures"]["bytes_written"] == 9 * 4
    text = refmerge("plan", "recipe.yml", "--tensor", "norm", cwd=folder).stdout
    assert "task_arithmetic" in text and "norm F32[3]" in text and "lambda=0.5" in text
    assert only_inputs(folder)


def test_plan_finds_what_a_merge_would_refuse(folder: Path) -> None:
    save_file({"layers.0.w": np.zeros((2, 4), np.float32), "norm": np.ones(3, np.float32)}, folder / "two.safetensors")
    assert refmerge("plan", "recipe.yml", cwd=folder).returncode == 3


def test_methods(tmp_path: Path) -> None:
    told = json.loads(refmerge("methods", "--json", cwd=tmp_path).stdout)
    listed = {m["name"]: m for m in told}
    assert {"linear", "ties", "widen", "mergekit:ties", "official:ties", "rws_signature"} <= listed.keys()
    assert [listed["ties"][k] for k in ("kind", "family", "tool")] == ["method", "task_vectors", None]
    assert [listed["mergekit:ties"][k] for k in ("kind", "family", "tool")] == ["method", "task_vectors", "mergekit"]
    assert listed["rws_signature"]["kind"] == "procedure"
    assert listed["rws_signature"]["parameters"]["levels"] == {"default": 256, "required": False}
    one = json.loads(refmerge("methods", "ties", "--json", cwd=tmp_path).stdout)
    assert one == listed["ties"] and one["parameters"]["density"]["domain"] == [0.0, 1.0]


def test_the_catalogue_is_a_line_an_entry_by_family_and_tool(tmp_path: Path) -> None:
    shown = refmerge("methods", cwd=tmp_path).stdout.splitlines()
    names = {m["name"] for m in json.loads(refmerge("methods", "--json", cwd=tmp_path).stdout)}
    assert sorted(line.split()[0] for line in shown if line.startswith("  ")) == sorted(names)
    headings = [line for line in shown if line and not line.startswith(" ")]
    assert headings.index("averaging") < headings.index("task_vectors") < headings.index("mergekit: as mergekit computes it")
    (ties,) = [line for line in shown if line.split()[:1] == ["ties"]]
    assert ties.endswith("TIES-Merging: trim, elect sign, disjoint merge.")
    (kept,) = [line for line in shown if line.split()[:1] == ["rws_signature"]]
    assert "  procedure: The signature of one robust model" in kept
    assert "\033" not in "".join(shown)


def test_methods_shows_what_is_known_of_one(tmp_path: Path) -> None:
    shown = refmerge("methods", "ties", cwd=tmp_path).stdout
    assert "float, default 0.2, in [0, 1]; k / d in the paper" in shown and "arXiv:2306.01708" in shown
    assert "lambda_  float, default 1.0; lambda in a recipe" in shown
    for heading in ("Purpose", "Needs", "Definition", "Parameters", "Edge cases", "Laws", "Who disagrees", "Citation"):
        assert f"\n{heading}\n" in shown, heading
    assert "\n  2. trim: k = int(density d)." in shown
    assert "\n  models  1 or more\n" in shown and "\n  draws   none\n" in shown
    assert "  identical_models" in shown and "(within 2 ulps)" in shown
    assert "  TiesSumNotMean: The agreeing entries are summed.\n    paper           mean\n" in shown
    assert "Prateek Yadav, Derek Tam, Leshem Choshen" in shown
    assert "Exercises" not in shown and ">>> " not in shown
    whole = refmerge("methods", "ties", "--page", cwd=tmp_path).stdout
    assert "\nExercises\n" in whole and "  >>> import refmerge\n" in whole and len(whole) > 1.5 * len(shown)


def test_methods_shows_another_tools_entry(tmp_path: Path) -> None:
    shown = refmerge("methods", "mergekit:ties", cwd=tmp_path).stdout
    assert "weight     float, one or one per model, required" in shown and "int8_mask" in shown
    assert "\nDiffers from ties\n" in shown and "refmerge methods ties " in shown and "\n  2.  keep the largest\n" in shown
    zero = "  TiesZeroSumSign: The sign that is elected where the sum is zero.\n"
    assert zero + "    paper           none: nothing is added\n    mergekit 0.1.5  +\n" in shown
    agrees = shown.partition("As the paper in what others differ in\n")[2].splitlines()[0]
    assert "TiesZeroDensity" in agrees and "    official " not in shown
    none = refmerge("methods", "mergekit:ties", "--page", cwd=tmp_path)
    assert none.returncode == 2 and "refmerge methods ties --page" in one_line(none)


def test_bibtex_is_all_that_is_printed(tmp_path: Path) -> None:
    expected = [
        "@misc{yadav2023ties,",
        "  title         = {{TIES-Merging: Resolving Interference When Merging Models}},",
        "  author        = {Prateek Yadav and Derek Tam and Leshem Choshen and Colin Raffel and Mohit Bansal},",
        "  year          = {2023},",
        "  eprint        = {2306.01708},",
        "  archivePrefix = {arXiv},",
        "  url           = {https://arxiv.org/abs/2306.01708}",
        "}",
    ]
    for name in ("ties", "mergekit:ties"):
        assert refmerge("methods", name, "--bibtex", cwd=tmp_path).stdout.splitlines() == expected
    for wrong in (["--bibtex"], ["ties", "--bibtex", "--json"]):
        assert refmerge("methods", *wrong, cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("tise", "did you mean ties"),
        ("rws_signatures", "did you mean rws_signature"),
        ("dare", "official:dare or dare_ties"),
        ("TIES", "did you mean ties"),
        ("fusion_bench:ties_merging", "'fusion_bench:ties_merging'"),
        ("mergekit:tise", "did you mean mergekit:ties?"),
        ("", "no method, procedure or recipe '' (`refmerge methods` lists them all)"),
    ],
)
def test_unknown_names(tmp_path: Path, name: str, near: str) -> None:
    for command in ("methods", "explain"):
        missing = refmerge(command, name, cwd=tmp_path)
        assert missing.returncode == 2 and near in one_line(missing)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
@pytest.mark.parametrize(("arguments", "columns"), [([], 80), ([], 120), (["ties"], 80), (["ties"], 120)])
def test_on_a_terminal_nothing_is_wider_and_there_is_colour(tmp_path: Path, arguments: list[str], columns: int) -> None:
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm-256color"}
    command = [sys.executable, "-m", "refmerge", "methods", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux ends a terminal that nobody writes to any more
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    os.close(ours)
    assert process.wait(timeout=120) == 0
    text = shown.decode()
    assert "\033[1m" in text
    lines = re.sub(r"\033\[[0-9;]*m", "", text).splitlines()
    assert columns - 20 < max(map(len, lines)) <= columns


SOMEONES = """\
from refmerge import method

@method("split", paper="none", outputs=("mask", "model"))
def split(models, group):
    '''A mask and what it keeps.'''
    mask = group.top(models[0], k=1)
    return {"mask": mask, "model": mask * models[0]}
"""


@pytest.fixture
def someones(folder: Path) -> dict[str, str]:
    """The environment of a user with a plug-in, of which one method works and one does not."""
    info = folder / "site" / "someones-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[refmerge.methods]\nsplit = someones:split\nbroken = someones:no_such\n")
    (folder / "site" / "someones.py").write_text(SOMEONES)
    return os.environ | {"PYTHONPATH": str(folder / "site")}


def test_a_broken_plug_in_does_not_hide_the_others(folder: Path, someones: dict[str, str]) -> None:
    listed = refmerge("methods", cwd=folder, env=someones)
    assert listed.returncode == 0 and "split" in listed.stdout and "ties" in listed.stdout
    assert "broken" not in listed.stdout
    assert one_line(listed).startswith("refmerge: warning: plug-in 'broken' of refmerge.methods failed to load")
    lines = listed.stdout.splitlines()
    assert lines[lines.index("from other packages") + 1].split() == ["split", "A", "mask", "and", "what", "it", "keeps."]
    shown = refmerge("methods", "split", cwd=folder, env=someones).stdout
    assert "A mask and what it keeps." in shown and "outputs  mask, model" in shown
    cited = refmerge("methods", "split", "--bibtex", cwd=folder, env=someones)
    assert cited.returncode == 2 and "split has no page with a citation" in cited.stderr.splitlines()[-1]


def test_several_outputs(folder: Path, someones: dict[str, str]) -> None:
    (folder / "split.yml").write_text("refmerge: 1\nmerge_method: split\nmodels: [{model: one.safetensors}]\n")
    told = json.loads(refmerge("merge", "split.yml", "out", "--json", cwd=folder, env=someones).stdout)
    assert told["out"] == "out" and told["bytes_written"] == 2 * 9 * 4
    assert load_file(folder / "out" / "mask.safetensors")["layers.0.w"].tolist() == [[1, 0, 0], [0, 0, 0]]
    a_file = refmerge("merge", "split.yml", "out.safetensors", cwd=folder, env=someones)
    assert a_file.returncode == 2 and "split has several outputs" in a_file.stderr


def test_backends(tmp_path: Path) -> None:
    told = {b["name"]: b for b in json.loads(refmerge("backends", "--json", cwd=tmp_path).stdout)}
    assert told["numpy"]["available"] and {"torch", "cupy"} <= set(told)


def test_explain(tmp_path: Path) -> None:
    shown = refmerge("explain", "linear", "--models", "1,2", "--models", "3,6", "--weight", "1,3", cwd=tmp_path).stdout
    assert "0.25" in shown and "2.5" in shown and "5" in shown  # c = 1/4, 3/4: 10/4 and 20/4
    wrong = refmerge("explain", "linear", "--models", "1,x", cwd=tmp_path)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    draws = [refmerge("explain", "dare_linear", "--density=.5", "--seed", s, cwd=tmp_path).stdout for s in "012"]
    assert len(set(draws)) > 1
    listed = refmerge("explain", "widen", "--embeddings", "x", cwd=tmp_path)
    assert listed.returncode == 0 and "embeddings[0]" in listed.stdout
    procedure = refmerge("explain", "rws_signature", cwd=tmp_path)
    assert procedure.returncode == 2 and "rws_signature is a procedure" in one_line(procedure)
    misspelt = refmerge("explain", "ties", "--densty", "1", cwd=tmp_path)
    assert misspelt.returncode == 2 and "did you mean density?" in one_line(misspelt)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, refmerge.cli\n"
        "try: refmerge.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'cupy', 'pydantic', 'ruamel', 'rich', 'scipy', 'numpy.f2py'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_merge_loads_one_method_and_nothing_of_other_commands(folder: Path) -> None:
    """Starting takes longer than a small merge. Modules that a recipe of whole models does not use stay unread."""
    code = (
        "import sys, refmerge.cli\n"
        "try: refmerge.cli.main(['merge', 'recipe.yml', 'out', '-q'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print(*sorted(m for m in sys.modules if m.startswith('refmerge.') or m in ('torch', 'scipy', 'rich', 'gguf')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert [m for m in loaded if m.startswith("refmerge.methods.") and m.count(".") == 3] == [
        "refmerge.methods.task_vectors.task_arithmetic"
    ]
    unused = ("cli_", "adapters", "changes", "foreign", "nets", "procedures.", "pages", "verify", "collect")
    assert not [m for m in loaded if m.removeprefix("refmerge.").startswith(unused)]
    assert not {"torch", "scipy", "rich", "gguf"} & set(loaded)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_behind(tmp_path: Path, number: int, status: int) -> None:
    shape = (1 << 23,)
    for k in range(3):
        save_file({f"w{i}": np.full(shape, k, np.float32) for i in range(4)}, tmp_path / f"{k}.safetensors")
    (tmp_path / "recipe.yml").write_text(
        "refmerge: 1\nmerge_method: dare_ties\nbase_model: 0.safetensors\n"
        "models: [{model: 1.safetensors}, {model: 2.safetensors}]\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "refmerge", "merge", "recipe.yml", "out"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"REFMERGE_COMPILE": "0"},  # compiled, it would be over before it is interrupted
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # what runs in the background ignores interrupts
    )  # fmt: skip
    until = time.monotonic() + 60
    while not any(".partial" in p for p in os.listdir(tmp_path)):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert process.stderr is not None
    assert process.stderr.read().split() in (["refmerge:", "interrupted"], ["refmerge:", "terminated"])
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["0.safetensors", "1.safetensors", "2.safetensors", "recipe.yml"]


def test_the_progress_bar_has_no_thread() -> None:
    """Beside another thread the merge would not fork, and threads are slower."""
    from refmerge.cli import _bar

    before, bar = threading.active_count(), _bar()
    bar.start()
    try:
        assert threading.active_count() == before
    finally:
        bar.stop()


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    """Built and installed outside the checkout, it runs the demo, shows pages and checks vectors."""
    root = tmp_path / "checkout"  # a copy: what an earlier build left in the checkout would get into the wheel
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "refmerge-demo", "tests")
    shutil.copytree(Path(__file__).parents[1], root, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, root], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("refmerge-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, cwd=tmp_path)
    code = (
        "import refmerge, refmerge.cli, refmerge.testing as t, numpy as np\n"
        f"assert refmerge.__file__.startswith({str(site)!r}), refmerge.__file__\n"
        "ties = lambda models, base, **p: refmerge.merge(models, 'ties', base=base, nonfinite='propagate', **p)\n"
        "r = t.check(ties, 'ties')\n"
        "assert r.ok and len(r.passed) > 20, r\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for arguments in (["demo", "shown"], ["methods", "ties"]):
        done = refmerge(*arguments, cwd=tmp_path, env=environment)
        assert done.returncode == 0 and "ties" in done.stdout, done.stderr
