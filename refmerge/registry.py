"""Name -> method and name -> backend, loaded on first use.

A method's file is its registration: `refmerge/methods/<family>/<name>.py` defines `<name>`, and
`refmerge/compat/<tool>/<name>.py` the entry `<tool>:<name>`; a procedure's is `refmerge/procedures/<family>/<name>.py`.
Others add theirs through the entry-point groups
`refmerge.methods` and `refmerge.backends`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

from refmerge.errors import UsageError
from refmerge.method import Method
from refmerge.procedure import Procedure

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def _modules(root: str) -> dict[tuple[str, str], str]:
    """(folder, name) -> module, of the files two levels below a package, but for steps, whose names begin with an
    underscore, and for a tool's adapter."""
    found = {}
    path = list(importlib.import_module(root).__path__)
    for folder in pkgutil.iter_modules(path):
        if not folder.ispkg:
            continue
        for module in pkgutil.iter_modules([os.path.join(place, folder.name) for place in path]):
            if not module.name.startswith("_") and module.name != "adapter":
                found[folder.name, module.name] = f"{root}.{folder.name}.{module.name}"
    return found


@cache
def _files() -> dict[str, tuple[str, str]]:
    """Registry name -> (module, attribute) of the methods that come with refmerge."""
    ours = {name: (module, name) for (_, name), module in _modules("refmerge.methods").items()}
    return ours | {f"{tool}:{name}": (module, name) for (tool, name), module in _modules("refmerge.compat").items()}


@cache
def _procedures() -> dict[str, str]:
    """Name -> module of the procedures."""
    return {name: module for (_, name), module in _modules("refmerge.procedures").items()}


def procedures() -> list[str]:
    """The names of what is no merge block by block, sorted; see refmerge.procedure."""
    return sorted(_procedures())


def procedure(name: str) -> Procedure:
    """The procedure of that name. UsageError lists what is available where there is none."""
    if name not in _procedures():
        raise UsageError(f"no procedure {name!r} (available: {', '.join(procedures())})")
    return getattr(importlib.import_module(_procedures()[name]), name)


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # which takes as long to import as all of this package's core

    return {ep.name: ep for ep in entry_points(group=group)}


def names() -> list[str]:
    """All method names, sorted: the papers' first, then `tool:name`."""
    return sorted({*_files(), *_entry_points("refmerge.methods")}, key=lambda n: (":" in n, n))


def comes_with(name: str) -> bool:
    """Whether refmerge brings the method of that name; others are other packages' entry points."""
    return name in _files()


def is_ours(method: Method) -> bool:
    """Whether this is a method that refmerge brings, and not another one of its name."""
    return comes_with(method.name) and get(method.name) is method


def _load_plugin(group: str, name: str) -> Any:
    """The object behind an entry point. A plug-in that breaks is a warning that names it, and None."""
    try:
        return _entry_points(group)[name].load()
    except Exception as e:
        warnings.warn(f"plug-in {name!r} of {group} failed to load: {type(e).__name__}: {e}", stacklevel=3)
        return None


@cache
def get(name: str) -> Method:
    """The method of that name. UsageError lists what is available where there is none, or its plug-in is broken."""
    if name in _files():
        module, attribute = _files()[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _entry_points("refmerge.methods"):
        loaded = _load_plugin("refmerge.methods", name)
        if isinstance(loaded, Method):
            return loaded
        if loaded is not None:
            kind = type(loaded).__name__
            warnings.warn(f"plug-in {name!r} of refmerge.methods is no Method but {kind}", stacklevel=2)
    known = [n for n in names() if n != name]  # a plug-in of that name is broken
    if ":" in name:
        raise UsageError(_no_entry(name, known))
    from refmerge import pages  # which imports this module

    for kind in ("procedure", "recipe"):
        if name in pages.names(kind):
            raise UsageError(f"{name} is a {kind} and not a method: `refmerge methods {name}` shows how it is used")
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"no method {name!r}{hint} (available: {', '.join(n for n in known if ':' not in n)})")


def _no_entry(name: str, known: list[str]) -> str:
    """That there is no entry `tool:method` of that name, which one is near, and what else the tool has."""
    tool, _, bare = name.rpartition(":")
    tools = list(dict.fromkeys(n.partition(":")[0] for n in known if ":" in n))
    same_tool = [n for n in known if n.startswith(tool + ":")]
    if same_tool:
        theirs = [n.partition(":")[2] for n in same_tool]
        near = [f"{tool}:{n}" for n in difflib.get_close_matches(bare.lower(), theirs)]
        has = f"{tool} has {', '.join(same_tool)}"
    else:
        near = [f"{t}:{bare.lower()}" for t in difflib.get_close_matches(tool.lower(), tools)]
        has = f"no entry of that tool exists; tools are {', '.join(tools)}"
    hint = next((f"; did you mean {n}?" for n in near if n in known), "")
    also = [n for n in known if n.rpartition(":")[2] == bare]
    others = f"; {bare} exists as {', '.join(also)}" if also else ""
    return f"no method {name!r}{hint} ({has}{others})"


def backend_names() -> list[str]:
    """Names of the registered backends, installed or not."""
    return sorted(_entry_points("refmerge.backends"))


def open_backend(spec: str) -> Any:
    """The backend for "numpy", "torch", "torch:cuda:0", "cupy", ... UsageError if it is missing or cannot run here."""
    if spec == "numpy":  # the usual one, without a look at what else is installed
        return importlib.import_module("refmerge.backends.numpy").open(None)
    name, _, device = spec.partition(":")
    if name not in _entry_points("refmerge.backends"):
        raise UsageError(f"no backend {name!r} (available: {', '.join(backend_names())})")
    module = _load_plugin("refmerge.backends", name)
    if module is None:
        raise UsageError(
            f"backend {name!r} is broken (available: {', '.join(n for n in backend_names() if n != name)})"
        )
    return module.open(device or None)
