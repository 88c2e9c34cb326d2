"""Write spec/vectors: `python tests/make_vectors.py RESULTS_DIR [METHOD ...]`.

RESULTS_DIR holds what the authors' code and other tools gave on small inputs, one safetensors file per case
(`base/<name>`, `model<k>/<name>`, `stat<k>/<name>`, `out/<name>`; header: registry, source, params, notes, tolerance).
Cases by hand, flags and what to make of the results are in vector_cases/, as is what of the page each case tests. Nothing
here calls refmerge, but to read the pages. The output is the same bytes for the same input; an id, once published, is never
reused. Afterwards `python -m tests.matrix` counts the tests and lists which sentence is tested by which.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from vector_cases import CODES, DTYPES, Exact, Paper, Tensors, Test, origin

from refmerge.pages import Page, page

OUT = Path(__file__).parent.parent / "spec" / "vectors"
CASES = Path(__file__).with_name("vector_cases")
INLINE = 64  # arrays up to this many values are written into the JSON, where people read them

# --- Results of other code --------------------------------------------------------------------------------------------

EVIDENCE_REASON = "kept as evidence for the flags; an implementation may offer this tool's semantics or not"


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    body = memoryview(data)[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }, meta


def part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.partition("/")[2]: x for name, x in tensors.items() if name.partition("/")[0] == prefix}


def results(folder: Path, cases: Any) -> list[Test]:
    """The results of other code that belong to the method of these cases."""
    tests = []
    stems = getattr(cases, "STEMS", (cases.__name__.rpartition(".")[2],))
    tools = ("official", "mergekit", *getattr(cases, "TOOLS", ()))
    papers = getattr(cases, "PAPER", {})
    for path in sorted(path for stem in stems for path in folder.glob(f"{stem}--*.safetensors")):
        tensors, meta = read(path)
        id = path.stem.replace("--", "-")
        if meta["registry"] == "function" and hasattr(cases, "several"):
            tests += cases.several(id, tensors, meta)
            continue
        tool = meta["registry"].partition(":")[0]
        if tool not in tools and id not in getattr(cases, "EVIDENCE", ()):
            continue
        params = {("lambda_" if name == "lambda" else name): x for name, x in json.loads(meta["params"]).items()}
        count = len({name.partition("/")[0] for name in tensors if name.startswith("model")})
        given = {name.partition("/")[0] for name in tensors if name.startswith("stat")}  # the base's too, at times
        stats = [part(tensors, f"stat{k}") for k in range(max(count, len(given)))]
        # Which of equal magnitudes a sort keeps, and what rests on rounding, no other implementation can reproduce.
        loose = re.search("FRAGILE|TIE-DEPENDENT", meta["notes"])
        options = getattr(cases, "OPTIONS", {}).get(id, {})
        sixteen = "-bf16-" in id or any(x.dtype == DTYPES["BF16"] for x in part(tensors, "out").values())
        # Tools round bfloat16 after every operation: one ulp of the largest value, where we round once.
        usual = 2.0**-7 if sixteen and "arithmetic" not in options else float(meta["tolerance"])
        test = Test(
            id=id,
            entry=meta["registry"],
            params=params,
            models=[part(tensors, f"model{k}") for k in range(count)],
            base=part(tensors, "base") or None,
            expect=part(tensors, "out"),
            comment=meta["notes"].strip(" ;").replace("\n", " ") or "random weights",
            source=origin(meta["source"]),
            flags=getattr(cases, "FLAGS", {}).get(id, []),
            tolerance=getattr(cases, "TOLERANCE", {}).get(id, usual),
            result="acceptable" if loose else "valid",
            stats=stats if any(stats) else None,
            options=options,
            registered=tool in tools,
        )
        if not getattr(cases, "accepts", lambda test: True)(test):
            continue
        tests.append(test)
        if id in papers:
            tests.append(paper(test, papers[id]))
    return tests


def paper(test: Test, how: Paper) -> Test:
    """The same arrays under the plain name."""

    def chosen(tensors: Tensors) -> Tensors:
        return {name: x for name, x in tensors.items() if name in how.names} if how.names else tensors

    stats = None if how.without_stats else test.stats
    if how.drop_masks:
        assert stats
        stats = [{f"{name}.mask": np.asarray(1 - x, np.uint8) for name, x in one.items()} for one in stats]
    if how.keep_masks:
        assert stats
        stats = [{f"{name}.mask": x for name, x in one.items()} for one in stats]
    return replace(
        test,
        id=f"{test.id}-paper",
        entry=how.entry or test.entry.rpartition(":")[2],
        params=how.params,
        models=[chosen(x) for x in ([test.base] if how.base_first and test.base else []) + test.models],
        base=chosen(test.base) if test.base and not how.base_first else None,
        expect=chosen(test.expect),
        comment=how.comment or "the tool does what the paper says",
        flags=[],
        stats=stats,
        registered=True,
    )


# --- What they show ---------------------------------------------------------------------------------------------------


def staged(test: Test, stages: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Values of steps as arrays of the case's dtype. They are exact, unless the case has a tolerance."""
    ((name, expect),) = test.expect.items()

    def array(value: Any) -> np.ndarray:
        exact = np.asarray(value, dtype=object)
        x = exact.astype(np.float64).astype(expect.dtype if exact.shape else np.float64)
        assert test.tolerance or np.array_equal(exact, x.astype(object)), f"{test.id}: a step's value is not exact"
        return x

    found = {
        step: {key: [array(x) for x in value] if isinstance(value, list) else array(value) for key, value in values.items()}
        for step, values in stages.items()
    }
    x, y = found[max(found)]["result"].astype(np.float64), expect.astype(np.float64)
    assert x.shape == y.shape and np.all(abs(x - y) <= test.tolerance * np.max(abs(y), initial=0)), f"{test.id}: {name}"
    return found


def pointers(cases: dict[str, list[str]], page: Page, tests: list[Test]) -> dict[str, list[str]]:
    """Id -> what of the page it tests. The other entries' answers to the same input test the same."""
    steps = [f"step {number}" for number, _ in page.steps]
    plain = {test.id for test in tests if test.entry == page.name}
    found: dict[str, list[str]] = {}
    for words, ids in cases.items():
        for id in ids:
            assert id in plain, f"{page.name}.toml: no case {id} under the plain name"
            found.setdefault(id, []).extend(steps if words == "all steps" else [words])
    order = [place.key for place in page.places]
    for test in tests:
        tool = test.entry.rpartition(":")[0]
        twins = (test.id, re.sub(rf"-{tool}(-\d+)?$", "", test.id), f"{test.id}-paper")
        words = next((found[id] for id in twins if id in found), [])
        found[test.id] = sorted(dict.fromkeys(words), key=lambda w: order.index(page.place(w).key))
    return found


# --- Writing ----------------------------------------------------------------------------------------------------------


def number(x: Any) -> Any:
    """A JSON value that reads back as the same number: the shortest decimal, or a word where JSON has no number."""
    if x.dtype.kind in "iub":
        return x.item()
    value = float(x)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    short = float(np.format_float_scientific(x, unique=True)) if x.dtype.kind == "f" else value
    assert x.dtype.type(short) == x
    return short


class Writer:
    """Turns tests into the document, moving larger arrays into the twin; equal arrays are stored once."""

    def __init__(self, page: Page, tests: list[Test], cases: dict[str, list[str]]) -> None:
        self.titles, self.pointers = dict(page.steps), pointers(cases, page, tests)
        self.twin: Tensors = {}
        self.stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def tensor(self, x: np.ndarray, key: str) -> dict[str, Any]:
        if x.size <= INLINE:
            return {"dtype": CODES[x.dtype], "shape": list(x.shape), "data": [number(v) for v in x.reshape(-1)]}
        name = self.stored.setdefault((CODES[x.dtype], x.shape, x.tobytes()), key)
        self.twin[name] = x
        return {"$ref": name}

    def tensors(self, tensors: Tensors, key: str) -> dict[str, Any]:
        return {name: self.tensor(x, f"{key}/{name}") for name, x in sorted(tensors.items())}

    def test(self, t: Test) -> dict[str, Any]:
        out: dict[str, Any] = {"id": t.id, "comment": t.comment, "flags": t.flags, "result": t.result}
        out["base"] = None if t.base is None else self.tensors(t.base, f"{t.id}/base")
        out["models"] = [self.tensors(x, f"{t.id}/model{k}") for k, x in enumerate(t.models)]
        if t.stats is not None:
            out["stats"] = [self.tensors(x, f"{t.id}/stat{k}") for k, x in enumerate(t.stats)]
        out["expect"] = self.tensors(t.expect, f"{t.id}/expect")
        out["tolerance"] = t.tolerance
        if t.stages:
            out["stages"] = [self.stage(t.id, step, values) for step, values in sorted(t.stages.items())]
        if pointers := self.pointers[t.id]:
            out["page"] = pointers
        return out

    def stage(self, id: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
        written = {
            name: [self.tensor(x, f"{id}/{step}/{name}/{n}") for n, x in enumerate(value)]
            if isinstance(value, list)
            else self.tensor(value, f"{id}/{step}/{name}")
            for name, value in values.items()
        }
        return {"step": step, "title": self.titles[step], "values": written}

    def groups(self, tests: list[Test]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for t in tests:
            head: dict[str, Any] = {"entry": t.entry, "source": t.source, "params": t.params}
            if t.options:
                head["options"] = t.options
            if not t.registered:
                head |= {"registered": False, "reason": EVIDENCE_REASON}
            if not groups or {k: v for k, v in groups[-1].items() if k != "tests"} != head:
                groups.append(head | {"tests": []})
            groups[-1]["tests"].append(self.test(t))
        return groups


def render(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits on a line is on one line."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(flat) + indent <= 118 or not isinstance(value, (dict, list)):
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + render(x, indent + 1) for x in value) + "\n" + " " * indent + "]"
    items = (f"{pad}{json.dumps(k)}: {render(x, indent + 1)}" for k, x in value.items())
    return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"


def safetensors(tensors: Tensors) -> bytes:
    """The format by hand: names sorted, so that the file is the same whenever the arrays are."""
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    end = 0
    # Wider dtypes first keep every array aligned to its own size.
    for name, x in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        blobs.append(np.ascontiguousarray(x).tobytes())
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": [end, end := end + x.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def write(method: str, folder: Path) -> str:
    cases = importlib.import_module(f"vector_cases.{method}")
    tests = [*cases.hand().tests, *results(folder, cases)]
    notes = tomllib.loads((CASES / f"{method}.toml").read_text(encoding="utf-8"))
    hit = notes.pop("cases", {})
    notes.pop("untested", None)
    for id in getattr(cases, "STAGED", ()):
        test = next(t for t in tests if t.id == id and t.entry == method)
        test.stages = staged(test, cases.stages(Exact.of(test)))
    writer = Writer(page(method), tests, hit)
    document = {
        "method": method,
        "schema": "vectors.schema.json",
        "number_of_tests": len(tests),
        "notes": dict(sorted(notes.items())),
        "groups": writer.groups(tests),
    }
    (OUT / f"{method}.json").write_text(render(document) + "\n", encoding="utf-8")
    if writer.twin:
        (OUT / f"{method}.safetensors").write_bytes(safetensors(writer.twin))
    return f"{method}: {len(tests)} tests, {len(notes)} flags"


if __name__ == "__main__":
    for chosen in sys.argv[2:] or sorted(p.stem for p in CASES.glob("*.toml")):
        print(write(chosen, Path(sys.argv[1])))
