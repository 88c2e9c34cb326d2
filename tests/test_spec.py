"""Pages and code say the same: one page for each method, the same facts, the same steps, and examples that hold."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import math
import re
import sys
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import refmerge
from refmerge import pages, registry, testing
from refmerge.api import prepare
from refmerge.explain import explain, outline, render
from refmerge.laws import LAWS, statistics
from refmerge.method import Method

ROOT = Path(__file__).parent.parent
METHODS = [n for n in refmerge.methods() if ":" not in n and n in registry._files()]
PAGES = pages.names()
BOTH = sorted({*METHODS} & {*PAGES})
BESIDE = ("adapter.py", "_serve.py", "_modules.py")  # what runs in other tools' Python
FILES = sorted(
    p for root in ("methods", "compat") for p in (ROOT / "refmerge" / root).rglob("*.py") if p.name not in BESIDE
)


# --- A method is its file, its page and its vectors -------------------------------------------------------------------


def test_every_method_has_a_page_and_every_page_a_method():
    assert METHODS == PAGES


def test_every_method_has_vectors():
    assert [n for n in METHODS if n not in testing.names()] == []


def test_the_page_lies_in_the_family_of_the_method():
    for name in BOTH:
        assert registry.get(name).run.__module__ == f"refmerge.methods.{pages.page(name).family}.{name}"


@pytest.mark.parametrize("name", refmerge.methods())
def test_a_file_defines_one_method_of_its_name(name):
    if name not in registry._files():
        pytest.skip("somebody else's method")
    module, attribute = registry._files()[name]
    own = [v for v in vars(importlib.import_module(module)).values() if isinstance(v, Method) and _defined_in(v, module)]
    assert [m.name for m in own] == [name]
    assert registry.get(name) is own[0]
    assert attribute == name.rpartition(":")[2]


def _defined_in(method: Method, module: str) -> bool:
    tool = module.split(".")[2] if module.startswith("refmerge.compat") else ""
    return method.name == (f"{tool}:" if tool else "") + module.rpartition(".")[2]


def test_no_list_of_methods_is_kept_elsewhere():
    """What a new method touches is its file, its page and its vectors; the packages import nothing."""
    for package in ("methods", "compat"):
        for init in (ROOT / "refmerge" / package).rglob("__init__.py"):
            assert not any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(ast.parse(init.read_text()))), init


def test_pyproject_lists_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"refmerge.spec"}
    for top, name in (("refmerge", "refmerge"), ("backends", "refmerge.backends")):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / top).parts]))
    assert sorted(listed) == sorted(found)


# --- The front matter -------------------------------------------------------------------------------------------------


@pytest.fixture(params=BOTH)
def both(request):
    return pages.page(request.param), registry.get(request.param)


KEYS = {
    "name", "family", "paper", "source", "asks", "view", "over", "models", "ulps", "passes", "laws", "params", "example",
    "flags", "confidence", "law_ulps", "cite", "optional_base",
}  # fmt: skip


def test_front_matter(both):
    page, method = both
    front = page.front
    assert front.keys() <= KEYS, front.keys() - KEYS
    assert KEYS - front.keys() <= {"params", "flags", "confidence", "law_ulps", "optional_base"}, KEYS - front.keys()
    assert front["name"] == method.name
    assert front["family"] == page.family
    assert front["paper"] == method.paper
    assert tuple(front["asks"]) == method.asks
    assert front.get("optional_base", False) == method.optional_base
    assert front["over"] == (method.over if isinstance(method.over, str) else "function")
    assert (front["models"][0], None if front["models"][1] == "any" else front["models"][1]) == method.models
    assert isinstance(front["ulps"], int | float)
    assert all(isinstance(front[k], str) and front[k] for k in ("source", "passes"))


@pytest.mark.parametrize("name", [name for kind in pages.SECTIONS_OF for name in pages.names(kind)])
def test_citation(name):
    """Enough for a BibTeX entry: the arXiv number comes from `paper`, where there is one. One paper has one entry."""
    cite = pages.page(name).front["cite"]
    assert {"key", "title", "author", "year"} <= cite.keys() <= {"key", "title", "author", "year", "url"}
    assert re.fullmatch(r"[A-Za-z][\w:-]*", cite["key"]) and type(cite["year"]) is int
    assert all(cite[k] == cite[k].strip() and cite[k] for k in ("title", "author")) and not cite["title"].endswith(".")
    assert not re.search(r",| & |\bet al\b|\band\s*$", cite["author"]), "A and B and C, first names first"
    assert ("url" in cite) or pages.page(name).arxiv, "a paper that is not on arXiv needs a url"
    assert cite.get("url", "https://").startswith("https://")
    for other in (pages.page(n) for kind in pages.SECTIONS_OF for n in pages.names(kind)):
        theirs = other.front["cite"]
        assert theirs["key"] != cite["key"] or theirs == cite, f"{name} and {other.name} cite {cite['key']} differently"


def test_each_input_byte_is_read_as_often_as_the_page_says(both, make_case):
    """In one block and in many. (Samples come on top, of groups of more than 131072 entries.)"""
    page, method = both
    said = [int(n) for n in re.findall(r"\b\d\b", page.front["passes"])]
    least, most = method.models
    count = max(least, min(2, most or 2))
    draw = np.random.default_rng(0)
    arrays = [{"x": draw.standard_normal((64, 64)).astype(np.float32)} for _ in range(count + 1)]
    read = 4 * 64 * 64 * (count + method.needs_base)
    needed = {key: x for key, x in make_case(page.name).arguments(count)[2].items() if method.params[key].required}
    for elements, passes in ((1 << 22, said[0]), (512, said[-1])):
        stats = [statistics(method, x, draw) for x in arrays[1:]] if method.needs else None
        based = arrays[0] if method.needs_base else None
        plan = prepare(arrays[1:], method, base=based, stats=stats, threads=1, params=needed)
        plan.elements = elements
        plan.run()
        assert (plan.ran.passes, plan.ran.bytes_read, plan.ran.bytes_sampled) == (passes, passes * read, 0)


def test_view(both):
    page, method = both
    if not callable(method.view):
        assert page.front["view"] == method.view
        return
    switches = list(inspect.signature(method.view).parameters)

    def values(key):
        if key == "ndim":
            return (1, 2, 3, 4)
        return method.params[key].choices or ((True, False) if method.params[key].type is bool else (None,))

    possible = itertools.product(*map(values, switches))
    assert sorted(page.front["view"]) == sorted({method.view(**dict(zip(switches, v))) for v in possible})


def test_parameters(both):
    page, method = both
    params = page.front.get("params", {})
    assert list(params) == list(method.params)
    for key, param in method.params.items():
        fact = params[key]
        assert fact.keys() <= {"symbol", "default", "domain", "choices", "per_model", "optional", "meaning"}
        assert fact["symbol"] and fact["meaning"].endswith(".")
        if param.required or param.default is None:
            assert "default" not in fact, key
        else:
            default = tuple(fact["default"]) if isinstance(fact["default"], list) else fact["default"]
            assert default == param.default and type(default) is type(param.default), key
        domain = (-math.inf, math.inf) if param.domain is None else param.domain
        assert tuple(fact.get("domain", (-math.inf, math.inf))) == domain, key
        assert tuple(fact["choices"]) == param.choices if "choices" in fact else param.choices is None, key
        assert fact.get("per_model", False) == param.per_model, key
        assert fact.get("optional", False) == param.optional, key


def test_flags(both):
    page, _ = both
    described = page.front.get("flags", {})
    notes = testing.flags(page.name)
    assert sorted(described) == sorted(notes)
    shown = {flag for case in testing.vectors(page.name) for flag in case.flags}
    section = page.sections["Where implementations disagree"]
    for flag, fact in described.items():
        assert fact == {"description": notes[flag]["description"], "who": notes[flag]["who"]}, flag
        assert flag in shown, f"{flag}: no vector shows it"
        assert f"**{flag}**" in section, f"{flag} is not explained"
        assert re.search(rf"\*\*{flag}\*\*[^\n]*(?:\n(?!- \*\*)[^\n]*)*\d", section), f"{flag}: no numbers"


def test_laws(both):
    page, _ = both
    laws = page.front["laws"]
    assert len(laws) == len(set(laws))
    assert set(laws) <= LAWS.keys(), set(laws) - LAWS.keys()
    assert page.front.get("law_ulps", {}).keys() <= {*laws}
    assert [law for law in laws if f"`{law}`" not in page.sections["Laws"]] == []


# --- Procedures and recipes -------------------------------------------------------------------------------------------

OTHERS = [(kind, name) for kind in ("procedure", "recipe") for name in pages.names(kind)]


def test_every_procedure_has_a_page_in_its_family():
    assert pages.names("procedure") == registry.procedures()
    for name in registry.procedures():
        found = registry.procedure(name)
        assert found.name == name
        assert found.run.__module__ == f"refmerge.procedures.{pages.page(name).family}.{name}"
        assert found.paper == pages.page(name).front["paper"]


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_front_matter_of_others(kind, name):
    page = pages.page(name)
    needed = {"kind", "name", "family", "paper", "source", "cite"} | ({"example"} if kind == "recipe" else set())
    assert needed <= page.front.keys() <= needed | {"confidence", "params", "flags"}
    assert (page.front["name"], page.front["family"]) == (name, page.family)
    assert tuple(page.sections) == pages.SECTIONS_OF[kind]
    assert all(page.sections.values())
    assert ">>> " in page.sections["Worked example"]
    assert not registry._files().keys() & {name}, f"{name} is a method"


@pytest.mark.parametrize("name", pages.names("procedure"))
def test_parameters_of_procedures(name):
    """The page says what the signature says."""
    said = pages.page(name).front.get("params", {})
    signature = inspect.signature(registry.procedure(name).run).parameters
    keywords = {k: p.default for k, p in signature.items() if p.kind is p.KEYWORD_ONLY}
    assert list(said) == list(keywords)
    for key, default in keywords.items():
        assert said[key]["meaning"].endswith("."), key
        has_default = default is not inspect.Parameter.empty and default is not None
        assert ("default" in said[key]) == has_default, key
        if has_default:
            assert said[key]["default"] == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize("name", pages.names("recipe"))
def test_recipes_give_what_the_page_says(name, tmp_path, monkeypatch):
    """The recipes of a page, run in turn on checkpoints of its numbers, give its result, which was made by hand."""
    example = pages.page(name).front["example"]
    monkeypatch.chdir(tmp_path)
    for path, tensors in example["inputs"].items():
        _save(tmp_path / path, tensors if isinstance(tensors, dict) else {"x": tensors})
    for run in example["runs"]:
        recipe = ROOT / "spec" / "recipes" / run["recipe"]
        copied = tmp_path / run["recipe"]  # paths in a recipe are beside it
        copied.write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
        refmerge.run_recipe(copied, tmp_path / run["out"])
    merged = refmerge.open_checkpoint(tmp_path / example["runs"][-1]["out"])
    expected = example["result"] if isinstance(example["result"], dict) else {"x": example["result"]}
    assert sorted(merged) == sorted(expected)
    for key, x in expected.items():
        np.testing.assert_allclose(merged[key], np.asarray(x), rtol=1e-6, atol=1e-7)


def _save(folder: Path, tensors: dict[str, list]) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file({k: np.asarray(x, np.float32) for k, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')


# --- The text ---------------------------------------------------------------------------------------------------------


def test_sections(both):
    page, _ = both
    assert tuple(page.sections) == pages.SECTIONS
    assert all(page.sections.values())
    assert len(re.findall(r"^\d+\. ", page.sections["Exercises"], re.MULTILINE)) == 3


def test_steps_of_the_definition_are_those_of_the_code(both):
    page, method = both
    assert page.steps == [(s.number, s.title) for s in outline(method)[1:]]
    assert [number for number, _ in page.steps] == list(range(1, len(page.steps) + 1))


def test_doctests_are_there(both):
    page, _ = both
    for section in ("Worked example", "Where it fails", "Exercises"):
        assert ">>> " in page.sections[section], section


def test_worked_example(both):
    page, method = both
    e = page.example
    got = refmerge.call(method, e.models, e.base, **e.params)
    assert np.size(got) == 6
    assert _six_digits(got) == _six_digits(e.result)


def _six_digits(x) -> list[str]:
    return [f"{float(v) + 0.0:.6g}" for v in np.ravel(np.asarray(x, dtype=np.float64))]


def test_links_lead_somewhere():
    for page in (ROOT / "spec").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_path_through_the_pages_links_what_there_is():
    text = (ROOT / "spec" / "README.md").read_text(encoding="utf-8")
    path = text.partition("## A path through the pages")[2].partition("\n## ")[0]
    unlinked = set(re.findall(r"(?<!\[)`(\w+)`", path))
    there = {name for kind in pages.SECTIONS_OF for name in pages.names(kind)}
    assert unlinked.isdisjoint(there), f"link {sorted(unlinked & there)}: they have pages now"


# --- The picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_picture_is_what_the_command_draws(name):
    page = pages.page(name)
    stored = (resources.files("refmerge.spec") / page.family / f"{name}.svg").read_bytes()
    assert len(stored) < 20_000
    assert stored == pages.draw(name).encode(), f"python -m refmerge.pages draw {name}"
    assert f"({name}.svg)" in page.sections["Picture"]


# --- Explaining -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", refmerge.methods())
def test_explain_gives_the_steps_and_the_result(name):
    before = sys.gettrace()
    steps = explain(name)
    assert sys.gettrace() is before
    assert [s.number for s in steps] == list(range(len(steps))) and len(steps) > 1
    assert sum(s.result is not None for s in steps) == 1
    given = steps[0].values
    example = pages.example_for(registry.get(name))
    expected = refmerge.call(name, example.models, example.base, **example.params)
    testing.assert_same(next(s.result for s in steps if s.result is not None), expected)
    testing.assert_same(given["models"][0], np.asarray(example.models[0], dtype=np.float64))
    text = render(steps)
    assert all(f"{s.number}. {s.title}" in text for s in steps[1:])
    assert all(len(line) < 160 for line in text.splitlines())


def test_explain_gives_values_as_they_were():
    steps = explain("ties", base=[0, 0, 0, 0], models=[[1, 2, 3, 4], [4, -3, 2, 1]], density=0.5)
    assert [s.title for s in steps] == ["given", "task vectors", "trim", "elect sign", "disjoint merge"]
    assert steps[2].lines == ["tau = trim(tau, group, density)"]
    assert steps[1].values["tau"][1].tolist() == [4, -3, 2, 1]
    assert steps[2].values["tau"][1].tolist() == [4, -3, 0, 0]
    assert steps[3].values["gamma"].tolist() == [1, -1, 1, 1]
    assert steps[4].result.tolist() == [4, -3, 3, 4]


def test_explain_marks_what_a_branch_left_out():
    steps = explain("slerp", models=[[1, 0], [2, 0]])
    assert [s.ran for s in steps] == [True, True, True, False]
    assert "not reached" in render(steps)


def test_explain_leaves_a_trace_function_alone():
    def tracer(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        explain("ties")
        assert sys.gettrace() is tracer
        with pytest.raises(refmerge.UsageError):
            explain("linear", models=[[1], [2]], weight=[1.0, -1.0])
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


# --- The rules of a method's text -------------------------------------------------------------------------------------

# What the methods call their arrays. Divided by a number, torch multiplies them by its reciprocal, which rounds twice.
ARRAYS = {"models", "base", "tau", "gamma", "delta", "theta", "theta_0", "theta_1", "D", "W", "T", "sparse", "mixed"}


def _name(node: ast.AST) -> str:
    """The variable, also under an index: tau for tau, tau[0] and tau_n."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.id.removesuffix("_n") if isinstance(node, ast.Name) else ""


def _dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT / "refmerge")))
def test_text_of_a_method(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Attribute):
            assert node.attr not in ("device", "cpu", "cuda", "detach", "lerp", "addcmul"), ast.unparse(node)
        elif isinstance(node, ast.Name):
            assert node.id not in ("torch", "cupy", "jax", "array_api_strict"), f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.Call):
            rounds = re.fullmatch(r"xp\.(sqrt|exp|log|sin|cos|tan|acos|sum|mean|std|var|prod|dot)", _dotted(node.func))
            assert not rounds, f"line {node.lineno}: {ast.unparse(node)} differs from one library to another"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            array = {_name(node.left), _name(node.right)} & ARRAYS
            number = isinstance(node.left, ast.Constant) or isinstance(node.right, ast.Constant)
            assert not (array and number), f"line {node.lineno}: {ast.unparse(node)}: multiply by a host coefficient"
        elif isinstance(node, ast.For | ast.comprehension):
            assert "block" not in ast.unparse(node.target), f"{file.name}: blocks are the engine's"
    assert imported <= {"refmerge", "numpy", "math", "itertools", "functools", "fnmatch", "typing", "collections", ""}
    if "numpy" not in imported:
        assert "astype(" not in file.read_text(encoding="utf-8")
    else:  # host scores alone
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "astype":
                assert not _dotted(node.value).startswith("xp"), ast.unparse(node)


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT / "refmerge")))
def test_a_long_method_says_why(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 80 or lines[0].startswith("# Longer than others: ")


def test_vectors_name_their_method():
    for name in testing.names():
        text = (resources.files("refmerge.spec") / "vectors" / f"{name}.json").read_text(encoding="utf-8")
        assert json.loads(text)["method"] == name
