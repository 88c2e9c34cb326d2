"""Loss barriers: by hand, as laws, and refusals; and the picture of the page."""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import InputError, UsageError, registry
from refmerge.checkpoint import save
from refmerge.plots import draw_paths, ticks
from refmerge.procedures.measures.loss_barrier import barrier_of

loss_barrier = registry.procedure("loss_barrier")


def well(m):
    """(x^2 - 1)^2: minima at -1 and 1, and a ridge of 1 between them."""
    return float((m["x"][0] ** 2 - 1) ** 2)


LEFT, RIGHT = {"x": np.array([-1.0])}, {"x": np.array([1.0])}


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_a_double_well():
    found = loss_barrier([LEFT, RIGHT], well, points=5)
    assert found.t == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.losses == (0.0, 0.5625, 1.0, 0.5625, 0.0)  # x = -1/2: (1/4 - 1)^2
    assert found.excess == found.losses
    assert (found.barrier, found.at) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("losses", "reference", "barrier", "at"),
    [
        ((1, 4, 3), "line", 2.0, 0.5),
        ((1, 4, 3), "mean", 2.0, 0.5),
        ((1, 4, 3), "max", 1.0, 0.5),
        ((1, 2, 3), "line", 0.0, 0.0),  # the first of equal ones
        ((1, 2, 3), "mean", 1.0, 1.0),
        ((1, 2, 3), "max", 0.0, 1.0),
        ((3, 0, 3), "line", 0.0, 0.0),
        ((3, 5, 5, 3), "line", 2.0, 1 / 3),
    ],
)
def test_references(losses, reference, barrier, at):
    t = [i / (len(losses) - 1) for i in range(len(losses))]
    found = barrier_of(t, losses, reference=reference)
    assert (found.barrier, found.at) == (barrier, at)
    turned = barrier_of(t, [-x for x in losses], reference=reference, better="higher")
    assert (turned.barrier, turned.at, turned.excess) == (barrier, at, found.excess)


def test_a_polygon_has_its_corners_once():
    seen = []
    found = loss_barrier([LEFT, RIGHT, LEFT], lambda m: seen.append(m["x"].item()) or 0.0, points=3)
    assert seen == [-1.0, 0.0, 1.0, 0.0, -1.0]
    assert found.t == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_a_path_that_is_a_function():
    found = loss_barrier(lambda t: {"x": np.array([t])}, lambda m: float(m["x"][0] * (1 - m["x"][0])), points=3)
    assert (found.losses, found.barrier) == ((0.0, 0.25, 0.0), 0.25)


def test_points_are_what_a_merge_would_be():
    """Rounded once to the models' dtype, and at the ends the models' own arrays."""
    one, other = {"x": np.array([0.1], np.float32)}, {"x": np.array([0.3], np.float32)}
    seen = []
    loss_barrier([one, other], lambda m: seen.append(m) or 0.0, points=3)
    assert seen[0] is one and seen[2] is other
    assert seen[1]["x"].dtype == np.float32


def test_checkpoints_on_disk(tmp_path):
    for name, model in (("a", LEFT), ("b", RIGHT)):
        save(model, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert loss_barrier(paths, well) == loss_barrier([LEFT, RIGHT], well)


def test_what_is_not_finite():
    t = (0.0, 0.5, 1.0)
    assert math.isnan(barrier_of(t, (0, math.nan, 0)).barrier) and barrier_of(t, (0, math.nan, 0)).at == 0.5
    assert barrier_of(t, (0, math.inf, 0)).barrier == math.inf
    assert math.isnan(barrier_of(t, (math.inf, 0, 0)).barrier)
    assert barrier_of(t, (math.inf, 0, 0), reference="max").excess[1] == -math.inf


@pytest.mark.parametrize(
    ("path", "options", "error", "said"),
    [
        ([LEFT], {}, UsageError, "two models or more"),
        (LEFT, {}, UsageError, "two models or more"),
        ([LEFT, RIGHT], {"points": 1}, UsageError, "points = 1"),
        ([LEFT, RIGHT], {"points": 2.0}, UsageError, "points = 2.0"),
        ([LEFT, RIGHT], {"reference": "middle"}, UsageError, "'line', 'mean', 'max'"),
        ([LEFT, RIGHT], {"better": "more"}, UsageError, "better = 'more'"),
        ([LEFT, {"y": np.ones(1)}], {}, InputError, "missing"),
        ([LEFT, {"x": np.ones(2)}], {}, InputError, "'x'"),
        ([{"n": np.array([1])}, {"n": np.array([2])}], {}, InputError, "integers="),
    ],
)
def test_refusals_come_before_the_first_loss(path, options, error, said):
    def loss(m):
        raise AssertionError("scored")

    with pytest.raises(error, match=said):
        loss_barrier(path, loss, **options)


def test_a_loss_is_a_number():
    for value in ("3", None, [1.0, 2.0]):
        with pytest.raises(UsageError, match="a loss is a number"):
            loss_barrier([LEFT, RIGHT], lambda m, value=value: value)
    assert loss_barrier([LEFT, RIGHT], lambda m: np.float32(2)).barrier == 0.0


def test_integers_of_the_first_model():
    one, other = {**LEFT, "n": np.array([1])}, {**RIGHT, "n": np.array([2])}
    seen = []
    loss_barrier([one, other], lambda m: seen.append(int(m["n"][0])) or 0.0, points=3, integers="base")
    assert seen == [1, 1, 2]  # the ends are the models


# --- Laws -------------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-100, 100, width=32)
LOSSES = st.lists(NUMBERS, min_size=2, max_size=8)


def grid(losses):
    return [i / (len(losses) - 1) for i in range(len(losses))]


@given(LOSSES)
def test_references_are_ordered(losses):
    line, mean, most = (barrier_of(grid(losses), losses, reference=r).barrier for r in ("line", "mean", "max"))
    assert 0 <= most <= line + 1e-9 and most <= mean
    assert mean >= abs(losses[0] - losses[-1]) / 2 - 1e-9


@given(LOSSES, NUMBERS, NUMBERS, st.floats(0.01, 10))
def test_linear_functions_add_nothing_and_factors_scale(losses, constant, slope, factor):
    t = grid(losses)
    plain = barrier_of(t, losses).barrier
    changed = barrier_of(t, [factor * x + constant + slope * u for u, x in zip(t, losses)]).barrier
    assert changed == pytest.approx(factor * plain, abs=1e-6, rel=1e-6)


@given(LOSSES)
def test_the_way_back_has_the_same_barrier(losses):
    for reference in ("line", "mean", "max"):
        there = barrier_of(grid(losses), losses, reference=reference).barrier
        assert barrier_of(grid(losses), losses[::-1], reference=reference).barrier == pytest.approx(there, abs=1e-9)


@given(st.integers(0, 1000), st.integers(2, 9))
def test_convex_losses_have_no_barrier(seed, points):
    draw = np.random.default_rng(seed)
    a, b = ({"x": draw.standard_normal(4)} for _ in range(2))
    half = draw.standard_normal((4, 4))
    found = loss_barrier([a, b], lambda m: float(np.sum((half @ m["x"]) ** 2) + np.abs(m["x"]).sum()), points=points)
    assert found.barrier <= 1e-9


@given(st.integers(0, 1000), st.integers(2, 6))
def test_more_points_never_lower_the_barrier(seed, steps):
    draw = np.random.default_rng(seed)
    a, b = ({"x": draw.standard_normal(3)} for _ in range(2))
    bumpy = lambda m: float(np.sum(np.sin(5 * m["x"])))  # noqa: E731
    few, many = (loss_barrier([a, b], bumpy, points=n * steps + 1).barrier for n in (1, 2))
    assert many >= few - 1e-12


# --- The plot, and the picture of the page ----------------------------------------------------------------------------


def picture():
    a = {"in": np.array([[1.0], [-1.0]]), "out": np.array([[1.0, 1.0]])}
    b = {"in": -a["in"], "out": a["out"]}
    x = np.array([[-1.0], [1.0]])

    def loss(m):
        return float(np.mean((np.maximum(x @ m["in"].T, 0) @ m["out"].T - 1) ** 2))

    paths = {"units exchanged": loss_barrier([a, b], loss), "units put back": loss_barrier([a, a], loss)}
    return draw_paths(paths, "Two networks that compute the same")


def test_the_picture_is_what_is_drawn():
    """To draw it again: write picture() to spec/measures/loss_barrier.svg."""
    stored = (resources.files("refmerge.spec") / "measures" / "loss_barrier.svg").read_text(encoding="utf-8")
    assert stored == picture()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.3, 2.6, [0.5, 1.0, 1.5, 2.0, 2.5]), (-3.0, 3.0, [-2.0, 0.0, 2.0])],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_a_plot_is_well_formed(losses):
    from xml.etree import ElementTree

    text = draw_paths({"a < b & c": barrier_of(grid(losses), losses)}, "x & y")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "nan" not in text


def test_a_plot_leaves_out_what_is_not_finite():
    text = draw_paths({"": barrier_of((0, 0.25, 0.5, 0.75, 1), (0.0, 1.0, math.inf, 1.0, 0.0))}, "x")
    assert text.count('stroke-width="2"') == 2 and "inf" not in text.replace("barrier inf", "")
    with pytest.raises(UsageError, match="finite"):
        draw_paths({"": barrier_of((0, 1), (math.nan, math.nan))}, "x")
