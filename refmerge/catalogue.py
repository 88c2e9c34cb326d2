"""What there is, by name: methods, procedures, recipe pages and other tools' entries, each with what its page says.

`entries()` lists them, `find(name)` gives one, `described` the same for programs, `bibtex` its paper's citation. How a
person sees them in a terminal is in refmerge.show.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from refmerge import pages, registry
from refmerge.errors import UsageError
from refmerge.method import Method
from refmerge.pages import Page
from refmerge.procedure import Procedure

__all__ = ["Entry", "bibtex", "described", "differences", "entries", "find"]


@dataclass(frozen=True)
class Entry:
    """One thing with a name. kind: "method", "procedure" or "recipe", a merge that is made of methods. tool: whose own
    semantics it has, "" for refmerge's. code: the Method or Procedure, None for a recipe. ours: whether it comes with
    refmerge. summary: one sentence."""

    name: str
    kind: str
    tool: str
    code: Method | Procedure | None
    ours: bool
    summary: str

    @property
    def pages(self) -> list[Page]:
        """Its page; of another tool's entry the page of its name, and where no method has that name the methods' pages
        whose vectors have the entry."""
        bare = self.name.rpartition(":")[2]
        known = [pages.page(name) for kind in pages.SECTIONS_OF for name in pages.names(kind)]
        named = [page for page in known if page.name == bare and (self.ours or self.tool)]
        if not self.tool or any(page.kind == "method" for page in named):
            return named
        shown = [page for page in known if f'"entry": "{self.name}"' in _vectors(page.name) and page not in named]
        return named + [page for page in shown if page.kind == "method"] or shown

    @property
    def page(self) -> Page | None:
        found = self.pages
        return found[0] if found else None

    @property
    def source(self) -> str:
        """The paper, or the code of which an entry of another tool has the semantics."""
        return self.code.paper if self.code is not None else pages.page(self.name).front["paper"]


def _vectors(name: str) -> str:
    file = resources.files("refmerge.spec") / "vectors" / f"{name}.json"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def entries() -> list[Entry]:
    """Everything, sorted: refmerge's own methods, procedures and recipes, then others' methods. A plug-in that is broken is
    a warning and no entry."""
    found = []
    for name in registry.names():
        with contextlib.suppress(UsageError):
            found.append(_method(name))
    found += [_procedure(name) for name in registry.procedures()]
    found += [_recipe(name) for name in pages.names("recipe")]
    return sorted(found, key=lambda e: (bool(e.tool), e.tool, list(pages.SECTIONS_OF).index(e.kind), e.name))


def find(name: str) -> Entry:
    """The entry of that name. UsageError says what is near where there is none."""
    if name in registry.names():
        return _method(name)
    if name in registry.procedures():
        return _procedure(name)
    if name in pages.names("recipe"):
        return _recipe(name)
    if ":" in name:
        registry.get(name)  # raises the error that says what the tool has
    every = [*registry.names(), *registry.procedures(), *pages.names("recipe")]
    near = [n for n in every if name and n.partition(":")[2] == name]
    near += difflib.get_close_matches(name.lower(), [n for n in every if ":" not in n], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(f"no method, procedure or recipe {name!r}{hint} (`refmerge methods` lists them all)")


def _method(name: str) -> Entry:
    method = registry.get(name)
    return Entry(name, "method", name.rpartition(":")[0], method, registry.comes_with(name), _sentence(method.doc))


def _procedure(name: str) -> Entry:
    procedure = registry.procedure(name)
    return Entry(name, "procedure", "", procedure, True, _sentence(procedure.doc))


def _recipe(name: str) -> Entry:
    """A recipe says in the comment at its top what it does."""
    page = pages.page(name)
    comment = itertools.takewhile(lambda line: line.startswith("#"), recipe_text(recipes(page)[0]).splitlines())
    sentence = _sentence("\n".join(line.lstrip("# ") for line in comment))
    named = page.title.lower() in sentence.lower()
    return Entry(name, "recipe", "", None, True, sentence if named else f"{page.title}: {sentence}")


def _sentence(text: str) -> str:
    """The first sentence of the first paragraph, on one line and without marks of emphasis."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0]
    return re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", sentence)


def differences(entry: Entry) -> list[tuple[str, dict[str, Any], dict[str, str]]]:
    """(flag, what its page says, who -> what) for the flags of an entry's pages that mention its tool."""
    found = []
    for page in entry.pages:
        for flag, fact in page.front.get("flags", {}).items():
            theirs = {who: says for who, says in fact["who"].items() if _tool(who) == _tool(entry.tool)}
            if theirs:
                found.append((flag, fact, theirs))
    return found


def _tool(who: str) -> str:
    """`mergekit` for mergekit 0.1.5, `sd_mecha` for sd-mecha: flags name tools as these are written."""
    return who.partition(" ")[0].lower().replace("-", "_")


def described(entry: Entry) -> dict[str, Any]:
    """What a program needs to know."""
    page, code = entry.page, entry.code
    told: dict[str, Any] = {
        "name": entry.name, "kind": entry.kind, "family": page.family if page else None, "tool": entry.tool or None,
        "summary": entry.summary, "source": entry.source, "doc": code.doc if code else "",
        "pages": [p.name for p in entry.pages],
    }  # fmt: skip
    if isinstance(code, Method):
        told |= {
            "asks": list(code.asks),
            "optional_base": code.optional_base,
            "models": list(code.models),
            "stats": dict(code.stats),
        }
        told["parameters"] = {
            p.name: {"type": p.type.__name__, "default": None if p.required else p.default, "required": p.required,
                     "per_model": p.per_model, "domain": p.domain, "choices": p.choices}
            for p in code.params.values()
        }  # fmt: skip
    elif code is not None:
        arguments = inspect.signature(code.run).parameters.values()
        told["asks"] = [p.name for p in arguments if p.kind is not p.KEYWORD_ONLY]
        told["parameters"] = {
            p.name: {"default": None if p.default is p.empty else p.default, "required": p.default is p.empty}
            for p in arguments
            if p.kind is p.KEYWORD_ONLY
        }
    elif page is not None:
        told["recipes"] = recipes(page)
    return told


def recipes(page: Page) -> list[str]:
    """The files in spec/recipes that a recipe page runs, each once."""
    return list(dict.fromkeys(run["recipe"] for run in page.front["example"]["runs"]))


def recipe_text(file: str) -> str:
    return (resources.files("refmerge.spec") / "recipes" / file).read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- citation


def bibtex(entry: Entry) -> str:
    """BibTeX of the paper that an entry's pages are about. UsageError where none says."""
    cited = {page.front["cite"]["key"]: page for page in entry.pages if "cite" in page.front}
    if not cited:
        raise UsageError(f"{entry.name} has no page with a citation; its source is {entry.source}")
    return "\n\n".join(map(_bibtex, cited.values()))


def _bibtex(page: Page) -> str:
    cite, paper = page.front["cite"], page.front["paper"]
    fields = {"title": f"{{{_tex(cite['title'])}}}", "author": _tex(cite["author"]), "year": str(cite["year"])}
    if arxiv := page.arxiv:
        fields |= {"eprint": arxiv, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{arxiv}"}
    if doi := re.search(r"\bdoi:(\S+?)[,.]?(?:\s|$)", paper):
        fields["doi"] = doi[1]
    if "url" in cite:
        fields["url"] = cite["url"]
    width = max(map(len, fields))
    body = ",\n".join(f"  {key:{width}} = {{{value}}}" for key, value in fields.items())
    return f"@misc{{{cite['key']},\n{body}\n}}"


def _tex(text: str) -> str:
    return re.sub(r"([&%#$_])", r"\\\1", text)
