"""The catalogue and its pages for people, in a terminal: wrapped to its width, with colours where it has them.

`catalogue` gives one line an entry, `sheet` what a page says of one: its facts, and its prose, which is the Markdown of
the pages and no more of Markdown than these use. Both give what rich prints.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from textwrap import wrap
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from refmerge.catalogue import Entry, differences, recipe_text, recipes
from refmerge.method import Method, Param
from refmerge.pages import Page
from refmerge.work import stat_name

__all__ = ["catalogue", "printed", "sheet"]

NARROW, WIDE = 80, 120  # the width where there is no terminal, and the widest that text is set
DISAGREE = "Where implementations disagree"
BRIEF = ("Purpose", "Definition", "Edge cases")  # what a sheet has of a page's prose; the rest on request
HEADING, NAME, CODE, FAINT = "bold", "bold", "cyan", "dim"
FROM = "the model that the others were fine-tuned from"


def printed(thing: RenderableType, widest: int | None = WIDE) -> str:
    """As text for standard output: as wide as the terminal, or as COLUMNS says, and with colours only on a terminal."""
    columns = shutil.get_terminal_size((NARROW, 24)).columns
    width = columns if widest is None else min(columns, widest)
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(thing)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


# ------------------------------------------------------------------------------------------------------------- catalogue


def catalogue(entries: Sequence[Entry]) -> str:
    """A line an entry: by family, then what came from other packages, then by tool. On a terminal lines are cut at its
    width, elsewhere they are whole."""
    widths = {tool: max((len(e.name) for e in entries if bool(e.tool) == tool), default=0) for tool in (False, True)}
    lines: list[Text] = []
    for (_, heading), group in groupby(sorted(entries, key=_place), key=_place):
        lines += [*([Text("")] if lines else []), Text(heading, style=HEADING)]
        for e in group:
            kind = "" if e.kind == "method" else f"{e.kind}: "
            name = e.name.ljust(widths[bool(e.tool)])
            lines.append(Text(f"  {name}  {kind}{e.summary}", no_wrap=True, overflow="ellipsis"))
    if sys.stdout.isatty():
        hint = Text("\n`refmerge methods NAME` shows one.", style=FAINT)
        return printed(Group(*lines, hint), widest=None)
    return "\n".join(line.plain for line in lines)


def _place(e: Entry) -> tuple[int, str]:
    if e.tool:
        return 2, f"{e.tool}: as {_whose(e.tool)} computes it"
    return (0, e.page.family) if e.page is not None else (1, "from other packages")


def _whose(tool: str) -> str:
    return "the authors' code" if tool == "official" else tool


# ----------------------------------------------------------------------------------------------------------------- sheet


def sheet(entry: Entry, whole: bool = False) -> RenderableType:
    """What there is to know of an entry; `whole` adds the sections of its page that are read beside, not looked up."""
    parts = [*_head(entry)]
    page = entry.page if not entry.tool else None
    sections = {} if page is None else {t: s for t, s in page.sections.items() if whole or t in BRIEF}
    parts += _section("Purpose", sections.pop("Purpose", ""))
    parts += _facts("Needs", _needs(entry))
    if entry.tool or page is None:
        parts += _steps(entry)
    parts += _section("Definition", sections.pop("Definition", ""))
    none = [("none", Text(""))] if entry.code is not None else []
    parts += _facts("Parameters", list(_parameters(entry, page)) or none)
    for file in recipes(page) if page is not None and entry.kind == "recipe" else ():
        parts += [*_heading(f"Recipe: spec/recipes/{file}"), _indented(_Code(recipe_text(file)))]
    parts += _section("Edge cases", sections.pop("Edge cases", ""))
    parts += _facts("Laws", _laws(page))
    if entry.tool:
        parts += _differences(entry)
    elif page is not None:
        parts += _heading("Who disagrees") if page.front.get("flags") else []
        parts += [_flag(flag, fact, fact["who"]) for flag, fact in page.front.get("flags", {}).items()]
        if not page.front.get("flags"):
            sections.setdefault(DISAGREE, page.sections[DISAGREE])
    for title, facts in (("Laws", page and page.front.get("laws")), (DISAGREE, page and page.front.get("flags"))):
        parts += _section(f"{title}, explained" if facts else title, sections.pop(title, ""))
    for title, text in sections.items():
        parts += _section(title, text)
    if page is not None:
        parts += _citation(page)
    parts += _facts("See also", _see_also(entry, whole))
    return Group(*parts)


def _head(entry: Entry) -> Iterator[RenderableType]:
    page = entry.page
    yield Text.assemble((entry.name, HEADING), f"   {page.title}" if page is not None and not entry.tool else "")
    what = f"as {_whose(entry.tool)} computes it" if entry.tool else entry.kind
    yield Text("; ".join([what, *([page.family] if page is not None else []), entry.source]), style=FAINT)
    if entry.code is not None:
        yield Text("")
        yield Group(*_markdown(entry.code.doc))
    if page is not None and not entry.tool and page.front.get("confidence"):
        yield Text("")
        yield _inline(f"Confidence: {page.front['confidence']}.")


def _needs(entry: Entry) -> list[tuple[str, RenderableType]]:
    code = entry.code
    if code is None:
        return []
    if not isinstance(code, Method):
        signature = str(inspect.signature(code.run))
        text = f"from {code.run.__module__} import {entry.name}\n{entry.name}{signature}"
        return [("call", _Code(text))]
    least, most = code.models
    count = f"{least} or more" if most is None else f"{least}" if most == least else f"{least} to {most}"
    kinds = {"draw": "a recorded draw, in place of the seed's", "element": "a number for each entry", "whole": "an array"}
    data = [f"{stat_name('<tensor>', key)}: {kinds[kind]}" for key, kind in code.stats.items()]
    views = {"flat": "a block at a time", "rows": "whole rows", "tensor": "whole tensors", "model": "whole models"}
    view = "depends on parameters and shape" if callable(code.view) else views[code.view]
    over = code.over if isinstance(code.over, str) else "group"
    return [
        ("base", Text("none" if not code.takes_base else FROM + (", or none" if code.optional_base else ""))),
        ("models", Text(count)),
        ("data", Text("\n".join(data) or "none")),
        ("draws", Text("at random, from the seed" if "rng" in code.asks else "none")),
        ("memory", Text(view + (f"; sums and ranks are over the {over}" if "group" in code.asks else ""))),
        *([("outputs", Text(", ".join(code.outputs)))] if code.outputs else []),
    ]


def _parameters(entry: Entry, page: Page | None) -> Iterator[tuple[str, RenderableType]]:
    said = {} if page is None else page.front.get("params", {})
    if isinstance(entry.code, Method):
        for p in entry.code.params.values():
            fact = said.get(p.name, {})
            yield p.name, Group(Text(_kind_of(p, fact)), *([_inline(fact["meaning"])] if "meaning" in fact else []))
    else:
        for name, fact in said.items():
            default = f"default {fact['default']!r}" if "default" in fact else "no default, or None"
            yield name, Group(Text(default), _inline(fact["meaning"]))


def _kind_of(p: Param, fact: dict[str, Any]) -> str:
    """`float, one or one per model, default 0.2, in [0, 1]; k / d in the paper`."""
    kinds = {"tuple": "list", "object": "number or text", "str": "text", "int": "whole number", "bool": "true or false"}
    default = list(p.default) if isinstance(p.default, tuple) else p.default
    facts = [f"one of {', '.join(map(repr, p.choices))}" if p.choices else kinds.get(p.type.__name__, p.type.__name__)]
    facts += ["one or one per model"] if p.per_model else []
    facts += ["required" if p.required else "none by default" if default is None else f"default {default!r}"]
    facts += [f"in [{p.domain[0]:g}, {p.domain[1]:g}]"] if p.domain else []
    key, symbol = p.name.rstrip("_"), fact.get("symbol", "-")
    notes = [", ".join(facts)]
    notes += [f"{key} in a recipe"] if key != p.name else []
    notes += [f"{symbol} in the paper"] if symbol not in ("-", key) else []
    return "; ".join(notes)


def _laws(page: Page | None) -> list[tuple[str, RenderableType]]:
    if page is None or "laws" not in page.front:
        return []
    from refmerge.laws import LAWS

    rows: list[tuple[str, RenderableType]] = []
    for name in page.front["laws"]:
        ulps = page.front.get("law_ulps", {}).get(name, LAWS[name].ulps)
        rows.append((name, Text(LAWS[name].says + (f" (within {ulps:g} ulps)" if ulps else ""))))
    return rows


def _steps(entry: Entry) -> list[RenderableType]:
    from refmerge.explain import outline

    if not isinstance(entry.code, Method):
        return []
    return _facts("Steps", [(f"{s.number}.", Text(s.title)) for s in outline(entry.code)[1:]])


def _differences(entry: Entry) -> list[RenderableType]:
    """The flags in which a tool says other than the paper, one by one, and those in which it agrees, by name."""
    found = differences(entry)
    differ = [
        (flag, fact, theirs) for flag, fact, theirs in found if any(x != fact["who"].get("paper") for x in theirs.values())
    ]
    alike = [flag for flag, *_ in found if flag not in [f for f, *_ in differ]]
    papers = " and ".join(page.name for page in entry.pages) or "the paper"
    out = _heading(f"Differs from {papers}") if differ else []
    for flag, fact, theirs in differ:
        paper = {"paper": fact["who"]["paper"]} if "paper" in fact["who"] else {}
        out.append(_flag(flag, fact, paper | theirs))
    rest = []
    if alike:
        rest.append(("As the paper in what others differ in", ", ".join(alike)))
    if entry.pages and not found:
        rest.append((f"As {papers}", "but for the names and defaults of parameters: no flag mentions it."))
    return [*out, *(part for title, text in rest for part in (*_heading(title), _indented(Text(text))))]


def _flag(flag: str, fact: dict[str, Any], who: dict[str, str]) -> RenderableType:
    said = Text.assemble((flag, NAME), ": ", _inline(fact["description"]))
    return _indented(Group(said, _indented(_grid([(k, _inline(v)) for k, v in who.items()], style=""))))


def _citation(page: Page) -> list[RenderableType]:
    cite = page.front.get("cite")
    if cite is None:
        return []
    authors, title = cite["author"].replace(" and ", ", "), cite["title"]
    title += "" if title.endswith(("?", "!")) else "."
    where = cite.get("url") or (f"arXiv:{page.arxiv}" if page.arxiv else page.front["paper"])
    return [*_heading("Citation"), _indented(Text(f"{authors}. {title} {cite['year']}. {where}"))]


def _see_also(entry: Entry, whole: bool) -> list[tuple[str, RenderableType]]:
    from refmerge import registry

    rows = []
    if entry.tool:
        rows += [(f"refmerge methods {page.name}", "the paper's method" if page.kind == "method" else f"a {page.kind}")
                 for page in entry.pages]  # fmt: skip
    if entry.kind == "method":
        rows.append((f"refmerge explain {entry.name}", "every step on six numbers"))
    if entry.page is not None and not entry.tool and not whole:
        rows.append((f"refmerge methods {entry.name} --page", "the whole page: examples, exercises, where it fails"))
    if not entry.tool:
        tools = [n for n in registry.names() if n.partition(":")[2] == entry.name]
        rows += [(f"refmerge methods {name}", "another tool's own semantics") for name in tools]
    return [(command, Text(text)) for command, text in rows]


# ------------------------------------------------------------------------------------------------------------ typesetting


def _heading(title: str) -> list[RenderableType]:
    return [Text(""), Text(title, style=HEADING)]


def _indented(thing: RenderableType) -> RenderableType:
    return Padding(thing, (0, 0, 0, 2))


def _section(title: str, text: str) -> list[RenderableType]:
    blocks = list(_markdown(text))
    return [*_heading(title), _indented(Group(*blocks))] if blocks else []


def _facts(title: str, rows: Iterable[tuple[str, RenderableType]]) -> list[RenderableType]:
    rows = list(rows)
    return [*_heading(title), _indented(_grid(rows))] if rows else []


def _grid(rows: Iterable[tuple[str, RenderableType]], style: str = NAME) -> RenderableType:
    """Two columns; a left one that is long gets a line for itself."""
    rows = list(rows)
    if max((len(left) for left, _ in rows), default=0) > 40:
        return Group(*(part for left, right in rows for part in (Text(left, style=style), _indented(right))))
    table = Table.grid(padding=(0, 2))
    table.add_column(style=style, no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


class _Code:
    """Lines as they are; what is longer than the terminal goes on below, further in."""

    def __init__(self, text: str) -> None:
        self.lines = text.rstrip("\n").splitlines()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            indent = len(line) - len(line.lstrip(" .>"))
            further = " " * indent + ("# " if line[indent:].startswith("#") else "    ")
            for part in wrap(line, options.max_width, subsequent_indent=further, break_on_hyphens=False) or [""]:
                yield Text(part, style=CODE)


INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*|(?<![\w*])\*(?=\S)(.+?)(?<=\S)\*(?![\w*])|\[([^]]+)\]\([^)]*\)")


def _inline(text: str) -> Text:
    """A paragraph with its `code`, **bold**, *emphasis* and [links](...)."""
    out, last = Text(), 0
    text = " ".join(text.split())
    for match in INLINE.finditer(text):
        out.append(text[last : match.start()])
        last = match.end()
        code, bold, slanted, link = match.groups()
        if code is not None:
            out.append(code, style=CODE)
        else:
            inner = _inline(bold or slanted or link)
            inner.stylize(HEADING if bold else "italic" if slanted else "")
            out.append(inner)
    out.append(text[last:])
    return out


ITEM = re.compile(r"(-|\d+\.) +")


def _markdown(text: str) -> Iterator[RenderableType]:
    """Paragraphs, items, tables and code, with an empty line where the text has one."""
    lines, begun, apart = text.splitlines(), False, False
    while lines:
        if not lines[0].strip():
            lines.pop(0)
            apart = begun
            continue
        marked = ITEM.match(lines[0])
        block: RenderableType
        if lines[0].startswith("```"):
            end = next((i for i, line in enumerate(lines[1:], 1) if line.startswith("```")), len(lines))
            block, lines = _Code("\n".join(lines[1:end])), lines[end + 1 :]
        elif marked:
            end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() and not line.startswith(" ")), len(lines))
            while not lines[end - 1].strip():
                end -= 1
            inner = [
                lines[0][marked.end() :],
                *(line[min(marked.end(), len(line) - len(line.lstrip())) :] for line in lines[1:end]),
            ]
            block = Table.grid(padding=(0, 1))
            block.add_column(no_wrap=True)
            block.add_column()
            block.add_row(marked[1], Group(*_markdown("\n".join(inner))))
            lines = lines[end:]
        elif lines[0].startswith("|"):
            end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
            block, lines = _table(lines[:end]), lines[end:]
        else:
            end = next((i for i, line in enumerate(lines) if not line.strip() or line.startswith("```")), len(lines))
            paragraph, lines = "\n".join(lines[:end]), lines[end:]
            if paragraph.startswith("!["):
                continue
            block = _inline(paragraph)
        if apart:
            yield Text("")
        begun, apart = True, False
        yield block


def _table(lines: Sequence[str]) -> RenderableType:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    table = Table(box=None, pad_edge=False, header_style=HEADING)
    for cell in rows[0]:
        table.add_column(_inline(cell))
    for row in rows[2:]:
        table.add_row(*map(_inline, row))
    return table
