"""Measures what spec/reliability.md publishes, and writes it.

    python -m tests.reliability [PART ...] [--mutants 1000000] [--signals 100] [--write]

PART is any of files, agreement, limits, folders, crashes, kinds, signals; all of them take about an hour of one core.
Results are kept in tests/data/reliability.json, and --write alone writes the page from what is there. `agreement` installs
five releases of the safetensors package into a temporary folder, or into --releases FOLDER and uses them again from there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.reliability import agreement, containment, corpus, crashes, fuzz, limits, recipes, signals

EVERY = 29  # calls of which one is stopped at, in recipes of all kinds
ROOT = Path(__file__).parents[2]
STORE = ROOT / "tests" / "data" / "reliability.json"
PAGE = ROOT / "spec" / "reliability.md"


def files(arguments: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for content in [*corpus.MALFORMED.values(), *corpus.VALID.values()]:
            fuzz.look(Path(folder) / "x.safetensors", content)
    return {"corpus": len(corpus.MALFORMED), "valid": len(corpus.VALID), **fuzz.many(arguments.mutants)}


def releases(arguments: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return agreement.compare(agreement.install(Path(arguments.releases or folder)))


def folders(arguments: argparse.Namespace) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = list(containment.cases(Path(folder) / "x"))
    wrong = [what for what, allowed, read in found if allowed != read]
    if wrong:
        raise SystemExit(f"wrongly read or refused: {wrong}")
    return {"cases": len(found), "refused": sum(not read for _, _, read in found)}


def crashed(arguments: argparse.Namespace) -> Any:
    found = {}
    for what, stop, options in (
        ("killed", crashes.kill, {}),
        ("killed, over an older output", crashes.kill, {"overwrite": True, "method": "ties"}),
        ("killed, one file", crashes.kill, {"single": True}),
        ("killed, a pipeline", crashes.kill, {"pipelines": True}),
        ("a call fails", crashes.fail, {}),
        ("a call fails, over an older output", crashes.fail, {"overwrite": True}),
        ("a call fails, not to be resumed", crashes.fail, {"resume": False}),
        ("a call fails, a pipeline over an older output", crashes.fail, {"pipelines": True, "overwrite": True}),
    ):
        with crashes.fast_folder() as folder:
            found[what] = Counter(outcome for _, outcome in crashes.points(folder, stop, **options))
        print(what, dict(found[what]), flush=True)
    return found


def kinds(arguments: argparse.Namespace) -> Any:
    found: dict[str, Counter[str]] = {}
    for kind in crashes.RECIPES:
        for what, stop in (("killed", crashes.kill), ("a call fails", crashes.fail)):
            with crashes.fast_folder() as folder:
                points = crashes.points(folder, stop, kind=kind, every=EVERY)
                found[f"{kind}, {what}"] = Counter(outcome for _, outcome in points)
            print(kind, what, dict(found[f"{kind}, {what}"]), flush=True)
    return found


def interrupted(arguments: argparse.Namespace) -> Any:
    with crashes.fast_folder() as folder:
        return signals.run(folder, arguments.signals)


PARTS = {
    "files": files,
    "agreement": releases,
    "limits": lambda arguments: limits.measure(),
    "folders": folders,
    "crashes": crashed,
    "kinds": kinds,
    "signals": interrupted,
}


def page(found: dict[str, Any]) -> str:
    """The page, from results."""
    f, a, c, k, s = (found[part]["found"] for part in ("files", "agreement", "crashes", "kinds", "signals"))
    looser = sorted({what for release in a.values() for what in release["looser"]})
    stricter = sorted({what for release in a.values() for what in release["only refmerge accepts"]})
    values = {
        "corpus": f["corpus"],
        "valid": f["valid"],
        "mutants": f"{f['read'] + f['refused']:,}",
        "read": f"{f['read']:,}",
        "longest": f"{f['longest']:.2f}",
        "peak": f"{f['peak'] / 1e6:.0f}",
        "cases": found["folders"]["found"]["cases"],
        "refused": found["folders"]["found"]["refused"],
        "recipes": len(recipes.REFUSED),
        "points": sum(sum(outcomes.values()) for outcomes in (*c.values(), *k.values())),
        "every": EVERY,
        "signals": s["signals"],
        "met": s["met"],
        "stop": f"{s['longest']:.2f}",
        "work": f"{s['processor']:.2f}",
        "dates": "; ".join(f"{part} {found[part]['date']}" for part in PARTS),
        "machine": found["files"]["machine"],
        "looser": ", ".join(looser),
        "stricter": ", ".join(stricter) or "none",
    }
    parts = ("memory", "own", "package")
    tables = {
        "agreement": _table(
            ["release", "both accept", "both refuse", "only it accepts", "only refmerge accepts", "its files read by us",
             "ours read by it"],
            [[r, n["both accept"], n["both refuse"], n["only it accepts"], len(n["only refmerge accepts"]),
              "{} of {}".format(*n["its files read"]), "{} of {}".format(*n["ours read"])] for r, n in a.items()],
        ),
        "limits": _table(
            ["file", "header MB", "outcome", "seconds", "memory MB", "memory / header", "our parser alone", "the package's"],
            [[name, f"{n['header'] / 1e6:.3g}", n["outcome"], f"{n['seconds']:.2f}", f"{n['memory'] / 1e6:.0f}",
              *(f"{n[key] / n['header']:.1f}" if key in n and n["header"] > 1e6 else "" for key in parts)]
             for name, n in found["limits"]["found"].items()],
        ),
        "crashes": _stops("stopped how", c),
        "kinds": _stops("recipe, stopped how", k),
    }  # fmt: skip
    text = Path(__file__).with_name("page.md").read_text("utf-8")
    for key, value in {**values, **tables}.items():
        text = text.replace(f"<{key}>", str(value))
    return text


def _stops(what: str, found: dict[str, dict[str, int]]) -> str:
    rows = [[how, sum(n.values()), n.get("absent", 0) + n.get("old", 0), n.get("new", 0)] for how, n in found.items()]
    return _table([what, "points", "old or no output", "new output"], rows)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[*PARTS, []])
    parser.add_argument("--mutants", type=int, default=1_000_000)
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--releases")
    parser.add_argument("--write", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    found = json.loads(STORE.read_text("utf-8")) if STORE.exists() else {}
    for part in arguments.parts or ([] if arguments.write else PARTS):
        told = PARTS[part](arguments)
        system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
        found[part] = {"date": datetime.date.today().isoformat(), "machine": system, "found": told}
        STORE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
        print(part, json.dumps(told), flush=True)
    if found.keys() >= PARTS.keys():
        PAGE.write_text(page(found), "utf-8")


if __name__ == "__main__":
    main()
