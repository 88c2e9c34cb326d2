"""The catalogue of what there is: everything in it can be shown, in any width, and cited."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from refmerge import catalogue, cli, pages, registry, show
from refmerge.errors import UsageError
from refmerge.pages import Page

ENTRIES = catalogue.entries()


def test_everything_is_in_it_once():
    names = [e.name for e in ENTRIES]
    assert len(names) == len(set(names))
    assert set(names) == {*registry.names(), *registry.procedures(), *pages.names("recipe")}
    assert [bool(e.tool) for e in ENTRIES] == sorted(bool(e.tool) for e in ENTRIES), "other tools come after"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_every_entry_can_be_shown(entry, monkeypatch):
    told = json.loads(json.dumps(catalogue.described(entry)))
    assert told["name"] == entry.name and told["kind"] in pages.SECTIONS_OF
    assert told["family"] or not entry.ours, "a page, or vectors that name the entry, say where it belongs"
    assert entry.summary and "\n" not in entry.summary
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        for whole in (False, True):
            text = show.printed(show.sheet(entry, whole))
            assert "\033" not in text
            assert max(map(len, text.splitlines())) <= columns
            assert not re.search(r"\*\*[A-Za-z][\w -]*\w\*\*|\]\([\w/.]+\.md|^```", text, re.MULTILINE), (
                "Markdown is set, not shown"
            )
    if entry.ours and not entry.tool:
        for section in entry.page.sections:
            assert section in ("Picture", "Laws", show.DISAGREE) or f"\n{section}\n" in text, section
        for flag in entry.page.front.get("flags", {}):
            assert f"  {flag}: " in text


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.ours], ids=lambda e: e.name)
def test_every_entry_can_be_cited(entry):
    for one in catalogue.bibtex(entry).split("\n\n"):
        assert re.fullmatch(r"@misc\{[\w:-]+,\n(  \w+ += \{.+\},\n)+  \w+ += \{.+\}\n\}", one), one
        assert one.count("{") == one.count("}")
        assert not re.search(r"(?<!\\)[&%#]", re.sub(r"url +=.*", "", one))


def test_differences_are_the_flags_that_name_the_tool():
    found = {flag: theirs for flag, _, theirs in catalogue.differences(catalogue.find("mergekit:ties"))}
    assert found["TiesKeepsAtLeastOne"] == {"mergekit 0.1.5": "one is kept", "mergekit 0.1.4": "an assertion fails"}
    expected = {
        f for f, fact in pages.page("ties").front["flags"].items() if any(w.startswith("mergekit") for w in fact["who"])
    }
    assert found.keys() == expected
    assert catalogue.differences(catalogue.find("ties")) == []


def test_an_entry_under_another_name_finds_its_page():
    assert "linear" in [p.name for p in catalogue.find("official:uniform_soup").pages]
    assert "dare_linear" in [p.name for p in catalogue.find("official:dare").pages]


@pytest.fixture
def stew(monkeypatch):
    """A page of a recipe, as if it were among the pages."""
    front = {
        "kind": "recipe", "name": "stew", "family": "averaging", "paper": "arXiv:2302.12480", "source": "none",
        "cite": {"key": "x2020stew", "title": "Stew & more", "author": "A B and C D", "year": 2020},
        "example": {"runs": [{"recipe": "rws.yml", "out": "./a"}, {"recipe": "rws.yml", "out": "./b"}]},
    }  # fmt: skip
    prose = dict.fromkeys(pages.SECTIONS_OF["recipe"], "Some text.")
    found, page = pages._found(), pages.page
    made = Page("stew", "averaging", "# Stewing\n", front, prose)
    monkeypatch.setattr(pages, "_found", lambda: {**found, "stew": "averaging"})
    monkeypatch.setattr(pages, "page", lambda name: made if name == "stew" else page(name))


def test_a_recipe_page(stew):
    entry = catalogue.find("stew")
    assert (entry.kind, entry.page.family, entry.code) == ("recipe", "averaging", None)
    said = (
        "Robustness to fog, and some to snow, patched into the first convolutions of a clean model, the first of the models."
    )
    assert entry.summary == f"Stewing: {said}"
    assert catalogue.described(entry)["recipes"] == ["rws.yml"]
    text = show.printed(show.sheet(entry))
    assert "Recipe: spec/recipes/rws.yml" in text and "  merge_method: rws\n" in text and "Who disagrees" not in text
    assert "title         = {{Stew \\& more}}" in catalogue.bibtex(entry)
    lines = show.catalogue(catalogue.entries()).splitlines()
    (line,) = [x for x in lines if x.startswith("  stew")]
    assert line.endswith(f"  recipe: Stewing: {said}")
    assert lines.index(line) < lines.index("task_vectors")
    with pytest.raises(UsageError, match="did you mean stew"):
        catalogue.find("stews")


def test_recipes_and_procedures_are_no_methods(stew):
    for name, kind in (("stew", "recipe"), ("rws_signature", "procedure")):
        with pytest.raises(UsageError, match=f"{name} is a {kind} and not a method"):
            registry.get(name)
        told = CliRunner().invoke(cli.main, ["explain", name])
        assert told.exit_code == 2 and f"{name} is a {kind}, and only methods have steps" in told.output


def test_text_is_set():
    given = (
        "One *two* **three** `four * five` [six](seven.md) and 2 * 3 * 4.\n\n- a\n  b\n- c\n\n| x | y |\n|---|---|\n"
        "| `1` | 2 |\n\n1. code:\n\n   ```python\n   >>> f(x)\n   ```\n\n![picture](a.svg)"
    )
    text = show.printed(show.Group(*show._markdown(given)))
    assert text == "One two three four * five six and 2 * 3 * 4.\n\n- a b\n- c\n\nx  y\n1  2\n\n1. code:\n\n   >>> f(x)"
