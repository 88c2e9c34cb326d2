"""The benchmark's own arithmetic: what it merges, what a floor counts, what it prints. Nothing here is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import refmerge
from refmerge import registry
from refmerge.recipe.run import prepare_recipe

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # `pytest` alone does not look for the folder `tests` there

from tests.bench import __main__ as bench  # noqa: E402
from tests.bench import alignment, data, decompositions, experts, floors, processes  # noqa: E402

TINY = data.qwen2(width=128, inner=256, key_value=64, layers=2, vocabulary=96)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    data.write(root, TINY)
    return root


@pytest.mark.parametrize("millions", [20, 45, 60, 494, 7000])
def test_there_are_as_many_parameters_as_were_asked_for(millions):
    found = data.shapes(millions)
    assert data.elements(found) == pytest.approx(millions * 1e6, rel=1e-3)
    assert 0.2 < data.elements({"": found[data.EMBEDDING]}) / data.elements(found) < 0.4


def test_the_config_fits_the_tensors():
    config = data.config(data.shapes(494))
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (896, 4864, 24)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (14, 2)


def test_checkpoints_are_written_once(checkpoints):
    before = {p: p.stat().st_mtime_ns for p in checkpoints.rglob("*")}
    data.write(checkpoints, TINY)
    assert {p: p.stat().st_mtime_ns for p in checkpoints.rglob("*")} == before
    assert {p.name for p in checkpoints.iterdir()} == {"base", "ft1", "ft2", "ft3"}
    assert {p.name for p in (checkpoints / "ft1").iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("method", [*data.PER_MODEL, "slerp", "widen", "wise_ft"])
def test_refmerge_takes_each_recipe(checkpoints, method, tmp_path):
    file = tmp_path / "recipe.yml"
    file.write_text(data.recipe(method, checkpoints))
    resolved, plan = prepare_recipe(file)
    prefix = "mergekit:" if data.known_to_mergekit(method) else ""
    assert resolved.method == prefix + method
    assert plan.figures()["parameters"] == data.elements(TINY)


def test_default_methods_are_those_that_mergekit_has_too():
    assert all(data.known_to_mergekit(m) and f"mergekit:{m}" in registry.names() for m in bench.METHODS)
    assert floors.UNAVOIDABLE.keys() <= set(registry.names())


def test_widths_and_columns():
    shapes = {data.EMBEDDING: (10, 4), "a": (3, 4), "b": (4, 3), "c": (5, 4), "norm": (4,)}
    assert floors.row_widths(shapes) == {4: 40 + 12 + 20, 3: 12}
    assert floors.column_counts(shapes) == {10: 1, 4: 2, 3: 1}


def test_a_floor_is_the_moving_and_the_work_of_each_thread(monkeypatch):
    monkeypatch.setitem(floors.UNAVOIDABLE, "della", (lambda tensors, models: 3.0 * models, lambda tensors, models: 1.0))
    options = {"models": 3, "moved": 8_000, "bandwidth": 4_000.0}
    assert floors.floor("della", {}, threads=2, **options) == 2 + (9 + 1) / 2
    assert floors.floor("linear", {}, threads=2, **options) == 2


def test_work_grows_with_the_parameters_and_the_models(monkeypatch):
    monkeypatch.setattr(floors, "seconds", lambda f: 1.0)
    once, twice = {"a": (3, 4)}, {"a": (3, 4), "b": (3, 4)}
    for part in (floors.draws, floors.selections, floors.rankings, floors.orderings):
        assert part(twice, 3) == pytest.approx(2 * part(once, 3)) == pytest.approx(6 * part(once, 1))


@pytest.mark.parametrize("part", [floors.draws, floors.selections, floors.rankings])
def test_the_probes_run(part):
    assert part({"a": (3, 4)}, 1) > 0


def test_what_a_copy_moves(checkpoints, tmp_path):
    copied = bench.copy(checkpoints, tmp_path / "copy.bin")
    assert copied.moved == 4 * (checkpoints / "ft1" / "model.safetensors").stat().st_size
    assert 0 < copied.seconds <= copied.to_disk
    assert not list(tmp_path.iterdir())


def test_the_inputs_survive_being_forgotten(checkpoints):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("the system has no posix_fadvise")
    before = (checkpoints / "ft2" / "model.safetensors").read_bytes()
    bench.forget(checkpoints)
    assert (checkpoints / "ft2" / "model.safetensors").read_bytes() == before


def test_a_table_for_a_page():
    table = bench.Table({"": 6, "seconds": 8, "passes": 6, "memory": 7}, markdown=True)
    assert table.head().splitlines()[1] == "| ------ | -------: | -----: | ------: |"
    assert (
        table.row({"": "ties", "seconds": 1.234, "passes": 2, "memory": 0.25}) == "| ties   |     1.23 |      2 |   25.0% |"
    )
    assert table.row({"": "copy", "seconds": 1.0}) == "| copy   |     1.00 |      - |       - |"


def test_a_table_for_a_terminal():
    table = bench.Table({"": 6, "seconds": 8}, markdown=False)
    assert table.head() == "        seconds"
    assert table.row({"": "ties", "seconds": 1.5}) == "ties       1.50"


def test_means_leave_out_what_was_not_compared():
    rows = [{"faster": 2.0, "merge only": None}, {"faster": 8.0, "merge only": 5.0}, {"seconds": 1.0}]
    assert bench.means(rows) == "Geometric means of 2 methods: faster 4.0x, merge only 5.0x."
    assert bench.ratio(1.0, -0.1) is bench.ratio(-1.0, 0.1) is None


def test_a_process_is_measured_with_its_children():
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell")
    child = "x = bytearray(b'1') * (48 << 20); input()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    try:
        for _ in range(500):
            if processes.anonymous(process.pid) > 48 << 20:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.02)
        assert len(list(processes.family(process.pid))) == 2
        assert processes.anonymous(process.pid) > 48 << 20
    finally:
        process.communicate(b"\n")


def test_a_failed_process_ends_the_benchmark():
    said = processes.measure([sys.executable, "-c", "print('done')"])
    assert said.said == "done\n"
    with pytest.raises(SystemExit, match="no such luck"):
        processes.measure([sys.executable, "-c", "raise SystemExit('no such luck')"])


def test_the_circumstances_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--threads", "2", "--cold", "--runs", "1"])
    said = bench.circumstances(bench.arguments(), TINY)
    assert refmerge.__version__ in said and "medians of 1 run; --threads 2, --cold." in said


@pytest.mark.parametrize("words", [["--methods", "tise"], ["--runs", "0"], ["--mergekit", "/nowhere/mergekit-yaml"]])
def test_mistakes_are_told_before_anything_is_written(monkeypatch, words, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit):
        bench.arguments()
    said = capsys.readouterr().err
    assert words[0] in said or words[1] in said


def test_a_shuffled_checkpoint_is_matched(checkpoints, tmp_path):
    with refmerge.open_checkpoint(checkpoints / "base") as base, refmerge.open_checkpoint(checkpoints / "ft1") as tune:
        spec = alignment.detect(base)
        alignment.save(alignment.Permuted(tune, spec, alignment.shuffled(spec, tune)), tmp_path / "shuffled")
    told = alignment.match(checkpoints / "base", tmp_path / "shuffled")
    assert told["found"] == 1 and told["largest"] == 256
    assert told["assigned"] > 0 and 0 < told["products"] + told["assignments"] < told["seconds"]
    assert "ratio" in alignment.report(told, 10**6)


def test_shuffled_experts_are_merged(tmp_path):
    sizes = {"width": 64, "inner": 40, "key_value": 64, "vocabulary": 50}
    experts.write(tmp_path, 2, sizes)
    told = {a: experts.run(tmp_path, tmp_path / a, 3, a) for a in ("none", "dominant")}
    assert told["dominant"]["found"] == 1 and told["dominant"]["assigned"] == 10 and not told["none"]["assigned"]
    assert refmerge.open_checkpoint(tmp_path / "none").config["num_local_experts"] == 3
    assert "found            100.0%" in experts.report(told, {"none": 1, "dominant": 2}, 0.1, 10**6)


def test_half_a_billion_parameters_are_active():
    tensors = experts.shapes(24, **experts.SIZES)
    assert experts.active(tensors) == pytest.approx(0.5e9, rel=0.01)
    assert data.elements(tensors) == pytest.approx(1.72e9, rel=0.01)


def test_methods_of_singular_vectors_are_timed_over_their_decompositions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decompositions", "--models", "2", "--shrink", "64"])
    decompositions.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" ")[1] for row in rows][:2] == ["iso_c", "svc"] and len(rows) == 11
    assert decompositions.decomposed("tsvm", 4, 7, 2) == [(4, 7), (4, 7), (4, 4), (7, 4)]
