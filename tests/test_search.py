"""Searches from a recipe: what is fixed and what is looked for, the best recipe, logs, plots, and what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import refmerge
from refmerge import RefmergeError, registry
from refmerge.cli import main
from refmerge.recipe.search import search

MODELS = [[4.0, 0, 0, 2], [0.0, 2, 0, 2], [0.0, 0, 1, 2]]
BEST = np.array([1, 1, 0.5, 2.5])


def closeness(merged):
    return -float(np.sum((np.asarray(merged["x"]) - BEST) ** 2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three models, a base, statistics, a recipe that names them, and a program that scores."""
    monkeypatch.chdir(tmp_path)
    for k, row in enumerate([*MODELS, [0.0] * 4]):
        save_file({"x": np.array(row)}, f"m{k}.safetensors")
        save_file({"x.fisher": np.array([1.0, 1, 1, k + 1])}, f"s{k}.safetensors")
    write("r.yml", "linear")
    (tmp_path / "score.py").write_text(
        "import sys, numpy as np\nfrom safetensors.numpy import load_file\n"
        f"print(-float(np.sum((load_file(sys.argv[1])['x'] - np.array({BEST.tolist()})) ** 2)))\n"
    )
    return tmp_path


def write(path, method, more="", stats=False):
    entries = "".join(f"  - {{model: m{k}.safetensors{f', stats: s{k}.safetensors' if stats else ''}}}\n" for k in range(3))
    with open(path, "w") as file:
        file.write(f"refmerge: 1\nmerge_method: {method}\nmodels:\n{entries}{more}")


def cli(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def test_it_is_the_procedure_on_the_recipes_models(folder):
    found = search("r.yml", "best.safetensors", closeness, evaluations=20)
    names = [str(folder / f"m{k}.safetensors") for k in range(3)]
    expected = registry.procedure("evolutionary_merge")(names, closeness, evaluations=20, out="again.safetensors")
    assert found.trials == expected.trials and found.recipe == expected.recipe
    write("t.yml", "\"mergekit:ties\"", "base_model: m3.safetensors\nparameters: {density: 0.75, lambda: 0.5}\nseed: 3\n")
    found = search("t.yml", "ties.safetensors", closeness, evaluations=5)
    assert len(found.trials[0].genes) == 3, "the weights; density and lambda are given"
    for line in ("density: 0.75", "lambda: 0.5", "seed: 3"):
        assert line in found.recipe
    found = search("t.yml", "more.safetensors", closeness, evaluations=2, names=["weight"], groups=2)
    assert len(found.trials[0].genes) == 6


def test_the_best_recipe_makes_the_best_merge(folder):
    """Also where the recipe stands in another folder, and statistics are among what it names."""
    write("f.yml", "fisher", stats=True)
    (folder / "elsewhere").mkdir()
    for recipe in ("r.yml", "f.yml"):
        words = ("search", recipe, f"{recipe}.safetensors", "--score", f"{sys.executable} score.py", "--evaluations", 3)
        done = cli(*words, "--save", "elsewhere/best.yml")
        assert done.exit_code == 0, done.output
        assert cli("merge", "elsewhere/best.yml", f"again-{recipe}.safetensors").exit_code == 0
        one, other = (refmerge.open_checkpoint(f"{n}.safetensors")["x"] for n in (recipe, f"again-{recipe}"))
        assert np.array_equal(one, other)


def test_the_command_line_goes_on_from_a_log(folder):
    words = ("search", "r.yml", "best.safetensors", "--score", f"{sys.executable} score.py", "--log", "log.jsonl", "--json")
    assert len(json.loads(cli(*words, "--evaluations", 3).output)["trials"]) == 3
    before = (folder / "log.jsonl").read_text()
    done = cli(*words, "--evaluations", 5, "--overwrite", "--plot", "p.svg")
    told = json.loads(done.output)
    assert (folder / "log.jsonl").read_text().startswith(before) and len(told["trials"]) == 5
    assert told["score"] == max(told["trials"]) and (folder / "p.svg").read_text().count("<circle") == 5
    expected = search("r.yml", "again.safetensors", closeness, evaluations=5)
    assert np.allclose(told["trials"], [t.score for t in expected.trials], rtol=1e-12) and told["recipe"] == expected.recipe


def test_greedy(folder):
    words = ("--greedy", "--score", f"{sys.executable} score.py", "--log", "g.jsonl", "--plot", "g.svg")
    done = cli("search", "r.yml", "soup.safetensors", *words)
    assert done.exit_code == 0, done.output
    expected = registry.procedure("greedy_soup")([{"x": np.array(m)} for m in MODELS], closeness)
    assert f"models {', '.join(str(k + 1) for k in expected.ingredients)} of the recipe" in done.output
    assert np.allclose(refmerge.open_checkpoint("soup.safetensors")["x"], expected.merged["x"])
    assert (folder / "g.svg").read_text().startswith("<svg") and len((folder / "g.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("parameters: {weight: [1, 0.5]}\n", "weight has several values; what a search does not look for has one"),
        ("align: {method: git_rebasin}\n", "takes whole models as they are: leave out align"),
        ("dtype: float32\n", "takes whole models as they are: leave out dtype"),
    ],
)
def test_recipes_that_say_too_much(more, says, folder):
    write("r.yml", "linear", more)
    with pytest.raises(RefmergeError, match=says):
        search("r.yml", "best.safetensors", closeness)
    own = "refmerge: 1\nmerge_method: linear\nmodels:\n  - {model: m0.safetensors, parameters: {weight: 2}}\n"
    (folder / "r.yml").write_text(own)
    with pytest.raises(RefmergeError, match="leave out its parameters"):
        search("r.yml", "best.safetensors", closeness)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Missing option '--score'"),
        (("--score", "x", "--rule", "strict"), "--rule is for --greedy"),
        (("--score", "x", "--greedy", "--groups", "2"), "--groups is for parameters, and --greedy has none"),
        (("--score", "x", "--greedy", "--evaluations", "2"), "--evaluations with --greedy is for --rule repeats"),
        (("--score", "x", "--plot", "p.png"), "p.png does not end in .svg"),
        (("--score", "x", "--search", "density"), "linear has the numbers weight"),
        (("--score", "no_such_program"), "no_such_program cannot be run"),
        (("--score", "false"), "false ended with status 1"),
    ],
)
def test_the_command_line_refuses(words, says, folder):
    before = sorted(p.name for p in folder.iterdir())
    done = cli("search", "r.yml", "best.safetensors", *words)
    assert done.exit_code == 2 and says in done.output and "Traceback" not in done.output, done.output
    assert sorted(p.name for p in folder.iterdir()) == before
