"""A method's numbered steps with their arrays, traced from its own text: there is no second text that could drift.

    from refmerge.explain import explain, render
    print(render(explain("ties", base=[0, 0, 0], models=[[1, 2, 3], [4, -5, 6]], density=0.5)))

Comments of the form `# 2. trim` in a method's body delimit its steps. The values of a step are those of the names that it
assigns, as they are when it ends.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import numpy as np

from refmerge.api import call
from refmerge.method import Method
from refmerge.numeric import host
from refmerge.registry import get

__all__ = ["Step", "explain", "outline", "render"]

MARK = re.compile(r"^\s*# (\d+)\. (.+?)\s*$")


@dataclass
class Step:
    """One step of a run: step 0, "given", is what comes in and what the text does before its first numbered step.

    lines: the step's source. values: name -> value at the end of the step. ran: False where the run branched around it.
    result: what the function returned, in the step that returned it; None in the others.
    """

    number: int
    title: str
    lines: list[str]
    values: dict[str, Any] = field(default_factory=dict)
    ran: bool = False
    result: Any = None


@dataclass(frozen=True)
class _Part:
    """A step of the text: lines first..last of the file, and the names assigned there."""

    number: int
    title: str
    first: int
    last: int
    lines: tuple[str, ...]
    names: tuple[str, ...]


def explain(name: str | Method, /, *, base: Any = None, models: Sequence[Any] | None = None, **params: Any) -> list[Step]:
    """Run a method on one tensor (by default the worked example of its page) and return its steps.

    `params` are the method's parameters, and any option of `refmerge.call` (seed, over, stats, name, dtype).
    """
    method = get(name) if isinstance(name, str) else name
    if models is None:
        from refmerge.pages import example_for

        example = example_for(method)
        models, params = example.models, example.params | params
        base = example.base if base is None else base
    base = None if base is None else np.asarray(base, dtype=np.float64)
    models = [np.asarray(m, dtype=np.float64) for m in models]

    parts = outline(method)
    steps = [Step(p.number, p.title, list(p.lines)) for p in parts]
    names = [(*_inputs(method), *parts[0].names), *(p.names for p in parts[1:])]
    at = {line: i for i, p in enumerate(parts) for line in range(p.first, p.last + 1)}
    current = 0

    def leave(frame: FrameType) -> None:
        steps[current].ran = True
        steps[current].values = {n: _copy(frame.f_locals[n]) for n in names[current] if n in frame.f_locals}

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal current
        if event == "line":
            following = at.get(frame.f_lineno, current)
            if following != current:
                leave(frame)
                current = following
        elif event == "return":
            leave(frame)
            steps[current].result = _copy(arg)
        return local

    with _traced(inspect.unwrap(method.run).__code__, local):
        call(method, models, base, **params)
    if method.view == "model":
        for step in steps:
            step.values, step.result = {k: _alone(v) for k, v in step.values.items()}, _alone(step.result)
    return steps


class _traced:
    """Trace the frames of one code object; a debugger's or a coverage tool's trace function comes back afterwards."""

    def __init__(self, code: CodeType, local: Callable[..., Any]) -> None:
        self._code, self._local = code, local

    def __enter__(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(lambda frame, event, arg: self._local if frame.f_code is self._code else None)

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._previous)


def outline(method: Method) -> list[_Part]:
    """The steps of a method's text, the part before the first numbered one as step 0."""
    function = inspect.unwrap(method.run)
    source, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(source)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    stores = list(_stores(body))
    marks = [(i, m) for i, line in enumerate(source, 1) if (m := MARK.match(line))]
    begin = (definition.body[0].end_lineno or 0) + 1 if body is not definition.body else body[0].lineno
    starts = [(begin, 0, "given"), *((i + 1, int(m[1]), m[2]) for i, m in marks)]
    ends = [i - 1 for i, _ in marks] + [len(source)]
    return [
        _Part(
            number,
            title,
            first + start - 1,
            first + end - 1,
            tuple(textwrap.dedent("".join(source[start - 1 : end])).strip("\n").splitlines()),
            tuple(dict.fromkeys(name for name, line in stores if start <= line <= end)),
        )
        for (start, number, title), end in zip(starts, ends)
    ]


def _stores(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Names that the statements assign, with their lines; a comprehension's own variables are not the function's."""
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp | ast.Lambda | ast.FunctionDef):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        todo[:0] = ast.iter_child_nodes(node)


def _inputs(method: Method) -> list[str]:
    """What a reader can look at of what the function is given; `group` and `rng` are questions, not values."""
    signature = inspect.signature(inspect.unwrap(method.run)).parameters
    return [n for n in signature if n not in ("group", "rng", "name")]


def _copy(value: Any) -> Any:
    """The value as it is now: later steps may rebind or fill the same arrays."""
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value))
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return host(value).copy() if hasattr(value, "dtype") else value


def _alone(value: Any) -> Any:
    """The one tensor of a model, for a method that is given whole models."""
    if isinstance(value, list | tuple):
        return type(value)(map(_alone, value))
    return next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else value


# ------------------------------------------------------------------------------------------------------------- rendering


def render(steps: Sequence[Step], *, title: str = "", digits: int = 6, width: int = 12) -> str:
    """The steps as text: each with its source and its values in aligned columns, at most `width` of them."""
    table: list[tuple[int, list[tuple[str, list[str] | str]]]] = []
    for i, step in enumerate(steps):
        rows = [row for n, v in step.values.items() for row in _rows(n, v, digits, width)]
        if step.result is not None:
            rows += _rows("result", step.result, digits, width)
        table.append((i, rows))
    cells = [row[1] for _, rows in table for row in rows]
    label = max((len(row[0]) for _, rows in table for row in rows), default=0)
    column = max((len(c) for row in cells if isinstance(row, list) for c in row), default=0)
    out = [title, ""] if title else []
    for i, rows in table:
        step = steps[i]
        out.append(f"{step.number}. {step.title}" if step.number else step.title)
        out += [f"    > {line}" for line in step.lines] if step.number else []
        if not step.ran:
            out.append("    not reached")
        for name, row in rows:
            text = row if isinstance(row, str) else "  ".join(c.rjust(column) for c in row)
            out.append(f"    {name.ljust(label)}  {text}".rstrip())
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def _rows(name: str, value: Any, digits: int, width: int) -> Iterator[tuple[str, list[str] | str]]:
    """One row for a number, a vector or a list of numbers; one for each row of a matrix and each item of a list."""
    if isinstance(value, np.ndarray) and value.ndim > 1:
        for i, x in enumerate(value):
            yield from _rows(f"{name}[{i}]", x, digits, width)
    elif isinstance(value, dict):
        for k, x in value.items():
            yield from _rows(f"{name}[{k!r}]", x, digits, width)
    elif isinstance(value, list | tuple) and any(not _is_number(x) for x in value):
        for i, x in enumerate(value):
            yield from _rows(f"{name}[{i}]", x, digits, width)
    elif isinstance(value, np.ndarray | list | tuple):
        numbers = [value[()]] if isinstance(value, np.ndarray) and value.ndim == 0 else list(value)
        cells = [format(float(x), f".{digits}g") for x in numbers[:width]]
        yield name, [*cells, "..."] if len(numbers) > width else cells
    elif _is_number(value):
        yield name, [format(float(value), f".{digits}g")]
    else:
        yield name, repr(value)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)
