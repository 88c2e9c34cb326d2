"""What another implementation makes of the test vectors: a verdict for each method, and the flag that explains it.

The other side is an installed tool, through its adapter in refmerge/compat/<tool>/adapter.py, which its own Python runs; any
command that answers requests as refmerge/compat/_serve.py says; or a Python function.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from refmerge import testing
from refmerge.checkpoint.dtypes import DTYPES, name_of
from refmerge.errors import RefmergeError, UsageError

__all__ = ["Answers", "Conformance", "Difference", "NotSupported", "Row", "ToolError", "conform", "fuzz", "tools"]

Verdict = Literal["equal", "within rounding", "differs", "unknown difference"]
Ask = Callable[[testing.Case], Any]  # a mapping name -> array, or that and its steps
CHECKOUTS = ("official",)  # adapters of code that is not installed, but lies in a checkout


class NotSupported(Exception):
    """The other side cannot be asked this."""


class ToolError(Exception):
    """The other side refused the input, or failed."""


# --------------------------------------------------------------------------------------------------------- the other side


def tools() -> list[str]:
    """The tools that have an adapter."""
    root = resources.files("refmerge.compat")
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and (folder / "adapter.py").is_file())


class Answers:
    """A process that answers requests: a tool's adapter, or another command."""

    def __init__(self, command: Sequence[str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe that nobody reads would fill, and stop a tool that logs)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, encoding="utf-8"
            )
        except OSError as e:
            raise UsageError(f"{shlex.join(command)} cannot be run: {e.strerror}") from None
        self._command = shlex.join(command)
        hello = self._line()
        self.tool, self.version = str(hello.get("tool", command[0])), str(hello.get("version", ""))
        self.entries = tuple(map(str, hello.get("entries", ())))

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            if isinstance(answer := json.loads(line), dict):
                return answer
        except ValueError:
            pass
        if line:
            raise UsageError(f"{self._command}: {line.strip()[:80]!r} is no answer: a line of JSON, an object")
        self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        raise UsageError(f"{self._command} ended without an answer{': ' + said[-1] if said else ''}")

    def ask(
        self, id: str, entry: str, models: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None,
        stats: Sequence[Mapping[str, Any]] | None, params: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """What the other side merges. NotSupported, ToolError."""
        return {name: _decoded(x) for name, x in self._answer(id, entry, models, base, stats, params)["tensors"].items()}

    def _answer(
        self, id: str, entry: str, models: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None,
        stats: Sequence[Mapping[str, Any]] | None, params: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        request = {
            "id": id, "entry": entry, "params": _plain(params), "models": [_coded(m) for m in models],
            "base": None if base is None else _coded(base), "stats": None if stats is None else [_coded(s) for s in stats],
        }  # fmt: skip
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone: what it said in the end is told below
        answer = self._line()
        if answer.get("id") != id:
            raise UsageError(f"{self._command} answers {answer.get('id')!r} where {id!r} was asked")
        if "unsupported" in answer:
            raise NotSupported(str(answer["unsupported"]))
        if "error" in answer:
            raise ToolError(str(answer["error"]))
        return answer

    def case(self, case: testing.Case) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What the other side makes of a vector, and the steps that it gives beside."""
        if case.options.keys() - {"integers", "nonfinite"}:
            raise NotSupported(f"asks for {', '.join(case.options)}")
        answer = self._answer(case.id, case.entry, case.models, case.base, case.stats, case.params)
        try:
            given = answer.get("stages", {}).items()
            stages = {step: {name: _value(x) for name, x in values.items()} for step, values in given}
        except (AttributeError, KeyError, ValueError):
            raise UsageError(f"{self._command}: its stages of {case.id} are not step -> name -> array or list") from None
        return {name: _decoded(x) for name, x in answer["tensors"].items()}, stages


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are spelled as strings, which float() reads."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _coded(model: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: {
            "dtype": name_of(x.dtype),
            "shape": list(x.shape),
            "data": base64.b64encode(np.ascontiguousarray(x).tobytes()).decode(),
        }
        for name, x in model.items()
    }


def _decoded(x: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(x["data"]), DTYPES[x["dtype"]]).reshape(x["shape"])


def _value(x: Any) -> Any:
    """A value of a step: an array, a number, or a list of these."""
    if isinstance(x, list):
        return [_value(one) for one in x]
    return _decoded(x) if isinstance(x, Mapping) else x


# ------------------------------------------------------------------------------------------------------------ the verdicts


@dataclass
class Row:
    """One method against one semantics, `entry`: the paper's, or what refmerge says that the tool computes.

    through: the tool's own entry that was asked. equal, close: ids of the cases whose result is expected to the bit, and
    within the case's tolerance. off: id -> (what is wrong, the flags that name it). steps: id -> the first step that
    differs, of who gives steps. skipped: id -> why.
    """

    method: str
    entry: str
    through: str = ""
    equal: list[str] = field(default_factory=list)
    close: list[str] = field(default_factory=list)
    off: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    steps: dict[str, testing.StepDiffers] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        return sorted({flag for _, flags in self.off.values() for flag in flags})

    @property
    def unknown(self) -> list[str]:
        """The cases that differ and that no flag explains."""
        return [id for id, (_, flags) in self.off.items() if not flags]

    @property
    def verdict(self) -> Verdict | None:
        """None where nothing could be asked."""
        if self.unknown:
            return "unknown difference"
        if self.off:
            return "differs"
        if self.close:
            return "within rounding"
        return "equal" if self.equal else None

    def told(self) -> dict[str, Any]:
        return {
            "method": self.method, "entry": self.entry, "through": self.through, "verdict": self.verdict,
            "equal": len(self.equal),
            "within_rounding": len(self.close), "flags": self.flags, "unknown": self.unknown, "skipped": self.skipped,
            "differs": {
                id: {"what": what, "flags": list(flags)} | ({"step": vars(self.steps[id])} if id in self.steps else {})
                for id, (what, flags) in self.off.items()
            },
        }  # fmt: skip


@dataclass
class Conformance:
    """tool, version: who was asked. papers: each method against its paper; own: against what refmerge says the tool does.
    claims: whether who was asked says to compute just that, so that no flag excuses a difference."""

    tool: str
    version: str
    papers: list[Row] = field(default_factory=list)
    own: list[Row] = field(default_factory=list)
    claims: bool = False

    @property
    def ok(self) -> bool:
        """Whether every difference has a name; of who claims a semantics, whether there is none."""
        return not any(row.off if self.claims else row.unknown for row in (*self.papers, *self.own))

    def told(self) -> dict[str, Any]:
        """For programs."""
        return {
            "tool": self.tool, "version": self.version, "ok": self.ok,
            "papers": [row.told() for row in self.papers], "own": [row.told() for row in self.own],
        }  # fmt: skip

    def table(self) -> list[tuple[str, str, str, str]]:
        """(method, verdict against the paper, flags that explain it, what refmerge says of the tool holds)."""
        mine = {(row.method, row.through): row for row in self.own}
        theirs = {(row.method, row.through): row for row in self.papers}
        rows = []
        for method, through in sorted(mine.keys() | theirs.keys()):
            paper, own = theirs.get((method, through)), mine.get((method, through))
            count = "" if paper is None else f" ({len(paper.equal) + len(paper.close)} of {_asked(paper)})"
            verdict = "not asked" if paper is None or paper.verdict is None else f"{paper.verdict}{count}"
            named = [] if paper is None else [*paper.flags, *(f"unexplained: {id}" for id in paper.unknown)]
            first = {(at.step, at.title) for at in paper.steps.values()} if paper is not None else ()
            named += [f"first differing step: {step}, {title}" for step, title in sorted(first)]
            said = "" if own is None or not _asked(own) else f"{len(own.equal) + len(own.close)} of {_asked(own)}"
            several = sum(name == method for name, _ in mine) > 1
            rows.append((f"{method} ({through})" if several else method, verdict, ", ".join(named), said))
        return rows

    def not_asked(self) -> list[str]:
        """Why cases of the tool's own entries could not be asked: a line for each entry and reason."""
        lines = []
        for row in self.own:
            for reason in dict.fromkeys(row.skipped.values()):
                count = sum(why == reason for why in row.skipped.values())
                lines.append(f"{row.entry}: {count} of {_asked(row) + len(row.skipped)} cases not asked: {reason}")
        return list(dict.fromkeys(lines))

    def text(self) -> str:
        """For people."""
        head = ("method", "against its paper", "as refmerge says", "because")
        rows = [head, *((m, v, s, f) for m, v, f, s in self.table())]
        widths = [max(len(r[i]) for r in rows) for i in range(3)]
        lines = [f"{self.tool} {self.version}", ""]
        lines += ["  ".join([*(x.ljust(w) for x, w in zip(r, widths)), r[3]]).rstrip() for r in rows]
        for row in (*self.own, *self.papers):
            lines += [f"{id}: {what}" for id, (what, flags) in row.off.items() if not flags or id in row.steps]
        lines += ["", *skipped] if (skipped := self.not_asked()) else []
        return "\n".join(lines)

    def html(self) -> str:
        """One page by itself: the table, and the meaning of each flag."""

        def cells(tag: str, row: Iterable[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"

        body = [
            cells("th", ("method", "against its paper", "because", "as refmerge says")),
            *(cells("td", r) for r in self.table()),
        ]
        notes = []
        for row in self.papers:
            described = testing.flags(row.method)
            notes += [f"<dt>{html.escape(f)}</dt><dd>{html.escape(_meaning(described[f]))}</dd>" for f in row.flags]
        title = html.escape(f"{self.tool} {self.version} and the papers")
        return (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
            f"<h1>{title}</h1>\n<table>\n"
            + "\n".join(body)
            + "\n</table>\n<dl>\n"
            + "\n".join(dict.fromkeys(notes))
            + "\n</dl>\n</html>\n"
        )

    def junit(self) -> str:
        """The same for a build server: a suite a row; what differs and has a name is skipped, what has none fails."""
        root = ElementTree.Element("testsuites", name=f"{self.tool} {self.version}")
        for row in [*self.papers, *self.own]:
            suite = ElementTree.SubElement(
                root, "testsuite", name=f"{row.method} as {row.entry}", tests=str(_asked(row) + len(row.skipped)),
                failures=str(len(row.unknown)), skipped=str(len(row.skipped) + len(row.off) - len(row.unknown)),
            )  # fmt: skip
            for id in [*row.equal, *row.close, *row.off, *row.skipped]:
                case = ElementTree.SubElement(suite, "testcase", name=id, classname=row.entry)
                if id in row.unknown:
                    ElementTree.SubElement(case, "failure", message=row.off[id][0])
                elif id in row.off or id in row.skipped:
                    why = f"{', '.join(row.off[id][1])}: {row.off[id][0]}" if id in row.off else row.skipped[id]
                    ElementTree.SubElement(case, "skipped", message=why)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#1b1f24}"
    "table{border-collapse:collapse}th,td{border:1px solid #c9ced6;padding:.3em .6em;text-align:left;vertical-align:top}"
    "th{background:#f3f5f8}dt{font-weight:600;margin-top:.8em}"
)


def _asked(row: Row) -> int:
    return len(row.equal) + len(row.close) + len(row.off)


def _meaning(note: Mapping[str, Any]) -> str:
    return f"{note['description']} {note['effect']} {'; '.join(f'{who}: {what}' for who, what in note['who'].items())}"


def conform(
    target: str | Callable[..., Any],
    methods: Sequence[str] | None = None,
    *,
    entry: str | None = None,
    python: str | None = None,
    command: bool = False,
    path: str | None = None,
) -> Conformance:
    """Run the vectors against somebody's implementation.

    target: a tool that has an adapter (see `tools`); "module:function" or a function (models, base, **params) -> mapping,
    with or without its steps (see `testing.check`), for one method; or, with `command`, a command line that answers
    requests. methods: None is all that have vectors. entry: whose semantics a function or a command claims; None is the
    paper's. python: the interpreter in which the tool is installed. path: for "official" the checkout of the authors'
    repository, which is recognised by its files.
    UsageError where the other side cannot be asked at all.
    """
    wanted = list(methods) if methods else testing.names()
    if unknown := [m for m in wanted if m not in testing.names()]:
        raise UsageError(f"no vectors for {', '.join(unknown)} (there are some for {', '.join(testing.names())})")
    if callable(target) or (":" in target and not command):
        return _function(target, wanted, entry)
    if command:
        with Answers(shlex.split(target)) as other:
            return _one_semantics(other.tool, other.version, wanted, entry, other.case)
    if path is not None and target not in CHECKOUTS:
        raise UsageError(f"a path is for {' and '.join(CHECKOUTS)}, code in a checkout; {target!r} is asked where it is")
    if target not in tools():
        raise UsageError(
            f"no adapter for {target!r} (there are some for {', '.join(tools())}): name a function as module:function, or a "
            "command with --command"
        )
    with _adapter(target, python, path) as other:
        return _tool(other, target, wanted)


def _adapter(tool: str, python: str | None, path: str | None) -> Answers:
    if tool in CHECKOUTS and path is None:
        raise UsageError(f"{tool}: give the checkout of the authors' repository (--path)")
    if path is not None and not Path(path).is_dir():
        raise UsageError(f"{path} is no folder")
    command = [python or sys.executable, str(resources.files("refmerge.compat") / tool / "adapter.py")]
    return Answers(command if path is None else [*command, str(Path(path).resolve())])


def _function(target: str | Callable[..., Any], methods: Sequence[str], entry: str | None) -> Conformance:
    if callable(target):
        function, name = target, getattr(target, "__qualname__", repr(target))
    else:
        from refmerge.collect import named

        function, name = named(target), target
    if len(methods) != 1:
        raise UsageError(f"{name} is one function: name the one method that it is (--method ties)")
    takes = testing.keywords(function)

    def ask(case: testing.Case) -> Mapping[str, Any]:
        extra = dict(case.options) | ({"stats": case.stats} if case.stats is not None else {})
        if missing := [key for key in extra if not takes(key)]:
            raise NotSupported(f"the function takes no {' or '.join(missing)}")
        try:
            return function(case.models, case.base, **extra, **case.params)
        except Exception as e:  # whatever it is, the function refused
            raise ToolError(f"{type(e).__name__}: {e}") from e

    return _one_semantics(name, "", methods, entry, ask)


def _one_semantics(tool: str, version: str, methods: Sequence[str], entry: str | None, ask: Ask) -> Conformance:
    found = Conformance(tool, version, claims=True)
    for method in methods:
        row = Row(method, entry or method)
        for case in testing.vectors(method, row.entry):
            _note(row, case, ask, case.flags)
        if _asked(row) or row.skipped:
            found.papers.append(row)
        elif entry is not None:
            known = sorted({case.entry for case in testing.vectors(method)})
            raise UsageError(f"no vectors of {method} for the entry {entry!r} (entries: {', '.join(known)})")
    return found


def _tool(other: Answers, tool: str, methods: Sequence[str]) -> Conformance:
    """A tool is asked what the cases of its own entries ask; where the paper's semantics has the same inputs, it is held to
    that too."""
    found = Conformance(other.tool, other.version)
    for method in methods:
        cases = {case.id: case for case in testing.vectors(method)}
        notes = testing.flags(method)
        for entry in dict.fromkeys(case.entry for case in cases.values()):
            prefix = entry.partition(":")[0]
            if entry not in other.entries and (tool in CHECKOUTS or not entry.startswith(f"{tool}:")):
                continue
            said, paper = Row(method, entry, entry), Row(method, method, entry)
            for case in (case for case in cases.values() if case.entry == entry):
                try:
                    answer: Any = other.case(case)
                except NotSupported as reason:
                    said.skipped[case.id] = str(reason)
                    continue
                except ToolError as error:
                    answer = error
                _note(said, case, partial(_given, answer), tuple(f for f in case.flags if _speaks_of(notes[f], prefix)))
                twin = (
                    cases.get(case.id.removesuffix(f"-{prefix}"))
                    if case.id.endswith(f"-{prefix}")
                    else cases.get(f"{case.id}-paper")
                )
                if twin is not None and twin.entry == method and _holds(case, twin):
                    flags = tuple(f for f in dict.fromkeys(case.flags + twin.flags) if _speaks_of(notes[f], prefix))
                    _note(paper, twin, partial(_given, answer), flags)
            found.own.append(said)
            found.papers += [paper] if _asked(paper) else []
    return found


def _holds(case: testing.Case, twin: testing.Case) -> bool:
    """Whether a case's models have all tensors that those of its twin have."""
    return all(x.keys() >= y.keys() for x, y in zip(case.models, twin.models, strict=False))


def _speaks_of(note: Mapping[str, Any], prefix: str) -> bool:
    """Whether a flag says what the code does whose entries have this prefix."""
    return any(re.match(rf"{prefix.replace('_', '[-_]')}\b", who, re.IGNORECASE) for who in note["who"])


def _given(answer: Any, case: testing.Case) -> Any:
    if isinstance(answer, ToolError):
        raise answer
    return answer


def _note(row: Row, case: testing.Case, ask: Ask, flags: tuple[str, ...]) -> None:
    got: Any
    try:
        got = ask(case)
    except NotSupported as reason:
        row.skipped[case.id] = str(reason)
        return
    except ToolError as error:
        got = error
    problem = testing.outcome(case, partial(_given, got, case), error=ToolError)
    if problem:
        row.off[case.id] = (problem, flags)
        if first := testing.first_differing(case, testing.answered(got)[1]):
            row.steps[case.id] = first
    elif case.result == "valid" and not _same(testing.answered(got)[0], case.expect):
        row.close.append(case.id)
    else:
        row.equal.append(case.id)


def _same(got: Mapping[str, Any], expect: Mapping[str, Any]) -> bool:
    try:
        testing.assert_same({name: got[name] for name in expect}, expect, signed_zero=False)
    except AssertionError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------- the fuzz


@dataclass(frozen=True)
class Difference:
    """The smallest input found on which a tool and refmerge's entry for it disagree."""

    entry: str
    what: str
    reproducer: str

    def text(self) -> str:
        """For people: what is wrong, and Python that shows refmerge's side."""
        return f"\n{self.entry}: {self.what}\n{self.reproducer}"


def fuzzed(
    tool: str, methods: Sequence[str], examples: int, python: str | None = None, path: str | None = None
) -> list[Difference]:
    """What `fuzz` finds for each entry of a tool."""
    from refmerge import registry

    found = []
    with _adapter(tool, python, path) as other:
        for entry in other.entries:
            if entry in registry.names() and (not methods or entry.partition(":")[2] in methods):
                try:
                    difference = fuzz(other, entry, examples)
                except NotSupported:
                    continue
                found += [difference] if difference else []
    return found


def fuzz(other: Answers, entry: str, examples: int, seed: int = 0) -> Difference | None:
    """Random inputs that bite, to a tool and to refmerge's entry for it, made as small as they can be where they disagree.

    Numbers that differ come before inputs that one of the two refuses, which are told where there is nothing else. None
    where no difference was found. Methods that draw at random, or rest on statistics, cannot be asked.
    """
    return _search(other, entry, examples, seed, _of_numbers) or _search(other, entry, examples, seed, _disagree)


def _search(other: Answers, entry: str, examples: int, seed: int, compare: Callable[[Any, Any], str]) -> Difference | None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from refmerge.api import merge
    from refmerge.laws import Trial
    from refmerge.registry import get

    method = get(entry)
    if "rng" in method.asks or method.stats or method.outputs:
        raise NotSupported("draws at random, or rests on statistics")
    last: dict[str, Any] = {}

    @seeded(seed)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False,
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.data())
    def agree(data: Any) -> None:
        trial = Trial(method, data.draw, 0)
        models, base = trial.inputs()
        params = method.bind(trial.params(len(models)), len(models))
        ours: Any
        try:
            with np.errstate(all="ignore"):
                ours = merge(models, entry, base=base, nonfinite="propagate", **params)
        except RefmergeError as refused:
            ours = ToolError(str(refused))
        try:
            theirs: Any = other.ask("fuzz", entry, models, base, None, params)
        except NotSupported:
            return
        except ToolError as refused:
            theirs = refused
        problem = compare(theirs, ours)
        if problem:
            case = testing.Case("fuzz", entry, "valid", "", (), dict(params), models, base, {}, 0.0)
            last.update(what=problem, reproducer=case.reproducer())
        assert not problem

    try:
        agree()
    except AssertionError:
        return Difference(entry, last["what"], last["reproducer"])
    return None


def _disagree(theirs: Any, ours: Any) -> str:
    for who, answer, another in (("the tool", theirs, ours), ("refmerge", ours, theirs)):
        if isinstance(answer, ToolError) and not isinstance(another, ToolError):
            return f"{who} refuses it: {answer}"
    return _of_numbers(theirs, ours)


def _of_numbers(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, ToolError) or isinstance(ours, ToolError):
        return ""
    for name, x in ours.items():
        tolerance = 1e-5 if x.dtype.itemsize <= 4 else 1e-6
        try:
            testing.assert_close(theirs[name], x, tolerance)
        except AssertionError as e:
            return f"{name}: {e}"
    return ""
