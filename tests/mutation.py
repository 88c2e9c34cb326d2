"""Do the vectors alone tell a wrong implementation from a right one? Changes the text of every method, one place at a time.

    python -m tests.mutation [METHOD ...]       writes spec/mutation.md, or, for some methods, prints their survivors

It needs the cosmic-ray package. A mutant is killed where a vector of its method fails, or of a method that takes a step from
its file. Those that survive are wrong in a way that no vector shows, or are no different: tests/mutation.toml says why, and
the rest is listed as unexplained.
"""

from __future__ import annotations

import ast
import importlib
import re
import signal
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from unittest.mock import patch

import numpy as np
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

import refmerge
from refmerge import pages, registry, testing
from refmerge.method import Method

ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Pow"}
COMPARISONS = {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}
OTHERS = {"AddNot", "NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
          "ZeroIterationForLoop", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub"}  # fmt: skip
SECONDS = 20  # in which the vectors of a method have long been run


@dataclass(frozen=True)
class Mutant:
    """line: of the method's file. before, after: that line, without its indentation."""

    method: str
    line: int
    before: str
    after: str
    code: str


def operators() -> list[str]:
    found = []
    for name in operator_names():
        kind = name.removeprefix("core/")
        both = set(kind.rpartition("Operator_")[2].split("_"))
        binary = kind.startswith("ReplaceBinaryOperator") and both <= ARITHMETIC
        comparison = kind.startswith("ReplaceComparisonOperator") and both <= COMPARISONS
        if binary or comparison or kind in OTHERS:
            found.append(name)
    return found


def methods() -> list[str]:
    """The papers' methods that have vectors of their own semantics."""
    return [n for n in testing.names() if n in registry.names() and any(testing.vectors(n, n))]


def mutants(name: str) -> Iterator[Mutant]:
    """Each once, without those of the declaration above the function, which the page has too, and of types."""
    code = text(name)
    tree = ast.parse(code)
    seen = {ast.dump(tree)}
    above = [d for node in tree.body if isinstance(node, ast.FunctionDef) for d in node.decorator_list]
    declared = {line for d in above for line in range(d.lineno, (d.end_lineno or d.lineno) + 1)}
    for operator in operators():
        occurrence = 0
        while (changed := mutate_code(code, get_operator(operator)(), occurrence)) is not None:
            occurrence += 1
            try:
                dumped = ast.dump(ast.parse(changed))
            except SyntaxError:  # the star of a signature is no product
                continue
            if dumped in seen:
                continue
            seen.add(dumped)
            lines = list(zip(code.splitlines(), changed.splitlines()))
            at = next(i for i, (a, b) in enumerate(lines) if a != b)
            if at + 1 in declared:
                continue
            yield Mutant(name, at + 1, lines[at][0].strip(), lines[at][1].strip(), changed)


class Slow(BaseException):
    """The vectors did not come to an end."""


def killed_by(mutant: Mutant) -> str:
    """The vector that fails, or what else gives it away; nothing where it survives."""
    changed = types.ModuleType("mutant")
    try:
        exec(compile(mutant.code, "mutant", "exec"), changed.__dict__)
        killer = failing(mutant.method, changed)
        place = registry._files()[mutant.method][0]
        for name in () if killer else takers(mutant.method):
            with patch.dict(sys.modules, {place: changed}):
                taker = types.ModuleType("taker")
                exec(compile(text(name), "taker", "exec"), taker.__dict__)
            if killer := failing(name, taker):
                break
        return killer
    except Slow:
        return "a vector that does not end"
    except Exception as e:
        return f"{type(e).__name__} when it is read"


def failing(name: str, module: types.ModuleType) -> str:
    """The first vector of the paper's semantics that the method of this name in the module does not pass, if any."""
    method = next(x for x in vars(module).values() if isinstance(x, Method) and x.name == name)
    for case in testing.vectors(name, name):
        if testing.outcome(case, partial(refmerge.merge, case.models, method, **case.call)):
            return case.id
    return ""


def text(name: str) -> str:
    """Of the file of a method."""
    return Path(str(importlib.import_module(registry._files()[name][0]).__file__)).read_text(encoding="utf-8")


@cache
def takers(name: str) -> list[str]:
    """The methods that import something from the file of this one."""
    return [n for n in methods() if f"from {registry._files()[name][0]} import" in text(n)]


def survivors(name: str) -> tuple[int, list[Mutant]]:
    """(how many mutants there are, those that no vector kills)."""

    def too_slow(*_: object) -> None:
        raise Slow

    if case := failing(name, importlib.import_module(registry._files()[name][0])):
        raise SystemExit(f"{case} fails as things are, and would kill all mutants")
    signal.signal(signal.SIGALRM, too_slow)
    count, left = 0, []
    for mutant in mutants(name):
        signal.alarm(SECONDS)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            killer = killed_by(mutant)
        signal.alarm(0)
        count += 1
        left += [] if killer else [mutant]
    return count, left


def reasons() -> list[dict[str, str]]:
    """[[survivor]] tables: method and a regular expression for "before -> after", and why it is no difference."""
    return tomllib.loads((Path(__file__).parent / "mutation.toml").read_text(encoding="utf-8"))["survivor"]


def explained(mutant: Mutant, known: list[dict[str, str]]) -> str:
    change = f"{mutant.before} -> {mutant.after}"
    return next((r["why"] for r in known if r["method"] == mutant.method and re.search(r["change"], change)), "")


HEAD = """# Mutation

How good the vectors are: `python -m tests.mutation` changes the text of each method in one place (an operator, a
comparison, a number, a condition, a loop that is not run) and runs the method's vectors of the paper's semantics, and
nothing else, on what comes of it. A mutant that passes them all survives. Users of other languages have only the vectors;
what survives is what they can get wrong unseen.

**{killed} of {count} mutants are killed, {score:.1%}.** Of the {left} that survive, {equal} have the reason that is given
below; {open} are unexplained.

| method | mutants | killed | survive |
|---|---|---|---|
"""


def main(names: list[str]) -> None:
    known = reasons()
    found = {name: survivors(name) for name in names or methods()}
    left = [m for _, ms in found.values() for m in ms]
    told = [
        f"- `{m.method}` line {m.line}: `{m.before}` to `{m.after}`: {explained(m, known) or '**unexplained**'}"
        for m in left
    ]
    if names:
        print("\n".join([*told, *(f"{n}: {len(ms)} of {count} survive" for n, (count, ms) in found.items())]))
        return
    count, equal = sum(c for c, _ in found.values()), sum(bool(explained(m, known)) for m in left)
    text = HEAD.format(
        killed=count - len(left), count=count, score=(count - len(left)) / count, left=len(left), equal=equal,
        open=len(left) - equal,
    )  # fmt: skip
    for name, (c, ms) in found.items():
        text += f"| [{name}]({pages.page(name).family}/{name}.md) | {c} | {c - len(ms)} | {len(ms)} |\n"
    text += "\n## What survives\n\n" + "\n".join(told) + "\n"
    Path(str(resources.files("refmerge.spec") / "mutation.md")).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
