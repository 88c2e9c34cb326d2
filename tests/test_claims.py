"""The page of the papers' claims is what its stored numbers give, and these are what the command measures."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest

from refmerge.adaptive import Composition, blocks, task_vectors
from refmerge.demo import claims
from refmerge.demo.claims import __main__ as command
from refmerge.demo.claims import page, papers, table, world
from refmerge.demo.claims.claim import Check, Claim
from refmerge.stats import Statistics

SPEC = resources.files("refmerge.spec")
STORED = json.loads((SPEC / "results.json").read_text(encoding="utf-8"))
CHEAP = ["table.linear", "table.ties", "table.fisher", "averaging.line", "task_vectors.masks"]
TOLERANCE = 3.0  # per cent: 18 of 599 images, for another BLAS


def test_the_page_is_what_the_stored_numbers_give():
    assert (SPEC / "results.md").read_text(encoding="utf-8") == page.page(STORED), (
        "python -m refmerge.demo.claims spec --page"
    )


def test_every_seed_has_every_number():
    assert STORED["seeds"] == claims.SEEDS
    for row in STORED["table"].values():
        assert len(row) == len(claims.SEEDS) and all(0 <= x <= 100 for found in row for x in found if x is not None)
    for numbers in STORED["claims"].values():
        assert all(len(x) == len(claims.SEEDS) and np.isfinite(x).all() for x in numbers.values())


def test_what_fails_is_said_plainly():
    text = page.page(STORED)
    found = page.tried(STORED)
    assert len(found) > 60
    for claim, numbers in found:
        answer = page.verdict(claim, numbers)
        plain = f"- **{claim.system}**, {answer}. {claim.says}. Perhaps: {claim.why}"
        assert (plain in text) == (not answer.startswith("yes")) and (claim.why or answer.startswith("yes"))


def test_claims_are_of_numbers_that_there_are():
    """A key that is spelt otherwise would leave its claim out of the page."""
    shown = [claim for claim, _ in page.tried(STORED)]
    for found in papers.CLAIMS.values():
        for claim in found:
            assert claim in shown, claim.says
    rows = {row.name for row in table.ROWS}
    used = {key for found in papers.CLAIMS.values() for claim in found for key in claim.shown if claim.measure is table.best}
    assert used <= rows and len(rows) == len(table.ROWS)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the command stores of one seed and a few experiments."""
    folder = tmp_path_factory.mktemp("results")
    command.main([str(folder), "--seeds", "0", "--only", *CHEAP, "--workers", "1"])
    return folder, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_the_command_measures_what_is_stored(ran):
    _, results = ran
    place = STORED["seeds"].index(0)
    assert set(results["table"]) == {"linear", "ties", "fisher"} and set(results["claims"]) == set(CHEAP[3:])
    for name, row in results["table"].items():
        default, scale, chosen = row[0]
        stored = STORED["table"][name][place]
        assert default == pytest.approx(stored[0], abs=TOLERANCE)
        assert (scale is None) == (stored[1] is None) and (
            chosen is None or chosen == pytest.approx(stored[2], abs=TOLERANCE)
        )
    for name, numbers in results["claims"].items():
        for key, (value,) in numbers.items():
            assert value == pytest.approx(STORED["claims"][name][key][place], abs=TOLERANCE), key


def test_the_command_writes_a_page_of_what_it_measured(ran, capsys):
    folder, results = ran
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert text == page.page(results) and "| [ties](task_vectors/ties.md) |" in text and "git_rebasin" not in text
    (folder / "results.md").unlink()
    command.main([str(folder), "--page"])
    assert (folder / "results.md").read_text(encoding="utf-8") == text
    command.main(["--list"])
    assert set(CHEAP) <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "tiers"], "there is no 'tiers'"),
        (["--page"], "--page needs the folder"),
        (["nowhere"], "there is no folder nowhere"),
        ([".", "--page"], "there is no results.json"),
        (["--seeds", "-1"], "a seed is"),
        (["--workers", "0"], "at least one"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["no", "[]", "{}", '{"seeds": []}'])
def test_numbers_that_are_none_are_refused(text, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path), "--page"])
    assert stopped.value.code == 2 and "is not what this command writes" in capsys.readouterr().err
    assert not (tmp_path / "results.md").exists()


def test_verdicts_by_hand():
    claim = Claim("ties", "", "", lambda seed: {}, [Check("a", "b", -1), Check("a", 0.5)])
    assert [str(check) for check in claim.checks] == ["a > b - 1", "a > 0.5"] and claim.shown == ["a", "b"]
    assert (
        claim.holds({"a": 1.0, "b": 1.5}) and not claim.holds({"a": 1.0, "b": 2.0}) and not claim.holds({"a": 0.5, "b": 0})
    )
    assert Check("a", "b", equal=True).holds({"a": 1.0, "b": 1.0}) and str(Check("a", "b", equal=True)) == "a >= b"
    b = [0.0] * 5
    assert page.verdict(claim, {"a": [1.0] * 5, "b": b}) == "yes, 5 of 5"
    assert page.verdict(claim, {"a": [1.0] * 2 + [0.0] * 3, "b": b}) == "unclear, 2 of 5"
    assert page.verdict(claim, {"a": [1.0] + [0.0] * 4, "b": b}) == "no, 1 of 5"
    assert page.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00" and page.spread([90.0]) == "90.0 ± 0.0"


def test_tasks_on_a_picture_by_hand():
    picture = np.zeros((1, 8, 8))
    picture[0, 1, 0] = 1.0  # second row, first column
    data = world.Split(picture.reshape(1, 64), np.array([3]))
    where = {}
    for name in ("turned", "mirrored", "shifted", "inverted", "thick"):
        x = world.TASKS[name](data, np.random.RandomState(0)).x.reshape(8, 8)
        where[name] = sorted(zip(*(axis.tolist() for axis in np.nonzero(x if name != "inverted" else 1 - x))))
    assert where == {
        "turned": [(7, 1)], "mirrored": [(1, 7)], "shifted": [(1, 2)], "inverted": [(1, 0)], "thick": [(1, 0), (2, 0)],
    }  # fmt: skip
    assert len(world.TASKS["0 to 4"](data, np.random.RandomState(0))) == 1
    assert len(world.TASKS["5 to 9"](data, np.random.RandomState(0))) == 0


def test_no_image_is_in_two_parts():
    data = world.images()
    assert (len(data.train), len(data.val), len(data.test)) == (999, 199, 599)


def test_statistics_are_those_of_refmerge_stats():
    random = np.random.RandomState(0)
    net = world.initial(random, {"blocks.0": (5, 4), "head": (4, 3)})
    data = world.Split(random.normal(size=(6, 5)), random.randint(3, size=6))
    found = world.collect(net, data)
    hidden = np.maximum(data.x @ net["blocks.0.weight"].T + net["blocks.0.bias"], 0)
    z = hidden @ net["head.weight"].T + net["head.bias"]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    back = np.eye(3)[None] - p[:, None]
    below = (back @ net["head.weight"]) * (hidden > 0)[:, None]
    expected = Statistics()
    expected.gram("head", hidden)
    expected.fisher("head", hidden, back, p)
    expected.fisher("blocks.0", data.x, below, p)
    for n in range(6):
        for c in range(3):
            expected.gradient_gram("blocks.0", np.sqrt(3 * p[n, c]) * below[n, c][None])
    for name in expected:
        assert np.allclose(found[name], expected[name], atol=1e-5), name  # and the ridge


def test_gradients_of_the_entropy_and_of_coefficients():
    random = np.random.RandomState(1)
    base, other = (world.initial(random, {"blocks.0": (5, 4), "head": (4, 3)}) for _ in range(2))
    x = random.normal(size=(6, 5))
    start, tau = task_vectors([other, base], base, "test")
    composition = Composition(start, tau, *blocks(tau[0], "tensor", "test"))
    c = np.full(composition.shape, 0.3)
    value, found = table.uncertain(composition.theta(c), x)
    slopes = table.by_coefficient(composition, found)
    assert np.allclose(slopes, composition.contract(found))
    for place in np.ndindex(c.shape):
        moved = [c.copy(), c.copy()]
        for k, h in enumerate((1e-6, -1e-6)):
            moved[k][place] += h
        rise = (
            table.uncertain(composition.theta(moved[0]), x)[0] - table.uncertain(composition.theta(moved[1]), x)[0]
        ) / 2e-6
        assert slopes[place] == pytest.approx(rise, abs=1e-7)
    assert value == pytest.approx(float(table.entropy(world.mlp.forward(composition.theta(c), x))))
