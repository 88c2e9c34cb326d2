"""What the vectors say of the pages: which sentence each tests, what every step gives; and the facts of the collection."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from refmerge import pages, testing
from refmerge.cli import main
from refmerge.conform import conform
from refmerge.errors import UsageError
from refmerge.explain import explain
from tests import matrix
from tests.test_vectors import CASES, DOCUMENTS, VECTORS, violations

# --- From case to page ------------------------------------------------------------------------------------------------

MAPPED = matrix.mapped()


def test_every_method_is_mapped():
    assert set(MAPPED) == set(DOCUMENTS), "[cases] in tests/vector_cases/<method>.toml is missing"


@pytest.mark.parametrize("method", MAPPED)
def test_every_step_and_edge_sentence_has_a_case_or_a_reason(method):
    tested, untested = matrix.tested(method), MAPPED[method]
    bare = [key for key, ids in tested.items() if not ids and key not in untested and key != "given"]
    assert not bare, f"no case and no reason in tests/vector_cases/{method}.toml: {bare}"
    assert not (both := [key for key in untested if tested[key]]), f"a case as well as a reason that there is none: {both}"
    lost = [case.id for case in matrix.own(method) if not case.page]
    assert not lost, f"[cases] in tests/vector_cases/{method}.toml does not say what these test: {lost}"


@pytest.mark.parametrize("method", MAPPED)
def test_what_the_other_entries_cases_test_is_on_the_page(method):
    page = pages.page(method)
    for case in testing.vectors(method):
        assert all(page.place(words) for words in case.page), case.id


def test_the_matrix_is_current():
    assert (VECTORS / "matrix.md").read_text(encoding="utf-8") == matrix.matrix(), "python -m tests.matrix"


def test_places_of_a_page():
    page = pages.page("ties")
    lines = page.text.splitlines()
    assert [p.key for p in page.places][:5] == ["given", "step 1", "step 2", "step 3", "step 4"]
    for place in page.places:
        assert place.text.split()[0] in lines[place.line - 1]
    assert page.place("density 1").text == "density 1 trims nothing."
    for words, count in (("A ", 3), ("Nothing", 0)):
        with pytest.raises(UsageError, match=f"page ties: '{words}' begins {count} of its steps and edge sentences"):
            page.place(words)


# --- Steps ------------------------------------------------------------------------------------------------------------

STAGED = [case for case in CASES if case.stages]


@pytest.mark.parametrize("case", STAGED, ids=lambda case: case.id)
def test_refmerge_goes_through_the_same_steps(case):
    """Its own trace has the value of each step, and the last step's is what the case expects."""
    ((name, expect),) = case.expect.items()
    given: dict[str, Any] = case.options | {"name": name, "base": None if case.base is None else case.base[name]}
    if case.stats is not None:
        keys = {key: "" if key == name else key.rpartition(".")[2] for one in case.stats for key in one}
        given["stats"] = [{keys[key]: x for key, x in one.items()} for one in case.stats]
    trace = {
        step.number: step.values | ({} if step.result is None else {"result": step.result})
        for step in explain(case.entry, models=[x[name] for x in case.models], **given, **case.params)
    }
    titles = dict(pages.page(case.entry).steps)
    for stage in case.stages:
        assert stage.title == titles[stage.step]
        assert stage.values.keys() <= trace[stage.step].keys(), f"step {stage.step} has {sorted(trace[stage.step])}"
    assert not (first := testing.first_differing(case, trace)), first
    testing.assert_close(case.stages[-1].values["result"], expect, case.tolerance)


def ties_with_steps(models, base, *, density=0.2, lambda_=1.0, elect=None):
    """Somebody's TIES of one tensor, which shows its steps. elect: how it elects a sign, where that is wrong."""
    (name,) = base
    tau = [model[name].astype(float) - base[name] for model in models]
    k = int(density * tau[0].size)
    kept = [np.isin(np.arange(x.size), np.argsort(-abs(x.ravel()), kind="stable")[:k]).reshape(x.shape) for x in tau]
    trimmed = [np.where(m, x, 0.0) for m, x in zip(kept, tau)]
    with np.errstate(invalid="ignore"):
        gamma = (elect or (lambda deltas: np.sign(sum(deltas))))(trimmed)
        agree = [np.where(gamma * x > 0, x, 0.0) for x in trimmed]
    mean = sum(agree) / np.maximum(sum(x != 0 for x in agree), 1)
    stages = {1: {"tau": tau}, "2": {"tau": trimmed}, 3: {"gamma": gamma.tolist()}}
    return {name: (base[name] + lambda_ * mean).astype(base[name].dtype)}, stages


def by_count(models, base, **params):
    """TIES in which each model has one vote: a wrong election."""
    return ties_with_steps(models, base, **params, elect=lambda deltas: np.sign(sum(np.sign(x) for x in deltas)))


FIRST = "first differing step: 3, elect sign (gamma, entry 0: 1.0 where -1.0 is right)"


def test_check_names_the_first_differing_step():
    passed = testing.check(ties_with_steps, "ties").passed
    assert {case.id for case in STAGED if case.entry == "ties"} <= set(passed), "right, with its steps"
    report = testing.check(by_count, "ties")
    (wrong,) = (failure for failure in report.failures if failure.case.id == "ties-vote-by-count")
    assert wrong.message.endswith(FIRST) and FIRST in str(report)
    assert "  of the page: step 3\n" in str(wrong)
    nothing = next(f for f in report.failures if f.case.id == "ties-nan-is-largest")
    assert "first differing" not in nothing.message, "a case without steps"


def test_steps_are_compared_as_the_caller_asks():
    case = next(case for case in STAGED if case.id == "ties-by-hand")
    off = {2: {"tau": [[8.0, -4.0, 0.0, 0.0], [4.0, 0.25, -6.0, np.nan]]}}
    for tolerance, entry in ((None, "entry 1: 0.25 where 0.0"), (0.125, "entry 3: nan where 0.0")):
        assert testing.first_differing(case, off, tolerance).what == f"tau of model 1, {entry} is right"
    assert testing.first_differing(case, {"2": {"tau": off[2]["tau"][:1] * 2}}, np.inf) is None
    assert testing.first_differing(case, {9: {"tau": 1}, 1: {"sigma": 1}}) is None


def test_conform_names_it_in_each_form(tmp_path):
    found = conform(by_count, ["ties"])
    (row,) = found.papers
    step = {"step": 3, "title": "elect sign", "what": "gamma, entry 0: 1.0 where -1.0 is right"}
    assert json.loads(json.dumps(found.told()))["papers"][0]["differs"]["ties-vote-by-count"]["step"] == step
    for text in (found.text(), found.html()):
        assert "first differing step: 3, elect sign" in text
    assert FIRST in row.off["ties-vote-by-count"][0] and FIRST in found.junit()
    without = conform(lambda models, base, **params: by_count(models, base, **params)[0], ["ties"])
    assert not without.papers[0].steps and "first differing" not in without.text() + json.dumps(without.told())


COMMAND = """
import base64, json, struct, sys
print(json.dumps({"tool": "toy", "version": "1", "entries": ["ties"]}), flush=True)
for line in sys.stdin:
    q = json.loads(line)
    if q["id"] != "ties-vote-by-count":
        print(json.dumps({"id": q["id"], "unsupported": "another"}), flush=True)
        continue
    array = lambda x: {"dtype": "F32", "shape": [1], "data": base64.b64encode(struct.pack("<f", x)).decode()}
    stages = STAGES
    print(json.dumps({"id": q["id"], "tensors": {"x": array(1.0)}, "stages": stages}), flush=True)
"""


@pytest.mark.parametrize(
    "stages, status, said",
    [
        ('{"2": {"tau": [array(1.0), [1.0], 1]}}', 1, "step: 2, trim (tau of model 2, entry 0: 1.0 where -3.0 is right)"),
        ('{"2": {"tau": [1, 1, -3]}, "3": {"gamma": [1]}}', 1, FIRST),
        ('{"2": {"tau": [1, 1]}}', 1, "(tau: a list of 2 where 3 is right)"),
        ('{"2": {"tau": 1}}', 1, "(tau: no list, where one of 3 is right)"),
        ('{"3": {"gamma": ["-"]}}', 1, "(gamma: no numbers)"),
        ('{"3": {"gamma": [1, 1]}}', 1, "(gamma: of size 2 where 1 is right)"),
        ("[]", 2, "stages of ties-vote-by-count are not step -> name -> array or list"),
        ('{"2": [1]}', 2, "stages of ties-vote-by-count are not step -> name -> array or list"),
    ],
)
def test_a_command_shows_its_steps(stages, status, said, tmp_path):
    (tmp_path / "toy.py").write_text(COMMAND.replace("STAGES", stages))
    command = ["conform", f"{sys.executable} {tmp_path / 'toy.py'}", "--command", "--method", "ties"]
    got = CliRunner().invoke(main, command)
    assert got.exit_code == status and said in got.output, got.output


# --- The collection ---------------------------------------------------------------------------------------------------

COLLECTION = json.loads((VECTORS / "collection.json").read_text(encoding="utf-8"))


def test_the_collection_follows_its_schema_and_is_counted():
    schema = json.loads((VECTORS / "collection.schema.json").read_text(encoding="utf-8"))
    assert not violations(COLLECTION, schema)
    assert violations(COLLECTION | {"version": "1.0"}, schema) and violations(COLLECTION | {"tests": 0}, schema)
    assert matrix.collection() == COLLECTION, "python -m tests.matrix"
    assert testing.version() == COLLECTION["version"]


def test_errata_are_of_tests_that_stand():
    ids = {case.id for case in CASES}
    for erratum in COLLECTION["errata"]:
        assert set(erratum["ids"]) <= ids, erratum


def test_every_repository_has_its_licence():
    ways: dict[str, set[str]] = {}
    for case in CASES:
        if "repository" in case.source:
            ways.setdefault(case.source["repository"], set()).add(case.source["how"])
    assert COLLECTION["licences"].keys() == ways.keys()
    for repository, stated in COLLECTION["licences"].items():
        assert (stated["licence"] == "none stated") == ("where" not in stated), repository
        ran = "ran" in ways[repository]
        assert stated["taken"] == ("outputs of running it, no code" if ran else "its rules, worked out by hand, no code")
