"""Which test vector tests which step and which sentence of a page, and how many vectors there are.

    python -m tests.matrix       writes spec/vectors/matrix.md, and the numbers in spec/vectors/collection.json

Both follow from spec/vectors/<method>.json and the tables [cases] and [untested] of tests/vector_cases/<method>.toml.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from refmerge import pages, testing

SPEC = Path(__file__).parent.parent / "spec"
CASES = Path(__file__).with_name("vector_cases")

HEAD = """# What the vectors test

Each step of a page's definition and each sentence of its edge cases, with the ids of the vectors under the plain name that
test it, of a recipe under any, without the method's name before them, or why no vector can. Made by `python -m
tests.matrix`.
"""


def mapped() -> dict[str, dict[str, str]]:
    """Methods whose cases say what of the page they test -> the places that no vector can test, with the reasons."""
    found = {}
    for method in testing.names():
        notes = tomllib.loads((CASES / f"{method}.toml").read_text(encoding="utf-8"))
        if "cases" in notes:
            page = pages.page(method)
            found[method] = {page.place(words).key: reason for words, reason in notes.get("untested", {}).items()}
    return found


def own(method: str) -> list[testing.Case]:
    """The cases under the plain name; a recipe has none, and all of its cases are of its page."""
    return list(testing.vectors(method, None if pages.page(method).kind == "recipe" else method))


def tested(method: str) -> dict[str, list[str]]:
    """Key of a place of the page -> ids of its own cases that test it."""
    page = pages.page(method)
    found: dict[str, list[str]] = {place.key: [] for place in page.places}
    for case in own(method):
        for words in case.page:
            found[page.place(words).key].append(case.id)
    return found


def section(method: str, untested: dict[str, str]) -> str:
    page, ids_of = pages.page(method), tested(method)
    lines = [f"## {method}\n", "| of the page | tested by |", "|---|---|"]
    for place in page.places:
        ids = ", ".join(id.removeprefix(f"{method}-") for id in ids_of[place.key])
        if ids or place.key in untested:
            label = f"{place.key}, {place.text}" if place.key.startswith("step ") else place.text
            words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", label)  # a link within a link is none
            link = re.sub(r"([|\[\]])", r"\\\1", words)
            lines.append(f"| [{link}](../{page.family}/{method}.md#L{place.line}) | {ids or untested[place.key]} |")
    return "\n".join(lines) + "\n"


def matrix() -> str:
    return "\n".join([HEAD, *(section(method, untested) for method, untested in mapped().items())])


def collection() -> dict[str, Any]:
    """The facts of the collection, with the numbers as they are now."""
    facts = json.loads((SPEC / "vectors" / "collection.json").read_text(encoding="utf-8"))
    counts = {"methods": len(testing.names()), "tests": sum(1 for name in testing.names() for _ in testing.vectors(name))}
    return facts | counts


if __name__ == "__main__":
    (SPEC / "vectors" / "matrix.md").write_text(matrix(), encoding="utf-8", newline="\n")
    text = json.dumps(collection(), indent=1, ensure_ascii=False) + "\n"
    (SPEC / "vectors" / "collection.json").write_text(text, encoding="utf-8", newline="\n")
