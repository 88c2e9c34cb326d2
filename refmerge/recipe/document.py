"""YAML text -> plain data, with the line and column of everything in it.

Recipes come from strangers, so the text is data and nothing else: no custom tags, no duplicate keys, numbers that are
finite and that every YAML version reads alike, and aliases only as far as they stay small.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from refmerge.errors import RecipeError

Path = tuple[Any, ...]

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
MAX_SHOWN = 20

_TAG = "tag:yaml.org,2002:"
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def quote(value: Any) -> str:
    """The value as a message shows it: short, and with control characters escaped."""
    return _short.repr(value)


@dataclass(frozen=True)
class Document:
    """Plain data and where it came from: path of keys and indices -> (line, column), counted from 1."""

    source: str
    data: Any
    marks: Mapping[Path, tuple[int, int]]


@dataclass
class Problems:
    """Everything wrong with one document, so that its author hears of it at once."""

    source: str
    marks: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    found: dict[tuple[int, int, str], None] = field(default_factory=dict)

    def add(self, path: Path, message: str) -> None:
        """Note a problem at the deepest part of the path whose place is known."""
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self.marks), None)
        line, column = (0, 0) if known is None else self.marks[known]
        self.found[line, column, message] = None

    def error(self) -> RecipeError:
        """One error for all problems, in the order of the text."""
        lines = [f"line {line}, column {column}: {text}" if line else text for line, column, text in sorted(self.found)]
        if len(lines) == 1:
            return RecipeError(f"{self.source}: {lines[0]}")
        more = [f"and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
        return RecipeError("\n  ".join([f"{self.source}: {len(lines)} problems", *lines[:MAX_SHOWN], *more]))

    def check(self) -> None:
        """Raise the RecipeError if there are problems."""
        if self.found:
            raise self.error()


def read_document(text: str, source: str) -> Document:
    """Parse one YAML document. RecipeError names line and column of everything that is refused."""
    return _read(text, source, several=False)[0]


def read_documents(text: str, source: str) -> list[Document]:
    """Parse a file of YAML documents, one after the other; those without content are left out."""
    found = _read(text, source, several=True)
    return [d for d in found if d.data is not None] or found[:1]


def _read(text: str, source: str, several: bool) -> list[Document]:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(f"{source}: larger than {MAX_BYTES} bytes, which no recipe needs")
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False
    documents, values = [], 0
    try:
        for root in yaml.compose_all(text) if several else [yaml.compose(text)]:
            reader = _Reader(source, values)
            data = None if root is None else reader.value(root, ())
            reader.problems.check()
            documents.append(Document(source, data, reader.marks))
            values = reader.values
    except RecipeError:
        raise
    except MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part.strip() for part in (e.context, e.problem) if part)
        raise RecipeError(f"{source}: {place}{what or 'not YAML'}") from None
    except ReaderError as e:
        character = chr(e.character)
        before = text.partition(character)[0].split("\n")
        place = f"line {len(before)}, column {len(before[-1]) + 1}"
        raise RecipeError(f"{source}: {place}: the character {quote(character)} is not allowed in YAML") from None
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply") from None
    except Exception as e:
        # On damaged text ruamel raises what its own code stumbles over: ValueError for the tag !%25, for one.
        raise RecipeError(f"{source}: not YAML: {quote(str(e).partition(chr(10))[0])}") from None
    return documents or [Document(source, None, {})]


class _Reader:
    """Turns nodes into plain data. Aliases arrive as the same node again and are copied out."""

    def __init__(self, source: str, values: int):
        self.marks: dict[Path, tuple[int, int]] = {}
        self.problems = Problems(source, self.marks)
        self.values = values  # of documents before this one, too
        self.open: set[int] = set()

    def value(self, node: Node, path: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            line, column = _place(node)
            where = f"{self.problems.source}: line {line}, column {column}"
            raise RecipeError(f"{where}: more than {MAX_VALUES} values, with aliases copied out")
        self.marks.setdefault(path, _place(node))
        if isinstance(node, ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open:
            self.problems.add(path, "an alias inside the very list or mapping that it stands for")
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                self.expect_tag(node, "seq", path)
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, MappingNode)
            self.expect_tag(node, "map", path)
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def expect_tag(self, node: Node, kind: str, path: Path) -> None:
        if node.tag != _TAG + kind:
            self.problems.add(path, f"tag {quote(str(node.tag))} is not allowed in a recipe")

    def mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                self.merge(value_node, path, merged)
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag != _TAG + "str":
                self.marks[(*path, None)] = _place(key_node)
                self.problems.add((*path, None), "a key must be text")
                continue
            key = self.text(key_node.value, path)
            self.marks[(*path, key)] = _place(key_node)
            if key in own:
                self.problems.add((*path, key), f"duplicate key {quote(key)}")
            own[key] = self.value(value_node, (*path, key))
        return {**merged, **own}

    def merge(self, node: Node, path: Path, merged: dict[str, Any]) -> None:
        """`<<: *other`: of several mappings the first one wins, and the mapping's own keys over all of them."""
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            found = self.value(source, path) if isinstance(source, MappingNode) else None
            if found is None:
                self.problems.add(path, "<< takes a mapping or a list of mappings")
                continue
            for key, value in found.items():
                merged.setdefault(key, value)

    def scalar(self, node: ScalarNode, path: Path) -> Any:
        text: str = node.value
        match str(node.tag).removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() in ("true", "yes", "on")
            case "int" | "float" as kind:
                return self.number(text, kind, path)
            case "str" | "timestamp" | "value":
                return self.text(text, path)
        self.problems.add(path, f"tag {quote(str(node.tag))} is not allowed in a recipe")
        return None

    def text(self, text: str, path: Path) -> str:
        # Neither a file name nor JSON can hold these; escapes in double quotes can make them.
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            self.problems.add(path, f"{quote(text)} holds a NUL character or half a surrogate pair")
        return text

    def number(self, text: str, kind: str, path: Path) -> int | float | None:
        digits = text.replace("_", "")
        if digits.lower().lstrip("+-") in (".inf", ".nan"):
            self.problems.add(path, f"{quote(text)} is not a finite number")
            return None
        try:
            # Base 0 refuses 010, which is 8 in YAML 1.1 and 10 in YAML 1.2.
            number = int(digits, 0) if kind == "int" else float(digits)
        except ValueError:
            self.problems.add(path, f"{quote(text)} is not a number that every YAML version reads alike")
            return None
        if not math.isfinite(number):
            self.problems.add(path, f"{quote(text)} is not a finite number")
            return None
        if kind == "int" and abs(number) >= 2**63:
            self.problems.add(path, f"{quote(text)} does not fit into 64 bits")
            return None
        return number


def _place(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
