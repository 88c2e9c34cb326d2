"""Another project's tests, three lines each, run by the plug-in."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

HEAD = "import numpy as np, pytest, refmerge\n\n"
RIGHT = """
@pytest.mark.refmerge("wise_ft", options=("integers",))
def test_wise_ft(case):
    options = {"integers": "base", "nonfinite": "propagate"} | case.options
    return refmerge.merge(case.models, "wise_ft", base=case.base, **options, **case.params)
"""
WRONG = """
@pytest.mark.refmerge("wise_ft")
def test_wise_ft(case):
    return {k: x + (case.params.get("alpha", 0.5) * (case.models[0][k] - x)).astype(x.dtype) for k, x in case.base.items()}
"""
THEIRS = """
@pytest.mark.refmerge("linear", entry="mergekit:linear", tolerance=1e-6)
def test_linear(case, tmp_path):
    assert tmp_path.is_dir()
    return refmerge.merge(case.models, "mergekit:linear", nonfinite="propagate", **case.params)
"""


def run(tmp_path, text, *options):
    (tmp_path / "test_theirs.py").write_text(HEAD + text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    return found.returncode, found.stdout + found.stderr


def test_a_right_one_passes(tmp_path):
    status, said = run(tmp_path, RIGHT + THEIRS, "--strict-markers")
    assert status == 0, said
    assert int(re.search(r"(\d+) passed", said)[1]) > 20 and "failed" not in said


def test_a_wrong_one_is_told_why(tmp_path):
    status, said = run(tmp_path, WRONG)
    assert status == 1
    assert "wise_ft-lerp-form [WiseFtLerpForm]" in said and "refmerge.merge(" in said and "Traceback" not in said
    assert "1 skipped" in said, "integers are an option that it does not take"


def test_one_that_shows_its_steps_is_told_which_differs_first(tmp_path):
    status, said = run(
        tmp_path,
        """
@pytest.mark.refmerge("ties")
def test_ties(case):
    right = refmerge.merge(case.models, "ties", base=case.base, nonfinite="propagate", integers="base", **case.params)
    if case.id != "ties-vote-by-count":
        return right, {}
    return case.models[0], {2: {"tau": [1.0, 1.0, -3.0]}, 3: {"gamma": 1.0}}
""",
    )
    assert status == 1 and "1 failed" in said, said
    assert "first differing step: 3, elect sign (gamma, entry 0: 1.0 where -1.0 is right)" in said


@pytest.mark.parametrize(
    "mark, said",
    [
        ('"wyse_ft"', "no vectors for 'wyse_ft'"),
        ('"wise_ft", entry="peft:wise_ft"', "no vectors of wise_ft for 'peft:wise_ft' .entries: .*wise_ft"),
    ],
)
def test_a_name_that_is_none(mark, said, tmp_path):
    status, text = run(tmp_path, f"@pytest.mark.refmerge({mark})\ndef test_it(case):\n    return {{}}\n")
    assert status != 0 and re.search(said, text), text
