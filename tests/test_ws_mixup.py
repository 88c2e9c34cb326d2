"""Mixup in weight space: the authors' result, and laws.

tests/data/ws_mixup.npz holds what AvivSham/deep-weight-space-augmentations@429e372 gave, in `augmentations.py`, class
ReBasinMixUpAugmentation, for two networks of 2, 8, 8 and 3 units: both, the alpha that was drawn, the order of the
matching's visits, the permutations and the result, each under the name that it had there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmerge import UsageError, registry
from refmerge.nets import mlp
from refmerge.procedures.alignment.git_rebasin import distance
from refmerge.symmetry import Spec, architectures

ws_mixup = registry.procedure("ws_mixup")
OFFICIAL = np.load(Path(__file__).parent / "data" / "ws_mixup.npz")
FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def official(group: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(group + "/"): OFFICIAL[key] for key in OFFICIAL.files if key.startswith(group + "/")}


def two(seed: int):
    a, b = (mlp.init(np.random.default_rng(seed + k), (3, 5, 2)) for k in range(2))
    return a, b, architectures.mlp(a)


def test_the_authors_result():
    spec = Spec({
        "seq.0.weight": ("P_0", None), "seq.1.weight": ("P_1", "P_0"), "seq.0.bias": ("P_0",), "seq.1.bias": ("P_1",),
        "seq.2.weight": (None, "P_1"), "seq.2.bias": (None,),
    })  # fmt: skip
    order = [[f"P_{i}" for i in turn] for turn in OFFICIAL["stat0/order"]]
    mixed = ws_mixup(official("model0"), official("model1"), spec, alpha=float(OFFICIAL["alpha"]), order=order)
    for name, p in official("perm").items():
        assert np.array_equal(mixed.permutations[name], p)
    for name, x in official("out").items():
        np.testing.assert_allclose(mixed.model[name], x, rtol=2e-6, atol=1e-7)
    assert len(mixed.objective) == 1 + sum(map(len, order))


@FEW
@given(SEEDS)
def test_the_ends_of_the_line(seed):
    a, b, spec = two(seed)
    assert all(np.array_equal(ws_mixup(a, b, spec, alpha=1.0).model[name], x) for name, x in a.items())
    end = ws_mixup(a, b, spec, alpha=0.0)
    moved = spec.apply(end.permutations, b)
    assert all(np.array_equal(end.model[name], x) for name, x in moved.items())
    x = np.random.default_rng(seed).standard_normal((4, 3))
    np.testing.assert_allclose(mlp.forward(end.model, x), mlp.forward(b, x), rtol=1e-12, atol=1e-12)


@FEW
@given(SEEDS, ALPHAS)
def test_orders_of_units_do_not_matter(seed, alpha):
    a, b, spec = two(seed)
    sigma = spec.random(a, np.random.default_rng(seed))
    mixed = ws_mixup(a, b, spec, alpha=alpha)
    again = ws_mixup(a, spec.apply(sigma, b), spec, alpha=alpha)
    assert all(np.array_equal(again.model[name], x) for name, x in mixed.model.items())
    moved = ws_mixup(spec.apply(sigma, a), b, spec, alpha=alpha)
    assert all(np.array_equal(moved.model[name], x) for name, x in spec.apply(sigma, mixed.model).items())


@FEW
@given(SEEDS, ALPHAS)
def test_distances(seed, alpha):
    a, b, spec = two(seed)
    mixed = ws_mixup(a, b, spec, alpha=alpha)
    near = distance(a, b, spec, mixed.permutations)
    assert near <= distance(a, b, spec, {}) + 1e-12
    assert distance(a, mixed.model, spec, {}) == pytest.approx((1 - alpha) * near, rel=1e-9, abs=1e-12)


@FEW
@given(SEEDS)
def test_equal_networks_give_themselves(seed):
    a, _, spec = two(seed)
    mixed = ws_mixup(a, a, spec, seed=seed)
    assert all(np.allclose(mixed.model[name], x, rtol=1e-15) for name, x in a.items())


def test_draws():
    a, b, spec = two(0)
    drawn = [ws_mixup(a, b, spec, seed=seed, low=0.25, high=0.5).alpha for seed in range(50)]
    assert min(drawn) >= 0.25 and max(drawn) < 0.5 and len(set(drawn)) == 50
    assert ws_mixup(a, b, spec, low=0.5, high=0.5).alpha == 0.5


def test_without_alignment():
    a, b, spec = two(0)
    plain = ws_mixup(a, b, spec, alpha=0.5, align="none")
    assert all(np.array_equal(plain.model[name], 0.5 * x + 0.5 * b[name]) for name, x in a.items())
    mixed = ws_mixup(a, b, spec, alpha=0.5, align="random")
    moved = spec.apply(mixed.permutations, a)
    assert all(np.array_equal(mixed.model[name], 0.5 * x + 0.5 * b[name]) for name, x in moved.items())
    assert not np.array_equal(mixed.permutations["layers.0"], np.arange(5)) and plain.objective == mixed.objective == ()


def test_labels():
    a, b, spec = two(0)
    assert ws_mixup(a, b, spec, alpha=0.25, labels=[1, 0]).label == 0.25
    assert ws_mixup(a, b, spec, alpha=0.25, labels=[[1, 0], [0, 1]]).label.tolist() == [0.25, 0.75]
    assert ws_mixup(a, b, spec, alpha=0.25).label is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"align": "x"}, "align = 'x' is none of 'weights', 'none', 'random'"),
        ({"labels": [1.0]}, "1 labels: one of a and one of b"),
        ({"labels": [1.0, [1.0, 2.0]]}, "do not mix"),
        ({"order": ["x"]}, "order names"),
        ({"seed": -1}, "seed = -1 is no whole number"),
    ],
)
def test_refusals(options, said):
    a, b, spec = two(0)
    with pytest.raises(UsageError, match=said):
        ws_mixup(a, b, spec, **options)
