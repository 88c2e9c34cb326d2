"""What the report tells of each merged tensor, against NumPy in float64 on what was read and written."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge.checkpoint import open_checkpoint, save
from refmerge.checkpoint.reader import Checkpoint
from refmerge.errors import UsageError
from refmerge.figures import Figures, part_of
from refmerge.group import Place
from refmerge.recipe.run import prepare_recipe, run_recipe

SHAPES = {"a.weight": (70, 1100), "b.weight": (300, 333), "c": (65537,), "d.bias": (5,), "e": (), "f": (0, 4)}
WITH_BASE = "refmerge: 1\nmerge_method: {}\nbase_model: base\nmodels: [{{model: one}}, {{model: two}}]\n"
RECIPES = {
    "linear": "refmerge: 1\nmerge_method: linear\nmodels: [{model: one}, {model: two}]\n",
    "ties": WITH_BASE.format("ties") + "parameters: {density: 0.3}\n",  # several passes, a threshold over the model
    "della": WITH_BASE.format("della") + "parameters: {density: 0.5}\n",  # whole rows
    "tsvm": WITH_BASE.format("tsvm"),  # whole tensors
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(3)
    base = {n: np.asarray(draw.standard_normal(s), np.float32) for n, s in SHAPES.items()}
    for name in ("base", "one", "two"):
        far = 0.0 if name == "base" else 0.02
        arrays = {n: (x + far * draw.standard_normal(x.shape)).astype(ml_dtypes.bfloat16) for n, x in base.items()}
        save(arrays | {"ids": np.arange(3)}, name, extra_files={"config.json": b"{}"})
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.yml").write_text(text)
    return tmp_path


def reported(path):
    return json.loads((path / "refmerge_report.json").read_text())


def expected(result, inputs, base):
    """The figures of one tensor; inputs in float64, the base last where there is one."""
    r, xs = result.ravel(), [x.ravel() for x in inputs]

    def cosine(a, b):
        length = np.linalg.norm(a) * np.linalg.norm(b)
        return float(a @ b / length) if length else None

    found = {
        "norm": np.linalg.norm(r),
        "norms": [np.linalg.norm(x) for x in xs],
        "cosines": [cosine(x, r) for x in xs],
        "distances": [np.linalg.norm(x - r) for x in xs],
    }
    if base:
        taus = [x - xs[-1] for x in xs[:-1]]
        found["task_norms"] = [np.linalg.norm(t) for t in taus]
        found["task_cosines"] = [cosine(t, r - xs[-1]) for t in taus]
    return found


@pytest.mark.parametrize("method", RECIPES)
def test_figures_are_those_of_what_was_read_and_written(models, method):
    run_recipe(f"{method}.yml", "out", figures=True)
    names = ["one", "two", *(["base"] if method != "linear" else [])]
    arrays = [{n: np.asarray(x, np.float64) for n, x in open_checkpoint(name).items()} for name in names]
    merged = open_checkpoint("out")
    found = reported(models / "out")["tensors"]
    assert "figures" not in found["ids"] and found["c"]["from"] == names
    for name in SHAPES:
        if name == "f":
            assert "figures" not in found[name]  # nothing is computed of no entries
            continue
        wanted = expected(np.asarray(merged[name], np.float64), [a[name] for a in arrays], method != "linear")
        told = found[name]["figures"]
        assert told.keys() == wanted.keys()
        for key, values in wanted.items():
            for one, value in zip(np.atleast_1d(told[key]), np.atleast_1d(values), strict=True):
                assert one == (None if value is None else pytest.approx(value, rel=3e-6, abs=1e-12)), (name, key)


@pytest.mark.parametrize("method", ["linear", "ties", "della"])
def test_blocks_threads_and_programs_change_no_figure(models, method):
    seen = set()
    for number, (threads, elements, fused) in enumerate(
        [(1, None, False), (2, 70_000, False), (1, 4096, False), (2, 1 << 16, True), (1, None, True)]
    ):
        out = models / f"{number}"
        _, plan = prepare_recipe(f"{method}.yml", out=out, threads=threads, figures=True)
        plan.elements, plan.fused = elements, fused
        plan.run(out)
        seen.add((out / "refmerge_report.json").read_bytes())
    assert len(seen) == 1
    run_recipe(f"{method}.yml", "plain")
    assert (models / "plain/model.safetensors").read_bytes() == (models / "0/model.safetensors").read_bytes()
    assert all("figures" not in t for t in reported(models / "plain")["tensors"].values())


def test_figures_read_nothing_again(models, monkeypatch):
    read, counted = Checkpoint.read, []
    monkeypatch.setattr(Checkpoint, "read", lambda self, n, i, j, out: counted.append(j - i) or read(self, n, i, j, out))
    totals = []
    for figures in (False, True):
        run_recipe("ties.yml", f"out{figures}", threads=1, figures=figures)
        totals.append(sum(counted))
        counted.clear()
    assert totals[0] == totals[1]


def test_figures_of_another_backend(models):
    pytest.importorskip("torch")
    run_recipe("della.yml", "out", figures=True)
    run_recipe("della.yml", "torch", figures=True, backend="torch")
    assert reported(models / "torch")["tensors"] == reported(models / "out")["tensors"]


def test_figures_of_slices(models):
    """Tensors come from others' layers, under other names, and two works have different numbers of models."""
    draw = np.random.default_rng(0)
    for name in ("x", "y"):
        layers = {f"model.layers.{i}.w": draw.standard_normal((4, 4)).astype(np.float32) for i in range(3)}
        save(layers, name, extra_files={"config.json": b'{"num_hidden_layers": 3}'})
    (models / "s.yml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: x, layer_range: [0, 1]}, {model: y, layer_range: [2, 3]}]\n"
        "  - sources: [{model: y, layer_range: [1, 2]}]\n"
    )
    run_recipe("s.yml", "out", figures=True)
    x, y = ({n: np.asarray(a, np.float64) for n, a in open_checkpoint(p).items()} for p in "xy")
    found = reported(models / "out")["tensors"]
    assert found["model.layers.0.w"]["from"] == ["x", ["y", "model.layers.2.w"]]
    wanted = expected(
        (x["model.layers.0.w"] + y["model.layers.2.w"]) / 2, [x["model.layers.0.w"], y["model.layers.2.w"]], False
    )
    assert found["model.layers.0.w"]["figures"]["cosines"] == pytest.approx(wanted["cosines"], rel=1e-6)
    alone = found["model.layers.1.w"]["figures"]
    assert alone["distances"] == [0.0] and alone["cosines"] == pytest.approx([1.0], rel=1e-7)


def test_by_hand(tmp_path, monkeypatch):
    """base (3, 4), one (3, 8), two (9, 4): the mean of what they changed is (3, 2), the result (6, 6)."""
    monkeypatch.chdir(tmp_path)
    for name, values in (("base", [3, 4]), ("one", [3, 8]), ("two", [9, 4])):
        save({"w": np.array(values, np.float32)}, name)
    (tmp_path / "r.yml").write_text(
        "refmerge: 1\nmerge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
        "parameters: {lambda: 0.5}\n"
    )
    run_recipe("r.yml", "out", figures=True)
    told = reported(tmp_path / "out")["tensors"]["w"]["figures"]
    assert told["norm"] == pytest.approx(math.sqrt(72), rel=1e-8)
    assert told["norms"] == pytest.approx([math.sqrt(73), math.sqrt(97), 5], rel=1e-8)
    assert told["distances"] == pytest.approx([math.sqrt(13)] * 3, rel=1e-8)
    assert told["cosines"] == pytest.approx([66 / math.sqrt(73 * 72), 78 / math.sqrt(97 * 72), 42 / (5 * math.sqrt(72))])
    assert told["task_norms"] == [4, 6]
    assert told["task_cosines"] == pytest.approx([2 / math.sqrt(13), 3 / math.sqrt(13)], rel=1e-8)


NASTY = [0.0, -0.0, 1.0, -3.0, 1e30, -1e30, math.inf, -math.inf, math.nan, 1e-30]


@given(st.lists(st.sampled_from(NASTY), max_size=5), st.sampled_from([1.0, 0.0, 1e30]), st.booleans())
def test_what_has_no_number_is_null(values, other, by_rows):
    """Vectors of zeros, NaN and infinities, and squares that overflow: plain JSON, and no made-up angle."""
    written, base = np.array(values, np.float32), np.full(len(values), other, np.float32)
    place = Place(0, "w", 0, len(values), len(values))
    figures = Figures(len(values), 2, True)
    with np.errstate(all="ignore"):
        figures.add(place, part_of(place, written, [written, base], True, len(values) if by_rows else None))
    told = json.loads(json.dumps(figures.told(), allow_nan=False))
    assert all(c is None or -1 <= c <= 1 for c in told["cosines"] + told["task_cosines"])
    if not all(map(math.isfinite, values)):
        assert told["norm"] is None and told["cosines"] == [None, None]
    if other == 0.0:
        assert told["norms"][1] == 0.0 and told["cosines"][1] is None
    if not values:
        assert told["norm"] == 0.0 and told["task_cosines"] == [None]


def test_values_that_were_let_through_leave_plain_json(models):
    save({"w": np.array([1, math.nan], np.float32)}, "bad")
    (models / "n.yml").write_text("refmerge: 1\nmerge_method: linear\nmodels: [{model: bad}]\n")
    run_recipe("n.yml", "out", figures=True, nonfinite="propagate")
    text = (models / "out/refmerge_report.json").read_text()
    told = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))["tensors"]["w"]["figures"]
    assert told == {"norm": None, "norms": [None], "cosines": [None], "distances": [None]}


def test_figures_where_there_can_be_none(models):
    with pytest.raises(UsageError, match="give a folder"):
        run_recipe("ties.yml", "out.safetensors", figures=True)
    with pytest.raises(UsageError, match="figures and resume exclude each other"):
        run_recipe("ties.yml", "out", figures=True, resume=True)
    (models / "m.yml").write_text(
        "refmerge: 1\nmerge_method: fusion_bench:opcm\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    )
    with pytest.raises(UsageError, match="fusion_bench:opcm sees whole models"):
        run_recipe("m.yml", "out", figures=True)
    (models / "e.yml").write_text("base_model: base\nexperts: [{source_model: one, positive_prompts: [a]}]\n")
    with pytest.raises(UsageError, match=r"figures = True: a mixture of experts copies weights"):
        run_recipe("e.yml", "out", figures=True)
    assert not (models / "out").exists()
