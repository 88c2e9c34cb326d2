"""The published page of surviving mutants fits the methods and the reasons as they are. It is made by tests/mutation.py."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from tests import mutation

PAGE = (resources.files("refmerge.spec") / "mutation.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[(\w+)\]\(\w+/\w+\.md\) \| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
KNOWN = mutation.reasons()


def survivors() -> list[tuple[str, str, str, str]]:
    """(method, reason, before, after), in the page's order."""
    found, method, why = [], "", ""
    for line in PAGE.partition("## What survives\n")[2].splitlines():
        if line.startswith("### "):
            method = line.removeprefix("### ")
        elif line.startswith("- "):
            why = line.removeprefix("- ")
        elif line:
            before, after = re.fullmatch(r"  - `(.*)` to `(.*)`", line).groups()
            found.append((method, why, before, after))
    return found


FOUND = survivors()


def test_every_method_is_there():
    assert [name for name, *_ in ROWS] == mutation.methods()


@pytest.mark.parametrize("name, text", [row[:2] for row in ROWS])
def test_the_texts_are_those_that_were_changed(name, text):
    assert mutation.fingerprint(name) == text, f"{name} is not as it was: python -m tests.mutation makes the page again"


def test_numbers_add_up():
    counts = [tuple(map(int, row[2:])) for row in ROWS]
    assert all(count == killed + left for count, killed, left in counts)
    count, killed, left = map(sum, zip(*counts))
    score = f"**{killed} of {count} mutants are killed, {killed / count:.1%}.** Of the {left} that survive, {left} have"
    assert score in PAGE, "the page says another number, or some are unexplained"
    for name, *_, survive in ROWS:
        assert sum(method == name for method, *_ in FOUND) == int(survive), name


@pytest.mark.parametrize("name", sorted({method for method, *_ in FOUND}))
def test_survivors_are_of_the_text_as_it_is(name):
    lines = {line.strip() for line in mutation.text(name).splitlines()}
    gone = [before for method, _, before, _ in FOUND if method == name and before not in lines]
    assert not gone, f"no line of {name} any more: {gone}; python -m tests.mutation makes the page again"


def test_each_has_its_reason():
    for method, why, before, after in FOUND:
        mutant = mutation.Mutant(method, 0, before, after, "")
        assert mutation.explained(mutant, KNOWN) == why, f"{method}: {before} -> {after}"


def test_each_reason_explains_one():
    for reason in KNOWN:
        alone = [reason]
        assert any(
            mutation.explained(mutation.Mutant(method, 0, before, after, ""), alone) for method, _, before, after in FOUND
        ), f"nothing survives for the reason {reason}"


def test_what_is_not_run_is_said():
    for name in mutation.recipes():
        assert f"`{name}`" in PAGE
