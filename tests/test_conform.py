"""Somebody's implementation, a command in another language and installed tools are given their verdicts."""

from __future__ import annotations

import importlib.util
import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from refmerge import registry, testing
from refmerge.cli import main
from refmerge.conform import Conformance, NotSupported, Row, ToolError, conform, fuzz, tools
from refmerge.errors import UsageError

# A command that averages as the paper does, with the standard library alone, and says that it cannot do anything else.
COMMAND = """
import base64, json, struct, sys
KIND = {"F32": "f", "F64": "d"}
print(json.dumps({"tool": "toy", "version": "1", "entries": ["linear"]}), flush=True)
for line in sys.stdin:
    q = json.loads(line)
    answer = {"id": q["id"]}
    try:
        if q["entry"] != "linear":
            raise KeyError(q["entry"])
        n = len(q["models"])
        w = q["params"].get("weight", 1.0)
        w = [float(x) for x in w] if isinstance(w, list) else [float(w)] * n
        if q["params"].get("normalize", True):
            w = [x / sum(w) for x in w]
        out = {}
        for name, x in q["models"][0].items():
            kind = KIND[x["dtype"]]
            count = len(base64.b64decode(x["data"])) // struct.calcsize(kind)
            rows = [struct.unpack(f"<{count}{kind}", base64.b64decode(m[name]["data"])) for m in q["models"]]
            mean = [sum(a * b for a, b in zip(w, column)) for column in zip(*rows)]
            out[name] = {**x, "data": base64.b64encode(struct.pack(f"<{count}{kind}", *mean)).decode()}
        answer["tensors"] = out
    except KeyError as e:
        answer["unsupported"] = f"no {e}"
    except Exception as e:
        answer["error"] = str(e)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(COMMAND)
    return f"{sys.executable} {path}"


def test_a_command_in_no_ones_language(toy):
    found = conform(toy, ["linear", "slerp"], command=True)
    assert (found.tool, found.version) == ("toy", "1")
    rows = {row.method: row for row in found.papers}
    assert rows["slerp"].verdict is None and set(rows["slerp"].skipped.values()) == {"no 'slerp'", "asks for over"}
    linear = rows["linear"]
    assert len(linear.equal) + len(linear.close) >= 10
    assert "linear-normalizes" in linear.equal
    # what it does wrong, by the vectors: float64 sums overflow no float32, NaN spreads from a weight of zero, ...
    for id, (what, flags) in linear.off.items():
        case = next(c for c in testing.vectors("linear") if c.id == id)
        assert what and flags == case.flags


def half_wrong(models, base, *, density=0.2, lambda_=1.0):
    """TIES that forgets to trim."""
    tau = [{k: m[k].astype(np.float64) - base[k] for k in base} for m in models]
    out = {}
    for k in base:
        sign = np.sign(sum(t[k] for t in tau))
        kept = [np.where(np.sign(t[k]) == sign, t[k], 0) for t in tau]
        count = np.maximum(sum((x != 0).astype(int) for x in kept), 1)
        out[k] = (base[k] + lambda_ * sum(kept) / count).astype(base[k].dtype)
    return out


def test_a_function():
    found = conform(half_wrong, ["ties"])
    (row,) = found.papers
    assert row.verdict == "unknown difference" and not found.ok and row.unknown
    assert any(why == "the function takes no over" for why in row.skipped.values())
    right = conform(lambda models, base, **params: registry_merge("wise_ft", models, base, params), ["wise_ft"])
    assert right.ok and right.papers[0].verdict == "equal"


def registry_merge(name, models, base, params):
    import refmerge

    options = {"nonfinite": "propagate"} | ({} if "integers" in params else {"integers": "base"})
    return refmerge.merge(models, name, base=base, **options, **params)


def test_a_flag_is_no_excuse_for_who_claims_the_papers_semantics():
    def lerp(models, base, *, alpha=0.5):
        """The paper's line in another form, which rounds otherwise; that has a name. All else is refmerge's."""
        right = registry_merge("wise_ft", models, base, {"alpha": alpha})
        return {
            k: x + (alpha * (models[0][k] - x)).astype(x.dtype) if x.dtype.kind == "f" else right[k] for k, x in base.items()
        }

    found = conform(lerp, ["wise_ft"])
    (row,) = found.papers
    assert row.verdict == "differs" and row.flags == ["WiseFtLerpForm"] and not row.unknown
    assert not found.ok


def test_by_name_as_the_command_does(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("import refmerge\ndef ties(models, base, **params):\n    return models[0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    got = CliRunner().invoke(main, ["conform", "theirs:ties", "--method", "ties", "--json"])
    assert got.exit_code == 1 and json.loads(got.output)["papers"][0]["verdict"] == "unknown difference"
    got = CliRunner().invoke(main, ["conform", "theirs:ties", "--method", "ties"])
    assert "unexplained: " in got.output and "theirs:ties" in got.output


@pytest.mark.parametrize(
    "target, options, said",
    [
        ("merjkit", {}, "no adapter for 'merjkit' .there are some for fusion_bench, mergekit, official, peft, sd_mecha"),
        ("math:no", {"methods": ["ties"]}, "math:no: module 'math' has no attribute 'no'"),
        ("math:sin", {}, "math:sin is one function: name the one method"),
        ("mergekit", {"methods": ["tyes"]}, "no vectors for tyes"),
        ("math:sin", {"methods": ["ties"], "entry": "x:ties"}, "no vectors of ties for the entry 'x:ties'"),
        ("/no/such/command", {"command": True}, "/no/such/command cannot be run"),
        (f"{sys.executable} -c 1", {"command": True}, "ended without an answer"),
        (f"{sys.executable} -c print(3)", {"command": True}, "'3' is no answer: a line of JSON, an object"),
        ("mergekit", {"python": "/no/python"}, "/no/python .* cannot be run"),
        ("official", {}, "official: give the checkout of the authors' repository"),
        ("official", {"path": "/no/checkout"}, "/no/checkout is no folder"),
        ("mergekit", {"path": "."}, "a path is for official, code in a checkout; 'mergekit' is asked where it is"),
    ],
)
def test_refusals(target, options, said):
    with pytest.raises(UsageError, match=said):
        conform(target, options.pop("methods", None), **options)


def test_a_command_that_dies(tmp_path):
    path = tmp_path / "dies.py"
    path.write_text('import sys; print("{}", flush=True); sys.stdin.readline(); sys.exit("so long")')
    with pytest.raises(UsageError, match="ended without an answer: so long"):
        conform(f"{sys.executable} {path}", ["linear"], command=True)


def test_a_command_that_talks(tmp_path):
    """More than a pipe holds."""
    (tmp_path / "talks.py").write_text("import sys\nsys.stderr.write('x' * 1_000_000)\nsys.stderr.flush()\n" + COMMAND)
    assert conform(f"{sys.executable} {tmp_path / 'talks.py'}", ["linear"], command=True).papers


def test_every_tool_has_entries_that_it_is_asked_for():
    assert tools() == ["fusion_bench", "mergekit", "official", "peft", "sd_mecha"]
    assert not [name for name in registry.names() if name.endswith(":adapter")]


def test_pages_and_reports(toy, tmp_path):
    run = CliRunner().invoke
    page, suite = tmp_path / "t.html", tmp_path / "t.xml"
    run(main, ["conform", toy, "--command", "--method", "linear", "--html", str(page), "--junit", str(suite)])
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "<td>linear</td>" in text and "http" not in text and "<script" not in text
    root = ElementTree.parse(suite).getroot()
    (cases,) = root
    assert cases.get("name") == "linear as linear" and len(cases) == int(cases.get("tests"))
    got = run(main, ["conform", toy, "--command", "--method", "linear", "--html", str(tmp_path / "no" / "t.html")])
    assert got.exit_code == 2 and "cannot be written" in got.output


# --- Random inputs ----------------------------------------------------------------------------------------------------


class Fake:
    """The other side, without a process."""

    def __init__(self, answer):
        self.ask = lambda id, entry, models, base, stats, params: answer(models, base, params)


def test_fuzz_finds_and_shrinks():
    def lerp(models, base, params):
        return {k: x + np.asarray(params["t"] * (models[0][k] - x), x.dtype) if x.size else x for k, x in base.items()}

    found = fuzz(Fake(lerp), "mergekit:slerp", 200)
    assert found is not None and "differ" in found.what
    assert "mergekit:slerp" in found.reproducer and found.reproducer.count("np.array(") <= 12


def test_fuzz_is_silent_where_there_is_nothing():
    def passthrough(models, base, params):
        return {k: np.asarray(x * x.dtype.type(params["scale"][0]), x.dtype) for k, x in models[0].items()}

    assert fuzz(Fake(passthrough), "mergekit:passthrough", 100) is None


def test_fuzz_puts_numbers_before_refusals():
    """A tool that refuses what is empty, and is wrong elsewhere."""

    def wrong(models, base, params):
        if not all(x.size for x in models[0].values()):
            raise ToolError("empty")
        return {k: 0 * x for k, x in models[0].items()}

    found = fuzz(Fake(wrong), "mergekit:passthrough", 100)
    assert found is not None and "differ" in found.what


def test_fuzz_tells_who_refuses():
    def never(models, base, params):
        raise ToolError("never")

    found = fuzz(Fake(never), "mergekit:passthrough", 20)
    assert found is not None and found.what == "the tool refuses it: never"
    with pytest.raises(NotSupported):
        fuzz(Fake(never), "mergekit:dare_ties", 20)


# --- The authors' code, in a checkout ---------------------------------------------------------------------------------

# Of the form of theirs, and of ours: a sum, in a file that does more when it is run, and imports what is nowhere.
CHECKOUT = """
from __future__ import annotations
import no_such_module
from no_such_module import missing
raise SystemExit("this file was run")

class TaskVector():
    def __init__(self, pretrained_checkpoint=None, finetuned_checkpoint=None, vector=None):
        self.vector = vector
        if vector is None:
            a, b = (torch.load(x).state_dict() for x in (pretrained_checkpoint, finetuned_checkpoint))
            self.vector = {k: b[k] - a[k] for k in a if a[k].is_floating_point()}

    def __add__(self, other: TaskVector):
        return TaskVector(vector={k: x + other.vector[k] for k, x in self.vector.items()})

    def __radd__(self, other):
        return self

    def __neg__(self):
        return TaskVector(vector={k: -x for k, x in self.vector.items()})

    def apply_to(self, pretrained_checkpoint, scaling_coef=1.0):
        model = torch.load(pretrained_checkpoint)
        state = {k: x + scaling_coef * self.vector[k] for k, x in model.state_dict().items() if k in self.vector}
        model.load_state_dict(state, strict=False)
        return model

import torch
"""


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_checkout_is_known_by_a_file_of_it(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "task_vectors.py").write_text(CHECKOUT)
    found = conform("official", ["task_arithmetic", "ties"], path=str(tmp_path))
    assert (found.tool, found.version) == ("mlfoundations/task_vectors", "")
    (row,) = found.own
    assert row.entry == "official:task_arithmetic" and len(row.equal) + len(row.close) == 8 and found.ok, found.text()


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_checkout_of_something_else(tmp_path):
    with pytest.raises(UsageError, match="is a checkout of no repository that is known: prateeky2806/ties-merging"):
        conform("official", ["ties"], path=str(tmp_path))


def test_what_was_not_asked_is_told():
    found = Conformance("toy", "1", own=[Row("ties", "toy:ties", "toy:ties", skipped={"a": "no", "b": "no", "c": "never"})])
    assert found.not_asked() == ["toy:ties: 2 of 3 cases not asked: no", "toy:ties: 1 of 3 cases not asked: never"]
    assert found.text().splitlines()[-2:] == found.not_asked() and found.ok


# --- Installed tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tool, module", [("mergekit", "mergekit"), ("peft", "peft"), ("sd_mecha", "sd_mecha"), ("fusion_bench", "fusion_bench")]
)
def test_what_is_said_of_a_tool_holds(tool, module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{tool} is not installed")
    found = conform(tool)
    assert found.version and found.ok and any(row.equal or row.close for row in found.own), found.text()


def test_a_function_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("def average(models, base, **parameters):\n    return models[0]\n")
    monkeypatch.chdir(tmp_path)
    (row,) = conform("mine_alone:average", ["linear"]).papers
    assert row.verdict == "unknown difference" and row.equal
