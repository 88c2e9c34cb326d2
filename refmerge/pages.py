"""The page of a method, spec/<family>/<name>.md: its machine-checked facts, its sections, its worked example, its picture.

A page is TOML between two lines of `+++`, then prose under fixed headings. `kind` says what it is about: a "method" unless
it says otherwise, a "procedure" (see refmerge.procedure), or a "recipe": a merge that is made of other methods and has
recipes in spec/recipes instead of code. From the shell:

    python -m refmerge.pages draw [NAME ...]     (re)draw the pictures of these pages, or of all
    python -m refmerge.pages flags NAME          the [flags] tables of a page, as the method's vectors have them
"""

from __future__ import annotations

import json
import math
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from textwrap import wrap
from typing import Any

from refmerge.errors import UsageError
from refmerge.method import Method
from refmerge.registry import get

__all__ = ["SECTIONS", "SECTIONS_OF", "Example", "Page", "Place", "draw", "example_for", "names", "page"]

SECTIONS = (
    "Purpose",
    "Definition",
    "Edge cases",
    "Where implementations disagree",
    "Laws",
    "Cost",
    "Worked example",
    "Picture",
    "Where it fails",
    "Exercises",
    "Read before",
)
# Procedures have no picture, and recipes no code whose steps or laws could be stated.
SECTIONS_OF = {
    "method": SECTIONS,
    "procedure": tuple(s for s in SECTIONS if s != "Picture"),
    "recipe": tuple(s for s in SECTIONS if s not in ("Laws", "Cost", "Picture", "Exercises")),
}
OPTIONS = ("seed", "over", "stats", "name", "dtype")  # of refmerge.call, beside the method's own parameters
STEP = re.compile(r"^(\d+)\. \*\*(.+?)\*\*", re.MULTILINE)
END = re.compile(r"(?<![.])[.?!][)`\"*]*$")  # of a sentence: not the dots of 1 ... N


@dataclass(frozen=True)
class Example:
    """The worked example: one tensor, as nested lists of numbers, and what is passed by keyword."""

    base: Any
    models: list[Any]
    params: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    picture: str = "steps"


@dataclass(frozen=True)
class Place:
    """What a test vector can point to: "given", "step 2", or a sentence of the edge cases; its text, and its line."""

    key: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """A page. front: the facts. sections: heading -> text. text: all of it. kind: of what."""

    name: str
    family: str
    text: str
    front: dict[str, Any]
    sections: dict[str, str]

    @property
    def kind(self) -> str:
        return self.front.get("kind", "method")

    @property
    def title(self) -> str:
        found = re.search(r"^# (.+)$", self.text, re.MULTILINE)
        return found[1].strip() if found else self.name

    @property
    def arxiv(self) -> str | None:
        """The paper's number there: 2306.01708."""
        found = re.search(r"\barXiv:([\w.-]+/\d{7}|\d{4}\.\d{4,5})", self.front["paper"])
        return found[1] if found else None

    @property
    def steps(self) -> list[tuple[int, str]]:
        """Numbers and titles of the steps in the Definition."""
        return [(int(number), title) for number, title in STEP.findall(self.sections.get("Definition", ""))]

    @cached_property
    def places(self) -> list[Place]:
        """What test vectors can point to: what the definition is given, its steps, each sentence of the edge cases."""
        found: list[Place] = []
        section, bullet, words, line = "", False, list[str](), 0

        def end() -> None:
            if words and words[0] != "See":
                found.append(Place(" ".join(words), " ".join(words), line))
            words.clear()

        for number, text in enumerate(self.text.splitlines(), 1):
            if text.startswith("## "):
                section, bullet = text[3:].strip(), False
            elif section == "Definition" and (step := STEP.match(text)):
                found.append(Place(f"step {step[1]}", step[2], number))
            elif section == "Definition" and text and not found:
                found.append(Place("given", text, number))
            elif section == "Edge cases":
                bullet = bool(text) and (bullet or text.startswith("- "))
                if not bullet or text.startswith("- "):
                    end()
                for word in text.removeprefix("- ").split() if bullet else ():
                    line = line if words else number
                    words.append(word)
                    if END.search(word) and word not in ("e.g.", "i.e."):
                        end()
        return found

    def place(self, words: str) -> Place:
        """The one place with this key, or whose sentence begins with these words. UsageError where there is not just one."""
        exact = [p for p in self.places if p.key == words]
        found = exact or [p for p in self.places if p.key.startswith(words)]
        if len(found) != 1:
            raise UsageError(f"page {self.name}: {words!r} begins {len(found)} of its steps and edge sentences, not one")
        return found[0]

    @property
    def example(self) -> Example:
        e = self.front["example"]
        options = {key: e[key] for key in OPTIONS if key in e}
        picture = e.get("picture", "steps")
        return Example(e.get("base"), e["models"], options | e.get("params", {}), e.get("result"), picture)


def _folder() -> Any:
    return resources.files("refmerge.spec")


@cache
def _found() -> dict[str, str]:
    """Page name -> family."""
    found = {}
    for family in _folder().iterdir():
        if family.is_dir() and family.name not in ("vectors", "recipes"):
            for file in family.iterdir():
                if file.name.endswith(".md"):
                    found[file.name[:-3]] = family.name
    return dict(sorted(found.items()))


def names(kind: str = "method") -> list[str]:
    """What has a page of that kind, sorted."""
    return [name for name in _found() if page(name).kind == kind]


@cache
def page(name: str) -> Page:
    """The page of a method. UsageError where there is none or its front matter cannot be read."""
    if name not in _found():
        raise UsageError(f"no page for {name!r}; there are pages for {', '.join(_found())}")
    family = _found()[name]
    text = (_folder() / family / f"{name}.md").read_text(encoding="utf-8")
    parts = re.split(r"^\+\+\+\n", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) != 3 or parts[0]:
        raise UsageError(f"spec/{family}/{name}.md does not begin with front matter between two lines of +++")
    try:
        front = tomllib.loads(parts[1])
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"spec/{family}/{name}.md: {e}") from e
    headed = re.split(r"^## (.+)\n", parts[2], flags=re.MULTILINE)
    return Page(name, family, text, front, {t: s.strip() for t, s in zip(headed[1::2], headed[2::2])})


def example_for(method: Method) -> Example:
    """The worked example of a method's page; for another tool's entry that of the paper's method, as far as it fits."""
    tool, _, bare = method.name.rpartition(":")
    if bare not in _found() or page(bare).kind != "method":
        count = max(2, method.models[0]) if method.models[1] is None else method.models[1]
        entries = [[4.0, -3.0, 2.0, -1.0, 0.5, 6.0], [3.0, 5.0, -2.0, -2.0, 0.25, 1.0], [-1.0, 2.0, 4.0, 0.0, 3.0, -5.0]]
        ours = Example([0.0] * 6 if method.needs_base else None, [entries[i % 3] for i in range(count)])
    else:
        ours = page(bare).example
    if not tool:
        return ours
    base, models = ours.base, list(ours.models)
    if base is None and method.needs_base:
        base, *models = models
    models = models[: method.models[1]]
    params = {k: v for k, v in ours.params.items() if k in OPTIONS and k != "stats"}
    for key, p in method.params.items():
        if p.required or key in ours.params:
            params[key] = ours.params.get(key, 1.0)
    if method.needs:
        given = ours.params.get("stats") or [{} for _ in ours.models]
        theirs = dict(zip(get(bare).stats, method.stats)) if bare in _found() else {}
        params["stats"] = [{theirs[key]: x for key, x in s.items() if key in theirs} for s in given]
    return Example(base, models, params)


# --------------------------------------------------------------------------------------------------------------- picture

INK, FAINT, GRID = "#1b1f24", "#6b7280", "#c9ced6"
COLOURS = ("#2f6fb5", "#d9822b", "#2e9461", "#a0498f", "#8a6d3b")
BASE, RESULT, OTHER = "#7d8590", "#b3313b", "#4b5563"


def draw(name: str) -> str:
    """The picture of a page's worked example, as SVG: the steps in columns, or the plane that two models span."""
    example = page(name).example
    kind, _, along = example.picture.partition(":")
    if kind == "steps":
        return _draw_steps(name)
    if kind == "plane":
        return _draw_plane(name, example, along)
    raise UsageError(f"page {name}: picture = {example.picture!r} is none of 'steps', 'plane:<parameter>'")


def _n(x: float) -> str:
    """A coordinate: one decimal, no trailing zero, no negative zero."""
    text = f"{x:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _g(x: float) -> str:
    """A value, as a label: three digits and a real minus sign."""
    text = f"{x:.3g}"
    return "0" if text == "-0" else text.replace("-", "\u2212")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _svg(width: float, height: float, title: str, description: str, body: list[str]) -> str:
    # The white ground keeps the picture readable on a dark page.
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" '
            f'height="{_n(height)}" font-family="Helvetica, Arial, sans-serif" font-size="11" role="img">',
            f"<title>{_escape(title)}</title>",
            f"<desc>{_escape(description)}</desc>",
            f'<rect width="{_n(width)}" height="{_n(height)}" fill="#fff"/>',
            *body,
            "</svg>\n",
        ]
    )


@dataclass
class _Panel:
    label: str
    values: list[float]
    before: list[float] | None
    colour: str


def _draw_steps(name: str) -> str:
    """One column a step, one panel of bars an array; what a step took away stays as an outline."""
    import numpy as np

    from refmerge.explain import explain

    steps = [s for s in explain(name) if s.ran]
    models_and_base = [*steps[0].values["models"], steps[0].values.get("base")]
    shape = np.shape(models_and_base[0])
    columns: list[tuple[str, list[_Panel], list[str]]] = []
    last: dict[str, list[float]] = {}
    for step in steps:
        panels, notes = [], []
        for key, value in [*step.values.items(), *([("result", step.result)] if step.result is not None else [])]:
            same = models_and_base if not step.number else [step.result]
            for label, x, colour in _arrays(key, value, shape):
                if key not in ("models", "base", "result") and any(np.array_equal(x, y) for y in same):
                    continue  # the text's own name for what is drawn anyway
                values = [float(v) for v in np.ravel(x)]
                if last.get(label) != values:
                    panels.append(_Panel(label, values, last.get(label), colour))
                last[label] = values
            if step.number:
                notes += _notes(key, value)
        columns.append((f"{step.number}. {step.title}" if step.number else step.title, panels, notes))
    columns = [c for c in columns if c[1] or c[2]]
    entry, gap, left, top = 25.0, 26.0, 16.0, 60.0
    scale = 64 / (max((max(_extent([p])) for _, ps, _ in columns for p in ps), default=0.0) or 1.0)
    wide = entry * max((len(p.values) for _, ps, _ in columns for p in ps), default=6)
    headings = [wrap(heading, int(wide / 6.2)) for heading, _, _ in columns]
    top += 14 * (max(map(len, headings)) - 1)
    tops, extents = [top], []  # of the rows of panels
    for row in range(max(len(ps) for _, ps, _ in columns)):
        high, low = _extent([ps[row] for _, ps, _ in columns if row < len(ps)])
        extents.append(high * scale + 16)
        tops.append(tops[-1] + high * scale + low * scale + 50)
    height = max(tops[len(ps)] + 16 * len(notes) for _, ps, notes in columns) + 4
    width = left * 2 + len(columns) * wide + (len(columns) - 1) * gap
    title = f"{name}, step by step"
    body = [f'<text x="{_n(left)}" y="24" font-size="14" font-weight="bold" fill="{INK}">{_escape(title)}</text>']
    for i, (_, panels, notes) in enumerate(columns):
        x = left + i * (wide + gap)
        for j, line in enumerate(headings[i]):
            body.append(f'<text x="{_n(x)}" y="{46 + 14 * j}" font-weight="bold" fill="{INK}">{_escape(line)}</text>')
        for j, p in enumerate(panels):
            y = tops[j]
            zero = y + 8 + extents[j]
            body.append(f'<text x="{_n(x)}" y="{_n(y + 8)}" fill="{p.colour}">{_escape(p.label)}</text>')
            body.append(f'<path d="M{_n(x)} {_n(zero)}h{_n(wide)}" stroke="{GRID}"/>')
            for k, value in enumerate(p.values):
                body += _bar(x + k * entry + 4, zero, entry - 8, value, scale, p.before[k] if p.before else None, p.colour)
        for j, note in enumerate(notes):
            y = tops[len(panels)] + 8 + 16 * j
            body.append(f'<text x="{_n(x)}" y="{_n(y)}" fill="{INK}">{_escape(note)}</text>')
    return _svg(width, height, title, "One column for each step, one bar for each entry of the worked example.", body)


def _bar(x: float, zero: float, wide: float, value: float, scale: float, before: float | None, colour: str) -> list[str]:
    out = []
    ghost = before if before is not None and abs(before) > abs(value) and before * value >= 0 else value
    outline = f'fill="none" stroke="{colour}" stroke-dasharray="2 2"'
    for height, paint in ((ghost if ghost != value else 0.0, outline), (value, f'fill="{colour}"')):
        if height:
            tall = abs(height) * scale
            y = zero - tall if height > 0 else zero
            out.append(f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(wide)}" height="{_n(tall)}" {paint}/>')
    at = zero - ghost * scale + (11 if ghost < 0 else -3)
    ink, label = INK if value else FAINT, _g(value)
    size = 9 if len(label) < 5 else 8
    out.append(
        f'<text x="{_n(x + wide / 2)}" y="{_n(at)}" font-size="{size}" text-anchor="middle" fill="{ink}">{label}</text>'
    )
    return out


def _extent(panels: list[_Panel]) -> tuple[float, float]:
    """How far the bars of these panels reach up and down."""
    values = [v for p in panels for v in [*p.values, *(p.before or ())] if math.isfinite(v)]
    return max([0.0, *values]), -min([0.0, *values])


def _arrays(key: str, value: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, Any, str]]:
    """The arrays of the example's shape in a traced value, with their label and colour."""
    import numpy as np

    if isinstance(value, dict):
        for name, x in value.items():
            yield from _arrays(f"{key}[{name}]", x, shape)
    elif isinstance(value, np.ndarray) and value.shape == shape:
        yield key, value, {"base": BASE, "result": RESULT}.get(key, OTHER)
    elif isinstance(value, list | tuple):
        for i, x in enumerate(value):
            if isinstance(x, np.ndarray) and x.shape == shape:
                yield f"model {i}" if key == "models" else f"{key}[{i}]", x, COLOURS[i % len(COLOURS)]


def _notes(key: str, value: Any) -> list[str]:
    """The numbers among traced values, as text."""
    value = [_plain(x) for x in value] if isinstance(value, list | tuple) else _plain(value)
    if isinstance(value, float | int) and not isinstance(value, bool):
        return [f"{key} = {_g(value)}"]
    if isinstance(value, list | tuple) and value and all(isinstance(x, float | int) for x in value):
        return [f"{key} = {', '.join(_g(x) for x in value)}"]
    return []


def _plain(x: Any) -> Any:
    """A 0-d array, as which explain keeps NumPy's numbers, as a Python number."""
    return x.item() if getattr(x, "shape", None) == () else x


def _draw_plane(name: str, example: Example, along: str) -> str:
    """The two inputs as arrows in the plane that they span, the path of the result, and the straight line."""
    import numpy as np

    from refmerge.api import call

    inputs = [np.asarray(x, dtype=np.float64) for x in ([] if example.base is None else [example.base]) + example.models]
    labels = (["base"] if example.base is not None else []) + [f"model {i}" for i in range(len(example.models))]
    a, b = (x.ravel() for x in inputs)
    e1 = a / np.linalg.norm(a)
    across = b - (b @ e1) * e1
    e2 = across / np.linalg.norm(across)

    def run(t: float) -> np.ndarray:
        return np.ravel(call(name, example.models, example.base, **(example.params | {along: t})))

    path = [(float(x @ e1), float(x @ e2)) for x in (run(k / 32) for k in range(33))]
    t = example.params.get(along, get(name).params[along].default)
    marks = {0.0, 0.25, 0.5, 0.75, 1.0} | {t}
    points = {u: run(u) for u in sorted(marks)}
    ends = [(float(x @ e1), float(x @ e2)) for x in (a, b)]

    xs, ys = [0.0, *(p[0] for p in path)], [0.0, *(p[1] for p in path)]
    scale = 300 / max(max(xs) - min(xs), max(ys) - min(ys))
    left, top = 60.0, 70.0

    def at(p: tuple[float, float]) -> tuple[float, float]:
        return left + (p[0] - min(xs)) * scale, top + (max(ys) - p[1]) * scale

    width = left * 2 + 60 + (max(xs) - min(xs)) * scale
    height = top + (max(ys) - min(ys)) * scale + 44
    title = f"{name}: the path of {along} from 0 to 1"
    ox, oy = at((0.0, 0.0))
    (ax, ay), (bx, by) = map(at, ends)
    body = [
        f'<text x="16" y="24" font-size="14" font-weight="bold" fill="{INK}">{_escape(title)}</text>',
        f'<text x="16" y="42" fill="{FAINT}">in the plane that the two models span; dashed: the straight line</text>',
        f'<path d="M{_n(ax)} {_n(ay)}L{_n(bx)} {_n(by)}" stroke="{FAINT}" stroke-dasharray="4 4" fill="none"/>',
    ]
    for (x, y), label, colour in zip(((ax, ay), (bx, by)), labels, COLOURS):
        body.append(f'<path d="M{_n(ox)} {_n(oy)}L{_n(x)} {_n(y)}" stroke="{colour}" stroke-width="2"/>')
        body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="4.5" fill="{colour}"/>')
        shift = 10 if y > oy - 12 else -10
        body.append(f'<text x="{_n(x + 8)}" y="{_n(y + shift)}" fill="{colour}" font-weight="bold">{label}</text>')
    curve = "L".join(f"{_n(x)} {_n(y)}" for x, y in map(at, path))
    body.append(f'<path d="M{curve}" stroke="{RESULT}" stroke-width="2" fill="none"/>')
    for u, point in points.items():
        x, y = at((float(point @ e1), float(point @ e2)))
        if u in (0.0, 1.0):
            continue
        r = 5 if u == t else 3
        body.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{r}" fill="{RESULT}"/>')
        weight = ' font-weight="bold"' if u == t else ""
        body.append(f'<text x="{_n(x + 9)}" y="{_n(y - 5)}" fill="{RESULT}"{weight}>{along} = {_g(u)}</text>')
    body.append(f'<circle cx="{_n(ox)}" cy="{_n(oy)}" r="3" fill="{INK}"/>')
    body.append(f'<text x="{_n(ox - 8)}" y="{_n(oy + 16)}" fill="{INK}">0</text>')
    return _svg(width, height, title, "Two models as arrows from the origin and the path between them.", body)


# --------------------------------------------------------------------------------------------------------------- command


def _flags(name: str) -> str:
    """The [flags] tables for a page, from the notes of the method's vectors."""
    from refmerge.testing import flags

    out = []
    for flag, note in flags(name).items():
        out += [f"[flags.{flag}]", f"description = {json.dumps(note['description'])}"]
        who = [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in note["who"].items()]
        line = f"who = {{ {', '.join(who)} }}"
        out += [line, ""] if len(line) <= 120 else [f"[flags.{flag}.who]", *who, ""]
    return "\n".join(out)


def _main(arguments: list[str]) -> None:
    match arguments:
        case ["draw", *chosen]:
            for name in chosen or names():
                target = Path(str(_folder() / page(name).family / f"{name}.svg"))
                target.write_text(draw(name), encoding="utf-8", newline="\n")
                print(target)
        case ["flags", name]:
            print(_flags(name))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    _main(sys.argv[1:])
