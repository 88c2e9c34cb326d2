"""Evolutionary merging: the search, genes and recipes, logs, and mergekit's genomes."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import refmerge
from refmerge import UsageError, registry, testing
from refmerge.cmaes import CMA
from refmerge.plots import draw_search
from refmerge.procedures.data_driven import _mergekit_genome as genome
from refmerge.procedures.data_driven.evolutionary_merge import space_of

evolutionary_merge = registry.procedure("evolutionary_merge")

ROWS = [[4, 0, 0, 0, 0, 2], [0, 2, 0, 0, 0, 2], [0, 0, 1, 0, 0, 2]]
MODELS = [{"x": np.array(row, np.float64)} for row in ROWS]
BEST = np.array([1, 1, 0.5, 0, 0, 2.5])


def closeness(merged):
    return -float(np.sum((merged["x"] - BEST) ** 2))


# --- CMA-ES -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_cma_finds_the_bottom_of_an_ellipsoid(n):
    scales = np.logspace(0, 3, n)
    state = CMA.start(np.zeros(n), 1 / 6)
    for g in range(400 * (n + 2) // state.population):
        samples = state.ask(np.random.default_rng([0, g]).standard_normal((state.population, n)))
        state = state.tell(samples, ((samples - 0.7) ** 2) @ scales)
    assert np.abs(state.mean - 0.7).max() < 1e-4


def test_cma_sees_only_ranks():
    """And NaN is the worst, with infinity; a state stays as it is."""
    start = CMA.start(np.zeros(3), 0.5, 6)
    samples = start.ask(np.random.default_rng(0).standard_normal((6, 3)))
    costs = np.array([1.0, 5.0, 2.0, 9.0, 7.0, 3.0])
    one, other = start.tell(samples, costs), start.tell(samples, np.where(costs > 6, math.nan, np.exp(costs)))
    assert np.array_equal(one.mean, other.mean) and np.array_equal(one.C, other.C) and one.sigma == other.sigma
    assert not start.mean.any() and start.generation == 0


def test_cma_by_hand():
    """Two genes, population 4: weights ln 2.5 and ln 1.25 over their sum, 0.804 and 0.196, of the better two samples."""
    state = CMA.start(np.zeros(2), 1.0, 4).tell(np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), np.array([1.0, 2, 3, 4]))
    w = np.log([2.5, 1.25]) / np.log(2.5 * 1.25)
    assert np.allclose(state.mean, w, rtol=1e-15)


# --- Genes and recipes ------------------------------------------------------------------------------------------------


def test_the_start_is_an_average():
    found = evolutionary_merge(MODELS, closeness, evaluations=1)
    testing.assert_same(found.merged, refmerge.merge(MODELS, "linear", weight=1 / 3))
    assert found.best == 0 and len(found.trials) == 1


def test_it_finds_what_is_there():
    found = evolutionary_merge(MODELS, closeness, normalize=False, evaluations=300)
    assert np.abs(found.merged["x"] - BEST).max() < 0.01
    assert found.score == max(t.score for t in found.trials) == closeness(found.merged)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"groups": 3}),
        ("ties", {"lambda_": 0.5, "filters": ["attn"], "groups": 2, "over": "tensor"}),
        ("dare_ties", {}),
        ("task_arithmetic", {"negative": True, "filters": ["mlp", "attn"]}),
        ("slerp", {}),
    ],
)
def test_the_recipe_gives_the_merge(method, options, tmp_path):
    draw = np.random.default_rng(0)
    names = [f"layers.{i}.{part}.weight" for i in range(4) for part in ("attn", "mlp")] + ["embed.weight"]
    count = 2 if method == "slerp" else 3
    for folder in ("base", *(f"m{k}" for k in range(count))):
        (tmp_path / folder).mkdir()
        save_file({n: draw.standard_normal((3, 4)) for n in names}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text("{}")
    base = tmp_path / "base" if refmerge.get(method).needs_base else None
    paths = [tmp_path / f"m{k}" for k in range(count)]
    score = lambda m: float(np.sum(m["layers.2.mlp.weight"]))  # noqa: E731
    found = evolutionary_merge(
        paths, score, method=method, base=base, evaluations=12, seed=3, sigma=0.4, out=tmp_path / "best", **options
    )
    (tmp_path / "best.yml").write_text(found.recipe)
    again = refmerge.run_recipe(tmp_path / "best.yml", tmp_path / "again")
    assert found.best > 0
    for n in names:
        assert np.array_equal(again[n], found.merged[n])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_magnitudes_within_the_domain():
    for negative, expected in ((False, 0.5), (True, -0.5)):
        weights = space_of(MODELS, None, "task_arithmetic", None, 1, (), negative, {})
        assert weights.value("weight", -0.5) == expected
        density = space_of(MODELS, None, "ties", None, 1, (), negative, {})
        assert (density.value("density", -2.0), density.value("density", -0.25)) == (1.0, 0.25)


def test_a_group_of_tensors_has_one_density():
    names = {f"layers.{i}.w": np.arange(6.0) for i in range(3)}
    with pytest.raises(UsageError, match="need over='tensor'"):
        evolutionary_merge([names, names], lambda m: 0.0, method="ties", base=names, groups=2, evaluations=9)


# --- Laws -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 25), st.integers(1, 25))
def test_more_trials_begin_with_fewer(seed, few, more):
    one, other = (evolutionary_merge(MODELS, closeness, seed=seed, evaluations=n) for n in sorted((few, more)))
    assert other.trials[: len(one.trials)] == one.trials
    assert other.score >= one.score >= one.trials[0].score
    assert one.score == closeness(one.merged)


def test_a_constant_score_gives_the_start():
    assert evolutionary_merge(MODELS, lambda m: 1.0, evaluations=20).best == 0


# --- The log ----------------------------------------------------------------------------------------------------------


def test_a_search_goes_on_from_its_log(tmp_path):
    """After an interruption at any trial, a half-written line included, with no score taken twice."""
    whole = evolutionary_merge(MODELS, closeness, evaluations=20)
    log, calls = tmp_path / "log.jsonl", []

    def score(merged, stop):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return closeness(merged)

    for stop in (0, 3, 11):
        with pytest.raises(KeyboardInterrupt):
            evolutionary_merge(MODELS, lambda m, stop=stop: score(m, stop), evaluations=20, log=log)
        with log.open("a") as file:
            file.write('{"genes": [0.33')
    found = evolutionary_merge(MODELS, lambda m: score(m, None), evaluations=20, log=log)
    assert found.trials == whole.trials and len(calls) == 20
    assert len(log.read_text().splitlines()) == 21
    again = evolutionary_merge(MODELS, lambda m: 1 / 0, evaluations=20, log=log)
    assert again.trials == whole.trials and again.recipe == whole.recipe


def test_a_log_keeps_what_is_not_finite(tmp_path):
    scores = iter([math.nan, -math.inf, 1.0, math.inf, math.nan])
    one = evolutionary_merge(MODELS, lambda m: next(scores), evaluations=5, log=tmp_path / "log")
    other = evolutionary_merge(MODELS, lambda m: 1 / 0, evaluations=5, log=tmp_path / "log")
    assert one.best == other.best == 3
    assert [t.genes for t in one.trials] == [t.genes for t in other.trials]


def test_a_log_of_something_else_is_refused(tmp_path):
    log = tmp_path / "log.jsonl"
    evolutionary_merge(MODELS, closeness, evaluations=3, log=log)
    for change in ({"seed": 1}, {"sigma": 0.5}, {"normalize": False}, {"population": 9}):
        with pytest.raises(UsageError, match="is the log of another search"):
            evolutionary_merge(MODELS, closeness, evaluations=3, log=log, **change)
    lines = log.read_text().splitlines()
    changed = json.loads(lines[1])
    changed["genes"][0] += 1
    log.write_text("\n".join([lines[0], json.dumps(changed), ""]))
    with pytest.raises(UsageError, match="has other genes than this search makes"):
        evolutionary_merge(MODELS, closeness, evaluations=3, log=log)


# --- Commands, files and the plot -------------------------------------------------------------------------------------


def test_a_command_scores(tmp_path):
    for k, model in enumerate(MODELS):
        (tmp_path / f"m{k}").mkdir()
        save_file(model, tmp_path / f"m{k}" / "model.safetensors")
        (tmp_path / f"m{k}" / "config.json").write_text("{}")
    program = tmp_path / "score.py"
    program.write_text(
        "import sys, pathlib\nfrom safetensors.numpy import load_file\n"
        "print('loading')\nprint(-abs(float(load_file(pathlib.Path(sys.argv[1]) / 'model.safetensors')['x'][0]) - 1))\n\n"
    )
    paths = [tmp_path / f"m{k}" for k in range(3)]
    found = evolutionary_merge(paths, [sys.executable, str(program)], evaluations=3, out=tmp_path / "out" / "best")
    expected = evolutionary_merge(MODELS, lambda m: -abs(m["x"][0] - 1), evaluations=3)
    assert found.trials == expected.trials
    testing.assert_same(dict(found.merged), expected.merged)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["best"]
    with pytest.raises(UsageError, match="ended with status 3; a score ends with 0"):
        evolutionary_merge(paths, [sys.executable, "-c", "exit(3)"], evaluations=3, out=tmp_path / "other")
    with pytest.raises(UsageError, match="a score is a number, not 'good'"):
        evolutionary_merge(paths, f"{sys.executable} -c \"print('good')\"", evaluations=3, out=tmp_path / "other")
    with pytest.raises(UsageError, match="exists; overwrite=True replaces it"):
        evolutionary_merge(paths, closeness, evaluations=3, out=tmp_path / "out" / "best")


def test_an_output_in_an_input_is_refused_before_a_score(tmp_path):
    """Also in the base, in a file of statistics, and by way of a link; nothing is written, the log neither."""
    for k, model in enumerate(MODELS):
        (tmp_path / f"m{k}").mkdir()
        save_file(model, tmp_path / f"m{k}" / "model.safetensors")
        save_file({"x.fisher": np.ones(6)}, tmp_path / f"m{k}.stats.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "m1")
    before = sorted(tmp_path.rglob("*"))
    paths, stats = [[tmp_path / f"m{k}{end}" for k in range(3)] for end in ("", ".stats.safetensors")]
    options = {"evaluations": 3, "log": tmp_path / "log", "overwrite": True}
    for out in ("m1", "m1/best", "link/best", "m2/model.safetensors", "m0/a/b"):
        with pytest.raises(UsageError, match=r"lies in an input, .*: inputs are never written to"):
            evolutionary_merge(paths, lambda m: 1 / 0, out=tmp_path / out, **options)
    with pytest.raises(UsageError, match="lies in an input"):
        evolutionary_merge(
            paths[:2], lambda m: 1 / 0, method="task_arithmetic", base=paths[2], out=paths[2] / "best", **options
        )
    with pytest.raises(UsageError, match="lies in an input"):
        evolutionary_merge(paths, lambda m: 1 / 0, method="fisher", stats=stats, out=stats[0], **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plot():
    found = evolutionary_merge(MODELS, closeness, evaluations=30)
    root = ElementTree.fromstring(found.plot())
    assert sum(e.tag.endswith("circle") for e in root.iter()) == 30
    assert "30 trials, the best" in found.plot()
    assert draw_search([math.nan, 1.0]).count("<circle") == 1
    with pytest.raises(UsageError, match="none of which is finite"):
        draw_search([math.nan])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "models is a sequence of at least one"),
        ({"models": MODELS[0]}, "models is a sequence of at least one"),
        ({"search": ["density"]}, "linear has the numbers weight"),
        ({"search": []}, "linear has the numbers weight"),
        ({"method": "passthrough"}, "passthrough has the numbers"),
        ({"weight": 1.0}, "weight is searched for and given: leave one out"),
        ({"groups": 0}, "groups = 0 is no whole number above 0"),
        ({"sigma": 0.0}, "sigma = 0.0 is no number above 0"),
        ({"evaluations": 0}, "evaluations = 0 is no whole number above 0"),
        ({"population": 1}, "population = 1 is no whole number above 1"),
        ({"density": 0.5}, "linear has no parameter 'density'"),
        ({"score": "evaluate"}, "a command scores checkpoints: give models as paths, and out"),
        ({"score": lambda m: None}, "a score is a number, not NoneType"),
        ({"score": lambda m: math.nan}, "every trial scores NaN"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(refmerge.RefmergeError, match=message):
        evolutionary_merge(**{"models": MODELS, "score": closeness, "evaluations": 3} | arguments)


# --- mergekit's genomes: recipes that mergekit 0.1.5 made -------------------------------------------------------------


def test_slices_of_mergekit():
    definition = {"models": ["a/x", "a/y"], "merge_method": "linear", "layer_granularity": 4}
    genes = [[[[0.8032760620117188]], [[0.17483338713645935]]], [[[0.08897809684276581]], [[-0.6137180328369141]]]]
    assert genome.initial(definition, 8).tolist() == [[[[0.5]], [[0.5]]], [[[0.5]], [[0.5]]]]
    weights = [[0.8032760620117188, 0.17483338713645935], [0.08897809684276581, 0.6137180328369141]]
    assert genome.recipe(definition, 8, np.array(genes)) == {
        "dtype": "bfloat16", "merge_method": "linear", "parameters": {"int8_mask": True, "normalize": True},
        "slices": [
            {"sources": [
                {"layer_range": place, "model": m, "parameters": {"weight": w}} for m, w in zip(("a/x", "a/y"), row)
            ]}
            for place, row in zip(([0, 4], [4, 8]), weights)
        ],
    }  # fmt: skip


def test_gradients_of_mergekit():
    definition = {
        "models": ["a/x", "a/y"], "merge_method": "dare_ties", "base_model": "a/b", "layer_granularity": 4, "smooth": True,
    }  # fmt: skip
    genes = np.array([[[[0.25, -0.5]], [[-1.5, 2.0]]], [[[0.5, 1.0]], [[0.0, 0.125]]]])
    assert genome.recipe(definition, 8, genes.ravel()) == {
        "base_model": "a/b", "dtype": "bfloat16", "merge_method": "dare_ties",
        "parameters": {"int8_mask": True, "normalize": True},
        "models": [
            {"model": "a/x", "parameters": {"weight": [0.25, 0.5], "density": [0.5, 1.0]}},
            {"model": "a/y", "parameters": {"weight": [1.5, 0.0], "density": [1.0, 0.125]}},
            {"model": "a/b"},
        ],
    }  # fmt: skip


def test_slerp_of_mergekit():
    definition = {"models": ["x", "y", "z"], "merge_method": "slerp"}
    (only,) = genome.recipe(definition, 8, np.array([0.25, 0.5, -1.0]))["slices"]
    assert only["base_model"] == "y" and [s["model"] for s in only["sources"]] == ["y", "x"]
    assert only["parameters"]["t"] == pytest.approx(1 / (1 + math.exp(0.25)))
