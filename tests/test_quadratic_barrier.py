"""Predicted barriers: by hand, and exact for the losses for which they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmerge import InputError, UsageError, registry

quadratic_barrier = registry.procedure("quadratic_barrier")
loss_barrier = registry.procedure("loss_barrier")
LEFT, RIGHT = {"x": np.array([-1.0])}, {"x": np.array([1.0])}


def well_slope(m):
    return {"x": 4 * m["x"] * (m["x"] ** 2 - 1)}


def test_a_saddle_by_hand():
    one, two = {"x": np.array([1.0]), "y": np.array([-1.0])}, {"x": np.array([-1.0]), "y": np.array([1.0])}
    found = quadratic_barrier([one, two], lambda m: {"x": m["y"], "y": m["x"]}, layerwise=True)
    assert (found.curvature, found.barrier) == (-8.0, 1.0)  # slopes 4 and -4
    assert found.layers == {"x": ((0.0, 0.0), (0.0, 0.0)), "y": ((0.0, 0.0), (0.0, 0.0))}


def test_a_double_well():
    assert quadratic_barrier([LEFT, RIGHT], well_slope).barrier == 0.0
    middle = quadratic_barrier([LEFT, RIGHT], well_slope, step=2.0**-10)
    assert middle.curvature == pytest.approx(-16, rel=1e-5)
    assert quadratic_barrier([LEFT, RIGHT], well_slope, step=0.5).barrier == pytest.approx(1.5)  # 2 (1 - 1/4)


def test_what_the_gradient_lacks_does_not_count():
    models = [{**m, "n": np.array([3])} for m in (LEFT, RIGHT)]
    assert quadratic_barrier(models, lambda m: {"x": -m["x"]}).curvature == -4.0
    assert quadratic_barrier(models, lambda m: {}).curvature == 0.0


def test_nan():
    found = quadratic_barrier([LEFT, RIGHT], lambda m: {"x": np.array([np.nan])})
    assert math.isnan(found.curvature) and math.isnan(found.barrier)


@pytest.mark.parametrize(
    ("gradient", "options", "said"),
    [
        (lambda m: {"y": m["x"]}, {}, "'y' and the models have none"),
        (lambda m: {"x": np.ones(2)}, {}, "'x' has another shape"),
        (well_slope, {"step": 0.0}, "step = 0.0"),
        (well_slope, {"at": 0.9, "step": 0.5}, "not within"),
        (well_slope, {"layers": {"z": ["z"]}}, "no tensor 'z'"),
    ],
)
def test_refusals(gradient, options, said):
    with pytest.raises(UsageError, match=said):
        quadratic_barrier([LEFT, RIGHT], gradient, **options)


def test_models_that_do_not_fit():
    with pytest.raises(InputError, match="'x'"):
        quadratic_barrier([LEFT, {"x": np.ones(2)}], well_slope)


@st.composite
def quadratics(draw):
    """Two models, a quadratic loss, its gradient and its Hessian."""
    seed = np.random.default_rng(draw(st.integers(0, 1000)))
    H = seed.standard_normal((5, 5))
    H, c = H + H.T, seed.standard_normal(5)
    models = [{"a.w": seed.standard_normal(2), "b.w": seed.standard_normal(3)} for _ in range(2)]

    def vector(m):
        return np.concatenate([m["a.w"], m["b.w"]])

    def loss(m):
        return float(vector(m) @ H @ vector(m) / 2 + c @ vector(m))

    def gradient(m):
        g = H @ vector(m) + c
        return {"a.w": g[:2], "b.w": g[2:]}

    return models, loss, gradient, H, vector(models[1]) - vector(models[0])


@given(quadratics(), st.floats(0.1, 1), st.floats(0, 1))
def test_exact_for_quadratic_losses(case, step, place):
    models, loss, gradient, H, D = case
    at = step / 2 + place * (1 - step)
    at = min(max(at, step / 2), 1 - step / 2)
    if at - step / 2 < 0 or at + step / 2 > 1:
        return
    found = quadratic_barrier(models, gradient, at=at, step=step, layerwise=True)
    assert found.curvature == pytest.approx(D @ H @ D, rel=1e-6, abs=1e-6)
    assert found.barrier == pytest.approx(loss_barrier(models, loss).barrier, rel=1e-6, abs=1e-6)
    own = (D[:2] @ H[:2, :2] @ D[:2], D[2:] @ H[2:, 2:] @ D[2:])
    for label, expected in zip(("a", "b"), own):
        for curvature, barrier in found.layers[label]:
            assert curvature == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert barrier == max(0.0, -curvature / 8)


@given(quadratics())
def test_laws(case):
    models, _, gradient, _, _ = case
    found = quadratic_barrier(models, gradient)
    assert quadratic_barrier(models[::-1], gradient).curvature == pytest.approx(found.curvature, rel=1e-9, abs=1e-9)
    scaled = quadratic_barrier(models, lambda m: {k: 3 * g + 1 for k, g in gradient(m).items()})
    assert scaled.curvature == pytest.approx(3 * found.curvature, rel=1e-9, abs=1e-9)
    assert quadratic_barrier([models[0]] * 2, gradient).curvature == 0.0


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_the_middle_of_a_cubic(k):
    loss = lambda m: float(k[0] + k[1] * m["x"][0] + k[2] * m["x"][0] ** 2 + k[3] * m["x"][0] ** 3)  # noqa: E731
    gradient = lambda m: {"x": k[1] + 2 * k[2] * m["x"] + 3 * k[3] * m["x"] ** 2}  # noqa: E731
    models = [{"x": np.array([-1.0])}, {"x": np.array([2.0])}]
    excess = loss_barrier(models, loss, points=3).excess[1]
    assert -quadratic_barrier(models, gradient).curvature / 8 == pytest.approx(excess, abs=1e-9)
